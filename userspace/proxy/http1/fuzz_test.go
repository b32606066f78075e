// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
)

// FuzzRequest holds our reading against net/http's: what we accept it must
// accept, and read alike.
func FuzzRequest(f *testing.F) {
	for _, c := range refusedRequests {
		if len(c.in) < 4096 {
			f.Add([]byte(c.in))
		}
	}
	for _, target := range refusedTargets {
		f.Add([]byte("GET " + target + " HTTP/1.1\r\n" + okFields + "\r\n"))
	}
	for _, c := range acceptedTargets {
		f.Add([]byte("GET " + c.target + " HTTP/1.1\r\n" + okFields + "\r\n"))
	}
	f.Add([]byte(benchRequest + "{}GET /next"))
	f.Add([]byte(handshake + "\x81\x00"))
	f.Add([]byte("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nT: v\r\n\r\nGET / HTTP/1.1\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		r, err := readRequest(bytes.Clone(in))
		if err != nil {
			return
		}
		br := bufio.NewReaderSize(bytes.NewReader(in), 128<<10)
		theirs, err := http.ReadRequest(br)
		if err != nil {
			t.Fatalf("net/http refuses what we accept: %v\n%q", err, in)
		}
		if theirs.Method != string(r.Method) || theirs.RequestURI != string(r.Target) {
			t.Fatalf("method %q target %q, net/http %q %q", r.Method, r.Target, theirs.Method, theirs.RequestURI)
		}
		if !strings.EqualFold(theirs.Host, string(r.Authority)) {
			t.Fatalf("host %q, net/http %q", r.Authority, theirs.Host)
		}
		if theirs.URL.EscapedPath() != string(r.Path) && theirs.URL.Path != string(r.Path) {
			t.Fatalf("path %q, net/http %q", r.Path, theirs.URL.EscapedPath())
		}
		if theirs.URL.RawQuery != string(r.Query) {
			t.Fatalf("query %q, net/http %q", r.Query, theirs.URL.RawQuery)
		}
		if theirs.ContentLength != r.ContentLength {
			t.Fatalf("length %d, net/http %d", r.ContentLength, theirs.ContentLength)
		}
		if r.Upgrade() && (theirs.Method != "GET" || theirs.Header.Get("Sec-WebSocket-Version") != "13" || !strings.EqualFold(theirs.Header.Get("Upgrade"), "websocket") ||
			len(theirs.Header["Upgrade"])*len(theirs.Header["Sec-Websocket-Key"])*len(theirs.Header["Sec-Websocket-Version"]) != 1) {
			t.Fatalf("taken for a handshake: %q", in)
		}
		ours, used, err := content(r.BodyFor(), in[r.Len:], len(in)+1)
		if err != nil {
			return
		}
		got, err := io.ReadAll(theirs.Body)
		if err != nil || !bytes.Equal(ours, got) {
			t.Fatalf("content %q, net/http %q %v\n%q", ours, got, err, in)
		}
		if rest := len(in) - br.Buffered(); r.ContentLength != 0 && rest != r.Len+used {
			t.Fatalf("the next request begins at %d, net/http says %d\n%q", r.Len+used, rest, in)
		}
	})
}

// FuzzResponse is FuzzRequest for the other direction.
func FuzzResponse(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n"), false)
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"), false)
	f.Add([]byte("HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\nHTTP/1.1"), false)
	f.Add([]byte("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"), true)
	f.Add([]byte("HTTP/1.1 200 OK\r\nConnection: x, close\r\n\r\nuntil the end"), false)
	f.Add([]byte(accepted), false)
	f.Fuzz(func(t *testing.T, in []byte, head bool) {
		r, err := readResponse(bytes.Clone(in))
		if err != nil || r.Interim() {
			return
		}
		method := "GET"
		if head {
			method = "HEAD"
		}
		theirs, err := http.ReadResponse(bufio.NewReaderSize(bytes.NewReader(in), 128<<10), &http.Request{Method: method})
		if err != nil {
			t.Fatalf("net/http refuses what we accept: %v\n%q", err, in)
		}
		if theirs.StatusCode != r.Status {
			t.Fatalf("status %d, net/http %d", r.Status, theirs.StatusCode)
		}
		body := r.BodyFor(head)
		if body.UntilClose() {
			return
		}
		ours, _, err := content(body, in[r.Len:], len(in)+1)
		if err != nil {
			return
		}
		got, err := io.ReadAll(theirs.Body)
		if err != nil || !bytes.Equal(ours, got) {
			t.Fatalf("content %q, net/http %q %v\n%q", ours, got, err, in)
		}
	})
}

// FuzzLooksLikeHTTP1 holds that a prefix is never judged against the whole.
func FuzzLooksLikeHTTP1(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	f.Add([]byte("\x16\x03\x01\x02\x00"))
	f.Fuzz(func(t *testing.T, in []byte) {
		if _, err := readRequest(in); err == nil {
			if yes, more := LooksLikeHTTP1(in); !yes || more {
				t.Fatalf("a request that does not look like one: %q", in)
			}
			for i := range in {
				if yes, more := LooksLikeHTTP1(in[:i]); !yes && !more {
					t.Fatalf("given up at %d of %q", i, in)
				}
			}
		}
	})
}
