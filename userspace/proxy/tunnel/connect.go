// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"golang.org/x/net/http2/hpack"
)

// reasonField carries a refusal's reason code to a Sallyport peer.
const reasonField = "sallyport-reason"

// fields is a header list as it is decoded.
type fields struct {
	method, authority, status string
	forwarded, reason         string
	forwards                  int
	size                      int
	seen                      uint8
	regular                   bool // a field that is no pseudo-header came
	bad                       string
}

const (
	seenMethod = 1 << iota
	seenAuthority
	seenStatus
	seenPath // or :scheme, which CONNECT does not have
)

// add takes one field (RFC 9113, 8.2 and 8.3).
func (f *fields) add(h hpack.HeaderField) {
	if f.size += len(h.Name) + len(h.Value) + 32; f.size > maxHeaderList {
		f.bad = "a header list that is too long"
		return
	}
	if len(h.Name) > 0 && h.Name[0] == ':' {
		if f.regular {
			f.bad = "a pseudo-header after other fields"
		}
		f.pseudo(h.Name, h.Value)
		return
	}
	f.regular = true
	if !fieldName(h.Name) || !fieldValue(h.Value) {
		f.bad = "a malformed field"
		return
	}
	switch h.Name {
	case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade":
		f.bad = "a connection-specific field"
	case "forwarded":
		f.forwards++
		f.forwarded = h.Value
	case reasonField:
		f.reason = h.Value
	}
}

func (f *fields) pseudo(name, value string) {
	bit, to := uint8(0), &f.method
	switch name {
	case ":method":
		bit = seenMethod
	case ":authority":
		bit, to = seenAuthority, &f.authority
	case ":status":
		bit, to = seenStatus, &f.status
	case ":path", ":scheme":
		f.seen |= seenPath
		return
	default:
		f.bad = "an unknown pseudo-header"
		return
	}
	if f.seen&bit != 0 || !fieldValue(value) {
		f.bad = "a malformed pseudo-header"
	}
	f.seen |= bit
	*to = value
}

func fieldName(s string) bool {
	if s == "" {
		return false
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c >= 0x7f || c == ':' || 'A' <= c && c <= 'Z' {
			return false
		}
	}
	return true
}

func fieldValue(s string) bool {
	for _, c := range []byte(s) {
		if c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
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
	if m.continua++; m.continua > maxContinuations || len(m.headers)+len(p) > maxHeaderBlock {
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
	m.fields = fields{}
	if _, err := m.dec.Write(m.headers); err != nil {
		return fault(CodeCompression, "a header block that cannot be decoded")
	}
	if err := m.dec.Close(); err != nil {
		return fault(CodeCompression, "a header block that is cut off")
	}
	if cap(m.headers) > 4<<10 {
		m.headers = nil
	}
	if m.server {
		return m.takeRequest()
	}
	m.takeResponse()
	return nil
}

// takeRequest opens a stream.
func (m *Session) takeRequest() error {
	id := m.headerOf.stream
	if id <= m.lastID {
		if s := m.streams[id]; s != nil {
			s.reset(CodeProtocol, fault(CodeProtocol, "HEADERS in an open CONNECT stream"))
		}
		return nil
	}
	m.lastID = id
	f := &m.fields
	switch {
	case f.bad != "" || f.forwards > 1 || f.seen&seenMethod == 0 || f.seen&seenStatus != 0 || f.method == "CONNECT" && f.seen&seenPath != 0:
		m.out = appendReset(m.out, id, CodeProtocol)
	case len(m.streams) >= m.cfg.MaxStreams || m.draining && time.Since(m.drainedAt) > time.Second:
		m.out = appendReset(m.out, id, CodeRefused)
		if !m.earlyResets.take(m.heard) {
			return fault(CodeEnhanceYourCalm, "too many streams")
		}
	case f.method != "CONNECT":
		m.respond(id, 405, "", true)
	case f.seen&seenAuthority == 0 || f.authority == "" || len(f.authority) > 512:
		m.out = appendReset(m.out, id, CodeProtocol)
	default:
		m.open(id)
	}
	m.wake()
	return nil
}

func (m *Session) open(id uint32) {
	s := m.newStream(id)
	s.request = Connect{Authority: m.fields.authority, Forwarded: m.fields.forwarded}
	if m.headerOf.flags&flagEndStream != 0 {
		s.rerr = io.EOF
	}
	if m.handler == nil {
		return
	}
	m.task.Go(func(t *netloop.Task) {
		defer func() {
			if !s.closed {
				_ = s.Close()
			}
		}()
		m.handler(t, s)
	})
}

func (m *Session) newStream(id uint32) *Stream {
	s := &Stream{m: m, id: id, born: time.Now(), window: m.cfg.Window, credit: m.cfg.Window, send: m.peerWindow}
	m.streams[id] = s
	return s
}

// respond answers a CONNECT request.
func (m *Session) respond(id uint32, status int, reason string, end bool) {
	m.block.Reset()
	_ = m.enc.WriteField(hpack.HeaderField{Name: ":status", Value: strconv.Itoa(status)})
	if reason != "" {
		_ = m.enc.WriteField(hpack.HeaderField{Name: reasonField, Value: reason})
	}
	flags := uint8(flagEndHeaders)
	if end {
		flags |= flagEndStream
	}
	m.out = append(appendHeader(m.out, m.block.Len(), frameHeaders, flags, id), m.block.Bytes()...)
	m.wake()
}

// takeResponse takes the answer to a CONNECT request.
func (m *Session) takeResponse() {
	s := m.streams[m.headerOf.stream]
	if s == nil {
		return
	}
	f := &m.fields
	status, err := strconv.Atoi(f.status)
	if f.bad != "" || err != nil || len(f.status) != 3 || f.seen != seenStatus || s.state != stateOpening {
		s.reset(CodeProtocol, fault(CodeProtocol, "a malformed answer to CONNECT"))
		return
	}
	if status < 200 {
		return
	}
	s.status, s.reason = status, ""
	if len(f.reason) <= 64 {
		s.reason = f.reason
	}
	if status != 200 {
		s.reset(CodeCancel, &RefusedError{s.status, s.reason})
		return
	}
	s.state, s.opened = stateOpen, true
	if m.headerOf.flags&flagEndStream != 0 {
		s.rerr = io.EOF
	}
	s.drained.Broadcast()
}

// Open asks for a stream to authority and parks until it is answered, or the
// deadline. forwarded is the value of the Forwarded field, "" for none. It
// returns ErrDraining where another session may be asked, *RefusedError
// where the peer refused.
func (m *Session) Open(t *netloop.Task, authority, forwarded string, deadline time.Time) (*Stream, error) {
	for !m.settled && !m.over && !m.draining {
		// Its number of streams and their windows are not known before.
		if err := t.WaitUntil(&m.changed, deadline); err != nil {
			return nil, err
		}
	}
	switch {
	case m.over && m.err != nil:
		return nil, m.err
	case !m.Usable():
		return nil, ErrDraining
	}
	s := m.newStream(m.nextID)
	m.nextID += 2
	m.block.Reset()
	_ = m.enc.WriteField(hpack.HeaderField{Name: ":method", Value: "CONNECT"})
	_ = m.enc.WriteField(hpack.HeaderField{Name: ":authority", Value: authority})
	if forwarded != "" {
		// Each client has another port: kept out of the table.
		_ = m.enc.WriteField(hpack.HeaderField{Name: "forwarded", Value: forwarded, Sensitive: true})
	}
	m.out = append(appendHeader(m.out, m.block.Len(), frameHeaders, flagEndHeaders, s.id), m.block.Bytes()...)
	m.wake()
	for s.state == stateOpening {
		if err := t.WaitUntil(&s.drained, deadline); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) && s.state != stateOpening {
				break
			}
			s.reset(CodeCancel, err)
			return nil, err
		}
	}
	if !s.opened {
		return nil, s.werr
	}
	return s, nil
}
