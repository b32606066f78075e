// SPDX-License-Identifier: Apache-2.0

package netloop

import (
	"errors"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Write takes all of p and never parks. It fails on a connection that is closed or shut, after the write deadline, when an
// earlier write could not be sent, and with ErrWriteLimit, which aborts the connection, over the hard bound.
func (c *Conn) Write(p []byte) (int, error) {
	switch {
	case c.werr != nil:
		return 0, c.werr
	case c.shut:
		return 0, syscall.EPIPE
	case c.wdl != noDeadline && c.wdl <= c.now():
		return 0, os.ErrDeadlineExceeded
	}
	n := len(p)
	if c.nc == nil && n >= directWrite && c.pending() == 0 && !c.full {
		k, err := c.send(p)
		if err != nil {
			c.failWrite(err)
			return 0, err
		}
		p = p[k:]
	}
	if len(p) == 0 {
		return n, nil
	}
	if c.pending()+len(p) > hardFactor*c.l.e.opt.WriteLimit {
		c.abort(ErrWriteLimit)
		return 0, ErrWriteLimit
	}
	if c.nc != nil {
		c.out = append(c.out, p...)
		c.startWriter()
		return n, nil
	}
	c.buffer(p)
	if c.pending() >= sendAt && !c.full {
		c.flush()
		return n, nil
	}
	c.mark()
	return n, nil
}

func (c *Conn) now() int64 {
	if c.l.r != nil {
		return c.l.r.now
	}
	return c.l.e.clock()
}

// mark has the output sent at the end of the turn.
func (c *Conn) mark() {
	if !c.dirty {
		c.dirty = true
		c.l.r.dirty = append(c.l.r.dirty, c)
	}
}

// Buffered is the number of bytes that were written and not yet taken by the socket.
func (c *Conn) Buffered() int { return c.pending() }

func (c *Conn) pending() int { return len(c.out) - c.off + c.sending }

// buffer appends to the output, in a spare buffer where one is large enough.
func (c *Conn) buffer(p []byte) {
	r := c.l.r
	have := len(c.out) - c.off
	need := have + len(p)
	if len(c.out)+len(p) > cap(c.out) {
		old, rest := c.out, c.out[c.off:]
		switch {
		case need <= cap(old):
			c.out = old[:copy(old, rest)]
		case need <= smallOutput:
			c.out = append(spare(&r.small, smallOutput), rest...)
			r.giveBack(old)
		case need <= largeOutput:
			c.out = append(spare(&r.large, largeOutput), rest...)
			r.giveBack(old)
		default:
			c.out = append(make([]byte, 0, need+need/2), rest...)
			r.giveBack(old)
		}
		c.off = 0
	}
	c.out = append(c.out, p...)
}

func spare(list *[][]byte, size int) []byte {
	if n := len(*list); n > 0 {
		b := (*list)[n-1]
		*list = (*list)[:n-1]
		return b
	}
	return make([]byte, 0, size)
}

func (r *reactor) giveBack(b []byte) {
	switch {
	case cap(b) == smallOutput && len(r.small) < keptSmall:
		r.small = append(r.small, b[:0])
	case cap(b) == largeOutput && len(r.large) < keptLarge:
		r.large = append(r.large, b[:0])
	}
}

// send gives p to the socket and returns how much it took.
func (c *Conn) send(p []byte) (int, error) {
	sent := 0
	for sent < len(p) {
		n, e := sysWrite(c.fd, p[sent:])
		if e == syscall.EAGAIN {
			c.full = true
			break
		}
		if e != 0 {
			return sent, e
		}
		sent += n
	}
	if sent > 0 {
		c.progress = c.l.r.now
		c.l.r.wrote += uint64(sent)
	}
	return sent, nil
}

// flush sends what it can of the output and carries out what waited for that.
func (c *Conn) flush() {
	if c.gone {
		return
	}
	r := c.l.r
	if c.off < len(c.out) && !c.full {
		n, err := c.send(c.out[c.off:])
		if err != nil {
			c.failWrite(err)
			return
		}
		c.off += n
	}
	if left := len(c.out) - c.off; left > 0 {
		if left <= smallOutput && cap(c.out) > smallOutput {
			// A stalled peer may keep this for long.
			c.shrink()
		}
		if c.stall.when == 0 {
			c.progress = r.now
			r.wheel.set(&c.stall, r.now+int64(c.l.e.opt.StallTimeout))
		}
	} else {
		c.drained()
	}
	c.wakeFlusher()
	if c.relay != nil {
		c.relay.schedule()
	}
}

func (c *Conn) shrink() {
	old := c.out
	c.out = append(make([]byte, 0, len(old)-c.off), old[c.off:]...)
	c.off = 0
	c.l.r.giveBack(old)
}

// drained is called when all output is sent.
func (c *Conn) drained() {
	r := c.l.r
	if c.out != nil {
		r.giveBack(c.out)
		c.out, c.off = nil, 0
	}
	r.wheel.clear(&c.stall)
	if c.closed {
		c.destroy()
		return
	}
	if c.shut && !c.fin {
		c.fin = true
		_ = unix.Shutdown(c.fd, unix.SHUT_WR)
	}
}

// stallTimer cuts a connection whose peer took nothing for too long.
func (c *Conn) stallTimer() {
	if at := c.progress + int64(c.l.e.opt.StallTimeout); at > c.l.r.now {
		c.l.r.wheel.set(&c.stall, at)
		return
	}
	c.l.e.stalled.Add(1)
	c.abort(ErrStalled)
}

// failWrite ends the sending side. What was received can still be read.
func (c *Conn) failWrite(err error) {
	if c.closed {
		c.destroy()
		return
	}
	c.werr = err
	c.l.r.wheel.clear(&c.stall)
	c.l.r.giveBack(c.out)
	c.out, c.off = nil, 0
	c.wakeFlusher()
	if c.relay != nil {
		c.relay.schedule()
	}
}

// Flushed parks until at most limit written bytes wait to be sent. It returns the error that Write would, and os.ErrDeadlineExceeded after
// the write deadline.
func (c *Conn) Flushed(limit int) error {
	waited := false
	for {
		if c.werr != nil || c.pending() <= limit {
			if waited {
				c.wakeFlusher()
			}
			return c.werr
		}
		if c.wdl != noDeadline && c.wdl <= c.now() {
			return os.ErrDeadlineExceeded
		}
		t := c.l.current()
		if t.want = limit; waited {
			c.flushers.pushFront(t)
		} else {
			c.flushers.push(t)
		}
		err := t.park(c.wdl)
		if t.queue != nil {
			c.flushers.remove(t)
		}
		if err != nil {
			c.wakeFlusher()
			return err
		}
		waited = true
	}
}

// wakeFlusher wakes the task that has waited longest in Flushed, if it can go on; that one wakes the next when it has seen that there is
// room, so that not all of them write into the room for one.
func (c *Conn) wakeFlusher() {
	if t := c.flushers.head; t != nil && (c.werr != nil || c.pending() <= t.want) {
		t.wake(nil)
	}
}

// CloseWrite ends the sending side once what was written is sent.
func (c *Conn) CloseWrite() error {
	if c.werr != nil {
		return c.werr
	}
	if c.shut {
		return nil
	}
	c.shut = true
	if c.nc != nil {
		c.startWriter()
	} else {
		c.mark()
	}
	return nil
}

// Close ends both sides. What was written is still sent, for as long as the peer takes it; what was received is dropped.
func (c *Conn) Close() error {
	if c.closed {
		return net.ErrClosed
	}
	failed := c.werr != nil
	c.closed = true
	c.rerr, c.werr = net.ErrClosed, net.ErrClosed
	c.disown()
	c.wakeAll()
	switch {
	case c.nc != nil:
		c.closePlain(failed)
	case failed || c.pending() == 0:
		c.destroy()
	default:
		c.flush()
	}
	return nil
}

// Abort drops what was written and resets the connection.
func (c *Conn) Abort() { c.abort(net.ErrClosed) }

func (c *Conn) abort(cause error) {
	if c.gone {
		return
	}
	c.closed = true
	c.rerr, c.werr = cause, cause
	c.disown()
	if c.nc != nil {
		c.abortPlain()
	} else {
		_ = unix.SetsockoptLinger(c.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		c.destroy()
	}
	c.wakeAll()
}

// wakeAll lets every task parked on the connection see what became of it.
func (c *Conn) wakeAll() {
	if c.notify != nil {
		c.notify.Broadcast()
	}
	if c.reader != nil {
		c.reader.wake(nil)
	}
	c.wakeFlusher()
	if c.relay != nil {
		c.relay.schedule()
	}
}

// destroy closes the descriptor.
func (c *Conn) destroy() {
	if c.gone {
		return
	}
	r := c.l.r
	c.gone = true
	r.conns[c.fd] = nil
	if c.adopted {
		// Whoever handed the socket over may still hold it, and then closing does not end its events.
		_ = epollControl(r.epfd, unix.EPOLL_CTL_DEL, c.fd, 0, 0)
	}
	sysClose(c.fd)
	r.wheel.clear(&c.stall)
	r.giveBack(c.out)
	c.out, c.off = nil, 0
	c.dropAhead()
	c.l.load.Add(-1)
	c.l.e.connGone()
}

// Linger ends the sending side, drops what the peer still sends until its end, limit bytes or d, and closes. It is how to refuse a
// peer in the middle of what it says: closing with input unread would reset the connection, and the refusal could be lost.
func (c *Conn) Linger(d time.Duration, limit int) error {
	t := c.l.current()
	err := errors.Join(c.SetDeadline(time.Now().Add(d)), c.CloseWrite())
	buf := t.Buffer()
	defer t.Release(buf)
	for err == nil && limit > 0 {
		var n int
		n, err = c.Read(buf[:min(len(buf), limit)])
		limit -= n
	}
	return c.Close()
}
