// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

// Connect is what a CONNECT request asks for.
type Connect struct {
	Authority string // host:port, as received
	Forwarded string // the value of the only Forwarded field, "" without one
}

type streamState uint8

const (
	stateOpening streamState = iota // CONNECT sent or received, not answered
	stateOpen
	stateOver // reset or refused; no longer in the session's table
)

// Stream is one CONNECT stream: a netloop.Stream, to be used by tasks of its
// session's loop, one reader at a time.
type Stream struct {
	m      *Session
	id     uint32
	state  streamState
	opened bool // client side: answered with 200
	born   time.Time
	// Local and Remote are what LocalAddr and RemoteAddr return.
	Local, Remote netip.AddrPort

	request Connect
	status  int // the answer, client side
	reason  string

	// Receiving.
	in       []byte // received, not read, from inOff on
	inOff    int
	dst      []byte // of the parked reader
	dstN     int    // bytes that were put there
	window   int    // what the peer may have outstanding
	credit   int    // what it may still send
	owed     int    // read and not yet credited
	rerr     error
	rdl      time.Time
	readable netloop.Event

	// Sending.
	out      []byte // waits for window, from outOff on
	outOff   int
	send     int64 // window that the peer gives
	queued   bool  // in the session's list of waiting streams
	fin      bool  // CloseWrite was called
	finSent  bool
	orderly  bool // all output was sent, END_STREAM included
	closed   bool // Close was called
	werr     error
	wdl      time.Time
	drained  netloop.Event
	progress time.Time // when output last moved, while some waits
}

// Request is what the peer asked for, server side.
func (s *Stream) Request() Connect { return s.request }

// Session is the tunnel that the stream is part of.
func (s *Stream) Session() *Session { return s.m }

// Accept answers 200.
func (s *Stream) Accept() error {
	if s.state != stateOpening {
		return s.over()
	}
	s.state = stateOpen
	s.m.respond(s.id, 200, "", false)
	return nil
}

// Refuse answers with another status, and a reason code, and ends the
// stream.
func (s *Stream) Refuse(status int, reason string) error {
	if s.state != stateOpening {
		return s.over()
	}
	s.m.respond(s.id, status, reason, true)
	s.finSent = true
	if s.rerr == nil {
		s.m.out = appendReset(s.m.out, s.id, CodeNone)
	}
	s.m.remove(s, ErrClosed)
	return nil
}

func (s *Stream) over() error {
	if s.werr != nil {
		return s.werr
	}
	return ErrClosed
}

func expired(deadline time.Time) bool { return !deadline.IsZero() && !time.Now().Before(deadline) }

// Read parks until there is data, the end, an error or the read deadline.
func (s *Stream) Read(p []byte) (int, error) {
	for {
		switch {
		case s.closed:
			return 0, net.ErrClosed
		case s.inOff < len(s.in):
			n := copy(p, s.in[s.inOff:])
			if s.inOff += n; s.inOff == len(s.in) {
				s.m.giveBack(s.in)
				s.in, s.inOff = nil, 0
			}
			s.consumed(n)
			return n, nil
		case s.rerr != nil:
			return 0, s.rerr
		case len(p) == 0:
			return 0, nil
		case expired(s.rdl):
			return 0, os.ErrDeadlineExceeded
		case s.dst != nil:
			return 0, netloop.ErrBusy
		}
		s.dst, s.dstN = p, 0
		err := s.m.task.Current().WaitUntil(&s.readable, s.rdl)
		n := s.dstN
		s.dst, s.dstN = nil, 0
		if n > 0 {
			s.consumed(n)
			return n, nil
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return 0, err
		}
	}
}

// AwaitRead parks until Read would not. It returns the error that Read would
// return, io.EOF excepted.
func (s *Stream) AwaitRead() error {
	for s.inOff == len(s.in) && s.rerr == nil && !s.closed {
		if expired(s.rdl) {
			return os.ErrDeadlineExceeded
		}
		if err := s.m.task.Current().WaitUntil(&s.readable, s.rdl); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
	switch {
	case s.closed:
		return net.ErrClosed
	case s.inOff < len(s.in) || errors.Is(s.rerr, io.EOF):
		return nil
	}
	return s.rerr
}

// deliver takes the payload of a DATA frame.
func (s *Stream) deliver(p []byte) {
	if s.dst != nil && s.dstN == 0 {
		s.dstN = copy(s.dst, p)
		p = p[s.dstN:]
	}
	if len(p) > 0 {
		if s.in == nil {
			s.in = s.m.lend()
		}
		if s.inOff > 0 && len(s.in)+len(p) > cap(s.in) {
			s.in = s.in[:copy(s.in, s.in[s.inOff:])]
			s.inOff = 0
		}
		s.in = append(s.in, p...)
	}
	s.readable.Signal()
}

// consumed credits what was read. A stream whose reader keeps up is given a
// larger window.
func (s *Stream) consumed(n int) {
	s.m.consumed(n)
	if s.rerr != nil || s.state == stateOver {
		return
	}
	s.owed += n
	if s.owed < s.window/2 {
		return
	}
	if s.inOff == len(s.in) && s.window < s.m.cfg.MaxWindow {
		more := min(s.window, s.m.cfg.MaxWindow-s.window)
		s.window += more
		s.owed += more
	}
	s.credit += s.owed
	s.m.out = appendWindow(s.m.out, s.id, s.owed)
	s.owed = 0
	s.m.wake()
}

// Write takes all of p and never parks.
func (s *Stream) Write(p []byte) (int, error) {
	switch {
	case s.closed:
		return 0, net.ErrClosed
	case s.werr != nil:
		return 0, s.werr
	case s.fin:
		return 0, syscall.EPIPE
	case expired(s.wdl):
		return 0, os.ErrDeadlineExceeded
	}
	n := len(p)
	if s.pending() == 0 {
		p = p[s.m.frame(s, p):]
	}
	if len(p) == 0 {
		return n, nil
	}
	if s.pending()+len(p) > s.m.cfg.HardLimit {
		s.reset(CodeCancel, ErrWriteLimit)
		return 0, ErrWriteLimit
	}
	if s.pending() == 0 {
		s.out, s.outOff = s.m.lend(), 0
		s.progress = time.Now()
	}
	s.out = append(s.out, p...)
	s.m.enqueue(s)
	return n, nil
}

func (s *Stream) pending() int { return len(s.out) - s.outOff }

// move sends what the windows allow of the output that waits.
func (s *Stream) move() {
	if n := s.m.frame(s, s.out[s.outOff:min(len(s.out), s.outOff+quantum)]); n > 0 {
		s.outOff += n
		s.progress = time.Now()
		if s.pending() == 0 {
			s.m.giveBack(s.out)
			s.out, s.outOff = nil, 0
		} else if s.outOff >= 64<<10 {
			s.out = s.out[:copy(s.out, s.out[s.outOff:])]
			s.outOff = 0
		}
		s.drained.Signal()
	}
	s.finish()
}

// finish sends END_STREAM when it is due.
func (s *Stream) finish() {
	if s.state == stateOver || s.pending() > 0 {
		return
	}
	if s.fin && !s.finSent {
		s.finSent = true
		s.m.out = appendHeader(s.m.out, 0, frameData, flagEndStream, s.id)
		s.m.wake()
	}
	switch {
	case s.finSent && s.rerr != nil:
		s.m.remove(s, nil)
	case s.finSent && s.closed:
		// The peer need not send what nobody reads (RFC 9113, 8.1).
		s.m.out = appendReset(s.m.out, s.id, CodeNone)
		s.m.remove(s, nil)
	}
}

// Flushed parks until at most limit bytes wait for the peer's window. It
// ends a stream whose peer gives none.
func (s *Stream) Flushed(limit int) error {
	for s.werr == nil && s.pending() > limit {
		if expired(s.wdl) {
			return os.ErrDeadlineExceeded
		}
		until := s.progress.Add(s.m.cfg.Stall)
		if !s.wdl.IsZero() && s.wdl.Before(until) {
			until = s.wdl
		}
		err := s.m.task.Current().WaitUntil(&s.drained, until)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if err != nil && !expired(s.wdl) && s.pending() > limit && expired(s.progress.Add(s.m.cfg.Stall)) {
			s.reset(CodeCancel, ErrStalled)
		}
	}
	s.drained.Signal()
	if s.orderly {
		return nil
	}
	return s.werr
}

// CloseWrite ends the sending side once what was written is sent.
func (s *Stream) CloseWrite() error {
	if s.orderly {
		return nil
	}
	if s.werr != nil {
		return s.werr
	}
	s.fin = true
	s.finish()
	return nil
}

// Close ends both sides. What was written is still sent; what was received
// is dropped. An unanswered stream is refused.
func (s *Stream) Close() error {
	if s.closed {
		return net.ErrClosed
	}
	if s.state == stateOpening {
		s.reset(CodeCancel, net.ErrClosed)
	}
	s.closed = true
	s.m.consumed(len(s.in) - s.inOff)
	s.m.giveBack(s.in)
	s.in, s.inOff = nil, 0
	s.fin = true
	s.finish()
	s.readable.Broadcast()
	s.drained.Broadcast()
	return nil
}

// Abort resets the stream and drops what was written.
func (s *Stream) Abort() { s.reset(CodeCancel, net.ErrClosed) }

// AbortWith is Abort with the error that the stream's tasks get.
func (s *Stream) AbortWith(cause error) { s.reset(CodeCancel, cause) }

func (s *Stream) reset(code Code, cause error) {
	if s.state == stateOver {
		return
	}
	s.m.out = appendReset(s.m.out, s.id, code)
	s.m.wake()
	if s.rerr == nil || errors.Is(s.rerr, io.EOF) {
		s.rerr = cause
	}
	s.drop()
	s.m.remove(s, cause)
}

// drop forgets what was received and what waits to be sent.
func (s *Stream) drop() {
	s.m.consumed(len(s.in) - s.inOff)
	s.m.giveBack(s.in)
	s.m.giveBack(s.out)
	s.in, s.inOff, s.out, s.outOff = nil, 0, nil, 0
}

// Draining says that the session takes no more streams and will end this
// one: code that serves one request after another ends after the current one.
func (s *Stream) Draining() bool { return s.m.draining }

// LocalAddr is the address that the stream stands for at this end.
func (s *Stream) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(s.Local) }

// RemoteAddr is the address of the client or the destination.
func (s *Stream) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(s.Remote) }

// SetDeadline sets both deadlines; the zero time is none.
func (s *Stream) SetDeadline(t time.Time) error {
	s.rdl, s.wdl = t, t
	s.readable.Broadcast()
	s.drained.Broadcast()
	return nil
}

// SetReadDeadline bounds the current and later Read calls.
func (s *Stream) SetReadDeadline(t time.Time) error {
	s.rdl = t
	s.readable.Broadcast()
	return nil
}

// SetWriteDeadline bounds the current and later Write and Flushed calls.
func (s *Stream) SetWriteDeadline(t time.Time) error {
	s.wdl = t
	s.drained.Broadcast()
	return nil
}
