// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/policies/load"
)

// costly costs some 8,000 units with costlyGroups, and is false.
const costly = "token.groups.exists(a, token.groups.exists(b, a + b == 'none'))"

func costlyGroups() []string {
	groups := make([]string, 26)
	for i := range groups {
		groups[i] = fmt.Sprint("g", i)
	}
	return groups
}

func condition(t testing.TB, text string) *Condition {
	t.Helper()
	c, errs := compileCondition(text)
	if errs != nil {
		t.Fatalf("%s: %v", text, errs)
	}
	return c
}

// TestConditionsOfARequestHaveABudget holds what the conditions of one request
// may cost together, by the cost and the number of evaluations.
func TestConditionsOfARequestHaveABudget(t *testing.T) {
	c := condition(t, costly)
	a := activation()
	a.Token.Groups = costlyGroups()
	told := 0
	for range 5000 {
		switch ok, err := c.Eval(a); {
		case err == nil && !ok:
			told++
		case !errors.Is(err, ErrBudget) || ok:
			t.Fatalf("after %d evaluations and %d units: %t, %v", told, a.spent, ok, err)
		}
	}
	one := a.spent / uint64(told)
	if want := int(maxRequestCost/one) + 1; told != want || one < maxConditionCost/4 {
		t.Errorf("%d evaluations of %d units, want %d", told, one, want)
	}
	if a.spent < maxRequestCost || a.spent > maxRequestCost+maxConditionCost {
		t.Errorf("%d units spent of %d", a.spent, maxRequestCost)
	}
	if ok, err := condition(t, "true").Eval(a); ok || !errors.Is(err, ErrBudget) {
		t.Errorf("a cheap condition after that: %t, %v", ok, err)
	}
	if ok, err := c.Eval(&Activation{Request: a.Request, Token: a.Token}); ok || err != nil {
		t.Errorf("of another request: %t, %v", ok, err)
	}
}

// TestConditionsThatBreakOffSpendToo holds that neither the limit of one
// condition nor an error is a way around the budget.
func TestConditionsThatBreakOffSpendToo(t *testing.T) {
	for text, want := range map[string]error{
		"token.groups.all(a, token.groups.all(b, token.groups.all(c, a + b != c + 'x')))":    errCost,
		"token.groups.exists(a, token.groups.exists(b, a + b == 'none')) || token.claims.no": errMissing,
	} {
		c := condition(t, text)
		a := activation()
		a.Token.Groups = costlyGroups()
		n := 0
		for ; n < 1000; n++ {
			_, err := c.Eval(a)
			if errors.Is(err, ErrBudget) {
				break
			}
			if !errors.Is(err, want) {
				t.Fatalf("%s: %v, want %v", text, err, want)
			}
		}
		if n > 4*maxRequestCost/maxConditionCost || a.spent > maxRequestCost+maxConditionCost+100 {
			t.Errorf("%s: %d evaluations, %d units", text, n, a.spent)
		}
	}
}

// TestManyCheapConditionsAreTold holds that the longest list of rules is
// within the budget where its conditions are cheap.
func TestManyCheapConditionsAreTold(t *testing.T) {
	c := condition(t, "request.content_length > 4711")
	a := activation()
	for i := range 10_000 {
		if ok, err := c.Eval(a); ok || err != nil {
			t.Fatalf("evaluation %d, %d units: %t, %v", i, a.spent, ok, err)
		}
	}
}

// TestCostCountsWhatCELTakesForFree holds that a unit stands for a bounded
// amount of work.
func TestCostCountsWhatCELTakesForFree(t *testing.T) {
	a := activation()
	var nested []any
	for i := range 1000 {
		nested = append(nested, map[string]any{"k": fmt.Sprint(i)})
	}
	a.Token.Raw["deep"] = map[string]any{"list": nested}
	a.Token.Raw["text"] = strings.Repeat("x", 5000)
	a.Token.Groups = []string{strings.Repeat("g", 5000)}
	for text, least := range map[string]uint64{
		"token.claims.deep == token.claims.deep":                    3000,
		"token.claims.deep != token.claims.deep":                    3000,
		"{'k': '1'} in token.claims.deep.list":                      3000,
		"'x' in token.claims.deep.list":                             1000,
		"token.claims.text + token.claims.text == 'x'":              1000,
		"token.claims.text < 'x' || size(token.claims.text) == 1":   1000,
		"[token.claims.deep] == [token.claims.deep]":                3000,
		"token.groups[0].matches('^(a|b)?g{500}x$')":                500 * 500 / 4,
		"matches(token.groups[0], '^(a|b)?g{500}x$')":               500 * 500 / 4,
		"token.groups[0].size() == 1 || size(token.groups[0]) == 1": 1000,
		"'X-Account' in request.headers":                            evaluationCost + 1,
	} {
		for len(a.Request.Headers) < 30 {
			a.Request.Headers = append(a.Request.Headers, a.Request.Headers[1])
		}
		a.spent = 0
		_, err := condition(t, text).Eval(a)
		if a.spent < least {
			t.Errorf("%s: %d units, want %d (%v)", text, a.spent, least, err)
		}
	}
}

// TestRulesBeyondTheBudgetAreWarnedOf counts what conditions cost at least.
func TestRulesBeyondTheBudgetAreWarnedOf(t *testing.T) {
	const n = 4000
	const when = "[request.content_length, request.content_length, 0] == [1, 2, %d]" // 30 units
	rules := func(more string) []load.Problem {
		var s strings.Builder
		s.WriteString("  rules:\n    - {name: first, effect: deny, http: [GET /no]}\n")
		for i := range n {
			fmt.Fprintf(&s, "    - {name: r%d, from: [a], when: \""+when+"\"%s}\n", i, i, strings.ReplaceAll(more, "N", fmt.Sprint(i)))
		}
		_, problems := Build([]load.File{{Path: "p.yaml", Content: []byte(preamble + s.String())}}, testOptions())
		return problems
	}
	if least := condition(t, fmt.Sprintf(when, 1)).least; least < maxRequestCost/n {
		t.Fatal(least)
	}
	if problems := rules(""); len(problems) != 1 || !strings.Contains(problems[0].Message, "can use up what those of one request may cost") {
		t.Errorf("%d problems: %.300v", len(problems), problems)
	}
	if problems := rules(`, http: ["GET /N"]`); len(problems) != 0 {
		t.Errorf("by paths: %d problems: %.300v", len(problems), problems)
	}
}
