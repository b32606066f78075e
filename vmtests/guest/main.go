// SPDX-License-Identifier: Apache-2.0

// Command guest is the init of the machines of vmtests. As the first process
// it starts itself once more and reaps what is left to it; that second process
// makes the surroundings, runs each test binary of the plan, and sends what
// they write to the host.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/vmtests/protocol"
)

// maxOutput is how much of a test binary's output is sent, in bytes.
const maxOutput = 16 << 20

func main() {
	if os.Getpid() == 1 {
		if err := first(); err != nil {
			fmt.Fprintln(os.Stderr, "vmtests:", err)
		}
		// With -no-reboot it ends QEMU, whatever came before.
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
		return
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "vmtests:", err)
		os.Exit(1)
	}
}

// first waits for the second process and meanwhile for every orphan.
func first() error {
	if err := mountAll(); err != nil {
		return err
	}
	p, err := os.StartProcess("/init", []string{"guest"}, &os.ProcAttr{
		// Emulation is slow enough for the scheduler's signals to interrupt
		// system calls that are not begun again, such as connect(2) with a
		// time-out.
		Env:   []string{"PATH=/bin", "HOME=/tmp", "TMPDIR=/tmp", "GODEBUG=asyncpreemptoff=1"},
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid == p.Pid {
			return err
		}
	}
}

func mountAll() error {
	for _, m := range []struct{ source, target, kind string }{
		{"proc", "/proc", "proc"},
		{"sysfs", "/sys", "sysfs"},
		{"dev", "/dev", "devtmpfs"},
		{"tmpfs", "/tmp", "tmpfs"},
		{"run", "/run", "tmpfs"},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2"},
		{"bpf", "/sys/fs/bpf", "bpf"},
		{"tracefs", "/sys/kernel/tracing", "tracefs"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", m.target, err)
		}
		// The kernel itself may have mounted /dev.
		if err := unix.Mount(m.source, m.target, m.kind, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s at %s: %w", m.kind, m.target, err)
		}
	}
	return nil
}

func run() error {
	b, err := os.ReadFile(protocol.PlanPath)
	if err != nil {
		return err
	}
	var plan protocol.Plan
	if err := json.Unmarshal(b, &plan); err != nil {
		return fmt.Errorf("read plan: %w", err)
	}
	for _, path := range plan.Modules {
		if err := loadModule(path); err != nil {
			return err
		}
	}
	out, err := openPort()
	if err != nil {
		return err
	}
	if err := runAll(plan.Tests, out); err != nil {
		return errors.Join(err, protocol.Write(out, protocol.Record{Kind: protocol.Error, Text: err.Error()}))
	}
	return protocol.Write(out, protocol.Record{Kind: protocol.Done})
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return fmt.Errorf("load module %s: %w", path, err)
	}
	return nil
}

// port is the virtio port. It is not an os.File: that makes the descriptor
// non-blocking, and only a blocking write returns once the host has it.
type port int

func (p port) Write(b []byte) (n int, err error) {
	for n < len(b) {
		m, err := unix.Write(int(p), b[n:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, fmt.Errorf("write to host: %w", err)
		}
		n += m
	}
	return n, nil
}

// openPort waits for the port, whose driver comes up in its own time.
func openPort() (port, error) {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return -1, err
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil || strings.TrimSpace(string(b)) != protocol.PortName {
				continue
			}
			fd, err := unix.Open(filepath.Join("/dev", filepath.Base(filepath.Dir(name))), unix.O_WRONLY|unix.O_CLOEXEC, 0)
			if err == nil {
				return port(fd), nil
			}
			if !errors.Is(err, unix.ENOENT) {
				return -1, fmt.Errorf("open port %s: %w", protocol.PortName, err)
			}
		}
	}
	return -1, fmt.Errorf("open port %s: it is not there", protocol.PortName)
}

func runAll(tests []protocol.Test, out io.Writer) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	if err := protocol.Write(out, protocol.Record{Kind: protocol.Boot, Text: unix.ByteSliceToString(u.Release[:])}); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	if err := ready(); err != nil {
		return err
	}
	for _, t := range tests {
		if err := runTest(t, out); err != nil {
			return fmt.Errorf("run %s: %w", t.Package, err)
		}
	}
	return nil
}

// ready makes sure that lo carries traffic, so that no test sees the machine
// half up.
func ready() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	c, err := net.DialTimeout("tcp", l.Addr().String(), 10*time.Second)
	if err != nil {
		return err
	}
	return c.Close()
}

func runTest(t protocol.Test, out io.Writer) error {
	if err := protocol.Write(out, protocol.Record{Kind: protocol.Start, Package: t.Package}); err != nil {
		return err
	}
	cmd := exec.Command(t.Binary, t.Args...)
	cmd.Dir = t.Dir
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		return errors.Join(err, w.Close())
	}
	if err := w.Close(); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() { sent <- send(r, t.Package, out) }()
	status := ""
	if err := cmd.Wait(); err != nil {
		status = err.Error()
	}
	// What it left running may hold the pipe.
	if err := r.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if err := <-sent; err != nil {
		return err
	}
	return protocol.Write(out, protocol.Record{Kind: protocol.End, Package: t.Package, Text: status})
}

func send(r io.Reader, name string, out io.Writer) error {
	// Whatever happens, the test must not wait for a reader.
	defer func() { _, _ = io.Copy(io.Discard, r) }()
	s := bufio.NewScanner(io.LimitReader(r, maxOutput))
	s.Buffer(nil, protocol.MaxLine/8) // JSON may take six bytes for one
	for s.Scan() {
		if err := protocol.Write(out, protocol.Record{Kind: protocol.Line, Package: name, Text: s.Text()}); err != nil {
			return err
		}
	}
	if err := s.Err(); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}
