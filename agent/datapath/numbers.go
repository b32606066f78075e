// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"math"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// AllocateNumber returns the number of a SPIFFE ID, the same one for as long
// as the maps live. A number is never given to another ID.
func (d *Datapath) AllocateNumber(spiffeID string) (flow.IdentityNumber, error) {
	if spiffeID == "" {
		return 0, fmt.Errorf("allocate identity number: no ID")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	key := nameKey(spiffeID)
	var v bpf.KernelNumberValue
	err := d.maps.Numbers.Lookup(&key, &v)
	if err == nil {
		return flow.IdentityNumber(v.Number), nil
	}
	if !errors.Is(err, ebpf.ErrKeyNotExist) {
		return 0, fmt.Errorf("allocate number of %s: %w", spiffeID, err)
	}
	if d.control.NextNumber >= math.MaxUint32-1 {
		return 0, fmt.Errorf("allocate number of %s: all are taken: run 'sallyport agent uninstall' and start again", spiffeID)
	}
	// The next number is written first: dying in between wastes one and
	// never gives one twice.
	v.Number = d.control.NextNumber
	d.control.NextNumber++
	if err := d.writeControl(); err != nil {
		return 0, err
	}
	if err := d.maps.Numbers.Put(&key, &v); err != nil {
		return 0, fmt.Errorf("allocate number of %s: %w", spiffeID, full(err))
	}
	return flow.IdentityNumber(v.Number), nil
}

// nameKey is the name, zero padded, or where it does not fit its hash behind
// a byte that no name begins with.
func nameKey(name string) (key bpf.KernelNameKey) {
	if len(name) < len(key.Name) && name[0] != 0xff {
		copy(key.Name[:], name)
		return key
	}
	sum := sha256.Sum256([]byte(name))
	key.Name[0] = 0xff
	copy(key.Name[1:], sum[:])
	return key
}
