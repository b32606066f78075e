// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"
)

// childDir tells the test binary that it is the process to be confined.
const childDir = "SALLYPORT_TEST_CONFINE_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		confinedChild(dir)
		return
	}
	os.Exit(m.Run())
}

// confinedChild tries what the userspace process does with files, and what it
// must not.
func confinedChild(dir string) {
	result := map[string]string{}
	note := func(what string, err error) {
		switch {
		case err == nil:
			result[what] = "ok"
		case errors.Is(err, fs.ErrPermission):
			result[what] = "refused"
		default:
			result[what] = err.Error()
		}
	}
	note("confine", Files(dir))
	note("write own", os.WriteFile(filepath.Join(dir, "a"), []byte("x"), 0o600))
	note("rename own", os.Rename(filepath.Join(dir, "a"), filepath.Join(dir, "b")))
	_, err := os.ReadFile(filepath.Join(dir, "b"))
	note("read own", err)
	_, err = os.ReadFile("/proc/self/statm")
	note("read statm", err)
	_, err = os.ReadFile(filepath.Join(dir, "..", "policy.yaml"))
	note("read policy", err)
	_, err = os.ReadDir(filepath.Join(dir, ".."))
	note("list beside", err)
	_, err = os.ReadFile("/etc/passwd")
	note("read passwd", err)
	note("write beside", os.WriteFile(filepath.Join(dir, "..", "c"), nil, 0o600))
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		os.Exit(1)
	}
}

func TestFiles(t *testing.T) {
	if _, err := llsys.LandlockGetABIVersion(); err != nil {
		t.Skipf("Landlock (Linux 5.13) is not active here: %v", err)
	}
	parent := t.TempDir()
	own := filepath.Join(parent, "own")
	if err := os.Mkdir(own, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(parent, "policy.yaml"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+own)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]string
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"confine": "ok", "write own": "ok", "rename own": "ok", "read own": "ok", "read statm": "ok",
		"read policy": "refused", "list beside": "refused", "read passwd": "refused", "write beside": "refused",
	}
	for what, outcome := range want {
		if got[what] != outcome {
			t.Errorf("%s: %s, want %s", what, got[what], outcome)
		}
	}
}
