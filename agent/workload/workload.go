// SPDX-License-Identifier: Apache-2.0

// Package workload recognises workloads: which cgroups belong to which
// MachineIdentity, and in which network namespaces their processes live. The
// kernel half enforces by cgroup; so what is not recognised here has no
// identity, and what two identities claim has none either.
package workload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/agent/sockets"
)

// Options configure a Recogniser.
type Options struct {
	Root  string // where cgroup2 is mounted; found if empty
	Scope string // the subtree to look after, absolute beneath Root; "" or "/" is all of it
	// Rescan is how often everything is looked at without a cause: what no
	// notification tells (a process that joins, or that changes its
	// namespace) is noticed that late. 1 s if 0.
	Rescan time.Duration
	// Own are the agent's own cgroups, beneath Root: no workloads.
	Own        []string
	MaxCgroups int // cgroups in the table; 16384 if 0
	MaxWatches int // inotify watches; 8192 if 0. Beyond, changes are noticed at the next rescan
	Logger     *slog.Logger
}

// Cgroup is a recognised cgroup.
type Cgroup struct {
	ID   uint64
	Path string // beneath Root
	// Identity is whose it is, "" where several claim it: Ambiguous then
	// names them all.
	Identity  string
	Ambiguous []string
	By        string // the lines of the selector that matched
	Top       bool   // the selected cgroup itself, not one beneath it
	Processes int
	Netns     []uint64 // cookies of its processes' namespaces
	// Unconfined says that one of its processes may evade enforcement: it
	// shares the agent's namespace and has CAP_NET_RAW or CAP_SYS_ADMIN over
	// it.
	Unconfined bool
}

// Netns is a namespace in which identities live, or serve, or have served
// and may do so again.
type Netns struct {
	*sockets.Netns
	Identities []string // sorted
}

// Table is what is recognised at one moment. It is never changed; the
// namespaces in it stay open until the callback that is given the next table
// without them has returned.
type Table struct {
	Cgroups  []Cgroup // sorted by path
	Netns    []Netns  // sorted by cookie
	Problems []string // what could not be looked at, sorted
	// Of is what SetIdentities returned for the identities that were looked
	// for: a table of others says nothing about a plan.
	Of uint64
}

// Recogniser keeps the table.
type Recogniser struct {
	opt  Options
	own  *sockets.Netns
	wake chan struct{}
	// digests are of what workloads run, until Run returns.
	digests *digests

	mu         sync.Mutex
	of         uint64 // counts SetIdentities
	identities []Identity
	table      *Table

	// Of the one goroutine in Run.
	held  map[uint64]*held // by inode
	watch *watcher
	swept time.Time
}

// New returns a Recogniser that knows no identity yet.
func New(opt Options) (*Recogniser, error) {
	if opt.Root == "" {
		root, err := CgroupRoot()
		if err != nil {
			return nil, err
		}
		opt.Root = root
	}
	if opt.Scope == "" {
		opt.Scope = "/"
	}
	if !filepath.IsAbs(opt.Scope) || filepath.Clean(opt.Scope) != opt.Scope {
		return nil, fmt.Errorf("look after cgroups beneath %q: not a clean absolute path", opt.Scope)
	}
	if opt.Rescan == 0 {
		opt.Rescan = time.Second
	}
	if opt.MaxCgroups == 0 {
		opt.MaxCgroups = 16384
	}
	if opt.MaxWatches == 0 {
		opt.MaxWatches = 8192
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	own, err := sockets.Own()
	if err != nil {
		return nil, err
	}
	r := &Recogniser{opt: opt, own: own, wake: make(chan struct{}, 1), table: &Table{}, held: map[uint64]*held{}}
	r.digests = newDigests(r.Wake)
	return r, nil
}

// looker returns one for a scan that begins.
func (r *Recogniser) looker() looker { return looker{r.digests, mounts{}} }

// SetIdentities replaces the identities that are looked for, and returns what
// the tables of these will bear in Of. The next one follows at once.
func (r *Recogniser) SetIdentities(all []Identity) uint64 {
	r.mu.Lock()
	r.identities = slices.Clone(all)
	r.of++
	of := r.of
	r.mu.Unlock()
	r.Wake()
	return of
}

// Wake has everything looked at now.
func (r *Recogniser) Wake() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Table returns what was recognised last.
func (r *Recogniser) Table() *Table {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.table
}

// settle is the least time between two looks that changes cause: the first
// change is looked at at once, a burst of them together.
const settle = 5 * time.Millisecond

// patience is how long the first table of a set of identities waits for
// digests: at an agent's start, and where a digest is asked for anew, a workload
// that runs what it should is not to be nobody meanwhile. What was in force
// before stays so.
const patience = 3 * time.Second

// Run looks at the cgroups until ctx ends, and calls f with the first table
// and each that differs from the one before in more than numbers of processes.
// The namespaces of the last table are closed when it returns.
func (r *Recogniser) Run(ctx context.Context, f func(*Table)) error {
	w, err := newWatcher(r.opt.MaxWatches)
	if err != nil {
		// Slower, and no less right.
		r.opt.Logger.Warn("changes of cgroups are noticed late", "err", err, "rescan", r.opt.Rescan)
	}
	r.watch = w
	var release []*held // not in the next table, and to be closed when that is told
	defer func() {
		r.digests.close()
		w.close()
		for _, h := range slices.Concat(release, slices.Collect(maps.Values(r.held))) {
			h.ns.Close()
		}
		r.own.Close()
	}()
	tick := time.NewTicker(r.opt.Rescan)
	defer tick.Stop()
	var waits time.Time // since when a set's first table waits, zero if none does
	for first := true; ; {
		began := time.Now()
		next, gone := r.scan()
		release = append(release, gone...)
		var enough <-chan time.Time
		if waits.IsZero() {
			waits = began
		}
		if left := patience - began.Sub(waits); next.Of != r.table.Of && r.digests.busy() && left > 0 {
			enough = time.After(left)
		} else {
			waits = time.Time{}
			r.mu.Lock()
			changed := first || !next.same(r.table)
			r.table = next
			r.mu.Unlock()
			if changed {
				first = false
				f(next)
			}
			for _, h := range release {
				h.ns.Close()
			}
			release = nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-enough:
		case <-r.wake:
		case <-w.changed:
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(settle - time.Since(began)):
			}
		case err := <-w.failed:
			return err
		}
	}
}

// same says whether two tables tell the same, but for how many processes there
// are: that changes with every fork.
func (t *Table) same(o *Table) bool {
	return t.Of == o.Of && slices.EqualFunc(t.Cgroups, o.Cgroups, func(a, b Cgroup) bool {
		return a.ID == b.ID && a.Path == b.Path && a.Identity == b.Identity && a.By == b.By && a.Top == b.Top &&
			a.Unconfined == b.Unconfined && slices.Equal(a.Ambiguous, b.Ambiguous) && slices.Equal(a.Netns, b.Netns)
	}) && slices.EqualFunc(t.Netns, o.Netns, func(a, b Netns) bool {
		return a.Netns == b.Netns && slices.Equal(a.Identities, b.Identities)
	}) && slices.Equal(t.Problems, o.Problems)
}

// errTooMany stops a walk at its bound.
var errTooMany = errors.New("too many cgroups")
