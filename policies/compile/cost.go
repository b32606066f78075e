// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"fmt"
	"slices"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
)

// Bounds of what conditions cost at run time, in CEL's own units: an
// operation or ten characters each, 50 to 200 ns. That of a request is for
// all of its conditions together, in the order in which they are asked; only
// the condition that uses it up goes beyond it, so that no request spends more
// than about 110,000 units, 20 ms.
const (
	maxConditionCost = 10_000
	maxRequestCost   = 100_000
	evaluationCost   = 5 // of an evaluation, before its first operation
	maxRegexProgram  = 1000
)

// overhead is what it costs to make ready what c reads of a request, which
// CEL does not count.
func (c *Condition) overhead(a *Activation) uint64 {
	return uint64(evaluationCost + len(c.headers)*len(a.Request.Headers)/10)
}

// prices have CEL count what it takes for free: comparisons of lists and maps
// look at all that is in them, size counts characters, a regular expression is
// as large as its program, not as its text, and what is done to a claim, whose
// type nobody knows beforehand, costs no less than with a type. They are the
// costs of regular expressions, for ten characters each.
type prices map[string]uint64

// CallCost returns what a call has cost, nil for what CEL says.
func (p prices) CallCost(function, _ string, args []ref.Val, _ ref.Val) *uint64 {
	n := uint64(1)
	switch function {
	case operators.Equals, operators.NotEquals, overloads.StartsWith, overloads.EndsWith:
		// Of texts as much is looked at as the shorter one has; CEL itself would
		// count the characters of both.
		if a, ok := args[0].(types.String); ok {
			if b, ok := args[1].(types.String); ok {
				n += uint64(min(len(a), len(b)) / 10)
				break
			}
		}
		if !isType(args[0], types.ListType, types.MapType) || !isType(args[1], types.ListType, types.MapType) {
			return nil
		}
		n = weigh(args[0].Value())
	case operators.In:
		switch list, ok := args[1].(traits.Lister); {
		case !ok:
			return nil
		case isType(args[0], types.ListType, types.MapType):
			n = weigh(list.Value())
		default:
			size, _ := list.Size().(types.Int)
			n += uint64(size)
		}
	case operators.Add, operators.Less, operators.LessEquals, operators.Greater, operators.GreaterEquals, overloads.Size:
		for _, a := range args {
			if !isType(a, types.StringType) {
				return nil
			}
			n += weigh(a.Value())
		}
	case overloads.Matches:
		text, _ := args[0].(types.String)
		pattern, _ := args[1].(types.String)
		n = uint64(len(text)/10+1) * p[string(pattern)]
	default:
		return nil
	}
	cost := n // what is returned is allocated, and most calls return nil
	return &cost
}

func isType(v ref.Val, list ...ref.Type) bool { return slices.Contains(list, v.Type()) }

// weigh counts the values of a list or map, and ten characters of a text as
// one.
func weigh(v any) uint64 {
	n := uint64(1)
	switch v := v.(type) {
	case string:
		n += uint64(len(v) / 10)
	case []string:
		for _, s := range v {
			n += weigh(s)
		}
	case []any:
		for _, e := range v {
			n += weigh(e)
		}
	case []ref.Val:
		for _, e := range v {
			n += weigh(e.Value())
		}
	case map[string]any:
		for key, e := range v {
			n += weigh(key) + weigh(e)
		}
	case map[string]string:
		for key, e := range v {
			n += weigh(key) + weigh(e)
		}
	case map[ref.Val]ref.Val:
		for key, e := range v {
			n += weigh(key.Value()) + weigh(e.Value())
		}
	}
	return n
}

// regex notes the size of the program of a call of matches. The pattern is a
// literal, so that no caller chooses it and its size is known.
func (c *Condition) regex(a *ast.AST, call ast.CallExpr) []exprError {
	args := call.Args()
	arg := args[len(args)-1]
	if arg.Kind() != ast.LiteralKind {
		return []exprError{at(a, arg, "matches: write the pattern as a literal, as in source.name.matches('^web-[0-9]+$')")}
	}
	pattern, _ := arg.AsLiteral().(types.String)
	size, err := types.RegexProgramSize(string(pattern))
	switch {
	case err != nil:
		return []exprError{at(a, arg, err.Error())}
	case size > maxRegexProgram:
		return []exprError{at(a, arg, fmt.Sprintf("matches: the pattern's program may have %d instructions, this one has %d", maxRegexProgram, size))}
	}
	c.prices[string(pattern)] = uint64(size/4 + 1)
	return nil
}

// beyondBudget warns of the first rule whose condition can be asked of no call
// that the rules before it leave undecided, because theirs cost too much.
// Counted are the rules that speak of every call of their callers.
func (c *compiler) beyondBudget(a *API) {
	var anybody, most uint64
	spent := make(map[*Identity]uint64)
	for _, deny := range [...]bool{true, false} {
		for _, r := range a.Rules {
			if r.Deny != deny || r.When == nil || len(r.Hosts)+len(r.Calls) > 0 {
				continue
			}
			before := anybody + most
			if len(r.From) > 0 {
				before = 0
			}
			for _, id := range r.From {
				before = max(before, anybody+spent[id])
				spent[id] += r.When.least
				most = max(most, spent[id])
			}
			if len(r.From) == 0 {
				anybody += r.When.least
			}
			if before >= maxRequestCost {
				c.report.Warnf(r.Position, "rule %q: the conditions of the rules before it can use up what those of one request may cost (%d): then `when` cannot be told; say which hosts and paths each rule is for", r.Name, maxRequestCost)
				return
			}
		}
	}
}
