// SPDX-License-Identifier: Apache-2.0

package netloop

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// This file is the goroutine engine: a task is a goroutine that holds its loop's lock except where it parks, a connection is one of
// package net with a goroutine that sends its output while there is any.

// enter takes the loop for t.
func (l *loop) enter(t *Task) {
	l.mu.Lock()
	l.cur = t
}

func (l *loop) leave(*Task) {
	l.cur = nil
	l.mu.Unlock()
}

func (l *loop) startPlain(t *Task) {
	t.wakeup = make(chan error, 1)
	l.e.wg.Go(func() {
		l.enter(t)
		defer l.leave(t)
		t.run()
	})
}

// systemPlain runs f in a goroutine, since the caller may be a task of this very loop.
func (l *loop) systemPlain(f func(*loop)) {
	go func() {
		l.enter(nil)
		defer l.leave(nil)
		f(l)
	}()
}

func (t *Task) parkPlain(deadline int64) error {
	l := t.l
	var expired <-chan time.Time
	if deadline != noDeadline {
		timer := time.NewTimer(time.Duration(deadline - l.e.clock()))
		defer timer.Stop()
		expired = timer.C
	}
	l.leave(t)
	var err error
	woken := false
	select {
	case err = <-t.wakeup:
		woken = true
	case <-expired:
	}
	l.enter(t)
	switch {
	case woken:
		return err
	case !t.parked: // between the timer and the lock
		return <-t.wakeup
	}
	t.parked = false
	if t.queue != nil {
		t.queue.remove(t)
	}
	return os.ErrDeadlineExceeded
}

func (e *Engine) listenPlain(ln *Listener, fd int) error {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(own), "listener")
	defer f.Close()
	tune(own)
	if ln.net, err = net.FileListener(f); err != nil {
		return err
	}
	if a, ok := ln.net.Addr().(*net.TCPAddr); ok {
		ln.addr = unmapped(a)
	}
	e.wg.Go(ln.acceptPlain)
	return nil
}

func (ln *Listener) acceptPlain() {
	for {
		nc, err := ln.net.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			ln.cannotAccept(err)
			time.Sleep(acceptPause)
			continue
		case !ln.e.admit():
			nc.Close()
			continue
		}
		ln.starved = false
		l := ln.e.leastLoaded(nil)
		l.enter(nil)
		if c := l.addPlain(nc); c != nil {
			ln.e.accepted.Add(1)
			l.spawn(func(t *Task) { ln.h(t, c) }).own(c)
		}
		l.leave(nil)
	}
}

// addPlain takes an admitted connection into the loop, or closes it.
func (l *loop) addPlain(nc net.Conn) *Conn {
	if l.stopping {
		nc.Close()
		l.e.connGone()
		return nil
	}
	c := &Conn{l: l, fd: -1, nc: nc, id: l.newID(0)}
	if a, ok := nc.LocalAddr().(*net.TCPAddr); ok {
		c.local = unmapped(a)
	}
	if a, ok := nc.RemoteAddr().(*net.TCPAddr); ok {
		c.remote = unmapped(a)
	}
	l.conns[c.id] = c
	l.load.Add(1)
	return c
}

func unmapped(a *net.TCPAddr) netip.AddrPort {
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

func (t *Task) adoptPlain(fd int, deadline time.Time) (c *Conn, err error) {
	l := t.l
	if err := unix.SetNonblock(fd, true); err != nil {
		sysClose(fd)
		l.e.connGone()
		return nil, err
	}
	tune(fd)
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	t.interrupt = func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) }
	if err = f.SetWriteDeadline(deadline); err != nil {
		l.e.connGone()
		return nil, err
	}
	l.leave(t)
	nc, err := connectedPlain(f)
	l.enter(t)
	t.interrupt = nil
	if err != nil {
		l.e.connGone()
		if l.stopping {
			err = ErrClosed
		}
		return nil, err
	}
	if c = l.addPlain(nc); c == nil {
		return nil, ErrClosed
	}
	t.own(c)
	return c, nil
}

// connectedPlain waits for a connecting socket.
func connectedPlain(f *os.File) (net.Conn, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var failed error
	err = raw.Write(func(fd uintptr) bool {
		if _, e := sysName(unix.SYS_GETPEERNAME, int(fd)); e != syscall.ENOTCONN {
			failed = errnoOrNil(e)
			return true
		}
		if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err != nil || n != 0 {
			failed = errors.Join(err, errnoOrNil(syscall.Errno(n)))
			return true
		}
		if pending(int(fd)) {
			return false
		}
		failed = syscall.ENOTCONN
		return true
	})
	if err = errors.Join(err, failed); err != nil {
		return nil, err
	}
	return net.FileConn(f)
}

// pending tells a socket that is connecting from one that is not, which poll(2) reports as hung up.
func pending(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd)}}
	n, err := unix.Poll(fds, 0)
	return err != nil || n == 0 || fds[0].Revents&unix.POLLHUP == 0
}

func errnoOrNil(e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

func (c *Conn) readPlain(p []byte) (int, error) {
	if c.rerr != nil {
		return 0, c.rerr
	}
	t := c.l.current()
	if c.reader != nil {
		return 0, ErrBusy
	}
	c.reader = t
	c.l.leave(t)
	n, err := c.nc.Read(p)
	c.l.enter(t)
	c.reader = nil
	c.l.bytesRead.Add(uint64(n))
	if c.rerr != nil { // closed meanwhile
		return 0, c.rerr
	}
	if errors.Is(err, io.EOF) {
		c.rerr = err
	}
	return n, err
}

// startWriter has the output sent, and what waits for that done, by a goroutine.
func (c *Conn) startWriter() {
	if !c.writing {
		c.writing = true
		c.l.e.wg.Go(c.writer)
	}
}

func (c *Conn) writer() {
	c.l.enter(nil)
	defer c.l.leave(nil)
	for len(c.out) > 0 && !c.gone {
		out := c.out
		c.out, c.spare, c.sending = c.spare[:0], out, len(out)
		for len(out) > 0 && !c.gone {
			c.l.leave(nil)
			n, err := c.writePlain(out[:min(len(out), sendAt)])
			c.l.enter(nil)
			out = out[n:]
			c.sending = len(out)
			if err != nil && !c.gone {
				c.out, c.sending = c.out[:0], 0
				if n == 0 && errors.Is(err, os.ErrDeadlineExceeded) {
					c.l.e.stalled.Add(1)
					c.abort(ErrStalled)
				} else if c.werr == nil {
					c.werr = err
				}
				out = nil
			}
			c.wakeFlusher()
		}
	}
	c.writing = false
	c.out, c.spare = nil, nil
	if c.closed {
		c.destroyPlain()
	} else if half, ok := c.nc.(interface{ CloseWrite() error }); ok && c.shut && !c.fin {
		c.fin = true
		_ = half.CloseWrite()
	}
}

// writePlain sends p; a peer that takes some of it in time has not stalled.
func (c *Conn) writePlain(p []byte) (int, error) {
	_ = c.nc.SetWriteDeadline(time.Now().Add(c.l.e.opt.StallTimeout))
	n, err := c.nc.Write(p)
	c.l.bytesWritten.Add(uint64(n))
	if n > 0 && errors.Is(err, os.ErrDeadlineExceeded) {
		err = nil
	}
	return n, err
}

// closePlain lets the writer close the connection if it has something to send.
func (c *Conn) closePlain(failed bool) {
	if failed || !c.writing {
		c.destroyPlain()
	} else {
		_ = c.nc.SetReadDeadline(time.Unix(1, 0)) // ends a Read that is under way
	}
}

func (c *Conn) abortPlain() {
	if tcp, ok := c.nc.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	c.destroyPlain()
}

func (c *Conn) destroyPlain() {
	if c.gone {
		return
	}
	c.gone = true
	_ = c.nc.Close()
	delete(c.l.conns, c.id)
	c.out, c.sending = nil, 0
	c.l.load.Add(-1)
	c.l.e.connGone()
}

// pollPlain says whether one of the events, or the end of the connection, is there.
func (c *Conn) pollPlain(events int16) bool {
	raw, ok := c.nc.(syscall.Conn)
	if !ok {
		return false
	}
	control, err := raw.SyscallConn()
	if err != nil {
		return true
	}
	there := false
	if err := control.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
		n, err := unix.Poll(fds, 0)
		there = err == nil && n > 0
	}); err != nil {
		return true
	}
	return there
}
