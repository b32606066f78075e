// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/testenv"
)

// outcome is a line of `demo -o json`.
type outcome struct {
	Case, Expected, Got, DecidedBy *string
	Pass                           *bool
	Summary                        *struct{ Passed, Failed *int }
}

// startDemo starts the demo in this machine's own namespace and cgroup, as a
// person does.
func startDemo(t *testing.T, args ...string) *program {
	t.Helper()
	host := testenv.HostNetns(t)
	return start(t, "", host, exec.Command(sallyport, append([]string{"demo", "-o", "json"}, args...)...))
}

// outcomes reads all that a demo says, and its exit status.
func outcomes(t *testing.T, p *program) (cases []outcome, passed, failed, status int) {
	t.Helper()
	for {
		l, err := p.out.ReadBytes('\n')
		if err == io.EOF && len(l) == 0 {
			break
		}
		var o outcome
		if err := json.Unmarshal(l, &o); err != nil {
			t.Fatalf("%q: %v", l, err)
		}
		if cases = append(cases, o); err != nil {
			break
		}
	}
	<-p.done
	if len(cases) == 0 || cases[len(cases)-1].Summary == nil || cases[len(cases)-1].Case != nil {
		t.Fatalf("no summary in the end: %s", p.errs)
	}
	s := cases[len(cases)-1].Summary
	cases = cases[:len(cases)-1]
	for _, o := range cases {
		if o.Case == nil || o.Expected == nil || o.Got == nil || o.DecidedBy == nil || o.Pass == nil || o.Summary != nil {
			t.Errorf("a line lacks a member: %+v", o)
			continue
		}
		if *o.Pass {
			passed++
		} else {
			failed++
		}
	}
	if *s.Passed != passed || *s.Failed != failed {
		t.Errorf("the summary says %d and %d, the lines %d and %d", *s.Passed, *s.Failed, passed, failed)
	}
	return cases, passed, failed, p.cmd.ProcessState.ExitCode()
}

// leftovers lists what a demo with that process id has not taken away.
func leftovers(t *testing.T, pid int) []string {
	t.Helper()
	name := fmt.Sprintf("sallyport-demo-%d", pid)
	var left []string
	for _, pattern := range []string{
		filepath.Join(testenv.CgroupMount(t), name+"*"), "/sys/fs/bpf/" + name + "*", filepath.Join(os.TempDir(), name+"*"),
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), name) {
			left = append(left, f+": "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return left
}

// TestDemo: it passes, its lines are JSON, and it leaves nothing.
func TestDemo(t *testing.T) {
	require(t)
	t.Parallel()
	p := startDemo(t)
	cases, passed, failed, status := outcomes(t, p)
	if failed != 0 || status != 0 || passed < 28 {
		for _, o := range cases {
			if !*o.Pass {
				t.Errorf("%s: got %s by %q, want %s", *o.Case, *o.Got, *o.DecidedBy, *o.Expected)
			}
		}
		t.Errorf("%d passed, %d failed, exit status %d: %s", passed, failed, status, p.errs)
	}
	if left := leftovers(t, p.cmd.Process.Pid); len(left) != 0 {
		t.Errorf("it left %q", left)
	}
}

// TestDemoCanFail runs the demo under a ceiling that refuses nothing: every
// case in which policy is to refuse must fail, and no other need.
func TestDemoCanFail(t *testing.T) {
	require(t)
	t.Parallel()
	p := startDemo(t, "--mode-ceiling", "observe")
	cases, _, failed, status := outcomes(t, p)
	if status != 1 || failed == 0 {
		t.Errorf("%d failed, exit status %d: %s", failed, status, p.errs)
	}
	// A forged certificate is refused in every mode. (A caller without one
	// passes as what it is, unproven.)
	always := map[string]bool{"a node that signs an ID outside its join token all the same": true}
	refusals := 0
	for _, o := range cases {
		switch {
		case always[*o.Case]:
			if !*o.Pass {
				t.Errorf("%s: got %s by %q under a ceiling too", *o.Case, *o.Got, *o.DecidedBy)
			}
			delete(always, *o.Case)
		case strings.HasPrefix(*o.Expected, "401 "), strings.HasPrefix(*o.Expected, "403 "), strings.HasPrefix(*o.Expected, "429 "),
			strings.HasPrefix(*o.Expected, "refused"), strings.HasPrefix(*o.Expected, "operation not permitted"), strings.HasPrefix(*o.Expected, "closed"):
			refusals++
			if *o.Pass {
				t.Errorf("%s: passes though nothing is refused (%s by %q)", *o.Case, *o.Got, *o.DecidedBy)
			}
		}
	}
	if len(always) > 0 {
		t.Errorf("no such cases: %v", always)
	}
	if refusals < 15 || failed < refusals {
		t.Errorf("%d refusals among %d cases: this test looks for them wrongly", refusals, len(cases))
	}
	if left := leftovers(t, p.cmd.Process.Pid); len(left) != 0 {
		t.Errorf("it left %q", left)
	}
}

// TestDemoIsInterrupted ends the demo by Ctrl-C half way.
func TestDemoIsInterrupted(t *testing.T) {
	require(t)
	t.Parallel()
	p := startDemo(t)
	lines := bufio.NewScanner(p.out)
	for range 5 {
		if !lines.Scan() {
			t.Fatalf("it ended by itself: %v %s", lines.Err(), p.errs)
		}
	}
	if left := leftovers(t, p.cmd.Process.Pid); len(left) < 4 {
		t.Fatalf("half way there is %q: this test looks for it wrongly", left)
	}
	// Ctrl-C reaches the whole foreground process group; its children have
	// groups of their own and are the demo's to end.
	if err := unix.Kill(-p.cmd.Process.Pid, unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	go func() {
		for lines.Scan() { //nolint:revive // what is under way is still said
		}
	}()
	select {
	case <-p.done:
	case <-time.After(patience):
		t.Fatal("it goes on")
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("exit status %d", code)
	}
	if left := leftovers(t, p.cmd.Process.Pid); len(left) != 0 {
		t.Errorf("it left %q", left)
	}
}
