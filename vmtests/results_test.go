// SPDX-License-Identifier: Apache-2.0

package vmtests

import (
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/vmtests/protocol"
)

// transcript is what a test binary writes with -test.v=test2json; % stands
// for ^V.
const transcript = `before everything
%=== RUN   TestGood
    good_test.go:1: a line
--- FAIL: TestGood (0.00s)
%=== RUN   TestGood/a_(b):_c
%=== NAME  TestGood
    good_test.go:2: of the outer
%--- PASS: TestGood (0.00s)
    %--- PASS: TestGood/a_(b):_c (0.00s)
%=== RUN   TestBad
no end of line%--- FAIL: TestBad (1.25s)
%=== RUN   TestSkip
    skip_test.go:1: needs Linux 9
%--- SKIP: TestSkip (0.00s)
%=== RUN   TestNeverEnds
panic: it is over
`

func transcribe(t *testing.T, text string) *results {
	t.Helper()
	r := &results{}
	add := func(rec protocol.Record) {
		if err := r.Add(rec); err != nil {
			t.Fatal(err)
		}
	}
	add(protocol.Record{Kind: protocol.Boot, Text: "6.1.0"})
	add(protocol.Record{Kind: protocol.Start, Package: "p"})
	for line := range strings.Lines(strings.ReplaceAll(text, "%", "\x16")) {
		add(protocol.Record{Kind: protocol.Line, Package: "p", Text: strings.TrimSuffix(line, "\n")})
	}
	add(protocol.Record{Kind: protocol.End, Package: "p", Text: "exit status 1"})
	return r
}

func TestResults(t *testing.T) {
	r := transcribe(t, transcript)
	u := r.runs["p"]
	if r.release != "6.1.0" || !u.ended || u.status != "exit status 1" || !u.failures() {
		t.Errorf("%+v", u)
	}
	for name, want := range map[string]result{
		"TestGood":          {passed, []string{"    good_test.go:1: a line", "--- FAIL: TestGood (0.00s)", "    good_test.go:2: of the outer"}},
		"TestGood/a_(b):_c": {passed, nil},
		"TestBad":           {failed, []string{"no end of line"}},
		"TestSkip":          {skipped, []string{"    skip_test.go:1: needs Linux 9"}},
		"TestNeverEnds":     {unfinished, []string{"panic: it is over"}},
	} {
		got := u.tests[name]
		if got == nil || got.outcome != want.outcome || !slices.Equal(got.output, want.output) {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if len(u.tests) != 5 || !slices.Equal(u.output, []string{"before everything"}) {
		t.Errorf("%v, %q", u.order, u.output)
	}
	if got := u.subtests("TestGood"); !slices.Equal(got, []string{"TestGood/a_(b):_c"}) {
		t.Errorf("subtests %q", got)
	}
}

func TestJudge(t *testing.T) {
	u := transcribe(t, transcript+`%=== RUN   TestLacks
    a_test.go:9: tcx: not supported
        which goes on
%--- FAIL: TestLacks (0.00s)
%=== RUN   TestLacksWithin
%=== RUN   TestLacksWithin/a
    a_test.go:9: tcx: not supported
%--- FAIL: TestLacksWithin/a (0.00s)
%--- FAIL: TestLacksWithin (0.00s)
%=== RUN   TestLacksMore
    a_test.go:9: tcx: not supported
    a_test.go:10: a wrong answer
%--- FAIL: TestLacksMore (0.00s)
%=== RUN   TestLacksAndHangs
    a_test.go:9: tcx: not supported
`).runs["p"]
	const tcx = "not supported$"
	for _, c := range []struct {
		name, lacks string
		bad, skip   bool
	}{
		{"TestGood", "", false, false},
		{"TestBad", "", true, false},
		{"TestSkip", "", true, false},
		{"TestNeverEnds", "", true, false},
		{"TestNeverRan", "", true, false},
		{"TestLacks", "", true, false},
		{"TestGood", tcx, true, false}, // it passes
		{"TestBad", tcx, true, false},  // it does not say why
		{"TestSkip", tcx, true, false},
		{"TestSkip", "needs Linux 9$", false, true},
		{"TestLacks", tcx, false, true},
		{"TestLacksWithin", tcx, false, true},
		{"TestLacksMore", tcx, true, false},
		{"TestLacksMore", tcx + "|wrong", false, true},
		{"TestLacksAndHangs", tcx, true, false},
		{"TestNeverRan", tcx, true, false},
		{"TestLacks", "(", true, false},
	} {
		if got := u.judge(c.name, c.lacks); got.bad != c.bad || got.skip != c.skip {
			t.Errorf("%s, lacking %q: %+v", c.name, c.lacks, got)
		}
	}
}

func TestRecordsOutOfOrder(t *testing.T) {
	for name, kinds := range map[string][]string{
		"line first": {protocol.Line}, "end first": {protocol.End}, "two starts": {protocol.Start, protocol.Start},
		"line after the end": {protocol.Start, protocol.End, protocol.Line},
	} {
		r := &results{}
		var err error
		for _, k := range kinds {
			err = r.Add(protocol.Record{Kind: k, Package: "p"})
		}
		if err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

func FuzzLine(f *testing.F) {
	f.Add(strings.ReplaceAll(transcript, "%", "\x16"))
	f.Add("\x16--- PASS: \n\x16=== RUN\n\x16\x16--- FAIL: a")
	f.Fuzz(func(t *testing.T, text string) {
		u := &run{tests: map[string]*result{}}
		for line := range strings.Lines(text) {
			u.line(line)
		}
		for name, r := range u.tests {
			if r.outcome == passed && !strings.Contains(text, "\x16") {
				t.Errorf("%q passed without a mark", name)
			}
		}
		if len(u.order) != len(u.tests) {
			t.Errorf("%d of %d tests are in order", len(u.order), len(u.tests))
		}
	})
}
