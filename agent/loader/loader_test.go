// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/sallyport-dev/sallyport/agent/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// options is a pin directory on a bpffs of its own and a cgroup root.
func options(t *testing.T) Options {
	t.Helper()
	return Options{PinDir: filepath.Join(testenv.BPFFS(t), "sallyport"), CgroupRoot: testenv.NewCgroup(t, nil).Path, FlowEntries: 128}
}

func open(t *testing.T, o Options) *Kernel {
	t.Helper()
	k, err := Open(o)
	must(t, err)
	t.Cleanup(func() { k.Close() })
	return k
}

// links returns the link and program ids by pin.
func links(t *testing.T, dir string) (ids map[string]link.ID, programs map[string]ebpf.ProgramID) {
	t.Helper()
	ids, programs = map[string]link.ID{}, map[string]ebpf.ProgramID{}
	for _, sub := range []string{"links", "netns", "tcx"} {
		names, err := pinsIn(filepath.Join(dir, sub))
		must(t, err)
		for _, name := range names {
			l, err := link.LoadPinnedLink(filepath.Join(dir, sub, name), nil)
			must(t, err)
			info, err := l.Info()
			must(t, err)
			must(t, l.Close())
			ids[sub+"/"+name], programs[sub+"/"+name] = info.ID, info.Program
		}
	}
	return ids, programs
}

func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not come about in time")
		}
	}
}

func TestTakeOverKeepsLinksAndMaps(t *testing.T) {
	o := options(t)
	k := open(t, o)
	if k.TookOver() {
		t.Error("a first start took something over")
	}
	n := testenv.NewNetns(t)
	must(t, k.AttachNetns(int(n.File.Fd()), n.Cookie))
	lo := Interface{NetnsFD: int(n.File.Fd()), Index: 1, Cookie: n.Cookie}
	must(t, k.AttachInterface(lo))
	must(t, k.maps.IdentityByCgroup.Put(uint64(42), [16]byte{7}))
	ids, programs := links(t, o.PinDir)
	if len(ids) < len(cgroupHooks)+3 {
		t.Errorf("links %v", ids)
	}
	must(t, k.Close())

	k = open(t, Options{PinDir: o.PinDir, CgroupRoot: o.CgroupRoot, FlowEntries: 4096})
	if !k.TookOver() {
		t.Error("nothing was taken over")
	}
	must(t, k.AttachInterface(lo))
	after, newPrograms := links(t, o.PinDir)
	// That link cannot be updated, so it is made anew.
	delete(ids, "links/cgroup_mkdir")
	delete(after, "links/cgroup_mkdir")
	if !maps.Equal(ids, after) {
		t.Errorf("links were %v, are %v", ids, after)
	}
	for pin, id := range newPrograms {
		if programs[pin] == id {
			t.Errorf("%s still has the old program", pin)
		}
	}
	var v [16]byte
	if err := k.maps.IdentityByCgroup.Lookup(uint64(42), &v); err != nil || v[0] != 7 {
		t.Errorf("the map was not kept: %v, %v", v, err)
	}
	if got := k.maps.Flow.MaxEntries(); got >= 4096 {
		t.Errorf("the flow map has another size: %d", got)
	}
}

func TestUninstallLeavesNothing(t *testing.T) {
	o := options(t)
	k := open(t, o)
	n := testenv.NewNetns(t)
	must(t, k.AttachNetns(int(n.File.Fd()), n.Cookie))
	must(t, k.AttachInterface(Interface{NetnsFD: int(n.File.Fd()), Index: 1, Cookie: n.Cookie}))
	ids, _ := links(t, o.PinDir)
	if _, err := Uninstall(o.PinDir); !errors.Is(err, ErrBusy) {
		t.Errorf("uninstall under a live agent: %v", err)
	}
	must(t, k.Close())
	removed, err := Uninstall(o.PinDir)
	must(t, err)
	if want := len(ids) + len(k.named()) + 1; len(removed) != want {
		t.Errorf("removed %d pins, want %d: %v", len(removed), want, removed)
	}
	if _, err := os.Stat(o.PinDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the pin directory is still there: %v", err)
	}
	attached := 0
	for _, at := range cgroupHooks {
		r, err := link.QueryPrograms(link.QueryOptions{Target: cgroupFD(t, o.CgroupRoot), Attach: at})
		must(t, err)
		attached += len(r.Programs)
	}
	if attached != 0 {
		t.Errorf("%d programs are still on the cgroup", attached)
	}
	r, err := link.QueryPrograms(link.QueryOptions{Target: int(n.File.Fd()), Attach: ebpf.AttachSkLookup})
	must(t, err)
	if len(r.Programs) != 0 {
		t.Errorf("%d programs are still on the netns", len(r.Programs))
	}
	if removed, err := Uninstall(o.PinDir); err != nil || len(removed) != 0 {
		t.Errorf("a second uninstall: %v, %v", removed, err)
	}
}

func cgroupFD(t *testing.T, path string) int {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

func TestAnotherLayoutIsRefused(t *testing.T) {
	o := options(t)
	k := open(t, o)
	ids, programs := links(t, o.PinDir)
	must(t, k.Close())
	m, err := ebpf.LoadPinnedMap(filepath.Join(o.PinDir, layoutPin), nil)
	must(t, err)
	must(t, m.Put(uint32(0), uint32(layoutVersion+1)))
	must(t, m.Close())
	_, err = Open(o)
	if !errors.Is(err, ErrLayout) || !strings.Contains(err.Error(), "sallyport agent uninstall") {
		t.Errorf("open: %v", err)
	}
	after, newPrograms := links(t, o.PinDir)
	if !maps.Equal(ids, after) || !maps.Equal(programs, newPrograms) {
		t.Error("what was refused was changed")
	}
	_, err = Uninstall(o.PinDir)
	must(t, err)
	must(t, open(t, o).Close())
}

func TestSecondAgentIsRefused(t *testing.T) {
	o := options(t)
	k := open(t, o)
	for name, o := range map[string]Options{
		"same pins": {PinDir: o.PinDir, CgroupRoot: testenv.NewCgroup(t, nil).Path},
		"same root": {PinDir: o.PinDir + "2", CgroupRoot: o.CgroupRoot},
	} {
		if _, err := Open(o); !errors.Is(err, ErrBusy) {
			t.Errorf("%s: %v", name, err)
		}
	}
	must(t, k.Close())
	if _, err := Open(Options{PinDir: o.PinDir, CgroupRoot: testenv.NewCgroup(t, nil).Path}); err == nil ||
		!strings.Contains(err.Error(), "another cgroup root") {
		t.Errorf("pins of another cgroup root: %v", err)
	}
	must(t, open(t, o).Close())
}

// An install that did not end leaves nothing that the next one trips over,
// and an error on the way leaves nothing attached.
func TestAllOrNothing(t *testing.T) {
	o := options(t)
	must(t, open(t, o).Close())
	must(t, os.Remove(filepath.Join(o.PinDir, layoutPin)))
	k := open(t, o)
	if k.TookOver() {
		t.Error("half an install was taken over")
	}
	must(t, k.Close())

	o = options(t)
	o.CgroupRoot = t.TempDir()
	if _, err := Open(o); err == nil {
		t.Fatal("a cgroup root that is none was taken")
	}
	for _, sub := range subdirs {
		if names, err := pinsIn(filepath.Join(o.PinDir, sub)); err == nil && len(names) > 0 {
			t.Errorf("%s holds %v", sub, names)
		}
	}
	o = options(t)
	o.FlowEntries = 1
	if _, err := Open(o); err == nil {
		t.Error("a flow map of one entry was taken")
	}
}

func TestStalePinsAreSwept(t *testing.T) {
	o := options(t)
	k := open(t, o)
	gone, stays := testenv.NewNetns(t), testenv.NewNetns(t)
	for _, n := range []*testenv.Netns{gone, stays} {
		must(t, k.AttachNetns(int(n.File.Fd()), n.Cookie))
		must(t, k.AttachInterface(Interface{NetnsFD: int(n.File.Fd()), Index: 1, Cookie: n.Cookie}))
	}
	must(t, gone.File.Close())
	// The kernel takes a netns down in its own time.
	waitFor(t, func() bool {
		must(t, k.Sweep())
		cookies, err := k.Netns()
		must(t, err)
		names, err := pinsIn(filepath.Join(o.PinDir, "tcx"))
		must(t, err)
		return slices.Equal(cookies, []uint64{stays.Cookie}) && len(names) == 2
	})
	must(t, k.DetachInterface(Interface{Index: 1, Cookie: stays.Cookie}))
	must(t, k.DetachNetns(stays.Cookie))
	must(t, k.DetachNetns(stays.Cookie))
	if cookies, err := k.Netns(); err != nil || len(cookies) != 0 {
		t.Errorf("after detach: %v, %v", cookies, err)
	}
}

func TestMountsBPF(t *testing.T) {
	testenv.RequireRoot(t)
	parent := filepath.Join(t.TempDir(), "not-there", "yet")
	o := Options{PinDir: filepath.Join(parent, "sallyport"), CgroupRoot: testenv.NewCgroup(t, nil).Path, FlowEntries: 128}
	k, err := Open(o)
	must(t, err)
	testenv.Unmounts(t, parent)
	must(t, k.Close())
	_, err = Uninstall(o.PinDir)
	must(t, err)

	busy := filepath.Join(t.TempDir(), "sallyport")
	must(t, os.Mkdir(busy, 0o700))
	must(t, os.WriteFile(filepath.Join(busy, "file"), nil, 0o600))
	o.PinDir = busy
	if _, err := Open(o); err == nil || !strings.Contains(err.Error(), "not on bpffs") {
		t.Errorf("a pin directory with files: %v", err)
	}
}

func TestInterfaceOfAnotherNetns(t *testing.T) {
	k := open(t, options(t))
	a, b := testenv.NewNetns(t), testenv.NewNetns(t)
	index, _ := testenv.Veth(t, "eth0", a, b, []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}, nil)
	must(t, k.AttachInterface(Interface{NetnsFD: int(a.File.Fd()), Index: index, Cookie: a.Cookie}))
	if err := k.AttachInterface(Interface{NetnsFD: int(a.File.Fd()), Index: 9999, Cookie: a.Cookie}); err == nil {
		t.Error("an interface that is not there was attached to")
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

// Opening, attaching, adopting and closing again leaves no descriptor.
func TestNothingLeaks(t *testing.T) {
	o := options(t)
	n := testenv.NewNetns(t)
	cycle := func() {
		k, err := Open(o)
		must(t, err)
		defer k.Close() //nolint:errcheck // of one that gives up
		must(t, k.AttachNetns(int(n.File.Fd()), n.Cookie))
		must(t, k.AttachInterface(Interface{NetnsFD: int(n.File.Fd()), Index: 1, Cookie: n.Cookie}))
		must(t, k.Adopt())
		must(t, k.Sweep())
		must(t, k.Close())
	}
	cycle()
	before := descriptors(t)
	for range 3 {
		cycle()
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
