// SPDX-License-Identifier: Apache-2.0

package relation

import (
	"hash/maphash"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// model is one version of a relation model in use. A new version is another
// model, so a pointer to it is part of what a cached answer is held against.
type model struct {
	name string
	ids  atomic.Pointer[modelIDs] // nil while an engine elsewhere has not told them
	bound
	// closed are the types whose tuples matter to their own object alone: no
	// relation of the model reaches an object of theirs from another.
	closed map[string]bool
	leases bool // it has the condition lease
	// foreign says that it has other conditions, of whose changes with time
	// nothing is known.
	foreign bool

	replaced  atomic.Bool
	all       atomic.Uint64 // generation of every object
	objects   [stripes]atomic.Uint64
	lastWrite atomic.Int64 // Unix nanoseconds
	ends      leaseEnds
}

// modelIDs are OpenFGA's.
type modelIDs struct{ store, version string }

var stripeSeed = maphash.MakeSeed()

func (m *model) stripe(object string) *atomic.Uint64 {
	return &m.objects[maphash.String(stripeSeed, object)%stripes]
}

func (m *model) stamp(object string) stamp {
	return stamp{m.all.Load(), m.stripe(object).Load()}
}

// touch voids the answers that a change of these tuples can change. It runs
// after the change is stored: a question that began before it carries the old
// stamp, and one that carries the new stamp sees the change.
func (m *model) touch(tuples []Tuple) {
	for i := range tuples {
		if !m.closed[typeOf(tuples[i].Object)] {
			m.all.Add(1)
			return
		}
	}
	for i := range tuples {
		m.stripe(tuples[i].Object).Add(1)
	}
}

const (
	maxEnds  = 1 << 16 // ends of leases that are kept in memory
	lastYear = 2200    // ends after it are none: Unix nanoseconds end in 2262
)

// leaseEnds are the instants at which a lease of a model begins or ends.
// Those of deleted leases stay until they have passed: an answer then ends
// early, never late.
type leaseEnds struct {
	mu       sync.Mutex
	sorted   []int64 // Unix nanoseconds
	overflow bool    // there are more than are kept
}

func (l *leaseEnds) add(t *Tuple, now time.Time) {
	if !t.leased() {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, at := range [...]time.Time{t.NotBefore, t.Expires} {
		if at.IsZero() || !at.After(now) || at.Year() > lastYear {
			continue
		}
		ns := at.UnixNano()
		n, there := slices.BinarySearch(l.sorted, ns)
		if there {
			continue
		}
		if len(l.sorted) >= maxEnds {
			l.overflow = true
			continue
		}
		l.sorted = slices.Insert(l.sorted, n, ns)
	}
}

// next returns the first instant after now at which an answer may change by
// itself, zero if there is none.
func (l *leaseEnds) next(now time.Time) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, there := slices.BinarySearch(l.sorted, now.UnixNano())
	if there {
		n++
	}
	l.sorted = slices.Delete(l.sorted, 0, n)
	if l.overflow {
		return now.Add(time.Second)
	}
	if len(l.sorted) == 0 {
		return time.Time{}
	}
	return time.Unix(0, l.sorted[0])
}
