// SPDX-License-Identifier: Apache-2.0

package token

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// The conformance table: every row is a token that must be refused, with its
// own reason, or taken. Each is verified twice, so that no refusal depends on
// the cache being cold and none is ever cached.
func TestConformance(t *testing.T) {
	now := time.Now()
	ec, ed := newES256(t, "ec"), newEdDSA(t, "ed")
	rs, ps := newRSA(t, "rs", jwt.SigningMethodRS256), newRSA(t, "ps", algorithms["PS256"].method)
	stranger := newES256(t, "ec")
	v := newVerifier(t, ec, ed, rs, ps)
	sign := func(header, claims map[string]any) []byte { return ec.sign(t, header, claims) }
	claim := func(name string, value any) []byte { return sign(ec.header(), with(claimsAt(now), name, value)) }
	head := func(name string, value any) []byte { return sign(with(ec.header(), name, value), claimsAt(now)) }
	asText := func(header, claims string) []byte { return ec.raw(t, header, claims) }
	goodHeader, goodClaims := marshal(t, ec.header()), marshal(t, claimsAt(now))
	splice := func(claims, member string) string { return strings.Replace(claims, "{", "{"+member+",", 1) }
	leaf, other := sha256.Sum256([]byte("leaf")), sha256.Sum256([]byte("other"))
	bound := func(digest [32]byte) map[string]any { return map[string]any{"x5t#S256": b64(digest[:])} }
	good := claim("jti", "good")

	type row struct {
		name  string
		token []byte
		check func(*Check)
		want  flow.Reason
	}
	rows := []row{
		{"good", good, nil, flow.ReasonOK},
		{"good EdDSA", ed.sign(t, ed.header(), claimsAt(now)), nil, flow.ReasonOK},
		{"good RS256", rs.sign(t, rs.header(), claimsAt(now)), nil, flow.ReasonOK},
		{"good PS256", ps.sign(t, ps.header(), claimsAt(now)), nil, flow.ReasonOK},
		{"aud array", claim("aud", []string{"x", testAudience}), nil, flow.ReasonOK},
		{"typ with application/ and other case", head("typ", "application/AT+JWT"), nil, flow.ReasonOK},

		// Time.
		{"expired", claim("exp", now.Add(-time.Second).Unix()), nil, flow.ReasonTokenExpired},
		{"expires this second, no leeway", good, func(c *Check) { c.Now = now.Truncate(time.Second).Add(5 * time.Minute) }, flow.ReasonTokenExpired},
		{"nbf beyond 30 s", claim("nbf", now.Add(32*time.Second).Unix()), nil, flow.ReasonTokenNotYet},
		{"nbf within 30 s", claim("nbf", now.Add(28*time.Second).Unix()), nil, flow.ReasonOK},
		{"iat beyond 30 s", claim("iat", now.Add(32*time.Second).Unix()), nil, flow.ReasonTokenNotYet},
		{"iat within 30 s", claim("iat", now.Add(28*time.Second).Unix()), nil, flow.ReasonOK},
		{"no exp", claim("exp", nil), nil, flow.ReasonTokenLifetime},
		{"lifetime over the maximum", claim("exp", now.Add(16*time.Minute).Unix()), nil, flow.ReasonTokenLifetime},
		{"lifetime over the maximum, no iat", sign(ec.header(), with(with(claimsAt(now), "iat", nil), "exp", now.Add(16*time.Minute).Unix())), nil, flow.ReasonTokenLifetime},
		{"no iat", claim("iat", nil), nil, flow.ReasonOK},
		{"old iat", claim("iat", now.Add(-time.Hour).Unix()), nil, flow.ReasonTokenLifetime},
		{"exp as a string", claim("exp", fmt.Sprint(now.Add(time.Minute).Unix())), nil, flow.ReasonTokenClaims},
		{"exp null", asText(goodHeader, strings.Replace(goodClaims, `"exp":`, `"exp":null,"x":`, 1)), nil, flow.ReasonTokenClaims},
		{"exp beyond the year 9999", claim("exp", int64(1)<<60), nil, flow.ReasonTokenClaims},
		{"exp with a fraction", claim("exp", float64(now.Unix())+60.5), nil, flow.ReasonOK},

		// Who and for whom.
		{"aud wrong", claim("aud", "other"), nil, flow.ReasonTokenAudience},
		{"aud missing", claim("aud", nil), nil, flow.ReasonTokenAudience},
		{"aud empty", claim("aud", []string{}), nil, flow.ReasonTokenAudience},
		{"aud of numbers", claim("aud", []int{1}), nil, flow.ReasonTokenClaims},
		{"rule without audience, issuer without", good, func(c *Check) { c.Audience = "" }, flow.ReasonTokenAudience},
		{"iss unknown", claim("iss", "https://evil.example"), nil, flow.ReasonTokenIssuer},
		{"iss with a slash more", claim("iss", testURL+"/"), nil, flow.ReasonTokenIssuer},
		{"iss missing", claim("iss", nil), nil, flow.ReasonTokenIssuer},
		{"iss as an array", claim("iss", []string{testURL}), nil, flow.ReasonTokenIssuer},
		{"rule of an issuer that is not loaded", good, func(c *Check) { c.Issuer = "shop/none" }, flow.ReasonTokenIssuer},
		{"sub missing", claim("sub", nil), nil, flow.ReasonTokenClaims},
		{"sub empty", claim("sub", ""), nil, flow.ReasonTokenClaims},
		{"sub a number", claim("sub", 7), nil, flow.ReasonTokenClaims},
		{"sub too long", claim("sub", strings.Repeat("a", maxSubject+1)), nil, flow.ReasonTokenClaims},
		{"jti a number", claim("jti", 7), nil, flow.ReasonTokenClaims},
		{"groups a string", claim("groups", "staff"), nil, flow.ReasonTokenClaims},
		{"scope an array", claim("scope", []string{"a"}), nil, flow.ReasonTokenClaims},
		{"scope there", good, func(c *Check) { c.Scopes = []string{"payments:write", "payments:read"} }, flow.ReasonOK},
		{"scope missing", good, func(c *Check) { c.Scopes = []string{"payments:admin"} }, flow.ReasonTokenScope},
		{"scope only as a prefix", good, func(c *Check) { c.Scopes = []string{"payments"} }, flow.ReasonTokenScope},

		// Algorithms.
		{"alg none", []byte(b64([]byte(`{"alg":"none","typ":"at+jwt"}`)) + "." + b64([]byte(goodClaims)) + "."), nil, flow.ReasonTokenAlgorithm},
		{"alg NoNe", []byte(b64([]byte(`{"alg":"NoNe","typ":"at+jwt"}`)) + "." + b64([]byte(goodClaims)) + "."), nil, flow.ReasonTokenAlgorithm},
		{"alg missing", asText(`{"typ":"at+jwt","kid":"ec"}`, goodClaims), nil, flow.ReasonTokenAlgorithm},
		{"the RSA key as HS256 secret", hs256(t, rs, goodClaims), nil, flow.ReasonTokenAlgorithm},
		{"ES256 header on the RSA key's kid", head("kid", "rs"), nil, flow.ReasonTokenAlgorithm},
		{"RS256 with the PS256 key", signedAs(t, ps, jwt.SigningMethodRS256, now), nil, flow.ReasonTokenAlgorithm},
		{"PS256 with the RS256 key", signedAs(t, rs, algorithms["PS256"].method, now), nil, flow.ReasonTokenAlgorithm},
		{"ES384 where the issuer may not", head("alg", "ES384"), nil, flow.ReasonTokenAlgorithm},

		// Signatures.
		{"another key's signature under a known kid", stranger.sign(t, stranger.header(), claimsAt(now)), nil, flow.ReasonTokenSignature},
		{"claims changed", tamper(good, 1), nil, flow.ReasonTokenSignature},
		{"signature of zeros", replaceSignature(good, make([]byte, 64)), nil, flow.ReasonTokenSignature},
		{"signature missing", replaceSignature(good, nil), nil, flow.ReasonTokenSignature},
		{"signature a byte longer", replaceSignature(good, append(signatureOf(good), 0)), nil, flow.ReasonTokenSignature},
		{"signature a byte shorter", replaceSignature(good, signatureOf(good)[:63]), nil, flow.ReasonTokenSignature},
		{"signature as ASN.1", replaceSignature(good, derOf(t, ec, good)), nil, flow.ReasonTokenSignature},
		{"PSS with another salt length", ps.withSalt(t, 20, now), nil, flow.ReasonTokenSignature},
		{"PSS with the longest salt", ps.withSalt(t, rsa.PSSSaltLengthAuto, now), nil, flow.ReasonTokenSignature},
		{"RSA signature with a zero in front", prefixZero(rs.sign(t, rs.header(), claimsAt(now))), nil, flow.ReasonTokenSignature},

		// Form.
		{"empty", nil, nil, flow.ReasonTokenMissing},
		{"over 16 KiB", append(bytes.Repeat([]byte{'a'}, MaxToken), '.'), nil, flow.ReasonTokenTooLarge},
		{"over 16 KiB and good", claim("x", strings.Repeat("a", MaxToken)), nil, flow.ReasonTokenTooLarge},
		{"two segments", good[:bytes.LastIndexByte(good, '.')], nil, flow.ReasonTokenMalformed},
		{"four segments", append(bytes.Clone(good), ".AA"...), nil, flow.ReasonTokenMalformed},
		{"five segments (JWE)", []byte("a.b.c.d.e"), nil, flow.ReasonTokenMalformed},
		{"padding", append(bytes.Clone(good), '='), nil, flow.ReasonTokenMalformed},
		{"a line break in it", append(bytes.Clone(good), '\n'), nil, flow.ReasonTokenMalformed},
		{"standard base64", bytes.Replace(good, []byte("."), []byte("+."), 1), nil, flow.ReasonTokenMalformed},
		{"unused bits of the last character set", loose(good), nil, flow.ReasonTokenMalformed},
		{"header not JSON", asText("x", goodClaims), nil, flow.ReasonTokenMalformed},
		{"header an array", asText("[]", goodClaims), nil, flow.ReasonTokenMalformed},
		{"claims not an object", asText(goodHeader, `"x"`), nil, flow.ReasonTokenMalformed},
		{"something after the claims", asText(goodHeader, goodClaims+"{}"), nil, flow.ReasonTokenMalformed},
		{"a comma too many", asText(goodHeader, strings.Replace(goodClaims, "}", ",}", 1)), nil, flow.ReasonTokenMalformed},
		{"not UTF-8", asText(goodHeader, splice(goodClaims, "\"x\":\"\xff\"")), nil, flow.ReasonTokenMalformed},
		{"a NUL", asText(goodHeader, splice(goodClaims, `"x":"\u0000"`)), nil, flow.ReasonTokenMalformed},
		{"a lone surrogate", asText(goodHeader, splice(goodClaims, `"x":"\ud800"`)), nil, flow.ReasonTokenMalformed},
		{"nested to 8", asText(goodHeader, splice(goodClaims, `"x":`+nest(7))), nil, flow.ReasonOK},
		{"nested deeper than 8", asText(goodHeader, splice(goodClaims, `"x":`+nest(8))), nil, flow.ReasonTokenMalformed},
		{"too many members", asText(goodHeader, splice(goodClaims, manyMembers(maxMembers))), nil, flow.ReasonTokenMalformed},

		// Names.
		{"exp twice", asText(goodHeader, splice(goodClaims, `"exp":1`)), nil, flow.ReasonTokenAmbiguous},
		{"exp and EXP", asText(goodHeader, splice(goodClaims, `"EXP":1`)), nil, flow.ReasonTokenAmbiguous},
		{"exp twice, one escaped", asText(goodHeader, splice(goodClaims, `"\u0065xp":1`)), nil, flow.ReasonTokenAmbiguous},
		{"sub and ſub", asText(goodHeader, splice(goodClaims, `"ſub":"root"`)), nil, flow.ReasonTokenAmbiguous},
		{"only Sub", asText(goodHeader, strings.Replace(goodClaims, `"sub"`, `"Sub"`, 1)), nil, flow.ReasonTokenAmbiguous},
		{"only ſcope", asText(goodHeader, strings.Replace(goodClaims, `"scope"`, `"ſcope"`, 1)), nil, flow.ReasonTokenAmbiguous},
		{"a nested member twice", asText(goodHeader, splice(goodClaims, `"x":{"a":1,"a":2}`)), nil, flow.ReasonTokenAmbiguous},
		{"a nested member twice by case", asText(goodHeader, splice(goodClaims, `"x":{"a":1,"A":2}`)), nil, flow.ReasonTokenAmbiguous},
		{"alg twice", asText(splice(goodHeader, `"alg":"none"`), goodClaims), nil, flow.ReasonTokenAmbiguous},
		{"alg and ALG", asText(splice(goodHeader, `"ALG":"none"`), goodClaims), nil, flow.ReasonTokenAmbiguous},
		{"kid with the Kelvin sign", asText(splice(goodHeader, `"Kid":"x"`), goodClaims), nil, flow.ReasonTokenAmbiguous},

		// Headers that would choose the key or change what is signed.
		{"crit", head("crit", []string{"exp"}), nil, flow.ReasonTokenHeader},
		{"b64 false", head("b64", false), nil, flow.ReasonTokenHeader},
		{"jwk", head("jwk", stranger.jwk()), nil, flow.ReasonTokenHeader},
		{"jku", head("jku", "https://evil.example/jwks"), nil, flow.ReasonTokenHeader},
		{"x5u", head("x5u", "https://evil.example/cert"), nil, flow.ReasonTokenHeader},
		{"x5c", head("x5c", []string{"AA=="}), nil, flow.ReasonTokenHeader},
		{"zip", head("zip", "DEF"), nil, flow.ReasonTokenHeader},
		{"kid traversal", head("kid", "../../etc/passwd"), nil, flow.ReasonTokenKey},
		{"kid SQL", head("kid", "' OR 1=1 --"), nil, flow.ReasonTokenKey},
		{"kid over 128 bytes", head("kid", strings.Repeat("k", MaxKeyID+1)), nil, flow.ReasonTokenMalformed},
		{"kid a number", head("kid", 1), nil, flow.ReasonTokenMalformed},
		{"kid unknown", head("kid", "new"), nil, flow.ReasonTokenKey},
		{"kid missing, several keys", head("kid", nil), nil, flow.ReasonTokenKey},
		{"typ JWT where the issuer says at+jwt", head("typ", "JWT"), nil, flow.ReasonTokenType},
		{"typ missing", head("typ", nil), nil, flow.ReasonTokenType},
		{"an ID token", head("typ", "id+jwt"), nil, flow.ReasonTokenType},

		// Binding.
		{"bound, this certificate", claim("cnf", bound(leaf)), func(c *Check) { c.Thumbprints = [][32]byte{other, leaf} }, flow.ReasonOK},
		{"bound, another certificate", claim("cnf", bound(leaf)), func(c *Check) { c.Thumbprints = [][32]byte{other} }, flow.ReasonTokenBinding},
		{"bound, no certificate", claim("cnf", bound(leaf)), nil, flow.ReasonTokenProof},
		{"bound, rule asks for it", claim("cnf", bound(leaf)), func(c *Check) { c.BoundTo = BindingMTLS; c.Thumbprints = [][32]byte{leaf} }, flow.ReasonOK},
		{"unbound, rule asks for it", good, func(c *Check) { c.BoundTo = BindingMTLS; c.Thumbprints = [][32]byte{leaf} }, flow.ReasonTokenUnbound},
		{"cnf jkt", claim("cnf", map[string]any{"jkt": b64(leaf[:])}), func(c *Check) { c.Thumbprints = [][32]byte{leaf} }, flow.ReasonTokenProof},
		{"cnf jkt and this certificate", claim("cnf", with(bound(leaf), "jkt", b64(leaf[:]))), func(c *Check) { c.Thumbprints = [][32]byte{leaf} }, flow.ReasonTokenProof},
		{"cnf of an unknown member", claim("cnf", map[string]any{"x": "y"}), func(c *Check) { c.Thumbprints = [][32]byte{leaf} }, flow.ReasonTokenProof},
		{"cnf {}", claim("cnf", map[string]any{}), func(c *Check) { c.Thumbprints = [][32]byte{leaf} }, flow.ReasonTokenProof},
		{"cnf not an object", claim("cnf", "x"), nil, flow.ReasonTokenClaims},
		{"cnf null", asText(goodHeader, splice(goodClaims, `"cnf":null`)), nil, flow.ReasonTokenClaims},
		{"x5t#S256 a byte short", claim("cnf", map[string]any{"x5t#S256": b64(leaf[:31])}), func(c *Check) { c.Thumbprints = [][32]byte{leaf} }, flow.ReasonTokenClaims},
		{"x5t#S256 a number", claim("cnf", map[string]any{"x5t#S256": 1}), func(c *Check) { c.Thumbprints = [][32]byte{leaf} }, flow.ReasonTokenClaims},
		{"unbound, rule asks for DPoP", good, func(c *Check) { c.BoundTo = BindingDPoP }, flow.ReasonTokenUnbound},
		{"unbound, with the scheme DPoP", good, func(c *Check) { c.DPoP = true }, flow.ReasonTokenProof},
		{"bound to the certificate, rule asks for DPoP", claim("cnf", bound(leaf)), func(c *Check) { c.BoundTo = BindingDPoP; c.Thumbprints = [][32]byte{leaf} }, flow.ReasonTokenUnbound},
		{"bound to a key, rule asks for the certificate", claim("cnf", map[string]any{"jkt": b64(leaf[:])}), func(c *Check) { c.BoundTo = BindingMTLS; c.Thumbprints = [][32]byte{leaf} }, flow.ReasonTokenUnbound},
		{"jkt a byte short", claim("cnf", map[string]any{"jkt": b64(leaf[:31])}), func(c *Check) { c.DPoP = true }, flow.ReasonTokenClaims},
		{"unbound, rule asks for a signature", good, func(c *Check) { c.BoundTo = BindingSignature }, flow.ReasonTokenUnbound},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			c := check()
			c.Now = now
			if r.check != nil {
				r.check(c)
			}
			for _, pass := range []string{"first", "second"} {
				claims, reason, err := v.Verify(r.token, c)
				if reason != r.want {
					t.Fatalf("%s time: %q (%v), want %q", pass, reason, err, r.want)
				}
				if (claims != nil) != (reason == flow.ReasonOK) || (err == nil) != (reason == flow.ReasonOK) {
					t.Fatalf("claims %v and error %v disagree with reason %q", claims, err, reason)
				}
				if status := reason.Status(); reason != flow.ReasonOK && status != 401 && reason != flow.ReasonTokenScope {
					t.Fatalf("%q answers %d, want 401", reason, status)
				}
			}
		})
	}
}

func marshal(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func nest(levels int) string {
	return strings.Repeat("[", levels) + strings.Repeat("]", levels)
}

func manyMembers(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `"m%d":%d,`, i, i)
	}
	return strings.TrimSuffix(b.String(), ",")
}

func signatureOf(token []byte) []byte {
	b, err := decodeSegment(string(token[bytes.LastIndexByte(token, '.')+1:]))
	if err != nil {
		panic(err)
	}
	return b
}

func replaceSignature(token, signature []byte) []byte {
	return append(bytes.Clone(token[:bytes.LastIndexByte(token, '.')+1]), b64(signature)...)
}

// tamper puts another subject into a segment.
func tamper(token []byte, segment int) []byte {
	parts := bytes.Split(token, []byte("."))
	raw, err := decodeSegment(string(parts[segment]))
	if err != nil {
		panic(err)
	}
	raw = bytes.Replace(raw, []byte("alice"), []byte("alicf"), 1)
	parts[segment] = []byte(b64(raw))
	return bytes.Join(parts, []byte("."))
}

// loose sets unused bits in the last character: another spelling of the same
// signature, which a lax decoder takes.
func loose(token []byte) []byte {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	out := bytes.Clone(token)
	last := &out[len(out)-1]
	*last = alphabet[strings.IndexByte(alphabet, *last)|1]
	return out
}

func prefixZero(token []byte) []byte {
	return replaceSignature(token, append([]byte{0}, signatureOf(token)...))
}

func hs256(t *testing.T, s *signer, claims string) []byte {
	t.Helper()
	secret, err := x509.MarshalPKIXPublicKey(s.private.Public())
	if err != nil {
		t.Fatal(err)
	}
	signed := b64([]byte(`{"alg":"HS256","typ":"at+jwt","kid":"`+s.id+`"}`)) + "." + b64([]byte(claims))
	h := hmac.New(sha256.New, secret)
	h.Write([]byte(signed))
	return []byte(signed + "." + b64(h.Sum(nil)))
}

// signedAs signs with a key under another algorithm than the key's own.
func signedAs(t *testing.T, s *signer, method jwt.SigningMethod, now time.Time) []byte {
	t.Helper()
	other := &signer{s.id, method, s.private}
	return other.sign(t, other.header(), claimsAt(now))
}

func derOf(t *testing.T, s *signer, token []byte) []byte {
	t.Helper()
	sum := sha256.Sum256(token[:bytes.LastIndexByte(token, '.')])
	der, err := ecdsa.SignASN1(rand.Reader, s.private.(*ecdsa.PrivateKey), sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func (s *signer) withSalt(t *testing.T, salt int, now time.Time) []byte {
	t.Helper()
	signed := b64([]byte(marshal(t, s.header()))) + "." + b64([]byte(marshal(t, claimsAt(now))))
	sum := sha256.Sum256([]byte(signed))
	sig, err := rsa.SignPSS(rand.Reader, s.private.(*rsa.PrivateKey), crypto.SHA256, sum[:], &rsa.PSSOptions{SaltLength: salt})
	if err != nil {
		t.Fatal(err)
	}
	return []byte(signed + "." + b64(sig))
}

// An ECDSA signature has a second valid form. Both verify, so what is revoked
// must be what the issuer said, not the token's bytes.
func TestRevocationHoldsForTheSecondSignature(t *testing.T) {
	ec := newES256(t, "ec")
	v := newVerifier(t, ec)
	good := ec.sign(t, ec.header(), claimsAt(time.Now()))
	twin := signatureOf(good)
	s := new(big.Int).SetBytes(twin[32:])
	s.Sub(elliptic.P256().Params().N, s).FillBytes(twin[32:])
	second := replaceSignature(good, twin)
	if bytes.Equal(good, second) {
		t.Fatal("the second form is the first")
	}
	for _, token := range [][]byte{good, second} {
		if _, reason, err := v.Verify(token, check()); err != nil {
			t.Fatal(reason, err)
		}
	}
	if err := v.SetRevocations([]Revocation{{Kind: "jti", Value: "id-1"}}); err != nil {
		t.Fatal(err)
	}
	for _, token := range [][]byte{good, second} {
		if _, reason, _ := v.Verify(token, check()); reason != flow.ReasonTokenRevoked {
			t.Fatalf("a revoked token: %q", reason)
		}
	}
}
