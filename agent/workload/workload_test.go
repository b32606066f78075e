// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/agent/sockets"
	"github.com/sallyport-dev/sallyport/agent/testenv"
)

// sleeper starts a process in a cgroup and a namespace that does nothing.
func sleeper(t testing.TB, cg *testenv.Cgroup, n *testenv.Netns) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "3600")
	testenv.Start(t, cg, n, cmd)
	return cmd
}

// run starts a Recogniser in the cgroup and returns a function that waits
// for a table that ok accepts.
func run(t *testing.T, scope *testenv.Cgroup, opt Options) (*Recogniser, func(what string, ok func(*Table) bool) *Table) {
	t.Helper()
	opt.Root = testenv.CgroupMount(t)
	opt.Scope = strings.TrimPrefix(scope.Path, opt.Root)
	r, err := New(opt)
	if err != nil {
		t.Fatal(err)
	}
	tables := make(chan *Table, 1024)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx, func(t *Table) { tables <- t }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return r, func(what string, ok func(*Table) bool) *Table {
		t.Helper()
		limit := time.After(10 * time.Second)
		var last *Table
		for {
			select {
			case last = <-tables:
				if ok(last) {
					return last
				}
			case <-limit:
				t.Fatalf("%s: not seen; last table %s", what, show(last))
			}
		}
	}
}

// show writes a table, one cgroup an item, with paths beneath the scope.
func show(t *Table) string {
	if t == nil {
		return "none"
	}
	var all []string
	for _, c := range t.Cgroups {
		who := c.Identity
		if len(c.Ambiguous) > 0 {
			who = strings.Join(c.Ambiguous, "|")
		}
		_, p, _ := strings.Cut(strings.TrimPrefix(c.Path, "/"), "/")
		all = append(all, fmt.Sprintf("/%s=%s:%d", p, who, c.Processes))
	}
	return strings.Join(append(all, t.Problems...), " ")
}

func cgroup(t testing.TB, scope *testenv.Cgroup, path string) *testenv.Cgroup {
	t.Helper()
	full := scope.Path
	var c *testenv.Cgroup
	for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		full = filepath.Join(full, part)
		if _, err := os.Stat(full); err == nil {
			continue
		}
		c = testenv.MakeCgroup(t, full)
	}
	return c
}

func is(want string) func(*Table) bool { return func(t *Table) bool { return show(t) == want } }

func TestRecognise(t *testing.T) {
	testenv.RequireRoot(t)
	uid := uint32(65533)
	cases := []struct {
		name       string
		cgroups    []string
		identities []Identity
		want       string
	}{
		{"path and beneath", []string{"/shop/checkout/a/b", "/shop/checkout2"},
			[]Identity{{Name: "shop/checkout", Path: "/shop/checkout"}},
			"/shop/checkout=shop/checkout:0 /shop/checkout/a=shop/checkout:0 /shop/checkout/a/b=shop/checkout:0"},
		{"unit", []string{"/system.slice/payments.service/sub", "/other.slice/payments.service", "/payments.service"},
			[]Identity{{Name: "p", Unit: "payments.service"}},
			"/system.slice/payments.service=p:0 /system.slice/payments.service/sub=p:0"},
		{"unit in a delegated subtree", []string{"/system.slice/evil.service/system.slice/payments.service", "/user.slice/user-1.slice/system.slice/payments.service"},
			[]Identity{{Name: "p", Unit: "payments.service"}}, ""},
		{"template", []string{`/system.slice/system-web\x2dapp.slice/web-app@1.service`, "/system.slice/web-app@1.service"},
			[]Identity{{Name: "w", Unit: "web-app@1.service"}},
			`/system.slice/system-web\x2dapp.slice/web-app@1.service=w:0`},
		{"two claim one", []string{"/shop/checkout"},
			[]Identity{{Name: "b", Path: "/shop/checkout"}, {Name: "a", Path: "/shop/checkout"}},
			"/shop/checkout=a|b:0"},
		{"one within the other", []string{"/shop/checkout"},
			[]Identity{{Name: "a", Path: "/shop"}, {Name: "b", Path: "/shop/checkout"}},
			"/shop=a:0 /shop/checkout=a|b:0"},
		{"unit and path", []string{"/system.slice/x.service/sub"},
			[]Identity{{Name: "a", Unit: "x.service", Path: "/system.slice/x.service/sub"}, {Name: "b", Unit: "x.service", Path: "/elsewhere"}},
			"/system.slice/x.service/sub=a:0 b: neither systemd.unit nor cgroup.path names a cgroup (systemd.unit x.service, cgroup.path /elsewhere)"},
		{"no process, narrowed", []string{"/shop/checkout"},
			[]Identity{{Name: "a", Path: "/shop/checkout", UID: &uid}}, ""},
		{"hostile selectors", []string{"/shop"},
			[]Identity{{Name: "a", Path: "/"}, {Name: "b", Path: "/shop/../shop"}, {Name: "c", Unit: "../x"}, {Name: "d"}, {Name: "e", Path: "shop"}},
			`a: cgroup.path / would be every workload b: cgroup.path "/shop/../shop" is not a clean absolute path ` +
				`c: neither systemd.unit nor cgroup.path names a cgroup (systemd.unit ../x) d: neither systemd.unit nor cgroup.path names a cgroup () ` +
				`e: cgroup.path "shop" is not a clean absolute path`},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			scope := testenv.NewCgroup(t, nil)
			for _, p := range c.cgroups {
				cgroup(t, scope, p)
			}
			r, until := run(t, scope, Options{Rescan: time.Hour})
			r.SetIdentities(c.identities)
			if c.want == "" {
				// The first table is empty already: wait for a scan that knows
				// the identities, told by one that is there for sure.
				cgroup(t, scope, "/sentinel")
				r.SetIdentities(append(slices.Clone(c.identities), Identity{Name: "sentinel", Path: "/sentinel"}))
				c.want = "/sentinel=sentinel:0"
			}
			got := until(c.want, is(c.want))
			for _, cg := range got.Cgroups {
				id, err := testenv.CgroupID(filepath.Join(testenv.CgroupMount(t), cg.Path))
				if err != nil || id != cg.ID {
					t.Errorf("%s: id %d, the kernel says %d (%v)", cg.Path, cg.ID, id, err)
				}
			}
		})
	}
}

func TestChangesAreNoticedWithoutRescan(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	r, until := run(t, scope, Options{Rescan: time.Hour})
	r.SetIdentities([]Identity{{Name: "p", Unit: "p.service"}})
	until("nothing", is(""))
	p := cgroup(t, scope, "/system.slice/p.service")
	until("a new unit", is("/system.slice/p.service=p:0"))
	n := testenv.NewNetns(t)
	sleeper(t, nil, n) // something else that lives there
	cmd := sleeper(t, p, n)
	got := until("its first process", is("/system.slice/p.service=p:1"))
	if len(got.Netns) != 1 || got.Netns[0].Cookie() != n.Cookie || !slices.Equal(got.Cgroups[0].Netns, []uint64{n.Cookie}) ||
		!slices.Equal(got.Netns[0].Identities, []string{"p"}) {
		t.Fatalf("namespaces %+v", got.Netns)
	}
	cgroup(t, scope, "/system.slice/p.service/child")
	until("a child", is("/system.slice/p.service=p:1 /system.slice/p.service/child=p:0"))
	cmd.Process.Kill()
	got = until("its end", is("/system.slice/p.service=p:0 /system.slice/p.service/child=p:0"))
	// The port of a server that is down stays guarded.
	if len(got.Netns) != 1 {
		t.Fatalf("the namespace was let go: %+v", got.Netns)
	}
	if err := os.Remove(filepath.Join(p.Path, "child")); err != nil {
		t.Fatal(err)
	}
	until("a child gone", is("/system.slice/p.service=p:0"))
	r.SetIdentities(nil)
	got = until("no policy", is(""))
	if len(got.Netns) != 0 {
		t.Fatalf("no policy names it, and it is held: %+v", got.Netns)
	}
}

// TestForksAreNoChange: a workload that forks has not everything looked at
// again by whoever is told of changes.
func TestForksAreNoChange(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	a := cgroup(t, scope, "/a")
	sleeper(t, a, nil)
	r, until := run(t, scope, Options{Rescan: time.Millisecond})
	r.SetIdentities([]Identity{{Name: "a", Path: "/a"}})
	until("one process", is("/a=a:1"))
	sleeper(t, a, nil)
	sleeper(t, a, nil)
	for limit := time.Now().Add(10 * time.Second); show(r.Table()) != "/a=a:3"; time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("table %s", show(r.Table()))
		}
	}
	cgroup(t, scope, "/a/b")
	if got := until("the next change", func(*Table) bool { return true }); show(got) != "/a=a:3 /a/b=a:0" {
		t.Errorf("told of %s", show(got))
	}
}

func TestNamespacesAndTheirEnd(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	before := descriptors(t)
	t.Cleanup(func() { // after the end of all that follows
		if after := descriptors(t); len(after) > len(before) {
			t.Errorf("open: %v, before: %v", after, before)
		}
	})
	r, until := run(t, scope, Options{Rescan: 20 * time.Millisecond})
	a, b := cgroup(t, scope, "/a"), cgroup(t, scope, "/b")
	r.SetIdentities([]Identity{{Name: "a", Path: "/a"}, {Name: "b", Path: "/b"}})
	shared, own := testenv.NewNetns(t), testenv.NewNetns(t)
	sleeper(t, a, shared)
	inOwn := sleeper(t, a, own)
	sleeper(t, b, shared)
	got := until("three processes", is("/a=a:2 /b=b:1"))
	for _, n := range got.Netns {
		want := "[a b]"
		if n.Cookie() == own.Cookie {
			want = "[a]"
		}
		if fmt.Sprint(n.Identities) != want {
			t.Errorf("%v: %v, want %s", n.Cookie(), n.Identities, want)
		}
	}
	if len(got.Netns) != 2 || len(got.Cgroups[0].Netns) != 2 || len(got.Cgroups[1].Netns) != 1 {
		t.Fatalf("namespaces %v", got.Netns)
	}
	// Without process and mount a namespace can be entered no more.
	inOwn.Process.Kill()
	got = until("an empty namespace", func(t *Table) bool { return len(t.Netns) == 1 })
	if got.Netns[0].Cookie() != shared.Cookie {
		t.Fatalf("left: %v", got.Netns)
	}
	// One that lasts while another identity lives there.
	r.SetIdentities([]Identity{{Name: "b", Path: "/b"}})
	got = until("a without policy", is("/b=b:1"))
	if len(got.Netns) != 1 || fmt.Sprint(got.Netns[0].Identities) != "[b]" {
		t.Fatalf("left: %v", got.Netns)
	}
}

// descriptors are those of this process, with what is kept for good once
// something was waited for, and once another namespace was entered.
func descriptors(t testing.TB) map[string]string {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	own, err := sockets.Own()
	if err != nil {
		t.Fatal(err)
	}
	own.Close()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	open := map[string]string{}
	for _, d := range all {
		if to, err := os.Readlink("/proc/self/fd/" + d.Name()); err == nil {
			open[d.Name()] = to
		}
	}
	return open
}

func TestUnconfined(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	sleeper(t, cgroup(t, scope, "/root"), nil)
	sleeper(t, cgroup(t, scope, "/inside"), testenv.NewNetns(t))
	for name, attr := range map[string]*syscall.SysProcAttr{
		"user": {Credential: &syscall.Credential{Uid: 65534, Gid: 65534}},
		"userns": {
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 65534, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 65534, Size: 1}},
		},
	} {
		cmd := exec.Command("sleep", "3600")
		cmd.SysProcAttr = attr
		testenv.Start(t, cgroup(t, scope, "/"+name), nil, cmd)
	}
	r, until := run(t, scope, Options{Rescan: time.Hour})
	r.SetIdentities([]Identity{{Name: "r", Path: "/root"}, {Name: "i", Path: "/inside"}, {Name: "u", Path: "/user"}, {Name: "n", Path: "/userns"}})
	got := until("all four", is("/inside=i:1 /root=r:1 /user=u:1 /userns=n:1"))
	for _, c := range got.Cgroups {
		if c.Unconfined != (c.Identity == "r") {
			t.Errorf("%s: unconfined %v", c.Path, c.Unconfined)
		}
	}
}

// TestWithoutInotify: where the kernel gives no instance, the rescan finds
// everything.
func TestWithoutInotify(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	r, err := New(Options{Root: testenv.CgroupMount(t), Scope: strings.TrimPrefix(scope.Path, testenv.CgroupMount(t))})
	if err != nil {
		t.Fatal(err)
	}
	defer r.own.Close()
	r.watch = &watcher{watches: map[string]int32{}, cgroups: map[string]uint64{}}
	defer r.watch.close()
	cgroup(t, scope, "/a/b")
	r.SetIdentities([]Identity{{Name: "a", Path: "/a"}})
	for range 2 {
		if table, _ := r.scan(); show(table) != "/a=a:0 /a/b=a:0" {
			t.Errorf("got %s", show(table))
		}
	}
}

func TestOwnNamespaceByEndpoint(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	r, until := run(t, scope, Options{Rescan: time.Hour})
	r.SetIdentities([]Identity{
		{Name: "down", Path: "/down", Endpoints: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:8080")}},
		{Name: "elsewhere", Path: "/elsewhere", Endpoints: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:8080")}},
	})
	got := until("the own namespace", func(t *Table) bool { return len(t.Netns) == 1 })
	if got.Netns[0].Cookie() != testenv.HostNetns(t).Cookie || fmt.Sprint(got.Netns[0].Identities) != "[down]" {
		t.Errorf("got %v", got.Netns)
	}
}

func TestNarrowed(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	if sleep, err = filepath.EvalSymlinks(sleep); err != nil {
		t.Fatal(err)
	}
	root, other := uint32(0), uint32(4242)
	for _, p := range []string{"/uid", "/notuid", "/bin", "/notbin", "/mixed"} {
		sleeper(t, cgroup(t, scope, p), nil)
	}
	cat := exec.Command("tail", "-f", "/dev/null")
	testenv.Start(t, &testenv.Cgroup{Path: filepath.Join(scope.Path, "mixed")}, nil, cat)
	r, until := run(t, scope, Options{Rescan: time.Hour})
	r.SetIdentities([]Identity{
		{Name: "uid", Path: "/uid", UID: &root},
		{Name: "notuid", Path: "/notuid", UID: &other},
		{Name: "bin", Path: "/bin", Binary: sleep},
		{Name: "notbin", Path: "/notbin", Binary: "/bin/none"},
		{Name: "mixed", Path: "/mixed", Binary: sleep},
	})
	got := until("narrowed", is("/bin=bin:1 /uid=uid:1"))
	if got.Cgroups[0].By != "cgroup.path /bin, process.binary "+sleep {
		t.Errorf("by %q", got.Cgroups[0].By)
	}
	all, _, err := r.Unrecognised()
	if err != nil {
		t.Fatal(err)
	}
	why := map[string]string{}
	for _, u := range all {
		why[filepath.Base(u.Path)] = u.Nearest + " " + u.Mismatch
	}
	if why["notuid"] != "notuid uid: is 0, want 4242" || !strings.HasPrefix(why["notbin"], "notbin process.binary: is ") || !strings.HasPrefix(why["mixed"], "mixed process.binary") {
		t.Errorf("got %v", why)
	}
}

// TestNobodyBeneath: to the kernel a cgroup without identity is what the one
// above it is, so one that did not match takes it away from that.
func TestNobodyBeneath(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	if sleep, err = filepath.EvalSymlinks(sleep); err != nil {
		t.Fatal(err)
	}
	sleeper(t, cgroup(t, scope, "/a"), nil)
	sleeper(t, cgroup(t, scope, "/a/b/c"), nil)
	r, until := run(t, scope, Options{Rescan: time.Hour})
	id := Identity{Name: "a", Path: "/a", Binary: sleep}
	r.SetIdentities([]Identity{id})
	until("both", is("/a=a:1 /a/b/c=a:1"))
	cgroup(t, scope, "/a/d")
	stranger := exec.Command("tail", "-f", "/dev/null")
	testenv.Start(t, cgroup(t, scope, "/a/d/e"), nil, stranger)
	until("a stranger beneath", is("/a/b/c=a:1"))
	all, _, err := r.Unrecognised()
	if err != nil || len(all) != 2 || all[0].Nearest != "a" || all[0].Mismatch != "a process in a cgroup beneath it does not match" ||
		!strings.HasPrefix(all[1].Mismatch, "process.binary: is ") {
		t.Errorf("without identity: %+v, %v", all, err)
	}
	// It is nobody's business once it is somebody.
	r.SetIdentities([]Identity{id, {Name: "e", Path: "/a/d"}})
	until("the stranger is somebody", is("/a=a:1 /a/b/c=a:1 /a/d=e:0 /a/d/e=e:1"))
	r.SetIdentities([]Identity{id})
	until("the stranger is nobody again", is("/a/b/c=a:1"))
	if err := stranger.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	until("the stranger is gone", is("/a=a:1 /a/b/c=a:1"))
}

// TestTooManyProcesses: what is not looked at does not match.
func TestTooManyProcesses(t *testing.T) {
	uid := uint32(os.Geteuid())
	id := Identity{Name: "a", Path: "/a", UID: &uid}
	procs := slices.Repeat([]int{os.Getpid()}, maxProcs)
	if !(looker{}).matchesAll(&id, procs) {
		t.Error("as many as are looked at do not match")
	}
	procs = append(procs, os.Getpid())
	if (looker{}).matchesAll(&id, procs) {
		t.Error("more than are looked at match")
	}
	if name, why := (looker{}).nearest([]Identity{id}, "/", "/a", procs); name != "a" || !strings.HasPrefix(why, "it has more than 4096 processes") {
		t.Errorf("%s: %s", name, why)
	}
}

func TestBounds(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	for i := range 10 {
		cgroup(t, scope, fmt.Sprintf("/a/%d", i))
	}
	r, until := run(t, scope, Options{Rescan: 10 * time.Millisecond, MaxCgroups: 5, MaxWatches: 3})
	r.SetIdentities([]Identity{{Name: "a", Path: "/a"}})
	got := until("the bound", func(t *Table) bool { return len(t.Problems) > 0 })
	if len(got.Cgroups) != 5 || !strings.Contains(got.Problems[0], "too many cgroups") {
		t.Errorf("%d cgroups, %v", len(got.Cgroups), got.Problems)
	}
}

func TestNearest(t *testing.T) {
	identities := []Identity{
		{Name: "shop/checkout", Unit: "checkout.service"},
		{Name: "shop/payments", Path: "/shop/payments"},
	}
	for _, c := range []struct{ path, name, mismatch string }{
		{"/scope/custom.slice/checkout.service", "shop/checkout", `systemd.unit: checkout.service runs at "/custom.slice/checkout.service" and not at "/system.slice/checkout.service"; select it by cgroup.path`},
		{"/scope/system.slice/chekout.service", "shop/checkout", `systemd.unit: is "chekout.service", want "checkout.service"`},
		{"/scope/shop/payment", "shop/payments", `cgroup.path: is "/shop/payment", want "/shop/payments" or beneath it`},
		{"/scope/a", "", ""},
	} {
		name, mismatch := looker{}.nearest(identities, "/scope", c.path, nil)
		if name != c.name || mismatch != c.mismatch {
			t.Errorf("%s: %s, %s", c.path, name, mismatch)
		}
	}
}

func TestCgroupRoot(t *testing.T) {
	for _, c := range []struct{ mountinfo, want string }{
		{"31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup/unified"},
		{"30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n", "/sys/fs/cgroup"},
		{"30 23 0:26 /sub /x rw - cgroup2 none rw\n31 23 0:26 / /a\\040b rw - cgroup2 none rw\n", "/a b"},
		{"30 23 0:26 / /cgroup2 rw - ext4 cgroup2 rw\n", ""},
		{"garbage\n", ""},
	} {
		got, err := cgroupRoot(strings.NewReader(c.mountinfo))
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%q: %q, %v", c.mountinfo, got, err)
		}
	}
}

func BenchmarkScan(b *testing.B) {
	testenv.RequireRoot(b)
	scope := testenv.NewCgroup(b, nil)
	var identities []Identity
	for i := range 100 {
		c := cgroup(b, scope, fmt.Sprintf("/w%d", i))
		if i < 10 {
			sleeper(b, c, nil)
		}
		identities = append(identities, Identity{Name: fmt.Sprint(i), Path: fmt.Sprintf("/w%d", i)})
	}
	root := testenv.CgroupMount(b)
	r, err := New(Options{Root: root, Scope: strings.TrimPrefix(scope.Path, root)})
	if err != nil {
		b.Fatal(err)
	}
	if r.watch, err = newWatcher(8192); err != nil {
		b.Fatal(err)
	}
	defer r.watch.close()
	r.SetIdentities(identities)
	b.ReportAllocs()
	for b.Loop() {
		if table, _ := r.scan(); len(table.Cgroups) != 100 {
			b.Fatal(len(table.Cgroups))
		}
	}
}

// TestAll: who is nobody else's is everybody's, but for what must be nobody.
func TestAll(t *testing.T) {
	testenv.RequireRoot(t)
	scope := testenv.NewCgroup(t, nil)
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	if sleep, err = filepath.EvalSymlinks(sleep); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"/mine", "/mine/deep", "/wrong", "/free", "/free/deep", "/own/leaf", "/own/other", "/above/below/narrowed"} {
		sleeper(t, cgroup(t, scope, p), nil)
	}
	root, err := CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	own := path.Join(strings.TrimPrefix(scope.Path, root), "own/leaf")
	r, until := run(t, scope, Options{Rescan: 20 * time.Millisecond, Own: []string{own}})
	all := []Identity{
		{Name: "rest", All: true},
		{Name: "mine", Path: "/mine"},
		{Name: "wrong", Path: "/wrong", Binary: "/bin/none"},
		{Name: "narrowed", Path: "/above/below/narrowed", Binary: sleep},
	}
	r.SetIdentities(all)
	got := until("the rest", is("/above/below/narrowed=narrowed:1 /free=rest:1 /free/deep=rest:1 /mine=mine:1 /mine/deep=mine:1 /own/other=rest:1"))
	for _, c := range got.Cgroups {
		if c.Identity == "rest" && c.By != "all" {
			t.Errorf("%s by %q", c.Path, c.By)
		}
	}
	// One that comes later, and one above what is somebody's.
	sleeper(t, cgroup(t, scope, "/late"), nil)
	until("a late one", is("/above/below/narrowed=narrowed:1 /free=rest:1 /free/deep=rest:1 /late=rest:1 /mine=mine:1 /mine/deep=mine:1 /own/other=rest:1"))
	sleeper(t, &testenv.Cgroup{Path: filepath.Join(scope.Path, "above")}, nil)
	r.SetIdentities(all[:2])
	until("fewer others", is("/above=rest:1 /above/below/narrowed=rest:1 /free=rest:1 /free/deep=rest:1 /late=rest:1 /mine=mine:1 /mine/deep=mine:1 /own/other=rest:1 /wrong=rest:1"))
	r.SetIdentities(all)
	until("all of them again", is("/above/below/narrowed=narrowed:1 /free=rest:1 /free/deep=rest:1 /late=rest:1 /mine=mine:1 /mine/deep=mine:1 /own/other=rest:1"))
	r.SetIdentities(all[1:])
	until("nobody is all", is("/above/below/narrowed=narrowed:1 /mine=mine:1 /mine/deep=mine:1"))
}
