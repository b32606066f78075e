// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Counter is how many decisions ended alike. Its labels are bounded: each
// reason belongs to about one stage.
type Counter struct {
	Stage    flow.Stage
	Reason   flow.Reason
	Effect   flow.Effect
	Enforced bool
	Count    uint64
}

// LatencyBounds are the upper bounds of Counters.Latency, the last bucket
// being open.
var LatencyBounds = [...]time.Duration{
	10 * time.Microsecond, 25 * time.Microsecond, 50 * time.Microsecond, 100 * time.Microsecond, 250 * time.Microsecond,
	time.Millisecond, 5 * time.Millisecond, 25 * time.Millisecond, 100 * time.Millisecond, time.Second,
}

// Counters are all loops' counts since the start.
type Counters struct {
	Decisions    []Counter
	Latency      [len(LatencyBounds) + 1]uint64
	LatencyTotal time.Duration
	Recalled     uint64 // answers of a while ago that stood in for a stage
	Streams      int    // registered live
}

// maxKinds bounds how many kinds of refusal are told apart; reasons are
// constants of this program, so it is not reached.
const maxKinds = 1024

type counterKey struct {
	stage    flow.Stage
	reason   flow.Reason
	effect   flow.Effect
	enforced bool
}

// counters are one loop's. The loop alone writes; it takes the lock only to
// add a kind of refusal, and reads the map without it.
type counters struct {
	allowed  [flow.StageCount][2]atomic.Uint64 // by enforced
	mu       sync.Mutex
	refused  map[counterKey]*atomic.Uint64
	latency  [len(LatencyBounds) + 1]atomic.Uint64
	total    atomic.Int64
	recalled atomic.Uint64
}

func (c *counters) init() { c.refused = map[counterKey]*atomic.Uint64{} }

func (c *counters) add(d *flow.Decision, took time.Duration) {
	i := 0
	for i < len(LatencyBounds) && took > LatencyBounds[i] {
		i++
	}
	c.latency[i].Add(1)
	c.total.Add(int64(took))
	if d.Effect == flow.EffectAllow {
		c.allowed[min(d.Stage, flow.StageCount-1)][enforcedIndex(d.Enforced)].Add(1)
		return
	}
	k := counterKey{d.Stage, d.Reason, d.Effect, d.Enforced}
	n := c.refused[k]
	if n == nil {
		n = c.addKind(k)
	}
	n.Add(1)
}

func (c *counters) addKind(k counterKey) *atomic.Uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.refused) >= maxKinds {
		k = counterKey{k.stage, flow.ReasonInternal, flow.EffectDeny, k.enforced}
	}
	n := c.refused[k]
	if n == nil {
		n = new(atomic.Uint64)
		c.refused[k] = n
	}
	return n
}

func enforcedIndex(enforced bool) int {
	if enforced {
		return 1
	}
	return 0
}

// Counters adds up the loops' counts.
func (p *Pipeline) Counters() Counters {
	out := Counters{Streams: p.live.Len()}
	sums := map[counterKey]uint64{}
	p.eachLoop(func(l *Loop) {
		c := &l.counts
		for stage := range c.allowed {
			for e := range c.allowed[stage] {
				if n := c.allowed[stage][e].Load(); n > 0 {
					sums[counterKey{stage: flow.Stage(stage), enforced: e == 1}] += n
				}
			}
		}
		c.mu.Lock()
		for k, n := range c.refused {
			sums[k] += n.Load()
		}
		c.mu.Unlock()
		for i := range c.latency {
			out.Latency[i] += c.latency[i].Load()
		}
		out.Recalled += c.recalled.Load()
		out.LatencyTotal += time.Duration(c.total.Load())
	})
	for k, n := range sums {
		out.Decisions = append(out.Decisions, Counter{k.stage, k.reason, k.effect, k.enforced, n})
	}
	slices.SortFunc(out.Decisions, func(a, b Counter) int {
		return cmp.Or(cmp.Compare(a.Stage, b.Stage), cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.Effect, b.Effect),
			cmp.Compare(enforcedIndex(a.Enforced), enforcedIndex(b.Enforced)))
	})
	return out
}
