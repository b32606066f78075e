// SPDX-License-Identifier: Apache-2.0

package vmtests

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/sallyport-dev/sallyport/vmtests/protocol"
)

// outcome is how a test ended.
type outcome string

const (
	passed     outcome = "PASS"
	failed     outcome = "FAIL"
	skipped    outcome = "SKIP"
	unfinished outcome = "unfinished" // it began, and the binary ended
	notRun     outcome = "not run"    // the binary has it, and it never began
)

// result is one test or subtest.
type result struct {
	outcome outcome
	output  []string
}

// run is what one test binary did.
type run struct {
	status string             // of its process, "" for success
	tests  map[string]*result // by full name
	order  []string
	output []string // what belongs to no test
	ended  bool

	current string
}

// results is what the guest reported.
type results struct {
	release string
	runs    map[string]*run // by package
}

// Add takes the next record. Lines are those of -test.v=test2json: what the
// testing package itself writes begins with ^V, so that no output of a test
// can pass for it.
func (r *results) Add(rec protocol.Record) error {
	if r.runs == nil {
		r.runs = map[string]*run{}
	}
	if rec.Kind == protocol.Boot {
		r.release = rec.Text
		return nil
	}
	u := r.runs[rec.Package]
	if (rec.Kind == protocol.Start) == (u != nil) || u != nil && u.ended {
		return fmt.Errorf("record %q of %s is out of order", rec.Kind, rec.Package)
	}
	switch rec.Kind {
	case protocol.Start:
		r.runs[rec.Package] = &run{tests: map[string]*result{}}
	case protocol.Line:
		u.line(rec.Text)
	case protocol.End:
		u.status, u.ended = rec.Text, true
	}
	return nil
}

func (u *run) line(text string) {
	// The mark can come after output that did not end its line, or after
	// indentation.
	before, event, marked := strings.Cut(text, "\x16")
	if strings.TrimSpace(before) != "" || !marked {
		u.write(before)
	}
	if !marked {
		return
	}
	if rest, ok := strings.CutPrefix(event, "=== "); ok {
		verb, name, _ := strings.Cut(rest, " ")
		name = strings.TrimSpace(name)
		switch verb {
		case "RUN":
			u.begin(name)
		case "CONT", "NAME", "PAUSE":
			u.current = name
		}
		return
	}
	if rest, ok := strings.CutPrefix(strings.TrimLeft(event, " "), "--- "); ok {
		verb, name, _ := strings.Cut(rest, ": ")
		name, _, _ = strings.Cut(name, " (")
		switch o := outcome(verb); o {
		case passed, failed, skipped:
			u.begin(name).outcome = o
		}
		return
	}
	u.write(event)
}

// begin returns the test, and attributes what follows to it.
func (u *run) begin(name string) *result {
	u.current = name
	t := u.tests[name]
	if t == nil {
		t = &result{outcome: unfinished}
		u.tests[name] = t
		u.order = append(u.order, name)
	}
	return t
}

func (u *run) write(line string) {
	if t := u.tests[u.current]; t != nil {
		t.output = append(t.output, line)
		return
	}
	u.output = append(u.output, line)
}

// failures says whether a test failed, which explains the status.
func (u *run) failures() bool {
	for _, t := range u.tests {
		if t.outcome != passed && t.outcome != skipped {
			return true
		}
	}
	return false
}

// subtests returns the names of what ran within a test, in order.
func (u *run) subtests(name string) []string {
	var subs []string
	for _, n := range u.order {
		if strings.HasPrefix(n, name+"/") {
			subs = append(subs, n)
		}
	}
	return subs
}

// judgement is what a result means on a kernel.
type judgement struct {
	bad, skip bool
	text      string
}

// complaint is how a line begins that says what is wrong with a test.
var complaint = regexp.MustCompile(`^\s+\w+\.go:\d+: `)

// judge holds the outcome of a top-level test against the expression that
// matches each of its complaints where it is known not to pass, "" where it
// has to.
func (u *run) judge(name, lacks string) judgement {
	if lacks == "" {
		return u.judgeAlone(name)
	}
	j := u.judgeAlone(name)
	if !j.bad {
		return judgement{bad: true, text: "it passes: take it off the list of what this kernel lacks"}
	}
	known, err := regexp.Compile(lacks)
	if err != nil {
		return judgement{bad: true, text: err.Error()}
	}
	complaints := 0
	for _, n := range append([]string{name}, u.subtests(name)...) {
		t := u.tests[n]
		if t == nil || t.outcome != passed && t.outcome != failed && t.outcome != skipped {
			return j
		}
		for _, line := range t.output {
			if !complaint.MatchString(line) {
				continue
			}
			if complaints++; !known.MatchString(line) {
				return j
			}
		}
	}
	if complaints == 0 {
		return j
	}
	return judgement{skip: true, text: "this kernel lacks something: " + j.text}
}

// judgeAlone wants the test to have passed.
func (u *run) judgeAlone(name string) judgement {
	t := u.tests[name]
	if t == nil {
		t = &result{outcome: notRun}
	}
	return judgement{bad: t.outcome != passed, text: strings.Join(append([]string{string(t.outcome) + " in the guest"}, t.output...), "\n")}
}
