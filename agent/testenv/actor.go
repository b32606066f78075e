// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const actorVar = "SALLYPORT_TEST_ACTOR"

// Main runs the tests of a package whose tests use an Actor; its TestMain
// calls nothing else. In the process of an Actor it does what it is told on
// descriptor 3 instead.
func Main(m *testing.M) {
	if os.Getenv(actorVar) != "" {
		serveActor(3)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Actor is a process in a cgroup and a network namespace that makes the
// socket calls a test asks for, one thread each, and reports their errors as
// they came from the kernel.
type Actor struct {
	PID  int
	line int

	mu      sync.Mutex
	last    uint64
	pending map[uint64]chan answer
}

type question struct {
	ID   uint64
	Op   string
	FD   int
	Args [3]int
	Addr netip.AddrPort
	Data []byte
}

type answer struct {
	ID    uint64
	Errno syscall.Errno
	FD    int
	Addr  netip.AddrPort
	Data  []byte
	file  *os.File
}

// NewActor starts an actor; nil stands for the test's own cgroup or network
// namespace. It ends with the test.
func NewActor(t testing.TB, cg *Cgroup, n *Netns) *Actor {
	t.Helper()
	RequireRoot(t)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "actor")
	defer theirs.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), actorVar+"=1")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	received := make(chan struct{})
	a := &Actor{line: pair[0], pending: map[uint64]chan answer{}}
	Start(t, cg, n, cmd)
	a.PID = cmd.Process.Pid
	go func() {
		defer close(received)
		a.receive()
	}()
	t.Cleanup(func() {
		_ = unix.Shutdown(a.line, unix.SHUT_RDWR)
		<-received
		unix.Close(a.line)
	})
	return a
}

// Wait waits for an actor that was killed: its sockets are closed then.
func (a *Actor) Wait(t testing.TB) {
	t.Helper()
	fd, err := unix.PidfdOpen(a.PID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if ended, err := Ended(fd, 10*time.Second); !ended {
		t.Fatalf("the actor is still there (%v)", err)
	}
}

// Ended waits for the end of a process by its pidfd (pidfd_open(2)), and says
// whether it came in time.
func Ended(pidfd int, limit time.Duration) (bool, error) {
	for late := time.Now().Add(limit); ; {
		left := max(0, time.Until(late))
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		if !errors.Is(err, unix.EINTR) {
			return n == 1, err
		}
	}
}

func (a *Actor) receive() {
	for {
		var ans answer
		file, err := recvJSON(a.line, &ans)
		if err != nil {
			break
		}
		ans.file = file
		a.mu.Lock()
		c := a.pending[ans.ID]
		delete(a.pending, ans.ID)
		a.mu.Unlock()
		if c != nil {
			c <- ans
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, c := range a.pending {
		c <- answer{Errno: unix.EPIPE}
		delete(a.pending, id)
	}
	a.pending = nil
}

func (a *Actor) call(q question, file *os.File) (answer, error) {
	c := make(chan answer, 1)
	a.mu.Lock()
	if a.pending == nil {
		a.mu.Unlock()
		return answer{}, unix.EPIPE
	}
	a.last++
	q.ID = a.last
	a.pending[q.ID] = c
	a.mu.Unlock()
	if err := sendJSON(a.line, &q, file); err != nil {
		return answer{}, err
	}
	ans := <-c
	if ans.Errno != 0 {
		return ans, ans.Errno
	}
	return ans, nil
}

// Sock is a socket of an actor. Every call waits at most for the socket's
// time-out, 5 s unless set.
type Sock struct {
	Actor *Actor
	FD    int // in the actor
}

// Socket is socket(2), the socket blocking with a time-out of 5 s.
func (a *Actor) Socket(domain, typ, proto int) (*Sock, error) {
	ans, err := a.call(question{Op: "socket", Args: [3]int{domain, typ, proto}}, nil)
	if err != nil {
		return nil, err
	}
	return &Sock{a, ans.FD}, nil
}

// TCP makes a plain TCP socket of the family of addr.
func (a *Actor) TCP(addr netip.AddrPort) (*Sock, error) {
	domain := unix.AF_INET
	if addr.Addr().Is6() { // also the v4-mapped ones
		domain = unix.AF_INET6
	}
	return a.Socket(domain, unix.SOCK_STREAM, unix.IPPROTO_TCP)
}

// Dial makes a TCP socket and connects it.
func (a *Actor) Dial(addr netip.AddrPort) (*Sock, error) {
	s, err := a.TCP(addr)
	if err != nil {
		return nil, err
	}
	if err := s.Connect(addr); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// Listen makes a TCP socket with SO_REUSEADDR, binds it and listens.
func (a *Actor) Listen(addr netip.AddrPort) (*Sock, error) {
	s, err := a.TCP(addr)
	if err != nil {
		return nil, err
	}
	if err := s.SetInt(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err == nil {
		if err = s.Bind(addr); err == nil {
			err = s.Listen()
		}
		if err == nil {
			return s, nil
		}
		_ = s.Close()
		return nil, err
	}
	return nil, err
}

// Adopt hands a descriptor to the actor (SCM_RIGHTS).
func (a *Actor) Adopt(f *os.File) (*Sock, error) {
	ans, err := a.call(question{Op: "adopt"}, f)
	if err != nil {
		return nil, err
	}
	return &Sock{a, ans.FD}, nil
}

// SendFrame sends a whole link-layer frame out of an interface, from a packet
// socket.
func (a *Actor) SendFrame(ifindex int, frame []byte) error {
	_, err := a.call(question{Op: "frame", Args: [3]int{ifindex}, Data: frame}, nil)
	return err
}

func (s *Sock) do(q question) (answer, error) {
	q.FD = s.FD
	return s.Actor.call(q, nil)
}

// Bind is bind(2).
func (s *Sock) Bind(addr netip.AddrPort) error {
	_, err := s.do(question{Op: "bind", Addr: addr})
	return err
}

// Listen is listen(2) with a backlog of 16.
func (s *Sock) Listen() error {
	_, err := s.do(question{Op: "listen"})
	return err
}

// Connect is connect(2). An attempt that outlasts the time-out is
// EINPROGRESS.
func (s *Sock) Connect(addr netip.AddrPort) error {
	_, err := s.do(question{Op: "connect", Addr: addr})
	return err
}

// Disconnect is connect(2) to AF_UNSPEC.
func (s *Sock) Disconnect() error {
	_, err := s.do(question{Op: "disconnect"})
	return err
}

// Accept is accept(2) with the peer's address as it shows there.
func (s *Sock) Accept() (*Sock, netip.AddrPort, error) {
	ans, err := s.do(question{Op: "accept"})
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	return &Sock{s.Actor, ans.FD}, ans.Addr, nil
}

// Peer is getpeername(2).
func (s *Sock) Peer() (netip.AddrPort, error) {
	ans, err := s.do(question{Op: "getpeername"})
	return ans.Addr, err
}

// Local is getsockname(2).
func (s *Sock) Local() (netip.AddrPort, error) {
	ans, err := s.do(question{Op: "getsockname"})
	return ans.Addr, err
}

// Send sends all of b.
func (s *Sock) Send(b []byte) error {
	_, err := s.do(question{Op: "send", Data: b})
	return err
}

// SendTo is sendto(2).
func (s *Sock) SendTo(b []byte, addr netip.AddrPort) error {
	_, err := s.do(question{Op: "sendto", Data: b, Addr: addr})
	return err
}

// SendFast is sendto(2) with MSG_FASTOPEN, which connects.
func (s *Sock) SendFast(b []byte, addr netip.AddrPort) error {
	_, err := s.do(question{Op: "sendto", Args: [3]int{unix.MSG_FASTOPEN}, Data: b, Addr: addr})
	return err
}

// Recv receives once, up to n bytes; none is the end of the stream.
func (s *Sock) Recv(n int) ([]byte, error) {
	ans, err := s.do(question{Op: "recv", Args: [3]int{n}})
	return ans.Data, err
}

// SetInt is setsockopt(2) with an int.
func (s *Sock) SetInt(level, opt, value int) error {
	_, err := s.do(question{Op: "setint", Args: [3]int{level, opt, value}})
	return err
}

// SetString is setsockopt(2) with bytes.
func (s *Sock) SetString(level, opt int, value string) error {
	_, err := s.do(question{Op: "setstring", Args: [3]int{level, opt}, Data: []byte(value)})
	return err
}

// SetTimeout sets how long a call on the socket may take.
func (s *Sock) SetTimeout(d time.Duration) error {
	_, err := s.do(question{Op: "timeout", Args: [3]int{int(d)}})
	return err
}

// Close is close(2).
func (s *Sock) Close() error {
	_, err := s.do(question{Op: "close"})
	return err
}

// File returns a duplicate of the socket in the test's own process.
func (s *Sock) File() (*os.File, error) {
	ans, err := s.do(question{Op: "give"})
	if err != nil {
		return nil, err
	}
	if ans.file == nil {
		return nil, fmt.Errorf("receive socket from actor: %w", unix.EBADF)
	}
	return ans.file, nil
}
