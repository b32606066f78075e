// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"encoding/asn1"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func scopeOf(t testing.TB, node string, ids ...string) Scope {
	t.Helper()
	s, err := NewScope("td", node, ids)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestScope(t *testing.T) {
	s := scopeOf(t, "n1", "spiffe://td/b", "spiffe://td/a", "spiffe://td/b")
	if !slices.Equal(s.IDs, []string{"spiffe://td/a", "spiffe://td/b"}) {
		t.Fatalf("%v: not sorted and unique", s.IDs)
	}
	back, err := ParseScope(s.marshal())
	if err != nil || back.Node != "n1" || !slices.Equal(back.IDs, s.IDs) {
		t.Fatalf("%+v, %v", back, err)
	}
	for id, want := range map[string]bool{
		"spiffe://td/a": true, "spiffe://td/b": true, "spiffe://td/": false, "spiffe://td/aa": false, "spiffe://td/a/b": false, "": false,
	} {
		if s.Permits(id) != want {
			t.Errorf("Permits(%q) = %v", id, !want)
		}
	}
	empty := scopeOf(t, "n1")
	if back, err := ParseScope(empty.marshal()); err != nil || back.Permits("spiffe://td/a") || back.Permits("") {
		t.Errorf("empty scope: %+v, %v", back, err)
	}
}

func TestNewScopeRefuses(t *testing.T) {
	many := make([]string, MaxScopeIDs+1)
	long := make([]string, 20)
	for i := range many {
		many[i] = fmt.Sprintf("spiffe://td/%d", i)
	}
	for i := range long {
		long[i] = fmt.Sprintf("spiffe://td/%d%s", i, strings.Repeat("x", 2000))
	}
	for name, c := range map[string]struct {
		node string
		ids  []string
		want string
	}{
		"node":         {"N", nil, "node name"},
		"id":           {"n", []string{"spiffe://td/a/"}, "empty path segment"},
		"wildcard":     {"n", []string{"spiffe://td/*"}, "in path"},
		"trust domain": {"n", []string{"spiffe://other/a"}, "not of trust domain"},
		"many":         {"n", many, "at most 1024"},
		"large":        {"n", long, "bytes, at most"},
	} {
		if _, err := NewScope("td", c.node, c.ids); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", name, err, c.want)
		}
	}
}

func rawScope(t testing.TB, node string, tag int, ids ...string) []byte {
	t.Helper()
	der := scopeDER{Node: node, IDs: []asn1.RawValue{}}
	for _, id := range ids {
		der.IDs = append(der.IDs, asn1.RawValue{Tag: tag, Bytes: []byte(id)})
	}
	b, err := asn1.Marshal(der)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseScopeRefuses(t *testing.T) {
	good := rawScope(t, "n", asn1.TagIA5String, "spiffe://td/a", "spiffe://td/b")
	if _, err := ParseScope(good); err != nil {
		t.Fatal(err)
	}
	if good[1] >= 0x80 {
		t.Fatal("the sample needs a short length")
	}
	element := func(inside ...[]byte) []byte { // a short SEQUENCE
		body := bytes.Join(inside, nil)
		return append([]byte{0x30, byte(len(body))}, body...)
	}
	node, ids := []byte{0x0c, 1, 'n'}, element([]byte("\x16\x0dspiffe://td/a"))
	if _, err := ParseScope(element(node, ids)); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"an element more":           element(node, ids, []byte{5, 0}),
		"node as PrintableString":   element([]byte{0x13, 1, 'n'}, ids),
		"an ID that is constructed": element(node, element([]byte("\x36\x0dspiffe://td/a"))),
		"empty":                     nil,
		"cut":                       good[:len(good)-1],
		"trailing":                  append(bytes.Clone(good), 0),
		"long form":                 append([]byte{good[0], 0x81, good[1]}, good[2:]...),
		"unsorted":                  rawScope(t, "n", asn1.TagIA5String, "spiffe://td/b", "spiffe://td/a"),
		"twice":                     rawScope(t, "n", asn1.TagIA5String, "spiffe://td/a", "spiffe://td/a"),
		"utf8":                      rawScope(t, "n", asn1.TagUTF8String, "spiffe://td/a"),
		"bad id":                    rawScope(t, "n", asn1.TagIA5String, "spiffe://td/a/../b"),
		"bad node":                  rawScope(t, "N", asn1.TagIA5String, "spiffe://td/a"),
		"large":                     rawScope(t, "n", asn1.TagIA5String, "spiffe://td/"+strings.Repeat("a", maxScopeBytes)),
	} {
		if _, err := ParseScope(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzParseScope(f *testing.F) {
	f.Add(rawScope(f, "n", asn1.TagIA5String, "spiffe://td/a", "spiffe://td/b"))
	f.Add(rawScope(f, "n", asn1.TagIA5String))
	f.Add([]byte{0x30, 0x80, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseScope(b)
		if err == nil && (!bytes.Equal(s.marshal(), b) || !slices.IsSorted(s.IDs) || CheckNodeName(s.Node) != nil) {
			t.Errorf("accepted %x as %+v", b, s)
		}
	})
}
