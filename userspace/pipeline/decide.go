// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"context"
	"errors"
	"strings"
	"time"
	"unsafe"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/anomaly"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// maxWait bounds what one decision waits for an issuer's keys.
const maxWait = 5 * time.Second

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
// mayCall. The rest is for the destination's own policy. mode is that of the
// source's outbound side.
func (p *Pipeline) DecideOutbound(env Env, req *flow.Request, src, dst *compile.Identity, d *flow.Decision) {
	r := env.Loop.take()
	r.start(p, env, req, src, nil, d)
	mode := flow.ModeEnforce
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

	matches    compile.Matches
	activation compile.Activation
	claims     compile.Claims
	check      token.Check
	raw        []byte // the bearer token, once looked for
	rawReason  flow.Reason
	rawLooked  bool
	verified   *token.Claims // of the rule that is being judged
	leaseEnd   time.Time     // of the relation of that rule
	user       []byte
	object     []byte
	sample     anomaly.Sample
	steps      []flow.Step
}

func (r *run) start(p *Pipeline, env Env, req *flow.Request, src *compile.Identity, api *compile.API, d *flow.Decision) {
	r.p, r.env, r.req, r.src, r.api, r.d = p, env, req, src, api, d
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
	r.raw, r.rawReason, r.rawLooked = nil, flow.ReasonOK, false
	r.verified, r.leaseEnd = nil, time.Time{}
	clear(r.matches.Rules)
	clear(r.steps)
	r.steps = r.steps[:0]
}

func (r *run) finish() {
	d := r.d
	if d.Effect != flow.EffectAllow || r.p.tracing.Load() {
		d.Steps = append(d.Steps, r.steps...)
	}
}

// step notes what a stage found.
func (r *run) step(stage flow.Stage, reason flow.Reason, detail, rule string) {
	var took time.Duration
	if stage >= flow.StageToken { // those before cost next to nothing
		now := r.p.opt.Now()
		took = now.Sub(r.last)
		r.last = now
	}
	r.steps = append(r.steps, flow.Step{Stage: stage, Reason: reason, Detail: detail, Rule: rule, Took: took})
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
	case r.channel() && r.identity(r.api.MTLS == compile.MTLSRequired) && r.posture() && r.governance():
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

// posture holds by itself: the loader refuses policies that ask for one.
func (r *run) posture() bool {
	r.step(flow.StagePosture, flow.ReasonOK, "none asked for", "")
	return true
}

func (r *run) governance() bool {
	if r.src == nil {
		r.step(flow.StageGovernance, flow.ReasonOK, "anonymous", "")
		return true
	}
	if r.src.Expired(r.now) {
		return r.refuse(flow.StageGovernance, flow.ReasonIdentityExpired, "owner "+r.src.Owner+", expired "+r.src.Expires.Format(time.DateOnly))
	}
	r.step(flow.StageGovernance, flow.ReasonOK, r.src.Owner, "")
	return true
}

// rules finds the rule that allows; nil with true where none speaks of the
// call and otherwise allows it.
func (r *run) rules() (*compile.Match, bool) {
	req := r.req
	r.activation = compile.Activation{Request: req, Source: r.src, Time: r.now}
	r.api.Match(&r.matches, r.src, req.Host, req.Method, req.Path)
	for i := range r.matches.Rules {
		if m := &r.matches.Rules[i]; m.Rule.Deny && r.denies(m) {
			return nil, false
		}
	}
	if reason := r.matches.Refusal; reason != flow.ReasonOK {
		stage := flow.StagePolicy
		if reason != flow.ReasonMayCall {
			stage = flow.StageProtocol
		}
		r.refuse(stage, reason, "")
		return nil, false
	}
	var best *compile.Match
	var farthest finding
	for i := range r.matches.Rules {
		m := &r.matches.Rules[i]
		if m.Rule.Deny {
			continue
		}
		f := r.satisfied(m)
		if f.reason == flow.ReasonOK {
			r.name(m)
			return m, true
		}
		if best == nil || f.stage > farthest.stage {
			best, farthest = m, f
		}
	}
	switch {
	case best != nil:
		r.name(best)
		r.conclude(farthest)
	case r.api.OtherwiseAllow:
		r.step(flow.StagePolicy, flow.ReasonOK, "otherwise: allow", "")
		return nil, true
	case req.Peer.ID == "":
		r.refuse(flow.StageIdentity, flow.ReasonNoIdentity, "no rule allows a caller without identity")
	default:
		r.refuse(flow.StagePolicy, flow.ReasonNoRule, "no rule allows it, otherwise: deny")
	}
	return nil, false
}

// denies holds a deny rule against the call. One that cannot be judged
// denies, for the reason that it cannot.
func (r *run) denies(m *compile.Match) bool {
	f := r.satisfied(m)
	switch f.reason {
	case flow.ReasonRelation, flow.ReasonCondition:
		return false // a clear no
	case flow.ReasonOK:
		f = finding{flow.StagePolicy, flow.ReasonDenyRule, ""}
		r.step(f.stage, f.reason, "", m.Rule.Name)
	}
	r.name(m)
	r.conclude(f)
	return true
}

// conclude refuses for what a rule's stage has found and noted already.
func (r *run) conclude(f finding) {
	r.d.Effect, r.d.Stage, r.d.Reason, r.d.Detail = flow.EffectDeny, f.stage, f.reason, f.detail
}

// name writes the rule into the decision.
func (r *run) name(m *compile.Match) {
	r.d.Rule = m.Rule.Name
	r.d.Template = m.Template
	pos, ok := r.st.rules[m.Rule]
	if !ok {
		pos = m.Rule.Position.FileLine()
	}
	r.d.Position = pos
}

// finding is where a rule ended and why.
type finding struct {
	stage  flow.Stage
	reason flow.Reason
	detail string
}

// satisfied asks a rule's token, relation and condition, in this order.
func (r *run) satisfied(m *compile.Match) finding {
	rule := m.Rule
	r.verified, r.leaseEnd = nil, time.Time{}
	r.activation.Token, r.activation.Match = nil, m
	if rule.Token != nil {
		if f := r.token(rule); f.reason != flow.ReasonOK {
			return f
		}
	}
	if rule.Relation != nil {
		if f := r.relation(rule); f.reason != flow.ReasonOK {
			return f
		}
	}
	if rule.When != nil {
		return r.condition(rule)
	}
	return finding{stage: flow.StageCondition}
}

func (r *run) fail(rule *compile.Rule, stage flow.Stage, reason flow.Reason, detail string) finding {
	r.step(stage, reason, detail, rule.Name)
	return finding{stage, reason, detail}
}

func (r *run) token(rule *compile.Rule) finding {
	if r.p.opt.Tokens == nil {
		return r.fail(rule, flow.StageToken, flow.ReasonTokenUnavailable, "no token verifier")
	}
	if !r.rawLooked {
		r.raw, r.rawReason = token.FromRequest(r.req)
		r.rawLooked = true
	}
	if r.rawReason != flow.ReasonOK {
		return r.fail(rule, flow.StageToken, r.rawReason, "")
	}
	t := rule.Token
	issuer, ok := r.st.issuers[t.Issuer]
	if !ok {
		issuer = t.Issuer.FullName()
	}
	r.check = token.Check{Issuer: issuer, Audience: t.Audience, Scopes: t.Scopes,
		BoundTo: bindings[t.Bound], Thumbprints: r.req.Peer.Thumbprints, Now: r.now}
	claims, reason, err := r.p.opt.Tokens.Verify(r.raw, &r.check)
	if err != nil && errors.Is(err, token.ErrKeysPending) {
		claims, reason, err = r.verifyLater()
	}
	if reason == flow.ReasonOK && r.p.blocked.Load().has(identity.RevokeJTI, claims.ID, r.now) {
		reason, err = flow.ReasonTokenRevoked, nil
	}
	if reason != flow.ReasonOK {
		detail := ""
		if err != nil {
			detail = err.Error()
		}
		return r.fail(rule, flow.StageToken, reason, detail)
	}
	r.verified = claims
	r.claims = compile.Claims{Subject: claims.Subject, Issuer: claims.Issuer, ID: claims.ID, ClientID: claims.ClientID,
		Scopes: claims.Scopes, Groups: claims.Groups, Raw: claims.Raw}
	r.activation.Token = &r.claims
	r.step(flow.StageToken, flow.ReasonOK, "", rule.Name)
	return finding{stage: flow.StageToken}
}

var bindings = [...]token.Binding{compile.BoundNone: token.BindingNone, compile.BoundMTLS: token.BindingMTLS}

// verifyLater waits for the issuer's keys and asks once more.
func (r *run) verifyLater() (claims *token.Claims, reason flow.Reason, err error) {
	issuer := r.check.Issuer
	r.env.Task.Block(func() {
		ctx, cancel := context.WithTimeout(context.Background(), maxWait)
		defer cancel()
		err = r.p.opt.Tokens.Await(ctx, issuer)
	})
	r.now = r.p.opt.Now()
	r.check.Now = r.now
	return r.p.opt.Tokens.Verify(r.raw, &r.check)
}

func (r *run) relation(rule *compile.Rule) finding {
	engine, rel := r.p.opt.Relations, rule.Relation
	if engine == nil {
		return r.fail(rule, flow.StageRelation, flow.ReasonRelationUnavailable, "no relation engine")
	}
	var reason flow.Reason
	if r.user, reason = rel.User.Append(r.user[:0], &r.activation); reason == flow.ReasonOK {
		r.object, reason = rel.Object.Append(r.object[:0], &r.activation)
	}
	if reason != flow.ReasonOK {
		return r.fail(rule, flow.StageRelation, reason, "a value that a relation cannot take")
	}
	model := ""
	if rel.Model != nil {
		var known bool
		if model, known = r.st.models[rel.Model]; !known {
			model = rel.Model.FullName()
		}
	}
	answer, ok := engine.Cached(model, text(r.user), rel.Relation, text(r.object))
	if !ok {
		if answer, reason = r.ask(model, rel.Relation); reason != flow.ReasonOK {
			detail := ""
			if reason == flow.ReasonRelationUnavailable {
				detail = "the relation engine gave no answer"
			}
			return r.fail(rule, flow.StageRelation, reason, detail)
		}
	}
	if !answer.Allowed {
		return r.fail(rule, flow.StageRelation, flow.ReasonRelation, "")
	}
	r.leaseEnd = answer.Until
	r.step(flow.StageRelation, flow.ReasonOK, rel.Relation, rule.Name)
	return finding{stage: flow.StageRelation}
}

// ask has the engine answer, which may take its time.
func (r *run) ask(model, rel string) (relation.Answer, flow.Reason) {
	user, object := string(r.user), string(r.object)
	var answer relation.Answer
	reason := flow.ReasonRelationUnavailable // unless it says otherwise
	var err error
	r.env.Task.Block(func() {
		answer, reason, err = r.p.opt.Relations.Check(context.Background(), model, user, rel, object)
	})
	if reason == flow.ReasonRelationUnavailable {
		r.p.opt.Logger.Warn("ask relation engine", "model", model, "error", err)
	}
	return answer, reason
}

// text views b as a string for the time of a call that does not keep it.
func text(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

func (r *run) condition(rule *compile.Rule) finding {
	ok, err := rule.When.Eval(&r.activation)
	switch {
	case err != nil:
		// What CEL says may quote a value of the request.
		return r.fail(rule, flow.StageCondition, flow.ReasonConditionErr, "`when` cannot be evaluated for this request")
	case !ok:
		return r.fail(rule, flow.StageCondition, flow.ReasonCondition, "`when` is false")
	}
	r.step(flow.StageCondition, flow.ReasonOK, "", rule.Name)
	return finding{stage: flow.StageCondition}
}

// grant notes what an allowed call rests on.
func (r *run) grant(m *compile.Match) {
	d := r.d
	if m == nil {
		return
	}
	d.Template = m.Template
	r.until(r.leaseEnd)
	if c := r.verified; c != nil {
		r.until(c.Expiry)
		d.Subjects[1], d.Subjects[2] = c.SubjectKey, c.TokenKey
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
	if find(identity.RevokeIdentity, subjects[0]) || find(identity.RevokeSerial, serial) ||
		find(identity.RevokeSubject, subjects[1]) || find(identity.RevokeIssuer, issuer) ||
		find(identity.RevokeJTI, strings.TrimPrefix(subjects[2], "jti:")) {
		return flow.ReasonRevoked
	}
	return flow.ReasonOK
}

// leeway is how much an issuer's clock may be ahead.
const leeway = 30 * time.Second
