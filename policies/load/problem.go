// SPDX-License-Identifier: Apache-2.0

// Package load reads policy documents: strict YAML, every error with its
// file, line and column, all of them at once. It knows the shape of the
// documents; what they mean together is policies/compile's.
package load

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
)

// Position is a place in a file. Line and Column count from 1, the column in
// characters; 0 is unknown.
type Position struct {
	File   string `json:"file,omitempty"`
	Line   int    `json:"line,omitempty"`
	Column int    `json:"column,omitempty"`
}

// String writes FILE:LINE:COLUMN, without what is unknown.
func (p Position) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	for _, n := range [...]int{p.Line, p.Column} {
		if n == 0 {
			break
		}
		b.WriteByte(':')
		b.WriteString(strconv.Itoa(n))
	}
	return b.String()
}

// FileLine writes FILE:LINE, as decision logs name a rule.
func (p Position) FileLine() string {
	p.Column = 0
	return p.String()
}

// Severity tells an error, which refuses the set, from a warning.
type Severity uint8

// The severities.
const (
	Error Severity = iota
	Warning
)

// String returns the severity's word.
func (s Severity) String() string {
	if s == Warning {
		return "warning"
	}
	return "error"
}

// MarshalText returns the severity's word.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Problem is one thing that is wrong with a set of documents.
type Problem struct {
	Position
	Severity Severity `json:"severity"`
	Message  string   `json:"message"`
	// Suggestion is what was probably meant, "" where nothing is near: a name
	// to write in place of the wrong one.
	Suggestion string `json:"suggestion,omitempty"`
}

// String writes FILE:LINE:COLUMN: MESSAGE, a warning marked as one.
func (p Problem) String() string {
	s := p.Message
	if p.File != "" {
		s = p.Position.String() + ": " + s
	}
	if p.Severity == Warning {
		return "warning: " + s
	}
	return s
}

// HasErrors says whether one of the problems is more than a warning.
func HasErrors(problems []Problem) bool {
	return slices.ContainsFunc(problems, func(p Problem) bool { return p.Severity == Error })
}

// Sort orders problems by place, those without one last, and drops
// repetitions.
func Sort(problems []Problem) []Problem {
	slices.SortStableFunc(problems, func(a, b Problem) int {
		if (a.File == "") != (b.File == "") {
			return cmp.Compare(b.File, a.File)
		}
		return cmp.Or(
			cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column),
			cmp.Compare(a.Severity, b.Severity), cmp.Compare(a.Message, b.Message), cmp.Compare(a.Suggestion, b.Suggestion))
	})
	return slices.Compact(problems)
}

// File is a policy file's name, as problems show it, and content.
type File struct {
	Path    string
	Content []byte
}
