// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"bytes"
	"context"
	"errors"
	"time"
	"unsafe"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// Bounds of one decision.
const (
	maxWait      = 5 * time.Second // for an issuer's keys; for the relation engine in all
	maxQuestions = 64              // to the relation engine
)

// rules finds the rule that allows; nil with true where none speaks of the
// call and otherwise allows it.
func (r *run) rules() (*compile.Match, bool) {
	req := r.req
	r.activation = compile.Activation{Request: req, Source: r.src, Time: r.now}
	r.api.Match(&r.matches, r.src, compile.Call{Host: req.Host, Method: req.Method, Path: req.Path, GRPC: req.Protocol == flow.ProtocolGRPC, Upgrade: req.Upgrade})
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
	asks := req.Upgrade && r.api.AsksUpgrade(r.src)
	var best *compile.Match
	var farthest finding
	for i := range r.matches.Rules {
		m := &r.matches.Rules[i]
		if m.Rule.Deny {
			continue
		}
		if asks && !m.Rule.Upgrade {
			f := r.fail(m.Rule, flow.StagePolicy, flow.ReasonUpgrade, "the rule lists no upgrade")
			if best == nil {
				best, farthest = m, f
			}
			continue
		}
		f := r.satisfied(m)
		if f.reason == flow.ReasonOK {
			r.name(m)
			return m, true
		}
		// That rules were not asked any more says more than what others lack.
		if best == nil || farthest.detail != spent && (f.stage > farthest.stage || farthest.reason == flow.ReasonUpgrade || f.detail == spent) {
			best, farthest = m, f
		}
	}
	switch {
	case best != nil:
		r.name(best)
		r.conclude(farthest)
	case r.api.OtherwiseAllow && asks:
		r.refuse(flow.StagePolicy, flow.ReasonUpgrade, "no rule allows the upgrade, and otherwise allows none")
	case r.api.OtherwiseAllow:
		if f := r.policyPosture(""); f.reason != flow.ReasonOK {
			r.conclude(f)
			return nil, false
		}
		r.step(flow.StagePolicy, flow.ReasonOK, "otherwise: allow", "")
		return nil, true
	case req.Peer.ID == "":
		r.refuse(flow.StageIdentity, flow.ReasonNoIdentity, "no rule allows a caller without identity")
	default:
		r.refuse(flow.StagePolicy, flow.ReasonNoRule, "no rule allows it, otherwise: deny")
	}
	return nil, false
}

// denies holds a deny rule, which may have a condition, against the call. One
// that cannot be judged denies, for the reason that it cannot.
func (r *run) denies(m *compile.Match) bool {
	f := r.satisfied(m)
	switch f.reason {
	case flow.ReasonCondition:
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
	if f.reason == flow.ReasonStepUp {
		r.d.Effect = flow.EffectStepUp
	}
}

// name writes the rule into the decision.
func (r *run) name(m *compile.Match) {
	r.d.Rule = m.Rule.Name
	r.d.Template = m.Template
	if t := m.Rule.Token; t != nil {
		r.d.Challenge, r.d.DPoP = t.Challenge, t.Bound == compile.BoundDPoP
	}
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

// satisfied asks a rule's posture, token, relation and condition, in this order.
func (r *run) satisfied(m *compile.Match) finding {
	rule := m.Rule
	r.verified, r.leaseEnd = nil, time.Time{}
	r.recalled, r.recalledEnd = "", time.Time{}
	r.activation.Token, r.activation.Match = nil, m
	if !rule.Deny {
		if f := r.rulePosture(rule); f.reason != flow.ReasonOK {
			return f
		}
	}
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
		r.raw, r.rawDPoP, r.rawReason = token.FromRequest(r.req)
		r.proof = token.Proof{Request: r.req}
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
	r.check = token.Check{Issuer: issuer, Audience: t.Audience, Scopes: t.Scopes, ACR: t.ACR, MaxAge: t.MaxAge,
		BoundTo: bindings[t.Bound], Thumbprints: r.req.Peer.Thumbprints, DPoP: r.rawDPoP, Proof: &r.proof, Now: r.now}
	claims, reason, err := r.p.opt.Tokens.Verify(r.raw, &r.check)
	if err != nil && errors.Is(err, token.ErrKeysPending) {
		claims, reason, err = r.verifyLater()
	}
	if err != nil && errors.Is(err, token.ErrAnswerPending) {
		claims, reason, err = r.introspect()
	}
	var asked question
	var old *remembered
	failed := reason
	bound := t.Bound == compile.BoundSignature || reason == flow.ReasonOK && claims.KeyThumbprint != [32]byte{}
	// A token that is bound to a key is proven by each request, and who has the
	// issuer asked too much has brought that about.
	holds := r.remembers(rule) && len(r.raw) <= maxRememberedToken && !r.rawDPoP && !bound && !errors.Is(err, token.ErrAskedMuch)
	if holds {
		asked = r.tokenQuestion(rule)
	}
	if holds && (reason == flow.ReasonTokenKeysStale || reason == flow.ReasonTokenUnavailable) {
		if old = r.recall(&asked); old != nil {
			claims, reason, err = old.claims, flow.ReasonOK, nil
		}
	}
	if reason == flow.ReasonOK && r.p.blocked.Load().has(identity.RevokeJTI, claims.TokenKey, r.now) {
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
	switch {
	case old != nil:
		r.rest(old, flow.StageToken, rule, failed)
		return finding{stage: flow.StageToken}
	case holds:
		until := claims.Expiry
		if t.MaxAge > 0 && claims.AuthTime.Add(t.MaxAge).Before(until) {
			until = claims.AuthTime.Add(t.MaxAge)
		}
		r.remember(asked, until, claims)
	}
	r.step(flow.StageToken, flow.ReasonOK, "", rule.Name)
	return finding{stage: flow.StageToken}
}

var bindings = [...]token.Binding{compile.BoundNone: token.BindingNone, compile.BoundMTLS: token.BindingMTLS, compile.BoundDPoP: token.BindingDPoP, compile.BoundSignature: token.BindingSignature}

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

// introspect has the issuer asked about an opaque token, and judges that.
func (r *run) introspect() (claims *token.Claims, reason flow.Reason, err error) {
	raw, caller := bytes.Clone(r.raw), r.req.Peer.ID
	r.env.Task.Block(func() {
		ctx, cancel := context.WithTimeout(context.Background(), maxWait)
		defer cancel()
		r.p.opt.Tokens.Introspect(ctx, raw, caller, &r.check)
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
		answer, reason = r.ask(model, rel.Relation)
		// What the request itself has used up is no failure of the engine.
		if reason == flow.ReasonRelationUnavailable && r.questions <= maxQuestions && r.remembers(rule) {
			asked := r.relationQuestion(rule, model)
			if old := r.recall(&asked); old != nil {
				r.leaseEnd = old.until
				r.rest(old, flow.StageRelation, rule, reason)
				return finding{stage: flow.StageRelation}
			}
		}
		if reason != flow.ReasonOK {
			detail := ""
			if reason == flow.ReasonRelationUnavailable {
				detail = "the relation engine gave no answer"
				if r.questions > maxQuestions {
					detail = "the rules before it asked as many relations as those of one request may"
				}
			}
			return r.fail(rule, flow.StageRelation, reason, detail)
		}
	}
	if !answer.Allowed {
		return r.fail(rule, flow.StageRelation, flow.ReasonRelation, "")
	}
	r.leaseEnd = answer.Until
	if r.remembers(rule) {
		r.remember(r.relationQuestion(rule, model), answer.Until, nil)
	}
	r.step(flow.StageRelation, flow.ReasonOK, rel.Relation, rule.Name)
	return finding{stage: flow.StageRelation}
}

// ask has the engine answer, which may take its time.
func (r *run) ask(model, rel string) (relation.Answer, flow.Reason) {
	user, object := string(r.user), string(r.object)
	var answer relation.Answer
	reason := flow.ReasonRelationUnavailable // unless it says otherwise
	var err error
	if r.questions++; r.questions > maxQuestions {
		return answer, reason
	}
	if r.answerBy.IsZero() {
		r.answerBy = time.Now().Add(maxWait)
	}
	r.env.Task.Block(func() {
		ctx, cancel := context.WithDeadline(context.Background(), r.answerBy)
		defer cancel()
		answer, reason, err = r.p.opt.Relations.Check(ctx, model, user, rel, object)
	})
	if reason == flow.ReasonRelationUnavailable {
		r.p.opt.Logger.Warn("ask relation engine", "model", model, "error", err)
	}
	return answer, reason
}

// text views b as a string for the time of a call that does not keep it.
func text(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// spent is said of a condition after compile.ErrBudget.
const spent = "`when` is not evaluated: the conditions before it cost what those of one request may cost"

func (r *run) condition(rule *compile.Rule) finding {
	ok, err := rule.When.Eval(&r.activation)
	switch {
	case errors.Is(err, compile.ErrBudget):
		return r.fail(rule, flow.StageCondition, flow.ReasonConditionErr, spent)
	case err != nil:
		// What CEL says may quote a value of the request.
		return r.fail(rule, flow.StageCondition, flow.ReasonConditionErr, "`when` cannot be evaluated for this request")
	case !ok:
		return r.fail(rule, flow.StageCondition, flow.ReasonCondition, "`when` is false")
	}
	r.step(flow.StageCondition, flow.ReasonOK, "", rule.Name)
	return finding{stage: flow.StageCondition}
}
