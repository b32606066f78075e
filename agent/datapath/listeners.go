// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// How the listeners map is divided: OWN_SLOTS for each netns, then
// SERVER_SLOTS for each protected port.
const (
	ownSlots    = uint32(bpf.KernelOwnSlotOWN_SLOTS)
	ownUsed     = uint32(bpf.KernelOwnSlotOWN_USED)
	serverSlots = 16 // SERVER_SLOTS
)

// slots gives out parts of the listeners map. A part is named by its first
// slot.
type slots struct {
	own, servers area
}

type area struct {
	start, size uint32 // first slot, slots of a part
	used        []bool
	next        int
}

func (a *area) take() (slot uint32, ok bool) {
	for range a.used {
		i := a.next
		a.next = (a.next + 1) % len(a.used)
		if !a.used[i] {
			a.used[i] = true
			return a.start + uint32(i)*a.size, true
		}
	}
	return 0, false
}

func (a *area) mark(slot uint32, used bool) {
	if slot >= a.start {
		if i := int((slot - a.start) / a.size); i < len(a.used) {
			a.used[i] = used
		}
	}
}

// restore learns from the maps which parts are in use.
func (s *slots) restore(m *bpf.KernelMaps) error {
	s.own = area{size: ownSlots, used: make([]bool, m.Netns.MaxEntries())}
	s.servers = area{start: ownSlots * m.Netns.MaxEntries(), size: serverSlots, used: make([]bool, m.Protected.MaxEntries())}
	var cookie uint64
	var n bpf.KernelNetnsValue
	it := m.Netns.Iterate()
	for it.Next(&cookie, &n) {
		s.own.mark(n.Slot, true)
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read netns: %w", err)
	}
	var key bpf.KernelProtectedKey
	var p bpf.KernelProtectedValue
	it = m.Protected.Iterate()
	for it.Next(&key, &p) {
		s.servers.mark(p.Slot, true)
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read protected ports: %w", err)
	}
	return nil
}

func (d *Datapath) clearSlots(first, n uint32) error {
	for slot := first; slot < first+n; slot++ {
		// The kernel says EINVAL for an empty slot.
		if err := absent(d.maps.Listeners.Delete(slot)); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("clear listener slot %d: %w", slot, err)
		}
	}
	return nil
}

// AddNetns registers a network namespace in which we have, or will have,
// listeners: from now on its bind hooks guard our ports and its connections
// are rewritten. Put the steering program on it first, with loader's
// AttachNetns. One that is registered stays so.
func (d *Datapath) AddNetns(cookie uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, err := d.netnsSlot(cookie, true)
	return err
}

func (d *Datapath) netnsSlot(cookie uint64, add bool) (uint32, error) {
	var v bpf.KernelNetnsValue
	err := d.maps.Netns.Lookup(cookie, &v)
	if err == nil {
		return v.Slot, nil
	}
	if !errors.Is(err, ebpf.ErrKeyNotExist) || !add {
		return 0, fmt.Errorf("find netns %d: %w", cookie, err)
	}
	slot, ok := d.slots.own.take()
	if !ok {
		return 0, fmt.Errorf("add netns %d: %w", cookie, ErrFull)
	}
	if err := d.clearSlots(slot, ownSlots); err == nil {
		err = d.maps.Netns.Put(cookie, &bpf.KernelNetnsValue{Slot: slot})
		if err == nil {
			return slot, nil
		}
		d.slots.own.mark(slot, false)
		return 0, fmt.Errorf("add netns %d: %w", cookie, full(err))
	}
	d.slots.own.mark(slot, false)
	return 0, fmt.Errorf("add netns %d: %w", cookie, err)
}

// RemoveNetns undoes AddNetns. Close the listeners there first, take the
// steering program off afterwards.
func (d *Datapath) RemoveNetns(cookie uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	slot, err := d.netnsSlot(cookie, false)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := absent(d.maps.Netns.Delete(cookie)); err != nil {
		return fmt.Errorf("remove netns %d: %w", cookie, err)
	}
	d.slots.own.mark(slot, false)
	return d.clearSlots(slot, ownSlots)
}

// Netns returns the cookies of the network namespaces that are registered.
func (d *Datapath) Netns() ([]uint64, error) {
	cookies, err := keysOf(d.maps.Netns, func(*uint64) bool { return true })
	if err != nil {
		return nil, fmt.Errorf("read netns: %w", err)
	}
	return cookies, nil
}

// ListenerKind is one of our own listeners.
type ListenerKind uint8

// The kinds, as line.proto numbers them.
const (
	ListenerOutbound ListenerKind = 1 + iota
	ListenerInbound
	ListenerTunnel
)

// SetListener puts one of our own listeners where the steering program of
// its netns finds it. The socket must listen, be plain TCP (never MPTCP) and
// have been made in that netns, in the cgroup that has FlagAgent; family is 4
// or 6. It leaves the kernel's map when its last descriptor is closed.
func (d *Datapath) SetListener(netns uint64, kind ListenerKind, family int, fd int) error {
	if kind < ListenerOutbound || kind > ListenerTunnel || (family != 4 && family != 6) {
		return fmt.Errorf("set listener: kind %d, family %d", kind, family)
	}
	// Without it the kernel would not see the listener go, and leave
	// connections in observe and audit alone as if it had never been.
	var tag bpf.KernelSocketTag
	if err := d.maps.SocketTags.Lookup(int32(fd), &tag); err != nil || tag.Listens == 0 {
		return fmt.Errorf("set listener %d/%d of netns %d: it does not listen, or was not made in the agent's own cgroup beneath %s",
			kind, family, netns, d.kernel.CgroupRoot())
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	slot, err := d.netnsSlot(netns, true)
	if err != nil {
		return err
	}
	slot += uint32(kind-ListenerOutbound) * 2
	if family == 6 {
		slot++
	}
	if err := d.maps.Listeners.Update(slot, uint64(fd), ebpf.UpdateAny); err != nil {
		return fmt.Errorf("set listener %d/%d of netns %d: %w", kind, family, netns, err)
	}
	return nil
}

// Listeners says which of our own listeners the kernel holds for a netns, by
// socket cookie, 0 where there is none: outbound, inbound, tunnel, each IPv4
// and IPv6.
func (d *Datapath) Listeners(netns uint64) (cookies [6]uint64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	slot, err := d.netnsSlot(netns, false)
	if err != nil {
		return cookies, err
	}
	for i := range ownUsed {
		if cookies[i], err = d.cookieAt(slot + i); err != nil {
			return cookies, err
		}
	}
	return cookies, nil
}

func (d *Datapath) cookieAt(slot uint32) (cookie uint64, err error) {
	if err := absent(d.maps.Listeners.Lookup(slot, &cookie)); err != nil {
		return 0, fmt.Errorf("read listener slot %d: %w", slot, err)
	}
	return cookie, nil
}

// ProtectedPort is a TCP port of a network namespace.
type ProtectedPort struct {
	Netns uint64 // cookie
	Port  uint16
}

func (p ProtectedPort) key() bpf.KernelProtectedKey {
	return bpf.KernelProtectedKey{Netns: p.Netns, Port: p.Port, Proto: protocolTCP}
}

// Protection is who serves at a protected port.
type Protection struct {
	Identity flow.IdentityNumber
	Mode     flow.Mode
}

// Protect makes a port the identity's: only it may bind the port, only its
// own listeners are given connections, and only those that the kernel knows
// the flow of; all others go to the inbound listener. Where another identity
// had the port, its listeners lose it.
func (d *Datapath) Protect(at ProtectedPort, p Protection) error {
	if at.Netns == 0 || at.Port == 0 || p.Identity == 0 || p.Mode > flow.ModeEnforce {
		return fmt.Errorf("protect port %d of netns %d: identity %d, mode %d", at.Port, at.Netns, p.Identity, p.Mode)
	}
	if at.Port == d.ports.Outbound || at.Port == d.ports.Inbound || at.Port == d.ports.Tunnel {
		return fmt.Errorf("protect port %d of netns %d: it is one of our own", at.Port, at.Netns)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	key := at.key()
	var old bpf.KernelProtectedValue
	err := d.maps.Protected.Lookup(&key, &old)
	isNew := errors.Is(err, ebpf.ErrKeyNotExist)
	if err != nil && !isNew {
		return fmt.Errorf("protect port %d of netns %d: %w", at.Port, at.Netns, err)
	}
	if err == nil && old.Identity == uint32(p.Identity) && old.Mode == uint8(p.Mode) {
		return nil
	}
	v := bpf.KernelProtectedValue{Identity: uint32(p.Identity), Slot: old.Slot, Mode: uint8(p.Mode), Generation: now()}
	if isNew {
		ok := false
		if v.Slot, ok = d.slots.servers.take(); !ok {
			return fmt.Errorf("protect port %d of netns %d: %w", at.Port, at.Netns, ErrFull)
		}
		if err := d.clearSlots(v.Slot, serverSlots); err != nil {
			d.slots.servers.mark(v.Slot, false)
			return err
		}
	}
	if err := d.maps.Protected.Put(&key, &v); err != nil {
		if isNew {
			d.slots.servers.mark(v.Slot, false)
		}
		return fmt.Errorf("protect port %d of netns %d: %w", at.Port, at.Netns, full(err))
	}
	if !isNew && old.Identity != v.Identity {
		return d.clearSlots(v.Slot, serverSlots)
	}
	return nil
}

// Unprotect undoes Protect.
func (d *Datapath) Unprotect(at ProtectedPort) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	key := at.key()
	var old bpf.KernelProtectedValue
	err := d.maps.Protected.Lookup(&key, &old)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err == nil {
		err = absent(d.maps.Protected.Delete(&key))
	}
	if err != nil {
		return fmt.Errorf("unprotect port %d of netns %d: %w", at.Port, at.Netns, err)
	}
	d.slots.servers.mark(old.Slot, false)
	return d.clearSlots(old.Slot, serverSlots)
}

// RegisterServer adopts a server that listened before its port was
// protected: fd is its listening socket, cgroupID the cgroup that made it
// (sock_diag says which), which must be one of the protected identity. A
// socket that is registered already stays so.
func (d *Datapath) RegisterServer(at ProtectedPort, fd int, cgroupID uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	key := at.key()
	var p bpf.KernelProtectedValue
	if err := d.maps.Protected.Lookup(&key, &p); err != nil {
		return fmt.Errorf("register server of port %d: find it: %w", at.Port, err)
	}
	var id bpf.KernelIdentityValue
	if err := d.maps.IdentityByCgroup.Lookup(cgroupID, &id); err != nil || id.Number != p.Identity {
		return fmt.Errorf("register server of port %d: cgroup %d has identity %d, the port belongs to %d", at.Port, cgroupID, id.Number, p.Identity)
	}
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return fmt.Errorf("register server of port %d: %w", at.Port, err)
	}
	free := uint32(0)
	found := false
	for i := range uint32(serverSlots) {
		have, err := d.cookieAt(p.Slot + i)
		if err != nil {
			return err
		}
		if have == cookie {
			return nil
		}
		if have == 0 && !found {
			free, found = p.Slot+i, true
		}
	}
	if !found {
		return fmt.Errorf("register server of port %d: %w: it listens with more than %d sockets", at.Port, ErrFull, serverSlots)
	}
	tag := bpf.KernelSocketTag{Cgroup: cgroupID, Owner: cgroupID}
	if err := d.maps.SocketTags.Put(int32(fd), &tag); err != nil {
		return fmt.Errorf("register server of port %d: tag it: %w", at.Port, err)
	}
	if err := d.maps.Listeners.Update(free, uint64(fd), ebpf.UpdateNoExist); err != nil {
		return fmt.Errorf("register server of port %d: %w", at.Port, err)
	}
	return nil
}

// Servers returns the cookies of the listening sockets that are registered
// for a protected port, none where it is not protected.
func (d *Datapath) Servers(at ProtectedPort) ([]uint64, error) {
	key := at.key()
	var p bpf.KernelProtectedValue
	err := d.maps.Protected.Lookup(&key, &p)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read protected port %d: %w", at.Port, err)
	}
	var cookies []uint64
	for i := range uint32(serverSlots) {
		cookie, err := d.cookieAt(p.Slot + i)
		if err != nil {
			return nil, err
		}
		if cookie != 0 {
			cookies = append(cookies, cookie)
		}
	}
	return cookies, nil
}
