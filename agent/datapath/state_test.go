// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/loader"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// dump reads back what the maps say.
func (n *node) dump(t *testing.T) State {
	t.Helper()
	s := State{map[uint64]Identity{}, map[string]Identity{}, map[netip.AddrPort]flow.IdentityNumber{}, map[EgressRule]EgressAction{}, map[ProtectedPort]Protection{}}
	var id uint64
	var i bpf.KernelIdentityValue
	for it := n.maps.IdentityByCgroup.Iterate(); it.Next(&id, &i); {
		s.Identities[id] = Identity{flow.IdentityNumber(i.Number), flow.Mode(i.Mode), Flags(i.Flags)}
	}
	var path bpf.KernelPathKey
	for it := n.maps.IdentityByPath.Iterate(); it.Next(&path, &i); {
		s.Paths[unix.ByteSliceToString(path.Path[:])] = Identity{flow.IdentityNumber(i.Number), flow.Mode(i.Mode), Flags(i.Flags)}
	}
	var claim bpf.KernelClaimedKey
	var claimed bpf.KernelClaimedValue
	for it := n.maps.Claimed.Iterate(); it.Next(&claim, &claimed); {
		s.Claims[addrPort(claim.Addr.Word, claim.Port)] = flow.IdentityNumber(claimed.Identity)
	}
	var rule bpf.KernelEgressKey
	var allow bpf.KernelEgressValue
	for it := n.maps.Egress.Iterate(); it.Next(&rule, &allow); {
		addr, bits := addrPort(rule.Addr.Word, 0).Addr(), int(rule.Prefixlen)-egressFixed
		if addr.Is4() {
			bits -= 96
		}
		s.Egress[EgressRule{flow.IdentityNumber(rule.Identity), netip.PrefixFrom(addr, bits), rule.Port, rule.Proto}] = EgressAction(allow.Action)
	}
	var port bpf.KernelProtectedKey
	var p bpf.KernelProtectedValue
	for it := n.maps.Protected.Iterate(); it.Next(&port, &p); {
		s.Protected[ProtectedPort{port.Netns, port.Port}] = Protection{flow.IdentityNumber(p.Identity), flow.Mode(p.Mode)}
	}
	return s
}

func equal(a, b State) bool {
	return maps.Equal(a.Identities, b.Identities) && maps.Equal(a.Paths, b.Paths) && maps.Equal(a.Claims, b.Claims) &&
		maps.Equal(a.Egress, b.Egress) && maps.Equal(a.Protected, b.Protected)
}

func TestApply(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	full := n.state(flow.ModeEnforce)
	full.Paths = map[string]Identity{"/system.slice/a.service": {Number: 9, Mode: flow.ModeAudit}}
	full.Egress = map[EgressRule]EgressAction{
		{clientNumber, netip.MustParsePrefix("192.0.2.0/24"), 443, unix.IPPROTO_TCP}: EgressLeave,
		{clientNumber, netip.MustParsePrefix("2001:db8::/32"), 53, unix.IPPROTO_UDP}: EgressLeave,
		{serverNumber, netip.MustParsePrefix("192.0.2.0/24"), 443, unix.IPPROTO_TCP}: EgressProxy,
	}
	audit := n.state(flow.ModeAudit)
	audit.Claims = map[netip.AddrPort]flow.IdentityNumber{address4: clientNumber}
	for _, want := range []State{full, audit, full, {}, full, full} {
		must(t, n.Apply(want))
		if got := n.dump(t); !equal(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
	}
	for name, s := range map[string]State{
		"identity without number": {Identities: map[uint64]Identity{1: {}}},
		"agent with number":       {Identities: map[uint64]Identity{1: {Number: 1, Flags: FlagAgent}}},
		"claim without port":      {Claims: map[netip.AddrPort]flow.IdentityNumber{netip.AddrPortFrom(address4.Addr(), 0): 1}},
		"claim by nobody":         {Claims: map[netip.AddrPort]flow.IdentityNumber{address4: 0}},
		"claim of everything":     {Claims: map[netip.AddrPort]flow.IdentityNumber{netip.MustParseAddrPort("0.0.0.0:80"): 1}},
		"own port":                {Protected: map[ProtectedPort]Protection{{1, 15001}: {1, flow.ModeEnforce}}},
		"relative path":           {Paths: map[string]Identity{"a": {Number: 1}}},
		"long path":               {Paths: map[string]Identity{"/" + string(make([]byte, 300)): {Number: 1}}},
		"egress of nobody":        {Egress: map[EgressRule]EgressAction{{0, netip.MustParsePrefix("::/0"), 0, 6}: EgressLeave}},
	} {
		if err := n.Apply(s); err == nil {
			t.Errorf("%s: it was applied", name)
		}
	}
}

// While a state is replaced by another there is no moment in which a
// connection gets past both.
func TestApplyIsNeverOpen(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	outbound, inbound := n.listenAll(t)
	l, err := n.server.Listen(address4)
	must(t, err)
	a, b := n.state(flow.ModeEnforce), n.state(flow.ModeEnforce)
	b.Claims[netip.MustParseAddrPort("192.0.2.99:1")] = clientNumber
	b.Egress = map[EgressRule]EgressAction{{clientNumber, netip.MustParsePrefix("192.0.2.0/24"), 8080, unix.IPPROTO_TCP}: EgressLeave}
	b.Identities[n.clientCgroup.ID] = Identity{clientNumber, flow.ModeEnforce, FlagEgressDeny}
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			for _, s := range []State{a, b} {
				if err := n.Apply(s); err != nil {
					stopped <- err
					return
				}
			}
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
		}
	}()
	stranger := testenv.NewActor(t, nil, n.netns)
	for range 50 {
		for who, a := range map[*testenv.Sock]*testenv.Actor{outbound[4]: n.client, inbound[4]: stranger} {
			c, err := a.Dial(address4)
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := who.Accept(); err != nil {
				t.Fatalf("a connection went elsewhere: %v", err)
			}
			must(t, c.Close())
		}
	}
	close(stop)
	must(t, <-stopped)
	nothingAccepted(t, l, "the server")
}

func TestClaimThatChangesVoidsItsVerdicts(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	n.direct(t, address4, time.Hour)
	n.direct(t, address6, time.Hour)
	s := n.state(flow.ModeEnforce)
	s.Claims[address4] = clientNumber
	must(t, n.Apply(s))
	keys, err := keysOf(n.maps.Verdict, VerdictFilter{}.match)
	if err != nil || len(keys) != 1 || addrPort(keys[0].Addr.Word, keys[0].Port) != address6 {
		t.Errorf("verdicts left: %+v, %v", keys, err)
	}
	delete(s.Claims, address6)
	must(t, n.Apply(s))
	if keys, err := keysOf(n.maps.Verdict, VerdictFilter{}.match); err != nil || len(keys) != 0 {
		t.Errorf("verdicts left: %+v, %v", keys, err)
	}
}

// A verdict into another netns of the node gives the flow an entry there
// too, by which the server's side knows it.
func TestDirectIntoAnotherNetns(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	there := testenv.NewNetns(t)
	testenv.Veth(t, "pod0", n.netns, there, []netip.Prefix{netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("2001:db8:1::1/64")},
		[]netip.Prefix{netip.MustParsePrefix("198.51.100.2/24"), netip.MustParsePrefix("2001:db8:1::2/64")})
	must(t, n.AddNetns(there.Cookie))
	must(t, n.kernel.AttachNetns(int(there.File.Fd()), there.Cookie))
	must(t, n.Protect(ProtectedPort{there.Cookie, port}, Protection{serverNumber, flow.ModeEnforce}))
	server := testenv.NewActor(t, n.serverCgroup, there)
	stranger := testenv.NewActor(t, nil, n.netns)
	for _, dst := range []netip.AddrPort{netip.MustParseAddrPort("198.51.100.2:8080"), netip.MustParseAddrPort("[2001:db8:1::2]:8080")} {
		l, err := server.Listen(dst)
		must(t, err)
		must(t, n.Claim(dst, serverNumber))
		g, err := n.GenerationOf("policy")
		must(t, err)
		must(t, n.PutVerdict(flow.Verdict{Source: clientNumber, SourceNetns: n.netns.Cookie, Destination: dst,
			DestinationNetns: there.Cookie, Action: flow.ActionDirect, Expires: time.Minute}, g))
		c, err := n.client.Dial(dst)
		if err != nil {
			t.Fatal(err)
		}
		s, peer, err := l.Accept()
		must(t, err)
		if _, err := n.LookupFlow(there.Cookie, peer, dst); err != nil {
			t.Error(err)
		}
		if own, total, err := n.FlowsOf(clientNumber); err != nil || own != 2 || total != 2 {
			t.Errorf("%d and %d entries are counted (%v)", own, total, err)
		}
		if _, err := stranger.Dial(dst); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("a stranger from the other netns: %v", err)
		}
		must(t, c.Close())
		must(t, s.Close())
		n.noFlows(t)
		nothingAccepted(t, l, "the server")
	}
}

func TestLevels(t *testing.T) {
	for path, want := range map[string]uint32{
		"": 1, "/": 1, ".": 1, "/a": 2, "a/b": 4, "/a/b/c": 8, "/a/b/c/d/e/f/g/h/i/j/k/l/m/n/o": 1 << 15, "/a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p": 0,
	} {
		if got := pathBit(path); got != want {
			t.Errorf("%q has bit %#x, want %#x", path, got, want)
		}
	}
	if got := (levels{}).bit(1); got != allLevels {
		t.Errorf("unknown depth gives %#x", got)
	}
	testenv.RequireRoot(t)
	l := openLevels()
	defer l.mount.Close()
	outer := testenv.NewCgroup(t, nil)
	inner := testenv.NewCgroup(t, testenv.NewCgroup(t, outer))
	if got := l.bit(outer.ID); got != 2 {
		t.Errorf("the first level has bit %#x", got)
	}
	if got := l.bit(inner.ID); got != 8 {
		t.Errorf("the third level has bit %#x", got)
	}
	if got := l.bit(1 << 40); got != allLevels {
		t.Errorf("a cgroup that is not there has bit %#x", got)
	}
}

// One identity cannot fill the verdict map for the others, and what has
// expired does not count.
func TestVerdictQuota(t *testing.T) {
	n := newNode(t, flow.ModeEnforce, func(_ *loader.Options, o *Options) { o.VerdictQuota = 3 })
	g, err := n.GenerationOf("policy")
	must(t, err)
	put := func(source flow.IdentityNumber, last byte, ttl time.Duration) error {
		return n.PutVerdict(flow.Verdict{Source: source, SourceNetns: 1, Destination: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, last}), 80),
			Action: flow.ActionDirect, Expires: ttl}, g)
	}
	for last := range byte(3) {
		must(t, put(clientNumber, last, time.Hour))
	}
	if err := put(clientNumber, 3, time.Hour); !errors.Is(err, ErrFull) {
		t.Errorf("beyond the quota: %v", err)
	}
	must(t, put(serverNumber, 3, time.Hour))
	must(t, put(clientNumber, 0, time.Nanosecond)) // replaced in place
	must(t, put(clientNumber, 3, time.Hour))
	if err := put(clientNumber, 4, time.Hour); !errors.Is(err, ErrFull) {
		t.Errorf("beyond the quota: %v", err)
	}
	must(t, n.DeleteVerdicts(VerdictFilter{Source: clientNumber}))
	must(t, put(clientNumber, 4, time.Hour))
}

func TestNetnsIsRegistered(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	must(t, n.AddNetns(99))
	must(t, n.AddNetns(99))
	cookies, err := n.Netns()
	must(t, err)
	slices.Sort(cookies)
	want := []uint64{99, n.netns.Cookie}
	slices.Sort(want)
	if !slices.Equal(cookies, want) {
		t.Errorf("registered %v, want %v", cookies, want)
	}
	must(t, n.RemoveNetns(99))
	must(t, n.RemoveNetns(99))
	if cookies, err := n.Netns(); err != nil || len(cookies) != 1 {
		t.Errorf("registered %v (%v)", cookies, err)
	}
}
