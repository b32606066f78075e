// SPDX-License-Identifier: Apache-2.0

package sockets

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Adopted is a listening socket that somebody else made, with a descriptor of
// ours on it.
type Adopted struct {
	Listening
	PID int // of the process that it was taken from
	FD  int // the holder's, close-on-exec
}

// Adopt finds the listening sockets of the namespace on ports whose maker's
// cgroup owned says is the right one, and gets a descriptor on each from a
// process that holds it (pidfd_getfd(2), 5.6; CAP_SYS_PTRACE). A socket whose
// process ended meanwhile is left out. The descriptors are the caller's, to
// be closed as soon as the socket is registered: held, they would keep a port
// open whose server is gone.
func (n *Netns) Adopt(ports []uint16, owned func(cgroup uint64) bool) ([]Adopted, error) {
	all, err := n.Listening()
	if err != nil {
		return nil, err
	}
	want := map[uint64]Listening{}
	for _, l := range all {
		if l.Cgroup != 0 && slices.Contains(ports, l.Address.Port()) && owned(l.Cgroup) {
			want[l.Inode] = l
		}
	}
	if len(want) == 0 {
		return nil, nil
	}
	var got []Adopted
	err = walkSockets(n.holds, func(pid, fd int, inode uint64) (bool, error) {
		l, ok := want[inode]
		if !ok {
			return len(want) > 0, nil
		}
		mine, err := duplicateFrom(pid, fd, l.Cookie)
		if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EBADF) || errors.Is(err, errOther) {
			return true, nil
		}
		if err != nil {
			return false, fmt.Errorf("adopt %s of process %d in netns %s: %w", l.Address, pid, n.name, err)
		}
		delete(want, inode)
		got = append(got, Adopted{l, pid, mine})
		return len(want) > 0, nil
	})
	if err != nil {
		for _, a := range got {
			unix.Close(a.FD)
		}
		return nil, err
	}
	return got, nil
}

var errOther = errors.New("another socket")

// duplicateFrom gets a descriptor on descriptor fd of process pid, and makes
// sure that it is the socket with that cookie: the process may have closed it
// and opened another meanwhile.
func duplicateFrom(pid, fd int, cookie uint64) (int, error) {
	p, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(p)
	mine, err := unix.PidfdGetfd(p, fd, 0)
	if err != nil {
		return -1, err
	}
	if got, err := unix.GetsockoptUint64(mine, unix.SOL_SOCKET, unix.SO_COOKIE); err != nil || got != cookie {
		unix.Close(mine)
		return -1, errOther
	}
	return mine, nil
}

// holder names who holds the listening socket that a is in conflict with.
func (n *Netns) holder(a netip.AddrPort) string {
	all, err := n.Listening()
	if err != nil {
		return ""
	}
	i := slices.IndexFunc(all, func(l Listening) bool {
		same := l.Address.Addr() == a.Addr() || l.Address.Addr().IsUnspecified() || a.Addr().IsUnspecified()
		return l.Address.Port() == a.Port() && same
	})
	if i < 0 {
		return ""
	}
	who := ""
	_ = walkSockets(func(string) bool { return true }, func(pid, _ int, inode uint64) (bool, error) {
		if inode != all[i].Inode {
			return true, nil
		}
		proc := filepath.Join("/proc", strconv.Itoa(pid))
		name, _ := os.ReadFile(filepath.Join(proc, "comm"))
		who = fmt.Sprintf("%s (pid %d, cgroup %s)", strings.TrimSpace(string(name)), pid, cgroupOf(proc))
		return false, nil
	})
	return who
}

// cgroupOf returns the cgroup2 path of the process at proc, "?" if it is
// gone.
func cgroupOf(proc string) string {
	b, _ := os.ReadFile(filepath.Join(proc, "cgroup"))
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return path
		}
	}
	return "?"
}

// holds says whether the process at proc is in the namespace: a server that
// is in another than its socket is not looked for.
func (n *Netns) holds(proc string) bool {
	link, err := os.Readlink(proc + "/ns/net")
	return err == nil && link == fmt.Sprintf("net:[%d]", n.inode)
}

// walkSockets calls f with every socket descriptor of the processes that look
// says to look at, until it returns false or an error. Processes that end
// meanwhile are passed over.
func walkSockets(look func(proc string) bool, f func(pid, fd int, inode uint64) (more bool, err error)) error {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil { // not a process
			continue
		}
		proc := filepath.Join("/proc", p.Name())
		if !look(proc) {
			continue
		}
		dir := filepath.Join(proc, "fd")
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, d := range fds {
			link, err := os.Readlink(filepath.Join(dir, d.Name()))
			if err != nil {
				continue
			}
			inode, ok := socketInode(link)
			if !ok {
				continue
			}
			fd, err := strconv.Atoi(d.Name())
			if err != nil {
				continue
			}
			if more, err := f(pid, fd, inode); err != nil || !more {
				return err
			}
		}
	}
	return nil
}

func socketInode(link string) (uint64, bool) {
	s, ok := strings.CutPrefix(link, "socket:[")
	if !ok {
		return 0, false
	}
	inode, err := strconv.ParseUint(strings.TrimSuffix(s, "]"), 10, 64)
	return inode, err == nil
}
