// SPDX-License-Identifier: Apache-2.0

// Package pipeline judges requests: the stages of verification in their
// order, channel, identity, posture, governance, token, relation, condition,
// anomaly, to one Decision with its trace. It also keeps what follows from
// decisions: the records, the recent refusals that can be explained, the
// counters, and the live streams that end when what allowed them ends.
//
// Decide runs on an event loop and does not block it: what may wait goes
// through Env.Task. Each loop has a Loop of its own, and nothing that all
// requests share is locked.
package pipeline

import (
	"crypto/rand"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/anomaly"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// Options of a Pipeline.
type Options struct {
	Node    string
	Ceiling flow.Mode // of every policy's mode
	// Tokens, Relations and Anomalies judge their stages. Without one, a rule
	// that needs it refuses with the stage's "unavailable" reason.
	Tokens    *token.Verifier
	Relations *relation.Engine
	Anomalies *anomaly.Scorer
	// Posture returns what is known of a caller's node and program, nil for
	// nothing. It is called for each request of a policy that asks for a
	// posture, must not block, and what it returns is never changed. nil: no
	// fact is known.
	Posture func(req *flow.Request, src *compile.Identity) *Facts
	// Revoked is told what an anomaly threshold revoked, so that it can be
	// kept beyond this process. It is called rarely and must not block. May
	// be nil.
	Revoked func(kind identity.RevocationKind, value string, until time.Time, why string)
	// Steps bounds a trace, 3 at least; 0: 128. Of more, those before the one
	// that it ends with are left out.
	Steps  int
	Logger *slog.Logger // default: discard
	Now    func() time.Time
}

// Pipeline is safe for concurrent use.
type Pipeline struct {
	opt        Options
	plan       atomic.Pointer[planState]
	revoked    atomic.Pointer[identity.Revocations]
	blocked    atomic.Pointer[blockList]
	generation atomic.Uint64
	tracing    atomic.Bool
	live       *Live
	acts       acts

	mu    sync.Mutex // guards loops
	loops []*Loop
	wake  chan struct{}
}

// planState is a plan with the texts that decisions show, so that none is
// built for a request.
type planState struct {
	plan    *compile.Plan
	rules   map[*compile.Rule]string // FILE:LINE
	apis    map[*compile.API]string
	issuers map[*compile.Issuer]string // NAMESPACE/NAME
	models  map[*compile.Model]string
}

// New returns a Pipeline without a plan.
func New(opt Options) *Pipeline {
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Steps == 0 {
		opt.Steps = maxSteps
	}
	p := &Pipeline{opt: opt, wake: make(chan struct{}, 1), live: newLive()}
	p.plan.Store(&planState{})
	p.blocked.Store(&blockList{})
	return p
}

// SetPlan swaps the plan. Live streams are judged again under it.
func (p *Pipeline) SetPlan(plan *compile.Plan) {
	st := &planState{plan: plan, rules: map[*compile.Rule]string{}, apis: map[*compile.API]string{},
		issuers: map[*compile.Issuer]string{}, models: map[*compile.Model]string{}}
	for _, a := range plan.APIs() {
		st.apis[a] = a.Position.FileLine()
		for _, r := range a.Rules {
			st.rules[r] = r.Position.FileLine()
		}
	}
	for _, i := range plan.Issuers() {
		st.issuers[i] = i.FullName()
	}
	for _, m := range plan.Models() {
		st.models[m] = m.FullName()
	}
	p.plan.Store(st)
	p.generation.Add(1)
	p.live.recheckAll()
}

// Plan returns the current plan, nil before the first.
func (p *Pipeline) Plan() *compile.Plan { return p.plan.Load().plan }

// SetRevocations replaces the deny list and closes the live streams that it
// names. Tokens are revoked at their verifier; the list given here closes
// what they had allowed.
func (p *Pipeline) SetRevocations(list *identity.Revocations) {
	p.revoked.Store(list)
	p.generation.Add(1)
	now := p.opt.Now()
	p.live.closeMatching(func(s *Stream) flow.Reason { return p.subjectsRevoked(&s.Subjects, s.Serial, s.Issued, now) })
}

// RelationsChanged says that answers of a relation model may have changed:
// live streams are judged again. It may be given to relation.Options.
func (p *Pipeline) RelationsChanged(string) {
	p.generation.Add(1)
	p.live.recheckAll()
}

// Generation changes with the plan, the revocations and the relations: a
// connection that remembers the generation of its last decision knows that
// it has to look up its identity and API anew when it differs.
func (p *Pipeline) Generation() uint64 { return p.generation.Load() }

// Live returns the registry of streams.
func (p *Pipeline) Live() *Live { return p.live }

// SetTracing keeps the trace of every decision, not of refusals alone.
func (p *Pipeline) SetTracing(on bool) { p.tracing.Store(on) }

// Mode returns what a policy's mode amounts to under the ceiling.
func (p *Pipeline) Mode(api *compile.API) flow.Mode {
	if api == nil {
		return p.opt.Ceiling
	}
	return flow.MinMode(api.Mode, p.opt.Ceiling)
}

// Blocker runs what may wait so that only the caller waits, not its loop. It
// is the line to netloop, whose Task is one.
type Blocker interface{ Block(func()) }

// Direct runs it in place: for goroutines that may wait.
type Direct struct{}

// Block runs f.
func (Direct) Block(f func()) { f() }

// Env is where a decision is taken.
type Env struct {
	Loop *Loop
	Task Blocker
	// Again says that what was decided before is judged again: it is not
	// recorded.
	Again bool
}

// Loop is the part of a Pipeline that belongs to one event loop: scratch
// memory, counters, queues. Its methods and Decide with it must be called by
// tasks of that loop alone.
type Loop struct {
	p       *Pipeline
	ids     flow.IDs
	free    []*run
	counts  counters
	queue   queue
	refused recent
	allowed recent
	second  int64 // in which kept counts
	kept    int
	scratch Record
	memory  memory
}

// NewLoop adds a loop.
func (p *Pipeline) NewLoop() *Loop {
	l := &Loop{p: p, ids: flow.NewIDs()}
	l.counts.init()
	_, _ = rand.Read(l.memory.key[:]) // it never fails
	p.mu.Lock()
	p.loops = append(p.loops, l)
	p.mu.Unlock()
	return l
}

func (p *Pipeline) eachLoop(f func(*Loop)) {
	p.mu.Lock()
	loops := p.loops
	p.mu.Unlock()
	for _, l := range loops {
		f(l)
	}
}

// maxRuns bounds the scratch memory that a loop keeps, about 10 KiB each:
// decisions in flight at once are those that wait in a Blocker.
const maxRuns = 16

func (l *Loop) take() *run {
	if n := len(l.free); n > 0 {
		r := l.free[n-1]
		l.free = l.free[:n-1]
		return r
	}
	return &run{user: make([]byte, 0, 256), object: make([]byte, 0, 256), steps: make([]flow.Step, 0, 16)}
}

func (l *Loop) put(r *run) {
	r.release()
	if len(l.free) < maxRuns {
		l.free = append(l.free, r)
	}
}

// NewID returns a request id.
func (l *Loop) NewID(now time.Time) string { return l.ids.New(now) }

// PutID writes a request id to b, for a caller that owns the memory.
func (l *Loop) PutID(b *[flow.IDLength]byte, now time.Time) { l.ids.Put(b, now) }
