// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"io"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/testenv"
)

// TestAuditAndObserveBreakNothing sends what enforce would refuse through the
// two modes that only look, with the agent, without it, and after it.
func TestAuditAndObserveBreakNothing(t *testing.T) {
	require(t, "nginx", "curl")
	for _, mode := range []string{"observe", "audit"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			n, stranger := one(t)
			n.policy("shop.yaml", shopIn(mode))
			w := startNginx(t, n.group("web"), n.ns, 8080)
			n.start()
			// Under enforce this one would be refused MPTCP; here it gets it.
			server(t, n.group("stream"), n.ns, "echo", addrB+":9090", "mptcp")
			act(t, n.group("client"), n.ns, "idle").line(t)
			n.served("client", "web", "stream")
			callers := []struct {
				who, cgroup string
				ns          *testenv.Netns
				reason      string
			}{
				{"the client", n.group("client"), n.ns, ""},
				{"one whom no rule names", n.group("outcast"), n.ns, "no_rule"},
				{"nobody", n.group("nobody"), n.ns, "mtls_required"},
				{"a process outside", "", n.ns, "mtls_required"},
				{"a stranger", "", stranger, "mtls_required"},
			}
			works := func(when string, judged bool) {
				t.Helper()
				for _, c := range callers {
					from := n.mark()
					if got := code(t, c.cgroup, c.ns, webURL+"/files/hello"); got != "200" {
						t.Errorf("%s: %s got %s", when, c.who, got)
					}
					if judged && c.reason != "" {
						r := n.decided(from, c.who, func(r *record) bool { return r.Reason != "" && r.WouldDeny && r.Hook == "" })
						if r.Mode != mode {
							t.Errorf("%s: %s was judged in %s", when, c.who, r.Mode)
						}
					}
					out, err := say(t, c.cgroup, c.ns, addrB+":9090", "through MPTCP\n")
					if err != nil || out != "through MPTCP\n" {
						t.Errorf("%s: %s got %q %v from a server with MPTCP", when, c.who, out, err)
					}
				}
			}
			works("with the agent", true)
			for name, request := range map[string]string{
				"bare LF":        "GET /files/hello HTTP/1.1\nHost: x\nConnection: close\n\n",
				"an odd target":  "GET //files//hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
				"HTTP/0.9":       "GET /files/hello\r\n",
				"two Hosts like": "GET /files/./hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
			} {
				from := n.mark()
				out, err := say(t, n.group("client"), n.ns, addrB+":8080", request)
				if err != nil || !strings.HasSuffix(out, "hello\n") {
					t.Errorf("%s: got %q %v", name, out, err)
				}
				n.decided(from, name, func(r *record) bool { return r.WouldDeny })
			}
			// What nobody can read is carried too: nginx answers it itself.
			out, err := say(t, n.group("client"), n.ns, addrB+":8080", "\x00\x01 neither HTTP nor TLS\r\n\r\n")
			if err != nil || !strings.Contains(out, "nginx") {
				t.Errorf("what cannot be read got %q %v", out, err)
			}
			n.hangUp()
			n.agent.kill()
			works("after SIGKILL of the agent", false)
			n.start()
			n.served("client", "web", "stream")
			works("with the next agent", true)
			n.stop()
			works("after the agent has ended", false)
			if w.requests() == 0 {
				t.Error("this test called nobody")
			}
		})
	}
}

// TestEnforceClosesWhatWasNeverVerified changes from audit to enforce while
// connections live that no agent has ever judged.
func TestEnforceClosesWhatWasNeverVerified(t *testing.T) {
	require(t)
	t.Parallel()
	n, stranger := one(t)
	n.policy("shop.yaml", shopIn("audit"))
	server(t, n.group("stream"), n.ns, "echo", addrB+":9090")
	live := map[string]*program{}
	dial := func(who, cgroup string, ns *testenv.Netns) {
		t.Helper()
		p := act(t, cgroup, ns, "dial", addrB+":9090")
		live[who] = p
		echoes(t, who, p)
	}
	// Before any agent: no hook has seen these.
	dial("a stranger from before", "", stranger)
	dial("a client from before", n.group("client"), n.ns)
	n.start()
	n.served("client", "stream")
	// And these were judged, but let through only because nothing is enforced.
	dial("a stranger", "", stranger)
	dial("nobody", n.group("nobody"), n.ns)
	dial("the client", n.group("client"), n.ns)
	for who, p := range live {
		echoes(t, who, p)
	}
	n.change(func() { n.policy("shop.yaml", shopIn("enforce")) })
	for who, p := range live {
		if who == "the client" {
			continue // enforce allows it
		}
		ended(t, who, p)
	}
	if out, err := say(t, n.group("client"), n.ns, addrB+":9090", "hello\n"); err != nil || out != "hello\n" {
		t.Errorf("the client may, and got %q %v", out, err)
	}
	if out, err := say(t, "", stranger, addrB+":9090", "hello\n"); err == nil || out != "" {
		t.Errorf("a stranger got %q %v", out, err)
	}
}

// echoes checks that a connection lives.
func echoes(t *testing.T, who string, p *program) {
	t.Helper()
	if _, err := io.WriteString(p.in, "ping\n"); err != nil {
		t.Fatalf("%s: %v", who, err)
	}
	if got := p.line(t); got != "ping" {
		t.Fatalf("%s: got %q %s", who, got, p.errs)
	}
}

// ended waits for a connection's end.
func ended(t *testing.T, who string, p *program) {
	t.Helper()
	eventually(t, who+" to be cut off", func() string {
		select {
		case <-p.done:
			return ""
		default:
			return "it lives"
		}
	})
}

// TestCeilingSoftens starts enforce's policies under a softer ceiling.
func TestCeilingSoftens(t *testing.T) {
	require(t, "nginx", "curl")
	for _, ceiling := range []string{"audit", "observe"} {
		t.Run(ceiling, func(t *testing.T) {
			t.Parallel()
			n, stranger := one(t)
			n.policy("shop.yaml", shopIn("enforce"))
			n.extra = "modeCeiling: " + ceiling
			startNginx(t, n.group("web"), n.ns, 8080)
			n.start()
			act(t, n.group("client"), n.ns, "idle").line(t)
			n.served("client", "web")
			from := n.mark()
			for who, ns := range map[string]*testenv.Netns{"one of this node": n.ns, "a stranger": stranger} {
				if got := code(t, "", ns, webURL+"/files/hello"); got != "200" {
					t.Errorf("%s got %s", who, got)
				}
			}
			n.decided(from, "what enforce would have refused", func(r *record) bool { return r.WouldDeny && r.Reason == "mtls_required" && r.Mode == ceiling })
			s := n.await("show the ceiling", func(s *controlpb.StatusReply) bool { return s.GetModeCeiling() == ceiling })
			for _, p := range s.GetPolicies() {
				if p.GetMode() != "enforce" || p.GetEffectiveMode() != ceiling {
					t.Errorf("%s %s: %s, in effect %s", p.GetKind(), p.GetName(), p.GetMode(), p.GetEffectiveMode())
				}
			}
			if out := n.mustRun("status"); !strings.Contains(out, "MODE CEILING "+strings.ToUpper(ceiling)) {
				t.Errorf("status does not say it loudly: %s", out)
			}
		})
	}
}
