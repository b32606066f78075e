// SPDX-License-Identifier: Apache-2.0

package netloop_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

// handled runs h for one client and returns the client; the channel gets what h returned.
func (b *bench) handled(h func(*netloop.Task, *netloop.Conn) error) (*net.TCPConn, <-chan error) {
	b.t.Helper()
	errs := make(chan error, 100)
	addr := b.serve(func(t *netloop.Task, c *netloop.Conn) { errs <- h(t, c) })
	return dial(b.t, addr), errs
}

func wantErr(t testing.TB, errs <-chan error, want error) {
	t.Helper()
	select {
	case err := <-errs:
		if !errors.Is(err, want) {
			t.Errorf("got error %v, want %v", err, want)
		}
	case <-time.After(patience):
		t.Fatalf("nothing within %v, want error %v", patience, want)
	}
}

func TestServerEndsFirst(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		var got []byte
		c, errs := b.handled(func(_ *netloop.Task, c *netloop.Conn) error {
			if _, err := c.Write([]byte("bye")); err != nil {
				return err
			}
			if err := c.CloseWrite(); err != nil {
				return err
			}
			if _, err := c.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
				return errors.New("a write after CloseWrite did not fail")
			}
			var err error
			got, err = io.ReadAll(c)
			return err
		})
		if all, err := io.ReadAll(c); string(all) != "bye" || err != nil {
			t.Errorf("read %q, %v", all, err)
		}
		if _, err := c.Write([]byte("still here")); err != nil {
			t.Error(err)
		}
		c.Close()
		wantErr(t, errs, nil)
		if string(got) != "still here" {
			t.Errorf("after its own end the server read %q", got)
		}
	})
}

func TestReadDeadline(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  func(*netloop.Task, *netloop.Conn)
	}{
		{"past", func(_ *netloop.Task, c *netloop.Conn) { c.SetReadDeadline(time.Unix(1, 0)) }},
		{"soon", func(_ *netloop.Task, c *netloop.Conn) { c.SetDeadline(time.Now().Add(20 * time.Millisecond)) }},
		{"moved up by another task", func(t *netloop.Task, c *netloop.Conn) {
			c.SetReadDeadline(time.Now().Add(time.Hour))
			t.Go(func(*netloop.Task) { c.SetReadDeadline(time.Now()) })
		}},
		{"moved back by another task", func(t *netloop.Task, c *netloop.Conn) {
			at := time.Now().Add(30 * time.Millisecond)
			c.SetReadDeadline(at)
			t.Go(func(*netloop.Task) { c.SetReadDeadline(at.Add(30 * time.Millisecond)) })
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, b *bench) {
				b.start(netloop.Options{})
				c, errs := b.handled(func(t *netloop.Task, c *netloop.Conn) error {
					tt.set(t, c)
					buf := make([]byte, 1)
					_, err := c.Read(buf)
					var timeout net.Error
					if !errors.As(err, &timeout) || !timeout.Timeout() {
						return errors.New("not a time-out")
					}
					if err := c.SetDeadline(time.Time{}); err != nil {
						return err
					}
					if _, werr := c.Write([]byte("late")); werr != nil {
						return werr
					}
					if _, rerr := c.Read(buf); rerr != nil {
						return rerr
					}
					return err
				})
				buf := make([]byte, 4)
				if _, err := io.ReadFull(c, buf); err != nil {
					t.Fatal(err)
				}
				c.Write([]byte("x")) // is read although a deadline had passed before
				wantErr(t, errs, os.ErrDeadlineExceeded)
			})
		})
	}
}

func TestDeadlineTakesItsTime(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		const d = 60 * time.Millisecond
		took := make(chan time.Duration, 1)
		_, errs := b.handled(func(_ *netloop.Task, c *netloop.Conn) error {
			start := time.Now()
			c.SetReadDeadline(start.Add(d))
			_, err := c.Read(make([]byte, 1))
			took <- time.Since(start)
			return err
		})
		wantErr(t, errs, os.ErrDeadlineExceeded)
		if got := <-took; got < d-time.Millisecond {
			t.Errorf("a deadline %v away passed after %v", d, got)
		}
	})
}

func TestBackPressure(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		const limit, chunk, total = 100 << 10, 30 << 10, 40 << 20
		b.start(netloop.Options{WriteLimit: limit})
		data := random(chunk)
		most := 0
		c, errs := b.handled(func(_ *netloop.Task, c *netloop.Conn) error {
			for sent := 0; sent < total; sent += chunk {
				if _, err := c.Write(data); err != nil {
					return err
				}
				most = max(most, c.Buffered())
				if err := c.Flushed(limit); err != nil {
					return err
				}
			}
			return nil
		})
		// The writer cannot get further than the buffers while nobody reads.
		var before uint64
		eventually(t, "the writer stops", func() bool {
			now := b.Stats().BytesWritten
			same := now == before && now > 0
			before = now
			time.Sleep(20 * time.Millisecond)
			return same
		})
		if before >= total {
			t.Fatalf("all %d bytes were sent to a client that reads nothing", before)
		}
		n := 0
		buf := make([]byte, chunk)
		for {
			if _, err := io.ReadFull(c, buf); err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(buf, data) {
				t.Fatalf("other bytes after %d", n)
			}
			n += chunk
		}
		wantErr(t, errs, nil)
		if n < total || most > limit+chunk {
			t.Errorf("%d bytes of %d came; at most %d were buffered, limit %d", n, total, most, limit)
		}
	})
}

func TestManyWritersStayWithinTheLimit(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		const limit, chunk, writers, rounds = 64 << 10, 16 << 10, 100, 10
		b.start(netloop.Options{WriteLimit: limit})
		most := 0
		c, errs := b.handled(func(t *netloop.Task, c *netloop.Conn) error {
			var done netloop.Event
			left := writers
			var failed error
			for range writers {
				t.Go(func(t *netloop.Task) {
					data := random(chunk)
					for range rounds {
						err := c.Flushed(limit)
						if err == nil {
							_, err = c.Write(data)
						}
						if err != nil {
							failed = err
						}
						most = max(most, c.Buffered())
					}
					left--
					done.Broadcast()
				})
			}
			for left > 0 {
				if err := t.Wait(&done); err != nil {
					return err
				}
			}
			return failed
		})
		time.Sleep(50 * time.Millisecond) // lets them pile up; correct without it
		n, err := io.Copy(io.Discard, c)
		if n != writers*rounds*chunk || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
		wantErr(t, errs, nil)
		if most > limit+chunk {
			t.Errorf("%d bytes were buffered by writers that wait for %d", most, limit)
		}
	})
}

func TestWriteLimit(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{WriteLimit: 64 << 10})
		c, errs := b.handled(func(_ *netloop.Task, c *netloop.Conn) error {
			data := make([]byte, 60<<10)
			if _, err := c.Read(data); err != nil {
				return err
			}
			for {
				if _, err := c.Write(data); err != nil {
					if _, again := c.Write(data); !errors.Is(again, netloop.ErrWriteLimit) {
						return again
					}
					return err
				}
			}
		})
		c.Write([]byte("go"))
		wantErr(t, errs, netloop.ErrWriteLimit)
		if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("client saw %v, want a reset", err)
		}
	})
}

// stall fills the connection of a client that reads nothing, with more than the kernel finds room for when its buffers grow.
func stall(c *netloop.Conn) error {
	data := make([]byte, 60<<10)
	for {
		if _, err := c.Write(data); err != nil {
			return err
		}
		if err := c.Flushed(2 << 20); err != nil {
			return err
		}
	}
}

// fill is stall until nothing moves any more, with output left.
func fill(t *netloop.Task, c *netloop.Conn) error {
	for before, same := -1, 0; same < 5; {
		if err := t.Sleep(20 * time.Millisecond); err != nil {
			return err
		}
		if same++; c.Buffered() != before {
			same = 0
		}
		for c.Buffered() < 2<<20 {
			if _, err := c.Write(make([]byte, 60<<10)); err != nil {
				return err
			}
		}
		before = c.Buffered()
	}
	return nil
}

func TestStalledPeerIsCut(t *testing.T) {
	for name, h := range map[string]func(*netloop.Task, *netloop.Conn) error{
		"in Flushed": func(_ *netloop.Task, c *netloop.Conn) error { return stall(c) },
		"after Close": func(t *netloop.Task, c *netloop.Conn) error {
			if err := fill(t, c); err != nil {
				return err
			}
			return netloop.ErrStalled // Close follows, which has output to send
		},
	} {
		t.Run(name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, b *bench) {
				b.start(netloop.Options{WriteLimit: 1 << 20, StallTimeout: 300 * time.Millisecond})
				c, errs := b.handled(h)
				wantErr(t, errs, netloop.ErrStalled)
				eventually(t, "the connection is cut", func() bool {
					s := b.Stats()
					return s.Conns == 0 && s.Stalled == 1
				})
				if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("client saw %v, want a reset", err)
				}
			})
		})
	}
}

func TestCloseSendsWhatWasWritten(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{WriteLimit: 4 << 20})
		data := random(8 << 20)
		c, errs := b.handled(func(_ *netloop.Task, c *netloop.Conn) error {
			if _, err := c.Write(data); err != nil {
				return err
			}
			return c.Close()
		})
		wantErr(t, errs, nil)
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes of %d, %v", len(got), len(data), err)
		}
		eventually(t, "the connection is gone", func() bool { return b.Stats().Conns == 0 })
	})
}

func TestLinger(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		c, errs := b.handled(func(t *netloop.Task, c *netloop.Conn) error {
			if _, err := c.Read(make([]byte, 1)); err != nil {
				return err
			}
			if _, err := c.Write([]byte("refused")); err != nil {
				return err
			}
			return c.Linger(patience, 10<<20)
		})
		if _, err := c.Write(make([]byte, 4<<20)); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); string(got) != "refused" || err != nil {
			t.Errorf("read %q, %v", got, err)
		}
		c.Close()
		wantErr(t, errs, nil)
	})
}

// TestOneSendATurn uses a socket that keeps the bounds of messages to see how many there were.
func TestOneSendATurn(t *testing.T) {
	b := (&bench{t: t}).start(netloop.Options{})
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	b.in(func(task *netloop.Task) {
		c, err := task.Adopt(fds[0])
		if err != nil {
			t.Error(err)
			return
		}
		for _, s := range []string{"one ", "two ", "three"} {
			if _, err := c.Write([]byte(s)); err != nil {
				t.Error(err)
			}
		}
		if err := c.Flushed(0); err != nil {
			t.Error(err)
		}
	})
	buf := make([]byte, 100)
	if n, err := unix.Read(fds[1], buf); string(buf[:max(n, 0)]) != "one two three" || err != nil {
		t.Errorf("first message %q, %v", buf[:max(n, 0)], err)
	}
}

func TestAddresses(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		for _, listen := range []string{"127.0.0.1:0", "[::1]:0", "[::]:0"} {
			ln, err := net.Listen("tcp", listen)
			if err != nil {
				t.Logf("%s: %v", listen, err)
				continue
			}
			f, err := ln.(*net.TCPListener).File()
			if err != nil {
				t.Fatal(err)
			}
			type ends struct{ local, remote netip.AddrPort }
			got := make(chan ends, 1)
			served, err := b.Serve(int(f.Fd()), func(_ *netloop.Task, c *netloop.Conn) {
				if c.LocalAddr().String() != c.LocalAddrPort().String() || c.RemoteAddr().String() != c.RemoteAddrPort().String() {
					t.Errorf("%v, %v, %v, %v", c.LocalAddr(), c.LocalAddrPort(), c.RemoteAddr(), c.RemoteAddrPort())
				}
				got <- ends{c.LocalAddrPort(), c.RemoteAddrPort()}
			})
			f.Close()
			ln.Close()
			if err != nil {
				t.Fatal(err)
			}
			to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), served.Addr().Port())
			if listen == "[::1]:0" {
				to = served.Addr()
			}
			c := dial(t, to.String())
			want := ends{to, netip.MustParseAddrPort(c.LocalAddr().String())}
			if ends := <-got; ends != want {
				t.Errorf("%s: %v, want %v", listen, ends, want)
			}
		}
	})
}

func TestGoneAndQuiet(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		step := make(chan string)
		c, errs := b.handled(func(task *netloop.Task, c *netloop.Conn) error {
			for _, want := range []struct {
				name        string
				gone, quiet bool
			}{{"new", false, true}, {"data", false, false}, {"read", false, true}, {"hang-up", true, false}} {
				task.Block(func() { step <- want.name })
				if want.name == "read" {
					if n, err := io.ReadFull(c, make([]byte, 40<<10)); err != nil {
						return errors.Join(err, errors.New(strings.Repeat("x", n)))
					}
				}
				end := time.Now().Add(patience)
				for c.Gone() != want.gone || c.Quiet() != want.quiet {
					if time.Now().After(end) {
						t.Errorf("%s: Gone %t, Quiet %t", want.name, c.Gone(), c.Quiet())
						return nil
					}
					if err := task.Sleep(time.Millisecond); err != nil {
						return err
					}
				}
			}
			return nil
		})
		<-step
		<-step
		c.Write(random(40 << 10))
		<-step
		<-step
		c.Close()
		wantErr(t, errs, nil)
	})
}

func TestSmallReads(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		data := random(120 << 10)
		var got []byte
		c, errs := b.handled(func(t *netloop.Task, c *netloop.Conn) error {
			buf := make([]byte, 50<<10)
			for i := 0; ; i++ {
				n, err := c.Read(buf[:[]int{1, 100, 5000, 1, 50 << 10}[i%5]])
				got = append(got, buf[:n]...)
				if errors.Is(err, io.EOF) {
					return nil
				}
				if err != nil {
					return err
				}
				if i%2 == 0 {
					if err := t.Yield(); err != nil {
						return err
					}
				}
			}
		})
		c.Write(data)
		c.CloseWrite()
		wantErr(t, errs, nil)
		if !bytes.Equal(got, data) {
			t.Errorf("read %d bytes of %d, or others", len(got), len(data))
		}
	})
}

func TestSecondReader(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		second := make(chan error, 1)
		c, errs := b.handled(func(t *netloop.Task, c *netloop.Conn) error {
			t.Go(func(*netloop.Task) {
				_, err := c.Read(make([]byte, 1))
				second <- err
			})
			_, err := c.Read(make([]byte, 1))
			return err
		})
		wantErr(t, second, netloop.ErrBusy)
		c.Write([]byte("x"))
		wantErr(t, errs, nil)
	})
}

// TestBudget has a task read what never ends, since it writes it itself, beside one that counts the turns of their loop.
func TestBudget(t *testing.T) {
	b := (&bench{t: t}).start(netloop.Options{Loops: 1, TurnBudget: 64 << 10})
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	b.in(func(task *netloop.Task) {
		c, err := task.Adopt(fds[0])
		if err != nil {
			t.Error(err)
			return
		}
		turns := 0
		task.Go(func(task *netloop.Task) {
			for task.Yield() == nil {
				turns++
			}
		})
		const total = 10 << 20
		data, buf := make([]byte, 64<<10), make([]byte, 32<<10)
		for n := 0; n < total; {
			if _, err := unix.Write(fds[1], data); err != nil && !errors.Is(err, syscall.EAGAIN) {
				t.Error(err)
				return
			}
			k, err := c.Read(buf)
			if n += k; err != nil {
				t.Error(err)
				return
			}
		}
		if want := total / (128 << 10); turns < want {
			t.Errorf("%d bytes were read in %d turns, want at least %d", total, turns, want)
		}
	})
}

func TestAllFlushedReturn(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{WriteLimit: 8 << 20})
		left := 10
		c, errs := b.handled(func(t *netloop.Task, c *netloop.Conn) error {
			if _, err := c.Write(make([]byte, 30<<20)); err != nil { // more than the kernel takes
				return err
			}
			var done netloop.Event
			for range left {
				t.Go(func(*netloop.Task) {
					if c.Flushed(0) == nil {
						left--
					}
					done.Signal()
				})
			}
			for left > 0 {
				if err := t.Wait(&done); err != nil {
					return err
				}
			}
			return c.CloseWrite()
		})
		if _, err := io.Copy(io.Discard, c); err != nil {
			t.Error(err)
		}
		wantErr(t, errs, nil)
	})
}

func TestSlowPeerIsNotCut(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		const patient = 300 * time.Millisecond
		b.start(netloop.Options{WriteLimit: 1 << 20, StallTimeout: patient})
		inTime(t, func() error {
			c, errs := b.handled(func(_ *netloop.Task, c *netloop.Conn) error { return stall(c) })
			last := time.Now()
			for start := last; time.Since(start) < 2*patient; time.Sleep(patient / 20) {
				last = time.Now()
				if _, err := io.ReadFull(c, make([]byte, 2<<20)); err != nil {
					return err
				}
			}
			wantErr(t, errs, netloop.ErrStalled)
			if d := time.Since(last); d < patient {
				t.Errorf("cut %v after the peer read", d)
			}
			return nil
		})
	})
}

// TestSharedDescriptorsMadeBlocking: O_NONBLOCK belongs to the open file, which others may have a descriptor of.
func TestSharedDescriptorsMadeBlocking(t *testing.T) {
	b := (&bench{t: t}).start(netloop.Options{Loops: 1})
	fd := listenTCP(t)
	defer unix.Close(fd)
	ln, err := b.Serve(fd, echo)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	shared, err := unix.FcntlInt(uintptr(fds[0]), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(shared)
	adopted := make(chan struct{})
	b.Go(func(task *netloop.Task) {
		c, err := task.Adopt(fds[0])
		if err != nil {
			t.Error(err)
		} else if err := unix.SetNonblock(shared, false); err != nil {
			t.Error(err)
		}
		close(adopted)
		_ = stall(c)
	})
	<-adopted
	for range 3 {
		roundTrip(t, dial(t, ln.Addr().String()), random(100<<10))
	}
}

func TestHandshakeDeadline(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		_, errs := b.handled(func(_ *netloop.Task, c *netloop.Conn) error {
			c.SetDeadline(time.Now().Add(20 * time.Millisecond))
			return tls.Server(c, serverTLS()).Handshake()
		})
		wantErr(t, errs, os.ErrDeadlineExceeded)
	})
}

func TestEngineIsTLSClient(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		addr := b.serve(func(t *netloop.Task, c *netloop.Conn) { _ = echoStream(t, tls.Server(c, serverTLS())) })
		b.in(func(task *netloop.Task) {
			c, err := task.Adopt(connecting(t, addr))
			if err != nil {
				t.Error(err)
				return
			}
			s := tls.Client(c, clientTLS())
			data := random(300 << 10)
			if err := s.Handshake(); err != nil {
				t.Error(err)
				return
			}
			// One task writes while another reads.
			task.Go(func(*netloop.Task) {
				if _, err := s.Write(data[:200<<10]); err != nil {
					t.Error(err)
				}
			})
			got := make([]byte, 200<<10)
			if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, data[:200<<10]) {
				t.Errorf("read: %v, equal %t", err, bytes.Equal(got, data[:200<<10]))
			}
			if err := s.CloseWrite(); err != nil {
				t.Error(err)
			}
			if n, err := s.Read(got); n != 0 || !errors.Is(err, io.EOF) {
				t.Errorf("after the end: %d, %v", n, err)
			}
		})
	})
}
