// SPDX-License-Identifier: Apache-2.0

package token

import (
	"context"
	"fmt"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func stale(keys *keySet, now time.Time) bool {
	return keys == nil || now.Sub(time.Unix(0, keys.fetched.Load())) > MaxKeyAge
}

// key finds the key of a token by its kid, which is never more than the key
// of a map. Keys that are missing, stale or do not hold the kid are asked for.
func (v *Verifier) key(i *issuer, keys *keySet, id string, now time.Time) (*key, flow.Reason, error) {
	if keys == nil {
		return nil, flow.ReasonTokenUnavailable, v.refresh(i, errKeysNever)
	}
	if stale(keys, now) {
		return nil, flow.ReasonTokenKeysStale, v.refresh(i, errKeysStale)
	}
	if id == "" {
		if keys.only == nil {
			return nil, flow.ReasonTokenKey, errNoKeyID
		}
		return keys.only, flow.ReasonOK, nil
	}
	if k := keys.byID[id]; k != nil {
		return k, flow.ReasonOK, nil
	}
	return nil, flow.ReasonTokenKey, v.refresh(i, errUnknownKey)
}

// refresh asks for an issuer's keys unless that was done within the last
// RefreshInterval, which also is how long an unknown kid stays unknown
// without a fetch. It returns the refusal's error.
func (v *Verifier) refresh(i *issuer, refusal error) error {
	now := v.opt.Now()
	i.mu.Lock()
	ask := i.asked.IsZero() || now.Sub(i.asked) >= RefreshInterval
	if ask {
		i.asked = now
		if i.waiting == nil {
			i.waiting = make(chan struct{})
		}
	}
	pending := i.waiting != nil
	i.mu.Unlock()
	if ask {
		i.refreshes.Add(1)
		v.opt.Refresh(i.Name)
	}
	if pending {
		return fmt.Errorf("%w: %w", refusal, ErrKeysPending)
	}
	return refusal
}

func (i *issuer) pending() chan struct{} {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.waiting
}

func (i *issuer) answered() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.waiting != nil {
		close(i.waiting)
		i.waiting = nil
	}
}

// Await blocks until the request for an issuer's keys is answered, by SetKeys
// or KeysFailed, or the context ends; then the token that was refused with
// ErrKeysPending may be verified once more. It returns at once where nothing
// is asked for.
func (v *Verifier) Await(ctx context.Context, name string) error {
	i := (*v.issuers.Load())[name]
	if i == nil {
		return fmt.Errorf("await keys of token issuer %q: there is none of that name", name)
	}
	waiting := i.pending()
	if waiting == nil {
		return nil
	}
	select {
	case <-waiting:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("await keys of token issuer %q: %w", name, ctx.Err())
	}
}
