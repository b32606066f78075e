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

const (
	scratchSize = 64 << 10
	directRead  = 32 << 10 // from this size on a read goes straight into the caller's buffer
	directWrite = 32 << 10 // from this size on a write is tried at once
	sendAt      = 64 << 10 // output that is not kept until the end of the turn
	smallOutput = 4 << 10
	largeOutput = 72 << 10 // four full TLS records
	keptSmall   = 512      // 2 MiB a loop
	keptLarge   = 32       // 2.25 MiB a loop
	keptInputs  = 32       // 2 MiB a loop
	hardFactor  = 4
)

// Conn is a connection of a loop; see the package documentation for who may use it and when it parks. Errors are those of
// package net in kind: io.EOF, net.ErrClosed, os.ErrDeadlineExceeded, syscall.Errno, and the causes of Engine.Kill.
type Conn struct {
	l     *loop
	id    uint64
	fd    int
	nc    net.Conn // goroutine engine
	owner *Task

	local, remote netip.AddrPort

	reader     *Task  // parked in Read or AwaitRead
	rerr, werr error  // what every later Read or Write returns
	rdl, wdl   int64  // deadlines on the engine's clock
	ahead      []byte // received, not yet read
	aheadOf    []byte // the buffer that ahead is part of
	turn       uint64 // in which moved bytes were read
	moved      int

	out      []byte // accepted and not yet sent, from off on
	off      int
	sending  int   // goroutine engine: bytes its writer has in hand
	flushers queue // parked in Flushed
	progress int64 // when the peer last took something, while stall runs
	stall    timer
	relay    *relay
	notify   *Event

	ready      bool // a read may find something
	full       bool // the socket takes no more for now
	hup        bool // the peer has ended its sending side, or worse
	broken     bool // nothing can be sent or received any more
	shut       bool // CloseWrite was called
	fin        bool // and carried out
	closed     bool // Close or abort was called
	gone       bool // the descriptor is closed
	dirty      bool // in reactor.dirty
	nopark     bool // Read returns errAgain instead of parking
	idle       bool // SetIdle
	adopted    bool
	connecting bool // reader waits for the peer
	writing    bool // goroutine engine: its writer runs
}

// again is what a Read that must not park returns when it would. crypto/tls carries on after a temporary net.Error.
type again struct{}

func (again) Error() string   { return "no data yet" }
func (again) Timeout() bool   { return true }
func (again) Temporary() bool { return true }

var errAgain net.Error = again{}

// ID names the connection in Engine.Kill. IDs are not used again, until 2^32 connections later.
func (c *Conn) ID() uint64 { return c.id }

// Read parks until there is data, the end, an error or the read deadline. At most Options.TurnBudget bytes are read in a turn of
// the loop; then the other tasks go first.
func (c *Conn) Read(p []byte) (int, error) {
	if c.nc != nil {
		return c.readPlain(p)
	}
	r := c.l.r
	for {
		switch {
		case len(c.ahead) > 0 && !c.closed:
			return c.readAhead(p), nil
		case c.rerr != nil:
			return 0, c.rerr
		case len(p) == 0:
			return 0, nil
		case c.rdl != noDeadline && c.rdl <= r.now:
			return 0, os.ErrDeadlineExceeded
		case c.readable():
			if n, err, ok := c.readNow(p); ok {
				return n, err
			}
			continue
		case c.nopark:
			return 0, errAgain
		}
		if err := c.awaitRead(); err != nil {
			return 0, err
		}
	}
}

// readable says that the socket may have something and the connection's budget for the turn is not spent.
func (c *Conn) readable() bool {
	return c.ready && (c.turn != c.l.r.turn || c.moved < c.l.e.opt.TurnBudget)
}

// awaitRead parks the current task until something about reading has changed, or for a turn if the budget is spent.
func (c *Conn) awaitRead() error {
	t := c.l.current()
	if c.reader != nil {
		return ErrBusy
	}
	if c.ready {
		return t.Yield()
	}
	c.reader = t
	err := t.park(c.rdl)
	c.reader = nil
	return err
}

// AwaitRead parks until Read would not, so that no buffer need be held meanwhile. It returns the error that Read would return instead of
// parking, io.EOF excepted. On the goroutine engine it returns at once.
func (c *Conn) AwaitRead() error {
	for c.nc == nil && len(c.ahead) == 0 && c.rerr == nil && !c.readable() {
		if c.rdl != noDeadline && c.rdl <= c.l.r.now {
			return os.ErrDeadlineExceeded
		}
		if err := c.awaitRead(); err != nil {
			return err
		}
	}
	if c.rerr != nil && c.rerr != io.EOF && len(c.ahead) == 0 {
		return c.rerr
	}
	return nil
}

// readNow asks the socket; not ok if it had nothing.
func (c *Conn) readNow(p []byte) (n int, err error, ok bool) {
	r := c.l.r
	direct := len(p) >= directRead
	buf := p
	if !direct {
		buf = r.scratch
	}
	n, e := sysRead(c.fd, buf)
	switch {
	case e == syscall.EAGAIN:
		c.ready = false
		return 0, nil, false
	case e != 0:
		c.rerr = e
		return 0, e, true
	case n == 0:
		c.rerr = io.EOF
		return 0, io.EOF, true
	}
	if n < len(buf) && !c.hup {
		c.ready = false // drained; more arriving is a new edge (epoll(7))
	}
	if c.turn != r.turn {
		c.turn, c.moved = r.turn, 0
	}
	c.moved += n
	r.read += uint64(n)
	if direct {
		return n, nil, true
	}
	k := copy(p, buf[:n])
	if k < n {
		c.aheadOf, c.ahead = r.scratch, r.scratch[k:n]
		r.scratch = r.input()
	}
	return k, nil, true
}

func (c *Conn) readAhead(p []byte) int {
	n := copy(p, c.ahead)
	if c.ahead = c.ahead[n:]; len(c.ahead) == 0 {
		c.dropAhead()
	}
	return n
}

func (c *Conn) dropAhead() {
	if c.aheadOf != nil && len(c.l.r.inputs) < keptInputs {
		c.l.r.inputs = append(c.l.r.inputs, c.aheadOf)
	}
	c.ahead, c.aheadOf = nil, nil
}

func (r *reactor) input() []byte {
	if n := len(r.inputs); n > 0 {
		b := r.inputs[n-1]
		r.inputs = r.inputs[:n-1]
		return b
	}
	return make([]byte, scratchSize)
}

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

// event notes readiness and wakes who waited for it.
func (c *Conn) event(events uint32) {
	const ended = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR
	if events&ended != 0 {
		if !c.hup && c.notify != nil {
			c.notify.Broadcast()
		}
		c.hup = true
	}
	if events&(unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		c.broken = true
	}
	if events&(unix.EPOLLIN|ended) != 0 {
		c.ready = true
		if c.reader != nil {
			c.reader.wake(nil)
		}
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 && c.full {
		c.full = false
		if c.connecting {
			c.reader.wake(nil)
		} else {
			c.mark()
		}
	}
	if c.relay != nil {
		c.relay.schedule()
	}
	if c.hup && c.owner == nil && !c.closed {
		_ = c.Close()
	}
}

// Gone says whether the peer is known to have ended its sending side or the whole connection; it is noticed while the task waits
// elsewhere. A peer that has only half-closed may still expect an answer.
func (c *Conn) Gone() bool {
	if c.nc != nil {
		return c.closed || c.pollPlain(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR)
	}
	return c.hup || c.closed
}

// Quiet says that the connection is whole and nothing has been received that was not read: the state in which one from a pool may be
// used again.
func (c *Conn) Quiet() bool {
	if c.nc != nil {
		return !c.closed && c.werr == nil && !c.pollPlain(unix.POLLIN|unix.POLLRDHUP)
	}
	if c.hup || c.closed || c.rerr != nil || c.werr != nil || len(c.ahead) > 0 {
		return false
	}
	if c.ready && !sysPeek(c.fd) {
		c.ready = false // the last read took exactly what there was
	}
	return !c.ready
}

// Notify has ev broadcast when the peer hangs up and when the connection is closed or killed, for a task that waits for ev and
// would not see it otherwise; nil ends that. The goroutine engine sees no hang-up.
func (c *Conn) Notify(ev *Event) { c.notify = ev }

// SetIdle says that nothing is lost if the connection is closed now, as between two requests: Shutdown then closes it.
func (c *Conn) SetIdle(idle bool) {
	c.idle = idle
	if c.l.e.draining.Load() {
		c.closeIdle()
	}
}

func (c *Conn) closeIdle() {
	if c.idle && !c.closed && (c.nc != nil || !c.ready) {
		_ = c.Close()
	}
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

// SetDeadline sets both deadlines; the zero time is none.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline bounds the current and later Read calls. It is kept to 4 ms.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.rdl = c.l.e.at(t)
	if c.nc != nil {
		return c.nc.SetReadDeadline(t)
	}
	if c.reader != nil {
		c.reader.wake(nil) // to park again with the new one
	}
	return nil
}

// SetWriteDeadline bounds the current and later Write and Flushed calls; see the package documentation for bytes already written.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.wdl = c.l.e.at(t)
	for _, waiting := range c.flushers.tasks() {
		waiting.wake(nil)
	}
	return nil
}

func (q *queue) tasks() (all []*Task) {
	for t := q.head; t != nil; t = t.queueNext {
		all = append(all, t)
	}
	return all
}

// LocalAddrPort is this end's address, for a transparently accepted connection the original destination; the zero AddrPort for families
// other than IP. It is looked up at the first call, which must come before Close.
func (c *Conn) LocalAddrPort() netip.AddrPort {
	if !c.local.IsValid() && !c.gone && c.nc == nil {
		c.local, _ = sysName(unix.SYS_GETSOCKNAME, c.fd)
	}
	return c.local
}

// RemoteAddrPort is the peer's address.
func (c *Conn) RemoteAddrPort() netip.AddrPort { return c.remote }

// LocalAddr is LocalAddrPort as a *net.TCPAddr, or a *net.UnixAddr without a name.
func (c *Conn) LocalAddr() net.Addr { return netAddr(c.LocalAddrPort()) }

// RemoteAddr is RemoteAddrPort likewise.
func (c *Conn) RemoteAddr() net.Addr { return netAddr(c.remote) }

func netAddr(a netip.AddrPort) net.Addr {
	if !a.IsValid() {
		return &net.UnixAddr{Net: "unix"}
	}
	return net.TCPAddrFromAddrPort(a)
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
