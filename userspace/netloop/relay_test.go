// SPDX-License-Identifier: Apache-2.0

package netloop_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

// opaque hides what a Stream is, as one of another package would.
type opaque struct {
	net.Conn
	half func() error
	wait func(int) error
}

func (o opaque) CloseWrite() error       { return o.half() }
func (o opaque) Flushed(limit int) error { return o.wait(limit) }

func TestRelay(t *testing.T) {
	for _, in := range []string{"plain", "tls", "opaque"} {
		for _, out := range []string{"plain", "tls", "opaque"} {
			t.Run(in+"-"+out, func(t *testing.T) {
				onBoth(t, func(t *testing.T, b *bench) { relayEcho(t, b, in, out) })
			})
		}
	}
}

func relayEcho(t *testing.T, b *bench, in, out string) {
	b.start(netloop.Options{})
	echoAddr := b.serve(func(t *netloop.Task, c *netloop.Conn) {
		if out == "tls" {
			_ = echoStream(t, tls.Server(c, serverTLS()))
		} else {
			_ = echoStream(t, c)
		}
	})
	type result struct {
		ab, ba int64
		err    error
	}
	results := make(chan result, 10)
	addr := b.serve(func(task *netloop.Task, c *netloop.Conn) {
		u, err := task.Adopt(connecting(b.t, echoAddr))
		if err != nil {
			results <- result{err: err}
			return
		}
		r := result{}
		r.ab, r.ba, r.err = netloop.Relay(task, dressed(c, in, true), dressed(u, out, false), netloop.RelayOptions{})
		results <- r
	})
	for _, size := range []int{0, 1, 1000, 64<<10 + 1, 5 << 20} {
		var c netloop.Stream = dial(t, addr)
		if in == "tls" {
			c = tls.Client(c, clientTLS())
		}
		roundTrip(t, c, random(size))
		if got, want := fmt.Sprint(<-results), fmt.Sprint(result{int64(size), int64(size), nil}); got != want {
			t.Errorf("relay of %d bytes returned %s, want %s", size, got, want)
		}
	}
}

// dressed is c as a stream of the given kind.
func dressed(c *netloop.Conn, kind string, server bool) netloop.Stream {
	switch {
	case kind == "tls" && server:
		return tls.Server(c, serverTLS())
	case kind == "tls":
		return tls.Client(c, clientTLS())
	case kind == "opaque":
		return opaque{c, c.CloseWrite, c.Flushed}
	}
	return c
}

// upstreamed relays one client to a server of its own, and returns the client and what Relay returned.
func (b *bench) upstreamed(server func(*netloop.Task, *netloop.Conn), dress [2]string, o netloop.RelayOptions, ids chan<- uint64) (*net.TCPConn, <-chan error) {
	b.t.Helper()
	to := b.serve(server)
	return b.handled(func(t *netloop.Task, c *netloop.Conn) error {
		u, err := t.Adopt(connecting(b.t, to))
		if err != nil {
			return err
		}
		if ids != nil {
			ids <- c.ID()
			ids <- u.ID()
		}
		_, _, err = netloop.Relay(t, dressed(c, dress[0], true), dressed(u, dress[1], false), o)
		if err != nil {
			c.Abort()
		}
		return err
	})
}

// ways are the two that Relay works: without its task, and with one for each direction.
var ways = map[string][2]string{"callbacks": {"plain", "plain"}, "tasks": {"opaque", "plain"}}

func onEachWay(t *testing.T, f func(t *testing.T, b *bench, dress [2]string)) {
	for name, dress := range ways {
		t.Run(name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, b *bench) { f(t, b, dress) })
		})
	}
}

func TestRelayServerEndsFirst(t *testing.T) {
	onEachWay(t, func(t *testing.T, b *bench, dress [2]string) {
		b.start(netloop.Options{})
		got := make(chan string, 1)
		c, errs := b.upstreamed(func(_ *netloop.Task, c *netloop.Conn) {
			c.Write([]byte("greeting"))
			c.CloseWrite()
			all, err := io.ReadAll(c)
			got <- fmt.Sprint(string(all), err)
		}, dress, netloop.RelayOptions{}, nil)
		if all, err := io.ReadAll(c); string(all) != "greeting" || err != nil {
			t.Errorf("read %q, %v", all, err)
		}
		c.Write([]byte("answer"))
		c.CloseWrite()
		if s := <-got; s != "answer<nil>" {
			t.Errorf("the server read %s", s)
		}
		wantErr(t, errs, nil)
	})
}

// inTime tries up to five times: a busy machine may stop for longer than the times of a test, a fault shows each time.
func inTime(t *testing.T, f func() error) {
	t.Helper()
	var err error
	for range 5 {
		if err = f(); err == nil {
			return
		}
	}
	t.Error(err)
}

func TestRelayIdle(t *testing.T) {
	onEachWay(t, func(t *testing.T, b *bench, dress [2]string) {
		b.start(netloop.Options{})
		const idle = 100 * time.Millisecond
		inTime(t, func() error {
			c, errs := b.upstreamed(echo, dress, netloop.RelayOptions{Idle: idle}, nil)
			defer c.Close()
			buf := make([]byte, 1)
			last := time.Now()
			for start := last; time.Since(start) < 2*idle; time.Sleep(idle / 10) { // is not idle
				last = time.Now()
				c.Write([]byte("x"))
				if _, err := io.ReadFull(c, buf); err != nil {
					return fmt.Errorf("cut while busy: %w", err)
				}
			}
			wantErr(t, errs, os.ErrDeadlineExceeded)
			if d := time.Since(last); d < idle {
				t.Errorf("cut after %v, idle time-out %v", d, idle)
			}
			return nil
		})
	})
}

func TestRelayOneWayIsNotIdle(t *testing.T) {
	onEachWay(t, func(t *testing.T, b *bench, dress [2]string) {
		b.start(netloop.Options{})
		const idle = 100 * time.Millisecond
		inTime(t, func() error {
			c, errs := b.upstreamed(func(t *netloop.Task, c *netloop.Conn) {
				for range 20 {
					c.Write([]byte("x"))
					t.Sleep(idle / 8)
				}
				c.CloseWrite()
				_, _ = io.Copy(io.Discard, c)
			}, dress, netloop.RelayOptions{Idle: idle}, nil)
			defer c.Close()
			if all, err := io.ReadAll(c); len(all) != 20 || err != nil {
				return fmt.Errorf("read %q, %w", all, err)
			}
			c.Close()
			return <-errs
		})
	})
}

func TestRelayKill(t *testing.T) {
	onEachWay(t, func(t *testing.T, b *bench, dress [2]string) {
		b.start(netloop.Options{})
		revoked := errors.New("revoked")
		for side := range 2 {
			ids := make(chan uint64, 2)
			c, errs := b.upstreamed(echo, dress, netloop.RelayOptions{}, ids)
			id := [2]uint64{<-ids, <-ids}[side]
			c.Write([]byte("x"))
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			b.Kill(id, revoked)
			wantErr(t, errs, revoked)
			if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("killed side %d: the client saw %v, want a reset", side, err)
			}
		}
		eventually(t, "all is closed", func() bool { return b.Stats().Conns == 0 })
	})
}

func TestRelayReset(t *testing.T) {
	onEachWay(t, func(t *testing.T, b *bench, dress [2]string) {
		b.start(netloop.Options{})
		c, errs := b.upstreamed(func(_ *netloop.Task, c *netloop.Conn) {
			c.Read(make([]byte, 1))
			c.Abort()
		}, dress, netloop.RelayOptions{}, nil)
		c.Write([]byte("x"))
		wantErr(t, errs, syscall.ECONNRESET)
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client saw %v, want a reset", err)
		}
	})
}

// TestRelayClientVanishes has the client end its side and then reset the connection, which no read can find any more.
func TestRelayClientVanishes(t *testing.T) {
	b := (&bench{t: t}).start(netloop.Options{})
	ended, released := make(chan struct{}), make(chan struct{})
	defer close(released)
	c, errs := b.upstreamed(func(t *netloop.Task, c *netloop.Conn) {
		_, _ = io.Copy(io.Discard, c)
		close(ended)
		t.Block(func() { <-released })
	}, ways["callbacks"], netloop.RelayOptions{}, nil)
	c.CloseWrite()
	await(t, "end of the client's side", ended)
	c.SetLinger(0)
	c.Close()
	wantErr(t, errs, syscall.EPIPE)
}

func TestRelayBackPressure(t *testing.T) {
	onEachWay(t, func(t *testing.T, b *bench, dress [2]string) {
		b.start(netloop.Options{WriteLimit: 64 << 10})
		const total = 64 << 20
		data := random(1 << 20)
		c, errs := b.upstreamed(func(_ *netloop.Task, c *netloop.Conn) {
			for range total / len(data) {
				for piece := range slices.Chunk(data, 32<<10) {
					if _, err := c.Write(piece); err != nil {
						return
					}
					if err := c.Flushed(64 << 10); err != nil {
						return
					}
				}
			}
			c.CloseWrite()
			_, _ = c.Read(make([]byte, 1))
		}, dress, netloop.RelayOptions{}, nil)
		var before uint64
		eventually(t, "all stops", func() bool {
			now := b.Stats().BytesRead
			same := now == before && now > 0
			before = now
			time.Sleep(20 * time.Millisecond)
			return same
		})
		if before >= total {
			t.Fatalf("%d bytes were taken for a client that reads nothing", before)
		}
		buf := make([]byte, len(data))
		for n := 0; n < total; n += len(data) {
			if _, err := io.ReadFull(c, buf); err != nil || !bytes.Equal(buf, data) {
				t.Fatalf("after %d bytes: %v", n, err)
			}
		}
		c.Close()
		wantErr(t, errs, nil)
	})
}

func TestRelayTruncatedTLS(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		raw, errs := b.upstreamed(echo, [2]string{"tls", "plain"}, netloop.RelayOptions{}, nil)
		c := tls.Client(raw, clientTLS())
		c.Write([]byte("x"))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		raw.CloseWrite() // without close_notify
		wantErr(t, errs, io.ErrUnexpectedEOF)
	})
}

func TestRelayHandshakeFails(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		c, errs := b.upstreamed(echo, [2]string{"tls", "plain"}, netloop.RelayOptions{}, nil)
		c.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
		select {
		case err := <-errs:
			if err == nil {
				t.Error("no error")
			}
		case <-time.After(patience):
			t.Fatal("the handshake goes on")
		}
	})
}

// TestRelayLosesItsTail has both sides end and then one vanish with output of the other still to be taken.
func TestRelayLosesItsTail(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{WriteLimit: 8 << 20})
		sent := make(chan struct{})
		c, errs := b.upstreamed(func(_ *netloop.Task, c *netloop.Conn) {
			_, _ = io.Copy(io.Discard, c)
			for range 2 { // more than the kernel takes, less than that and the relay
				c.Write(make([]byte, 5<<20))
				_ = c.Flushed(0)
			}
			c.CloseWrite()
			_ = c.Flushed(0)
			close(sent)
		}, ways["callbacks"], netloop.RelayOptions{}, nil)
		c.CloseWrite()
		await(t, "the server's answer to be taken", sent)
		eventually(t, "its end to be passed on", func() bool { return b.Stats().BytesRead == 10<<20 })
		c.SetLinger(0)
		c.Close()
		select {
		case err := <-errs:
			if err == nil {
				t.Error("no error, though not all was delivered")
			}
		case <-time.After(patience):
			t.Fatal("the relay goes on")
		}
	})
}

func TestRelayHandshakeIsBound(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		to := b.serve(echo)
		_, errs := b.handled(func(task *netloop.Task, c *netloop.Conn) error {
			u, err := task.Adopt(connecting(t, to))
			if err != nil {
				return err
			}
			c.SetDeadline(time.Now().Add(30 * time.Millisecond))
			_, _, err = netloop.Relay(task, dressed(c, "tls", true), u, netloop.RelayOptions{})
			return err
		})
		wantErr(t, errs, os.ErrDeadlineExceeded)
	})
}

func TestRelayAfterRead(t *testing.T) {
	// What was received before Relay, and not read, is part of it.
	onEachWay(t, func(t *testing.T, b *bench, dress [2]string) {
		b.start(netloop.Options{})
		to := b.serve(echo)
		c, errs := b.handled(func(task *netloop.Task, c *netloop.Conn) error {
			first := make([]byte, 3)
			if _, err := io.ReadFull(c, first); err != nil {
				return err
			}
			u, err := task.Adopt(connecting(t, to))
			if err != nil {
				return err
			}
			if _, err := u.Write(first); err != nil {
				return err
			}
			_, _, err = netloop.Relay(task, dressed(c, dress[0], true), dressed(u, dress[1], false), netloop.RelayOptions{})
			return err
		})
		roundTrip(t, c, random(1000))
		wantErr(t, errs, nil)
	})
}
