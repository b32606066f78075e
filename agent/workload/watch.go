// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// watcher tells that something beneath the watched paths has changed; not
// what. Only as many are watched as allowed: the rescan finds the rest.
type watcher struct {
	file    *os.File // nil where the kernel has no more to give
	max     int
	changed chan struct{}
	failed  chan error

	watches map[string]int32  // path -> watch descriptor
	cgroups map[string]uint64 // watched cgroup -> its id
	used    map[string]bool   // in the scan under way
}

// newWatcher returns a watcher that works, or one that watches nothing and why.
func newWatcher(most int) (*watcher, error) {
	w := &watcher{
		changed: make(chan struct{}, 1), failed: make(chan error, 1),
		watches: map[string]int32{}, cgroups: map[string]uint64{},
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return w, fmt.Errorf("watch cgroups: %w; raise fs.inotify.max_user_instances", err)
	}
	w.file, w.max = os.NewFile(uintptr(fd), "inotify"), most
	go w.read()
	return w, nil
}

// read turns any number of events into one wake-up.
func (w *watcher) read() {
	buf := make([]byte, 64<<10)
	for {
		if _, err := w.file.Read(buf); err != nil {
			if !errors.Is(err, os.ErrClosed) {
				w.failed <- fmt.Errorf("watch cgroups: %w", err)
			}
			return
		}
		select {
		case w.changed <- struct{}{}:
		default:
		}
	}
}

func (w *watcher) close() {
	if w.file != nil {
		w.file.Close()
	}
}

// begin starts a scan: what is not added again until end is watched no more.
func (w *watcher) begin() { w.used = map[string]bool{} }

// add watches a path, if it is there and the bound allows.
func (w *watcher) add(p string, events uint32) {
	if w.used[p] || len(w.used) >= w.max {
		return
	}
	raw, err := w.file.SyscallConn()
	if err != nil {
		return
	}
	wd := -1
	ctl := raw.Control(func(fd uintptr) { wd, err = unix.InotifyAddWatch(int(fd), p, events|unix.IN_DONT_FOLLOW) })
	if ctl == nil && err == nil {
		// The same inode keeps its descriptor; a path that was made again
		// gets another.
		w.watches[p], w.used[p] = int32(wd), true
	}
}

// cgroup watches the cgroup at p for children and for its first and last
// process, unless that very one is watched already; added says whether it had
// to.
func (w *watcher) cgroup(p string, id uint64) (added bool) {
	events := filepath.Join(p, "cgroup.events")
	if w.cgroups[p] == id {
		w.used[p], w.used[events] = true, true
		return false
	}
	w.add(p, unix.IN_CREATE|unix.IN_DELETE|unix.IN_DELETE_SELF)
	w.add(events, unix.IN_MODIFY)
	if w.used[p] && w.used[events] {
		w.cgroups[p] = id
	}
	return true
}

// ancestors watches the directories from the root down to the parent of p
// for their children.
func (w *watcher) ancestors(root, p string) {
	for d := path.Dir(p); ; d = path.Dir(d) {
		w.add(filepath.Join(root, d), unix.IN_CREATE|unix.IN_DELETE|unix.IN_DELETE_SELF)
		if d == "/" {
			return
		}
	}
}

func (w *watcher) end() {
	for p, wd := range w.watches {
		if w.used[p] {
			continue
		}
		delete(w.watches, p)
		delete(w.cgroups, p)
		raw, err := w.file.SyscallConn()
		if err == nil {
			// A path that is gone has taken its watch along: EINVAL.
			_ = raw.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) })
		}
	}
}
