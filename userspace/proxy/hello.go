// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"strings"
)

const maxHello = 16 << 10

// serverName reads the server name of a ClientHello (RFC 8446, 4.1.2; RFC
// 6066, 3) from the start of a connection: "" where it has none. more says
// that the hello is not complete.
func serverName(b []byte) (name string, more, ok bool) {
	hello, more, ok := handshake(b)
	if !ok {
		return "", more, false
	}
	r := reader{b: hello}
	r.skip(2 + 32)       // version, random
	r.skip(int(r.u8()))  // session id
	r.skip(int(r.u16())) // cipher suites
	r.skip(int(r.u8()))  // compression
	ext := reader{b: r.take(int(r.u16()))}
	if r.bad || len(r.b) > 0 {
		return "", false, false
	}
	named := false
	for len(ext.b) > 0 {
		kind := ext.u16()
		data := ext.take(int(ext.u16()))
		if kind != 0 {
			continue
		}
		all := reader{b: data}
		list := reader{b: all.take(int(all.u16()))}
		// No extension comes twice, RFC 8446 section 4.2.
		if len(all.b) > 0 || named || list.u8() != 0 {
			return "", false, false
		}
		host := list.take(int(list.u16()))
		if list.bad || len(list.b) > 0 || !isName(host) {
			return "", false, false
		}
		name, named = strings.ToLower(string(host)), true
	}
	if ext.bad {
		return "", false, false
	}
	return name, false, true
}

// handshake joins the handshake records at the start of b into the body of
// the ClientHello.
func handshake(b []byte) (body []byte, more, ok bool) {
	var joined []byte
	for {
		if len(b) < 5 {
			return nil, true, false
		}
		n := int(b[3])<<8 | int(b[4])
		if !looksLikeTLS(b) || n == 0 || n > maxHello {
			return nil, false, false
		}
		if len(b) < 5+n {
			return nil, true, false
		}
		if joined == nil {
			joined = b[5 : 5+n : 5+n]
		} else {
			joined = append(joined, b[5:5+n]...)
		}
		b = b[5+n:]
		if len(joined) < 4 {
			continue
		}
		size := int(joined[1])<<16 | int(joined[2])<<8 | int(joined[3])
		if joined[0] != 1 || size > maxHello {
			return nil, false, false
		}
		if len(joined) >= 4+size {
			return joined[4 : 4+size], false, true
		}
	}
}

func isName(b []byte) bool {
	if len(b) == 0 || len(b) > 253 {
		return false
	}
	for _, c := range b {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return false
		}
	}
	return true
}

// reader takes fields of a message one after the other; bad once one was
// not there.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if r.bad || n > len(r.b) {
		r.bad = true
		r.b = nil
		return nil
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) skip(n int) { r.take(n) }

func (r *reader) u8() uint8 {
	if p := r.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if p := r.take(2); p != nil {
		return uint16(p[0])<<8 | uint16(p[1])
	}
	return 0
}
