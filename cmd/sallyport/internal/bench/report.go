// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// spread is a median with the least and the most.
type spread struct{ median, least, most float64 }

func spreadOf(v []float64) spread {
	if len(v) == 0 {
		return spread{math.NaN(), math.NaN(), math.NaN()}
	}
	v = slices.Sorted(slices.Values(v))
	m := v[len(v)/2]
	if len(v)%2 == 0 {
		m = (m + v[len(v)/2-1]) / 2
	}
	return spread{m, v[0], v[len(v)-1]}
}

func (s spread) String() string {
	return fmt.Sprintf("%s (%s to %s)", short(s.median), short(s.least), short(s.most))
}

// short writes a number with about three digits.
func short(f float64) string {
	switch a := math.Abs(f); {
	case math.IsNaN(f):
		return "-"
	case a >= 100:
		return fmt.Sprintf("%.0f", f)
	case a >= 10:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.2f", f)
}

// figure is one number of a sample.
type figure func(*sample) float64

var (
	rate figure = func(s *sample) float64 { return s.perSecond() }
	cpu  figure = (*sample).perRequest
	p50  figure = func(s *sample) float64 { return s.P50 }
	p99  figure = func(s *sample) float64 { return s.P99 }
	rss  figure = func(s *sample) float64 { return s.mib }

	agentCPU figure = func(s *sample) float64 { return s.share(s.agents) }
)

// at is a figure of a variant in a mode and round, false where it was not
// measured.
func (r *results) at(name string, m mode, round int, f figure) (float64, bool) {
	list := r.samples[name][m]
	if round >= len(list) {
		return 0, false
	}
	return f(&list[round]), true
}

// best is the best figure of the peers of a kind in a round.
func (r *results) best(k kind, m mode, round int, f figure, better func(...float64) float64) (float64, bool) {
	var found []float64
	for _, v := range r.variants {
		if v.kind != k {
			continue
		}
		if x, ok := r.at(v.name, m, round, f); ok {
			found = append(found, x)
		}
	}
	if len(found) == 0 {
		return 0, false
	}
	return better(found...), true
}

func lowest(v ...float64) float64  { return slices.Min(v) }
func highest(v ...float64) float64 { return slices.Max(v) }

func (r *results) median(name string, m mode, f figure) float64 {
	var v []float64
	for i := range r.samples[name][m] {
		v = append(v, f(&r.samples[name][m][i]))
	}
	return spreadOf(v).median
}

// markdown is the whole report.
func (r *results) markdown() string {
	var b bytes.Buffer
	r.conditions(&b)
	r.goals(&b)
	for _, m := range r.modes {
		r.table(&b, m)
	}
	return b.String()
}

func (r *results) conditions(b *bytes.Buffer) {
	var others []float64
	for _, modes := range r.samples {
		for _, list := range modes {
			for _, s := range list {
				others = append(others, s.others)
			}
		}
	}
	fmt.Fprintf(b, "`make bench` on %s: %d rounds, %d s each, every variant once a round, in turn.\n\n", r.began.UTC().Format(time.DateOnly), r.o.rounds, r.o.seconds)
	fmt.Fprintf(b, "- machine: %s, %d cores; Linux %s; load before %s, after %s; cores busy with something else while it was measured (softirqs and kernel threads included): %s\n",
		cpuModel(), runtime.NumCPU(), kernel(), r.load[0], r.load[1], spreadOf(others))
	fmt.Fprintf(b, "- versions: %s\n", strings.Join(r.versions, "; "))
	if len(r.missing) > 0 {
		fmt.Fprintf(b, "- missing: %s\n", strings.Join(r.missing, "; "))
	}
	fmt.Fprintf(b, "- the decision log is on, to a file: %s of the requests that are decided one by one have their line\n", r.logShare())
	fmt.Fprintf(b, "- memory of one idle agent, both processes, relation engine included: %.0f MiB (proportional set size)\n\n", r.idleMiB)
}

// logShare is how much of what should be is in the decision log.
func (r *results) logShare() string {
	var requests, lines int64
	for _, name := range []string{sameHTTP, acrossHTTP, acrossFull} {
		for _, list := range r.samples[name] {
			for _, s := range list {
				requests += s.Requests
				lines += s.logged
			}
		}
	}
	return fmt.Sprintf("%.1f %%", 100*float64(lines)/float64(max(requests, 1)))
}

// table shows the absolute figures of a mode, and ratios to the bare
// connection of the same round.
func (r *results) table(b *bytes.Buffer, m mode) {
	what := "requests/s"
	if m.fresh {
		what = "connections/s"
	}
	fmt.Fprintf(b, "### %s\n\n| | %s | of direct | p50 ms | p99 ms | CPU s per 100k | of it agents' | MiB | errors |\n|---|---|---|---|---|---|---|---|---|\n", strings.ToUpper(m.String()[:1])+m.String()[1:], what)
	for _, v := range r.variants {
		list := r.samples[v.name][m]
		if len(list) == 0 {
			continue
		}
		reference := bareAcross
		if v.kind == kindSame || v.name == bareSame {
			reference = bareSame
		}
		var ratios []float64
		var errs int64
		for i := range list {
			if d, ok := r.at(reference, m, i, rate); ok {
				ratios = append(ratios, list[i].perSecond()/d)
			}
			errs += list[i].Errors
		}
		used, agents, mib := "-", "-", "-"
		if len(v.proxies) > 0 {
			used, mib = short(r.median(v.name, m, cpu)/10), short(r.median(v.name, m, rss))
		}
		if len(v.nodes) > 0 {
			agents = short(r.median(v.name, m, agentCPU) / 10)
		}
		fmt.Fprintf(b, "| %s | %.0f | %s | %.3f | %.2f | %s | %s | %s | %d |\n", v.name, r.median(v.name, m, rate), spreadOf(ratios),
			r.median(v.name, m, p50)/1e3, r.median(v.name, m, p99)/1e3, used, agents, mib, errs)
	}
	fmt.Fprintln(b)
}

func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// versions are those of everything that takes part.
func versions(ctx context.Context, t *testbed) []string {
	own, err := t.lab.Command(ctx, "version")
	if err != nil {
		own = "unknown"
	}
	out := []string{"Sallyport " + strings.TrimSpace(own), runtime.Version()}
	for _, argv := range [][]string{{"nginx", "-v"}, {"haproxy", "-v"}, {"wrk", "-v"}} {
		// Some of them end with a status that is not 0, wrk for one.
		text, _ := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput() //nolint:errcheck // see above
		if first, _, _ := strings.Cut(string(text), "\n"); first != "" {
			if i := strings.Index(first, " Copyright"); i > 0 {
				first = first[:i]
			}
			if i := strings.Index(first, " - http"); i > 0 {
				first = first[:i]
			}
			out = append(out, strings.TrimPrefix(first, "nginx version: "))
		}
	}
	return out
}

// The marks between which a document takes the report.
const (
	beginMark = "<!-- bench: begin -->\n"
	endMark   = "<!-- bench: end -->\n"
)

func writeBetweenMarks(file, text string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	before, rest, ok := strings.Cut(string(b), beginMark)
	_, after, ended := strings.Cut(rest, endMark)
	if !ok || !ended {
		return fmt.Errorf("write report: %s has no lines %q and %q", file, strings.TrimSpace(beginMark), strings.TrimSpace(endMark))
	}
	if err := os.WriteFile(file, []byte(before+beginMark+"\n"+text+endMark+after), 0o644); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}
