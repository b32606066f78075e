// SPDX-License-Identifier: Apache-2.0

package token

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"maps"
	"math/big"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	testIssuer   = "shop/sso"
	testURL      = "https://sso.shop.example"
	testAudience = "payments"
)

var b64 = base64.RawURLEncoding.EncodeToString

// signer is one key of the tests' issuer.
type signer struct {
	id      string
	method  jwt.SigningMethod
	private crypto.Signer
}

func newES256(t testing.TB, id string) *signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &signer{id, jwt.SigningMethodES256, k}
}

func newEdDSA(t testing.TB, id string) *signer {
	t.Helper()
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &signer{id, jwt.SigningMethodEdDSA, k}
}

func newRSA(t testing.TB, id string, method jwt.SigningMethod) *signer {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return &signer{id, method, k}
}

// jwk is the signer's public key as RFC 7517 writes it.
func (s *signer) jwk() map[string]any {
	m := map[string]any{"kid": s.id, "use": "sig"}
	switch k := s.private.Public().(type) {
	case *ecdsa.PublicKey:
		point, err := k.Bytes()
		if err != nil {
			panic(err)
		}
		half := len(point) / 2
		m["kty"], m["crv"], m["x"], m["y"] = "EC", k.Curve.Params().Name, b64(point[1:1+half]), b64(point[1+half:])
	case ed25519.PublicKey:
		m["kty"], m["crv"], m["x"] = "OKP", "Ed25519", b64(k)
	case *rsa.PublicKey:
		m["kty"], m["n"], m["e"], m["alg"] = "RSA", b64(k.N.Bytes()), b64(big.NewInt(int64(k.E)).Bytes()), s.method.Alg()
	}
	return m
}

func jwks(t testing.TB, keys ...map[string]any) []byte {
	t.Helper()
	b, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// raw signs a header and claims given as JSON text, well-formed or not.
func (s *signer) raw(t testing.TB, header, claims string) []byte {
	t.Helper()
	signed := b64([]byte(header)) + "." + b64([]byte(claims))
	sig, err := s.method.Sign(signed, s.private)
	if err != nil {
		t.Fatal(err)
	}
	return []byte(signed + "." + b64(sig))
}

func (s *signer) header() map[string]any {
	return map[string]any{"alg": s.method.Alg(), "typ": "at+jwt", "kid": s.id}
}

// sign signs a header and claims, each changed by the caller.
func (s *signer) sign(t testing.TB, header, claims map[string]any) []byte {
	t.Helper()
	h, err := json.Marshal(header)
	if err != nil {
		t.Fatal(err)
	}
	c, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return s.raw(t, string(h), string(c))
}

// claimsAt are good claims of a token issued at now.
func claimsAt(now time.Time) map[string]any {
	return map[string]any{
		"iss": testURL, "sub": "alice", "aud": testAudience, "client_id": "web", "jti": "id-1",
		"iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(), "scope": "payments:read payments:write",
		"groups": []string{"staff"},
	}
}

// with returns m with name set to value, or without it where value is nil.
func with(m map[string]any, name string, value any) map[string]any {
	out := make(map[string]any, len(m)+1)
	maps.Copy(out, m)
	if value == nil {
		delete(out, name)
	} else {
		out[name] = value
	}
	return out
}

// newVerifier holds one issuer with the signers' keys.
func newVerifier(t testing.TB, signers ...*signer) *Verifier {
	t.Helper()
	v := New(Options{})
	if err := v.SetIssuer(Issuer{Name: testIssuer, URL: testURL, Algorithms: []string{"ES256", "EdDSA", "RS256", "PS256"}, MaxLifetime: 15 * time.Minute}); err != nil {
		t.Fatal(err)
	}
	keys := make([]map[string]any, len(signers))
	for i, s := range signers {
		keys[i] = s.jwk()
	}
	if err := v.SetKeys(testIssuer, jwks(t, keys...), time.Now()); err != nil {
		t.Fatal(err)
	}
	return v
}

func check() *Check { return &Check{Issuer: testIssuer, Audience: testAudience} }
