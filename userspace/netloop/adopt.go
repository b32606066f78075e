// SPDX-License-Identifier: Apache-2.0

package netloop

import (
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// AdoptBy is Adopt with a time at which it gives up with os.ErrDeadlineExceeded; the zero time is no limit.
func (t *Task) AdoptBy(fd int, deadline time.Time) (*Conn, error) {
	e := t.l.e
	if t.l.stopping {
		sysClose(fd)
		return nil, fmt.Errorf("adopt socket: %w", ErrClosed)
	}
	if !e.admit() {
		sysClose(fd)
		return nil, fmt.Errorf("adopt socket: %w", ErrTooManyConns)
	}
	adopt := t.adopt
	if t.l.r == nil {
		adopt = t.adoptPlain
	}
	c, err := adopt(fd, deadline)
	if err != nil {
		return nil, fmt.Errorf("adopt socket: %w", err)
	}
	return c, nil
}

func (t *Task) adopt(fd int, deadline time.Time) (*Conn, error) {
	e := t.l.e
	err := unix.SetNonblock(fd, true)
	var c *Conn
	if err == nil {
		c, err = t.l.r.add(fd, netip.AddrPort{})
	}
	if err != nil {
		sysClose(fd)
		e.connGone()
		return nil, err
	}
	c.adopted = true
	t.own(c)
	if err := t.connected(c, e.at(deadline)); err != nil {
		if !c.closed {
			c.abort(err)
		}
		return nil, err
	}
	tune(fd)
	return c, nil
}

// connected parks until the socket has a peer.
func (t *Task) connected(c *Conn, deadline int64) error {
	for {
		remote, e := sysName(unix.SYS_GETPEERNAME, c.fd)
		if e == 0 {
			c.remote, c.full = remote, false
			return nil
		}
		if e != syscall.ENOTCONN {
			return e
		}
		if n, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil {
			return err
		} else if n != 0 {
			return syscall.Errno(n)
		}
		if c.broken {
			return syscall.ENOTCONN
		}
		// The edge of writability wakes it: until then the socket takes nothing.
		c.full, c.connecting, c.reader = true, true, t
		err := t.park(deadline)
		c.connecting, c.reader = false, nil
		if c.closed {
			return c.rerr
		}
		if err != nil {
			return err
		}
	}
}

// Own makes the task the owner of c: when it returns, c is closed. A task owns what it was started with and what it adopted.
func (t *Task) Own(c *Conn) {
	c.disown()
	t.own(c)
}

func (t *Task) own(c *Conn) {
	if c.closed {
		return
	}
	c.owner = t
	t.conns = append(t.conns, c)
}

// Disown leaves c without an owner, for a pool of the loop: it stays open when the task returns. If the peer ends it meanwhile the epoll
// engine closes it; see Conn.Quiet for when it may be used again.
func (t *Task) Disown(c *Conn) {
	c.disown()
	if c.hup && !c.closed {
		_ = c.Close()
	}
}

func (c *Conn) disown() {
	t := c.owner
	if t == nil {
		return
	}
	c.owner = nil
	for i, other := range t.conns {
		if other == c {
			last := len(t.conns) - 1
			t.conns[i] = t.conns[last]
			t.conns[last] = nil
			t.conns = t.conns[:last]
			return
		}
	}
}

// Adopt takes ownership of a socket that is connected or connecting, whatever happens, and parks until it is connected, for at most
// Options.ConnectTimeout.
func (t *Task) Adopt(fd int) (*Conn, error) {
	return t.AdoptBy(fd, time.Now().Add(t.l.e.opt.ConnectTimeout))
}
