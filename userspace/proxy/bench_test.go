// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const (
	benchGet    = "GET /v1/payments/7f3a?currency=eur HTTP/1.1\r\nHost: pay.shop.example\r\nUser-Agent: client/1.0\r\nAccept: */*\r\n\r\n"
	benchAnswer = "HTTP/1.1 200 OK\r\nServer: app\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\n\r\n"
)

// BenchmarkRequest sends one request after the other over a kept connection:
// client and application are plain sockets in this process. "direct" is the
// same without the proxy.
func BenchmarkRequest(b *testing.B) {
	answer := append([]byte(benchAnswer), bytes.Repeat([]byte("x"), 1024)...)
	app := func(c *net.TCPConn) {
		_ = c.SetDeadline(time.Time{})
		buf := make([]byte, 4096)
		got := 0
		for {
			n, err := c.Read(buf[got:])
			if err != nil {
				return
			}
			if got += n; bytes.HasSuffix(buf[:got], []byte("\r\n\r\n")) {
				got = 0
				if _, err := c.Write(answer); err != nil {
					return
				}
			}
		}
	}
	run := func(b *testing.B, addr string) {
		c, err := net.Dial("tcp4", addr)
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		buf := make([]byte, len(answer))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := io.WriteString(c, benchGet); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(c, buf); err != nil {
				b.Fatal(err)
			}
		}
	}
	for _, goroutines := range []bool{false, true} {
		b.Run(fmt.Sprintf("same node/goroutines=%v", goroutines), func(b *testing.B) {
			n := oneNode(b, nodeOptions{goroutines: goroutines})
			n.raw(app, 80)
			run(b, n.out(clientNumber, serverPort(80)))
		})
		b.Run(fmt.Sprintf("tunnel/goroutines=%v", goroutines), func(b *testing.B) {
			a, s := twoNodes(b, nodeOptions{goroutines: goroutines})
			s.raw(app, 80)
			run(b, a.out(clientNumber, serverPort(80)))
		})
	}
	b.Run("direct", func(b *testing.B) {
		n := oneNode(b, nodeOptions{})
		n.raw(app, 80)
		run(b, n.apps[serverPort(80)])
	})
}

// BenchmarkDenial measures a refused request, from head to problem document.
func BenchmarkDenial(b *testing.B) {
	n := oneNode(b, nodeOptions{})
	c, err := net.Dial("tcp4", n.out(clientNumber, serverPort(80)))
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := io.WriteString(c, "GET /debug/x HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
			b.Fatal(err)
		}
		if k, err := c.Read(buf); err != nil || !bytes.Contains(buf[:k], []byte(flow.ReasonDenyRule)) {
			b.Fatal(k, err)
		}
	}
}
