// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/flow/abi"
)

func TestConnectIsRewritten(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	for _, dst := range []netip.AddrPort{address4, address6, mapped4} {
		t.Run(dst.String(), func(t *testing.T) {
			c, err := n.client.Dial(dst)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			accepted, peer, err := outbound[family(dst)].Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer accepted.Close()
			local, err := accepted.Local()
			must(t, err)
			f, err := n.LookupFlow(n.netns.Cookie, unmapped(peer), unmapped(local))
			if err != nil {
				t.Fatal(err)
			}
			if got := f.Value.Original(); got != unmapped(dst) {
				t.Errorf("original destination %s, want %s", got, dst)
			}
			if f.Value.Kind != abi.KindOut || f.Value.Identity != uint32(clientNumber) || f.Value.Target != uint32(serverNumber) {
				t.Errorf("flow entry %+v", f.Value)
			}
			if shown, err := c.Peer(); err != nil || shown != dst {
				t.Errorf("the client sees %s (%v), want %s", shown, err, dst)
			}
			must(t, c.Close())
			must(t, accepted.Close())
			n.noFlows(t)
		})
	}
}

func TestUnclaimedIsLeftAlone(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	dst := netip.MustParseAddrPort("192.0.2.10:9999")
	l, err := n.server.Listen(dst)
	must(t, err)
	c, err := n.client.Dial(dst)
	if err != nil {
		t.Fatal(err)
	}
	if _, peer, err := l.Accept(); err != nil {
		t.Fatal(err)
	} else if local, err := c.Local(); err != nil || local != peer {
		t.Errorf("server sees %s, client is %s", peer, local)
	}
	if _, err := n.client.Dial(netip.MustParseAddrPort("192.0.2.10:9998")); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("closed port: %v", err)
	}
}

// The ways to connect that are not connect(2), and sockets that are used
// more than once.
func TestOtherWaysToConnect(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	server, err := n.server.Listen(address4)
	must(t, err)
	original := func(t *testing.T) netip.AddrPort {
		t.Helper()
		s, peer, err := outbound[4].Accept()
		if err != nil {
			t.Fatalf("not proxied: %v", err)
		}
		local, err := s.Local()
		must(t, err)
		f, err := n.LookupFlow(n.netns.Cookie, peer, local)
		must(t, err)
		must(t, s.Close())
		return f.Value.Original()
	}
	const tcpFastOpenConnect = 30
	t.Run("MSG_FASTOPEN", func(t *testing.T) {
		s, err := n.client.TCP(address4)
		must(t, err)
		must(t, s.SendFast([]byte("x"), address4))
		if got := original(t); got != address4 {
			t.Errorf("original destination %s", got)
		}
		must(t, s.Close())
	})
	t.Run("TCP_FASTOPEN_CONNECT", func(t *testing.T) {
		s, err := n.client.TCP(address4)
		must(t, err)
		must(t, s.SetInt(unix.IPPROTO_TCP, tcpFastOpenConnect, 1))
		must(t, s.Connect(address4))
		must(t, s.Send([]byte("x")))
		if got := original(t); got != address4 {
			t.Errorf("original destination %s", got)
		}
		must(t, s.Close())
	})
	t.Run("bound to an address", func(t *testing.T) {
		s, err := n.client.TCP(address4)
		must(t, err)
		must(t, s.Bind(netip.AddrPortFrom(address4.Addr(), 0)))
		must(t, s.Connect(address4))
		if got := original(t); got != address4 {
			t.Errorf("original destination %s", got)
		}
		must(t, s.Close())
	})
	t.Run("again after a refusal", func(t *testing.T) {
		s, err := n.client.TCP(address4)
		must(t, err)
		if err := s.Connect(netip.MustParseAddrPort("192.0.2.10:9998")); !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatalf("closed port: %v", err)
		}
		must(t, s.Connect(address4))
		if got := original(t); got != address4 {
			t.Errorf("original destination %s", got)
		}
		must(t, s.Close())
	})
	t.Run("elsewhere after the proxy", func(t *testing.T) {
		open := netip.MustParseAddrPort("192.0.2.10:9997")
		l, err := n.server.Listen(open)
		must(t, err)
		s, err := n.client.TCP(address4)
		must(t, err)
		must(t, s.Connect(address4))
		original(t)
		must(t, s.Disconnect())
		must(t, s.Connect(open))
		if _, _, err := l.Accept(); err != nil {
			t.Fatal(err)
		}
		if peer, err := s.Peer(); err != nil || peer != open {
			t.Errorf("the client sees %s (%v), want %s", peer, err, open)
		}
		must(t, s.Close())
	})
	nothingAccepted(t, server, "the server")
	n.noFlows(t)
}

// Many at once, some cut off by the agent's restart of their verdicts: no
// entry and no count is left behind.
func TestNoEntryIsLeftBehind(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, _ := n.listenAll(t)
	server, err := n.server.Listen(address4)
	must(t, err)
	for _, l := range []*testenv.Sock{outbound[4], server} {
		go func() {
			for {
				s, _, err := l.Accept()
				if err != nil {
					return // closed with the actor
				}
				_ = s.Close()
			}
		}()
	}
	n.direct(t, address4, time.Hour)
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range 50 {
				if worker == 0 && i%10 == 5 {
					if err := n.BumpGeneration("policy"); err != nil {
						t.Error(err)
					}
				}
				c, err := n.client.Dial(address4)
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = c.Recv(1) // the other end closes
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	n.noFlows(t)
	c, err := n.Counters()
	must(t, err)
	if c.Direct == 0 || c.Proxied == 0 || c.Direct+c.Proxied != 400 {
		t.Errorf("%d direct and %d proxied of 400", c.Direct, c.Proxied)
	}
}
