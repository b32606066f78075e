// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// lab is the ground that the demo stands on: network namespaces joined by
// veth pairs, and a cgroup subtree. close takes all of it away again.
type lab struct {
	name    string // unique on this machine
	dir     string // files of the nodes
	cgroup  string // absolute folder of the demo's subtree
	spaces  map[string]netns.NsHandle
	pinDirs []string
}

// newLab makes the namespaces a, b and x (a stranger) and the links a-b and
// x-b between them, over IPv4 and IPv6.
func newLab() (_ *lab, err error) {
	l := &lab{name: fmt.Sprintf("sallyport-demo-%d", os.Getpid()), spaces: map[string]netns.NsHandle{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if l.dir, err = os.MkdirTemp("", l.name+"-"); err != nil {
		return nil, fmt.Errorf("make folder: %w", err)
	}
	// The userspace process runs as another user and must reach its own
	// folder below.
	if err = os.Chmod(l.dir, 0o755); err != nil {
		return nil, fmt.Errorf("open folder %s: %w", l.dir, err)
	}
	root, err := cgroup2Mount()
	if err != nil {
		return nil, err
	}
	l.cgroup = filepath.Join(root, l.name)
	if err = os.Mkdir(l.cgroup, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	for _, s := range []string{"a", "b", "x"} {
		if err = l.addSpace(s); err != nil {
			return nil, err
		}
	}
	if err = l.link("a", "b", 1); err != nil {
		return nil, err
	}
	if err = l.link("x", "b", 3); err != nil {
		return nil, err
	}
	return l, nil
}

// addresses of the demo: 10.77.N.1 and fd77:N::1 on the left of link N,
// .2 and ::2 on its right.
func linkAddrs(n, side int) []string {
	return []string{fmt.Sprintf("10.77.%d.%d/24", n, side), fmt.Sprintf("fd77:%d::%d/64", n, side)}
}

func (l *lab) addSpace(s string) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	if err != nil {
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer home.Close()
	h, err := netns.New()
	if err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	l.spaces[s] = h
	if err := netns.Set(home); err != nil {
		// This thread is of no more use; the process is about to end.
		return fmt.Errorf("return to own network namespace: %w", err)
	}
	return l.in(s, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		return netlink.LinkSetUp(lo)
	})
}

// in runs f on a thread inside the namespace s.
func (l *lab) in(s string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		// The thread is not unlocked: it ends with the goroutine and takes
		// the namespace with it.
		runtime.LockOSThread()
		if err := netns.Set(l.spaces[s]); err != nil {
			done <- fmt.Errorf("enter namespace %s: %w", s, err)
			return
		}
		done <- f()
	}()
	return <-done
}

func (l *lab) link(left, right string, n int) error {
	lName, rName := fmt.Sprintf("to-%s", right), fmt.Sprintf("to-%s", left)
	err := l.in(left, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = lName
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: rName, PeerNamespace: netlink.NsFd(int(l.spaces[right]))})
	})
	if err != nil {
		return fmt.Errorf("link %s and %s: %w", left, right, err)
	}
	if err := l.in(left, func() error { return setUp(lName, linkAddrs(n, 1), n, 2) }); err != nil {
		return err
	}
	return l.in(right, func() error { return setUp(rName, linkAddrs(n, 2), n, 1) })
}

func setUp(name string, addrs []string, n, peer int) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return fmt.Errorf("parse %s: %w", a, err)
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add %s to %s: %w", a, name, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	if peer != 2 {
		return nil
	}
	// What lies beyond the neighbour is reached through it.
	for _, gw := range []string{fmt.Sprintf("10.77.%d.2", n), fmt.Sprintf("fd77:%d::2", n)} {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gw)}); err != nil {
			return fmt.Errorf("route by %s: %w", gw, err)
		}
	}
	return nil
}

// addCgroup makes a cgroup below the demo's and returns its folder.
func (l *lab) addCgroup(path string) (string, error) {
	dir := filepath.Join(l.cgroup, path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make cgroup %s: %w", path, err)
	}
	return dir, nil
}

// close removes what newLab made. The processes must have ended.
func (l *lab) close() error {
	var errs []error
	for _, h := range l.spaces {
		errs = append(errs, h.Close())
	}
	if l.cgroup != "" {
		errs = append(errs, removeCgroups(l.cgroup))
	}
	for _, d := range l.pinDirs {
		errs = append(errs, os.RemoveAll(d))
	}
	if l.dir != "" {
		errs = append(errs, os.RemoveAll(l.dir))
	}
	return errors.Join(errs...)
}

// removeCgroups removes a subtree from the leaves up. A cgroup whose last
// process has just ended may be busy for a moment longer.
func removeCgroups(root string) error {
	var dirs []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("list cgroups below %s: %w", root, err)
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		deadline := time.Now().Add(5 * time.Second)
		for {
			err = unix.Rmdir(dirs[i])
			if err == nil || errors.Is(err, unix.ENOENT) {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				return fmt.Errorf("remove cgroup %s: %w", dirs[i], err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return nil
}

// cgroup2Mount finds where cgroup2 is mounted: alone on /sys/fs/cgroup, or
// beside the first version on a folder of its own.
func cgroup2Mount() (string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("read mounts: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(line, " - ")
		if f := strings.Fields(before); ok && strings.HasPrefix(after, "cgroup2 ") && len(f) > 4 {
			return f[4], nil
		}
	}
	return "", errors.New("find cgroup2: it is not mounted; mount -t cgroup2 none /sys/fs/cgroup")
}

// awaitListener waits until something accepts at an address in a namespace.
func (l *lab) awaitListener(ctx context.Context, space, addr string, p *process) error {
	return waitFor(ctx, p, "listen at "+addr, func() bool {
		return l.in(space, func() error {
			c, err := net.DialTimeout("tcp", addr, time.Second)
			if err != nil {
				return err
			}
			return c.Close()
		}) == nil
	})
}
