// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"net/netip"

	"github.com/sallyport-dev/sallyport/agent/testenv"
)

// shop is who is who in most tests. Paths are beneath a node's cgroup root.
const shop = `apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: client, namespace: shop}
spec: {owner: a@b.example, select: {cgroup: {path: /client}}, mode: MODE, mayCall: [web, stream]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: outcast, namespace: shop}
spec: {owner: a@b.example, select: {cgroup: {path: /outcast}}, mode: MODE, mayCall: [web]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: web, namespace: shop}
spec: {owner: a@b.example, select: {cgroup: {path: /web}}, endpoints: ["10.78.1.2:8080", "[fd78:1::2]:8080"], mode: MODE}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: stream, namespace: shop}
spec: {owner: a@b.example, select: {cgroup: {path: /stream}}, endpoints: ["10.78.1.2:9090"], mode: MODE}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: web, namespace: shop}
spec:
  mode: MODE
  protect: {identity: web, ports: [8080], protocol: http}
  mtls: required
  rules:
    - {name: read, from: [client], http: ["GET /files/{name}", "HEAD /files/{name}"]}
    - {name: write, from: [client], http: ["PUT /up/{name}"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: stream, namespace: shop}
spec:
  mode: MODE
  protect: {identity: stream, ports: [9090], protocol: tcp}
  mtls: required
  rules:
    - {name: any, from: [client]}
`

func shopIn(mode string) string { return strings.ReplaceAll(shop, "MODE", mode) }

const (
	addrA, addrB   = "10.78.1.1", "10.78.1.2"
	addrA6, addrB6 = "fd78:1::1", "fd78:1::2"
	webURL         = "http://" + addrB + ":8080"
)

// join makes two namespaces with a link: a is 10.78.1.1, b is 10.78.1.2.
func join(t *testing.T) (a, b *testenv.Netns) {
	t.Helper()
	a, b = testenv.NewNetns(t), testenv.NewNetns(t)
	p := func(v4, v6 string) []netip.Prefix {
		return []netip.Prefix{netip.MustParsePrefix(v4 + "/24"), netip.MustParsePrefix(v6 + "/64")}
	}
	testenv.Veth(t, "link", a, b, p(addrA, addrA6), p(addrB, addrB6))
	return a, b
}

// one makes a single node at 10.78.1.2, with a stranger beyond the link.
func one(t *testing.T) (n *node, stranger *testenv.Netns) {
	t.Helper()
	a, b := join(t)
	return newNode(t, "b", b), a
}

// two makes two nodes under one authority, with shop's policies in enforce.
func two(t *testing.T) (a, b *node) {
	t.Helper()
	nsA, nsB := join(t)
	a, b = newNode(t, "a", nsA), newNode(t, "b", nsB)
	state := filepath.Join(folder(t), "authority")
	flags := []string{"--state-dir", state, "--trust-domain", trustDomain, "--tpm", "none"}
	const listen = addrB + ":15443"
	for _, n := range []*node{a, b} {
		n.authorityFlags = flags
		args := []string{"token", "create", "--node", n.name}
		for _, i := range []string{"client", "outcast", "web", "stream"} {
			args = append(args, "--id", n.id(i))
		}
		if err := os.WriteFile(n.path("join-token"), []byte(n.authority(args...)), 0o600); err != nil {
			t.Fatal(err)
		}
		n.identity = fmt.Sprintf("identity: {source: authority, tpm: none, authority: {address: %q, token: %s}}", listen, n.path("join-token"))
		n.policy("shop.yaml", shopIn("enforce"))
	}
	authority := start(t, "", nsB, exec.Command(sallyport, append([]string{"authority", "--listen", listen}, flags...)...))
	eventually(t, "the authority to listen", func() string {
		select {
		case <-authority.done:
			t.Fatalf("the authority ended: %v %s", authority.err, authority.errs)
		default:
		}
		if _, err := say(t, "", nsB, listen, ""); err != nil {
			return err.Error()
		}
		return ""
	})
	return a, b
}

func (n *node) group(name string) string { return filepath.Join(n.cgroup, name) }

// TestTraffic sends every shape of ordinary traffic, on one node and across
// two, through both engines.
func TestTraffic(t *testing.T) {
	require(t, "nginx", "curl", "wrk")
	for _, engine := range []struct{ name, extra string }{{"loops", ""}, {"goroutines", "userspace: {goroutines: true}"}} {
		t.Run(engine.name, func(t *testing.T) {
			t.Parallel()
			a, b := two(t)
			a.extra, b.extra = engine.extra, engine.extra
			// This nginx is adopted: it listens before there is an agent.
			w := startNginx(t, b.group("web"), b.ns, 8080)
			b.start()
			a.start()
			server(t, b.group("stream"), b.ns, "digest", addrB+":9090")
			// Somebody must live there for the workload to be known.
			for _, n := range []*node{a, b} {
				act(t, n.group("client"), n.ns, "idle").line(t)
				act(t, n.group("outcast"), n.ns, "idle").line(t)
				n.served("client", "outcast")
			}
			b.served("web", "stream")
			for _, from := range []struct {
				name string
				*node
			}{{"one node", b}, {"across nodes", a}} {
				t.Run(from.name, func(t *testing.T) { trafficFrom(t, from.node, b, w) })
			}
			t.Run("after a restart of nginx", func(t *testing.T) {
				w.terminate(t)
				w = startNginx(t, b.group("web"), b.ns, 8080)
				for _, n := range []*node{a, b} {
					eventually(t, "nginx to be reached from "+n.name, func() string {
						if got := code(t, n.group("client"), n.ns, webURL+"/files/hello"); got != "200" {
							return got
						}
						return ""
					})
				}
			})
		})
	}
}

// trafficFrom calls nginx on node b from a client of node n.
func trafficFrom(t *testing.T, n, b *node, w *web) {
	client := n.group("client")
	get := func(t *testing.T, args ...string) string {
		t.Helper()
		out, err := curl(t, client, n.ns, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	t.Run("allowed and denied", func(t *testing.T) {
		// What wrk left half way may still be written to the log.
		agent := "curl-" + testenv.Suffix()
		arrived := func() (lines []string) {
			for l := range strings.Lines(w.log("access.log")) {
				if strings.HasSuffix(l, " "+agent+"\n") {
					lines = append(lines, l)
				}
			}
			return lines
		}
		from := b.mark()
		for _, c := range []struct {
			name, want string
			cgroup     string
			args       []string
		}{
			{"a call that a rule allows", "200", client, []string{webURL + "/files/hello"}},
			{"over IPv6", "200", client, []string{"http://[" + addrB6 + "]:8080/files/hello"}},
			{"what the server does not have", "404", client, []string{webURL + "/files/none"}},
			{"a method that no rule allows", "403 no_rule", client, []string{webURL + "/files/hello", "-X", "DELETE"}},
			{"a path that no rule allows", "403 no_rule", client, []string{webURL + "/secret"}},
			{"an identity that no rule names", "403 no_rule", n.group("outcast"), []string{webURL + "/files/hello"}},
			{"a workload that is nobody", "403 mtls_required", n.group("nobody"), []string{webURL + "/files/hello"}},
			{"a process outside of all", "403 mtls_required", "", []string{webURL + "/files/hello"}},
			{"a forged identity header", "200", client, []string{webURL + "/files/hello", "-H", "X-Forwarded-Client-Cert: By=spiffe://evil/x;URI=spiffe://evil/x"}},
		} {
			got := code(t, c.cgroup, n.ns, c.args[0], append(c.args[1:], "-A", agent)...)
			if got != c.want {
				t.Errorf("%s: %s, want %s", c.name, got, c.want)
			}
		}
		eventually(t, "the access log", func() string {
			if got := arrived(); len(got) != 4 {
				return fmt.Sprintf("nginx saw %q, want the 4 that were allowed", got)
			}
			return ""
		})
		host, shown := addrB, false
		if n != b {
			host = addrA
		}
		for _, l := range arrived() {
			shown = shown || strings.HasPrefix(l, host+":")
			if strings.Contains(l, "evil") {
				t.Errorf("a forged header came through: %s", l)
			}
			if !strings.Contains(l, "URI="+n.id("client")) {
				t.Errorf("the server was not told who calls: %s", l)
			}
		}
		if !shown {
			t.Errorf("accept() never showed the client %s: %q", host, arrived())
		}
		b.decided(from, "an allowed call", func(r *record) bool { return r.Decision == "allow" && r.Source == n.id("client") && r.Method == "GET" })
		b.decided(from, "a denied one", func(r *record) bool { return r.Reason == "no_rule" && r.Source == n.id("outcast") })
	})
	t.Run("keep-alive", func(t *testing.T) {
		url := webURL + "/files/hello"
		out := get(t, "-o", "/dev/null", "-o", "/dev/null", "-o", "/dev/null", "-w", "%{http_code} %{num_connects}\n", url, url, url)
		if out != "200 1\n200 0\n200 0\n" {
			t.Errorf("got %q, want three answers over one connection", out)
		}
	})
	t.Run("HEAD", func(t *testing.T) {
		if out := get(t, "-I", webURL+"/files/hello"); !strings.HasPrefix(out, "HTTP/1.1 200 ") || !strings.Contains(out, "Content-Length: 6\r\n") {
			t.Errorf("got %q", out)
		}
	})
	t.Run("a chunked upload", func(t *testing.T) {
		body := filepath.Join(folder(t), "body")
		content := strings.Repeat("0123456789abcdef", 1<<16)
		if err := os.WriteFile(body, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		got := code(t, client, n.ns, webURL+"/up/chunked", "-T", body, "-H", "Transfer-Encoding: chunked", "-H", "Expect:")
		if got != "201" && got != "204" {
			t.Fatalf("got %s", got)
		}
		if fileDigest(t, filepath.Join(w.dir, "up", "chunked")) != digest([]byte(content)) {
			t.Error("what was stored is not what was sent")
		}
		t.Run("with 100-continue", func(t *testing.T) {
			out := get(t, "-v", "--stderr", "-", "-T", body, "-H", "Expect: 100-continue", "--expect100-timeout", "60", webURL+"/up/continued")
			if !strings.Contains(out, "< HTTP/1.1 100 Continue") || !regexp.MustCompile(`< HTTP/1\.1 20[14] `).MatchString(out) {
				t.Errorf("got %s", out)
			}
			if fileDigest(t, filepath.Join(w.dir, "up", "continued")) != digest([]byte(content)) {
				t.Error("what was stored is not what was sent")
			}
		})
		t.Run("that is refused before the body", func(t *testing.T) {
			out := get(t, "-v", "--stderr", "-", "-T", body, "-H", "Expect: 100-continue", "--expect100-timeout", "60", webURL+"/secret")
			if strings.Contains(out, "100 Continue") || !strings.Contains(out, "< HTTP/1.1 403 ") {
				t.Errorf("got %s", out)
			}
		})
	})
	t.Run("64 MiB both ways", func(t *testing.T) {
		want := w.big()
		down := filepath.Join(folder(t), "down")
		get(t, "-o", down, webURL+"/files/big")
		if fileDigest(t, down) != want {
			t.Error("what came is not what the server has")
		}
		if got := code(t, client, n.ns, webURL+"/up/big", "-T", down); got != "201" && got != "204" {
			t.Fatalf("got %s", got)
		}
		if fileDigest(t, filepath.Join(w.dir, "up", "big")) != want {
			t.Error("what was stored is not what was sent")
		}
	})
	t.Run("half-close of a byte stream", func(t *testing.T) {
		data := strings.Repeat("half a conversation\n", 1<<16)
		out, err := say(t, client, n.ns, addrB+":9090", data)
		if want := fmt.Sprintf("%d %s\n", len(data), digest([]byte(data))); err != nil || out != want {
			t.Errorf("got %q %v, want %q", out, err, want)
		}
		if out, err := say(t, n.group("outcast"), n.ns, addrB+":9090", data); err == nil || out != "" {
			t.Errorf("one who may not got %q %v", out, err)
		}
	})
	t.Run("wrk", func(t *testing.T) {
		cmd := exec.Command("wrk", "-t2", "-c16", "-d2s", "--timeout", "60s", webURL+"/files/hello")
		p := start(t, client, n.ns, cmd)
		var out strings.Builder
		for {
			l, err := p.out.ReadString('\n')
			out.WriteString(l)
			if err != nil {
				break
			}
		}
		<-p.done
		if p.err != nil || strings.Contains(out.String(), "Socket errors") || strings.Contains(out.String(), "Non-2xx") ||
			!regexp.MustCompile(`(?m)^\s*[1-9]\d* requests in `).MatchString(out.String()) {
			t.Errorf("wrk: %v\n%s%s", p.err, out.String(), p.errs)
		}
		t.Log(strings.TrimSpace(out.String()))
	})
}
