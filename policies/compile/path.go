// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"fmt"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Bounds of a path template.
const (
	maxPatternBytes    = 1024
	maxPatternSegments = 32
	maxParams          = 8
	maxPathBytes       = 1<<16 - 1
)

// pattern is one entry of a rule's http or grpc list.
type pattern struct {
	method   string // "" for any
	template string // as written: /v1/payments/{id}, shop.Payments/Create
	segments []segment
	rest     bool // ends in /**
	grpc     bool // of a grpc list: two segments, the second of any name or literal
	params   []string
}

type segment struct {
	literal string // raw, as written
	param   bool
}

// parsePattern reads "METHOD /path", the method being a token (RFC 9110
// section 5.6.2) or *. The path's segments are literals in the characters of
// RFC 3986 section 3.3, {name} for one whole segment, and ** at the end for
// any number of them, none included.
func parsePattern(s string) (*pattern, error) {
	if len(s) > maxPatternBytes {
		return nil, fmt.Errorf("a pattern may have %d bytes, this one has %d", maxPatternBytes, len(s))
	}
	method, path, ok := strings.Cut(s, " ")
	if !ok || !isToken(method) {
		return nil, fmt.Errorf("%q is not METHOD /PATH, such as \"GET /v1/payments/{id}\" or \"* /debug/**\"", s)
	}
	if !strings.HasPrefix(path, "/") {
		return nil, fmt.Errorf("%q: the path must begin with /", s)
	}
	p := &pattern{method: method, template: path}
	if method == "*" {
		p.method = ""
	}
	parts := strings.Split(path[1:], "/")
	if len(parts) > maxPatternSegments {
		return nil, fmt.Errorf("%q: a path may have %d segments", s, maxPatternSegments)
	}
	for i, part := range parts {
		last := i == len(parts)-1
		switch {
		case part == "**":
			if !last {
				return nil, fmt.Errorf("%q: ** can only be the last segment", s)
			}
			p.rest = true
			return p, nil
		case part == "" && !last:
			return nil, fmt.Errorf("%q: // is refused in requests, so this can never match", s)
		case strings.HasPrefix(part, "{") && strings.HasSuffix(part, "}"):
			name := part[1 : len(part)-1]
			if err := p.addParam(name); err != nil {
				return nil, fmt.Errorf("%q: %w", s, err)
			}
			p.segments = append(p.segments, segment{param: true})
		default:
			if err := checkLiteral(part); err != nil {
				return nil, fmt.Errorf("%q: %w", s, err)
			}
			p.segments = append(p.segments, segment{literal: part})
		}
	}
	return p, nil
}

func (p *pattern) addParam(name string) error {
	if !isIdentifier(name) {
		return fmt.Errorf("{%s} is not a parameter: a name has letters, digits and _ and does not begin with a digit", name)
	}
	if slices.Contains(p.params, name) {
		return fmt.Errorf("{%s} stands there twice", name)
	}
	if len(p.params) == maxParams {
		return fmt.Errorf("a path may have %d parameters", maxParams)
	}
	p.params = append(p.params, name)
	return nil
}

func checkLiteral(part string) error {
	if strings.ContainsAny(part, "{}") {
		return fmt.Errorf("%q: a parameter is a whole segment", part)
	}
	if strings.Contains(part, "*") {
		return fmt.Errorf("%q: * stands for nothing here; write {name} for one segment, ** at the end for the rest", part)
	}
	for _, c := range part {
		if c > 0x7f || !isUnreserved(byte(c)) && !strings.ContainsRune("!$&'()+,=:@%", c) {
			return fmt.Errorf("%q cannot stand in a path; percent-encode it", c)
		}
	}
	if r := checkPath("/" + part); r != flow.ReasonOK {
		return fmt.Errorf("%q is refused in requests, so this can never match", part)
	}
	return nil
}

// checkPath refuses what the application could read differently from us:
// anything that does not begin with /, bad percent-encodings, empty and dot
// segments, encoded or literal slashes and backslashes, NUL, a query.
func checkPath(path string) flow.Reason {
	if len(path) > maxPathBytes {
		return flow.ReasonTooLarge
	}
	if path == "" || path[0] != '/' {
		return flow.ReasonTarget
	}
	empty, dots, other := true, 0, false // of the segment so far
	for i := 1; i < len(path); {
		c, n := path[i], 1
		if c == '%' {
			d, ok := unhex(path, i)
			if !ok || d == '/' {
				return flow.ReasonTarget
			}
			c, n = d, 3
		}
		switch c {
		case '/':
			if empty || isDots(dots, other) {
				return flow.ReasonTarget
			}
			empty, dots, other = true, 0, false
			i++
			continue
		case '.':
			dots++
		case '\\', 0:
			return flow.ReasonTarget
		case '?', '#':
			if n == 1 {
				return flow.ReasonTarget
			}
			other = true
		default:
			other = true
		}
		empty = false
		i += n
	}
	if isDots(dots, other) {
		return flow.ReasonTarget
	}
	return flow.ReasonOK
}

// isDots says whether a segment of that many dots, and nothing else unless
// other, is "." or "..".
func isDots(dots int, other bool) bool { return !other && (dots == 1 || dots == 2) }

// decodeAll decodes every percent-encoding of a path that checkPath let
// pass: the most that an application may do.
func decodeAll(path string) string {
	return decode(path, func(byte) bool { return true })
}

// decodeUnreserved decodes only what RFC 3986 section 6.2.2.2 calls
// equivalent and writes the other encodings in upper case.
func decodeUnreserved(path string) string {
	return decode(path, isUnreserved)
}

func decode(path string, plain func(byte) bool) string {
	if strings.IndexByte(path, '%') < 0 {
		return path
	}
	out := make([]byte, 0, len(path))
	for i := 0; i < len(path); {
		if path[i] != '%' {
			out = append(out, path[i])
			i++
			continue
		}
		c, ok := unhex(path, i)
		switch {
		case !ok:
			out = append(out, path[i])
			i++
			continue
		case plain(c):
			out = append(out, c)
		default:
			out = append(out, '%', upperHex[c>>4], upperHex[c&15])
		}
		i += 3
	}
	return string(out)
}

const upperHex = "0123456789ABCDEF"

func unhex(s string, i int) (byte, bool) {
	if i+2 >= len(s) {
		return 0, false
	}
	hi, ok1 := nibble(s[i+1])
	lo, ok2 := nibble(s[i+2])
	return hi<<4 | lo, ok1 && ok2
}

func nibble(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

func isAlnum(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

func isUnreserved(c byte) bool { return isAlnum(c) || c == '-' || c == '.' || c == '_' || c == '~' }

func isToken(s string) bool {
	if s == "" || len(s) > 32 {
		return false
	}
	for i := range len(s) {
		if !isAlnum(s[i]) && strings.IndexByte("!#$%&'*+-.^_`|~", s[i]) < 0 {
			return false
		}
	}
	return true
}

func isIdentifier(s string) bool {
	if s == "" || len(s) > 64 || '0' <= s[0] && s[0] <= '9' {
		return false
	}
	for i := range len(s) {
		if !isAlnum(s[i]) && s[i] != '_' {
			return false
		}
	}
	return true
}
