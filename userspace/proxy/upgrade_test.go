// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/token"
	"golang.org/x/net/websocket"
)

// livePolicy is the policy of an application that speaks WebSocket, beside
// those of the world.
const livePolicy = `---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: live, namespace: t}
spec:
  mode: MODE
  protect: {identity: server, ports: [85], protocol: http}
  rules:
    - {name: feed, from: [client], http: ["* /feed/**"], upgrade: [websocket]}
    - {name: paid, from: [client], http: [GET /paid], upgrade: [websocket], token: {issuer: sso, audience: server}}
    - {name: plain, from: [client], http: ["* /plain/**", GET /paid]}
    - {name: no-debug, effect: deny, http: ["* /feed/debug"]}
`

// livePlan is the plan with livePolicy, with one text in place of another.
func livePlan(t testing.TB, mode, from, to string) *compile.Plan {
	t.Helper()
	text := strings.NewReplacer("MODE", mode, `"10.0.2.1:84"`, `"10.0.2.1:84", "10.0.2.1:85"`).Replace(worldPolicies + livePolicy)
	if strings.Count(text, from) != 1 && from != "" {
		t.Fatalf("the policies do not hold %q once", from)
	}
	return build(t, strings.Replace(text, from, to, 1))
}

// eachLive is eachWay with livePolicy, and where its port can be reached.
func eachLive(t *testing.T, mode string, o nodeOptions, f func(t *testing.T, in, app *node, addr string)) {
	o.mode = mode
	eachWay(t, o, func(t *testing.T, in, app *node) {
		for _, n := range []*node{in, app} {
			n.proxy.SetPlan(livePlan(t, mode, "", ""), 2)
		}
		f(t, in, app, in.out(clientNumber, serverPort(85)))
	})
}

// oneLive is eachLive on one node.
func oneLive(t *testing.T, o nodeOptions, f func(t *testing.T, n *node, addr string)) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		o.goroutines = goroutines
		n := oneNode(t, o)
		n.proxy.SetPlan(livePlan(t, "enforce", "", ""), 2)
		f(t, n, n.out(clientNumber, serverPort(85)))
	})
}

// echoes serves WebSocket: it says who it took for the client, then says
// everything again. It reflects what is no handshake.
func echoes() http.Handler {
	live := &websocket.Server{Handler: func(c *websocket.Conn) {
		_ = websocket.Message.Send(c, c.Request().Header.Get("X-Forwarded-Client-Cert")+" "+strings.Join(c.Config().Protocol, ","))
		var b []byte
		for websocket.Message.Receive(c, &b) == nil {
			if websocket.Message.Send(c, b) != nil {
				return
			}
		}
	}}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			live.ServeHTTP(w, r)
			return
		}
		reflect(w, r)
	})
}

// open opens a WebSocket over a connection.
func open(c net.Conn, path string, fields ...string) (*websocket.Conn, error) {
	cfg, err := websocket.NewConfig("ws://app.example"+path, "http://app.example")
	if err != nil {
		return nil, err
	}
	cfg.Protocol = []string{"chat"}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		cfg.Header = http.Header{name: {value}}
	}
	return websocket.NewClient(cfg, c)
}

// opened is open where it must succeed, after what echoes says first.
func opened(t testing.TB, c net.Conn, path string, fields ...string) *websocket.Conn {
	t.Helper()
	ws, err := open(c, path, fields...)
	if err != nil {
		t.Fatal(err)
	}
	var who string
	if err := websocket.Message.Receive(ws, &who); err != nil || !strings.HasSuffix(who, "URI="+clientID+" chat") {
		t.Fatalf("the application took the client for %q: %v", who, err)
	}
	return ws
}

func said(ws *websocket.Conn, b []byte) error {
	if err := websocket.Message.Send(ws, b); err != nil {
		return err
	}
	var got []byte
	if err := websocket.Message.Receive(ws, &got); err != nil {
		return err
	}
	if !bytes.Equal(got, b) {
		return fmt.Errorf("%d bytes came back of %d", len(got), len(b))
	}
	return nil
}

// wsHandshake begins a WebSocket by hand; wsAccepted answers it.
const (
	wsHandshake = "GET /feed/a HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
	wsAccepted = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)

// TestWebSocket has a real client and a real server, and one line in the
// decision log for each.
func TestWebSocket(t *testing.T) {
	large := make([]byte, 3<<20)
	_, _ = rand.Read(large)
	eachLive(t, "enforce", nodeOptions{}, func(t *testing.T, in, app *node, addr string) {
		app.app(echoes(), 85, 81)
		ws := opened(t, dialTCP(t, addr), "/feed/a")
		for _, b := range [][]byte{[]byte("x"), large[:70_000], large} {
			if err := said(ws, b); err != nil {
				t.Fatal(err)
			}
		}
		_ = ws.Close()
		var lines []string
		for len(lines) == 0 {
			for _, r := range app.records() {
				if r.Upgrade != "" {
					lines = append(lines, fmt.Sprint(r.Decision, " ", r.Rule, " ", r.Method, " ", r.Path, " ", r.Upgrade, " ", r.Source))
				}
			}
		}
		if want := "allow feed GET /feed/** websocket " + clientID; len(lines) != 1 || lines[0] != want {
			t.Errorf("records %q, want %q", lines, want)
		}
		// After requests on the same connection; the same rule allows those.
		c := dialTCP(t, addr)
		resp, err := ask(t, c, "POST /feed/a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")
		if err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		if err := said(opened(t, c, "/feed/a"), large[:10]); err != nil {
			t.Error(err)
		}
		// Where identity alone decides, connections may be of any kind.
		if err := said(opened(t, dialTCP(t, in.out(clientNumber, serverPort(81))), "/any"), large[:10]); err != nil {
			t.Error(err)
		}
	})
}

// TestWebSocketRefused holds that an upgrade goes only where a rule lists it,
// and that the connection can be used on, for what is asked for next.
func TestWebSocketRefused(t *testing.T) {
	eachLive(t, "enforce", nodeOptions{}, func(t *testing.T, in, app *node, addr string) {
		var seen atomic.Int64
		app.app(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			seen.Add(1)
			reflect(w, r)
		}), 80, 85)
		for _, c := range []struct {
			path, rule string
			port       uint16
			reason     flow.Reason
		}{
			{"/plain/a", "plain", 85, flow.ReasonUpgrade},
			{"/paid", "paid", 85, flow.ReasonTokenMissing}, // the rule that lists it is the nearer one
			{"/feed/debug", "no-debug", 85, flow.ReasonDenyRule},
			{"/feed/%64ebug", "no-debug", 85, flow.ReasonDenyRule},
			{"/else", "", 85, flow.ReasonNoRule},
			{"/a", "all", 80, flow.ReasonUpgrade},
		} {
			conn := dialTCP(t, in.out(clientNumber, serverPort(c.port)))
			resp, err := ask(t, conn, strings.Replace(wsHandshake, "/feed/a", c.path, 1))
			if err != nil {
				t.Fatal(err)
			}
			if reason, _ := problem(t, resp); reason != c.reason {
				t.Errorf("%s: reason %s", c.path, reason)
			}
			if r := app.recorded(c.reason); r.Rule != c.rule || r.Upgrade != "websocket" {
				t.Errorf("%s: record %+v", c.path, r)
			}
			before := seen.Load()
			next := map[uint16]string{80: "/a", 85: "/plain/a"}[c.port]
			if resp, err = ask(t, conn, "GET "+next+" HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil || resp.StatusCode != 200 {
				t.Errorf("%s: afterwards %v %v", c.path, resp, err)
			}
			if n := seen.Load(); n != before+1 {
				t.Errorf("%s: the application saw %d requests", c.path, n-before)
			}
		}
	})
}

// TestWebSocketSmuggling holds that what a client sends behind a handshake
// goes nowhere before the application has switched: if it does not, that is
// the next request, read and judged like any other.
func TestWebSocketSmuggling(t *testing.T) {
	const hidden = "GET /feed/debug HTTP/1.1\r\nHost: a\r\n\r\n"
	eachLive(t, "enforce", nodeOptions{}, func(t *testing.T, in, app *node, addr string) {
		var seen atomic.Int64
		answers := make(chan string, 1)
		got := make(chan string, 1)
		app.raw(func(c *net.TCPConn) {
			br := bufio.NewReader(c)
			if _, err := http.ReadRequest(br); err != nil {
				return
			}
			seen.Add(1)
			select {
			case answer := <-answers:
				_, _ = io.WriteString(c, answer)
			case <-t.Context().Done():
				return
			}
			rest, _ := io.ReadAll(br)
			select {
			case got <- string(rest):
			case <-t.Context().Done():
			}
		}, 85)
		for _, c := range []struct {
			name, answer string
			status       int
		}{
			{"426", "HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 8\r\nContent-Length: 0\r\n\r\n", 426},
			{"200", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200},
			{"interim, then 200", "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200},
			{"204", "HTTP/1.1 204 No Content\r\n\r\n", 204},
		} {
			t.Run(c.name, func(t *testing.T) {
				answers <- c.answer
				conn := dialTCP(t, addr)
				go io.WriteString(conn, wsHandshake+hidden+"GET /else HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
				br := bufio.NewReader(conn)
				for _, want := range []struct {
					status int
					reason flow.Reason
				}{{c.status, ""}, {403, flow.ReasonDenyRule}, {403, flow.ReasonNoRule}} {
					resp, err := http.ReadResponse(br, &http.Request{Method: "GET"})
					for err == nil && resp.StatusCode == 103 {
						resp, err = http.ReadResponse(br, &http.Request{Method: "GET"})
					}
					if err != nil {
						t.Fatal(err)
					}
					if resp.StatusCode != want.status {
						t.Fatalf("status %d, want %d", resp.StatusCode, want.status)
					}
					if want.reason == "" {
						_, _ = io.Copy(io.Discard, resp.Body)
					} else if reason, _ := problem(t, resp); reason != want.reason {
						t.Errorf("reason %s, want %s", reason, want.reason)
					}
				}
				_ = conn.Close()
				if rest := <-got; rest != "" {
					t.Errorf("the application got %q behind the handshake", rest)
				}
			})
		}
		// A 101 that is no answer to the handshake is no answer at all.
		for name, change := range map[string][2]string{
			"another handshake's": {"s3pP", "t3pP"}, "another protocol": {"Upgrade: websocket", "Upgrade: h2c"}, "no accept": {"Sec-WebSocket-Accept", "X"},
			"no Connection": {"Connection: Upgrade\r\n", ""}, "close": {"Connection: Upgrade", "Connection: Upgrade, close"},
			"length": {"Connection: Upgrade", "Connection: Upgrade\r\nContent-Length: 0"},
		} {
			t.Run(name, func(t *testing.T) {
				answers <- strings.Replace(wsAccepted, change[0], change[1], 1)
				conn := dialTCP(t, addr)
				go io.WriteString(conn, wsHandshake+hidden)
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					t.Fatal(err)
				}
				if reason, _ := problem(t, resp); reason != flow.ReasonUpstream || resp.StatusCode != 502 || !resp.Close {
					t.Errorf("reason %s status %d", reason, resp.StatusCode)
				}
				_ = conn.Close()
				if rest := <-got; rest != "" {
					t.Errorf("the application got %q behind the handshake", rest)
				}
			})
		}
		// What is no handshake does not even get there: the known way is a
		// version that the application does not speak.
		before := seen.Load()
		for name, change := range map[string][2]string{
			"version": {"Version: 13", "Version: 777"}, "protocols": {"Upgrade: websocket", "Upgrade: websocket, h2c"}, "h2c": {"Upgrade: websocket", "Upgrade: h2c"},
			"method": {"GET", "POST"}, "content": {"Sec-WebSocket-Version", "Content-Length: 3\r\nSec-WebSocket-Version"}, "key": {"dGhl", ""},
		} {
			t.Run(name, func(t *testing.T) {
				conn := dialTCP(t, addr)
				go io.WriteString(conn, strings.Replace(wsHandshake, change[0], change[1], 1)+hidden)
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					t.Fatal(err)
				}
				if reason, _ := problem(t, resp); reason != flow.ReasonUpgrade || !resp.Close {
					t.Errorf("reason %s", reason)
				}
				if rest, err := io.ReadAll(conn); len(rest) != 0 {
					t.Errorf("more came: %q %v", rest, err)
				}
			})
		}
		if n := seen.Load(); n != before {
			t.Errorf("the application saw %d requests", n-before)
		}
	})
}

// TestWebSocketBytes holds that both sides' bytes go on whole from the very
// first, also those that came before the switch and those with it, and that
// either side may end first.
func TestWebSocketBytes(t *testing.T) {
	eachLive(t, "enforce", nodeOptions{}, func(t *testing.T, in, app *node, addr string) {
		head := make(chan string, 1)
		app.raw(func(c *net.TCPConn) {
			br := bufio.NewReader(c)
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			head <- strings.Join(r.Header["Connection"], "|") + " " + strings.Join(r.Header["Upgrade"], "|")
			io.WriteString(c, "HTTP/1.1 103 Early Hints\r\n\r\n"+wsAccepted+"first")
			got, err := io.ReadAll(br)
			fmt.Fprintf(c, "%s %v", got, err)
		}, 85)
		conn := dialTCP(t, addr)
		io.WriteString(conn, wsHandshake+"early")
		br := bufio.NewReader(conn)
		for _, status := range []int{103, 101} {
			resp, err := http.ReadResponse(br, nil)
			if err != nil || resp.StatusCode != status {
				t.Fatal(resp, err)
			}
			if status == 101 && (resp.Header.Get("Upgrade") != "websocket" || resp.Header.Get("Connection") != "Upgrade" || resp.Header.Get("Sec-WebSocket-Accept") == "") {
				t.Errorf("switched with %v", resp.Header)
			}
		}
		if got := <-head; got != "Upgrade websocket" {
			t.Errorf("the application was asked for %q", got)
		}
		io.WriteString(conn, " later")
		_ = conn.CloseWrite()
		if got, err := io.ReadAll(br); string(got) != "firstearly later <nil>" || err != nil {
			t.Errorf("got %q %v", got, err)
		}
	})
}

// TestWebSocketIdle holds that silence is measured as that of an opaque
// connection, not as that between two requests.
func TestWebSocketIdle(t *testing.T) {
	const idle = 3 * time.Second
	o := nodeOptions{change: func(o *Options) {
		o.HeadTimeout, o.BodyTimeout, o.IdleTimeout, o.ResponseTimeout, o.RelayIdle = idle/3, idle/3, idle/3, idle/3, idle
	}}
	oneLive(t, o, func(t *testing.T, n *node, addr string) {
		n.app(echoes(), 85)
		ws := opened(t, dialTCP(t, addr), "/feed/a")
		began := time.Now()
		if err := said(ws, []byte("x")); err != nil {
			t.Fatal(err)
		}
		_, err := ws.Read(make([]byte, 1))
		if took := time.Since(began); err == nil || errors.Is(err, os.ErrDeadlineExceeded) || took < idle {
			t.Errorf("it ended after %v: %v", took, err)
		}
	})
}

// TestWebSocketEnds holds that one ends with what allowed it, and goes on
// while that lasts.
func TestWebSocketEnds(t *testing.T) {
	eachLive(t, "enforce", nodeOptions{}, func(t *testing.T, in, app *node, addr string) {
		app.app(echoes(), 85)
		bearer := "Authorization: Bearer " + app.mints(t)
		feed := opened(t, dialTCP(t, addr), "/feed/a")
		paid := opened(t, dialTCP(t, addr), "/paid", bearer)
		ended := func(ws *websocket.Conn, reason flow.Reason) {
			t.Helper()
			if _, err := ws.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("it goes on: %v", err)
			}
			app.recorded(reason)
		}
		lives := func(ws *websocket.Conn) {
			t.Helper()
			if err := said(ws, []byte("still there")); err != nil {
				t.Fatal(err)
			}
		}
		set := func(from, to string, generation uint64) {
			t.Helper()
			app.proxy.SetPlan(livePlan(t, "enforce", from, to), generation)
		}
		set("", "", 3)
		lives(feed)
		lives(paid)
		// The rule lists it no more, but still speaks of the request.
		const list = `http: ["* /feed/**"], upgrade: [websocket]`
		set(list, `http: ["* /feed/**"]`, 4)
		ended(feed, flow.ReasonPolicyChanged)
		lives(paid)
		set("", "", 5)
		feed = opened(t, dialTCP(t, addr), "/feed/a")
		set(list, `http: ["* /other/**"], upgrade: [websocket]`, 6)
		ended(feed, flow.ReasonPolicyChanged)
		lives(paid)
		set("", "", 7)
		feed = opened(t, dialTCP(t, addr), "/feed/a")
		// The token.
		list1, err := identity.NewRevocations([]identity.Revocation{{Kind: identity.RevokeJTI, Value: "t1"}}, 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := app.tokens.SetRevocations([]token.Revocation{{Kind: "jti", Value: "t1"}}); err != nil {
			t.Fatal(err)
		}
		app.pipeline.SetRevocations(list1)
		ended(paid, flow.ReasonRevoked)
		lives(feed)
		// The caller.
		list2, err := identity.NewRevocations([]identity.Revocation{{Kind: identity.RevokeIdentity, Value: clientID}}, 2)
		if err != nil {
			t.Fatal(err)
		}
		app.verifier.SetRevocations(list2)
		app.pipeline.SetRevocations(list2)
		ended(feed, flow.ReasonRevoked)
	})
}

// TestWebSocketExpires holds that one ends when the token ends that allowed
// it, and not before.
func TestWebSocketExpires(t *testing.T) {
	oneLive(t, nodeOptions{}, func(t *testing.T, app *node, addr string) {
		app.app(echoes(), 85)
		go app.pipeline.Run(t.Context())
		end := time.Now().Add(4 * time.Second).Truncate(time.Second)
		ws := opened(t, dialTCP(t, addr), "/paid", "Authorization: Bearer "+app.mintsUntil(t, end))
		if err := said(ws, []byte("x")); err != nil {
			t.Fatal(err)
		}
		_, err := ws.Read(make([]byte, 1))
		if err == nil || errors.Is(err, os.ErrDeadlineExceeded) || time.Now().Before(end) {
			t.Errorf("it ended %v after the token: %v", time.Since(end), err)
		}
		app.recorded(flow.ReasonExpired)
	})
}

// TestWebSocketInAudit holds that a policy that only observes breaks no
// upgrade, says what it would have done, and ends none.
func TestWebSocketInAudit(t *testing.T) {
	eachLive(t, "audit", nodeOptions{}, func(t *testing.T, in, app *node, addr string) {
		app.app(echoes(), 85)
		ws := opened(t, dialTCP(t, addr), "/plain/a")
		if r := app.recorded(flow.ReasonUpgrade); !r.WouldDeny || r.Rule != "plain" || r.Upgrade != "websocket" {
			t.Errorf("record %+v", r)
		}
		app.proxy.SetPlan(livePlan(t, "audit", `"* /plain/**", `, ""), 3)
		if err := said(ws, []byte("still there")); err != nil {
			t.Error(err)
		}
	})
}

// TestWebSocketOverTLS takes one over TLS that ends at the proxy: with the
// application's certificate, and from elsewhere with the caller's own.
func TestWebSocketOverTLS(t *testing.T) {
	eachLive(t, "enforce", nodeOptions{}, func(t *testing.T, in, app *node, addr string) {
		for _, n := range []*node{in, app} {
			n.proxy.SetPlan(livePlan(t, "enforce", "ports: [85], protocol: http}", strings.Replace(terminated, "80", "85", 1)), 3)
		}
		pair := newAppKeyPair(t, ecKey(t), "app.example")
		app.mu.Lock()
		app.signer = pair.sign
		app.mu.Unlock()
		app.proxy.SetAppCertificates([]AppCertificate{{API: "t/live", Chain: [][]byte{pair.der}}})
		app.app(echoes(), 85)
		secured := tls.Client(dialTCP(t, addr), &tls.Config{RootCAs: pair.pool, ServerName: "app.example"})
		ws := opened(t, secured, "/feed/a")
		if err := said(ws, bytes.Repeat([]byte("x"), 300_000)); err != nil {
			t.Error(err)
		}
		app.proxy.SetPlan(livePlan(t, "enforce", `http: ["* /feed/**"], upgrade: [websocket]`, `http: ["* /feed/**"]`), 4)
		if _, err := ws.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("it goes on: %v", err)
		}
	})
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := oneNode(t, nodeOptions{goroutines: goroutines})
		addr, fd := listener(t, "127.0.0.1:0")
		real := netip.MustParseAddrPort(addr)
		n.proxy.SetPlan(livePlan(t, "enforce", "ports: [85]", fmt.Sprintf("ports: [%d]", real.Port())), 2)
		if err := n.proxy.Serve(fd, KindInbound, serverNetns); err != nil {
			t.Fatal(err)
		}
		n.app(echoes(), 85)
		n.mu.Lock()
		n.apps[real] = n.apps[serverPort(85)]
		n.mu.Unlock()
		leaf, err := n.leaves.Get(clientID)
		if err != nil {
			t.Fatal(err)
		}
		known := tls.Client(dialTCP(t, addr), &tls.Config{InsecureSkipVerify: true, ServerName: "any.example", Certificates: []tls.Certificate{leaf.Certificate}})
		if err := said(opened(t, known, "/feed/a"), bytes.Repeat([]byte("x"), 300_000)); err != nil {
			t.Error(err)
		}
	})
}

// TestWebSocketBackPressure holds that a client that does not read stops the
// application.
func TestWebSocketBackPressure(t *testing.T) {
	oneLive(t, nodeOptions{}, func(t *testing.T, app *node, addr string) {
		const chunk, most = 64 << 10, 64 << 20
		var wrote atomic.Int64
		stalled := make(chan struct{})
		app.raw(func(c *net.TCPConn) {
			if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
				return
			}
			_, _ = io.WriteString(c, wsAccepted)
			for b := make([]byte, chunk); wrote.Load() < most; {
				_ = c.SetWriteDeadline(time.Now().Add(time.Second))
				n, err := c.Write(b)
				wrote.Add(int64(n))
				if errors.Is(err, os.ErrDeadlineExceeded) {
					close(stalled)
					return
				} else if err != nil {
					return
				}
			}
		}, 85)
		conn := dialTCP(t, addr)
		_ = conn.SetReadBuffer(chunk)
		resp, err := ask(t, conn, wsHandshake)
		if err != nil || resp.StatusCode != 101 {
			t.Fatal(resp, err)
		}
		select {
		case <-stalled:
		case <-time.After(15 * time.Second):
			t.Fatalf("the application wrote %d bytes that nobody reads", wrote.Load())
		}
	})
}
