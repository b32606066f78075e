// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
)

// TestDPoP: who calls without a certificate of ours proves a key with each
// request; what is overheard is worth nothing.
func TestDPoP(t *testing.T) {
	require(t, "nginx", "curl")
	t.Parallel()
	n, far := one(t)
	s := newIssuer(t)
	if err := os.WriteFile(n.path("jwks.json"), s.jwks, 0o644); err != nil {
		t.Fatal(err)
	}
	// Callers from elsewhere, over plain HTTP.
	text := strings.Replace(shopIn("enforce"), "mtls: required\n  rules:\n    - {name: read, from: [client], http: [\"GET /files/{name}\", \"HEAD /files/{name}\"]}",
		"mtls: permissive\n  rules:\n    - {name: read, all: true, http: [\"GET /files/{name}\"], token: {issuer: sso, audience: web, scopes: [read], boundTo: dpop}}", 1)
	if !strings.Contains(text, "boundTo: dpop") {
		t.Fatal("the policies are others")
	}
	n.policy("shop.yaml", text+`---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso, namespace: shop}
spec: {issuer: "`+issuerURL+`", jwks: {file: "`+n.path("jwks.json")+`"}, algorithms: [ES256], maxLifetime: 15m}
`)
	startNginx(t, n.group("web"), n.ns, 8080)
	n.start()
	n.served("web")

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	jwk := map[string]string{"kty": "EC", "crv": "P-256", "x": b64(point[1:33]), "y": b64(point[33:])}
	canonical, err := json.Marshal(jwk)
	if err != nil {
		t.Fatal(err)
	}
	sign := func(key *ecdsa.PrivateKey, typ string, header map[string]any, claims jwt.MapClaims) string {
		t.Helper()
		k := jwt.NewWithClaims(jwt.SigningMethodES256, claims)
		k.Header["typ"] = typ
		maps.Copy(k.Header, header)
		signed, err := k.SignedString(key)
		if err != nil {
			t.Fatal(err)
		}
		return signed
	}
	thumbprint := sha256.Sum256(canonical)
	now := time.Now()
	token := sign(s.key, "at+jwt", map[string]any{"kid": "k1"}, jwt.MapClaims{"iss": issuerURL, "sub": "alice", "aud": "web", "client_id": "e2e", "scope": "read",
		"iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(), "cnf": map[string]string{"jkt": b64(thumbprint[:])}})
	ath := sha256.Sum256([]byte(token))
	proof := func(jti, method string) string {
		return sign(key, "dpop+jwt", map[string]any{"jwk": jwk}, jwt.MapClaims{"jti": jti, "htm": method, "htu": webURL + "/files/hello", "iat": time.Now().Unix(), "ath": b64(ath[:])})
	}
	get := func(scheme, proof string) string {
		t.Helper()
		args := []string{"-H", "Authorization: " + scheme + " " + token}
		if proof != "" {
			args = append(args, "-H", "DPoP: "+proof)
		}
		return code(t, "", far, webURL+"/files/hello", args...)
	}
	// What a node has never kept it does not know to be unused: proofs of its
	// first seconds are refused.
	eventually(t, "the call to get through", func() string {
		if got := get("DPoP", proof(time.Now().String(), "GET")); got != "200" {
			return got
		}
		return ""
	})
	first := proof("p1", "GET")
	for _, c := range []struct{ what, scheme, proof, want string }{
		{"the first proof", "DPoP", first, "200"}, {"the same again", "DPoP", first, "401 dpop_replayed"}, {"another", "DPoP", proof("p2", "GET"), "200"},
		{"for another method", "DPoP", proof("p3", "HEAD"), "401 dpop_mismatch"}, {"none", "DPoP", "", "401 dpop_missing"},
		{"as a bearer token", "Bearer", proof("p4", "GET"), "401"}, {"as a bearer token alone", "Bearer", "", "401"},
	} {
		if got := get(c.scheme, c.proof); got != c.want {
			t.Errorf("%s: %s, want %s", c.what, got, c.want)
		}
	}
	// The process that remembers is killed.
	last := proof("p5", "GET")
	if got := get("DPoP", last); got != "200" {
		t.Errorf("before the kill: %s", got)
	}
	pid := n.userspacePID()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.await("run another", func(s *controlpb.StatusReply) bool {
		return s.GetUserspace().GetReady() && int(s.GetUserspace().GetPid()) != pid && s.GetReady()
	})
	got := ""
	eventually(t, "an answer to what was used before the kill", func() string { // the issuer's keys come again
		if got = get("DPoP", last); !strings.HasPrefix(got, "401 dpop_") {
			return got
		}
		return ""
	})
	if got != "401 dpop_replayed" {
		t.Errorf("what was used before the kill: %s", got)
	}
	if got := get("DPoP", proof("p6", "GET")); got != "200" {
		t.Errorf("another after the kill: %s", got)
	}
	for _, f := range []string{"decisions.json", "agent.log"} {
		if b, err := os.ReadFile(n.path(f)); err != nil || strings.Contains(string(b), strings.Split(token, ".")[2]) || strings.Contains(string(b), strings.Split(first, ".")[2]) {
			t.Errorf("%s holds a token or a proof (%v)", f, err)
		}
	}
}
