// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/agent/datapath"
	"github.com/sallyport-dev/sallyport/agent/revocations"
	"github.com/sallyport-dev/sallyport/agent/workload"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// inputs are what reconcile brings together.
type inputs struct {
	plan       *compile.Plan
	files      []load.File
	problems   []load.Problem // of the directory's set, also where it was refused
	generation uint64
	loaded     time.Time
	lastGood   bool
	table      *workload.Table
	// recognising is what the table of the plan's identities bears.
	recognising uint64
	revoked     map[string]bool // SPIFFE IDs
}

// view is one consistent picture of plan, workloads and addresses. It is
// never changed; requests of the userspace process are held against it.
type view struct {
	plan       *compile.Plan
	files      []load.File // that the plan is made of
	loaded     time.Time
	generation uint64
	ceiling    flow.Mode
	byNumber   map[flow.IdentityNumber]*compile.Identity
	numbers    map[*compile.Identity]flow.IdentityNumber
	local      map[*compile.Identity]bool // has, or may have, a workload here
	homes      map[*compile.Identity][]uint64
	protected  map[datapath.ProtectedPort]*compile.API
	namespaces map[uint64]*namespace
	addresses  map[netip.Addr][]uint64
	revoked    map[string]bool
	// resolved are the addresses of the hosts that egress names, without this
	// node's own.
	resolved map[string][]netip.Addr
	// disputed are the ports that two identities serve at, with the strictest
	// of their modes. They are not among the protected ones.
	disputed map[datapath.ProtectedPort]flow.Mode
	expires  time.Time // when an identity's validity ends next, zero for never
	expired  time.Time // when the last one's did, zero for none
}

// elsewhere leaves out what resolves to an address of this node: whoever
// answers for a name must not open the node's own services by it.
func (v *view) elsewhere(resolved map[string][]netip.Addr) map[string][]netip.Addr {
	for name, list := range resolved {
		resolved[name] = slices.DeleteFunc(list, func(a netip.Addr) bool { return v.addresses[a] != nil })
	}
	return resolved
}

// outdated says whether time alone has made the view another, also by a clock
// that was set back.
func (v *view) outdated(now time.Time) bool {
	return v != nil && (!v.expires.IsZero() && !now.Before(v.expires) || now.Before(v.expired))
}

// expiries returns when the last of those identities that are not valid any
// more expired, and when the first that are will; zero for none.
func expiries(plan *compile.Plan, now time.Time) (last, first time.Time) {
	for _, id := range plan.Identities() {
		switch {
		case id.Expires.IsZero():
		case id.Expired(now):
			if id.Expires.After(last) {
				last = id.Expires
			}
		case first.IsZero() || id.Expires.Before(first):
			first = id.Expires
		}
	}
	return last, first
}

// without returns the view for who is still there, less what is revoked now;
// nil for none.
func (v *view) without(table *workload.Table, revoked map[string]bool) *view {
	if v == nil {
		return nil
	}
	w := *v
	w.revoked = revoked
	w.expired, w.expires = expiries(v.plan, time.Now())
	w.namespaces = map[uint64]*namespace{}
	for _, n := range table.Netns {
		if ns := v.namespaces[n.Cookie()]; ns != nil {
			w.namespaces[n.Cookie()] = ns
		}
	}
	w.protected = maps.Clone(v.protected)
	maps.DeleteFunc(w.protected, func(at datapath.ProtectedPort, _ *compile.API) bool { return w.namespaces[at.Netns] == nil })
	return &w
}

// barred says why an identity that is enforced may do nothing at all now, nil
// where it may.
func (v *view) barred(id *compile.Identity) error {
	switch {
	case v.revoked[id.ID]:
		return refuse(flow.ReasonIdentityRevoked, "%s is revoked", id.FullName())
	case id.Expired(time.Now()):
		return refuse(flow.ReasonIdentityExpired, "%s expired at %s", id.FullName(), id.Expires.UTC().Format(time.RFC3339))
	}
	return nil
}

// mode is what a mode amounts to under the ceiling.
func (v *view) mode(m flow.Mode) flow.Mode { return flow.MinMode(m, v.ceiling) }

// egress says whether an identity's egress lists an address, host being the
// one whose name was verified there, "" for none.
func (v *view) egress(id *compile.Identity, to netip.AddrPort, host string) bool {
	return slices.ContainsFunc(id.Egress, func(e compile.Egress) bool {
		return slices.Contains(e.Ports, to.Port()) && (e.Prefix.Contains(to.Addr()) || slices.Contains(v.resolved[e.Host], to.Addr())) && (!e.Verify || e.Host == host)
	})
}

// livesIn says whether a workload of the identity lives in the namespace.
func (v *view) livesIn(id *compile.Identity, netns uint64) bool {
	return slices.Contains(v.homes[id], netns)
}

// isAddressOf says whether an address is one of the namespace's own; loopback
// is every namespace's.
func (v *view) isAddressOf(a netip.Addr, netns uint64) bool {
	return a.IsLoopback() || slices.Contains(v.addresses[a], netns)
}

// homesOf says in which namespaces each identity's workloads live.
func homesOf(plan *compile.Plan, table *workload.Table) map[*compile.Identity][]uint64 {
	byName := map[string]*compile.Identity{}
	for _, id := range plan.Identities() {
		byName[id.FullName()] = id
	}
	homes := map[*compile.Identity][]uint64{}
	add := func(name string, cookie uint64) {
		if id := byName[name]; id != nil && !slices.Contains(homes[id], cookie) {
			homes[id] = append(homes[id], cookie)
		}
	}
	for _, n := range table.Netns {
		for _, name := range n.Identities {
			add(name, n.Cookie())
		}
	}
	return homes
}

// revokedIdentities picks what the kernel can refuse by itself.
func revokedIdentities(entries []revocations.Entry) map[string]bool {
	m := map[string]bool{}
	for _, e := range entries {
		if e.Kind == revocations.Identity {
			m[e.Value] = true
		}
	}
	return m
}
