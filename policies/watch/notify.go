// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"log/slog"
	"os"

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
}

const watched = unix.IN_CLOSE_WRITE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM |
	unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

func newNotifier(dir string, logger *slog.Logger) *notifier {
	n := &notifier{dir: dir, changes: make(chan struct{}, 1), wd: -1, done: make(chan struct{})}
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

// forward turns notifications into at most one pending change. What they
// say does not matter: the folder is read whole.
func (n *notifier) forward() {
	defer close(n.done)
	buf := make([]byte, 16<<10)
	for {
		if _, err := n.file.Read(buf); err != nil {
			return
		}
		select {
		case n.changes <- struct{}{}:
		default:
		}
	}
}

// watch makes sure that the folder which bears the name now is the one that
// is watched, and says whether there is one.
func (n *notifier) watch() bool {
	var st unix.Stat_t
	if err := unix.Stat(n.dir, &st); err != nil {
		n.forget()
		return false
	}
	if n.file == nil || n.wd >= 0 && st.Ino == n.inode && st.Dev == n.dev {
		return true
	}
	n.forget()
	n.control(func(fd int) {
		wd, err := unix.InotifyAddWatch(fd, n.dir, watched)
		if err != nil {
			return // polling sees the folder
		}
		n.wd, n.inode, n.dev = wd, st.Ino, st.Dev
	})
	return true
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
