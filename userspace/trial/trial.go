// SPDX-License-Identifier: Apache-2.0

// Package trial judges calls that are described instead of made: the tests of
// a set of policies, and the question what would become of a call. A described
// call is written out as the bytes that a client would send, read by the
// proxy's own parser, and judged by the pipeline that judges real ones, over
// the plan, the token verifier and the relation engine that serve them. Only
// what lies outside is stood in for: the issuers' keys are the trial's own,
// and the caller's certificate and posture are as described.
//
// What a trial does not judge: the content of bodies against body.inspect,
// anomaly (every trial is before the warm-up), revocations, and what the
// kernel does before the proxy is asked.
package trial

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/anomaly"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// Trial judges described calls by one plan. It is safe for concurrent use;
// calls are judged one after the other.
type Trial struct {
	plan *compile.Plan
	now  time.Time // of calls that name no time

	mu        sync.Mutex
	pipeline  *pipeline.Pipeline
	env       pipeline.Env
	tokens    *token.Verifier
	signers   map[*compile.Issuer]*signer
	relations *relation.Engine // nil where no rule asks for a relation
	dir       string           // of its store
	base      map[string][]relation.Tuple
	held      map[string][]relation.Tuple // what the store holds
	clock     time.Time
	facts     *pipeline.Facts
}

// New returns a trial of a plan. now is the time of calls that name none.
func New(ctx context.Context, plan *compile.Plan, now time.Time) (*Trial, error) {
	t := &Trial{plan: plan, now: now, clock: now, signers: map[*compile.Issuer]*signer{}}
	t.tokens = token.New(token.Options{Now: t.time})
	issuers := pipeline.Issuers(plan)
	for n := range issuers {
		// Nobody is asked: what is described is signed.
		issuers[n].Introspect, issuers[n].NoKeys = false, false
	}
	if err := t.tokens.SetIssuers(issuers); err != nil {
		return nil, err
	}
	if err := t.openRelations(ctx); err != nil {
		t.Close()
		return nil, err
	}
	return t, t.begin()
}

func (t *Trial) time() time.Time { return t.clock }

// begin makes a pipeline that has seen no call yet.
func (t *Trial) begin() error {
	scorer, err := anomaly.New(anomaly.Options{Now: t.time})
	if err != nil {
		return fmt.Errorf("make an anomaly scorer: %w", err)
	}
	t.pipeline = pipeline.New(pipeline.Options{
		Steps: math.MaxInt, // by which coverage counts rules
		Node:  "trial", Ceiling: flow.ModeEnforce, Tokens: t.tokens, Relations: t.relations, Anomalies: scorer, Now: t.time,
		Posture: func(*flow.Request, *compile.Identity) *pipeline.Facts { return t.facts },
	})
	t.pipeline.SetPlan(t.plan)
	t.pipeline.SetTracing(true)
	t.env = pipeline.Env{Loop: t.pipeline.NewLoop(), Task: pipeline.Direct{}}
	return nil
}

func asksRelation(plan *compile.Plan) bool {
	for _, a := range plan.APIs() {
		for _, r := range a.Rules {
			if r.Relation != nil {
				return true
			}
		}
	}
	return false
}

func (t *Trial) openRelations(ctx context.Context) error {
	if !asksRelation(t.plan) {
		return nil
	}
	if !relation.Built {
		return fmt.Errorf("ask for relations: %w", errNoRelations)
	}
	var err error
	if t.dir, err = os.MkdirTemp("", "sallyport-trial-"); err != nil {
		return fmt.Errorf("make a folder for the trial's relations: %w", err)
	}
	if t.relations, err = relation.Open(ctx, relation.Options{StateDir: t.dir}); err != nil {
		return err
	}
	models, tuples := pipeline.Models(t.plan)
	for n := range models {
		models[n].Remote = nil // nobody elsewhere is asked
	}
	if err := t.relations.SetModels(ctx, models); err != nil {
		return fmt.Errorf("set relation models: %w", err)
	}
	t.base, t.held = tuples, map[string][]relation.Tuple{}
	return t.hold(ctx, nil)
}

// Close removes what the trial kept.
func (t *Trial) Close() {
	if t.relations != nil {
		_ = t.relations.Close() // of a store that is removed
	}
	if t.dir != "" {
		_ = os.RemoveAll(t.dir) // in the folder for temporary files
	}
}

// hold has the store hold the relations of the policies' files and these.
func (t *Trial) hold(ctx context.Context, more map[string][]relation.Tuple) error {
	if t.relations == nil {
		return nil
	}
	for _, model := range slices.Sorted(maps.Keys(t.base)) {
		want := slices.Concat(t.base[model], more[model])
		if held, ok := t.held[model]; ok && slices.Equal(held, want) {
			continue
		}
		if _, err := t.relations.Reconcile(ctx, model, want); err != nil {
			delete(t.held, model)
			return fmt.Errorf("hold relations of %s: %w", model, err)
		}
		t.held[model] = want
	}
	return nil
}

// Outcome is what becomes of a call.
type Outcome struct {
	Decision flow.Decision
	// Leaving says that the call was refused where it leaves, by the caller's
	// own MachineIdentity.
	Leaving bool
}

// Judge judges a call that Resolve made of a description.
func (t *Trial) Judge(ctx context.Context, c *Resolved) (Outcome, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.clock, t.facts = c.now, c.posture.facts(c.now)
	if err := t.hold(ctx, c.tuples); err != nil {
		return Outcome{}, err
	}
	headers, err := t.authorize(c)
	if err != nil {
		return Outcome{}, err
	}
	req := flow.Request{ID: t.env.Loop.NewID(c.now), Time: c.now, Peer: c.peer, Destination: c.destination, Protocol: flow.ProtocolTCP}
	var out Outcome
	if c.peer.ID != "" && (c.peer.Channel == flow.ChannelKernel || c.peer.Channel == flow.ChannelTunnel) {
		t.pipeline.DecideOutbound(t.env, &req, c.Source, c.Target, flow.ModeObserve, &out.Decision)
		if out.Decision.Refused() {
			out.Leaving = true
			return out, nil
		}
	}
	if fault := c.read(&req, headers); fault != nil {
		out.Decision = t.unreadable(c, fault)
		return out, nil
	}
	t.pipeline.Decide(t.env, &req, c.Source, c.API, &out.Decision)
	if c.API != nil && c.API.Anomaly != nil {
		return out, t.begin() // no call is to be judged by the ones before
	}
	return out, nil
}

// authorize returns the call's field lines with its token.
func (t *Trial) authorize(c *Resolved) ([]string, error) {
	if c.token == nil {
		return c.headers, nil
	}
	s := t.signers[c.issuer]
	if s == nil {
		var err error
		if s, err = newSigner(c.issuer); err != nil {
			return nil, err
		}
		t.signers[c.issuer] = s
	}
	// Again for each call: the keys are as new as the time that it names.
	if err := t.tokens.SetKeys(c.issuer.FullName(), s.jwks, c.now); err != nil {
		return nil, err
	}
	var jwk map[string]any
	if c.signs && c.key != [sha256.Size]byte{} {
		// Which key it is depends on who holds it alone.
		jwk = publicKey(c.key)
		own := token.KeyThumbprint(publicKey(certificate("the caller's key")))
		c.provenKey = own
	}
	text, err := s.sign(c.token, c.caller(), c.audience, c.bound, c.key, jwk, c.now)
	if err != nil {
		return nil, err
	}
	scheme := "Bearer "
	if c.key != [sha256.Size]byte{} && !c.signs {
		scheme = "DPoP "
	}
	return slices.Concat(c.headers, []string{"Authorization: " + scheme + text}), nil
}
