// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/agent/testenv"
)

func TestRunHere(t *testing.T) {
	testenv.RequireRoot(t)
	cg := testenv.NewCgroup(t, nil)
	checks := Run(cg.Path)
	for _, c := range checks {
		// A setting of the machine, not of its kernel.
		if !c.Have && c.Name != "BPF closed to users" {
			t.Errorf("%s: %s", c.Name, c.Detail)
		}
		if c.Name == "" || c.Needs == "" || c.Lost == "" {
			t.Errorf("incomplete: %+v", c)
		}
	}
	if len(checks) < len(features)+5 {
		t.Errorf("%d checks", len(checks))
	}
	if err := Missing(checks); err != nil {
		t.Error(err)
	}
	left, err := filepath.Glob(filepath.Join(cg.Path, "sallyport-probe-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}

func TestNotACgroup(t *testing.T) {
	testenv.RequireRoot(t)
	checks := Run(t.TempDir())
	err := Missing(checks)
	if err == nil || !strings.Contains(err.Error(), "needs") {
		t.Errorf("a directory that is no cgroup: %v", err)
	}
	if err := Missing(Run(filepath.Join(t.TempDir(), "none"))); err == nil {
		t.Error("a directory that is not there")
	}
}

func TestMissingNamesWhatToDo(t *testing.T) {
	err := Missing([]Check{
		check("a", true, "Linux 9", "everything is lost", os.ErrNotExist),
		check("b", false, "Linux 9", "a little is lost", os.ErrNotExist),
		check("c", true, "Linux 9", "nothing", nil),
	})
	if err == nil || !strings.Contains(err.Error(), "a is missing") || strings.Contains(err.Error(), "b is missing") ||
		!strings.Contains(err.Error(), "Linux 9") {
		t.Errorf("%v", err)
	}
}
