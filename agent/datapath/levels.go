// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/loader"
)

// allLevels makes the kernel look for an identity at every ancestor.
const allLevels = ^uint32(0)

// levels finds out how deep cgroups are, so that the kernel need look only
// at the ancestors that may have an identity: what has none pays for the
// search with every socket it makes.
type levels struct {
	mount *os.File // nil where depths cannot be told
	path  string
}

// rootID is the id of the root of a cgroup2 hierarchy.
const rootID = 1

// openLevels never fails: where the mount does not show the whole hierarchy,
// every level counts as used.
func openLevels() levels {
	path, err := loader.CgroupMount()
	if err != nil {
		return levels{}
	}
	if id, err := cgroupIDOf(path); err != nil || id != rootID {
		return levels{}
	}
	mount, err := os.Open(path)
	if err != nil {
		return levels{}
	}
	return levels{mount, path}
}

func cgroupIDOf(path string) (uint64, error) {
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, path, 0)
	if err != nil {
		return 0, fmt.Errorf("read id of cgroup %s: %w", path, err)
	}
	if handle.Size() != 8 {
		return 0, fmt.Errorf("read id of cgroup %s: not on cgroup2", path)
	}
	return binary.NativeEndian.Uint64(handle.Bytes()), nil
}

// kernfsHandle is FILEID_KERNFS, the type of a file handle of kernfs.
const kernfsHandle = 0xfe

// bit is the bit of a cgroup's level, allLevels where it cannot be told.
func (l levels) bit(cgroupID uint64) uint32 {
	fd, err := l.open(cgroupID)
	if err != nil {
		return allLevels
	}
	defer unix.Close(fd)
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return allLevels
	}
	rel, err := filepath.Rel(l.path, path)
	if err != nil || strings.HasPrefix(rel, "..") {
		return allLevels
	}
	return pathBit(rel)
}

// gone says that a cgroup does not exist any more, false where that cannot
// be told.
func (l levels) gone(cgroupID uint64) bool {
	fd, err := l.open(cgroupID)
	if err == nil {
		unix.Close(fd)
	}
	return errors.Is(err, unix.ESTALE)
}

func (l levels) open(cgroupID uint64) (fd int, err error) {
	if l.mount == nil {
		return -1, unix.ENOENT
	}
	handle := unix.NewFileHandle(kernfsHandle, binary.NativeEndian.AppendUint64(nil, cgroupID))
	return unix.OpenByHandleAt(int(l.mount.Fd()), handle, unix.O_PATH|unix.O_CLOEXEC)
}

// deepest is MAX_LEVELS of bpf/include/abi.h.
const deepest = 16

// pathBit is the bit of the level of a path below the root of the hierarchy.
// The root itself is not looked at: nothing can inherit from it.
func pathBit(path string) uint32 {
	depth := 0
	for name := range strings.SplitSeq(path, "/") {
		if name != "" && name != "." {
			depth++
		}
	}
	if depth >= deepest {
		return 0 // not inherited: waits for the scan
	}
	return 1 << depth
}

// useLevels adds levels to those that the kernel looks at.
func (d *Datapath) useLevels(bits uint32) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.control.Levels|bits == d.control.Levels {
		return nil
	}
	d.control.Levels |= bits
	return d.writeControl()
}

// narrowLevels makes the kernel look at these levels and no others.
func (d *Datapath) narrowLevels(bits uint32) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.control.Levels == bits {
		return nil
	}
	d.control.Levels = bits
	if err := d.writeControl(); err != nil {
		return fmt.Errorf("narrow levels: %w", err)
	}
	return nil
}
