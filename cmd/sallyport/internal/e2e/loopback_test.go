// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestLoopbackCalls calls protected ports by way of loopback, in each mode: the
// namespace says there whose they are.
func TestLoopbackCalls(t *testing.T) {
	require(t, "nginx", "curl")
	for _, mode := range []string{"enforce", "audit", "observe"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			n, _ := one(t)
			n.policy("shop.yaml", shopIn(mode))
			w := startNginx(t, n.group("web"), n.ns, 8080)
			server(t, n.group("stream"), n.ns, "echo", ":9090")
			n.start()
			act(t, n.group("client"), n.ns, "idle").line(t)
			act(t, n.group("outcast"), n.ns, "idle").line(t)
			n.served("client", "outcast", "web", "stream")
			for _, host := range []string{"127.0.0.1", "127.0.0.2", "::1", "0.0.0.0", addrB} {
				url := "http://" + net.JoinHostPort(host, "8080") + "/files/hello"
				if got := code(t, n.group("client"), n.ns, url); got != "200" {
					t.Errorf("%s: the client got %s", host, got)
				}
				if out, err := say(t, n.group("client"), n.ns, net.JoinHostPort(host, "9090"), "hello\n"); err != nil || out != "hello\n" {
					t.Errorf("%s: the client got %q %v from the stream", host, out, err)
				}
				want := map[bool]string{true: "403 no_rule", false: "200"}[mode == "enforce"]
				if got := code(t, n.group("outcast"), n.ns, url); got != want {
					t.Errorf("%s: one whom no rule names got %s, want %s", host, got, want)
				}
			}
			if mode == "enforce" {
				from := n.mark()
				if out, err := say(t, n.group("client"), n.ns, "127.0.0.1:9", ""); err == nil {
					t.Errorf("the client got %q from a port that nobody has", out)
				}
				n.decided(from, "the egress of the client", func(r *record) bool { return r.Reason == "egress" && !r.WouldDeny })
			}
			if w.requests() == 0 {
				t.Error("this test called nobody")
			}
		})
	}
}

// TestUnprotectedWhileObserved calls an endpoint that no policy protects.
func TestUnprotectedWhileObserved(t *testing.T) {
	require(t)
	t.Parallel()
	n, _ := one(t)
	n.policy("shop.yaml", strings.ReplaceAll(shopIn("audit"), `endpoints: ["10.78.1.2:9090"]`, `endpoints: ["10.78.1.2:9090", "10.78.1.2:9091"]`))
	server(t, n.group("stream"), n.ns, "echo", ":9091")
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)
	n.served("client", "stream")
	if out, err := say(t, n.group("client"), n.ns, addrB+":9091", "hello\n"); err != nil || out != "hello\n" {
		t.Errorf("got %q %v", out, err)
	}
}

// TestApplicationTLSWhileObserved has servers that speak TLS themselves on
// ports whose policies say that they do not.
func TestApplicationTLSWhileObserved(t *testing.T) {
	require(t, "openssl", "curl")
	for _, mode := range []string{"audit", "observe"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			n, stranger := one(t)
			n.policy("shop.yaml", shopIn(mode))
			dir := folder(t)
			key, cert := filepath.Join(dir, "key.pem"), filepath.Join(dir, "cert.pem")
			tool(t, n.ns, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=shop.example", "-keyout", key, "-out", cert)
			for group, port := range map[string]string{"web": "8080", "stream": "9090"} {
				start(t, n.group(group), n.ns, exec.Command("openssl", "s_server", "-accept", port, "-www", "-quiet", "-key", key, "-cert", cert))
			}
			n.start()
			act(t, n.group("client"), n.ns, "idle").line(t)
			n.served("client", "web", "stream")
			for _, port := range []string{"8080", "9090"} {
				url := "https://" + addrB + ":" + port + "/"
				eventually(t, "the server to listen", func() string {
					if got := code(t, "", stranger, url, "-k"); got != "200" {
						return got
					}
					return ""
				})
				from := n.mark()
				for _, args := range [][]string{{url, "-k"}, {"https://shop.example:" + port + "/", "-k", "--resolve", "shop.example:" + port + ":" + addrB}} {
					if got := code(t, "", stranger, args[0], args[1:]...); got != "200" {
						t.Errorf("a stranger at %s: %s", args[0], got)
					}
					if got := code(t, n.group("client"), n.ns, args[0], args[1:]...); got != "200" {
						t.Errorf("the client at %s: %s", args[0], got)
					}
				}
				n.decided(from, "TLS at "+port, func(r *record) bool { return r.Reason == "tls_in_app" && r.WouldDeny && r.Mode == mode })
			}
		})
	}
}
