// SPDX-License-Identifier: Apache-2.0

// Package hosts follows the addresses of the hosts that egress names.
package hosts

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Bounds of what is followed.
const (
	// Interval is how often a name is asked for.
	Interval = 30 * time.Second
	// Keep is how long an address counts that answers have stopped to show:
	// connections are made to what was answered a while ago, and large
	// services answer with another part of their addresses each time.
	Keep = 10 * time.Minute
	// MaxAddresses bounds the addresses of one name; the oldest go.
	MaxAddresses = 256

	timeout = 5 * time.Second // of one look-up
	atOnce  = 8               // look-ups
	hurry   = time.Second     // between two look-ups of all that were asked for
)

// Options are what a Follower needs from outside.
type Options struct {
	// Lookup resolves a name; nil: the machine's resolver.
	Lookup func(ctx context.Context, name string) ([]netip.Addr, error)
	// Changed is told that addresses have changed.
	Changed func()
	Now     func() time.Time // nil: time.Now
}

// Follower follows a set of names. It is safe for concurrent use.
type Follower struct {
	opt  Options
	soon chan struct{}

	mu    sync.Mutex
	names map[string]*name
}

type name struct {
	seen map[netip.Addr]time.Time // when an answer last had it
	err  error                    // of the last look-up
}

// New returns a follower; Run makes it work.
func New(opt Options) *Follower {
	if opt.Lookup == nil {
		opt.Lookup = func(ctx context.Context, name string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", name+".") // never a search domain's
		}
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	return &Follower{opt: opt, soon: make(chan struct{}, 1), names: map[string]*name{}}
}

// Set replaces the names, and has new ones looked up at once.
func (f *Follower) Set(list []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	names := make(map[string]*name, len(list))
	added := false
	for _, n := range list {
		if names[n] = f.names[n]; names[n] == nil {
			names[n], added = &name{seen: map[netip.Addr]time.Time{}}, true
		}
	}
	f.names = names
	if added {
		f.Soon()
	}
}

// Soon asks for a look-up of all names before it is their time, as where one
// has connected to an address that is not known yet.
func (f *Follower) Soon() {
	select {
	case f.soon <- struct{}{}:
	default:
	}
}

// Addresses returns what the names resolve to, in ascending order.
func (f *Follower) Addresses() map[string][]netip.Addr {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make(map[string][]netip.Addr, len(f.names))
	for n, x := range f.names {
		out[n] = slices.SortedFunc(maps.Keys(x.seen), netip.Addr.Compare)
	}
	return out
}

// Problem says which names do not resolve.
func (f *Follower) Problem() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for _, n := range slices.Sorted(maps.Keys(f.names)) {
		if err := f.names[n].err; err != nil {
			errs = append(errs, fmt.Errorf("resolve %s: %w", n, err))
		}
	}
	return errors.Join(errs...)
}

// Run looks names up until ctx ends.
func (f *Follower) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-f.soon:
		}
		if f.lookup(ctx) && f.opt.Changed != nil {
			f.opt.Changed()
		}
		// Not at once again, however often one asks.
		pause := time.NewTimer(hurry)
		select {
		case <-ctx.Done():
			pause.Stop()
			return
		case <-pause.C:
		}
		timer.Reset(Interval)
	}
}

// lookup looks all names up and says whether addresses have changed.
func (f *Follower) lookup(ctx context.Context) bool {
	f.mu.Lock()
	list := slices.Collect(maps.Keys(f.names))
	f.mu.Unlock()
	var wg sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	changed := false
	for _, n := range list {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			addresses, err := f.opt.Lookup(ctx, n)
			if f.note(n, addresses, err) {
				f.mu.Lock()
				changed = true
				f.mu.Unlock()
			}
		})
	}
	wg.Wait()
	return changed
}

var errNoAddress = errors.New("no address that may be connected to")

// note takes an answer over. What fails changes nothing: the addresses known
// before stay until an answer does without them for long enough.
func (f *Follower) note(n string, addresses []netip.Addr, err error) (changed bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	x := f.names[n]
	if x == nil {
		return false // nobody asks for it any more
	}
	if x.err = err; err != nil {
		return false
	}
	now := f.opt.Now()
	usable := false
	for _, a := range addresses {
		if a = a.Unmap(); !Usable(a) {
			continue
		}
		usable = true
		if _, known := x.seen[a]; !known {
			changed = true
		}
		x.seen[a] = now
	}
	if !usable {
		x.err = errNoAddress
	}
	for a, at := range x.seen {
		if now.Sub(at) > Keep {
			delete(x.seen, a)
			changed = true
		}
	}
	for len(x.seen) > MaxAddresses {
		oldest := slices.MinFunc(slices.Collect(maps.Keys(x.seen)), func(a, b netip.Addr) int {
			if c := x.seen[a].Compare(x.seen[b]); c != 0 {
				return c
			}
			return b.Compare(a)
		})
		delete(x.seen, oldest)
	}
	return changed
}

// Usable says whether an answer may open an address at all: a name must not
// lead to loopback, to the link (where metadata services are) or to many;
// nor, which the agent sees to, to another address of the node. Whoever means
// those writes the range.
func Usable(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !a.IsLinkLocalUnicast() &&
		a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}
