// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"net/netip"
	"time"
)

// Protocol is what the proxy speaks on a connection.
type Protocol uint8

// The protocols of a protected port.
const (
	ProtocolTCP  Protocol = iota // an opaque byte stream, one decision a connection
	ProtocolHTTP                 // HTTP/1.1, one decision a request
	ProtocolTLS                  // TLS of the application, passed through
	ProtocolGRPC                 // gRPC, one decision a stream
)

// String returns the protocol as policies write it.
func (p Protocol) String() string {
	switch p {
	case ProtocolTCP:
		return "tcp"
	case ProtocolHTTP:
		return "http"
	case ProtocolTLS:
		return "tls"
	case ProtocolGRPC:
		return "grpc"
	}
	return "unknown"
}

// Header is one field of a request, as received. Both slices alias the
// connection's buffer: valid until the request's body is read.
type Header struct {
	Name, Value []byte
}

// Request is one API call as the proxy sees it. The zero Method means an
// opaque connection. The strings and headers alias the connection's buffer
// and are valid only while the request is decided; a stage that keeps one
// must clone it.
type Request struct {
	ID          string // 26 characters, given to the caller in a denial
	Time        time.Time
	Peer        Peer
	Destination netip.AddrPort // the protected address, as the client dialled it
	Protocol    Protocol
	Method      string
	Path        string // without query; no dot segment, no "//", no encoded slash
	Query       string // raw, without "?"
	Host        string // lower case, without port
	Authority   string // host and port as asked for
	TLS         bool   // the client spoke TLS, to us
	Upgrade     bool   // it is the opening handshake of WebSocket
	Headers     []Header
	// ContentLength is in bytes, -1 when the body is chunked.
	ContentLength int64
	Body          []byte // the first bytes, up to the policy's body.inspect
	// ProvenKey is the thumbprint (RFC 7638) of the key that the request's
	// DPoP proof has proven already, where it is judged again; zero for none.
	ProvenKey [32]byte
}

// HeaderValue returns the value of the only field of that name (ASCII case
// is ignored) and how many there are; a policy that reads a header refuses
// any count but 1.
func (r *Request) HeaderValue(name string) (value []byte, count int) {
	for i := range r.Headers {
		h := &r.Headers[i]
		if len(h.Name) == len(name) && equalFoldASCII(h.Name, name) {
			if count == 0 {
				value = h.Value
			}
			count++
		}
	}
	return value, count
}

func equalFoldASCII(b []byte, s string) bool {
	for i := range b {
		x, y := b[i], s[i]
		if x == y {
			continue
		}
		if 'A' <= x && x <= 'Z' {
			x += 'a' - 'A'
		}
		if 'A' <= y && y <= 'Z' {
			y += 'a' - 'A'
		}
		if x != y {
			return false
		}
	}
	return true
}
