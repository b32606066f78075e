// SPDX-License-Identifier: Apache-2.0

package anomaly

import (
	"unsafe"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const maxDepth = 16 // of JSON that is taken apart

// readBody takes a form or a JSON document apart, as far as it was
// inspected. Any other kind counts by its presence alone.
func (s *Scorer) readBody(sm *Sample, req *flow.Request) {
	value, count := req.HeaderValue("content-type")
	switch {
	case count == 1 && hasMediaType(value, "application/x-www-form-urlencoded"):
		s.mark(sm, 3, "(form)")
		s.readPairs(sm, tagForm, alias(req.Body))
	case count == 1 && (hasMediaType(value, "application/json") || hasJSONSuffix(value)):
		s.mark(sm, 4, "(json)")
		j := jsonReader{s: s, sm: sm, in: req.Body, cut: req.ContentLength != int64(len(req.Body))}
		j.run()
	default:
		s.mark(sm, 5, "(body)")
	}
}

// alias views b as a string for the time of the call: the body is not
// written to while the request is decided.
func alias(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

func hasMediaType(v []byte, want string) bool {
	if len(v) < len(want) || len(v) > len(want) && v[len(want)] != ';' && v[len(want)] != ' ' {
		return false
	}
	for i := range len(want) {
		if lower(v[i]) != want[i] {
			return false
		}
	}
	return true
}

// hasJSONSuffix knows structured suffixes, RFC 6839: application/problem+json.
func hasJSONSuffix(v []byte) bool {
	end := len(v)
	for i, c := range v {
		if c == ';' || c == ' ' {
			end = i
			break
		}
	}
	return end > 5 && hasMediaType(v[end-5:end], "+json")
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// jsonReader walks a document and makes every scalar a parameter whose name
// is the path of its keys; elements of an array share one name. What is not
// JSON, or is deeper than maxDepth, is marked as such, once.
type jsonReader struct {
	s   *Scorer
	sm  *Sample
	in  []byte
	at  int
	cut bool // the document goes on beyond in
}

func (j *jsonReader) run() {
	ok := j.value(j.s.start(tagJSON), "", 0)
	if ok {
		j.space()
		ok = j.at == len(j.in)
	}
	if !ok && (!j.cut || j.at < len(j.in)) && !j.sm.maximum {
		j.s.mark(j.sm, 6, "(not json)")
	}
}

func (j *jsonReader) space() {
	for j.at < len(j.in) {
		switch j.in[j.at] {
		case ' ', '\t', '\r', '\n':
			j.at++
		default:
			return
		}
	}
}

func (j *jsonReader) peek() byte {
	j.space()
	if j.at < len(j.in) {
		return j.in[j.at]
	}
	return 0
}

func (j *jsonReader) value(name uint64, label string, depth int) bool {
	if depth > maxDepth {
		return false
	}
	switch c := j.peek(); c {
	case '{':
		return j.object(name, depth)
	case '[':
		return j.array(name, label, depth)
	case '"':
		a := j.sm.begin(j.s, name, label)
		if a == nil || !j.text(a.add) {
			return false
		}
		j.sm.end(a)
		return true
	case 0:
		return false
	}
	return j.bare(name, label)
}

func (j *jsonReader) object(name uint64, depth int) bool {
	j.at++
	if j.peek() == '}' {
		j.at++
		return true
	}
	for {
		if j.peek() != '"' {
			return false
		}
		from := j.at + 1
		key := byteHash{s: j.s, h: j.s.step(name, tagJSON)}
		if !j.text(key.add) {
			return false
		}
		label := alias(j.in[from : j.at-1])
		if j.peek() != ':' {
			return false
		}
		j.at++
		if !j.value(key.sum(), label, depth+1) {
			return false
		}
		switch j.peek() {
		case ',':
			j.at++
		case '}':
			j.at++
			return true
		default:
			return false
		}
	}
}

func (j *jsonReader) array(name uint64, label string, depth int) bool {
	j.at++
	if j.peek() == ']' {
		j.at++
		return true
	}
	name = j.s.step(name, tagSegment)
	for {
		if !j.value(name, label, depth+1) {
			return false
		}
		switch j.peek() {
		case ',':
			j.at++
		case ']':
			j.at++
			return true
		default:
			return false
		}
	}
}

// bare reads a number, true, false or null, as it is written.
func (j *jsonReader) bare(name uint64, label string) bool {
	a := j.sm.begin(j.s, name, label)
	if a == nil {
		return false
	}
	from := j.at
	for j.at < len(j.in) {
		c := j.in[j.at]
		if k := classes[c]; k.class != classLetter && k.class != classDigit && c != '-' && c != '+' && c != '.' {
			break
		}
		a.add(c)
		j.at++
	}
	if j.at == from {
		return false
	}
	a.symbols |= 1 << symbolUpper // a bare value is not a string that reads the same
	j.sm.end(a)
	return true
}

// text reads a string and hands over its bytes, escapes resolved.
func (j *jsonReader) text(add func(byte)) bool {
	for j.at++; j.at < len(j.in); j.at++ {
		switch c := j.in[j.at]; c {
		case '"':
			j.at++
			return true
		case '\\':
			j.at++
			if j.at == len(j.in) {
				return false
			}
			if !j.escape(add) {
				return false
			}
		default:
			if c < 0x20 {
				return false
			}
			add(c)
		}
	}
	return false
}

func (j *jsonReader) escape(add func(byte)) bool {
	switch c := j.in[j.at]; c {
	case '"', '\\', '/':
		add(c)
	case 'b', 'f', 'n', 'r', 't':
		add('\n') // a control character, whichever
	case 'u':
		if j.at+4 >= len(j.in) {
			j.at = len(j.in)
			return false
		}
		v := uint32(0)
		for i := 1; i <= 4; i++ {
			d := unhex[j.in[j.at+i]]
			if d > 15 {
				return false
			}
			v = v<<4 | uint32(d)
		}
		j.at += 4
		if v < 0x80 {
			add(byte(v))
		} else {
			add(0x80 | byte(v>>8))
			add(0x80 | byte(v))
		}
	default:
		return false
	}
	return true
}
