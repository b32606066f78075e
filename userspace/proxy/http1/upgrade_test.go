// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"errors"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// The handshake of RFC 6455, section 1.2, with its answer.
const (
	handshake = "GET /chat HTTP/1.1\r\nHost: server.example.com\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: http://example.com\r\nSec-WebSocket-Protocol: chat, superchat\r\nSec-WebSocket-Version: 13\r\n\r\n"
	accepted = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: chat\r\n\r\n"
	accept   = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
)

// change replaces one text in a message.
func change(t testing.TB, in, from, to string) string {
	t.Helper()
	if strings.Count(in, from) != 1 {
		t.Fatalf("%q is not once in %q", from, in)
	}
	return strings.Replace(in, from, to, 1)
}

func TestHandshake(t *testing.T) {
	for _, c := range []struct{ name, from, to, sent string }{
		{"as in the RFC", "", "", "Upgrade: websocket\r\nConnection: Upgrade\r\n"},
		{"in other letters", "Upgrade: websocket\r\nConnection: Upgrade", "upgrade: WebSocket\r\nCONNECTION: keep-alive, UPGRADE", ""},
		{"two Connections", "Connection: Upgrade", "Connection: keep-alive\r\nConnection: upgrade", ""},
		{"Keep-Alive", "Connection: Upgrade", "Connection: Upgrade, Keep-Alive\r\nKeep-Alive: timeout=5", ""},
		{"no content, said so", "Origin:", "Content-Length: 0\r\nOrigin:", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := handshake
			if c.from != "" {
				in = change(t, in, c.from, c.to)
			}
			const room = 64
			full := append(make([]byte, room), in...)
			r, err := readRequest(full[room:])
			if err != nil {
				t.Fatal(err)
			}
			if !r.Upgrade() || r.Accept() != accept {
				t.Errorf("upgrade %v, accept %q", r.Upgrade(), r.Accept())
			}
			r.DropConnection()
			sent := string(full[r.Compact(full, room, []byte(SwitchLines)):])
			lines := strings.ToLower(sent)
			if strings.Count(lines, "\r\nconnection:") != 1 || strings.Count(lines, "\r\nupgrade:") != 1 || !strings.HasSuffix(sent, "\r\n"+SwitchLines+"\r\n") {
				t.Errorf("goes on %q", sent)
			}
			if again, err := readRequest([]byte(sent)); err != nil || again.Accept() != accept {
				t.Errorf("what goes on reads %v", err)
			}
		})
	}
}

func TestNoHandshake(t *testing.T) {
	for _, c := range []struct{ name, from, to string }{
		{"version 8", "Version: 13", "Version: 8"},
		{"several versions", "Version: 13", "Version: 13, 8"},
		{"version twice", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Version: 13"},
		{"no version", "Sec-WebSocket-Version: 13\r\n", ""},
		{"version +13", "Version: 13", "Version: +13"},
		{"no key", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", ""},
		{"key twice", "Origin: http://example.com", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="},
		{"empty key", "dGhlIHNhbXBsZSBub25jZQ==", ""},
		{"short key", "dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZQ=="},
		{"long key", "dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZSE="},
		{"no base64", "dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZ!=="},
		{"bits left over", "dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZR=="},
		{"not named in Connection", "Connection: Upgrade", "Connection: keep-alive"},
		{"close as well", "Connection: Upgrade", "Connection: Upgrade, close"},
		{"another protocol", "Upgrade: websocket", "Upgrade: h2c"},
		{"several protocols", "Upgrade: websocket", "Upgrade: websocket, h2c"},
		{"Upgrade twice", "Upgrade: websocket", "Upgrade: websocket\r\nUpgrade: websocket"},
		{"a version of it", "Upgrade: websocket", "Upgrade: websocket/13"},
		{"HTTP2-Settings", "Origin: http://example.com", "HTTP2-Settings: AAMAAABk"},
		{"POST", "GET", "POST"},
		{"HTTP/1.0", "/chat HTTP/1.1", "/chat HTTP/1.0"},
		{"content", "Origin: http://example.com", "Content-Length: 5"},
		{"chunked", "Origin: http://example.com", "Transfer-Encoding: chunked"},
		{"100-continue", "Origin: http://example.com", "Expect: 100-continue"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := readRequest([]byte(change(t, handshake, c.from, c.to)))
			fault, ok := errors.AsType[*Error](err)
			if !ok || fault.Reason != flow.ReasonUpgrade {
				t.Errorf("read: upgrade %v, %v", err == nil && r.Upgrade(), err)
			}
		})
	}
	r, err := readRequest([]byte("GET / HTTP/1.1\r\nHost: a\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"))
	if err != nil || r.Upgrade() || r.Accept() != "" {
		t.Errorf("without an Upgrade field: %v", err)
	}
	// What was read before leaves nothing behind.
	r = new(Request)
	if err := r.Parse([]byte(handshake)); err != nil || !r.Upgrade() {
		t.Fatal(err)
	}
	if err := r.Parse([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n")); err != nil || r.Upgrade() {
		t.Errorf("the next request: %v", err)
	}
}

func TestSwitch(t *testing.T) {
	read := func(in, asked string) (*Response, error) {
		r := &Response{Accept: asked}
		return r, r.Parse([]byte(in))
	}
	if r, err := read(accepted, accept); err != nil || !r.Switches() || r.Interim() || r.BodyFor(false).kind != bodyNone {
		t.Errorf("as in the RFC: %v", err)
	}
	if _, err := read(accepted, ""); err == nil {
		t.Error("nobody asked for it")
	}
	for _, c := range []struct{ name, from, to string }{
		{"another handshake's", accept, "t3pPLMBiTxaQ9kYGzzhZRbK+xOo="},
		{"in other letters", accept, strings.ToLower(accept)},
		{"no accept", "Sec-WebSocket-Accept: " + accept + "\r\n", ""},
		{"accept twice", "Sec-WebSocket-Protocol: chat", "Sec-WebSocket-Accept: " + accept},
		{"another protocol", "Upgrade: websocket", "Upgrade: h2c"},
		{"several protocols", "Upgrade: websocket", "Upgrade: websocket, h2c"},
		{"Upgrade twice", "Upgrade: websocket", "Upgrade: websocket\r\nUpgrade: websocket"},
		{"no Upgrade", "Upgrade: websocket\r\n", ""},
		{"no Connection", "Connection: Upgrade\r\n", ""},
		{"close as well", "Connection: Upgrade", "Connection: Upgrade, close"},
		{"HTTP/1.0", "HTTP/1.1", "HTTP/1.0"},
		{"content", "Sec-WebSocket-Protocol: chat", "Content-Length: 5"},
		{"length 0", "Sec-WebSocket-Protocol: chat", "Content-Length: 0"},
		{"chunked", "Sec-WebSocket-Protocol: chat", "Transfer-Encoding: chunked"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := read(change(t, accepted, c.from, c.to), accept); err == nil {
				t.Error("taken for the answer")
			}
		})
	}
	// Whatever else the application says is an ordinary response.
	if r, err := read("HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 0\r\n\r\n", accept); err != nil || r.Switches() || r.Interim() {
		t.Errorf("426: %v", err)
	}
}
