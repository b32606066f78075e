// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/bpf"
)

// Probe loads every program of the kernel half and attaches it to a cgroup
// beneath cgroupRoot and a network namespace that it makes for that and
// removes again. It returns what the kernel said, nil for success, by the
// program's name; the error is for what stood in the way of trying.
func Probe(cgroupRoot string) (map[string]error, error) {
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("raise memlock limit: %w", err)
	}
	spec, err := bpf.LoadKernel()
	if err != nil {
		return nil, fmt.Errorf("read kernel object: %w", err)
	}
	// Of the maps only the kinds matter here.
	for name, m := range spec.Maps {
		if m.Type != ebpf.RingBuf && name != ".rodata" && m.MaxEntries > 64 && name != "counters" && name != "event_windows" {
			m.MaxEntries = 64
		}
	}
	k := &Kernel{spec: spec}
	only := spec.Copy()
	only.Programs = nil
	c, err := ebpf.NewCollection(only)
	if err != nil {
		return nil, fmt.Errorf("make maps: %w", err)
	}
	err = c.Assign(&k.maps)
	c.Close()
	if err != nil {
		return nil, fmt.Errorf("make maps: %w", err)
	}
	dir, err := os.MkdirTemp(cgroupRoot, "sallyport-probe-")
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make cgroup: %w", err), k.Close())
	}
	results := make(map[string]error)
	for name := range spec.Programs {
		results[name] = k.try(name, dir)
	}
	return results, errors.Join(unix.Rmdir(dir), k.Close())
}

// try loads one program and attaches it to where it belongs.
func (k *Kernel) try(name, cgroup string) error {
	c, err := k.instance([]string{name}, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	prog := c.Programs[name]
	if at, ok := cgroupHooks[name]; ok {
		return done(link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: at, Program: prog}))
	}
	switch name {
	case "cgroup_mkdir":
		return done(link.AttachTracing(link.TracingOptions{Program: prog}))
	case "adopt":
		return done(link.AttachIter(link.IterOptions{Program: prog}))
	case "steer":
		return inNewNetns(func(fd int) error { return done(link.AttachNetNs(fd, prog)) })
	case "tc_egress", "tc_deliver":
		return inNewNetns(func(int) error {
			return done(link.AttachTCX(link.TCXOptions{Interface: 1, Program: prog, Attach: ebpf.AttachTCXEgress}))
		})
	case "tc_ingress", "tc_confined":
		return inNewNetns(func(int) error {
			return done(link.AttachTCX(link.TCXOptions{Interface: 1, Program: prog, Attach: ebpf.AttachTCXIngress}))
		})
	}
	return nil // attached to nothing: it is called
}

func done[L io.Closer](l L, err error) error {
	if err != nil {
		return err
	}
	return l.Close()
}

// inNewNetns runs f in a network namespace of its own, that ends with it.
func inNewNetns(f func(fd int) error) error {
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the netns ends with the thread
		errs <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("make netns: %w", err)
			}
			ns, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return fmt.Errorf("make netns: %w", err)
			}
			defer ns.Close()
			return f(int(ns.Fd()))
		}()
	}()
	return <-errs
}
