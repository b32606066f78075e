// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/testenv"
)

// sleepBinary returns the content of sleep, to make programs of.
func sleepBinary(t testing.TB) []byte {
	t.Helper()
	file, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// install puts a program at a path as a package manager does: by rename.
func install(t testing.TB, file string, content []byte) (digest string) {
	t.Helper()
	if err := os.WriteFile(file+".new", content, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// mismatches waits until the cgroups without identity are told by what does
// not match, by the last part of their path.
func mismatches(t *testing.T, r *Recogniser, want map[string]string) {
	t.Helper()
	got := map[string]string{}
	for limit := time.Now().Add(10 * time.Second); time.Now().Before(limit); time.Sleep(5 * time.Millisecond) {
		all, _, err := r.Unrecognised()
		if err != nil {
			t.Fatal(err)
		}
		clear(got)
		for _, u := range all {
			got[filepath.Base(u.Path)] = u.Nearest + " " + u.Mismatch
		}
		if fmt.Sprint(got) == fmt.Sprint(want) {
			return
		}
	}
	t.Errorf("without identity:\n%v\nwant\n%v", got, want)
}

func TestDigest(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	sleep := sleepBinary(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "app")
	right := install(t, file, sleep)
	sleeping(t, cgroup(t, scope, "/right"), file)
	sleeping(t, cgroup(t, scope, "/both"), file)
	// An upgrade: what runs keeps its content, at a path that was taken away.
	wrong := install(t, file, append(sleep, 0))
	sleeping(t, cgroup(t, scope, "/wrong"), file)
	sleeping(t, &testenv.Cgroup{Path: filepath.Join(scope.Path, "both")}, file)
	sleeping(t, cgroup(t, scope, "/elsewhere"), "/bin/sleep")
	large := filepath.Join(dir, "large")
	install(t, large, sleep)
	if err := os.Truncate(large, maxExecutable+1); err != nil {
		t.Fatal(err)
	}
	sleeping(t, cgroup(t, scope, "/large"), large)
	r, until := run(t, scope, Options{Rescan: time.Hour})
	var identities []Identity
	for _, name := range []string{"right", "wrong", "both", "elsewhere"} {
		identities = append(identities, Identity{Name: name, Path: "/" + name, Binary: file, Digest: right})
	}
	identities = append(identities, Identity{Name: "large", Path: "/large", Binary: large, Digest: right})
	r.SetIdentities(identities)
	got := until("the right content", is("/right=right:1"))
	if want := "cgroup.path /right, process.binary " + file + ", process.digest " + right; got.Cgroups[0].By != want {
		t.Errorf("by %q", got.Cgroups[0].By)
	}
	elsewhere, err := filepath.EvalSymlinks("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	other := "process.digest: is " + wrong + ", want " + right
	mismatches(t, r, map[string]string{
		"wrong": "wrong " + other, "both": "both " + other,
		"elsewhere": fmt.Sprintf("elsewhere process.binary: is %q, want %q", elsewhere, file),
		"large":     "large process.digest: the executable is larger than 1 GiB",
	})
	// A process that joins takes it away.
	sleeping(t, &testenv.Cgroup{Path: filepath.Join(scope.Path, "right")}, file)
	r.Wake()
	until("another content beside it", is(""))
}

// sleeping starts a program that sleeps.
func sleeping(t testing.TB, cg *testenv.Cgroup, file string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(file, "3600")
	testenv.Start(t, cg, nil, cmd)
	return cmd
}

// TestDigestOfChangedFile: a file that was written to is another content, also
// where its size and mtime are the same.
func TestDigestOfChangedFile(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	content := append(sleepBinary(t), 'a')
	file := filepath.Join(t.TempDir(), "app")
	right := install(t, file, content)
	a := cgroup(t, scope, "/a")
	cmd := sleeping(t, a, file)
	r, until := run(t, scope, Options{Rescan: 20 * time.Millisecond})
	r.SetIdentities([]Identity{{Name: "a", Path: "/a", Binary: file, Digest: right}})
	until("the right content", is("/a=a:1"))
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	until("its end", is(""))
	if err := testenv.RemoveCgroup(a.Path); err != nil { // waits for it
		t.Fatal(err)
	}
	before, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{'b'}, int64(len(content)-1)); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(file, before.ModTime(), before.ModTime()); err != nil {
		t.Fatal(err)
	}
	content[len(content)-1] = 'b'
	sum := sha256.Sum256(content)
	sleeping(t, cgroup(t, scope, "/a"), file)
	mismatches(t, r, map[string]string{"a": "a process.digest: is sha256:" + hex.EncodeToString(sum[:]) + ", want " + right})
	if got := show(r.Table()); got != "" {
		t.Errorf("recognised: %s", got)
	}
}

// TestHashingHoldsUpNobody: while a file cannot be hashed yet, who runs it is
// nobody, and the rest is recognised.
func TestHashingHoldsUpNobody(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	file := filepath.Join(t.TempDir(), "app")
	digest := install(t, file, sleepBinary(t))
	sleeping(t, cgroup(t, scope, "/slow"), file)
	sleeper(t, cgroup(t, scope, "/other"), nil)
	r, until := run(t, scope, Options{Rescan: time.Hour})
	for range hashers {
		r.digests.slots <- struct{}{}
	}
	identities := []Identity{{Name: "slow", Path: "/slow", Binary: file, Digest: digest}, {Name: "other", Path: "/other"}}
	r.SetIdentities(identities)
	until("the other one", is("/other=other:1"))
	cgroup(t, scope, "/third")
	r.SetIdentities(append(identities, Identity{Name: "third", Path: "/third"}))
	until("a third one", is("/other=other:1 /third=third:0"))
	mismatches(t, r, map[string]string{"slow": "slow process.digest: " + errHashing.Error()})
	for range hashers {
		<-r.digests.slots
	}
	until("the slow one", is("/other=other:1 /slow=slow:1 /third=third:0"))
}

// inMemory returns a command of a program that is on no file system.
func inMemory(t testing.TB, content []byte) *exec.Cmd {
	t.Helper()
	fd, err := unix.MemfdCreate("app", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	written := os.NewFile(uintptr(fd), "memfd")
	if _, err := written.Write(content); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(ownFile(fd)) // what is open for writing cannot be run
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	written.Close()
	return &exec.Cmd{Path: "/proc/self/fd/3", Args: []string{"app", "3600"}, ExtraFiles: []*os.File{file}}
}

// TestFirstTableWaitsForDigests: who is started before the agent, or before its
// identity asks for a digest, is at no time told to be nobody.
func TestFirstTableWaitsForDigests(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	file := filepath.Join(t.TempDir(), "app")
	digest := install(t, file, sleepBinary(t))
	sleeping(t, cgroup(t, scope, "/a"), file)
	r, until := run(t, scope, Options{Rescan: time.Hour})
	id := Identity{Name: "a", Path: "/a", Binary: file}
	first := r.SetIdentities([]Identity{id})
	until("the first set", func(t *Table) bool { return t.Of == first })
	id.Digest = digest
	second := r.SetIdentities([]Identity{id})
	if got := until("the second set", func(t *Table) bool { return t.Of == second }); show(got) != "/a=a:1" {
		t.Errorf("got %s", show(got))
	}
}

// TestNotVouchedFor: what a workload's own file system says of a file is not
// believed.
func TestNotVouchedFor(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	file := filepath.Join(t.TempDir(), "app")
	digest := install(t, file, sleepBinary(t))
	own := sleeping(t, cgroup(t, scope, "/own"), file)
	cmd := exec.Command(file, "3600")
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, UidMappings: ids, GidMappings: ids}
	testenv.Start(t, cgroup(t, scope, "/theirs"), nil, cmd)
	testenv.Start(t, cgroup(t, scope, "/memory"), nil, inMemory(t, sleepBinary(t)))
	r, until := run(t, scope, Options{Rescan: time.Hour})
	r.SetIdentities([]Identity{
		{Name: "own", Path: "/own", Binary: file, Digest: digest},
		{Name: "theirs", Path: "/theirs", Binary: file, Digest: digest},
		{Name: "memory", Path: "/memory", Binary: "/memfd:app", Digest: digest},
	})
	until("the one in the node's namespace", is("/own=own:1"))
	const nowhere = "the executable is on no file system that is mounted where it runs"
	mismatches(t, r, map[string]string{"theirs": "theirs process.digest: " + errForeign.Error(), "memory": "memory process.digest: " + nowhere})

	exe, err := openProgram(own.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer exe.close()
	ns, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		types map[uint64]string
		want  string
	}{
		{map[uint64]string{exe.mount: "fuse.sshfs"}, "the executable is on fuse.sshfs, whose content the kernel does not vouch for"},
		{map[uint64]string{exe.mount: "nfs4"}, "the executable is on nfs4, whose content the kernel does not vouch for"},
		{map[uint64]string{exe.mount + 1: "ext4"}, nowhere},
		{nil, errForeign.Error()},
	} {
		if err := (mounts{ns: c.types}).vouch(own.Process.Pid, exe); err == nil || err.Error() != c.want {
			t.Errorf("%v: %v", c.types, err)
		}
	}
	if err := (mounts{}).vouch(own.Process.Pid, exe); err != nil {
		t.Errorf("its own: %v", err)
	}
}

// TestDigestsAreBounded fills what is remembered.
func TestDigestsAreBounded(t *testing.T) {
	d := newDigests(func() {})
	defer d.close()
	for i := range uint64(maxDigests) {
		d.known[content{inode: i + 1}] = &digest{sum: "x", used: i + 1}
	}
	d.known[content{inode: 1}].used = maxDigests + 1
	d.asked = maxDigests + 1
	self, err := openProgram(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer self.close()
	if _, err := d.of(self); !errors.Is(err, errHashing) {
		t.Errorf("the first time: %v", err)
	}
	d.mu.Lock()
	if _, ok := d.known[content{inode: 2}]; ok || len(d.known) != maxDigests || d.known[content{inode: 1}] == nil {
		t.Errorf("%d are known, the least recent among them: %t", len(d.known), ok)
	}
	d.hashing += maxHashing
	d.mu.Unlock()
	if _, err := d.of(&program{fd: self.fd, state: content{inode: maxDigests + 1}}); !errors.Is(err, errBusy) {
		t.Errorf("beyond the bound: %v", err)
	}
	d.mu.Lock()
	d.hashing -= maxHashing
	d.mu.Unlock()
}

// TestDigestThatFails: what cannot be read is said, and tried again.
func TestDigestThatFails(t *testing.T) {
	tried := make(chan struct{}, 1)
	d := newDigests(func() { tried <- struct{}{} })
	defer d.close()
	self, err := openProgram(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer self.close()
	other := &program{fd: self.fd, state: self.state}
	other.state.size-- // as if it grew meanwhile
	for limit := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		_, err := d.of(other)
		if err != nil && strings.Contains(err.Error(), "changed while it was read") {
			break
		}
		if time.Now().After(limit) {
			t.Fatal(err)
		}
	}
	if _, err := d.of(self); !errors.Is(err, errHashing) {
		t.Fatal(err)
	}
	<-tried
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	want := sha256.Sum256(b)
	if got, err := d.of(self); got != "sha256:"+hex.EncodeToString(want[:]) {
		t.Errorf("%s, %v", got, err)
	}
	d.close()
	if _, err := d.of(other); err == nil {
		t.Error("hashed after the end")
	}
}

func TestMountTypes(t *testing.T) {
	got, err := mountTypes(strings.NewReader("36 35 98:0 /a\\040b /mnt rw shared:1 - ext4 /dev/root rw\n41 36 0:40 / /x rw - fuse.sshfs a@b:/ rw\ngarbage\n7 1 0:1 / / rw\n"))
	if err != nil || fmt.Sprint(got) != "map[36:ext4 41:fuse.sshfs]" {
		t.Errorf("%v, %v", got, err)
	}
}

func FuzzMountTypes(f *testing.F) {
	f.Add("36 35 98:0 / / rw - ext4 /dev/root rw\n")
	f.Add("36 - \n - ext4\n")
	f.Fuzz(func(t *testing.T, text string) {
		types, _ := mountTypes(strings.NewReader(text))
		for _, kind := range types {
			if kind == "" || strings.ContainsAny(kind, " \n") {
				t.Errorf("type %q", kind)
			}
		}
	})
}
