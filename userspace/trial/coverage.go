// SPDX-License-Identifier: Apache-2.0

package trial

import (
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Coverage notes which rules tests have exercised: those that a decision or
// its trace names.
type Coverage struct{ seen map[string]bool }

// Add notes what a test exercised.
func (c *Coverage) Add(d *flow.Decision) {
	if c.seen == nil {
		c.seen = map[string]bool{}
	}
	if d.Rule != "" {
		c.seen[d.Policy+" "+d.Rule] = true
	}
	for i := range d.Steps {
		if rule := d.Steps[i].Rule; rule != "" {
			c.seen[d.Policy+" "+rule] = true
		}
	}
}

// Uncovered is a rule that nothing exercised.
type Uncovered struct {
	Policy   string `json:"policy"`
	Rule     string `json:"rule"`
	Position string `json:"position"`
}

// Missing lists the rules of a plan that nothing exercised, and how many it
// has.
func (c *Coverage) Missing(plan *compile.Plan) (missing []Uncovered, rules int) {
	for _, a := range plan.APIs() {
		for _, r := range a.Rules {
			rules++
			if !c.seen[a.Name+" "+r.Name] {
				missing = append(missing, Uncovered{a.Name, r.Name, r.Position.FileLine()})
			}
		}
	}
	return missing, rules
}
