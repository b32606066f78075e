// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func diffState() State {
	return State{
		Identities: map[uint64]Identity{7: {Number: 1, Mode: flow.ModeEnforce}, 8: {Flags: FlagAgent, Mode: flow.ModeEnforce}},
		Paths:      map[string]Identity{"/shop": {Number: 1, Mode: flow.ModeAudit}},
		Claims:     map[netip.AddrPort]flow.IdentityNumber{netip.MustParseAddrPort("10.0.0.1:80"): 1},
		Egress:     map[EgressRule]EgressAction{{Identity: 1, Prefix: netip.MustParsePrefix("10.9.0.0/16"), Port: 5432, Protocol: 6}: EgressLeave},
		Protected:  map[ProtectedPort]Protection{{Netns: 3, Port: 80}: {Identity: 1, Mode: flow.ModeAudit}},
	}
}

func TestDiff(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*State)
		want []string
	}{
		{"the same", func(*State) {}, nil},
		{"mode", func(s *State) { s.Identities[7] = Identity{Number: 1, Mode: flow.ModeAudit} },
			[]string{"identities: change cgroup 7: identity 1, enforce, flags 0x0 to identity 1, audit, flags 0x0"}},
		{"workload ends", func(s *State) { delete(s.Identities, 7) }, []string{"identities: remove cgroup 7: identity 1, enforce, flags 0x0"}},
		{"path", func(s *State) { s.Paths["/new"] = Identity{Number: 2} }, []string{"paths: add /new: identity 2, observe, flags 0x0"}},
		{"claim moves", func(s *State) { s.Claims[netip.MustParseAddrPort("10.0.0.1:80")] = 2 }, []string{"claims: change 10.0.0.1:80: identity 1 to identity 2"}},
		{"claim, mapped", func(s *State) {
			s.Claims = map[netip.AddrPort]flow.IdentityNumber{netip.MustParseAddrPort("[::ffff:10.0.0.1]:80"): 1}
		}, nil},
		{"egress", func(s *State) {
			s.Egress = map[EgressRule]EgressAction{{Identity: 1, Prefix: netip.MustParsePrefix("10.9.0.0/16"), Port: 443, Protocol: 17}: EgressLeave}
		}, []string{"egress: add identity 1 to 10.9.0.0/16 port 443 protocol 17: allowed", "egress: remove identity 1 to 10.9.0.0/16 port 5432 protocol 6: allowed"}},
		{"egress that is not allowed", func(s *State) { s.Egress[EgressRule{Identity: 9}] = 0 }, nil},
		{"protected by another", func(s *State) { s.Protected[ProtectedPort{3, 80}] = Protection{Identity: 2, Mode: flow.ModeEnforce} },
			[]string{"protected: change port 80 of netns 3: identity 1, audit to identity 2, enforce"}},
		{"nothing", func(s *State) { *s = State{} }, []string{
			"claims: remove 10.0.0.1:80: identity 1",
			"egress: remove identity 1 to 10.9.0.0/16 port 5432 protocol 6: allowed",
			"identities: remove cgroup 7: identity 1, enforce, flags 0x0",
			"identities: remove cgroup 8: identity 0, enforce, flags 0x1",
			"paths: remove /shop: identity 1, audit, flags 0x0",
			"protected: remove port 80 of netns 3: identity 1, audit",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, after := diffState(), diffState()
			c.edit(&after)
			var got []string
			for _, change := range before.Diff(after) {
				got = append(got, change.String())
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
			if back := after.Diff(before); len(back) != len(c.want) {
				t.Errorf("back: %v", back)
			}
			if !maps.Equal(before.Identities, diffState().Identities) {
				t.Error("the state was changed")
			}
		})
	}
}
