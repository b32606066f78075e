// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"
)

// TestWhatTwoParsersReadDifferently sends raw bytes to nginx behind the
// product: each is refused with its reason, and nginx never hears of it.
func TestWhatTwoParsersReadDifferently(t *testing.T) {
	require(t, "nginx", "curl")
	t.Parallel()
	n, stranger := one(t)
	// Nothing that a rule would refuse anyway: only the protocol does.
	n.policy("shop.yaml", strings.ReplaceAll(shopIn("enforce"), `http: ["GET /files/{name}", "HEAD /files/{name}"]`, `http: ["* /**"]`))
	w := startNginx(t, n.group("web"), n.ns, 8080)
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)
	n.served("client", "web")
	const addr = addrB + ":8080"
	const host = "Host: " + addr + "\r\n"
	good := "GET /files/hello HTTP/1.1\r\n" + host + "Connection: close\r\n\r\n"
	smuggled := "GET /files/smuggled HTTP/1.1\r\n" + host + "\r\n"
	cases := []struct{ name, request, want string }{
		{"Content-Length and Transfer-Encoding", "POST /up/x HTTP/1.1\r\n" + host + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, "400 http_malformed"},
		{"two Content-Lengths that differ", "POST /up/x HTTP/1.1\r\n" + host + "Content-Length: 0\r\nContent-Length: 60\r\n\r\n" + smuggled, "400 http_malformed"},
		{"two Content-Lengths that agree", "POST /up/x HTTP/1.1\r\n" + host + "Content-Length: 2\r\nContent-Length: 2\r\n\r\nab", "400 http_malformed"},
		{"a Content-Length list", "POST /up/x HTTP/1.1\r\n" + host + "Content-Length: 2, 2\r\n\r\nab", "400 http_malformed"},
		{"a signed Content-Length", "POST /up/x HTTP/1.1\r\n" + host + "Content-Length: +2\r\n\r\nab", "400 http_malformed"},
		{"an unknown transfer coding", "POST /up/x HTTP/1.1\r\n" + host + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "400 http_malformed"},
		{"two transfer codings", "POST /up/x HTTP/1.1\r\n" + host + "Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n", "400 http_malformed"},
		{"chunked in HTTP/1.0", "POST /up/x HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400 http_malformed"},
		{"obs-fold", "GET /files/hello HTTP/1.1\r\n" + host + "X-A: a\r\n b\r\n\r\n", "400 http_malformed"},
		{"a fold before the first field", "GET /files/hello HTTP/1.1\r\n " + host + "\r\n", "400 http_malformed"},
		{"a bare LF", "GET /files/hello HTTP/1.1\n" + host + "\r\n", "400 http_malformed"},
		{"a bare LF among fields", "GET /files/hello HTTP/1.1\r\n" + host + "X-A: a\nX-B: b\r\n\r\n", "400 http_malformed"},
		{"a bare CR", "GET /files/hello HTTP/1.1\r\n" + host + "X-A: a\rX-B: b\r\n\r\n", "400 http_malformed"},
		{"NUL in a field", "GET /files/hello HTTP/1.1\r\n" + host + "X-A: a\x00b\r\n\r\n", "400 http_malformed"},
		{"space before a colon", "POST /up/x HTTP/1.1\r\n" + host + "Content-Length : 2\r\n\r\nab", "400 http_malformed"},
		{"no Host", "GET /files/hello HTTP/1.1\r\n\r\n", "400 http_malformed"},
		{"two Hosts", "GET /files/hello HTTP/1.1\r\n" + host + host + "\r\n", "400 http_malformed"},
		{"a Host that differs from the authority", "GET http://other.example/files/hello HTTP/1.1\r\n" + host + "\r\n", "400"},
		{"//", "GET //files/hello HTTP/1.1\r\n" + host + "\r\n", "400 http_target"},
		{"..", "GET /files/../files/hello HTTP/1.1\r\n" + host + "\r\n", "400 http_target"},
		{"encoded ..", "GET /files/%2e%2e/files/hello HTTP/1.1\r\n" + host + "\r\n", "400 http_target"},
		{"encoded slash", "GET /files%2fhello HTTP/1.1\r\n" + host + "\r\n", "400 http_target"},
		{"backslash", "GET /files\\hello HTTP/1.1\r\n" + host + "\r\n", "400"},
		{"encoded NUL", "GET /files/hello%00 HTTP/1.1\r\n" + host + "\r\n", "400 http_target"},
		{"path parameters", "GET /files;a=b/hello HTTP/1.1\r\n" + host + "\r\n", "400 http_target"},
		{"userinfo", "GET http://a@" + addr + "/files/hello HTTP/1.1\r\n" + host + "\r\n", "400"},
		{"a huge line", "GET /files/" + strings.Repeat("a", 1<<17) + " HTTP/1.1\r\n" + host + "\r\n", "4"},
		{"a huge head", "GET /files/hello HTTP/1.1\r\n" + host + strings.Repeat("X-Filler: "+strings.Repeat("a", 1000)+"\r\n", 300) + "\r\n", "4"},
		{"a thousand fields", "GET /files/hello HTTP/1.1\r\n" + host + strings.Repeat("A: b\r\n", 1000) + "\r\n", "4"},
		{"no HTTP at all", "\x16\x03\x01nothing that HTTP begins with\r\n\r\n", ""},
		{"HTTP/1.1 after the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + good, ""},
	}
	for _, who := range []struct {
		name, cgroup string
		known        bool
	}{{"an identity", n.group("client"), true}, {"a stranger", "", false}} {
		ns := n.ns
		if !who.known {
			ns = stranger
		}
		for _, c := range cases {
			if !who.known && len(c.request) > 1<<16 {
				continue // a stranger is refused as one before that matters
			}
			t.Run(who.name+"/"+c.name, func(t *testing.T) {
				before := w.requests()
				from := n.mark()
				out, err := say(t, who.cgroup, ns, addr, c.request)
				got := answer(out)
				switch {
				case !who.known:
					if strings.HasPrefix(got, "2") || strings.Contains(out, "nginx") {
						t.Errorf("got %s", out)
					}
				case !strings.HasPrefix(got, c.want) || c.want == "" && strings.HasPrefix(got, "2"):
					t.Errorf("got %q %v, want %q", got, err, c.want)
				case strings.Count(out, "HTTP/1.1 ") > 1:
					t.Errorf("more than one answer: %q", out)
				default:
					n.decided(from, "a refusal", func(r *record) bool {
						return r.Decision == "deny" && (len(strings.Fields(c.want)) < 2 || r.Reason == strings.Fields(c.want)[1])
					})
				}
				if after := w.requests(); after != before {
					t.Errorf("nginx heard of it: %s", w.log("access.log"))
				}
			})
		}
	}
	out, err := say(t, n.group("client"), n.ns, addr, good)
	if err != nil || !strings.HasSuffix(out, "hello\n") {
		t.Fatalf("what is well-formed got %q %v", out, err)
	}
	eventually(t, "nginx's access log", func() string {
		if w.log("access.log") == "" {
			return "it is empty"
		}
		return ""
	})
	if got := w.requests(); got != 1 {
		t.Errorf("%d requests, want the well-formed one: %s", got, w.log("access.log"))
	}
	if strings.Contains(w.log("access.log"), "smuggled") {
		t.Error("a smuggled request arrived")
	}
}

// answer is the status of a raw HTTP answer, and the reason of a refusal.
func answer(out string) string {
	rest, ok := strings.CutPrefix(out, "HTTP/1.1 ")
	if !ok {
		return ""
	}
	status, _, _ := strings.Cut(rest, " ")
	if _, after, ok := strings.Cut(rest, `"reason":"`); ok {
		reason, _, _ := strings.Cut(after, `"`)
		status += " " + reason
	}
	return status
}
