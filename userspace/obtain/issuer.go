// SPDX-License-Identifier: Apache-2.0

package obtain

import (
	"context"
	"sync"
	"time"
)

// endpoint is where tokens are asked for.
type endpoint struct{ issuer, url string }

// issuer is what requests to one endpoint share: their number is bounded, and
// one that does not answer is left alone for a while, so that it keeps nobody
// from another.
type issuer struct {
	slots chan struct{}
	trial chan struct{} // of those slots, while it does not answer

	mu      sync.Mutex
	answers bool
	until   time.Time     // no request before
	pause   time.Duration // the last one
	why     error         // of it
}

func newIssuer() *issuer {
	return &issuer{slots: make(chan struct{}, atOnceOne), trial: make(chan struct{}, atOnceNew)}
}

// enter waits for its turn, and returns what ends it. An error says why there
// is none, and until when.
func (i *issuer) enter(ctx context.Context, s *Source) (leave func(), until time.Time, err error) {
	var held []chan struct{}
	leave = func() {
		for _, slots := range held {
			<-slots
		}
	}
	take := func(slots chan struct{}) bool {
		select {
		case slots <- struct{}{}:
			held = append(held, slots)
			return true
		case <-ctx.Done():
			return false
		}
	}
	gone := func() (func(), time.Time, error) {
		leave()
		return nil, s.opt.Now(), ctx.Err()
	}
	if !take(i.slots) {
		return gone()
	}
	if answers, _, _ := i.state(); !answers && !take(i.trial) {
		return gone()
	}
	if _, until, why := i.state(); s.opt.Now().Before(until) {
		leave()
		return nil, until, why
	}
	if !take(s.slots) {
		return gone()
	}
	return leave, time.Time{}, nil
}

func (i *issuer) state() (answers bool, until time.Time, why error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.answers, i.until, i.why
}

// silent notes that no answer came in time.
func (i *issuer) silent(now time.Time, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.answers = false; now.Before(i.until) {
		return // another request has seen it
	}
	i.pause = min(max(2*i.pause, retryMin), retryMax)
	i.until, i.why = now.Add(i.pause), err
}

func (i *issuer) answered() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.answers, i.pause, i.until, i.why = true, 0, time.Time{}, nil
}
