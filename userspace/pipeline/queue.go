// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const (
	queueSize  = 1024 // records of each kind that wait, a loop
	recentSize = 512  // refusals, and as many allowed calls, that can be explained, a loop
	slotKeep   = 4096 // bytes of a slot that are kept for reuse
)

// queue holds encoded records until the agent takes them. Refusals have a
// ring of their own, so that a flood of allowed calls cannot push one out.
type queue struct {
	mu       sync.Mutex // of the loop and the taker, never of two loops
	refusals ring
	allows   ring
}

type ring struct {
	slots       [][]byte
	first, used int
	lost        uint64
}

func (r *ring) put(rec *Record) {
	if r.used == queueSize {
		r.lost++
		return
	}
	if r.slots == nil {
		r.slots = make([][]byte, queueSize)
	}
	i := (r.first + r.used) % queueSize
	r.slots[i] = rec.Append(r.slots[i][:0])
	r.used++
}

func (r *ring) take(out [][]byte, limit int) [][]byte {
	for r.used > 0 && len(out) < limit {
		s := r.slots[r.first]
		out = append(out, slices.Clone(s))
		if cap(s) > slotKeep {
			r.slots[r.first] = nil
		}
		r.first = (r.first + 1) % queueSize
		r.used--
	}
	return out
}

func (q *queue) put(rec *Record, refusal bool) {
	q.mu.Lock()
	if refusal {
		q.refusals.put(rec)
	} else {
		q.allows.put(rec)
	}
	q.mu.Unlock()
}

// Wake is signalled when records wait.
func (p *Pipeline) Wake() <-chan struct{} { return p.wake }

// TakeRecords takes up to limit records, one JSON object each, refusals
// first, and how many were lost since the last call because the queues were
// full.
func (p *Pipeline) TakeRecords(limit int) (records [][]byte, lost uint64) {
	p.eachLoop(func(l *Loop) {
		l.queue.mu.Lock()
		records = l.queue.refusals.take(records, limit)
		lost += l.queue.refusals.lost + l.queue.allows.lost
		l.queue.refusals.lost, l.queue.allows.lost = 0, 0
		l.queue.mu.Unlock()
	})
	p.eachLoop(func(l *Loop) {
		l.queue.mu.Lock()
		records = l.queue.allows.take(records, limit)
		l.queue.mu.Unlock()
	})
	return records, lost
}

// Explained is a recent decision with its trace.
type Explained struct {
	Record
	Steps []ExplainedStep `json:"steps,omitempty"`
}

// ExplainedStep is what one stage found.
type ExplainedStep struct {
	Stage     string      `json:"stage"`
	Reason    flow.Reason `json:"reason,omitempty"`
	Detail    string      `json:"detail,omitempty"`
	Rule      string      `json:"rule,omitempty"`
	TookNanos int64       `json:"tookNanos"`
}

// recent is a ring of the last decisions with a trace.
type recent struct {
	mu    sync.Mutex
	items []Explained
	next  int
}

func (r *recent) put(rec *Record, steps []flow.Step) {
	e := Explained{Record: *rec}
	// These alias the request's buffer.
	e.RequestID, e.Method = strings.Clone(rec.RequestID), strings.Clone(rec.Method)
	for i := range steps {
		s := &steps[i]
		e.Steps = append(e.Steps, ExplainedStep{s.Stage.String(), s.Reason, s.Detail, s.Rule, s.Took.Nanoseconds()})
	}
	r.mu.Lock()
	if len(r.items) < recentSize {
		r.items = append(r.items, e)
	} else {
		r.items[r.next] = e
		r.next = (r.next + 1) % recentSize
	}
	r.mu.Unlock()
}

// KeptAllows is how many allowed calls a second can be explained: the first of
// a loop in each.
const KeptAllows = 50

// keeps says whether the trace of another allowed call is kept, should it be
// recorded.
func (l *Loop) keeps(now time.Time) bool {
	// What waited meanwhile has an older time; a clock may be set back.
	if second := now.Unix(); second > l.second || second < l.second-60 {
		l.second, l.kept = second, 0
	}
	return l.kept < KeptAllows
}

// Explain returns a recent decision by its request id: refusals, and of the
// allowed calls KeptAllows a second, while tracing is on all, the last 512 each
// of each loop.
func (p *Pipeline) Explain(id string) (Explained, bool) {
	var out Explained
	found := false
	p.eachLoop(func(l *Loop) {
		for _, r := range []*recent{&l.refused, &l.allowed} {
			r.mu.Lock()
			for i := range r.items {
				if !found && r.items[i].RequestID == id {
					out, found = r.items[i], true
				}
			}
			r.mu.Unlock()
		}
	})
	return out, found
}
