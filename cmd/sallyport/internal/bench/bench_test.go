// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestMain lets the harness run this program as its client of connect().
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == connectVerb {
		if err := connectMain(os.Args[2:], os.Stdout); err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestEveryVariantCarries: figures of one short round prove nothing, but each
// variant carried requests, without an error, and is in the report.
func TestEveryVariantCarries(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, cgroups and BPF")
	}
	program := filepath.Join(t.TempDir(), "sallyport")
	if out, err := exec.Command("go", "build", "-o", program, "github.com/sallyport-dev/sallyport/cmd/sallyport").CombinedOutput(); err != nil {
		t.Fatalf("build sallyport: %v\n%s", err, out)
	}
	o := options{program: program, rounds: 1, seconds: 1, connections: []int{16}, fresh: []int{1}, only: regexp.MustCompile(""), progress: t.Logf}
	r, err := measure(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	text := r.markdown()
	want := []string{bareSame, bareAcross, same, sameHTTP, acrossL4, acrossHTTP, acrossFull, "nginx http"}
	for _, p := range recipes {
		if p.missing() == "" {
			want = append(want, p.name)
		}
	}
	for _, name := range want {
		for _, m := range r.modes {
			if m.fresh && name == acrossFull {
				continue
			}
			s := r.samples[name][m]
			if len(s) != 1 || s[0].Requests == 0 || s[0].Errors != 0 {
				t.Errorf("%s, %s: %+v", name, m, s)
			}
		}
		if !strings.Contains(text, "| "+name+" |") {
			t.Errorf("%s is not in the report:\n%s", name, text)
		}
	}
	if s := r.samples[acrossHTTP][mode{connections: 16}]; len(s) == 1 && (s[0].cpu == 0 || s[0].logged == 0) {
		t.Errorf("%s took no CPU time or logged no decision: %+v", acrossHTTP, s[0])
	}
	if s := r.samples[acrossL4][mode{1, true}]; len(s) == 1 && s[0].logged == 0 {
		t.Errorf("%s logged no decision: %+v", acrossL4, s[0])
	}
}

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want spread
	}{
		{[]float64{3}, spread{3, 3, 3}},
		{[]float64{3, 1, 2}, spread{2, 1, 3}},
		{[]float64{4, 1, 3, 2}, spread{2.5, 1, 4}},
	} {
		if got := spreadOf(c.in); got != c.want {
			t.Errorf("spreadOf(%v) = %v", c.in, got)
		}
	}
}

func TestNumbers(t *testing.T) {
	for in, want := range map[string]int{"": 0, "1": 1, "1,16,64": 3} {
		if got, err := numbers(in); err != nil || len(got) != want {
			t.Errorf("numbers(%q) = %v, %v", in, got, err)
		}
	}
	for _, in := range []string{"0", "a", "1,,2", "1 2", "-3"} {
		if got, err := numbers(in); err == nil {
			t.Errorf("numbers(%q) = %v", in, got)
		}
	}
}

// TestGoals: medians of a round's own ratios are held against the goals.
func TestGoals(t *testing.T) {
	m := mode{connections: 64}
	r := &results{o: options{rounds: 3}, samples: map[string]map[mode][]sample{}}
	put := func(name string, k kind, requests ...int64) {
		r.variants = append(r.variants, &variant{name: name, kind: k})
		r.samples[name] = map[mode][]sample{}
		for _, n := range requests {
			r.samples[name][m] = append(r.samples[name][m], sample{found: found{Requests: n, Micros: 1e6}})
		}
	}
	put(acrossL4, kindL4, 150, 300, 80)
	put("x", kindPeerL4, 100, 100, 100)
	put("y", kindPeerL4, 50, 200, 40)
	g := goal{"rate", 1.4, true, againstPeer(acrossL4, kindPeerL4, m, rate, highest)}
	for round, want := range []float64{1.5, 1.5, 0.8} {
		if got, ok := g.value(r, round); !ok || got != want {
			t.Errorf("round %d: %v, %t", round, got, ok)
		}
	}
	if _, ok := g.value(r, 3); ok {
		t.Error("a round that was not measured has a ratio")
	}
	if got := (goal{limit: 1.4, least: true}).verdict(spreadOf([]float64{1.5, 1.5, .8})); got != "met" {
		t.Error(got)
	}
	if got := (goal{limit: .5}).verdict(spreadOf([]float64{.51})); got != "missed" {
		t.Error(got)
	}
	if got := (goal{limit: .5}).verdict(spreadOf(nil)); got != "not measured" {
		t.Error(got)
	}
}

func TestWriteBetweenMarks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "doc.md")
	for _, c := range []struct{ in, want string }{
		{"a\n" + beginMark + "old\n" + endMark + "b\n", "a\n" + beginMark + "\nnew\n" + endMark + "b\n"},
		{"no marks\n", ""},
		{"a\n" + beginMark + "no end\n", ""},
	} {
		if err := os.WriteFile(file, []byte(c.in), 0o644); err != nil {
			t.Fatal(err)
		}
		err := writeBetweenMarks(file, "new\n")
		b, readErr := os.ReadFile(file)
		if readErr != nil {
			t.Fatal(readErr)
		}
		switch {
		case c.want == "" && (err == nil || string(b) != c.in):
			t.Errorf("%q: %v, became %q", c.in, err, b)
		case c.want != "" && (err != nil || string(b) != c.want):
			t.Errorf("%q: %v, became %q", c.in, err, b)
		}
	}
}
