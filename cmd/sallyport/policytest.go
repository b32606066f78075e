// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/trial"
)

func newPolicyTest() *cobra.Command {
	defaults := config.Defaults("node")
	c := &cobra.Command{
		Use: "test [DIR|FILE_test.yaml...]", Short: "Run the tests beside policies (*_test.yaml); exit 1 if one fails",
		Long: "Run the tests beside policies (*_test.yaml) by the agent's own code; exit 1 if one fails.\nEach folder is a set of policies of its own. Without an argument: " + defaults.PolicyDir + ".",
		Example: `  sallyport policy test policies/
  sallyport policy test --run 'alice.*' policies/payments_test.yaml`,
	}
	out := addFormat(c)
	set := addSetFlags(c)
	run := c.Flags().String("run", "", "only cases whose name matches this regular expression")
	c.RunE = func(c *cobra.Command, args []string) error {
		only, err := regexp.Compile(*run)
		if err != nil {
			return fmt.Errorf("--run: %w", err)
		}
		if len(args) == 0 {
			args = []string{defaults.PolicyDir}
		}
		r := &testRun{set: set, only: only, out: c.OutOrStdout(), faults: c.OutOrStdout(), json: out.json, all: *run == ""}
		if out.json {
			r.faults = c.ErrOrStderr()
		}
		for _, a := range args {
			if err := r.argument(c.Context(), a); err != nil {
				return err
			}
		}
		return r.finish()
	}
	return c
}

// testRun is one `policy test`.
type testRun struct {
	set  *setFlags
	only *regexp.Regexp
	all  bool
	out  io.Writer
	json bool
	// faults is where what is wrong with files is written.
	faults io.Writer

	report testReport
}

// testReport is what `policy test -o json` writes.
type testReport struct {
	Cases   []caseReport      `json:"cases"`
	Failed  int               `json:"failed"`
	Rules   int               `json:"rules"`
	Missing []trial.Uncovered `json:"rulesWithoutCase"`
}

type caseReport struct {
	Name     string        `json:"name"`
	Position load.Position `json:"position"`
	OK       bool          `json:"ok"`
	Differs  string        `json:"differs,omitempty"`
	Decision decided       `json:"decision"`
}

// argument runs the tests of a folder, or those of one file of it.
func (r *testRun) argument(ctx context.Context, arg string) error {
	info, err := os.Stat(arg)
	if err != nil {
		return fmt.Errorf("read tests: %w", err)
	}
	dir, one := arg, ""
	if !info.IsDir() {
		if dir, one = filepath.Split(filepath.Clean(arg)); !load.IsTestFile(one) {
			return fmt.Errorf("%s is no test; name a folder, or a file *_test.yaml", arg)
		}
		dir = filepath.Clean(dir)
	}
	tests, problems, err := load.ReadTests(dir)
	if err != nil {
		return readError(dir, err)
	}
	if one != "" {
		tests = slices.DeleteFunc(tests, func(f load.File) bool { return f.Path != one })
	}
	for _, p := range placed(dir, problems) {
		fmt.Fprintln(r.faults, plain(p.String()))
	}
	if len(problems) > 0 {
		return errSilent
	}
	if len(tests) == 0 {
		return fmt.Errorf("no test files in %s: write *_test.yaml beside the policies", dir)
	}
	set, err := r.set.folder(dir)
	if err != nil {
		return err
	}
	plan, err := set.build(r.faults)
	if err != nil {
		return err
	}
	return r.folder(ctx, plan, within(dir, tests))
}

func (r *testRun) folder(ctx context.Context, plan *compile.Plan, files []load.File) error {
	t, err := trial.New(ctx, plan, time.Now())
	if err != nil {
		return err
	}
	defer t.Close()
	var tests []trial.Test
	bad := false
	for _, f := range files {
		found, problems := t.Tests(f)
		for _, p := range problems {
			fmt.Fprintln(r.faults, plain(p.String()))
		}
		bad = bad || load.HasErrors(problems)
		tests = append(tests, found...)
	}
	if bad {
		return errSilent
	}
	var coverage trial.Coverage
	for _, one := range tests {
		if !r.only.MatchString(one.Name) {
			continue
		}
		result, err := t.Run(ctx, one)
		if err != nil {
			return err
		}
		coverage.Add(&result.Outcome.Decision)
		r.result(&result)
	}
	missing, rules := coverage.Missing(plan)
	r.report.Missing = append(r.report.Missing, missing...)
	r.report.Rules += rules
	return nil
}

func (r *testRun) result(result *trial.Result) {
	ok := result.Differs == ""
	r.report.Cases = append(r.report.Cases, caseReport{result.Name, result.Position, ok, result.Differs, decidedOf(&result.Outcome)})
	if !ok {
		r.report.Failed++
	}
	switch {
	case r.json:
	case ok:
		fmt.Fprintf(r.out, "ok    %s  %s\n", result.Position.FileLine(), plain(result.Name))
	default:
		fmt.Fprintf(r.out, "FAIL  %s  %s\n      %s\n", result.Position.FileLine(), plain(result.Name), plain(result.Differs))
		writeDecided(r.out, "      ", &result.Outcome)
	}
}

// maxListed bounds what a closing line lists.
const maxListed = 20

func (r *testRun) finish() error {
	n := len(r.report.Cases)
	if n == 0 {
		return errors.New("no case has a name that --run matches")
	}
	if r.json {
		if r.report.Missing == nil || !r.all {
			r.report.Missing = []trial.Uncovered{}
		}
		if err := writeJSON(r.out, r.report); err != nil {
			return err
		}
	} else {
		if r.all {
			r.coverage()
		}
		fmt.Fprintf(r.out, "%d cases, %d failed\n", n, r.report.Failed)
	}
	if r.report.Failed > 0 {
		return errSilent
	}
	return nil
}

// coverage says which rules no case exercised.
func (r *testRun) coverage() {
	missing := r.report.Missing
	if len(missing) == 0 {
		fmt.Fprintf(r.out, "%d rules, each with a case\n", r.report.Rules)
		return
	}
	fmt.Fprintf(r.out, "%d rules, %d without a case:\n", r.report.Rules, len(missing))
	for _, m := range missing[:min(len(missing), maxListed)] {
		fmt.Fprintf(r.out, "      %s  %s %s\n", m.Position, m.Policy, m.Rule)
	}
	if more := len(missing) - maxListed; more > 0 {
		fmt.Fprintf(r.out, "      and %d more; -o json lists all\n", more)
	}
}

// decided is an outcome as -o json writes it.
type decided struct {
	Decision string      `json:"decision"`
	Refused  bool        `json:"refused"`
	Leaving  bool        `json:"leaving,omitempty"`
	Stage    string      `json:"stage"`
	Reason   flow.Reason `json:"reason,omitempty"`
	Detail   string      `json:"detail,omitempty"`
	Policy   string      `json:"policy,omitempty"`
	Rule     string      `json:"rule,omitempty"`
	Position string      `json:"position,omitempty"`
	Trace    []found     `json:"trace"`
}

type found struct {
	Stage  string      `json:"stage"`
	Rule   string      `json:"rule,omitempty"`
	Reason flow.Reason `json:"reason,omitempty"`
	Detail string      `json:"detail,omitempty"`
}

func decidedOf(o *trial.Outcome) decided {
	d := &o.Decision
	out := decided{Decision: d.Effect.String(), Refused: d.Refused(), Leaving: o.Leaving, Stage: d.Stage.String(), Reason: d.Reason,
		Detail: d.Detail, Policy: d.Policy, Rule: d.Rule, Position: d.Position, Trace: []found{}}
	for _, s := range d.Steps {
		out.Trace = append(out.Trace, found{s.Stage.String(), s.Rule, s.Reason, s.Detail})
	}
	return out
}

// writeDecided writes a decision and its trace, each line after an indent.
func writeDecided(w io.Writer, indent string, o *trial.Outcome) {
	d := decidedOf(o)
	line := d.Decision
	if d.Reason != "" {
		line += " by stage " + d.Stage + ", " + string(d.Reason)
	}
	if d.Detail != "" {
		line += ": " + d.Detail
	}
	fmt.Fprintf(w, "%s%s\n", indent, plain(line))
	switch {
	case o.Leaving:
		fmt.Fprintf(w, "%srefused where it leaves, %s\n", indent, orDash(d.Position))
	case d.Policy != "":
		fmt.Fprintf(w, "%spolicy %s, rule %s, %s\n", indent, d.Policy, orDash(d.Rule), orDash(d.Position))
	}
	_ = table(w, func(row func(...any)) { // w is the command's own output
		for _, s := range d.Trace {
			what := string(s.Reason)
			if what == "" {
				what = "ok"
			}
			row(indent+s.Stage, orDash(s.Rule), what, plain(s.Detail))
		}
	})
}
