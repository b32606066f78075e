// SPDX-License-Identifier: Apache-2.0

// Package http2 is the engine of HTTP/2 (RFC 9113) under package netloop, in
// both roles: frames, windows, header compression and the life of streams.
// What a header list means is for who uses it; Request, Response and Trailers
// read those of requests (RFC 9113, 8), package tunnel those of CONNECT.
//
// A Session runs on one loop of package netloop and takes no lock. Frames of
// one turn leave in one write; a read may hold many frames. A Stream is read
// and written like a connection, between its header lists.
//
// Every size and rate that the peer chooses is bounded: streams, resets,
// settings, pings, continuations, header lists, frame sizes, both kinds of
// windows and what waits for a peer that does not read. A peer that passes a
// bound loses the session.
package http2

import (
	"errors"
	"fmt"
	"time"
)

// Config bounds a session. Zero values take the defaults.
type Config struct {
	MaxStreams   int           // concurrent streams that the peer may open (1000)
	Window       int           // bytes a stream may have received and not read, at first (64 KiB)
	MaxWindow    int           // the same for a stream that is read fast (256 KiB)
	ConnWindow   int           // the same for all streams together (16 MiB)
	WriteLimit   int           // bytes waiting for the socket at which streams wait (128 KiB)
	HardLimit    int           // bytes of one stream that its writer may leave waiting (1 MiB)
	Handshake    time.Duration // for the peer's preface and settings (5 s)
	Idle         time.Duration // a session without streams ends after it (5 min)
	Stall        time.Duration // a stream whose peer gives no window for its output is cut (60 s)
	Ping         time.Duration // silence after which the peer is pinged while streams are open (30 s)
	PingTimeout  time.Duration // silence after a ping that ends the session (20 s)
	DrainTimeout time.Duration // for the streams of a session that drains (30 s)
	// MaxHeaderList bounds a header list (RFC 9113, 6.5.2) and the block that
	// carries it, in bytes (16 KiB).
	MaxHeaderList int
	// Trailers lets streams end with a second header list. Without, as
	// CONNECT has it (RFC 9113, 8.5), one costs the peer the stream.
	Trailers bool
	// NotAfter is when the session begins to drain by itself: the earlier
	// end of both certificates. Zero: never.
	NotAfter time.Time
	// Ending is asked every few seconds whether the session should drain. nil:
	// no.
	Ending func() bool
	// OnDrain is told once that the session takes no more streams, since it
	// drains or has ended. It must not park. May be nil.
	OnDrain func()
	// OnEnd is told once that the session has ended. It must not park. May be
	// nil.
	OnEnd func()
}

func (c Config) withDefaults() Config {
	for _, d := range []struct {
		value *int
		def   int
	}{{&c.MaxStreams, 1000}, {&c.Window, 64 << 10}, {&c.MaxWindow, 256 << 10}, {&c.ConnWindow, 16 << 20}, {&c.WriteLimit, 128 << 10}, {&c.HardLimit, 1 << 20}, {&c.MaxHeaderList, 16 << 10}} {
		if *d.value <= 0 {
			*d.value = d.def
		}
	}
	c.Window = max(c.Window, 65535) // what a peer may use before it has our settings
	c.MaxWindow, c.ConnWindow = max(c.MaxWindow, c.Window), max(c.ConnWindow, c.Window)
	for _, d := range []struct {
		value *time.Duration
		def   time.Duration
	}{{&c.Handshake, 5 * time.Second}, {&c.Idle, 5 * time.Minute}, {&c.Stall, time.Minute}, {&c.Ping, 30 * time.Second},
		{&c.PingTimeout, 20 * time.Second}, {&c.DrainTimeout, 30 * time.Second}} {
		if *d.value <= 0 {
			*d.value = d.def
		}
	}
	return c
}

var (
	// ErrClosed is what streams and Open get from a session that has ended.
	ErrClosed = errors.New("http2: session closed")
	// ErrDraining is what Open gets from a session that takes no more
	// streams, and from one that ended before it looked at this one: another
	// session may be asked.
	ErrDraining = errors.New("http2: session takes no more streams")
	// ErrStalled ends a stream whose peer gave no window for too long.
	ErrStalled = errors.New("http2: stream stalled")
	// ErrWriteLimit ends a stream whose writer never waited.
	ErrWriteLimit = errors.New("http2: stream write limit exceeded")
)

// Code is an HTTP/2 error code (RFC 9113, 7).
type Code uint32

// The codes that are sent.
const (
	CodeNone             Code = 0x0
	CodeProtocol         Code = 0x1
	CodeInternal         Code = 0x2
	CodeFlowControl      Code = 0x3
	CodeSettingsTimeout  Code = 0x4
	CodeStreamClosed     Code = 0x5
	CodeFrameSize        Code = 0x6
	CodeRefused          Code = 0x7
	CodeCancel           Code = 0x8
	CodeCompression      Code = 0x9
	CodeConnect          Code = 0xa
	CodeEnhanceYourCalm  Code = 0xb
	CodeInadequateSecure Code = 0xc
)

// ResetError is what a stream gets that the peer reset.
type ResetError struct{ Code Code }

// Error returns a text with the code.
func (e *ResetError) Error() string {
	return fmt.Sprintf("http2: stream reset by peer (code %d)", e.Code)
}

// FaultError ends a session over what the peer sent.
type FaultError struct {
	Code Code
	Text string
}

// Error returns the text.
func (e *FaultError) Error() string { return "http2: " + e.Text }

func fault(code Code, text string) error { return &FaultError{code, text} }

// bucket is a rate limit: burst at once, then rate a second.
type bucket struct {
	rate, burst float64
	left        float64
	last        time.Time
}

func newBucket(rate, burst float64) bucket { return bucket{rate: rate, burst: burst, left: burst} }

func (b *bucket) take(now time.Time) bool {
	if !b.last.IsZero() {
		b.left = min(b.burst, b.left+b.rate*now.Sub(b.last).Seconds())
	}
	b.last = now
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}

// give lets n more pass: what the peer may say grows with what it is sent.
func (b *bucket) give(n float64) { b.left = min(b.burst, b.left+n) }
