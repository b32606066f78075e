// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
)

func policy(name string) string {
	return fmt.Sprintf(`apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: %s}
spec: {owner: o, spiffeID: "spiffe://example.org/%[1]s"}
`, name)
}

const broken = "apiVersion: sallyport.dev/v1alpha1\nkind: MachineIdentit\n"

type harness struct {
	t          *testing.T
	dir, state string
	w          *Watcher
	said       lines
	stop       func()
}

// start watches dir; poll is so long that only notifications count, unless
// a test says otherwise.
func start(t *testing.T, dir, state string, poll time.Duration) *harness {
	t.Helper()
	return startQuiet(t, dir, state, poll, 5*time.Millisecond)
}

// startQuiet is start with another debounce.
func startQuiet(t *testing.T, dir, state string, poll, debounce time.Duration) *harness {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	said := make(lines, 1)
	w := New(Options{
		Dir: dir, StateDir: state, Debounce: debounce, Poll: poll,
		Logger: slog.New(slog.NewTextHandler(said, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Build: func(files []load.File) (*compile.Plan, []load.Problem) {
			return compile.Build(files, compile.Options{TrustDomain: "example.org", Node: "n"})
		},
	})
	done := make(chan struct{})
	go func() { w.Run(ctx); close(done) }()
	h := &harness{t: t, dir: dir, state: state, w: w, said: said}
	h.stop = func() {
		cancel()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Error("Run does not end")
		}
	}
	t.Cleanup(h.stop)
	return h
}

// lines hands log lines to who waits for one, and drops the rest.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	select {
	case l <- string(p):
	default:
	}
	return len(p), nil
}

// waitFor waits for a line of the log.
func (h *harness) waitFor(message string) {
	h.t.Helper()
	timeout := time.After(10 * time.Second)
	for {
		select {
		case line := <-h.said:
			if strings.Contains(line, message) {
				return
			}
		case <-timeout:
			h.t.Fatalf("%q is not said", message)
		}
	}
}

func (h *harness) write(name, content string) {
	h.t.Helper()
	if err := os.WriteFile(filepath.Join(h.dir, name), []byte(content), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

// place writes a file that is there whole from the first.
func (h *harness) place(name, content string) {
	h.t.Helper()
	beside := filepath.Join(h.t.TempDir(), name)
	if err := os.WriteFile(beside, []byte(content), 0o600); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Rename(beside, filepath.Join(h.dir, name)); err != nil {
		h.t.Fatal(err)
	}
}

// until waits for the event that satisfies want; those before it are states
// in between.
func (h *harness) until(what string, want func(Event) bool) Event {
	h.t.Helper()
	timeout := time.After(30 * time.Second)
	var last Event
	for {
		select {
		case e, ok := <-h.w.Events():
			if !ok {
				h.t.Fatalf("%s: the watcher has ended", what)
			}
			if last = e; want(e) {
				return e
			}
		case <-timeout:
			h.t.Fatalf("%s: does not come; last: %s", what, describe(last))
		}
	}
}

func describe(e Event) string {
	names := "none"
	if e.Plan != nil {
		names = ""
		for _, i := range e.Plan.Identities() {
			names += i.Name + " "
		}
	}
	return fmt.Sprintf("plan %s, problems %v, from last good %v", names, e.Problems, e.FromLastGood)
}

// holds says whether exactly these identities are in force, of a folder
// that is or is not rejected.
func holds(rejected bool, names ...string) func(Event) bool {
	return func(e Event) bool {
		if e.Plan == nil || e.Rejected() != rejected || len(e.Plan.Identities()) != len(names) {
			return false
		}
		for i, id := range e.Plan.Identities() {
			if id.Name != names[i] {
				return false
			}
		}
		return true
	}
}

func TestChangesTakeEffectAndBadOnesDoNot(t *testing.T) {
	h := start(t, t.TempDir(), t.TempDir(), time.Hour)
	h.until("empty", holds(false))
	h.write("a.yaml", policy("a"))
	e := h.until("a", holds(false, "a"))
	h.place("b.yaml", broken)
	bad := h.until("b is broken", holds(true, "a"))
	if bad.Plan != e.Plan || len(bad.Problems) != 1 || !strings.HasPrefix(bad.Problems[0].String(), "b.yaml:2:7: kind: ") {
		t.Errorf("%s", describe(bad))
	}
	if len(bad.Files) != 1 || bad.Files[0].Path != "a.yaml" {
		t.Errorf("files %v", bad.Files)
	}
	if err := os.Remove(filepath.Join(h.dir, "b.yaml")); err != nil {
		t.Fatal(err)
	}
	if back := h.until("back", holds(false, "a")); back.Plan != e.Plan {
		t.Error("the same set is another plan")
	}
	h.write("notes.txt", "not a policy")
	h.write("a_test.yaml", "neither")
	h.write("b.yaml", policy("b"))
	h.until("a and b", holds(false, "a", "b"))
}

func TestEditorsRename(t *testing.T) {
	h := start(t, t.TempDir(), "", time.Hour)
	h.write("a.yaml", policy("a"))
	h.until("a", holds(false, "a"))
	h.write(".a.yaml.swp", "half")
	h.write("a.yaml.tmp", policy("a2"))
	if err := os.Rename(filepath.Join(h.dir, "a.yaml.tmp"), filepath.Join(h.dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	h.until("a2", holds(false, "a2"))
}

func TestConfigMapLinkSwap(t *testing.T) {
	dir := t.TempDir()
	put := func(version, name string) {
		t.Helper()
		sub := filepath.Join(dir, ".."+version)
		if err := os.Mkdir(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(sub, "policy.yaml"), []byte(policy(name)), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(".."+version, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	put("1", "one")
	if err := os.Symlink(filepath.Join("..data", "policy.yaml"), filepath.Join(dir, "policy.yaml")); err != nil {
		t.Fatal(err)
	}
	h := start(t, dir, "", time.Hour)
	h.until("one", holds(false, "one"))
	put("2", "two")
	h.until("two", holds(false, "two"))
}

func TestMissingFolderIsWaitedFor(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "policies")
	h := start(t, dir, "", 20*time.Millisecond)
	e := h.until("missing", func(e Event) bool { return e.Plan == nil && e.Rejected() })
	if !strings.Contains(e.Problems[0].Message, "is not there") {
		t.Errorf("problems %v", e.Problems)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	h.write("a.yaml", policy("a"))
	h.until("a", holds(false, "a"))
	// Gone: what was in force stays. Back, as another folder: watched again.
	if err := os.Rename(dir, dir+".old"); err != nil {
		t.Fatal(err)
	}
	h.until("gone", holds(true, "a"))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	h.write("b.yaml", policy("b"))
	h.until("b", holds(false, "b"))
}

// TestFolderThatFillsIsNoSet has a folder come back whose files come one after
// another: the first alone is never in force.
func TestFolderThatFillsIsNoSet(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "policies")
	h := startQuiet(t, dir, "", time.Hour, 2*time.Second)
	h.until("missing", func(e Event) bool { return e.Plan == nil && e.Rejected() })
	fill := func(first, second string) {
		t.Helper()
		aside := filepath.Join(t.TempDir(), "policies")
		if err := errors.Join(os.Mkdir(aside, 0o755), os.WriteFile(filepath.Join(aside, first+".yaml"), []byte(policy(first)), 0o600)); err != nil {
			t.Fatal(err)
		}
		select { // the log keeps a line
		case <-h.said:
		default:
		}
		if err := os.Rename(aside, dir); err != nil {
			t.Fatal(err)
		}
		h.waitFor(thereAgain)
		h.place(second+".yaml", policy(second))
		e := h.until("a set", func(e Event) bool { return !e.Rejected() }) // it may have been seen to be gone
		if !holds(false, first, second)(e) {
			t.Errorf("the set of %s and %s: %s", first, second, describe(e))
		}
	}
	fill("a", "b")
	// Another in its place, before it was seen to be gone.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	fill("c", "d")
}

// TestTimeAloneWarns holds that a set which nobody touches warns once an
// identity is about to expire, and stays what it is.
func TestTimeAloneWarns(t *testing.T) {
	h := start(t, t.TempDir(), "", 20*time.Millisecond)
	expires := time.Now().Add(30*24*time.Hour + 6*time.Second).UTC().Format(time.RFC3339)
	h.place("a.yaml", strings.Replace(policy("a"), "spec: {", "spec: {expires: \""+expires+"\", ", 1))
	e := h.until("a", holds(false, "a"))
	if len(e.Problems) != 0 {
		t.Fatalf("warned at once: %s", describe(e))
	}
	later := h.until("the warning", func(e Event) bool { return len(e.Problems) > 0 })
	if later.Plan != e.Plan || !strings.Contains(later.Problems[0].Message, "expires in less than 30 days") {
		t.Errorf("%s", describe(later))
	}
}

func TestLastGoodSurvivesARestartIntoABrokenFolder(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	h := start(t, dir, state, time.Hour)
	h.write("a.yaml", policy("a"))
	h.until("a", holds(false, "a"))
	h.write("a.yaml", broken)
	h.until("broken", holds(true, "a"))
	h.stop()

	h = start(t, dir, state, time.Hour)
	if e := h.until("last good", holds(true, "a")); !e.FromLastGood || e.Files[0].Path != "a.yaml" {
		t.Errorf("%s", describe(e))
	}
	h.write("a.yaml", policy("mended"))
	if e := h.until("mended", holds(false, "mended")); e.FromLastGood {
		t.Errorf("%s", describe(e))
	}
	h.stop()

	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	h = start(t, dir, state, time.Hour)
	if e := h.until("without a folder", holds(true, "mended")); !e.FromLastGood {
		t.Errorf("%s", describe(e))
	}
}

// TestEmptyFolderTakesNothingAway holds that an empty folder is no set where
// there was one, also over a restart and where the folder was made anew; and
// that nothing is a set where somebody says so.
func TestEmptyFolderTakesNothingAway(t *testing.T) {
	dir, state := filepath.Join(t.TempDir(), "policies"), t.TempDir()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	h := start(t, dir, state, time.Hour)
	h.until("nothing at first", holds(false))
	h.write("a.yaml", policy("a"))
	h.until("a", holds(false, "a"))
	if err := os.Remove(filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	e := h.until("the folder is empty", holds(true, "a"))
	if len(e.Problems) != 1 || !strings.Contains(e.Problems[0].Message, "is empty; what is in force stays") {
		t.Errorf("%v", e.Problems)
	}
	h.stop()
	h = start(t, dir, state, 10*time.Millisecond)
	if e := h.until("after a restart", holds(true, "a")); !e.FromLastGood {
		t.Errorf("%s", describe(e))
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	h.until("without a folder", func(e Event) bool {
		return holds(true, "a")(e) && strings.Contains(e.Problems[0].Message, "is not there")
	})
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	h.until("an empty one in its place", func(e Event) bool { return holds(true, "a")(e) && strings.Contains(e.Problems[0].Message, "is empty") })
	h.write("none.yaml", "# nothing is protected here\n")
	h.until("nothing, as somebody says", holds(false))
}

func TestDamagedLastGoodIsSetAside(t *testing.T) {
	good, err := os.ReadFile(saved(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"flipped": append(append([]byte{}, good[:len(good)-9]...), append([]byte{good[len(good)-9] ^ 1}, good[len(good)-8:]...)...),
		"cut":     good[:len(good)/2],
		"empty":   {},
		"other":   []byte("sallyport policies 2 00\n[]"),
	} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			path := filepath.Join(state, storeName)
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			h := start(t, filepath.Join(state, "missing"), state, time.Hour)
			e := h.until("set aside", func(e Event) bool { return true })
			if e.Plan != nil || len(e.Problems) != 2 || !strings.Contains(e.Problems[1].Message, "damaged") {
				t.Errorf("%s", describe(e))
			}
			if aside, err := os.ReadFile(filepath.Join(state, damagedName)); err != nil || string(aside) != string(content) {
				t.Errorf("set aside: %v", err)
			}
			if _, err := os.Stat(path); !os.IsNotExist(err) {
				t.Errorf("still there: %v", err)
			}
		})
	}
}

// saved returns the path of a store that holds a set.
func saved(t *testing.T) string {
	t.Helper()
	s := store{dir: t.TempDir()}
	if err := s.save([]load.File{{Path: "a.yaml", Content: []byte(policy("a"))}}); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(s.dir, storeName)
}

func TestStoreIsPrivateAndWrittenOnlyOnChange(t *testing.T) {
	path := saved(t)
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info.Mode(), err)
	}
	s := store{dir: filepath.Dir(path)}
	files, err := s.load()
	if err != nil || len(files) != 1 || string(files[0].Content) != policy("a") {
		t.Fatalf("%v, %v", files, err)
	}
	if err := s.save(files); err != nil {
		t.Fatal(err)
	}
	again, err := os.Stat(path)
	if err != nil || !os.SameFile(info, again) {
		t.Error("the same set was written again")
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left over: %v, %v", entries, err)
	}
}

func TestUnwritableStateIsAWarning(t *testing.T) {
	h := start(t, t.TempDir(), filepath.Join(t.TempDir(), "missing"), time.Hour)
	e := h.until("empty", holds(false))
	if len(e.Problems) != 1 || !strings.Contains(e.Problems[0].Message, "not kept for a restart") {
		t.Errorf("%s", describe(e))
	}
}

func TestWorldWritableFolderIsAWarning(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	h := start(t, dir, "", time.Hour)
	e := h.until("empty", holds(false))
	if len(e.Problems) != 1 || !strings.Contains(e.Problems[0].Message, "writable by every user") {
		t.Errorf("%s", describe(e))
	}
}

func TestWhoDoesNotKeepUpGetsTheNewest(t *testing.T) {
	w := New(Options{Dir: "x"})
	for i := range 3 {
		w.send(Event{Problems: make([]load.Problem, i)})
	}
	if e := <-w.Events(); len(e.Problems) != 2 {
		t.Errorf("%d", len(e.Problems))
	}
	select {
	case e := <-w.Events():
		t.Errorf("another: %v", e)
	default:
	}
}

func TestNothingLeaks(t *testing.T) {
	round := func() {
		h := start(t, t.TempDir(), t.TempDir(), time.Hour)
		h.until("empty", holds(false))
		h.stop()
	}
	round() // the runtime's own descriptors
	before := descriptors(t)
	for range 5 {
		round()
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors, before %d", after, before)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func FuzzStore(f *testing.F) {
	f.Add([]byte("sallyport policies 1 00\n[]"))
	f.Add([]byte(""))
	f.Fuzz(func(t *testing.T, content []byte) {
		if files, err := decodeStore(content); err == nil && !strings.HasPrefix(string(content), storeMagic) {
			t.Errorf("%d files of something else", len(files))
		}
	})
}

// TestHalfAFileIsNoSet writes a file in two halves, of which the first is a
// good set that says less: it is never in force.
func TestHalfAFileIsNoSet(t *testing.T) {
	dir := t.TempDir()
	// So long that the hundredfold, after which it is read all the same, does
	// not pass in a test.
	h := startQuiet(t, dir, "", time.Hour, 100*time.Millisecond)
	h.until("an empty folder", holds(false))
	f, err := os.Create(filepath.Join(dir, "a.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(policy("a") + "---\n"); err != nil {
		t.Fatal(err)
	}
	// Another file, written whole, would have the folder read.
	h.write("c.yaml", policy("c"))
	// The first may be of the time before that.
	for range 2 {
		h.waitFor(openForWriting)
	}
	select {
	case e := <-h.w.Events():
		t.Errorf("in force while a file was being written: %s", describe(e))
	default:
	}
	if _, err := f.WriteString(policy("b")); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	e := <-h.w.Events()
	if !holds(false, "a", "b", "c")(e) {
		t.Errorf("after it was closed: %s", describe(e))
	}
}

// TestTestFilesChangeNothing holds that tests beside the policies, also broken
// ones, are neither read nor a reason to build anew.
func TestTestFilesChangeNothing(t *testing.T) {
	dir := t.TempDir()
	h := start(t, dir, "", time.Hour)
	h.write("a.yaml", policy("a"))
	first := h.until("the set", holds(false, "a"))
	h.place("a_test.yaml", "cases: [")
	h.place("b.yaml", policy("b"))
	second := <-h.w.Events()
	if !holds(false, "a", "b")(second) || len(second.Files) != 2 || first.Plan == second.Plan {
		t.Errorf("with a broken test beside them: %s", describe(second))
	}
}

func TestWorldWritableFileIsAWarning(t *testing.T) {
	dir := t.TempDir()
	h := start(t, dir, "", time.Hour)
	h.until("an empty folder", holds(false))
	path := filepath.Join(t.TempDir(), "a.yaml")
	if err := os.WriteFile(path, []byte(policy("a")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o606); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	e := h.until("the set", holds(false, "a"))
	if len(e.Problems) != 1 || e.Problems[0].String() != "warning: a.yaml: every user of this machine may write to the file; chmod o-w it" {
		t.Errorf("%s", describe(e))
	}
}
