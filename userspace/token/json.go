// SPDX-License-Identifier: Apache-2.0

package token

import (
	"errors"
	"math"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Bounds of a JSON text that the strict reader accepts (RFC 8259 leaves them
// to the reader).
const (
	maxDepth   = 8    // levels of nesting, the text itself being the first
	maxMembers = 128  // of one object
	maxNodes   = 2048 // values of the whole text
	maxName    = 256  // bytes of a member's name
)

var (
	errJSON      = errors.New("read JSON: not one well-formed object within its bounds")
	errAmbiguous = errors.New("read JSON: two members that another reader could take for one")
)

// reader is a strict JSON reader (RFC 8259): one object and nothing after it,
// valid UTF-8, no lone surrogate, no NUL, no member that equals another by
// Unicode simple folding, at any level. It builds maps, slices, strings,
// booleans, nil, and int64 or float64 for numbers.
type reader struct {
	s     string
	i     int
	nodes int
	// folded holds the folded names that may only be spelt exactly, because
	// a lax reader further on would take another spelling for them.
	reserved map[string]string
}

// readObject reads s as one object. Names that fold to a key of reserved but
// are not spelt as its value are refused as ambiguous.
func readObject(s string, reserved map[string]string) (map[string]any, error) {
	r := reader{s: s, reserved: reserved}
	r.space()
	if r.i >= len(s) || s[r.i] != '{' {
		return nil, errJSON
	}
	v, err := r.value(1)
	if err != nil {
		return nil, err
	}
	r.space()
	if r.i != len(s) {
		return nil, errJSON
	}
	return v.(map[string]any), nil
}

func (r *reader) space() {
	for r.i < len(r.s) {
		switch r.s[r.i] {
		case ' ', '\t', '\n', '\r':
			r.i++
		default:
			return
		}
	}
}

func (r *reader) take(c byte) bool {
	if r.i < len(r.s) && r.s[r.i] == c {
		r.i++
		return true
	}
	return false
}

func (r *reader) value(depth int) (any, error) {
	r.nodes++
	if depth > maxDepth || r.nodes > maxNodes || r.i >= len(r.s) {
		return nil, errJSON
	}
	switch c := r.s[r.i]; {
	case c == '{':
		return r.object(depth)
	case c == '[':
		return r.array(depth)
	case c == '"':
		return r.text()
	case c == '-' || '0' <= c && c <= '9':
		return r.number()
	}
	for _, w := range [...]struct {
		word  string
		value any
	}{{"true", true}, {"false", false}, {"null", nil}} {
		if strings.HasPrefix(r.s[r.i:], w.word) {
			r.i += len(w.word)
			return w.value, nil
		}
	}
	return nil, errJSON
}

func (r *reader) object(depth int) (any, error) {
	r.i++
	m := make(map[string]any, 8)
	var folds map[string]struct{}
	r.space()
	if r.take('}') {
		return m, nil
	}
	for {
		r.space()
		if r.i >= len(r.s) || r.s[r.i] != '"' {
			return nil, errJSON
		}
		name, err := r.text()
		if err != nil {
			return nil, err
		}
		if len(name) > maxName || len(m) == maxMembers {
			return nil, errJSON
		}
		if folds, err = r.claim(m, folds, name); err != nil {
			return nil, err
		}
		r.space()
		if !r.take(':') {
			return nil, errJSON
		}
		r.space()
		if m[name], err = r.value(depth + 1); err != nil {
			return nil, err
		}
		r.space()
		if r.take('}') {
			return m, nil
		}
		if !r.take(',') {
			return nil, errJSON
		}
	}
}

// claim refuses a name that equals another of its object by folding. Names
// of lower-case ASCII alone fold to themselves, so only others cost a map.
func (r *reader) claim(m map[string]any, folds map[string]struct{}, name string) (map[string]struct{}, error) {
	if _, twice := m[name]; twice {
		return folds, errAmbiguous
	}
	f, changed := fold(name)
	if want, ok := r.reserved[f]; ok && want != name {
		return folds, errAmbiguous
	}
	if folds == nil {
		if !changed {
			return nil, nil
		}
		folds = make(map[string]struct{}, len(m)+1)
		for other := range m {
			of, _ := fold(other)
			folds[of] = struct{}{}
		}
	}
	if _, twice := folds[f]; twice {
		return folds, errAmbiguous
	}
	folds[f] = struct{}{}
	return folds, nil
}

// fold maps every rune to one representative of its simple-folding orbit,
// the lower-case letter for ASCII, and says whether that changed anything.
func fold(s string) (string, bool) {
	plain := true
	for i := range len(s) {
		if c := s[i]; c >= utf8.RuneSelf || 'A' <= c && c <= 'Z' {
			plain = false
			break
		}
	}
	if plain {
		return s, false
	}
	return strings.Map(foldRune, s), true
}

func foldRune(c rune) rune {
	least := c
	for f := unicode.SimpleFold(c); f != c; f = unicode.SimpleFold(f) {
		least = min(least, f)
	}
	if 'A' <= least && least <= 'Z' {
		least += 'a' - 'A'
	}
	return least
}

func (r *reader) array(depth int) (any, error) {
	r.i++
	a := []any{}
	r.space()
	if r.take(']') {
		return a, nil
	}
	for {
		r.space()
		v, err := r.value(depth + 1)
		if err != nil {
			return nil, err
		}
		a = append(a, v)
		r.space()
		if r.take(']') {
			return a, nil
		}
		if !r.take(',') {
			return nil, errJSON
		}
	}
}

// text reads a string. One without escapes is a part of the input.
func (r *reader) text() (string, error) {
	r.i++
	start := r.i
	for r.i < len(r.s) {
		switch c := r.s[r.i]; {
		case c == '"':
			t := r.s[start:r.i]
			r.i++
			if !utf8.ValidString(t) {
				return "", errJSON
			}
			return t, nil
		case c == '\\':
			return r.escaped(start)
		case c < 0x20:
			return "", errJSON
		}
		r.i++
	}
	return "", errJSON
}

func (r *reader) escaped(start int) (string, error) {
	var b strings.Builder
	b.WriteString(r.s[start:r.i])
	for r.i < len(r.s) {
		c := r.s[r.i]
		r.i++
		switch {
		case c == '"':
			if !utf8.ValidString(b.String()) {
				return "", errJSON
			}
			return b.String(), nil
		case c < 0x20:
			return "", errJSON
		case c != '\\':
			b.WriteByte(c)
			continue
		}
		if r.i >= len(r.s) {
			return "", errJSON
		}
		c = r.s[r.i]
		r.i++
		if at := strings.IndexByte(`"\/bfnrt`, c); at >= 0 {
			b.WriteByte("\"\\/\b\f\n\r\t"[at])
			continue
		}
		if c != 'u' {
			return "", errJSON
		}
		u, err := r.unicode()
		if err != nil {
			return "", err
		}
		b.WriteRune(u)
	}
	return "", errJSON
}

// unicode reads what follows \u, both halves of a surrogate pair.
func (r *reader) unicode() (rune, error) {
	u, err := r.hex()
	if err != nil || u == 0 {
		return 0, errJSON
	}
	if u < 0xd800 || u > 0xdfff {
		return u, nil
	}
	if u > 0xdbff || !r.take('\\') || !r.take('u') {
		return 0, errJSON
	}
	low, err := r.hex()
	if err != nil || low < 0xdc00 || low > 0xdfff {
		return 0, errJSON
	}
	return (u-0xd800)<<10 + (low - 0xdc00) + 0x10000, nil
}

func (r *reader) hex() (rune, error) {
	if r.i+4 > len(r.s) {
		return 0, errJSON
	}
	var u rune
	for _, c := range []byte(r.s[r.i : r.i+4]) {
		switch {
		case '0' <= c && c <= '9':
			u = u<<4 | rune(c-'0')
		case 'a' <= c && c <= 'f':
			u = u<<4 | rune(c-'a'+10)
		case 'A' <= c && c <= 'F':
			u = u<<4 | rune(c-'A'+10)
		default:
			return 0, errJSON
		}
	}
	r.i += 4
	return u, nil
}

func (r *reader) digits() int {
	start := r.i
	for r.i < len(r.s) && '0' <= r.s[r.i] && r.s[r.i] <= '9' {
		r.i++
	}
	return r.i - start
}

func (r *reader) number() (any, error) {
	start, whole := r.i, true
	r.take('-')
	if lead := r.i; r.digits() == 0 || r.s[lead] == '0' && r.i-lead > 1 {
		return nil, errJSON
	}
	if r.take('.') {
		whole = false
		if r.digits() == 0 {
			return nil, errJSON
		}
	}
	if r.take('e') || r.take('E') {
		whole = false
		if !r.take('+') {
			r.take('-')
		}
		if r.digits() == 0 {
			return nil, errJSON
		}
	}
	text := r.s[start:r.i]
	if whole {
		if n, err := strconv.ParseInt(text, 10, 64); err == nil {
			return n, nil
		}
	}
	f, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsInf(f, 0) {
		return nil, errJSON
	}
	return f, nil
}
