// SPDX-License-Identifier: Apache-2.0

package netloop_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

func TestOptions(t *testing.T) {
	for _, opt := range []netloop.Options{{Loops: -1}, {Loops: 257}, {WriteLimit: -1}, {TurnBudget: -1}, {MaxConns: -1}} {
		if e, err := netloop.New(opt); err == nil {
			_ = e.Close()
			t.Errorf("%+v: no error", opt)
		}
	}
}

func TestServeWantsAListener(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		for _, fd := range []int{fd, -1} {
			if _, err := b.Serve(fd, echo); err == nil {
				t.Errorf("descriptor %d is served", fd)
			}
		}
	})
}

func TestListenerClose(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		fd := listenTCP(t)
		before := openDescriptors(t)
		ln, err := b.Serve(fd, echo)
		if err != nil {
			t.Fatal(err)
		}
		addr := ln.Addr().String()
		live := dial(t, addr)
		eventually(t, "it is served", func() bool { return b.Stats().Accepted == 1 })
		held := openDescriptors(t)
		if err := ln.Close(); err != nil {
			t.Error(err)
		}
		if n := openDescriptors(t); n != held-1 || n != before+2 {
			t.Errorf("%d descriptors before Serve, %d before Close, %d after it", before, held, n)
		}
		if err := ln.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("second Close: %v", err)
		}
		unix.Close(fd)
		if c, err := net.Dial("tcp", addr); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial after Close: %v", err)
			if err == nil {
				c.Close()
			}
		}
		roundTrip(t, live, random(1000))
	})
}

func TestListenersComeAndGo(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		for range 50 {
			fd := listenTCP(t)
			ln, err := b.Serve(fd, echo)
			if err != nil {
				t.Fatal(err)
			}
			unix.Close(fd)
			c := dial(t, ln.Addr().String())
			roundTrip(t, c, []byte("hello"))
			c.Close()
			if err := ln.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestShutdown(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		addr := b.serve(func(t *netloop.Task, c *netloop.Conn) {
			// One request after another, a byte each.
			buf := make([]byte, 1)
			for !t.Engine().Draining() {
				c.SetIdle(true)
				if _, err := c.Read(buf); err != nil {
					return
				}
				c.SetIdle(false)
				if _, err := c.Read(buf); err != nil { // the second half of the request
					return
				}
				c.Write([]byte("done"))
			}
		})
		idle, busy := dial(t, addr), dial(t, addr)
		busy.Write([]byte("1"))
		eventually(t, "half a request is read", func() bool { return b.Stats().Accepted == 2 && b.Stats().BytesRead == 1 })
		result := make(chan error, 1)
		go func() { result <- b.Shutdown(context.Background()) }()
		if got, err := io.ReadAll(idle); len(got) != 0 || err != nil {
			t.Errorf("the idle client saw %q, %v", got, err)
		}
		select {
		case err := <-result:
			t.Fatalf("Shutdown returned %v while a request was under way", err)
		default:
		}
		busy.Write([]byte("2"))
		if got, err := io.ReadAll(busy); string(got) != "done" || err != nil {
			t.Errorf("the busy client saw %q, %v", got, err)
		}
		wantErr(t, result, nil)
	})
}

func TestShutdownCutsOff(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		_, errs := b.handled(func(_ *netloop.Task, c *netloop.Conn) error {
			_, err := c.Read(make([]byte, 1))
			return err
		})
		eventually(t, "it is served", func() bool { return b.Stats().Accepted == 1 })
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		if err := b.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown: %v", err)
		}
		wantErr(t, errs, netloop.ErrClosed)
	})
}

// TestOutOfDescriptors must not run beside other tests: the limit is the process's.
func TestOutOfDescriptors(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		addr := b.serve(echo)
		roundTrip(t, dial(t, addr), []byte("before"))
		eventually(t, "it is over", func() bool { return b.Stats().Conns == 0 })
		late := unboundSocket(t)
		restore := limitDescriptors(t)
		// The kernel makes the connection; there is no descriptor left to accept it with.
		err := unix.Connect(late, addrOf(t, addr))
		if err != nil {
			restore()
			t.Fatal(err)
		}
		eventually(t, "the lack is logged", func() bool { return b.log.has("cannot accept") })
		before := processorTime(t)
		time.Sleep(300 * time.Millisecond)
		if used := processorTime(t) - before; used > 150*time.Millisecond {
			t.Errorf("%v of processor time was used in 300 ms of not accepting", used)
		}
		restore()
		if _, err := unix.Write(late, []byte("after")); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 5)
		if n, err := unix.Read(late, buf); string(buf[:max(n, 0)]) != "after" || err != nil {
			t.Errorf("read %q, %v", buf[:max(n, 0)], err)
		}
	})
}

// unboundSocket blocks for at most patience.
func unboundSocket(t *testing.T) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &unix.Timeval{Sec: int64(patience.Seconds())}); err != nil {
			t.Fatal(err)
		}
	}
	return fd
}

func addrOf(t testing.TB, addr string) unix.Sockaddr {
	t.Helper()
	a, err := netip.ParseAddrPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

// limitDescriptors leaves no descriptor to be opened until the returned function is called.
func limitDescriptors(t *testing.T) (restore func()) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	// The lowest free number: all below it are taken.
	next, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(next)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(next), Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	return sync.OnceFunc(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	})
}

func processorTime(t *testing.T) time.Duration {
	t.Helper()
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		t.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func TestIdleCostsNothing(t *testing.T) {
	b := (&bench{t: t}).start(netloop.Options{})
	addr := b.serve(func(_ *netloop.Task, c *netloop.Conn) {
		c.SetReadDeadline(time.Now().Add(time.Hour))
		c.Read(make([]byte, 1))
	})
	for range 50 {
		dial(t, addr)
	}
	eventually(t, "all are served", func() bool { return b.Stats().Accepted == 50 })
	time.Sleep(50 * time.Millisecond)
	before := processorTime(t)
	time.Sleep(500 * time.Millisecond)
	if used := processorTime(t) - before; used > 25*time.Millisecond {
		t.Errorf("%v of processor time was used in 500 ms with nothing to do", used)
	}
}
