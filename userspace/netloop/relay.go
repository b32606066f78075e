// SPDX-License-Identifier: Apache-2.0

package netloop

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// Stream is a connection whose sending side can be ended by itself: a *Conn, a *tls.Conn over one, a stream of a tunnel.
//
// A stream of another package that keeps its own output should have a method Flushed(limit int) error like that of Conn, and, so
// that an idle Relay holds no buffer, AwaitRead() error.
type Stream interface {
	net.Conn
	CloseWrite() error
}

// RelayOptions bound a Relay.
type RelayOptions struct {
	Idle time.Duration // end it when nothing moved in either direction for so long; 0: never
}

// Flushed parks until at most limit bytes written to s wait to be sent. It asks s, or what is beneath it as far as NetConn tells; where
// nobody knows, it returns nil at once.
func Flushed(s net.Conn, limit int) error {
	for {
		switch v := s.(type) {
		case interface{ Flushed(limit int) error }:
			return v.Flushed(limit)
		case interface{ NetConn() net.Conn }:
			s = v.NetConn()
		default:
			return nil
		}
	}
}

// bottom is the Conn beneath s, nil if there is none.
func bottom(s net.Conn) *Conn {
	for {
		switch v := s.(type) {
		case *Conn:
			return v
		case interface{ NetConn() net.Conn }:
			s = v.NetConn()
		default:
			return nil
		}
	}
}

// pollable is the Conn beneath s if Read of s can be tried without parking: s is that Conn itself or TLS right over it.
func pollable(s Stream) *Conn {
	c, _ := s.(*Conn)
	if secured, ok := s.(*tls.Conn); ok {
		c, _ = secured.NetConn().(*Conn)
	}
	if c == nil || c.nc != nil {
		return nil
	}
	return c
}

// Relay copies both ways until both are done, and returns the bytes that went each way. The end of one direction is passed on by
// CloseWrite while the other goes on; a side takes no more input while more than Options.WriteLimit bytes of it wait on the other.
// An error of either side ends both directions: io.ErrUnexpectedEOF if a TLS peer went without close_notify, os.ErrDeadlineExceeded
// after o.Idle, the cause of Engine.Kill. A TLS handshake that is still to be done is bound by the deadlines that are set; then
// Relay clears those of both. It closes neither; after an error the caller should abort what must not look complete.
func Relay(t *Task, a, b Stream, o RelayOptions) (aToB, bToA int64, err error) {
	for _, s := range []Stream{a, b} {
		if secured, ok := s.(*tls.Conn); ok {
			if err := secured.Handshake(); err != nil {
				return 0, 0, err
			}
		}
	}
	if err := errors.Join(a.SetDeadline(time.Time{}), b.SetDeadline(time.Time{})); err != nil {
		return 0, 0, err
	}
	if from, to := pollable(a), pollable(b); from != nil && to != nil && from != to {
		p := &relay{t: t, r: t.l.r, idle: int64(o.Idle), half: [2]half{
			{src: a, dst: b, from: from, to: to}, {src: b, dst: a, from: to, to: from}}}
		err = p.wait()
		return p.half[0].moved, p.half[1].moved, err
	}
	return relayTasks(t, a, b, o)
}

// relay moves bytes between two connections as the loop finds them ready. The task that called Relay is parked meanwhile, so an idle
// relay has no buffer and costs no switch to wake.
type relay struct {
	t         *Task
	r         *reactor
	half      [2]half
	idle      int64
	last      int64 // when something moved
	timer     timer
	scheduled bool
	over      bool
	err       error
}

// half is one direction.
type half struct {
	src, dst Stream
	from, to *Conn
	other    *half
	moved    int64
	ended    bool // src is at its end, and dst was told
}

// wait runs the relay to its end.
func (p *relay) wait() error {
	a, b := p.half[0].from, p.half[1].from
	if a.relay != nil || b.relay != nil || a.reader != nil || b.reader != nil {
		return ErrBusy
	}
	a.relay, b.relay = p, p
	p.half[0].other, p.half[1].other = &p.half[1], &p.half[0]
	p.timer.relay = p
	p.last = p.r.now
	if p.idle > 0 {
		p.r.wheel.set(&p.timer, p.last+p.idle)
	}
	p.schedule()
	err := p.t.park(noDeadline)
	p.over = true
	a.relay, b.relay = nil, nil
	p.r.wheel.clear(&p.timer)
	if err == nil {
		err = p.err
	}
	return err
}

// schedule has the relay looked at in this turn, or the next if its time in this one is over.
func (p *relay) schedule() {
	if !p.scheduled && !p.over {
		p.scheduled = true
		p.r.pumps = append(p.r.pumps, p)
	}
}

func (p *relay) finish(err error) {
	if !p.over {
		p.over, p.err = true, err
		p.t.wake(nil)
	}
}

func (p *relay) idleTimer() {
	at := max(p.last, p.half[0].to.progress, p.half[1].to.progress) + p.idle
	if at <= p.r.now {
		p.finish(os.ErrDeadlineExceeded)
		return
	}
	p.r.wheel.set(&p.timer, at)
}

// run moves what can be moved.
func (p *relay) run() {
	for i := range p.half {
		if p.over {
			return
		}
		if err := p.move(&p.half[i]); err != nil {
			p.finish(err)
			return
		}
	}
	a, b := &p.half[0], &p.half[1]
	if a.ended && b.ended && a.to.pending() == 0 && b.to.pending() == 0 {
		p.finish(nil)
	}
}

// move does one large read and one write. Under TLS the read is one from the socket, and the records in it are opened one after the
// other into the same buffer.
func (p *relay) move(h *half) error {
	if h.to.werr != nil {
		return h.to.werr
	}
	if h.ended {
		return nil
	}
	if h.to.broken && h.other.ended {
		return syscall.EPIPE // the reading of it, which would find the error, is over
	}
	if h.to.pending() > p.t.l.e.opt.WriteLimit {
		return nil
	}
	buf := p.r.relayBuffer()
	n, err := h.gather(buf)
	if n > 0 {
		h.moved += int64(n)
		p.last = p.r.now
		if _, err := h.dst.Write(buf[:n]); err != nil {
			return err
		}
	}
	switch {
	case err == nil, errors.Is(err, errAgain) && h.from.ready:
		p.schedule()
	case errors.Is(err, io.EOF):
		h.ended = true
		return h.end()
	case !errors.Is(err, errAgain):
		return err
	}
	return nil
}

// gather reads until the buffer is nearly full, nothing is left (errAgain) or the stream ends.
func (h *half) gather(buf []byte) (n int, err error) {
	h.from.nopark = true
	defer func() { h.from.nopark = false }()
	for err == nil && len(buf)-n >= directRead {
		var k int
		k, err = h.src.Read(buf[n:])
		n += k
		if err == nil && h.src == Stream(h.from) && !h.from.ready && len(h.from.ahead) == 0 {
			err = errAgain // the read was short: asking again would find nothing
		}
	}
	return n, err
}

// end passes the end of src on to dst, unless a TLS peer left without saying so: then someone else may have cut the stream.
func (h *half) end() error {
	if truncated(h.src, h.from) {
		return io.ErrUnexpectedEOF
	}
	return h.dst.CloseWrite()
}

// Truncated says whether a stream of TLS that was read to its end has ended without close_notify: then someone else may have cut it,
// and what came must not pass for all of it. It is false of every other stream.
func Truncated(s Stream) bool { return truncated(s, bottom(s)) }

// truncated tells a TLS stream whose transport ended from one ended by close_notify, after which crypto/tls reads no further.
func truncated(s Stream, transport *Conn) bool {
	_, secured := s.(*tls.Conn)
	return secured && transport != nil && errors.Is(transport.rerr, io.EOF)
}

const relayBufferSize = 96 << 10

func (r *reactor) relayBuffer() []byte {
	if r.relayed == nil {
		r.relayed = make([]byte, relayBufferSize)
	}
	return r.relayed
}

// pair is a relay by two tasks, for streams that only they know how to wait for.
type pair struct {
	a, b  Stream
	idle  time.Duration
	last  time.Time
	limit int
	ended Event
	left  int
	err   error
}

func relayTasks(t *Task, a, b Stream, o RelayOptions) (aToB, bToA int64, err error) {
	p := &pair{a: a, b: b, idle: o.Idle, last: time.Now(), limit: t.l.e.opt.WriteLimit, left: 2}
	t.Go(func(t *Task) { p.direction(t, b, a, &bToA) })
	p.direction(t, a, b, &aToB)
	for p.left > 0 {
		if err := t.Wait(&p.ended); err != nil {
			return aToB, bToA, err
		}
	}
	for _, s := range []Stream{a, b} {
		if p.err == nil {
			// crypto/tls has set one in the past with its close_notify.
			p.err = s.SetWriteDeadline(time.Time{})
		}
		if p.err == nil {
			p.err = Flushed(s, 0)
		}
	}
	return aToB, bToA, p.err
}

// direction runs one way. Its error ends the other by a deadline in the past.
func (p *pair) direction(t *Task, src, dst Stream, moved *int64) {
	err := ErrPanicked // unless copy returns
	defer func() {
		p.left--
		if err != nil && p.err == nil {
			p.err = err
			_ = p.a.SetDeadline(time.Unix(1, 0))
			_ = p.b.SetDeadline(time.Unix(1, 0))
		}
		p.ended.Broadcast()
	}()
	err = p.copy(t, src, dst, moved)
}

func (p *pair) copy(t *Task, src, dst Stream, moved *int64) error {
	for {
		if p.err != nil { // the other direction failed before this one began: step would lift its deadline
			return p.err
		}
		n, err := p.step(t, src, dst)
		*moved += int64(n)
		switch {
		case p.err != nil:
			return p.err
		case errors.Is(err, io.EOF):
			if Truncated(src) {
				return io.ErrUnexpectedEOF
			}
			return dst.CloseWrite()
		case p.idle > 0 && errors.Is(err, os.ErrDeadlineExceeded) && time.Since(p.last) < p.idle:
			// The other direction was busy.
		case err != nil:
			return err
		}
	}
}

// step moves one buffer.
func (p *pair) step(t *Task, src, dst Stream) (int, error) {
	if p.idle > 0 {
		if err := src.SetReadDeadline(p.last.Add(p.idle)); err != nil {
			return 0, err
		}
	}
	c := pollable(src)
	if v, ok := src.(interface{ AwaitRead() error }); ok {
		// Not so crypto/tls, which may hold whole records and is asked before its socket is waited for.
		if err := v.AwaitRead(); err != nil {
			return 0, err
		}
	}
	buf := t.Buffer()
	if c != nil {
		c.nopark = true
	}
	n, err := src.Read(buf)
	if c != nil {
		c.nopark = false
	}
	if n > 0 {
		p.last = time.Now()
		if _, err := dst.Write(buf[:n]); err != nil {
			t.Release(buf)
			return 0, err
		}
	}
	t.Release(buf)
	if errors.Is(err, errAgain) {
		err = c.AwaitRead()
	}
	if n > 0 && err == nil {
		err = Flushed(dst, p.limit)
	}
	return n, err
}
