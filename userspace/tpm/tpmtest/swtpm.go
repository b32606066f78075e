// SPDX-License-Identifier: Apache-2.0

// Package tpmtest runs software TPMs (swtpm) for tests.
package tpmtest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/sallyport-dev/sallyport/userspace/testenv"
)

// TPM is a software TPM. It dies with the test, and with the test process.
type TPM struct {
	Socket string // for tpm.Open
	dir    string
	cmd    *exec.Cmd
	output bytes.Buffer
}

const startTime = 20 * time.Second

// Start starts a TPM with a seed of its own. It skips the test only where
// swtpm is not installed.
func Start(t testing.TB) *TPM {
	t.Helper()
	testenv.Program(t, "swtpm")
	dir, err := os.MkdirTemp("", "swtpm-") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	s := &TPM{Socket: filepath.Join(dir, "tpm"), dir: dir}
	t.Cleanup(func() {
		s.Stop(t)
		os.RemoveAll(dir)
	})
	s.Restart(t)
	return s
}

// Restart starts the stopped TPM again with the same seed, as a reboot does.
func (s *TPM) Restart(t testing.TB) {
	t.Helper()
	s.Stop(t)
	s.output.Reset()
	s.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+s.dir,
		"--server", "type=unixio,path="+s.Socket, "--ctrl", "type=unixio,path="+s.Socket+".ctrl",
		"--flags", "not-need-init,startup-clear")
	s.cmd.Stdout, s.cmd.Stderr = &s.output, &s.output
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.cmd = nil
		t.Fatalf("start swtpm: %v", err)
	}
	if err := s.answer(); err != nil {
		s.Stop(t)
		t.Fatalf("start swtpm: %v\n%s", err, s.output.String())
	}
}

// answer waits for the first answer to a command.
func (s *TPM) answer() error {
	deadline := time.Now().Add(startTime)
	for {
		link, err := linuxudstpm.Open(s.Socket)
		if err == nil {
			_, err = tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(tpm2.TPMPTManufacturer), PropertyCount: 1}.Execute(link)
			link.Close()
		}
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no answer in %v: %w", startTime, err)
		}
		time.Sleep(5 * time.Millisecond) // swtpm says nothing when its socket is there
	}
}

// Stop ends the TPM's process; its seed stays until the test ends.
func (s *TPM) Stop(t testing.TB) {
	t.Helper()
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Kill() // ended already is as good
	_ = s.cmd.Wait()
	s.cmd = nil
	os.Remove(s.Socket)
	os.Remove(s.Socket + ".ctrl")
}
