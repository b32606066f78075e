// SPDX-License-Identifier: Apache-2.0

package token

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"net/url"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Bounds of a DPoP proof (RFC 9449).
const (
	// MaxProof is the longest proof that is read, in bytes.
	MaxProof = 8 << 10
	// MaxProofAge is how old a proof may be, MaxProofLead from how far in the
	// future it may come.
	MaxProofAge  = time.Minute
	MaxProofLead = 10 * time.Second
	maxProofID   = 256 // bytes of jti
)

// ProofAlgorithms are those that a challenge offers (RFC 9449 section 5.1).
const ProofAlgorithms = "ES256 ES384 ES512 EdDSA PS256 PS384 PS512 RS256 RS384 RS512"

var (
	errProofNone    = errors.New("the token is bound to a key, and no DPoP proof came")
	errProofScheme  = errors.New("a token that is bound to a key comes with the scheme DPoP, and no other")
	errProofTwo     = errors.New("more than one DPoP proof")
	errProofForm    = errors.New("the DPoP proof is not one that can be read")
	errProofKey     = errors.New("the DPoP proof's jwk is no public key for its algorithm")
	errProofSigned  = errors.New("the DPoP proof's signature does not verify")
	errProofMethod  = errors.New("the DPoP proof is for another method (htm)")
	errProofTarget  = errors.New("the DPoP proof is for another target (htu)")
	errProofToken   = errors.New("the DPoP proof is for another token (ath)")
	errProofAge     = errors.New("the DPoP proof is too old, or of the future (iat)")
	errProofBinding = errors.New("the DPoP proof is by another key than the token's")
	errProofTwice   = errors.New("the DPoP proof came before (jti)")
)

// proofHeaders and proofClaims are the members that decide something.
var (
	proofHeaders = reservedNames("typ", "alg", "jwk", "kid", "crit", "b64", "cty", "jku", "x5u", "x5c", "enc", "zip")
	proofClaims  = reservedNames("jti", "htm", "htu", "iat", "ath", "nonce")
	publicJWK    = reservedNames("kty", "crv", "x", "y", "n", "e", "d", "k", "alg", "use", "key_ops")
)

// Proof is the DPoP proof of one request (RFC 9449): it is read once, however
// many rules ask for it, and counts as used with the first token that it
// proves.
type Proof struct {
	Request *flow.Request

	read   bool
	used   bool
	key    [sha256.Size]byte // thumbprint, RFC 7638
	id     [sha256.Size]byte // of the key and the jti
	until  time.Time         // it can be used no more
	reason flow.Reason
	err    error
}

// of says whether the request proves the possession of the key with that
// thumbprint, for a token.
func (p *Proof) of(thumbprint *[sha256.Size]byte, token []byte, used *Proofs, now time.Time) (flow.Reason, error) {
	if p == nil || p.Request == nil {
		return flow.ReasonTokenProof, errProof
	}
	if known := &p.Request.ProvenKey; *known != ([sha256.Size]byte{}) {
		// It was proven when the request came.
		if subtle.ConstantTimeCompare(known[:], thumbprint[:]) != 1 {
			return flow.ReasonTokenBinding, errProofBinding
		}
		return flow.ReasonOK, nil
	}
	if !p.read {
		p.read = true
		p.reason, p.err = p.verify(token, thumbprint, now)
	}
	switch {
	case p.err != nil:
		return p.reason, p.err
	case subtle.ConstantTimeCompare(p.key[:], thumbprint[:]) != 1:
		return flow.ReasonTokenBinding, errProofBinding
	case p.used:
		return flow.ReasonOK, nil
	}
	if p.reason, p.err = used.use(&p.id, &p.key, p.until, now); p.err == nil {
		p.used = true
	}
	return p.reason, p.err
}

// Key returns the thumbprint of the key that was proven, zero for none.
func (p *Proof) Key() [sha256.Size]byte {
	switch {
	case p == nil || p.Request == nil:
		return [sha256.Size]byte{}
	case p.used:
		return p.key
	}
	return p.Request.ProvenKey
}

// verify does what RFC 9449 section 4.3 asks for, but for jti. The signature of
// a key that the token is not bound to is not looked at: everybody can make one.
func (p *Proof) verify(token []byte, bound *[sha256.Size]byte, now time.Time) (flow.Reason, error) {
	raw, count := p.Request.HeaderValue("DPoP")
	switch {
	case count == 0:
		return flow.ReasonProofMissing, errProofNone
	case count > 1:
		return flow.ReasonProofMalformed, errProofTwo
	case len(raw) > MaxProof:
		return flow.ReasonProofMalformed, errProofForm
	}
	header, claims, signed, signature, ok := splitProof(string(raw))
	if !ok {
		return flow.ReasonProofMalformed, errProofForm
	}
	jwk, ok := header["jwk"].(map[string]any)
	name, named := header["alg"].(string)
	if !ok || !named {
		return flow.ReasonProofMalformed, errProofForm
	}
	k, alg := proofKey(jwk, name), algorithms[name]
	if k == nil {
		return flow.ReasonProofMalformed, errProofKey
	}
	p.key = thumbprint(jwk)
	if subtle.ConstantTimeCompare(p.key[:], bound[:]) != 1 {
		return flow.ReasonTokenBinding, errProofBinding
	}
	size := alg.signature
	if size == 0 {
		size = k.size
	}
	if len(signature) != size || alg.method.Verify(signed, signature, k.public) != nil {
		return flow.ReasonProofMalformed, errProofSigned
	}
	return p.claims(claims, token, now)
}

// splitProof cuts a proof into its parts, and reads two of them.
func splitProof(raw string) (header, claims map[string]any, signed string, signature []byte, ok bool) {
	head, rest, _ := strings.Cut(raw, ".")
	body, last, _ := strings.Cut(rest, ".")
	h, err1 := decodeSegment(head)
	b, err2 := decodeSegment(body)
	signature, err3 := decodeSegment(last)
	if errors.Join(err1, err2, err3) != nil {
		return nil, nil, "", nil, false
	}
	header, err1 = readObject(string(h), proofHeaders)
	claims, err2 = readObject(string(b), proofClaims)
	if errors.Join(err1, err2) != nil {
		return nil, nil, "", nil, false
	}
	for _, forbidden := range [...]string{"crit", "b64", "jku", "x5u", "x5c", "enc", "zip"} {
		if _, there := header[forbidden]; there {
			return nil, nil, "", nil, false
		}
	}
	typ, _ := header["typ"].(string)
	return header, claims, raw[:len(head)+1+len(body)], signature, mediaType(typ) == "dpop+jwt"
}

// proofKey reads the key of a proof, nil for one that cannot be the
// algorithm's.
func proofKey(jwk map[string]any, name string) *key {
	alg := algorithms[name]
	if alg == nil {
		return nil
	}
	for member := range jwk {
		if folded, _ := fold(member); publicJWK[folded] != "" && publicJWK[folded] != member {
			return nil
		}
	}
	_, k, err := parseKey(jwk)
	if err != nil || k == nil || k.family != alg.family || k.algorithm != "" && k.algorithm != name {
		return nil
	}
	return k
}

// claims judges what a proof says.
func (p *Proof) claims(claims map[string]any, token []byte, now time.Time) (flow.Reason, error) {
	id, _ := claims["jti"].(string)
	method, _ := claims["htm"].(string)
	target, _ := claims["htu"].(string)
	hash := octets(claims["ath"])
	var issued time.Time
	if id == "" || len(id) > maxProofID || !date(claims, "iat", &issued) || issued.IsZero() {
		return flow.ReasonProofMalformed, errProofForm
	}
	sum := sha256.Sum256(token)
	switch {
	case method != p.Request.Method:
		return flow.ReasonProofMismatch, errProofMethod
	case !isTarget(target, p.Request):
		return flow.ReasonProofMismatch, errProofTarget
	case subtle.ConstantTimeCompare(hash, sum[:]) != 1:
		return flow.ReasonProofMismatch, errProofToken
	case issued.Before(now.Add(-MaxProofAge)), issued.After(now.Add(MaxProofLead)):
		return flow.ReasonProofStale, errProofAge
	}
	h := sha256.New()
	h.Write(p.key[:])
	h.Write([]byte(id))
	h.Sum(p.id[:0])
	p.until = issued.Add(MaxProofAge)
	return flow.ReasonOK, nil
}

// KeyThumbprint is the thumbprint of a public JWK (RFC 7638).
func KeyThumbprint(jwk map[string]any) [sha256.Size]byte { return thumbprint(jwk) }

// thumbprint is that of a public JWK which was parsed (RFC 7638 section 3):
// its required members in lexicographic order. Their values need no escape.
func thumbprint(jwk map[string]any) [sha256.Size]byte {
	var names []string
	switch jwk["kty"] {
	case "EC":
		names = []string{"crv", "kty", "x", "y"}
	case "OKP":
		names = []string{"crv", "kty", "x"}
	default:
		names = []string{"e", "kty", "n"}
	}
	var b strings.Builder
	for i, n := range names {
		b.WriteString([...]string{"{", ","}[min(i, 1)])
		value, _ := jwk[n].(string)
		b.WriteString(`"` + n + `":"` + value + `"`)
	}
	b.WriteString("}")
	return sha256.Sum256([]byte(b.String()))
}

// isTarget says whether htu is what a request asks for, without query and
// fragment, in the normal forms of RFC 3986 sections 6.2.2 and 6.2.3.
func isTarget(htu string, r *flow.Request) bool {
	u, err := url.Parse(htu)
	if err != nil || u.Host == "" || u.User != nil || u.Opaque != "" {
		return false
	}
	scheme, port := "http", "80"
	if r.TLS {
		scheme, port = "https", "443"
	}
	if !strings.EqualFold(u.Scheme, scheme) || !strings.EqualFold(withPort(u.Host, port), withPort(r.Authority, port)) {
		return false
	}
	path := u.EscapedPath()
	if path == "" {
		path = "/"
	}
	return path == r.Path || normalPath(path) == normalPath(r.Path)
}

// withPort adds a port to an authority that has none.
func withPort(authority, port string) string {
	if at := strings.LastIndexByte(authority, ':'); at > strings.LastIndexByte(authority, ']') {
		return authority
	}
	return authority + ":" + port
}

// normalPath decodes what needs no percent-encoding and writes the rest in
// upper case.
func normalPath(path string) string {
	if !strings.Contains(path, "%") {
		return path
	}
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		if path[i] != '%' || i+2 >= len(path) {
			b.WriteByte(path[i])
			continue
		}
		high, low := unhex(path[i+1]), unhex(path[i+2])
		if high > 15 || low > 15 {
			b.WriteByte(path[i])
			continue
		}
		if c := high<<4 | low; base64urlByte[c] || c == '.' || c == '~' {
			b.WriteByte(c)
		} else {
			b.WriteByte('%')
			b.WriteByte(digits[high])
			b.WriteByte(digits[low])
		}
		i += 2
	}
	return b.String()
}
