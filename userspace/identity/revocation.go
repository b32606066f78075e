// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"fmt"
	"math/big"
	"strings"
	"time"
)

// RevocationKind says what a revocation names.
type RevocationKind string

// The kinds of a revocation and the form of their values.
const (
	RevokeIdentity RevocationKind = "identity" // a SPIFFE ID
	RevokeSerial   RevocationKind = "serial"   // a certificate's serial number, hex; an intermediate's voids its leaves
	RevokeJTI      RevocationKind = "jti"      // a token's "iss|jti", or the jti of any issuer's
	RevokeSubject  RevocationKind = "subject"  // "iss|sub"
	RevokeIssuer   RevocationKind = "issuer"   // a token's iss
)

// MaxRevocations bounds a list.
const MaxRevocations = 1 << 20

const maxRevocationValue = 4096 // bytes

// Revocation voids what it names until Until, for good when that is zero.
// Since is when it was made: a token issued later, after the cause was
// mended, may be let through by who checks tokens; certificates never are.
type Revocation struct {
	Kind  RevocationKind
	Value string
	Since time.Time
	Until time.Time
}

type revocationKey struct {
	kind  RevocationKind
	value string
}

// Revocations is an immutable deny list, replaced as a whole. The nil list
// is empty.
type Revocations struct {
	generation uint64
	entries    map[revocationKey]Revocation
}

// NewRevocations builds a list. Of two entries for one value the longer
// lasting counts, with the later Since.
func NewRevocations(list []Revocation, generation uint64) (*Revocations, error) {
	if len(list) > MaxRevocations {
		return nil, fmt.Errorf("build revocation list: %d entries, at most %d", len(list), MaxRevocations)
	}
	r := &Revocations{generation: generation, entries: make(map[revocationKey]Revocation, len(list))}
	for _, e := range list {
		switch e.Kind {
		case RevokeIdentity, RevokeJTI, RevokeSubject, RevokeIssuer:
		case RevokeSerial:
			e.Value = normalSerial(e.Value)
		default:
			return nil, fmt.Errorf("build revocation list: unknown kind %q", e.Kind)
		}
		if e.Value == "" || len(e.Value) > maxRevocationValue {
			return nil, fmt.Errorf("build revocation list: %s value of %d bytes, must be 1 to %d", e.Kind, len(e.Value), maxRevocationValue)
		}
		key := revocationKey{e.Kind, e.Value}
		if old, ok := r.entries[key]; ok {
			if old.Until.IsZero() || !e.Until.IsZero() && old.Until.After(e.Until) {
				e.Until = old.Until
			}
			if old.Since.After(e.Since) {
				e.Since = old.Since
			}
		}
		r.entries[key] = e
	}
	return r, nil
}

// Generation returns the generation that the list was built with, 0 for nil.
func (r *Revocations) Generation() uint64 {
	if r == nil {
		return 0
	}
	return r.generation
}

// Len returns the number of entries.
func (r *Revocations) Len() int {
	if r == nil {
		return 0
	}
	return len(r.entries)
}

// Find returns the revocation of value that holds at now, in constant time
// and without allocation.
func (r *Revocations) Find(kind RevocationKind, value string, now time.Time) (Revocation, bool) {
	if r == nil || len(r.entries) == 0 {
		return Revocation{}, false
	}
	e, ok := r.entries[revocationKey{kind, value}]
	if !ok || !e.Until.IsZero() && !now.Before(e.Until) {
		return Revocation{}, false
	}
	return e, true
}

// Serial writes a certificate's serial number as revocations, the decision
// log and `identity list` do: lower-case hex without leading zeros.
func Serial(n *big.Int) string { return n.Text(16) }

func normalSerial(s string) string {
	s = strings.ToLower(strings.ReplaceAll(s, ":", ""))
	if t := strings.TrimLeft(s, "0"); t != "" {
		return t
	}
	return s
}
