// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/agent/testenv"
)

// TestWorkloadsInTheirOwnNamespaces puts client and server each into a
// namespace of its own, joined by links to the node's, as containers are.
func TestWorkloadsInTheirOwnNamespaces(t *testing.T) {
	require(t, "nginx", "curl", "wrk", "ip", "sysctl")
	t.Parallel()
	node := testenv.NewNetns(t)
	p := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	box := func(name, gateway, address string) *testenv.Netns {
		t.Helper()
		ns := testenv.NewNetns(t)
		testenv.Veth(t, name, node, ns, p(gateway+"/24"), p(address+"/24"))
		tool(t, ns, "ip", "route", "add", "default", "via", gateway)
		return ns
	}
	servers := box("servers", "10.78.20.1", "10.78.20.2")
	clients := box("clients", "10.78.30.1", "10.78.30.2")
	tool(t, node, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
	n := newNode(t, "b", node)
	n.policy("shop.yaml", strings.NewReplacer(`, "[fd78:1::2]:8080"`, "", addrB, "10.78.20.2").Replace(shopIn("enforce")))
	w := startNginx(t, n.group("web"), servers, 8080)
	server(t, n.group("stream"), servers, "digest", "10.78.20.2:9090")
	n.start()
	act(t, n.group("client"), clients, "idle").line(t)
	n.served("client", "web", "stream")
	const url = "http://10.78.20.2:8080/files/hello"
	eventually(t, "the client to be served", func() string {
		if got := code(t, n.group("client"), clients, url); got != "200" {
			return got
		}
		return ""
	})
	eventually(t, "accept() to show the client's own address", func() string {
		if got := w.log("access.log"); !strings.HasPrefix(got, "10.78.30.2:") {
			return got
		}
		return ""
	})
	served := w.requests()
	for _, c := range []struct {
		who, cgroup string
		ns          *testenv.Netns
	}{
		{"nobody beside the client", n.group("nobody"), clients}, {"a process outside beside the client", "", clients},
		{"the node itself", "", node}, {"nobody beside the server", n.group("nobody"), servers}, {"a process outside beside the server", "", servers},
	} {
		if got := code(t, c.cgroup, c.ns, url); got != "403 mtls_required" {
			t.Errorf("%s got %s", c.who, got)
		}
	}
	if now := w.requests(); now != served {
		t.Errorf("nginx was reached %d times", now-served)
	}
	data := strings.Repeat("half a conversation\n", 1<<12)
	if out, err := say(t, n.group("client"), clients, "10.78.20.2:9090", data); err != nil || !strings.HasSuffix(out, digest([]byte(data))+"\n") {
		t.Errorf("half-close: got %q %v", out, err)
	}
	// The listeners are inside those namespaces and not in the node's.
	for who, c := range map[string]struct {
		ns   *testenv.Netns
		want bool
	}{"servers": {servers, true}, "clients": {clients, true}, "node": {node, false}} {
		out := tool(t, c.ns, "ss", "-Hltn")
		if has := strings.Contains(out, "127.0.0.1:15001") && strings.Contains(out, "127.0.0.1:15006"); has != c.want {
			t.Errorf("listeners in %s: %t, want %t\n%s", who, has, c.want, out)
		}
	}
	// A workload that lives in neither and comes later is found too.
	late := box("late", "10.78.40.1", "10.78.40.2")
	act(t, n.group("client"), late, "idle").line(t)
	eventually(t, "a client in a namespace that came later", func() string {
		if got := code(t, n.group("client"), late, url); got != "200" {
			return got
		}
		return ""
	})
}

// tool runs a program of the system in a namespace.
func tool(t *testing.T, ns *testenv.Netns, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out lockedBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	p := start(t, "", ns, cmd)
	<-p.done
	if p.err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, p.err, out.String())
	}
	return out.String()
}
