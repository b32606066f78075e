// SPDX-License-Identifier: Apache-2.0

// Package relations reads relation models, in OpenFGA's modelling language
// or as JSON, and says what of a model a policy and a tuple may use. Loader
// and engine read them through it, so that the engine refuses nothing that
// the loader took.
//
// Reading a model is bounded in time, which OpenFGA's own checks are not:
// they follow every path through the relations, and its parser tries every
// reading of nested parentheses.
package relations

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"strings"
)

// Default is the model of a RelationModel that brings none, in OpenFGA's
// modelling language.
//
//go:embed default.fga
var Default string

// Bounds of models.
const (
	MaxModels = 256       // of one set of policies
	MaxText   = 256 << 10 // bytes of one
	MaxTypes  = 1000      // of one
	MaxSize   = 1 << 20   // bytes of one as OpenFGA stores it
	maxNested = 32        // parentheses within each other
	// MaxCost bounds what reading one costs, and MaxSetCost what reading those
	// of a set does; see Cost. A unit has been seen to take up to 4 us.
	MaxCost    = 512 << 10
	MaxSetCost = 1 << 20
	maxErrors  = 20 // that are told of one
)

// Error is what is wrong with a model, or with what uses one.
type Error struct {
	// Line and Column of the model's text, from 1; 0 where they are not known.
	Line, Column int
	Message      string
	// Name was not found among Known; "" where that is not what is wrong.
	Name  string
	Known []string
}

// Error returns the message, after the line where it is known.
func (e *Error) Error() string {
	switch {
	case e.Line == 0:
		return e.Message
	case e.Column == 0:
		return fmt.Sprintf("line %d: %s", e.Line, e.Message)
	}
	return fmt.Sprintf("line %d, column %d: %s", e.Line, e.Column, e.Message)
}

func wrong(line int, format string, args ...any) *Error {
	return &Error{Line: line, Message: fmt.Sprintf(format, args...)}
}

func isJSON(text string) bool { return strings.HasPrefix(strings.TrimSpace(text), "{") }

// Cost is what reading a model costs: one for each byte, eleven for those of
// conditions, and for parentheses within each other as much as the parser tries,
// which grows with the square of how deep they are.
func Cost(text string) int {
	cost := len(text)
	if isJSON(text) {
		return cost
	}
	if i := strings.IndexByte(text, '{'); i >= 0 { // nothing but conditions has it
		cost += 10 * (len(text) - i)
	}
	nested := 0
	for i := range len(text) {
		switch text[i] {
		case '(':
			cost += 40 * nested
			nested++
		case ')':
			nested = max(0, nested-1)
		}
	}
	return cost
}

// shape tells a model from something else, and holds it to what the parser
// reads in time.
func shape(text string) *Error {
	if len(text) > MaxText {
		return wrong(0, "%d bytes are more than %d", len(text), MaxText)
	}
	if isJSON(text) {
		if !json.Valid([]byte(text)) {
			return wrong(0, "is not JSON")
		}
		return nil
	}
	if !beginsWithModel(text) {
		return wrong(0, `is neither JSON nor begins with "model"`)
	}
	if n := Cost(text); n > MaxCost {
		return wrong(0, "it takes too long to read (%d units, more than %d): fewer parentheses within each other, shorter conditions", n, MaxCost)
	}
	nested, line := 0, 1
	for i := range len(text) {
		switch text[i] {
		case '(':
			if nested++; nested > maxNested {
				return wrong(line, "more than %d parentheses within each other", maxNested)
			}
		case ')':
			nested = max(0, nested-1)
		case '\n':
			line++
		}
	}
	return nil
}

func beginsWithModel(text string) bool {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		return line == "model" || strings.HasPrefix(line, "model ") || strings.HasPrefix(line, "model#")
	}
	return false
}
