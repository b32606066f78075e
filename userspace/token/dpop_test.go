// SPDX-License-Identifier: Apache-2.0

package token

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// public is the signer's key as a proof bears it.
func (s *signer) public() map[string]any {
	m := s.jwk()
	delete(m, "kid")
	delete(m, "use")
	delete(m, "alg")
	return m
}

// jkt is the key's thumbprint, computed apart from the code under test.
func (s *signer) jkt(t testing.TB) string {
	t.Helper()
	b, err := json.Marshal(s.public()) // encoding/json sorts the members
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	return b64(sum[:])
}

func (s *signer) proofHeader() map[string]any {
	return map[string]any{"typ": "dpop+jwt", "alg": s.method.Alg(), "jwk": s.public()}
}

// proofClaims are good ones for a token and dpopRequest.
func proofOf(token []byte, id string, now time.Time) map[string]any {
	sum := sha256.Sum256(token)
	return map[string]any{"jti": id, "htm": "POST", "htu": "http://pay.example:8080/v1/pay", "iat": now.Unix(), "ath": b64(sum[:])}
}

func dpopRequest(proofs ...[]byte) *flow.Request {
	r := &flow.Request{Method: "POST", Authority: "pay.example:8080", Path: "/v1/pay"}
	for _, p := range proofs {
		r.Headers = append(r.Headers, flow.Header{Name: []byte("dpop"), Value: p})
	}
	return r
}

// TestDPoP is the conformance table of proofs.
func TestDPoP(t *testing.T) {
	issuer, client, other := newES256(t, "k1"), newES256(t, "c1"), newES256(t, "c2")
	now := time.Now()
	v := newVerifier(t, issuer)
	token := issuer.sign(t, issuer.header(), with(claimsAt(now), "cnf", map[string]any{"jkt": client.jkt(t)}))
	n := 0
	id := func() string { n++; return fmt.Sprint("id-", n) }
	good := func() map[string]any { return proofOf(token, id(), now) }
	claim := func(name string, value any) []byte {
		return client.sign(t, client.proofHeader(), with(good(), name, value))
	}
	head := func(name string, value any) []byte {
		return client.sign(t, with(client.proofHeader(), name, value), good())
	}
	jwk := func(name string, value any) []byte { return head("jwk", with(client.public(), name, value)) }
	changed := func(f func(*flow.Request)) *flow.Request {
		r := dpopRequest(client.sign(t, client.proofHeader(), good()))
		f(r)
		return r
	}
	sum := sha256.Sum256([]byte("another"))
	hmac := func() []byte {
		k := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims(good()))
		k.Header["typ"], k.Header["jwk"] = "dpop+jwt", client.public()
		s, err := k.SignedString([]byte("x"))
		if err != nil {
			t.Fatal(err)
		}
		return []byte(s)
	}
	for _, c := range []struct {
		name    string
		request *flow.Request
		want    flow.Reason
	}{
		{"good", dpopRequest(claim("x", "y")), flow.ReasonOK},
		{"typ in other case, long", dpopRequest(head("typ", "Application/DPoP+JWT")), flow.ReasonOK},
		{"key with use, alg and kid", dpopRequest(head("jwk", client.jwk())), flow.ReasonOK},
		{"iat almost too old", dpopRequest(claim("iat", now.Add(-MaxProofAge).Unix()+1)), flow.ReasonOK},
		{"iat a little ahead", dpopRequest(claim("iat", now.Add(MaxProofLead).Unix()-1)), flow.ReasonOK},
		{"htu without port", changed(func(r *flow.Request) {
			r.Authority = "PAY.example"
			r.Headers[0].Value = claim("htu", "HTTP://pay.Example:80/v1/pay")
		}), flow.ReasonOK},
		{"htu with query and fragment", dpopRequest(claim("htu", "http://pay.example:8080/v1/pay?a=b#c")), flow.ReasonOK},
		{"htu escaped otherwise", changed(func(r *flow.Request) {
			r.Path = "/v1/%70%c3%a4y"
			r.Headers[0].Value = claim("htu", "http://pay.example:8080/v1/p%C3%A4y")
		}), flow.ReasonOK},
		{"htu without path", changed(func(r *flow.Request) { r.Path = "/"; r.Headers[0].Value = claim("htu", "http://pay.example:8080") }), flow.ReasonOK},
		{"https", changed(func(r *flow.Request) {
			r.TLS = true
			r.Headers[0].Value = claim("htu", "https://pay.example:8080/v1/pay")
		}), flow.ReasonOK},
		{"https without port", changed(func(r *flow.Request) {
			r.TLS, r.Authority = true, "pay.example"
			r.Headers[0].Value = claim("htu", "https://pay.example:443/v1/pay")
		}), flow.ReasonOK},
		{"IPv6", changed(func(r *flow.Request) {
			r.Authority = "[fd00::1]"
			r.Headers[0].Value = claim("htu", "http://[fd00::1]:80/v1/pay")
		}), flow.ReasonOK},

		{"none", dpopRequest(), flow.ReasonProofMissing},
		{"two", dpopRequest(claim("x", "y"), claim("x", "y")), flow.ReasonProofMalformed},
		{"empty", dpopRequest([]byte{}), flow.ReasonProofMalformed},
		{"no JWT", dpopRequest([]byte("x")), flow.ReasonProofMalformed},
		{"two parts", dpopRequest(claim("x", "y")[:40]), flow.ReasonProofMalformed},
		{"four parts", dpopRequest(append(claim("x", "y"), ".x"...)), flow.ReasonProofMalformed},
		{"too large", dpopRequest(claim("x", strings.Repeat("y", MaxProof))), flow.ReasonProofMalformed},
		{"typ JWT", dpopRequest(head("typ", "JWT")), flow.ReasonProofMalformed},
		{"no typ", dpopRequest(head("typ", nil)), flow.ReasonProofMalformed},
		{"no alg", dpopRequest(head("alg", nil)), flow.ReasonProofMalformed},
		{"alg none", dpopRequest(head("alg", "none")), flow.ReasonProofMalformed},
		{"alg not the key's", dpopRequest(head("alg", "ES384")), flow.ReasonProofMalformed},
		{"a MAC", dpopRequest(hmac()), flow.ReasonProofMalformed},
		{"crit", dpopRequest(head("crit", []string{"x"})), flow.ReasonProofMalformed},
		{"b64", dpopRequest(head("b64", false)), flow.ReasonProofMalformed},
		{"jku", dpopRequest(head("jku", "https://evil.example")), flow.ReasonProofMalformed},
		{"no jwk", dpopRequest(head("jwk", nil)), flow.ReasonProofMalformed},
		{"jwk a text", dpopRequest(head("jwk", "x")), flow.ReasonProofMalformed},
		{"private jwk", dpopRequest(jwk("d", "AAAA")), flow.ReasonProofMalformed},
		{"symmetric jwk", dpopRequest(head("jwk", map[string]any{"kty": "oct", "k": "AAAA"})), flow.ReasonProofMalformed},
		{"jwk off the curve", dpopRequest(jwk("x", b64(make([]byte, 32)))), flow.ReasonProofMalformed},
		{"jwk for encryption", dpopRequest(jwk("use", "enc")), flow.ReasonProofMalformed},
		{"jwk with X", dpopRequest(jwk("X", "AAAA")), flow.ReasonProofMalformed},
		{"another's signature", dpopRequest(other.sign(t, client.proofHeader(), good())), flow.ReasonProofMalformed},
		{"jti twice", dpopRequest(client.raw(t, string(text2(t, client.proofHeader())), strings.Replace(string(text2(t, good())), "{", `{"jti":"x",`, 1))), flow.ReasonProofMalformed},
		{"JTI", dpopRequest(claim("JTI", "x")), flow.ReasonProofMalformed},
		{"no jti", dpopRequest(claim("jti", nil)), flow.ReasonProofMalformed},
		{"jti a number", dpopRequest(claim("jti", 7)), flow.ReasonProofMalformed},
		{"jti too long", dpopRequest(claim("jti", strings.Repeat("x", maxProofID+1))), flow.ReasonProofMalformed},
		{"no iat", dpopRequest(claim("iat", nil)), flow.ReasonProofMalformed},
		{"iat a text", dpopRequest(claim("iat", "1")), flow.ReasonProofMalformed},

		{"no htm", dpopRequest(claim("htm", nil)), flow.ReasonProofMismatch},
		{"another htm", dpopRequest(claim("htm", "GET")), flow.ReasonProofMismatch},
		{"htm in other case", dpopRequest(claim("htm", "post")), flow.ReasonProofMismatch},
		{"no htu", dpopRequest(claim("htu", nil)), flow.ReasonProofMismatch},
		{"another path", dpopRequest(claim("htu", "http://pay.example:8080/v1/pay/")), flow.ReasonProofMismatch},
		{"another host", dpopRequest(claim("htu", "http://pay.example.evil:8080/v1/pay")), flow.ReasonProofMismatch},
		{"another port", dpopRequest(claim("htu", "http://pay.example/v1/pay")), flow.ReasonProofMismatch},
		{"another scheme", dpopRequest(claim("htu", "https://pay.example:8080/v1/pay")), flow.ReasonProofMismatch},
		{"a user", dpopRequest(claim("htu", "http://a@pay.example:8080/v1/pay")), flow.ReasonProofMismatch},
		{"htu a path", dpopRequest(claim("htu", "/v1/pay")), flow.ReasonProofMismatch},
		{"an escaped slash", changed(func(r *flow.Request) {
			r.Path = "/v1/pay"
			r.Headers[0].Value = claim("htu", "http://pay.example:8080/v1%2Fpay")
		}), flow.ReasonProofMismatch},
		{"no ath", dpopRequest(claim("ath", nil)), flow.ReasonProofMismatch},
		{"another ath", dpopRequest(claim("ath", b64(sum[:]))), flow.ReasonProofMismatch},
		{"too old", dpopRequest(claim("iat", now.Add(-MaxProofAge-2*time.Second).Unix())), flow.ReasonProofStale},
		{"of the future", dpopRequest(claim("iat", now.Add(MaxProofLead+2*time.Second).Unix())), flow.ReasonProofStale},
		{"another key", dpopRequest(other.sign(t, other.proofHeader(), good())), flow.ReasonTokenBinding},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := check()
			k.BoundTo, k.DPoP, k.Now, k.Proof = BindingDPoP, true, now, &Proof{Request: c.request}
			_, reason, err := v.Verify(token, k)
			if reason != c.want || (err == nil) != (c.want == flow.ReasonOK) {
				t.Fatalf("%q (%v), want %q", reason, err, c.want)
			}
			if c.want != flow.ReasonOK {
				if reason.Status() != 401 || k.Proof.Key() != [32]byte{} {
					t.Errorf("status %d, key %x", reason.Status(), k.Proof.Key())
				}
				return
			}
			// Another rule of the same request is content with it, another
			// request is not.
			if _, reason, err := v.Verify(token, k); reason != flow.ReasonOK {
				t.Errorf("by another rule: %q (%v)", reason, err)
			}
			again := *k
			again.Proof = &Proof{Request: c.request}
			if _, reason, _ := v.Verify(token, &again); reason != flow.ReasonProofReplayed {
				t.Errorf("a second time: %q", reason)
			}
			// The same request, judged again later.
			later := *c.request
			later.ProvenKey = k.Proof.Key()
			again.Proof, again.Now = &Proof{Request: &later}, now.Add(2*MaxProofAge)
			if _, reason, err := v.Verify(token, &again); reason != flow.ReasonOK || again.Proof.Key() != k.Proof.Key() {
				t.Errorf("judged again: %q (%v)", reason, err)
			}
			later.ProvenKey[0]++
			if _, reason, _ := v.Verify(token, &again); reason != flow.ReasonTokenBinding {
				t.Errorf("by another key: %q", reason)
			}
		})
	}
	// As a bearer token it is nobody's, whether the rule asks or not.
	for _, bound := range []Binding{BindingNone, BindingDPoP} {
		k := check()
		k.BoundTo, k.Proof = bound, &Proof{Request: dpopRequest(client.sign(t, client.proofHeader(), good()))}
		if _, reason, _ := v.Verify(token, k); reason != flow.ReasonTokenProof {
			t.Errorf("as a bearer token: %q", reason)
		}
	}
	// Where the rule does not ask, the proof still counts.
	k := check()
	k.DPoP, k.Proof = true, &Proof{Request: dpopRequest(client.sign(t, client.proofHeader(), good()))}
	if _, reason, err := v.Verify(token, k); reason != flow.ReasonOK {
		t.Errorf("unasked: %q (%v)", reason, err)
	}
	// Bound to both, both are asked for.
	leaf := sha256.Sum256([]byte("leaf"))
	both := issuer.sign(t, issuer.header(), with(claimsAt(now), "cnf", map[string]any{"jkt": client.jkt(t), "x5t#S256": b64(leaf[:])}))
	for _, thumbprints := range [][][32]byte{nil, {leaf}} {
		k := check()
		k.DPoP, k.Thumbprints, k.Proof = true, thumbprints, &Proof{Request: dpopRequest(client.sign(t, client.proofHeader(), proofOf(both, id(), now)))}
		if _, reason, err := v.Verify(both, k); (reason == flow.ReasonOK) != (thumbprints != nil) {
			t.Errorf("bound to both, %d certificates: %q (%v)", len(thumbprints), reason, err)
		}
	}
}

func text2(t *testing.T, m map[string]any) []byte {
	t.Helper()
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestDPoPAlgorithms proves keys of each kind.
func TestDPoPAlgorithms(t *testing.T) {
	issuer, now := newES256(t, "k1"), time.Now()
	v := newVerifier(t, issuer)
	for _, client := range []*signer{newES256(t, ""), newEdDSA(t, ""), newRSA(t, "", jwt.SigningMethodRS256), newRSA(t, "", pss("PS256", 5))} {
		token := issuer.sign(t, issuer.header(), with(claimsAt(now), "cnf", map[string]any{"jkt": client.jkt(t)}))
		k := check()
		k.DPoP, k.Proof = true, &Proof{Request: dpopRequest(client.sign(t, client.proofHeader(), proofOf(token, "x", now)))}
		if _, reason, err := v.Verify(token, k); reason != flow.ReasonOK {
			t.Errorf("%s: %q (%v)", client.method.Alg(), reason, err)
		}
	}
}

func FuzzProof(f *testing.F) {
	client := newES256(f, "")
	now := time.Unix(1_800_000_000, 0)
	f.Add(client.sign(f, client.proofHeader(), proofOf([]byte("t"), "x", now)))
	f.Add([]byte("a.b.c"))
	bound := thumbprint(client.public())
	f.Fuzz(func(t *testing.T, raw []byte) {
		p := &Proof{Request: dpopRequest(raw)}
		if reason, err := p.verify([]byte("t"), &bound, now); (err == nil) != (reason == flow.ReasonOK) || err == nil && p.key != bound {
			t.Errorf("%q: %q (%v)", raw, reason, err)
		}
	})
}

func BenchmarkProof(b *testing.B) {
	client, now := newES256(b, ""), time.Now()
	r := dpopRequest(client.sign(b, client.proofHeader(), proofOf([]byte("t"), "x", now)))
	bound := thumbprint(client.public())
	b.ReportAllocs()
	for b.Loop() {
		p := &Proof{Request: r}
		if _, err := p.verify([]byte("t"), &bound, now); err != nil {
			b.Fatal(err)
		}
	}
}
