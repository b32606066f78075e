// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
)

// TestEgressByHost lets a workload reach a host by its name, at the addresses
// that the name has, and nothing else; and follows the name to another address.
func TestEgressByHost(t *testing.T) {
	require(t, "unshare", "mount")
	t.Parallel()
	n, stranger := one(t)
	hosts := n.path("hosts")
	resolve := func(address string) {
		t.Helper()
		// In place: the file is mounted.
		if err := os.WriteFile(hosts, []byte("127.0.0.1 localhost\n"+address+" api.partner.test\n127.0.0.1 evil.partner.test\n"+addrB+" home.partner.test\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	resolve(addrA)
	// The agent's own /etc/hosts, so that names mean what this test says.
	n.wrap = []string{"unshare", "--mount", "--propagation", "private", "sh", "-c", "mount --bind " + hosts + ` /etc/hosts && exec "$@"`, "sh"}
	n.policy("shop.yaml", strings.Replace(shopIn("enforce"), "mayCall: [web, stream]}",
		"mayCall: [web, stream], egress: [{host: api.partner.test, ports: [9999]}, {host: evil.partner.test, ports: [9998]}, {host: home.partner.test, ports: [9997]}, {host: nowhere.partner.test, ports: [1]}]}", 1))
	server(t, "", stranger, "echo", ":9999")
	server(t, "", stranger, "echo", ":9998")
	server(t, n.group("nobody"), n.ns, "echo", "127.0.0.1:9998")
	server(t, n.group("nobody"), n.ns, "echo", addrB+":9997")
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)

	reaches := func(address string) bool {
		t.Helper()
		out, err := say(t, n.group("client"), n.ns, address, "hello\n")
		return err == nil && out == "hello\n"
	}
	eventually(t, "the client to reach the host", func() string {
		if !reaches(addrA + ":9999") {
			return "refused"
		}
		return ""
	})
	from := n.mark()
	for what, address := range map[string]string{
		"another port of the host": addrA + ":9998", "another address": "[" + addrA6 + "]:9999", "loopback, to which a name leads": "127.0.0.1:9998",
		"the node itself, to which a name leads": addrB + ":9997",
	} {
		if reaches(address) {
			t.Errorf("the client reaches %s", what)
		}
	}
	n.decided(from, "the egress that is not listed", func(r *record) bool { return r.Reason == "egress" && r.Decision == "deny" && !r.WouldDeny })
	n.await("say which names do not resolve", func(s *controlpb.StatusReply) bool {
		for _, p := range s.GetProblems() {
			if p.GetId() == "egress-hosts" {
				return strings.Contains(p.GetText(), "nowhere.partner.test") && strings.Contains(p.GetText(), "evil.partner.test: no address that may be connected to")
			}
		}
		return false
	})

	// The name moves. Being refused at its new address has the agent ask again.
	resolve(addrA6)
	eventually(t, "the client to reach the host at its new address", func() string {
		if !reaches("[" + addrA6 + "]:9999") {
			return "refused"
		}
		return ""
	})
	if !reaches(addrA + ":9999") {
		t.Error("the address of before is forgotten at once")
	}
}
