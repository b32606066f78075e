// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/sockdiag"
)

// Lab is the ground that nodes stand on: network namespaces joined by veth
// pairs, and a cgroup subtree. Close takes all of it away again.
type Lab struct {
	Dir       string // files of the nodes
	name      string // unique on this machine
	program   string // the sallyport binary
	cgroup    string // absolute folder of the lab's subtree
	spaces    map[string]netns.NsHandle
	pinDirs   []string
	authority string // its address, once it runs
}

// New makes a lab without namespaces. Its name, to which this process's id is
// added, tells it from others; program is the sallyport binary that its nodes
// run.
func New(name, program string) (_ *Lab, err error) {
	l := &Lab{name: fmt.Sprintf("%s-%d", name, os.Getpid()), program: program, spaces: map[string]netns.NsHandle{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if l.Dir, err = os.MkdirTemp("", l.name+"-"); err != nil {
		return nil, fmt.Errorf("make folder: %w", err)
	}
	// The userspace process runs as another user and must reach its own
	// folder below.
	if err = os.Chmod(l.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("open folder %s: %w", l.Dir, err)
	}
	root, err := cgroup2Mount()
	if err != nil {
		return nil, err
	}
	l.cgroup = filepath.Join(root, l.name)
	if err = os.Mkdir(l.cgroup, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	return l, nil
}

// linkAddrs are 10.77.N.1 and fd77:N::1 on the left of link N, .2 and ::2 on
// its right.
func linkAddrs(n, side int) []string {
	return []string{fmt.Sprintf("10.77.%d.%d/24", n, side), fmt.Sprintf("fd77:%d::%d/64", n, side)}
}

// AddSpace makes the network namespace s, with its loopback up.
func (l *Lab) AddSpace(s string) error {
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
	return l.In(s, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		return netlink.LinkSetUp(lo)
	})
}

// In runs f on a thread inside the namespace s.
func (l *Lab) In(s string, f func() error) error {
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

// Space is the descriptor of a namespace, the lab's own.
func (l *Lab) Space(s string) int { return int(l.spaces[s]) }

// Link joins two namespaces by veth pair n, with the addresses 10.77.n.1 and
// fd77:n::1 on the left, 10.77.n.2 and fd77:n::2 on the right. Left reaches
// what lies beyond right through it.
func (l *Lab) Link(left, right string, n int) error {
	lName, rName := fmt.Sprintf("to-%s", right), fmt.Sprintf("to-%s", left)
	err := l.In(left, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = lName
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: rName, PeerNamespace: netlink.NsFd(int(l.spaces[right]))})
	})
	if err != nil {
		return fmt.Errorf("link %s and %s: %w", left, right, err)
	}
	if err := l.In(left, func() error { return setUp(lName, linkAddrs(n, 1), n, 2) }); err != nil {
		return err
	}
	return l.In(right, func() error { return setUp(rName, linkAddrs(n, 2), n, 1) })
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

// AddCgroup makes a cgroup below the lab's and returns its folder.
func (l *Lab) AddCgroup(path string) (string, error) {
	dir := filepath.Join(l.cgroup, path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make cgroup %s: %w", path, err)
	}
	return dir, nil
}

// Close removes what the lab has made. The processes must have ended.
func (l *Lab) Close() error {
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
	if l.Dir != "" {
		errs = append(errs, os.RemoveAll(l.Dir))
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
	for _, dir := range slices.Backward(dirs) {
		deadline := time.Now().Add(5 * time.Second)
		for {
			err = unix.Rmdir(dir)
			if err == nil || errors.Is(err, unix.ENOENT) {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				return fmt.Errorf("remove cgroup %s: %w", dir, err)
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

// AwaitListener waits until something accepts at an address in a namespace.
func (l *Lab) AwaitListener(ctx context.Context, space, addr string, p *Process) error {
	return WaitFor(ctx, p, "listen at "+addr, func() bool {
		return l.In(space, func() error {
			c, err := net.DialTimeout("tcp", addr, time.Second)
			if err != nil {
				return err
			}
			return c.Close()
		}) == nil
	})
}

// Listening says whether a socket listens at an IPv4 address in a namespace,
// by what the kernel knows: nothing is connected to, so that it tells of a
// protected server too.
func (l *Lab) Listening(space string, addr netip.AddrPort) bool {
	c, err := sockdiag.Open(int(l.spaces[space]))
	if err != nil {
		return false
	}
	defer c.Close() //nolint:errcheck // nothing to be done about it
	list, err := c.List(sockdiag.Listen)
	return err == nil && slices.ContainsFunc(list, func(s sockdiag.Socket) bool { return s.Local == addr })
}
