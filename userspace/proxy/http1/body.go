// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"bytes"
	"slices"
)

var (
	errChunkSize  = malformed("a chunk size that is not a plain hexadecimal number")
	errChunkLine  = malformed("a chunk line that does not end with CRLF")
	errChunkEnd   = malformed("a chunk that is longer than its size")
	errExtension  = tooLarge("a chunk extension is too long")
	errOverhead   = tooLarge("more chunk framing than content")
	errTrailer    = tooLarge("the trailer section is too long")
	errTrailLine  = malformed("a malformed trailer field")
	errTrailField = malformed("a trailer field that belongs into the head")
)

type bodyKind uint8

const (
	bodyNone bodyKind = iota
	bodyLength
	bodyChunked
	bodyClose
)

type chunkState uint8

const (
	chunkSize chunkState = iota
	chunkSizeMore
	chunkExtension
	chunkSizeLF
	chunkData
	chunkDataCR
	chunkDataLF
	trailerStart
	trailerName
	trailerValue
	trailerLF
	trailerEndLF
	chunkDone
)

// Body follows the content of one message through the buffers that hold it.
// It decodes nothing: the bytes go on as they came, once they were judged.
// The zero Body is that of a message without content.
type Body struct {
	kind    bodyKind
	state   chunkState
	request bool
	left    int64 // of the content, or of the chunk
	content int64 // bytes of content so far
	framing int64 // bytes of chunk framing so far, less what each chunk may have
	digits  uint8
	span    int // bytes of the extension, or of the trailer section
	nameLen int
	name    [64]byte
	fields  []uint32 // hashes of the head's field names
}

// guard remembers the field names of the head: a trailer must not repeat
// one, since a server may merge them and the head's was judged.
func (b *Body) guard(f *Framing) {
	for i := range f.Fields {
		f.hashes = append(f.hashes, nameHash(f.Fields[i].Name))
	}
	b.fields = f.hashes
}

// nameHash is FNV-1a over the name in lower case, an underscore being a
// dash.
func nameHash(name []byte) uint32 {
	h := uint32(2166136261)
	for _, c := range name {
		switch {
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case c == '_':
			c = '-'
		}
		h = (h ^ uint32(c)) * 16777619
	}
	return h
}

// UntilClose returns the body of a message whose content ends with the
// connection.
func UntilClose() Body { return Body{kind: bodyClose} }

// Done says whether the content is complete. Content that ends with the
// connection never is.
func (b *Body) Done() bool {
	return b.kind == bodyNone || b.kind == bodyLength && b.left == 0 || b.kind == bodyChunked && b.state == chunkDone
}

// UntilClose says whether the content ends with the connection.
func (b *Body) UntilClose() bool { return b.kind == bodyClose }

// Content is how many bytes of content went by, without chunk framing.
func (b *Body) Content() int64 { return b.content }

// Next takes what was received and returns how many of its first bytes
// belong to this message. They have been judged and may go on; on an error
// none may.
func (b *Body) Next(p []byte) (int, error) {
	switch b.kind {
	case bodyLength:
		n := int(min(b.left, int64(len(p))))
		b.left -= int64(n)
		b.content += int64(n)
		return n, nil
	case bodyChunked:
		return b.chunks(p)
	case bodyClose:
		b.content += int64(len(p))
		return len(p), nil
	}
	return 0, nil
}

// Split is Next for a reader of the content: it also returns where the first
// run of content in p lies, p[from:to), and how many bytes it used up.
func (b *Body) Split(p []byte) (from, to, used int, err error) {
	if b.kind != bodyChunked {
		n, err := b.Next(p)
		return 0, n, n, err
	}
	for i := 0; i < len(p) && !b.Done(); {
		if b.state == chunkData {
			n := int(min(b.left, int64(len(p)-i)))
			b.data(n)
			return i, i + n, i + n, nil
		}
		if err := b.step(p[i]); err != nil {
			return 0, 0, 0, err
		}
		i++
		used = i
	}
	return 0, 0, used, nil
}

func (b *Body) data(n int) {
	b.left -= int64(n)
	b.content += int64(n)
	if b.left == 0 {
		b.state = chunkDataCR
	}
}

func (b *Body) chunks(p []byte) (int, error) {
	i := 0
	for i < len(p) && b.state != chunkDone {
		if b.state == chunkData {
			n := int(min(b.left, int64(len(p)-i)))
			b.data(n)
			i += n
			continue
		}
		if err := b.step(p[i]); err != nil {
			return 0, err
		}
		i++
	}
	return i, nil
}

// step takes one byte of chunk framing.
func (b *Body) step(c byte) error {
	if b.framing++; b.framing > b.content+maxOverhead {
		return errOverhead
	}
	switch b.state {
	case chunkSize, chunkSizeMore:
		return b.size(c)
	case chunkExtension:
		if c == '\r' {
			b.state = chunkSizeLF
			return nil
		}
		if b.span++; b.span > MaxExtension {
			return errExtension
		}
		if is(c, classControl) {
			return errChunkLine
		}
	case chunkSizeLF:
		if c != '\n' {
			return errChunkLine
		}
		b.digits, b.span = 0, 0
		b.state = chunkData
		if b.left == 0 {
			b.state = trailerStart
		} else {
			// Who flushes often sends chunks of a few bytes for hours.
			b.framing = max(0, b.framing-chunkAllowance)
		}
	case chunkDataCR:
		if c != '\r' {
			return errChunkEnd
		}
		b.state = chunkDataLF
	case chunkDataLF:
		if c != '\n' {
			return errChunkEnd
		}
		b.state = chunkSize
	default:
		return b.trailer(c)
	}
	return nil
}

func (b *Body) size(c byte) error {
	switch {
	case is(c, classHex):
		if b.digits++; b.digits > 15 {
			return errChunkSize
		}
		b.left = b.left<<4 | int64(unhex(c))
		b.state = chunkSizeMore
	case b.state == chunkSize:
		return errChunkSize
	case c == '\r':
		b.state = chunkSizeLF
	case c == ';':
		b.state = chunkExtension
	default:
		return errChunkSize
	}
	return nil
}

func (b *Body) trailer(c byte) error {
	if b.span++; b.span > MaxTrailer {
		return errTrailer
	}
	switch b.state {
	case trailerStart:
		if c == '\r' {
			b.state = trailerEndLF
			return nil
		}
		b.nameLen = 0
		b.state = trailerName
		return b.trailerNameByte(c)
	case trailerName:
		return b.trailerNameByte(c)
	case trailerValue:
		if c == '\r' {
			b.state = trailerLF
		} else if is(c, classControl) {
			return errTrailLine
		}
	case trailerLF:
		if c != '\n' {
			return errTrailLine
		}
		b.state = trailerStart
	case trailerEndLF:
		if c != '\n' {
			return errTrailLine
		}
		b.state = chunkDone
	}
	return nil
}

func (b *Body) trailerNameByte(c byte) error {
	if c != ':' {
		if !is(c, classToken) || b.nameLen == len(b.name) {
			return errTrailLine
		}
		b.name[b.nameLen] = c
		b.nameLen++
		return nil
	}
	name := b.name[:b.nameLen]
	if len(name) == 0 {
		return errTrailLine
	}
	b.state = trailerValue
	if err := CheckTrailer(name, b.request); err != nil {
		return err
	}
	if slices.Contains(b.fields, nameHash(name)) {
		return errTrailField
	}
	return nil
}

// CheckTrailer refuses the name of a trailer field that belongs into a head.
func CheckTrailer(name []byte, request bool) error {
	if headOnly(name) || request && IsIdentity(name) {
		return errTrailField
	}
	return nil
}

// headOnly are the fields that frame, route, authenticate or describe a
// message (RFC 9110, 6.5.1): in a trailer they are never honest.
func headOnly(name []byte) bool {
	for _, n := range [...]string{"host", "authorization", "proxy-authorization", "connection", "keep-alive", "te",
		"trailer", "transfer-encoding", "upgrade", "expect", "range", "cookie", "set-cookie", "forwarded",
		"www-authenticate", "max-forwards", "cache-control", "pragma", "date", "location", "vary"} {
		if foldDash(name, n) {
			return true
		}
	}
	return hasPrefixDash(name, "content-") || hasPrefixDash(name, "if-") || hasPrefixDash(name, "x-forwarded-") ||
		hasPrefixDash(name, "proxy-")
}

func hasPrefixDash(name []byte, p string) bool {
	return len(name) >= len(p) && foldDash(name[:len(p)], p)
}

// LooksLikeHTTP1 judges the first bytes of a connection: whether they begin
// a request of HTTP/1, and whether more are needed to say.
func LooksLikeHTTP1(b []byte) (yes, more bool) {
	head, _, complete := bytes.Cut(b, []byte(" "))
	n := len(head)
	if n > MaxMethod || n == 0 && complete {
		return false, false
	}
	for _, c := range head {
		if (c < 'A' || c > 'Z') && c != '-' && c != '_' && (c < '0' || c > '9') {
			return false, false
		}
	}
	if !complete {
		return false, true
	}
	line, _, whole := bytes.Cut(b, []byte("\n"))
	if whole {
		return bytes.LastIndex(line, []byte(" HTTP/")) > 0, false
	}
	// What follows the method must at least begin a target.
	if len(b) == n+1 {
		return false, true
	}
	if c := b[n+1]; c != '/' && c != '*' && c|0x20 != 'h' && string(head) != "CONNECT" {
		return false, false
	}
	return len(b) > maxStartLine, len(b) <= maxStartLine
}
