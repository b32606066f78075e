// SPDX-License-Identifier: Apache-2.0

// Package sockets makes sockets inside workloads' network namespaces: the
// proxy's listeners and the sockets it dials. A socket belongs for ever to the
// namespace in which it was made, so only its making needs setns(2)
// (CAP_SYS_ADMIN); everything after that is done from anywhere.
package sockets

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Netns is a network namespace, held by descriptor: it lives at least until
// Close. It is told from others by its cookie, which the kernel never uses
// twice in one boot; its inode number is.
type Netns struct {
	fd     int
	cookie uint64
	inode  uint64
	name   string

	// open is held for reading while fd is in use: a number that was closed
	// could be another namespace's the next moment.
	open   sync.RWMutex
	closed bool

	mu       sync.Mutex
	reserved map[uint16]bool // ports that ReservePorts added
}

// ErrClosed says that the namespace has been let go of.
var ErrClosed = errors.New("netns closed")

// Open opens the namespace at path: /proc/PID/ns/net, or what `ip netns add`
// left in /run/netns. Its cookie is read (SO_NETNS_COOKIE, 5.14) on a socket
// made inside.
func Open(path string) (*Netns, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open netns", Path: path, Err: err}
	}
	n := &Netns{fd: fd, name: path, reserved: map[uint16]bool{}}
	if err := n.identify(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return n, nil
}

// init keeps every other goroutine off the process's first thread: that one
// cannot be discarded, and its namespace is what /proc/self shows to all.
func init() { runtime.LockOSThread() }

// Own opens the namespace of the calling process.
func Own() (*Netns, error) { return Open("/proc/self/ns/net") }

func (n *Netns) identify() error {
	kind, err := unix.IoctlRetInt(n.fd, unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		return fmt.Errorf("open netns %s: not a network namespace", n.name)
	}
	var st unix.Stat_t
	if err := unix.Fstat(n.fd, &st); err != nil {
		return fmt.Errorf("stat netns %s: %w", n.name, err)
	}
	n.inode = st.Ino
	return n.In(func() error {
		s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("make socket in netns %s: %w", n.name, err)
		}
		defer unix.Close(s)
		if n.cookie, err = unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil {
			return fmt.Errorf("read cookie of netns %s: %w", n.name, err)
		}
		return nil
	})
}

// Cookie is what the kernel knows the namespace by; the host's first one is 1.
func (n *Netns) Cookie() uint64 { return n.cookie }

// Inode is the number that /proc/PID/ns/net shows; it is the namespace's own
// only while it is held.
func (n *Netns) Inode() uint64 { return n.inode }

// FD is the descriptor, which stays the Netns's and is valid until Close.
func (n *Netns) FD() int { return n.fd }

// String names the namespace for a person.
func (n *Netns) String() string { return fmt.Sprintf("%s (cookie %d)", n.name, n.cookie) }

// Close lets go of the namespace once what is under way in it has ended;
// later uses are ErrClosed.
func (n *Netns) Close() error {
	n.open.Lock()
	defer n.open.Unlock()
	if n.closed {
		return nil
	}
	n.closed = true
	if err := unix.Close(n.fd); err != nil {
		return fmt.Errorf("close netns %s: %w", n.name, err)
	}
	return nil
}

// In runs f on a thread that is inside the namespace, and waits for it.
// Descriptors that f makes may be used anywhere; f must start no goroutine
// that is to be inside.
func (n *Netns) In(f func() error) error {
	done := make(chan error, 1)
	go func() { done <- n.in(f) }()
	return <-done
}

// home is the process's own namespace, the way back. Only threads inside in
// are ever elsewhere.
var home = sync.OnceValues(func() (int, error) {
	return unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
})

func (n *Netns) in(f func() error) (err error) {
	n.open.RLock()
	defer n.open.RUnlock()
	if n.closed {
		return fmt.Errorf("enter netns %s: %w", n.name, ErrClosed)
	}
	home, err := home()
	if err != nil {
		return fmt.Errorf("open own netns: %w", err)
	}
	runtime.LockOSThread()
	// CLONE_NEWNET and not 0: systemd's RestrictNamespaces=net passes only
	// what names its kind.
	if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter netns %s: %w", n.name, err)
	}
	defer func() {
		if back := unix.Setns(home, unix.CLONE_NEWNET); back != nil {
			// Still locked when this goroutine ends, the thread ends with it:
			// nothing else ever runs there.
			err = errors.Join(err, fmt.Errorf("leave netns %s: %w", n.name, back))
			return
		}
		runtime.UnlockOSThread()
	}()
	return f()
}
