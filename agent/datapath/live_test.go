// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/events"
	"github.com/sallyport-dev/sallyport/agent/loader"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// node is a kernel half on a cgroup subtree of its own, with an agent's leaf,
// two workloads and one netns that has two addresses of each family.
type node struct {
	*Datapath
	kernel         *loader.Kernel
	pins           string
	root           *testenv.Cgroup
	agentCgroup    *testenv.Cgroup
	clientCgroup   *testenv.Cgroup
	serverCgroup   *testenv.Cgroup
	netns          *testenv.Netns
	agent          *testenv.Actor
	client, server *testenv.Actor
	events         *events.Reader[events.Event]
}

const (
	clientNumber = flow.IdentityNumber(7)
	serverNumber = flow.IdentityNumber(8)
	port         = 8080
)

var (
	address4 = netip.MustParseAddrPort("192.0.2.10:8080")
	address6 = netip.MustParseAddrPort("[2001:db8::10]:8080")
	mapped4  = netip.MustParseAddrPort("[::ffff:192.0.2.10]:8080")
)

func open(t testing.TB, o loader.Options) *loader.Kernel {
	t.Helper()
	k, err := loader.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newNode(t testing.TB, mode flow.Mode, change ...func(*loader.Options, *Options)) *node {
	t.Helper()
	n := &node{pins: filepath.Join(testenv.BPFFS(t), "sallyport"), root: testenv.NewCgroup(t, nil)}
	n.agentCgroup, n.clientCgroup, n.serverCgroup = testenv.NewCgroup(t, n.root), testenv.NewCgroup(t, n.root), testenv.NewCgroup(t, n.root)
	lo, o := loader.Options{PinDir: n.pins, CgroupRoot: n.root.Path, FlowEntries: 1024}, Options{Ceiling: flow.ModeEnforce}
	for _, c := range change {
		c(&lo, &o)
	}
	n.kernel = open(t, lo)
	t.Cleanup(func() {
		n.kernel.Close()
		if _, err := loader.Uninstall(n.pins); err != nil {
			t.Errorf("uninstall: %v", err)
		}
	})
	d, err := New(n.kernel, o)
	must(t, err)
	n.Datapath = d
	t.Cleanup(func() { d.Close() })
	n.netns = testenv.NewNetns(t)
	testenv.Veth(t, "eth0", n.netns, testenv.NewNetns(t),
		[]netip.Prefix{netip.PrefixFrom(address4.Addr(), 24), netip.PrefixFrom(address6.Addr(), 64)},
		[]netip.Prefix{netip.MustParsePrefix("192.0.2.20/24"), netip.MustParsePrefix("2001:db8::20/64")})
	must(t, d.Apply(n.state(mode)))
	must(t, n.kernel.AttachNetns(int(n.netns.File.Fd()), n.netns.Cookie))
	must(t, d.AddNetns(n.netns.Cookie))
	if n.events, err = d.Events(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.events.Close() })
	n.agent = testenv.NewActor(t, n.agentCgroup, n.netns)
	n.client = testenv.NewActor(t, n.clientCgroup, n.netns)
	n.server = testenv.NewActor(t, n.serverCgroup, n.netns)
	return n
}

func (n *node) state(mode flow.Mode) State {
	return State{
		Identities: map[uint64]Identity{
			n.agentCgroup.ID:  {Flags: FlagAgent},
			n.clientCgroup.ID: {Number: clientNumber, Mode: mode},
			n.serverCgroup.ID: {Number: serverNumber, Mode: mode},
		},
		Claims:    map[netip.AddrPort]flow.IdentityNumber{address4: serverNumber, address6: serverNumber},
		Protected: map[ProtectedPort]Protection{{n.netns.Cookie, port}: {serverNumber, mode}},
	}
}

// listen opens our listener of a kind in the agent's cgroup and registers it.
func (n *node) listen(t testing.TB, kind ListenerKind, at string) *testenv.Sock {
	t.Helper()
	addr := netip.MustParseAddrPort(at)
	s, err := n.agent.TCP(addr)
	must(t, err)
	family := 4
	if addr.Addr().Is6() {
		family = 6
		must(t, s.SetInt(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1))
	}
	must(t, s.SetInt(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	must(t, s.Bind(addr))
	must(t, s.Listen())
	f, err := s.File()
	must(t, err)
	defer f.Close()
	must(t, n.SetListener(n.netns.Cookie, kind, family, int(f.Fd())))
	return s
}

func (n *node) listenAll(t testing.TB) (outbound, inbound map[int]*testenv.Sock) {
	t.Helper()
	return map[int]*testenv.Sock{4: n.listen(t, ListenerOutbound, "127.0.0.1:15001"), 6: n.listen(t, ListenerOutbound, "[::1]:15001")},
		map[int]*testenv.Sock{4: n.listen(t, ListenerInbound, "127.0.0.1:15006"), 6: n.listen(t, ListenerInbound, "[::1]:15006")}
}

// event waits for the next refusal with that reason.
func (n *node) event(t testing.TB, reason flow.Reason) events.Event {
	t.Helper()
	n.events.SetDeadline(time.Now().Add(5 * time.Second))
	for {
		e, err := n.events.Read()
		if err != nil {
			t.Fatalf("wait for event %s: %v", reason, err)
		}
		if e.Reason == reason {
			return e
		}
	}
}

func (n *node) refused(t testing.TB, reason flow.Reason) uint64 {
	t.Helper()
	c, err := n.Counters()
	must(t, err)
	return c.Refused[reason]
}

func family(a netip.AddrPort) int {
	if a.Addr().Unmap().Is4() {
		return 4
	}
	return 6
}

func unmapped(a netip.AddrPort) netip.AddrPort { return unmap(a) }

// nothingAccepted fails if anybody reached the listener.
// heartbeatOf has the agent's last heartbeat be of some time ago.
func (n *node) heartbeatOf(t testing.TB, ago time.Duration) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.control.Heartbeat = now() - uint64(ago)
	must(t, n.writeControl())
}

// noFlows waits until no flow has an entry and none of the client's is counted:
// the kernel may still be closing the last ones.
func (n *node) noFlows(t testing.TB) {
	t.Helper()
	for late := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		flows, err := n.Flows()
		must(t, err)
		own, total, err := n.FlowsOf(clientNumber)
		must(t, err)
		if len(flows) == 0 && own == 0 && total == 0 {
			return
		}
		if time.Now().After(late) {
			t.Errorf("%d entries are left, %d and %d flows are counted", len(flows), own, total)
			return
		}
	}
}

func nothingAccepted(t testing.TB, s *testenv.Sock, who string) {
	t.Helper()
	must(t, s.SetTimeout(50*time.Millisecond))
	if _, peer, err := s.Accept(); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("%s received a connection from %s (%v)", who, peer, err)
	}
}
