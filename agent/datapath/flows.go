// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/flow/abi"
)

// DialTag says on whose behalf the agent dials.
type DialTag struct {
	// Client is what the server's accept() and getpeername() show, the zero
	// value for the dial's own address.
	Client netip.AddrPort
	Source flow.IdentityNumber // 0 for a caller that lives elsewhere
	Target flow.IdentityNumber // who must serve there, 0: nobody's address
}

// TagDial tags a socket that the agent's own cgroup made, before connect(2).
// The flow entry exists before the SYN leaves; without room for it connect
// is refused with EPERM.
func (d *Datapath) TagDial(fd int, t DialTag) error {
	var tag bpf.KernelSocketTag
	if err := d.maps.SocketTags.Lookup(int32(fd), &tag); err != nil {
		return fmt.Errorf("tag dial: the socket was not made in the agent's own cgroup beneath %s: %w", d.kernel.CgroupRoot(), err)
	}
	tag.Kind = uint8(bpf.KernelFlowKindFLOW_DIAL)
	tag.Identity, tag.Target = uint32(t.Source), uint32(t.Target)
	tag.Client.Word, tag.ClientPort = [4]uint32{}, 0
	if t.Client.IsValid() {
		tag.Client.Word, tag.ClientPort = words(t.Client.Addr()), t.Client.Port()
	}
	if err := d.maps.SocketTags.Put(int32(fd), &tag); err != nil {
		return fmt.Errorf("tag dial: %w", err)
	}
	return nil
}

// Flow is one entry of the flow map.
type Flow struct {
	Key   abi.FlowKey
	Value abi.FlowValue
}

// Describe returns the flow in the words of userspace/flow. Source is the
// true client, Destination what it asked for.
func (f *Flow) Describe() flow.Flow {
	out := flow.Flow{
		Cookie: f.Value.Cookie, NetnsCookie: f.Key.Netns, Source: f.Key.Source(), Destination: f.Value.Original(),
		Identity: flow.IdentityNumber(f.Value.Identity),
	}
	if c := f.Value.TrueClient(); c.IsValid() {
		out.Source = c
	}
	return out
}

// ErrNoFlow means that the kernel knows no such flow.
var ErrNoFlow = errors.New("no such flow")

// LookupFlow finds a connection by its tuple as the end that opened it sees
// it.
func (d *Datapath) LookupFlow(netns uint64, src, dst netip.AddrPort) (f Flow, err error) {
	f.Key = abi.Key(netns, src, dst)
	err = d.maps.Flow.Lookup(&f.Key, &f.Value)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		err = ErrNoFlow
	}
	if err != nil {
		return f, fmt.Errorf("look up flow %s to %s: %w", src, dst, err)
	}
	return f, nil
}

// Flows returns all entries, at most as many as the map holds.
func (d *Datapath) Flows() ([]Flow, error) {
	var err error
	for range 5 {
		var flows []Flow
		var f Flow
		it := d.maps.Flow.Iterate()
		for it.Next(&f.Key, &f.Value) {
			flows = append(flows, f)
		}
		if err = it.Err(); err == nil {
			return flows, nil
		}
		if !errors.Is(err, ebpf.ErrIterationAborted) {
			break
		}
	}
	return nil, fmt.Errorf("read flows: %w", err)
}

// ForgetFlow removes an entry if it still belongs to the socket with that
// cookie, and gives its place back to the quota.
func (d *Datapath) ForgetFlow(f *Flow) (bool, error) {
	args := bpf.KernelForgetArgs{Cookie: f.Value.Cookie}
	args.Key = bpf.KernelFlowKey{Netns: f.Key.Netns, Sport: f.Key.Sport, Dport: f.Key.Dport, Proto: f.Key.Proto}
	args.Key.Src.Word, args.Key.Dst.Word = f.Key.Src.Word, f.Key.Dst.Word
	var out bpf.KernelForgetArgs
	if _, err := d.kernel.Forget().Run(&ebpf.RunOptions{Context: &args, ContextOut: &out}); err != nil {
		return false, fmt.Errorf("forget flow: %w", err)
	}
	return out.Removed == 1, nil
}

// ReconcileFlows removes the entries of sockets that are gone. live says
// whether a socket (by its netns cookie and its own) still exists; entries
// younger than age are left alone.
func (d *Datapath) ReconcileFlows(age time.Duration, live func(netns, cookie uint64) bool) (removed int, err error) {
	flows, err := d.Flows()
	if err != nil {
		return 0, err
	}
	before := now()
	before -= min(uint64(age), before)
	for i := range flows {
		f := &flows[i]
		if f.Value.Created > before || live(f.Value.Netns, f.Value.Cookie) {
			continue
		}
		gone, err := d.ForgetFlow(f)
		if err != nil {
			return removed, err
		}
		if gone {
			removed++
		}
	}
	return removed, nil
}

// usageTotal is USAGE_TOTAL of bpf/include/abi.h.
const usageTotal = 0xffffffff

// FlowsOf returns how many entries an identity uses, and how many are in use
// altogether.
func (d *Datapath) FlowsOf(number flow.IdentityNumber) (own, total uint64, err error) {
	for _, u := range []struct {
		key uint32
		to  *uint64
	}{{uint32(number), &own}, {usageTotal, &total}} {
		var v bpf.KernelUsageValue
		if err := absent(d.maps.Usage.Lookup(u.key, &v)); err != nil {
			return 0, 0, fmt.Errorf("read flow usage: %w", err)
		}
		*u.to = v.Flows
	}
	return own, total, nil
}

// FlowMapReadOnly opens the flow map so that its descriptor can be handed to
// a process without privilege: it can look up and iterate, and nothing else.
func (d *Datapath) FlowMapReadOnly() (*os.File, error) {
	pin := filepath.Join(d.kernel.PinDir(), "maps", "flow")
	m, err := ebpf.LoadPinnedMap(pin, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("open flow map read only: %w", err)
	}
	defer m.Close()
	return dup(m.FD(), "flow map")
}
