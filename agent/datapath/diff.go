// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// Change is one entry in which two states differ.
type Change struct {
	Table string // identities, paths, claims, egress or protected
	Key   string
	// Before and After are the values, "" where the entry is not there.
	Before, After string
}

// String writes the change as one line.
func (c Change) String() string {
	switch {
	case c.Before == "":
		return fmt.Sprintf("%s: add %s: %s", c.Table, c.Key, c.After)
	case c.After == "":
		return fmt.Sprintf("%s: remove %s: %s", c.Table, c.Key, c.Before)
	}
	return fmt.Sprintf("%s: change %s: %s to %s", c.Table, c.Key, c.Before, c.After)
}

// Diff returns what has to change for s to become after, in order of table
// and key; nothing where both say the same to the kernel.
func (s State) Diff(after State) []Change {
	var out []Change
	out = diff(out, "identities", s.Identities, after.Identities, func(id uint64) string { return fmt.Sprintf("cgroup %d", id) }, Identity.text)
	out = diff(out, "paths", s.Paths, after.Paths, func(path string) string { return path }, Identity.text)
	out = diff(out, "claims", claimed(s.Claims), claimed(after.Claims), netip.AddrPort.String, func(n uint32) string { return fmt.Sprintf("identity %d", n) })
	out = diff(out, "egress", listed(s.Egress), listed(after.Egress), EgressRule.text, EgressAction.String)
	out = diff(out, "protected", s.Protected, after.Protected, ProtectedPort.text, Protection.text)
	slices.SortFunc(out, func(a, b Change) int { return cmp.Or(cmp.Compare(a.Table, b.Table), cmp.Compare(a.Key, b.Key)) })
	return out
}

func diff[K comparable, V comparable](out []Change, table string, before, after map[K]V, key func(K) string, value func(V) string) []Change {
	for k, v := range before {
		switch w, ok := after[k]; {
		case !ok:
			out = append(out, Change{Table: table, Key: key(k), Before: value(v)})
		case v != w:
			out = append(out, Change{Table: table, Key: key(k), Before: value(v), After: value(w)})
		}
	}
	for k, w := range after {
		if _, ok := before[k]; !ok {
			out = append(out, Change{Table: table, Key: key(k), After: value(w)})
		}
	}
	return out
}

// claimed is what the kernel holds of claims: a v4-mapped address is IPv4's.
func claimed[N ~uint32](claims map[netip.AddrPort]N) map[netip.AddrPort]uint32 {
	out := make(map[netip.AddrPort]uint32, len(claims))
	for at, n := range claims {
		out[netip.AddrPortFrom(at.Addr().Unmap(), at.Port())] = uint32(n)
	}
	return out
}

// listed leaves out what is refused: it is not in the kernel's map.
func listed(rules map[EgressRule]EgressAction) map[EgressRule]EgressAction {
	out := make(map[EgressRule]EgressAction, len(rules))
	for r, action := range rules {
		if action != 0 {
			out[r] = action
		}
	}
	return out
}

func (i Identity) text() string {
	return fmt.Sprintf("identity %d, %s, flags %#x", i.Number, i.Mode, uint8(i.Flags))
}

func (r EgressRule) text() string {
	return fmt.Sprintf("identity %d to %s port %d protocol %d", r.Identity, r.Prefix, r.Port, r.Protocol)
}

func (p ProtectedPort) text() string { return fmt.Sprintf("port %d of netns %d", p.Port, p.Netns) }

func (p Protection) text() string { return fmt.Sprintf("identity %d, %s", p.Identity, p.Mode) }
