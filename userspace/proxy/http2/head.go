// SPDX-License-Identifier: Apache-2.0

package http2

import (
	"strings"
	"unsafe"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
)

func malformed(text string) *http1.Error {
	return &http1.Error{Reason: flow.ReasonMalformed, Text: text}
}

var (
	errLong       = &http1.Error{Reason: flow.ReasonTooLarge, Text: "the header list is too long"}
	errName       = malformed("a field name that is no token in lower case")
	errSpace      = malformed("white space around a field value")
	errOrder      = malformed("a pseudo-header after other fields")
	errPseudo     = malformed("a pseudo-header that is missing, twice or unknown")
	errConnection = malformed("a connection-specific field")
	errTE         = malformed("a TE field other than trailers")
	errConnect    = &http1.Error{Reason: flow.ReasonUpgrade, Text: "CONNECT"}
	errScheme     = &http1.Error{Reason: flow.ReasonTarget, Text: "a scheme other than http and https"}
	errHost       = malformed("neither :authority nor Host, or two that differ")
	errLength     = malformed("Content-Length came more than once")
	errNoContent  = malformed("Content-Length without content")
	errExpect     = malformed("an expectation other than 100-continue")
	errStatus     = malformed("a status that is not three digits, or 101")
	errTrailer    = malformed("a pseudo-header in trailers, or a field of the head")
)

// ErrContent is said of content that is longer or shorter than its
// Content-Length (RFC 9113, 8.1.1).
var ErrContent error = malformed("content of another length than Content-Length")

// view sees a string as bytes that nobody may write.
func view(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

// Check refuses what no header list may hold (RFC 9113, 8.2 and 8.3): names
// that are not in lower case, control characters, fields that belong to one
// connection, and pseudo-headers that do not come first. Errors are
// *http1.Error.
func (h *Head) Check() error {
	if h.Long {
		return errLong
	}
	regular := false
	for i := range h.Fields {
		name, value := h.Fields[i].Name, h.Fields[i].Value
		if err := http1.CheckValue(view(value)); err != nil {
			return err
		}
		if value != "" && (space(value[0]) || space(value[len(value)-1])) {
			return errSpace
		}
		if strings.HasPrefix(name, ":") {
			if regular {
				return errOrder
			}
			continue
		}
		regular = true
		if !http1.IsToken(view(name)) || strings.ToLower(name) != name {
			return errName
		}
		switch name {
		case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "http2-settings":
			return errConnection
		case "te":
			if value != "trailers" {
				return errTE
			}
		}
	}
	return nil
}

func space(c byte) bool { return c == ' ' || c == '\t' }

// Count returns how many fields have that name.
func (h *Head) Count(name string) (n int) {
	for i := range h.Fields {
		if h.Fields[i].Name == name {
			n++
		}
	}
	return n
}

// Pseudo returns how many pseudo-headers there are.
func (h *Head) Pseudo() (n int) {
	for i := range h.Fields {
		if strings.HasPrefix(h.Fields[i].Name, ":") {
			n++
		}
	}
	return n
}

// Only returns the value of the field of that name, and whether there is
// exactly one.
func (h *Head) Only(name string) (value string, ok bool) {
	for i := range h.Fields {
		if h.Fields[i].Name == name {
			if ok {
				return "", false
			}
			value, ok = h.Fields[i].Value, true
		}
	}
	return value, ok
}

// Request is what the header list of a request says. Use one again and again:
// Parse keeps its storage.
type Request struct {
	Method, Scheme, Authority string
	Path, Query               string // of :path; Path is "*" for the asterisk form
	Host                      string // of Authority, in lower case and without port
	Fields                    []flow.Header
	// ContentLength is in bytes, -1 where it is not known before the end.
	ContentLength int64
	Expect        bool // 100-continue
	// GRPC says that it is a call of gRPC by its method and content type,
	// which is known also of a request that is refused.
	GRPC bool

	scratch [http1.MaxHost]byte
}

// Parse reads the header list of a request (RFC 9113, 8.3.1), as strictly as
// package http1 does. Errors are *http1.Error.
func (r *Request) Parse(h *Head) error {
	*r = Request{Fields: r.Fields[:0], ContentLength: -1}
	if h.End {
		r.ContentLength = 0
	}
	method, ok := h.Only(":method")
	r.Method = method
	r.GRPC = method == "POST" && isGRPC(h.get("content-type"))
	if err := h.Check(); err != nil {
		return err
	}
	if !ok {
		return errPseudo
	}
	if err := http1.CheckMethod(view(method)); err != nil {
		return err
	}
	if method == "CONNECT" {
		return errConnect
	}
	if err := r.target(h); err != nil {
		return err
	}
	if err := r.authority(h); err != nil {
		return err
	}
	return r.fields(h)
}

// isGRPC reads a content type as servers of gRPC do.
func isGRPC(contentType string) bool {
	rest, ok := strings.CutPrefix(contentType, "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

func (r *Request) target(h *Head) error {
	var ok bool
	if r.Scheme, ok = h.Only(":scheme"); !ok {
		return errPseudo
	}
	if r.Scheme != "http" && r.Scheme != "https" {
		return errScheme
	}
	target, ok := h.Only(":path")
	if !ok {
		return errPseudo
	}
	if target == "*" && r.Method == "OPTIONS" {
		r.Path = target
		return nil
	}
	path, query, err := http1.Target(view(target))
	r.Path, r.Query = target[:len(path)], target[len(target)-len(query):]
	return err
}

func (r *Request) authority(h *Head) error {
	authority, ok := h.Only(":authority")
	host, hosted := h.Only("host")
	pseudo := 3
	switch {
	case !hosted && h.Count("host") > 0, !ok && h.Count(":authority") > 0, !ok && !hosted, ok && hosted && authority != host:
		return errHost
	case ok:
		pseudo++
	default:
		authority = host
	}
	if h.Pseudo() != pseudo {
		return errPseudo
	}
	r.Authority = authority
	name, err := http1.Host(view(authority), &r.scratch)
	if err != nil {
		return err
	}
	if r.Host = authority[:len(name)]; string(name) != r.Host {
		r.Host = string(name)
	}
	return nil
}

// fields reads the fields that are no pseudo-headers.
func (r *Request) fields(h *Head) error {
	underscore, lengths := false, 0
	for i := range h.Fields {
		name, value := view(h.Fields[i].Name), view(h.Fields[i].Value)
		switch h.Fields[i].Name {
		case ":method", ":scheme", ":path", ":authority":
			continue
		case "content-length":
			n, err := http1.Length(value)
			if err != nil {
				return err
			}
			if lengths++; lengths > 1 {
				return errLength
			}
			if h.End && n != 0 {
				return errNoContent
			}
			r.ContentLength = n
		case "content_length", "transfer_encoding":
			return errName
		case "expect":
			if !strings.EqualFold(h.Fields[i].Value, "100-continue") {
				return errExpect
			}
			r.Expect = true
		default:
			underscore = underscore || strings.IndexByte(h.Fields[i].Name, '_') >= 0
		}
		r.Fields = append(r.Fields, flow.Header{Name: name, Value: value})
	}
	if underscore {
		return http1.Underscores(r.Fields)
	}
	return nil
}

// Response is what the header list of a response says.
type Response struct {
	Status int
	// ContentLength is in bytes, -1 where it is not known before the end.
	ContentLength int64
}

// Interim says whether another response to the same request follows.
func (r *Response) Interim() bool { return r.Status < 200 }

// Parse reads the header list of a response (RFC 9113, 8.3.2) to a request of
// that method.
func (r *Response) Parse(h *Head, method string) error {
	*r = Response{ContentLength: -1}
	if err := h.Check(); err != nil {
		return err
	}
	status, ok := h.Only(":status")
	if !ok || h.Pseudo() != 1 {
		return errPseudo
	}
	if len(status) != 3 {
		return errStatus
	}
	for _, c := range view(status) {
		if c < '0' || c > '9' {
			return errStatus
		}
		r.Status = r.Status*10 + int(c-'0')
	}
	if r.Status < 100 || r.Status > 599 || r.Status == 101 {
		return errStatus
	}
	switch n := h.Count("content-length"); {
	case n > 1:
		return errLength
	case n == 1:
		length, err := http1.Length(view(h.get("content-length")))
		if err != nil {
			return err
		}
		// They tell of content that does not come (RFC 9110, 8.6).
		if method != "HEAD" && r.Status != 304 {
			r.ContentLength = length
		}
	}
	if h.End && r.ContentLength > 0 {
		return errNoContent
	}
	return nil
}

// CheckTrailers judges the header list that ends a message: it must not hold
// what belongs into a head, nor in a request what its head holds already.
func CheckTrailers(h *Head, of *Request) error {
	if err := h.Check(); err != nil {
		return err
	}
	if h.Pseudo() > 0 {
		return errTrailer
	}
	if of == nil {
		return nil
	}
	for i := range h.Fields {
		name := view(h.Fields[i].Name)
		if err := http1.CheckTrailer(name, true); err != nil {
			return err
		}
		for j := range of.Fields {
			if string(of.Fields[j].Name) == h.Fields[i].Name {
				return errTrailer
			}
		}
	}
	return nil
}
