// SPDX-License-Identifier: Apache-2.0

package token

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Bounds of an HTTP message signature (RFC 9421).
const (
	maxSignatureInput = 2 << 10 // bytes of Signature-Input
	maxSignature      = 2 << 10 // bytes of Signature
	maxComponents     = 32
	maxNonce          = 128 // bytes
)

var (
	errSignatureNone    = errors.New("the token is bound to a key that signs requests, and no signature came")
	errSignatureForm    = errors.New("the signature's fields are not in the one form that is read here")
	errSignatureName    = errors.New("the signature covers a component that is not there, or is none of a request")
	errSignatureAlg     = errors.New("the signature's algorithm is not its key's")
	errSignatureWrong   = errors.New("the signature does not verify")
	errSignatureCovers  = errors.New("the signature does not cover all that it must: @method, @target-uri (or @authority, @path and @query), authorization, and content-digest where there is content")
	errSignatureDigest  = errors.New("the content is not that of Content-Digest, or was not held against it")
	errSignatureAge     = errors.New("the signature is too old, of the future, or has expired (created, expires)")
	errSignatureNoNonce = errors.New("the signature has no nonce")
)

// signature is what Signature-Input and Signature say of one signature.
type signature struct {
	components []string
	params     string // as covered, from the parenthesis on
	created    int64
	expires    int64 // 0 without
	nonce      string
	alg        string // "" without
	value      []byte
}

// signed says whether the request bears a signature by the key of a token (RFC
// 7800 section 3.2), over all that decides.
func (p *Proof) signed(k *key, thumbprint *[sha256.Size]byte, used *Proofs, now time.Time) (flow.Reason, error) {
	if p == nil || p.Request == nil {
		return flow.ReasonTokenProof, errProof
	}
	if known := &p.Request.ProvenKey; *known != ([sha256.Size]byte{}) {
		if subtle.ConstantTimeCompare(known[:], thumbprint[:]) != 1 {
			return flow.ReasonTokenBinding, errProofBinding
		}
		return flow.ReasonOK, nil
	}
	if !p.read {
		p.read = true
		p.key = *thumbprint
		p.reason, p.err = p.verifySignature(k, now)
	}
	switch {
	case p.err != nil:
		return p.reason, p.err
	case subtle.ConstantTimeCompare(p.key[:], thumbprint[:]) != 1:
		return flow.ReasonTokenBinding, errProofBinding
	case p.used:
		return flow.ReasonOK, nil
	}
	switch p.reason, p.err = used.use(&p.id, &p.key, p.until, now); p.reason {
	case flow.ReasonOK:
		p.used = true
	case flow.ReasonProofReplayed:
		p.reason = flow.ReasonSignatureReplayed
	case flow.ReasonProofStale:
		p.reason = flow.ReasonSignatureStale
	}
	return p.reason, p.err
}

func (p *Proof) verifySignature(k *key, now time.Time) (flow.Reason, error) {
	input, inputs := p.Request.HeaderValue("Signature-Input")
	value, values := p.Request.HeaderValue("Signature")
	switch {
	case inputs == 0 && values == 0:
		return flow.ReasonSignatureMissing, errSignatureNone
	case inputs != 1 || values != 1:
		return flow.ReasonSignatureMalformed, errSignatureForm
	}
	s, ok := parseSignature(string(input), string(value))
	if !ok {
		return flow.ReasonSignatureMalformed, errSignatureForm
	}
	if !s.covers(p.Request) {
		return flow.ReasonSignatureCovers, errSignatureCovers
	}
	base, ok := s.base(p.Request)
	if !ok {
		return flow.ReasonSignatureMalformed, errSignatureName
	}
	switch alg := signatureAlgorithm(k, s.alg); {
	case alg == "":
		return flow.ReasonSignatureMalformed, errSignatureAlg
	case !verifies(k, alg, base, s.value):
		return flow.ReasonSignatureMalformed, errSignatureWrong
	case s.nonce == "":
		return flow.ReasonSignatureMalformed, errSignatureNoNonce
	}
	created := time.Unix(s.created, 0)
	if created.Before(now.Add(-MaxProofAge)) || created.After(now.Add(MaxProofLead)) || s.expires != 0 && s.expires <= now.Unix() {
		return flow.ReasonSignatureStale, errSignatureAge
	}
	if hasContent(p.Request) && !digested(p.Request) {
		return flow.ReasonSignatureDigest, errSignatureDigest
	}
	h := sha256.New()
	h.Write(p.key[:])
	h.Write([]byte("signature " + s.nonce)) // apart from a DPoP proof's jti
	h.Sum(p.id[:0])
	p.until = created.Add(MaxProofAge)
	return flow.ReasonOK, nil
}

// hasContent says whether a request has content, or may have some that was not
// held.
func hasContent(r *flow.Request) bool {
	return len(r.Body) > 0 || r.ContentLength > 0 || r.ContentLength < 0 && r.Body == nil
}

// covers says whether a signature covers all that it must.
func (s *signature) covers(r *flow.Request) bool {
	has := func(name string) bool { return slices.Contains(s.components, name) }
	target := has("@target-uri") || has("@authority") && has("@path") && has("@query")
	return has("@method") && target && has("authorization") && (!hasContent(r) || has("content-digest"))
}

// parseSignature reads the fields of exactly one signature, in the canonical
// form of RFC 8941 alone, so that what is covered has one spelling.
func parseSignature(input, value string) (*signature, bool) {
	if len(input) > maxSignatureInput || len(value) > maxSignature {
		return nil, false
	}
	label, rest, ok := strings.Cut(input, "=")
	if !ok || !isLabel(label) {
		return nil, false
	}
	s := &signature{params: rest}
	if rest, ok = s.list(rest); !ok {
		return nil, false
	}
	if !s.parameters(rest) {
		return nil, false
	}
	own, encoded, ok := strings.Cut(value, "=")
	if !ok || own != label || len(encoded) < 2 || encoded[0] != ':' || encoded[len(encoded)-1] != ':' {
		return nil, false
	}
	var err error
	s.value, err = base64.StdEncoding.Strict().DecodeString(encoded[1 : len(encoded)-1])
	return s, err == nil && !strings.ContainsAny(encoded, "\r\n")
}

// isLabel says whether s is the key of a dictionary (RFC 8941 section 3.1.2).
func isLabel(s string) bool {
	for i := range len(s) {
		c := s[i]
		lower := 'a' <= c && c <= 'z' || c == '*'
		if !lower && (i == 0 || (c < '0' || c > '9') && c != '_' && c != '-' && c != '.') {
			return false
		}
	}
	return s != "" && len(s) <= 64
}

// list reads the covered components, ("a" "b"), and returns what follows.
func (s *signature) list(in string) (rest string, ok bool) {
	if in, ok = strings.CutPrefix(in, "("); !ok {
		return "", false
	}
	for {
		name, after, ok := quoted(in)
		if !ok || name == "" || name != strings.ToLower(name) || slices.Contains(s.components, name) || len(s.components) == maxComponents {
			return "", false
		}
		s.components = append(s.components, name)
		if rest, ok = strings.CutPrefix(after, ")"); ok {
			return rest, true
		}
		if in, ok = strings.CutPrefix(after, " "); !ok {
			return "", false // parameters of a component are not read
		}
	}
}

// quoted reads a string (RFC 8941 section 3.3.3) without escapes.
func quoted(in string) (value, rest string, ok bool) {
	if in, ok = strings.CutPrefix(in, `"`); !ok {
		return "", "", false
	}
	value, rest, ok = strings.Cut(in, `"`)
	if !ok || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r > '~' || r == '\\' }) {
		return "", "", false
	}
	return value, rest, true
}

// parameters reads ;created=N;nonce="..." and the others of RFC 9421 section
// 2.3, each once.
func (s *signature) parameters(in string) bool {
	seen := map[string]bool{}
	for in != "" {
		rest, ok := strings.CutPrefix(in, ";")
		if !ok {
			return false
		}
		name, value, ok := strings.Cut(rest, "=")
		if !ok || seen[name] {
			return false
		}
		seen[name] = true
		switch name {
		case "created", "expires":
			digits := len(value) - len(strings.TrimLeft(value, "0123456789"))
			n, err := strconv.ParseInt(value[:digits], 10, 64)
			if err != nil || n < 1 || n > maxDate || value[0] == '0' {
				return false
			}
			if in = value[digits:]; name == "created" {
				s.created = n
			} else {
				s.expires = n
			}
		case "nonce", "alg", "keyid", "tag":
			var text string
			if text, in, ok = quoted(value); !ok {
				return false
			}
			switch {
			case name == "nonce" && (text == "" || len(text) > maxNonce):
				return false
			case name == "nonce":
				s.nonce = text
			case name == "alg" && text == "":
				return false
			case name == "alg":
				s.alg = text
			}
		default:
			return false
		}
	}
	return s.created != 0
}

// base is the signature base (RFC 9421 section 2.5).
func (s *signature) base(r *flow.Request) ([]byte, bool) {
	b := make([]byte, 0, 1024)
	for _, name := range s.components {
		value, ok := component(name, r)
		if !ok || strings.ContainsAny(value, "\r\n") {
			return nil, false
		}
		b = append(append(append(append(b, '"'), name...), `": `...), value...)
		b = append(b, '\n')
	}
	return append(append(b, `"@signature-params": `...), s.params...), true
}

// component is the value of a component of a request (RFC 9421 sections 2.1
// and 2.2).
func component(name string, r *flow.Request) (string, bool) {
	scheme, port := "http", ":80"
	if r.TLS {
		scheme, port = "https", ":443"
	}
	authority := strings.TrimSuffix(strings.ToLower(r.Authority), port)
	target := r.Path
	if r.Query != "" {
		target += "?" + r.Query
	}
	switch name {
	case "@method":
		return r.Method, true
	case "@target-uri":
		return scheme + "://" + authority + target, true
	case "@authority":
		return authority, true
	case "@scheme":
		return scheme, true
	case "@request-target":
		return target, true
	case "@path":
		return r.Path, true
	case "@query":
		return "?" + r.Query, true
	}
	if strings.HasPrefix(name, "@") {
		return "", false
	}
	var values []string
	for i := range r.Headers {
		if strings.EqualFold(string(r.Headers[i].Name), name) {
			values = append(values, strings.Trim(string(r.Headers[i].Value), " \t"))
		}
	}
	return strings.Join(values, ", "), values != nil
}

// signatureAlgorithm is the algorithm of RFC 9421 section 6.2 for a key, "" for
// one that is asked for and is not its own.
func signatureAlgorithm(k *key, asked string) string {
	own := ""
	switch k.family {
	case familyP256:
		own = "ecdsa-p256-sha256"
	case familyP384:
		own = "ecdsa-p384-sha384"
	case familyEd25519:
		own = "ed25519"
	case familyRSA:
		switch {
		case k.algorithm == "PS512" || k.algorithm == "" && asked == "rsa-pss-sha512":
			own = "rsa-pss-sha512"
		case k.algorithm == "RS256" || k.algorithm == "" && asked == "rsa-v1_5-sha256":
			own = "rsa-v1_5-sha256"
		}
	}
	if asked != "" && asked != own {
		return ""
	}
	return own
}

func verifies(k *key, alg string, base, value []byte) bool {
	switch public := k.public.(type) {
	case *ecdsa.PublicKey:
		var digest []byte
		if alg == "ecdsa-p256-sha256" {
			sum := sha256.Sum256(base)
			digest = sum[:]
		} else {
			sum := sha512.Sum384(base)
			digest = sum[:]
		}
		size := (public.Curve.Params().BitSize + 7) / 8
		if len(value) != 2*size { // r and s, RFC 9421 section 3.3.4
			return false
		}
		return ecdsa.Verify(public, digest, new(big.Int).SetBytes(value[:size]), new(big.Int).SetBytes(value[size:]))
	case ed25519.PublicKey:
		return ed25519.Verify(public, base, value)
	case *rsa.PublicKey:
		if alg == "rsa-v1_5-sha256" {
			sum := sha256.Sum256(base)
			return rsa.VerifyPKCS1v15(public, crypto.SHA256, sum[:], value) == nil
		}
		sum := sha512.Sum512(base)
		return rsa.VerifyPSS(public, crypto.SHA512, sum[:], value, &rsa.PSSOptions{SaltLength: 64}) == nil
	}
	return false
}

// digested says whether the content is that of Content-Digest (RFC 9530), by
// each digest there whose algorithm is known, of which there must be one.
func digested(r *flow.Request) bool {
	field, count := r.HeaderValue("Content-Digest")
	if count != 1 || r.Body == nil || r.ContentLength >= 0 && int64(len(r.Body)) != r.ContentLength {
		return false
	}
	known := false
	for member := range strings.SplitSeq(string(field), ",") {
		name, encoded, ok := strings.Cut(strings.Trim(member, " \t"), "=")
		if !ok || len(encoded) < 2 || encoded[0] != ':' || encoded[len(encoded)-1] != ':' {
			return false
		}
		want, err := base64.StdEncoding.Strict().DecodeString(encoded[1 : len(encoded)-1])
		if err != nil {
			return false
		}
		var sum []byte
		switch name {
		case "sha-256":
			s := sha256.Sum256(r.Body)
			sum = s[:]
		case "sha-512":
			s := sha512.Sum512(r.Body)
			sum = s[:]
		default:
			continue
		}
		if subtle.ConstantTimeCompare(sum, want) != 1 {
			return false
		}
		known = true
	}
	return known
}
