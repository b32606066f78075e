// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/testenv"
)

// pki is somebody else's certificate authority, made by OpenSSL.
type pki struct {
	t   *testing.T
	dir string
}

func newPKI(t *testing.T) *pki {
	t.Helper()
	p := &pki{t, folder(t)}
	p.openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=partner root",
		"-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign", "-keyout", p.path("root.key"), "-out", p.path("root.pem"))
	return p
}

func (p *pki) path(name string) string { return filepath.Join(p.dir, name) }

func (p *pki) openssl(args ...string) {
	p.t.Helper()
	if out, err := exec.Command("openssl", args...).CombinedOutput(); err != nil {
		p.t.Fatalf("openssl %q: %v: %s", args, err, out)
	}
}

// issue makes a certificate signed by another of these, with its chain; a CA
// where extensions say so.
func (p *pki) issue(name, by, subject, extensions string) {
	p.t.Helper()
	file := p.path(name + ".ext")
	if err := os.WriteFile(file, []byte(extensions), 0o600); err != nil {
		p.t.Fatal(err)
	}
	p.openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", subject, "-keyout", p.path(name+".key"), "-out", p.path(name+".csr"))
	p.openssl("x509", "-req", "-in", p.path(name+".csr"), "-CA", p.path(by+".pem"), "-CAkey", p.path(by+".key"), "-CAcreateserial", "-days", "1",
		"-extfile", file, "-out", p.path(name+".pem"))
	chain, err := os.ReadFile(p.path(name + ".pem"))
	if err != nil {
		p.t.Fatal(err)
	}
	if by != "root" {
		above, err := os.ReadFile(p.path(by + ".pem"))
		if err != nil {
			p.t.Fatal(err)
		}
		chain = append(chain, above...)
	}
	if err := os.WriteFile(p.path(name+".chain"), chain, 0o600); err != nil {
		p.t.Fatal(err)
	}
}

const leafOf = "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=clientAuth\nsubjectAltName="

const serverOf = "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\nsubjectAltName="

// TestTLSEndsAtTheProxy has callers speak TLS to a host's name, with the
// host's own certificate, to an application that speaks none: partners from
// elsewhere, and a workload of the same node.
func TestTLSEndsAtTheProxy(t *testing.T) {
	require(t, "nginx", "curl", "openssl")
	t.Parallel()
	web, theirs := newPKI(t), newPKI(t)
	web.issue("shop", "root", "/CN=shop.example", serverOf+"DNS:shop.example\n")
	theirs.issue("billing", "root", "/CN=billing", leafOf+"URI:spiffe://partner.example/billing\n")
	n, stranger := one(t)
	n.identity = "identity: {tpm: none, bundles: [" + `"partner.example=` + theirs.path("root.pem") + `"]}`
	text := strings.Replace(shopIn("enforce"), "ports: [8080], protocol: http}",
		"ports: [8080], protocol: http, app: {tls: terminate, certificate: "+web.path("shop.chain")+", key: "+web.path("shop.key")+"}}", 1)
	n.policy("shop.yaml", strings.Replace(text, `{name: write, from: [client]`, `{name: partner, from: [billing], http: ["GET /files/{name}"]}
    - {name: write, from: [client]`, 1)+`---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: billing, namespace: shop}
spec: {owner: partner@partner.example, spiffeID: "spiffe://partner.example/billing", mayCall: [web]}
`)
	w := startNginx(t, n.group("web"), n.ns, 8080)
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)
	act(t, n.group("outcast"), n.ns, "idle").line(t)
	n.served("client", "outcast", "web")

	const url = "https://shop.example:8080"
	trusting := func(more ...string) []string {
		return append([]string{"--cacert", web.path("root.pem"), "--resolve", "shop.example:8080:" + addrB}, more...)
	}
	billing := []string{"--cert", theirs.path("billing.chain"), "--key", theirs.path("billing.key")}
	for _, c := range []struct {
		who, cgroup string
		ns          *testenv.Netns
		path        string
		args        []string
		want        string
	}{
		{"the partner", "", stranger, "/files/hello", trusting(billing...), "200"},
		{"the partner, for what its rule does not say", "", stranger, "/nothing", trusting(billing...), "403 no_rule"},
		{"nobody", "", stranger, "/files/hello", trusting(), "403 mtls_required"},
		{"a workload of the node", n.group("client"), n.ns, "/files/hello", trusting(), "200"},
		{"one whom no rule names", n.group("outcast"), n.ns, "/files/hello", trusting(), "403 no_rule"},
	} {
		if got := code(t, c.cgroup, c.ns, url+c.path, c.args...); got != c.want {
			t.Errorf("%s got %s, want %s", c.who, got, c.want)
		}
	}
	if got := n.get(); got != "200" {
		t.Errorf("in plaintext the client got %s", got)
	}

	// Without the files nothing is shown, and status says why.
	s := n.await("be well", func(s *controlpb.StatusReply) bool { return s.GetReady() && len(s.GetPolicySet().GetErrors()) == 0 })
	for _, p := range s.GetProblems() {
		if p.GetId() == "app-certificates" {
			t.Errorf("problem %v", p)
		}
	}
	n.stop()
	if err := os.Remove(web.path("shop.key")); err != nil {
		t.Fatal(err)
	}
	n.launch()
	n.await("miss the key", func(s *controlpb.StatusReply) bool {
		return s.GetUserspace().GetReady() && slices.ContainsFunc(s.GetProblems(), func(p *controlpb.Problem) bool {
			return p.GetId() == "app-certificates" && strings.Contains(p.GetText(), "shop.key")
		})
	})
	eventually(t, "the port to be served again", func() string { // in plaintext
		if got := n.get(); got != "200" {
			return got
		}
		return ""
	})
	served := w.requests()
	from := n.mark()
	if got := code(t, "", stranger, url+"/files/hello", trusting(billing...)...); !strings.HasPrefix(got, "refused: ") {
		t.Errorf("without a key the partner got %s", got)
	}
	n.decided(from, "TLS that nothing ends", func(r *record) bool { return r.Reason == "app_certificate" && r.Decision == "deny" })
	if now := w.requests(); now != served {
		t.Errorf("nginx was reached %d times", now-served)
	}
}

// TestTLSToTheApplication has nginx speak TLS itself behind the proxy, for
// callers in TLS and in plaintext: requests are judged all the same, and
// nothing goes to an nginx that proves to be another.
func TestTLSToTheApplication(t *testing.T) {
	require(t, "nginx", "curl", "openssl")
	t.Parallel()
	web, inner, others := newPKI(t), newPKI(t), newPKI(t)
	web.issue("shop", "root", "/CN=shop.example", serverOf+"DNS:shop.example\n")
	inner.issue("nginx", "root", "/CN=nginx", serverOf+"DNS:shop.example\n")
	others.issue("nginx", "root", "/CN=nginx", serverOf+"DNS:shop.example\n")
	n, _ := one(t)
	n.policy("shop.yaml", strings.Replace(shopIn("enforce"), "ports: [8080], protocol: http}", "ports: [8080], protocol: http, app: {tls: reencrypt, certificate: "+
		web.path("shop.chain")+", key: "+web.path("shop.key")+", ca: "+inner.path("root.pem")+"}}", 1))
	w := startNginx(t, n.group("web"), n.ns, 8080, inner.path("nginx.chain"), inner.path("nginx.key"))
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)
	act(t, n.group("outcast"), n.ns, "idle").line(t)
	n.served("client", "outcast", "web")
	secured := []string{"--cacert", web.path("root.pem"), "--resolve", "shop.example:8080:" + addrB}
	for _, c := range []struct {
		who, cgroup, url string
		args             []string
		want             string
	}{
		{"a workload in TLS", "client", "https://shop.example:8080/files/hello", secured, "200"},
		{"the same in HTTP/2, which this nginx does not offer", "client", webURL + "/files/hello", []string{"--http2-prior-knowledge"}, "502 upstream_tls"},
		{"the same in plaintext", "client", webURL + "/files/hello", nil, "200"},
		{"for what no rule says", "client", webURL + "/nothing", nil, "403 no_rule"},
		{"one whom no rule names", "outcast", "https://shop.example:8080/files/hello", secured, "403 no_rule"},
	} {
		if got := code(t, n.group(c.cgroup), n.ns, c.url, c.args...); got != c.want {
			t.Errorf("%s got %s, want %s", c.who, got, c.want)
		}
	}

	w.terminate(t)
	w = startNginx(t, n.group("web"), n.ns, 8080, others.path("nginx.chain"), others.path("nginx.key"))
	from := n.mark()
	eventually(t, "nginx to be reached", func() string {
		if got := code(t, n.group("client"), n.ns, webURL+"/files/hello"); got != "502 upstream_tls" {
			return got
		}
		return ""
	})
	if r := n.decided(from, "the call to another nginx", func(r *record) bool { return r.Reason == "upstream_tls" }); r.Stage != "upstream" || r.Decision != "deny" {
		t.Errorf("recorded as %+v", r)
	}
	if got := w.requests(); got != 0 {
		t.Errorf("the other nginx was asked %d times", got)
	}
}

// TestPartner lets a caller without an agent in, by a certificate of its own
// authority, as far as its rule goes; and nobody else by that authority.
func TestPartner(t *testing.T) {
	require(t, "nginx", "curl", "openssl")
	t.Parallel()
	theirs, others := newPKI(t), newPKI(t)
	theirs.issue("ca2", "root", "/CN=partner issuing", "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n")
	theirs.issue("billing", "ca2", "/CN=billing", leafOf+"URI:spiffe://partner.example/billing\n")
	theirs.issue("crm", "root", "/CN=crm", leafOf+"URI:spiffe://partner.example/crm\n")
	theirs.issue("noid", "root", "/CN=billing.partner.example", leafOf+"DNS:billing.partner.example\n")
	others.issue("forged", "root", "/CN=billing", leafOf+"URI:spiffe://partner.example/billing\n")

	n, stranger := one(t)
	theirs.issue("ours", "root", "/CN=client", leafOf+"URI:"+n.id("client")+"\n")
	n.identity = "identity: {tpm: none, bundles: [" + `"partner.example=` + theirs.path("root.pem") + `"]}`
	n.policy("shop.yaml", strings.Replace(shopIn("enforce"), `{name: write, from: [client]`, `{name: partner, from: [billing], http: ["GET /files/{name}"]}
    - {name: write, from: [client]`, 1)+`---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: billing, namespace: shop}
spec: {owner: partner@partner.example, spiffeID: "spiffe://partner.example/billing", mayCall: [web]}
`)
	w := startNginx(t, n.group("web"), n.ns, 8080)
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)
	n.served("client", "web")

	const url = "https://" + addrB + ":8080"
	as := func(p *pki, name string) []string {
		return []string{"-k", "--cert", p.path(name + ".chain"), "--key", p.path(name + ".key")}
	}
	from := n.mark()
	if got := code(t, "", stranger, url+"/files/hello", as(theirs, "billing")...); got != "200" {
		t.Fatalf("the partner got %s", got)
	}
	if r := n.decided(from, "the partner's call", func(r *record) bool { return r.Source == "spiffe://partner.example/billing" }); r.Decision != "allow" || r.Channel != "tls" {
		t.Errorf("the partner's call is recorded as %+v", r)
	}
	served := w.requests()
	for _, c := range []struct {
		who    string
		args   []string
		path   string
		reason string // of the record
		want   string // what the caller gets; "" for a connection that ends
	}{
		{"the partner, for what its rule does not say", as(theirs, "billing"), "/nothing", "no_rule", "403 no_rule"},
		{"another of the partner's, whom no policy knows", as(theirs, "crm"), "/files/hello", "unknown_identity", "403 unknown_identity"},
		{"the partner, by another authority", as(others, "forged"), "/files/hello", "cert_untrusted", ""},
		{"one of ours, by the partner's authority", as(theirs, "ours"), "/files/hello", "cert_untrusted", ""},
		{"the partner, without an ID", as(theirs, "noid"), "/files/hello", "cert_no_id", ""},
		{"nobody", []string{"-k"}, "/files/hello", "", ""},
	} {
		from := n.mark()
		got := code(t, "", stranger, url+c.path, c.args...)
		if c.want != "" && got != c.want || c.want == "" && !strings.HasPrefix(got, "refused: ") && !strings.HasPrefix(got, "403") {
			t.Errorf("%s got %s, want %s", c.who, got, c.want)
		}
		if c.reason != "" {
			n.decided(from, c.who, func(r *record) bool { return r.Reason == c.reason && r.Decision == "deny" })
		}
	}
	if now := w.requests(); now != served {
		t.Errorf("nginx was reached %d times by what was refused", now-served)
	}
}
