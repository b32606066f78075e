// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
)

// refused says whether the directory's set is refused for want and the last
// good one is in force.
func refusedFor(want string) func(*controlpb.StatusReply) bool {
	return func(s *controlpb.StatusReply) bool {
		p := s.GetPolicySet()
		return p.GetLastGood() && strings.Contains(strings.Join(p.GetErrors(), "\n"), want)
	}
}

// metric reads a metric without labels of the node.
func (n *node) metric(name string) float64 {
	n.t.Helper()
	out, err := curl(n.t, "", n.ns, "http://127.0.0.1:15020/metrics")
	if err != nil {
		n.t.Fatal(err)
	}
	for line := range strings.Lines(out) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+" "); ok {
			f, err := strconv.ParseFloat(value, 64)
			if err != nil {
				n.t.Fatal(err)
			}
			return f
		}
	}
	n.t.Fatalf("no metric %s", name)
	return 0
}

// TestPoliciesThatAreWrong breaks the policies of a running node in several
// ways, restarts it into a broken directory, and takes the directory away.
func TestPoliciesThatAreWrong(t *testing.T) {
	t.Parallel()
	n, _, stranger := enforced(t)
	n.settled(stranger)
	good := shopIn("enforce")
	mend := func() {
		t.Helper()
		n.policy("shop.yaml", good)
		n.await("be mended", func(s *controlpb.StatusReply) bool {
			return len(s.GetPolicySet().GetErrors()) == 0 && !s.GetPolicySet().GetLastGood() && s.GetReady()
		})
	}
	dangling := strings.Replace(good, "{name: read, from: [client]", "{name: read, from: [cliemt]", 1)
	for _, c := range []struct{ name, text, want string }{
		{"a dangling reference", dangling, `shop.yaml:29:27: from: no MachineIdentity "cliemt" in namespace shop (did you mean "client"?)`},
		{"bad YAML", good + "---\na: [\n", "YAML: "},
		{"an unknown field", strings.Replace(good, "mtls: required", "mtsl: required", 1), `shop.yaml:27:3: unknown field "mtsl" (did you mean "mtls"?)`},
		{"an unknown kind", good + "---\napiVersion: sallyport.dev/v1alpha1\nkind: Nothing\nmetadata: {name: x}\nspec: {}\n", `kind: "Nothing" is not one of `},
	} {
		t.Run(c.name, func(t *testing.T) {
			refusals := n.metric("sallyport_policy_loads_refused_total")
			n.policy("shop.yaml", c.text)
			n.await("refuse the set", refusedFor(c.want))
			if got := n.metric("sallyport_policy_loads_refused_total"); got <= refusals {
				t.Errorf("%v sets refused, by the metric, and %v before", got, refusals)
			}
			log, err := os.ReadFile(n.path("agent.log"))
			if err != nil {
				t.Fatal(err)
			}
			if text := strings.ReplaceAll(string(log), `\"`, `"`); !strings.Contains(text, "policy refused") || !strings.Contains(text, c.want) {
				t.Errorf("the log does not say %q", c.want)
			}
			n.settled(stranger)
			out, _ := n.run("status")
			if !strings.Contains(out, "the last good set") || !strings.Contains(out, c.want) {
				t.Errorf("status says %s", out)
			}
			mend()
		})
	}
	t.Run("a restart into a broken directory", func(t *testing.T) {
		n.stop()
		n.policy("shop.yaml", dangling)
		n.launch()
		n.await("run on the last good set", func(s *controlpb.StatusReply) bool {
			return refusedFor(`no MachineIdentity "cliemt"`)(s) && s.GetUserspace().GetReady()
		})
		n.settled(stranger)
		mend()
	})
	t.Run("a restart without a directory", func(t *testing.T) {
		n.stop()
		if err := os.Rename(n.path("policies"), n.path("elsewhere")); err != nil {
			t.Fatal(err)
		}
		n.launch()
		n.await("run on the last good set", func(s *controlpb.StatusReply) bool {
			return s.GetPolicySet().GetLastGood() && s.GetUserspace().GetReady()
		})
		n.settled(stranger)
		if err := os.Rename(n.path("elsewhere"), n.path("policies")); err != nil {
			t.Fatal(err)
		}
		mend()
	})
	t.Run("the directory goes and comes back", func(t *testing.T) {
		if err := os.Rename(n.path("policies"), n.path("elsewhere")); err != nil {
			t.Fatal(err)
		}
		n.await("miss its directory", func(s *controlpb.StatusReply) bool { return s.GetPolicySet().GetLastGood() })
		n.settled(stranger)
		if err := os.Rename(n.path("elsewhere"), n.path("policies")); err != nil {
			t.Fatal(err)
		}
		mend()
		n.change(func() { n.policy("shop.yaml", strings.Replace(good, "GET /files/{name}", "GET /moved/{name}", 1)) })
		if got := n.get(); got != "403 no_rule" {
			t.Errorf("a change after that does not count: %s", got)
		}
	})
}
