// SPDX-License-Identifier: Apache-2.0

package obtain

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/identity"
)

// keeper keeps one want: a token for each leaf of the identity that has not
// expired, since tunnels live on under the leaf that they were made with.
type keeper struct {
	s       *Source
	issuer  *issuer
	want    Want
	ctx     context.Context
	stop    context.CancelFunc
	tokens  atomic.Pointer[[]Token] // by age of their leaves, the newest last
	failure atomic.Pointer[string]
	tried   chan struct{} // closed once the first try has ended
	held    []*held       // of run alone
}

// held is what is kept for one leaf.
type held struct {
	leaf  *identity.Leaf
	token *Token
	due   time.Time
	retry time.Duration
}

func newKeeper(s *Source, i *issuer, w Want) *keeper {
	k := &keeper{s: s, issuer: i, want: w, tried: make(chan struct{})}
	k.ctx, k.stop = context.WithCancel(s.ctx)
	k.tokens.Store(&[]Token{})
	return k
}

// run is the keeper's life.
func (k *keeper) run() {
	defer k.stop()
	for {
		changed, known := k.s.opt.Leaves.Changed(k.want.ID)
		now := k.s.opt.Now()
		k.follow(now)
		for _, h := range slices.Backward(k.held) { // what new connections use first
			if !now.Before(h.due) {
				k.renew(h)
			}
		}
		wait := time.NewTimer(k.idle(known))
		select {
		case <-changed:
		case <-wait.C:
		case <-k.ctx.Done():
			wait.Stop()
			return
		}
		wait.Stop()
	}
}

// follow takes up the identity's leaf and drops those that have expired.
func (k *keeper) follow(now time.Time) {
	before := len(k.held)
	k.held = slices.DeleteFunc(k.held, func(h *held) bool { return !now.Before(h.leaf.NotAfter) })
	leaf, err := k.s.opt.Leaves.Get(k.want.ID)
	if err == nil && !slices.ContainsFunc(k.held, func(h *held) bool { return h.leaf == leaf }) {
		k.held = append(k.held, &held{leaf: leaf, retry: retryMin})
		if len(k.held) > maxHeld {
			k.held = slices.Delete(k.held, 0, 1)
		}
	}
	if err != nil && !errors.Is(err, identity.ErrUnsigned) {
		k.failed(err)
	}
	if len(k.held) < before {
		k.publish()
	}
}

// idle is how long nothing is to be done.
func (k *keeper) idle(known bool) time.Duration {
	if len(k.held) == 0 {
		if known {
			return time.Minute // a leaf will say so
		}
		return lookAgain
	}
	due := k.held[0].due
	for _, h := range k.held {
		due = earlier(due, earlier(h.due, h.leaf.NotAfter))
	}
	return min(max(due.Sub(k.s.opt.Now()), 0), time.Minute)
}

func (k *keeper) renew(h *held) {
	leave, until, err := k.issuer.enter(k.ctx, k.s)
	if err != nil {
		// Another's try has shown that it does not answer.
		h.due = until.Add(rand.N(retryMin))
		k.failed(err)
		return
	}
	began := k.s.opt.Now() // a token's life may begin as soon
	ctx, cancel := context.WithTimeout(k.ctx, k.s.timeout)
	value, life, err := k.s.request(ctx, &k.want, h.leaf)
	silent := err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded)
	cancel()
	now := k.s.opt.Now()
	switch { // before another has its turn
	case silent:
		k.issuer.silent(now, err)
	case k.ctx.Err() == nil:
		k.issuer.answered()
	}
	leave()
	switch {
	case k.ctx.Err() != nil:
		return
	case err != nil:
		k.s.opt.Log.Warn("token not obtained", "identity", k.want.ID, "to", k.want.To, "issuer", k.want.Issuer, "error", err, "retry", h.retry)
		h.due, h.retry = now.Add(h.retry/2+rand.N(h.retry)), min(2*h.retry, retryMax)
		k.failed(err)
		return
	}
	h.token = &Token{Field: append([]byte("Bearer "), value...), Thumbprint: h.leaf.Thumbprint, Expires: began.Add(life)}
	h.retry = retryMin
	if h.due = now.Add(max(life/2, retryMin)); !h.token.Expires.Before(h.leaf.NotAfter) {
		h.due = h.leaf.NotAfter // it outlives the leaf
	}
	k.failure.Store(nil)
	k.publish()
	k.first()
}

func (k *keeper) failed(err error) {
	text := err.Error()
	k.failure.Store(&text)
	k.first()
}

// first notes that there was a try.
func (k *keeper) first() {
	select {
	case <-k.tried:
	default:
		close(k.tried)
	}
}

// publish makes what is held known.
func (k *keeper) publish() {
	list := make([]Token, 0, len(k.held))
	for _, h := range k.held {
		if h.token != nil {
			list = append(list, *h.token)
		}
	}
	k.tokens.Store(&list)
	k.s.watchers.tell(key{k.want.ID, k.want.To})
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// errorf says whom was asked.
func errorf(want *Want, format string, a ...any) error {
	return fmt.Errorf("ask %s for a token: %w", want.Issuer, fmt.Errorf(format, a...))
}
