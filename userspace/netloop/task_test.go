// SPDX-License-Identifier: Apache-2.0

package netloop_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

func TestAdopt(t *testing.T) {
	for _, tt := range []struct {
		name string
		fd   func(*testing.T, string) int // given the address of an echo server
		want error
	}{
		{"connecting", func(t *testing.T, addr string) int { return connecting(t, addr) }, nil},
		{"connected and blocking", func(t *testing.T, addr string) int {
			f, err := dial(t, addr).File()
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.SetNonblock(fd, false); err != nil {
				t.Fatal(err)
			}
			return fd
		}, nil},
		{"refused", func(t *testing.T, _ string) int {
			fd := listenTCP(t)
			sa, err := unix.Getsockname(fd)
			unix.Close(fd)
			if err != nil {
				t.Fatal(err)
			}
			return connecting(t, fmt.Sprintf("127.0.0.1:%d", sa.(*unix.SockaddrInet4).Port))
		}, syscall.ECONNREFUSED},
		{"never connected", func(t *testing.T, _ string) int {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			return fd
		}, syscall.ENOTCONN},
		{"not a socket", func(t *testing.T, _ string) int {
			fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			return fd
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, b *bench) {
				b.start(netloop.Options{})
				addr := b.serve(echo)
				fd := tt.fd(t, addr)
				b.in(func(task *netloop.Task) {
					c, err := task.Adopt(fd)
					if tt.name == "not a socket" {
						if err == nil {
							t.Error("adopted /dev/null")
						}
						return
					}
					if !errors.Is(err, tt.want) {
						t.Errorf("got %v, want %v", err, tt.want)
					}
					if err != nil {
						return
					}
					if c.RemoteAddrPort().String() != addr {
						t.Errorf("peer %v, want %s", c.RemoteAddrPort(), addr)
					}
					if _, err := c.Write([]byte("hello")); err != nil {
						t.Error(err)
					}
					buf := make([]byte, 5)
					if _, err := io.ReadFull(c, buf); string(buf) != "hello" || err != nil {
						t.Errorf("read %q, %v", buf, err)
					}
				})
				if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); tt.want != nil && err == nil {
					t.Error("a socket that could not be adopted is still open")
				}
			})
		})
	}
}

// unanswered is a listener whose queue is full: the kernel drops further connection requests.
func unanswered(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", sa.(*unix.SockaddrInet4).Port)
	for range 3 {
		c := connecting(t, addr)
		t.Cleanup(func() { unix.Close(c) })
	}
	return addr
}

func TestAdoptGivesUp(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		addr := unanswered(t)
		b.start(netloop.Options{ConnectTimeout: 50 * time.Millisecond})
		b.in(func(task *netloop.Task) {
			if _, err := task.Adopt(connecting(t, addr)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("got %v, want a time-out", err)
			}
			if _, err := task.AdoptBy(connecting(t, addr), time.Unix(1, 0)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("got %v, want a time-out", err)
			}
		})
		if n := b.Stats().Conns; n != 0 {
			t.Errorf("%d connections are counted", n)
		}
	})
}

func TestMaxConns(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{MaxConns: 2})
		addr := b.serve(echo)
		first, second := dial(t, addr), dial(t, addr)
		eventually(t, "two are served", func() bool { return b.Stats().Accepted == 2 })
		if _, err := io.ReadAll(dial(t, addr)); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Error(err)
		}
		b.in(func(task *netloop.Task) {
			if _, err := task.Adopt(connecting(t, addr)); !errors.Is(err, netloop.ErrTooManyConns) {
				t.Errorf("got %v, want %v", err, netloop.ErrTooManyConns)
			}
		})
		eventually(t, "refusals are counted", func() bool { return b.Stats().Refused >= 2 })
		roundTrip(t, first, []byte("x"))
		roundTrip(t, second, []byte("y"))
		eventually(t, "their places are free", func() bool { return b.Stats().Conns == 0 })
		roundTrip(t, dial(t, addr), []byte("z"))
	})
}

func TestManyConnections(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{Loops: 3})
		var mu sync.Mutex
		loops := map[int]int{}
		addr := b.serve(func(t *netloop.Task, c *netloop.Conn) {
			mu.Lock()
			loops[t.Loop()]++
			mu.Unlock()
			echo(t, c)
		})
		const n = 300
		var clients []*net.TCPConn
		for range n {
			clients = append(clients, dial(t, addr))
		}
		eventually(t, "all are served", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return loops[0]+loops[1]+loops[2] == n
		})
		mu.Lock()
		for i := range 3 {
			if loops[i] < n/3-n/10 || loops[i] > n/3+n/10 {
				t.Errorf("connections by loop: %v", loops)
				break
			}
		}
		mu.Unlock()
		var wg sync.WaitGroup
		for i, c := range clients {
			wg.Go(func() {
				buf := make([]byte, 100)
				for round := range 20 {
					msg := fmt.Sprintf("%d in round %d", i, round)
					if _, err := c.Write([]byte(msg)); err != nil {
						t.Error(err)
						return
					}
					if n, err := io.ReadFull(c, buf[:len(msg)]); err != nil || string(buf[:n]) != msg {
						t.Errorf("got %q for %q, %v", buf[:n], msg, err)
						return
					}
				}
			})
		}
		wg.Wait()
	})
}

func TestBlockLeavesTheLoopFree(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{Loops: 1})
		released, blocked := make(chan struct{}), make(chan struct{})
		var order []string
		done := make(chan struct{})
		b.Go(func(task *netloop.Task) {
			defer close(done)
			task.Block(func() {
				close(blocked)
				<-released
			})
			order = append(order, "blocked")
		})
		<-blocked
		b.in(func(*netloop.Task) { order = append(order, "other") })
		close(released)
		await(t, "blocked task", done)
		if fmt.Sprint(order) != "[other blocked]" {
			t.Errorf("order %v", order)
		}
	})
}

func TestTasksTakeTurns(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{Loops: 1})
		inside, left := 0, 20
		done := make(chan struct{})
		for range left {
			b.Go(func(task *netloop.Task) {
				for range 50 {
					inside++
					runtime.Gosched()
					if inside != 1 {
						t.Errorf("%d tasks of one loop run at once", inside)
					}
					inside--
					if err := task.Yield(); err != nil {
						t.Error(err)
					}
				}
				if left--; left == 0 {
					close(done)
				}
			})
		}
		await(t, "tasks", done)
	})
}

func TestEvent(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{Loops: 1})
		var ev, ready netloop.Event
		var woken []int
		b.in(func(task *netloop.Task) {
			for i := range 5 {
				task.Go(func(task *netloop.Task) {
					if err := task.Wait(&ev); err != nil {
						t.Error(err)
					}
					woken = append(woken, i)
					ready.Signal()
				})
				if err := task.Yield(); err != nil { // the goroutine engine starts tasks in no order
					t.Error(err)
				}
			}
			for range 50 {
				_ = task.Yield()
			}
			if err := task.WaitTimeout(&ready, 10*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) || len(woken) != 0 {
				t.Errorf("%v, woken %v without a signal", err, woken)
			}
			ev.Signal()
			ev.Signal()
			for len(woken) < 2 {
				if err := task.WaitTimeout(&ready, patience); err != nil {
					t.Fatal(err)
				}
			}
			if err := task.WaitUntil(&ready, time.Now().Add(10*time.Millisecond)); !errors.Is(err, os.ErrDeadlineExceeded) || len(woken) != 2 {
				t.Errorf("%v, woken %v by two signals", err, woken)
			}
			ev.Broadcast()
			for len(woken) < 5 {
				if err := task.WaitTimeout(&ready, patience); err != nil {
					t.Fatal(err)
				}
			}
		})
		if slices.Sort(woken); fmt.Sprint(woken) != "[0 1 2 3 4]" {
			t.Errorf("woken %v", woken)
		}
	})
}

func TestPostSignals(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		for loop := range b.Loops() {
			var ev netloop.Event
			count := 0
			done := make(chan struct{})
			b.Post(loop, func(task *netloop.Task) {
				defer close(done)
				if task.Loop() != loop || task.Engine() != b.Engine {
					t.Errorf("runs on loop %d, posted to %d", task.Loop(), loop)
				}
				for count < 100 {
					if err := task.Wait(&ev); err != nil {
						t.Error(err)
						return
					}
				}
			})
			for range 100 {
				go b.Post(loop, func(*netloop.Task) {
					count++
					ev.Signal()
				})
			}
			await(t, "all posts", done)
		}
	})
}

func TestSleep(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		b.in(func(task *netloop.Task) {
			for _, d := range []time.Duration{-1, 0, time.Millisecond, 30 * time.Millisecond} {
				start := time.Now()
				if err := task.Sleep(d); err != nil || time.Since(start) < d {
					t.Errorf("Sleep(%v): %v after %v", d, err, time.Since(start))
				}
			}
		})
	})
}

func TestPanicEndsItsTaskAlone(t *testing.T) {
	for name, crash := range map[string]func(*netloop.Task){
		"panic":          func(*netloop.Task) { panic("boom") },
		"panic in Block": func(t *netloop.Task) { t.Block(func() { panic("boom") }) },
		"Goexit":         func(*netloop.Task) { runtime.Goexit() },
	} {
		t.Run(name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, b *bench) {
				b.start(netloop.Options{Loops: 1})
				addr := b.serve(echo)
				before := dial(t, addr)
				crashed := b.serve(func(t *netloop.Task, c *netloop.Conn) {
					c.Read(make([]byte, 1))
					c.Write([]byte("half of an ans"))
					crash(t)
				})
				c := dial(t, crashed)
				c.Write([]byte("?"))
				got, err := io.ReadAll(c)
				eventually(t, "the task's connection is gone", func() bool { return b.Stats().Conns == 1 })
				if name != "Goexit" {
					if !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("the client saw %q and %v, want a reset", got, err)
					}
					if n := b.Stats().Panics; n != 1 || !b.log.has("boom") || !b.log.has("task_test.go") {
						t.Errorf("%d panics counted; logged with its stack: %t", n, b.log.has("boom"))
					}
				}
				roundTrip(t, before, random(100<<10))
				roundTrip(t, dial(t, addr), random(100<<10))
			})
		})
	}
}

func TestKill(t *testing.T) {
	revoked := errors.New("revoked")
	for name, h := range map[string]func(*netloop.Task, *netloop.Conn) error{
		"in Read": func(_ *netloop.Task, c *netloop.Conn) error {
			_, err := c.Read(make([]byte, 1))
			return err
		},
		"in Flushed": func(_ *netloop.Task, c *netloop.Conn) error { return stall(c) },
		"waiting for an event": func(t *netloop.Task, c *netloop.Conn) error {
			var ev netloop.Event
			c.Notify(&ev)
			for !c.Gone() {
				if err := t.Wait(&ev); err != nil {
					return err
				}
			}
			_, err := c.Write([]byte("x"))
			return err
		},
		"in Block": func(t *netloop.Task, c *netloop.Conn) error {
			t.Block(func() {
				for t.Engine().Stats().Killed == 0 {
					time.Sleep(time.Millisecond)
				}
			})
			_, err := c.Read(make([]byte, 1))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, b *bench) {
				b.start(netloop.Options{WriteLimit: 1 << 20})
				ids := make(chan uint64, 1)
				c, errs := b.handled(func(t *netloop.Task, c *netloop.Conn) error {
					ids <- c.ID()
					return h(t, c)
				})
				id := <-ids
				b.Kill(id+1, nil) // nobody's
				b.Kill(1<<63, nil)
				b.Kill(id, revoked)
				wantErr(t, errs, revoked)
				if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the client saw %v, want a reset", err)
				}
				b.Kill(id, nil) // gone
				if n := b.Stats().Killed; n != 1 {
					t.Errorf("%d killed", n)
				}
			})
		})
	}
}

func TestCloseEndsEverything(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		silent := unanswered(t)
		b.start(netloop.Options{WriteLimit: 1 << 20})
		addr := b.serve(echo)
		errs := make(chan error, 100)
		park := map[string]func(*netloop.Task) error{
			"sleep": func(t *netloop.Task) error { return t.Sleep(time.Hour) },
			"wait":  func(t *netloop.Task) error { return t.Wait(new(netloop.Event)) },
			"adopt": func(task *netloop.Task) error {
				_, err := task.AdoptBy(connecting(t, silent), time.Now().Add(time.Hour))
				return err
			},
			"read": func(task *netloop.Task) error {
				c, err := task.Adopt(connecting(t, addr))
				if err != nil {
					return err
				}
				_, err = c.Read(make([]byte, 1))
				return err
			},
			"relay": func(task *netloop.Task) error {
				c, err := task.Adopt(connecting(t, addr))
				if err != nil {
					return err
				}
				d, err := task.Adopt(connecting(t, addr))
				if err != nil {
					return err
				}
				_, _, err = netloop.Relay(task, c, d, netloop.RelayOptions{})
				return err
			},
			"two parks": func(t *netloop.Task) error {
				_ = t.Sleep(time.Hour)
				return t.Yield()
			},
			"block": func(t *netloop.Task) error {
				t.Block(func() {
					for !t.Engine().Draining() {
						time.Sleep(time.Millisecond)
					}
				})
				return t.Sleep(time.Hour)
			},
		}
		var begun atomic.Int32 // one that has not begun at Close never does
		for _, f := range park {
			b.Go(func(t *netloop.Task) {
				begun.Add(1)
				errs <- f(t)
			})
		}
		c, stalled := b.handled(func(_ *netloop.Task, c *netloop.Conn) error { return stall(c) })
		// Seven tasks, the writer and three of echo; one connection is not made; a relay may have a second task.
		eventually(t, "all are parked", func() bool {
			s := b.Stats()
			return int(begun.Load()) == len(park) && s.Tasks >= len(park)+4 && s.Conns == 8
		})
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		for range park {
			// The other end of a connection may be in a loop that was closed before.
			if err := <-errs; !errors.Is(err, netloop.ErrClosed) && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("got error %v, want %v", err, netloop.ErrClosed)
			}
		}
		wantErr(t, stalled, netloop.ErrClosed)
		if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client saw %v, want a reset", err)
		}
		if err := b.Close(); !errors.Is(err, netloop.ErrClosed) {
			t.Errorf("second Close: %v", err)
		}
		b.Go(func(*netloop.Task) { t.Error("a task was started after Close") })
		b.Post(0, func(*netloop.Task) { t.Error("a task was posted after Close") })
		b.Kill(1, nil)
		fd := listenTCP(t)
		defer unix.Close(fd)
		if _, err := b.Serve(fd, echo); !errors.Is(err, netloop.ErrClosed) {
			t.Errorf("Serve after Close: %v", err)
		}
	})
}

func TestPool(t *testing.T) {
	// A connection that outlives the task which made it, as in a pool of idle connections.
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{Loops: 1})
		addr := b.serve(echo)
		pool := netloop.Local[[]*netloop.Conn]{}
		ask := func(task *netloop.Task, c *netloop.Conn) {
			buf := make([]byte, 4)
			if _, err := c.Write([]byte("ping")); err != nil {
				t.Error(err)
			}
			if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "ping" {
				t.Errorf("read %q, %v", buf, err)
			}
		}
		b.in(func(task *netloop.Task) {
			c, err := task.Adopt(connecting(t, addr))
			if err != nil {
				t.Error(err)
				return
			}
			ask(task, c)
			task.Disown(c)
			idle := pool.Get(task)
			*idle = append(*idle, c)
		})
		b.in(func(task *netloop.Task) {
			idle := *pool.Get(task)
			if len(idle) != 1 || !idle[0].Quiet() || idle[0].Gone() {
				t.Error("the connection is not in the pool, or not fit")
				return
			}
			task.Own(idle[0])
			ask(task, idle[0])
		})
		eventually(t, "its second owner closed it", func() bool { return b.Stats().Conns == 0 })
	})
}

func TestPooledConnectionIsClosedWhenItsPeerLeaves(t *testing.T) {
	b := (&bench{t: t}).start(netloop.Options{})
	addr := b.serve(func(task *netloop.Task, _ *netloop.Conn) { task.Sleep(20 * time.Millisecond) })
	b.in(func(task *netloop.Task) {
		c, err := task.Adopt(connecting(t, addr))
		if err != nil {
			t.Error(err)
			return
		}
		task.Disown(c)
	})
	eventually(t, "both ends are closed", func() bool { return b.Stats().Conns == 0 && b.Stats().Accepted == 1 })
}

func TestLocalIsPerLoop(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{Loops: 2})
		made := make(chan int, 10)
		counters := netloop.Local[int]{New: func(t *netloop.Task) *int {
			made <- t.Loop()
			return new(int)
		}}
		for round := 1; round <= 3; round++ {
			for loop := range 2 {
				done := make(chan struct{})
				b.Post(loop, func(task *netloop.Task) {
					defer close(done)
					if *counters.Get(task)++; *counters.Get(task) != round {
						t.Errorf("loop %d counts %d in round %d", loop, *counters.Get(task), round)
					}
				})
				await(t, "post", done)
			}
		}
		if len(made) != 2 {
			t.Errorf("%d values were made for 2 loops", len(made))
		}
	})
}

func TestBuffersAreUsedAgain(t *testing.T) {
	onBoth(t, func(t *testing.T, b *bench) {
		b.start(netloop.Options{})
		b.in(func(task *netloop.Task) {
			x := task.Buffer()
			task.Release(x[:10])
			task.Release(make([]byte, 10))
			y := task.Buffer()
			if len(y) != netloop.BufferSize || &x[0] != &y[0] {
				t.Errorf("%d bytes; the same buffer: %t", len(y), &x[0] == &y[0])
			}
		})
	})
}

// TestASlotIsLeftBesideTheLoops holds that goroutines have a scheduler slot
// beside the loops of all engines of the process, each of which may keep its own
// while it waits.
func TestASlotIsLeftBesideTheLoops(t *testing.T) {
	before := runtime.GOMAXPROCS(1)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
	var engines []*netloop.Engine
	loops := 0
	for n := 1; n <= 3; n++ {
		e, err := netloop.New(netloop.Options{Loops: n})
		if err != nil {
			t.Fatal(err)
		}
		engines = append(engines, e)
		if loops += n; runtime.GOMAXPROCS(0) <= loops {
			t.Errorf("%d slots for %d loops", runtime.GOMAXPROCS(0), loops)
		}
	}
	for _, e := range engines {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	}
	runtime.GOMAXPROCS(1)
	e, err := netloop.New(netloop.Options{Loops: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if n := runtime.GOMAXPROCS(0); n > loops {
		t.Errorf("%d slots for one loop: those of ended engines are still counted", n)
	}
}
