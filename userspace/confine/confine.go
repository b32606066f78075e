// SPDX-License-Identifier: Apache-2.0

// Package confine gives away what the userspace process will never need, and
// makes sure that it was started without privilege: no capability, no way to
// gain one, no core dump with keys in it, and a seccomp filter that leaves it
// without new sockets, programs, namespaces and BPF objects.
package confine

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Name is what a confined process is called, in at most 15 bytes.
const Name = "sallyport-user"

// Status is what /proc/PID/status says about a process's privilege.
type Status struct {
	UID        string // real, effective, saved, file system
	CapEff     string // hex masks
	CapPrm     string
	CapInh     string
	CapBnd     string
	CapAmb     string
	NoNewPrivs string
	Seccomp    string // 0 none, 2 a filter
	Parent     string
}

// ReadStatus reads the status of process pid, "self" for one's own.
func ReadStatus(pid string) (Status, error) {
	f, err := os.Open("/proc/" + pid + "/status")
	if err != nil {
		return Status{}, fmt.Errorf("read status of process: %w", err)
	}
	defer f.Close()
	var s Status
	into := map[string]*string{
		"Uid": &s.UID, "CapEff": &s.CapEff, "CapPrm": &s.CapPrm, "CapInh": &s.CapInh, "CapBnd": &s.CapBnd, "CapAmb": &s.CapAmb,
		"NoNewPrivs": &s.NoNewPrivs, "Seccomp": &s.Seccomp, "PPid": &s.Parent,
	}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if name, value, ok := strings.Cut(lines.Text(), ":"); ok && into[name] != nil {
			*into[name] = strings.Join(strings.Fields(value), " ")
		}
	}
	if err := lines.Err(); err != nil {
		return Status{}, fmt.Errorf("read status of process: %w", err)
	}
	return s, nil
}

// Unprivileged says whether a process with that status has no capability, can
// gain none, and is not root; the error names what is wrong.
func (s Status) Unprivileged() error {
	for _, c := range []struct{ name, mask string }{
		{"CapEff", s.CapEff}, {"CapPrm", s.CapPrm}, {"CapInh", s.CapInh}, {"CapAmb", s.CapAmb},
	} {
		if c.mask == "" || strings.Trim(c.mask, "0") != "" {
			return fmt.Errorf("%s is %q, want none", c.name, c.mask)
		}
	}
	if s.NoNewPrivs != "1" {
		return fmt.Errorf("NoNewPrivs is %q, want 1", s.NoNewPrivs)
	}
	ids := strings.Fields(s.UID)
	if len(ids) != 4 {
		return fmt.Errorf("its users are %q", s.UID)
	}
	if slices.Contains(ids, "0") {
		return errors.New("it runs as root")
	}
	return nil
}

// Self confines the calling process for good, all of its threads. It refuses
// a process that has privilege: that one was not started by the agent.
func Self() error {
	s, err := ReadStatus("self")
	if err != nil {
		return err
	}
	if err := s.Unprivileged(); err != nil {
		return fmt.Errorf("confine this process: %w; it is started by `sallyport agent`, never by hand", err)
	}
	// Started through /proc/self/exe it would be called "exe" by ps and by
	// whoever finds a port taken.
	if err := os.WriteFile("/proc/self/comm", []byte(Name), 0); err != nil {
		return fmt.Errorf("name this process: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	// Nobody of the same user may look into its memory or descriptors.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("make process undumpable: %w", err)
	}
	return filter()
}
