// SPDX-License-Identifier: Apache-2.0

package control

import (
	"slices"
	"strings"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
)

const (
	hubKeeps     = 4096    // observations for those who come later
	hubBytes     = 8 << 20 // of their JSON
	maxJSON      = 64 << 10
	maxReaders   = 32
	readerBuffer = 1024
)

// Hub hands observations to whoever watches, and keeps the latest. A reader
// that is too slow loses, and is told how much; a writer never waits.
type Hub struct {
	mu      sync.Mutex
	ring    []*controlpb.Observation // oldest first
	bytes   int
	readers map[*reader]struct{}
	refused uint64 // too large
}

// NewHub returns an empty Hub.
func NewHub() *Hub { return &Hub{readers: map[*reader]struct{}{}} }

// Publish hands o to the readers. o must not be changed any more.
func (h *Hub) Publish(o *controlpb.Observation) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(o.Json) > maxJSON {
		h.refused++
		return
	}
	h.ring = append(h.ring, o)
	h.bytes += len(o.Json)
	for len(h.ring) > hubKeeps || h.bytes > hubBytes {
		h.bytes -= len(h.ring[0].Json)
		h.ring[0] = nil
		h.ring = h.ring[1:]
	}
	for r := range h.readers {
		r.offer(o)
	}
}

// Refused counts the observations that were too large to be kept or shown.
func (h *Hub) Refused() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.refused
}

// Watching says whether anybody follows: where nobody does, a costly
// observation need not be made.
func (h *Hub) Watching() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.readers) > 0
}

// reader is one that follows.
type reader struct {
	match func(*controlpb.Observation) bool
	ch    chan *controlpb.Observation
	lost  uint64 // under the hub's lock
}

// offer gives o to the reader if it matches and there is room.
func (r *reader) offer(o *controlpb.Observation) {
	if !r.match(o) {
		return
	}
	if r.lost > 0 {
		c := proto.CloneOf(o)
		c.Lost = r.lost
		o = c
	}
	select {
	case r.ch <- o:
		r.lost = 0
	default:
		r.lost++
	}
}

// subscribe returns what is kept and asked for, and, to follow, a reader that
// gets everything after it. nil without a reader where there are too many.
func (h *Hub) subscribe(q *controlpb.ObserveRequest) (kept []*controlpb.Observation, r *reader) {
	match := matcher(q.Filters)
	h.mu.Lock()
	defer h.mu.Unlock()
	last := int(q.Last)
	if last == 0 {
		switch {
		case q.SinceUnixNs != 0:
			last = hubKeeps
		case !q.Follow:
			last = 20
		}
	}
	for _, o := range slices.Backward(h.ring) {
		if len(kept) >= last || o.TimeUnixNs < q.SinceUnixNs {
			break
		}
		if match(o) {
			kept = append(kept, o)
		}
	}
	slices.Reverse(kept)
	if !q.Follow || len(h.readers) >= maxReaders {
		return kept, nil
	}
	r = &reader{match: match, ch: make(chan *controlpb.Observation, readerBuffer)}
	h.readers[r] = struct{}{}
	return kept, r
}

func (h *Hub) unsubscribe(r *reader) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.readers, r)
}

// fields are what a filter can name.
var fields = map[string]func(*controlpb.Observation) string{
	"kind":     (*controlpb.Observation).GetKind,
	"from":     (*controlpb.Observation).GetFrom,
	"to":       (*controlpb.Observation).GetTo,
	"decision": (*controlpb.Observation).GetDecision,
	"reason":   (*controlpb.Observation).GetReason,
	"stage":    (*controlpb.Observation).GetStage,
	"method":   (*controlpb.Observation).GetMethod,
	"path":     (*controlpb.Observation).GetPath,
	"policy":   (*controlpb.Observation).GetPolicy,
}

// matcher returns what tells whether an observation passes all filters, whose
// fields are known.
func matcher(filters []*controlpb.Filter) func(*controlpb.Observation) bool {
	return func(o *controlpb.Observation) bool {
		for _, f := range filters {
			v := fields[f.Field](o)
			hit := slices.ContainsFunc(f.Values, func(want string) bool {
				if prefix, ok := strings.CutSuffix(want, "*"); ok {
					return strings.HasPrefix(v, prefix)
				}
				return v == want
			})
			if hit == f.Negate {
				return false
			}
		}
		return true
	}
}
