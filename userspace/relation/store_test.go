// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func TestRestart(t *testing.T) {
	dir, ctx := t.TempDir(), context.Background()
	models := []Model{{Name: "shop/shop", Text: testModel}, {Name: "default/default"}}
	e := openEngine(t, dir, Options{})
	must(t, e.SetModels(ctx, models))
	must(t, e.Write(ctx, "shop/shop", tuples(t, "user:alice can_pay account:1", "user:bob can_pay account:1")))
	must(t, e.Delete(ctx, "shop/shop", tuples(t, "user:bob can_pay account:1")))
	version := e.models.Load().byName["shop/shop"].ids.Load().version
	must(t, e.Close())
	if _, reason, _ := e.Check(ctx, "shop/shop", "user:alice", "can_pay", "account:1"); reason != flow.ReasonRelationUnavailable {
		t.Fatalf("a closed engine answers %q", reason)
	}
	if err := e.Write(ctx, "shop/shop", tuples(t, "user:bob can_pay account:1")); err == nil {
		t.Fatal("a closed engine writes")
	}
	for range 2 {
		e = openEngine(t, dir, Options{})
		must(t, e.SetModels(ctx, models))
		if got := e.models.Load().byName["shop/shop"].ids.Load().version; got != version {
			t.Fatalf("the same model became version %s after %s", got, version)
		}
		for user, want := range map[string]flow.Reason{"user:alice": flow.ReasonOK, "user:bob": flow.ReasonRelation} {
			if _, reason, err := e.Check(ctx, "shop/shop", user, "can_pay", "account:1"); reason != want {
				t.Fatalf("%s after a restart: %q (%v)", user, reason, err)
			}
		}
		must(t, e.Close())
	}
	for _, name := range []string{storeFile, storeFile + ".lock"} {
		info, err := os.Stat(filepath.Join(dir, name))
		must(t, err)
		if info.Mode().Perm() != 0o600 {
			t.Fatalf("%s has mode %v", name, info.Mode())
		}
	}
}

func TestDamagedStoreIsAnError(t *testing.T) {
	damages := map[string]func(t *testing.T, path string){
		"not a database": func(t *testing.T, path string) {
			must(t, os.WriteFile(path, []byte(strings.Repeat("this is no database ", 1000)), 0o600))
		},
		"pages overwritten": func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			must(t, err)
			defer f.Close()
			info, err := f.Stat()
			must(t, err)
			junk := strings.Repeat("\xa5", 4096)
			for at := int64(4096); at < info.Size(); at += 4096 {
				_, err := f.WriteAt([]byte(junk), at)
				must(t, err)
			}
		},
		"cut off": func(t *testing.T, path string) { must(t, os.Truncate(path, 8192)) },
		"a folder": func(t *testing.T, path string) {
			must(t, os.Remove(path))
			must(t, os.Mkdir(path, 0o700))
		},
		"a link to elsewhere": func(t *testing.T, path string) {
			must(t, os.Remove(path))
			must(t, os.Symlink(path+".elsewhere", path))
		},
	}
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			dir, ctx := t.TempDir(), context.Background()
			path := filepath.Join(dir, storeFile)
			e := openEngine(t, dir, Options{})
			must(t, e.SetModels(ctx, []Model{{Name: "shop/shop", Text: testModel}}))
			must(t, e.Write(ctx, "", tuples(t, "user:alice can_pay account:1")))
			must(t, e.Close())
			for _, extra := range []string{"-wal", "-shm"} {
				os.Remove(path + extra)
			}
			damage(t, path)
			before, _ := os.ReadFile(path)
			_, err := Open(ctx, Options{StateDir: dir})
			if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "backup") {
				t.Fatalf("got %v", err)
			}
			if after, _ := os.ReadFile(path); string(after) != string(before) {
				t.Fatal("the damaged store was changed")
			}
			closed := Unavailable(err)
			_, reason, cerr := closed.Check(ctx, "shop/shop", "user:alice", "can_pay", "account:1")
			if reason != flow.ReasonRelationUnavailable || !errors.Is(cerr, err) || reason.Status() != 503 {
				t.Fatalf("got %q, %v", reason, cerr)
			}
			if s := closed.Status(); s.Ready || s.Problem == "" {
				t.Fatalf("status %+v", s)
			}
			must(t, closed.Close())
		})
	}
}

func TestOneProcessAtATime(t *testing.T) {
	dir, ctx := t.TempDir(), context.Background()
	e := openEngine(t, dir, Options{})
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := Open(short, Options{StateDir: dir}); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Fatalf("got %v", err)
	}
	must(t, e.Close())
	openEngine(t, dir, Options{})
}

func TestEngineTooSlowDenies(t *testing.T) {
	e := openEngine(t, t.TempDir(), Options{Parallel: 1})
	ctx := context.Background()
	must(t, e.SetModels(ctx, []Model{{Name: "a/a", Text: testModel}}))
	must(t, e.Write(ctx, "", tuples(t, "user:alice can_pay account:1")))
	e.slots <- struct{}{} // the engine works on something that does not end
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, reason, err := e.Check(short, "", "user:alice", "can_pay", "account:1"); reason != flow.ReasonRelationUnavailable || !errors.Is(err, errOverload) && !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %q, %v", reason, err)
	}
	if s := e.Status(); s.Errors != 1 {
		t.Fatalf("status %+v", s)
	}
	<-e.slots
	if got := ask(t, e, "user:alice can_pay account:1"); got != flow.ReasonOK {
		t.Fatalf("afterwards: %q", got)
	}
}

// Questions that fan out hold connections to the store while they ask for
// more of them: many at once must not starve each other.
func TestManyWideQuestionsAtOnce(t *testing.T) {
	e, ctx := openEngine(t, t.TempDir(), Options{Timeout: time.Minute}), context.Background()
	must(t, e.SetModels(ctx, []Model{{Name: "shop/shop", Text: plainModel}}))
	for a := range 60 {
		some := []Tuple{{User: fmt.Sprintf("group:g%d#member", a), Relation: "can_pay", Object: "account:1"}}
		for b := range 3 {
			some = append(some, Tuple{User: fmt.Sprintf("group:g%dh%d#member", a, b), Relation: "member", Object: fmt.Sprintf("group:g%d", a)})
		}
		must(t, e.Write(ctx, "", some))
	}
	must(t, e.Write(ctx, "", tuples(t, "user:u0 member group:g59h2")))
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			want := flow.ReasonRelation
			if n == 0 {
				want = flow.ReasonOK
			}
			if _, reason, err := e.Check(ctx, "", fmt.Sprint("user:u", n), "can_pay", "account:1"); reason != want {
				t.Errorf("user:u%d: %q, %v", n, reason, err)
			}
		})
	}
	wg.Wait()
}

func TestCloseLeavesNothingBehind(t *testing.T) {
	openEngine(t, t.TempDir(), Options{}).Close() // what the process starts once
	before := runtime.NumGoroutine()
	for range 3 {
		e := openEngine(t, t.TempDir(), Options{})
		must(t, e.SetModels(context.Background(), []Model{{Name: "a/a", Text: testModel}}))
		must(t, e.Write(context.Background(), "", tuples(t, "user:alice can_pay account:1")))
		ask(t, e, "user:alice can_pay account:1")
		must(t, e.Close())
		must(t, e.Close())
	}
	deadline := time.Now().Add(10 * time.Second)
	for runtime.NumGoroutine() > before && time.Now().Before(deadline) {
		runtime.Gosched()
	}
	if after := runtime.NumGoroutine(); after > before {
		buf := make([]byte, 1<<16)
		t.Fatalf("%d goroutines, %d before:\n%s", after, before, buf[:runtime.Stack(buf, true)])
	}
}
