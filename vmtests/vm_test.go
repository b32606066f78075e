// SPDX-License-Identifier: Apache-2.0

package vmtests

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"flag"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/vmtests/protocol"
)

var (
	kernelFlag = flag.String("kernel", "", "boot this `version` of the matrix, such as 6.12")
	accelFlag  = flag.String("accel", "tcg,thread=multi", "QEMU's accelerator: a host may have a /dev/kvm that is of no use")
	cacheFlag  = flag.String("cache", "", "`directory` that keeps kernels (default: sallyport-vmtests in the user's cache directory)")
)

// silence is more than any test goes without a line of output.
const silence = 2 * time.Minute

func TestKernel(t *testing.T) {
	if *kernelFlag == "" {
		t.Skip("boots no machine unless told which: go test ./vmtests -kernel 6.12")
	}
	i := slices.IndexFunc(matrix, func(k kernel) bool { return k.version == *kernelFlag })
	if i < 0 {
		t.Fatalf("the matrix has no kernel %s", *kernelFlag)
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("needs amd64: the matrix has kernels of that only")
	}
	ctx := t.Context()
	if end, ok := t.Deadline(); ok { // of -timeout, 10 minutes by default
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, end.Add(-10*time.Second))
		defer cancel()
	}
	cache := *cacheFlag
	if cache == "" {
		user, err := os.UserCacheDir()
		must(t, err)
		cache = filepath.Join(user, "sallyport-vmtests")
	}
	image, err := fetchKernel(ctx, matrix[i].version, cache)
	must(t, err)
	dir := t.TempDir()
	tests := buildTests(t, ctx, dir)
	m := machine{vmlinuz: image.vmlinuz, initramfs: filepath.Join(dir, "initramfs.gz"), dir: dir, accelerator: *accelFlag, silence: silence}
	must(t, pack(t, m.initramfs, image, dir, tests))
	var got results
	start := time.Now()
	err = m.Run(ctx, func(r protocol.Record) {
		if r.Kind != protocol.Line {
			t.Logf("%4.0f s: %s %s %s", time.Since(start).Seconds(), r.Kind, r.Package, r.Text)
		}
		if err := got.Add(r); err != nil {
			t.Error(err)
		}
	})
	for _, b := range tests {
		t.Run(b.name, func(t *testing.T) { repeat(t, &got, b, matrix[i].lacks[b.name]) })
	}
	if err != nil {
		t.Error(err)
	}
	if !strings.HasPrefix(got.release, matrix[i].version+".") {
		t.Errorf("%q was booted", got.release)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// testBinary is a test binary on the host.
type testBinary struct {
	name  string // of the package, within the module
	path  string
	tests []string // that it has
}

func (b testBinary) guestPath() string {
	return "/bin/" + strings.ReplaceAll(b.name, "/", "_") + ".test"
}

// buildTests builds the guest's init and all test binaries, static.
func buildTests(t *testing.T, ctx context.Context, dir string) []testBinary {
	t.Helper()
	build := func(args ...string) {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = ".."
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", args[0], err, out)
		}
	}
	build("build", "-ldflags=-s -w", "-o", filepath.Join(dir, "init"), "./vmtests/guest")
	var tests []testBinary
	for _, p := range packages {
		b := testBinary{name: p, path: filepath.Join(dir, path.Base(p)+".test")}
		build("test", "-c", "-ldflags=-s -w", "-o", b.path, "./"+p)
		out, err := output(ctx, b.path, "-test.list=^(Test|Fuzz|Example)")
		must(t, err)
		b.tests = strings.Fields(out)
		tests = append(tests, b)
	}
	return tests
}

// pack writes the initramfs.
func pack(t *testing.T, name string, image *kernelImage, dir string, tests []testBinary) (err error) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	// Unpacked in emulation: what saves space here costs more time there.
	z, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		return err
	}
	a := newArchive(z)
	add := func(guest, host string, mode fs.FileMode) {
		b, err := os.ReadFile(host)
		must(t, err)
		a.Add(guest, mode, b)
	}
	add("/init", filepath.Join(dir, "init"), 0o755)
	var plan protocol.Plan
	available, err := openModules(image.modules)
	if err != nil {
		return err
	}
	needed, err := available.Resolve(guestModules...)
	if err != nil {
		return err
	}
	for _, m := range needed {
		path := "/modules/" + m.name + ".ko"
		a.Add(path, 0o644, m.content)
		plan.Modules = append(plan.Modules, path)
	}
	for _, b := range tests {
		add(b.guestPath(), b.path, 0o755)
		plan.Tests = append(plan.Tests, protocol.Test{
			Package: b.name, Binary: b.guestPath(), Dir: "/src/" + b.name,
			Args: []string{"-test.v=test2json", "-test.timeout=0", "-test.paniconexit0"},
		})
		addTree(t, a, b.name+"/testdata")
		a.Add("/src/"+b.name+"/.keep", 0o644, nil)
	}
	addTree(t, a, "bpf/include") // a test compares Go to it
	b, err := json.Marshal(plan)
	if err != nil {
		return err
	}
	a.Add(protocol.PlanPath, 0o644, b)
	if err := a.Close(); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	return f.Close()
}

// addTree adds a folder of this module, where there is one, beneath /src.
func addTree(t *testing.T, a *archive, name string) {
	t.Helper()
	root := os.DirFS("..")
	err := fs.WalkDir(root, name, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := fs.ReadFile(root, path)
		a.Add("/src/"+path, 0o644, b)
		return err
	})
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
}

// repeat makes a subtest of each test that the binary has.
func repeat(t *testing.T, got *results, b testBinary, lacks map[string]string) {
	u := got.runs[b.name]
	if u == nil {
		t.Fatal("it was not run")
	}
	if !u.ended {
		t.Error("it did not end")
	}
	if u.status != "" && !u.failures() {
		t.Errorf("it ended with %s", u.status)
	}
	if len(u.output) > 1 { // beside PASS or FAIL
		t.Log(strings.Join(u.output, "\n"))
	}
	for name := range lacks {
		if !slices.Contains(b.tests, name) {
			t.Errorf("%s is on the list of what does not pass, and is no test", name)
		}
	}
	for _, name := range b.tests {
		t.Run(name, func(t *testing.T) {
			verdict := u.judge(name, lacks[name])
			if verdict.skip {
				t.Skip(verdict.text)
			}
			if verdict.bad {
				t.Error(verdict.text)
			}
			for _, sub := range u.subtests(name) {
				t.Run(strings.TrimPrefix(sub, name+"/"), func(t *testing.T) {
					if verdict := u.judgeAlone(sub); verdict.bad {
						t.Error(verdict.text)
					}
				})
			}
		})
	}
}
