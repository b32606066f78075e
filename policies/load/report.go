// SPDX-License-Identifier: Apache-2.0

package load

import "fmt"

// Report collects problems, the first thousand errors and the first thousand
// warnings.
type Report struct {
	problems []Problem
	counts   [2]int // by severity, with those that were dropped
}

const (
	maxProblems    = 1000
	maxSuggestions = 50
)

// Errorf adds an error; a Hint among the arguments is its suggestion.
func (r *Report) Errorf(p Position, format string, args ...any) {
	r.add(Problem{Position: p, Severity: Error, Message: fmt.Sprintf(format, args...), Suggestion: suggestion(args)})
}

// Warnf adds a warning.
func (r *Report) Warnf(p Position, format string, args ...any) {
	r.add(Problem{Position: p, Severity: Warning, Message: fmt.Sprintf(format, args...), Suggestion: suggestion(args)})
}

// ErrorHint adds an error whose text has the hint somewhere inside, or names all
// that it could be.
func (r *Report) ErrorHint(p Position, message string, h Hint) {
	r.add(Problem{Position: p, Severity: Error, Message: message, Suggestion: h.Name})
}

func suggestion(args []any) string {
	for _, a := range args {
		if h, ok := a.(Hint); ok {
			return h.Name
		}
	}
	return ""
}

func (r *Report) add(p Problem) {
	if r.counts[p.Severity]++; r.counts[p.Severity] > maxProblems {
		return
	}
	r.problems = append(r.problems, p)
}

// Suggest is DidYouMean with double quotes, for the first problems: among
// thousands nobody reads it, and it is what costs.
func (r *Report) Suggest(name string, candidates []string) Hint {
	if !r.Suggests() {
		return Hint{}
	}
	return DidYouMean(name, candidates, `"`)
}

// Suggests says whether suggestions are still made.
func (r *Report) Suggests() bool { return len(r.problems) < maxSuggestions }

// Errors returns how many errors there were.
func (r *Report) Errors() int { return r.counts[Error] }

// Failed says whether there was an error.
func (r *Report) Failed() bool { return r.counts[Error] > 0 }

// Problems returns what was collected, in order of place.
func (r *Report) Problems() []Problem {
	out := Sort(r.problems)
	for s, n := range r.counts {
		if n > maxProblems {
			out = append(out, Problem{Severity: Severity(s), Message: fmt.Sprintf("%d more problems are not shown", n-maxProblems)})
		}
	}
	return out
}
