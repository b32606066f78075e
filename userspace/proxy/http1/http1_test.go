// SPDX-License-Identifier: Apache-2.0

package http1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func readRequest(b []byte) (*Request, error) {
	var s Scan
	n, err := s.End(b)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.ErrUnexpectedEOF
	}
	r := new(Request)
	return r, r.Parse(b[:n])
}

func readResponse(b []byte) (*Response, error) {
	var s Scan
	n, err := s.End(b)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.ErrUnexpectedEOF
	}
	r := new(Response)
	return r, r.Parse(b[:n])
}

const okFields = "Host: a.example\r\n"

var refusedRequests = []struct {
	name   string
	in     string
	reason flow.Reason
}{
	{"CL and TE", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", flow.ReasonMalformed},
	{"TE and CL", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", flow.ReasonMalformed},
	{"two CL", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", flow.ReasonMalformed},
	{"two equal CL", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n", flow.ReasonMalformed},
	{"CL list", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 3\r\n\r\n", flow.ReasonMalformed},
	{"CL sign", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\n", flow.ReasonMalformed},
	{"CL minus", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -3\r\n\r\n", flow.ReasonMalformed},
	{"CL hex", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x3\r\n\r\n", flow.ReasonMalformed},
	{"CL empty", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\n", flow.ReasonMalformed},
	{"CL leading zero", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 010\r\n\r\n", flow.ReasonMalformed},
	{"CL overflow", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551617\r\n\r\n", flow.ReasonMalformed},
	{"CL after a tab", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\t3\r\n\r\n", flow.ReasonMalformed},
	{"CL with underscore", "POST / HTTP/1.1\r\nHost: a\r\nContent_Length: 3\r\n\r\n", flow.ReasonMalformed},
	{"TE identity", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n", flow.ReasonMalformed},
	{"TE gzip, chunked", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", flow.ReasonMalformed},
	{"TE twice", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", flow.ReasonMalformed},
	{"TE in capitals", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n", flow.ReasonMalformed},
	{"TE quoted", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \"chunked\"\r\n\r\n", flow.ReasonMalformed},
	{"TE with vertical tab", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n", flow.ReasonMalformed},
	{"TE after a tab", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\tchunked\r\n\r\n", flow.ReasonMalformed},
	{"TE in 1.0", "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", flow.ReasonMalformed},
	{"TE with space before colon", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n", flow.ReasonMalformed},
	{"obs-fold", "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", flow.ReasonMalformed},
	{"obs-fold with a tab", "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n\tb\r\n\r\n", flow.ReasonMalformed},
	{"first field folded", "GET / HTTP/1.1\r\n Host: a\r\n\r\n", flow.ReasonMalformed},
	{"bare LF in the start line", "GET / HTTP/1.1\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"bare LF in a field", "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", flow.ReasonMalformed},
	{"bare LF at the end", "GET / HTTP/1.1\r\nHost: a\r\n\n", flow.ReasonMalformed},
	{"bare CR in a field", "GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n", flow.ReasonMalformed},
	{"CR CR LF", "GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", flow.ReasonMalformed},
	{"bare CR in the start line", "GET /\r HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"NUL in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", flow.ReasonMalformed},
	{"NUL in a name", "GET / HTTP/1.1\r\nHost: a\r\nX\x00: ab\r\n\r\n", flow.ReasonMalformed},
	{"DEL in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: 0123456789\x7f\r\n\r\n", flow.ReasonMalformed},
	{"ESC in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: 0123456789\x1b[2J\r\n\r\n", flow.ReasonMalformed},
	{"space before colon", "GET / HTTP/1.1\r\nHost : a\r\n\r\n", flow.ReasonMalformed},
	{"name with space", "GET / HTTP/1.1\r\nHost: a\r\nX Y: a\r\n\r\n", flow.ReasonMalformed},
	{"name with colon first", "GET / HTTP/1.1\r\nHost: a\r\n: a\r\n\r\n", flow.ReasonMalformed},
	{"name not ASCII", "GET / HTTP/1.1\r\nHost: a\r\nX\xc3\xa9: a\r\n\r\n", flow.ReasonMalformed},
	{"no colon", "GET / HTTP/1.1\r\nHost: a\r\nXY\r\n\r\n", flow.ReasonMalformed},
	{"no Host", "GET / HTTP/1.1\r\nX: a\r\n\r\n", flow.ReasonMalformed},
	{"no field", "GET / HTTP/1.1\r\n\r\n", flow.ReasonMalformed},
	{"two Hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"two Hosts, one absolute", "GET http://a/ HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n", flow.ReasonMalformed},
	{"empty Host", "GET / HTTP/1.1\r\nHost: \r\n\r\n", flow.ReasonMalformed},
	{"Host with userinfo", "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", flow.ReasonMalformed},
	{"Host with path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", flow.ReasonMalformed},
	{"Host list", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", flow.ReasonMalformed},
	{"Host with dot at the end", "GET / HTTP/1.1\r\nHost: a.\r\n\r\n", flow.ReasonMalformed},
	{"Host port 0", "GET / HTTP/1.1\r\nHost: a:0\r\n\r\n", flow.ReasonMalformed},
	{"Host port too high", "GET / HTTP/1.1\r\nHost: a:65536\r\n\r\n", flow.ReasonMalformed},
	{"Host port empty", "GET / HTTP/1.1\r\nHost: a:\r\n\r\n", flow.ReasonMalformed},
	{"Host open bracket", "GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", flow.ReasonMalformed},
	{"Host differs", "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"Host differs in port", "GET http://a:80/ HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"empty line first", "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"two spaces", "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonTarget},
	{"two spaces before the version", "GET /  HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonTarget},
	{"tab as separator", "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"space at the end", "GET / HTTP/1.1 \r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"space first", " GET / HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"space in the target", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonTarget},
	{"no version", "GET /\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"version 2.0", "GET / HTTP/2.0\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"version 1.2", "GET / HTTP/1.2\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"version 1.10", "GET / HTTP/1.10\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"version in lower case", "GET / http/1.1\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"method in lower case", "get / HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"method with slash", "G/T / HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"method too long", strings.Repeat("A", 33) + " / HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonMalformed},
	{"CONNECT", "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", flow.ReasonUpgrade},
	{"Upgrade websocket", "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", flow.ReasonUpgrade},
	{"Upgrade h2c", "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n", flow.ReasonUpgrade},
	{"Upgrade alone", "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\n\r\n", flow.ReasonUpgrade},
	{"expectation", "GET / HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\n\r\n", flow.ReasonMalformed},
	{"Connection names Authorization", "GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer x\r\nConnection: close, authorization\r\n\r\n", flow.ReasonHeaderAmbiguous},
	{"Connection names Host", "GET / HTTP/1.1\r\nConnection: Host\r\nHost: a\r\n\r\n", flow.ReasonHeaderAmbiguous},
	{"Connection names a later field", "GET / HTTP/1.1\r\nConnection: x-account\r\nHost: a\r\nX-Account: 1\r\n\r\n", flow.ReasonHeaderAmbiguous},
	{"Connection no token", "GET / HTTP/1.1\r\nHost: a\r\nConnection: clo se\r\n\r\n", flow.ReasonMalformed},
	{"underscore twin", "GET / HTTP/1.1\r\nHost: a\r\nX-Account: 1\r\nX_Account: 2\r\n\r\n", flow.ReasonHeaderAmbiguous},
	{"target too long", "GET /" + strings.Repeat("a", MaxTarget) + " HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonTooLarge},
	{"start line too long", "GET /" + strings.Repeat("a", MaxTarget+100) + " HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonTooLarge},
	{"too many fields", "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("X: a\r\n", MaxFields) + "\r\n", flow.ReasonTooLarge},
	{"head too long", "GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("a", MaxHead) + "\r\n\r\n", flow.ReasonTooLarge},
}

var refusedTargets = []string{
	"//", "//a", "/a//b", "/a//", "/.", "/..", "/a/.", "/a/..", "/./a", "/../a", "/a/../b", "/%2e", "/%2E%2e/a", "/.%2e/a", "/a/%2e.",
	"/a%2fb", "/a%2Fb", "/a%5cb", "/a%5Cb", "/a\\b", "/a;b", "/a;jsessionid=1/b", "/a#b", "/a?b#c", "/a%00", "/a?b=%00", "/a%", "/a%2",
	"/a%zz", "/a%c0%ae", "/a%C1%9c", "/\x80", "/a\x00", "/a\"b", "/a<b", "/a|b", "/a^b", "/a`b", "/a{b}", "/?\x7f", "/?\x80", "a", "*", "a/b", "http://u@a.example/",
	"http://u:p@a.example/", "http://a.example", "http:///a", "https://a.example/", "ftp://a.example/", "http://a.example//", "http://a.example/../",
	"http://a.example?x", "/..?x", "/%2e%2e?x", "/a/..%2f", "http://a.example/#f",
}

var acceptedTargets = []struct{ target, path, query string }{
	{"/", "/", ""},
	{"/a/b/c", "/a/b/c", ""},
	{"/a/", "/a/", ""},
	{"/a?b=c&d=//../;\\", "/a", "b=c&d=//../;\\"},
	{"/?", "/", ""},
	{"/...", "/...", ""},
	{"/.a/..b/c..", "/.a/..b/c..", ""},
	{"/%2e%2e%2e", "/%2e%2e%2e", ""},
	{"/.well-known/x", "/.well-known/x", ""},
	{"/a%20b", "/a%20b", ""},
	{"/%e2%82%ac", "/%e2%82%ac", ""},
	{"/a:b@c,d=e!$&'()*+", "/a:b@c,d=e!$&'()*+", ""},
	{"/q?x=100%", "/q", "x=100%"},
	{"/q?x='+OR+'1'='1", "/q", "x='+OR+'1'='1"},
	{"http://a.example/x?y", "/x", "y"},
	{"HTTP://A.example/", "/", ""},
}

func TestRequestRefused(t *testing.T) {
	for _, c := range refusedRequests {
		t.Run(c.name, func(t *testing.T) {
			r, err := readRequest([]byte(c.in))
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("accepted or unfinished: %v %+v", err, r)
			}
			if e.Reason != c.reason {
				t.Errorf("reason %s (%s), want %s", e.Reason, e.Text, c.reason)
			}
		})
	}
	for _, target := range refusedTargets {
		t.Run("target "+target, func(t *testing.T) {
			_, err := readRequest([]byte("GET " + target + " HTTP/1.1\r\n" + okFields + "\r\n"))
			var e *Error
			if !errors.As(err, &e) || e.Reason != flow.ReasonTarget {
				t.Errorf("got %v, want a refused target", err)
			}
		})
	}
}

func TestTargetAccepted(t *testing.T) {
	for _, c := range acceptedTargets {
		t.Run(c.target, func(t *testing.T) {
			r, err := readRequest([]byte("GET " + c.target + " HTTP/1.1\r\n" + okFields + "\r\n"))
			if err != nil {
				t.Fatal(err)
			}
			if string(r.Path) != c.path || string(r.Query) != c.query {
				t.Errorf("path %q query %q, want %q %q", r.Path, r.Query, c.path, c.query)
			}
		})
	}
}

func TestRequestAccepted(t *testing.T) {
	cases := []struct {
		name, in                string
		method, host, authority string
		length                  int64
		close, expect           bool
		goesOn                  string
	}{
		{name: "plain", in: "GET / HTTP/1.1\r\nHost: A.Example:8080\r\nUser-Agent: x\r\n\r\n", method: "GET", host: "a.example", authority: "A.Example:8080",
			goesOn: "GET / HTTP/1.1\r\nHost: A.Example:8080\r\nUser-Agent: x\r\n\r\n"},
		{name: "address", in: "GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", method: "GET", host: "[::1]", authority: "[::1]:80",
			goesOn: "GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n"},
		{name: "length", in: "POST / HTTP/1.1\r\nHost: a\r\ncontent-length: 12\r\n\r\n", method: "POST", host: "a", authority: "a", length: 12,
			goesOn: "POST / HTTP/1.1\r\nHost: a\r\ncontent-length: 12\r\n\r\n"},
		{name: "chunked", in: "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n", method: "POST", host: "a", authority: "a", length: -1, expect: true,
			goesOn: "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"},
		{name: "close stays", in: "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", method: "GET", host: "a", authority: "a", close: true,
			goesOn: "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"},
		{name: "hop by hop", in: "GET / HTTP/1.1\r\nKeep-Alive: timeout=5\r\nHost: a\r\nTE: trailers\r\nConnection: keep-alive, TE, x-absent\r\nX: y\r\nProxy-Connection: close\r\n\r\n", method: "GET", host: "a", authority: "a",
			goesOn: "GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n"},
		{name: "identity", in: "GET / HTTP/1.1\r\nX-Forwarded-Client-Cert: By=me\r\nx-sallyport-identity: root\r\nX_Sallyport-Role: x\r\nHost: a\r\nX_SALLYPORT_NODE: b\r\n\r\n", method: "GET", host: "a", authority: "a",
			goesOn: "GET / HTTP/1.1\r\nHost: a\r\n\r\n"},
		{name: "1.0", in: "GET / HTTP/1.0\r\n\r\n", method: "GET", close: true, goesOn: "GET / HTTP/1.0\r\n\r\n"},
		{name: "1.0 kept", in: "GET / HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n", method: "GET", host: "a", authority: "a",
			goesOn: "GET / HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n"},
		{name: "asterisk", in: "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", method: "OPTIONS", host: "a", authority: "a", goesOn: "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"},
		{name: "odd but plain values", in: "GET / HTTP/1.1\r\nHost: a\r\nX:\t y \t\r\nEmpty:\r\nU: \xc3\xa9\ta long enough value\r\n\r\n", method: "GET", host: "a", authority: "a",
			goesOn: "GET / HTTP/1.1\r\nHost: a\r\nX:\t y \t\r\nEmpty:\r\nU: \xc3\xa9\ta long enough value\r\n\r\n"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			r, err := readRequest([]byte(c.in))
			if err != nil {
				t.Fatal(err)
			}
			if string(r.Method) != c.method || string(r.Host) != c.host || string(r.Authority) != c.authority {
				t.Errorf("method %q host %q authority %q", r.Method, r.Host, r.Authority)
			}
			if r.ContentLength != c.length || r.Close != c.close || r.Expect != c.expect {
				t.Errorf("length %d close %v expect %v", r.ContentLength, r.Close, r.Expect)
			}
			for _, add := range []string{"", "X-Forwarded-Client-Cert: By=b;URI=a\r\n", "X-Sallyport-A: " + strings.Repeat("z", 200) + "\r\n"} {
				const room = 300
				full := append(make([]byte, room), c.in...)
				full = append(full, "BODY"...)
				if r, err = readRequest(full[room:]); err != nil {
					t.Fatal(err)
				}
				begin := r.Compact(full, room, []byte(add))
				want := strings.TrimSuffix(c.goesOn, "\r\n") + add + "\r\nBODY"
				if got := string(full[begin:]); got != want {
					t.Errorf("goes on\n%q, want\n%q", got, want)
				}
			}
		})
	}
}

// TestScanByteByByte holds that where reads end changes nothing.
func TestScanByteByByte(t *testing.T) {
	in := []byte("POST /a?b HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody")
	var s Scan
	for i := range in {
		n, err := s.End(in[:i+1])
		if err != nil {
			t.Fatalf("at %d: %v", i, err)
		}
		if want := len(in) - 4; (n != 0) != (i+1 >= want) || n != 0 && n != want {
			t.Fatalf("at %d: end %d", i, n)
		}
		if n != 0 {
			return
		}
	}
	t.Fatal("no end found")
}

func TestBody(t *testing.T) {
	cases := []struct {
		name, in, content string
		ok                bool
	}{
		{"empty", "0\r\n\r\n", "", true},
		{"two chunks", "3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n", "abc0123456789", true},
		{"extension", "3;a=b;c=\"d\"\r\nabc\r\n0;x\r\n\r\n", "abc", true},
		{"trailer", "1\r\na\r\n0\r\nX-Sum: 1\r\nY:\r\n\r\n", "a", true},
		{"zeros", "000\r\n\r\n", "", true},
		{"no size", "\r\n\r\n", "", false},
		{"space after the size", "3 \r\nabc\r\n0\r\n\r\n", "", false},
		{"sign", "+3\r\nabc\r\n0\r\n\r\n", "", false},
		{"0x", "0x3\r\nabc\r\n0\r\n\r\n", "", false},
		{"bare LF", "3\nabc\r\n0\r\n\r\n", "", false},
		{"bare LF in an extension", "3;a\nabc\r\n0\r\n\r\n", "", false},
		{"bare CR in an extension", "3;a\rb\r\nabc\r\n0\r\n\r\n", "", false},
		{"longer than its size", "3\r\nabcd\r\n0\r\n\r\n", "", false},
		{"LF after data", "3\r\nabc\n0\r\n\r\n", "", false},
		{"overflow", "fffffffffffffffff\r\n", "", false},
		{"extension too long", "3;" + strings.Repeat("a", MaxExtension+1) + "\r\nabc\r\n0\r\n\r\n", "", false},
		{"trailer too long", "0\r\nX: " + strings.Repeat("a", MaxTrailer) + "\r\n\r\n", "", false},
		{"trailer folded", "0\r\nX: a\r\n b\r\n\r\n", "", false},
		{"trailer without colon", "0\r\nX\r\n\r\n", "", false},
		{"trailer with space before colon", "0\r\nX : a\r\n\r\n", "", false},
		{"trailer Content-Length", "0\r\nContent-Length: 3\r\n\r\n", "", false},
		{"trailer Authorization", "0\r\nAUTHORIZATION: Bearer a\r\n\r\n", "", false},
		{"trailer repeats a field", "0\r\nX_Account: 2\r\n\r\n", "", false},
		{"trailer names an identity", "0\r\nX-Sallyport-Identity: root\r\n\r\n", "", false},
		{"trailer NUL", "0\r\nX: \x00\r\n\r\n", "", false},
		{"tiny chunks", strings.Repeat("1;"+strings.Repeat("x", 200)+"\r\na\r\n", 200) + "0\r\n\r\n", "", false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			for _, step := range []int{1, 7, len(c.in)} {
				r, err := readRequest([]byte("POST / HTTP/1.1\r\nHost: a\r\nX-Account: 1\r\nTransfer-Encoding: chunked\r\n\r\n"))
				if err != nil {
					t.Fatal(err)
				}
				content, used, err := content(r.BodyFor(), []byte(c.in+"NEXT"), step)
				if (err == nil) != c.ok {
					t.Fatalf("step %d: %v", step, err)
				}
				if err == nil && (string(content) != c.content || used != len(c.in)) {
					t.Errorf("step %d: content %q, used %d of %d", step, content, used, len(c.in))
				}
			}
		})
	}
}

// content reads a body in two ways at once and holds them against each
// other.
func content(b Body, in []byte, step int) (out []byte, used int, err error) {
	next := b
	pos := 0
	for !b.Done() && used < len(in) {
		end := min(used+step, len(in))
		from, to, n, err := b.Split(in[used:end])
		if err != nil {
			return nil, 0, err
		}
		out = append(out, in[used+from:used+to]...)
		used += n
	}
	for !next.Done() && pos < len(in) {
		n, err := next.Next(in[pos:min(pos+step, len(in))])
		if err != nil {
			return nil, 0, errors.New("Next refuses what Split takes: " + err.Error())
		}
		pos += n
	}
	if pos != used || b.Done() != next.Done() || b.Content() != next.Content() {
		return nil, 0, errors.New("Next and Split differ")
	}
	if !b.Done() {
		return nil, 0, io.ErrUnexpectedEOF
	}
	return out, used, nil
}

func TestResponse(t *testing.T) {
	cases := []struct {
		name, in string
		ok       bool
		head     bool
		kind     bodyKind
		close    bool
		goesOn   string // "" as it came
	}{
		{name: "length", in: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", ok: true, kind: bodyLength},
		{name: "HEAD", in: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", ok: true, head: true, kind: bodyNone},
		{name: "HEAD chunked", in: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", ok: true, head: true, kind: bodyNone},
		{name: "chunked", in: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", ok: true, kind: bodyChunked},
		{name: "until close", in: "HTTP/1.1 200 OK\r\n\r\n", ok: true, kind: bodyClose},
		{name: "1.0", in: "HTTP/1.0 200 OK\r\n\r\n", ok: true, kind: bodyClose, close: true},
		{name: "no text", in: "HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", ok: true, kind: bodyNone},
		{name: "no space", in: "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", ok: true, kind: bodyNone},
		{name: "204", in: "HTTP/1.1 204 No Content\r\n\r\n", ok: true, kind: bodyNone},
		{name: "304 with length", in: "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", ok: true, kind: bodyNone},
		{name: "100", in: "HTTP/1.1 100 Continue\r\n\r\n", ok: true, kind: bodyNone},
		{name: "103", in: "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", ok: true, kind: bodyNone},
		{name: "hop by hop", in: "HTTP/1.1 200 OK\r\nConnection: Upgrade, Keep-Alive\r\nUpgrade: h2\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n", ok: true, kind: bodyNone,
			goesOn: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"},
		{name: "upgrade first", in: "HTTP/1.1 200 OK\r\nUpgrade: h2\r\nContent-Length: 0\r\nConnection: Upgrade\r\n\r\n", ok: true, kind: bodyNone,
			goesOn: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"},
		{name: "101", in: "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"},
		{name: "CL and TE", in: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{name: "two CL", in: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n"},
		{name: "204 with content", in: "HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n"},
		{name: "204 chunked", in: "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{name: "100 with length", in: "HTTP/1.1 100 Continue\r\nContent-Length: 2\r\n\r\n"},
		{name: "fold", in: "HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n"},
		{name: "bare LF", in: "HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n"},
		{name: "NUL", in: "HTTP/1.1 200 O\x00K\r\nContent-Length: 0\r\n\r\n"},
		{name: "status of two digits", in: "HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n"},
		{name: "status of four digits", in: "HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n"},
		{name: "status 099", in: "HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n"},
		{name: "status 600", in: "HTTP/1.1 600 OK\r\nContent-Length: 0\r\n\r\n"},
		{name: "version", in: "HTTP/1.2 200 OK\r\nContent-Length: 0\r\n\r\n"},
		{name: "HTTP/0.9", in: "<html>\r\n\r\n"},
		{name: "no colon", in: "HTTP/1.1 200 OK\r\nContent-Length 0\r\n\r\n"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			in := []byte(c.in)
			r, err := readResponse(in)
			if (err == nil) != c.ok {
				t.Fatal(err)
			}
			if err != nil {
				return
			}
			if b := r.BodyFor(c.head); b.kind != c.kind || r.Close != c.close {
				t.Errorf("body %d close %v, want %d %v", b.kind, r.Close, c.kind, c.close)
			}
			want := c.goesOn
			if want == "" {
				want = c.in
			}
			if got := string(in[r.Compact(in, 0, nil):]); got != want {
				t.Errorf("goes on %q, want %q", got, want)
			}
		})
	}
}

func TestDropConnection(t *testing.T) {
	for _, fields := range []string{
		"Connection: keep-alive\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n",
		"Keep-Alive: timeout=5\r\nContent-Length: 0\r\nConnection: keep-alive\r\n",
		"Content-Length: 0\r\nConnection: close\r\nConnection: keep-alive\r\n",
		"Content-Length: 0\r\n",
	} {
		const room = 64
		full := append(make([]byte, room), "HTTP/1.1 200 OK\r\n"+fields+"\r\n"...)
		r, err := readResponse(full[room:])
		if err != nil {
			t.Fatal(err)
		}
		r.DropConnection()
		begin := r.Compact(full, room, []byte("Connection: close\r\n"))
		if got, want := string(full[begin:]), "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"; got != want {
			t.Errorf("%q: %q", fields, got)
		}
	}
}

func TestLooksLikeHTTP1(t *testing.T) {
	for _, c := range []struct {
		in        string
		yes, more bool
	}{
		{"", false, true}, {"GE", false, true}, {"GET ", false, true}, {"GET / HT", false, true}, {"GET / HTTP/1.1\r\n", true, false},
		{"GET / HTTP/1.1\n", true, false}, {"get / HTTP/1.1\r\n", false, false}, {"\x16\x03\x01", false, false}, {"SSH-2.0-OpenSSH\r\n", false, false},
		{"EHLO mail.example\r\n", false, false}, {"\x00\x00\x00\x08", false, false}, {"QUIT\r\n", false, false}, {"PRI * HTTP/2.0\r\n", true, false},
		{"A 1", false, false}, {strings.Repeat("A", 40), false, false}, {"SET /x y\r\n", false, false},
	} {
		if yes, more := LooksLikeHTTP1([]byte(c.in)); yes != c.yes || more != c.more {
			t.Errorf("%q: %v %v, want %v %v", c.in, yes, more, c.yes, c.more)
		}
	}
}

const benchRequest = "POST /v1/payments/7f3a?currency=eur HTTP/1.1\r\nHost: pay.shop.example\r\nUser-Agent: client/1.0\r\nAccept: */*\r\nAuthorization: Bearer eyJhbGciOiJFUzI1NiIsInR5cCI6ImF0K2p3dCJ9\r\nX-Account: 4711\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"

func BenchmarkRequest(b *testing.B) {
	in := []byte(benchRequest)
	r := new(Request)
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		var s Scan
		n, err := s.End(in)
		if err != nil || n != len(in) {
			b.Fatal(n, err)
		}
		if err := r.Parse(in[:n]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRequestNetHTTP(b *testing.B) {
	in := bytes.NewReader([]byte(benchRequest))
	br := bufio.NewReader(in)
	b.ReportAllocs()
	for b.Loop() {
		in.Seek(0, io.SeekStart)
		br.Reset(in)
		if _, err := http.ReadRequest(br); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkResponse(b *testing.B) {
	in := []byte("HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: Wed, 25 Nov 2026 22:00:00 GMT\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\nConnection: keep-alive\r\nETag: \"abc\"\r\n\r\n")
	r := new(Response)
	b.ReportAllocs()
	for b.Loop() {
		var s Scan
		n, _ := s.End(in)
		if err := r.Parse(in[:n]); err != nil {
			b.Fatal(err)
		}
	}
}

// TestSmallChunks holds that who flushes after each byte may go on for ever,
// and who sends more framing than that may not.
func TestSmallChunks(t *testing.T) {
	for chunk, most := range map[string]int{"1\r\nx\r\n": 1 << 20, "1;" + strings.Repeat("y", 10) + "\r\nx\r\n": 1 << 20, "1;" + strings.Repeat("y", 40) + "\r\nx\r\n": 1000} {
		b := Body{kind: bodyChunked}
		var err error
		n := 0
		for ; n < 1<<20 && err == nil; n++ {
			_, err = b.Next([]byte(chunk))
		}
		if (n == 1<<20) != (most == 1<<20) && n > most {
			t.Errorf("%q: %d chunks, %v", chunk, n, err)
		}
	}
}
