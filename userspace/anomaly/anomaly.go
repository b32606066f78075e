// SPDX-License-Identifier: Apache-2.0

// Package anomaly learns what is normal for each endpoint of a protected API
// and scores every request against it.
//
// A request is taken apart once, into a [Sample]: its parameters (of the
// path, the query, and a form or JSON body as far as it was inspected), each
// with its name's hash, length, character classes, shape and value hash. No
// value is kept, neither in memory nor on disk.
//
// Six components are scored, each in bits of surprise: the set of
// parameters, and per parameter the length, the characters, the pairs of
// character classes, the shape and, where a parameter takes few values, the
// value. A component's p-value is conformal: the share of learned requests
// of that endpoint that were at least as surprising, at least 1/(n+1). The
// components are combined by their harmonic mean, and the combination is
// ranked conformally again, so that [Score.P] of normal requests is uniform
// however dependent the components are.
//
// # Thresholds and n
//
// P is never below 1/(N+1), where N is how many requests the endpoint's
// calibration rests on: a threshold below that cannot be reached yet. An
// operator who wants to act at 1e-3 needs some 3,000 requests of that
// endpoint; after a warm-up of 200 a threshold of 0.02 is reachable (P of an
// injection is then about 0.006), after 60 about 0.02 is the least there is.
// N is the number n of learned requests, less those of the first eighth of
// the warm-up (at most 16), up to 512, and between n/3 and 2n/3 beyond. The
// rate of false alarms of a threshold is at most about the threshold itself.
//
// P is what thresholds are for. To order requests of different endpoints,
// or those whose P is at its least, take [Score.Evidence].
package anomaly

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of what is kept.
const (
	maxEndpoints      = 4096 // over all APIs
	maxPerSpace       = 256  // endpoints that one wildcard template unfolds to
	maxSpaces         = 512
	shardCount        = 64
	maxKeyLength      = 512 // bytes of an endpoint's name that are kept
	defaultRequests   = 1000
	defaultIdentities = 1
)

// Warmup says when an endpoint's scores may act: after that many learned
// requests of that many distinct identities (at most 16 are told apart), and
// once under 1 % of its requests bring a parameter that was never seen.
type Warmup struct {
	Requests   int // default 1000
	Identities int // default 1
}

// Key names what a request belongs to. Template is the path template of the
// rule that matched. Where it is empty or holds a wildcard ("*", "**"), the
// endpoint is the request's own path with number-like segments folded, and a
// path never seen is itself a novelty once the template's requests are warm.
type Key struct {
	API      string // namespace/name of the policy
	Method   string
	Template string
	Warmup   Warmup
	// Budget is how many actions a day upon normal calls the policy bears; 0:
	// it says nothing.
	Budget float64
}

// Part is a component of the score.
type Part uint8

// The components.
const (
	PartParameters Part = iota
	PartLength
	PartCharacters
	PartPairs
	PartShape
	PartValue
	PartTogether // all of one parameter's parts, against that parameter's own
	partCount
	PartEndpoint // an endpoint that was never seen, below a wildcard template

	valueParts = PartTogether // the parts of a value come before
)

var partNames = [...]string{"parameters", "length", "characters", "pairs", "shape", "value", "together", "", "endpoint"}

// String returns the component's name, as explanations write it.
func (p Part) String() string {
	if int(p) < len(partNames) {
		return partNames[p]
	}
	return "unknown"
}

// Component is one part of a score.
type Component struct {
	Part Part
	// Parameter is the learned parameter that stood out most, "" for one
	// that was never seen or for the whole request.
	Parameter string
	Observed  float64 // bits of surprise
	Expected  float64 // bits that 99 % of the learned requests stayed under
	P         float64 // at least 1/(N+1)
}

// Score is how a request fits its endpoint.
type Score struct {
	P          float64 // conformal p-value, in [1/(N+1), 1]; 1 while N is 0
	N          int     // how many requests P rests on
	Warm       bool    // the warm-up is over: the score may act
	Limit      float64 // no action above this P, by the policy's budget; 1 without one
	Evidence   float64 // bits; orders requests whose P is equal, unbounded
	Components [3]Component
}

// Options of a Scorer.
type Options struct {
	// StateDir is where the baselines are kept, as the file "baselines";
	// "" keeps them in memory only.
	StateDir string
	Logger   *slog.Logger // default: discard
	Now      func() time.Time
}

// Scorer holds the baselines. It is safe for concurrent use: look-ups take
// no lock, and each endpoint has its own.
type Scorer struct {
	opt    Options
	seed   [2]uint64
	shards [shardCount]shard
	spaces atomic.Pointer[map[uint64]*space]
	paces  atomic.Pointer[map[uint64]*pace] // by policy
	mu     sync.Mutex                       // guards the replacement of spaces and paces
	count  atomic.Int64
	full   atomic.Uint64
	save   sync.Mutex
}

type shard struct {
	mu sync.Mutex // writers only
	m  atomic.Pointer[map[uint64]*endpoint]
}

// ErrDamaged says that the stored baselines could not be read; they were set
// aside, and learning starts anew.
var ErrDamaged = errors.New("stored baselines are damaged")

// New returns a Scorer with the baselines of the state directory. A damaged
// file is renamed to "baselines.damaged" and reported as an error that wraps
// ErrDamaged beside a Scorer that is usable and empty; any other error comes
// with a nil Scorer.
func New(opt Options) (*Scorer, error) {
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	s := &Scorer{opt: opt}
	s.clear(newSeed())
	if opt.StateDir == "" {
		return s, nil
	}
	err := s.load()
	if err != nil && !errors.Is(err, ErrDamaged) {
		return nil, err
	}
	return s, err
}

func (s *Scorer) clear(seed [2]uint64) {
	s.seed = seed
	for i := range s.shards {
		m := map[uint64]*endpoint{}
		s.shards[i].m.Store(&m)
	}
	spaces := map[uint64]*space{}
	s.spaces.Store(&spaces)
	paces := map[uint64]*pace{}
	s.paces.Store(&paces)
	s.count.Store(0)
}

func (s *Scorer) endpoint(h uint64) *endpoint {
	return (*s.shards[h%shardCount].m.Load())[h]
}

func (s *Scorer) space(h uint64) *space { return (*s.spaces.Load())[h] }

// Score judges the request that sm was read from. It changes no baseline.
func (s *Scorer) Score(sm *Sample) Score {
	sc := s.judge(sm)
	sc.Limit = s.threshold(sm, &sc)
	return sc
}

func (s *Scorer) judge(sm *Sample) Score {
	e := s.endpoint(sm.hash)
	if e == nil {
		return s.scoreUnseen(sm)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	sc := e.score(sm)
	if sc.Warm {
		e.scored++
		if sc.P <= quarantineBelow {
			e.unusual++
		}
	}
	return sc
}

// scoreUnseen judges a request of an endpoint without baseline: below a
// wildcard by how rarely new endpoints come, else not at all.
func (s *Scorer) scoreUnseen(sm *Sample) Score {
	sm.scored = false
	sc := Score{P: 1}
	if !sm.derived {
		return sc
	}
	sp := s.space(sm.space)
	if sp == nil {
		return sc
	}
	sp.mu.Lock()
	n, p := int(sp.life.N), sp.fresh.unseen()
	sc.Warm = sp.life.warm(sm.key.Warmup) && p < maxUnseen
	sp.mu.Unlock()
	if n == 0 {
		return sc
	}
	sc.P, sc.N = max(p, 1/float64(n+1)), n
	sc.Evidence = -math.Log2(sc.P)
	sc.Components[0] = Component{Part: PartEndpoint, Observed: sc.Evidence, P: sc.P}
	return sc
}

// Learn adds the request to its endpoint's baseline, as one of that
// identity. It must not be called for a request that was acted upon, nor for
// one that was refused. A request that does not fit a warm baseline is
// quarantined: it is learned only once enough distinct identities have sent
// its like. Score must have been called on sm before.
func (s *Scorer) Learn(sm *Sample, identity string) {
	who := s.hashString(tagIdentity, identity)
	now := sm.time.Unix()
	s.paced(sm, who, now)
	e := s.endpoint(sm.hash)
	if e == nil {
		if e = s.admit(sm, who, now); e == nil {
			return
		}
	} else if sm.derived {
		if sp := s.space(sm.space); sp != nil {
			sp.mu.Lock()
			if sp.life.admit(who, now, sm.key.Warmup) {
				sp.fresh.add(false)
			}
			sp.mu.Unlock()
		}
	}
	e.mu.Lock()
	e.learn(sm, who, now)
	e.mu.Unlock()
}

// admit creates the endpoint of sm, or returns nil where a bound or the
// quarantine of its space forbids that.
func (s *Scorer) admit(sm *Sample, who uint64, now int64) *endpoint {
	if sm.derived {
		sp := s.ensureSpace(sm)
		if sp == nil || !sp.admitNew(sm, who, now) {
			return nil
		}
	}
	sh := &s.shards[sm.hash%shardCount]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	old := *sh.m.Load()
	if e := old[sm.hash]; e != nil {
		return e
	}
	if s.count.Add(1) > maxEndpoints {
		s.count.Add(-1)
		s.full.Add(1)
		return nil
	}
	m := make(map[uint64]*endpoint, len(old)+1)
	maps.Copy(m, old)
	e := &endpoint{hash: sm.hash, space: sm.space, api: clip(sm.key.API), method: clip(sm.key.Method), name: sm.name()}
	m[sm.hash] = e
	sh.m.Store(&m)
	return e
}

func (s *Scorer) ensureSpace(sm *Sample) *space {
	if sp := s.space(sm.space); sp != nil {
		return sp
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := *s.spaces.Load()
	if sp := old[sm.space]; sp != nil {
		return sp
	}
	if len(old) >= maxSpaces {
		s.full.Add(1)
		return nil
	}
	m := make(map[uint64]*space, len(old)+1)
	maps.Copy(m, old)
	sp := &space{hash: sm.space, api: clip(sm.key.API)}
	m[sm.space] = sp
	s.spaces.Store(&m)
	return sp
}

// Explain writes the component as an operator reads it, without any value.
func (c *Component) Explain(n int) string {
	if c.Part == PartEndpoint {
		return fmt.Sprintf("endpoint never seen, p %.2g (n %d)", c.P, n)
	}
	of := ""
	if c.Parameter != "" {
		of = " of " + c.Parameter
	}
	return fmt.Sprintf("%s%s %.1f bits, expected up to %.1f, p %.2g (n %d)", c.Part, of, c.Observed, c.Expected, c.P, n)
}

func clip(s string) string {
	if len(s) > maxKeyLength {
		s = s[:maxKeyLength]
	}
	return string(append([]byte(nil), s...))
}
