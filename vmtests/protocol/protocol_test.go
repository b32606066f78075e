// SPDX-License-Identifier: Apache-2.0

package protocol

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	want := []Record{{Kind: Boot, Text: "6.1.0"}, {Kind: Start, Package: "p"}, {Kind: Line, Package: "p", Text: "a\n\x16\xff"}, {Kind: End, Package: "p"}}
	var b bytes.Buffer
	for _, r := range want {
		if err := Write(&b, r); err != nil {
			t.Fatal(err)
		}
	}
	want[2].Text = "a\n\x16\ufffd" // JSON holds no bytes that are not UTF-8
	var got []Record
	collect := func(r Record) { got = append(got, r) }
	if err := Read(bytes.NewReader(b.Bytes()), collect); !errors.Is(err, ErrNotDone) {
		t.Errorf("without the end: %v", err)
	}
	got = nil
	if err := Write(&b, Record{Kind: Done}); err != nil {
		t.Fatal(err)
	}
	if err := Read(&b, collect); err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
}

func TestReadRefuses(t *testing.T) {
	for _, s := range []string{
		"", "\n", "done\n", `{"Kind":"Done"}`, `{"Kind":"line","What":1}`, `{"Kind":"error","Text":"out of memory"}`,
		`{"Kind":"line","Text":"` + strings.Repeat("a", MaxLine) + `"}`,
	} {
		if err := Read(strings.NewReader(s), func(Record) {}); err == nil {
			t.Errorf("%.40q was taken", s)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"Kind":"boot","Text":"6.1"}` + "\n" + `{"Kind":"done"}`))
	f.Add([]byte("\x00{"))
	f.Fuzz(func(t *testing.T, b []byte) {
		done := Read(bytes.NewReader(b), func(r Record) {
			if r.Kind == Done || r.Kind == Error {
				t.Errorf("passed on %v", r)
			}
		}) == nil
		if done && !bytes.Contains(bytes.ToLower(b), []byte(`kind`)) {
			t.Error("done without a record")
		}
	})
}
