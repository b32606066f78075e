// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/obtain/issuertest"
)

// TestOpaqueTokens: the issuer is asked about a token that says nothing by
// itself, and what it takes back is refused.
func TestOpaqueTokens(t *testing.T) {
	require(t, "nginx", "curl")
	t.Parallel()
	n, far := one(t)
	i := issuertest.New(t, issuerURL, addrA)
	for name, content := range map[string][]byte{"roots.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Root}), "credentials": []byte("sallyport:s3cret\n")} {
		if err := os.WriteFile(n.path(name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n.env = []string{"SSL_CERT_FILE=" + n.path("roots.pem"), "SSL_CERT_DIR=/nonexistent"}
	n.policy("shop.yaml", strings.Replace(shopIn("enforce"), `http: ["GET /files/{name}", "HEAD /files/{name}"]}`,
		`http: ["GET /files/{name}"], token: {issuer: sso, audience: web, scopes: [read]}}`, 1)+`---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso, namespace: shop}
spec: {issuer: "`+issuerURL+`", introspection: {url: "https://`+addrA+`:8443/introspect", credentials: "`+n.path("credentials")+`"}, maxLifetime: 15m}
`)
	var mu sync.Mutex
	good, asked := map[string]time.Duration{"opaque-1": 3 * time.Second, "opaque-2": time.Minute}, map[string]int{}
	server := &http.Server{ReadHeaderTimeout: patience, ErrorLog: log.New(io.Discard, "", 0), TLSConfig: &tls.Config{Certificates: []tls.Certificate{i.Certificate}},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if id, secret, _ := r.BasicAuth(); id != "sallyport" || secret != "s3cret" {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			token := r.PostFormValue("token")
			asked[token]++
			answer := map[string]any{"active": false}
			if life, ok := good[token]; ok {
				answer = map[string]any{"active": true, "sub": "alice", "aud": "web", "scope": "read write", "iat": time.Now().Unix(), "exp": time.Now().Add(life).Unix()}
			}
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(answer) //nolint:errcheck // the agent has gone
		})}
	startNginx(t, n.group("web"), n.ns, 8080)
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)
	n.served("client", "web")
	get := func(token string) string {
		t.Helper()
		return code(t, n.group("client"), n.ns, webURL+"/files/hello", "-H", "Authorization: Bearer "+token)
	}
	if got := get("opaque-1"); got != "503 token_unavailable" {
		t.Errorf("with the issuer down: %s", got)
	}
	go server.ServeTLS(far.Listen(t, "tcp", netip.MustParseAddrPort(addrA+":8443")), "", "") //nolint:errcheck // ends with the listener
	t.Cleanup(func() { server.Close() })
	eventually(t, "the token to count", func() string {
		if got := get("opaque-1"); got != "200" {
			return got
		}
		return ""
	})
	if got := get("opaque-9"); got != "401 token_inactive" {
		t.Errorf("a token that the issuer does not know: %s", got)
	}
	for range 5 {
		if got := get("opaque-2"); got != "200" {
			t.Errorf("another: %s", got)
		}
	}
	mu.Lock()
	if asked["opaque-2"] != 1 {
		t.Errorf("the issuer was asked %d times about one token", asked["opaque-2"])
	}
	delete(good, "opaque-1")
	mu.Unlock()
	// The answer counts no longer than the token's end.
	eventually(t, "the issuer's word to count", func() string {
		if got := get("opaque-1"); got != "401 token_inactive" {
			return got
		}
		return ""
	})
	for _, f := range []string{"decisions.json", "agent.log"} {
		if b, err := os.ReadFile(n.path(f)); err != nil || strings.Contains(string(b), "opaque-") || strings.Contains(string(b), "s3cret") {
			t.Errorf("%s holds a token or a secret (%v)", f, err)
		}
	}
}
