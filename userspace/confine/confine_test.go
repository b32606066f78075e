// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// TestProgram runs the filter on what system calls look like to it. (That the
// kernel takes it, and that a process lives under it, is tested in
// agent/supervise.)
func TestProgram(t *testing.T) {
	prog, err := program()
	if err != nil {
		t.Fatal(err)
	}
	var insns []bpf.Instruction
	for _, f := range prog {
		insns = append(insns, bpf.RawInstruction{Op: f.Code, Jt: f.Jt, Jf: f.Jf, K: f.K}.Disassemble())
	}
	vm, err := bpf.NewVM(insns)
	if err != nil {
		t.Fatal(err)
	}
	arch, err := auditArch()
	if err != nil {
		t.Fatal(err)
	}
	run := func(arch, nr uint32, arg0 uint64) uint32 {
		// The kernel's loads are of its own byte order, the VM's of the
		// network's: each word is written as the VM reads it.
		b := make([]byte, 64)
		binary.BigEndian.PutUint32(b[offsetNumber:], nr)
		binary.BigEndian.PutUint32(b[offsetArch:], arch)
		binary.BigEndian.PutUint32(b[offsetArg0:], uint32(arg0))
		got, err := vm.Run(b)
		if err != nil {
			t.Fatal(err)
		}
		return uint32(got)
	}
	const eperm = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	for nr := range uint32(600) {
		want := uint32(unix.SECCOMP_RET_ALLOW)
		if slices.Contains(denied, nr) {
			want = eperm
		}
		if nr == unix.SYS_BPF {
			continue
		}
		if got := run(arch, nr, 0); got != want {
			t.Errorf("call %d: %#x, want %#x", nr, got, want)
		}
	}
	for cmd := range uint64(64) {
		want := eperm
		if slices.Contains(allowedBPF, uint32(cmd)) {
			want = unix.SECCOMP_RET_ALLOW
		}
		if got := run(arch, unix.SYS_BPF, cmd); got != want {
			t.Errorf("bpf command %d: %#x, want %#x", cmd, got, want)
		}
	}
	for name, got := range map[string]uint32{
		"another architecture": run(unix.AUDIT_ARCH_I386, unix.SYS_READ, 0),
		"x32":                  run(arch, unix.SYS_READ|1<<30, 0),
		"no call":              run(arch, 1<<32-1, 0),
	} {
		if got != unix.SECCOMP_RET_KILL_PROCESS {
			t.Errorf("%s: %#x", name, got)
		}
	}
}

func TestUnprivileged(t *testing.T) {
	good := Status{UID: "5 5 5 5", CapEff: "0000", CapPrm: "0000", CapInh: "0000", CapBnd: "ffff", CapAmb: "0000", NoNewPrivs: "1"}
	if err := good.Unprivileged(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Status){
		"CapEff":     func(s *Status) { s.CapEff = "0001" },
		"CapPrm":     func(s *Status) { s.CapPrm = "8000" },
		"CapInh":     func(s *Status) { s.CapInh = "1" },
		"CapAmb":     func(s *Status) { s.CapAmb = "1" },
		"CapEff is":  func(s *Status) { s.CapEff = "" },
		"NoNewPrivs": func(s *Status) { s.NoNewPrivs = "0" },
		"root":       func(s *Status) { s.UID = "5 5 0 5" },
		"users":      func(s *Status) { s.UID = "" },
	} {
		s := good
		change(&s)
		if err := s.Unprivileged(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReadStatus(t *testing.T) {
	s, err := ReadStatus("self")
	if err != nil || s.CapEff == "" || s.NoNewPrivs == "" || len(strings.Fields(s.UID)) != 4 || s.Parent == "" || s.Seccomp == "" {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := ReadStatus("none"); err == nil {
		t.Error("a process that is not there has a status")
	}
}
