// SPDX-License-Identifier: Apache-2.0

// Package e2e holds the product against real programs: it builds the binary,
// starts agents in network namespaces and cgroups of their own, and judges by
// what nginx, curl, wrk and raw sockets see.
package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/sallyport-dev/sallyport/agent/testenv"
)

// sallyport is the path of the binary under test.
var sallyport string

// actorVar has this binary be one of the programs of actor_test.go.
const actorVar = "SALLYPORT_E2E_ACTOR"

func TestMain(m *testing.M) {
	if name := os.Getenv(actorVar); name != "" {
		if err := actors[name](os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "sallyport-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if os.Geteuid() == 0 {
		sallyport = filepath.Join(dir, "sallyport")
		build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", sallyport, "github.com/sallyport-dev/sallyport/cmd/sallyport")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build sallyport: %v\n%s", err, out)
			return 1
		}
	}
	return m.Run()
}

// require asks for what every test here needs, and these programs.
func require(t *testing.T, programs ...string) {
	t.Helper()
	testenv.RequireRoot(t)
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			testenv.Missing(t, p+" is not installed")
		}
	}
}
