// SPDX-License-Identifier: Apache-2.0

package sockdiag

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestListAndDestroy(t *testing.T) {
	testenv.RequireRoot(t)
	cg, n := testenv.NewCgroup(t, nil), testenv.NewNetns(t)
	inside, outside := testenv.NewActor(t, cg, n), testenv.NewActor(t, nil, n)
	diag, err := Open(int(n.File.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer diag.Close()
	for _, at := range []string{"127.0.0.1:8080", "[::1]:8080", "[::ffff:127.0.0.2]:8080"} {
		t.Run(at, func(t *testing.T) {
			addr := netip.MustParseAddrPort(at)
			want := netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
			l, err := inside.Listen(addr)
			if err != nil {
				t.Fatal(err)
			}
			listening, err := diag.List(Listen)
			if err != nil {
				t.Fatal(err)
			}
			if len(listening) != 1 || listening[0].Local != want || listening[0].CgroupID != cg.ID || listening[0].Cookie == 0 ||
				listening[0].State != Listen || listening[0].Inode == 0 {
				t.Errorf("listening %+v", listening)
			}
			c, err := outside.Dial(addr)
			if err != nil {
				t.Fatal(err)
			}
			s, _, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			connected, err := diag.List(Connected...)
			if err != nil {
				t.Fatal(err)
			}
			if len(connected) != 2 {
				t.Fatalf("connected %+v", connected)
			}
			found := false
			for i := range connected {
				server := &connected[i]
				if server.Local != want {
					continue
				}
				found = true
				if server.CgroupID != cg.ID {
					t.Errorf("the server's socket is of cgroup %d, not %d", server.CgroupID, cg.ID)
				}
				if err := diag.Destroy(server); err != nil {
					t.Fatal(err)
				}
				if err := diag.Destroy(server); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("destroyed twice: %v", err)
				}
			}
			if !found {
				t.Fatalf("the server's socket is not among %+v", connected)
			}
			if _, err := s.Recv(1); !errors.Is(err, unix.ECONNABORTED) {
				t.Errorf("the server's socket: %v", err)
			}
			if _, err := c.Recv(1); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the client's socket: %v", err)
			}
			for _, s := range []*testenv.Sock{l, c, s} {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestOwnNetns(t *testing.T) {
	diag, err := Open(-1)
	if err != nil {
		t.Fatal(err)
	}
	defer diag.Close()
	if _, err := diag.List(Listen, Established); err != nil {
		t.Error(err)
	}
}

func TestRefusesWhatIsShort(t *testing.T) {
	message := make([]byte, sizeMessage+12)
	ne := binary.NativeEndian
	message[0], message[1] = unix.AF_INET, byte(Established)
	ne.PutUint16(message[sizeMessage:], 12)
	ne.PutUint16(message[sizeMessage+2:], attrCgroup)
	ne.PutUint64(message[sizeMessage+4:], 77)
	if s, err := parse(message); err != nil || s.CgroupID != 77 {
		t.Fatalf("%+v, %v", s, err)
	}
	for cut := range message[:sizeMessage] {
		if _, err := parse(message[:cut]); err == nil {
			t.Errorf("%d bytes were read", cut)
		}
	}
	for _, length := range []uint16{0, 3, 13, 0xffff} {
		ne.PutUint16(message[sizeMessage:], length)
		if _, err := parse(message); err == nil {
			t.Errorf("an attribute of %d bytes was read", length)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(make([]byte, sizeMessage+12))
	f.Add([]byte{20, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = parse(b)
		for len(b) > 0 {
			_, body, rest, err := split(b)
			if err != nil {
				return
			}
			_, _ = parse(body)
			_ = errorOf(body)
			b = rest
		}
	})
}
