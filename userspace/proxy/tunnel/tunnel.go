// SPDX-License-Identifier: Apache-2.0

// Package tunnel carries many byte streams over one connection as HTTP/2
// CONNECT streams (RFC 9113, 8.5), compatible with HBONE: the authority is
// the original destination, 200 opens the stream, and `forwarded: for=` holds
// the client's address. Besides, a client may present the access tokens that
// its node has obtained for it (PUT). It speaks nothing else of HTTP/2; frames,
// windows and limits are those of package http2. A stream is a netloop.Stream, so that
// whoever relays cannot tell it from a socket.
package tunnel

import (
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http2"
)

// Config bounds a session.
type Config = http2.Config

// Session is one tunnel connection. It belongs to one loop.
type Session struct{ *http2.Session }

// Handler is what a server does.
type Handler struct {
	// Connect runs for each CONNECT request in a task of its own; the stream is
	// closed when it returns.
	Connect func(*netloop.Task, *Stream)
	// Tokens takes what the client presents, at most MaxTokens bytes in place of
	// what it presented before, and says whether it is well formed. Nil refuses.
	Tokens func(list []byte) bool
}

// Serve runs the server's side of a session on c until it ends. It returns nil
// when both sides ended in order. It does not close c.
func Serve(t *netloop.Task, c netloop.Stream, cfg Config, h Handler) error {
	side := &server{Handler: h}
	return http2.Serve(t, c, cfg, side.serve)
}

// Dial starts the client's side of a session on c, which must be owned by
// the calling task; a task of the session takes it over and closes it.
func Dial(t *netloop.Task, c netloop.Stream, cfg Config) *Session {
	return &Session{http2.Dial(t, c, cfg)}
}
