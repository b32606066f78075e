// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/policies/diff"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/trial"
)

func newPolicyDiff() *cobra.Command {
	defaults := config.Defaults("node")
	c := &cobra.Command{
		Use: "diff [DIR]", Short: "Show what differs from the policies in force, and which past calls would end otherwise", Args: cobra.MaximumNArgs(1),
		Long: "Show what differs between the policies in force, or those of another folder, and those of DIR, by document and\n" +
			"field, and which calls of a decision log would end otherwise under DIR's. Without an argument: " + defaults.PolicyDir + ".",
		Example: `  sallyport policy diff new/ --against running --replay decisions.json
  sallyport observe --since 1h -o json | sallyport policy diff new/ --replay -
  sallyport policy diff new/ --against old/ --exit-code`,
	}
	d := &differ{set: addSetFlags(c), socket: addSocket(c), out: addFormat(c)}
	c.Flags().StringVar(&d.against, "against", running, "the old policies: a folder, or running for those in force")
	c.Flags().StringVar(&d.replay, "replay", "", "decision log with calls to judge by the new policies, - for standard input")
	c.Flags().StringVar(&d.ceiling, "mode-ceiling", "", "the node's mode ceiling (default: that of the agent, enforce for a folder)")
	exit := c.Flags().Bool("exit-code", false, "exit 1 where something differs; with --replay, where a call would end otherwise")
	c.RunE = func(c *cobra.Command, args []string) error {
		dir := defaults.PolicyDir
		if len(args) == 1 {
			dir = args[0]
		}
		differs, err := d.run(c, dir)
		if err == nil && differs && *exit {
			return errSilent
		}
		return err
	}
	return c
}

// differ is one `policy diff`.
type differ struct {
	set                      *setFlags
	socket                   *string
	out                      *format
	against, replay, ceiling string
}

// diffReport is what `policy diff -o json` writes.
type diffReport struct {
	Documents []diff.Change `json:"documents"`
	Replay    *replayReport `json:"replay,omitempty"`
}

// replayReport counts calls. Changed and Untold are groups of calls that are
// alike, the largest first.
type replayReport struct {
	Calls   int           `json:"calls"`
	Same    int           `json:"same"`
	Changed []replayGroup `json:"changed"`
	Untold  []replayGroup `json:"cannotBeTold"`
	// Other are decisions on calls to what neither set protects.
	Other int `json:"other"`
	// Left counts the calls that were not grouped: there were too many kinds.
	Left int `json:"left,omitempty"`

	changed int // calls that would end otherwise, grouped or not
}

type replayGroup struct {
	Calls       int          `json:"calls"`
	Source      string       `json:"source"`
	Destination string       `json:"destination"`
	Method      string       `json:"method,omitempty"`
	Path        string       `json:"path,omitempty"`
	Before      trial.Ending `json:"before"`
	After       trial.Ending `json:"after"`
	Reason      flow.Reason  `json:"reason,omitempty"`
	Policy      string       `json:"policy,omitempty"`
	Rule        string       `json:"rule,omitempty"`
	Position    string       `json:"position,omitempty"`
	Why         string       `json:"why,omitempty"`
}

func (d *differ) run(c *cobra.Command, dir string) (differs bool, err error) {
	ctx, w, errOut := c.Context(), c.OutOrStdout(), c.ErrOrStderr()
	ceiling, ok := flow.ParseMode(d.ceiling)
	if d.ceiling != "" && !ok {
		return false, fmt.Errorf("--mode-ceiling: %q is not one of observe, audit, enforce", d.ceiling)
	}
	old, err := d.set.read(ctx, *d.socket, d.against)
	if err != nil {
		return false, err
	}
	new, err := d.set.folder(dir)
	if err != nil {
		return false, err
	}
	if d.against == running { // DIR is for that agent
		new.opt, new.ceiling = old.opt, old.ceiling
	}
	oldPlan, err := old.build(errOut)
	if err != nil {
		return false, err
	}
	newPlan, err := new.build(errOut)
	if err != nil {
		return false, err
	}
	before, _ := load.Load(old.files)
	after, _ := load.Load(new.files)
	report := diffReport{Documents: diff.Compare(before, after)}
	if report.Documents == nil {
		report.Documents = []diff.Change{}
	}
	differs = len(report.Documents) > 0
	if d.replay != "" {
		if d.ceiling == "" {
			ceiling = new.ceiling
		}
		report.Replay, err = d.judge(ctx, c.InOrStdin(), trial.NewReplay(oldPlan, newPlan, ceiling, time.Now()))
		if err != nil {
			return false, err
		}
		differs = report.Replay.changed > 0
	}
	if d.out.json {
		return differs, writeJSON(w, report)
	}
	report.write(w)
	return differs, nil
}

// maxGroups bounds how many kinds of calls are told apart.
const maxGroups = 10_000

func (d *differ) judge(ctx context.Context, stdin io.Reader, r *trial.Replay) (*replayReport, error) {
	in := stdin
	if d.replay != "-" {
		f, err := os.Open(d.replay)
		if err != nil {
			return nil, fmt.Errorf("read decision log: %w", err)
		}
		defer f.Close() //nolint:errcheck // it is only read
		in = f
	}
	report := &replayReport{Changed: []replayGroup{}, Untold: []replayGroup{}}
	groups := map[trial.Key]int{}
	err := trial.ReadRecords(in, func(rec *pipeline.Record) error {
		out, ok := r.Judge(rec)
		switch {
		case !ok:
			report.Other++
			return ctx.Err()
		case out.After == out.Before:
			report.Same++
		default:
			if out.Changed() {
				report.changed++
			}
			key := trial.KeyOf(rec, &out)
			if _, known := groups[key]; !known && len(groups) == maxGroups {
				report.Left++
			} else {
				groups[key]++
			}
		}
		report.Calls++
		return ctx.Err()
	})
	if err != nil {
		return nil, fmt.Errorf("read decision log %s: %w", d.replay, err)
	}
	for k, n := range groups {
		g := replayGroup{n, k.Source, k.Destination, k.Method, k.Path, k.Before, k.After, k.Reason, k.Policy, k.Rule, k.Position, k.Why}
		if k.After == trial.Untold {
			report.Untold = append(report.Untold, g)
		} else {
			report.Changed = append(report.Changed, g)
		}
	}
	for _, list := range [][]replayGroup{report.Changed, report.Untold} {
		slices.SortFunc(list, func(a, b replayGroup) int {
			return cmp.Or(cmp.Compare(b.Calls, a.Calls), strings.Compare(a.Source, b.Source), strings.Compare(a.Destination, b.Destination),
				strings.Compare(a.Method, b.Method), strings.Compare(a.Path, b.Path), strings.Compare(string(a.Before), string(b.Before)),
				strings.Compare(string(a.After), string(b.After)), strings.Compare(a.Rule, b.Rule), strings.Compare(a.Why, b.Why))
		})
	}
	return report, nil
}

func (r *diffReport) write(w io.Writer) {
	if len(r.Documents) == 0 {
		fmt.Fprintln(w, "the documents say the same")
	}
	marks := map[string]string{diff.Added: "+", diff.Removed: "-", diff.Changed: "~"}
	for _, c := range r.Documents {
		fmt.Fprintf(w, "%s %s %s  %s\n", marks[c.What], c.Kind, plain(c.Name), orDash(c.Position.FileLine()))
		for _, f := range c.Fields {
			switch {
			case f.Old == nil:
				fmt.Fprintf(w, "    + %s: %s\n", plain(f.Path), short(*f.New))
			case f.New == nil:
				fmt.Fprintf(w, "    - %s: %s\n", plain(f.Path), short(*f.Old))
			default:
				fmt.Fprintf(w, "    ~ %s: %s -> %s\n", plain(f.Path), short(*f.Old), short(*f.New))
			}
		}
	}
	if r.Replay != nil {
		r.Replay.write(w)
	}
}

// short writes a value of a document in one line.
func short(s string) string {
	const most = 100
	s = plain(strings.Join(strings.Fields(s), " "))
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}

func (r *replayReport) write(w io.Writer) {
	count := func(groups []replayGroup) (n int) {
		for _, g := range groups {
			n += g.Calls
		}
		return n
	}
	fmt.Fprintf(w, "\n%d calls: %d as before, %d otherwise, %d cannot be told\n", r.Calls, r.Same, count(r.Changed), count(r.Untold))
	if r.Other > 0 {
		fmt.Fprintf(w, "%d decisions were on calls to what neither set protects\n", r.Other)
	}
	if r.Left > 0 {
		fmt.Fprintf(w, "%d calls were of more kinds than %d and are in none of these\n", r.Left, maxGroups)
	}
	for _, list := range [][]replayGroup{r.Changed, r.Untold} {
		for _, g := range list[:min(len(list), maxListed)] {
			g.write(w)
		}
		if more := len(list) - maxListed; more > 0 {
			fmt.Fprintf(w, "  and %d kinds more; -o json lists all\n", more)
		}
	}
}

func (g *replayGroup) write(w io.Writer) {
	what := strings.TrimSpace(g.Method + " " + g.Path)
	fmt.Fprintf(w, "  %6d  %s -> %s  %s\n", g.Calls, plain(g.Source), plain(g.Destination), plain(cmp.Or(what, "connection")))
	fmt.Fprintf(w, "          %s -> %s", g.Before, g.After)
	if g.Reason != "" {
		fmt.Fprintf(w, ", %s", plain(string(g.Reason)))
	}
	if g.Position != "" {
		fmt.Fprintf(w, "  by %s %s %s", orDash(g.Policy), plain(g.Rule), g.Position)
	}
	fmt.Fprintln(w)
	if g.Why != "" {
		fmt.Fprintf(w, "          %s\n", plain(g.Why))
	}
}
