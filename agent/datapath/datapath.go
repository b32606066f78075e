// SPDX-License-Identifier: Apache-2.0

// Package datapath is the one place where the kernel's records become the
// types of userspace/flow: identities, claimed addresses, protected ports,
// verdicts, flows, listeners. It writes the maps that agent/loader loaded.
//
// All methods may be called from several goroutines.
package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/loader"
	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const protocolTCP = 6

// Ports are the ports of our own listeners, the same in every netns.
type Ports struct {
	Outbound, Inbound, Tunnel uint16
}

// Options bound what the kernel half does by itself. The zero value of a
// field is its default.
type Options struct {
	Ports        Ports         // 15001, 15006, 15008
	StaleAfter   time.Duration // age at which a heartbeat is none: 3 s
	FlowQuota    uint32        // flows of one identity: a quarter of all
	VerdictQuota uint32        // verdicts of one identity: 4096
	SampleBudget uint32        // samples a second: 1000
	EventLimit   uint32        // events a second per identity and reason: 32
	Ceiling      flow.Mode     // the node-wide ceiling; see also SetCeiling
}

// Datapath writes and reads the maps of the kernel half.
type Datapath struct {
	kernel       *loader.Kernel
	maps         *bpf.KernelMaps
	ports        Ports
	verdictQuota uint32

	mu      sync.Mutex // control record, slots, generations, numbers
	control bpf.KernelControlValue
	slots   slots
	gens    generations
	levels  levels

	verdictMu sync.Mutex
	verdicts  map[flow.IdentityNumber]uint32 // how many each identity has
}

// New writes the control record and, where the pins were taken over, voids
// every verdict that an earlier agent left. Identities, claims and protected
// ports stay as they are until Apply.
func New(k *loader.Kernel, o Options) (*Datapath, error) {
	d := &Datapath{kernel: k, maps: k.Maps()}
	if o.Ports == (Ports{}) {
		o.Ports = Ports{Outbound: 15001, Inbound: 15006, Tunnel: 15008}
	}
	if p := o.Ports; p.Outbound == p.Inbound || p.Inbound == p.Tunnel || p.Outbound == p.Tunnel ||
		p.Outbound == 0 || p.Inbound == 0 || p.Tunnel == 0 {
		return nil, fmt.Errorf("set ports: outbound %d, inbound %d, tunnel %d are not three ports", p.Outbound, p.Inbound, p.Tunnel)
	}
	d.ports = o.Ports
	d.verdictQuota = or(o.VerdictQuota, 4096)
	if err := d.maps.Control.Lookup(uint32(0), &d.control); err != nil {
		return nil, fmt.Errorf("read control: %w", err)
	}
	entries := d.maps.Flow.MaxEntries()
	c := &d.control
	c.FlowLimit = entries - max(entries/9, 8)
	c.FlowQuota = or(o.FlowQuota, max(c.FlowLimit/4, 1))
	c.SampleBudget = or(o.SampleBudget, 1000)
	c.EventLimit = or(o.EventLimit, 32)
	c.StaleAfter = uint64(or(o.StaleAfter, 3*time.Second))
	c.PortOutbound, c.PortInbound, c.PortTunnel = o.Ports.Outbound, o.Ports.Inbound, o.Ports.Tunnel
	c.Ceiling = uint8(o.Ceiling)
	// Until Apply says which: an earlier agent's entries are still there.
	c.Levels = allLevels
	c.NextNumber = max(c.NextNumber, 1)
	c.Heartbeat = now()
	if err := d.slots.restore(d.maps); err != nil {
		return nil, err
	}
	d.gens = newGenerations()
	d.levels = openLevels()
	if err := d.DeleteVerdicts(VerdictFilter{}); err != nil {
		return nil, err
	}
	d.verdicts = make(map[flow.IdentityNumber]uint32)
	if err := d.BumpEpoch(); err != nil {
		return nil, err
	}
	return d, d.writeControl()
}

func or[T comparable](value, otherwise T) T {
	var zero T
	if value == zero {
		return otherwise
	}
	return value
}

// now is CLOCK_BOOTTIME in nanoseconds, as bpf_ktime_get_boot_ns has it.
func now() uint64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) // cannot fail for this clock
	return uint64(ts.Nano())
}

func (d *Datapath) writeControl() error {
	if err := d.maps.Control.Put(uint32(0), &d.control); err != nil {
		return fmt.Errorf("write control: %w", err)
	}
	return nil
}

// Heartbeat says that the agent is alive; due every second. While it is
// stale the kernel takes no verdict `direct`.
func (d *Datapath) Heartbeat() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.control.Heartbeat = now()
	return d.writeControl()
}

// SetCeiling sets the node-wide ceiling: the softer of it and an entry's own
// mode holds.
func (d *Datapath) SetCeiling(m flow.Mode) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.control.Ceiling = uint8(m)
	return d.writeControl()
}

// SetBudget sets how many samples a second the kernel takes.
func (d *Datapath) SetBudget(samples uint32) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.control.SampleBudget = samples
	return d.writeControl()
}

// Close lets go of what the Datapath holds; the maps are the loader's.
func (d *Datapath) Close() error {
	if d.levels.mount == nil {
		return nil
	}
	return d.levels.mount.Close()
}

// Kernel returns what the Datapath writes to.
func (d *Datapath) Kernel() *loader.Kernel { return d.kernel }

// Ports returns the ports of our own listeners.
func (d *Datapath) Ports() Ports { return d.ports }

// Flags of an identity in the kernel.
type Flags uint8

// The flags: enum identity_flags of bpf/include/abi.h.
const (
	// FlagAgent exempts the agent's own leaf cgroup. Nothing inherits it.
	FlagAgent = Flags(bpf.KernelIdentityFlagsIDENTITY_AGENT)
	// FlagRevoked refuses every connection.
	FlagRevoked = Flags(bpf.KernelIdentityFlagsIDENTITY_REVOKED)
	// FlagEgressDeny refuses what nobody claims, except what SetEgress allows.
	FlagEgressDeny = Flags(bpf.KernelIdentityFlagsIDENTITY_EGRESS_DENY)
	// FlagPending refuses with ECONNREFUSED until the identity's listeners are
	// there.
	FlagPending = Flags(bpf.KernelIdentityFlagsIDENTITY_PENDING)
	// FlagExpired refuses what nobody claims, whatever egress allows.
	FlagExpired = Flags(bpf.KernelIdentityFlagsIDENTITY_EXPIRED)
)

// Identity is what the kernel knows of a workload.
type Identity struct {
	Number flow.IdentityNumber // 0 only with FlagAgent
	Mode   flow.Mode
	Flags  Flags
}

func (i Identity) record() bpf.KernelIdentityValue {
	return bpf.KernelIdentityValue{Number: uint32(i.Number), Mode: uint8(i.Mode), Flags: uint8(i.Flags), Generation: now()}
}

func (i Identity) valid() error {
	if (i.Number == 0) != (i.Flags&FlagAgent != 0) {
		return fmt.Errorf("number %d with flags %#x", i.Number, i.Flags)
	}
	return nil
}

// SetIdentity gives the cgroup with that id an identity. Cgroups beneath it
// that have none of their own inherit it in the kernel at once.
func (d *Datapath) SetIdentity(cgroupID uint64, i Identity) error {
	if err := i.valid(); err != nil {
		return fmt.Errorf("set identity of cgroup %d: %w", cgroupID, err)
	}
	if err := d.useLevels(d.levels.bit(cgroupID)); err != nil {
		return err
	}
	v := i.record()
	if err := d.maps.IdentityByCgroup.Put(cgroupID, &v); err != nil {
		return fmt.Errorf("set identity of cgroup %d: %w", cgroupID, full(err))
	}
	return nil
}

// DeleteIdentity takes the identity of a cgroup away. One without is no
// error.
func (d *Datapath) DeleteIdentity(cgroupID uint64) error {
	if err := absent(d.maps.IdentityByCgroup.Delete(cgroupID)); err != nil {
		return fmt.Errorf("delete identity of cgroup %d: %w", cgroupID, err)
	}
	return nil
}

// SetPath names the identity that a cgroup made at path (in the cgroup2
// hierarchy, absolute) has before mkdir returns.
func (d *Datapath) SetPath(path string, i Identity) error {
	key, err := pathKey(path)
	if err != nil {
		return err
	}
	if err := i.valid(); err != nil {
		return fmt.Errorf("set identity of %s: %w", path, err)
	}
	if err := d.useLevels(pathBit(path)); err != nil {
		return err
	}
	v := i.record()
	if err := d.maps.IdentityByPath.Put(&key, &v); err != nil {
		return fmt.Errorf("set identity of %s: %w", path, full(err))
	}
	return nil
}

// DeletePath undoes SetPath.
func (d *Datapath) DeletePath(path string) error {
	key, err := pathKey(path)
	if err != nil {
		return err
	}
	if err := absent(d.maps.IdentityByPath.Delete(&key)); err != nil {
		return fmt.Errorf("delete identity of %s: %w", path, err)
	}
	return nil
}

func pathKey(path string) (key bpf.KernelPathKey, err error) {
	if len(path) == 0 || path[0] != '/' || len(path) >= len(key.Path) {
		return key, fmt.Errorf("use cgroup path %q: it is not absolute, or longer than %d bytes", path, len(key.Path)-1)
	}
	copy(key.Path[:], path)
	return key, nil
}

// Claim says that an identity serves at an address, so that connections to
// it go by verdict and else to the proxy.
func (d *Datapath) Claim(at netip.AddrPort, number flow.IdentityNumber) error {
	key, err := claimedKey(at)
	if err != nil {
		return err
	}
	if number == 0 {
		return fmt.Errorf("claim %s: no identity", at)
	}
	if err := d.maps.Claimed.Put(&key, &bpf.KernelClaimedValue{Identity: uint32(number)}); err != nil {
		return fmt.Errorf("claim %s: %w", at, full(err))
	}
	return nil
}

// Unclaim undoes Claim.
func (d *Datapath) Unclaim(at netip.AddrPort) error {
	key, err := claimedKey(at)
	if err != nil {
		return err
	}
	if err := absent(d.maps.Claimed.Delete(&key)); err != nil {
		return fmt.Errorf("unclaim %s: %w", at, err)
	}
	return nil
}

func claimedKey(at netip.AddrPort) (key bpf.KernelClaimedKey, err error) {
	if !at.IsValid() || at.Port() == 0 || at.Addr().IsUnspecified() {
		return key, fmt.Errorf("claim %s: not an address with a port", at)
	}
	key.Addr.Word = words(at.Addr())
	key.Port, key.Proto = at.Port(), protocolTCP
	return key, nil
}

// EgressAction is what becomes of a connection that egress lists.
type EgressAction uint32

// The actions.
const (
	// EgressLeave lets it go there by itself.
	EgressLeave = EgressAction(bpf.KernelEgressActionEGRESS_LEAVE)
	// EgressProxy has the proxy see to whom it speaks; TCP only.
	EgressProxy = EgressAction(bpf.KernelEgressActionEGRESS_PROXY)
)

// String returns the action's word.
func (a EgressAction) String() string {
	switch a {
	case EgressLeave:
		return "allowed"
	case EgressProxy:
		return "by the proxy"
	}
	return "refused"
}

// EgressRule allows an identity with FlagEgressDeny destinations that nobody
// claims.
type EgressRule struct {
	Identity flow.IdentityNumber
	Prefix   netip.Prefix
	Port     uint16 // 0: every port
	Protocol uint8  // 6 or 17
}

// AllowEgress adds a rule, with EgressLeave or EgressProxy.
func (d *Datapath) AllowEgress(r EgressRule, action EgressAction) error {
	key, err := egressKey(r)
	if err != nil {
		return err
	}
	if err := d.maps.Egress.Put(&key, &bpf.KernelEgressValue{Action: bpf.KernelEgressAction(action)}); err != nil {
		return fmt.Errorf("allow egress to %s: %w", r.Prefix, full(err))
	}
	return nil
}

// DenyEgress removes a rule.
func (d *Datapath) DenyEgress(r EgressRule) error {
	key, err := egressKey(r)
	if err != nil {
		return err
	}
	if err := absent(d.maps.Egress.Delete(&key)); err != nil {
		return fmt.Errorf("deny egress to %s: %w", r.Prefix, err)
	}
	return nil
}

// egressFixed is EGRESS_FIXED of bpf/include/abi.h.
const egressFixed = 64

func egressKey(r EgressRule) (key bpf.KernelEgressKey, err error) {
	if r.Identity == 0 || !r.Prefix.IsValid() || (r.Protocol != protocolTCP && r.Protocol != unix.IPPROTO_UDP) {
		return key, fmt.Errorf("allow egress to %s: identity %d, protocol %d", r.Prefix, r.Identity, r.Protocol)
	}
	p := r.Prefix.Masked()
	key.Prefixlen = egressFixed + uint32(p.Bits())
	if p.Addr().Is4() {
		key.Prefixlen += 96
	}
	key.Identity, key.Port, key.Proto = uint32(r.Identity), r.Port, r.Protocol
	key.Addr.Word = words(p.Addr())
	return key, nil
}

// ErrFull is the cause where a kernel map has no room left.
var ErrFull = errors.New("kernel map is full")

func full(err error) error {
	if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.ENOMEM) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}

// absent takes a key that is not there for success.
func absent(err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}
