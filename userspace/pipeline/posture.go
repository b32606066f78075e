// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// posture is what the judging of a profile found.
type posture struct {
	judged bool
	reason flow.Reason
	detail string
	until  time.Time // zero where it does not end by itself
}

// posture judges the policy's profile where it binds every rule. Where a rule
// has one of its own, it is judged with the rules.
func (r *run) posture() bool {
	switch {
	case r.api.Posture == nil && !r.api.RulePosture:
		r.step(flow.StagePosture, flow.ReasonOK, "none asked for", "")
		return true
	case r.api.RulePosture:
		return true
	}
	if f := r.policyPosture(""); f.reason != flow.ReasonOK {
		r.conclude(f)
		return false
	}
	return true
}

// policyPosture judges the policy's profile, once for a request.
func (r *run) policyPosture(rule string) finding {
	if r.api.Posture == nil {
		return finding{stage: flow.StagePosture}
	}
	if !r.proven.judged {
		r.proven = r.prove(r.api.Posture, rule)
	}
	return finding{flow.StagePosture, r.proven.reason, r.proven.detail}
}

// rulePosture judges the profile that binds a rule: its own, or else the
// policy's.
func (r *run) rulePosture(rule *compile.Rule) finding {
	if rule.Posture == nil {
		f := r.policyPosture(rule.Name)
		r.ruleProven = r.proven
		return f
	}
	r.ruleProven = r.prove(rule.Posture, rule.Name)
	return finding{flow.StagePosture, r.ruleProven.reason, r.ruleProven.detail}
}

// prove holds a profile against what is known of the caller, and notes what
// it found. What is known to fall short is named before what is not known.
func (r *run) prove(p *compile.Posture, rule string) posture {
	if !r.factsAsked {
		r.factsAsked = true
		if f := r.p.opt.Posture; f != nil && r.src != nil {
			r.facts = f(r.req, r.src)
		}
	}
	out := posture{judged: true}
	var missing *compile.Requirement
	for i := range p.Requirements {
		q := &p.Requirements[i]
		s, until := r.facts.hold(q, p.Attested, r.now)
		if !until.IsZero() && (out.until.IsZero() || until.Before(out.until)) {
			out.until = until
		}
		switch {
		case s == fails:
			out.reason, out.detail = flow.ReasonPosture, q.Failed
			r.step(flow.StagePosture, out.reason, out.detail, rule)
			return out
		case s == warns:
			r.step(flow.StagePosture, flow.ReasonOK, q.Failed, rule)
		case s == unknown && p.WarnUnknown:
			r.step(flow.StagePosture, flow.ReasonOK, q.Unknown, rule)
		case s == unknown && missing == nil:
			missing = q
		}
	}
	if missing != nil {
		out.reason, out.detail = flow.ReasonPostureUnknown, missing.Unknown
		r.step(flow.StagePosture, out.reason, out.detail, rule)
		return out
	}
	r.step(flow.StagePosture, flow.ReasonOK, p.Held, rule)
	return out
}
