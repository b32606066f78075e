// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// What is pinned where, beneath the pin directory.
var subdirs = []string{"maps", "links", "netns", "tcx"}

const layoutPin = "layout"

// CgroupMount returns where cgroup2 is mounted: /sys/fs/cgroup, or a
// directory of it on a hybrid layout.
func CgroupMount() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		before, after, ok := strings.Cut(s.Text(), " - ")
		fields := strings.Fields(before)
		if ok && len(fields) > 4 && strings.HasPrefix(after, "cgroup2 ") {
			return unescapeMount(fields[4]), nil
		}
	}
	if err := s.Err(); err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	return "", fmt.Errorf("find cgroup2: it is not mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

// unescapeMount undoes the octal escapes of proc_pid_mountinfo(5).
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// mountBPF makes sure that dir is a directory on bpffs, and mounts one at
// its parent where there is none.
func mountBPF(dir string, log *slog.Logger) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) &&
		!errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("make pin directory %s: %w", dir, err)
	}
	if on, err := onBPF(dir); err == nil && on {
		return os.Chmod(dir, 0o700)
	}
	parent := filepath.Dir(dir)
	if on, err := onBPF(parent); err != nil || !on {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("use %s for pins: it is not on bpffs and holds other files", dir)
		}
		if err := os.MkdirAll(parent, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", parent, err)
		}
		if err := unix.Mount("bpf", parent, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			return fmt.Errorf("mount bpffs at %s: %w: mount it by hand, or set pinDir to a directory of an existing bpffs", parent, err)
		}
		log.Info("mounted bpffs", "path", parent)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make pin directory %s: %w", dir, err)
	}
	return nil
}

func onBPF(dir string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, err
	}
	return st.Type == unix.BPF_FS_MAGIC, nil
}

func readLayout(dir string) (version uint32, found bool, err error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(dir, layoutPin), &ebpf.LoadPinOptions{ReadOnly: true})
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("read layout version of %s: %w", dir, err)
	}
	defer m.Close()
	if err := m.Lookup(uint32(0), &version); err != nil {
		return 0, false, fmt.Errorf("read layout version of %s: %w", dir, err)
	}
	return version, true, nil
}

func writeLayout(dir string) error {
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "layout", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		return fmt.Errorf("write layout version: %w", err)
	}
	defer m.Close()
	if err := m.Put(uint32(0), uint32(layoutVersion)); err != nil {
		return fmt.Errorf("write layout version: %w", err)
	}
	if err := m.Pin(filepath.Join(dir, layoutPin)); err != nil {
		return fmt.Errorf("pin layout version: %w", err)
	}
	return nil
}

// Uninstall removes every pin beneath pinDir, which detaches every program,
// and returns what it removed. It refuses while an agent is alive.
func Uninstall(pinDir string) (removed []string, err error) {
	if pinDir == "" {
		pinDir = DefaultPinDir
	}
	d, err := os.Open(pinDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("uninstall %s: %w", pinDir, err)
	}
	defer d.Close()
	if on, err := onBPF(pinDir); err != nil || !on {
		return nil, fmt.Errorf("uninstall %s: not on bpffs", pinDir)
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("uninstall %s: %w: stop it first", pinDir, ErrBusy)
	}
	if err := removePins(pinDir, &removed); err != nil {
		return removed, err
	}
	if err := os.Remove(pinDir); err != nil {
		return removed, fmt.Errorf("uninstall: %w", err)
	}
	return removed, nil
}

// removePins removes what we pin beneath dir: links first, so that no
// program runs on maps that are half gone.
func removePins(dir string, removed *[]string) error {
	for _, sub := range []string{"links", "netns", "tcx", "maps"} {
		entries, err := os.ReadDir(filepath.Join(dir, sub))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read pins: %w", err)
		}
		for _, e := range entries {
			path := filepath.Join(dir, sub, e.Name())
			remove := removeLink
			if sub == "maps" {
				remove = os.Remove
			}
			if err := remove(path); err != nil {
				return fmt.Errorf("remove pin: %w", err)
			}
			if removed != nil {
				*removed = append(*removed, path)
			}
		}
		if err := os.Remove(filepath.Join(dir, sub)); err != nil {
			return fmt.Errorf("remove pins: %w", err)
		}
	}
	path := filepath.Join(dir, layoutPin)
	if err := os.Remove(path); err == nil && removed != nil {
		*removed = append(*removed, path)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin: %w", err)
	}
	return nil
}

// removeLink detaches a pinned link and removes the pin. Removing alone would
// let the program run on until the kernel gets round to it. One that is not
// there is fs.ErrNotExist.
func removeLink(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return err
	}
	defer l.Close()
	// Some links cannot be detached, and some have nothing left to be
	// detached from: removing the pin is then all there is to do.
	_ = l.Detach()
	return os.Remove(pin)
}

func pinsIn(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read pins: %w", err)
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names, nil
}
