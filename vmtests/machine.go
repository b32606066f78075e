// SPDX-License-Identifier: Apache-2.0

package vmtests

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/vmtests/protocol"
)

const qemu = "qemu-system-x86_64"

// machine is one virtual machine, from boot to its end.
type machine struct {
	vmlinuz, initramfs string
	dir                string // for its console
	accelerator        string
	silence            time.Duration // without a record it is taken for dead
}

func (m *machine) arguments() []string {
	cpu := "max"
	if strings.HasPrefix(m.accelerator, "kvm") {
		cpu = "host"
	}
	return []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35", "-accel", m.accelerator, "-cpu", cpu, "-smp", "2", "-m", "1G",
		"-kernel", m.vmlinuz, "-initrd", m.initramfs,
		"-append", "console=ttyS0 quiet loglevel=5 panic=-1 oops=panic panic_on_warn=1 mitigations=off",
		"-serial", "file:" + m.console(),
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=results,fd=3",
		"-device", "virtserialport,chardev=results,name=" + protocol.PortName,
	}
}

func (m *machine) console() string { return filepath.Join(m.dir, "console") }

// Run boots the machine and calls f with each record. It returns nil only
// where the guest said that it is done: the exit status of QEMU says
// nothing.
func (m *machine) Run(ctx context.Context, f func(protocol.Record)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "results"), os.NewFile(uintptr(pair[1]), "results")
	defer ours.Close()
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, qemu, m.arguments()...)
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = &said
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return fmt.Errorf("boot: %w: install qemu-system-x86", err)
	}
	err = protocol.Read(&impatient{ctx, ours, m.silence}, f)
	cancel()
	_ = cmd.Wait() // it was killed; and after a panic its status is 0
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w\nqemu: %s\nend of the console:\n%s", err, strings.TrimSpace(said.String()), m.consoleEnd())
}

// consoleEnd returns the last of what the kernel wrote.
func (m *machine) consoleEnd() string {
	const most = 6000
	b, err := os.ReadFile(m.console())
	if err != nil {
		return err.Error()
	}
	return string(bytes.ToValidUTF8(b[max(0, len(b)-most):], []byte("?")))
}

// impatient is a reader that gives up where nothing comes for some time.
type impatient struct {
	ctx   context.Context
	f     *os.File
	limit time.Duration
}

func (r *impatient) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	deadline := time.Now().Add(r.limit)
	if end, ok := r.ctx.Deadline(); ok && end.Before(deadline) {
		deadline = end
	}
	if err := r.f.SetReadDeadline(deadline); err != nil {
		return 0, err
	}
	n, err := r.f.Read(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("nothing came from the guest for %v", r.limit)
	}
	// A machine that ends may reset the connection.
	if errors.Is(err, unix.ECONNRESET) {
		err = io.EOF
	}
	return n, err
}
