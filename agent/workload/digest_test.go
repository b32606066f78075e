// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/agent/testenv"
)

// program copies sleep, with something behind it, and returns its content's
// digest.
func program(t *testing.T, at, more string) [sha256.Size]byte {
	t.Helper()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	b = append(b, more...)
	if err := os.WriteFile(at, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// TestDigest holds that a workload is recognised by what it runs, and not by
// the name of that alone.
func TestDigest(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	good, evil := filepath.Join(dir, "good"), filepath.Join(dir, "evil")
	want := program(t, good, "")
	other := program(t, evil, "x")
	runs := func(group, path string) {
		t.Helper()
		cgroup(t, scope, group)
		testenv.Start(t, &testenv.Cgroup{Path: filepath.Join(scope.Path, group)}, nil, exec.Command(path, "1000"))
	}
	runs("/right", good)
	runs("/wrong", evil)
	runs("/mixed", good)
	runs("/mixed", evil)
	r, until := run(t, scope, Options{Rescan: time.Hour}) // what is hashed wakes it
	all := []Identity{
		{Name: "right", Path: "/right", Binary: good, Digest: &want},
		{Name: "wrong", Path: "/wrong", Binary: evil, Digest: &want},
		{Name: "mixed", Path: "/mixed", Digest: &want},
		{Name: "late", Path: "/late", Binary: good, Digest: &want},
	}
	r.SetIdentities(all)
	got := until("the digest", is("/right=right:1"))
	if !strings.Contains(got.Cgroups[0].By, "process.digest sha256:") {
		t.Errorf("by %q", got.Cgroups[0].By)
	}
	told := func() bool {
		list, _, err := r.Unrecognised()
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range list {
			if filepath.Base(u.Path) == "wrong" && u.Nearest == "wrong" && strings.HasPrefix(u.Mismatch, "process.digest: is sha256:") {
				return true
			}
		}
		return false
	}
	for late := time.Now().Add(10 * time.Second); !told(); time.Sleep(time.Millisecond) {
		if time.Now().After(late) {
			t.Fatal("the digest is not told")
		}
	}
	// Another program at the same path: the inode that runs is what counts.
	if err := os.Rename(evil, good); err != nil {
		t.Fatal(err)
	}
	runs("/late", good)
	all[3].Digest = &other
	r.SetIdentities(all)
	until("the program that took the name", is("/late=late:1"))
}

// TestDigests holds what is kept, and that what changes is not believed.
func TestDigests(t *testing.T) {
	testenv.RequireRoot(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "p")
	want := program(t, path, "")
	cmd := exec.Command(path, "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() }) //nolint:errcheck // it was killed
	woken := make(chan struct{}, 16)
	d := newDigests(func() {
		select {
		case woken <- struct{}{}:
		default:
		}
	})
	if _, err := d.of(cmd.Process.Pid); !errors.Is(err, errUnknownYet) {
		t.Errorf("at first: %v", err)
	}
	if _, err := d.of(cmd.Process.Pid); !errors.Is(err, errUnknownYet) || len(d.jobs) != 1 {
		t.Errorf("again: %v, %d jobs", err, len(d.jobs))
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	d.run(ctx)
	<-woken
	if sum, err := d.of(cmd.Process.Pid); err != nil || sum != want {
		t.Errorf("%x %v", sum, err)
	}
	// Its inode changes, its content does not: it is read again, not at once.
	if err := os.Chtimes(path, time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.of(cmd.Process.Pid); !errors.Is(err, errUnknownYet) || len(d.jobs) != 0 {
		t.Errorf("touched: %v", err)
	}
	d.mu.Lock()
	for _, k := range d.known {
		k.next = time.Time{}
	}
	d.mu.Unlock()
	if _, err := d.of(cmd.Process.Pid); !errors.Is(err, errUnknownYet) {
		t.Errorf("after a pause: %v", err)
	}
	for late := time.Now().Add(10 * time.Second); ; <-woken {
		sum, err := d.of(cmd.Process.Pid)
		if err == nil && sum == want {
			break
		}
		if !errors.Is(err, errUnknownYet) || time.Now().After(late) {
			t.Fatalf("read again: %x %v", sum, err)
		}
	}
	if _, err := d.of(1 << 30); err == nil {
		t.Error("a process that is not there has an executable")
	}
	if _, err := hash(ctx, job{file{size: maxExecutable + 1}, os.Getpid()}); !errors.Is(err, errTooLarge) {
		t.Errorf("too large: %v", err)
	}
	if _, err := hash(ctx, job{file{}, os.Getpid()}); !errors.Is(err, errChanged) {
		t.Errorf("another file: %v", err)
	}
	for n := range maxDigests + 10 {
		d.learn(file{inode: inode{number: uint64(n) + 1<<40}}, want, nil, 0)
	}
	if len(d.known) > maxDigests {
		t.Errorf("%d are kept", len(d.known))
	}
}
