// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"bytes"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

var (
	errRequestLine = malformed("the request line is not method SP target SP version")
	errMethod      = malformed("the method is not a token in upper case")
	errTargetLong  = tooLarge("the request target is too long")
	errForm        = badTarget("a target in none of the forms that are accepted")
	errConnect     = &Error{flow.ReasonUpgrade, "CONNECT"}
	errScheme      = badTarget("an absolute target with a scheme other than http")
	errUserinfo    = badTarget("user information in a target")
	errFragment    = badTarget("a fragment in a target")
	errChar        = badTarget("a character that a target cannot hold")
	errEscape      = badTarget("an incomplete percent-encoding in a path")
	errNUL         = badTarget("an encoded NUL in a target")
	errSlash       = badTarget("an encoded slash or backslash in a path")
	errOverlong    = badTarget("an overlong encoding in a path")
	errEmptySeg    = badTarget("an empty segment in a path")
	errDotSeg      = badTarget("a dot segment in a path")
	errParameters  = badTarget("path parameters")
	errHostMissing = malformed("Host is missing")
	errHostTwice   = malformed("Host came more than once")
	errHost        = malformed("Host is no host name, address or port")
	errHostDiffers = malformed("Host differs from the target's authority")
	errExpect      = malformed("an expectation other than 100-continue")
)

// Request is the head of a request. Use one again and again: Parse keeps its
// storage. Slices alias the buffer that was parsed.
type Request struct {
	Framing
	Method    []byte
	Target    []byte // as received
	Path      []byte // "*" for the asterisk form
	Query     []byte // without "?", nil without one
	Authority []byte // the Host field, as received; empty in HTTP/1.0 without it
	Host      []byte // in lower case, without port; an address literal keeps its brackets
	Expect    bool   // 100-continue

	hosts   int
	upgrade bool   // there is a field that asks to switch protocols
	key     []byte // of a handshake of WebSocket
	scratch [MaxHost]byte
}

// Parse reads a whole head, as Scan.End delimits it.
func (r *Request) Parse(head []byte) error { return r.parse(head, MaxFields) }

// ParseSent reads a head as Compact wrote it, with up to MaxAdded field lines
// more.
func (r *Request) ParseSent(head []byte) error { return r.parse(head, MaxFields+MaxAdded) }

func (r *Request) parse(head []byte, most int) error {
	r.clear()
	r.Method, r.Target, r.Path, r.Query, r.Authority, r.Host = nil, nil, nil, nil, nil, nil
	r.Expect, r.hosts, r.upgrade, r.key = false, 0, false, nil
	eol := bytes.IndexByte(head, '\r')
	if eol < 0 || len(head) < eol+4 || head[eol+1] != '\n' {
		return errRequestLine
	}
	authority, err := r.requestLine(head[:eol])
	if err != nil {
		return err
	}
	if err := r.fieldLines(head, eol+2, most, true); err != nil {
		return err
	}
	if err := r.requestFields(); err != nil {
		return err
	}
	if r.upgrade {
		if err := r.handshake(); err != nil {
			return err
		}
	}
	return r.host(authority)
}

// requestLine reads the start line and returns the authority of an absolute
// target.
func (r *Request) requestLine(line []byte) (authority []byte, err error) {
	n := bytes.IndexByte(line, ' ')
	if n <= 0 || n > MaxMethod {
		return nil, errRequestLine
	}
	r.Method = line[:n]
	if err := CheckMethod(r.Method); err != nil {
		return nil, err
	}
	rest := line[n+1:]
	const version = " HTTP/1.1"
	m := len(rest) - len(version)
	if m < 1 {
		return nil, errRequestLine
	}
	tail := rest[m:]
	if string(tail[:len(" HTTP/1.")]) != " HTTP/1." || tail[len(tail)-1] != '1' && tail[len(tail)-1] != '0' {
		return nil, errVersion
	}
	r.Minor = tail[len(tail)-1] - '0'
	r.Target = rest[:m]
	if m > MaxTarget {
		return nil, errTargetLong
	}
	if string(r.Method) == "CONNECT" {
		return nil, errConnect
	}
	path := r.Target
	switch {
	case path[0] == '/':
	case len(path) == 1 && path[0] == '*' && string(r.Method) == "OPTIONS":
		r.Path = path
		return nil, nil
	default:
		if authority, path, err = absolute(path); err != nil {
			return nil, err
		}
	}
	r.Path, r.Query, err = Target(path)
	return authority, err
}

// CheckMethod refuses what is no method in upper case, or a long one.
func CheckMethod(b []byte) error {
	if len(b) == 0 || len(b) > MaxMethod {
		return errMethod
	}
	for _, c := range b {
		if (c < 'A' || c > 'Z') && c != '-' && c != '_' && (c < '0' || c > '9') {
			return errMethod
		}
	}
	return nil
}

// absolute splits a target in absolute form (RFC 9112, 3.2.2).
func absolute(target []byte) (authority, path []byte, err error) {
	const scheme = "http://"
	i := bytes.Index(target, []byte("://"))
	if i < 0 {
		return nil, nil, errForm
	}
	if i+3 != len(scheme) || !fold(target[:i+3], scheme) {
		return nil, nil, errScheme
	}
	rest := target[i+3:]
	slash := bytes.IndexByte(rest, '/')
	if slash <= 0 {
		return nil, nil, errForm
	}
	if bytes.IndexByte(rest[:slash], '@') >= 0 {
		return nil, nil, errUserinfo
	}
	return rest[:slash], rest[slash:], nil
}

// Target splits a target in origin form, or the :path of HTTP/2, and judges
// path and query. The path that is accepted has one reading: no segment that
// a server may resolve, drop or split differently. query is nil without "?".
func Target(b []byte) (path, query []byte, err error) {
	switch {
	case len(b) > MaxTarget:
		return nil, nil, errTargetLong
	case len(b) == 0 || b[0] != '/':
		return nil, nil, errForm
	}
	segment := 0 // where the segment began
	for i := 0; i < len(b); i++ {
		c := b[i]
		if class[c]&classPath != 0 && c != '/' && c != '%' {
			continue
		}
		switch c {
		case '/':
			if i > 0 {
				if err := segmentOf(b[segment:i], false); err != nil {
					return nil, nil, err
				}
			}
			segment = i + 1
		case '%':
			if err := escape(b[i:]); err != nil {
				return nil, nil, err
			}
			i += 2
		case '?':
			if err := segmentOf(b[segment:i], true); err != nil {
				return nil, nil, err
			}
			return b[:i], b[i+1:], checkQuery(b[i+1:])
		default:
			return nil, nil, badChar(c)
		}
	}
	return b, nil, segmentOf(b[segment:], true)
}

func badChar(c byte) error {
	switch c {
	case ';':
		return errParameters
	case '\\':
		return errSlash
	case '#':
		return errFragment
	case 0:
		return errNUL
	}
	return errChar
}

// escape judges the percent-encoding at the start of b.
func escape(b []byte) error {
	if len(b) < 3 || !is(b[1], classHex) || !is(b[2], classHex) {
		return errEscape
	}
	switch unhex(b[1])<<4 | unhex(b[2]) {
	case 0:
		return errNUL
	case '/', '\\':
		return errSlash
	case 0xc0, 0xc1:
		return errOverlong
	}
	return nil
}

func unhex(c byte) byte {
	if c <= '9' {
		return c - '0'
	}
	return c | 0x20 - 'a' + 10
}

// segmentOf judges one segment; only the last may be empty.
func segmentOf(s []byte, last bool) error {
	if len(s) == 0 {
		if last {
			return nil
		}
		return errEmptySeg
	}
	if s[0] != '.' && s[0] != '%' || len(s) > 6 {
		return nil
	}
	dots := 0
	for len(s) > 0 {
		switch {
		case s[0] == '.':
			s = s[1:]
		case len(s) >= 3 && s[0] == '%' && s[1] == '2' && s[2]|0x20 == 'e':
			s = s[3:]
		default:
			return nil
		}
		dots++
	}
	if dots <= 2 {
		return errDotSeg
	}
	return nil
}

func checkQuery(b []byte) error {
	for i, c := range b {
		if class[c]&classQuery == 0 {
			if c == '#' {
				return errFragment
			}
			return errChar
		}
		if c == '%' && i+2 < len(b) && b[i+1] == '0' && b[i+2] == '0' {
			return errNUL
		}
	}
	return nil
}

// requestFields reads the fields that only requests have.
func (r *Request) requestFields() error {
	for i := range r.Fields {
		f := &r.Fields[i]
		switch len(f.Name) {
		case len("host"):
			if foldDash(f.Name, "host") {
				r.hosts++
				r.Authority = f.Value
			}
		case len("expect"):
			if fold(f.Name, "expect") && r.Minor > 0 {
				if !fold(f.Value, "100-continue") {
					return errExpect
				}
				r.Expect = true
			}
		case len("upgrade"):
			if fold(f.Name, "upgrade") {
				r.upgrade = true
			}
		case len("http2-settings"):
			if fold(f.Name, "http2-settings") {
				r.upgrade = true
			}
		}
	}
	return nil
}

// host judges the Host field against an absolute target's authority.
func (r *Request) host(authority []byte) error {
	switch {
	case r.hosts > 1:
		return errHostTwice
	case r.hosts == 0 && r.Minor == 0 && authority == nil:
		return nil
	case r.hosts == 0:
		return errHostMissing
	case authority != nil && !bytes.EqualFold(authority, r.Authority):
		return errHostDiffers
	}
	var err error
	r.Host, err = Host(r.Authority, &r.scratch)
	return err
}

// Host returns the host of an authority, in lower case and without port; it
// aliases the authority, or scratch.
func Host(authority []byte, scratch *[MaxHost]byte) ([]byte, error) {
	name, ok := splitHost(authority)
	if !ok {
		return nil, errHost
	}
	for i, c := range name {
		if 'A' <= c && c <= 'Z' {
			host := scratch[:len(name)]
			copy(host, name[:i])
			for j, c := range name[i:] {
				if 'A' <= c && c <= 'Z' {
					c += 'a' - 'A'
				}
				host[i+j] = c
			}
			return host, nil
		}
	}
	return name, nil
}

// splitHost cuts the port off an authority. A name that ends with a dot is
// refused: servers differ on whether it is the name without.
func splitHost(b []byte) (name []byte, ok bool) {
	if len(b) == 0 {
		return nil, false
	}
	end := bytes.IndexByte(b, ':')
	if b[0] == '[' {
		end = bytes.IndexByte(b, ']') + 1
		if end < 4 {
			return nil, false
		}
		for _, c := range b[1 : end-1] {
			if !is(c, classHex) && c != ':' && c != '.' {
				return nil, false
			}
		}
	} else {
		if end < 0 {
			end = len(b)
		}
		if end == 0 || !all(b[:end], classHost) || b[end-1] == '.' || b[0] == '.' {
			return nil, false
		}
	}
	if end > MaxHost {
		return nil, false
	}
	port := b[end:]
	if len(port) == 0 {
		return b[:end], true
	}
	if port[0] != ':' || len(port) < 2 || len(port) > 6 {
		return nil, false
	}
	n := 0
	for _, c := range port[1:] {
		if c < '0' || c > '9' {
			return nil, false
		}
		n = n*10 + int(c-'0')
	}
	return b[:end], n > 0 && n <= 65535
}

// BodyFor returns the body that follows this head.
func (r *Request) BodyFor() Body {
	switch {
	case r.ContentLength < 0:
		b := Body{kind: bodyChunked, request: true}
		b.guard(&r.Framing)
		return b
	case r.ContentLength == 0:
		return Body{kind: bodyNone}
	}
	return Body{kind: bodyLength, left: r.ContentLength}
}
