// SPDX-License-Identifier: Apache-2.0

package relation

import (
	"errors"
	"strings"
	"testing"
)

func TestParseTuple(t *testing.T) {
	good := []string{
		"user:alice can_pay account:1",
		"user:alice@shop.example can_pay account:1",
		"team:eng#member editor folder:plans",
		"user:* viewer folder:plans",
		"service:checkout caller endpoint:orders|GET|/v1/orders/{id}",
		"user:ünal viewer folder:plans",
	}
	for _, s := range good {
		got, err := parseTuple(s)
		if err != nil || got.String() != s {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	bad := []string{
		"", "user:alice", "user:alice can_pay", "user:alice can_pay account:1 more", " user:alice can_pay account:1",
		"user:alice  can_pay account:1", "alice can_pay account:1", ":alice can_pay account:1", "user: can_pay account:1",
		"user:a:b can_pay account:1", "user:alice# can_pay account:1", "user:*#member can_pay account:1", "team:eng#a#b can_pay account:1",
		"user:alice can:pay account:1", "user:alice can* account:1", "user:alice can_pay account:*", "user:alice can_pay account:1#x",
		"user:alice can_pay account", "user:al\tice can_pay account:1", "user:alice\x00 can_pay account:1", "user:\xff can_pay account:1",
		"user:al\u200bice can_pay account:1", "user:al\u00a0ice can_pay account:1", "us*er:alice can_pay account:1",
		"user:alice " + strings.Repeat("r", maxRelation+1) + " account:1", "user:alice can_pay account:" + strings.Repeat("1", maxObject),
		"user:" + strings.Repeat("a", maxUser) + " can_pay account:1",
	}
	for _, s := range bad {
		if got, err := parseTuple(s); err == nil {
			t.Errorf("%q was taken as %q", s, got)
		}
	}
}

func FuzzParseTuple(f *testing.F) {
	for _, s := range []string{"user:alice can_pay account:1", "team:eng#member editor folder:plans", "user:* viewer folder:x", "a:b#c d e:f|g", "  ", "user:\u200b r o:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := parseTuple(s)
		if err != nil {
			return
		}
		if got.String() != s {
			t.Fatalf("%q was read as %q", s, got)
		}
		if again, err := parseTuple(got.String()); err != nil || again != got {
			t.Fatalf("read again as %q, %v", again, err)
		}
		if !validObject(got.Object) || len(got.Relation) > maxRelation || strings.ContainsAny(got.Object, "*#\n\r\t ") {
			t.Fatalf("took %q", got)
		}
	})
}

// parseTuple reads "USER RELATION OBJECT", the words parted by single spaces.
func parseTuple(s string) (Tuple, error) {
	user, rest, ok := strings.Cut(s, " ")
	relation, object, ok2 := strings.Cut(rest, " ")
	if !ok || !ok2 {
		return Tuple{}, errors.New("not USER RELATION OBJECT, three words")
	}
	t := Tuple{User: user, Relation: relation, Object: object}
	if err := t.Validate(); err != nil {
		return Tuple{}, err
	}
	return t, nil
}
