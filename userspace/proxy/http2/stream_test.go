// SPDX-License-Identifier: Apache-2.0

package http2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
)

// eachEngine runs a test on both engines.
func eachEngine(t *testing.T, f func(t *testing.T, e *netloop.Engine)) {
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("goroutines=%v", plain), func(t *testing.T) {
			e, err := netloop.New(netloop.Options{Loops: 1, Goroutines: plain})
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

// pair makes two sessions that speak to each other and runs f with the
// client's.
func pair(t *testing.T, e *netloop.Engine, server, client Config, handler func(*netloop.Task, *Stream), f func(*netloop.Task, *Session) error) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	e.Post(0, func(task *netloop.Task) {
		c, err := task.Adopt(fds[0])
		if err == nil {
			_ = Serve(task, c, server, handler)
		}
	})
	e.Post(0, func(task *netloop.Task) {
		c, err := task.Adopt(fds[1])
		if err == nil {
			m := Dial(task, c, client)
			err = f(task, m)
			m.Kill(ErrClosed)
		}
		done <- err
	})
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the task did not end")
	}
}

func soon() time.Time { return time.Now().Add(10 * time.Second) }

var requestList = []Field{{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/s.S/M"}, {Name: ":authority", Value: "a"}}

// TestHeads sends interim responses, content and trailers, with header lists
// of more than a frame.
func TestHeads(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		cfg := Config{Trailers: true, MaxHeaderList: 64 << 10}
		long := strings.Repeat("x", 20000) + strings.Repeat("\u00e9", 10000)
		var seen error
		handler := func(task *netloop.Task, s *Stream) {
			body, err := io.ReadAll(s)
			if tr := s.Trailers(); err != nil || len(s.Head().Fields) != 5 || s.Head().Fields[4].Value != long || !s.Head().Fields[4].Sensitive ||
				string(body) != "question" || tr == nil || tr.Fields[0].Value != "after" {
				seen = fmt.Errorf("the server saw %d fields, %q, %+v, %w", len(s.Head().Fields), body, tr, err)
			}
			_ = s.SendInterim([]Field{{Name: ":status", Value: "103"}, {Name: "link", Value: "a"}})
			_ = s.SendHead([]Field{{Name: ":status", Value: "200"}, {Name: "x-long", Value: long}}, false)
			_, _ = s.Write(bytes.Repeat([]byte("answer"), 50_000))
			_ = s.SendTrailers([]Field{{Name: "x-after", Value: long}})
		}
		pair(t, e, cfg, cfg, handler, func(task *netloop.Task, m *Session) error {
			for range 3 { // compression tables are used again
				s, err := m.Open(task, append(requestList[:4:4], Field{Name: "x-long", Value: long, Sensitive: true}), false, soon())
				if err != nil {
					return err
				}
				_, _ = s.Write([]byte("question"))
				if err := s.SendTrailers([]Field{{Name: "x-before", Value: "after"}}); err != nil {
					return err
				}
				for _, want := range []string{"103", "200"} {
					if h, err := s.ReadHead(); err != nil || h.get(":status") != want || h.End {
						return fmt.Errorf("head %+v, %w", h, err)
					}
				}
				body, err := io.ReadAll(s)
				if tr := s.Trailers(); err != nil || len(body) != 300_000 || tr == nil || tr.Fields[0].Value != long || !s.Orderly() {
					return fmt.Errorf("%d bytes, trailers %v, %w", len(body), tr != nil, err)
				}
				if _, err := s.ReadHead(); !errors.Is(err, io.ErrUnexpectedEOF) {
					return fmt.Errorf("another head: %w", err)
				}
			}
			return seen
		})
	})
}

// TestLists holds what becomes of header lists that are too long, and of
// those where none may be.
func TestLists(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		handler := func(task *netloop.Task, s *Stream) {
			_ = s.SendHead([]Field{{Name: ":status", Value: map[bool]string{true: "431", false: "200"}[s.Head().Long]}}, false)
			_, _ = io.Copy(io.Discard, s)
			_ = s.CloseWrite()
		}
		pair(t, e, Config{MaxHeaderList: 16 << 10}, Config{}, handler, func(task *netloop.Task, m *Session) error {
			for _, c := range []struct {
				fields, size int
				want         string
			}{{1, 15 << 10, "200"}, {2, 9 << 10, "431"}, {MaxFields - 4, 1, "200"}, {MaxFields - 3, 1, "431"}} {
				list := requestList[:4:4]
				for range c.fields {
					list = append(list, Field{Name: "x", Value: strings.Repeat("0", c.size)})
				}
				s, err := m.Open(task, list, true, soon())
				if err != nil {
					return err
				}
				if h, err := s.ReadHead(); err != nil || h.get(":status") != c.want {
					return fmt.Errorf("%d fields of %d bytes: %+v %w", c.fields, c.size, h, err)
				}
			}
			// Without Config.Trailers a second list costs the stream.
			s, err := m.Open(task, requestList, false, soon())
			if err != nil {
				return err
			}
			if _, err := s.ReadHead(); err != nil {
				return err
			}
			_ = s.SendTrailers([]Field{{Name: "x", Value: "y"}})
			var reset *ResetError
			if _, err := io.ReadAll(s); !errors.As(err, &reset) || reset.Code != CodeProtocol {
				return fmt.Errorf("trailers: %w", err)
			}
			return nil
		})
	})
}

// TestEnded holds that a stream tells of its end, whoever ends it.
func TestEnded(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		var ended []string
		var changed netloop.Event
		handler := func(task *netloop.Task, s *Stream) {
			s.Ended = func() {
				ended = append(ended, fmt.Sprint(s.Orderly()))
				changed.Broadcast()
			}
			_ = s.SendHead([]Field{{Name: ":status", Value: "200"}}, false)
			_, _ = io.Copy(io.Discard, s)
			_ = s.CloseWrite()
		}
		pair(t, e, Config{}, Config{}, handler, func(task *netloop.Task, m *Session) error {
			for i, reset := range []bool{false, true} {
				s, err := m.Open(task, requestList, false, soon())
				if err != nil {
					return err
				}
				if _, err := s.ReadHead(); err != nil {
					return err
				}
				if reset {
					s.Abort()
				} else if err := s.CloseWrite(); err != nil {
					return err
				}
				for len(ended) == i {
					if err := task.WaitUntil(&changed, soon()); err != nil {
						return err
					}
				}
			}
			if got := strings.Join(ended, " "); got != "true false" {
				return errors.New(got)
			}
			return nil
		})
	})
}

// TestPeerThatDoesNotRead asks without end and takes no answer: what waits for
// it is bounded, and it is not read any more.
func TestPeerThatDoesNotRead(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *netloop.Engine) {
		sessions, ended := make(chan *Session, 1), make(chan error, 1)
		answer := []Field{{Name: ":status", Value: "200"}, {Name: "x", Value: strings.Repeat("\x7f", 40), Sensitive: true}}
		addr := listen(t, e, func(task *netloop.Task, c *netloop.Conn) {
			ended <- Serve(task, c, Config{MaxStreams: 1 << 20}, func(task *netloop.Task, s *Stream) {
				select {
				case sessions <- s.Session():
				default:
				}
				_ = s.SendHead(answer, true)
			})
		})
		conn, err := net.Dial("tcp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		var block bytes.Buffer
		enc := hpack.NewEncoder(&block)
		b := append([]byte(Preface), appendSettings(nil)...)
		_ = conn.SetWriteDeadline(time.Now().Add(2 * time.Second)) // it ends by this
		id := uint32(1)
		for {
			for range 1000 {
				block.Reset()
				for _, f := range requestList {
					_ = enc.WriteField(f)
				}
				b = append(appendHeader(b, block.Len(), frameHeaders, flagEndHeaders|flagEndStream, id), block.Bytes()...)
				id += 2
			}
			if _, err := conn.Write(b); err != nil {
				break
			}
			b = b[:0]
		}
		var m *Session
		select {
		case m = <-sessions:
		case err := <-ended: // it asked faster than it was answered
			var f *FaultError
			if !errors.As(err, &f) || f.Code != CodeEnhanceYourCalm {
				t.Errorf("the session ended with %v", err)
			}
			return
		}
		most := make(chan int, 1)
		e.Post(0, func(*netloop.Task) { most <- len(m.out) })
		if n := <-most; n > 1<<20 {
			t.Errorf("%d bytes wait after %d requests", n, id/2)
		}
	})
}
