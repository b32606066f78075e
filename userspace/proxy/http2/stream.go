// SPDX-License-Identifier: Apache-2.0

package http2

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

// Stream is one stream of a session, to be used by tasks of the session's
// loop, one reader at a time. Its header lists are read and sent by Head,
// ReadHead, Trailers and SendHead, SendInterim, SendTrailers; between them it
// is a stream of bytes.
type Stream struct {
	m    *Session
	id   uint32
	over bool // ended in both directions or reset; no longer in the session's table
	born time.Time
	// Ended is called once when the stream has ended in both directions or was
	// reset, by either side. It must not park. May be nil.
	Ended func()

	head     Head   // server: of the request
	heads    []Head // client: of responses, not read yet
	trailers *Head  // that the peer sent
	headRead bool   // the peer's last header list before the data came
	headSent bool   // and ours was sent

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
	send     int64   // window that the peer gives
	queued   bool    // in the session's list of waiting streams
	last     []Field // trailers to be sent
	fin      bool    // CloseWrite was called
	finSent  bool
	orderly  bool // all output was sent, END_STREAM included
	closed   bool // Close was called
	werr     error
	wdl      time.Time
	drained  netloop.Event
	progress time.Time // when output last moved, while some waits
}

// Session is what the stream is part of.
func (s *Stream) Session() *Session { return s.m }

// Over says that the stream has ended in both directions or was reset.
func (s *Stream) Over() bool { return s.over }

// Orderly says that it has ended in both directions, and was not reset before
// all was sent.
func (s *Stream) Orderly() bool { return s.over && s.orderly }

// Head is what the request began with, server side.
func (s *Stream) Head() *Head { return &s.head }

// ReadHead parks until the peer's next header list is there, client side: of
// interim responses, then of the final one. It returns the error of the
// stream, io.ErrUnexpectedEOF after the final one, and os.ErrDeadlineExceeded
// at the read deadline.
func (s *Stream) ReadHead() (Head, error) {
	for {
		switch {
		case len(s.heads) > 0:
			h := s.heads[0]
			s.heads = s.heads[1:]
			return h, nil
		case s.headRead:
			return Head{}, io.ErrUnexpectedEOF
		case s.rerr != nil:
			return Head{}, s.rerr
		case expired(s.rdl):
			return Head{}, os.ErrDeadlineExceeded
		}
		if err := s.m.task.Current().WaitUntil(&s.readable, s.rdl); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return Head{}, err
		}
	}
}

// Trailers is the header list that ended the stream, nil if there was none.
// It is known once Read has returned io.EOF.
func (s *Stream) Trailers() *Head { return s.trailers }

// SendInterim sends the header list of a response that is not the final one.
func (s *Stream) SendInterim(list []Field) error {
	if s.over || s.headSent {
		return s.gone()
	}
	s.m.writeBlock(s.id, list, false)
	return nil
}

// SendHead sends the header list before the data, with end instead of any
// data. It is for a server: a client's goes with Open. Call Session.Room
// before.
func (s *Stream) SendHead(list []Field, end bool) error {
	if s.over || s.headSent || s.fin {
		return s.gone()
	}
	s.headSent = true
	s.m.writeBlock(s.id, list, end)
	if end {
		s.fin, s.finSent = true, true
		s.finish()
	}
	return nil
}

// SendTrailers ends the sending side with a header list once what was written
// is sent.
func (s *Stream) SendTrailers(list []Field) error {
	if s.over || s.fin {
		return s.gone()
	}
	s.last = list
	return s.CloseWrite()
}

func (s *Stream) gone() error {
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
	if s.rerr != nil || s.over {
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
	if s.over || s.pending() > 0 {
		return
	}
	if s.fin && !s.finSent {
		s.finSent = true
		if s.last != nil {
			s.m.writeBlock(s.id, s.last, true)
			s.last = nil
		} else {
			s.m.out = appendHeader(s.m.out, 0, frameData, flagEndStream, s.id)
			s.m.wake()
		}
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
// is dropped. A stream that has not been answered yet is reset.
func (s *Stream) Close() error {
	if s.closed {
		return net.ErrClosed
	}
	if !s.headSent || !s.headRead {
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

// Reset resets the stream with that code; its tasks get cause.
func (s *Stream) Reset(code Code, cause error) { s.reset(code, cause) }

func (s *Stream) reset(code Code, cause error) {
	if s.over {
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
