// SPDX-License-Identifier: Apache-2.0

package http2

import (
	"errors"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
)

func head(end bool, pairs ...string) *Head {
	h := &Head{End: end}
	for i := 0; i < len(pairs); i += 2 {
		h.Fields = append(h.Fields, Field{Name: pairs[i], Value: pairs[i+1]})
	}
	return h
}

func reasonOf(err error) flow.Reason {
	if e, ok := errors.AsType[*http1.Error](err); ok {
		return e.Reason
	}
	return flow.ReasonOK
}

func TestRequest(t *testing.T) {
	var r Request
	err := r.Parse(head(false, ":method", "POST", ":scheme", "https", ":path", "/s.S/M?a=b", ":authority", "A.Example:8080",
		"content-type", "application/grpc+proto", "te", "trailers", "cookie", "a", "cookie", "b"))
	if err != nil || r.Method != "POST" || r.Path != "/s.S/M" || r.Query != "a=b" || r.Host != "a.example" || r.Authority != "A.Example:8080" ||
		!r.GRPC || r.ContentLength != -1 || len(r.Fields) != 4 {
		t.Errorf("%+v %v", r, err)
	}
	err = r.Parse(head(true, ":method", "OPTIONS", ":scheme", "http", ":path", "*", "host", "a", "expect", "100-Continue"))
	if err != nil || r.Path != "*" || r.Host != "a" || r.GRPC || r.ContentLength != 0 || !r.Expect {
		t.Errorf("%+v %v", r, err)
	}
	for contentType, want := range map[string]bool{"application/grpc": true, "application/grpc+json": true, "application/grpc;x=y": true,
		"application/grpc-web": false, "application/grpcs": false, "application/json": false, "": false, "APPLICATION/GRPC": false} {
		if _ = r.Parse(head(false, ":method", "POST", ":scheme", "http", ":path", "/", ":authority", "a", "content-type", contentType)); r.GRPC != want {
			t.Errorf("%q: gRPC %v", contentType, r.GRPC)
		}
	}
}

func TestResponse(t *testing.T) {
	for _, c := range []struct {
		head   *Head
		method string
		status int // 0: refused
		length int64
	}{
		{head(true, ":status", "204"), "GET", 204, -1},
		{head(false, ":status", "103", "link", "a"), "GET", 103, -1},
		{head(false, ":status", "200", "content-length", "5"), "GET", 200, 5},
		{head(true, ":status", "200", "content-length", "5"), "HEAD", 200, -1},
		{head(true, ":status", "304", "content-length", "5"), "GET", 304, -1},
		{head(true, ":status", "200", "content-length", "5"), "GET", 0, 0},
		{head(false, ":status", "200", "content-length", "5", "content-length", "5"), "GET", 0, 0},
		{head(true, ":status", "101"), "GET", 0, 0},
		{head(true, ":status", "20"), "GET", 0, 0},
		{head(true, ":status", "2000"), "GET", 0, 0},
		{head(true, ":status", "+20"), "GET", 0, 0},
		{head(true, ":status", "600"), "GET", 0, 0},
		{head(true), "GET", 0, 0},
		{head(true, ":status", "200", ":status", "200"), "GET", 0, 0},
		{head(true, ":status", "200", ":path", "/"), "GET", 0, 0},
		{head(true, ":status", "200", "connection", "close"), "GET", 0, 0},
		{head(true, ":status", "200", "Server", "x"), "GET", 0, 0},
	} {
		var r Response
		if err := r.Parse(c.head, c.method); (err == nil) != (c.status > 0) || err == nil && (r.Status != c.status || r.ContentLength != c.length) {
			t.Errorf("%+v: %+v %v", c.head, r, err)
		}
	}
}

func TestTrailers(t *testing.T) {
	var r Request
	if err := r.Parse(head(false, ":method", "POST", ":scheme", "http", ":path", "/", ":authority", "a", "x-account", "1")); err != nil {
		t.Fatal(err)
	}
	for name, ok := range map[string]bool{"x-checksum": true, "x-account": false, "authorization": false, "content-length": false,
		"x-forwarded-client-cert": false, "x-sallyport-role": false, ":path": false, "X-Checksum": false, "te": false} {
		if err := CheckTrailers(head(true, name, "trailers"), &r); (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := CheckTrailers(head(true, "grpc-status", "0", "x-account", "1"), nil); err != nil {
		t.Errorf("of a response: %v", err)
	}
}

// FuzzHead holds what must be true of each header list that is accepted.
func FuzzHead(f *testing.F) {
	f.Add(":method\nPOST\n:scheme\nhttp\n:path\n/s.S/M\n:authority\na\ncontent-type\napplication/grpc", true)
	f.Add(":status\n200\ncontent-length\n5", false)
	f.Add("grpc-status\n0", true)
	f.Fuzz(func(t *testing.T, text string, end bool) {
		parts := strings.Split(text, "\n")
		if len(parts)%2 != 0 {
			parts = append(parts, "")
		}
		h := head(end, parts...)
		var q Request
		if err := q.Parse(h); err == nil {
			if h.Check() != nil || q.Method == "" || q.Path == "" || q.Host == "" || strings.ToLower(q.Host) != q.Host ||
				q.Path[0] != '/' && q.Path != "*" || end && q.ContentLength != 0 || len(q.Fields)+4 < len(h.Fields) {
				t.Errorf("%q: %+v", parts, q)
			}
		} else if reasonOf(err) == flow.ReasonOK {
			t.Errorf("%q: refused without a reason: %v", parts, err)
		}
		var p Response
		if err := p.Parse(h, "GET"); err == nil && (p.Status < 100 || p.Status > 599 || h.Pseudo() != 1) {
			t.Errorf("%q: %+v", parts, p)
		}
		if CheckTrailers(h, &q) == nil && (h.Pseudo() > 0 || h.Count("content-length") > 0) {
			t.Errorf("%q as trailers", parts)
		}
	})
}
