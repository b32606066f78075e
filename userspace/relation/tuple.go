// SPDX-License-Identifier: Apache-2.0

package relation

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Bounds of the parts of a tuple, in bytes; those of OpenFGA.
const (
	maxType     = 254
	maxRelation = 50
	maxObject   = 256
	maxUser     = 512
)

// Tuple says that User has Relation to Object: "user:alice", "editor",
// "document:plan". User may also be a userset ("team:eng#member") or, where
// the model permits it, everybody of a type ("user:*").
type Tuple struct {
	User, Relation, Object string
	// NotBefore and Expires, where one is set, make it a lease: the model's
	// condition `lease` holds from the first, inclusive, to the second,
	// exclusive. Zero is unbounded.
	NotBefore, Expires time.Time
}

// String returns the tuple as USER RELATION OBJECT, without its lease.
func (t Tuple) String() string { return t.User + " " + t.Relation + " " + t.Object }

func (t *Tuple) leased() bool { return !t.NotBefore.IsZero() || !t.Expires.IsZero() }

// key is what makes two tuples the same: all but the lease.
func (t Tuple) key() Tuple { return Tuple{User: t.User, Relation: t.Relation, Object: t.Object} }

var (
	errUserForm  = errors.New("the user is not TYPE:ID, TYPE:ID#RELATION or TYPE:*")
	errRelForm   = errors.New("the relation is not a word of 1 to 50 bytes without : # @ * |")
	errObjForm   = errors.New("the object is not TYPE:ID")
	errLeaseForm = errors.New("the lease ends before it begins")
)

// Validate holds a tuple that is to be stored against the syntax; whether the
// model has its types and relation is the engine's to say.
func (t *Tuple) Validate() error {
	switch {
	case !validUser(t.User, true):
		return fmt.Errorf("check tuple: %w", errUserForm)
	case !validName(t.Relation, maxRelation):
		return fmt.Errorf("check tuple: %w", errRelForm)
	case !validObject(t.Object):
		return fmt.Errorf("check tuple: %w", errObjForm)
	case t.leased() && !t.Expires.IsZero() && !t.NotBefore.Before(t.Expires):
		return fmt.Errorf("check tuple: %w", errLeaseForm)
	}
	return nil
}

// plain says whether s is UTF-8 without the given bytes, white space, control
// or format characters (the last can make two values look the same).
func plain(s, without string) bool {
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			if c <= ' ' || c == 0x7f || strings.IndexByte(without, c) >= 0 {
				return false
			}
			i++
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n == 1 || unicode.IsSpace(r) || unicode.IsControl(r) || unicode.Is(unicode.Cf, r) {
			return false
		}
		i += n
	}
	return true
}

func validName(s string, most int) bool {
	return s != "" && len(s) <= most && plain(s, ":#@*|")
}

// validObject wants TYPE:ID with an ID that is not a wildcard. An ID may hold
// `|`, as those of endpoints do, and `@`.
func validObject(s string) bool {
	if len(s) > maxObject {
		return false
	}
	typ, id, ok := strings.Cut(s, ":")
	return ok && validName(typ, maxType) && id != "" && plain(id, ":#*")
}

func validUser(s string, wildcard bool) bool {
	if len(s) > maxUser {
		return false
	}
	object, relation, userset := strings.Cut(s, "#")
	if userset {
		return validName(relation, maxRelation) && validObject(object)
	}
	if typ, ok := strings.CutSuffix(s, ":*"); ok {
		return wildcard && validName(typ, maxType)
	}
	return validObject(object)
}

// typeOf returns the type of an object or a user.
func typeOf(s string) string {
	typ, _, _ := strings.Cut(s, ":")
	return typ
}
