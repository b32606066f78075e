// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/anomaly"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// Decide judges one request, or one opaque connection where req.Method is
// "". src is the identity that the plan knows for req.Peer.ID, nil if there
// is none; api is what protects the destination, nil if nothing does. The
// outcome is written to d, whose Steps are reused; strings in it do not
// alias the request's buffers.
//
// A request of a policy in observe or audit is judged the same, with
// d.Enforced false.
func (p *Pipeline) Decide(env Env, req *flow.Request, src *compile.Identity, api *compile.API, d *flow.Decision) {
	r := env.Loop.take()
	r.start(p, env, req, src, api, d)
	r.judge()
	r.finish()
	env.Loop.put(r)
}

// DecideOutbound judges what can be judged where a call leaves: whether the
// source may call anything, and whether the destination is within its
// mayCall. The rest is for the destination's own policy. It is judged in the
// mode of the source's outbound side; unknown is that of a source that is nil.
func (p *Pipeline) DecideOutbound(env Env, req *flow.Request, src, dst *compile.Identity, unknown flow.Mode, d *flow.Decision) {
	r := env.Loop.take()
	r.start(p, env, req, src, nil, d)
	mode := unknown
	if src != nil {
		mode = src.Mode
	}
	d.Enforced = flow.MinMode(mode, p.opt.Ceiling) == flow.ModeEnforce
	if r.identity(true) && r.governance() {
		if src.MayCallIdentity(dst) {
			r.allow()
		} else {
			d.Position = src.Position.FileLine()
			r.refuse(flow.StagePolicy, flow.ReasonMayCall, "")
		}
	}
	r.finish()
	env.Loop.put(r)
}

// run is the scratch memory of one decision.
type run struct {
	p    *Pipeline
	env  Env
	req  *flow.Request
	src  *compile.Identity
	api  *compile.API
	d    *flow.Decision
	st   *planState
	now  time.Time
	last time.Time

	matches     compile.Matches
	activation  compile.Activation
	claims      compile.Claims
	check       token.Check
	raw         []byte // the bearer token, once looked for
	rawReason   flow.Reason
	rawLooked   bool
	rawDPoP     bool          // it came with the scheme DPoP
	proof       token.Proof   // of the request, for a token that is bound to a key
	verified    *token.Claims // of the rule that is being judged
	leaseEnd    time.Time     // of the relation of that rule
	generation  uint64        // before the plan was looked at, where the policy remembers
	asked       []byte        // scratch of a question
	recalled    string        // what of that rule rests on an answer of a while ago, "" for nothing
	recalledEnd time.Time     // and until when
	proven      posture       // of the policy, once judged
	ruleProven  posture       // of the rule that is being judged
	facts       *Facts        // once asked for
	factsAsked  bool
	user        []byte
	object      []byte
	sample      anomaly.Sample
	steps       []flow.Step
	left        int       // steps that are not among them
	leftLast    flow.Step // the last of those
	questions   int       // that the relation engine was asked
	answerBy    time.Time // when it must have answered all of them
}

func (r *run) start(p *Pipeline, env Env, req *flow.Request, src *compile.Identity, api *compile.API, d *flow.Decision) {
	r.p, r.env, r.req, r.src, r.api, r.d = p, env, req, src, api, d
	if api != nil && api.CacheErrors {
		r.generation = p.generation.Load()
	}
	r.st = p.plan.Load()
	r.now = p.opt.Now()
	r.last = r.now
	// Until a stage says otherwise, and if one breaks off, it is refused.
	*d = flow.Decision{Effect: flow.EffectDeny, Stage: flow.StagePolicy, Reason: flow.ReasonInternal, Steps: d.Steps[:0]}
	d.Enforced = p.Mode(api) == flow.ModeEnforce
	d.Subjects[0] = req.Peer.ID
	if api != nil {
		d.Policy = api.Name
		d.Position = r.apiPosition(api)
	}
}

// release drops what belongs to the request.
func (r *run) release() {
	r.req, r.src, r.api, r.d, r.st, r.env = nil, nil, nil, nil, nil, Env{}
	r.activation = compile.Activation{}
	r.claims = compile.Claims{}
	r.check = token.Check{}
	r.raw, r.rawReason, r.rawLooked, r.rawDPoP = nil, flow.ReasonOK, false, false
	r.proof = token.Proof{}
	r.verified, r.leaseEnd = nil, time.Time{}
	r.recalled, r.recalledEnd = "", time.Time{}
	r.proven, r.ruleProven, r.facts, r.factsAsked = posture{}, posture{}, nil, false
	clear(r.matches.Rules)
	clear(r.steps)
	r.steps = r.steps[:0]
	r.left, r.leftLast, r.questions, r.answerBy = 0, flow.Step{}, 0, time.Time{}
}

// maxSteps bounds a trace, unless Options say otherwise: as many rules may
// speak of a call as a policy has.
const maxSteps = 128

func (r *run) finish() {
	d := r.d
	if d.Effect == flow.EffectAllow && !r.p.tracing.Load() && (r.api == nil || r.env.Again || !r.env.Loop.keeps(r.now)) {
		return
	}
	d.Steps = append(d.Steps, r.steps...)
	if r.left == 0 {
		return
	}
	last := r.leftLast
	if r.left > 1 {
		d.Steps = append(d.Steps, flow.Step{Stage: last.Stage, Detail: strconv.Itoa(r.left) + " steps are left out"})
		if d.Effect != flow.EffectAllow {
			last = flow.Step{Stage: d.Stage, Reason: d.Reason, Detail: d.Detail, Rule: d.Rule} // the one that it rests on
		}
	}
	d.Steps = append(d.Steps, last)
}

// step notes what a stage found.
func (r *run) step(stage flow.Stage, reason flow.Reason, detail, rule string) {
	var took time.Duration
	if stage >= flow.StageToken { // those before cost next to nothing
		now := r.p.opt.Now()
		took = now.Sub(r.last)
		r.last = now
	}
	s := flow.Step{Stage: stage, Reason: reason, Detail: detail, Rule: rule, Took: took}
	if len(r.steps) == r.p.opt.Steps-2 {
		r.left++
		r.leftLast = s
		return
	}
	r.steps = append(r.steps, s)
}

// refuse ends the decision; it returns false for the stages to return.
func (r *run) refuse(stage flow.Stage, reason flow.Reason, detail string) bool {
	r.step(stage, reason, detail, r.d.Rule)
	r.d.Effect, r.d.Stage, r.d.Reason, r.d.Detail = flow.EffectDeny, stage, reason, detail
	return false
}

func (r *run) allow() {
	r.d.Effect, r.d.Stage, r.d.Reason, r.d.Detail = flow.EffectAllow, flow.StagePolicy, flow.ReasonOK, ""
	r.until(r.req.Peer.NotAfter)
	if r.src != nil {
		r.until(r.src.Expires)
	}
	if r.api != nil {
		r.until(r.api.Identity.Expires)
	}
}

// until moves the end of the decision forward to t.
func (r *run) until(t time.Time) {
	if !t.IsZero() && (r.d.Until.IsZero() || t.Before(r.d.Until)) {
		r.d.Until = t
	}
}

func (r *run) apiPosition(a *compile.API) string {
	if s, ok := r.st.apis[a]; ok {
		return s
	}
	return a.Position.FileLine() // of a plan that was swapped meanwhile
}

func (r *run) judge() {
	switch {
	case r.api == nil && r.st.plan == nil:
		r.refuse(flow.StagePolicy, flow.ReasonNotReady, "")
	case r.api == nil:
		r.refuse(flow.StagePolicy, flow.ReasonNoPolicy, "")
	case r.channel() && r.identity(r.api.MTLS == compile.MTLSRequired) && r.posture() && r.governance() && r.protocol():
		m, ok := r.rules()
		if !ok {
			return
		}
		r.allow()
		r.grant(m)
		if r.api.Anomaly != nil && r.req.Method != "" {
			r.anomaly(m)
		}
		if allow, decided := r.api.IdentityOnly(r.src); decided && allow && r.d.Effect == flow.EffectAllow {
			r.d.DirectOK = r.req.Peer.Channel == flow.ChannelKernel
		}
	}
}

func (r *run) channel() bool {
	if r.api.MTLS == compile.MTLSRequired && r.req.Peer.Channel == flow.ChannelPlaintext {
		return r.refuse(flow.StageChannel, flow.ReasonMTLSRequired, "plaintext where the policy asks for mTLS")
	}
	r.step(flow.StageChannel, flow.ReasonOK, r.req.Peer.Channel.String(), "")
	return true
}

// identity checks who calls. A caller that proves nothing may go on where
// the policy does not ask for proof: only rules without from match it then.
func (r *run) identity(required bool) bool {
	peer := &r.req.Peer
	if peer.ID == "" {
		if required {
			return r.refuse(flow.StageIdentity, flow.ReasonNoIdentity, "")
		}
		r.step(flow.StageIdentity, flow.ReasonOK, "anonymous", "")
		return true
	}
	if reason := r.p.peerRevoked(peer, r.now); reason != flow.ReasonOK {
		return r.refuse(flow.StageIdentity, reason, peer.ID)
	}
	if r.src == nil {
		return r.refuse(flow.StageIdentity, flow.ReasonUnknownIdentity, "no MachineIdentity has the ID "+peer.ID)
	}
	if !peer.NotAfter.IsZero() && !r.now.Before(peer.NotAfter) {
		return r.refuse(flow.StageIdentity, flow.ReasonExpired, "the caller's certificate has expired")
	}
	r.step(flow.StageIdentity, flow.ReasonOK, peer.ID, "")
	return true
}

// governance holds both ends to their documents' validity.
func (r *run) governance() bool {
	if r.api != nil && r.api.Identity.Expired(r.now) {
		id := r.api.Identity
		return r.refuse(flow.StageGovernance, flow.ReasonIdentityExpired, "of the server "+id.FullName()+": "+id.Expiry())
	}
	if r.src == nil {
		r.step(flow.StageGovernance, flow.ReasonOK, "anonymous", "")
		return true
	}
	if r.src.Expired(r.now) {
		return r.refuse(flow.StageGovernance, flow.ReasonIdentityExpired, r.src.Expiry())
	}
	r.step(flow.StageGovernance, flow.ReasonOK, r.src.Owner, "")
	return true
}

// protocol refuses what is no call of gRPC where gRPC alone is served.
func (r *run) protocol() bool {
	if r.api.Protocol == compile.ProtocolGRPC && r.req.Protocol != flow.ProtocolGRPC {
		return r.refuse(flow.StageProtocol, flow.ReasonNotGRPC, "no call of gRPC: POST over HTTP/2 with content-type application/grpc")
	}
	return true
}

// grant notes what an allowed call rests on.
func (r *run) grant(m *compile.Match) {
	d := r.d
	if m == nil {
		r.until(r.proven.until)
		return
	}
	r.until(r.ruleProven.until)
	d.Template = m.Template
	r.until(r.leaseEnd)
	r.until(r.recalledEnd)
	d.Detail = r.recalled
	if c := r.verified; c != nil {
		r.until(c.Expiry)
		if age := m.Rule.Token.MaxAge; age > 0 {
			r.until(c.AuthTime.Add(age))
		}
		d.Subjects[1], d.Subjects[2] = c.SubjectKey, c.TokenKey
		d.ProvenKey = r.proof.Key()
	}
}

// peerRevoked says whether the caller's identity or certificate is revoked.
func (p *Pipeline) peerRevoked(peer *flow.Peer, now time.Time) flow.Reason {
	list := p.revoked.Load()
	if _, ok := list.Find(identity.RevokeIdentity, peer.ID, now); ok || p.blocked.Load().has(identity.RevokeIdentity, peer.ID, now) {
		return flow.ReasonIdentityRevoked
	}
	if peer.Serial != "" {
		if _, ok := list.Find(identity.RevokeSerial, peer.Serial, now); ok {
			return flow.ReasonCertificateRevoked
		}
	}
	return flow.ReasonOK
}

// subjectsRevoked says whether what had allowed a live stream is revoked.
func (p *Pipeline) subjectsRevoked(subjects *[4]string, serial string, issued, now time.Time) flow.Reason {
	list, local := p.revoked.Load(), p.blocked.Load()
	find := func(kind identity.RevocationKind, v string) bool {
		if v == "" {
			return false
		}
		e, ok := list.Find(kind, v, now)
		if ok && (kind == identity.RevokeSubject || kind == identity.RevokeIssuer) && issued.After(e.Since.Add(leeway)) {
			ok = false
		}
		return ok || local.has(kind, v, now)
	}
	issuer, _, _ := strings.Cut(subjects[1], "|")
	_, tokenID, _ := strings.Cut(subjects[2], "|")
	if find(identity.RevokeIdentity, subjects[0]) || find(identity.RevokeSerial, serial) ||
		find(identity.RevokeSubject, subjects[1]) || find(identity.RevokeIssuer, issuer) ||
		find(identity.RevokeJTI, subjects[2]) || find(identity.RevokeJTI, tokenID) {
		return flow.ReasonRevoked
	}
	return flow.ReasonOK
}

// leeway is how much an issuer's clock may be ahead.
const leeway = 30 * time.Second
