// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// scanned is one cgroup while a table is made.
type scanned struct {
	Cgroup
	procs []int
	leaf  bool
	names []string
	bys   []string
	// narrowed says that those who claim it look at its processes.
	narrowed bool
	netns    map[uint64]bool
}

// scan looks at everything once. What it returns to be released is no longer
// in the table.
func (r *Recogniser) scan() (*Table, []*held) {
	r.mu.Lock()
	identities, of := r.identities, r.of
	r.mu.Unlock()
	s := scan{r: r, look: r.looker(), cgroups: map[string]*scanned{}, named: map[string]bool{}}
	r.watch.begin()
	for i := range identities {
		if !identities[i].All {
			s.identity(&identities[i])
		}
	}
	r.watch.end()
	s.withhold()
	for i := range identities {
		if identities[i].All {
			s.rest(&identities[i], identities)
		}
	}
	s.namespaces(identities)
	table, release := s.table()
	table.Of = of
	return table, release
}

type scan struct {
	r        *Recogniser
	look     looker
	cgroups  map[string]*scanned // by path beneath Root
	named    map[string]bool     // the identities that are looked for
	problems []string
}

func (s *scan) problem(format string, args ...any) {
	s.problems = append(s.problems, fmt.Sprintf(format, args...))
}

// identity finds the cgroups of one identity.
func (s *scan) identity(i *Identity) {
	s.named[i.Name] = true
	if err := i.valid(); err != nil {
		s.problem("%v", err)
		return
	}
	for _, root := range i.roots() {
		top := path.Join(s.r.opt.Scope, root)
		s.r.watch.ancestors(s.r.opt.Root, top)
		var found []*scanned
		err := s.walk(top, func(c *scanned) { found = append(found, c) })
		if err != nil {
			s.problem("%s: look at cgroup %s: %v", i.Name, top, err)
			if i.narrowed() {
				continue // what was not looked at would be taken for it: see withhold
			}
		}
		for _, c := range found {
			if i.narrowed() && !s.look.matchesAll(i, c.procs) {
				continue
			}
			c.names = append(c.names, i.Name)
			c.bys = append(c.bys, i.by())
			c.narrowed = c.narrowed || i.narrowed()
			c.Top = c.Top || c.Path == top
		}
	}
}

func (l looker) matchesAll(i *Identity, procs []int) bool {
	return len(procs) > 0 && len(procs) <= maxProcs && !slices.ContainsFunc(procs, func(pid int) bool { return l.mismatch(i, pid) != "" })
}

// withhold takes the identity from cgroups that would pass it on: to the
// kernel a cgroup without one is what the nearest above it is, and where
// processes are looked at, those beneath that did not match would match by
// that.
func (s *scan) withhold() {
	for _, p := range slices.Backward(slices.Sorted(maps.Keys(s.cgroups))) { // what is beneath comes first
		if c := s.cgroups[p]; len(c.names) > 0 || len(c.procs) == 0 {
			continue
		}
		for up := path.Dir(p); up != "/"; up = path.Dir(up) {
			c := s.cgroups[up]
			if c == nil || len(c.names) == 0 {
				continue
			}
			if c.narrowed {
				c.names, c.bys, c.Top = nil, nil, false
			}
			break
		}
	}
}

// maxRest bounds the cgroups that are recognised because nobody else is: they
// share the kernel's table with those that are somebody.
const maxRest = 4096

// rest finds the workloads of the identity that is all of them: the cgroups
// with processes that no other selects. None is among them that another
// identity's selector would narrow down, since what did not match is nobody; nor
// the agent's own, the root and what starts everything else; nor one above any
// of these, which to the kernel would be it too. They are not watched: the next
// rescan notices what changes.
func (s *scan) rest(i *Identity, all []Identity) {
	s.named[i.Name] = true
	apart := append([]string{"/init.scope"}, s.r.opt.Own...)
	for n := range all {
		for _, root := range all[n].roots() {
			apart = append(apart, path.Join(s.r.opt.Scope, root))
		}
	}
	seen, found := 0, 0
	err := filepath.WalkDir(filepath.Join(s.r.opt.Root, s.r.opt.Scope), func(full string, d fs.DirEntry, err error) error {
		p := path.Join("/", strings.TrimPrefix(full, s.r.opt.Root))
		switch {
		case err != nil && gone(err):
			return nil
		case err != nil:
			return err
		case !d.IsDir():
			return nil
		case slices.ContainsFunc(apart, func(a string) bool { return within(p, a) }):
			return fs.SkipDir
		}
		if seen++; seen > s.r.opt.MaxCgroups {
			return errTooMany
		}
		if p == "/" || s.cgroups[p] != nil || slices.ContainsFunc(apart, func(a string) bool { return within(a, p) }) {
			return nil
		}
		procs, err := processes(full)
		if err != nil || len(procs) == 0 {
			return nil //nolint:nilerr // it ended, or it has none
		}
		var st unix.Stat_t
		if unix.Lstat(full, &st) != nil {
			return nil // it ended
		}
		if found++; found > maxRest {
			return errTooMany
		}
		s.cgroups[p] = &scanned{Cgroup: Cgroup{ID: st.Ino, Path: p, Processes: len(procs), Top: true}, procs: procs, names: []string{i.Name}, bys: []string{i.by()}, netns: map[uint64]bool{}}
		return nil
	})
	if err != nil {
		s.problem("%s: look at all cgroups: %v", i.Name, err)
	}
}

// walk calls f with the cgroup at p and each one beneath it. One that ends
// meanwhile is no error.
func (s *scan) walk(p string, f func(*scanned)) error {
	c, err := s.cgroup(p)
	if err != nil {
		if gone(err) {
			return nil
		}
		return err
	}
	f(c)
	if c.leaf {
		return nil
	}
	entries, err := os.ReadDir(filepath.Join(s.r.opt.Root, p))
	if err != nil && !gone(err) {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := s.walk(path.Join(p, e.Name()), f); err != nil {
				return err
			}
		}
	}
	return nil
}

// cgroup reads one cgroup, once in a scan.
func (s *scan) cgroup(p string) (*scanned, error) {
	if c := s.cgroups[p]; c != nil {
		return c, nil
	}
	if len(s.cgroups) >= s.r.opt.MaxCgroups {
		return nil, errTooMany
	}
	full := filepath.Join(s.r.opt.Root, p)
	var st unix.Stat_t
	if err := unix.Lstat(full, &st); err != nil {
		return nil, err
	}
	// Watched before it is read: what changes in between is told.
	if s.r.watch.cgroup(full, st.Ino) {
		if err := unix.Lstat(full, &st); err != nil {
			return nil, err
		}
	}
	procs, err := processes(full)
	if err != nil {
		return nil, err
	}
	c := &scanned{Cgroup: Cgroup{ID: st.Ino, Path: p, Processes: len(procs)}, procs: procs, leaf: leaf(&st), netns: map[uint64]bool{}}
	s.cgroups[p] = c
	return c, nil
}

// table makes the table of what was found.
func (s *scan) table() (*Table, []*held) {
	t := &Table{}
	for _, p := range slices.Sorted(maps.Keys(s.cgroups)) {
		c := s.cgroups[p]
		if len(c.names) == 0 {
			continue
		}
		if len(c.names) == 1 {
			c.Identity, c.By = c.names[0], c.bys[0]
		} else {
			slices.Sort(c.names)
			c.Ambiguous = slices.Compact(c.names)
			if len(c.Ambiguous) == 1 { // by two ways of its own
				c.Identity, c.By, c.Ambiguous = c.Ambiguous[0], c.bys[0], nil
			}
		}
		c.Netns = slices.Sorted(maps.Keys(c.netns))
		t.Cgroups = append(t.Cgroups, c.Cgroup)
	}
	release := s.collect(t)
	slices.Sort(s.problems)
	t.Problems = slices.Compact(s.problems)
	return t, release
}

// Unrecognised is a cgroup with processes that no identity claims, and why
// not.
type Unrecognised struct {
	ID        uint64
	Path      string
	Processes int
	Nearest   string // the MachineIdentity that comes nearest, "" where none does
	Mismatch  string // the line of its selector that does not match
}

// maxUnrecognised bounds what Unrecognised returns.
const maxUnrecognised = 1000

// Unrecognised looks for workloads without identity in the scope, and for the
// identity that each is nearest to. truncated says that there are more.
func (r *Recogniser) Unrecognised() (all []Unrecognised, truncated bool, err error) {
	r.mu.Lock()
	identities, table := r.identities, r.table
	r.mu.Unlock()
	known := map[string]bool{}
	for _, c := range table.Cgroups {
		known[c.Path] = true
	}
	seen, look := 0, r.looker()
	err = filepath.WalkDir(filepath.Join(r.opt.Root, r.opt.Scope), func(full string, d fs.DirEntry, err error) error {
		if err != nil {
			if gone(err) {
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		if seen++; seen > r.opt.MaxCgroups || len(all) >= maxUnrecognised {
			truncated = true
			return fs.SkipAll
		}
		p := path.Join("/", strings.TrimPrefix(full, r.opt.Root))
		if known[p] {
			return nil
		}
		procs, err := processes(full)
		if err != nil || len(procs) == 0 {
			return nil //nolint:nilerr // it ended, or it has none
		}
		id, err := cgroupID(full)
		if err != nil {
			return nil //nolint:nilerr // it ended
		}
		u := Unrecognised{ID: id, Path: p, Processes: len(procs)}
		u.Nearest, u.Mismatch = look.nearest(identities, r.opt.Scope, p, procs)
		all = append(all, u)
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("look for workloads: %w", err)
	}
	return all, truncated, nil
}

// nearest returns the identity whose selector comes nearest to the cgroup at
// p, and what does not match.
func (l looker) nearest(identities []Identity, scope, p string, procs []int) (name, mismatch string) {
	relative := path.Join("/", strings.TrimPrefix(p, scope))
	best := 0.5 // less alike than that is no explanation
	for i := range identities {
		id := &identities[i]
		for _, root := range id.roots() {
			if within(relative, root) {
				for _, pid := range procs {
					if m := l.mismatch(id, pid); m != "" {
						return id.Name, m
					}
				}
				switch {
				case id.narrowed() && len(procs) > maxProcs:
					return id.Name, fmt.Sprintf("it has more than %d processes, too many to look at each", maxProcs)
				case id.narrowed() && len(procs) > 0:
					return id.Name, "a process in a cgroup beneath it does not match"
				}
			}
			score, text := likeness(relative, root), fmt.Sprintf("cgroup.path: is %q, want %q or beneath it", relative, root)
			if id.Unit != "" {
				text = fmt.Sprintf("systemd.unit: is %q, want %q", path.Base(relative), id.Unit)
				if path.Base(relative) == id.Unit {
					score = 1
					text = fmt.Sprintf("systemd.unit: %s runs at %q and not at %q; select it by cgroup.path", id.Unit, relative, root)
				}
			}
			if score > best {
				best, name, mismatch = score, id.Name, text
			}
		}
	}
	return name, mismatch
}

// likeness is 1 for equal paths and 0 for those with nothing in common: the
// share of what is the same at both ends.
func likeness(a, b string) float64 {
	n, short := 0, min(len(a), len(b))
	for n < short && a[n] == b[n] {
		n++
	}
	same := n
	for m := 1; m <= short-n && a[len(a)-m] == b[len(b)-m]; m++ {
		same++
	}
	return float64(same) / float64(max(len(a), len(b)))
}
