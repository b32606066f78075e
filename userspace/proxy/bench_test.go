// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
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

// BenchmarkWrk has wrk ask nginx for 1 KiB, directly, on one node and through
// a tunnel whose two ends are in this process. It reports requests a second
// and the CPU time of this process (kernel included) for 100,000 requests;
// -benchtime is ignored.
func BenchmarkWrk(b *testing.B) {
	addr := startNginx(b, nil)
	for _, conns := range []string{"1", "64", "512"} {
		for _, goroutines := range []bool{false, true} {
			b.Run(fmt.Sprintf("same node/c=%s/goroutines=%v", conns, goroutines), func(b *testing.B) {
				n := oneNode(b, nodeOptions{goroutines: goroutines})
				n.at(addr, 80)
				wrk(b, conns, n.out(clientNumber, serverPort(80)))
			})
			b.Run(fmt.Sprintf("tunnel/c=%s/goroutines=%v", conns, goroutines), func(b *testing.B) {
				a, s := twoNodes(b, nodeOptions{goroutines: goroutines})
				s.at(addr, 80)
				wrk(b, conns, a.out(clientNumber, serverPort(80)))
			})
		}
		b.Run("direct/c="+conns, func(b *testing.B) { wrk(b, conns, addr) })
	}
}

func wrk(b *testing.B, conns, addr string) {
	b.Helper()
	if _, err := exec.LookPath("wrk"); err != nil {
		b.Skip("wrk is not installed")
	}
	for b.Loop() {
		var before, after unix.Rusage
		_ = unix.Getrusage(unix.RUSAGE_SELF, &before)
		out, err := exec.Command("wrk", "-t1", "-c"+conns, "-d2s", "--latency", "http://"+addr+"/kib").CombinedOutput()
		_ = unix.Getrusage(unix.RUSAGE_SELF, &after)
		if err != nil || bytes.Contains(out, []byte("Non-2xx")) || bytes.Contains(out, []byte("Socket errors")) {
			b.Fatalf("%v: %s", err, out)
		}
		rate, total := 0.0, 0.0
		for line := range strings.Lines(string(out)) {
			_, _ = fmt.Sscanf(strings.TrimSpace(line), "Requests/sec: %f", &rate)
			if strings.Contains(line, "requests in") {
				_, _ = fmt.Sscanf(strings.TrimSpace(line), "%f requests in", &total)
			}
		}
		cpu := float64(after.Utime.Nano()+after.Stime.Nano()-before.Utime.Nano()-before.Stime.Nano()) / 1e9
		b.ReportMetric(rate, "req/s")
		b.ReportMetric(cpu/total*1e5, "cpu-s/100k")
	}
}

// BenchmarkBulk has curl take 256 MiB from nginx; it reports the CPU time of
// this process, kernel included, for one GiB.
func BenchmarkBulk(b *testing.B) {
	const size = 256 << 20
	addr := startNginx(b, make([]byte, size))
	get := func(b *testing.B, addr string) {
		b.Helper()
		for b.Loop() {
			var before, after unix.Rusage
			_ = unix.Getrusage(unix.RUSAGE_SELF, &before)
			if out, err := exec.Command("curl", "-sSf", "-o", "/dev/null", "http://"+addr+"/large").CombinedOutput(); err != nil {
				b.Fatalf("%v: %s", err, out)
			}
			_ = unix.Getrusage(unix.RUSAGE_SELF, &after)
			cpu := float64(after.Utime.Nano()+after.Stime.Nano()-before.Utime.Nano()-before.Stime.Nano()) / 1e9
			b.ReportMetric(cpu*(1<<30)/size, "cpu-s/GiB")
		}
	}
	b.Run("direct", func(b *testing.B) { get(b, addr) })
	b.Run("same node", func(b *testing.B) {
		n := oneNode(b, nodeOptions{})
		n.at(addr, 80)
		get(b, n.out(clientNumber, serverPort(80)))
	})
	b.Run("tunnel", func(b *testing.B) {
		a, s := twoNodes(b, nodeOptions{})
		s.at(addr, 80, 7)
		get(b, a.out(clientNumber, serverPort(80)))
	})
}

// BenchmarkIdle reports what an idle kept connection holds in memory, both
// sides of the proxy, after one request each.
func BenchmarkIdle(b *testing.B) {
	const conns = 2000
	for b.Loop() {
		n := oneNode(b, nodeOptions{change: func(o *Options) { o.MaxPerIdentity = 2 * conns }})
		n.raw(func(c *net.TCPConn) {
			_ = c.SetDeadline(time.Time{})
			buf := make([]byte, 512)
			for {
				if _, err := c.Read(buf); err != nil {
					return
				}
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		}, 80)
		addr := n.out(clientNumber, serverPort(80))
		var before, after runtime.MemStats
		list := make([]net.Conn, conns)
		direct := func(addr string) (heap, stack uint64) {
			runtime.GC()
			runtime.ReadMemStats(&before)
			for i := range list {
				c, err := net.Dial("tcp4", addr)
				if err != nil {
					b.Fatal(err)
				}
				list[i] = c
				io.WriteString(c, benchGet)
				if _, err := c.Read(make([]byte, 512)); err != nil {
					b.Fatal(err)
				}
			}
			for range 3 { // stacks shrink by half each time
				runtime.GC()
			}
			runtime.ReadMemStats(&after)
			for _, c := range list {
				c.Close()
			}
			return (after.HeapInuse - before.HeapInuse) / conns, (after.StackInuse - before.StackInuse) / conns
		}
		heap, stack := direct(addr)
		time.Sleep(200 * time.Millisecond)
		heapDirect, stackDirect := direct(n.apps[serverPort(80)])
		b.ReportMetric(float64(heap)-float64(heapDirect), "heap-B/conn")
		b.ReportMetric(float64(stack)-float64(stackDirect), "stack-B/conn")
	}
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

// BenchmarkTerminate has a caller speak TLS that ends at the proxy: one request
// after the other over a kept connection, and a new connection for each.
// "plaintext" is the same without TLS, "direct" a handshake with a Go server
// that has the key itself. The agent is a stand-in: its answer does not cross
// a line between processes.
func BenchmarkTerminate(b *testing.B) {
	answer := append([]byte(benchAnswer), bytes.Repeat([]byte("x"), 1024)...)
	app := func(c *net.TCPConn) {
		_ = c.SetDeadline(time.Time{})
		buf := make([]byte, 4096)
		for {
			if _, err := c.Read(buf); err != nil {
				return
			}
			if _, err := c.Write(answer); err != nil {
				return
			}
		}
	}
	pair := newAppKeyPair(b, ecKey(b), "app.example")
	config := &tls.Config{RootCAs: pair.pool, ServerName: "app.example"}
	n := oneNode(b, nodeOptions{})
	n.proxy.SetPlan(terminating(b), 2)
	n.shows(pair)
	n.raw(app, 80)
	addr := n.out(clientNumber, serverPort(80))
	one := func(b *testing.B, c net.Conn, buf []byte) {
		if _, err := io.WriteString(c, benchGet); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
	}
	for name, secured := range map[string]bool{"requests/plaintext": false, "requests/TLS": true} {
		b.Run(name, func(b *testing.B) {
			var c net.Conn = dialTCP(b, addr)
			_ = c.SetDeadline(time.Time{})
			if secured {
				c = tls.Client(c, config)
			}
			buf := make([]byte, len(answer))
			for b.Loop() {
				one(b, c, buf)
			}
		})
	}
	handshakes := func(addr string) func(*testing.B) {
		return func(b *testing.B) {
			for b.Loop() {
				c, err := net.Dial("tcp4", addr)
				if err != nil {
					b.Fatal(err)
				}
				if err := tls.Client(c, config).Handshake(); err != nil {
					b.Fatal(err)
				}
				_ = c.(*net.TCPConn).SetLinger(0)
				c.Close()
			}
		}
	}
	b.Run("handshakes/ended here", handshakes(addr))
	ln, err := tls.Listen("tcp4", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{pair.der}, PrivateKey: pair.key}}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				_ = c.(*tls.Conn).Handshake()
				_, _ = c.Read(make([]byte, 1))
				c.Close()
			}()
		}
	}()
	b.Run("handshakes/direct", handshakes(ln.Addr().String()))
}

// BenchmarkExchange sends one request of HTTP/2 after the other over one
// connection, a call of gRPC in frames that are made beforehand: client and
// application are plain sockets in this process.
func BenchmarkExchange(b *testing.B) {
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	frames := func(id uint32, list ...hpack.HeaderField) []byte {
		block.Reset()
		for _, f := range list {
			_ = enc.WriteField(f)
		}
		var out bytes.Buffer
		_ = http2.NewFramer(&out, nil).WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
		return out.Bytes()
	}
	hello := func(c net.Conn, first string) {
		_, _ = io.WriteString(c, first)
		_ = http2.NewFramer(c, c).WriteSettings()
	}
	// each answers to the frames of headers of its peer.
	each := func(c net.Conn, f func(id uint32)) error {
		fr := http2.NewFramer(io.Discard, bufio.NewReader(c))
		fr.SetReuseFrames()
		for {
			frame, err := fr.ReadFrame()
			if err != nil {
				return err
			}
			if h := frame.Header(); h.Type == http2.FrameHeaders {
				f(h.StreamID)
			}
		}
	}
	n := oneNode(b, nodeOptions{})
	n.raw(func(c *net.TCPConn) {
		_ = c.SetDeadline(time.Time{})
		hello(c, "")
		_, _ = io.ReadFull(c, make([]byte, len(http2.ClientPreface)))
		answer := frames(1, hpack.HeaderField{Name: ":status", Value: "200", Sensitive: true}, hpack.HeaderField{Name: "content-type", Value: "application/grpc", Sensitive: true},
			hpack.HeaderField{Name: "grpc-status", Value: "0", Sensitive: true})
		_ = each(c, func(id uint32) {
			binary.BigEndian.PutUint32(answer[5:], id)
			_, _ = c.Write(answer)
		})
	}, 84)
	c, err := net.Dial("tcp4", n.out(clientNumber, serverPort(84)))
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	hello(c, http2.ClientPreface)
	var request []byte
	sensitive := func(name, value string) hpack.HeaderField {
		return hpack.HeaderField{Name: name, Value: value, Sensitive: true}
	}
	request = frames(1, sensitive(":method", "POST"), sensitive(":scheme", "http"), sensitive(":path", "/t.Echo/Unary"), sensitive(":authority", "echo.example"),
		sensitive("content-type", "application/grpc"), sensitive("te", "trailers"), sensitive("user-agent", "bench"))
	request = bytes.Clone(request)
	answered := make(chan struct{}, 1)
	go func() { _ = each(c, func(uint32) { answered <- struct{}{} }) }()
	id := uint32(1)
	b.ReportAllocs()
	for b.Loop() {
		binary.BigEndian.PutUint32(request[5:], id)
		if _, err := c.Write(request); err != nil {
			b.Fatal(err)
		}
		<-answered
		id += 2
	}
}

// BenchmarkRPC has a client of gRPC call a server, one call after the other
// and 64 at once, and take a stream of 64 MiB.
func BenchmarkRPC(b *testing.B) {
	run := func(b *testing.B, addr string) {
		conn := rpcClient(b, addr, nil)
		call := func(b *testing.B) {
			if _, err := call1(b.Context(), conn, "/t.Echo/Unary", "hello"); err != nil {
				b.Fatal(err)
			}
		}
		// The framework sets GOMAXPROCS anew for each benchmark, lower than the
		// engines have raised it: their loops would keep client and server from
		// running. Two for those, beside at most two loops.
		leaf := func(name string, f func(b *testing.B)) {
			b.Run(name, func(b *testing.B) {
				defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0))))
				f(b)
			})
		}
		leaf("one", func(b *testing.B) {
			for b.Loop() {
				call(b)
			}
		})
		leaf("64", func(b *testing.B) {
			b.SetParallelism(64 / runtime.GOMAXPROCS(0))
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					call(b)
				}
			})
		})
		leaf("bulk", func(b *testing.B) {
			b.SetBytes(64 << 20)
			for b.Loop() {
				s, err := conn.NewStream(b.Context(), &grpc.StreamDesc{ServerStreams: true}, "/t.Echo/Count")
				if err != nil {
					b.Fatal(err)
				}
				err = errors.Join(s.SendMsg(wrapperspb.String("64 1048576")), s.CloseSend())
				for err == nil {
					err = s.RecvMsg(new(wrapperspb.BytesValue))
				}
				if !errors.Is(err, io.EOF) {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("same node", func(b *testing.B) {
		n := oneNode(b, nodeOptions{})
		n.rpc(84)
		run(b, n.out(clientNumber, serverPort(84)))
	})
	b.Run("tunnel", func(b *testing.B) {
		a, s := twoNodes(b, nodeOptions{})
		s.rpc(84)
		run(b, a.out(clientNumber, serverPort(84)))
	})
	b.Run("direct", func(b *testing.B) {
		n := oneNode(b, nodeOptions{})
		n.rpc(84)
		run(b, n.apps[serverPort(84)])
	})
}
