// SPDX-License-Identifier: Apache-2.0

package netloop_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

const patience = 10 * time.Second // for what must happen; a test that waits longer has failed

// onBoth runs a conformance test on either engine.
func onBoth(t *testing.T, f func(*testing.T, *bench)) {
	for _, engine := range []struct {
		name       string
		goroutines bool
	}{{"epoll", false}, {"goroutines", true}} {
		t.Run(engine.name, func(t *testing.T) { f(t, &bench{t: t, goroutines: engine.goroutines}) })
	}
}

// TestMain opens what package net keeps open for the life of the process, so that it is not counted as a leak.
func TestMain(m *testing.M) {
	if ln, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		ln.Close()
	}
	os.Exit(m.Run())
}

// bench makes an engine and asserts at the end of the test that nothing of it is left.
type bench struct {
	t          testing.TB
	goroutines bool
	log        logged
	*netloop.Engine
}

// start makes the engine.
func (b *bench) start(opt netloop.Options) *bench {
	b.t.Helper()
	opt.Goroutines = b.goroutines
	opt.Logger = slog.New(slog.NewTextHandler(&b.log, nil))
	if opt.Loops == 0 {
		opt.Loops = 2
	}
	goroutines, descriptors := runtime.NumGoroutine(), openDescriptors(b.t)
	e, err := netloop.New(opt)
	if err != nil {
		b.t.Fatal(err)
	}
	b.Engine = e
	b.t.Cleanup(func() {
		if b.t.Failed() {
			b.t.Logf("%+v", e.Stats())
		}
		_ = e.Close()
		eventually(b.t, "goroutines end", func() bool { return runtime.NumGoroutine() <= goroutines })
		eventually(b.t, "descriptors are closed", func() bool { return openDescriptors(b.t) <= descriptors })
		if s := e.Stats(); s.Conns != 0 || s.Tasks != 0 {
			b.t.Errorf("after Close: %+v", s)
		}
	})
	return b
}

// logged keeps what an engine logs.
type logged struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) has(s string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.text.String(), s)
}

func openDescriptors(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v\n%s", what, patience, stacks())
		}
	}
}

func stacks() []byte {
	buf := make([]byte, 1<<16)
	return buf[:runtime.Stack(buf, true)]
}

// serve listens on loopback and returns the address.
func (b *bench) serve(h func(*netloop.Task, *netloop.Conn)) string {
	b.t.Helper()
	fd := listenTCP(b.t)
	defer unix.Close(fd)
	ln, err := b.Serve(fd, h)
	if err != nil {
		b.t.Fatal(err)
	}
	return ln.Addr().String()
}

func listenTCP(t testing.TB) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 4096); err != nil {
		t.Fatal(err)
	}
	return fd
}

// dial is an ordinary client.
func dial(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// connecting is a socket on which a non-blocking connect was started.
func connecting(t testing.TB, addr string) int {
	t.Helper()
	a, err := net.ResolveTCPAddr("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: a.Port, Addr: [4]byte(a.IP.To4())}); err != nil && !errors.Is(err, syscall.EINPROGRESS) {
		unix.Close(fd)
		t.Fatal(err)
	}
	return fd
}

// in runs f as a task and waits for it.
func (b *bench) in(f func(*netloop.Task)) {
	b.t.Helper()
	done := make(chan struct{})
	b.Go(func(t *netloop.Task) {
		defer close(done)
		f(t)
	})
	await(b.t, "task", done)
}

func await(t testing.TB, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s: not done within %v\n%s", what, patience, stacks())
	}
}

var keys = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"server"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
})

func serverTLS() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{keys()}}
}

func clientTLS() *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(keys().Leaf)
	return &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: "server"}
}
