// SPDX-License-Identifier: Apache-2.0

package token

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func expect(t *testing.T, v *Verifier, token []byte, c *Check, want flow.Reason) {
	t.Helper()
	if _, reason, err := v.Verify(token, c); reason != want {
		t.Fatalf("got %q (%v), want %q", reason, err, want)
	}
}

func TestClaims(t *testing.T) {
	ec, now := newES256(t, "ec"), time.Now()
	v := newVerifier(t, ec)
	leaf := sha256.Sum256([]byte("leaf"))
	claims := with(with(claimsAt(now), "cnf", map[string]any{"x5t#S256": b64(leaf[:])}), "nbf", now.Unix())
	claims = with(claims, "deep", map[string]any{"n": 7, "f": 1.5, "b": true, "z": nil, "a": []any{"\t\"é😀"}})
	c := check()
	c.Thumbprints = [][32]byte{leaf}
	got, reason, err := v.Verify(ec.sign(t, ec.header(), claims), c)
	if err != nil {
		t.Fatal(reason, err)
	}
	if got.Issuer != testURL || got.Subject != "alice" || got.ID != "id-1" || got.ClientID != "web" ||
		got.SubjectKey != testURL+"|alice" || got.TokenKey != testURL+"|id-1" ||
		fmt.Sprint(got.Scopes, got.Groups, got.Audience) != "[payments:read payments:write] [staff] [payments]" ||
		got.IssuedAt.Unix() != now.Unix() || got.NotBefore.Unix() != now.Unix() || got.Expiry.Unix() != now.Add(5*time.Minute).Unix() ||
		!got.Bound || got.Thumbprint != leaf {
		t.Fatalf("got %+v", got)
	}
	deep := got.Raw["deep"].(map[string]any)
	if deep["n"] != int64(7) || deep["f"] != 1.5 || deep["b"] != true || deep["z"] != nil || deep["a"].([]any)[0] != "\t\"é😀" {
		t.Fatalf("raw claims %#v", deep)
	}
}

// TestAuthentication holds how and when the subject authenticated against what
// a rule asks for (RFC 9470).
func TestAuthentication(t *testing.T) {
	ec, now := newES256(t, "ec"), time.Now()
	v := newVerifier(t, ec)
	ago := func(d time.Duration) int64 { return now.Add(-d).Unix() }
	for _, c := range []struct {
		name          string
		acr, authTime any // nil: the token has none
		asks          Check
		want          flow.Reason
	}{
		{"nothing asked for", nil, nil, Check{}, flow.ReasonOK},
		{"the class", "mfa", nil, Check{ACR: []string{"mfa", "hwk"}}, flow.ReasonOK},
		{"another class", "pwd", nil, Check{ACR: []string{"mfa", "hwk"}}, flow.ReasonStepUp},
		{"a part of the class", "mf", nil, Check{ACR: []string{"mfa"}}, flow.ReasonStepUp},
		{"no class", nil, nil, Check{ACR: []string{"mfa"}}, flow.ReasonStepUp},
		{"a class that is none", []string{"mfa"}, nil, Check{ACR: []string{"mfa"}}, flow.ReasonStepUp},
		{"an empty class", "", nil, Check{ACR: []string{"mfa"}}, flow.ReasonStepUp},
		{"recent enough", nil, ago(time.Minute), Check{MaxAge: 5 * time.Minute}, flow.ReasonOK},
		{"a moment too old", nil, ago(5 * time.Minute), Check{MaxAge: 5 * time.Minute}, flow.ReasonStepUp},
		{"no time", nil, nil, Check{MaxAge: 5 * time.Minute}, flow.ReasonStepUp},
		{"a time that is none", nil, "now", Check{MaxAge: 5 * time.Minute}, flow.ReasonStepUp},
		{"a time to come", nil, ago(-time.Hour), Check{MaxAge: 5 * time.Minute}, flow.ReasonStepUp},
		{"a clock that is ahead", nil, ago(-10 * time.Second), Check{MaxAge: 5 * time.Minute}, flow.ReasonOK},
		{"both, one of them", "mfa", ago(time.Hour), Check{ACR: []string{"mfa"}, MaxAge: time.Minute}, flow.ReasonStepUp},
		{"scope before it", "pwd", nil, Check{Scopes: []string{"x"}, ACR: []string{"mfa"}}, flow.ReasonTokenScope},
	} {
		claims := claimsAt(now)
		if c.acr != nil {
			claims = with(claims, "acr", c.acr)
		}
		if c.authTime != nil {
			claims = with(claims, "auth_time", c.authTime)
		}
		raw := ec.sign(t, ec.header(), claims)
		for _, how := range []string{"first", "cached"} {
			asked := check()
			asked.Now, asked.ACR, asked.MaxAge, asked.Scopes = now, c.asks.ACR, c.asks.MaxAge, c.asks.Scopes
			if _, reason, err := v.Verify(raw, asked); reason != c.want || (err == nil) != (c.want == flow.ReasonOK) {
				t.Errorf("%s, %s: %s, %v; want %q", c.name, how, reason, err, c.want)
			}
		}
	}
}

// A hit must be held against all that can have changed since.
func TestHitIsJudgedAgain(t *testing.T) {
	ec, now := newES256(t, "ec"), time.Now()
	leaf, other := sha256.Sum256([]byte("leaf")), sha256.Sum256([]byte("other"))
	claims := with(claimsAt(now), "cnf", map[string]any{"x5t#S256": b64(leaf[:])})
	tests := []struct {
		name   string
		change func(*Verifier, *Check) error
		want   flow.Reason
	}{
		{"nothing", func(*Verifier, *Check) error { return nil }, flow.ReasonOK},
		{"time", func(_ *Verifier, c *Check) error { c.Now = now.Add(6 * time.Minute); return nil }, flow.ReasonTokenExpired},
		{"clock turned back", func(_ *Verifier, c *Check) error { c.Now = now.Add(-time.Hour); return nil }, flow.ReasonTokenNotYet},
		{"audience", func(_ *Verifier, c *Check) error { c.Audience = "ledger"; return nil }, flow.ReasonTokenAudience},
		{"scope", func(_ *Verifier, c *Check) error { c.Scopes = []string{"x"}; return nil }, flow.ReasonTokenScope},
		{"connection", func(_ *Verifier, c *Check) error { c.Thumbprints = [][32]byte{other}; return nil }, flow.ReasonTokenBinding},
		{"plaintext connection", func(_ *Verifier, c *Check) error { c.Thumbprints = nil; return nil }, flow.ReasonTokenProof},
		{"another issuer's rule", func(v *Verifier, c *Check) error {
			c.Issuer = "shop/b"
			return v.SetIssuer(Issuer{Name: "shop/b", URL: "https://b.example"})
		}, flow.ReasonTokenIssuer},
		{"issuer gone", func(v *Verifier, _ *Check) error { return v.SetIssuers(nil) }, flow.ReasonTokenIssuer},
		{"key gone", func(v *Verifier, _ *Check) error {
			return v.SetKeys(testIssuer, jwks(t, newES256(t, "new").jwk()), time.Now())
		}, flow.ReasonTokenKey},
		{"key of that kid replaced", func(v *Verifier, _ *Check) error {
			return v.SetKeys(testIssuer, jwks(t, newES256(t, "ec").jwk()), time.Now())
		}, flow.ReasonTokenSignature},
		{"keys stale", func(v *Verifier, _ *Check) error {
			return v.SetKeys(testIssuer, jwks(t, ec.jwk()), now.Add(-MaxKeyAge-time.Minute))
		}, flow.ReasonTokenKeysStale},
		{"algorithm withdrawn", func(v *Verifier, _ *Check) error {
			return v.SetIssuer(Issuer{Name: testIssuer, URL: testURL, Algorithms: []string{"EdDSA"}})
		}, flow.ReasonTokenAlgorithm},
		{"shorter lifetimes", func(v *Verifier, _ *Check) error {
			return v.SetIssuer(Issuer{Name: testIssuer, URL: testURL, MaxLifetime: time.Minute})
		}, flow.ReasonTokenLifetime},
		{"another type", func(v *Verifier, _ *Check) error {
			return v.SetIssuer(Issuer{Name: testIssuer, URL: testURL, Types: []string{"JWT"}})
		}, flow.ReasonTokenType},
		{"a claim required", func(v *Verifier, _ *Check) error {
			return v.SetIssuer(Issuer{Name: testIssuer, URL: testURL, Require: []Requirement{{"client_id", []string{"cli", "we"}}}})
		}, flow.ReasonTokenClaims},
		{"a claim required that it has", func(v *Verifier, _ *Check) error {
			return v.SetIssuer(Issuer{Name: testIssuer, URL: testURL, Require: []Requirement{{"client_id", []string{"cli", "web"}}, {"groups", []string{"staff"}}}})
		}, flow.ReasonOK},
		{"audiences of the issuer", func(v *Verifier, _ *Check) error {
			return v.SetIssuer(Issuer{Name: testIssuer, URL: testURL, Audiences: []string{"ledger"}})
		}, flow.ReasonTokenAudience},
		{"jti of the issuer revoked", func(v *Verifier, _ *Check) error {
			return v.SetRevocations([]Revocation{{Kind: "jti", Value: testURL + "|id-1"}})
		}, flow.ReasonTokenRevoked},
		{"jti of another issuer revoked", func(v *Verifier, _ *Check) error {
			return v.SetRevocations([]Revocation{{Kind: "jti", Value: "https://other.example|id-1"}})
		}, flow.ReasonOK},
		{"jti revoked", func(v *Verifier, _ *Check) error {
			return v.SetRevocations([]Revocation{{Kind: "jti", Value: "id-1"}})
		}, flow.ReasonTokenRevoked},
		{"subject revoked", func(v *Verifier, _ *Check) error {
			return v.SetRevocations([]Revocation{{Kind: "subject", Value: testURL + "|alice", Since: now}})
		}, flow.ReasonTokenRevoked},
		{"issuer revoked by URL", func(v *Verifier, _ *Check) error {
			return v.SetRevocations([]Revocation{{Kind: "issuer", Value: testURL, Since: now}})
		}, flow.ReasonTokenRevoked},
		{"issuer revoked by name", func(v *Verifier, _ *Check) error {
			return v.SetRevocations([]Revocation{{Kind: "issuer", Value: testIssuer, Since: now}})
		}, flow.ReasonTokenRevoked},
		{"subject revoked long before", func(v *Verifier, _ *Check) error {
			return v.SetRevocations([]Revocation{{Kind: "subject", Value: testURL + "|alice", Since: now.Add(-time.Hour)}})
		}, flow.ReasonOK},
		{"revocation ended", func(v *Verifier, _ *Check) error {
			return v.SetRevocations([]Revocation{{Kind: "jti", Value: "id-1", Until: now.Add(-time.Second)}})
		}, flow.ReasonOK},
		{"others revoked", func(v *Verifier, _ *Check) error {
			return v.SetRevocations([]Revocation{{Kind: "jti", Value: "id-2"}, {Kind: "identity", Value: "spiffe://x/y"}, {Kind: "subject", Value: testURL + "|bob", Since: now}})
		}, flow.ReasonOK},
		{"revoked twice, the wider holds", func(v *Verifier, _ *Check) error {
			return v.SetRevocations([]Revocation{{Kind: "jti", Value: "id-1"}, {Kind: "jti", Value: "id-1", Until: now.Add(-time.Second)}})
		}, flow.ReasonTokenRevoked},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			v := newVerifier(t, ec)
			token := ec.sign(t, ec.header(), claims)
			c := check()
			c.Thumbprints = [][32]byte{leaf}
			expect(t, v, token, c, flow.ReasonOK)
			expect(t, v, token, c, flow.ReasonOK)
			if err := test.change(v, c); err != nil {
				t.Fatal(err)
			}
			expect(t, v, token, c, test.want)
		})
	}
}

func TestIssuerWithoutIat(t *testing.T) {
	ec, now := newES256(t, "ec"), time.Now()
	v := newVerifier(t, ec)
	token := ec.sign(t, ec.header(), with(claimsAt(now), "iat", nil))
	expect(t, v, token, check(), flow.ReasonOK)
	if err := v.SetRevocations([]Revocation{{Kind: "subject", Value: testURL + "|alice", Since: now.Add(-time.Hour)}}); err != nil {
		t.Fatal(err)
	}
	expect(t, v, token, check(), flow.ReasonTokenRevoked) // when it was issued is not known
}

func TestRequireBinding(t *testing.T) {
	ec := newES256(t, "ec")
	v := newVerifier(t, ec)
	if err := v.SetIssuer(Issuer{Name: testIssuer, URL: testURL, RequireBinding: true}); err != nil {
		t.Fatal(err)
	}
	expect(t, v, ec.sign(t, ec.header(), claimsAt(time.Now())), check(), flow.ReasonTokenUnbound)
}

func TestRevocationsOverflowDenies(t *testing.T) {
	ec := newES256(t, "ec")
	v := newVerifier(t, ec)
	token := ec.sign(t, ec.header(), claimsAt(time.Now()))
	many := make([]Revocation, maxRevocations+1)
	for i := range many {
		many[i] = Revocation{Kind: "jti", Value: fmt.Sprint("j", i)}
	}
	if err := v.SetRevocations(many); err == nil {
		t.Fatal("too many revocations were taken")
	}
	expect(t, v, token, check(), flow.ReasonTokenRevoked)
	if err := v.SetRevocations(many[1:]); err != nil {
		t.Fatal(err)
	}
	expect(t, v, token, check(), flow.ReasonOK)
}

func TestSetIssuerRefuses(t *testing.T) {
	v := New(Options{})
	for name, i := range map[string]Issuer{
		"no URL":            {Name: "a"},
		"no scheme":         {Name: "a", URL: "sso.example"},
		"none":              {Name: "a", URL: testURL, Algorithms: []string{"none"}},
		"a MAC":             {Name: "a", URL: testURL, Algorithms: []string{"HS256"}},
		"negative lifetime": {Name: "a", URL: testURL, MaxLifetime: -1},
		"lifetime of years": {Name: "a", URL: testURL, MaxLifetime: 401 * 24 * time.Hour},
	} {
		if err := v.SetIssuer(i); err == nil {
			t.Errorf("%s was taken", name)
		}
		if err := v.SetIssuers([]Issuer{{Name: "b", URL: testURL}, i}); err == nil {
			t.Errorf("%s was taken among others", name)
		}
	}
	if err := v.SetIssuers([]Issuer{{Name: "b", URL: testURL}, {Name: "b", URL: testURL}}); err == nil {
		t.Error("two of one name were taken")
	}
	if len(v.Status(time.Now())) != 0 {
		t.Error("a refused set left something behind")
	}
}

func TestSetKeys(t *testing.T) {
	ec, ed, rs := newES256(t, "ec"), newEdDSA(t, "ed"), newRSA(t, "rs", jwt.SigningMethodRS256)
	weak := &signer{"weak", jwt.SigningMethodRS256, weakRSA(t)}
	e1 := with(rs.jwk(), "e", b64([]byte{1}))
	off := with(ec.jwk(), "y", ec.jwk()["x"])
	many := make([]map[string]any, MaxKeys+1)
	for i := range many {
		many[i] = with(ec.jwk(), "kid", fmt.Sprint("k", i))
	}
	padded := func(n int) []byte {
		d := jwks(t, ec.jwk())
		return append(d, strings.Repeat(" ", n-len(d))...)
	}
	tests := []struct {
		name     string
		document []byte
		ok       bool
	}{
		{"one key", jwks(t, ec.jwk()), true},
		{"all kinds", jwks(t, ec.jwk(), ed.jwk(), rs.jwk()), true},
		{"unknown members", jwks(t, with(ec.jwk(), "x5t", "abc")), true},
		{"key_ops verify", jwks(t, with(ec.jwk(), "key_ops", []string{"verify"})), true},
		{"no kid", jwks(t, with(ec.jwk(), "kid", nil)), true},
		{"64 keys", jwks(t, many[1:]...), true},
		{"256 KiB", padded(MaxKeySet), true},
		{"one usable among unusable", jwks(t, ec.jwk(), weak.jwk(), e1Named(e1), with(ed.jwk(), "crv", "X25519"), map[string]any{"kty": "new", "kid": "n"}), true},
		{"over 256 KiB", padded(MaxKeySet + 1), false},
		{"65 keys", jwks(t, many...), false},
		{"no keys", jwks(t), false},
		{"keys null", []byte(`{"keys":null}`), false},
		{"not JSON", []byte(`<html>`), false},
		{"an array", []byte(`[]`), false},
		{"empty", nil, false},
		{"keys twice", []byte(strings.Replace(string(jwks(t, ec.jwk())), "{", `{"keys":[],`, 1)), false},
		{"a private key", jwks(t, ed.jwk(), with(ec.jwk(), "d", "AAAA")), false},
		{"a private RSA key", jwks(t, ed.jwk(), with(rs.jwk(), "p", "AAAA")), false},
		{"an oct key", jwks(t, ed.jwk(), map[string]any{"kty": "oct", "kid": "o", "k": "AAAA"}), false},
		{"an oct key without k", jwks(t, ed.jwk(), map[string]any{"kty": "oct", "kid": "o"}), false},
		{"two keys of one kid", jwks(t, ec.jwk(), with(ed.jwk(), "kid", "ec")), false},
		{"two keys of one kid, one for encryption", jwks(t, ec.jwk(), with(with(ed.jwk(), "kid", "ec"), "use", "enc")), false},
		{"kid over 128 bytes", jwks(t, with(ec.jwk(), "kid", strings.Repeat("k", MaxKeyID+1))), false},
		{"kid a number", jwks(t, with(ec.jwk(), "kid", 1)), false},
		{"only use enc", jwks(t, with(ec.jwk(), "use", "enc")), false},
		{"only key_ops sign", jwks(t, with(ec.jwk(), "key_ops", []string{"sign"})), false},
		{"only RSA of 1024 bits", jwks(t, weak.jwk()), false},
		{"only RSA with e = 1", jwks(t, e1), false},
		{"only RSA with an even modulus", jwks(t, with(rs.jwk(), "n", b64(evenModulus(rs)))), false},
		{"only RSA of 16384 bits", jwks(t, with(rs.jwk(), "n", b64(append([]byte{0xff}, make([]byte, 2047)...)))), false},
		{"only a point off the curve", jwks(t, off), false},
		{"only alg of another family", jwks(t, with(ec.jwk(), "alg", "RS256")), false},
		{"only alg unknown", jwks(t, with(ec.jwk(), "alg", "HS256")), false},
		{"only x padded", jwks(t, with(ec.jwk(), "x", ec.jwk()["x"].(string)+"=")), false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			old := newES256(t, "old")
			v := newVerifier(t, old)
			token := old.sign(t, old.header(), claimsAt(time.Now()))
			expect(t, v, token, check(), flow.ReasonOK)
			err := v.SetKeys(testIssuer, test.document, time.Now())
			if (err == nil) != test.ok {
				t.Fatalf("got %v", err)
			}
			if test.ok {
				expect(t, v, token, check(), flow.ReasonTokenKey)
				return
			}
			expect(t, v, token, check(), flow.ReasonOK) // the old set is kept
			if s := v.Status(time.Now()); s[0].Problem == "" || s[0].Keys != 1 {
				t.Fatalf("status %+v", s)
			}
		})
	}
}

func e1Named(jwk map[string]any) map[string]any { return with(jwk, "kid", "e1") }

func weakRSA(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	p, err := rand.Prime(rand.Reader, 512)
	if err != nil {
		t.Fatal(err)
	}
	q, err := rand.Prime(rand.Reader, 512)
	if err != nil {
		t.Fatal(err)
	}
	return &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: new(big.Int).Mul(p, q), E: 65537}}
}

func evenModulus(s *signer) []byte {
	n := s.private.(*rsa.PrivateKey).N.Bytes()
	n[len(n)-1] &^= 1
	return n
}

func TestOnlyKeyNeedsNoKid(t *testing.T) {
	ec := newES256(t, "ec")
	v := newVerifier(t, ec)
	expect(t, v, ec.sign(t, with(ec.header(), "kid", nil), claimsAt(time.Now())), check(), flow.ReasonOK)
}

func TestRSAKeyWithoutAlgIsForOneAlgorithm(t *testing.T) {
	rs := newRSA(t, "rs", jwt.SigningMethodRS256)
	v := New(Options{})
	if err := v.SetIssuer(Issuer{Name: testIssuer, URL: testURL, Algorithms: []string{"PS256", "RS256"}}); err != nil {
		t.Fatal(err)
	}
	if err := v.SetKeys(testIssuer, jwks(t, with(rs.jwk(), "alg", nil)), time.Now()); err != nil {
		t.Fatal(err)
	}
	expect(t, v, rs.sign(t, rs.header(), claimsAt(time.Now())), check(), flow.ReasonTokenAlgorithm)
	expect(t, v, signedAs(t, rs, algorithms["PS256"].method, time.Now()), check(), flow.ReasonOK)
}

func TestOtherCurves(t *testing.T) {
	for curve, method := range map[elliptic.Curve]jwt.SigningMethod{elliptic.P384(): jwt.SigningMethodES384, elliptic.P521(): jwt.SigningMethodES512} {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		s := &signer{"k", method, k}
		v := New(Options{})
		if err := v.SetIssuer(Issuer{Name: testIssuer, URL: testURL, Algorithms: []string{method.Alg()}}); err != nil {
			t.Fatal(err)
		}
		if err := v.SetKeys(testIssuer, jwks(t, s.jwk()), time.Now()); err != nil {
			t.Fatal(err)
		}
		expect(t, v, s.sign(t, s.header(), claimsAt(time.Now())), check(), flow.ReasonOK)
	}
}

func TestTheSameDocumentKeepsTheCache(t *testing.T) {
	ec := newES256(t, "ec")
	v := newVerifier(t, ec)
	token := ec.sign(t, ec.header(), claimsAt(time.Now()))
	first, _, err := v.Verify(token, check())
	if err != nil {
		t.Fatal(err)
	}
	document := jwks(t, ec.jwk())
	if err := v.SetKeys(testIssuer, document, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := v.SetIssuers([]Issuer{{Name: testIssuer, URL: testURL, Algorithms: []string{"ES256", "EdDSA", "RS256", "PS256"}, MaxLifetime: 15 * time.Minute}}); err != nil {
		t.Fatal(err)
	}
	if second, _, _ := v.Verify(token, check()); second != first {
		t.Fatal("the token was verified again")
	}
}

func TestChangedURLDropsTheKeys(t *testing.T) {
	ec := newES256(t, "ec")
	v := newVerifier(t, ec)
	if err := v.SetIssuer(Issuer{Name: testIssuer, URL: "https://other.example"}); err != nil {
		t.Fatal(err)
	}
	expect(t, v, ec.sign(t, ec.header(), with(claimsAt(time.Now()), "iss", "https://other.example")), check(), flow.ReasonTokenUnavailable)
}

func TestUnknownKidRefreshes(t *testing.T) {
	old, rotated := newES256(t, "old"), newES256(t, "new")
	var asked atomic.Int64
	v := New(Options{Refresh: func(name string) {
		if name != testIssuer {
			t.Errorf("keys of %q were asked for", name)
		}
		asked.Add(1)
	}})
	if err := v.SetIssuer(Issuer{Name: testIssuer, URL: testURL}); err != nil {
		t.Fatal(err)
	}
	if err := v.SetKeys(testIssuer, jwks(t, old.jwk()), time.Now()); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	// None of these may cause a fetch: only a well-formed token of the right
	// issuer and algorithm that names an unknown key.
	forged := newES256(t, "old")
	expect(t, v, forged.sign(t, forged.header(), claimsAt(now)), check(), flow.ReasonTokenSignature)
	expect(t, v, forged.sign(t, with(forged.header(), "kid", "x"), with(claimsAt(now), "iss", "https://evil.example")), check(), flow.ReasonTokenIssuer)
	expect(t, v, forged.sign(t, with(with(forged.header(), "kid", "x"), "alg", "HS256"), claimsAt(now)), check(), flow.ReasonTokenAlgorithm)
	if asked.Load() != 0 {
		t.Fatalf("keys were asked for %d times", asked.Load())
	}
	token := rotated.sign(t, rotated.header(), claimsAt(now))
	var wg sync.WaitGroup
	for n := range 200 {
		wg.Go(func() {
			f := forged.sign(t, with(forged.header(), "kid", fmt.Sprint("forged", n)), claimsAt(now))
			if _, reason, err := v.Verify(f, check()); reason != flow.ReasonTokenKey || !errors.Is(err, ErrKeysPending) {
				t.Errorf("got %q, %v", reason, err)
			}
		})
	}
	wg.Wait()
	if asked.Load() != 1 {
		t.Fatalf("200 forged kids asked for keys %d times", asked.Load())
	}
	_, reason, err := v.Verify(token, check())
	if reason != flow.ReasonTokenKey || !errors.Is(err, ErrKeysPending) {
		t.Fatalf("got %q, %v", reason, err)
	}
	short, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := v.Await(short, testIssuer); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("awaiting keys that do not come: %v", err)
	}
	waited := make(chan error, 1)
	go func() { waited <- v.Await(context.Background(), testIssuer) }()
	if err := v.SetKeys(testIssuer, jwks(t, old.jwk(), rotated.jwk()), time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; err != nil {
		t.Fatal(err)
	}
	expect(t, v, token, check(), flow.ReasonOK)
	_, reason, err = v.Verify(forged.sign(t, with(forged.header(), "kid", "other"), claimsAt(now)), check())
	if reason != flow.ReasonTokenKey || errors.Is(err, ErrKeysPending) || asked.Load() != 1 {
		t.Fatalf("after the answer: %q, %v, asked %d times", reason, err, asked.Load())
	}
	if s := v.Status(now); s[0].Refreshes != 1 {
		t.Fatalf("status %+v", s)
	}
}

func TestKeysFailedAnswers(t *testing.T) {
	ec := newES256(t, "ec")
	v := New(Options{})
	if err := v.SetIssuer(Issuer{Name: testIssuer, URL: testURL}); err != nil {
		t.Fatal(err)
	}
	token := ec.sign(t, ec.header(), claimsAt(time.Now()))
	expect(t, v, token, check(), flow.ReasonTokenUnavailable)
	v.KeysFailed(testIssuer, "connection refused")
	if err := v.Await(context.Background(), testIssuer); err != nil {
		t.Fatal(err)
	}
	if s := v.Status(time.Now()); s[0].Problem != "connection refused" || s[0].Keys != 0 || !s[0].Fetched.IsZero() {
		t.Fatalf("status %+v", s)
	}
	if err := v.Await(context.Background(), "shop/none"); err == nil {
		t.Fatal("an unknown issuer was awaited")
	}
	if err := v.SetKeys("shop/none", jwks(t, ec.jwk()), time.Now()); err == nil {
		t.Fatal("keys of an unknown issuer were taken")
	}
}

func TestReplacedIssuerEndsTheWait(t *testing.T) {
	ec := newES256(t, "ec")
	v := New(Options{})
	if err := v.SetIssuer(Issuer{Name: testIssuer, URL: testURL}); err != nil {
		t.Fatal(err)
	}
	expect(t, v, ec.sign(t, ec.header(), claimsAt(time.Now())), check(), flow.ReasonTokenUnavailable)
	i := (*v.issuers.Load())[testIssuer]
	pending := i.pending()
	if err := v.SetIssuers(nil); err != nil {
		t.Fatal(err)
	}
	select {
	case <-pending:
	default:
		t.Fatal("those who wait for a removed issuer's keys wait on")
	}
}

func TestStaleKeys(t *testing.T) {
	ec, now := newES256(t, "ec"), time.Now()
	v := newVerifier(t, ec)
	c := check()
	c.Now = now.Add(MaxKeyAge - time.Minute)
	expect(t, v, ec.sign(t, ec.header(), claimsAt(c.Now)), c, flow.ReasonOK)
	c.Now = now.Add(MaxKeyAge + time.Minute)
	expect(t, v, ec.sign(t, ec.header(), claimsAt(c.Now)), c, flow.ReasonTokenKeysStale)
	if s := v.Status(c.Now); !s[0].Stale || s[0].Refreshes != 1 {
		t.Fatalf("status %+v", s)
	}
	// A document that claims to come from the future is of now.
	if err := v.SetKeys(testIssuer, jwks(t, ec.jwk()), now.Add(1000*time.Hour)); err != nil {
		t.Fatal(err)
	}
	expect(t, v, ec.sign(t, ec.header(), claimsAt(c.Now)), c, flow.ReasonTokenKeysStale)
}

func TestCacheIsBounded(t *testing.T) {
	ec, now := newES256(t, "ec"), time.Now()
	v := New(Options{CacheEntries: 64, CacheBytes: 64 << 10})
	if err := v.SetIssuer(Issuer{Name: testIssuer, URL: testURL}); err != nil {
		t.Fatal(err)
	}
	if err := v.SetKeys(testIssuer, jwks(t, ec.jwk()), now); err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		expect(t, v, ec.sign(t, ec.header(), with(claimsAt(now), "jti", fmt.Sprint(i))), check(), flow.ReasonOK)
	}
	if len(v.cache.slots) != 64 {
		t.Fatalf("%d slots", len(v.cache.slots))
	}
	var entries, cost int64
	for n := range v.cache.slots {
		if e := v.cache.slots[n].Load(); e != nil {
			entries++
			cost += e.cost
		}
	}
	if entries < 8 || cost != v.cache.bytes.Load() || cost > v.cache.most {
		t.Fatalf("%d entries, %d bytes counted as %d, at most %d", entries, cost, v.cache.bytes.Load(), v.cache.most)
	}
}

func TestConcurrentVerify(t *testing.T) {
	ec := newES256(t, "ec")
	v := newVerifier(t, ec)
	document := jwks(t, ec.jwk())
	tokens := make([][]byte, 16)
	for i := range tokens {
		tokens[i] = ec.sign(t, ec.header(), with(claimsAt(time.Now()), "jti", fmt.Sprint(i)))
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for n := range 400 {
				if c, reason, err := v.Verify(tokens[n%16], check()); err != nil || c.ID != fmt.Sprint(n%16) {
					t.Errorf("got %q, %v", reason, err)
				}
			}
		})
	}
	wg.Go(func() {
		for n := range 100 {
			if err := v.SetKeys(testIssuer, append(document, strings.Repeat(" ", n)...), time.Now()); err != nil {
				t.Error(err)
			}
			if err := v.SetRevocations([]Revocation{{Kind: "jti", Value: "x"}}); err != nil {
				t.Error(err)
			}
			v.Status(time.Now())
		}
	})
	wg.Wait()
}

func TestRefusalsHoldNothingOfTheToken(t *testing.T) {
	ec := newES256(t, "secretkid")
	v := newVerifier(t, newES256(t, "ec"), newES256(t, "ec2"))
	token := ec.sign(t, ec.header(), with(claimsAt(time.Now()), "sub", "secretsub"))
	_, _, err := v.Verify(token, check())
	if err == nil || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), string(token[:8])) {
		t.Fatalf("got %v", err)
	}
}

// TestTwoIssuersOfOneURL holds that two TokenIssuers may name the same iss,
// and that neither's keys vouch for a token where the other is asked for.
func TestTwoIssuersOfOneURL(t *testing.T) {
	ours, theirs, now := newES256(t, "k"), newES256(t, "k"), time.Now()
	v := newVerifier(t, ours)
	if err := v.SetIssuer(Issuer{Name: "other/sso", URL: testURL, Algorithms: []string{"ES256"}, MaxLifetime: 15 * time.Minute}); err != nil {
		t.Fatal(err)
	}
	if err := v.SetKeys("other/sso", jwks(t, theirs.jwk()), now); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time they are cached
		for name, signer := range map[string]*signer{testIssuer: ours, "other/sso": theirs} {
			token := signer.sign(t, signer.header(), claimsAt(now))
			for _, asked := range []string{testIssuer, "other/sso"} {
				c := check()
				c.Issuer = asked
				want := flow.ReasonOK
				if asked != name {
					want = flow.ReasonTokenSignature
				}
				if _, reason, _ := v.Verify(token, c); reason != want {
					t.Errorf("a token of %s where %s is asked for: %s, want %s", name, asked, reason, want)
				}
			}
		}
	}
}
