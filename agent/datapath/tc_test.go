// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/events"
	"github.com/sallyport-dev/sallyport/agent/loader"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func (n *node) index(t testing.TB, name string) (index int) {
	t.Helper()
	must(t, n.netns.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err == nil {
			index = l.Attrs().Index
		}
		return err
	}))
	return index
}

func (n *node) watch(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		must(t, n.kernel.AttachInterface(loader.Interface{NetnsFD: int(n.netns.File.Fd()), Index: n.index(t, name), Cookie: n.netns.Cookie}))
	}
}

func (n *node) detach(t testing.TB, hooks ...string) {
	t.Helper()
	for _, h := range hooks {
		l, err := link.LoadPinnedLink(filepath.Join(n.pins, "links", h), nil)
		must(t, err)
		must(t, l.Detach())
		must(t, l.Close())
	}
}

// With the connect hooks gone nothing of an enforced workload that has no
// flow entry leaves for an address that somebody claims.
func TestBackstop(t *testing.T) {
	for _, c := range []struct {
		mode flow.Mode
		want error
	}{{flow.ModeEnforce, unix.EINPROGRESS}, {flow.ModeAudit, nil}, {flow.ModeObserve, nil}} {
		t.Run(c.mode.String(), func(t *testing.T) {
			n := newNode(t, c.mode)
			_, inbound := n.listenAll(t)
			n.watch(t, "lo", "eth0")
			nobody := testenv.NewActor(t, nil, n.netns)
			n.detach(t, "connect4", "connect6")
			for _, dst := range []netip.AddrPort{address4, address6} {
				s, err := n.client.TCP(dst)
				must(t, err)
				if c.want != nil {
					must(t, s.SetTimeout(300*time.Millisecond))
				}
				if err := s.Connect(dst); !errors.Is(err, c.want) {
					t.Errorf("connect to %s: %v, want %v", dst, err, c.want)
				}
				if e := n.event(t, flow.ReasonUntagged); e.Identity != clientNumber || e.Target != serverNumber ||
					e.Destination != dst || e.Enforced != (c.mode == flow.ModeEnforce) || e.Hook != events.HookEgress {
					t.Errorf("event %+v", e)
				}
				if _, err := nobody.Dial(dst); err != nil {
					t.Errorf("without identity: %v", err)
				}
				if c.want != nil {
					_, _, err := inbound[family(dst)].Accept()
					must(t, err)
					nothingAccepted(t, inbound[family(dst)], "our inbound listener")
				}
			}
		})
	}
}

func TestBackstopAndEgress(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	n.watch(t, "lo", "eth0")
	must(t, n.SetIdentity(n.clientCgroup.ID, Identity{clientNumber, flow.ModeEnforce, FlagEgressDeny}))
	open := netip.MustParseAddrPort("192.0.2.10:9999")
	_, err := n.server.Listen(open)
	must(t, err)
	n.detach(t, "connect4")
	try := func(limit time.Duration) error {
		s, err := n.client.TCP(open)
		must(t, err)
		must(t, s.SetTimeout(limit))
		return s.Connect(open)
	}
	if err := try(200 * time.Millisecond); !errors.Is(err, unix.EINPROGRESS) {
		t.Errorf("connect: %v", err)
	}
	must(t, n.AllowEgress(EgressRule{clientNumber, netip.MustParsePrefix("192.0.2.0/24"), 9999, unix.IPPROTO_TCP}, EgressLeave))
	if err := try(5 * time.Second); err != nil {
		t.Errorf("connect to what egress allows: %v", err)
	}
}

// syn is an Ethernet frame with a TCP SYN, built by hand.
func syn(src, dst netip.AddrPort, change func(frame []byte) []byte) []byte {
	tcp := make([]byte, 20)
	binary.BigEndian.PutUint16(tcp, src.Port())
	binary.BigEndian.PutUint16(tcp[2:], dst.Port())
	tcp[12], tcp[13] = 5<<4, 2
	eth := make([]byte, 14)
	eth[0], eth[6] = 2, 2
	var ip []byte
	if dst.Addr().Is4() {
		eth[12], eth[13] = 8, 0
		ip = []byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0}
	} else {
		eth[12], eth[13] = 0x86, 0xdd
		ip = []byte{0x60, 0, 0, 0, 0, 20, 6, 64}
	}
	ip = append(append(ip, src.Addr().AsSlice()...), dst.Addr().AsSlice()...)
	frame := append(append(eth, ip...), tcp...)
	if change != nil {
		frame = change(frame)
	}
	return frame
}

// insert puts bytes into a frame and corrects the IP length.
func insert(at int, b ...byte) func([]byte) []byte {
	return func(f []byte) []byte {
		f = append(f[:at:at], append(b, f[at:]...)...)
		if f[12] == 8 {
			binary.BigEndian.PutUint16(f[16:], uint16(len(f)-14))
		} else {
			binary.BigEndian.PutUint16(f[18:], uint16(len(f)-54))
		}
		return f
	}
}

// Frames that the workload builds itself, from a packet socket and on the
// host side of its veth, where the kernel no longer knows the socket.
func TestFramesByHand(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	n.watch(t, "eth0")
	src4, src6 := netip.AddrPortFrom(address4.Addr(), 40000), netip.AddrPortFrom(address6.Addr(), 40000)
	other4 := netip.MustParseAddrPort("192.0.2.20:7777")
	remote4, remote6 := netip.MustParseAddrPort("192.0.2.20:8080"), netip.MustParseAddrPort("[2001:db8::20]:8080")
	must(t, n.Claim(remote4, serverNumber))
	must(t, n.Claim(remote6, serverNumber))
	for _, c := range []struct {
		name  string
		frame []byte
		want  bool // dropped
	}{
		{"SYN to a claimed address", syn(src4, remote4, nil), true},
		{"SYN over IPv6", syn(src6, remote6, nil), true},
		{"SYN to an address that nobody claims", syn(src4, other4, nil), false},
		{"SYN and ECN", syn(src4, remote4, func(f []byte) []byte { f[47] |= 0xc0; return f }), true},
		{"ACK", syn(src4, remote4, func(f []byte) []byte { f[47] = 0x10; return f }), false},
		{"no-operation options", func() []byte {
			return syn(src4, remote4, func(f []byte) []byte { f = insert(34, 1, 1, 1, 1)(f); f[14] = 0x46; return f })
		}(), true},
		{"loose source route", syn(src4, other4, func(f []byte) []byte { f = insert(34, 131, 4, 4, 0)(f); f[14] = 0x46; return f }), true},
		{"cut TCP header", syn(src4, other4, func(f []byte) []byte { return f[:40] }), true},
		{"data offset beyond the end", syn(src4, other4, func(f []byte) []byte { f[46] = 0xf0; return f }), true},
		{"later fragment", syn(src4, remote4, func(f []byte) []byte { f[21] = 3; return f }), false},
		{"IPv6 destination options", syn(src6, remote6, func(f []byte) []byte {
			f = insert(54, 6, 0, 1, 4, 0, 0, 0, 0)(f)
			f[20] = 60
			return f
		}), true},
		{"IPv6 routing header", syn(src6, netip.AddrPortFrom(remote6.Addr(), 1), func(f []byte) []byte {
			f = insert(54, 6, 0, 2, 0, 0, 0, 0, 0)(f)
			f[20] = 43
			return f
		}), true},
		{"two VLAN tags", func() []byte {
			f := syn(src4, remote4, nil)
			return append(f[:12:12], append([]byte{0x88, 0xa8, 0, 0, 0x81, 0, 0, 0}, f[12:]...)...)
		}(), true},
		{"ARP", append(append([]byte{}, syn(src4, other4, nil)[:12]...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 1), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := n.refused(t, flow.ReasonUntagged)
			// A drop shows to the sender of a frame.
			if err := n.client.SendFrame(n.index(t, "eth0"), c.frame); (errors.Is(err, unix.ENOBUFS)) != c.want {
				t.Errorf("send: %v", err)
			}
			if got := n.refused(t, flow.ReasonUntagged) > before; got != c.want {
				t.Errorf("dropped %v, want %v", got, c.want)
			}
		})
	}
	child := testenv.NewActor(t, testenv.NewCgroup(t, testenv.NewCgroup(t, n.clientCgroup)), n.netns)
	if err := child.SendFrame(n.index(t, "eth0"), syn(src4, remote4, nil)); !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("a frame of a grandchild of the workload: %v", err)
	}
	// The same frames of a process without identity pass.
	before := n.refused(t, flow.ReasonUntagged)
	must(t, testenv.NewActor(t, nil, n.netns).SendFrame(n.index(t, "eth0"), syn(src4, remote4, nil)))
	if n.refused(t, flow.ReasonUntagged) != before {
		t.Error("a frame of a process without identity was dropped")
	}
}

func TestHostSideOfAVeth(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	host := testenv.NewNetns(t)
	_, index := testenv.Veth(t, "pod0", n.netns, host, []netip.Prefix{netip.MustParsePrefix("198.51.100.1/24")},
		[]netip.Prefix{netip.MustParsePrefix("198.51.100.2/24")})
	remote := netip.MustParseAddrPort("198.51.100.2:8080")
	must(t, n.Claim(remote, serverNumber))
	must(t, n.kernel.AttachInterface(loader.Interface{NetnsFD: int(host.File.Fd()), Index: index, Cookie: n.netns.Cookie, Confined: true}))
	l := host.Listen(t, "tcp4", remote)
	n.direct(t, remote, time.Minute)
	if _, err := n.client.Dial(remote); err != nil {
		t.Errorf("a flow that connect let through: %v", err)
	}
	if _, err := l.Accept(); err != nil {
		t.Fatal(err)
	}
	must(t, n.DeleteVerdicts(VerdictFilter{}))
	if _, err := n.client.Dial(remote); err != nil {
		t.Error(err)
	}
	if _, _, err := outbound[4].Accept(); err != nil {
		t.Error(err)
	}
	n.detach(t, "connect4")
	s, err := n.client.TCP(remote)
	must(t, err)
	must(t, s.SetTimeout(300*time.Millisecond))
	if err := s.Connect(remote); !errors.Is(err, unix.EINPROGRESS) {
		t.Errorf("an untagged SYN passed the host side: %v", err)
	}
	n.event(t, flow.ReasonUntagged)
}

func TestSamples(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	n.watch(t, "lo", "eth0")
	samples, err := n.Samples()
	must(t, err)
	t.Cleanup(func() { samples.Close() })
	next := func() (events.Sample, error) {
		samples.SetDeadline(time.Now().Add(2 * time.Second))
		return samples.Read()
	}
	long := strings.Repeat("x", 200)
	for _, c := range []struct {
		dst              netip.AddrPort
		request          string
		method, path     string
		host             string
		pathCut, hostCut bool
		nothing          bool
	}{
		{dst: address4, request: "GET /a/b?secret=1 HTTP/1.1\r\nAccept: */*\r\nhOsT:  example.test:80\r\nX: y\r\n\r\n", method: "GET", path: "/a/b", host: "example.test:80"},
		{dst: address6, request: "OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", method: "OPTIONS", path: "*", host: "h"},
		{dst: mapped4, request: "POST / HTTP/1.1\r\nHostile: no\r\nXHost: no\r\n\r\nHost: body", method: "POST", path: "/"},
		{dst: address4, request: "GET /" + long + " HTTP/1.1\r\nHost: " + long + "\r\n\r\n", method: "GET", path: "/" + long[:127], host: long[:64], pathCut: true, hostCut: true},
		{dst: address4, request: "GET http://user:secret@h/x HTTP/1.1\r\nHost: h\r\n\r\n", method: "GET", host: "h"},
		{dst: address4, request: "GET /x;jsessionid=secret HTTP/1.1\r\nHost: h\r\n\r\n", method: "GET", path: "/x", host: "h"},
		{dst: address4, request: "DELETE /x HTTP/1.0\n\nHost: body", method: "DELETE", path: "/x"},
		{dst: address4, request: "GET /unfinished-request-line", method: "", nothing: true},
		{dst: address4, request: "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03aaaaaaaaaaaa", nothing: true},
		{dst: address4, request: "GETTING /longer HTTP/1.1\r\n\r\n", nothing: true},
	} {
		t.Run(fmt.Sprintf("%.20q", c.request), func(t *testing.T) {
			s, err := n.client.Dial(c.dst)
			must(t, err)
			a, peer, err := outbound[family(c.dst)].Accept()
			must(t, err)
			must(t, s.Send([]byte(c.request)))
			_, err = a.Recv(4096)
			must(t, err)
			// Never a second one for a flow.
			must(t, s.Send([]byte("GET /second HTTP/1.1\r\nHost: second\r\n\r\n")))
			_, err = a.Recv(4096)
			must(t, err)
			got, err := next()
			must(t, err)
			want := events.Sample{
				Time: got.Time, NetnsCookie: n.netns.Cookie, Source: unmapped(peer), Destination: got.Destination, Identity: clientNumber,
				Payload: uint32(len(c.request)), Interface: n.index(t, "lo"), Kind: 1, Method: c.method, Path: c.path, Host: c.host,
				PathCut: c.pathCut, HostCut: c.hostCut,
			}
			if c.nothing {
				want.Method, want.Path, want.Host, want.Payload = "GET", "/second", "second", got.Payload
			}
			if got != want || got.Destination.Port() != 15001 {
				t.Errorf("sample %+v\nwant   %+v", got, want)
			}
			must(t, s.Close())
			must(t, a.Close())
		})
	}
}

// program returns the tcx program on an interface of the node.
func (n *node) program(t testing.TB, name, direction string) *ebpf.Program {
	t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(n.pins, "tcx", fmt.Sprintf("%d-%d-%s", n.netns.Cookie, n.index(t, name), direction)), nil)
	must(t, err)
	defer l.Close()
	info, err := l.Info()
	must(t, err)
	p, err := ebpf.NewProgramFromID(info.Program)
	must(t, err)
	t.Cleanup(func() { p.Close() })
	return p
}

// request is an Ethernet frame with the segment of an established connection.
func request(sport uint16, text string) []byte {
	return syn(netip.AddrPortFrom(address4.Addr(), sport), netip.MustParseAddrPort("192.0.2.20:80"), func(f []byte) []byte {
		f = append(f, text...)
		f[47] = 0x18
		binary.BigEndian.PutUint16(f[16:], uint16(len(f)-14))
		return f
	})
}

func run(t testing.TB, p *ebpf.Program, frame []byte) {
	t.Helper()
	if _, err := p.Run(&ebpf.RunOptions{Data: frame}); err != nil {
		t.Fatal(err)
	}
}

// A connection whose request line never ends spends three times, and leaves
// the rest of the budget to the others.
func TestEndlessRequestLine(t *testing.T) {
	const budget = 4
	n := newNode(t, flow.ModeEnforce, func(_ *loader.Options, o *Options) { o.SampleBudget = budget })
	n.watch(t, "eth0")
	p := n.program(t, "eth0", "egress")
	for range 500 {
		run(t, p, request(1, "GET /and/so/on/and/so/on"))
	}
	run(t, p, request(2, "GET /other HTTP/1.1\r\nHost: x\r\n\r\n"))
	c, err := n.Counters()
	must(t, err)
	if c.SamplesLimited != 0 || c.Samples != 1 {
		t.Errorf("counters %+v", c)
	}
}

// A flood of samples stays within its budget and its ring, one of events
// within its identity's share, and another identity's refusal is told.
func TestFloodsLoseNoRefusal(t *testing.T) {
	const limit = 10
	n := newNode(t, flow.ModeEnforce, func(_ *loader.Options, o *Options) { o.SampleBudget, o.EventLimit = 100, limit })
	n.listenAll(t)
	n.watch(t, "eth0")
	p := n.program(t, "eth0", "egress")
	sport := uint16(0)
	flood := func(count int) {
		t.Helper()
		for range count {
			sport++
			run(t, p, request(sport, "GET /flood HTTP/1.1\r\nHost: x\r\n\r\n"))
		}
	}
	flood(1000)
	c, err := n.Counters()
	must(t, err)
	// The flood may straddle seconds, each with a budget of its own.
	if c.SamplesLimited == 0 || c.Samples+c.SamplesLimited != 1000 {
		t.Errorf("with a budget: %+v", c)
	}
	must(t, n.SetBudget(1<<30))
	flood(10000)
	if c, err = n.Counters(); err != nil || c.SamplesLost == 0 {
		t.Errorf("without a budget: %+v, %v", c, err)
	}
	raw, err := n.client.TCP(address4)
	must(t, err)
	must(t, n.SetIdentity(n.clientCgroup.ID, Identity{clientNumber, flow.ModeEnforce, FlagRevoked}))
	for range 500 {
		if err := raw.Connect(address4); !errors.Is(err, unix.EPERM) {
			t.Fatal(err)
		}
	}
	if _, err := n.server.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP); !errors.Is(err, unix.EPROTONOSUPPORT) {
		t.Fatal(err)
	}
	if e := n.event(t, flow.ReasonSocketKind); e.Identity != serverNumber {
		t.Errorf("event %+v", e)
	}
	c, err = n.Counters()
	must(t, err)
	if c.EventsLost != 0 || c.EventsLimited == 0 || c.Refused[flow.ReasonIdentityRevoked] != 500 {
		t.Errorf("counters %+v", c)
	}
}
