// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http2"
	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
)

// eachEngine runs a test on both engines.
func eachEngine(t *testing.T, f func(t *testing.T, e *netloop.Engine)) {
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("goroutines=%v", plain), func(t *testing.T) {
			e, err := netloop.New(netloop.Options{Loops: 2, Goroutines: plain})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				e.Close()
				if s := e.Stats(); s.Panics != 0 || s.Conns != 0 || s.Tasks != 0 {
					t.Errorf("left behind: %+v", s)
				}
			})
			f(t, e)
		})
	}
}

// listen serves h on a loopback port of e.
func listen(t *testing.T, e *netloop.Engine, h func(*netloop.Task, *netloop.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := e.Serve(int(f.Fd()), h); err != nil {
		t.Fatal(err)
	}
	return ln.Addr().String()
}

// dialFD connects to a loopback port.
func dialFD(t *testing.T, addr string) int {
	t.Helper()
	a := net.TCPAddr{}
	ap, err := net.ResolveTCPAddr("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	a = *ap
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	sa := &unix.SockaddrInet4{Port: a.Port}
	copy(sa.Addr[:], a.IP.To4())
	if err := unix.Connect(fd, sa); err != nil {
		t.Fatal(err)
	}
	return fd
}

// onLoop runs f in a task and waits for it.
func onLoop(t *testing.T, e *netloop.Engine, f func(*netloop.Task) error) {
	t.Helper()
	done := make(chan error, 1)
	e.Go(func(task *netloop.Task) { done <- f(task) })
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the task did not end")
	}
}

// echo accepts and sends back what comes, and half-closes in turn.
func echo(task *netloop.Task, s *Stream) {
	switch {
	case s.Request().Authority == "refuse.example:1":
		_ = s.Refuse(403, "may_call")
		return
	case s.Request().Authority == "forwarded.example:1":
		_ = s.Accept()
		_, _ = io.WriteString(s, s.Request().Forwarded)
		return
	}
	if s.Accept() != nil {
		return
	}
	buf := make([]byte, 20000)
	for {
		n, err := s.Read(buf)
		if n > 0 {
			if _, err := s.Write(buf[:n]); err != nil {
				return
			}
			if s.Flushed(64<<10) != nil {
				return
			}
		}
		if errors.Is(err, io.EOF) {
			_ = s.CloseWrite()
			return
		}
		if err != nil {
			return
		}
	}
}

func serveEcho(t *testing.T, e *netloop.Engine, cfg Config) string {
	return listen(t, e, func(task *netloop.Task, c *netloop.Conn) { _ = Serve(task, c, cfg, Handler{Connect: echo}) })
}

func soon() time.Time { return time.Now().Add(10 * time.Second) }

func dial(t *testing.T, task *netloop.Task, addr string, cfg Config) (*Session, error) {
	c, err := task.Adopt(dialFD(t, addr))
	if err != nil {
		return nil, err
	}
	return Dial(task, c, cfg), nil
}

// TestEcho sends much and little over many streams of one session, in both
// directions at once.
func TestEcho(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		addr := serveEcho(t, e, Config{})
		onLoop(t, e, func(task *netloop.Task) error {
			m, err := dial(t, task, addr, Config{})
			if err != nil {
				return err
			}
			const streams = 20
			left := streams
			var failed error
			var done netloop.Event
			for i := range streams {
				task.Go(func(task *netloop.Task) {
					defer func() { left--; done.Broadcast() }()
					if err := exchange(task, m, i*i*i*100); err != nil {
						failed = fmt.Errorf("stream %d: %w", i, err)
					}
				})
			}
			for left > 0 {
				if err := task.Wait(&done); err != nil {
					return err
				}
			}
			if failed == nil && m.Streams() != 0 {
				failed = fmt.Errorf("%d streams are left", m.Streams())
			}
			m.Drain()
			return failed
		})
	})
}

// exchange sends n bytes and holds what comes back against them.
func exchange(task *netloop.Task, m *Session, n int) error {
	s, err := m.Open(task, "app.example:80", "", soon())
	if err != nil {
		return err
	}
	defer s.Close()
	sent, got := sha256.New(), sha256.New()
	var wrote netloop.Event
	var werr error
	writing := true
	task.Go(func(task *netloop.Task) {
		defer func() { writing = false; wrote.Broadcast() }()
		r := rand.New(rand.NewPCG(uint64(n), 1))
		buf := make([]byte, 30000)
		for left := n; left > 0; {
			k := min(left, 1+r.IntN(len(buf)))
			for i := range buf[:k] {
				buf[i] = byte(r.Uint32())
			}
			sent.Write(buf[:k])
			if _, werr = s.Write(buf[:k]); werr != nil {
				return
			}
			if werr = s.Flushed(32 << 10); werr != nil {
				return
			}
			left -= k
		}
		werr = s.CloseWrite()
	})
	buf := make([]byte, 7000)
	total := 0
	for {
		k, err := s.Read(buf)
		got.Write(buf[:k])
		total += k
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	for writing {
		if err := task.Wait(&wrote); err != nil {
			return err
		}
	}
	if werr != nil {
		return werr
	}
	if total != n || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		return fmt.Errorf("got %d bytes of %d, or other ones", total, n)
	}
	return nil
}

func TestRefuse(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		addr := serveEcho(t, e, Config{})
		onLoop(t, e, func(task *netloop.Task) error {
			m, err := dial(t, task, addr, Config{})
			if err != nil {
				return err
			}
			_, err = m.Open(task, "refuse.example:1", "", soon())
			var refused *RefusedError
			if !errors.As(err, &refused) || refused.Status != 403 || refused.Reason != "may_call" {
				return fmt.Errorf("got %w", err)
			}
			s, err := m.Open(task, "forwarded.example:1", `for="[2001:db8::1]:4711"`, soon())
			if err != nil {
				return err
			}
			b, err := io.ReadAll(s)
			if err != nil || string(b) != `for="[2001:db8::1]:4711"` {
				return fmt.Errorf("got %q %w", b, err)
			}
			m.Drain()
			return nil
		})
	})
}

// TestStalledReader holds that a stream whose reader sleeps stops its own
// writer and nobody else.
func TestStalledReader(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		addr := serveEcho(t, e, Config{})
		onLoop(t, e, func(task *netloop.Task) error {
			m, err := dial(t, task, addr, Config{Stall: 2 * time.Second})
			if err != nil {
				return err
			}
			stalled, err := m.Open(task, "app.example:80", "", soon())
			if err != nil {
				return err
			}
			buf := make([]byte, 16<<10)
			wrote := 0
			for {
				if _, err = stalled.Write(buf); err == nil {
					err = stalled.Flushed(0)
				}
				if err != nil {
					break
				}
				if wrote += len(buf); wrote > 8<<20 {
					return errors.New("no back-pressure")
				}
			}
			if !errors.Is(err, http2.ErrStalled) {
				return fmt.Errorf("got %w", err)
			}
			if err := exchange(task, m, 500_000); err != nil {
				return fmt.Errorf("another stream: %w", err)
			}
			m.Drain()
			return nil
		})
	})
}

// TestDeadline holds that a read deadline ends a read, and that the stream
// can be used after it.
func TestDeadline(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		addr := serveEcho(t, e, Config{})
		onLoop(t, e, func(task *netloop.Task) error {
			m, err := dial(t, task, addr, Config{})
			if err != nil {
				return err
			}
			s, err := m.Open(task, "a.example:1", "", soon())
			if err != nil {
				return err
			}
			_ = s.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			if _, err := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				return fmt.Errorf("got %w", err)
			}
			if err := s.AwaitRead(); !errors.Is(err, os.ErrDeadlineExceeded) {
				return fmt.Errorf("got %w", err)
			}
			_ = s.SetDeadline(time.Time{})
			if _, err := s.Write([]byte("x")); err != nil {
				return err
			}
			if err := s.AwaitRead(); err != nil {
				return err
			}
			b := make([]byte, 2)
			if n, err := s.Read(b); n != 1 || err != nil {
				return fmt.Errorf("got %d %w", n, err)
			}
			m.Kill(errors.New("over"))
			if _, err := s.Read(b); err == nil || err.Error() != "over" {
				return fmt.Errorf("after the end: %w", err)
			}
			return nil
		})
	})
}

// TestDrain holds that a session that drains at NotAfter serves what it has
// and refuses what comes after.
func TestDrain(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		addr := serveEcho(t, e, Config{NotAfter: time.Now().Add(3 * time.Second)})
		onLoop(t, e, func(task *netloop.Task) error {
			m, err := dial(t, task, addr, Config{})
			if err != nil {
				return err
			}
			s, err := m.Open(task, "a.example:1", "", soon())
			if err != nil {
				return err
			}
			for !m.Draining() {
				if err := m.Changed(task, soon()); err != nil {
					return err
				}
			}
			if _, err := m.Open(task, "a.example:1", "", soon()); !errors.Is(err, http2.ErrDraining) {
				return fmt.Errorf("open while draining: %w", err)
			}
			if !s.Draining() {
				return errors.New("the stream does not know")
			}
			if _, err := s.Write([]byte("still")); err != nil {
				return err
			}
			_ = s.CloseWrite()
			if b, err := io.ReadAll(s); err != nil || string(b) != "still" {
				return fmt.Errorf("got %q %w", b, err)
			}
			_ = s.Close()
			for !m.Over() {
				if err := m.Changed(task, soon()); err != nil {
					return err
				}
			}
			return m.Err()
		})
	})
}

// TestReset holds that an abort arrives as an error and not as an end.
func TestReset(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		got := make(chan error, 1)
		addr := listen(t, e, func(task *netloop.Task, c *netloop.Conn) {
			_ = Serve(task, c, Config{}, Handler{Connect: func(task *netloop.Task, s *Stream) {
				_ = s.Accept()
				_, err := io.ReadAll(s)
				got <- err
			}})
		})
		onLoop(t, e, func(task *netloop.Task) error {
			m, err := dial(t, task, addr, Config{})
			if err != nil {
				return err
			}
			s, err := m.Open(task, "a.example:1", "", soon())
			if err != nil {
				return err
			}
			_, _ = s.Write([]byte("half a mess"))
			s.Abort()
			m.Drain()
			return nil
		})
		var reset *http2.ResetError
		if err := <-got; !errors.As(err, &reset) || reset.Code != http2.CodeCancel {
			t.Errorf("got %v", err)
		}
	})
}

// TestGoServer has our client speak to Go's server, which is golang.org/x/net's.
func TestGoServer(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != "CONNECT" || r.Host == "refuse.example:1" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		buf := make([]byte, 9000)
		for {
			n, err := r.Body.Read(buf)
			if n > 0 {
				if _, err := w.Write(buf[:n]); err != nil {
					return
				}
				w.(http.Flusher).Flush()
			}
			if err != nil {
				return
			}
		}
	})
	server := &http.Server{Handler: handler, Protocols: onlyHTTP2()}
	go server.Serve(ln)
	t.Cleanup(func() { server.Close() })
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		onLoop(t, e, func(task *netloop.Task) error {
			m, err := dial(t, task, ln.Addr().String(), Config{})
			if err != nil {
				return err
			}
			if err := exchange(task, m, 700_000); err != nil {
				return err
			}
			var refused *RefusedError
			if _, err := m.Open(task, "refuse.example:1", "", soon()); !errors.As(err, &refused) || refused.Status != 403 {
				return fmt.Errorf("refused: %w", err)
			}
			err = exchange(task, m, 10)
			m.Drain()
			return err
		})
	})
}

// TestGoClient has Go's client, which is golang.org/x/net's speak to our server.
func TestGoClient(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		addr := serveEcho(t, e, Config{})
		tr := &http.Transport{Protocols: onlyHTTP2(), DialContext: dialPlain(addr)}
		defer tr.CloseIdleConnections()
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				if err := goExchange(tr, i*50_000); err != nil {
					t.Errorf("stream %d: %v", i, err)
				}
			})
		}
		wg.Wait()
		resp, err := tr.RoundTrip(&http.Request{Method: "CONNECT", URL: &url.URL{Scheme: "http", Host: "refuse.example:1"}, Host: "refuse.example:1", Header: http.Header{}})
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 403 || resp.Header.Get(reasonField) != "may_call" {
			t.Errorf("status %d, reason %q", resp.StatusCode, resp.Header.Get(reasonField))
		}
		resp, err = tr.RoundTrip(&http.Request{Method: "GET", URL: &url.URL{Scheme: "http", Host: "a.example", Path: "/"}, Header: http.Header{}})
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 405 {
			t.Errorf("GET was answered with %d", resp.StatusCode)
		}
	})
}

func goExchange(tr *http.Transport, n int) error {
	pr, pw := io.Pipe()
	req := &http.Request{Method: "CONNECT", URL: &url.URL{Scheme: "http", Host: "app.example:80"}, Host: "app.example:80", Header: http.Header{}, Body: pr, ContentLength: -1}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	want := bytes.Repeat([]byte("0123456789"), n/10)
	go func() {
		_, _ = pw.Write(want)
		pw.Close()
	}()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("got %d bytes, want %d", len(got), len(want))
	}
	return nil
}

// TestStreamFaults are what costs the peer a stream and not the session.
func TestStreamFaults(t *testing.T) {
	e, err := netloop.New(netloop.Options{Loops: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	addr := serveEcho(t, e, Config{})
	conn, err := net.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	fr := xhttp2.NewFramer(conn, conn)
	if _, err := io.WriteString(conn, http2.Preface); err != nil {
		t.Fatal(err)
	}
	_ = fr.WriteSettings()
	var b bytes.Buffer
	enc := hpack.NewEncoder(&b)
	write := func(id uint32, pairs ...string) {
		b.Reset()
		for i := 0; i < len(pairs); i += 2 {
			_ = enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
		}
		_ = fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: b.Bytes(), EndHeaders: true})
	}
	cases := [][]string{
		{":method", "CONNECT"},
		{":method", "CONNECT", ":authority", "a:1", ":path", "/"},
		{":method", "CONNECT", ":authority", "a:1", ":protocol", "websocket"},
		{":method", "CONNECT", ":authority", "a:1", ":authority", "b:1"},
		{":method", "CONNECT", "x", "y", ":authority", "a:1"},
		{":method", "CONNECT", ":authority", "a:1", "Upper", "y"},
		{":method", "CONNECT", ":authority", "a:1", "x", "a\nb"},
		{":method", "CONNECT", ":authority", "a:1", "connection", "close"},
		{":method", "CONNECT", ":authority", "a:1", "forwarded", "for=a", "forwarded", "for=b"},
		{":method", "CONNECT", ":authority", "a:1", "x", strings.Repeat("y", 15000), "z", strings.Repeat("y", 2000)},
	}
	for i, c := range cases {
		write(uint32(2*i+1), c...)
	}
	good := uint32(2*len(cases) + 1)
	write(good, ":method", "CONNECT", ":authority", "a:1")
	_ = fr.WriteData(good, true, []byte("hi"))
	reset := map[uint32]bool{}
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		switch f := f.(type) {
		case *xhttp2.RSTStreamFrame:
			reset[f.StreamID] = true
		case *xhttp2.DataFrame:
			if f.StreamID != good || string(f.Data()) != "hi" {
				continue
			}
			for i, c := range cases {
				if !reset[uint32(2*i+1)] {
					t.Errorf("%q was not reset", c)
				}
			}
			return
		}
	}
}

func dialPlain(addr string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp4", addr)
	}
}

// onlyHTTP2 is HTTP/2 without TLS.
func onlyHTTP2() *http.Protocols {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return p
}

// TestPresent holds what a client presents, in order and within bounds.
func TestPresent(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		var mu sync.Mutex
		var lists [][]byte
		came := func() [][]byte {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(lists)
		}
		addr := listen(t, e, func(task *netloop.Task, c *netloop.Conn) {
			_ = Serve(task, c, Config{}, Handler{Connect: echo, Tokens: func(list []byte) bool {
				mu.Lock()
				defer mu.Unlock()
				lists = append(lists, list)
				return !bytes.HasPrefix(list, []byte("bad"))
			}})
		})
		deaf := serveEcho(t, e, Config{})
		onLoop(t, e, func(task *netloop.Task) error {
			m, err := dial(t, task, addr, Config{})
			if err != nil {
				return err
			}
			large := bytes.Repeat([]byte("x"), MaxTokens)
			for _, c := range []struct {
				list   []byte
				status int
			}{{[]byte("one"), 0}, {nil, 0}, {[]byte("bad"), 400}, {large, 0}, {append(large, 'x'), 413}, {[]byte("two"), 0}} {
				err := m.Present(task, c.list, soon())
				refused, _ := errors.AsType[*RefusedError](err)
				if c.status == 0 && err != nil || c.status != 0 && (refused == nil || refused.Status != c.status) {
					return fmt.Errorf("%d bytes: %w", len(c.list), err)
				}
			}
			if got := came(); len(got) != 5 || len(got[3]) != MaxTokens || string(got[4]) != "two" {
				return fmt.Errorf("%d lists came: %.20q", len(got), got)
			}
			// Two at once, of which the first is not complete.
			half, err := m.OpenLast(task, []http2.Field{{Name: ":method", Value: "PUT"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: "a"}, {Name: ":path", Value: tokensPath}}, false, soon())
			if err != nil {
				return err
			}
			if err := exchange(task, m, 10); err != nil {
				return err
			}
			err = m.Present(task, []byte("x"), soon())
			if refused, ok := errors.AsType[*RefusedError](err); !ok || refused.Status != 429 {
				return fmt.Errorf("beside another: %w", err)
			}
			half.Reset(http2.CodeCancel, nil)
			other, err := m.OpenLast(task, []http2.Field{{Name: ":method", Value: "PUT"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: "a"}, {Name: ":path", Value: "/else"}}, true, soon())
			if err != nil {
				return err
			}
			h, err := other.ReadHead()
			if err != nil {
				return err
			}
			if status, _ := h.Only(":status"); status != "404" {
				return fmt.Errorf("another path: %s", status)
			}
			// A session that was retired still takes them, as long as it has streams.
			open, err := m.Open(task, "a.example:1", "", soon())
			if err != nil {
				return err
			}
			m.Retire()
			if _, err := m.Open(task, "a.example:1", "", soon()); !errors.Is(err, http2.ErrDraining) {
				return fmt.Errorf("a retired session: %w", err)
			}
			if err := m.Present(task, []byte("late"), soon()); err != nil {
				return fmt.Errorf("a retired session: %w", err)
			}
			if got := came(); string(got[len(got)-1]) != "late" {
				return fmt.Errorf("%.20q came last", got[len(got)-1])
			}
			_ = open.Close()
			without, err := dial(t, task, deaf, Config{})
			if err != nil {
				return err
			}
			err = without.Present(task, []byte("x"), soon())
			if refused, ok := errors.AsType[*RefusedError](err); !ok || refused.Status != 405 {
				return fmt.Errorf("a server that takes none: %w", err)
			}
			without.Drain()
			return nil
		})
	})
}
