// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"bytes"
)

var (
	errStatusLine = malformed("the status line is not version SP three digits SP text")
	errNoContent  = malformed("a status without content that announces some")
	errInterim    = malformed("an interim response that announces content")
)

// Response is the head of a response. Use one again and again: Parse keeps
// its storage. Slices alias the buffer that was parsed.
type Response struct {
	Framing
	Status int
	// Accept is the Sec-WebSocket-Accept that a 101 must show, "" where none
	// was asked for. It is the caller's to set; Parse leaves it.
	Accept string
}

// Interim says whether another response to the same request follows.
func (r *Response) Interim() bool { return r.Status < 200 && !r.Switches() }

// Switches says whether what follows is not HTTP any more.
func (r *Response) Switches() bool { return r.Status == 101 }

// Parse reads a whole head, as Scan.End delimits it.
func (r *Response) Parse(head []byte) error {
	r.clear()
	r.Status = 0
	eol := bytes.IndexByte(head, '\r')
	if eol < 0 || len(head) < eol+4 || head[eol+1] != '\n' {
		return errStatusLine
	}
	if err := r.statusLine(head[:eol]); err != nil {
		return err
	}
	if err := r.fieldLines(head, eol+2, MaxFields, false); err != nil {
		return err
	}
	switch {
	case r.Status == 101:
		return r.switched()
	case r.Status < 200 && (r.HasLength || r.coding):
		return errInterim
	case r.Status == 204 && (r.coding || r.ContentLength > 0):
		return errNoContent
	}
	return nil
}

func (r *Response) statusLine(line []byte) error {
	const version = "HTTP/1.1 "
	if len(line) < len(version)+3 || string(line[:len("HTTP/1.")]) != "HTTP/1." || line[8] != ' ' {
		return errStatusLine
	}
	if line[7] != '0' && line[7] != '1' {
		return errVersion
	}
	r.Minor = line[7] - '0'
	for _, c := range line[9:12] {
		if c < '0' || c > '9' {
			return errStatusLine
		}
		r.Status = r.Status*10 + int(c-'0')
	}
	if r.Status < 100 || r.Status > 599 {
		return errStatusLine
	}
	if len(line) > 12 && line[12] != ' ' || hasControl(line[12:]) {
		return errStatusLine
	}
	return nil
}

// BodyFor returns the body that follows this head, which answers a request
// with the method HEAD or another one.
func (r *Response) BodyFor(head bool) Body {
	switch {
	case head || r.Status < 200 || r.Status == 204 || r.Status == 304:
		return Body{kind: bodyNone}
	case r.coding:
		b := Body{kind: bodyChunked}
		b.guard(&r.Framing)
		return b
	case !r.HasLength:
		return Body{kind: bodyClose}
	case r.ContentLength == 0:
		return Body{kind: bodyNone}
	}
	return Body{kind: bodyLength, left: r.ContentLength}
}
