// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

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
			if _, err := n.LookupFlow(n.netns.Cookie, unmapped(peer), unmapped(local)); err == nil {
				t.Error("the flow entry outlives its socket")
			}
		})
	}
	if own, total, err := n.FlowsOf(clientNumber); err != nil || own != 0 || total != 0 {
		t.Errorf("after close %d and %d flows are counted (%v)", own, total, err)
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
	if _, err := n.client.Dial(netip.MustParseAddrPort("192.0.2.10:9998")); err != unix.ECONNREFUSED {
		t.Errorf("closed port: %v", err)
	}
}
