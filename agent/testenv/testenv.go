// SPDX-License-Identifier: Apache-2.0

// Package testenv makes the surroundings that tests of the agent need in the
// live kernel: cgroups, network namespaces, veth pairs, and processes inside
// them. Everything is undone when the test that asked for it ends. It is
// imported by tests only.
package testenv

import (
	"bufio"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/testenv"
)

// init keeps goroutines that change their thread's namespace off the first
// thread, which cannot end with them and is what /proc/self shows.
func init() { runtime.LockOSThread() }

// RequireRoot skips the test where it does not run as root, which is the
// only prerequisite that a machine may lack.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: loads BPF programs and makes namespaces")
	}
}

// Missing skips the test for what is not there, or fails it where CI says that
// everything is.
func Missing(t testing.TB, what string) {
	t.Helper()
	testenv.Missing(t, what)
}

// Suffix returns a name part that no other test uses.
func Suffix() string {
	var b [5]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails
	return fmt.Sprintf("%d-%s", os.Getpid(), hex.EncodeToString(b[:]))
}

// CgroupMount returns where cgroup2 is mounted, also on a hybrid layout.
func CgroupMount(t testing.TB) string {
	t.Helper()
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		before, after, ok := strings.Cut(s.Text(), " - ")
		fields := strings.Fields(before)
		if ok && len(fields) > 4 && strings.HasPrefix(after, "cgroup2 ") {
			return fields[4]
		}
	}
	Missing(t, "cgroup2 is not mounted")
	return ""
}

// Cgroup is a cgroup2 directory that a test made.
type Cgroup struct {
	Path string // in the file system
	ID   uint64 // what bpf_get_current_cgroup_id returns in it
}

// BPFFS mounts a bpffs of the test's own, and returns where.
func BPFFS(t testing.TB) string {
	t.Helper()
	RequireRoot(t)
	dir := filepath.Join(t.TempDir(), "bpf")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	Unmounts(t, dir)
	return dir
}

// Unmounts has a mount go with the test. Somebody else on the machine who walks
// through all mounts may be in it just then; who holds it keeps it.
func Unmounts(t testing.TB, dir string) {
	t.Cleanup(func() {
		err := unix.Unmount(dir, 0)
		for late := time.Now().Add(10 * time.Second); errors.Is(err, unix.EBUSY) && time.Now().Before(late); err = unix.Unmount(dir, 0) {
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// NewCgroup makes a cgroup beneath parent, or beneath the root of the
// hierarchy where parent is nil. At the end of the test its processes are
// killed and it is removed.
func NewCgroup(t testing.TB, parent *Cgroup) *Cgroup {
	t.Helper()
	dir := ""
	if parent != nil {
		dir = parent.Path
	} else {
		dir = CgroupMount(t)
	}
	return MakeCgroup(t, filepath.Join(dir, "sallyport-test-"+Suffix()))
}

// MakeCgroup makes the cgroup with that path, like NewCgroup does.
func MakeCgroup(t testing.TB, path string) *Cgroup {
	t.Helper()
	RequireRoot(t)
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := RemoveCgroup(path); err != nil {
			t.Errorf("remove cgroup %s: %v", path, err)
		}
	})
	id, err := CgroupID(path)
	if err != nil {
		t.Fatal(err)
	}
	return &Cgroup{Path: path, ID: id}
}

// CgroupID returns the id by which the kernel knows the cgroup at path.
func CgroupID(path string) (uint64, error) {
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, path, 0)
	if err != nil {
		return 0, fmt.Errorf("read id of cgroup %s: %w", path, err)
	}
	if handle.Size() != 8 {
		return 0, fmt.Errorf("read id of cgroup %s: handle of %d bytes", path, handle.Size())
	}
	return binary.NativeEndian.Uint64(handle.Bytes()), nil
}

// RemoveCgroup kills what lives in the cgroup and removes it. One that is
// not there any more is no error.
func RemoveCgroup(path string) error {
	if err := os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := waitEmpty(path, 10*time.Second); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := unix.Rmdir(path); err != nil && err != unix.ENOENT {
		return err
	}
	return nil
}

func waitEmpty(path string, limit time.Duration) error {
	f, err := os.Open(filepath.Join(path, "cgroup.events"))
	if err != nil {
		return err
	}
	defer f.Close()
	deadline := time.Now().Add(limit)
	for {
		var b [256]byte
		n, err := f.ReadAt(b[:], 0)
		if n == 0 {
			return err
		}
		if strings.Contains(string(b[:n]), "populated 0") {
			return nil
		}
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("cgroup %s is still populated", path)
		}
		p := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
		if _, err := unix.Poll(p, int(left.Milliseconds())+1); err != nil && err != unix.EINTR {
			return err
		}
	}
}

// Netns is a network namespace, held by descriptor.
type Netns struct {
	File   *os.File
	Cookie uint64 // SO_NETNS_COOKIE
}

// NewNetns makes a network namespace with its loopback interface up. It
// lives until the test ends and nothing else is in it.
func NewNetns(t testing.TB) *Netns {
	t.Helper()
	RequireRoot(t)
	n := &Netns{}
	errs := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine and no other
		// goroutine ever runs in the new namespace.
		runtime.LockOSThread()
		errs <- func() (err error) {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("make netns: %w", err)
			}
			if n.File, err = os.Open("/proc/thread-self/ns/net"); err != nil {
				return err
			}
			return loopbackUp()
		}()
	}()
	if err := <-errs; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.File.Close() })
	cookie, err := n.cookie()
	if err != nil {
		t.Fatal(err)
	}
	n.Cookie = cookie
	return n
}

// HostNetns returns the network namespace that the test runs in.
func HostNetns(t testing.TB) *Netns {
	t.Helper()
	f, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	n := &Netns{File: f}
	if n.Cookie, err = n.cookie(); err != nil {
		t.Fatal(err)
	}
	return n
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

func (n *Netns) cookie() (cookie uint64, err error) {
	err = n.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return err
	})
	return cookie, err
}

// Do runs f on a thread that is in the network namespace. Sockets that f
// makes stay there; goroutines that it starts do not.
func (n *Netns) Do(f func() error) error {
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked, like in NewNetns
		if err := unix.Setns(int(n.File.Fd()), unix.CLONE_NEWNET); err != nil {
			errs <- fmt.Errorf("enter netns: %w", err)
			return
		}
		errs <- f()
	}()
	return <-errs
}

// Listen opens a TCP listener (never MPTCP) in the network namespace, in
// the test's own cgroup.
func (n *Netns) Listen(t testing.TB, network string, addr netip.AddrPort) *net.TCPListener {
	t.Helper()
	var l net.Listener
	err := n.Do(func() (err error) {
		var c net.ListenConfig
		c.SetMultipathTCP(false)
		l, err = c.Listen(t.Context(), network, addr.String())
		return err
	})
	if err != nil {
		t.Fatalf("listen on %s: %v", addr, err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// Veth joins two network namespaces by a pair of interfaces, both called
// name, gives each end its addresses (without duplicate address detection)
// and brings it up. It returns the interface index at either end.
func Veth(t testing.TB, name string, a, b *Netns, addrA, addrB []netip.Prefix) (indexA, indexB int) {
	t.Helper()
	err := a.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name, Namespace: netlink.NsFd(int(a.File.Fd()))},
			PeerName:  name, PeerNamespace: netlink.NsFd(int(b.File.Fd())),
		})
	})
	if err != nil {
		t.Fatalf("make veth pair: %v", err)
	}
	up := func(n *Netns, addrs []netip.Prefix) (index int) {
		h, err := netlink.NewHandleAt(netns.NsHandle(n.File.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		l, err := h.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range addrs {
			ip := net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
			addr := &netlink.Addr{IPNet: &ip}
			if p.Addr().Is6() {
				addr.Flags = unix.IFA_F_NODAD
			}
			if err := h.AddrAdd(l, addr); err != nil {
				t.Fatalf("add %s: %v", p, err)
			}
		}
		if err := h.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
		return l.Attrs().Index
	}
	return up(a, addrA), up(b, addrB)
}

// Start starts cmd in the cgroup and the network namespace (nil: the test's
// own). At the end of the test it is killed and waited for.
func Start(t testing.TB, cg *Cgroup, n *Netns, cmd *exec.Cmd) {
	t.Helper()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	if cg != nil {
		dir, err := os.Open(cg.Path)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	start := cmd.Start
	if n != nil {
		start = func() error { return n.Do(cmd.Start) }
	}
	if err := start(); err != nil {
		t.Fatalf("start %s: %v", cmd.Path, err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended by itself
		_ = cmd.Wait()
	})
}
