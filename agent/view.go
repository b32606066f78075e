// SPDX-License-Identifier: Apache-2.0

package agent

import (
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
	revoked    map[string]bool // SPIFFE IDs
}

// view is one consistent picture of plan, workloads and addresses. It is
// never changed; requests of the userspace process are held against it.
type view struct {
	plan       *compile.Plan
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
}

// mode is what a mode amounts to under the ceiling.
func (v *view) mode(m flow.Mode) flow.Mode { return flow.MinMode(m, v.ceiling) }

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
