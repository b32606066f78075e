// SPDX-License-Identifier: Apache-2.0

package flow

import "time"

// Effect is the outcome of a decision.
type Effect uint8

// The effects of a decision.
const (
	EffectAllow Effect = iota
	EffectDeny
	EffectStepUp    // stronger authentication is asked for (RFC 9470)
	EffectThrottle  // refused for now
	EffectTerminate // refused, and the identity's connections are closed
)

var effectNames = [...]string{"allow", "deny", "step-up", "throttle", "terminate"}

// String returns the effect's word.
func (e Effect) String() string {
	if int(e) < len(effectNames) {
		return effectNames[e]
	}
	return "unknown"
}

// Stage is one step of verification, or the place outside the pipeline that
// decided.
type Stage uint8

// The stages in the order in which they run. StageKernel and StagePolicy
// are not steps of their own: the first marks what the kernel refused, the
// second what no rule allowed.
const (
	StageChannel Stage = iota
	StageIdentity
	StagePosture
	StageGovernance
	StagePolicy
	StageToken
	StageRelation
	StageCondition
	StageAnomaly
	StageProtocol // the request could not be read unambiguously
	StageUpstream // the application could not be reached
	StageKernel
	StageCount // how many there are; not a stage
)

var stageNames = [...]string{
	"channel", "identity", "posture", "governance", "policy", "token", "relation", "condition", "anomaly",
	"protocol", "upstream", "kernel",
}

// String returns the stage's name, as decision logs and metrics write it.
func (s Stage) String() string {
	if int(s) < len(stageNames) {
		return stageNames[s]
	}
	return "unknown"
}

// Step is what one stage found.
type Step struct {
	Stage  Stage
	Reason Reason // ReasonOK when it was satisfied
	Detail string // for operators; never a secret, a token or a parameter's value
	Rule   string // the rule it was asked for, "" for the whole policy
	Took   time.Duration
}

// Decision is the outcome of all stages for one request. Mode does not
// change it: Effect says what the stages found, Enforced whether the
// refusal had its effect.
type Decision struct {
	Effect   Effect
	Enforced bool // false in observe and audit: a refusal is then "wouldDeny"
	Stage    Stage
	Reason   Reason
	Detail   string // for operators, never for the caller
	Policy   string // namespace/name
	Rule     string
	Position string // file:line of the rule, or of the policy for the default
	// Challenge are further parameters of the WWW-Authenticate field of a
	// step-up (RFC 9470 section 3), "" for none.
	Challenge string
	Template  string // path template that matched, "" without one; the path itself is never logged
	Steps     []Step // the trace; nil unless asked for or refused
	// DirectOK says that identity alone decided, so that the kernel may hold
	// the verdict and later connections need no proxy.
	DirectOK bool
	// Until is when what allowed it ends (token, certificate), zero if it
	// does not end by itself.
	Until time.Time
	// ProvenKey is the thumbprint (RFC 7638) of the key that was proven by
	// DPoP (RFC 9449), zero for none.
	ProvenKey [32]byte
	// DPoP says that the rule asks for a token bound by DPoP: the challenge is
	// of that scheme.
	DPoP bool
	// Subjects are what a revocation of would void the decision: SPIFFE IDs,
	// "iss|sub", "iss|jti". At most 4.
	Subjects [4]string
}

// Refused says whether the caller is to be refused.
func (d *Decision) Refused() bool { return d.Effect != EffectAllow && d.Enforced }

// WouldDeny says whether the mode alone let it pass.
func (d *Decision) WouldDeny() bool { return d.Effect != EffectAllow && !d.Enforced }
