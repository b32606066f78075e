// SPDX-License-Identifier: Apache-2.0

package http2

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"golang.org/x/net/http2/hpack"
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
		m := newSession(nil, netloop.Stream(nowhere{}), Config{MaxStreams: 10}, server)
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
