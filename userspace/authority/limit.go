// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"time"
)

// The rates: what one source, and all together, may ask for.
const (
	sourceRate  = 1.0 // a second
	sourceBurst = 20
	totalRate   = 50.0
	totalBurst  = 200
	buckets     = 4096
)

// limiter is a table of token buckets of fixed size: sources fall into it by
// a keyed hash, so that nobody can make it grow or choose whose bucket to
// share. An IPv6 source is its /64.
type limiter struct {
	mu      sync.Mutex
	seed    maphash.Seed
	total   bucket
	sources [buckets]bucket
}

type bucket struct {
	left float64
	at   time.Time
}

func newLimiter(now time.Time) *limiter {
	l := &limiter{seed: maphash.MakeSeed(), total: bucket{totalBurst, now}}
	for i := range l.sources {
		l.sources[i] = bucket{sourceBurst, now}
	}
	return l
}

func (l *limiter) allow(source netip.Addr, now time.Time) bool {
	source = source.Unmap().WithZone("")
	if source.Is6() {
		if prefix, err := source.Prefix(64); err == nil {
			source = prefix.Addr()
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sources[maphash.Comparable(l.seed, source)%buckets].take(now, sourceRate, sourceBurst) &&
		l.total.take(now, totalRate, totalBurst)
}

func (b *bucket) take(now time.Time, rate, burst float64) bool {
	if passed := now.Sub(b.at).Seconds(); passed > 0 {
		b.left = min(burst, b.left+passed*rate)
		b.at = now
	}
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}
