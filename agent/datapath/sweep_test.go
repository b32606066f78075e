// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/sockdiag"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func (n *node) diag(t *testing.T) *sockdiag.Conn {
	t.Helper()
	c, err := sockdiag.Open(int(n.netns.File.Fd()))
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// cut says whether the socket was closed under its user.
func cut(s *testenv.Sock) bool {
	_ = s.SetTimeout(20 * time.Millisecond)
	_, err := s.Recv(1)
	return err == unix.ECONNABORTED || err == unix.ECONNRESET
}

func TestSweepClosesWhatWasNeverVerified(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	must(t, n.Apply(State{Identities: map[uint64]Identity{n.agentCgroup.ID: {Flags: FlagAgent}}}))
	n.listenAll(t)
	open := netip.MustParseAddrPort("192.0.2.10:9999")
	type pair struct{ client, server *testenv.Sock }
	connect := func(client, server *testenv.Actor, dst netip.AddrPort) pair {
		t.Helper()
		l, err := server.Listen(dst)
		must(t, err)
		c, err := client.Dial(dst)
		must(t, err)
		s, _, err := l.Accept()
		must(t, err)
		must(t, l.Close())
		return pair{c, s}
	}
	nobody := testenv.NewActor(t, nil, n.netns)
	child := testenv.NewActor(t, testenv.NewCgroup(t, n.clientCgroup), n.netns)
	fromChild := connect(child, nobody, address6)
	fromNobody := connect(nobody, n.server, netip.MustParseAddrPort("127.0.0.1:8080"))
	unclaimed := connect(n.client, n.server, open)
	diag := n.diag(t)

	must(t, n.Apply(n.state(flow.ModeAudit)))
	if closed, err := n.SweepUnverified(diag, n.netns.Cookie); err != nil || len(closed) != 0 {
		t.Errorf("in audit %v were closed (%v)", closed, err)
	}
	must(t, n.Apply(n.state(flow.ModeEnforce)))
	l, err := n.server.Listen(address4)
	must(t, err)
	n.direct(t, address4, time.Minute)
	c, err := n.client.Dial(address4)
	must(t, err)
	s, _, err := l.Accept()
	must(t, err)
	direct := pair{c, s}
	c, err = n.dial(t, address4, DialTag{Target: serverNumber})
	must(t, err)
	s, _, err = l.Accept()
	must(t, err)
	dialled := pair{c, s}
	must(t, n.DeleteVerdicts(VerdictFilter{}))
	proxied, err := n.client.Dial(address4)
	must(t, err)

	if _, err := n.SweepUnverified(diag, n.netns.Cookie); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]pair{"of a child of an enforced workload": fromChild, "to a protected port": fromNobody} {
		if !cut(p.client) || !cut(p.server) {
			t.Errorf("a connection %s was left", name)
		}
	}
	for name, p := range map[string]pair{"to an address that nobody claims": unclaimed, "that is direct": direct, "of the agent": dialled} {
		if cut(p.client) || cut(p.server) {
			t.Errorf("a connection %s was closed", name)
		}
	}
	if cut(proxied) {
		t.Error("a connection to the proxy was closed")
	}
	if closed, err := n.SweepUnverified(diag, n.netns.Cookie); err != nil || len(closed) != 0 {
		t.Errorf("a second sweep closed %v (%v)", closed, err)
	}
}

func TestCloseFlows(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	n.listenAll(t)
	l, err := n.server.Listen(address4)
	must(t, err)
	n.direct(t, address4, time.Minute)
	c, err := n.client.Dial(address4)
	must(t, err)
	s, _, err := l.Accept()
	must(t, err)
	diag := n.diag(t)
	if closed, err := n.CloseFlows(diag, n.netns.Cookie, func(f *Flow) bool { return f.Value.Identity == uint32(serverNumber) }); err != nil || closed != 0 {
		t.Errorf("closed %d of another identity (%v)", closed, err)
	}
	if closed, err := n.CloseFlows(diag, n.netns.Cookie, func(f *Flow) bool {
		d := f.Describe()
		return d.Identity == clientNumber && d.Destination == address4
	}); err != nil || closed != 1 {
		t.Errorf("closed %d (%v)", closed, err)
	}
	if !cut(c) || !cut(s) {
		t.Error("an end is still open")
	}
	if own, total, err := n.FlowsOf(clientNumber); err != nil || own != 0 || total != 0 {
		t.Errorf("%d and %d flows are counted (%v)", own, total, err)
	}
}
