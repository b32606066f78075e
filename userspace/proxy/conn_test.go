// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
	"github.com/sallyport-dev/sallyport/userspace/testenv"
)

// TestOpaque copies bytes both ways and keeps half-closed connections.
func TestOpaque(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.raw(echo, 7)
		addr := in.out(clientNumber, serverPort(7))
		for _, n := range []int{0, 1, 70_000, 5 << 20} {
			conn := dialTCP(t, addr)
			sent := sha256.New()
			go func() {
				r := rand.New(rand.NewPCG(uint64(n), 2))
				buf := make([]byte, 64<<10)
				for left := n; left > 0; {
					k := min(left, 1+r.IntN(len(buf)))
					for i := range buf[:k] {
						buf[i] = byte(r.Uint32())
					}
					buf[0] = 'x' // no ClientHello
					sent.Write(buf[:k])
					if _, err := conn.Write(buf[:k]); err != nil {
						return
					}
					left -= k
				}
				_ = conn.CloseWrite()
			}()
			got := sha256.New()
			k, err := io.Copy(got, conn)
			if err != nil || k != int64(n) || !bytes.Equal(got.Sum(nil), sent.Sum(nil)) {
				t.Fatalf("%d of %d bytes, or other ones: %v", k, n, err)
			}
		}
		app.mu.Lock()
		verdicts := app.verdicts
		app.mu.Unlock()
		if in != app {
			if len(verdicts) != 0 {
				t.Errorf("verdicts across nodes: %+v", verdicts)
			}
			return
		}
		want := flow.Verdict{Source: clientNumber, SourceNetns: clientNetns, Destination: serverPort(7), DestinationNetns: serverNetns, Action: flow.ActionDirect, Expires: 5 * time.Minute}
		if len(verdicts) == 0 { // one a second at most
			t.Error("no verdict")
		}
		for _, v := range verdicts {
			if v != want {
				t.Errorf("verdict %+v, want %+v", v, want)
			}
		}
	})
}

// TestServerFirst holds that a protocol whose server speaks first works on
// an auto port.
func TestServerFirst(t *testing.T) {
	eachWay(t, nodeOptions{change: atOnce}, func(t *testing.T, in, app *node) {
		app.raw(func(c *net.TCPConn) {
			io.WriteString(c, "220 ready\r\n")
			line, _ := bufio.NewReader(c).ReadString('\n')
			io.WriteString(c, "you said "+line)
		}, 81)
		addr := in.out(clientNumber, serverPort(81))
		conn := dialTCP(t, addr)
		br := bufio.NewReader(conn)
		if line, err := br.ReadString('\n'); line != "220 ready\r\n" {
			t.Fatalf("got %q %v", line, err)
		}
		io.WriteString(conn, "QUIT\n")
		if line, err := br.ReadString('\n'); line != "you said QUIT\n" {
			t.Fatalf("got %q %v", line, err)
		}
	})
}

// TestPunctualAtABusyNode holds that what a client says in time counts, also
// where the node gets round to it later.
func TestPunctualAtABusyNode(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		const limit = 50 * time.Millisecond
		n := oneNode(t, nodeOptions{goroutines: goroutines, change: func(o *Options) { o.Detect = limit }})
		n.app(http.HandlerFunc(reflect), 81)
		c := dialTCP(t, n.out(clientNumber, serverPort(81)))
		for n.engine.Stats().Accepted == 0 {
			time.Sleep(time.Millisecond)
		}
		n.engine.Go(func(*netloop.Task) { // and nothing else goes on
			io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n") //nolint:errcheck // then nothing comes
			time.Sleep(2 * limit)
		})
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp.Header.Get("X-Client-Cert") == "" {
			t.Error("it was taken for silent")
		}
	})
}

// TestToldApart holds that HTTP and TLS are told apart on an auto port.
func TestToldApart(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		addr := in.out(clientNumber, serverPort(81))
		app.app(http.HandlerFunc(reflect), 81)
		resp, err := ask(t, dialTCP(t, addr), "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if err != nil || resp.StatusCode != 200 {
			t.Errorf("HTTP: %+v %v", resp, err)
		}
		for _, port := range []uint16{81, 80, 7} {
			app.app(http.HandlerFunc(reflect), port)
			secured := tls.Client(dialTCP(t, in.out(clientNumber, serverPort(port))), &tls.Config{InsecureSkipVerify: true})
			if err := secured.Handshake(); err == nil {
				t.Errorf("TLS was let through to port %d", port)
			}
			app.recorded(flow.ReasonTLSInApp)
		}
	})
}

// TestPassthrough holds that TLS of the application is judged by its SNI.
func TestPassthrough(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		cert, err := app.leaves.Get(serverID)
		if err != nil {
			t.Fatal(err)
		}
		app.raw(func(c *net.TCPConn) {
			s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert.Certificate}})
			if s.Handshake() == nil {
				io.WriteString(s, "hello "+s.ConnectionState().ServerName)
				s.Close()
			}
		}, 83)
		addr := in.out(clientNumber, serverPort(83))
		secured := tls.Client(dialTCP(t, addr), &tls.Config{InsecureSkipVerify: true, ServerName: "App.example"})
		if b, err := io.ReadAll(secured); string(b) != "hello App.example" {
			t.Errorf("got %q %v", b, err)
		}
		secured = tls.Client(dialTCP(t, addr), &tls.Config{InsecureSkipVerify: true, ServerName: "other.example"})
		if err := secured.Handshake(); err == nil {
			t.Error("another name was let through")
		}
		app.recorded(flow.ReasonNoRule)
	})
}

// TestNoFlow holds that nothing is taken that the kernel did not send.
func TestNoFlow(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := oneNode(t, nodeOptions{goroutines: goroutines})
		addr, fd := listener(t, "127.0.0.1:0")
		if err := n.proxy.Serve(fd, KindOutbound, clientNetns); err != nil {
			t.Fatal(err)
		}
		if conn, err := net.Dial("tcp4", addr); err == nil {
			if b, err := io.ReadAll(conn); len(b) != 0 || err == nil {
				t.Errorf("got %q %v", b, err)
			}
			conn.Close()
		}
		n.recorded(flow.ReasonNoFlow)
	})
}

// tunnelClient is Go's own client with a leaf of that identity.
func tunnelClient(t *testing.T, leaves *identity.Leaves, verifier *identity.Verifier, id, peer, addr string) *http.Transport {
	t.Helper()
	config, err := identity.ClientConfig(identity.ClientOptions{Leaves: leaves, Verifier: verifier, ID: id, Peer: peer, Expect: func(id string) bool { return id == serverID }})
	if err != nil {
		t.Fatal(err)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	tr := &http.Transport{Protocols: protocols, DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp4", addr)
		if err != nil {
			return nil, err
		}
		s := tls.Client(c, config)
		return s, s.HandshakeContext(ctx)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

// TestTunnelRefusals asks a tunnel for what it must not give, by the hand of
// another implementation.
func TestTunnelRefusals(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		a, b := twoNodes(t, nodeOptions{goroutines: goroutines})
		b.raw(echo, 7)
		b.app(http.HandlerFunc(reflect), 80)
		addr := a.tunnels[serverAddr]
		// A peer of HBONE names no server.
		tr := tunnelClient(t, a.leaves, a.verifier, clientID, "", addr)
		connect := func(tr *http.Transport, authority, forwarded string) (int, string, error) {
			t.Helper()
			body, w := io.Pipe()
			req := &http.Request{Method: "CONNECT", URL: &url.URL{Scheme: "https", Host: authority}, Host: authority, Header: http.Header{}, Body: body, ContentLength: -1}
			if forwarded != "" {
				req.Header.Set("Forwarded", forwarded)
			}
			resp, err := tr.RoundTrip(req)
			if err != nil {
				return 0, "", err
			}
			defer resp.Body.Close()
			go func() { io.WriteString(w, "hello"); w.Close() }()
			got, _ := io.ReadAll(resp.Body)
			if resp.StatusCode == 200 && string(got) != "hello" {
				t.Errorf("%s: got %q", authority, got)
			}
			return resp.StatusCode, resp.Header.Get("sallyport-reason"), nil
		}
		for _, c := range []struct {
			authority, forwarded string
			status               int
			reason               flow.Reason
		}{
			{"10.0.2.1:7", "", 200, ""},
			{"10.0.2.1:7", "for=10.0.1.1", 200, ""},
			{"10.0.2.1:7", `for="10.0.1.1:4711"`, 200, ""},
			{"10.0.2.1:7", "for=127.0.0.1", 200, ""}, // the peer's own
			{"10.0.2.1:7", "for=10.9.9.9", 403, flow.ReasonForwardedAddress},
			{"10.0.2.1:7", "for=10.0.1.1, for=10.0.1.1", 403, flow.ReasonForwardedAddress},
			{"10.0.2.1:7", "for=unknown", 403, flow.ReasonForwardedAddress},
			{"10.0.2.1:6000", "", 404, flow.ReasonNotThisNode},
			{"10.0.1.1:7", "", 404, flow.ReasonNotThisNode},
			{"10.0.3.1:7", "", 404, flow.ReasonNotThisNode},
			{"127.0.0.1:7", "", 404, flow.ReasonNotThisNode},
			{"app.example:7", "", 404, flow.ReasonNotThisNode},
			{"10.0.2.1", "", 404, flow.ReasonNotThisNode},
			{"10.0.2.1:7", "", 200, ""},
		} {
			status, reason, err := connect(tr, c.authority, c.forwarded)
			if err != nil || status != c.status || reason != string(c.reason) {
				t.Errorf("%s %s: status %d reason %s error %v, want %d %s", c.authority, c.forwarded, status, reason, err, c.status, c.reason)
			}
			if c.reason != "" {
				b.recorded(c.reason)
			}
		}
		if status, reason, err := connect(tunnelClient(t, a.leaves, a.verifier, otherID, serverID, addr), "10.0.2.1:7", ""); err != nil || status != 403 || reason != string(flow.ReasonMayCall) {
			t.Errorf("another identity: status %d reason %s error %v", status, reason, err)
		}
		b.mu.Lock()
		for _, d := range b.dials {
			if d.Client.Addr() != clientAddr && d.Client.Addr() != netip.MustParseAddr("127.0.0.1") {
				t.Errorf("dialled for %s", d.Client)
			}
		}
		b.mu.Unlock()
		// Without a certificate, and with another authority's.
		stranger := newNode(t, authority(t), nodeOptions{mode: "enforce", ids: map[flow.IdentityNumber]string{clientNumber: clientID}})
		if _, _, err := connect(tunnelClient(t, stranger.leaves, a.verifier, clientID, serverID, addr), "10.0.2.1:7", ""); err == nil {
			t.Error("a leaf of another authority was accepted")
		}
		c := tls.Client(dialTCP(t, addr), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13})
		if _, err := io.ReadAll(c); err == nil {
			t.Error("a client without certificate was accepted")
		}
		b.recorded(flow.ReasonCertMissing)
	})
}

// TestPeerMismatch holds that a tunnel to an address expects the identity
// that claims it.
func TestPeerMismatch(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		ca := authority(t)
		const impostor = "spiffe://example.org/other"
		evil := newNode(t, ca, nodeOptions{goroutines: goroutines, mode: "enforce", ids: map[flow.IdentityNumber]string{otherNumber: impostor}})
		config := identity.ServerConfig(identity.ServerOptions{Leaves: evil.leaves, Verifier: evil.verifier,
			Identity: func(*tls.ClientHelloInfo) (string, error) { return impostor, nil }})
		ln, err := tls.Listen("tcp4", "127.0.0.1:0", config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		got := make(chan []byte, 10)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				b, _ := io.ReadAll(c)
				got <- b
				c.Close()
			}
		}()
		n := newNode(t, ca, nodeOptions{goroutines: goroutines, mode: "enforce", ids: map[flow.IdentityNumber]string{clientNumber: clientID},
			addresses: []NetnsAddresses{{clientNetns, []netip.Addr{clientAddr}}}})
		n.tunnels[serverAddr] = ln.Addr().String()
		resp, err := ask(t, dialTCP(t, n.out(clientNumber, serverPort(80))), "GET /secret HTTP/1.1\r\nHost: a\r\n\r\n")
		if err != nil {
			t.Fatal(err)
		}
		if reason, _ := problem(t, resp); reason != flow.ReasonPeerMismatch {
			t.Errorf("reason %s", reason)
		}
		if b := <-got; bytes.Contains(b, []byte("secret")) || len(b) > 0 {
			t.Errorf("the impostor received %q", b)
		}
	})
}

// TestSteered serves what comes from elsewhere to the protected port itself.
func TestSteered(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		for _, c := range []struct {
			port uint16
			http bool
		}{{80, true}, {81, true}, {7, false}} {
			t.Run(fmt.Sprint(c.port), func(t *testing.T) {
				o, dial := nodeOptions{goroutines: goroutines}, dialTCP
				if c.port == 80 { // where the caller speaks first it may take its time
					o.change, dial = atOnce, dialLate
				}
				n := oneNode(t, o)
				addr, fd := listener(t, "127.0.0.1:0")
				// The address that a steered connection shows as its own.
				real := netip.MustParseAddrPort(addr)
				n.proxy.change(func(v *view) { v.plan = steeredPlan(t, real.Port(), c.port) })
				n.proxy.opt.Pipeline.SetPlan(n.proxy.view.Load().plan)
				if err := n.proxy.Serve(fd, KindInbound, serverNetns); err != nil {
					t.Fatal(err)
				}
				n.mu.Lock()
				n.apps[real] = "" // nothing yet
				n.mu.Unlock()
				testSteered(t, n, addr, dial, c.http)
			})
		}
	})
}

func testSteered(t *testing.T, n *node, addr string, dial func(testing.TB, string) *net.TCPConn, speaksHTTP bool) {
	real := netip.MustParseAddrPort(addr)
	if speaksHTTP {
		n.app(http.HandlerFunc(reflect), 80)
	} else {
		n.raw(echo, 80)
	}
	n.mu.Lock()
	n.apps[real] = n.apps[serverPort(80)]
	n.mu.Unlock()
	const get = "GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
	plain := dial(t, addr)
	resp, err := ask(t, plain, get)
	if speaksHTTP {
		if err != nil {
			t.Fatal(err)
		}
		if reason, _ := problem(t, resp); reason != flow.ReasonMTLSRequired {
			t.Errorf("plaintext: reason %s", reason)
		}
	} else if err == nil {
		t.Error("plaintext was let through")
	}
	n.recorded(flow.ReasonMTLSRequired)
	anonymous := tls.Client(dial(t, addr), &tls.Config{InsecureSkipVerify: true})
	if _, err := ask(t, anonymous, get); err == nil {
		t.Error("a client without certificate was let in")
	}
	n.recorded(flow.ReasonCertMissing)
	leaf, err := n.leaves.Get(clientID)
	if err != nil {
		t.Fatal(err)
	}
	known := tls.Client(dial(t, addr), &tls.Config{InsecureSkipVerify: true, ServerName: "any.example", NextProtos: []string{"h2", "http/1.1"}, Certificates: []tls.Certificate{leaf.Certificate}})
	if !speaksHTTP {
		if err := known.Handshake(); err != nil {
			t.Fatal(err)
		}
		io.WriteString(known, "hello")
		_ = known.CloseWrite()
		if b, err := io.ReadAll(known); string(b) != "hello" {
			t.Errorf("got %q %v", b, err)
		}
		return
	}
	if resp, err = ask(t, known, get); err != nil || resp.StatusCode != 200 {
		t.Fatalf("got %+v %v", resp, err)
	}
	if cert := resp.Header.Get("X-Client-Cert"); !strings.Contains(cert, "Hash=") || !strings.HasSuffix(cert, "URI="+clientID) {
		t.Errorf("the application saw the client as %q", cert)
	}
	other, err := n.leaves.Get(otherID)
	if err != nil {
		t.Fatal(err)
	}
	stranger := tls.Client(dial(t, addr), &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{other.Certificate}})
	if resp, err = ask(t, stranger, get); err != nil {
		t.Fatal(err)
	}
	if reason, _ := problem(t, resp); reason != flow.ReasonMayCall {
		t.Errorf("another identity: reason %s", reason)
	}
}

// TestTLSWhileObserved holds that an application that speaks TLS itself is
// reached as before while its policy is not enforced, whole and in pieces; and
// that TLS for us is still ours.
func TestTLSWhileObserved(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		for _, mode := range []string{"audit", "observe"} {
			for _, port := range []uint16{80, 81, 7} {
				t.Run(fmt.Sprintf("%s/%d", mode, port), func(t *testing.T) { testTLSWhileObserved(t, goroutines, mode, port) })
			}
		}
	})
}

// TestNoWordFromTheClient holds that a client that says nothing and ends its
// sending side hears what the server has to say: steered and of the same node,
// also where the caller's TLS would be ended. It is judged like any other.
func TestNoWordFromTheClient(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		for _, port := range []uint16{81, 7} {
			for name, app := range map[string]string{"": "", "/terminate": ", app: {tls: terminate, certificate: /c.pem, key: /k.pem}"} {
				t.Run(fmt.Sprint(port, name), func(t *testing.T) {
					n := oneNode(t, nodeOptions{goroutines: goroutines, mode: "audit", change: atOnce})
					n.raw(func(c *net.TCPConn) { _, _ = io.WriteString(c, "220 ready\r\n") }, port)
					addr, fd := listener(t, "127.0.0.1:0")
					real := netip.MustParseAddrPort(addr)
					n.mu.Lock()
					n.apps[real] = n.apps[serverPort(port)]
					n.mu.Unlock()
					protocol := map[uint16]string{81: "auto", 7: "tcp"}[port]
					hears := func(who, at string, generation uint64, protected uint16) {
						n.proxy.SetPlan(build(t, strings.NewReplacer("MODE", "audit", fmt.Sprintf("ports: [%d], protocol: %s", port, protocol),
							fmt.Sprintf("ports: [%d], protocol: %s%s", protected, protocol, app)).Replace(worldPolicies)), generation)
						c := dialTCP(t, at)
						_ = c.CloseWrite()
						if got, err := io.ReadAll(c); string(got) != "220 ready\r\n" {
							t.Errorf("%s: %q %v", who, got, err)
						}
					}
					hears("of the same node", n.out(clientNumber, serverPort(port)), 2, port)
					if err := n.proxy.Serve(fd, KindInbound, serverNetns); err != nil {
						t.Fatal(err)
					}
					hears("steered", addr, 3, real.Port())
					if r := n.recorded(flow.ReasonMTLSRequired); !r.WouldDeny {
						t.Errorf("%+v", r)
					}
				})
			}
		}
	})
}

func testTLSWhileObserved(t *testing.T, goroutines bool, mode string, port uint16) {
	n := oneNode(t, nodeOptions{goroutines: goroutines, mode: mode})
	cert, err := n.leaves.Get(serverID)
	if err != nil {
		t.Fatal(err)
	}
	n.raw(func(c *net.TCPConn) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert.Certificate}})
		if s.Handshake() == nil {
			io.WriteString(s, "hello "+s.ConnectionState().ServerName)
			s.Close()
		}
	}, port)
	addr, fd := listener(t, "127.0.0.1:0")
	real := netip.MustParseAddrPort(addr)
	n.mu.Lock()
	n.apps[real] = n.apps[serverPort(port)]
	n.mu.Unlock()
	talk := func(from string, conn net.Conn, name string) {
		t.Helper()
		secured := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: name})
		if b, err := io.ReadAll(secured); string(b) != "hello "+name || err != nil {
			t.Errorf("%s, name %q: got %q %v", from, name, b, err)
		}
		if r := n.recorded(flow.ReasonTLSInApp); !r.WouldDeny || r.Mode != mode || r.Destination != serverID {
			t.Errorf("%s: record %+v", from, r)
		}
	}
	talk("same node", dialTCP(t, n.out(clientNumber, serverPort(port))), "app.example")
	n.proxy.SetPlan(build(t, strings.NewReplacer("MODE", mode, fmt.Sprintf("ports: [%d]", port), fmt.Sprintf("ports: [%d]", real.Port())).Replace(worldPolicies)), 2)
	if err := n.proxy.Serve(fd, KindInbound, serverNetns); err != nil {
		t.Fatal(err)
	}
	talk("steered", dialTCP(t, addr), "app.example")
	talk("without a name", dialTCP(t, addr), "")
	talk("in pieces", &pieces{dialTCP(t, addr)}, "app.example")
	if port == 7 {
		return
	}
	n.app(http.HandlerFunc(reflect), port)
	n.mu.Lock()
	n.apps[real] = n.apps[serverPort(port)]
	n.mu.Unlock()
	leaf, err := n.leaves.Get(clientID)
	if err != nil {
		t.Fatal(err)
	}
	known := tls.Client(dialTCP(t, addr), &tls.Config{InsecureSkipVerify: true, ServerName: identity.ServerName(serverID), Certificates: []tls.Certificate{leaf.Certificate}})
	resp, err := ask(t, known, "GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
	if err != nil || resp.StatusCode != 200 || !strings.HasSuffix(resp.Header.Get("X-Client-Cert"), "URI="+clientID) {
		t.Errorf("TLS for us: %+v %v", resp, err)
	}
}

// pieces sends what is written in two halves.
type pieces struct{ *net.TCPConn }

func (p *pieces) Write(b []byte) (int, error) {
	n, err := p.TCPConn.Write(b[:len(b)/2])
	if err != nil {
		return n, err
	}
	m, err := p.TCPConn.Write(b[len(b)/2:])
	return n + m, err
}

// TestRevocation holds that what was allowed ends when it is revoked, in the
// middle of a stream.
func TestRevocation(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.raw(echo, 7)
		app.app(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "begin")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}), 80)
		opaque := dialTCP(t, in.out(clientNumber, serverPort(7)))
		io.WriteString(opaque, "x")
		if _, err := io.ReadFull(opaque, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		stream := dialTCP(t, in.out(clientNumber, serverPort(80)))
		resp, err := ask(t, stream, "GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(resp.Body, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		list, err := identity.NewRevocations([]identity.Revocation{{Kind: identity.RevokeIdentity, Value: clientID}}, 1)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		app.verifier.SetRevocations(list)
		app.pipeline.SetRevocations(list)
		if b, err := io.ReadAll(opaque); err == nil || len(b) > 0 {
			t.Errorf("the opaque connection ended with %q %v", b, err)
		}
		if b, err := io.ReadAll(resp.Body); err == nil || len(b) > 0 {
			t.Errorf("the stream ended with %q %v", b, err)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("it took %v", took)
		}
		app.recorded(flow.ReasonRevoked)
		resp, err = ask(t, dialTCP(t, in.out(clientNumber, serverPort(80))), "GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
		if err != nil {
			t.Fatal(err)
		}
		if reason, _ := problem(t, resp); resp.StatusCode == 200 || reason == "" {
			t.Errorf("after the revocation: status %d", resp.StatusCode)
		}
	})
}

// TestRevocationInAudit holds that a policy that only observes ends nothing.
func TestRevocationInAudit(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := oneNode(t, nodeOptions{goroutines: goroutines, mode: "audit"})
		n.raw(echo, 7)
		c := dialTCP(t, n.out(clientNumber, serverPort(7)))
		say := func() error {
			if _, err := io.WriteString(c, "x"); err != nil {
				return err
			}
			_, err := io.ReadFull(c, make([]byte, 1))
			return err
		}
		if err := say(); err != nil {
			t.Fatal(err)
		}
		list, err := identity.NewRevocations([]identity.Revocation{{Kind: identity.RevokeIdentity, Value: clientID}}, 1)
		if err != nil {
			t.Fatal(err)
		}
		n.pipeline.SetRevocations(list)
		// What was posted to the loop has run when a later connection is served.
		n.app(http.HandlerFunc(reflect), 81)
		if resp, err := ask(t, dialTCP(t, n.out(otherNumber, serverPort(81))), "GET / HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
			t.Fatal(resp, err)
		}
		if err := say(); err != nil {
			t.Errorf("the connection was ended: %v", err)
		}
	})
}

// TestPolicyChange holds that a live opaque connection ends when the new
// plan does not allow it, and stays when it does.
func TestPolicyChange(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.raw(echo, 7)
		opaque := dialTCP(t, in.out(clientNumber, serverPort(7)))
		say := func() error {
			if _, err := io.WriteString(opaque, "x"); err != nil {
				return err
			}
			_, err := io.ReadFull(opaque, make([]byte, 1))
			return err
		}
		if err := say(); err != nil {
			t.Fatal(err)
		}
		app.proxy.SetPlan(plan(t, "enforce"), 2)
		if err := say(); err != nil {
			t.Fatalf("the same rules again: %v", err)
		}
		app.proxy.SetPlan(changed(t, "{name: anything, from: [client]}", "{name: anything, from: [other]}"), 3)
		if b, err := io.ReadAll(opaque); err == nil {
			t.Errorf("the connection ended with %q %v", b, err)
		}
		app.recorded(flow.ReasonPolicyChanged)
	})
}

// TestPolicyChangeInResponse holds that a response that is under way is cut
// when a new plan does not allow its request, and goes on when it does.
func TestPolicyChangeInResponse(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		begun := make(chan chan struct{}, 1) // each response's own: one that was cut may not know yet
		app.app(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.ReadAll(r.Body)
			next := make(chan struct{})
			begun <- next
			for {
				io.WriteString(w, "tick")
				w.(http.Flusher).Flush()
				select {
				case <-next:
				case <-r.Context().Done():
					return
				}
			}
		}), 80)
		addr := in.out(clientNumber, serverPort(80))
		// Of all that a head may have, and so more than that with our own lines.
		full := strings.Repeat("X: y\r\n", http1.MaxFields-2)
		for _, more := range []struct {
			body   int
			fields string
		}{{0, ""}, {3, ""}, {100_000, ""}, {0, full}, {100_000, full}} {
			conn := dialTCP(t, addr)
			go fmt.Fprintf(conn, "POST /stream HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n%s\r\n%s", more.body, more.fields, strings.Repeat("x", more.body))
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			tick := func() error {
				_, err := io.ReadFull(resp.Body, make([]byte, 4))
				return err
			}
			next := <-begun
			for range 2 { // the second registers it
				if err := tick(); err != nil {
					t.Fatal(err)
				}
				next <- struct{}{}
			}
			app.proxy.SetPlan(plan(t, "enforce"), 2)
			if err := tick(); err != nil {
				t.Fatalf("the same rules again: %v", err)
			}
			next <- struct{}{}
			if err := tick(); err != nil {
				t.Fatalf("the same rules again: %v", err)
			}
			app.proxy.SetPlan(changed(t, `{name: all, from: [client], http: ["* /**"]}
    - {name: no-debug`, `{name: all, from: [client], http: ["* /other/**"]}
    - {name: no-debug`), 3)
			if b, err := io.ReadAll(resp.Body); err == nil {
				t.Errorf("it ended with %q", b)
			}
			app.recorded(flow.ReasonPolicyChanged)
			app.proxy.SetPlan(plan(t, "enforce"), 4)
		}
	})
}

// TestRenewed holds that a connection ends when the validity of either end does
// as the documents say it now, not as they said when it was made.
func TestRenewed(t *testing.T) {
	for _, name := range []string{"client", "server", "client of another node"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			who, _, far := strings.Cut(name, " ")
			in := oneNode(t, nodeOptions{})
			app := in
			if far {
				in, app = twoNodes(t, nodeOptions{})
			}
			app.raw(echo, 7)
			go app.pipeline.Run(t.Context())
			set := func(expires time.Time, generation uint64) {
				old := `spiffeID: "spiffe://example.org/` + who + `",`
				p := changed(t, old, old+` expires: "`+expires.UTC().Format(time.RFC3339)+`",`)
				for _, n := range []*node{in, app} {
					n.proxy.SetPlan(p, generation)
				}
			}
			soon := time.Now().Add(6 * time.Second)
			set(soon, 2)
			app.app(http.HandlerFunc(reflect), 80)
			app.app2(http.HandlerFunc(reflect), 81)
			web, web2, addr := in.out(clientNumber, serverPort(80)), in.out(clientNumber, serverPort(81)), in.out(clientNumber, serverPort(7))
			kept, cut, one := dialTCP(t, addr), dialTCP(t, addr), dialTCP(t, web)
			two := http2Client(t)
			asks := func(reused bool) {
				t.Helper()
				if resp, err := ask(t, one, "GET /a HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil || resp.StatusCode != 200 {
					t.Errorf("over HTTP/1.1: %+v %v", resp, err)
				}
				trace := &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
					if i.Reused != reused {
						t.Errorf("HTTP/2: reused %v", i.Reused)
					}
				}}
				req, err := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), trace), "GET", "http://"+web2+"/a", nil)
				if err != nil {
					t.Fatal(err)
				}
				if resp, err := two.Do(req); err != nil || resp.StatusCode != 200 {
					t.Errorf("over HTTP/2: %+v %v", resp, err)
				} else {
					io.Copy(io.Discard, resp.Body) //nolint:errcheck // it is short
					resp.Body.Close()
				}
			}
			asks(false)
			for _, c := range []*net.TCPConn{kept, cut, one} {
				_ = c.SetDeadline(time.Now().Add(40 * time.Second))
			}
			says := func(c *net.TCPConn) error {
				if _, err := io.WriteString(c, "x"); err != nil {
					return err
				}
				_, err := io.ReadFull(c, make([]byte, 1))
				return err
			}
			if err := errors.Join(says(kept), says(cut)); err != nil {
				t.Fatal(err)
			}
			set(soon.Add(time.Hour), 3)
			for time.Now().Before(soon.Add(1500 * time.Millisecond)) { // it is looked at once a second
				if err := says(kept); err != nil {
					t.Fatalf("the renewed: %v", err)
				}
				time.Sleep(50 * time.Millisecond)
			}
			asks(true)
			set(time.Now().Add(5*time.Second), 4)
			if _, err := cut.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("what ends sooner: %v", err)
			}
			app.recorded(flow.ReasonExpired)
		})
	}
}

// TestRotation has leaves that live four seconds under traffic; nothing may
// be lost.
func TestRotation(t *testing.T) {
	if testing.Short() {
		t.Skip("takes ten seconds")
	}
	for _, goroutines := range []bool{false, true} {
		t.Run(fmt.Sprintf("goroutines=%v", goroutines), func(t *testing.T) {
			t.Parallel()
			a, b := twoNodes(t, nodeOptions{goroutines: goroutines, ttl: 4 * time.Second})
			b.app(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/slow" {
					reflect(w, r)
					return
				}
				for range 80 {
					io.WriteString(w, "tick")
					w.(http.Flusher).Flush()
					time.Sleep(100 * time.Millisecond)
				}
			}), 80)
			base := "http://" + a.out(clientNumber, serverPort(80))
			slow := make(chan error, 1)
			go func() {
				resp, err := httpClient(t).Get(base + "/slow")
				if err == nil {
					var body []byte
					if body, err = io.ReadAll(resp.Body); err == nil && len(body) != 320 {
						err = fmt.Errorf("%d bytes", len(body))
					}
					resp.Body.Close()
				}
				slow <- err
			}()
			fresh := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
			kept := httpClient(t)
			serials := map[string]bool{}
			requests := 0
			for late := time.Now().Add(20 * time.Second); len(serials) < 3 && time.Now().Before(late); requests++ {
				for _, client := range []*http.Client{fresh, kept} {
					resp, err := client.Post(base+"/a", "text/plain", strings.NewReader("hello"))
					if err != nil {
						t.Fatalf("request %d: %v", requests, err)
					}
					body, err := io.ReadAll(resp.Body)
					resp.Body.Close()
					if err != nil || resp.StatusCode != 200 || string(body) != "hello" {
						t.Fatalf("request %d: status %d %q %v", requests, resp.StatusCode, body, err)
					}
					serials[resp.Header.Get("X-Client-Cert")] = true
				}
				time.Sleep(5 * time.Millisecond)
			}
			if err := <-slow; err != nil {
				t.Errorf("a response that outlives the certificate: %v", err)
			}
			if len(serials) < 3 {
				t.Errorf("%d certificates in %d requests: nothing rotated", len(serials), requests)
			}
		})
	}
}

// TestNginxAndCurl has a real server and a real client, through a tunnel.
func TestNginxAndCurl(t *testing.T) {
	testenv.Program(t, "curl")
	large := make([]byte, 5<<20)
	for i := range large {
		large[i] = byte(rand.Uint32())
	}
	largeFile := filepath.Join(t.TempDir(), "upload")
	if err := os.WriteFile(largeFile, large, 0o644); err != nil {
		t.Fatal(err)
	}
	addr := startNginx(t, large)
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.at(addr, 80)
		base := "http://" + in.out(clientNumber, serverPort(80))
		curl := func(args ...string) []byte {
			t.Helper()
			out, err := exec.Command("curl", append([]string{"-sS", "--max-time", "20"}, args...)...).CombinedOutput()
			if err != nil {
				t.Fatalf("curl %v: %v %s", args, err, out)
			}
			return out
		}
		if out := curl(base + "/text"); !bytes.Contains(out, []byte("from nginx for By="+serverID)) {
			t.Errorf("got %q", out)
		}
		if out := curl(base+"/large", "-o", "-"); !bytes.Equal(out, large) {
			t.Errorf("got %d bytes", len(out))
		}
		if out := curl("-0", base+"/text"); !bytes.HasPrefix(out, []byte("from nginx")) {
			t.Errorf("HTTP/1.0: got %q", out)
		}
		if out := curl("--data-binary", "@"+largeFile, "-H", "Transfer-Encoding: chunked", base+"/post"); string(out) != "posted" {
			t.Errorf("chunked: got %q", out)
		}
		if out := curl("--data-binary", "@"+largeFile, base+"/post", base+"/text"); !bytes.HasPrefix(out, []byte("postedfrom nginx")) {
			t.Errorf("100-continue: got %q", out)
		}
		if out := curl("-I", base+"/large"); !bytes.Contains(out, []byte("Content-Length: 5242880")) {
			t.Errorf("HEAD: got %q", out)
		}
		if out := curl("--path-as-is", "-w", "%{http_code}", base+"/text/../large"); !bytes.HasSuffix(out, []byte("400")) {
			t.Errorf("dot segment: got %q", out)
		}
	})
}

// TestAnsweredEarly holds that a client which is answered before it has sent all
// may send the rest.
func TestAnsweredEarly(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.raw(func(c *net.TCPConn) {
			_, _ = http.ReadRequest(bufio.NewReader(c))
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			_, _ = io.Copy(io.Discard, c)
		}, 80)
		const length = 8 << 20
		c := dialTCP(t, in.out(clientNumber, serverPort(80)))
		if _, err := fmt.Fprintf(c, "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\nx", length); err != nil {
			t.Fatal(err)
		}
		from := bufio.NewReader(c)
		resp, err := http.ReadResponse(from, nil)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "ok" || !resp.Close {
			t.Errorf("%q %v, close %v", body, err, resp.Close)
		}
		if _, err := c.Write(make([]byte, length-1)); err != nil {
			t.Errorf("the rest: %v", err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Error(err)
		}
		if n, err := from.Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
			t.Errorf("at the end: %d %v", n, err)
		}
	})
}

// startNginx runs nginx as an application and returns where.
func startNginx(t testing.TB, large []byte, listen ...string) string {
	t.Helper()
	testenv.Program(t, "nginx")
	dir := t.TempDir()
	for name, content := range map[string][]byte{"large": large, "kib": bytes.Repeat([]byte("x"), 1024)} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const config = `
daemon off; master_process off; pid DIR/pid; error_log DIR/error.log;
events { worker_connections 1024; }
http {
  access_log off; client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/f; uwsgi_temp_path DIR/u; scgi_temp_path DIR/s;
  keepalive_requests 1000000000;
  server {
    listen 127.0.0.1:PORT LISTEN; root DIR; client_max_body_size 20m;
    location /text { return 200 "from nginx for $http_x_forwarded_client_cert"; }
    location /post { return 200 "posted"; }
  }
}`
	free, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	_, port, _ := net.SplitHostPort(addr)
	free.Close()
	path := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(path, []byte(strings.NewReplacer("DIR", dir, "PORT", port, "LISTEN", strings.Join(listen, " ")).Replace(config)), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("nginx", "-p", dir, "-c", path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for tries := 0; ; tries++ {
		c, err := net.Dial("tcp4", addr)
		if err == nil {
			c.Close()
			return addr
		}
		if tries == 200 {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestPlainAndUnprotected carries what nobody claims and the caller's egress
// lists, and refuses what nobody protects without asking the agent.
func TestPlainAndUnprotected(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := oneNode(t, nodeOptions{goroutines: goroutines})
		n.raw(echo, 99, 6000)
		for port, want := range map[uint16]string{99: "", 6000: "hello"} {
			conn := dialTCP(t, n.out(clientNumber, serverPort(port)))
			io.WriteString(conn, "hello")
			_ = conn.CloseWrite()
			if b, err := io.ReadAll(conn); string(b) != want {
				t.Errorf("port %d: got %q %v", port, b, err)
			}
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		if len(n.dials) != 1 || n.dials[0].Kind != DialPlain {
			t.Errorf("dials %+v", n.dials)
		}
	})
}

// TestEgress holds that an enforced caller is told that its egress forbids an
// address, that the agent is not asked for it, and that others go on.
func TestEgress(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		for _, c := range []struct {
			mode   string
			caller flow.IdentityNumber
			dst    string
			denied bool
		}{
			{"enforce", clientNumber, "10.0.2.1:6000", false}, {"enforce", clientNumber, "10.0.2.1:6001", true}, {"enforce", clientNumber, "10.0.3.1:6000", true},
			{"enforce", clientNumber, "127.0.0.1:6000", true}, {"enforce", clientNumber, "[::1]:80", true}, {"enforce", otherNumber, "10.0.2.1:6000", true},
			{"enforce", 99, "10.0.2.1:6000", true}, {"audit", clientNumber, "10.0.3.1:6000", false}, {"audit", clientNumber, "10.0.2.1:99", false}, {"observe", clientNumber, "127.0.0.1:6000", false},
		} {
			n := oneNode(t, nodeOptions{goroutines: goroutines, plan: changed(t, "mode: enforce, mayCall: [server]", "mode: "+c.mode+", mayCall: [server]")})
			dst := netip.MustParseAddrPort(c.dst)
			n.app(http.HandlerFunc(reflect), 80)
			n.mu.Lock()
			n.apps[dst] = n.apps[serverPort(80)]
			n.mu.Unlock()
			resp, err := ask(t, dialTCP(t, n.out(c.caller, dst)), "GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
			if err != nil {
				t.Fatal(err)
			}
			n.mu.Lock()
			dials := n.dials
			n.mu.Unlock()
			if !c.denied {
				if resp.StatusCode != 200 || len(dials) != 1 || dials[0].Kind != DialPlain {
					t.Errorf("%+v: status %d, dials %+v", c, resp.StatusCode, dials)
				}
				continue
			}
			if reason, _ := problem(t, resp); reason != flow.ReasonEgress || resp.StatusCode != 403 || len(dials) != 0 {
				t.Errorf("%+v: status %d, reason %s, dials %+v", c, resp.StatusCode, reason, dials)
			}
			if r := n.recorded(flow.ReasonEgress); r.WouldDeny {
				t.Errorf("%+v: record %+v", c, r)
			}
		}
	})
}

// TestLoopback holds that a call to a protected port by way of loopback is
// judged and carried as one to an address of the node.
func TestLoopback(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		for _, mode := range []string{"enforce", "audit", "observe"} {
			for _, host := range []string{"127.0.0.1", "127.0.0.2", "::1"} {
				for _, held := range []flow.IdentityNumber{0, serverNumber} {
					t.Run(fmt.Sprintf("%s/%s/%d", mode, host, held), func(t *testing.T) {
						testLoopback(t, goroutines, mode, netip.MustParseAddr(host), held)
					})
				}
			}
		}
	})
}

func testLoopback(t *testing.T, goroutines bool, mode string, host netip.Addr, held flow.IdentityNumber) {
	text := strings.NewReplacer("MODE", mode, "mode: enforce, mayCall", "mode: "+mode+", mayCall").Replace(worldPolicies)
	addresses := []netip.Addr{clientAddr}
	if held == 0 { // then it has to be found by where it serves
		addresses = append(addresses, serverAddr)
	}
	n := oneNode(t, nodeOptions{goroutines: goroutines, plan: build(t, text)})
	n.proxy.SetAddresses([]NetnsAddresses{{clientNetns, addresses}})
	web, tcp := netip.AddrPortFrom(host, 80), netip.AddrPortFrom(host, 7)
	n.app(http.HandlerFunc(reflect), 80)
	n.raw(echo, 7)
	n.mu.Lock()
	n.apps[web], n.apps[tcp] = n.apps[serverPort(80)], n.apps[serverPort(7)]
	n.mu.Unlock()
	out := func(id flow.IdentityNumber, dst netip.AddrPort) *net.TCPConn {
		addr := n.out(id, dst)
		n.mu.Lock()
		port := netip.MustParseAddrPort(addr).Port()
		f := n.flows[port]
		f.Target = held
		n.flows[port] = f
		n.mu.Unlock()
		return dialTCP(t, addr)
	}
	const get = "GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
	resp, err := ask(t, out(clientNumber, web), get)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("got %+v %v", resp, err)
	}
	if cert := resp.Header.Get("X-Client-Cert"); !strings.Contains(cert, "By="+serverID+";") || !strings.HasSuffix(cert, "URI="+clientID) {
		t.Errorf("the application saw the client as %q", cert)
	}
	opaque := out(clientNumber, tcp)
	io.WriteString(opaque, "hello")
	_ = opaque.CloseWrite()
	if b, err := io.ReadAll(opaque); string(b) != "hello" {
		t.Errorf("opaque: got %q %v", b, err)
	}
	n.mu.Lock()
	for _, d := range n.dials {
		if d.Kind != DialApplication || d.Netns != clientNetns || d.Address.Addr() != host || d.Source != clientNumber || d.Target != serverNumber {
			t.Errorf("dial %+v", d)
		}
	}
	want := flow.Verdict{Source: clientNumber, SourceNetns: clientNetns, Destination: tcp, DestinationNetns: clientNetns, Action: flow.ActionDirect, Expires: 5 * time.Minute}
	if len(n.dials) != 2 || len(n.verdicts) != 1 || n.verdicts[0] != want {
		t.Errorf("dials %+v, verdicts %+v", n.dials, n.verdicts)
	}
	n.mu.Unlock()
	if resp, err = ask(t, out(otherNumber, web), get); err != nil {
		t.Fatal(err)
	}
	if r := n.recorded(flow.ReasonMayCall); r.WouldDeny != (mode != "enforce") || r.Destination != serverID {
		t.Errorf("another identity: record %+v", r)
	}
	if want := map[bool]int{true: 403, false: 200}[mode == "enforce"]; resp.StatusCode != want {
		t.Errorf("another identity: status %d, want %d", resp.StatusCode, want)
	}
}

func TestLimits(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := oneNode(t, nodeOptions{goroutines: goroutines, change: func(o *Options) { o.MaxPerIdentity = 3 }})
		n.raw(echo, 7)
		addr := n.out(clientNumber, serverPort(7))
		say := func(c net.Conn) error {
			if _, err := io.WriteString(c, "x"); err != nil {
				return err
			}
			_, err := io.ReadFull(c, make([]byte, 1))
			return err
		}
		for range 3 {
			if err := say(dialTCP(t, addr)); err != nil {
				t.Fatal(err)
			}
		}
		if c, err := net.Dial("tcp4", addr); err == nil {
			if say(c) == nil {
				t.Error("a connection over the limit was served")
			}
			c.Close()
		}
		if n.proxy.Stats().Overload == 0 {
			t.Error("it was not counted")
		}
	})
}

func TestForwardedFor(t *testing.T) {
	for _, c := range []struct {
		in, out string
	}{
		{"for=10.0.0.1", "10.0.0.1:5"}, {`for="10.0.0.1:80"`, "10.0.0.1:80"}, {`for="[2001:db8::1]:80"`, "[2001:db8::1]:80"}, {`for="[2001:db8::1]"`, "[2001:db8::1]:5"},
		{"For=10.0.0.1;by=10.0.0.2;proto=http", "10.0.0.1:5"}, {`for="[::ffff:10.0.0.1]:80"`, "10.0.0.1:80"},
		{"", ""}, {"for=", ""}, {"for=unknown", ""}, {"for=_hidden", ""}, {"by=10.0.0.1", ""}, {"for=10.0.0.1,for=10.0.0.2", ""},
		{"for=10.0.0.1;for=10.0.0.2", ""}, {`for="[fe80::1%eth0]:80"`, ""}, {`for="10.0.0.1:80`, ""}, {"for", ""},
	} {
		got, ok := forwardedFor(c.in, 5)
		if ok != (c.out != "") || ok && got.String() != c.out {
			t.Errorf("%q: %v %v, want %q", c.in, got, ok, c.out)
		}
	}
}

func FuzzForwardedFor(f *testing.F) {
	f.Add(`for="[2001:db8::1]:80";by=10.0.0.1`)
	f.Fuzz(func(t *testing.T, in string) {
		if a, ok := forwardedFor(in, 1); ok && (!a.IsValid() || a.Addr().Zone() != "" || a.Addr().Is4In6()) {
			t.Fatalf("%q gives %v", in, a)
		}
	})
}

// hello is a real ClientHello for that name.
func hello(t testing.TB, name string) []byte {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	go func() { _ = tls.Client(a, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake() }()
	buf := make([]byte, 16<<10)
	n, err := b.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

func TestServerName(t *testing.T) {
	for _, name := range []string{"app.example", "A.B-c.example", ""} {
		h := hello(t, name)
		for i := range h {
			if _, more, ok := serverName(h[:i]); !more || ok {
				t.Fatalf("%q: at %d of %d: more %v ok %v", name, i, len(h), more, ok)
			}
		}
		got, more, ok := serverName(h)
		if got != strings.ToLower(name) || more || !ok {
			t.Errorf("%q: got %q more %v ok %v", name, got, more, ok)
		}
		// The same in records of ten bytes.
		var split []byte
		for body := h[5:]; len(body) > 0; {
			k := min(10, len(body))
			split = append(append(split, 0x16, 3, 1, 0, byte(k)), body[:k]...)
			body = body[k:]
		}
		if got, _, ok := serverName(split); got != strings.ToLower(name) || !ok {
			t.Errorf("%q split: got %q ok %v", name, got, ok)
		}
	}
}

// TestServerNameTwice holds that a hello has one server name, and is read to
// its end: what stands behind it could read another.
func TestServerNameTwice(t *testing.T) {
	sni := func(name string) []byte {
		n := byte(len(name))
		return append([]byte{0, 0, 0, n + 5, 0, n + 3, 0, 0, n}, name...)
	}
	with := func(extensions ...[]byte) []byte {
		list := slices.Concat(extensions...)
		body := append([]byte{3, 3}, make([]byte, 32)...)
		body = append(body, 0, 0, 2, 0x13, 1, 1, 0, 0, byte(len(list)))
		body = append(body, list...)
		n := byte(len(body))
		return append([]byte{22, 3, 1, 0, n + 4, 1, 0, 0, n}, body...)
	}
	other := []byte{0, 23, 0, 0}
	behind := slices.Concat(sni("a.test"), sni("b.test")[6:])
	behind[3] = byte(len(behind) - 4)
	if name, _, ok := serverName(with(other, sni("a.test"), other)); !ok || name != "a.test" {
		t.Errorf("%q %v", name, ok)
	}
	for _, bad := range [][]byte{with(sni("a.test"), sni("b.test")), with(sni("a.test"), other, sni("a.test")), with(sni("a.test"), other[:3]), with(sni("a.test"), []byte{0, 23, 0, 9}), with(behind)} {
		if name, more, ok := serverName(bad); ok || more {
			t.Errorf("%x: %q", bad, name)
		}
	}
}

func FuzzServerName(f *testing.F) {
	f.Add(hello(f, "app.example"))
	f.Add([]byte{0x16, 3, 1, 0, 4, 1, 0, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		name, more, ok := serverName(in)
		if ok && (more || name != strings.ToLower(name) || name != "" && !isName([]byte(name))) {
			t.Fatalf("%q %v", name, more)
		}
	})
}

func TestClientAddress(t *testing.T) {
	v := (&view{addresses: []NetnsAddresses{{1, []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.168.0.1"), netip.MustParseAddr("10.0.1.1"),
		netip.MustParseAddr("fe80::1"), netip.MustParseAddr("2001:db8::1")}}, {2, []netip.Addr{netip.MustParseAddr("10.0.2.1")}}}}).build()
	for _, c := range []struct{ source, dst, want string }{
		{"127.0.0.1:5", "10.0.2.1:80", "10.0.1.1:5"},
		{"127.0.0.1:5", "192.168.7.1:80", "192.168.0.1:5"},
		{"127.0.0.1:5", "10.0.1.1:80", "10.0.1.1:5"},
		{"127.0.0.1:5", "127.0.0.1:80", "127.0.0.1:5"},
		{"[::1]:5", "[2001:db8::2]:80", "[2001:db8::1]:5"},
		{"10.0.1.9:5", "10.0.2.1:80", "10.0.1.9:5"},
	} {
		if got := v.client(1, netip.MustParseAddrPort(c.source), netip.MustParseAddrPort(c.dst)); got.String() != c.want {
			t.Errorf("%s to %s: %s, want %s", c.source, c.dst, got, c.want)
		}
	}
}

// TestDerivedIdentities holds that an identity whose ID names its node is
// found on whatever node it is.
func TestDerivedIdentities(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		ca := authority(t)
		text := strings.ReplaceAll(worldPolicies, "MODE", "enforce")
		for _, id := range []string{clientID, otherID, serverID} {
			text = strings.ReplaceAll(text, fmt.Sprintf("spiffeID: %q, ", id), "")
		}
		var nodes [2]*node
		for i, name := range []string{"a", "b"} {
			p := buildOn(t, name, text)
			o := nodeOptions{goroutines: goroutines, plan: p, ids: map[flow.IdentityNumber]string{}}
			for _, id := range p.Identities() {
				if !id.Derived || !strings.Contains(id.ID, "/node/"+name+"/") {
					t.Fatalf("%s is not derived: %s", id.FullName(), id.ID)
				}
				// Both nodes may have each of them.
				o.ids[map[string]flow.IdentityNumber{"client": clientNumber, "other": otherNumber, "server": serverNumber}[id.Name]] = id.ID
			}
			o.addresses = []NetnsAddresses{{clientNetns, []netip.Addr{clientAddr}}}
			if name == "b" {
				o.addresses = []NetnsAddresses{{serverNetns, []netip.Addr{serverAddr}}}
			}
			nodes[i] = newNode(t, ca, o)
		}
		a, b := nodes[0], nodes[1]
		a.tunnels[serverAddr] = b.tunnelListener()
		b.app(http.HandlerFunc(reflect), 80)
		resp, err := ask(t, dialTCP(t, a.out(clientNumber, serverPort(80))), "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		if cert := resp.Header.Get("X-Client-Cert"); !strings.Contains(cert, "/node/a/") || !strings.Contains(cert, "By=spiffe://example.org/node/b/") {
			t.Errorf("the application saw the client as %q", cert)
		}
	})
}

// TestTunnelRefused holds what a client is told when the other node refuses
// or cannot be reached.
func TestTunnelRefused(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		a, b := twoNodes(t, nodeOptions{goroutines: goroutines})
		b.proxy.SetPlan(changed(t, "ports: [80]", "ports: [8080]"), 2)
		get := func() *http.Response {
			t.Helper()
			resp, err := ask(t, dialTCP(t, a.out(clientNumber, serverPort(80))), "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			if err != nil {
				t.Fatal(err)
			}
			return resp
		}
		if reason, _ := problem(t, get()); reason != flow.ReasonTunnelRefused {
			t.Errorf("refused: reason %s", reason)
		}
		b.recorded(flow.ReasonNotThisNode)
		opaque := dialTCP(t, a.out(clientNumber, serverPort(80)))
		io.WriteString(opaque, "\x00not HTTP")
		if got, err := io.ReadAll(opaque); err == nil || len(got) > 0 {
			t.Errorf("opaque: got %q %v", got, err)
		}
		down := newNode(t, authority(t), nodeOptions{goroutines: goroutines, mode: "enforce", ids: map[flow.IdentityNumber]string{clientNumber: clientID},
			addresses: []NetnsAddresses{{clientNetns, []netip.Addr{clientAddr}}}})
		free, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		free.Close()
		down.tunnels[serverAddr] = free.Addr().String()
		a = down
		if reason, _ := problem(t, get()); reason != flow.ReasonTunnel {
			t.Errorf("down: reason %s", reason)
		}
	})
}

// TestNoTunnelInAudit holds that a caller whose policy only observes reaches
// what it reached before, where the other node has no tunnel.
func TestNoTunnelInAudit(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := newNode(t, authority(t), nodeOptions{goroutines: goroutines, plan: changed(t, "mode: enforce, mayCall: [server]", "mode: audit, mayCall: [server]"),
			ids: map[flow.IdentityNumber]string{clientNumber: clientID}, addresses: []NetnsAddresses{{clientNetns, []netip.Addr{clientAddr}}}})
		n.app(http.HandlerFunc(reflect), 80)
		resp, err := ask(t, dialTCP(t, n.out(clientNumber, serverPort(80))), "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		if err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		if r := n.recorded(flow.ReasonLineRefused); !r.WouldDeny {
			t.Errorf("record %+v", r)
		}
	})
}

// mute never answers what is asked of the agent for another node, as where
// that node drops what it is sent.
type mute struct{ Agent }

func (m mute) Dial(r DialRequest, done func(int, flow.Reason, error)) {
	if r.Kind != DialPeer {
		m.Agent.Dial(r, done)
	}
}

// TestNoTunnelInTime holds that a caller whose policy only observes does not
// wait long for a tunnel that does not come about, and not twice.
func TestNoTunnelInTime(t *testing.T) {
	never := func(ctx context.Context, _ string, _ []byte) ([][]byte, error) { <-ctx.Done(); return nil, ctx.Err() }
	refused := func(context.Context, string, []byte) ([][]byte, error) { return nil, errors.New("it is revoked") }
	eachEngine(t, func(t *testing.T, goroutines bool) {
		for _, c := range []struct {
			name  string
			drops bool
			sign  identity.SignFunc // of the caller's leaf, nil where it has one
			asked int               // how often the other node was asked
		}{{"silent", false, nil, 1}, {"drops", true, nil, 0}, {"leaf pending", false, never, 0}, {"leaf refused", false, refused, 0}} {
			t.Run(c.name, func(t *testing.T) {
				n := newNode(t, authority(t), nodeOptions{goroutines: goroutines, plan: changed(t, "mode: enforce, mayCall: [server]", "mode: audit, mayCall: [server]"),
					ids: map[flow.IdentityNumber]string{clientNumber: clientID}, addresses: []NetnsAddresses{{clientNetns, []netip.Addr{clientAddr}}},
					change: func(o *Options) {
						if c.drops {
							o.Agent = mute{o.Agent}
						}
					}})
				if c.sign != nil {
					n.proxy.opt.Leaves = identity.NewLeaves(identity.LeavesOptions{Sign: c.sign})
					t.Cleanup(n.proxy.opt.Leaves.Close)
					if err := n.proxy.opt.Leaves.Set([]string{clientID}); err != nil {
						t.Fatal(err)
					}
				}
				silent, err := net.Listen("tcp4", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { silent.Close() })
				n.mu.Lock()
				n.tunnels[serverAddr] = silent.Addr().String() // it accepts, and that is all
				n.mu.Unlock()
				n.app(http.HandlerFunc(reflect), 80)
				addr := n.out(clientNumber, serverPort(80))
				began := time.Now()
				for range 3 {
					resp, err := ask(t, dialTCP(t, addr), "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
					if err != nil || resp.StatusCode != 200 {
						t.Fatal(resp, err)
					}
					if r := n.recorded(flow.ReasonTunnel); !r.WouldDeny {
						t.Errorf("record %+v", r)
					}
				}
				if took := time.Since(began); took > 8*time.Second {
					t.Errorf("three connections took %s", took)
				}
				n.mu.Lock()
				defer n.mu.Unlock()
				asked := 0
				for _, d := range n.dials {
					if d.Kind == DialPeer {
						asked++
					}
				}
				if asked != c.asked {
					t.Errorf("the other node was asked %d times, want %d", asked, c.asked)
				}
			})
		}
	})
}

// TestHeldTunnel holds how long a tunnel that failed is not tried again.
func TestHeldTunnel(t *testing.T) {
	peer, leaf := &refusal{flow.StageChannel, flow.ReasonTunnel, "peer"}, &refusal{flow.StageIdentity, flow.ReasonTunnel, "leaf"}
	for _, c := range []struct {
		failed   error
		took     time.Duration
		enforced bool
		hold     time.Duration
	}{
		{peer, lenientWait, false, 30 * time.Second}, {peer, 10 * time.Second, false, 30 * time.Second}, {peer, time.Millisecond, false, 60 * time.Millisecond},
		{leaf, lenientWait, false, lenientWait}, {leaf, 10 * time.Second, false, time.Second},
		{peer, 10 * time.Second, true, time.Second}, {peer, 10 * time.Millisecond, true, 10 * time.Millisecond}, {leaf, 10 * time.Second, true, time.Second},
	} {
		ended := time.Now()
		tp := &tunnelPool{failed: c.failed, took: c.took, ended: ended}
		if err := tp.held(ended.Add(c.hold-1), c.enforced); !errors.Is(err, c.failed) {
			t.Errorf("%+v: before: %v", c, err)
		}
		if err := tp.held(ended.Add(c.hold), c.enforced); err != nil {
			t.Errorf("%+v: after: %v", c, err)
		}
	}
	if err := (&tunnelPool{took: time.Second, ended: time.Now()}).held(time.Now(), false); err != nil {
		t.Errorf("after a success: %v", err)
	}
}

func TestView(t *testing.T) {
	v := (&view{plan: plan(t, "enforce"), local: []LocalIdentity{{serverNumber, serverID}, {clientNumber, clientID}},
		addresses: []NetnsAddresses{{1, []netip.Addr{clientAddr, netip.MustParseAddr("10.0.9.9")}}, {2, []netip.Addr{serverAddr}}, {3, []netip.Addr{netip.MustParseAddr("10.0.9.9")}}}}).build()
	for _, c := range []struct {
		from  uint64
		addr  string
		netns uint64
		known bool
	}{{1, "127.0.0.1", 1, true}, {1, "10.0.2.1", 2, true}, {1, "10.0.9.9", 1, true}, {2, "10.0.9.9", 0, true}, {1, "10.0.3.1", 0, false}, {1, "::ffff:10.0.2.1", 2, true}} {
		if netns, known := v.home(c.from, netip.MustParseAddr(c.addr)); netns != c.netns || known != c.known {
			t.Errorf("home of %s from %d: %d %v", c.addr, c.from, netns, known)
		}
	}
	if id, err := v.server(2, ""); err != nil || id.ID != serverID {
		t.Errorf("without a name: %v %v", id, err)
	}
	if id, err := v.server(2, identity.ServerName(serverID)); err != nil || id.ID != serverID {
		t.Errorf("by name: %v %v", id, err)
	}
	for _, c := range []struct {
		netns uint64
		name  string
	}{{1, ""}, {1, identity.ServerName(serverID)}, {9, ""}} {
		if id, err := v.server(c.netns, c.name); err == nil {
			t.Errorf("%+v: %s serves there", c, id.ID)
		}
	}
	if api := v.protected(2, serverPort(80)); api == nil || api.Name != "t/web" {
		t.Errorf("port 80 is protected by %+v", api)
	}
	if api := v.protected(2, netip.MustParseAddrPort("10.0.2.1:6000")); api != nil {
		t.Errorf("port 6000 is protected by %s", api.Name)
	}
	for _, c := range []struct {
		netns  uint64
		dst    string
		target flow.IdentityNumber
		found  bool
	}{
		{2, "127.0.0.1:80", 0, true}, {2, "127.0.0.2:80", 0, true}, {2, "[::1]:80", 0, true}, {1, "127.0.0.1:80", 0, false},
		{1, "127.0.0.1:80", serverNumber, true}, {1, "127.0.0.1:80", clientNumber, false}, {1, "127.0.0.1:80", 99, false},
		{2, "127.0.0.1:6000", serverNumber, false}, {1, "10.0.2.1:99", 0, true}, {2, "10.0.9.9:80", serverNumber, false},
	} {
		if id := v.asked(c.netns, netip.MustParseAddrPort(c.dst), c.target); (id != nil) != c.found || c.found && id.ID != serverID {
			t.Errorf("asked %+v: %+v", c, id)
		}
	}
	if (&view{}).build().protected(2, serverPort(80)) != nil {
		t.Error("something is protected without a plan")
	}
}
