// SPDX-License-Identifier: Apache-2.0

package trial

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Suite is one document of a *_test.yaml file.
type Suite struct {
	// Defaults stand where a case writes nothing.
	Defaults *Call `json:"defaults"`
	// Tuples are relations that hold in each case, beside its own.
	Tuples []Tuple `json:"tuples"`
	Cases  []Case  `json:"cases" required:"true"`
}

// Case is a call and what should become of it.
type Case struct {
	Call
	// Name is unique in its file.
	Name string `json:"name" required:"true"`
	// Without lists defaults that do not hold for this case.
	Without []string `json:"without" oneof:"port|channel|http|grpc|upgrade|host|headers|body|token|posture|tuples|now"`
	Expect  Expect   `json:"expect" required:"true"`
}

// Expect is what should become of a call; the bare word is Decision. What is
// not written may be anything.
type Expect struct {
	// Decision is what the stages find, whatever the policy's mode.
	Decision string `json:"decision" required:"true" oneof:"allow|deny"`
	Reason   string `json:"reason"`
	Stage    string `json:"stage" oneof:"channel|identity|posture|governance|policy|token|relation|condition|anomaly|protocol"`
	// Policy is the APIPolicy that decides, NAME or NAMESPACE/NAME, and Rule
	// the name of its rule, or none where no rule decides.
	Policy string `json:"policy"`
	Rule   string `json:"rule"`
	// Refused says whether the caller is refused: a denial in enforce.
	Refused *bool `json:"refused"`
}

// UnmarshalText takes the bare word.
func (e *Expect) UnmarshalText(b []byte) error {
	if e.Decision = string(b); e.Decision != "allow" && e.Decision != "deny" {
		return fmt.Errorf("%q is not one of allow, deny", b)
	}
	return nil
}

// Test is a case that can be run.
type Test struct {
	Name     string
	Position load.Position
	Expect   Expect
	call     *Resolved
}

// Tests reads a test file for the trial's plan: everything that is wrong with
// it, or its cases in order.
func (t *Trial) Tests(f load.File) ([]Test, []load.Problem) {
	docs, problems := load.Documents[Suite](f, "a test")
	var report load.Report
	if len(docs) == 0 && len(problems) == 0 {
		report.Errorf(load.Position{File: f.Path}, "the file has no cases")
	}
	var tests []Test
	seen := map[string]load.Position{}
	for _, d := range docs {
		for i := range d.Value.Cases {
			c := &d.Value.Cases[i]
			if first, ok := seen[c.Name]; ok && c.Name != "" {
				report.Errorf(d.At("cases", i, "name"), "name: case %q is there twice: first at %s", c.Name, first)
			}
			seen[c.Name] = d.At("cases", i, "name")
			tests = append(tests, t.test(&report, d, i))
		}
	}
	problems = load.Sort(append(problems, report.Problems()...))
	if load.HasErrors(problems) {
		return nil, problems
	}
	return tests, problems
}

func (t *Trial) test(report *load.Report, d *load.Doc[Suite], i int) Test {
	c := &d.Value.Cases[i]
	defaults := d.Value.Defaults
	if defaults != nil && len(c.Without) > 0 {
		less := *defaults
		for _, field := range c.Without {
			less.drop(field)
		}
		defaults = &less
	}
	call := c.Call.over(defaults)
	call.Tuples = slices.Concat(d.Value.Tuples, call.Tuples)
	resolved, faults := t.Resolve(&call)
	for _, f := range faults {
		report.Errorf(place(d, i, f.Path), "%s", f.Message)
	}
	t.expects(report, d, i, resolved)
	return Test{Name: c.Name, Position: d.At("cases", i), Expect: c.Expect, call: resolved}
}

// drop leaves a field out of the defaults.
func (c *Call) drop(field string) {
	switch field {
	case "port":
		c.Port = 0
	case "channel":
		c.Channel = ""
	case "http":
		c.HTTP = ""
	case "grpc":
		c.GRPC = ""
	case "upgrade":
		c.Upgrade = ""
	case "host":
		c.Host = ""
	case "headers":
		c.Headers = nil
	case "body":
		c.Body = ""
	case "token":
		c.Token = nil
	case "posture":
		c.Posture = nil
	case "tuples":
		c.Tuples = nil
	case "now":
		c.Now = nil
	}
}

// place finds where a field of a case is written: there, or in the defaults.
func place(d *load.Doc[Suite], i int, path []any) load.Position {
	if path[0] == "tuples" { // of the suite, then of the case
		n, shared := path[1].(int), len(d.Value.Tuples)
		if n < shared {
			return d.At(path...)
		}
		path = append([]any{"tuples", n - shared}, path[2:]...)
	}
	if _, written := d.Lookup("cases", i, path[0]); !written {
		if _, written = d.Lookup("defaults", path[0]); written {
			return d.At(append([]any{"defaults"}, path...)...)
		}
	}
	return d.At(append([]any{"cases", i}, path...)...)
}

// expects holds what a case expects against what there is: a name that
// nothing has would only ever fail.
func (t *Trial) expects(report *load.Report, d *load.Doc[Suite], i int, call *Resolved) {
	e := &d.Value.Cases[i].Expect
	if e.Policy != "" {
		var names []string
		for _, a := range t.plan.APIs() {
			names = append(names, a.Name)
			if _, name, _ := strings.Cut(a.Name, "/"); !strings.Contains(e.Policy, "/") {
				names = append(names, name)
			}
		}
		if !slices.Contains(names, e.Policy) {
			report.Errorf(d.At("cases", i, "expect", "policy"), "policy: no APIPolicy %q%s", e.Policy, load.DidYouMean(e.Policy, names, `"`))
		}
	}
	if e.Rule != "" && e.Rule != Nobody && call != nil && call.API != nil {
		var names []string
		for _, r := range call.API.Rules {
			names = append(names, r.Name)
		}
		if !slices.Contains(names, e.Rule) {
			report.Errorf(d.At("cases", i, "expect", "rule"), "rule: %s has no rule %q%s", call.API.Name, e.Rule, load.DidYouMean(e.Rule, names, `"`))
		}
	}
}

// Result is what came of a test.
type Result struct {
	Test
	Outcome Outcome
	// Differs says what was expected and did not come, "" where all did.
	Differs string
}

// Run runs a test.
func (t *Trial) Run(ctx context.Context, one Test) (Result, error) {
	out, err := t.Judge(ctx, one.call)
	if err != nil {
		return Result{}, fmt.Errorf("%s: case %q: %w", one.Position.FileLine(), one.Name, err)
	}
	return Result{Test: one, Outcome: out, Differs: one.Expect.differs(&out.Decision)}, nil
}

// differs names the first thing that is not as expected.
func (e *Expect) differs(d *flow.Decision) string {
	decision := "allow"
	if d.Effect != flow.EffectAllow {
		decision = "deny"
	}
	_, short, _ := strings.Cut(d.Policy, "/")
	policy := d.Policy
	if !strings.Contains(e.Policy, "/") {
		policy = short
	}
	for _, c := range [...]struct{ what, want, got string }{
		{"decision", e.Decision, decision},
		{"reason", e.Reason, cmp.Or(string(d.Reason), "none")},
		{"stage", e.Stage, d.Stage.String()},
		{"policy", e.Policy, cmp.Or(policy, "none")},
		{"rule", e.Rule, cmp.Or(d.Rule, "none")},
	} {
		if c.want != "" && c.want != c.got {
			return fmt.Sprintf("%s %s, want %s", c.what, c.got, c.want)
		}
	}
	if e.Refused != nil && *e.Refused != d.Refused() {
		return fmt.Sprintf("refused %t, want %t", d.Refused(), *e.Refused)
	}
	return ""
}
