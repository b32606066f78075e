// SPDX-License-Identifier: Apache-2.0

package token

import (
	"fmt"
	"time"
)

// maxRevocations bounds the list of revocations.
const maxRevocations = 1 << 17

// Revocation voids tokens until it ends. It goes by what the issuer said
// (jti, subject, issuer), never by a token's bytes: an ECDSA signature has a
// second valid form, so a token has a second spelling.
type Revocation struct {
	Kind string // jti ("iss|jti", or the jti of any issuer), subject ("iss|sub"), issuer (URL or namespace/name); others are not for tokens and ignored
	// Value is what the kind says.
	Value string
	// Since: subject and issuer void the tokens issued until then, and those
	// without an iat. As an issuer's clock may be ahead by the leeway, those
	// issued in the 30 s after it are void too.
	Since time.Time
	Until time.Time // zero: for good
}

type revocationKey struct{ kind, value string }

type revocations struct {
	all map[revocationKey]Revocation
	// overflow: the list did not fit, so no token can be known to be good.
	overflow bool
}

// SetRevocations replaces all revocations. It takes effect on the next
// request, cached tokens included. A list that is too long refuses every
// token until one that fits replaces it.
func (v *Verifier) SetRevocations(list []Revocation) error {
	r := &revocations{all: make(map[revocationKey]Revocation, len(list))}
	for _, one := range list {
		switch one.Kind {
		case "jti", "subject", "issuer":
		default:
			continue
		}
		if len(r.all) >= maxRevocations {
			v.revoked.Store(&revocations{overflow: true})
			return fmt.Errorf("set token revocations: more than %d; every token is refused until there are fewer", maxRevocations)
		}
		k := revocationKey{one.Kind, one.Value}
		if old, twice := r.all[k]; twice {
			one = wider(old, one)
		}
		r.all[k] = one
	}
	v.revoked.Store(r)
	return nil
}

// wider joins two revocations of one thing into one that voids what either does.
func wider(a, b Revocation) Revocation {
	if b.Since.After(a.Since) {
		a.Since = b.Since
	}
	if a.Until.IsZero() || b.Until.IsZero() {
		a.Until = time.Time{}
	} else if b.Until.After(a.Until) {
		a.Until = b.Until
	}
	return a
}

func (r *revocations) holds(t *Claims, i *issuer, now time.Time) bool {
	if r.overflow {
		return true
	}
	if len(r.all) == 0 {
		return false
	}
	if t.ID != "" {
		for _, value := range [...]string{t.TokenKey, t.ID} {
			if one, there := r.all[revocationKey{"jti", value}]; there && one.live(now) {
				return true
			}
		}
	}
	return r.covers("subject", t.SubjectKey, t, now) || r.covers("issuer", i.URL, t, now) || r.covers("issuer", i.Name, t, now)
}

func (r *revocations) covers(kind, value string, t *Claims, now time.Time) bool {
	one, there := r.all[revocationKey{kind, value}]
	return there && one.live(now) && (t.IssuedAt.IsZero() || !t.IssuedAt.After(one.Since.Add(leeway)))
}

func (r Revocation) live(now time.Time) bool { return r.Until.IsZero() || now.Before(r.Until) }
