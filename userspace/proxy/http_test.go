// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// reflect answers with what it got.
func reflect(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Client-Cert", r.Header.Get("X-Forwarded-Client-Cert"))
	w.Header().Set("X-Role", r.Header.Get("X-Sallyport-Role"))
	switch r.URL.Path {
	case "/none":
		w.WriteHeader(204)
		return
	case "/stream":
		for i := range 3 {
			fmt.Fprintf(w, "part %d\n", i)
			w.(http.Flusher).Flush()
		}
		return
	}
	body, err := io.ReadAll(r.Body)
	if err == nil {
		_, _ = w.Write(body)
	}
}

// TestHTTP sends requests of every shape over kept connections.
func TestHTTP(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.app(http.HandlerFunc(reflect), 80)
		base := "http://" + in.out(clientNumber, serverPort(80))
		client := httpClient(t)
		large := make([]byte, 3<<20)
		for i := range large {
			large[i] = byte(rand.Uint32())
		}
		for round := range 3 {
			for _, body := range [][]byte{nil, []byte("x"), large[:100_000], large} {
				for _, chunked := range []bool{false, true} {
					var r io.Reader = bytes.NewReader(body)
					if chunked {
						r = io.MultiReader(r)
					}
					resp, err := client.Post(base+"/a", "text/plain", r)
					if err != nil {
						t.Fatalf("round %d, %d bytes, chunked %v: %v", round, len(body), chunked, err)
					}
					got, err := io.ReadAll(resp.Body)
					resp.Body.Close()
					if err != nil || resp.StatusCode != 200 || !bytes.Equal(got, body) {
						t.Fatalf("round %d, %d bytes, chunked %v: status %d, %d bytes, %v", round, len(body), chunked, resp.StatusCode, len(got), err)
					}
				}
			}
		}
		req, _ := http.NewRequest("GET", base+"/stream", nil)
		req.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://example.org/root")
		req.Header.Set("X-Sallyport-Role", "root")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(got) != "part 0\npart 1\npart 2\n" {
			t.Errorf("stream: %q", got)
		}
		if cert := resp.Header.Get("X-Client-Cert"); !strings.Contains(cert, "By="+serverID+";") || !strings.HasSuffix(cert, "URI="+clientID) {
			t.Errorf("the application saw the client as %q", cert)
		}
		if role := resp.Header.Get("X-Role"); role != "" {
			t.Errorf("a forged identity field came through: %q", role)
		}
		for _, c := range []struct {
			method, path string
			status       int
		}{{"HEAD", "/a", 200}, {"GET", "/none", 204}, {"OPTIONS", "/a", 200}, {"GET", "/debug/x", 403}, {"HEAD", "/debug/x", 403}, {"GET", "/a", 200}} {
			req, _ := http.NewRequest(c.method, base+c.path, nil)
			resp, err := client.Do(req)
			if err != nil {
				t.Fatalf("%s %s: %v", c.method, c.path, err)
			}
			if resp.StatusCode != c.status {
				t.Errorf("%s %s: status %d", c.method, c.path, resp.StatusCode)
			}
			if c.status == 403 && c.method == "GET" {
				reason, id := problem(t, resp)
				if reason != flow.ReasonDenyRule {
					t.Errorf("reason %s", reason)
				}
				if r := app.recorded(flow.ReasonDenyRule); r.RequestID != id || r.Rule != "no-debug" || r.Source != clientID || r.Destination != serverID {
					t.Errorf("record %+v", r)
				}
			}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		app.mu.Lock()
		defer app.mu.Unlock()
		applications := 0
		for _, d := range app.dials {
			if d.Kind == DialApplication {
				applications++
				if d.Client.Addr() != clientAddr || d.Target != serverNumber || d.Netns != serverNetns {
					t.Errorf("dial %+v", d)
				}
			}
		}
		if applications > 4 {
			t.Errorf("%d connections to the application: they are not kept", applications)
		}
	})
}

// smuggling is what must end at the proxy.
var smuggling = []struct {
	name, request string
	reason        flow.Reason
}{
	{"CL and TE", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG", flow.ReasonMalformed},
	{"two CL", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", flow.ReasonMalformed},
	{"two equal CL", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na", flow.ReasonMalformed},
	{"TE gzip", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", flow.ReasonMalformed},
	{"obs-fold", "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", flow.ReasonMalformed},
	{"bare LF", "GET / HTTP/1.1\nHost: a\n\n", flow.ReasonMalformed},
	{"NUL", "GET / HTTP/1.1\r\nHost: a\r\nX: a\x00\r\n\r\n", flow.ReasonMalformed},
	{"space before colon", "GET / HTTP/1.1\r\nHost : a\r\n\r\n", flow.ReasonMalformed},
	{"no Host", "GET / HTTP/1.1\r\n\r\n", flow.ReasonMalformed},
	{"two Hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", flow.ReasonMalformed},
	{"//", "GET //debug/x HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonTarget},
	{"dot segment", "GET /a/../debug/x HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonTarget},
	{"encoded dot segment", "GET /a/%2e%2e/debug/x HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonTarget},
	{"encoded slash", "GET /a%2fdebug HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonTarget},
	{"backslash", "GET /a\\..\\debug HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonTarget},
	{"parameters", "GET /debug;a/x HTTP/1.1\r\nHost: a\r\n\r\n", flow.ReasonTarget},
	{"CONNECT", "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", flow.ReasonUpgrade},
	{"h2c", "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n", flow.ReasonUpgrade},
	{"Connection takes a field away", "GET / HTTP/1.1\r\nHost: a\r\nConnection: authorization\r\nAuthorization: Bearer x\r\n\r\n", flow.ReasonHeaderAmbiguous},
	{"long head", "GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("a", 70<<10) + "\r\n\r\n", flow.ReasonTooLarge},
	{"many fields", "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("X: a\r\n", 200) + "\r\n", flow.ReasonTooLarge},
	{"bad chunk", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n", flow.ReasonMalformed},
	{"not HTTP", "EHLO example\r\n", flow.ReasonNotHTTP},
}

func TestSmuggling(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		var seen atomic.Int64
		app.raw(func(c *net.TCPConn) {
			b, _ := io.ReadAll(c)
			seen.Add(int64(len(b)))
		}, 80)
		addr := in.out(clientNumber, serverPort(80))
		for _, c := range smuggling {
			t.Run(c.name, func(t *testing.T) {
				conn := dialTCP(t, addr)
				go io.WriteString(conn, c.request+"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					t.Fatal(err)
				}
				if reason, _ := problem(t, resp); reason != c.reason {
					t.Errorf("reason %s, want %s", reason, c.reason)
				}
				if !resp.Close {
					t.Error("the connection can be used on")
				}
				if rest, err := io.ReadAll(conn); len(rest) != 0 {
					t.Errorf("more came: %q %v", rest, err)
				}
			})
		}
		if n := seen.Load(); n != 0 {
			t.Errorf("the application saw %d bytes", n)
		}
	})
}

// smugglingBack is what an application must not be able to say.
var smugglingBack = []string{
	"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
	"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
	"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n",
	"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
	"HTTP/1.1 2000 OK\r\n\r\n",
	"nonsense\r\n\r\n",
	"",
}

func TestSmugglingBack(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		answers := make(chan string, 1)
		app.raw(func(c *net.TCPConn) {
			if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
				_, _ = io.WriteString(c, <-answers)
			}
		}, 80)
		addr := in.out(clientNumber, serverPort(80))
		for _, answer := range smugglingBack {
			t.Run(answer, func(t *testing.T) {
				answers <- answer
				resp, err := ask(t, dialTCP(t, addr), "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
				if err != nil {
					t.Fatal(err)
				}
				if reason, _ := problem(t, resp); reason != flow.ReasonUpstream || resp.StatusCode != 502 {
					t.Errorf("reason %s status %d", reason, resp.StatusCode)
				}
			})
		}
	})
}

// TestAuditPassesOn holds that a policy that only observes breaks nothing,
// and says what it would have done.
func TestAuditPassesOn(t *testing.T) {
	eachWay(t, nodeOptions{mode: "audit"}, func(t *testing.T, in, app *node) {
		app.raw(echo, 80)
		addr := in.out(clientNumber, serverPort(80))
		for _, c := range smuggling {
			t.Run(c.name, func(t *testing.T) {
				conn := dialTCP(t, addr)
				sent := c.request + "and the rest"
				go func() {
					_, _ = io.WriteString(conn, sent)
					_ = conn.CloseWrite()
				}()
				got, err := io.ReadAll(conn)
				if err != nil || string(got) != sent {
					t.Errorf("%d of %d bytes came back: %v", len(got), len(sent), err)
				}
				r := app.recorded(c.reason)
				if !r.WouldDeny || r.Mode != "audit" {
					t.Errorf("record %+v", r)
				}
			})
		}
		// A body that goes wrong later goes on as well.
		app.raw(echo, 81)
		conn := dialTCP(t, in.out(clientNumber, serverPort(81)))
		const head, rest = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "3\nabc\r\n0\r\n\r\n"
		io.WriteString(conn, head)
		got := make([]byte, len("POST / HTTP/1.1"))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != "POST / HTTP/1.1" {
			t.Errorf("the beginning: %q %v", got, err)
		}
		io.WriteString(conn, rest)
		_ = conn.CloseWrite()
		if got, err := io.ReadAll(conn); err != nil || !strings.HasSuffix(string(got), "abc\r\n"+rest) {
			t.Errorf("the rest: %q %v", got, err)
		}
		// A call that no rule allows goes through too.
		app.app(http.HandlerFunc(reflect), 80)
		resp, err := httpClient(t).Get("http://" + addr + "/debug/x")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if r := app.recorded(flow.ReasonDenyRule); resp.StatusCode != 200 || !r.WouldDeny {
			t.Errorf("status %d, record %+v", resp.StatusCode, r)
		}
	})
}

func TestContinue(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.app(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/refuse" {
				w.WriteHeader(413)
				return
			}
			reflect(w, r)
		}), 80)
		addr := in.out(clientNumber, serverPort(80))
		conn := dialTCP(t, addr)
		br := bufio.NewReader(conn)
		for range 2 {
			fmt.Fprintf(conn, "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
			line, err := br.ReadString('\n')
			if err != nil || line != "HTTP/1.1 100 Continue\r\n" {
				t.Fatalf("got %q %v", line, err)
			}
			if line, _ = br.ReadString('\n'); line != "\r\n" {
				t.Fatalf("got %q", line)
			}
			io.WriteString(conn, "hello")
			resp, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Fatal(err)
			}
			if b, _ := io.ReadAll(resp.Body); string(b) != "hello" {
				t.Errorf("got %q", b)
			}
		}
		fmt.Fprintf(conn, "POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
		resp, err := http.ReadResponse(br, nil)
		if err != nil || resp.StatusCode != 413 || !resp.Close {
			t.Errorf("got %+v %v", resp, err)
		}
		conn = dialTCP(t, addr)
		if resp, err = ask(t, conn, "POST /debug/x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"); err != nil || resp.StatusCode != 403 || !resp.Close {
			t.Errorf("denied: got %+v %v", resp, err)
		}
	})
}

// TestEarlyAnswer holds that an application may answer before it has read
// the request, and that the client gets the answer.
func TestEarlyAnswer(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.raw(func(c *net.TCPConn) {
			if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
				_, _ = io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
				_, _ = io.Copy(io.Discard, c)
			}
		}, 80)
		conn := dialTCP(t, in.out(clientNumber, serverPort(80)))
		resp, err := ask(t, conn, "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nbegin")
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); resp.StatusCode != 413 || string(b) != "big" || err != nil || !resp.Close {
			t.Errorf("got %d %q %v close %v", resp.StatusCode, b, err, resp.Close)
		}
	})
}

// TestPipelining holds that requests sent together are judged one by one and
// answered in order.
func TestPipelining(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.app(http.HandlerFunc(reflect), 80)
		conn := dialTCP(t, in.out(clientNumber, serverPort(80)))
		var b strings.Builder
		for i := range 100 {
			path := "/a"
			if i%10 == 9 {
				path = "/debug/x"
			}
			fmt.Fprintf(&b, "POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n%03d", path, i)
		}
		go io.WriteString(conn, b.String())
		br := bufio.NewReader(conn)
		for i := range 100 {
			resp, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Fatalf("%d: %v", i, err)
			}
			got, _ := io.ReadAll(resp.Body)
			if i%10 == 9 {
				if resp.StatusCode != 403 {
					t.Errorf("%d: status %d", i, resp.StatusCode)
				}
			} else if resp.StatusCode != 200 || string(got) != fmt.Sprintf("%03d", i) {
				t.Errorf("%d: status %d %q", i, resp.StatusCode, got)
			}
		}
	})
}

func TestTimeouts(t *testing.T) {
	eachWay(t, nodeOptions{change: func(o *Options) {
		o.HeadTimeout, o.IdleTimeout, o.BodyTimeout = 100*time.Millisecond, 2*time.Second, 100*time.Millisecond
	}}, func(t *testing.T, in, app *node) {
		app.app(http.HandlerFunc(reflect), 80)
		addr := in.out(clientNumber, serverPort(80))
		for name, request := range map[string]string{
			"head": "GET / HTTP/1.1\r\nHost: a\r\n",
			"body": "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc",
		} {
			resp, err := ask(t, dialTCP(t, addr), request)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if reason, _ := problem(t, resp); reason != flow.ReasonTimeout || resp.StatusCode != 408 {
				t.Errorf("%s: reason %s", name, reason)
			}
		}
		conn := dialTCP(t, addr)
		resp, err := ask(t, conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		if b, err := io.ReadAll(conn); len(b) != 0 || err != nil {
			t.Errorf("an idle connection ended with %q %v", b, err)
		}
	})
}

// TestInspect holds that a body is held before the decision up to the limit.
func TestInspect(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.app(http.HandlerFunc(reflect), 82)
		addr := in.out(clientNumber, serverPort(82))
		for _, c := range []struct {
			name, head, body string
			status           int
		}{
			{"short", "Content-Length: 5\r\n", "hello", 200},
			{"at the limit", "Content-Length: 1024\r\n", strings.Repeat("a", 1024), 200},
			{"over", "Content-Length: 1025\r\n", strings.Repeat("a", 1025), 413},
			{"chunked", "Transfer-Encoding: chunked\r\n", "3\r\nabc\r\n0\r\n\r\n", 200},
			{"chunked over", "Transfer-Encoding: chunked\r\n", "800\r\n" + strings.Repeat("a", 2048) + "\r\n0\r\n\r\n", 413},
			{"encoded", "Content-Length: 5\r\nContent-Encoding: gzip\r\n", "hello", 413},
			{"bad chunk", "Transfer-Encoding: chunked\r\n", "x\r\n", 400},
			{"next to a long head", "X: " + strings.Repeat("h", 30<<10) + "\r\nContent-Length: 5\r\n", "hello", 200},
		} {
			t.Run(c.name, func(t *testing.T) {
				conn := dialTCP(t, addr)
				br := bufio.NewReader(conn)
				go func() {
					// Byte by byte at first, so that it has to wait.
					request := "POST /a HTTP/1.1\r\nHost: a\r\n" + c.head + "\r\n" + c.body
					io.WriteString(conn, request[:len(request)-3])
					time.Sleep(20 * time.Millisecond)
					io.WriteString(conn, request[len(request)-3:])
				}()
				resp, err := http.ReadResponse(br, nil)
				if err != nil || resp.StatusCode != c.status {
					t.Fatalf("got %+v %v", resp, err)
				}
			})
		}
	})
}

// TestKeptConnectionGone holds that a request is not sent twice when the
// application ends the connection that it had kept.
func TestKeptConnectionGone(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		var requests atomic.Int64
		app.raw(func(c *net.TCPConn) {
			br := bufio.NewReader(c)
			if _, err := http.ReadRequest(br); err != nil {
				return
			}
			requests.Add(1)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			if _, err := http.ReadRequest(br); err == nil {
				requests.Add(1) // and goes away without an answer
			}
		}, 80)
		conn := dialTCP(t, in.out(clientNumber, serverPort(80)))
		resp, err := ask(t, conn, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
		if err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		if resp, err := ask(t, conn, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"); err == nil {
			t.Errorf("got status %d where the application said nothing", resp.StatusCode)
		}
		if n := requests.Load(); n != 2 {
			t.Errorf("the application got %d requests, want 2", n)
		}
	})
}

// TestUpstreamGone holds what a client is told when nothing serves.
func TestUpstreamGone(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		addr := in.out(clientNumber, serverPort(80))
		resp, err := ask(t, dialTCP(t, addr), "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if err != nil {
			t.Fatal(err)
		}
		if reason, _ := problem(t, resp); reason != flow.ReasonLineRefused {
			t.Errorf("the agent refuses: reason %s", reason)
		}
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ln.Close()
		app.at(ln.Addr().String(), 80)
		if resp, err = ask(t, dialTCP(t, addr), "GET / HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if reason, _ := problem(t, resp); reason != flow.ReasonUpstreamGone {
			t.Errorf("nobody listens: reason %s", reason)
		}
	})
}

// TestBackPressure holds that a client that does not read stops the
// application.
func TestBackPressure(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		var wrote atomic.Int64
		stopped := make(chan struct{}, 1)
		app.raw(func(c *net.TCPConn) {
			if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
				return
			}
			_ = c.SetWriteBuffer(64 << 10)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
			buf := make([]byte, 64<<10)
			for wrote.Load() < 1_000_000_000 {
				_ = c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
				n, err := c.Write(buf)
				wrote.Add(int64(n))
				if err != nil {
					if !os.IsTimeout(err) {
						t.Errorf("write: %v", err)
					}
					stopped <- struct{}{}
					return
				}
			}
		}, 80)
		conn := dialTCP(t, in.out(clientNumber, serverPort(80)))
		_ = conn.SetReadBuffer(64 << 10)
		resp, err := ask(t, conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if err != nil {
			t.Fatal(err)
		}
		_ = resp
		select {
		case <-stopped:
		case <-within(t).Done():
			t.Error("nothing stops it")
		}
		if n := wrote.Load(); n > 64<<20 {
			t.Errorf("%d bytes were taken for a client that does not read", n)
		}
	})
}

// TestMayCall holds that a source that may not call is refused where it is,
// however late it begins.
func TestMayCall(t *testing.T) {
	eachWay(t, nodeOptions{change: atOnce}, func(t *testing.T, in, app *node) {
		app.app(http.HandlerFunc(reflect), 80)
		resp, err := ask(t, dialLate(t, in.out(otherNumber, serverPort(80))), "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if err != nil {
			t.Fatal(err)
		}
		if reason, _ := problem(t, resp); reason != flow.ReasonMayCall {
			t.Errorf("reason %s", reason)
		}
		in.mu.Lock()
		defer in.mu.Unlock()
		if len(in.dials) != 0 {
			t.Errorf("dialled %+v", in.dials)
		}
	})
}

// TestManyClients has many clients at once, some of which go away in the
// middle.
func TestManyClients(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.app(http.HandlerFunc(reflect), 80)
		addr := in.out(clientNumber, serverPort(80))
		var wg sync.WaitGroup
		for i := range 40 {
			wg.Go(func() {
				if i%4 == 3 {
					c, err := net.Dial("tcp4", addr)
					if err != nil {
						t.Error(err)
						return
					}
					io.WriteString(c, "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nabc")
					c.Close()
					return
				}
				client := &http.Client{Transport: &http.Transport{}, Timeout: 20 * time.Second}
				defer client.CloseIdleConnections()
				for j := range 20 {
					body := strings.Repeat("x", i*j*10)
					resp, err := client.Post("http://"+addr+"/a", "text/plain", strings.NewReader(body))
					if err != nil {
						t.Errorf("client %d request %d: %v", i, j, err)
						return
					}
					got, err := io.ReadAll(resp.Body)
					resp.Body.Close()
					if err != nil || string(got) != body {
						t.Errorf("client %d request %d: %d bytes of %d, %v", i, j, len(got), len(body), err)
					}
				}
			})
		}
		wg.Wait()
	})
}
