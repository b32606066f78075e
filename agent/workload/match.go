// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/policies/compile"
)

// Identity is a MachineIdentity as it is recognised. Unit or Path is set, or
// both; every line that is set must match.
type Identity struct {
	Name string // NAMESPACE/NAME
	// Unit is a unit of the system manager, as in payments.service. It is
	// matched on the manager's own path, /system.slice/UNIT (a template's
	// instance: /system.slice/system-TEMPLATE.slice/UNIT): a delegated
	// subtree can hold any name.
	Unit string
	// Path is a cgroup, absolute beneath the scope; what is beneath it
	// belongs to it.
	Path string
	// UID, Binary and Digest narrow: every process of the cgroup must match, and
	// there must be one, and none beneath it that is nobody's. A process that joins
	// later is noticed at the next scan, so they tell workloads apart but
	// confine none.
	UID    *uint32
	Binary string
	// Digest is the SHA-256 that the content of Binary must have, nil for any.
	Digest *[sha256.Size]byte
	// Endpoints are the addresses where it serves.
	Endpoints []netip.AddrPort
}

// roots returns the paths beneath the scope where the identity's cgroups
// begin.
func (i *Identity) roots() []string {
	var units []string
	if unit := compile.UnitPath(i.Unit); unit != "" {
		units = append(units, unit)
	}
	switch {
	case i.Path == "":
		return units
	case i.Unit == "":
		return []string{i.Path}
	}
	// Both: the unit, where it is the path or beneath it, or above it.
	var both []string
	for _, u := range units {
		if within(u, i.Path) {
			both = append(both, u)
		} else if within(i.Path, u) {
			both = append(both, i.Path)
		}
	}
	return both
}

// within says whether p is root or beneath it; both are clean and absolute.
func within(p, root string) bool {
	return p == root || root == "/" || strings.HasPrefix(p, root) && p[len(root)] == '/'
}

// narrowed says whether more than the cgroup is asked for.
func (i *Identity) narrowed() bool { return i.UID != nil || i.Binary != "" || i.Digest != nil }

// mismatch returns which line of the identity process pid does not match, ""
// if it matches all. A process that cannot be looked at matches none.
func (i *Identity) mismatch(pid int, d *digests) string {
	proc := "/proc/" + strconv.Itoa(pid)
	if i.UID != nil {
		var st unix.Stat_t
		if err := unix.Stat(proc, &st); err != nil {
			return "uid: cannot be read"
		}
		if st.Uid != *i.UID {
			return fmt.Sprintf("uid: is %d, want %d", st.Uid, *i.UID)
		}
	}
	if i.Binary != "" {
		exe, err := os.Readlink(proc + "/exe")
		if err != nil {
			return "process.binary: cannot be read"
		}
		if exe != i.Binary {
			return fmt.Sprintf("process.binary: is %q, want %q", exe, i.Binary)
		}
	}
	if i.Digest != nil {
		switch sum, err := d.of(pid); {
		case err != nil:
			return "process.digest: " + err.Error()
		case sum != *i.Digest:
			return fmt.Sprintf("process.digest: is sha256:%x, want sha256:%x", sum, *i.Digest)
		}
	}
	return ""
}

// by says by what the identity recognises its workloads.
func (i *Identity) by() string {
	var lines []string
	if i.Unit != "" {
		lines = append(lines, "systemd.unit "+i.Unit)
	}
	if i.Path != "" {
		lines = append(lines, "cgroup.path "+i.Path)
	}
	if i.UID != nil {
		lines = append(lines, fmt.Sprint("uid ", *i.UID))
	}
	if i.Binary != "" {
		lines = append(lines, "process.binary "+i.Binary)
	}
	if i.Digest != nil {
		lines = append(lines, fmt.Sprintf("process.digest sha256:%x", *i.Digest))
	}
	return strings.Join(lines, ", ")
}

// valid says whether the identity can be looked for.
func (i *Identity) valid() error {
	if i.Path != "" && (!path.IsAbs(i.Path) || path.Clean(i.Path) != i.Path) {
		return fmt.Errorf("%s: cgroup.path %q is not a clean absolute path", i.Name, i.Path)
	}
	if i.Path == "/" {
		return fmt.Errorf("%s: cgroup.path / would be every workload", i.Name)
	}
	if len(i.roots()) == 0 {
		return fmt.Errorf("%s: neither systemd.unit nor cgroup.path names a cgroup (%s)", i.Name, i.by())
	}
	return nil
}
