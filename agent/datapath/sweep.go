// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/sockdiag"
	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/flow/abi"
)

// identityOf returns the identity of a cgroup or of its nearest ancestor
// that has one, as the kernel's hooks find it.
func (d *Datapath) identityOf(cgroupID uint64) (v bpf.KernelIdentityValue, found bool, err error) {
	err = d.maps.IdentityByCgroup.Lookup(cgroupID, &v)
	if err == nil || !errors.Is(err, ebpf.ErrKeyNotExist) {
		return v, err == nil, err
	}
	fd, err := d.levels.open(cgroupID)
	if err != nil {
		return v, false, nil // the cgroup is gone, and with it what lived in it
	}
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	unix.Close(fd)
	if err != nil {
		return v, false, fmt.Errorf("find cgroup %d: %w", cgroupID, err)
	}
	for path != d.levels.path && len(path) > 1 {
		path = filepath.Dir(path)
		id, err := cgroupIDOf(path)
		if err != nil {
			return v, false, nil
		}
		err = d.maps.IdentityByCgroup.Lookup(id, &v)
		if err == nil {
			return v, Flags(v.Flags)&FlagAgent == 0, nil
		}
		if !errors.Is(err, ebpf.ErrKeyNotExist) {
			return v, false, err
		}
	}
	return v, false, nil
}

// SweepUnverified closes the connections of a network namespace that the
// kernel half never saw begin: those of enforced workloads to addresses that
// an identity serves, and those that a protected server accepted. Call it
// when something enters enforce, and again a second later for handshakes that
// were under way; diag must be of that netns. It returns what it closed.
func (d *Datapath) SweepUnverified(diag *sockdiag.Conn, netns uint64) (closed []sockdiag.Socket, err error) {
	sockets, err := diag.List(sockdiag.Connected...)
	if err != nil {
		return nil, err
	}
	for i := range sockets {
		s := &sockets[i]
		unverified, err := d.unverified(netns, s)
		if err != nil {
			return closed, fmt.Errorf("sweep netns %d: %w", netns, err)
		}
		if !unverified {
			continue
		}
		if err := diag.Destroy(s); err == nil {
			closed = append(closed, *s)
		} else if !errors.Is(err, os.ErrNotExist) {
			return closed, err
		}
	}
	return closed, nil
}

func (d *Datapath) unverified(netns uint64, s *sockdiag.Socket) (bool, error) {
	if s.CgroupID == 0 {
		return false, nil // a handshake under way: whose it is shows when it is done
	}
	id, found, err := d.identityOf(s.CgroupID)
	if err != nil {
		return false, err
	}
	if found && Flags(id.Flags)&FlagAgent != 0 {
		return false, nil
	}
	ceiling := d.ceiling()
	if p, ok, err := d.protection(netns, s.Local.Port()); err != nil {
		return false, err
	} else if ok && flow.MinMode(flow.Mode(p.Mode), ceiling) == flow.ModeEnforce {
		kind, err := d.kindOf(netns, s.Remote, s.Local)
		if err != nil || kind == 0 {
			return err == nil, err
		}
	}
	if !found || flow.MinMode(flow.Mode(id.Mode), ceiling) != flow.ModeEnforce {
		return false, nil
	}
	served, err := d.served(netns, s.Remote)
	if err != nil || !served {
		return false, err
	}
	kind, err := d.kindOf(netns, s.Local, s.Remote)
	return err == nil && kind == 0, err
}

func (d *Datapath) ceiling() flow.Mode {
	d.mu.Lock()
	defer d.mu.Unlock()
	return flow.Mode(d.control.Ceiling)
}

func (d *Datapath) protection(netns uint64, port uint16) (p bpf.KernelProtectedValue, ok bool, err error) {
	key := ProtectedPort{netns, port}.key()
	err = d.maps.Protected.Lookup(&key, &p)
	return p, err == nil, absent(err)
}

// served says whether an identity serves at an address, as the kernel's
// server_of does.
func (d *Datapath) served(netns uint64, at netip.AddrPort) (bool, error) {
	key, err := claimedKey(at)
	if err != nil {
		return false, nil
	}
	var v bpf.KernelClaimedValue
	if err = d.maps.Claimed.Lookup(&key, &v); err == nil || !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err == nil, err
	}
	if !at.Addr().IsLoopback() {
		return false, nil
	}
	_, ok, err := d.protection(netns, at.Port())
	return ok, err
}

func (d *Datapath) kindOf(netns uint64, src, dst netip.AddrPort) (uint8, error) {
	key := abi.Key(netns, src, dst)
	var v abi.FlowValue
	if err := absent(d.maps.Flow.Lookup(&key, &v)); err != nil {
		return 0, err
	}
	return v.Kind, nil
}

// CloseFlows closes the connections of a network namespace whose flow
// matches: what a revocation or a changed policy no longer allows. Both ends
// see a reset. diag must be of that netns, the one that the connections were
// opened in. It returns how many it closed.
func (d *Datapath) CloseFlows(diag *sockdiag.Conn, netns uint64, match func(*Flow) bool) (int, error) {
	flows, err := d.Flows()
	if err != nil {
		return 0, err
	}
	doomed := make(map[uint64]bool)
	for i := range flows {
		if f := &flows[i]; f.Value.Netns == netns && match(f) {
			doomed[f.Value.Cookie] = true
		}
	}
	if len(doomed) == 0 {
		return 0, nil
	}
	sockets, err := diag.List(sockdiag.Connected...)
	if err != nil {
		return 0, err
	}
	closed := 0
	for i := range sockets {
		if !doomed[sockets[i].Cookie] {
			continue
		}
		if err := diag.Destroy(&sockets[i]); err == nil {
			closed++
		} else if !errors.Is(err, os.ErrNotExist) {
			return closed, err
		}
	}
	return closed, nil
}
