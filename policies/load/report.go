// SPDX-License-Identifier: Apache-2.0

package load

import "fmt"

// Report collects problems, the first thousand of them.
type Report struct {
	problems []Problem
	dropped  int
	errors   bool
}

const (
	maxProblems    = 1000
	maxSuggestions = 50
)

// Errorf adds an error.
func (r *Report) Errorf(p Position, format string, args ...any) {
	r.errors = true
	r.add(Problem{Position: p, Severity: Error, Message: fmt.Sprintf(format, args...)})
}

// Warnf adds a warning.
func (r *Report) Warnf(p Position, format string, args ...any) {
	r.add(Problem{Position: p, Severity: Warning, Message: fmt.Sprintf(format, args...)})
}

func (r *Report) add(p Problem) {
	if len(r.problems) >= maxProblems {
		r.dropped++
		return
	}
	r.problems = append(r.problems, p)
}

// Suggest is DidYouMean with double quotes, for the first problems: among
// thousands nobody reads it, and it is what costs.
func (r *Report) Suggest(name string, candidates []string) string {
	if !r.Suggests() {
		return ""
	}
	return DidYouMean(name, candidates, `"`)
}

// Suggests says whether suggestions are still made.
func (r *Report) Suggests() bool { return len(r.problems) < maxSuggestions }

// Failed says whether there was an error.
func (r *Report) Failed() bool { return r.errors }

// Problems returns what was collected, in order of place.
func (r *Report) Problems() []Problem {
	out := Sort(r.problems)
	if r.dropped > 0 {
		out = append(out, Problem{Severity: Error, Message: fmt.Sprintf("%d more problems are not shown", r.dropped)})
	}
	return out
}
