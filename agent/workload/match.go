// SPDX-License-Identifier: Apache-2.0

package workload

import (
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
	// All is every workload that no other identity selects: it stands alone.
	All bool
	// Unit is a unit of the system manager, as in payments.service. It is
	// matched on the manager's own path, /system.slice/UNIT (a template's
	// instance: /system.slice/system-TEMPLATE.slice/UNIT): a delegated
	// subtree can hold any name.
	Unit string
	// Path is a cgroup, absolute beneath the scope; what is beneath it
	// belongs to it.
	Path string
	// UID, Binary and Digest narrow: every process of the cgroup must match,
	// and there must be one, and none beneath it that is nobody's. A process
	// that joins later is noticed at the next scan, so they tell workloads
	// apart but confine none.
	UID    *uint32
	Binary string
	// Digest is that of the content of what they run, sha256: and 64 lower-case
	// digits, "" for any; with Binary.
	Digest string
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
func (i *Identity) narrowed() bool { return i.UID != nil || i.Binary != "" }

// looker looks at processes, for the time of one scan.
type looker struct {
	digests *digests
	mounts  mounts
}

// mismatch returns which line of the identity process pid does not match, ""
// if it matches all. A process that cannot be looked at matches none.
func (l looker) mismatch(i *Identity, pid int) string {
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
		return l.program(i, pid)
	}
	return ""
}

// program is mismatch for what the process runs.
func (l looker) program(i *Identity, pid int) string {
	if i.Digest == "" {
		exe, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
		if err != nil {
			return "process.binary: cannot be read"
		}
		if exe != i.Binary {
			return fmt.Sprintf("process.binary: is %q, want %q", exe, i.Binary)
		}
		return ""
	}
	// Path and content of one file, though the process may run another one
	// meanwhile.
	exe, err := openProgram(pid)
	if err != nil {
		return "process.binary: cannot be read"
	}
	defer exe.close()
	// What was replaced on the disk is still what runs, and its content is
	// known: an upgrade takes the identity from nobody before its restart.
	if strings.TrimSuffix(exe.path, " (deleted)") != i.Binary {
		return fmt.Sprintf("process.binary: is %q, want %q", exe.path, i.Binary)
	}
	if err := l.mounts.vouch(pid, exe); err != nil {
		return "process.digest: " + err.Error()
	}
	sum, err := l.digests.of(exe)
	if err != nil {
		return "process.digest: " + err.Error()
	}
	if sum != i.Digest {
		return fmt.Sprintf("process.digest: is %s, want %s", sum, i.Digest)
	}
	return ""
}

// by says by what the identity recognises its workloads.
func (i *Identity) by() string {
	if i.All {
		return "all"
	}
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
	if i.Digest != "" {
		lines = append(lines, "process.digest "+i.Digest)
	}
	return strings.Join(lines, ", ")
}

// valid says whether the identity can be looked for.
func (i *Identity) valid() error {
	if i.All {
		return nil
	}
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
