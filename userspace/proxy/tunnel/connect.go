// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http2"
)

// reasonField carries a refusal's reason code to a Sallyport peer.
const reasonField = "sallyport-reason"

// Connect is what a CONNECT request asks for.
type Connect struct {
	Authority string // host:port, as received
	Forwarded string // the value of the only Forwarded field, "" without one
}

// Stream is one CONNECT stream: a netloop.Stream, to be used by tasks of its
// session's loop, one reader at a time.
type Stream struct {
	*http2.Stream
	// Local and Remote are what LocalAddr and RemoteAddr return.
	Local, Remote netip.AddrPort

	request Connect
}

// LocalAddr is the address that the stream stands for at this end.
func (s *Stream) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(s.Local) }

// RemoteAddr is the address of the client or the destination.
func (s *Stream) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(s.Remote) }

// Draining says that the session takes no more streams and will end this
// one: code that serves one request after another ends after the current one.
func (s *Stream) Draining() bool { return s.Session().Draining() }

// Request is what the peer asked for, server side.
func (s *Stream) Request() Connect { return s.request }

// Accept answers 200.
func (s *Stream) Accept() error {
	return s.SendHead([]http2.Field{{Name: ":status", Value: "200"}}, false)
}

// Refuse answers with another status, and a reason code, and ends the
// stream.
func (s *Stream) Refuse(status int, reason string) error {
	list := []http2.Field{{Name: ":status", Value: strconv.Itoa(status)}}
	if reason != "" {
		list = append(list, http2.Field{Name: reasonField, Value: reason})
	}
	if err := s.SendHead(list, true); err != nil {
		return err
	}
	return s.Close()
}

// server is the server's side of a session.
type server struct {
	Handler
	taking bool // a list of tokens is being received
}

// serve runs the handler for a request that can be one.
func (m *server) serve(t *netloop.Task, s *http2.Stream) {
	stream := &Stream{Stream: s}
	switch method, err := stream.request.parse(s.Head()); {
	case err != nil:
		s.Reset(http2.CodeProtocol, err)
	case method == "PUT" && m.Tokens != nil:
		m.takeTokens(stream)
	case method != "CONNECT":
		_ = stream.Refuse(405, "")
	default:
		m.Connect(t, stream)
	}
}

// parse reads the header list of a request (RFC 9113, 8.5).
func (c *Connect) parse(h *http2.Head) (method string, err error) {
	if err := h.Check(); err != nil {
		return "", err
	}
	method, ok := h.Only(":method")
	if _, status := h.Only(":status"); !ok || status {
		return "", errConnect
	}
	if method != "CONNECT" {
		return method, nil
	}
	c.Authority, ok = h.Only(":authority")
	if !ok || h.Pseudo() != 2 || c.Authority == "" || len(c.Authority) > 512 || h.Count("forwarded") > 1 {
		return "", errConnect
	}
	c.Forwarded, _ = h.Only("forwarded")
	return method, nil
}

var (
	errConnect = &http2.FaultError{Code: http2.CodeProtocol, Text: "a malformed CONNECT"}
	errAnswer  = &http2.FaultError{Code: http2.CodeProtocol, Text: "a malformed answer to CONNECT"}
)

// RefusedError is what Open gets from a peer that answers with another
// status than 200.
type RefusedError struct {
	Status int
	Reason string // the peer's reason code, "" where it gave none
}

// Error returns the status and the reason.
func (e *RefusedError) Error() string {
	return "tunnel stream refused with status " + strconv.Itoa(e.Status) + " " + e.Reason
}

// Open asks for a stream to authority and parks until it is answered, or the
// deadline. forwarded is the value of the Forwarded field, "" for none. It
// returns http2.ErrDraining where another session may be asked, *RefusedError
// where the peer refused.
func (m *Session) Open(t *netloop.Task, authority, forwarded string, deadline time.Time) (*Stream, error) {
	list := []http2.Field{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: authority}}
	if forwarded != "" {
		// Each client has another port: kept out of the table.
		list = append(list, http2.Field{Name: "forwarded", Value: forwarded, Sensitive: true})
	}
	s, err := m.Session.Open(t, list, false, deadline)
	if err != nil {
		return nil, err
	}
	_ = s.SetReadDeadline(deadline)
	for {
		h, err := s.ReadHead()
		if err == nil {
			var status int
			if status, err = answer(&h); err == nil && status < 200 {
				continue
			}
		}
		if err != nil {
			s.Reset(http2.CodeCancel, err)
			return nil, err
		}
		return &Stream{Stream: s}, s.SetReadDeadline(time.Time{})
	}
}

// answer reads the answer to CONNECT: an interim status, or 200.
func answer(h *http2.Head) (int, error) {
	text, ok := h.Only(":status")
	status, err := strconv.Atoi(text)
	if h.Check() != nil || !ok || err != nil || len(text) != 3 || h.Pseudo() != 1 {
		return 0, errAnswer
	}
	if status < 200 || status == 200 {
		return status, nil
	}
	reason, _ := h.Only(reasonField)
	if len(reason) > 64 {
		reason = ""
	}
	return 0, &RefusedError{status, reason}
}
