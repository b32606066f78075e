// SPDX-License-Identifier: Apache-2.0

package http2

import (
	"bytes"
	"io"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"golang.org/x/net/http2/hpack"
)

// Field is one field of a header list. Sensitive ones are kept out of
// compression tables (RFC 7541, 7.1.3), here and on their further way.
type Field = hpack.HeaderField

// Head is a header list as it was received, not judged yet.
type Head struct {
	Fields []Field
	// Long says that the list passed a limit and that Fields lacks the rest.
	Long bool
	// End says that nothing follows it.
	End bool
}

// MaxFields bounds the fields of a header list, pseudo-headers included.
const MaxFields = 128

// get returns the value of the first field of that name, "" without one.
func (h *Head) get(name string) string {
	for i := range h.Fields {
		if h.Fields[i].Name == name {
			return h.Fields[i].Value
		}
	}
	return ""
}

// field takes one field of the list that is being decoded.
func (m *Session) field(f hpack.HeaderField) {
	m.size += len(f.Name) + len(f.Value) + 32
	if m.size > m.cfg.MaxHeaderList || len(m.list.Fields) == MaxFields {
		m.list.Long = true
		return
	}
	m.list.Fields = append(m.list.Fields, f)
}

// writeBlock sends a header list, which must happen in one piece.
func (m *Session) writeBlock(id uint32, list []Field, end bool) {
	m.block.Reset()
	for _, f := range list {
		_ = m.enc.WriteField(f) // a bytes.Buffer takes everything
	}
	kind, flags := uint8(frameHeaders), uint8(0)
	if end {
		flags = flagEndStream
	}
	for b := m.block.Bytes(); ; kind, flags = frameContinuation, 0 {
		n := min(len(b), m.peerFrame)
		if n == len(b) {
			flags |= flagEndHeaders
		}
		m.out = append(appendHeader(m.out, n, kind, flags, id), b[:n]...)
		if b = b[n:]; len(b) == 0 {
			break
		}
	}
	if m.block.Cap() > 8<<10 {
		m.block = bytes.Buffer{}
	}
	m.sent()
	m.wake()
}

func (m *Session) takeHeaders(h header, p []byte) error {
	if h.stream == 0 || h.stream&1 == 0 {
		return fault(CodeProtocol, "HEADERS for a stream that cannot be")
	}
	if !m.server && !m.known(h.stream) {
		return fault(CodeProtocol, "HEADERS for a stream that was never opened")
	}
	p, err := unpad(h, p)
	if err != nil {
		return err
	}
	m.headers, m.headerOf, m.inBlock, m.continua = append(m.headers[:0], p...), h, true, 0
	if h.flags&flagEndHeaders != 0 {
		return m.headerBlock()
	}
	return nil
}

func (m *Session) takeContinuation(h header, p []byte) error {
	if !m.inBlock {
		return fault(CodeProtocol, "CONTINUATION without HEADERS")
	}
	if m.continua++; m.continua > maxContinuations || len(m.headers)+len(p) > m.cfg.MaxHeaderList {
		return fault(CodeEnhanceYourCalm, "a header block that is too long")
	}
	m.headers = append(m.headers, p...)
	if h.flags&flagEndHeaders != 0 {
		return m.headerBlock()
	}
	return nil
}

// headerBlock decodes a complete header block, which must happen whatever
// becomes of the stream, since it moves the compression state.
func (m *Session) headerBlock() error {
	m.inBlock = false
	m.list, m.size = Head{Fields: m.list.Fields[:0], End: m.headerOf.flags&flagEndStream != 0}, 0
	if _, err := m.dec.Write(m.headers); err != nil {
		return fault(CodeCompression, "a header block that cannot be decoded")
	}
	if err := m.dec.Close(); err != nil {
		return fault(CodeCompression, "a header block that is cut off")
	}
	if cap(m.headers) > 4<<10 {
		m.headers = nil
	}
	list := m.list
	list.Fields = slices.Clone(m.list.Fields)
	clear(m.list.Fields)
	switch s := m.streams[m.headerOf.stream]; {
	case s != nil && s.rerr != nil:
		s.reset(CodeStreamClosed, &ResetError{CodeStreamClosed})
	case s != nil && s.headRead:
		s.takeTrailers(list)
	case s != nil:
		s.takeResponse(list)
	case m.server && m.headerOf.stream > m.lastID:
		m.lastID = m.headerOf.stream
		return m.takeRequest(list)
	}
	return nil
}

// takeRequest opens a stream.
func (m *Session) takeRequest(list Head) error {
	m.wake()
	if len(m.streams) >= m.cfg.MaxStreams || m.serving >= 2*m.cfg.MaxStreams || m.draining && m.heard.Sub(m.drainedAt) > lateStreams {
		m.out = appendReset(m.out, m.lastID, CodeRefused)
		if !m.earlyResets.take(m.heard) {
			return fault(CodeEnhanceYourCalm, "too many streams")
		}
		return nil
	}
	s := m.newStream(m.lastID)
	s.head, s.headRead = list, true
	if list.End {
		s.rerr = io.EOF
	}
	if m.handler == nil {
		return nil
	}
	m.serving++
	m.task.Go(func(t *netloop.Task) {
		defer func() {
			m.serving--
			if !s.closed {
				_ = s.Close()
			}
		}()
		if !s.over { // else it was taken back, or the session has ended
			m.handler(t, s)
		}
	})
	return nil
}

// takeResponse takes the header list of a response.
func (s *Stream) takeResponse(list Head) {
	status := list.get(":status")
	interim := len(status) == 3 && status[0] == '1'
	if interim && list.End || len(s.heads) >= maxHeads {
		s.reset(CodeProtocol, fault(CodeProtocol, "a malformed interim response, or too many"))
		return
	}
	s.heads = append(s.heads, list)
	s.headRead = !interim
	if list.End {
		s.rerr = io.EOF
	}
	s.readable.Signal()
	s.finish()
}

// takeTrailers takes the header list that ends a stream.
func (s *Stream) takeTrailers(list Head) {
	if !list.End || !s.m.cfg.Trailers {
		s.reset(CodeProtocol, fault(CodeProtocol, "a header list in the middle of a stream"))
		return
	}
	s.trailers = &list
	s.rerr = io.EOF
	s.readable.Signal()
	s.finish()
}

func (m *Session) newStream(id uint32) *Stream {
	s := &Stream{m: m, id: id, born: m.heard, window: m.cfg.Window, credit: m.cfg.Window, send: m.peerWindow}
	m.streams[id] = s
	return s
}

// Open begins a request with a header list, client side, with end one without
// content. It parks until the peer's settings are known, or the deadline.
// ErrDraining says that another session may be asked.
func (m *Session) Open(t *netloop.Task, list []Field, end bool, deadline time.Time) (*Stream, error) {
	return m.open(t, list, end, deadline, (*Session).Usable)
}

// OpenLast is Open also for a session that was retired and that the peer has
// not ended: for what the streams that are left need.
func (m *Session) OpenLast(t *netloop.Task, list []Field, end bool, deadline time.Time) (*Stream, error) {
	return m.open(t, list, end, deadline, func(m *Session) bool { return !m.over && m.retired || m.Usable() })
}

func (m *Session) open(t *netloop.Task, list []Field, end bool, deadline time.Time, usable func(*Session) bool) (*Stream, error) {
	for !m.settled && !m.over && !m.draining {
		// Its number of streams and their windows are not known before.
		if err := t.WaitUntil(&m.changed, deadline); err != nil {
			return nil, err
		}
	}
	switch {
	case m.over && m.err != nil:
		return nil, m.err
	case !usable(m):
		return nil, ErrDraining
	}
	s := m.newStream(m.nextID)
	m.nextID += 2
	s.headSent, s.fin, s.finSent = true, end, end
	m.writeBlock(s.id, list, end)
	return s, nil
}
