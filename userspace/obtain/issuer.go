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

	mu    sync.Mutex
	until time.Time     // no request before
	pause time.Duration // the last one
	why   error         // of it
}

func newIssuer() *issuer { return &issuer{slots: make(chan struct{}, atOnceOne)} }

// enter waits for its turn. An error says why there is none, and until when.
func (i *issuer) enter(ctx context.Context, s *Source) (until time.Time, err error) {
	select {
	case i.slots <- struct{}{}:
	case <-ctx.Done():
		return s.opt.Now(), ctx.Err()
	}
	i.mu.Lock()
	until, err = i.until, i.why
	i.mu.Unlock()
	if err != nil && s.opt.Now().Before(until) {
		<-i.slots
		return until, err
	}
	select {
	case s.slots <- struct{}{}:
		return time.Time{}, nil
	case <-ctx.Done():
		<-i.slots
		return s.opt.Now(), ctx.Err()
	}
}

// leave ends a request.
func (i *issuer) leave(s *Source) {
	<-s.slots
	<-i.slots
}

// silent notes that no answer came in time.
func (i *issuer) silent(now time.Time, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if now.Before(i.until) {
		return // another request has seen it
	}
	i.pause = min(max(2*i.pause, retryMin), retryMax)
	i.until, i.why = now.Add(i.pause), err
}

func (i *issuer) answered() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.pause, i.until, i.why = 0, time.Time{}, nil
}
