// SPDX-License-Identifier: Apache-2.0

package sockets

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

var testPorts = Ports{Outbound: 15001, Inbound: 15006, Tunnel: 15008}

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func open(t testing.TB, n *testenv.Netns) *Netns {
	t.Helper()
	ns, err := Open(fmt.Sprintf("/proc/self/fd/%d", n.File.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

func descriptors(t testing.TB) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func TestNetns(t *testing.T) {
	n := testenv.NewNetns(t)
	ns := open(t, n)
	if ns.Cookie() != n.Cookie || ns.Cookie() == 0 {
		t.Errorf("cookie %d, want %d", ns.Cookie(), n.Cookie)
	}
	own, err := Own()
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if own.Cookie() == ns.Cookie() || own.Inode() == ns.Inode() {
		t.Error("two namespaces look the same")
	}
	for _, path := range []string{"/proc/self/ns/mnt", "/proc/self/ns/user", "/dev/null", "/proc/none"} {
		if _, err := Open(path); err == nil {
			t.Errorf("%s was taken for a netns", path)
		}
	}
}

func TestInComesBackHome(t *testing.T) {
	ns := open(t, testenv.NewNetns(t))
	where := func() string {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		s, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	home := where()
	before := descriptors(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				inside := ""
				if err := ns.In(func() error { inside = where(); return nil }); err != nil {
					t.Error(err)
				}
				if want := fmt.Sprintf("net:[%d]", ns.Inode()); inside != want {
					t.Errorf("inside is %s, want %s", inside, want)
				}
				if got := where(); got != home {
					t.Errorf("a thread was left in %s", got)
				}
			}
		})
	}
	wg.Wait()
	want := errors.New("x")
	if err := ns.In(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("got %v", err)
	}
	if after := descriptors(t); after > before {
		t.Errorf("descriptors: %d, before %d", after, before)
	}
}

// TestInDiscardsThread makes the way back impossible and expects that no
// other goroutine ever meets the thread.
func TestInDiscardsThread(t *testing.T) {
	ns := open(t, testenv.NewNetns(t))
	way, err := home()
	if err != nil {
		t.Fatal(err)
	}
	kept, err := unix.FcntlInt(uintptr(way), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(kept)
	defer unix.Dup3(kept, way, unix.O_CLOEXEC)
	err = ns.In(func() error {
		home, err := home()
		if err != nil {
			return err
		}
		null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(null)
		return unix.Dup3(null, home, unix.O_CLOEXEC)
	})
	if err == nil || !strings.Contains(err.Error(), "leave netns") {
		t.Fatalf("got %v", err)
	}
	inside := fmt.Sprintf("net:[%d]", ns.Inode())
	deadline := time.Now().Add(5 * time.Second)
	for {
		strays := 0
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			if s, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); err == nil && s == inside {
				strays++
			}
		}
		if strays == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d threads are still inside", strays)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestClosedNetns(t *testing.T) {
	n := testenv.NewNetns(t)
	ns := open(t, n)
	entered, leave := make(chan struct{}), make(chan struct{})
	go ns.In(func() error { close(entered); <-leave; return nil })
	<-entered
	closed := make(chan error, 1)
	go func() { closed <- ns.Close() }()
	select {
	case <-closed:
		t.Error("closed while in use")
	case <-time.After(20 * time.Millisecond):
	}
	close(leave)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if _, err := ns.Dial(ap("127.0.0.1:1"), nil); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if _, err := ns.Addresses(); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if err := ns.Close(); err != nil {
		t.Error(err)
	}
}

func TestListen(t *testing.T) {
	n := testenv.NewNetns(t)
	ns := open(t, n)
	ls, err := ns.Listen(testPorts, DefaultBacklog)
	if err != nil {
		t.Fatal(err)
	}
	defer CloseListeners(ls)
	var got []string
	for _, l := range ls {
		got = append(got, fmt.Sprintf("%s/%d/%s", l.Kind, l.Family, l.Address))
		if proto, err := unix.GetsockoptInt(l.FD, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || proto != unix.IPPROTO_TCP {
			t.Errorf("%s: protocol %d, %v", l.Address, proto, err)
		}
		if cookie, err := unix.GetsockoptUint64(l.FD, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil || cookie != n.Cookie {
			t.Errorf("%s: in netns %d, %v", l.Address, cookie, err)
		}
	}
	want := "outbound/4/127.0.0.1:15001 outbound/6/[::1]:15001 inbound/4/127.0.0.1:15006 inbound/6/[::1]:15006 tunnel/4/0.0.0.0:15008 tunnel/6/[::]:15008"
	if strings.Join(got, " ") != want {
		t.Errorf("got  %v\nwant %s", got, want)
	}
	for _, to := range []string{"127.0.0.1:15001", "[::1]:15006", "127.0.0.1:15008", "[::1]:15008"} {
		if err := n.Do(func() error {
			c, err := net.DialTimeout("tcp", to, time.Second)
			if err == nil {
				c.Close()
			}
			return err
		}); err != nil {
			t.Errorf("%s: %v", to, err)
		}
	}
	// The second agent, or the other mesh, is told of the first.
	before := descriptors(t)
	_, err = ns.Listen(testPorts, 1)
	if c, ok := errors.AsType[*Conflict](err); !ok || c.Address.Port() != 15001 || !strings.Contains(c.Holder, fmt.Sprintf("pid %d,", os.Getpid())) {
		t.Fatalf("a second set: %v", err)
	}
	if after := descriptors(t); after != before {
		t.Errorf("descriptors: %d, before %d", after, before)
	}
}

// TestListenWaitsForWhatIsEnding: a socket that no process holds any more is
// not a conflict yet.
func TestListenWaitsForWhatIsEnding(t *testing.T) {
	n := testenv.NewNetns(t)
	ns := open(t, n)
	a := testenv.NewActor(t, nil, n)
	s, err := a.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Bind(ap("127.0.0.1:15001")), s.Listen()); err != nil {
		t.Fatal(err)
	}
	// Held in flight, on a socket nobody reads, it belongs to no process.
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := s.File()
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Sendmsg(pair[0], []byte("x"), unix.UnixRights(int(f.Fd())), nil, 0); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	go func() {
		time.Sleep(50 * time.Millisecond)
		unix.Close(pair[0])
		unix.Close(pair[1])
	}()
	ls, err := ns.Listen(testPorts, 1)
	if err != nil {
		t.Fatal(err)
	}
	CloseListeners(ls)
}

func TestListenBeforeLoopbackIsUp(t *testing.T) {
	n := testenv.NewNetns(t)
	if err := n.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(lo)
	}); err != nil {
		t.Fatal(err)
	}
	ls, err := open(t, n).Listen(testPorts, 1)
	if err != nil {
		t.Fatal(err)
	}
	CloseListeners(ls)
}

func TestConflictNamesItsHolder(t *testing.T) {
	n := testenv.NewNetns(t)
	cg := testenv.NewCgroup(t, nil)
	ns := open(t, n)
	other := testenv.NewActor(t, cg, n)
	s, err := other.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Bind(ap("0.0.0.0:15006")), s.Listen()); err != nil {
		t.Fatal(err)
	}
	before := descriptors(t)
	_, err = ns.Listen(testPorts, 1)
	if err == nil {
		t.Fatal("no conflict")
	}
	for _, want := range []string{"15006 is taken by", fmt.Sprintf("pid %d", other.PID), strings.TrimPrefix(cg.Path, testenv.CgroupMount(t)), "refusing that netns"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q lacks %q", err, want)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("descriptors: %d, before %d", after, before)
	}
}

func TestDial(t *testing.T) {
	n := testenv.NewNetns(t)
	ns := open(t, n)
	for _, network := range []struct{ name, at, to string }{
		{"tcp4", "127.0.0.1:0", "127.0.0.1"}, {"tcp6", "[::1]:0", "::1"}, {"tcp4", "127.0.0.1:0", "::ffff:127.0.0.1"},
	} {
		l := n.Listen(t, network.name, ap(network.at))
		to := netip.AddrPortFrom(netip.MustParseAddr(network.to), l.Addr().(*net.TCPAddr).AddrPort().Port())
		tagged := 0
		fd, err := ns.Dial(to, func(fd int) error {
			tagged = fd
			if _, err := unix.Getpeername(fd); err != unix.ENOTCONN {
				return fmt.Errorf("tagged after connect: %w", err)
			}
			return nil
		})
		if err != nil || fd != tagged {
			t.Fatalf("%s: %d, %v", to, fd, err)
		}
		if fl, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); fl&unix.O_NONBLOCK == 0 {
			t.Error("a dialled socket blocks")
		}
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if host := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(); host != to.Addr().Unmap() {
			t.Errorf("from %s, want %s", host, to.Addr())
		}
		c.Close()
		unix.Close(fd)
	}
	before := descriptors(t)
	stop := errors.New("no tag")
	if _, err := ns.Dial(ap("127.0.0.1:1"), func(int) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("got %v", err)
	}
	for _, to := range []netip.AddrPort{{}, ap("0.0.0.0:80"), ap("[::]:80"), ap("127.0.0.1:0"), ap("224.0.0.1:80"), ap("[ff02::1]:80"), ap("[fe80::1%lo]:80")} {
		if fd, err := ns.Dial(to, nil); err == nil || fd != -1 {
			t.Errorf("%s was dialled", to)
		}
	}
	if _, err := ns.Dial(ap("192.0.2.1:80"), nil); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("without a route: %v", err)
	}
	if after := descriptors(t); after != before {
		t.Errorf("descriptors: %d, before %d", after, before)
	}
}

func TestAdopt(t *testing.T) {
	n := testenv.NewNetns(t)
	ns := open(t, n)
	mine, other := testenv.NewCgroup(t, nil), testenv.NewCgroup(t, nil)
	server, squatter := testenv.NewActor(t, mine, n), testenv.NewActor(t, other, n)
	listen := func(a *testenv.Actor, domain int, at string) {
		t.Helper()
		s, err := a.Socket(domain, unix.SOCK_STREAM, unix.IPPROTO_TCP)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(s.Bind(ap(at)), s.Listen()); err != nil {
			t.Fatal(err)
		}
	}
	listen(server, unix.AF_INET, "127.0.0.1:8080")
	listen(server, unix.AF_INET6, "[::1]:8080")
	listen(server, unix.AF_INET, "127.0.0.1:9999")
	listen(squatter, unix.AF_INET, "127.0.0.2:8080")
	before := descriptors(t)
	got, err := ns.Adopt([]uint16{8080}, func(cgroup uint64) bool { return cgroup == mine.ID })
	if err != nil {
		t.Fatal(err)
	}
	var at []string
	for _, a := range got {
		at = append(at, a.Address.String())
		if cookie, err := unix.GetsockoptUint64(a.FD, unix.SOL_SOCKET, unix.SO_COOKIE); err != nil || cookie != a.Cookie {
			t.Errorf("%s: another socket, %v", a.Address, err)
		}
		if a.PID != server.PID || a.Cgroup != mine.ID {
			t.Errorf("%s: of process %d in cgroup %d", a.Address, a.PID, a.Cgroup)
		}
		unix.Close(a.FD)
	}
	slices.Sort(at)
	if fmt.Sprint(at) != "[127.0.0.1:8080 [::1]:8080]" {
		t.Errorf("adopted %v", at)
	}
	if after := descriptors(t); after != before {
		t.Errorf("descriptors: %d, before %d", after, before)
	}
}

func TestReservePorts(t *testing.T) {
	n := testenv.NewNetns(t)
	ns := open(t, n)
	read := func() string {
		var b []byte
		if err := n.Do(func() (err error) { b, err = os.ReadFile(reservedPorts); return err }); err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	if err := n.Do(func() error { return os.WriteFile(reservedPorts, []byte("100-102,8080\n"), 0) }); err != nil {
		t.Fatal(err)
	}
	host, err := os.ReadFile(reservedPorts)
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		ports []uint16
		want  string
	}{
		{[]uint16{8080, 9000, 103}, "100-103,8080,9000"},
		{[]uint16{9000, 9001}, "100-102,8080,9000-9001"},
		{[]uint16{101}, "100-102,8080"},
		{[]uint16{8081, 8081}, "100-102,8080-8081"},
		{nil, "100-102,8080"},
	} {
		if err := ns.ReservePorts(step.ports); err != nil {
			t.Fatal(err)
		}
		if got := read(); got != step.want {
			t.Errorf("%v: %s, want %s", step.ports, got, step.want)
		}
	}
	if now, _ := os.ReadFile(reservedPorts); !bytes.Equal(now, host) {
		t.Errorf("the host's list changed: %s", now)
	}
	if err := ns.ReservePorts([]uint16{40000, 40001, 40002}); err != nil {
		t.Fatal(err)
	}
	if err := n.Do(func() error {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40003\n"), 0); err != nil {
			return err
		}
		for range 20 {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if err := unix.Listen(fd, 1); err == nil {
				sa, err := unix.Getsockname(fd)
				if err != nil {
					return err
				}
				if port := sa.(*unix.SockaddrInet4).Port; port != 40003 {
					return fmt.Errorf("an unbound listen was given %d", port)
				}
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestParsePorts(t *testing.T) {
	for in, want := range map[string]string{"": "", "1": "1", "3,1-2,2": "1-3", "65535": "65535", "0-1": "0-1"} {
		set, err := parsePorts(in)
		if got := formatPorts(set); err != nil || got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"x", "2-1", "70000", "1-", "-1", "1 2"} {
		if _, err := parsePorts(in); err == nil {
			t.Errorf("%q was read", in)
		}
	}
}

func TestAddressesAndTheirChanges(t *testing.T) {
	n := testenv.NewNetns(t)
	ns := open(t, n)
	ctx, cancel := context.WithCancel(context.Background())
	told := make(chan []netip.Addr, 64)
	ended := make(chan error, 1)
	go func() { ended <- ns.WatchAddresses(ctx, func(a []netip.Addr) { told <- a }) }()
	next := func(want string) {
		t.Helper()
		limit := time.After(10 * time.Second)
		var last []netip.Addr
		for {
			select {
			case last = <-told:
				if fmt.Sprint(last) == want {
					return
				}
			case <-limit:
				t.Fatalf("got %v, want %s", last, want)
			}
		}
	}
	next("[127.0.0.1 ::1]")
	address := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 9, 8, 7), Mask: net.CIDRMask(24, 32)}}
	change := func(f func(netlink.Link, *netlink.Addr) error) {
		t.Helper()
		if err := n.Do(func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			return f(lo, address)
		}); err != nil {
			t.Fatal(err)
		}
	}
	change(netlink.AddrAdd)
	next("[10.9.8.7 127.0.0.1 ::1]")
	if a, err := ns.Addresses(); err != nil || fmt.Sprint(a) != "[10.9.8.7 127.0.0.1 ::1]" {
		t.Errorf("%v %v", a, err)
	}
	change(netlink.AddrDel)
	next("[127.0.0.1 ::1]")
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the watch does not end")
	}
}

func BenchmarkDial(b *testing.B) {
	n := testenv.NewNetns(b)
	ns := open(b, n)
	l := n.Listen(b, "tcp4", ap("127.0.0.1:0"))
	to := l.Addr().(*net.TCPAddr).AddrPort()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	b.ReportAllocs()
	for b.Loop() {
		fd, err := ns.Dial(to, nil)
		if err != nil {
			b.Fatal(err)
		}
		unix.Close(fd)
	}
}

func BenchmarkIn(b *testing.B) {
	ns := open(b, testenv.NewNetns(b))
	for b.Loop() {
		if err := ns.In(func() error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
