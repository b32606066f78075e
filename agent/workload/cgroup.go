// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// CgroupRoot returns where cgroup2 is mounted: /sys/fs/cgroup, or beneath it
// on a hybrid layout.
func CgroupRoot() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	defer f.Close()
	path, err := cgroupRoot(f)
	if err != nil {
		return "", err
	}
	return path, nil
}

// cgroupRoot reads mountinfo (proc(5)): the mount point is the fifth field,
// the type the first one after the dash. A mount of a subtree (a container's)
// has another root than "/" and is passed over.
func cgroupRoot(r io.Reader) (string, error) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		f := strings.Fields(before)
		if ok && len(f) >= 5 && strings.HasPrefix(after, "cgroup2 ") && f[3] == "/" {
			return unescapeMount(f[4]), nil
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	return "", errors.New("find cgroup2: it is not mounted; mount -t cgroup2 none /sys/fs/cgroup")
}

// unescapeMount undoes the octal escapes of mountinfo.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// cgroupID returns the number by which the kernel knows the cgroup at path:
// that of its directory.
func cgroupID(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

// leaf says whether a cgroup has none beneath it: kernfs counts a directory's
// children in its links.
func leaf(st *unix.Stat_t) bool { return st.Nlink == 2 }

// maxProcs bounds how many processes of one cgroup are looked at; where there
// are more, one more is listed, so that it is known.
const maxProcs = 4096

// processes lists the processes of the cgroup at path, not those beneath it.
// A threaded cgroup has none of its own.
func processes(path string) ([]int, error) {
	b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return nil, err
	}
	var all []int
	for line := range bytes.Lines(b) {
		if len(all) > maxProcs {
			break
		}
		if pid, err := strconv.Atoi(string(bytes.TrimSpace(line))); err == nil && pid > 0 {
			all = append(all, pid)
		}
	}
	return all, nil
}

// gone says whether an error means that a cgroup or process has ended.
func gone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH)
}
