// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// cgroupHooks are the programs that are attached once, to the cgroup root.
var cgroupHooks = map[string]ebpf.AttachType{
	"sock_create":  ebpf.AttachCGroupInetSockCreate,
	"connect4":     ebpf.AttachCGroupInet4Connect,
	"connect6":     ebpf.AttachCGroupInet6Connect,
	"sendmsg4":     ebpf.AttachCGroupUDP4Sendmsg,
	"sendmsg6":     ebpf.AttachCGroupUDP6Sendmsg,
	"bind4":        ebpf.AttachCGroupInet4Bind,
	"bind6":        ebpf.AttachCGroupInet6Bind,
	"post_bind4":   ebpf.AttachCGroupInet4PostBind,
	"post_bind6":   ebpf.AttachCGroupInet6PostBind,
	"getpeername4": ebpf.AttachCgroupInet4GetPeername,
	"getpeername6": ebpf.AttachCgroupInet6GetPeername,
	"track":        ebpf.AttachCGroupSockOps,
}

// attachAll attaches or updates every program of which there is one. Where
// it returns an error, what it newly attached is detached.
func (k *Kernel) attachAll(p *programs) (err error) {
	var fresh []string
	defer func() {
		if err != nil {
			for _, pin := range fresh {
				err = errors.Join(err, removeLink(pin))
			}
		}
	}()
	root, err := cgroupID(k.root)
	if err != nil {
		return err
	}
	for name, at := range cgroupHooks {
		pin := filepath.Join(k.dir, "links", name)
		made, err := k.attachCgroup(pin, at, p.Programs[name], root)
		if err != nil {
			return fmt.Errorf("attach %s to %s: %w", name, k.root, err)
		}
		if made {
			fresh = append(fresh, pin)
		}
	}
	if p.mkdir == nil {
		return nil
	}
	pin := filepath.Join(k.dir, "links", "cgroup_mkdir")
	if err := k.attachMkdir(pin, p.mkdir.Programs["cgroup_mkdir"]); err != nil {
		return fmt.Errorf("attach cgroup_mkdir: %w", err)
	}
	return nil
}

func (k *Kernel) attachCgroup(pin string, at ebpf.AttachType, prog *ebpf.Program, root uint64) (made bool, err error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, fs.ErrNotExist) {
		l, err := link.AttachCgroup(link.CgroupOptions{Path: k.root, Attach: at, Program: prog})
		if err != nil {
			return false, err
		}
		defer l.Close()
		return true, l.Pin(pin)
	}
	if err != nil {
		return false, err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return false, err
	}
	if cg := info.Cgroup(); cg == nil || cg.CgroupId != root {
		return false, errors.New("its pin belongs to another cgroup root: run 'sallyport agent uninstall' and start again")
	}
	return false, l.Update(prog)
}

// attachMkdir cannot update such a link, so it puts the new one beside the
// old one and then lets the old one go: no mkdir is missed.
func (k *Kernel) attachMkdir(pin string, prog *ebpf.Program) error {
	l, err := link.AttachTracing(link.TracingOptions{Program: prog})
	if err != nil {
		return err
	}
	defer l.Close()
	fresh := pin + "_new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := l.Pin(fresh); err != nil {
		return err
	}
	if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(err, os.Remove(fresh))
	}
	return os.Rename(fresh, pin)
}

func cgroupID(path string) (uint64, error) {
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, path, 0)
	if err != nil {
		return 0, fmt.Errorf("read id of cgroup %s: %w", path, err)
	}
	if handle.Size() != 8 {
		return 0, fmt.Errorf("read id of cgroup %s: not on cgroup2", path)
	}
	return binary.NativeEndian.Uint64(handle.Bytes()), nil
}

func (k *Kernel) netnsPin(cookie uint64) string {
	return filepath.Join(k.dir, "netns", strconv.FormatUint(cookie, 10))
}

// AttachNetns puts the steering program on the network namespace behind
// nsFD, whose cookie is given. It may be called again: the link is then
// updated.
func (k *Kernel) AttachNetns(nsFD int, cookie uint64) error {
	c, err := k.instance([]string{"steer"}, map[string]any{"netns_cookie": cookie})
	if err != nil {
		return fmt.Errorf("attach steer to netns %d: %w", cookie, err)
	}
	defer c.Close()
	attach := func() (link.Link, error) { return link.AttachNetNs(nsFD, c.Programs["steer"]) }
	if _, err := attachOrUpdate(k.netnsPin(cookie), c.Programs["steer"], attach); err != nil {
		return fmt.Errorf("attach steer to netns %d: %w", cookie, err)
	}
	return nil
}

// DetachNetns takes the steering program off. One that is not there is no
// error.
func (k *Kernel) DetachNetns(cookie uint64) error {
	if err := removeLink(k.netnsPin(cookie)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("detach steer from netns %d: %w", cookie, err)
	}
	return nil
}

// attachOrUpdate moves the pinned link to prog, or attaches and pins a new
// one where there is none or the old one's netns or interface is gone.
func attachOrUpdate(pin string, prog *ebpf.Program, attach func() (link.Link, error)) (made bool, err error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		defer l.Close()
		if alive(l) {
			return false, l.Update(prog)
		}
		if err := os.Remove(pin); err != nil {
			return false, err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if l, err = attach(); err != nil {
		return false, err
	}
	defer l.Close()
	return true, l.Pin(pin)
}

// alive says whether what a link was attached to still exists.
func alive(l link.Link) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	if n := info.NetNs(); n != nil {
		return n.NetnsInode != 0
	}
	if t := info.TCX(); t != nil {
		return t.Ifindex != 0
	}
	return true
}

// Interface is one interface to watch.
type Interface struct {
	NetnsFD int // of the netns that the interface is in, -1: the agent's own
	Index   int
	// Cookie is of the netns whose flows pass there: the interface's own, or
	// for the host side of a workload's veth the workload's.
	Cookie uint64
	// Confined says that everything that comes from there is an enforced
	// workload's, whether or not the kernel still knows its socket. In that
	// case the direction from the workload is the ingress of the interface.
	Confined bool
}

func (i Interface) pin(dir, direction string) string {
	return filepath.Join(dir, "tcx", fmt.Sprintf("%d-%d-%s", i.Cookie, i.Index, direction))
}

// AttachInterface puts the backstop and the samples on an interface, by tcx
// (Linux 6.6). It may be called again: the links are then updated.
func (k *Kernel) AttachInterface(i Interface) error {
	err := inNetns(i.NetnsFD, func() error { return k.attachInterface(i) })
	if err != nil {
		return fmt.Errorf("attach to interface %d of netns %d: %w", i.Index, i.Cookie, err)
	}
	return nil
}

func (k *Kernel) attachInterface(i Interface) (err error) {
	nl, err := netlink.LinkByIndex(i.Index)
	if err != nil {
		return err
	}
	attrs := nl.Attrs()
	ethernet := attrs.EncapType == "ether" || attrs.EncapType == "loopback"
	loopback := attrs.EncapType == "loopback"
	var fresh []string
	defer func() {
		if err != nil {
			for _, pin := range fresh {
				err = errors.Join(err, removeLink(pin))
			}
		}
	}()
	for _, d := range []struct {
		direction, program string
		attach             ebpf.AttachType
		sampling           bool
	}{
		{"egress", "tc_egress", ebpf.AttachTCXEgress, true},
		// On lo every packet passes both.
		{"ingress", "tc_ingress", ebpf.AttachTCXIngress, !loopback},
	} {
		if i.Confined {
			// On the host side what leaves the workload comes in.
			d.program = map[string]string{"tc_egress": "tc_deliver", "tc_ingress": "tc_confined"}[d.program]
		}
		c, err := k.instance([]string{d.program}, map[string]any{
			"netns_cookie": i.Cookie, "ethernet": ethernet, "sampling": d.sampling,
		})
		if err != nil {
			return err
		}
		prog := c.Programs[d.program]
		pin := i.pin(k.dir, d.direction)
		made, err := attachOrUpdate(pin, prog, func() (link.Link, error) {
			return link.AttachTCX(link.TCXOptions{Interface: i.Index, Program: prog, Attach: d.attach})
		})
		c.Close()
		if err != nil {
			return err
		}
		if made {
			fresh = append(fresh, pin)
		}
	}
	return nil
}

// DetachInterface takes the programs off an interface. Ones that are not
// there are no error.
func (k *Kernel) DetachInterface(i Interface) error {
	for _, direction := range []string{"egress", "ingress"} {
		if err := removeLink(i.pin(k.dir, direction)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("detach from interface %d of netns %d: %w", i.Index, i.Cookie, err)
		}
	}
	return nil
}

// takeOverInstances moves the links of network namespaces and interfaces to
// this binary's programs and sweeps the pins of those that are gone.
func (k *Kernel) takeOverInstances() error {
	names, err := pinsIn(filepath.Join(k.dir, "netns"))
	if err != nil {
		return err
	}
	for _, name := range names {
		cookie, err := strconv.ParseUint(name, 10, 64)
		if err != nil {
			return fmt.Errorf("take over netns %q: %w", name, err)
		}
		if err := k.updatePinned(filepath.Join(k.dir, "netns", name), "steer", map[string]any{"netns_cookie": cookie}); err != nil {
			return fmt.Errorf("take over netns %d: %w", cookie, err)
		}
	}
	return k.sweep("tcx")
}

// updatePinned moves a link to a new instance, or removes its pin where
// what it was attached to is gone.
func (k *Kernel) updatePinned(pin, program string, constants map[string]any) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return err
	}
	defer l.Close()
	if !alive(l) {
		return os.Remove(pin)
	}
	c, err := k.instance([]string{program}, constants)
	if err != nil {
		return err
	}
	defer c.Close()
	return l.Update(c.Programs[program])
}

// Sweep removes the pins of network namespaces and interfaces that are gone.
func (k *Kernel) Sweep() error {
	if err := k.sweep("netns"); err != nil {
		return err
	}
	return k.sweep("tcx")
}

func (k *Kernel) sweep(sub string) error {
	names, err := pinsIn(filepath.Join(k.dir, sub))
	if err != nil {
		return err
	}
	for _, name := range names {
		pin := filepath.Join(k.dir, sub, name)
		l, err := link.LoadPinnedLink(pin, nil)
		if err != nil {
			return fmt.Errorf("sweep %s: %w", pin, err)
		}
		gone := !alive(l)
		l.Close()
		if gone {
			if err := os.Remove(pin); err != nil {
				return fmt.Errorf("sweep: %w", err)
			}
		}
	}
	return nil
}

// Netns returns the cookies of the network namespaces with a steering
// program.
func (k *Kernel) Netns() ([]uint64, error) {
	names, err := pinsIn(filepath.Join(k.dir, "netns"))
	if err != nil {
		return nil, err
	}
	var cookies []uint64
	for _, name := range names {
		if cookie, err := strconv.ParseUint(strings.TrimSpace(name), 10, 64); err == nil {
			cookies = append(cookies, cookie)
		}
	}
	return cookies, nil
}

// inNetns runs f on a thread of the network namespace; the thread ends with
// it.
func inNetns(fd int, f func() error) error {
	if fd < 0 {
		return f()
	}
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: nothing else may run in there
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			errs <- fmt.Errorf("enter netns: %w", err)
			return
		}
		errs <- f()
	}()
	return <-errs
}
