// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// unwired is a network namespace of nobody's with the claimed addresses in
// it, and a process outside of the subtree that listens on the outbound port
// and on those addresses.
type unwired struct {
	*testenv.Netns
	own, claimed map[int]*testenv.Sock
	client       *testenv.Actor
}

func (n *node) unwired(t *testing.T) *unwired {
	t.Helper()
	u := &unwired{Netns: testenv.NewNetns(t), own: map[int]*testenv.Sock{}, claimed: map[int]*testenv.Sock{}}
	testenv.Veth(t, "eth0", u.Netns, testenv.NewNetns(t),
		[]netip.Prefix{netip.PrefixFrom(address4.Addr(), 24), netip.PrefixFrom(address6.Addr(), 64)}, nil)
	squatter := testenv.NewActor(t, nil, u.Netns)
	listen := func(at string) *testenv.Sock {
		s, err := squatter.Listen(netip.MustParseAddrPort(at))
		must(t, err)
		return s
	}
	u.own[4], u.own[6] = listen("127.0.0.1:15001"), listen("[::1]:15001")
	u.claimed[4], u.claimed[6] = listen(address4.String()), listen(address6.String())
	u.client = testenv.NewActor(t, n.clientCgroup, u.Netns)
	return u
}

func (u *unwired) receiveNothing(t *testing.T) {
	t.Helper()
	for _, l := range []*testenv.Sock{u.own[4], u.own[6], u.claimed[4], u.claimed[6]} {
		nothingAccepted(t, l, "a squatter")
	}
}

// In a network namespace that nobody wired our port is anybody's: what an
// enforced identity says there reaches no one.
func TestUnwiredNetnsIsRefused(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	n.listenAll(t)
	u := n.unwired(t)
	g, err := n.GenerationOf("policy")
	must(t, err)
	refusedAll := func(t *testing.T) {
		t.Helper()
		for _, dst := range []netip.AddrPort{address4, address6, mapped4} {
			if s, err := u.client.Dial(dst); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("connect to %s: %v", dst, err)
				if err == nil {
					must(t, s.Send([]byte("Authorization: Bearer")))
				}
			}
			s, err := u.client.TCP(dst)
			must(t, err)
			if err := s.SendFast([]byte("x"), dst); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("sendto %s with MSG_FASTOPEN: %v", dst, err)
			}
			must(t, s.Close())
			domain := unix.AF_INET
			if dst.Addr().Is6() {
				domain = unix.AF_INET6
			}
			udp, err := u.client.Socket(domain, unix.SOCK_DGRAM, 0)
			must(t, err)
			if err := udp.SendTo([]byte("x"), dst); !errors.Is(err, unix.EPERM) {
				t.Errorf("datagram to %s: %v", dst, err)
			}
		}
		u.receiveNothing(t)
	}
	refusedAll(t)
	if e := n.event(t, flow.ReasonNotReady); e.Identity != clientNumber || e.Target != serverNumber || !e.Enforced ||
		e.Destination != address4 || e.NetnsCookie != u.Cookie {
		t.Errorf("event %+v", e)
	}
	t.Run("direct", func(t *testing.T) {
		for _, dst := range []netip.AddrPort{address4, address6} {
			must(t, n.PutVerdict(flow.Verdict{Source: clientNumber, SourceNetns: u.Cookie, Destination: dst,
				DestinationNetns: u.Cookie, Action: flow.ActionDirect, Expires: time.Minute}, g))
		}
		must(t, n.Heartbeat())
		refusedAll(t)
	})
	t.Run("steered, not yet registered", func(t *testing.T) {
		must(t, n.kernel.AttachNetns(int(u.File.Fd()), u.Cookie))
		refusedAll(t)
	})
	t.Run("registered", func(t *testing.T) {
		must(t, n.AddNetns(u.Cookie))
		must(t, n.DeleteVerdicts(VerdictFilter{}))
		refusedAll(t)
		must(t, n.RemoveNetns(u.Cookie))
		must(t, n.kernel.DetachNetns(u.Cookie))
	})
	t.Run("no agent", func(t *testing.T) {
		before := n.refused(t, flow.ReasonNotReady)
		must(t, n.events.Close())
		must(t, n.kernel.Close())
		must(t, unix.Kill(n.agent.PID, unix.SIGKILL))
		n.agent.Wait(t)
		refusedAll(t)
		if c, err := pinnedCounters(n.pins); err != nil || c.Refused[flow.ReasonNotReady] < before+6 {
			t.Errorf("counters of a dead agent: %+v, %v", c, err)
		}
	})
}

// What is not enforced is left as it was: it reaches whom it would have
// reached without us, not who sits on our port.
func TestUnwiredNetnsIsLeftAlone(t *testing.T) {
	for _, mode := range []flow.Mode{flow.ModeObserve, flow.ModeAudit} {
		t.Run(mode.String(), func(t *testing.T) {
			n := newNode(t, mode)
			n.listenAll(t)
			u := n.unwired(t)
			for _, dst := range []netip.AddrPort{address4, address6, mapped4} {
				if _, err := u.client.Dial(dst); err != nil {
					t.Errorf("connect to %s: %v", dst, err)
				}
				if _, _, err := u.claimed[family(dst)].Accept(); err != nil {
					t.Errorf("%s was not left alone: %v", dst, err)
				}
			}
			u.receiveNothing(t)
			c, err := n.Counters()
			must(t, err)
			if c.Bypassed != 3 || c.Proxied != 0 || c.WouldRefuse[flow.ReasonNotReady] != 0 {
				t.Errorf("counters %+v", c)
			}
		})
	}
}

// A direct verdict into a namespace that is wired no more goes to the proxy:
// there nothing would tell the server from a squatter.
func TestDirectIntoUnwiredNetnsIsProxied(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	there := testenv.NewNetns(t)
	testenv.Veth(t, "pod0", n.netns, there, []netip.Prefix{netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("2001:db8:1::1/64")},
		[]netip.Prefix{netip.MustParsePrefix("198.51.100.2/24"), netip.MustParsePrefix("2001:db8:1::2/64")})
	squatter := testenv.NewActor(t, nil, there)
	g, err := n.GenerationOf("policy")
	must(t, err)
	for _, dst := range []netip.AddrPort{netip.MustParseAddrPort("198.51.100.2:8080"), netip.MustParseAddrPort("[2001:db8:1::2]:8080")} {
		l, err := squatter.Listen(dst)
		must(t, err)
		must(t, n.Claim(dst, serverNumber))
		must(t, n.Heartbeat())
		must(t, n.PutVerdict(flow.Verdict{Source: clientNumber, SourceNetns: n.netns.Cookie, Destination: dst,
			DestinationNetns: there.Cookie, Action: flow.ActionDirect, Expires: time.Minute}, g))
		if _, err := n.client.Dial(dst); err != nil {
			t.Errorf("connect to %s: %v", dst, err)
		}
		if _, _, err := outbound[family(dst)].Accept(); err != nil {
			t.Errorf("%s was not proxied: %v", dst, err)
		}
		nothingAccepted(t, l, "the squatter")
	}
}
