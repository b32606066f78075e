// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/tls"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/userspace/obtain/issuertest"
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

// TestEgressThatVerifies lets a workload reach a host in TLS under the host's
// name, at an address that proves it, and in no other way.
func TestEgressThatVerifies(t *testing.T) {
	require(t, "unshare", "mount", "curl")
	t.Parallel()
	n, far := one(t)
	good, impostor := issuertest.New(t, "", "api.partner.test"), issuertest.New(t, "", "api.partner.test")
	hosts, roots := n.path("hosts"), n.path("roots.pem")
	for name, content := range map[string][]byte{
		hosts: []byte("127.0.0.1 localhost\n" + addrA + " api.partner.test\n" + addrA6 + " api.partner.test\n"),
		roots: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: good.Root}),
	} {
		if err := os.WriteFile(name, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	n.wrap = []string{"unshare", "--mount", "--propagation", "private", "sh", "-c", "mount --bind " + hosts + ` /etc/hosts && exec "$@"`, "sh"}
	n.env = []string{"SSL_CERT_FILE=" + roots, "SSL_CERT_DIR=/nonexistent"}
	policies := func(mode string) string {
		return strings.Replace(shopIn(mode), "mayCall: [web, stream]}", "mayCall: [web, stream], egress: [{host: api.partner.test, ports: [9443], tls: verify}]}", 1)
	}
	n.policy("shop.yaml", policies("enforce"))
	serve := func(at string, i *issuertest.Issuer) {
		l := far.Listen(t, "tcp", netip.MustParseAddrPort(at))
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "partner") }), //nolint:errcheck // the client has gone
			TLSConfig: &tls.Config{Certificates: []tls.Certificate{i.Certificate}}, ReadHeaderTimeout: patience, ErrorLog: log.New(io.Discard, "", 0)}
		go s.ServeTLS(l, "", "") //nolint:errcheck // ends with the listener
		t.Cleanup(func() { s.Close() })
	}
	serve(addrA+":9443", good)
	serve("["+addrA6+"]:9443", impostor)
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)
	get := func(name, address string) string {
		t.Helper()
		// The workload believes anybody: that is what the node must not.
		return code(t, n.group("client"), n.ns, "https://"+name+":9443/", "--insecure", "--resolve", name+":9443:"+address)
	}
	eventually(t, "the client to reach the host", func() string {
		if got := get("api.partner.test", addrA); got != "200" {
			return got
		}
		return ""
	})
	for _, c := range []struct{ what, name, address, reason string }{
		{"another name at the host's address", "other.test", addrA, "egress_tls"},
		{"an address that has another's certificate", "api.partner.test", addrA6, "egress_certificate"},
	} {
		from := n.mark()
		if got := get(c.name, c.address); got == "200" {
			t.Errorf("%s: %s", c.what, got)
		}
		n.decided(from, c.what, func(r *record) bool { return r.Reason == c.reason && r.Decision == "deny" && !r.WouldDeny })
	}
	from := n.mark()
	if got := code(t, n.group("client"), n.ns, "http://"+addrA+":9443/"); got != "403 egress_tls" {
		t.Errorf("without TLS: %s", got)
	}
	n.decided(from, "a call without TLS", func(r *record) bool { return r.Reason == "egress_tls" })
	if out, err := say(t, n.group("client"), n.ns, addrA+":9444", "x"); err == nil {
		t.Errorf("another port of the host: %q", out)
	}
	n.change(func() { n.policy("shop.yaml", policies("audit")) })
	from = n.mark()
	// A client that has said nothing for a while is not waited for: it may be
	// one that listens first, and its host is not asked.
	eventually(t, "what enforce would refuse to be told", func() string {
		if got := get("api.partner.test", addrA6); got != "200" {
			t.Fatalf("in audit: %s", got)
		}
		if !slices.ContainsFunc(n.records(from), func(r record) bool { return r.Reason == "egress_certificate" && r.WouldDeny }) {
			return "it is not in the log"
		}
		return ""
	})
}
