// SPDX-License-Identifier: Apache-2.0

package netloop_test

import (
	"crypto/tls"
	"fmt"
	"net"
	"testing"

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
