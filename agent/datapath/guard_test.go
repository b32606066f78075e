// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/loader"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func TestForeignSocketIsRefused(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	nobody := testenv.NewActor(t, testenv.NewCgroup(t, n.root), n.netns)
	for _, c := range []struct {
		name         string
		maker, user  *testenv.Actor
		dst          netip.AddrPort
		wantIdentity flow.IdentityNumber
	}{
		{"made by nobody, used by a workload", nobody, n.client, address4, clientNumber},
		{"made by a workload, used by nobody", n.client, nobody, address4, clientNumber},
		{"made by another workload", n.server, n.client, address4, clientNumber},
		{"made by the agent", n.agent, n.client, address4, clientNumber},
		{"made by the agent, used by nobody", n.agent, nobody, address4, 0},
		{"to an address that nobody claims", nobody, n.client, netip.MustParseAddrPort("192.0.2.20:9"), clientNumber},
		{"IPv6", nobody, n.client, address6, clientNumber},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := c.maker.TCP(c.dst)
			must(t, err)
			f, err := s.File()
			must(t, err)
			defer f.Close()
			handed, err := c.user.Adopt(f)
			must(t, err)
			if err := handed.Connect(c.dst); !errors.Is(err, unix.EPERM) {
				t.Errorf("connect: %v", err)
			}
			if e := n.event(t, flow.ReasonForeignSocket); e.Identity != c.wantIdentity || !e.Enforced {
				t.Errorf("event %+v", e)
			}
		})
	}
	nothingAccepted(t, outbound[4], "our outbound listener")
}

func TestSocketKinds(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	nobody := testenv.NewActor(t, testenv.NewCgroup(t, n.root), n.netns)
	must(t, n.netns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0)
	}))
	const sctp, udplite = 132, 136
	for _, c := range []struct {
		name               string
		domain, typ, proto int
		refused            bool
	}{
		{"TCP", unix.AF_INET, unix.SOCK_STREAM, 0, false},
		{"UDP over IPv6", unix.AF_INET6, unix.SOCK_DGRAM, 0, false},
		{"unix", unix.AF_UNIX, unix.SOCK_STREAM, 0, false},
		{"netlink", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE, false},
		{"MPTCP", unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP, true},
		{"MPTCP over IPv6", unix.AF_INET6, unix.SOCK_STREAM, unix.IPPROTO_MPTCP, true},
		{"raw", unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP, true},
		{"raw over IPv6", unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6, true},
		{"ping", unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP, true},
		{"ping over IPv6", unix.AF_INET6, unix.SOCK_DGRAM, unix.IPPROTO_ICMPV6, true},
		{"UDP-Lite", unix.AF_INET, unix.SOCK_DGRAM, udplite, true},
		{"SCTP", unix.AF_INET, unix.SOCK_STREAM, sctp, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, without := nobody.Socket(c.domain, c.typ, c.proto)
			_, err := n.client.Socket(c.domain, c.typ, c.proto)
			switch {
			case !c.refused && err != nil:
				t.Errorf("socket: %v", err)
			case c.refused && !errors.Is(err, unix.EPROTONOSUPPORT):
				t.Errorf("socket: %v", err)
			case c.refused && errors.Is(without, unix.EPROTONOSUPPORT):
				t.Logf("this kernel has none of that kind anyway")
			case c.refused && without != nil:
				t.Errorf("without identity: %v", without)
			case c.refused:
				if e := n.event(t, flow.ReasonSocketKind); e.Identity != clientNumber {
					t.Errorf("event %+v", e)
				}
			}
		})
	}
}

func TestDatagramsToClaimedAddressesAreRefused(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	for _, dst := range []netip.AddrPort{address4, address6, mapped4} {
		domain := unix.AF_INET
		if dst.Addr().Is6() {
			domain = unix.AF_INET6
		}
		s, err := n.client.Socket(domain, unix.SOCK_DGRAM, 0)
		must(t, err)
		if err := s.SendTo([]byte("x"), dst); !errors.Is(err, unix.EPERM) {
			t.Errorf("sendto %s: %v", dst, err)
		}
		if err := s.Connect(dst); !errors.Is(err, unix.EPERM) {
			t.Errorf("connect %s: %v", dst, err)
		}
		other := netip.AddrPortFrom(dst.Addr(), 53)
		if err := s.SendTo([]byte("x"), other); err != nil {
			t.Errorf("sendto %s: %v", other, err)
		}
	}
}

func TestDeviceBoundSocket(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	n.listenAll(t)
	s, err := n.client.TCP(address4)
	must(t, err)
	must(t, s.SetString(unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "eth0"))
	if err := s.Connect(address4); !errors.Is(err, unix.EPERM) {
		t.Errorf("connect: %v", err)
	}
	n.event(t, flow.ReasonDevice)
}

// To the kernel the unspecified address is loopback, and loopback names the
// netns's own protected ports, which no claim can name for a node.
func TestLoopbackDestinations(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	for dst, original := range map[string]string{
		"127.0.0.1:8080": "127.0.0.1:8080", "127.9.9.9:8080": "127.9.9.9:8080", "0.0.0.0:8080": "127.0.0.1:8080",
		"[::1]:8080": "[::1]:8080", "[::]:8080": "[::1]:8080", "[::ffff:127.0.0.1]:8080": "127.0.0.1:8080",
	} {
		t.Run(dst, func(t *testing.T) {
			want := netip.MustParseAddrPort(original)
			c, err := n.client.Dial(netip.MustParseAddrPort(dst))
			must(t, err)
			s, peer, err := outbound[family(want)].Accept()
			if err != nil {
				t.Fatalf("not proxied: %v", err)
			}
			local, err := s.Local()
			must(t, err)
			f, err := n.LookupFlow(n.netns.Cookie, peer, local)
			if err != nil || f.Value.Original() != want {
				t.Errorf("original destination %s (%v)", f.Value.Original(), err)
			}
			must(t, c.Close())
			must(t, s.Close())
		})
	}
}

func TestFlags(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	n.listenAll(t)
	open := netip.MustParseAddrPort("192.0.2.10:9999")
	_, err := n.server.Listen(open)
	must(t, err)
	set := func(f Flags) {
		t.Helper()
		must(t, n.SetIdentity(n.clientCgroup.ID, Identity{clientNumber, flow.ModeEnforce, f}))
	}
	check := func(dst netip.AddrPort, want error) {
		t.Helper()
		s, err := n.client.Dial(dst)
		if !errors.Is(err, want) {
			t.Errorf("connect to %s: %v, want %v", dst, err, want)
		}
		if err == nil {
			must(t, s.Close())
		}
	}
	t.Run("revoked", func(t *testing.T) {
		set(FlagRevoked)
		check(address4, unix.EPERM)
		check(open, unix.EPERM)
		n.event(t, flow.ReasonIdentityRevoked)
	})
	t.Run("pending", func(t *testing.T) {
		set(FlagPending)
		check(address4, unix.ECONNREFUSED)
		check(open, unix.ECONNREFUSED)
		n.event(t, flow.ReasonNotReady)
	})
	t.Run("egress", func(t *testing.T) {
		set(FlagEgressDeny)
		check(address4, nil)
		check(open, unix.EPERM)
		n.event(t, flow.ReasonEgress)
		for _, r := range []EgressRule{
			{clientNumber, netip.MustParsePrefix("192.0.2.0/28"), 9999, unix.IPPROTO_TCP},
			{clientNumber, netip.MustParsePrefix("192.0.2.10/32"), 0, unix.IPPROTO_TCP},
			{clientNumber, netip.MustParsePrefix("0.0.0.0/0"), 9999, unix.IPPROTO_TCP},
		} {
			must(t, n.AllowEgress(r, EgressLeave))
			check(open, nil)
			must(t, n.DenyEgress(r))
			check(open, unix.EPERM)
		}
		for _, r := range []EgressRule{
			{serverNumber, netip.MustParsePrefix("192.0.2.0/24"), 9999, unix.IPPROTO_TCP},
			{clientNumber, netip.MustParsePrefix("192.0.2.0/24"), 9998, unix.IPPROTO_TCP},
			{clientNumber, netip.MustParsePrefix("192.0.2.0/24"), 9999, unix.IPPROTO_UDP},
			{clientNumber, netip.MustParsePrefix("::/0"), 9998, unix.IPPROTO_TCP},
		} {
			must(t, n.AllowEgress(r, EgressLeave))
			check(open, unix.EPERM)
		}
	})
	t.Run("expired", func(t *testing.T) {
		set(FlagEgressDeny | FlagExpired)
		must(t, n.AllowEgress(EgressRule{clientNumber, netip.MustParsePrefix("192.0.2.0/24"), 9999, unix.IPPROTO_TCP}, EgressLeave))
		check(address4, nil) // the proxy says so
		check(open, unix.EPERM)
		n.event(t, flow.ReasonIdentityExpired)
		set(FlagEgressDeny)
		check(open, nil)
	})
	t.Run("the ceiling softens", func(t *testing.T) {
		set(FlagRevoked)
		must(t, n.SetCeiling(flow.ModeAudit))
		check(open, nil)
		must(t, n.SetCeiling(flow.ModeEnforce))
		check(open, unix.EPERM)
	})
}

// A cgroup inherits from its nearest ancestor before anybody scans; the
// agent's exemption is not inherited.
func TestCgroupsInherit(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	deep := testenv.NewCgroup(t, testenv.NewCgroup(t, testenv.NewCgroup(t, n.clientCgroup)))
	a := testenv.NewActor(t, deep, n.netns)
	c, err := a.Dial(address4)
	must(t, err)
	s, peer, err := outbound[4].Accept()
	must(t, err)
	local, err := s.Local()
	must(t, err)
	f, err := n.LookupFlow(n.netns.Cookie, peer, local)
	if err != nil || f.Value.Identity != uint32(clientNumber) {
		t.Errorf("flow of a grandchild: %+v, %v", f.Value, err)
	}
	must(t, c.Close())
	child := testenv.NewActor(t, testenv.NewCgroup(t, n.serverCgroup), n.netns)
	l, err := child.Listen(address4)
	if err != nil {
		t.Fatalf("a child of the server could not bind its port: %v", err)
	}
	if _, err := n.dial(t, address4, DialTag{Target: serverNumber}); err != nil {
		t.Errorf("dial of a child of the server: %v", err)
	}
	if _, _, err := l.Accept(); err != nil {
		t.Error(err)
	}
	pretender := testenv.NewActor(t, testenv.NewCgroup(t, n.agentCgroup), n.netns)
	if _, err := pretender.Listen(netip.MustParseAddrPort("127.0.0.2:15001")); !errors.Is(err, unix.EPERM) {
		t.Errorf("a child of the agent's leaf could bind our port: %v", err)
	}
}

// A unit that is started again is known before its first process runs.
func TestCgroupMadeAgainIsKnown(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	if lost := n.kernel.Lost(); len(lost) != 0 {
		t.Skipf("this kernel: %v", lost)
	}
	mount := testenv.CgroupMount(t)
	path := filepath.Join(n.root.Path, "unit.service")
	rel, err := filepath.Rel(mount, path)
	must(t, err)
	must(t, n.SetPath("/"+rel, Identity{Number: serverNumber, Mode: flow.ModeEnforce}))
	var last uint64
	for range 2 {
		cg := testenv.MakeCgroup(t, path)
		if cg.ID == last {
			t.Fatal("the cgroup has its old id: the test proves nothing")
		}
		last = cg.ID
		// A state that was drawn up before the cgroup was made spares it.
		s := n.state(flow.ModeEnforce)
		s.Paths = map[string]Identity{"/" + rel: {Number: serverNumber, Mode: flow.ModeEnforce}}
		must(t, n.Apply(s))
		a := testenv.NewActor(t, cg, n.netns)
		l, err := a.Listen(address4)
		if err != nil {
			t.Fatalf("it could not bind its port: %v", err)
		}
		must(t, l.Close())
		must(t, testenv.RemoveCgroup(path))
	}
	var left [16]byte
	must(t, n.Apply(n.state(flow.ModeEnforce)))
	if err := n.maps.IdentityByCgroup.Lookup(last, &left); err == nil {
		t.Error("the identity of a cgroup that is gone is still there")
	}
	cg := testenv.MakeCgroup(t, path)
	if _, err := testenv.NewActor(t, cg, n.netns).Listen(address4); !errors.Is(err, unix.EPERM) {
		t.Errorf("after the path was deleted: %v", err)
	}
}

// With no room for one more cgroup the kernel counts each that it could not
// make known; those beneath a known one inherit, and the scan makes room.
func TestFullIdentityMapIsCounted(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	if lost := n.kernel.Lost(); len(lost) != 0 {
		t.Skipf("this kernel: %v", lost)
	}
	path := filepath.Join(n.root.Path, "unit.service")
	rel, err := filepath.Rel(testenv.CgroupMount(t), path)
	must(t, err)
	s := n.state(flow.ModeEnforce)
	s.Paths = map[string]Identity{"/" + rel: {Number: clientNumber, Mode: flow.ModeEnforce}}
	must(t, n.Apply(s))
	other := Identity{Number: serverNumber}.record()
	for id := uint64(1 << 50); err == nil; id++ {
		err = full(n.maps.IdentityByCgroup.Put(id, &other))
	}
	if !errors.Is(err, ErrFull) {
		t.Fatal(err)
	}
	cg := testenv.MakeCgroup(t, path)
	if got := n.refused(t, flow.ReasonMapFull); got != 1 {
		t.Errorf("counted %d times", got)
	}
	outbound, _ := n.listenAll(t)
	proxied := func(cg *testenv.Cgroup) {
		t.Helper()
		_, err := testenv.NewActor(t, cg, n.netns).Dial(address4)
		must(t, err)
		if _, _, err := outbound[4].Accept(); err != nil {
			t.Errorf("not proxied: %v", err)
		}
	}
	proxied(testenv.NewCgroup(t, n.clientCgroup))
	s.Identities[cg.ID] = s.Paths["/"+rel]
	must(t, n.Apply(s))
	proxied(cg)
}

func TestFullFlowMapRefuses(t *testing.T) {
	n := newNode(t, flow.ModeEnforce, func(l *loader.Options, o *Options) { l.FlowEntries, o.FlowQuota = 64, 20 })
	n.listenAll(t)
	if _, err := n.server.Listen(address4); err != nil {
		t.Fatal(err)
	}
	fill := func(dial func() (*testenv.Sock, error)) (open []*testenv.Sock, err error) {
		for range 100 {
			s, err := dial()
			if err != nil {
				return open, err
			}
			open = append(open, s)
		}
		return open, nil
	}
	drop := func(socks []*testenv.Sock) {
		for _, s := range socks {
			// Reset, so that none lingers for a server that does not accept.
			must(t, s.SetString(unix.SOL_SOCKET, unix.SO_LINGER, "\x01\x00\x00\x00\x00\x00\x00\x00"))
			must(t, s.Close())
		}
	}
	socks, err := fill(func() (*testenv.Sock, error) {
		s, err := n.client.TCP(address4)
		if err == nil {
			must(t, s.SetTimeout(20*time.Millisecond)) // the backlog is small, the entry is there all the same
			if err = s.Connect(address4); errors.Is(err, unix.EINPROGRESS) {
				err = nil
			}
		}
		return s, err
	})
	if !errors.Is(err, unix.EPERM) || len(socks) != 20 {
		t.Errorf("quota: %d connections, then %v", len(socks), err)
	}
	if e := n.event(t, flow.ReasonMapFull); e.Identity != clientNumber {
		t.Errorf("event %+v", e)
	}
	// Only the one that used its quota up is refused.
	d, err := n.dial(t, address4, DialTag{Target: serverNumber})
	if err != nil {
		t.Errorf("dial for another identity: %v", err)
	}
	must(t, d.Close())
	drop(socks)
	n.noFlows(t)
	n.mu.Lock()
	n.control.FlowLimit = 5
	err = n.writeControl()
	n.mu.Unlock()
	must(t, err)
	var dials []*testenv.Sock
	for range 10 {
		var s *testenv.Sock
		if s, err = n.dial(t, address4, DialTag{Target: serverNumber}); err != nil {
			break
		}
		dials = append(dials, s)
	}
	if !errors.Is(err, unix.EPERM) || len(dials) != 5 {
		t.Errorf("limit: %d dials, then %v", len(dials), err)
	}
	drop(dials)
}

// Entries whose socket is gone are found and given back.
func TestReconcile(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	n.listenAll(t)
	c, err := n.client.Dial(address4)
	must(t, err)
	if removed, err := n.ReconcileFlows(time.Hour, func(_, _ uint64) bool { return false }); err != nil || removed != 0 {
		t.Errorf("removed %d young entries, %v", removed, err)
	}
	if removed, err := n.ReconcileFlows(0, func(_, _ uint64) bool { return true }); err != nil || removed != 0 {
		t.Errorf("removed %d live entries, %v", removed, err)
	}
	if removed, err := n.ReconcileFlows(0, func(_, _ uint64) bool { return false }); err != nil || removed != 1 {
		t.Errorf("removed %d entries, %v", removed, err)
	}
	if own, total, err := n.FlowsOf(clientNumber); err != nil || own != 0 || total != 0 {
		t.Errorf("%d and %d flows are counted (%v)", own, total, err)
	}
	must(t, c.Close())
	if own, _, err := n.FlowsOf(clientNumber); err != nil || own != 0 {
		t.Errorf("after close %d flows are counted (%v)", own, err)
	}
}

// A workload that ran before anybody knew it keeps its sockets when it
// becomes enforced: a datagram server goes on answering, a socket that was
// made early connects late. What was made elsewhere stays foreign.
func TestSocketsMadeBeforeAreAdopted(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	must(t, n.Apply(State{Identities: map[uint64]Identity{n.agentCgroup.ID: {Flags: FlagAgent}}}))
	child := testenv.NewActor(t, testenv.NewCgroup(t, n.clientCgroup), n.netns)
	nobody := testenv.NewActor(t, testenv.NewCgroup(t, n.root), n.netns)
	foreign, err := nobody.TCP(address4)
	must(t, err)
	f, err := foreign.File()
	must(t, err)
	defer f.Close()
	handed, err := n.client.Adopt(f)
	must(t, err)
	type early struct {
		udp, tcp4, tcp6 *testenv.Sock
	}
	var sockets []early
	for _, a := range []*testenv.Actor{n.client, child} {
		udp, err := a.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		must(t, err)
		tcp4, err := a.TCP(address4)
		must(t, err)
		tcp6, err := a.TCP(address6)
		must(t, err)
		sockets = append(sockets, early{udp, tcp4, tcp6})
	}
	must(t, n.Apply(n.state(flow.ModeEnforce)))
	for _, s := range sockets {
		if err := s.udp.SendTo([]byte("x"), netip.MustParseAddrPort("192.0.2.20:9")); err != nil {
			t.Errorf("sendto: %v", err)
		}
		for fam, tcp := range map[int]*testenv.Sock{4: s.tcp4, 6: s.tcp6} {
			dst := map[int]netip.AddrPort{4: address4, 6: address6}[fam]
			if err := tcp.Connect(dst); err != nil {
				t.Errorf("connect to %s: %v", dst, err)
			}
			if _, _, err := outbound[fam].Accept(); err != nil {
				t.Errorf("not proxied: %v", err)
			}
		}
	}
	if err := handed.Connect(address4); !errors.Is(err, unix.EPERM) {
		t.Errorf("a foreign socket: %v", err)
	}
	c, err := n.Counters()
	must(t, err)
	if c.Adopted < 6 {
		t.Errorf("adopted %d", c.Adopted)
	}
}

// TestEgressByProxy holds that the proxy gets what egress lists for it, over
// TCP alone, and that nothing goes past it.
func TestEgressByProxy(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	to := n.leavesByProxy(t)
	server, err := n.server.Listen(to)
	must(t, err)
	c, err := n.client.Dial(to)
	must(t, err)
	s, peer, err := outbound[4].Accept()
	must(t, err)
	local, err := s.Local()
	must(t, err)
	f, err := n.LookupFlow(n.netns.Cookie, peer, local)
	if err != nil || f.Value.Original() != to || f.Value.Target != 0 || f.Value.Identity != uint32(clientNumber) {
		t.Errorf("flow %+v (%v)", f, err)
	}
	must(t, c.Close())
	must(t, s.Close())
	nothingAccepted(t, server, "the host")
	must(t, n.AllowEgress(EgressRule{clientNumber, netip.PrefixFrom(to.Addr(), 32), to.Port(), unix.IPPROTO_UDP}, EgressProxy))
	u, err := n.client.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	must(t, err)
	if err := u.Connect(to); !errors.Is(err, unix.EPERM) {
		t.Errorf("UDP: %v", err)
	}
}

// leavesByProxy lets the client leave to an address by the proxy.
func (n *node) leavesByProxy(t *testing.T) netip.AddrPort {
	t.Helper()
	must(t, n.SetIdentity(n.clientCgroup.ID, Identity{clientNumber, flow.ModeEnforce, FlagEgressDeny}))
	to := netip.MustParseAddrPort("192.0.2.10:9999")
	must(t, n.AllowEgress(EgressRule{clientNumber, netip.PrefixFrom(to.Addr(), 32), to.Port(), unix.IPPROTO_TCP}, EgressProxy))
	must(t, n.AllowEgress(EgressRule{clientNumber, netip.MustParsePrefix("192.0.2.0/24"), to.Port(), unix.IPPROTO_TCP}, EgressLeave)) // less exact
	return to
}

// TestBackstopOfEgressByProxy holds that a SYN which connect never saw does not
// go past the proxy.
func TestBackstopOfEgressByProxy(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	n.watch(t, "lo", "eth0")
	to := n.leavesByProxy(t)
	_, err := n.server.Listen(to)
	must(t, err)
	n.detach(t, "connect4")
	s, err := n.client.TCP(to)
	must(t, err)
	must(t, s.SetTimeout(200*time.Millisecond))
	if err := s.Connect(to); !errors.Is(err, unix.EINPROGRESS) {
		t.Errorf("past the proxy: %v", err)
	}
}
