// SPDX-License-Identifier: Apache-2.0

package http2

import (
	"bytes"
	"errors"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"golang.org/x/net/http2/hpack"
)

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

// TestHostilePeers are what a peer may try; each must cost it the session.
func TestHostilePeers(t *testing.T) {
	block := func(pairs ...string) []byte {
		var b bytes.Buffer
		enc := hpack.NewEncoder(&b)
		for i := 0; i < len(pairs); i += 2 {
			_ = enc.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
		}
		return b.Bytes()
	}
	request := block(":method", "POST", ":scheme", "http", ":path", "/s.S/M", ":authority", "a.example")
	frame := func(kind, flags uint8, id uint32, p []byte) []byte {
		return append(appendHeader(nil, len(p), kind, flags, id), p...)
	}
	repeat := func(n int, f func(i int) []byte) []byte {
		var b []byte
		for i := range n {
			b = append(b, f(i)...)
		}
		return b
	}
	hello := slices.Clip(append([]byte(Preface), appendSettings(nil)...))
	cases := []struct {
		name string
		send []byte
		code Code
	}{
		{"no preface", []byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"), CodeProtocol},
		{"no settings", append([]byte(Preface), frame(framePing, 0, 0, make([]byte, 8))...), CodeProtocol},
		{"rapid reset", append(hello, repeat(2000, func(i int) []byte {
			id := uint32(2*i + 1)
			return append(frame(frameHeaders, flagEndHeaders, id, request), appendReset(nil, id, CodeCancel)...)
		})...), CodeEnhanceYourCalm},
		{"too many streams", append(hello, repeat(5000, func(i int) []byte {
			return frame(frameHeaders, flagEndHeaders, uint32(2*i+1), request)
		})...), CodeEnhanceYourCalm},
		{"settings flood", append(hello, repeat(100, func(int) []byte { return appendSettings(nil, settingInitialWindow, 70000) })...), CodeEnhanceYourCalm},
		{"ping flood", append(hello, repeat(200, func(int) []byte { return frame(framePing, 0, 0, make([]byte, 8)) })...), CodeEnhanceYourCalm},
		{"priority flood", append(hello, repeat(50000, func(int) []byte { return frame(framePriority, 0, 1, make([]byte, 5)) })...), CodeEnhanceYourCalm},
		{"unknown flood", append(hello, repeat(50000, func(int) []byte { return frame(99, 0, 1, nil) })...), CodeEnhanceYourCalm},
		{"empty data flood", append(append(hello, frame(frameHeaders, flagEndHeaders, 1, request)...),
			repeat(1000, func(int) []byte { return frame(frameData, 0, 1, nil) })...), CodeEnhanceYourCalm},
		{"continuation flood", append(append(hello, frame(frameHeaders, 0, 1, request)...),
			repeat(1000, func(int) []byte { return frame(frameContinuation, 0, 1, nil) })...), CodeEnhanceYourCalm},
		{"large header block", append(append(hello, frame(frameHeaders, 0, 1, request)...),
			repeat(4, func(int) []byte { return frame(frameContinuation, 0, 1, make([]byte, 8000)) })...), CodeEnhanceYourCalm},
		{"interrupted block", append(append(hello, frame(frameHeaders, 0, 1, request)...), frame(framePing, 0, 0, make([]byte, 8))...), CodeProtocol},
		{"bad compression", append(hello, frame(frameHeaders, flagEndHeaders, 1, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})...), CodeCompression},
		{"large frame", append(hello, appendHeader(nil, maxFrame+1, frameData, 0, 1)...), CodeFrameSize},
		{"even stream", append(hello, frame(frameHeaders, flagEndHeaders, 2, request)...), CodeProtocol},
		{"data for no stream", append(hello, frame(frameData, 0, 1, []byte("x"))...), CodeProtocol},
		{"reset of no stream", append(hello, appendReset(nil, 1, CodeCancel)...), CodeProtocol},
		{"window of nothing", append(hello, appendWindow(nil, 0, 0)...), CodeProtocol},
		{"window overflow", append(hello, append(appendWindow(nil, 0, maxWindow), appendWindow(nil, 0, maxWindow)...)...), CodeFlowControl},
		{"initial window overflow", append(hello, appendSettings(nil, settingInitialWindow, 1<<31)...), CodeFlowControl},
		{"push promise", append(hello, frame(framePush, flagEndHeaders, 1, make([]byte, 4))...), CodeProtocol},
		{"padding", append(append(hello, frame(frameHeaders, flagEndHeaders, 1, request)...), frame(frameData, flagPadded, 1, []byte{200, 1})...), CodeProtocol},
		{"settings of a wrong size", append(hello, frame(frameSettings, 0, 0, make([]byte, 7))...), CodeFrameSize},
		{"settings for a stream", append(hello, frame(frameSettings, 0, 1, nil)...), CodeProtocol},
		{"max frame size", append(hello, appendSettings(nil, settingMaxFrame, 1)...), CodeProtocol},
		{"ping of a wrong size", append(hello, frame(framePing, 0, 0, make([]byte, 7))...), CodeFrameSize},
	}
	e, err := netloop.New(netloop.Options{Loops: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	ended := make(chan error, 1)
	addr := listen(t, e, func(task *netloop.Task, c *netloop.Conn) {
		// A handshake that does not come ends early here.
		ended <- Serve(task, c, Config{MaxStreams: 100, Handshake: 2 * time.Second}, func(task *netloop.Task, s *Stream) {
			// Accepting takes as long as it does for a real destination.
			_ = task.Sleep(time.Hour)
		})
	})
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			conn, err := net.Dial("tcp4", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			go func() { _, _ = conn.Write(c.send) }()
			err = <-ended
			var f *FaultError
			if !errors.As(err, &f) || f.Code != c.code {
				t.Fatalf("the session ended with %v, want code %d", err, c.code)
			}
		})
	}
	if s := e.Stats(); s.Panics != 0 {
		t.Errorf("%d panics", s.Panics)
	}
}
