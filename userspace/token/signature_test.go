// SPDX-License-Identifier: Apache-2.0

package token

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// message signs a text as RFC 9421 section 3.3 says.
func (s *signer) message(t testing.TB, base string) []byte {
	t.Helper()
	switch k := s.private.(type) {
	case *ecdsa.PrivateKey:
		sum := sha256.Sum256([]byte(base))
		r, v, err := ecdsa.Sign(rand.Reader, k, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		return append(r.FillBytes(make([]byte, 32)), v.FillBytes(make([]byte, 32))...)
	case ed25519.PrivateKey:
		return ed25519.Sign(k, []byte(base))
	case *rsa.PrivateKey:
		sum := sha512.Sum512([]byte(base))
		b, err := rsa.SignPSS(rand.Reader, k, crypto.SHA512, sum[:], &rsa.PSSOptions{SaltLength: 64})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	panic("no such key")
}

// ownBase is the signature base of a request, written apart from the code
// under test.
func ownBase(r *flow.Request, input string) string {
	lines := ""
	list, _, _ := strings.Cut(input[strings.Index(input, "(")+1:], ")")
	for name := range strings.FieldsSeq(list) {
		value := map[string]string{`"@method"`: r.Method, `"@target-uri"`: "http://" + r.Authority + r.Path + "?" + r.Query, `"@authority"`: r.Authority, `"@path"`: r.Path, `"@query"`: "?" + r.Query}[name]
		for _, h := range r.Headers {
			if `"`+strings.ToLower(string(h.Name))+`"` == name {
				value = string(h.Value)
			}
		}
		lines += name + ": " + value + "\n"
	}
	return lines + `"@signature-params": ` + input[strings.Index(input, "=")+1:]
}

const allCovered = `("@method" "@target-uri" "authorization" "content-digest")`

// signedRequest is a request with content that the signer signs.
func signedRequest(t testing.TB, s *signer, token []byte, input string, change func(*flow.Request)) *flow.Request {
	t.Helper()
	body := []byte(`{"pay":1}`)
	sum := sha256.Sum256(body)
	r := &flow.Request{Method: "POST", Authority: "pay.example:8080", Path: "/v1/pay", Query: "a=b", Body: body, ContentLength: int64(len(body))}
	field := func(name, value string) {
		r.Headers = append(r.Headers, flow.Header{Name: []byte(name), Value: []byte(value)})
	}
	field("Authorization", "Bearer "+string(token))
	field("Content-Digest", "sha-256=:"+base64.StdEncoding.EncodeToString(sum[:])+":")
	value := base64.StdEncoding.EncodeToString(s.message(t, ownBase(r, input)))
	field("Signature-Input", input)
	label, _, _ := strings.Cut(input, "=")
	field("Signature", label+"=:"+value+":")
	if change != nil {
		change(r)
	}
	return r
}

// TestSignature is the conformance table of HTTP message signatures.
func TestSignature(t *testing.T) {
	issuer, client, other := newES256(t, "k1"), newES256(t, "c1"), newES256(t, "c2")
	now := time.Now()
	v := newVerifier(t, issuer)
	token := issuer.sign(t, issuer.header(), with(claimsAt(now), "cnf", map[string]any{"jwk": client.public()}))
	n := 0
	params := func() string {
		n++
		return fmt.Sprintf(`;created=%d;nonce="n%d";keyid="c1"`, now.Unix(), n)
	}
	by := func(s *signer, input string, change func(*flow.Request)) *flow.Request {
		return signedRequest(t, s, token, input, change)
	}
	good := func(change func(*flow.Request)) *flow.Request { return by(client, "sig1="+allCovered+params(), change) }
	set := func(name, value string) func(*flow.Request) {
		return func(r *flow.Request) {
			for i := range r.Headers {
				if string(r.Headers[i].Name) == name {
					r.Headers[i].Value = []byte(value)
				}
			}
		}
	}
	without := func(names ...string) func(*flow.Request) {
		return func(r *flow.Request) {
			var kept []flow.Header
			for _, h := range r.Headers {
				if !strings.Contains(strings.Join(names, " "), string(h.Name)) {
					kept = append(kept, h)
				}
			}
			r.Headers = kept
		}
	}
	bare := func(r *flow.Request) { r.Body, r.ContentLength = nil, 0 }
	for _, c := range []struct {
		name    string
		request *flow.Request
		want    flow.Reason
	}{
		{"good", good(nil), flow.ReasonOK},
		{"parts of the target", by(client, `s=("@method" "@authority" "@path" "@query" "authorization" "content-digest")`+params(), nil), flow.ReasonOK},
		{"with alg, expires and tag", by(client, "sig1="+allCovered+params()+fmt.Sprintf(`;alg="ecdsa-p256-sha256";expires=%d;tag="x"`, now.Add(time.Minute).Unix()), nil), flow.ReasonOK},
		{"without content", by(client, `sig1=("@method" "@target-uri" "authorization")`+params(), bare), flow.ReasonOK},
		{"chunked, without content", by(client, `sig1=("@method" "@target-uri" "authorization")`+params(), func(r *flow.Request) { r.Body, r.ContentLength = []byte{}, -1 }), flow.ReasonOK},

		{"none", good(without("Signature-Input", "Signature")), flow.ReasonSignatureMissing},
		{"only the input", by(client, "sig1="+allCovered+params(), func(r *flow.Request) { r.Headers = r.Headers[:len(r.Headers)-1] }), flow.ReasonSignatureMalformed},
		{"two", good(func(r *flow.Request) { r.Headers = append(r.Headers, r.Headers[len(r.Headers)-1]) }), flow.ReasonSignatureMalformed},
		{"two labels", good(func(r *flow.Request) {
			set("Signature-Input", string(r.Headers[2].Value)+`, b=("@method");created=1`)(r)
		}), flow.ReasonSignatureMalformed},
		{"labels that differ", good(func(r *flow.Request) { set("Signature", "x"+string(r.Headers[3].Value))(r) }), flow.ReasonSignatureMalformed},
		{"spaces", by(client, "sig1="+strings.Replace(allCovered, " ", "  ", 1)+params(), nil), flow.ReasonSignatureMalformed},
		{"a component twice", by(client, `sig1=("@method" "@method" "@target-uri" "authorization" "content-digest")`+params(), nil), flow.ReasonSignatureMalformed},
		{"a component in capitals", by(client, `sig1=("@method" "@target-uri" "Authorization" "content-digest")`+params(), nil), flow.ReasonSignatureMalformed},
		{"parameters of a component", by(client, `sig1=("@method";req "@target-uri" "authorization" "content-digest")`+params(), nil), flow.ReasonSignatureMalformed},
		{"a parameter twice", by(client, "sig1="+allCovered+params()+`;keyid="x"`, nil), flow.ReasonSignatureMalformed},
		{"an unknown parameter", by(client, "sig1="+allCovered+params()+`;x="y"`, nil), flow.ReasonSignatureMalformed},
		{"a component that is not there", by(client, `sig1=("@method" "@target-uri" "authorization" "content-digest" "x-none")`+params(), nil), flow.ReasonSignatureMalformed},
		{"a component of responses", by(client, `sig1=("@method" "@target-uri" "authorization" "content-digest" "@status")`+params(), nil), flow.ReasonSignatureMalformed},
		{"without created", by(client, "sig1="+allCovered+`;nonce="x"`, nil), flow.ReasonSignatureMalformed},
		{"without nonce", by(client, "sig1="+allCovered+fmt.Sprintf(`;created=%d`, now.Unix()), nil), flow.ReasonSignatureMalformed},
		{"another algorithm", by(client, "sig1="+allCovered+params()+`;alg="ed25519"`, nil), flow.ReasonSignatureMalformed},
		{"a MAC", by(client, "sig1="+allCovered+params()+`;alg="hmac-sha256"`, nil), flow.ReasonSignatureMalformed},
		{"another's key", by(other, "sig1="+allCovered+params(), nil), flow.ReasonSignatureMalformed},
		{"another method", good(func(r *flow.Request) { r.Method = "PUT" }), flow.ReasonSignatureMalformed},
		{"another path", good(func(r *flow.Request) { r.Path = "/v1/pay2" }), flow.ReasonSignatureMalformed},
		{"another query", good(func(r *flow.Request) { r.Query = "a=c" }), flow.ReasonSignatureMalformed},
		{"another host", good(func(r *flow.Request) { r.Authority = "evil.example" }), flow.ReasonSignatureMalformed},
		{"another scheme", good(func(r *flow.Request) { r.TLS = true }), flow.ReasonSignatureMalformed},
		{"another digest", good(set("Content-Digest", "sha-256=:AAAA:")), flow.ReasonSignatureMalformed},
		{"a signature cut short", good(set("Signature", "sig1=:AAAA:")), flow.ReasonSignatureMalformed},

		{"the method left out", by(client, `sig1=("@target-uri" "authorization" "content-digest")`+params(), nil), flow.ReasonSignatureCovers},
		{"the target left out", by(client, `sig1=("@method" "authorization" "content-digest")`+params(), nil), flow.ReasonSignatureCovers},
		{"the query left out", by(client, `sig1=("@method" "@authority" "@path" "authorization" "content-digest")`+params(), nil), flow.ReasonSignatureCovers},
		{"the token left out", by(client, `sig1=("@method" "@target-uri" "content-digest")`+params(), nil), flow.ReasonSignatureCovers},
		{"the content left out", by(client, `sig1=("@method" "@target-uri" "authorization")`+params(), nil), flow.ReasonSignatureCovers},
		{"content that was not held", by(client, `sig1=("@method" "@target-uri" "authorization")`+params(), func(r *flow.Request) { r.Body, r.ContentLength = nil, -1 }), flow.ReasonSignatureCovers},

		{"another content", good(func(r *flow.Request) { r.Body = []byte(`{"pay":2}`) }), flow.ReasonSignatureDigest},
		{"content that is cut", good(func(r *flow.Request) { r.ContentLength++ }), flow.ReasonSignatureDigest},
		{"content that is not there", good(func(r *flow.Request) { r.Body = nil }), flow.ReasonSignatureDigest},
		{"too old", by(client, "sig1="+allCovered+fmt.Sprintf(`;created=%d;nonce="x"`, now.Add(-MaxProofAge-2*time.Second).Unix()), nil), flow.ReasonSignatureStale},
		{"of the future", by(client, "sig1="+allCovered+fmt.Sprintf(`;created=%d;nonce="x"`, now.Add(MaxProofLead+2*time.Second).Unix()), nil), flow.ReasonSignatureStale},
		{"expired", by(client, "sig1="+allCovered+params()+fmt.Sprintf(`;expires=%d`, now.Unix()-1), nil), flow.ReasonSignatureStale},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := check()
			k.BoundTo, k.Now, k.Proof = BindingSignature, now, &Proof{Request: c.request}
			_, reason, err := v.Verify(token, k)
			if reason != c.want || (err == nil) != (c.want == flow.ReasonOK) {
				t.Fatalf("%q (%v), want %q", reason, err, c.want)
			}
			if c.want != flow.ReasonOK {
				return
			}
			if _, reason, err := v.Verify(token, k); reason != flow.ReasonOK {
				t.Errorf("by another rule: %q (%v)", reason, err)
			}
			again := *k
			again.Proof = &Proof{Request: c.request}
			if _, reason, _ := v.Verify(token, &again); reason != flow.ReasonSignatureReplayed {
				t.Errorf("a second time: %q", reason)
			}
			later := *c.request
			later.ProvenKey = k.Proof.Key()
			again.Proof, again.Now = &Proof{Request: &later}, now.Add(2*MaxProofAge)
			if _, reason, err := v.Verify(token, &again); reason != flow.ReasonOK {
				t.Errorf("judged again: %q (%v)", reason, err)
			}
		})
	}
	// Without its signature it is nobody's, whether the rule asks or not.
	if _, reason, _ := v.Verify(token, check()); reason != flow.ReasonTokenProof {
		t.Errorf("as a bearer token: %q", reason)
	}
	k := check()
	k.DPoP, k.Proof = true, &Proof{Request: good(nil)}
	if _, reason, _ := v.Verify(token, k); reason != flow.ReasonTokenProof {
		t.Errorf("with the scheme DPoP: %q", reason)
	}
	for name, cnf := range map[string]any{"a private key": map[string]any{"jwk": with(client.public(), "d", "AAAA")}, "no key": map[string]any{"jwk": map[string]any{}}} {
		bad := issuer.sign(t, issuer.header(), with(claimsAt(now), "cnf", cnf))
		if _, reason, _ := v.Verify(bad, check()); reason != flow.ReasonTokenClaims {
			t.Errorf("%s: %q", name, reason)
		}
	}
}

// TestSignatureAlgorithms signs by keys of each kind.
func TestSignatureAlgorithms(t *testing.T) {
	issuer, now := newES256(t, "k1"), time.Now()
	v := newVerifier(t, issuer)
	for alg, client := range map[string]*signer{"ecdsa-p256-sha256": newES256(t, ""), "ed25519": newEdDSA(t, ""), "rsa-pss-sha512": newRSA(t, "", jwt.SigningMethodPS512)} {
		token := issuer.sign(t, issuer.header(), with(claimsAt(now), "cnf", map[string]any{"jwk": client.public()}))
		k := check()
		k.BoundTo, k.Proof = BindingSignature, &Proof{Request: signedRequest(t, client, token, "s="+allCovered+fmt.Sprintf(`;created=%d;nonce="n";alg=%q`, now.Unix(), alg), nil)}
		if _, reason, err := v.Verify(token, k); reason != flow.ReasonOK {
			t.Errorf("%s: %q (%v)", alg, reason, err)
		}
	}
}

// TestSignatureVector is the test case of RFC 9421, B.2.6.
func TestSignatureVector(t *testing.T) {
	k := parsePublic("OKP", map[string]any{"kty": "OKP", "crv": "Ed25519", "x": "JrQLj5P_89iXES9-vFgrIy29clF9CC_oPPsw3c5D0bs"})
	r := &flow.Request{Method: "POST", Authority: "example.com", Path: "/foo", Query: "param=Value&Pet=dog", TLS: true}
	for _, h := range [][2]string{{"Host", "example.com"}, {"Date", "Tue, 20 Apr 2021 02:07:55 GMT"}, {"Content-Type", "application/json"}, {"Content-Length", "18"}} {
		r.Headers = append(r.Headers, flow.Header{Name: []byte(h[0]), Value: []byte(h[1])})
	}
	s, ok := parseSignature(`sig-b26=("date" "@method" "@path" "@authority" "content-type" "content-length");created=1618884473;keyid="test-key-ed25519"`,
		`sig-b26=:wqcAqbmYJ2ji2glfAMaRy4gruYYnx2nEFN2HN6jrnDnQCK1u02Gb04v9EDgwUPiu4A0w6vuQv5lIp5WPpBKRCw==:`)
	if !ok {
		t.Fatal("it is not read")
	}
	base, ok := s.base(r)
	if !ok || !verifies(k, signatureAlgorithm(k, s.alg), base, s.value) {
		t.Errorf("it does not verify: %s", base)
	}
}

func FuzzSignature(f *testing.F) {
	client := newES256(f, "")
	r := signedRequest(f, client, []byte("t"), "s="+allCovered+`;created=1800000000;nonce="n"`, nil)
	f.Add(string(r.Headers[2].Value), string(r.Headers[3].Value))
	f.Add(`s=()`, `s=::`)
	f.Fuzz(func(t *testing.T, input, value string) {
		s, ok := parseSignature(input, value)
		if ok && (len(s.components) == 0 || len(s.components) > maxComponents || s.created == 0 || strings.ContainsAny(s.params, "\r\n")) {
			t.Errorf("%q reads as %+v", input, s)
		}
	})
}
