// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/introspect"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

// obtaining are documents in which clients obtain tokens of an issuer at that
// port.
func obtaining(port int) string {
	const tokens = ", tokens: [{to: server, issuer: sso, audience: server}]"
	text := documents
	for _, name := range []string{"{path: /client}}, mode: enforce, mayCall: [server, far]", "{path: /lapsed}}, mode: enforce, mayCall: [server, far]"} {
		text = strings.Replace(text, name, name+tokens, 1)
	}
	return text + fmt.Sprintf(`
---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso, namespace: t}
spec: {issuer: "https://sso.test", jwks: {url: "https://127.0.0.1:1/jwks"}, tokenURL: "https://127.0.0.1:%d/token", algorithms: [ES256]}
---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: other, namespace: t}
spec: {issuer: "https://other.test", jwks: {url: "https://127.0.0.1:1/jwks"}, tokenURL: "https://127.0.0.1:%d/token", algorithms: [ES256]}
`, port, port)
}

// dialIssuer is dial for an issuer's token endpoint.
func (h *hostile) dialIssuer(id, issuer string) (flow.Reason, string, int) {
	h.g.t.Helper()
	m, fds := h.ask(&linepb.Message{Body: &linepb.Message_DialIssuer{DialIssuer: &linepb.DialIssuer{Id: id, Issuer: issuer}}})
	r := m.GetDialReply()
	if r.GetError() != "" {
		return flow.Reason(r.GetReason()), r.GetError(), -1
	}
	if len(fds) != 1 {
		h.g.t.Fatalf("%d descriptors", len(fds))
	}
	return flow.ReasonOK, "", fds[0]
}

// An issuer is asked about a token only where the plan says so, with what the
// agent alone knows.
func TestIntrospectionIsHeldAgainstThePlan(t *testing.T) {
	g := newGround(t)
	h := g.connect(nil).ready()
	credentials := filepath.Join(t.TempDir(), "credentials")
	must(t, os.WriteFile(credentials, []byte("id:secret\n"), 0o600))
	asked := make(chan string, 1)
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, secret, _ := r.BasicAuth()
		asked <- id + ":" + secret + " " + r.PostFormValue("token")
		w.Header().Set("Content-Type", "application/json")
		w.Write([]byte(`{"active":false}`)) //nolint:errcheck // the agent has gone
	}))
	defer s.Close()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	g.introspection = introspect.New(roots)
	defer g.introspection.Close()
	g.policy(obtaining(1) + `
---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: opaque, namespace: t}
spec: {issuer: "https://opaque.test", introspection: {url: "` + s.URL + `/introspect", credentials: "` + credentials + `"}}
`)
	ask := func(issuer, token string) (string, string) {
		t.Helper()
		m, _ := h.ask(&linepb.Message{Body: &linepb.Message_Introspect{Introspect: &linepb.Introspect{Issuer: issuer, Token: token}}})
		return string(m.GetIntrospectReply().GetAnswer()), m.GetIntrospectReply().GetError()
	}
	for _, c := range []struct{ name, issuer, token, why string }{
		{"an issuer of signed tokens", "t/sso", "x", "no issuer that is asked"}, {"none", "", "x", "no issuer that is asked"}, {"a URL", s.URL, "x", "no issuer that is asked"},
		{"no token", "t/opaque", "", "a token of 0 bytes"}, {"a long token", "t/opaque", strings.Repeat("x", 17<<10), "a token of 17408 bytes"},
	} {
		if body, why := ask(c.issuer, c.token); body != "" || !strings.Contains(why, c.why) {
			t.Errorf("%s: %q %q", c.name, body, why)
		}
	}
	if body, why := ask("t/opaque", "x&y"); body != `{"active":false}` || why != "" {
		t.Errorf("%q %q", body, why)
	}
	if got := <-asked; got != "id:secret x&y" {
		t.Errorf("the issuer was asked %q", got)
	}
	s.Close()
	if body, why := ask("t/opaque", "x"); body != "" || why == "" || strings.Contains(why, "secret") {
		t.Errorf("with nobody there: %q %q", body, why)
	}
}

// A connection to a relation engine is made only for a model that has one.
func TestDialOfAnEngine(t *testing.T) {
	g := newGround(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	credentials := filepath.Join(t.TempDir(), "key")
	must(t, os.WriteFile(credentials, []byte("s3cret\n"), 0o600))
	h := g.connect(nil).ready()
	g.policy(obtaining(1) + `
---
apiVersion: sallyport.dev/v1alpha1
kind: RelationModel
metadata: {name: far, namespace: t}
spec: {engine: openfga, address: "` + l.Addr().String() + `", store: shop, credentials: "` + credentials + `"}
---
apiVersion: sallyport.dev/v1alpha1
kind: RelationModel
metadata: {name: near, namespace: t}
spec: {}
`)
	ask := func(model string) (secret, why string, fds []int) {
		t.Helper()
		m, fds := h.ask(&linepb.Message{Body: &linepb.Message_DialEngine{DialEngine: &linepb.DialEngine{Model: model}}})
		return m.GetDialEngineReply().GetSecret(), m.GetDialEngineReply().GetError(), fds
	}
	for _, model := range []string{"t/near", "t/none", "", l.Addr().String()} {
		before := g.refusals("dial")
		if secret, why, fds := ask(model); secret != "" || len(fds) != 0 || !strings.Contains(why, "no model with an engine elsewhere") || g.refusals("dial") != before+1 {
			t.Errorf("%s: %q %q %v", model, secret, why, fds)
		}
	}
	secret, why, fds := ask("t/far")
	if secret != "s3cret" || why != "" || len(fds) != 1 {
		t.Fatalf("%q %q %v", secret, why, fds)
	}
	unix.Close(fds[0])
	must(t, os.Chmod(credentials, 0o644))
	if secret, why, _ := ask("t/far"); secret != "" || !strings.Contains(why, "chmod 600") {
		t.Errorf("a key for everybody: %q %q", secret, why)
	}
	must(t, os.Chmod(credentials, 0o600))
	l.Close()
	if secret, why, fds := ask("t/far"); why == "" || len(fds) != 0 || strings.Contains(why, "s3cret") {
		t.Errorf("with nobody there: %q %q %v", secret, why, fds)
	}
}

// A connection to an issuer is made only for an identity that obtains tokens
// of it, and leads there whatever userspace may want.
func TestDialOfAnIssuer(t *testing.T) {
	g := newGround(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	h := g.connect(nil).ready()
	g.policy(obtaining(l.Addr().(*net.TCPAddr).Port))
	client := g.spiffe("client")
	for _, c := range []struct {
		name, id, issuer string
		want             flow.Reason
		why              string
	}{
		{"an identity that nobody has", "spiffe://nowhere/x", "t/sso", flow.ReasonLineRefused, "no identity of this node"},
		{"no identity", "", "t/sso", flow.ReasonLineRefused, "no identity of this node"},
		{"one that obtains none", g.spiffe("server"), "t/sso", flow.ReasonLineRefused, "obtains no token"},
		{"an issuer that it does not name", client, "t/other", flow.ReasonLineRefused, "obtains no token"},
		{"an issuer that is none", client, "https://127.0.0.1/", flow.ReasonLineRefused, "obtains no token"},
		{"past its validity", g.spiffe("lapsed"), "t/sso", flow.ReasonIdentityExpired, "expired at"},
	} {
		before := g.refusals("dial")
		reason, why, fd := h.dialIssuer(c.id, c.issuer)
		if reason != c.want || !strings.Contains(why, c.why) {
			t.Errorf("%s: %q (%s), want %q (%s)", c.name, reason, why, c.want, c.why)
		}
		if fd >= 0 {
			unix.Close(fd)
		}
		if c.want == flow.ReasonLineRefused && g.refusals("dial") != before+1 {
			t.Errorf("%s: not counted", c.name)
		}
	}
	reason, why, fd := h.dialIssuer(client, "t/sso")
	if reason != flow.ReasonOK {
		t.Fatalf("%s: %s", reason, why)
	}
	defer unix.Close(fd)
	conn, err := l.Accept()
	must(t, err)
	defer conn.Close()
	must(t, conn.SetDeadline(time.Now().Add(patience)))
	_, err = unix.Write(fd, []byte("x"))
	must(t, err)
	if n, err := conn.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Errorf("%d bytes came: %v", n, err)
	}
	l.Close()
	if reason, why, _ := h.dialIssuer(client, "t/sso"); reason != flow.ReasonUpstream {
		t.Errorf("with nothing there: %s (%s)", reason, why)
	}
	g.policy(documents)
	if reason, _, _ := h.dialIssuer(client, "t/sso"); reason != flow.ReasonLineRefused {
		t.Errorf("once nothing is obtained any more: %s", reason)
	}
}
