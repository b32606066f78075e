// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/pem"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace/obtain/issuertest"
)

// obtaining are shop's policies in which web asks for a token that is bound to
// the caller's certificate, and client's node obtains it.
func obtaining(jwks, tokenURL string) string {
	text := strings.Replace(shopIn("enforce"), `http: ["GET /files/{name}", "HEAD /files/{name}"]}`,
		`http: ["GET /files/{name}"], token: {issuer: sso, audience: web, scopes: [read], boundTo: mtls}}`, 1)
	text = strings.Replace(text, "mayCall: [web, stream]}", "mayCall: [web, stream], tokens: [{to: web, issuer: sso, audience: web, scopes: [read]}]}", 1)
	return text + `---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso, namespace: shop}
spec: {issuer: "` + issuerURL + `", jwks: {file: "` + jwks + `"}, tokenURL: "` + tokenURL + `", algorithms: [ES256], maxLifetime: 15m}
`
}

// obtains writes the policies, and has the agent believe the issuer.
func (n *node) obtains(s *issuertest.Issuer, host string) {
	n.t.Helper()
	for name, content := range map[string][]byte{"jwks.json": s.JWKS(), "roots.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Root})} {
		if err := os.WriteFile(n.path(name), content, 0o644); err != nil {
			n.t.Fatal(err)
		}
	}
	n.env = []string{"SSL_CERT_FILE=" + n.path("roots.pem"), "SSL_CERT_DIR=/nonexistent"}
	n.policy("shop.yaml", obtaining(n.path("jwks.json"), "https://"+host+":8443/token"))
}

// getBare calls as client's programs do, without any token.
func (n *node) getBare(args ...string) string {
	n.t.Helper()
	return code(n.t, n.group("client"), n.ns, webURL+"/files/hello", args...)
}

// TestTokensForWorkloads: an application without any token gets through where
// one that is bound is asked for, because its node obtains it.
func TestTokensForWorkloads(t *testing.T) {
	require(t, "nginx", "curl")
	listen := func(t *testing.T, s *issuertest.Issuer, ns *testenv.Netns, host string) {
		t.Helper()
		s.Serve(ns.Listen(t, "tcp", netip.MustParseAddrPort(host+":8443")))
	}
	t.Run("one node", func(t *testing.T) {
		t.Parallel()
		n, far := one(t)
		s := issuertest.New(t, issuerURL, addrA)
		n.obtains(s, addrA)
		startNginx(t, n.group("web"), n.ns, 8080)
		n.start()
		act(t, n.group("client"), n.ns, "idle").line(t)
		n.served("client", "web")
		if got := n.getBare(); got != "401 token_missing" {
			t.Errorf("with the issuer down: %s", got)
		}
		n.await("say that there is no token", func(s *controlpb.StatusReply) bool {
			for _, p := range s.GetProblems() {
				if p.GetId() == "tokens" && strings.Contains(p.GetText(), "shop/sso") && strings.Contains(p.GetText(), n.id("client")) {
					return true
				}
			}
			return false
		})
		listen(t, s, far, addrA)
		eventually(t, "the call to get through", func() string {
			if got := n.getBare(); got != "200" {
				return got
			}
			return ""
		})
		asked := s.Requests()[0]
		if asked.ID != n.id("client") || asked.Form.Get("client_id") != n.id("client") || asked.Form.Get("scope") != "read" {
			t.Errorf("%s asked for a token: %v", asked.ID, asked.Form)
		}
		n.await("be well", func(s *controlpb.StatusReply) bool { return s.GetReady() && len(s.GetProblems()) == 0 })
		// Who steals it has another certificate, or none.
		if got := code(t, "", far, webURL+"/files/hello"); got != "403 mtls_required" {
			t.Errorf("a stranger: %s", got)
		}
		if got := n.getBare("-H", "Authorization: Bearer x.y.z"); got != "401 token_malformed" {
			t.Errorf("a token of its own: %s", got)
		}
		out := n.mustRun("identity", "list", "-o", "json")
		if !strings.Contains(out, `"to": "shop/web"`) {
			t.Errorf("identity list lacks the token: %s", out)
		}
		for _, f := range []string{"decisions.json", "agent.log"} {
			if b, err := os.ReadFile(n.path(f)); err != nil || strings.Contains(string(b), "Bearer ey") || strings.Contains(string(b), `"ey`) {
				t.Errorf("%s holds a token (%v)", f, err)
			}
		}
	})
	t.Run("two nodes", func(t *testing.T) {
		t.Parallel()
		a, b := two(t)
		s := issuertest.New(t, issuerURL, addrB)
		listen(t, s, b.ns, addrB)
		a.obtains(s, addrB)
		b.obtains(s, addrB)
		startNginx(t, b.group("web"), b.ns, 8080)
		b.start()
		a.start()
		act(t, a.group("client"), a.ns, "idle").line(t)
		a.served("client")
		b.served("web")
		from := b.mark()
		for range 3 {
			if got := a.getBare(); got != "200" {
				t.Fatalf("got %s: %s", got, a.mustRun("status"))
			}
		}
		r := b.decided(from, "the call", func(r *record) bool { return r.Decision == "allow" && r.Method == "GET" })
		if r.Source != a.id("client") || r.Channel != "tunnel" || r.Rule != "read" {
			t.Errorf("%+v", r)
		}
	})
}
