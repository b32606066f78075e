// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const issuerURL = "https://sso.e2e.sallyport"

// issuer signs tokens.
type issuer struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	jwks []byte
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	jwks, err := json.Marshal(map[string]any{"keys": []map[string]string{{
		"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": "k1", "x": b64(pub[1:33]), "y": b64(pub[33:65]),
	}}})
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{t, key, jwks}
}

// token signs one for a subject with an id, good for five minutes.
func (s *issuer) token(subject, jti string) string {
	s.t.Helper()
	return s.authenticated(subject, jti, time.Now())
}

// authenticated is token with the time at which the subject authenticated.
func (s *issuer) authenticated(subject, jti string, at time.Time) string {
	s.t.Helper()
	now := time.Now()
	k := jwt.NewWithClaims(jwt.SigningMethodES256, jwt.MapClaims{
		"iss": issuerURL, "sub": subject, "aud": "web", "client_id": "e2e", "scope": "read",
		"iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(), "jti": jti, "auth_time": at.Unix(),
	})
	k.Header["typ"], k.Header["kid"] = "at+jwt", "k1"
	signed, err := k.SignedString(s.key)
	if err != nil {
		s.t.Fatal(err)
	}
	return signed
}

// withToken adds an issuer whose keys come from jwks, and a relation, to the
// shop's rule for reading.
func withToken(jwks, mode string) string {
	rule := `{name: read, from: [client], http: ["GET /files/{name}"], token: {issuer: sso, audience: web, scopes: [read]}, relation: "user:{token.sub} can_read doc:{header.X-Doc}"}`
	return strings.Replace(shopIn(mode), `{name: read, from: [client], http: ["GET /files/{name}", "HEAD /files/{name}"]}`, rule, 1) + `---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso, namespace: shop}
spec: {issuer: "` + issuerURL + `", jwks: ` + jwks + `, algorithms: [ES256], maxLifetime: 15m}
---
apiVersion: sallyport.dev/v1alpha1
kind: RelationModel
metadata: {name: docs, namespace: shop}
spec:
  model: |
    model
      schema 1.1
    type user
    type doc
      relations
        define can_read: [user]
`
}

// tokenNode starts a node whose web asks for a token and a relation.
func tokenNode(t *testing.T, n *node, jwks string) {
	t.Helper()
	n.policy("shop.yaml", withToken(jwks, "enforce"))
	n.policy("docs.tuples.yaml", `- {user: "user:alice", relation: can_read, object: "doc:1"}`+"\n")
	startNginx(t, n.group("web"), n.ns, 8080)
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)
	n.served("client", "web")
}

// getAs calls with a token, about a document.
func (n *node) getAs(token, doc string) string {
	n.t.Helper()
	return code(n.t, n.group("client"), n.ns, webURL+"/files/hello", "-H", "Authorization: Bearer "+token, "-H", "X-Doc: "+doc)
}

func (n *node) awaitAs(token, doc, want string) {
	n.t.Helper()
	eventually(n.t, "the call to get "+want, func() string {
		if got := n.getAs(token, doc); got != want {
			return got
		}
		return ""
	})
}

// TestKeysThatAreNotThere starts without an issuer's keys, in a file and
// behind a URL, has them appear, and takes them away again.
func TestKeysThatAreNotThere(t *testing.T) {
	require(t, "nginx", "curl")
	t.Run("file", func(t *testing.T) {
		t.Parallel()
		n, _ := one(t)
		s := newIssuer(t)
		file := n.path("jwks.json")
		tokenNode(t, n, `{file: "`+file+`"}`)
		token := s.token("alice", "t1")
		if got := n.getAs(token, "1"); got != "503 token_unavailable" {
			t.Errorf("without keys: %s", got)
		}
		n.problem("jwks")
		if err := os.WriteFile(file, s.jwks, 0o644); err != nil {
			t.Fatal(err)
		}
		n.awaitAs(token, "1", "200")
		if err := os.WriteFile(file, []byte("{broken"), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := n.getAs(token, "1"); got != "200" {
			t.Errorf("with a broken file after a good one: %s", got)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if got := n.getAs(token, "1"); got != "200" {
			t.Errorf("with the file gone after a good one: %s", got)
		}
		if got := n.getAs(newIssuer(t).token("alice", "t1"), "1"); got != "401 token_signature" {
			t.Errorf("another's signature: %s", got)
		}
	})
	t.Run("URL", func(t *testing.T) {
		t.Parallel()
		n, far := one(t)
		s := newIssuer(t)
		cert, roots := serverCertificate(t, addrA)
		// The agent trusts what the machine trusts.
		bundle := n.path("roots.pem")
		if err := os.WriteFile(bundle, roots, 0o644); err != nil {
			t.Fatal(err)
		}
		n.env = []string{"SSL_CERT_FILE=" + bundle, "SSL_CERT_DIR=/nonexistent"}
		tokenNode(t, n, `{url: "https://`+addrA+`:8443/jwks"}`)
		token := s.token("alice", "t1")
		if got := n.getAs(token, "1"); got != "503 token_unavailable" {
			t.Errorf("with the issuer down: %s", got)
		}
		n.problem("jwks")
		l := far.Listen(t, "tcp", netip.MustParseAddrPort(addrA+":8443"))
		server := &http.Server{
			Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/jwk-set+json")
				w.Write(s.jwks) //nolint:errcheck // the agent has gone
			}),
			TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}}, ReadHeaderTimeout: patience, ErrorLog: log.New(io.Discard, "", 0),
		}
		go server.ServeTLS(l, "", "") //nolint:errcheck // ends with the listener
		t.Cleanup(func() { server.Close() })
		n.awaitAs(token, "1", "200")
		server.Close()
		if got := n.getAs(token, "1"); got != "200" {
			t.Errorf("with the issuer down after its keys were had: %s", got)
		}
	})
}

// problem waits until the status holds a problem whose text has a word in it.
func (n *node) problem(word string) {
	n.t.Helper()
	eventually(n.t, "a problem about "+word, func() string {
		s, err := n.status()
		if err != nil {
			return err.Error()
		}
		for _, i := range proxyOf(s).Issuers {
			if i.Keys == 0 && i.Problem != "" {
				return ""
			}
		}
		return fmt.Sprintf("%v %v", s.GetProblems(), proxyOf(s).Issuers)
	})
}

// serverCertificate makes one for an address, and its roots.
func serverCertificate(t *testing.T, address string) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "issuer"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.ParseIP(address)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// TestRelationsAndRevocationsByTheCommandLine changes both by the verbs, and
// calls as soon as each has returned.
func TestRelationsAndRevocationsByTheCommandLine(t *testing.T) {
	require(t, "nginx", "curl")
	t.Parallel()
	n, stranger := one(t)
	s := newIssuer(t)
	file := n.path("jwks.json")
	if err := os.WriteFile(file, s.jwks, 0o644); err != nil {
		t.Fatal(err)
	}
	tokenNode(t, n, `{file: "`+file+`"}`)
	bob := s.token("bob", "b1")
	n.awaitAs(s.token("alice", "a0"), "1", "200")
	now := func(what, token, doc, want string) {
		t.Helper()
		if got := n.getAs(token, doc); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	now("no relation", bob, "1", "403 relation_missing")
	for range 5 {
		n.mustRun("relation", "write", "user:bob", "can_read", "doc:1")
		now("written", bob, "1", "200")
		n.mustRun("relation", "delete", "user:bob", "can_read", "doc:1")
		now("deleted", bob, "1", "403 relation_missing")
	}
	now("a value that a relation cannot take", bob, "1#x", "403 relation_template")
	now("no token", "", "1", "401 token_missing")
	n.mustRun("relation", "write", "user:bob", "can_read", "doc:2")
	if out := n.mustRun("relation", "check", "user:bob", "can_read", "doc:2"); out != "allowed\n" {
		t.Errorf("check says %q", out)
	}
	if out, err := n.run("relation", "check", "user:bob", "can_read", "doc:1"); err == nil || out != "denied\n" {
		t.Errorf("check says %q %v", out, err)
	}
	if out := n.mustRun("relation", "list-objects", "user:bob", "can_read", "doc"); out != "doc:2\n" {
		t.Errorf("list-objects says %q", out)
	}

	second := s.token("bob", "b2")
	now("before", bob, "2", "200")
	n.mustRun("revoke", "jti", "b1", "--why", "lost")
	now("a token that is revoked", bob, "2", "401 token_revoked")
	now("another of the same subject", second, "2", "200")
	n.mustRun("revoke", "subject", issuerURL+"|bob")
	now("a subject that is revoked", second, "2", "401 token_revoked")
	now("another subject", s.token("alice", "a1"), "1", "200")
	n.mustRun("revoke", "lift", "subject", issuerURL+"|bob")
	now("lifted", s.token("bob", "b3"), "2", "200")
	n.mustRun("revoke", "identity", n.id("client"))
	if got := n.getAs(second, "2"); got == "200" {
		t.Errorf("an identity that is revoked got %s", got)
	}
	out := n.mustRun("revoke", "list")
	for _, want := range []string{"b1", n.id("client"), "lost"} {
		if !strings.Contains(out, want) {
			t.Errorf("revoke list lacks %s: %s", want, out)
		}
	}
	n.hangUp()
	n.agent.kill()
	n.start()
	n.served("web")
	if got := n.getAs(second, "2"); got == "200" {
		t.Errorf("after SIGKILL and a restart the identity is not revoked: %s", got)
	}
	n.mustRun("revoke", "lift", "identity", n.id("client"))
	n.awaitAs(s.token("bob", "b4"), "2", "200")
	now("the token, after the restart", bob, "2", "401 token_revoked")
	now("the relation, after the restart", s.token("bob", "b5"), "1", "403 relation_missing")
	if got := code(t, "", stranger, webURL+"/files/hello", "-H", "Authorization: Bearer "+s.token("alice", "a2"), "-H", "X-Doc: 1"); got != "403 mtls_required" {
		t.Errorf("a stolen token got %s", got)
	}
	if _, err := n.run("revoke", "everything", "x"); err == nil {
		t.Error("an unknown kind was revoked")
	}
	// Nothing of a token is in any log.
	for _, f := range []string{"decisions.json", "agent.log"} {
		b, err := os.ReadFile(n.path(f))
		if err != nil || strings.Contains(string(b), strings.Split(bob, ".")[2]) {
			t.Errorf("%s holds a token's signature (%v)", f, err)
		}
	}
}

// TestAuditNeedsNoToken: what lacks a token is let through where policy is in
// audit, and said.
func TestAuditNeedsNoToken(t *testing.T) {
	require(t, "nginx", "curl")
	t.Parallel()
	n, _ := one(t)
	n.policy("shop.yaml", withToken(`{file: "`+n.path("jwks.json")+`"}`, "audit"))
	startNginx(t, n.group("web"), n.ns, 8080)
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)
	n.served("client", "web")
	for _, c := range []struct{ name, token, reason string }{
		{"no token", "", "token_missing"}, {"a token, and no keys", newIssuer(t).token("alice", "a"), "token_unavailable"}, {"no token at all", "x", "token_malformed"},
	} {
		from := n.mark()
		args := []string{"-H", "X-Doc: 1"}
		if c.token != "" {
			args = append(args, "-H", "Authorization: Bearer "+c.token)
		}
		if got := code(t, n.group("client"), n.ns, webURL+"/files/hello", args...); got != "200" {
			t.Errorf("%s: %s", c.name, got)
		}
		n.decided(from, c.name, func(r *record) bool { return r.WouldDeny && r.Reason == c.reason && r.Decision == "deny" })
	}
}
