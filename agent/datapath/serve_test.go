// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/flow/abi"
)

func (n *node) direct(t *testing.T, dst netip.AddrPort, ttl time.Duration) {
	t.Helper()
	must(t, n.Heartbeat()) // an emulated machine takes longer than it lasts
	g, err := n.GenerationOf("policy")
	must(t, err)
	must(t, n.PutVerdict(flow.Verdict{
		Source: clientNumber, SourceNetns: n.netns.Cookie, Destination: dst, DestinationNetns: n.netns.Cookie,
		Action: flow.ActionDirect, Expires: ttl,
	}, g))
}

func TestDirectReachesTheServerItself(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, inbound := n.listenAll(t)
	for _, dst := range []netip.AddrPort{address4, address6, mapped4} {
		t.Run(dst.String(), func(t *testing.T) {
			l, err := n.server.Listen(netip.AddrPortFrom(unmapped(dst).Addr(), port))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			n.direct(t, dst, time.Minute)
			c, err := n.client.Dial(dst)
			if err != nil {
				t.Fatal(err)
			}
			s, peer, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if local, err := c.Local(); err != nil || unmapped(local) != unmapped(peer) {
				t.Errorf("server sees %s, client is %s", peer, local)
			}
			f, err := n.LookupFlow(n.netns.Cookie, unmapped(peer), unmapped(dst))
			if err != nil || f.Value.Kind != abi.KindDirect {
				t.Errorf("flow entry %+v, %v", f.Value, err)
			}
			must(t, c.Send([]byte("x")))
			if b, err := s.Recv(4); err != nil || string(b) != "x" {
				t.Errorf("received %q, %v", b, err)
			}
			must(t, c.Close())
			must(t, s.Close())
		})
	}
	for _, l := range []*testenv.Sock{outbound[4], outbound[6], inbound[4], inbound[6]} {
		nothingAccepted(t, l, "our listener")
	}
}

// A verdict is used only while it is fresh in every respect.
func TestVerdictEnds(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	l, err := n.server.Listen(address4)
	must(t, err)
	proxied := func(t *testing.T) {
		t.Helper()
		c, err := n.client.Dial(address4)
		must(t, err)
		s, _, err := outbound[4].Accept()
		if err != nil {
			t.Fatalf("the connection did not go to the proxy: %v", err)
		}
		must(t, c.Close())
		must(t, s.Close())
	}
	straight := func(t *testing.T) {
		t.Helper()
		c, err := n.client.Dial(address4)
		must(t, err)
		s, _, err := l.Accept()
		if err != nil {
			t.Fatalf("the connection was not direct: %v", err)
		}
		must(t, c.Close())
		must(t, s.Close())
	}
	n.direct(t, address4, time.Minute)
	straight(t)
	t.Run("another generation", func(t *testing.T) {
		must(t, n.BumpGeneration("another policy"))
		straight(t)
		must(t, n.BumpGeneration("policy"))
		proxied(t)
	})
	t.Run("epoch", func(t *testing.T) {
		n.direct(t, address4, time.Minute)
		straight(t)
		must(t, n.BumpEpoch())
		proxied(t)
	})
	t.Run("bumped while it was decided", func(t *testing.T) {
		g, err := n.GenerationOf("policy")
		must(t, err)
		must(t, n.BumpGeneration("policy"))
		must(t, n.PutVerdict(flow.Verdict{Source: clientNumber, SourceNetns: n.netns.Cookie, Destination: address4,
			Action: flow.ActionDirect, Expires: time.Minute}, g))
		proxied(t)
	})
	t.Run("expired", func(t *testing.T) {
		n.direct(t, address4, time.Nanosecond)
		proxied(t)
		must(t, n.SweepVerdicts())
		keys, err := keysOf(n.maps.Verdict, VerdictFilter{}.match)
		if err != nil || len(keys) != 0 {
			t.Errorf("%d expired verdicts are left (%v)", len(keys), err)
		}
	})
	t.Run("stale heartbeat", func(t *testing.T) {
		n.direct(t, address4, time.Minute)
		straight(t)
		n.heartbeatOf(t, 4*time.Second)
		proxied(t)
		must(t, n.Heartbeat())
		straight(t)
	})
	t.Run("deleted", func(t *testing.T) {
		must(t, n.DeleteVerdicts(VerdictFilter{Source: serverNumber}))
		straight(t)
		must(t, n.DeleteVerdicts(VerdictFilter{Source: clientNumber}))
		proxied(t)
	})
	t.Run("denied", func(t *testing.T) {
		g, err := n.GenerationOf("policy")
		must(t, err)
		must(t, n.PutVerdict(flow.Verdict{Source: clientNumber, SourceNetns: n.netns.Cookie, Destination: address4,
			Action: flow.ActionDeny, Expires: time.Minute}, g))
		if _, err := n.client.Dial(address4); !errors.Is(err, unix.EPERM) {
			t.Errorf("connect: %v", err)
		}
		if e := n.event(t, flow.ReasonVerdictDeny); e.Identity != clientNumber || e.Target != serverNumber ||
			e.Destination != address4 || !e.Enforced || e.CgroupID != n.clientCgroup.ID {
			t.Errorf("event %+v", e)
		}
	})
}

// dial makes a socket in the agent's cgroup, tags it and connects it.
func (n *node) dial(t *testing.T, dst netip.AddrPort, tag DialTag) (*testenv.Sock, error) {
	t.Helper()
	s, err := n.agent.TCP(dst)
	must(t, err)
	f, err := s.File()
	must(t, err)
	defer f.Close()
	must(t, n.TagDial(int(f.Fd()), tag))
	return s, s.Connect(dst)
}

func TestDialShowsTheTrueClient(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	_, inbound := n.listenAll(t)
	client4, client6 := netip.MustParseAddrPort("198.51.100.7:41234"), netip.MustParseAddrPort("[2001:db8:1::7]:41234")
	for _, c := range []struct {
		name          string
		listen, dst   netip.AddrPort
		client, shown netip.AddrPort
		own           bool // the dial's own address is shown
	}{
		{name: "IPv4", listen: address4, dst: address4, client: client4, shown: client4},
		{name: "IPv6", listen: address6, dst: address6, client: client6, shown: client6},
		{name: "IPv4 to a dual-stack server", listen: netip.MustParseAddrPort("[::]:8080"), dst: address4, client: client4,
			shown: netip.AddrPortFrom(netip.AddrFrom16(client4.Addr().As16()), client4.Port())},
		{name: "IPv6 client over IPv4 to a dual-stack server", listen: netip.MustParseAddrPort("[::]:8080"), dst: address4,
			client: client6, shown: client6},
		{name: "IPv6 client, IPv4 server", listen: address4, dst: address4, client: client6, own: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := n.server.Listen(c.listen)
			must(t, err)
			defer l.Close()
			d, err := n.dial(t, c.dst, DialTag{Client: c.client, Source: clientNumber, Target: serverNumber})
			if err != nil {
				t.Fatal(err)
			}
			s, peer, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			want := c.shown
			if c.own {
				want, err = d.Local()
				must(t, err)
			}
			if peer != want {
				t.Errorf("accept shows %s, want %s", peer, want)
			}
			must(t, d.Close())
			if b, err := s.Recv(1); err != nil || len(b) != 0 {
				t.Errorf("after the dial was closed: %q, %v", b, err)
			}
			if peer, err := s.Peer(); err != nil || peer != want {
				t.Errorf("getpeername shows %s (%v), want %s", peer, err, want)
			}
		})
	}
	nothingAccepted(t, inbound[4], "our inbound listener")
	nothingAccepted(t, inbound[6], "our inbound listener")
}

func TestStrangersAreSteered(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	_, inbound := n.listenAll(t)
	l, err := n.server.Listen(netip.MustParseAddrPort("[::]:8080"))
	must(t, err)
	stranger := testenv.NewActor(t, nil, n.netns)
	for _, dst := range []netip.AddrPort{address4, address6} {
		c, err := stranger.Dial(dst)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		s, _, err := inbound[family(dst)].Accept()
		if err != nil {
			t.Fatalf("%s did not reach our inbound listener: %v", dst, err)
		}
		if local, err := s.Local(); err != nil || local != dst {
			t.Errorf("the accepted socket's address is %s (%v), want %s", local, err, dst)
		}
	}
	nothingAccepted(t, l, "the server")
	for _, dst := range []string{"127.0.0.1:15001", "[::1]:15001", "192.0.2.10:15006", "127.0.0.1:15006", "[::1]:15006"} {
		if _, err := stranger.Dial(netip.MustParseAddrPort(dst)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("a stranger reached %s: %v", dst, err)
		}
	}
	if n.refused(t, flow.ReasonUnguarded) == 0 {
		t.Error("own_port was not counted")
	}
}

func TestListenerGoneIsRefused(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, inbound := n.listenAll(t)
	for _, s := range []*testenv.Sock{outbound[4], outbound[6], inbound[4], inbound[6]} {
		must(t, s.Close())
	}
	stranger := testenv.NewActor(t, nil, n.netns)
	l, err := n.server.Listen(address4)
	must(t, err)
	for who, a := range map[string]*testenv.Actor{"a stranger": stranger, "a workload": n.client} {
		if _, err := a.Dial(address4); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: %v", who, err)
		}
	}
	nothingAccepted(t, l, "the server")
	if n.refused(t, flow.ReasonListenerGone) < 2 {
		t.Error("listener_gone was not counted")
	}
}

func TestServerGoneIsRefused(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	_, inbound := n.listenAll(t)
	if _, err := n.dial(t, address4, DialTag{Target: serverNumber}); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial with no server: %v", err)
	}
	if e := n.event(t, flow.ReasonServerGone); e.Target != serverNumber || e.Destination != address4 {
		t.Errorf("event %+v", e)
	}
	// The address has another owner than the dial expects.
	l, err := n.server.Listen(address4)
	must(t, err)
	for _, target := range []flow.IdentityNumber{clientNumber, 0} {
		if _, err := n.dial(t, address4, DialTag{Target: target}); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("dial that expects identity %d: %v", target, err)
		}
	}
	nothingAccepted(t, l, "the server")
	nothingAccepted(t, inbound[4], "our inbound listener")
}

// Squatters take the port while the server is down: in the subtree, outside
// of it, and by the ways around bind.
func TestSquatterReceivesNothing(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	_, inbound := n.listenAll(t)
	// So that the kernel may be asked to give the protected port by itself.
	must(t, n.netns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("1024 65535"), 0)
	}))
	if _, err := n.client.Listen(address4); !errors.Is(err, unix.EPERM) {
		t.Errorf("another identity could bind: %v", err)
	}
	if e := n.event(t, flow.ReasonBindGuard); e.Identity != clientNumber || e.Target != serverNumber || e.Source != address4 {
		t.Errorf("event %+v", e)
	}
	nobody := testenv.NewActor(t, testenv.NewCgroup(t, n.root), n.netns)
	if _, err := nobody.Listen(netip.MustParseAddrPort("[::]:8080")); !errors.Is(err, unix.EPERM) {
		t.Errorf("a process without identity could bind: %v", err)
	}
	t.Run("given by the kernel", func(t *testing.T) {
		s, err := n.client.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		must(t, err)
		must(t, s.SetInt(unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, port<<16|port))
		if err := s.Bind(netip.MustParseAddrPort("0.0.0.0:0")); !errors.Is(err, unix.EPERM) {
			t.Errorf("bind(0): %v", err)
		}
	})
	outside := testenv.NewActor(t, nil, n.netns)
	reuse := func(a *testenv.Actor) *testenv.Sock {
		s, err := a.TCP(address4)
		must(t, err)
		must(t, s.SetInt(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
		must(t, s.SetInt(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
		must(t, s.Bind(address4))
		must(t, s.Listen())
		return s
	}
	unbound, err := n.client.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	must(t, err)
	must(t, unbound.SetInt(unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, port<<16|port))
	if err := unbound.Listen(); err != nil {
		t.Errorf("listen without bind: %v", err)
	}
	if at, err := unbound.Local(); err != nil || at.Port() != port {
		t.Errorf("listen without bind got %s (%v): the test proves nothing", at, err)
	}
	if _, err := n.dial(t, address4, DialTag{Target: serverNumber}); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial: %v", err)
	}
	nothingAccepted(t, unbound, "the squatter that did not bind")
	must(t, unbound.Close())
	squatter := reuse(outside)
	reach := func(what string, want error) {
		t.Helper()
		for range 8 {
			if _, err := n.dial(t, address4, DialTag{Target: serverNumber}); !errors.Is(err, want) {
				t.Errorf("%s: dial: %v", what, err)
			}
		}
		n.direct(t, address4, time.Minute)
		for range 8 {
			if _, err := n.client.Dial(address4); !errors.Is(err, want) {
				t.Errorf("%s: direct: %v", what, err)
			}
		}
	}
	reach("server down", unix.ECONNREFUSED)
	c, err := outside.Dial(address4)
	must(t, err)
	s, _, err := inbound[4].Accept()
	must(t, err)
	must(t, s.Close())
	must(t, c.Close())
	t.Run("in the server's reuseport group", func(t *testing.T) {
		server := reuse(n.server)
		reach("server up", nil)
		for range 16 {
			if _, _, err := server.Accept(); err != nil {
				t.Fatalf("the server missed a connection: %v", err)
			}
		}
	})
	nothingAccepted(t, squatter, "the squatter outside")
}

func TestOwnPortsAreGuarded(t *testing.T) {
	n := newNode(t, flow.ModeAudit)
	outbound, _ := n.listenAll(t)
	must(t, outbound[4].Close())
	must(t, outbound[6].Close())
	for _, at := range []string{"127.0.0.1:15001", "[::]:15001", "127.0.0.1:15006", "0.0.0.0:15008"} {
		if _, err := n.client.Listen(netip.MustParseAddrPort(at)); !errors.Is(err, unix.EPERM) {
			t.Errorf("a workload could bind %s: %v", at, err)
		}
	}
	outside := testenv.NewActor(t, nil, n.netns)
	l, err := outside.Listen(netip.MustParseAddrPort("127.0.0.1:15001"))
	must(t, err)
	server, err := n.server.Listen(address4)
	must(t, err)
	// In audit nothing breaks: without our listener nothing is rewritten.
	if _, err := n.client.Dial(address4); err != nil {
		t.Errorf("audit, listener gone: %v", err)
	}
	must(t, n.Apply(n.state(flow.ModeEnforce)))
	if _, err := n.client.Dial(address4); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("enforce, listener gone: %v", err)
	}
	nothingAccepted(t, l, "the squatter on 15001")
	must(t, server.Close())
	elsewhere := testenv.NewNetns(t)
	if _, err := testenv.NewActor(t, n.clientCgroup, elsewhere).Listen(netip.MustParseAddrPort("127.0.0.1:15001")); err != nil {
		t.Errorf("bind of 15001 in a netns that is not ours: %v", err)
	}
	if _, err := n.agent.Listen(netip.MustParseAddrPort("127.0.0.1:15008")); err != nil {
		t.Errorf("the agent could not bind its own port: %v", err)
	}
}

func TestAuditNeverBreaksTraffic(t *testing.T) {
	n := newNode(t, flow.ModeAudit)
	l, err := n.server.Listen(address4)
	must(t, err)
	stranger := testenv.NewActor(t, nil, n.netns)
	for _, a := range []*testenv.Actor{n.client, stranger} {
		if _, err := a.Dial(address4); err != nil {
			t.Errorf("no listeners of ours: %v", err)
		}
		if _, _, err := l.Accept(); err != nil {
			t.Error(err)
		}
	}
	outbound, inbound := n.listenAll(t)
	if _, err := n.client.Dial(address4); err != nil {
		t.Error(err)
	}
	if _, _, err := outbound[4].Accept(); err != nil {
		t.Errorf("audit is not proxied: %v", err)
	}
	if _, err := stranger.Dial(address4); err != nil {
		t.Error(err)
	}
	if _, _, err := inbound[4].Accept(); err != nil {
		t.Errorf("audit is not steered: %v", err)
	}
	if s, err := n.client.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_UDP); err != nil {
		t.Errorf("raw socket in audit: %v", err)
	} else {
		must(t, s.Close())
	}
	c, err := n.Counters()
	must(t, err)
	if c.Bypassed == 0 || c.WouldRefuse[flow.ReasonSocketKind] == 0 || c.Refused[flow.ReasonSocketKind] != 0 {
		t.Errorf("counters %+v", c)
	}
}

func TestServerThatListenedBefore(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	at := ProtectedPort{n.netns.Cookie, port}
	must(t, n.Unprotect(at))
	l, err := n.server.Listen(address4)
	must(t, err)
	must(t, n.Protect(at, Protection{serverNumber, flow.ModeEnforce}))
	if _, err := n.dial(t, address4, DialTag{Target: serverNumber}); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("before it is registered: %v", err)
	}
	f, err := l.File()
	must(t, err)
	defer f.Close()
	if err := n.RegisterServer(at, int(f.Fd()), n.clientCgroup.ID); err == nil {
		t.Error("a listener of another identity was registered")
	}
	for range 2 {
		must(t, n.RegisterServer(at, int(f.Fd()), n.serverCgroup.ID))
	}
	if servers, err := n.Servers(at); err != nil || len(servers) != 1 {
		t.Errorf("registered: %v, %v", servers, err)
	}
	if _, err := n.dial(t, address4, DialTag{Target: serverNumber}); err != nil {
		t.Errorf("after it was registered: %v", err)
	}
	if _, _, err := l.Accept(); err != nil {
		t.Error(err)
	}
	must(t, n.Protect(at, Protection{clientNumber, flow.ModeEnforce}))
	if servers, err := n.Servers(at); err != nil || len(servers) != 0 {
		t.Errorf("the port has another owner and still %v, %v", servers, err)
	}
}
