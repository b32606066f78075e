// SPDX-License-Identifier: Apache-2.0

package statefile

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, content := range []string{"one", "two, longer", ""} {
		if err := Write(path, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if b, err := Read(path, 64); err != nil || string(b) != content {
			t.Errorf("%q, %v", b, err)
		}
		if err := CheckPrivate(path); err != nil {
			t.Error(err)
		}
	}
	if err := Write(filepath.Join(dir, "none", "f"), nil); err == nil {
		t.Error("wrote into a directory that is not there")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("%v, %v: something was left behind", entries, err)
	}
}

func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := Write(path, bytes.Repeat([]byte("x"), 10)); err != nil {
		t.Fatal(err)
	}
	for limit, want := range map[int64]bool{9: false, 10: true, 11: true} {
		if _, err := Read(path, limit); (err == nil) != want {
			t.Errorf("limit %d: %v", limit, err)
		}
	}
	for _, p := range []string{"/dev/zero", t.TempDir(), filepath.Join(t.TempDir(), "none")} {
		if _, err := Read(p, 10); err == nil {
			t.Errorf("%s was read", p)
		}
	}
}

func TestCheckPrivate(t *testing.T) {
	dir := t.TempDir()
	path, link := filepath.Join(dir, "f"), filepath.Join(dir, "l")
	if err := Write(path, nil); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if CheckPrivate(link) == nil || CheckPrivate(dir) == nil || CheckPrivate(filepath.Join(dir, "none")) == nil {
		t.Error("a link, a directory or nothing passed")
	}
	for mode, want := range map[os.FileMode]bool{0o600: true, 0o400: true, 0o640: false, 0o604: false, 0o620: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if err := CheckPrivate(path); (err == nil) != want {
			t.Errorf("mode %v: %v", mode, err)
		}
	}
}

func TestMakeDir(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "a", "b")
	for range 2 {
		if err := MakeDir(dir); err != nil {
			t.Fatal(err)
		}
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if err := os.Chmod(dir, 0o770); err != nil {
		t.Fatal(err)
	}
	if MakeDir(dir) == nil {
		t.Error("a directory that the group may write to passed")
	}
	file := filepath.Join(base, "f")
	if err := Write(file, nil); err != nil {
		t.Fatal(err)
	}
	if MakeDir(file) == nil {
		t.Error("a file passed for a directory")
	}
}

// What root writes belongs to the directory's owner.
func TestOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away")
	}
	dir := t.TempDir()
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if err := Write(filepath.Join(dir, "f"), nil); err != nil {
		t.Fatal(err)
	}
	if err := MakeDir(filepath.Join(dir, "d")); err != nil {
		t.Fatal(err)
	}
	unlock, err := Lock(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	unlock()
	for _, name := range []string{"f", "d", "lock"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != 65534 || st.Gid != 65534 {
			t.Errorf("%s belongs to %d:%d", name, st.Uid, st.Gid)
		}
	}
}

func TestHold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "held")
	f, err := Hold(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if _, err := Hold(ended, path); err == nil {
		t.Error("two hold it")
	}
	go f.Close() // one that is ending is waited for
	again, err := Hold(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if err := os.Symlink(path, path+"2"); err != nil {
		t.Fatal(err)
	}
	if _, err := Hold(t.Context(), path+"2"); err == nil {
		t.Error("a link is followed")
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	var inside, total atomic.Int32 // the race detector does not know flock
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			unlock, err := Lock(path)
			if err != nil {
				t.Error(err)
				return
			}
			if inside.Add(1) != 1 {
				t.Error("two hold the lock")
			}
			total.Add(1)
			inside.Add(-1)
			unlock()
		})
	}
	group.Wait()
	if total.Load() != 16 {
		t.Errorf("%d held it, want 16", total.Load())
	}
	if _, err := Lock(filepath.Join(t.TempDir(), "none", "lock")); err == nil {
		t.Error("locked in a directory that is not there")
	}
}
