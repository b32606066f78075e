// SPDX-License-Identifier: Apache-2.0

package http2

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"golang.org/x/net/http2/hpack"
)

// Session is one connection in either role. It belongs to one loop.
type Session struct {
	c       netloop.Stream
	task    *netloop.Task // any task of the loop
	cfg     Config
	server  bool
	handler func(*netloop.Task, *Stream)

	streams map[uint32]*Stream
	serving int    // handlers that have not returned
	nextID  uint32 // client: of the next stream
	lastID  uint32 // server: highest that the peer opened
	waiting []*Stream

	out     []byte // frames to be written
	spare   []byte
	work    netloop.Event // there is something for the writer
	changed netloop.Event // the number of streams, or the end of the session
	taken   netloop.Event // the writer took what was in out
	buffers [][]byte
	large   [][]byte
	block   bytes.Buffer // of the encoder

	// What the peer allows.
	send        int64
	peerWindow  int64
	peerFrame   int
	peerStreams int
	settled     bool // its first SETTINGS came

	// What we allow.
	credit int
	owed   int

	enc      *hpack.Encoder
	dec      *hpack.Decoder
	list     Head   // that is being decoded
	size     int    // of it (RFC 9113, 6.5.2)
	headers  []byte // a header block that is not complete
	headerOf header // its HEADERS frame
	inBlock  bool
	continua int

	resets, earlyResets, settings, pings, control bucket
	empty                                         int // DATA frames without data in a row

	heard     time.Time
	active    time.Time // when the last stream ended
	pinged    time.Time // zero when no ping is out
	draining  bool
	retired   bool      // it drains without a time limit of ours
	drainedAt time.Time // when the drain began
	over      bool
	err       error
}

func newSession(t *netloop.Task, c netloop.Stream, cfg Config, server bool) *Session {
	now := time.Now()
	m := &Session{c: c, task: t, cfg: cfg.withDefaults(), server: server, streams: map[uint32]*Stream{}, nextID: 1,
		send: 65535, peerWindow: 65535, peerFrame: maxData, peerStreams: 1000, heard: now, active: now,
		resets: newBucket(1000, 4000), earlyResets: newBucket(100, 300), settings: newBucket(1, 20),
		pings: newBucket(2, 60), control: newBucket(2000, 20000)}
	m.credit = m.cfg.ConnWindow
	m.enc = hpack.NewEncoder(&m.block)
	m.enc.SetMaxDynamicTableSizeLimit(4096)
	m.dec = hpack.NewDecoder(4096, m.field)
	m.dec.SetMaxStringLength(m.cfg.MaxHeaderList)
	return m
}

// start queues what each side sends first.
func (m *Session) start() {
	if !m.server {
		m.out = append(m.out, Preface...)
	}
	m.out = appendSettings(m.out, settingPush, 0, settingMaxStreams, uint32(m.cfg.MaxStreams), settingInitialWindow, uint32(m.cfg.Window),
		settingMaxHeaderList, uint32(m.cfg.MaxHeaderList))
	m.out = appendWindow(m.out, 0, m.cfg.ConnWindow-65535)
	m.wake()
}

// Serve runs the server's side of a session on c until it ends; handler runs
// for each request in a task of its own, and the stream is closed when it
// returns. None begins after Serve has returned. Serve returns nil when both sides ended in order. It does
// not close c.
func Serve(t *netloop.Task, c netloop.Stream, cfg Config, handler func(*netloop.Task, *Stream)) error {
	m := newSession(t, c, cfg, true)
	m.handler = handler
	m.start()
	t.Go(m.writer)
	return m.end(m.read(t))
}

// Dial starts the client's side of a session on c, which must be owned by
// the calling task; a task of the session takes it over and closes it.
func Dial(t *netloop.Task, c netloop.Stream, cfg Config) *Session {
	m := newSession(t, c, cfg, false)
	m.start()
	own := connOf(c)
	if own != nil {
		t.Disown(own)
	}
	t.Go(func(t *netloop.Task) {
		m.task = t
		if own != nil {
			t.Own(own)
		}
		t.Go(m.writer)
		_ = m.end(m.read(t))
		_ = c.Close()
	})
	return m
}

// beneath is what can be aborted under c: a connection of the loop, or a
// stream of another session.
func beneath(c any) interface{ Abort() } {
	for {
		switch v := c.(type) {
		case interface{ Abort() }:
			return v
		case interface{ NetConn() net.Conn }:
			c = v.NetConn()
		default:
			return nil
		}
	}
}

// connOf is the connection of the loop under c, nil if there is none.
func connOf(c any) *netloop.Conn {
	conn, _ := beneath(c).(*netloop.Conn)
	return conn
}

// Changed parks until the number of streams changes, or the session drains or
// ends, or the deadline.
func (m *Session) Changed(t *netloop.Task, deadline time.Time) error {
	return t.WaitUntil(&m.changed, deadline)
}

// Await parks until Open can be called, or the session will take no more
// streams, or the deadline.
func (m *Session) Await(t *netloop.Task, deadline time.Time) error {
	for !m.over && !m.draining {
		wait := &m.changed
		if m.settled && !m.Full() {
			if len(m.out) <= m.cfg.WriteLimit {
				break
			}
			wait = &m.taken
		}
		if err := t.WaitUntil(wait, deadline); err != nil {
			return err
		}
	}
	return nil
}

// Room parks until what waits for the socket is little enough for another
// header list, which no window bounds. It returns an error where the engine
// ends.
func (m *Session) Room(t *netloop.Task) error {
	for len(m.out) > m.cfg.WriteLimit && !m.over {
		if err := t.Wait(&m.taken); err != nil {
			return err
		}
	}
	return nil
}

// Usable says whether another stream may be opened.
func (m *Session) Usable() bool {
	return !m.over && !m.draining && len(m.streams) < m.peerStreams && m.nextID < maxWindow-1
}

// Full says that only the number of streams keeps it from being usable.
func (m *Session) Full() bool { return !m.over && !m.draining && len(m.streams) >= m.peerStreams }

// Over says that the session has ended, and Err why.
func (m *Session) Over() bool { return m.over }

// Err is why the session ended, nil while it lives and if it ended in order.
func (m *Session) Err() error { return m.err }

// Streams is how many are open.
func (m *Session) Streams() int { return len(m.streams) }

// Draining says that the session takes no more streams.
func (m *Session) Draining() bool { return m.draining }

// Drain lets no more streams begin and ends the session when the last one
// has ended, or after Config.DrainTimeout.
func (m *Session) Drain() {
	if m.draining && !m.retired || m.over {
		return
	}
	m.beginDrain(time.Now())
	if m.server {
		m.out = appendGoAway(m.out, maxWindow, CodeNone)
	}
	m.wakeAll()
}

func (m *Session) beginDrain(now time.Time) {
	m.draining, m.retired, m.drainedAt = true, false, now
	m.drained()
}

// drained tells that no more streams are taken.
func (m *Session) drained() {
	if f := m.cfg.OnDrain; f != nil {
		m.cfg.OnDrain = nil
		f()
	}
}

// Retire is Drain without a limit of time for the streams that are open.
func (m *Session) Retire() {
	if !m.draining && !m.over {
		m.beginDrain(time.Now())
		m.retired = true
		if m.server {
			m.out = appendGoAway(m.out, maxWindow, CodeNone)
		}
		m.wakeAll()
	}
}

// wakeAll lets every task of the session see what has changed.
func (m *Session) wakeAll() {
	m.work.Signal()
	m.changed.Broadcast()
	m.taken.Broadcast()
}

// Kill ends the session at once; its streams get cause.
func (m *Session) Kill(cause error) {
	m.finishAll(cause)
	if c := beneath(m.c); c != nil {
		c.Abort()
	}
}

func (m *Session) wake() { m.work.Signal() }

// Buffers that a session keeps for what waits on either side of its streams.
const (
	keptBuffers = 16
	smallBuffer = 4 << 10
	largeBuffer = 64 << 10
	keptLarge   = 4 // of those over largeBuffer
	// trimAfter is how long a session without streams keeps any.
	trimAfter = 5 * time.Second
)

func (m *Session) lend() []byte {
	list := &m.buffers
	if len(m.large) > 0 {
		list = &m.large // who needs a buffer at all is likely to need a large one
	}
	if n := len(*list); n > 0 {
		b := (*list)[n-1]
		*list = (*list)[:n-1]
		return b[:0]
	}
	return make([]byte, 0, smallBuffer)
}

func (m *Session) giveBack(b []byte) {
	switch {
	case cap(b) < smallBuffer:
	case cap(b) <= largeBuffer && len(m.buffers) < keptBuffers:
		m.buffers = append(m.buffers, b)
	case cap(b) > largeBuffer && cap(b) <= 2*m.cfg.MaxWindow && len(m.large) < keptLarge:
		m.large = append(m.large, b)
	}
}

// read takes frames until the connection ends.
func (m *Session) read(t *netloop.Task) error {
	buf := t.Buffer()
	defer func() { t.Release(buf) }()
	_ = m.c.SetReadDeadline(time.Now().Add(m.cfg.Handshake))
	awaits, _ := m.c.(interface{ AwaitRead() error })
	w := 0
	greeted := !m.server
	for {
		var n int
		var err error
		if w == 0 && awaits != nil { // a quiet connection holds no buffer
			t.Release(buf)
			err = awaits.AwaitRead()
			buf = t.Buffer()
		}
		if err == nil {
			n, err = m.c.Read(buf[w:])
			w += n
		}
		if n > 0 {
			m.heard, m.pinged = time.Now(), time.Time{}
		}
		used := 0
		if !greeted {
			if greeted, err = m.greet(buf[:w], err); err != nil {
				return err
			}
			if greeted {
				used = len(Preface)
			}
		}
		if greeted {
			k, ferr := m.take(buf[used:w])
			if ferr != nil {
				return ferr
			}
			used += k
		}
		w = copy(buf, buf[used:w])
		for len(m.out) > m.cfg.WriteLimit+maxQueued && !m.over {
			// It asks for more than it takes.
			if err := t.Wait(&m.taken); err != nil {
				return err
			}
		}
		if err == nil {
			continue
		}
		if done, err := m.quiet(err); done {
			return err
		}
	}
}

// greet judges the client's Preface.
func (m *Session) greet(b []byte, err error) (done bool, _ error) {
	n := min(len(b), len(Preface))
	if string(b[:n]) != Preface[:n] {
		return false, fault(CodeProtocol, "no HTTP/2 Preface")
	}
	if n == len(Preface) {
		return true, nil
	}
	return false, err
}

// quiet is asked when a read ended with an error, whether that is the end:
// the deadlines are ours, to look at the time.
func (m *Session) quiet(err error) (done bool, _ error) {
	now := time.Now()
	switch {
	case m.over:
		return true, m.err
	case !errors.Is(err, os.ErrDeadlineExceeded):
		if errors.Is(err, io.EOF) && len(m.streams) == 0 {
			return true, nil
		}
		return true, err
	case !m.settled:
		return true, fault(CodeSettingsTimeout, "no settings in time")
	case !m.pinged.IsZero() && now.Sub(m.pinged) >= m.cfg.PingTimeout:
		return true, fault(CodeNone, "the peer is silent")
	case len(m.streams) == 0 && now.Sub(m.active) >= m.cfg.Idle:
		m.Drain()
	case len(m.streams) > 0 && m.pinged.IsZero() && now.Sub(m.heard) >= m.cfg.Ping:
		m.out = append(appendHeader(m.out, 8, framePing, 0, 0), "sallypor"...)
		m.pinged = now
		m.wake()
	}
	m.deadline(now)
	return false, nil
}

// deadline sets when read looks at the time next.
func (m *Session) deadline(now time.Time) {
	until := m.heard.Add(m.cfg.Ping)
	if len(m.streams) == 0 {
		until = m.active.Add(m.cfg.Idle)
	}
	if !m.pinged.IsZero() {
		until = m.pinged.Add(m.cfg.PingTimeout)
	}
	if soonest := now.Add(time.Second); until.Before(soonest) {
		until = soonest
	}
	_ = m.c.SetReadDeadline(until)
}

// end ends the session and tells the peer why.
func (m *Session) end(err error) error {
	var f *FaultError
	if errors.As(err, &f) && !m.over {
		m.out = appendGoAway(m.out, m.lastID, f.Code)
		_, _ = m.c.Write(m.out)
		m.out = m.out[:0]
	}
	m.finishAll(err)
	return err
}

func (m *Session) finishAll(err error) {
	if m.over {
		return
	}
	m.over, m.err = true, err
	m.drained()
	if m.cfg.OnEnd != nil {
		m.cfg.OnEnd()
	}
	cause := err
	if cause == nil {
		cause = ErrClosed
	}
	for _, s := range m.streams {
		s.end(cause)
	}
	m.wakeAll()
}

// end is the stream's part in the end of its session.
func (s *Stream) end(cause error) {
	if s.rerr == nil {
		s.rerr = cause
	}
	s.m.giveBack(s.out)
	s.out, s.outOff = nil, 0
	s.m.remove(s, cause)
}

// remove takes the stream out of the session; cause is what writers get.
func (m *Session) remove(s *Stream, cause error) {
	if s.over {
		return
	}
	s.over = true
	s.orderly = cause == nil && s.finSent
	if s.werr == nil {
		s.werr = cause
	}
	if s.werr == nil {
		s.werr = ErrClosed
	}
	delete(m.streams, s.id)
	if s.orderly {
		m.earlyResets.give(1) // who lets most requests come to an end may take others back
	}
	if len(m.streams) == 0 {
		m.active = time.Now()
	}
	s.readable.Broadcast()
	s.drained.Broadcast()
	m.wakeAll()
	if f := s.Ended; f != nil {
		s.Ended = nil
		f()
	}
}

// consumed credits what left the session's buffers.
func (m *Session) consumed(n int) {
	m.owed += n
	if m.owed >= m.cfg.ConnWindow/4 && !m.over {
		m.credit += m.owed
		m.out = appendWindow(m.out, 0, m.owed)
		m.owed = 0
		m.wake()
	}
}

// quantum is what a stream with much to send may send before the next one's
// turn.
const quantum = 2 * maxData

// frame puts as much of p into DATA frames as the windows allow, and returns
// how much that is. It makes no small frames of large output.
func (m *Session) frame(s *Stream, p []byte) int {
	sent := 0
	for len(p) > 0 && !m.over && !s.over {
		n := int(min(s.send, m.send, int64(m.peerFrame), int64(m.cfg.WriteLimit-len(m.out))))
		if n >= len(p) {
			n = len(p)
		} else if n < 512 {
			break
		}
		m.out = append(appendHeader(m.out, n, frameData, 0, s.id), p[:n]...)
		m.sent()
		s.send -= int64(n)
		m.send -= int64(n)
		p = p[n:]
		sent += n
	}
	if sent > 0 {
		m.wake()
	}
	return sent
}

// sent lets the peer say what a frame of data or headers calls for: window
// updates, the ping of who measures the bandwidth.
func (m *Session) sent() {
	m.control.give(3)
	m.pings.give(1)
}

// enqueue has the stream's output moved when a window opens or the socket
// has taken what was there.
func (m *Session) enqueue(s *Stream) {
	if !s.queued {
		s.queued = true
		m.waiting = append(m.waiting, s)
	}
	m.wake()
}

// refill moves waiting output, each stream in its turn.
func (m *Session) refill() {
	list := m.waiting
	m.waiting = m.waiting[:0]
	for i, s := range list {
		if m.send < 512 || m.cfg.WriteLimit-len(m.out) < 512 {
			m.waiting = append(m.waiting, list[i:]...)
			return
		}
		s.queued = false
		if s.over || s.pending() == 0 {
			continue
		}
		s.move()
		if !s.over && s.pending() > 0 && s.send >= 512 {
			s.queued = true
			m.waiting = append(m.waiting, s)
		}
	}
}

// writer sends frames: what the tasks of one turn produced leaves together.
func (m *Session) writer(t *netloop.Task) {
	for {
		if len(m.waiting) > 0 {
			m.refill()
		}
		if len(m.out) > 0 && !m.over {
			b := m.out
			m.out = m.spare[:0]
			m.taken.Broadcast()
			err := m.flush(b)
			m.spare = b
			if cap(b) > 2*m.cfg.WriteLimit {
				m.spare = nil
			}
			if err != nil {
				m.Kill(err)
				return
			}
			continue
		}
		if m.over || m.drainOver() {
			return
		}
		if err := t.WaitTimeout(&m.work, m.tick()); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		m.sweep()
	}
}

// flush writes b, piece by piece where it is long, and waits for a slow peer.
func (m *Session) flush(b []byte) error {
	for len(b) > 0 {
		n := min(len(b), 2*m.cfg.WriteLimit)
		if _, err := m.c.Write(b[:n]); err != nil {
			return err
		}
		if err := netloop.Flushed(m.c, m.cfg.WriteLimit); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// drainOver ends the session when its drain is done.
func (m *Session) drainOver() bool {
	if !m.draining || len(m.streams) > 0 && m.retired || len(m.streams) > 0 && time.Since(m.drainedAt) < m.cfg.DrainTimeout {
		return false
	}
	if len(m.streams) == 0 && m.server && time.Since(m.drainedAt) < min(lateStreams, m.cfg.DrainTimeout) {
		// A stream that the peer opened before it saw GOAWAY is still served.
		return false
	}
	for _, s := range m.streams {
		s.reset(CodeCancel, ErrClosed)
	}
	m.out = appendGoAway(m.out, m.lastID, CodeNone)
	_, _ = m.c.Write(m.out)
	m.out = m.out[:0]
	m.finishAll(nil)
	_ = m.c.CloseWrite()
	_ = m.c.SetReadDeadline(time.Now().Add(time.Second)) // wakes the reader, which ends
	return true
}

// tick is how long the writer may sleep.
func (m *Session) tick() time.Duration {
	d := 10 * time.Second
	if !m.cfg.NotAfter.IsZero() && (!m.draining || m.retired) {
		d = min(d, max(time.Until(m.cfg.NotAfter), 0))
	}
	if m.draining && (!m.retired || len(m.streams) == 0) {
		d = min(d, 250*time.Millisecond)
	}
	return d
}

// sweep does what is due by the time alone.
func (m *Session) sweep() {
	if m.over {
		return
	}
	now := time.Now()
	if !m.cfg.NotAfter.IsZero() && !now.Before(m.cfg.NotAfter) || m.cfg.Ending != nil && !m.draining && m.cfg.Ending() {
		m.Drain()
	}
	if len(m.streams) == 0 && now.Sub(m.active) >= trimAfter {
		m.buffers, m.large, m.spare = nil, nil, nil
		if len(m.out) == 0 {
			m.out = nil
		}
	}
	for _, s := range m.waitingClosed() {
		if now.Sub(s.progress) >= m.cfg.Stall {
			s.reset(CodeCancel, ErrStalled)
		}
	}
}

// waitingClosed are the streams that nobody waits on any more but that have
// output left.
func (m *Session) waitingClosed() (list []*Stream) {
	for _, s := range m.streams {
		if s.closed && s.pending() > 0 {
			list = append(list, s)
		}
	}
	return list
}
