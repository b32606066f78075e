// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"crypto/sha1"
	"encoding/base64"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

var (
	errUpgrade    = &Error{flow.ReasonUpgrade, "an Upgrade field that asks for something else than websocket alone"}
	errHandshake  = &Error{flow.ReasonUpgrade, "an Upgrade to websocket that is no handshake of RFC 6455, version 13"}
	errSwitch     = malformed("101 without an upgrade")
	errSwitchElse = malformed("101 that does not answer the handshake")
)

// SwitchLines are the field lines of a switch to WebSocket that end at an
// intermediary: Compact drops them, and who lets the switch pass adds them.
const SwitchLines = "Connection: Upgrade\r\nUpgrade: websocket\r\n"

// handshake judges a request with an Upgrade field: what passes is the
// opening handshake of RFC 6455, section 4.1, without content and read by
// nobody in another way, such as a server of another version, which would
// take what follows for further requests.
func (r *Request) handshake() error {
	var version, key []byte
	n := [3]int{}
	for i := range r.Fields {
		f := &r.Fields[i]
		switch len(f.Name) {
		case len("upgrade"):
			if fold(f.Name, "upgrade") {
				if n[0]++; n[0] > 1 || !fold(f.Value, "websocket") {
					return errUpgrade
				}
			}
		case len("http2-settings"):
			if fold(f.Name, "http2-settings") {
				return errUpgrade
			}
		case len("sec-websocket-key"):
			if foldDash(f.Name, "sec-websocket-key") {
				key = f.Value
				n[1]++
			}
		case len("sec-websocket-version"):
			if foldDash(f.Name, "sec-websocket-version") {
				version = f.Value
				n[2]++
			}
		}
	}
	if n != [3]int{1, 1, 1} || string(version) != "13" || !isNonce(key) || string(r.Method) != "GET" || r.Minor == 0 ||
		!r.upgrades || r.Close || r.ContentLength != 0 || r.Expect {
		return errHandshake
	}
	r.key = key
	return nil
}

// isNonce says whether b is 16 bytes in base64.
func isNonce(b []byte) bool {
	var raw [18]byte
	if len(b) != base64.StdEncoding.EncodedLen(16) {
		return false
	}
	n, err := base64.StdEncoding.Strict().Decode(raw[:], b)
	return err == nil && n == 16
}

// Upgrade says whether the request is a handshake of WebSocket.
func (r *Request) Upgrade() bool { return r.key != nil }

// Accept returns the Sec-WebSocket-Accept that answers the handshake (RFC
// 6455, section 4.2.2), "" where the request is none.
func (r *Request) Accept() string {
	if r.key == nil {
		return ""
	}
	h := sha1.New()
	h.Write(r.key)
	h.Write([]byte("258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(h.Sum(nil))
}

// switched judges a 101.
func (r *Response) switched() error {
	if r.Accept == "" {
		return errSwitch
	}
	upgrades, accepts := 0, 0
	for i := range r.Fields {
		switch f := &r.Fields[i]; {
		case fold(f.Name, "upgrade"):
			if upgrades++; !fold(f.Value, "websocket") {
				return errSwitchElse
			}
		case foldDash(f.Name, "sec-websocket-accept"):
			if accepts++; string(f.Value) != r.Accept {
				return errSwitchElse
			}
		}
	}
	if upgrades != 1 || accepts != 1 || r.Minor == 0 || !r.upgrades || r.Close || r.HasLength || r.coding {
		return errSwitchElse
	}
	return nil
}
