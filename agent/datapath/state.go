// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// State is everything that policy and workloads say to the kernel.
type State struct {
	Identities map[uint64]Identity // by cgroup id
	Paths      map[string]Identity // by cgroup path, see SetPath
	Claims     map[netip.AddrPort]flow.IdentityNumber
	Egress     map[EgressRule]EgressAction // what is not there is refused
	Protected  map[ProtectedPort]Protection
}

// Apply makes the maps say what the state says, by the difference. What
// protects is added first and what protected is removed last, so that no
// moment in between is more open than both ends. It stops at the first
// error; the state may then be mixed, but never more open than the old one
// or the new one. Sockets of cgroups that are new are adopted. Verdicts to addresses whose claim changes are removed.
func (d *Datapath) Apply(s State) error {
	claims := make(map[bpf.KernelClaimedKey]uint32, len(s.Claims))
	for at, number := range s.Claims {
		key, err := claimedKey(at)
		if err != nil {
			return err
		}
		claims[key] = uint32(number)
	}
	if err := d.tighten(s); err != nil {
		return err
	}
	if err := d.applyIdentities(s); err != nil {
		return err
	}
	return d.loosen(s, claims)
}

func (d *Datapath) tighten(s State) error {
	for at, p := range s.Protected {
		if err := d.Protect(at, p); err != nil {
			return err
		}
	}
	for at, number := range s.Claims {
		var old bpf.KernelClaimedValue
		key, _ := claimedKey(at) // checked by Apply
		err := d.maps.Claimed.Lookup(&key, &old)
		if err == nil && old.Identity == uint32(number) {
			continue
		}
		if err := d.Claim(at, number); err != nil {
			return err
		}
		if err := d.DeleteVerdicts(VerdictFilter{Destination: at}); err != nil {
			return err
		}
	}
	return d.applyEgress(s.Egress)
}

// applyEgress removes before it adds: of two prefixes the longer one wins,
// and all of them let it go.
func (d *Datapath) applyEgress(rules map[EgressRule]EgressAction) error {
	want := make(map[bpf.KernelEgressKey]EgressAction, len(rules))
	for r, action := range rules {
		if action == 0 {
			continue
		}
		key, err := egressKey(r)
		if err != nil {
			return err
		}
		want[key] = action
	}
	if err := prune(d.maps.Egress, func(k *bpf.KernelEgressKey) bool { return want[*k] != 0 }); err != nil {
		return fmt.Errorf("prune egress: %w", err)
	}
	for key, action := range want {
		if err := d.maps.Egress.Put(&key, &bpf.KernelEgressValue{Action: bpf.KernelEgressAction(action)}); err != nil {
			return fmt.Errorf("allow egress: %w", full(err))
		}
	}
	return nil
}

// applyIdentities gives cgroups that are new to the kernel their sockets'
// tags before anything is refused for want of one: the softest mode is no
// more open than no identity was.
func (d *Datapath) applyIdentities(s State) error {
	fresh := false
	for id, i := range s.Identities {
		var old bpf.KernelIdentityValue
		if err := d.maps.IdentityByCgroup.Lookup(id, &old); !errors.Is(err, ebpf.ErrKeyNotExist) {
			continue
		}
		fresh = true
		if i.Flags&FlagAgent == 0 {
			i.Mode, i.Flags = flow.ModeObserve, 0
		}
		if err := d.addIdentity(id, i); err != nil {
			return err
		}
	}
	if fresh {
		if err := d.kernel.Adopt(); err != nil {
			return err
		}
	}
	for id, i := range s.Identities {
		var old bpf.KernelIdentityValue
		if err := d.maps.IdentityByCgroup.Lookup(id, &old); err == nil && same(old, i) {
			continue
		}
		if err := d.SetIdentity(id, i); err != nil {
			return err
		}
	}
	for path, i := range s.Paths {
		key, err := pathKey(path)
		if err != nil {
			return err
		}
		var old bpf.KernelIdentityValue
		if err := d.maps.IdentityByPath.Lookup(&key, &old); err == nil && same(old, i) {
			continue
		}
		if err := d.SetPath(path, i); err != nil {
			return err
		}
	}
	return nil
}

// addIdentity makes room at the expense of cgroups that are gone, whose
// entries would otherwise keep a full map full.
func (d *Datapath) addIdentity(id uint64, i Identity) error {
	err := d.SetIdentity(id, i)
	if !errors.Is(err, ErrFull) {
		return err
	}
	if err := prune(d.maps.IdentityByCgroup, func(id *uint64) bool { return !d.levels.gone(*id) }); err != nil {
		return fmt.Errorf("prune identities: %w", err)
	}
	return d.SetIdentity(id, i)
}

func same(old bpf.KernelIdentityValue, i Identity) bool {
	return old.Number == uint32(i.Number) && old.Mode == uint8(i.Mode) && old.Flags == uint8(i.Flags)
}

func (d *Datapath) loosen(s State, claims map[bpf.KernelClaimedKey]uint32) error {
	gone, err := keysOf(d.maps.Claimed, func(k *bpf.KernelClaimedKey) bool { _, keep := claims[*k]; return !keep })
	if err != nil {
		return fmt.Errorf("read claims: %w", err)
	}
	for i := range gone {
		at := addrPort(gone[i].Addr.Word, gone[i].Port)
		if err := d.Unclaim(at); err != nil {
			return err
		}
		if err := d.DeleteVerdicts(VerdictFilter{Destination: at}); err != nil {
			return err
		}
	}
	ports, err := keysOf(d.maps.Protected, func(k *bpf.KernelProtectedKey) bool {
		_, keep := s.Protected[ProtectedPort{k.Netns, k.Port}]
		return !keep
	})
	if err != nil {
		return fmt.Errorf("read protected ports: %w", err)
	}
	for _, k := range ports {
		if err := d.Unprotect(ProtectedPort{k.Netns, k.Port}); err != nil {
			return err
		}
	}
	paths := make(map[bpf.KernelPathKey]bool, len(s.Paths))
	for path := range s.Paths {
		key, _ := pathKey(path) // checked by applyIdentities
		paths[key] = true
	}
	if err := prune(d.maps.IdentityByPath, func(k *bpf.KernelPathKey) bool { return paths[*k] }); err != nil {
		return fmt.Errorf("prune identities by path: %w", err)
	}
	if err := d.pruneIdentities(s); err != nil {
		return fmt.Errorf("prune identities: %w", err)
	}
	return d.narrowLevels(d.levelsOf(s))
}

// pruneIdentities spares what the kernel itself gave to a cgroup that was
// made at a known path: the state may have been drawn up before that.
func (d *Datapath) pruneIdentities(s State) error {
	var path bpf.KernelPathKey
	var v bpf.KernelIdentityValue
	given := make(map[uint64]bool)
	it := d.maps.IdentityByPath.Iterate()
	for it.Next(&path, &v) {
		given[v.Generation] = true
	}
	if err := it.Err(); err != nil {
		return err
	}
	return prune(d.maps.IdentityByCgroup, func(id *uint64) bool {
		if _, keep := s.Identities[*id]; keep {
			return true
		}
		var v bpf.KernelIdentityValue
		return d.maps.IdentityByCgroup.Lookup(*id, &v) == nil && given[v.Generation] && !d.levels.gone(*id)
	})
}

func (d *Datapath) levelsOf(s State) (bits uint32) {
	for id := range s.Identities {
		bits |= d.levels.bit(id)
	}
	for path := range s.Paths {
		bits |= pathBit(path)
	}
	return bits
}

// prune removes the keys that are not to be kept.
func prune[K any](m *ebpf.Map, keep func(*K) bool) error {
	gone, err := keysOf(m, func(k *K) bool { return !keep(k) })
	if err != nil {
		return err
	}
	for i := range gone {
		if err := absent(m.Delete(&gone[i])); err != nil {
			return err
		}
	}
	return nil
}
