// SPDX-License-Identifier: Apache-2.0

package abi

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

func TestEndpoints(t *testing.T) {
	for _, c := range []struct{ src, dst, wantSrc, wantDst string }{
		{"192.0.2.1:1234", "192.0.2.2:80", "192.0.2.1:1234", "192.0.2.2:80"},
		{"[2001:db8::1]:1234", "[2001:db8::2]:80", "[2001:db8::1]:1234", "[2001:db8::2]:80"},
		{"[::ffff:192.0.2.1]:1234", "[::ffff:192.0.2.2]:80", "192.0.2.1:1234", "192.0.2.2:80"},
		{"0.0.0.0:0", "[::]:65535", "0.0.0.0:0", "[::]:65535"},
	} {
		k := Key(7, netip.MustParseAddrPort(c.src), netip.MustParseAddrPort(c.dst))
		if k.Netns != 7 || k.Proto != unix.IPPROTO_TCP || k.Source().String() != c.wantSrc || k.Destination().String() != c.wantDst {
			t.Errorf("%s to %s becomes %s to %s", c.src, c.dst, k.Source(), k.Destination())
		}
	}
	// An IPv4 connection has one key, in whatever form its address comes.
	if Key(7, netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("192.0.2.2:2")) !=
		Key(7, netip.MustParseAddrPort("[::ffff:192.0.2.1]:1"), netip.MustParseAddrPort("[::ffff:192.0.2.2]:2")) {
		t.Error("a v4-mapped address has another key")
	}
}

func TestTrueClient(t *testing.T) {
	var v FlowValue
	if v.TrueClient().IsValid() {
		t.Errorf("no client becomes %s", v.TrueClient())
	}
	want := netip.MustParseAddrPort("198.51.100.7:41234")
	v.Client, v.ClientPort = AddressOf(want.Addr()), want.Port()
	v.Dst, v.Dport = AddressOf(netip.MustParseAddr("2001:db8::1")), 80
	if v.TrueClient() != want || v.Original() != netip.MustParseAddrPort("[2001:db8::1]:80") {
		t.Errorf("client %s, original %s", v.TrueClient(), v.Original())
	}
}

func TestLookupOnNoMap(t *testing.T) {
	var k FlowKey
	var v FlowValue
	if err := NewFlowMap(-1).Lookup(&k, &v); !errors.Is(err, unix.EBADF) && !errors.Is(err, unix.EPERM) {
		t.Errorf("no descriptor: %v", err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := NewFlowMap(fd).Lookup(&k, &v); !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EPERM) {
		t.Errorf("a descriptor that is no map: %v", err)
	}
}
