// SPDX-License-Identifier: Apache-2.0

package relation

import (
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
		got, err := ParseTuple(s)
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
		if got, err := ParseTuple(s); err == nil {
			t.Errorf("%q was taken as %q", s, got)
		}
	}
}

func TestValidValue(t *testing.T) {
	for _, s := range []string{"alice", "a", "A-1_b.c~d", "ünal", "{id}", "/v1/orders", strings.Repeat("a", maxValue)} {
		if !ValidValue(s) {
			t.Errorf("%q was refused", s)
		}
	}
	for _, s := range []string{
		"", "a:b", "a#b", "a@b", "*", "a*", "a|b", " ", "a b", "a\tb", "a\n", "\x00", "a\x7f", "a\u0085b", "a\u00a0b", "a\u2028b",
		"a\u200bb", "a\u202eb", "\ufeffa", "\xff", "a\xc3", strings.Repeat("a", maxValue+1),
	} {
		if ValidValue(s) {
			t.Errorf("%q was taken", s)
		}
	}
	if n := testing.AllocsPerRun(100, func() { ValidValue("ünal-1234567890") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzParseTuple(f *testing.F) {
	for _, s := range []string{"user:alice can_pay account:1", "team:eng#member editor folder:plans", "user:* viewer folder:x", "a:b#c d e:f|g", "  ", "user:\u200b r o:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseTuple(s)
		if err != nil {
			return
		}
		if got.String() != s {
			t.Fatalf("%q was read as %q", s, got)
		}
		if again, err := ParseTuple(got.String()); err != nil || again != got {
			t.Fatalf("read again as %q, %v", again, err)
		}
		if !validObject(got.Object) || len(got.Relation) > maxRelation || strings.ContainsAny(got.Object, "*#\n\r\t ") {
			t.Fatalf("took %q", got)
		}
	})
}

// FuzzValidValue: a value that is taken leaves a tuple's parts what they
// were when it is put into one.
func FuzzValidValue(f *testing.F) {
	for _, s := range []string{"alice", "a:b", "*", "a|b", "a b", "\xff", "\u2028"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if !ValidValue(s) {
			return
		}
		got, err := ParseTuple("user:" + s + " can_pay account:" + s)
		if err != nil || got.User != "user:"+s || got.Object != "account:"+s || typeOf(got.Object) != "account" {
			t.Fatalf("%q made %q, %v", s, got, err)
		}
		endpoint := "endpoint:" + s + "|GET|/" + s
		if strings.Count(endpoint, "|") != 2 || strings.Count(endpoint, ":") != 1 {
			t.Fatalf("%q made the endpoint %q", s, endpoint)
		}
	})
}
