// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Stream is a connection or stream that outlives the decision that allowed
// it.
type Stream struct {
	Subjects [4]string // of its decision
	Serial   string    // of the peer's certificate
	Issued   time.Time // of its decision: a subject revoked for what was issued before is not hit by it
	Until    time.Time // when what allowed it ends, zero if never
	// Carries says that others go over it, so that they are ended before: each
	// for its own reason, and not because this one is gone.
	Carries bool
	// Kill ends it for that reason. It is called once at most, from any
	// goroutine, and must not block.
	Kill func(flow.Reason)
	// Recheck has it judged again, since policies or relations changed: its
	// owner decides anew on its own loop and ends it where that refuses. It
	// is called from any goroutine and must not block. nil: it judges each
	// request anyway.
	Recheck func()
}

const liveShards = 32

// Live knows what is open, so that a revocation, a new policy or the end of
// a token reaches it.
type Live struct {
	next   atomic.Uint64
	shards [liveShards]liveShard
}

type liveShard struct {
	mu sync.Mutex
	m  map[uint64]*Stream
}

func newLive() *Live {
	l := &Live{}
	for i := range l.shards {
		l.shards[i].m = map[uint64]*Stream{}
	}
	return l
}

// Add registers a stream and returns the handle for Update and Remove. A
// revocation that came between the decision and Add is caught by comparing
// Pipeline.Generation before the decision and after Add.
func (l *Live) Add(s Stream) uint64 {
	h := l.next.Add(1)
	sh := &l.shards[h%liveShards]
	sh.mu.Lock()
	sh.m[h] = &s
	sh.mu.Unlock()
	return h
}

// Update replaces what a stream rests on, after a later decision.
func (l *Live) Update(h uint64, subjects [4]string, until time.Time) {
	sh := &l.shards[h%liveShards]
	sh.mu.Lock()
	if s := sh.m[h]; s != nil {
		s.Subjects, s.Until = subjects, until
	}
	sh.mu.Unlock()
}

// Remove forgets a stream that has ended.
func (l *Live) Remove(h uint64) {
	sh := &l.shards[h%liveShards]
	sh.mu.Lock()
	delete(sh.m, h)
	sh.mu.Unlock()
}

// Len is how many streams are registered.
func (l *Live) Len() int {
	n := 0
	for i := range l.shards {
		sh := &l.shards[i]
		sh.mu.Lock()
		n += len(sh.m)
		sh.mu.Unlock()
	}
	return n
}

// closeMatching ends the streams for which why gives a reason.
func (l *Live) closeMatching(why func(*Stream) flow.Reason) {
	type victim struct {
		kill   func(flow.Reason)
		reason flow.Reason
	}
	var carriers []victim
	for i := range l.shards {
		sh := &l.shards[i]
		var victims []victim
		sh.mu.Lock()
		for h, s := range sh.m {
			reason := why(s)
			switch {
			case reason == flow.ReasonOK:
				continue
			case s.Carries:
				carriers = append(carriers, victim{s.Kill, reason})
			default:
				victims = append(victims, victim{s.Kill, reason})
			}
			delete(sh.m, h)
		}
		sh.mu.Unlock()
		for _, v := range victims { // outside the lock: Kill may call Remove
			v.kill(v.reason)
		}
	}
	for _, v := range carriers {
		v.kill(v.reason)
	}
}

func (l *Live) recheckAll() {
	for i := range l.shards {
		sh := &l.shards[i]
		var all []func()
		sh.mu.Lock()
		for _, s := range sh.m {
			if s.Recheck != nil {
				all = append(all, s.Recheck)
			}
		}
		sh.mu.Unlock()
		for _, f := range all {
			f()
		}
	}
}

// closeExpired ends the streams whose time has come.
func (l *Live) closeExpired(now time.Time) {
	l.closeMatching(func(s *Stream) flow.Reason {
		if !s.Until.IsZero() && !now.Before(s.Until) {
			return flow.ReasonExpired
		}
		return flow.ReasonOK
	})
}

// Run ends streams whose time has come, once a second, until ctx ends.
func (p *Pipeline) Run(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			p.live.closeExpired(p.opt.Now())
		}
	}
}
