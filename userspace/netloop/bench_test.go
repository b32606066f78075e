// SPDX-License-Identifier: Apache-2.0

package netloop_test

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

// The benchmarks run the engine in a process of its own, so that its processor time can be told from the clients': this variable
// holds what that process is to be, as "engine role upstream".
const benchRole = "NETLOOP_BENCH_ROLE"

func init() {
	if role := os.Getenv(benchRole); role != "" {
		benchServer(strings.Fields(role))
		os.Exit(0)
	}
}

// benchServer serves until its standard input ends.
func benchServer(role []string) {
	raiseDescriptors()
	e, err := netloop.New(netloop.Options{Loops: 2, Goroutines: role[0] == "goroutines"})
	if err != nil {
		log.Fatal(err)
	}
	serve := map[string]func(*netloop.Task, *netloop.Conn){
		"echo":  echo,
		"relay": func(t *netloop.Task, c *netloop.Conn) { benchRelay(t, c, role[2]) },
		"idle":  func(_ *netloop.Task, c *netloop.Conn) { answerOnce(c) },
		"tls":   func(_ *netloop.Task, c *netloop.Conn) { answerOnce(tls.Server(c, serverTLS())) },
	}[role[1]]
	nl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	f, err := nl.(*net.TCPListener).File()
	if err != nil {
		log.Fatal(err)
	}
	ln, err := e.Serve(int(f.Fd()), serve)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(ln.Addr())
	_, _ = io.Copy(io.Discard, os.Stdin)
}

func answerOnce(c net.Conn) {
	buf := make([]byte, 1)
	if _, err := c.Read(buf); err == nil {
		c.Write(buf)
		c.Read(buf)
	}
}

func benchRelay(t *netloop.Task, c *netloop.Conn, to string) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		log.Print(err)
		return
	}
	a := netip.MustParseAddrPort(to)
	_ = unix.Connect(fd, &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}) // Adopt sees what became of it
	u, err := t.Adopt(fd)
	if err != nil {
		log.Print(err)
		return
	}
	_, _, _ = netloop.Relay(t, c, u, netloop.RelayOptions{Idle: time.Minute})
}

// process is a benchServer.
type process struct {
	cmd   *exec.Cmd
	stdin io.Closer
	addr  string
}

func startProcess(b testing.TB, role string) *process {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), benchRole+"="+role)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	return &process{cmd, stdin, strings.TrimSpace(line)}
}

// stop returns the processor time used.
func (p *process) stop(b testing.TB) time.Duration {
	b.Helper()
	p.stdin.Close()
	if err := p.cmd.Wait(); err != nil {
		b.Fatal(err)
	}
	return p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()
}

// resident is VmRSS in bytes.
func (p *process) resident(b testing.TB) int {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	kib := 0
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			fmt.Sscan(rest, &kib)
		}
	}
	return kib << 10
}

// roundTrips has n clients share b.N round trips of 1 KiB.
func roundTrips(b *testing.B, addr string, n int) {
	b.Helper()
	var clients []*net.TCPConn
	for range n {
		c := dial(b, addr)
		c.SetDeadline(time.Time{})
		clients = append(clients, c)
	}
	b.ResetTimer()
	var wg sync.WaitGroup
	for i, c := range clients {
		wg.Go(func() {
			buf := make([]byte, 1<<10)
			for range (b.N + n - 1 - i) / n {
				if _, err := c.Write(buf); err != nil {
					b.Error(err)
					return
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
}

func BenchmarkEcho(b *testing.B)  { benchBoth(b, "echo") }
func BenchmarkRelay(b *testing.B) { benchBoth(b, "relay") }

func benchBoth(b *testing.B, role string) {
	upstream := startProcess(b, "epoll echo")
	defer upstream.stop(b)
	for _, clients := range []int{1, 16, 64} {
		for _, engine := range []string{"epoll", "goroutines"} {
			b.Run(fmt.Sprintf("c=%d/%s", clients, engine), func(b *testing.B) {
				p := startProcess(b, engine+" "+role+" "+upstream.addr)
				roundTrips(b, p.addr, clients)
				b.ReportMetric(float64(p.stop(b))/float64(b.N), "cpu-ns/op")
			})
		}
	}
}

// BenchmarkRelayBulk sends MiBs through a relay to an echo and back.
func BenchmarkRelayBulk(b *testing.B) {
	upstream := startProcess(b, "epoll echo")
	defer upstream.stop(b)
	for _, engine := range []string{"epoll", "goroutines"} {
		b.Run(engine, func(b *testing.B) {
			p := startProcess(b, engine+" relay "+upstream.addr)
			c := dial(b, p.addr)
			c.SetDeadline(time.Time{})
			b.SetBytes(1 << 20)
			b.ResetTimer()
			var wg sync.WaitGroup
			wg.Go(func() {
				data := make([]byte, 1<<20)
				for range b.N {
					if _, err := c.Write(data); err != nil {
						b.Error(err)
						return
					}
				}
				c.CloseWrite()
			})
			if n, err := io.Copy(io.Discard, c); n != int64(b.N)<<20 || err != nil {
				b.Errorf("%d bytes, %v", n, err)
			}
			wg.Wait()
			b.StopTimer()
			b.ReportMetric(float64(p.stop(b))/float64(b.N), "cpu-ns/op")
		})
	}
}

// BenchmarkIdle reports the memory of the serving process for each of many idle connections that have spoken once.
func BenchmarkIdle(b *testing.B) {
	for _, role := range []struct {
		name  string
		conns uint64
	}{{"idle", 50_000}, {"relay", 20_000}, {"tls", 2_000}} {
		for _, engine := range []string{"epoll", "goroutines"} {
			b.Run(role.name+"/"+engine, func(b *testing.B) {
				n := min(role.conns, raiseDescriptors()-500)
				upstream := startProcess(b, "epoll idle")
				defer upstream.stop(b)
				if role.name == "relay" {
					n /= 2 // each has two descriptors in the process measured
				}
				p := startProcess(b, engine+" "+role.name+" "+upstream.addr)
				defer p.stop(b)
				before := p.resident(b)
				for i := range int(n) {
					speakOnce(b, p.addr, i, role.name == "tls")
				}
				b.ReportMetric(float64(p.resident(b)-before)/float64(n), "B/conn")
				b.ReportMetric(float64(n), "conns")
			})
		}
	}
}

// speakOnce opens a connection, from one of several source addresses since one has too few ports, and leaves it open.
func speakOnce(b *testing.B, addr string, i int, secured bool) {
	b.Helper()
	from := &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+i/20_000))}
	dialer := net.Dialer{LocalAddr: from, Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		})
	}}
	c, err := dialer.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	if secured {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true}) // the other process has a certificate of its own
	}
	buf := []byte("x")
	if _, err := c.Write(buf); err != nil {
		b.Fatal(err)
	}
	if _, err := io.ReadFull(c, buf); err != nil {
		b.Fatal(err)
	}
}

// raiseDescriptors asks for enough of them and returns how many may be open.
func raiseDescriptors() uint64 {
	const want = 51_000
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: want, Max: want}) // only root may raise the hard limit
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	return limit.Cur
}
