// SPDX-License-Identifier: Apache-2.0

// Package authority is the shared certificate authority of a handful of
// nodes (`sallyport authority`): it enrols a node by a single-use join
// token that names the node and the exact SPIFFE IDs it may issue, gives it
// an intermediate for an hour, and renews that as long as the operator's
// list still has the node. Server and client are here; the node's side of
// an enrolment is identity.CA.
//
// The wire is HTTPS, TLS 1.3 alone, JSON bodies, binary fields in base64:
//
//	POST /v1/join   {"token","csr"} -> {"trustDomain","intermediate","roots"}
//	POST /v1/renew  {"csr"}         -> the same; the client certificate is the current intermediate
//	GET  /v1/bundle                 -> {"trustDomain","roots"}
//
// A refusal is {"error","reason"} with status 400, 403, 429 or 503.
package authority

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/sallyport-dev/sallyport/userspace/statefile"
)

const (
	tokenPrefix = "sjt1."
	secretSize  = 32
	tokenSize   = sha256.Size + secretSize
)

// Token is a join token, "sjt1." followed by 64 bytes in base64url without
// padding: the SHA-256 of the authority root's SubjectPublicKeyInfo, by
// which the node knows the authority, and 32 random bytes, by which the
// authority knows the token. Pinning the public key and not the certificate
// lets the root be issued anew under its key. A token says nothing of the
// node and its IDs: they stay with the authority.
type Token struct {
	Pin    [sha256.Size]byte
	secret [secretSize]byte
}

var errToken = errors.New("not a join token: it must be sjt1. and 86 characters of base64url, as `sallyport authority token create` printed it")

// ParseToken parses the one canonical form of a token.
func ParseToken(s string) (Token, error) {
	text, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok || len(text) != base64.RawURLEncoding.EncodedLen(tokenSize) || strings.ContainsAny(text, "\r\n") {
		return Token{}, errToken
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || len(b) != tokenSize {
		return Token{}, errToken
	}
	var t Token
	copy(t.Pin[:], b)
	copy(t.secret[:], b[sha256.Size:])
	return t, nil
}

const maxTokenFile = 1024 // bytes

// LoadToken takes a token itself or the path of a file that holds one.
func LoadToken(s string) (Token, error) {
	if strings.HasPrefix(s, tokenPrefix) {
		return ParseToken(s)
	}
	b, err := statefile.Read(s, maxTokenFile)
	if err != nil {
		return Token{}, fmt.Errorf("read join token: %w", err)
	}
	t, err := ParseToken(strings.TrimSpace(string(b)))
	if err != nil {
		return Token{}, fmt.Errorf("read join token %s: %w", s, err)
	}
	return t, nil
}

func newToken(root *x509.Certificate) Token {
	t := Token{Pin: pinOf(root)}
	rand.Read(t.secret[:]) // never fails, by its contract
	return t
}

func pinOf(root *x509.Certificate) [sha256.Size]byte {
	return sha256.Sum256(root.RawSubjectPublicKeyInfo)
}

// Encode returns the token's text, which is a secret.
func (t Token) Encode() string {
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(t.Pin[:], t.secret[:]...))
}

// String keeps the secret out of logs and errors; it names the token.
func (t Token) String() string { return "join token " + t.ID() }

// GoString is String, for %#v.
func (t Token) GoString() string { return t.String() }

// ID names the token in lists and logs: the first half of its hash in hex.
func (t Token) ID() string {
	hash := t.hash()
	return hex.EncodeToString(hash[:16])
}

// hash is all that the authority stores of a token.
func (t Token) hash() [sha256.Size]byte { return sha256.Sum256(t.secret[:]) }
