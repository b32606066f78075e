// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"errors"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { Main(m) }

func TestActorInCgroupAndNetns(t *testing.T) {
	RequireRoot(t)
	cg, a, b := NewCgroup(t, nil), NewNetns(t), NewNetns(t)
	if a.Cookie == b.Cookie || a.Cookie == 0 {
		t.Fatalf("cookies %d and %d", a.Cookie, b.Cookie)
	}
	Veth(t, "eth0", a, b, []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")},
		[]netip.Prefix{netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")})
	client, server := NewActor(t, cg, a), NewActor(t, nil, b)

	self, err := os.ReadFile("/proc/" + strconv.Itoa(client.PID) + "/cgroup")
	if err != nil || !strings.Contains(string(self), cg.Path[strings.LastIndex(cg.Path, "/"):]) {
		t.Fatalf("actor is in %q (%v), not in %s", self, err, cg.Path)
	}
	for _, host := range []string{"192.0.2.2", "2001:db8::2"} {
		addr := netip.AddrPortFrom(netip.MustParseAddr(host), 8080)
		l, err := server.Listen(addr)
		if err != nil {
			t.Fatal(err)
		}
		c, err := client.Dial(addr)
		if err != nil {
			t.Fatal(err)
		}
		s, peer, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if local, err := c.Local(); err != nil || local != peer {
			t.Errorf("accepted %s, client is %s (%v)", peer, local, err)
		}
		if err := c.Send([]byte("ping")); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Recv(16); err != nil || string(got) != "ping" {
			t.Errorf("received %q, %v", got, err)
		}
	}
	if _, err := client.Dial(netip.MustParseAddrPort("192.0.2.2:9")); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial of a closed port: %v", err)
	}
	s, err := client.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	f, err := s.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := server.Adopt(f); err != nil {
		t.Fatal(err)
	}
}
