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
	spare    []byte // goroutine engine: what its writer sends, and then the next out
	sending  int    // and how much of that is left
	flushers queue  // parked in Flushed
	progress int64  // when the peer last took something, while stall runs
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
	if c.rerr != nil && !errors.Is(c.rerr, io.EOF) && len(c.ahead) == 0 {
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
		r.holding = append(r.holding, c)
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
	c.l.r.giveInput(c.aheadOf)
	c.ahead, c.aheadOf = nil, nil
}

// compact gives the large buffer back if little of it is left at the end of a turn: its reader may now wait for long.
func (c *Conn) compact() {
	if n := len(c.ahead); n > 0 && n <= scratchSize/4 && cap(c.aheadOf) == scratchSize {
		little := append(make([]byte, 0, n), c.ahead...)
		c.l.r.giveInput(c.aheadOf)
		c.ahead, c.aheadOf = little, little
	}
}

func (r *reactor) giveInput(b []byte) {
	if cap(b) == scratchSize && len(r.inputs) < keptInputs {
		r.inputs = append(r.inputs, b[:scratchSize])
	}
}

func (r *reactor) input() []byte {
	if n := len(r.inputs); n > 0 {
		b := r.inputs[n-1]
		r.inputs = r.inputs[:n-1]
		return b
	}
	return make([]byte, scratchSize)
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
