// SPDX-License-Identifier: Apache-2.0

package http2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
)

// nowhere is a connection that takes everything and gives nothing.
type nowhere struct{ net.Conn }

func (nowhere) CloseWrite() error               { return nil }
func (nowhere) Write(p []byte) (int, error)     { return len(p), nil }
func (nowhere) Read([]byte) (int, error)        { return 0, io.EOF }
func (nowhere) SetReadDeadline(time.Time) error { return nil }

// FuzzFrames feeds frames to both roles and holds what must be true of a
// session whatever came: bounds on what it keeps and on the windows.
func FuzzFrames(f *testing.F) {
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	_ = enc.WriteField(hpack.HeaderField{Name: ":method", Value: "CONNECT"})
	_ = enc.WriteField(hpack.HeaderField{Name: ":authority", Value: "a:1"})
	b := appendSettings(nil, settingInitialWindow, 100000)
	b = append(appendHeader(b, block.Len(), frameHeaders, flagEndHeaders, 1), block.Bytes()...)
	b = append(appendHeader(b, 5, frameData, flagEndStream, 1), "hello"...)
	b = appendWindow(b, 0, 1000)
	b = appendWindow(b, 1, 1000)
	b = appendReset(b, 1, CodeCancel)
	f.Add(b, true)
	block.Reset()
	_ = enc.WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
	c := appendSettings(nil)
	c = append(appendHeader(c, block.Len(), frameHeaders, flagEndHeaders, 1), block.Bytes()...)
	c = append(appendHeader(c, 6, frameData, flagPadded, 1), "\x01hello"...)
	c = appendGoAway(c, 1, CodeNone)
	f.Add(c, false)
	f.Add(appendHeader(nil, maxFrame, frameContinuation, 0, 1), true)
	f.Fuzz(func(t *testing.T, in []byte, server bool) {
		m := newSession(nil, netloop.Stream(nowhere{}), Config{MaxStreams: 10, Trailers: true}, server)
		if !server {
			for range 3 {
				m.newStream(m.nextID)
				m.nextID += 2
			}
		}
		used, err := m.take(in)
		if used > len(in) || err == nil && len(in)-used > maxFrame+headerSize {
			t.Fatalf("used %d of %d", used, len(in))
		}
		if len(m.streams) > 10 || len(m.headers) > m.cfg.MaxHeaderList+maxFrame {
			t.Fatalf("%d streams, %d bytes of header block", len(m.streams), len(m.headers))
		}
		held := 0
		for _, s := range m.streams {
			if len(s.in)-s.inOff > m.cfg.MaxWindow || s.send > maxWindow {
				t.Fatalf("stream holds %d bytes, window %d", len(s.in), s.send)
			}
			if len(s.heads) > maxHeads || len(s.head.Fields) > MaxFields {
				t.Fatalf("%d lists, %d fields", len(s.heads), len(s.head.Fields))
			}
			held += len(s.in) - s.inOff
			_, _ = s.Write([]byte("answer"))
			_ = s.CloseWrite()
		}
		if err == nil && held+m.credit+m.owed > m.cfg.ConnWindow {
			t.Fatalf("%d held, %d credit, %d owed", held, m.credit, m.owed)
		}
		m.end(err)
		if len(m.streams) != 0 {
			t.Fatal("streams outlive their session")
		}
	})
}

// FuzzServe has a peer of either role send bytes to a whole session on the
// loop, whose streams are read to their ends, and then hang up.
func FuzzServe(f *testing.F) {
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, field := range requestList {
		_ = enc.WriteField(field)
	}
	b := append([]byte(Preface), appendSettings(nil)...)
	b = append(appendHeader(b, block.Len(), frameHeaders, flagEndHeaders, 1), block.Bytes()...)
	b = append(appendHeader(b, 5, frameData, 0, 1), "hello"...)
	block.Reset()
	_ = enc.WriteField(hpack.HeaderField{Name: "x-after", Value: "1"})
	b = append(appendHeader(b, block.Len(), frameHeaders, flagEndHeaders|flagEndStream, 1), block.Bytes()...)
	f.Add(b, true)
	block.Reset()
	enc = hpack.NewEncoder(&block)
	_ = enc.WriteField(hpack.HeaderField{Name: ":status", Value: "103"})
	c := appendSettings(nil)
	c = append(appendHeader(c, block.Len(), frameHeaders, flagEndHeaders, 1), block.Bytes()...)
	block.Reset()
	_ = enc.WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
	c = append(appendHeader(c, block.Len(), frameHeaders, flagEndHeaders, 1), block.Bytes()...)
	c = append(appendHeader(c, 5, frameData, flagEndStream, 1), "hello"...)
	f.Add(c, false)
	e, err := netloop.New(netloop.Options{Loops: 1})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { e.Close() })
	cfg := Config{Trailers: true, MaxStreams: 10}
	f.Fuzz(func(t *testing.T, in []byte, server bool) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		peer := os.NewFile(uintptr(fds[1]), "peer")
		defer peer.Close()
		done := make(chan *Session, 1)
		e.Post(0, func(task *netloop.Task) {
			conn, err := task.Adopt(fds[0])
			if err != nil {
				done <- nil
				return
			}
			if server {
				var m *Session
				_ = Serve(task, conn, cfg, func(_ *netloop.Task, s *Stream) {
					m = s.Session()
					_ = s.SendHead([]Field{{Name: ":status", Value: "200"}}, false)
					n, err := io.Copy(io.Discard, s)
					if err == nil && s.Trailers() != nil {
						_ = s.SendTrailers(s.Trailers().Fields)
					}
					_, _ = s.Write(make([]byte, n))
				})
				done <- m
				return
			}
			m := Dial(task, conn, cfg)
			for s, err := m.Open(task, requestList, false, time.Now().Add(time.Minute)); err == nil; {
				if _, err = s.ReadHead(); errors.Is(err, io.ErrUnexpectedEOF) {
					_, _ = io.ReadAll(s)
					break
				}
			}
			m.Kill(ErrClosed)
			done <- m
		})
		_, _ = peer.Write(in)
		_ = unix.Shutdown(fds[1], unix.SHUT_WR)
		if m := <-done; m != nil {
			checked := make(chan string, 1)
			e.Post(0, func(*netloop.Task) {
				if len(m.streams) != 0 || !m.over {
					checked <- fmt.Sprintf("%d streams outlive their session", len(m.streams))
				}
				close(checked)
			})
			if fault := <-checked; fault != "" {
				t.Fatal(fault)
			}
		}
		if s := e.Stats(); s.Panics != 0 {
			t.Fatal("a task panicked")
		}
	})
}
