// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
