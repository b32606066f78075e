// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"sallyport": main})
}

// TestCommandLine runs the scripts of testdata: one a topic, each against the
// program as it is.
func TestCommandLine(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"nobody": asNobody, "status": exitStatus},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, errors.New("unknown condition")
		},
	})
}

// command runs this program with the script's directory and environment.
func command(ts *testscript.TestScript, args []string, uid uint32) error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append([]string{"sallyport"}, args...)
	cmd.Dir, cmd.Env = ts.Getenv("WORK"), []string{"PATH=" + ts.Getenv("PATH"), "HOME=/nonexistent"}
	cmd.Stdout, cmd.Stderr = ts.Stdout(), ts.Stderr()
	if uid != 0 {
		// A user that can read nothing of root's: no file of this script is
		// named by a path in it.
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	return cmd.Run()
}

// asNobody is `nobody ARG...`: the program, run by uid 65534.
func asNobody(ts *testscript.TestScript, neg bool, args []string) {
	uid := uint32(65534)
	if os.Geteuid() != 0 {
		uid = 0 // whoever runs the test is somebody without privilege already
	}
	if err := command(ts, args, uid); (err != nil) != neg {
		ts.Fatalf("sallyport %q: %v", args, err)
	}
}

// exitStatus is `status N ARG...`: the program, and its exit status.
func exitStatus(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: status N ARG...")
	}
	got := "0"
	var exit *exec.ExitError
	if err := command(ts, args[1:], 0); errors.As(err, &exit) {
		got = exit.String()[len("exit status "):]
	} else if err != nil {
		ts.Fatalf("sallyport %q: %v", args[1:], err)
	}
	if got != args[0] {
		ts.Fatalf("sallyport %q: exit status %s, want %s", args[1:], got, args[0])
	}
}
