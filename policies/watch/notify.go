// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// notifier tells that something in a folder may have changed. Without
// inotify it tells nothing, and polling has to do.
type notifier struct {
	dir     string
	changes chan struct{}
	file    *os.File // nil without inotify
	wd      int      // -1 while nothing is watched
	inode   uint64   // of the watched folder
	dev     uint64
	done    chan struct{}

	mu sync.Mutex
	// writing are the files that were written to and are still open for it.
	writing map[string]struct{}
	gone    int // the watch that went with its folder last, -1 for none
}

// maxWriting bounds how many files are followed while they are written.
const maxWriting = 1000

const watched = unix.IN_CLOSE_WRITE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM |
	unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

func newNotifier(dir string, logger *slog.Logger) *notifier {
	n := &notifier{dir: dir, changes: make(chan struct{}, 1), wd: -1, gone: -1, done: make(chan struct{}), writing: map[string]struct{}{}}
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		logger.Warn("watch policy folder: no inotify, polling alone; raise fs.inotify.max_user_instances", "error", err)
		close(n.done)
		return n
	}
	n.file = os.NewFile(uintptr(fd), "inotify")
	go n.forward()
	return n
}

// forward turns notifications into at most one pending change. All that is
// taken from them is which files are being written: the folder is read whole.
func (n *notifier) forward() {
	defer close(n.done)
	buf := make([]byte, 16<<10)
	for {
		size, err := n.file.Read(buf)
		if err != nil {
			return
		}
		n.follow(buf[:size])
		select {
		case n.changes <- struct{}{}:
		default:
		}
	}
}

// follow notes of a buffer of inotify_event structs, inotify(7), which files
// are written to and which are closed again or gone.
func (n *notifier) follow(events []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for len(events) >= unix.SizeofInotifyEvent {
		wd, mask := int(int32(binary.NativeEndian.Uint32(events))), binary.NativeEndian.Uint32(events[4:])
		size := binary.NativeEndian.Uint32(events[12:])
		events = events[unix.SizeofInotifyEvent:]
		if uint64(size) > uint64(len(events)) {
			return
		}
		name := string(bytes.TrimRight(events[:size], "\x00"))
		events = events[size:]
		if mask&unix.IN_IGNORED != 0 {
			n.gone = wd
		}
		switch {
		case mask&(unix.IN_Q_OVERFLOW|unix.IN_IGNORED) != 0:
			clear(n.writing)
		case mask&(unix.IN_CLOSE_WRITE|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO) != 0:
			delete(n.writing, name)
		case mask&unix.IN_MODIFY != 0 && len(n.writing) < maxWriting:
			n.writing[name] = struct{}{}
		}
	}
}

// busy says whether a file is being written: closing it is a change that is
// still to come.
func (n *notifier) busy() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.writing) > 0
}

// watch makes sure that the folder which bears the name now is the one that
// is watched, and says whether there is one, and whether it is another than
// before. One that is made again may have the number of the old one.
func (n *notifier) watch() (there, another bool) {
	var st unix.Stat_t
	if err := unix.Stat(n.dir, &st); err != nil {
		n.forget()
		return false, false
	}
	n.mu.Lock()
	same := st.Ino == n.inode && st.Dev == n.dev && (n.wd < 0 || n.gone != n.wd)
	n.mu.Unlock()
	if n.file == nil || n.wd >= 0 && same {
		return true, false
	}
	n.forget()
	n.control(func(fd int) {
		wd, err := unix.InotifyAddWatch(fd, n.dir, watched)
		if err != nil {
			return // polling sees the folder
		}
		n.wd = wd
	})
	n.inode, n.dev = st.Ino, st.Dev
	return true, !same
}

func (n *notifier) forget() {
	if n.wd < 0 {
		return
	}
	n.control(func(fd int) {
		// EINVAL where the folder is gone and took its watch along.
		_, _ = unix.InotifyRmWatch(fd, uint32(n.wd))
	})
	n.wd = -1
	n.mu.Lock()
	clear(n.writing)
	n.mu.Unlock()
}

func (n *notifier) control(f func(fd int)) {
	c, err := n.file.SyscallConn()
	if err != nil {
		return
	}
	_ = c.Control(func(fd uintptr) { f(int(fd)) }) // fails only on a closed file
}

func (n *notifier) close() {
	if n.file != nil {
		_ = n.file.Close() // wakes forward
	}
	<-n.done
}
