// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"math/bits"
	"net/netip"
	"slices"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
)

// LocalIdentity is an identity that has, or may have, a workload on this
// node.
type LocalIdentity struct {
	Number flow.IdentityNumber
	ID     string // SPIFFE ID
}

// NetnsAddresses are the addresses of a network namespace of this node.
type NetnsAddresses struct {
	Netns     uint64 // cookie
	Addresses []netip.Addr
}

// view is what the proxy knows of the node, as one immutable value that
// every connection reads.
type view struct {
	plan       *compile.Plan
	generation uint64
	local      []LocalIdentity
	addresses  []NetnsAddresses
	apps       map[string]*appTLS // by the name of the API

	ids     map[flow.IdentityNumber]string
	numbers map[string]flow.IdentityNumber // by ID
	where   map[netip.Addr][]uint64
	served  map[uint64][]*compile.Identity // by netns cookie: the protected identities that may serve there
	names   map[string]*compile.Identity   // by TLS server name
}

// build fills what follows from the rest.
func (v *view) build() *view {
	v.ids, v.numbers = map[flow.IdentityNumber]string{}, map[string]flow.IdentityNumber{}
	for _, l := range v.local {
		v.ids[l.Number], v.numbers[l.ID] = l.ID, l.Number
	}
	v.where = map[netip.Addr][]uint64{}
	for _, n := range v.addresses {
		for _, a := range n.Addresses {
			if a = a.Unmap(); !a.IsLoopback() {
				v.where[a] = append(v.where[a], n.Netns)
			}
		}
	}
	v.served, v.names = map[uint64][]*compile.Identity{}, map[string]*compile.Identity{}
	if v.plan == nil {
		return v
	}
	seen := map[*compile.Identity]bool{}
	for _, a := range v.plan.APIs() {
		id := a.Identity
		if seen[id] || v.numbers[id.ID] == 0 {
			continue
		}
		seen[id] = true
		v.names[identity.ServerName(id.ID)] = id
		v.names[identity.ServerName(id.FullName())] = id
		for _, n := range v.addresses {
			if servesIn(id, n.Addresses) {
				v.served[n.Netns] = append(v.served[n.Netns], id)
			}
		}
	}
	return v
}

// servesIn says whether an identity may serve in a namespace with these
// addresses: one of its endpoints is there, or it names none.
func servesIn(id *compile.Identity, addresses []netip.Addr) bool {
	if len(id.Endpoints) == 0 {
		return true
	}
	for _, e := range id.Endpoints {
		if e.Addr().IsLoopback() {
			return true
		}
		for _, a := range addresses {
			if a.Unmap() == e.Addr().Unmap() {
				return true
			}
		}
	}
	return false
}

// source returns the plan's identity of a SPIFFE ID, nil if it has none.
func (v *view) source(id string) *compile.Identity {
	if v.plan == nil || id == "" {
		return nil
	}
	found, _, _ := v.plan.Identity(id)
	return found
}

func (v *view) claimed(a netip.AddrPort) *compile.Identity {
	if v.plan == nil {
		return nil
	}
	return v.plan.Claimed(a)
}

func (v *view) api(id *compile.Identity, port uint16) *compile.API {
	if v.plan == nil || id == nil {
		return nil
	}
	return v.plan.API(id, port)
}

// protected returns what protects a destination in a namespace of this node:
// the API of the identity that claims the address, or else of the one that
// serves there.
func (v *view) protected(netns uint64, dst netip.AddrPort) *compile.API {
	if id := v.claimed(dst); id != nil && v.numbers[id.ID] != 0 {
		if api := v.api(id, dst.Port()); api != nil {
			return api
		}
	}
	for _, id := range v.served[netns] {
		if api := v.api(id, dst.Port()); api != nil {
			return api
		}
	}
	return nil
}

// asked returns who serves what a caller of this node asked for, nil for
// nobody that we know of. Loopback is not an address that is claimed for the
// node: there it is who the kernel took for it, or else who protects the port
// in the caller's own namespace.
func (v *view) asked(netns uint64, dst netip.AddrPort, target flow.IdentityNumber) *compile.Identity {
	if dst.Addr().IsLoopback() {
		if id := v.source(v.ids[target]); v.api(id, dst.Port()) != nil {
			return id
		}
		if api := v.protected(netns, dst); api != nil {
			return api.Identity
		}
	}
	return v.claimed(dst)
}

var errNoServer = errors.New("no protected identity of that name serves here")

// server returns the identity that a tunnel client asks for by TLS server
// name. One that names none, as HBONE peers do, gets the only one there is.
func (v *view) server(netns uint64, name string) (*compile.Identity, error) {
	if id := v.names[name]; id != nil {
		if slices.Contains(v.served[netns], id) {
			return id, nil
		}
		return nil, errNoServer
	}
	if served := v.served[netns]; len(served) == 1 {
		return served[0], nil
	}
	return nil, errNoServer
}

// home returns the namespace of this node that has an address, as seen from
// one of its namespaces. known is false where the address is none of this
// node's, and the cookie 0 where several namespaces have it.
func (v *view) home(from uint64, a netip.Addr) (netns uint64, known bool) {
	if a.IsLoopback() {
		return from, true
	}
	all := v.where[a.Unmap()]
	if slices.Contains(all, from) {
		return from, true
	}
	switch len(all) {
	case 0:
		return 0, false
	case 1:
		return all[0], true
	}
	return 0, true
}

// has says whether an address is one of a namespace's.
func (v *view) has(netns uint64, a netip.Addr) bool {
	if a.IsLoopback() {
		return false
	}
	return slices.Contains(v.where[a.Unmap()], netns)
}

// client returns the address that a client of this node would have shown:
// its connection to the outbound listener may come from the loopback address
// whatever it was meant for. Among the addresses of its namespace that is the
// destination itself, or the one with the longest prefix in common with it.
func (v *view) client(netns uint64, source, dst netip.AddrPort) netip.AddrPort {
	to := dst.Addr().Unmap()
	if !source.Addr().IsLoopback() || to.IsLoopback() {
		return source
	}
	best, length := source.Addr(), -1
	for _, n := range v.addresses {
		if n.Netns != netns {
			continue
		}
		for _, a := range n.Addresses {
			a = a.Unmap()
			if a.Is4() != to.Is4() || a.IsLoopback() || a.IsLinkLocalUnicast() != to.IsLinkLocalUnicast() {
				continue
			}
			if k := commonBits(a, to); k > length {
				best, length = a, k
			}
		}
	}
	return netip.AddrPortFrom(best, source.Port())
}

// commonBits is how many leading bits two addresses of one family share.
func commonBits(a, b netip.Addr) int {
	x, y := a.As16(), b.As16()
	for i := range x {
		if d := x[i] ^ y[i]; d != 0 {
			return i*8 + bits.LeadingZeros8(d)
		}
	}
	return 128
}
