// SPDX-License-Identifier: Apache-2.0

package http2

import (
	"encoding/binary"
	"errors"
	"io"
	"time"
)

// take reads the frames in b and returns how many bytes it used.
func (m *Session) take(b []byte) (used int, err error) {
	for len(b)-used >= headerSize {
		h := parseHeader(b[used:])
		if h.length > maxFrame {
			return used, fault(CodeFrameSize, "a frame larger than was permitted")
		}
		if len(b)-used < headerSize+h.length {
			break
		}
		p := b[used+headerSize : used+headerSize+h.length]
		if err := m.takeFrame(h, p); err != nil {
			return used, err
		}
		used += headerSize + h.length
	}
	return used, nil
}

func (m *Session) takeFrame(h header, p []byte) error {
	if m.inBlock && (h.kind != frameContinuation || h.stream != m.headerOf.stream) {
		return fault(CodeProtocol, "a header block interrupted by another frame")
	}
	if !m.settled && (h.kind != frameSettings || h.flags&flagAck != 0) {
		return fault(CodeProtocol, "the first frame is not SETTINGS")
	}
	if h.kind != frameData && !m.control.take(m.heard) {
		return fault(CodeEnhanceYourCalm, "too many control frames")
	}
	switch h.kind {
	case frameData:
		return m.takeData(h, p)
	case frameHeaders:
		return m.takeHeaders(h, p)
	case frameContinuation:
		return m.takeContinuation(h, p)
	case frameReset:
		return m.takeReset(h, p)
	case frameSettings:
		return m.takeSettings(h, p)
	case framePing:
		return m.takePing(h, p)
	case frameGoAway:
		return m.takeGoAway(h, p)
	case frameWindow:
		return m.takeWindow(h, p)
	case framePush:
		return fault(CodeProtocol, "PUSH_PROMISE")
	case framePriority:
		if h.stream == 0 || h.length != 5 {
			return fault(CodeProtocol, "a malformed PRIORITY")
		}
	}
	return nil // other types are ignored (RFC 9113, 4.1)
}

// known says whether a stream was ever opened.
func (m *Session) known(id uint32) bool {
	if m.server {
		return id&1 == 1 && id <= m.lastID
	}
	return id&1 == 1 && id < m.nextID
}

func (m *Session) takeData(h header, p []byte) error {
	if !m.known(h.stream) {
		return fault(CodeProtocol, "DATA for a stream that was never opened")
	}
	if m.credit -= h.length; m.credit < 0 {
		return fault(CodeFlowControl, "more DATA than the connection's window")
	}
	data, err := unpad(h, p)
	if err != nil {
		return err
	}
	m.empty++
	if len(data) > 0 || h.flags&flagEndStream != 0 {
		m.empty = 0
	}
	if m.empty > 100 {
		return fault(CodeEnhanceYourCalm, "too many DATA frames without data")
	}
	s := m.streams[h.stream]
	switch {
	case s == nil:
		m.consumed(h.length)
		return nil
	case s.rerr != nil:
		m.consumed(h.length)
		s.reset(CodeStreamClosed, &ResetError{CodeStreamClosed})
		return nil
	case !s.headRead:
		m.consumed(h.length)
		s.reset(CodeProtocol, fault(CodeProtocol, "DATA before a header list"))
		return nil
	}
	if s.credit -= h.length; s.credit < 0 {
		m.consumed(h.length)
		s.reset(CodeFlowControl, fault(CodeFlowControl, "more DATA than the stream's window"))
		return nil
	}
	pad := h.length - len(data)
	if s.closed {
		m.consumed(len(data))
	} else if len(data) > 0 {
		s.deliver(data)
	}
	if pad > 0 {
		s.consumed(pad)
	}
	if h.flags&flagEndStream != 0 {
		s.rerr = io.EOF
		s.readable.Signal()
		s.finish()
	}
	return nil
}

func (m *Session) takeReset(h header, p []byte) error {
	if h.length != 4 {
		return fault(CodeFrameSize, "a malformed RST_STREAM")
	}
	if !m.known(h.stream) {
		return fault(CodeProtocol, "RST_STREAM for a stream that was never opened")
	}
	s := m.streams[h.stream]
	if !m.resets.take(m.heard) {
		return fault(CodeEnhanceYourCalm, "too many resets")
	}
	code := Code(binary.BigEndian.Uint32(p))
	// The rapid reset: opened, and taken back before anything came of it.
	early := s == nil && code != CodeNone || s != nil && (!s.headSent || m.heard.Sub(s.born) < time.Second && s.finSent)
	if m.server && early && !m.earlyResets.take(m.heard) {
		return fault(CodeEnhanceYourCalm, "too many early resets")
	}
	if s == nil {
		return nil
	}
	var cause error = &ResetError{code}
	if code == CodeRefused && !s.headRead {
		cause = ErrDraining
	}
	if s.rerr == nil {
		s.rerr = cause
	}
	if !errors.Is(s.rerr, io.EOF) {
		s.drop()
	} else {
		m.giveBack(s.out)
		s.out, s.outOff = nil, 0
	}
	m.remove(s, cause)
	return nil
}

func (m *Session) takeSettings(h header, p []byte) error {
	switch {
	case h.stream != 0:
		return fault(CodeProtocol, "SETTINGS for a stream")
	case h.flags&flagAck != 0:
		if h.length != 0 {
			return fault(CodeFrameSize, "an acknowledgement with settings")
		}
		return nil
	case h.length%6 != 0 || h.length > 64*6:
		return fault(CodeFrameSize, "a malformed SETTINGS")
	case !m.settings.take(m.heard):
		return fault(CodeEnhanceYourCalm, "too many SETTINGS")
	}
	for ; len(p) > 0; p = p[6:] {
		if err := m.set(binary.BigEndian.Uint16(p), binary.BigEndian.Uint32(p[2:])); err != nil {
			return err
		}
	}
	if !m.settled {
		m.settled = true
		m.deadline(m.heard)
	}
	m.out = appendHeader(m.out, 0, frameSettings, flagAck, 0)
	m.wake()
	m.changed.Broadcast()
	return nil
}

func (m *Session) set(id uint16, v uint32) error {
	switch id {
	case settingTableSize:
		m.enc.SetMaxDynamicTableSize(min(v, 4096))
	case settingPush:
		if v > 1 || v == 1 && !m.server {
			return fault(CodeProtocol, "a malformed ENABLE_PUSH")
		}
	case settingMaxStreams:
		m.peerStreams = int(min(v, 1<<20))
	case settingInitialWindow:
		if v > maxWindow {
			return fault(CodeFlowControl, "an initial window that is too large")
		}
		delta := int64(v) - m.peerWindow
		m.peerWindow = int64(v)
		for _, s := range m.streams {
			if s.send += delta; s.send > maxWindow {
				return fault(CodeFlowControl, "a window that is too large")
			}
			if s.pending() > 0 {
				m.enqueue(s)
			}
		}
	case settingMaxFrame:
		if v < maxFrame || v > 1<<24-1 {
			return fault(CodeProtocol, "a malformed MAX_FRAME_SIZE")
		}
	}
	return nil
}

func (m *Session) takePing(h header, p []byte) error {
	if h.length != 8 || h.stream != 0 {
		return fault(CodeFrameSize, "a malformed PING")
	}
	if h.flags&flagAck != 0 {
		return nil
	}
	if !m.pings.take(m.heard) {
		return fault(CodeEnhanceYourCalm, "too many PINGs")
	}
	m.out = append(appendHeader(m.out, 8, framePing, flagAck, 0), p...)
	m.wake()
	return nil
}

func (m *Session) takeGoAway(h header, p []byte) error {
	if h.length < 8 || h.stream != 0 {
		return fault(CodeFrameSize, "a malformed GOAWAY")
	}
	last := binary.BigEndian.Uint32(p) & maxWindow
	if !m.draining || m.retired {
		m.beginDrain(m.heard)
	}
	if !m.server {
		for id, s := range m.streams {
			if id > last {
				s.end(ErrDraining)
			}
		}
	}
	m.wakeAll()
	return nil
}

func (m *Session) takeWindow(h header, p []byte) error {
	if h.length != 4 {
		return fault(CodeFrameSize, "a malformed WINDOW_UPDATE")
	}
	n := int64(binary.BigEndian.Uint32(p) & maxWindow)
	if h.stream == 0 {
		if n == 0 {
			return fault(CodeProtocol, "a WINDOW_UPDATE of nothing")
		}
		if m.send += n; m.send > maxWindow {
			return fault(CodeFlowControl, "a connection window that is too large")
		}
		if len(m.waiting) > 0 {
			m.wake()
		}
		return nil
	}
	if !m.known(h.stream) {
		return fault(CodeProtocol, "WINDOW_UPDATE for a stream that was never opened")
	}
	s := m.streams[h.stream]
	if s == nil {
		return nil
	}
	if n == 0 {
		s.reset(CodeProtocol, fault(CodeProtocol, "a WINDOW_UPDATE of nothing"))
		return nil
	}
	if s.send += n; s.send > maxWindow {
		s.reset(CodeFlowControl, fault(CodeFlowControl, "a stream window that is too large"))
		return nil
	}
	if s.pending() > 0 {
		m.enqueue(s)
	}
	return nil
}
