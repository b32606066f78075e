// SPDX-License-Identifier: Apache-2.0

package token

import (
	"crypto/sha256"
	"math"
	"strings"
	"time"
)

// Bounds of the claims that are read.
const (
	maxSubject   = 512 // bytes of sub
	maxTokenID   = 256 // bytes of jti
	maxAudiences = 32
	maxGroups    = 256
	maxScope     = 4096             // bytes of scope
	maxDate      = 253402300799     // the last second of the year 9999
	leeway       = 30 * time.Second // for nbf and iat
	defaultLife  = 15 * time.Minute // where an issuer names no maximum
	maxLifetime  = 400 * 24 * time.Hour
)

// Claims is what a verified token says. It is shared by every request that
// brings the same token: read it, never write to it.
type Claims struct {
	Issuer   string
	Subject  string
	ID       string // jti, "" without one
	ClientID string // "" without one
	Audience []string
	Scopes   []string
	Groups   []string
	// IssuedAt and NotBefore are zero where the token has none.
	IssuedAt, NotBefore, Expiry time.Time
	// ACR is the authentication context class and AuthTime when the subject
	// authenticated (OpenID Connect Core, section 2): "" and zero without one,
	// or where it is none.
	ACR      string
	AuthTime time.Time
	// Bound says that the token names what its sender must prove: the
	// certificate whose SHA-256 digest Thumbprint is (RFC 8705), the key whose
	// thumbprint (RFC 7638) KeyThumbprint is (by RFC 9449 or RFC 9421), or both.
	Bound         bool
	Thumbprint    [sha256.Size]byte
	KeyThumbprint [sha256.Size]byte
	// Raw holds every claim: strings, booleans, nil, int64, float64, []any
	// and map[string]any.
	Raw map[string]any
	// SubjectKey ("iss|sub") and TokenKey ("iss|jti", "" without a jti) are
	// the names by which flow.Decision.Subjects knows what a revocation of
	// would void this token.
	SubjectKey, TokenKey string

	kind  string // typ, lower case, without "application/"
	proof cnf

	signer *key      // of a cnf with a jwk (RFC 7800 section 3.2), which signs requests
	opaque bool      // what the issuer answered of an opaque token
	until  time.Time // that answer counts that long
}

// cnf is what a token's cnf claim asks to be proven (RFC 7800): all of it.
type cnf uint8

const (
	cnfAbsent      cnf = 0
	cnfCertificate cnf = 1 << iota // x5t#S256
	cnfKey                         // jkt
	cnfSigner                      // jwk
	cnfOther                       // nothing, or something that cannot be proven here
)

// reservedClaims are the claims that decide something here or in an
// application behind, by folded name.
var reservedClaims = reservedNames("iss", "sub", "aud", "exp", "nbf", "iat", "jti", "cnf", "scope", "client_id", "groups",
	"roles", "entitlements", "acr", "amr", "auth_time", "act", "azp")

// reservedHeaders are the header members that decide something.
var reservedHeaders = reservedNames("alg", "typ", "kid", "cty", "crit", "b64", "jwk", "jku", "x5u", "x5c", "x5t", "enc", "zip")

func reservedNames(names ...string) map[string]string {
	m := make(map[string]string, len(names))
	for _, n := range names {
		f, _ := fold(n)
		m[f] = n
	}
	return m
}

// readClaims types the claims. It judges nothing but shapes.
func readClaims(raw map[string]any) (*Claims, error) {
	c := &Claims{Raw: raw}
	ok := text(raw, "iss", &c.Issuer, math.MaxInt) && text(raw, "sub", &c.Subject, maxSubject) &&
		text(raw, "jti", &c.ID, maxTokenID) && text(raw, "client_id", &c.ClientID, maxSubject) &&
		date(raw, "exp", &c.Expiry) && date(raw, "nbf", &c.NotBefore) && date(raw, "iat", &c.IssuedAt) &&
		list(raw, "groups", &c.Groups, maxGroups) && readScope(c, raw) && readAudience(c, raw) && readProof(c, raw)
	if !ok || c.Subject == "" {
		return nil, errClaims
	}
	c.ACR, _ = raw["acr"].(string)
	date(raw, "auth_time", &c.AuthTime)
	c.SubjectKey = c.Issuer + "|" + c.Subject
	if c.ID != "" {
		c.TokenKey = c.Issuer + "|" + c.ID
	}
	return c, nil
}

func text(raw map[string]any, name string, to *string, most int) bool {
	v, there := raw[name]
	if !there {
		return true
	}
	s, ok := v.(string)
	*to = s
	return ok && s != "" && len(s) <= most
}

// date reads a NumericDate (RFC 7519 section 2). A fraction is cut off: an
// expiry comes earlier by it, the others stay within the leeway.
func date(raw map[string]any, name string, to *time.Time) bool {
	v, there := raw[name]
	if !there {
		return true
	}
	var seconds float64
	switch n := v.(type) {
	case int64:
		seconds = float64(n)
	case float64:
		seconds = math.Floor(n)
	default:
		return false
	}
	if seconds < 1 || seconds > maxDate {
		return false
	}
	*to = time.Unix(int64(seconds), 0)
	return true
}

func list(raw map[string]any, name string, to *[]string, most int) bool {
	v, there := raw[name]
	if !there {
		return true
	}
	items, ok := v.([]any)
	if !ok || len(items) > most {
		return false
	}
	out := make([]string, len(items))
	for i, item := range items {
		if out[i], ok = item.(string); !ok {
			return false
		}
	}
	*to = out
	return true
}

// readScope reads scope as RFC 9068 section 2.2.3 has it: words in one string.
func readScope(c *Claims, raw map[string]any) bool {
	v, there := raw["scope"]
	if !there {
		return true
	}
	s, ok := v.(string)
	if !ok || len(s) > maxScope {
		return false
	}
	if s != "" {
		c.Scopes = strings.Split(s, " ")
	}
	return true
}

func readAudience(c *Claims, raw map[string]any) bool {
	if s, ok := raw["aud"].(string); ok {
		c.Audience = []string{s}
		return true
	}
	return list(raw, "aud", &c.Audience, maxAudiences)
}

func readProof(c *Claims, raw map[string]any) bool {
	v, there := raw["cnf"]
	if !there {
		return true
	}
	members, ok := v.(map[string]any)
	if !ok {
		return false
	}
	c.Bound = true
	for name, value := range members {
		if jwk, ok := value.(map[string]any); ok && name == "jwk" {
			_, k, err := parseKey(jwk)
			if err != nil || k == nil {
				return false
			}
			c.proof |= cnfSigner
			c.signer, c.KeyThumbprint = k, thumbprint(jwk)
			continue
		}
		b := octets(value)
		switch name {
		case "x5t#S256":
			c.proof |= cnfCertificate
			copy(c.Thumbprint[:], b)
		case "jkt":
			c.proof |= cnfKey
			copy(c.KeyThumbprint[:], b)
		default:
			c.proof |= cnfOther
			continue
		}
		if len(b) != sha256.Size {
			return false
		}
	}
	if len(members) == 0 || c.proof&(cnfKey|cnfSigner) == cnfKey|cnfSigner {
		c.proof = cnfOther
	}
	return true
}
