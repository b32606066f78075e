// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"io"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http2"
)

const (
	// MaxTokens bounds what a client presents, in bytes.
	MaxTokens = 160 << 10

	tokensPath    = "/sallyport/tokens"
	tokensTimeout = 10 * time.Second
)

// Present gives the server access tokens for all streams of the session, in
// place of those that it was given before. It returns once they are taken: what
// is asked for afterwards bears them.
func (m *Session) Present(t *netloop.Task, list []byte, deadline time.Time) error {
	s, err := m.OpenLast(t, []http2.Field{{Name: ":method", Value: "PUT"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: "tokens"},
		{Name: ":path", Value: tokensPath}}, false, deadline)
	if err != nil {
		return err
	}
	_ = s.SetDeadline(deadline)
	if _, err = s.Write(list); err == nil {
		err = s.CloseWrite()
	}
	var h http2.Head
	if err == nil {
		h, err = s.ReadHead()
	}
	if err == nil {
		_, err = answer(&h)
	}
	if err != nil {
		s.Reset(http2.CodeCancel, err)
		return err
	}
	return s.Close()
}

// takeTokens serves a PUT; one at a time, so that a peer has no more held than
// one may be long.
func (m *server) takeTokens(s *Stream) {
	switch path, _ := s.Head().Only(":path"); {
	case path != tokensPath:
		_ = s.Refuse(404, "")
		return
	case m.taking:
		_ = s.Refuse(429, "")
		return
	}
	m.taking = true
	defer func() { m.taking = false }()
	_ = s.SetReadDeadline(time.Now().Add(tokensTimeout))
	var list []byte
	buf := make([]byte, 16<<10)
	for {
		n, err := s.Read(buf)
		if list = append(list, buf[:n]...); len(list) > MaxTokens {
			_ = s.Refuse(413, "")
			return
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			s.Reset(http2.CodeCancel, err)
			return
		}
	}
	if !m.Tokens(list) {
		_ = s.Refuse(400, "")
		return
	}
	if s.SendHead([]http2.Field{{Name: ":status", Value: "200"}}, true) == nil {
		_ = s.Close()
	}
}
