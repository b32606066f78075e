// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// generations maps names to slots of the kernel's array. Slot 0 is the
// epoch. Names beyond the last slot share one by hash, so that bumping one
// voids a few verdicts more than it must, never fewer.
type generations struct {
	slot map[string]uint32
	next uint32
}

func newGenerations() generations { return generations{slot: map[string]uint32{}, next: 1} }

const generationSlots = 4096

func (g *generations) of(name string) uint32 {
	if s, ok := g.slot[name]; ok {
		return s
	}
	if g.next < generationSlots {
		s := g.next
		g.next++
		g.slot[name] = s
		return s
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(name)) // never fails
	return 1 + h.Sum32()%(generationSlots-1)
}

// Generation is the state of a policy, an issuer or a subject under which a
// verdict was given.
type Generation struct {
	slot         uint32
	value, epoch uint64
}

// GenerationOf returns the present generation of a name. Take it before the
// decision is made: a bump in between then voids the verdict.
func (d *Datapath) GenerationOf(name string) (Generation, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	g := Generation{slot: d.gens.of(name)}
	if err := d.maps.Generations.Lookup(g.slot, &g.value); err != nil {
		return g, fmt.Errorf("read generation of %s: %w", name, err)
	}
	if err := d.maps.Generations.Lookup(uint32(0), &g.epoch); err != nil {
		return g, fmt.Errorf("read generation of %s: %w", name, err)
	}
	return g, nil
}

// BumpGeneration voids every verdict given under the name's present
// generation, and no others.
func (d *Datapath) BumpGeneration(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.bump(d.gens.of(name))
}

// BumpEpoch voids every verdict.
func (d *Datapath) BumpEpoch() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.bump(0)
}

func (d *Datapath) bump(slot uint32) error {
	var value uint64
	if err := d.maps.Generations.Lookup(slot, &value); err != nil {
		return fmt.Errorf("bump generation: %w", err)
	}
	value++
	if err := d.maps.Generations.Put(slot, value); err != nil {
		return fmt.Errorf("bump generation: %w", err)
	}
	return nil
}

// PutVerdict puts a verdict into the kernel. It holds until it expires or
// its generation is bumped.
func (d *Datapath) PutVerdict(v flow.Verdict, g Generation) error {
	if v.Source == 0 || v.SourceNetns == 0 || !v.Destination.IsValid() || v.Expires <= 0 || v.Action > flow.ActionDeny {
		return fmt.Errorf("put verdict: %+v is not complete", v)
	}
	key := verdictKey(v.Source, v.SourceNetns, v.Destination)
	value := bpf.KernelVerdictValue{
		Netns: v.DestinationNetns, Expires: now() + uint64(v.Expires), Generation: g.value, Epoch: g.epoch,
		Slot: g.slot, Action: uint8(v.Action),
	}
	if err := d.putVerdict(v.Source, &key, &value); err != nil {
		return fmt.Errorf("put verdict for %d to %s: %w", v.Source, v.Destination, err)
	}
	return nil
}

// putVerdict keeps each identity within its quota, so that none can fill the
// map for the others.
func (d *Datapath) putVerdict(source flow.IdentityNumber, key *bpf.KernelVerdictKey, value *bpf.KernelVerdictValue) error {
	d.verdictMu.Lock()
	defer d.verdictMu.Unlock()
	err := d.maps.Verdict.Update(key, value, ebpf.UpdateExist)
	if !errors.Is(err, ebpf.ErrKeyNotExist) {
		return full(err)
	}
	if d.verdicts[source] >= d.verdictQuota {
		t := now()
		if err := d.removeVerdicts(func(k *bpf.KernelVerdictKey, v *bpf.KernelVerdictValue) bool {
			return k.Identity == uint32(source) && v.Expires <= t
		}); err != nil {
			return err
		}
		if d.verdicts[source] >= d.verdictQuota {
			return fmt.Errorf("%w: the identity has its %d verdicts", ErrFull, d.verdictQuota)
		}
	}
	if err := d.maps.Verdict.Update(key, value, ebpf.UpdateNoExist); err != nil {
		return full(err)
	}
	d.verdicts[source]++
	return nil
}

func verdictKey(source flow.IdentityNumber, netns uint64, dst netip.AddrPort) (key bpf.KernelVerdictKey) {
	key.Netns, key.Identity, key.Port, key.Proto = netns, uint32(source), dst.Port(), protocolTCP
	key.Addr.Word = words(dst.Addr())
	return key
}

// VerdictFilter selects verdicts; a zero field selects all.
type VerdictFilter struct {
	Source      flow.IdentityNumber
	SourceNetns uint64
	Destination netip.AddrPort
}

func (f VerdictFilter) match(k *bpf.KernelVerdictKey) bool {
	return (f.Source == 0 || uint32(f.Source) == k.Identity) &&
		(f.SourceNetns == 0 || f.SourceNetns == k.Netns) &&
		(!f.Destination.IsValid() || addrPort(k.Addr.Word, k.Port) == unmap(f.Destination))
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// DeleteVerdicts removes the verdicts that the filter selects.
func (d *Datapath) DeleteVerdicts(f VerdictFilter) error {
	d.verdictMu.Lock()
	defer d.verdictMu.Unlock()
	return d.removeVerdicts(func(k *bpf.KernelVerdictKey, _ *bpf.KernelVerdictValue) bool { return f.match(k) })
}

// SweepVerdicts removes the verdicts that have expired, so that the map
// holds only what can be used. Due every minute or so.
func (d *Datapath) SweepVerdicts() error {
	d.verdictMu.Lock()
	defer d.verdictMu.Unlock()
	t := now()
	return d.removeVerdicts(func(_ *bpf.KernelVerdictKey, v *bpf.KernelVerdictValue) bool { return v.Expires <= t })
}

// removeVerdicts is called with verdictMu held: nobody else writes the map.
func (d *Datapath) removeVerdicts(match func(*bpf.KernelVerdictKey, *bpf.KernelVerdictValue) bool) error {
	var key bpf.KernelVerdictKey
	var value bpf.KernelVerdictValue
	var doomed []bpf.KernelVerdictKey
	it := d.maps.Verdict.Iterate()
	for it.Next(&key, &value) {
		if match(&key, &value) {
			doomed = append(doomed, key)
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read verdicts: %w", err)
	}
	for i := range doomed {
		if err := absent(d.maps.Verdict.Delete(&doomed[i])); err != nil {
			return fmt.Errorf("delete verdicts: %w", err)
		}
		if source := flow.IdentityNumber(doomed[i].Identity); d.verdicts[source] > 1 {
			d.verdicts[source]--
		} else {
			delete(d.verdicts, source)
		}
	}
	return nil
}

// keysOf collects the keys that match. A map that is changed meanwhile may
// make the iteration start over; that is tried a few times.
func keysOf[K any](m *ebpf.Map, match func(*K) bool) ([]K, error) {
	value := make([]byte, m.ValueSize())
	var err error
	for range 5 {
		var keys []K
		var key K
		it := m.Iterate()
		for it.Next(&key, &value) {
			if match(&key) {
				keys = append(keys, key)
			}
		}
		if err = it.Err(); !errors.Is(err, ebpf.ErrIterationAborted) {
			return keys, err
		}
	}
	return nil, err
}
