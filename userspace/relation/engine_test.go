// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const testModel = `model
  schema 1.1
type user
type group
  relations
    define member: [user, group#member]
type account
  relations
    define can_pay: [user, user with lease, group#member]
condition lease(now: timestamp, not_before: timestamp, expires: timestamp) {
  now >= not_before && now < expires
}
`

// plainModel is testModel without anything that changes with time, so that
// OpenFGA's own caches come into play.
var plainModel = strings.Replace(testModel[:strings.Index(testModel, "condition")], ", user with lease", "", 1)

func openEngine(t testing.TB, dir string, opt Options) *Engine {
	t.Helper()
	opt.StateDir = dir
	e, err := Open(context.Background(), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func newTestEngine(t testing.TB) *Engine {
	t.Helper()
	return newEngineWith(t, testModel)
}

func newEngineWith(t testing.TB, text string) *Engine {
	t.Helper()
	e := openEngine(t, t.TempDir(), Options{})
	must(t, e.SetModels(context.Background(), []Model{{Name: "shop/shop", Text: text}}))
	return e
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func tuples(t testing.TB, lines ...string) []Tuple {
	t.Helper()
	out := make([]Tuple, len(lines))
	for i, l := range lines {
		var err error
		out[i], err = ParseTuple(l)
		must(t, err)
	}
	return out
}

func ask(t testing.TB, e *Engine, line string) flow.Reason {
	t.Helper()
	q := tuples(t, line)[0]
	answer, reason, err := e.Check(context.Background(), "", q.User, q.Relation, q.Object)
	if answer.Allowed != (reason == flow.ReasonOK) || (err == nil) != answer.Allowed {
		t.Fatalf("%s: answer %+v, reason %q, error %v disagree", line, answer, reason, err)
	}
	if reason == flow.ReasonRelationUnavailable {
		t.Logf("%s: %v", line, err)
	}
	return reason
}

func TestCheckFollowsWrites(t *testing.T) {
	e, ctx := newEngineWith(t, plainModel), context.Background()
	const direct = "user:alice can_pay account:1"
	steps := []struct {
		name string
		do   func() error
		line string
		want flow.Reason
	}{
		{"nothing stored", func() error { return nil }, direct, flow.ReasonRelation},
		{"direct write", func() error { return e.Write(ctx, "", tuples(t, direct)) }, direct, flow.ReasonOK},
		{"the same again", func() error { return e.Write(ctx, "", tuples(t, direct)) }, direct, flow.ReasonOK},
		{"another object", func() error { return nil }, "user:alice can_pay account:2", flow.ReasonRelation},
		{"direct delete", func() error { return e.Delete(ctx, "", tuples(t, direct)) }, direct, flow.ReasonRelation},
		{"the same again", func() error { return e.Delete(ctx, "", tuples(t, direct)) }, direct, flow.ReasonRelation},
		{"through a group, not yet a member", func() error { return e.Write(ctx, "", tuples(t, "group:eng#member can_pay account:1")) }, direct, flow.ReasonRelation},
		{"through a group", func() error { return e.Write(ctx, "", tuples(t, "user:alice member group:eng")) }, direct, flow.ReasonOK},
		{"out of the group", func() error { return e.Delete(ctx, "", tuples(t, "user:alice member group:eng")) }, direct, flow.ReasonRelation},
		{"through a group in the group", func() error {
			return e.Write(ctx, "", tuples(t, "user:alice member group:sre", "group:sre#member member group:eng"))
		}, direct, flow.ReasonOK},
		{"the inner group out", func() error { return e.Delete(ctx, "", tuples(t, "group:sre#member member group:eng")) }, direct, flow.ReasonRelation},
		{"no such relation", func() error { return nil }, "user:alice can_fly account:1", flow.ReasonRelationUnavailable},
		{"no such type", func() error { return nil }, "user:alice can_pay plane:1", flow.ReasonRelationUnavailable},
	}
	for _, s := range steps {
		must(t, s.do())
		for range 2 { // asked, then from memory
			if got := ask(t, e, s.line); got != s.want {
				t.Fatalf("%s: %s: %q, want %q", s.name, s.line, got, s.want)
			}
		}
	}
}

// world is what the tests' model means, evaluated the plain way.
type world map[Tuple]bool

func (w world) member(user, group string, seen map[string]bool) bool {
	if seen[group] {
		return false
	}
	seen[group] = true
	for t := range w {
		if t.Object != group || t.Relation != "member" {
			continue
		}
		inner, userset := strings.CutSuffix(t.User, "#member")
		if t.User == user || userset && w.member(user, inner, seen) {
			return true
		}
	}
	return false
}

func (w world) canPay(user, account string) bool {
	for t := range w {
		if t.Object != account || t.Relation != "can_pay" {
			continue
		}
		group, userset := strings.CutSuffix(t.User, "#member")
		if t.User == user || userset && w.member(user, group, map[string]bool{}) {
			return true
		}
	}
	return false
}

// After each of many random writes and deletes every question is asked, and
// every answer, cached or not, is the plain evaluation's.
func TestAnswersAreExact(t *testing.T) {
	e, ctx := newEngineWith(t, plainModel), context.Background()
	rnd := rand.New(rand.NewPCG(1, 2))
	users := []string{"user:a", "user:b"}
	groups := []string{"group:g", "group:h", "group:i"}
	accounts := []string{"account:1", "account:2"}
	pick := func(from []string) string { return from[rnd.IntN(len(from))] }
	w, hits := world{}, 0
	for step := range 80 {
		var tuple Tuple
		switch rnd.IntN(4) {
		case 0:
			tuple = Tuple{User: pick(users), Relation: "can_pay", Object: pick(accounts)}
		case 1:
			tuple = Tuple{User: pick(groups) + "#member", Relation: "can_pay", Object: pick(accounts)}
		case 2:
			tuple = Tuple{User: pick(users), Relation: "member", Object: pick(groups)}
		case 3:
			tuple = Tuple{User: pick(groups) + "#member", Relation: "member", Object: pick(groups)}
			if tuple.User == tuple.Object+"#member" {
				continue // the engine takes no tuple that holds by itself
			}
		}
		if rnd.IntN(2) == 0 {
			must(t, e.Write(ctx, "", []Tuple{tuple}))
			w[tuple] = true
		} else {
			must(t, e.Delete(ctx, "", []Tuple{tuple}))
			delete(w, tuple)
		}
		for _, u := range users {
			for _, a := range accounts {
				want := w.canPay(u, a)
				if got, ok := e.Cached("", u, "can_pay", a); ok {
					hits++
					if got.Allowed != want {
						t.Fatalf("step %d: %s on %s from memory: %v, want %v, with %v", step, u, a, got.Allowed, want, w)
					}
				}
				got, reason, err := e.Check(ctx, "", u, "can_pay", a)
				if got.Allowed != want || (reason == flow.ReasonOK) != want {
					t.Fatalf("step %d: %s on %s: %v (%q, %v), want %v, with %v", step, u, a, got.Allowed, reason, err, want, w)
				}
			}
		}
	}
	if hits == 0 {
		t.Fatal("no answer survived a write to another account")
	}
}

// While many ask, a tuple is written and deleted. Nobody who begins to ask
// after Delete has returned may be allowed, nobody after Write denied.
func TestNoStaleAnswerAfterWrite(t *testing.T) {
	// A loaded machine may take long; an answer that is late is not stale.
	e, ctx := openEngine(t, t.TempDir(), Options{Timeout: time.Minute}), context.Background()
	must(t, e.SetModels(ctx, []Model{{"shop/shop", plainModel}}))
	for name, tuple := range map[string]Tuple{
		"direct":        tuples(t, "user:alice can_pay account:1")[0],
		"through group": tuples(t, "user:alice member group:eng")[0],
	} {
		t.Run(name, func(t *testing.T) {
			must(t, e.Write(ctx, "", tuples(t, "group:eng#member can_pay account:1")))
			must(t, e.Delete(ctx, "", tuples(t, "user:alice can_pay account:1", "user:alice member group:eng")))
			// state is the number of the last finished change, odd while it is allowed, and
			// negative while a change goes on.
			var state atomic.Int64
			var stop atomic.Bool
			var asked, wrong atomic.Int64
			var wg sync.WaitGroup
			for range 2 {
				wg.Go(func() {
					for !stop.Load() {
						before := state.Load()
						answer, ok := e.Cached("", "user:alice", "can_pay", "account:1")
						if !ok {
							var reason flow.Reason
							var err error
							answer, reason, err = e.Check(ctx, "", "user:alice", "can_pay", "account:1")
							if reason == flow.ReasonRelationUnavailable {
								t.Error(err)
							}
						}
						if before < 0 || state.Load() != before {
							continue // a change went on meanwhile: either answer is right
						}
						asked.Add(1)
						if answer.Allowed != (before%2 == 1) {
							t.Logf("after change %d (cached: %v): allowed %v", before, ok, answer.Allowed)
							wrong.Add(1)
						}
					}
				})
			}
			for n := int64(1); n <= 40; n++ {
				state.Store(-1)
				if n%2 == 1 {
					must(t, e.Write(ctx, "", []Tuple{tuple}))
				} else {
					must(t, e.Delete(ctx, "", []Tuple{tuple}))
				}
				at := asked.Load()
				state.Store(n)
				for asked.Load() < at+20 {
					runtime.Gosched()
				}
			}
			stop.Store(true)
			wg.Wait()
			if wrong.Load() != 0 {
				t.Fatalf("%d wrong answers of %d", wrong.Load(), asked.Load())
			}
		})
	}
}

func TestRestart(t *testing.T) {
	dir, ctx := t.TempDir(), context.Background()
	models := []Model{{Name: "shop/shop", Text: testModel}, {Name: "default/default"}}
	e := openEngine(t, dir, Options{})
	must(t, e.SetModels(ctx, models))
	must(t, e.Write(ctx, "shop/shop", tuples(t, "user:alice can_pay account:1", "user:bob can_pay account:1")))
	must(t, e.Delete(ctx, "shop/shop", tuples(t, "user:bob can_pay account:1")))
	version := e.models.Load().byName["shop/shop"].version
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
		if got := e.models.Load().byName["shop/shop"].version; got != version {
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

func TestQuestionsThatAreNone(t *testing.T) {
	e, ctx := newTestEngine(t), context.Background()
	must(t, e.Write(ctx, "", tuples(t, "user:alice can_pay account:1")))
	long := strings.Repeat("a", maxUser)
	for _, q := range []Tuple{
		{User: "user:*", Relation: "can_pay", Object: "account:1"},
		{User: "user:al*", Relation: "can_pay", Object: "account:1"},
		{User: "alice", Relation: "can_pay", Object: "account:1"},
		{User: "user:", Relation: "can_pay", Object: "account:1"},
		{User: "user:a:b", Relation: "can_pay", Object: "account:1"},
		{User: "user:alice\n", Relation: "can_pay", Object: "account:1"},
		{User: "user:al ice", Relation: "can_pay", Object: "account:1"},
		{User: "user:" + long, Relation: "can_pay", Object: "account:1"},
		{User: "user:alice", Relation: "", Object: "account:1"},
		{User: "user:alice", Relation: "can_pay", Object: "account:*"},
		{User: "user:alice", Relation: "can_pay", Object: "account:"},
		{User: "user:alice", Relation: "can_pay", Object: "account:1#x"},
		{User: "user:alice", Relation: "can_pay", Object: "account:\xff"},
		{User: "", Relation: "", Object: ""},
	} {
		answer, reason, err := e.Check(ctx, "", q.User, q.Relation, q.Object)
		if answer.Allowed || reason != flow.ReasonRelationTemplate || err == nil {
			t.Errorf("%q: %+v, %q, %v", q, answer, reason, err)
		}
	}
}

func TestModels(t *testing.T) {
	e, ctx := openEngine(t, t.TempDir(), Options{}), context.Background()
	const a, b = "a/model", "b/model"
	must(t, e.SetModels(ctx, []Model{{a, testModel}, {b, testModel}}))
	must(t, e.Write(ctx, a, tuples(t, "user:alice can_pay account:1")))
	check := func(model string) flow.Reason {
		_, reason, _ := e.Check(ctx, model, "user:alice", "can_pay", "account:1")
		return reason
	}
	if check(a) != flow.ReasonOK || check(b) != flow.ReasonRelation {
		t.Fatal("two models share their tuples")
	}
	if check("") != flow.ReasonRelationUnavailable || check("c/model") != flow.ReasonRelationUnavailable {
		t.Fatal("a question to no model was answered")
	}
	must(t, e.HasRelation(a, "account", "can_pay"))
	if e.HasRelation(a, "account", "x") == nil || e.HasRelation(a, "x", "can_pay") == nil || !errors.Is(e.HasRelation("c/model", "account", "can_pay"), ErrNoModel) {
		t.Fatal("a relation that is not there was found")
	}
	// A new version voids what was answered under the old one.
	must(t, e.SetModels(ctx, []Model{{a, strings.Replace(testModel, "can_pay: [user, user with lease, group#member]", "can_pay: [group#member]", 1)}}))
	if check(a) != flow.ReasonRelation {
		t.Fatal("the old version answers")
	}
	text, err := e.ModelText(ctx, "")
	if err != nil || !strings.Contains(text, "can_pay: [group#member]") {
		t.Fatalf("got %q, %v", text, err)
	}
	// Back again: the tuples were kept.
	must(t, e.SetModels(ctx, []Model{{a, testModel}}))
	if check(a) != flow.ReasonOK {
		t.Fatal("the first version does not answer again")
	}
	for name, text := range map[string]string{
		"not a model": "modell", "no types": "model\n  schema 1.1\n", "undefined type": "model\n  schema 1.1\ntype a\n  relations\n    define x: [b]\n",
		"undefined relation": "model\n  schema 1.1\ntype a\n  relations\n    define x: y\n", "broken JSON": "{", "JSON of something else": `{"a":1}`,
		"too large": strings.Repeat(" ", MaxModelText+1),
	} {
		if err := e.SetModels(ctx, []Model{{b, testModel}, {a, text}}); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	if e.SetModels(ctx, []Model{{a, testModel}, {a, testModel}}) == nil || e.SetModels(ctx, []Model{{"", testModel}}) == nil {
		t.Error("models without a name of their own were taken")
	}
	if s := e.Status(); !s.Ready || s.Models != 1 || check(a) != flow.ReasonOK {
		t.Fatalf("a refused set changed something: %+v", s)
	}
	json := `{"schema_version":"1.1","type_definitions":[{"type":"user"},{"type":"door","relations":{"may_open":{"this":{}}},"metadata":{"relations":{"may_open":{"directly_related_user_types":[{"type":"user"}]}}}}]}`
	must(t, e.SetModels(ctx, []Model{{a, json}}))
	must(t, e.HasRelation(a, "door", "may_open"))
	if err := e.CheckModel(json); err != nil || e.CheckModel("x") == nil {
		t.Fatalf("got %v", err)
	}
}

func TestDefaultModel(t *testing.T) {
	e, ctx := openEngine(t, t.TempDir(), Options{}), context.Background()
	must(t, e.SetModels(ctx, []Model{{Name: "default/default"}}))
	const orders = "endpoint:orders|GET|/v1/orders/{id}"
	must(t, e.Write(ctx, "", tuples(t,
		"service:checkout member svcgroup:shop", "svcgroup:shop#member consumer api:orders", "api:orders api "+orders,
		"user:alice caller "+orders, "user:mallory caller "+orders, "user:mallory blocked "+orders,
		"folder:plans parent document:q1", "team:eng#member editor folder:plans", "user:alice member team:eng", "user:* viewer folder:plans",
	)))
	for line, want := range map[string]flow.Reason{
		"service:checkout can_call " + orders: flow.ReasonOK,
		"service:audit can_call " + orders:    flow.ReasonRelation,
		"user:alice can_call " + orders:       flow.ReasonOK,
		"user:mallory can_call " + orders:     flow.ReasonRelation,
		"user:alice can_edit document:q1":     flow.ReasonOK,
		"user:bob can_edit document:q1":       flow.ReasonRelation,
		"user:bob can_view document:q1":       flow.ReasonOK,
	} {
		if got := ask(t, e, line); got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
	closed := e.models.Load().only.closed
	if !closed["endpoint"] || !closed["document"] || closed["folder"] || closed["team"] || closed["svcgroup"] || closed["api"] {
		t.Errorf("closed types: %v", closed)
	}
	objects, err := e.ListObjects(ctx, "", "user:alice", "can_edit", "document")
	if err != nil || fmt.Sprint(objects) != "[document:q1]" {
		t.Errorf("listed %v, %v", objects, err)
	}
	if _, err := e.ListObjects(ctx, "", "user:*", "can_edit", "document"); err == nil {
		t.Error("everybody's objects were listed")
	}
}

func TestLeases(t *testing.T) {
	e, ctx := newTestEngine(t), context.Background()
	now := time.Now()
	var passed atomic.Int64
	e.now = func() time.Time { return now.Add(time.Duration(passed.Load())) }
	lease := func(user string, from, to time.Duration) Tuple {
		one := Tuple{User: user, Relation: "can_pay", Object: "account:1"}
		if from != 0 {
			one.NotBefore = now.Add(from)
		}
		if to != 0 {
			one.Expires = now.Add(to)
		}
		return one
	}
	const soon = 10 * time.Second // within Options.TTL
	must(t, e.Write(ctx, "", []Tuple{
		lease("user:now", -time.Hour, time.Hour), lease("user:open", -time.Hour, 0), lease("user:later", time.Hour, 0),
		lease("user:past", -2*time.Hour, -time.Hour), lease("user:ends", 0, soon), lease("user:begins", soon, 0),
	}))
	check := func(user string) (Answer, flow.Reason) {
		a, reason, err := e.Check(ctx, "", user, "can_pay", "account:1")
		if reason == flow.ReasonRelationUnavailable {
			t.Fatal(err)
		}
		return a, reason
	}
	for user, want := range map[string]flow.Reason{
		"user:now": flow.ReasonOK, "user:open": flow.ReasonOK, "user:later": flow.ReasonRelation, "user:past": flow.ReasonRelation,
		"user:ends": flow.ReasonOK, "user:begins": flow.ReasonRelation,
	} {
		a, reason := check(user)
		if reason != want {
			t.Errorf("%s: %q, want %q", user, reason, want)
		}
		if a.Until.IsZero() || a.Until.After(now.Add(time.Hour)) {
			t.Errorf("%s: an answer until %v", user, a.Until)
		}
	}
	if a, _ := check("user:ends"); !a.Until.Equal(time.Unix(0, now.Add(soon).UnixNano())) {
		t.Errorf("the next change is at %v, got %v", now.Add(soon), a.Until)
	}
	// The answers in memory end with the lease, not with the cache.
	passed.Store(int64(soon))
	for user, want := range map[string]flow.Reason{"user:ends": flow.ReasonRelation, "user:begins": flow.ReasonOK} {
		if _, reason := check(user); reason != want {
			t.Errorf("%s after the change: %q, want %q", user, reason, want)
		}
	}
	// A lease is replaced by another and by none.
	must(t, e.Write(ctx, "", []Tuple{lease("user:now", -2*time.Hour, -time.Hour)}))
	if _, reason := check("user:now"); reason != flow.ReasonRelation {
		t.Errorf("an ended lease: %q", reason)
	}
	must(t, e.Write(ctx, "", []Tuple{lease("user:now", 0, 0)}))
	if _, reason := check("user:now"); reason != flow.ReasonOK {
		t.Errorf("no lease any more: %q", reason)
	}
	if got, err := e.Read(ctx, "", Tuple{User: "user:past", Relation: "can_pay", Object: "account:1"}, 0); err != nil || len(got) != 1 ||
		!got[0].Expires.Equal(now.Add(-time.Hour)) || !got[0].NotBefore.Equal(now.Add(-2*time.Hour)) {
		t.Errorf("read %v, %v", got, err)
	}
	if e.Write(ctx, "", []Tuple{lease("user:x", time.Hour, time.Minute)}) == nil {
		t.Error("a lease that ends before it begins was taken")
	}
}

func TestReadPagesAndLimits(t *testing.T) {
	e, ctx := newTestEngine(t), context.Background()
	for part := range 3 {
		var some []Tuple
		for n := range MaxTuples {
			some = append(some, Tuple{User: fmt.Sprintf("user:u%d-%d", part, n), Relation: "can_pay", Object: "account:1"})
		}
		must(t, e.Write(ctx, "", some))
	}
	for limit, want := range map[int]int{0: 300, 5: 5, 150: 150, 10_000: 300} {
		got, err := e.Read(ctx, "", Tuple{}, limit)
		if err != nil || len(got) != want {
			t.Errorf("limit %d: %d tuples, %v", limit, len(got), err)
		}
	}
	got, err := e.Read(ctx, "", Tuple{Object: "account:1", User: "user:u2-7"}, 0)
	if err != nil || len(got) != 1 {
		t.Errorf("filtered: %v, %v", got, err)
	}
	if e.Write(ctx, "", nil) == nil || e.Write(ctx, "", make([]Tuple, MaxTuples+1)) == nil {
		t.Error("no tuple, or too many, were taken")
	}
	if e.Write(ctx, "", []Tuple{{User: "user:a", Relation: "can_fly", Object: "account:1"}}) == nil {
		t.Error("a tuple that the model has not was taken")
	}
	if e.Write(ctx, "", []Tuple{{User: "user:a b", Relation: "can_pay", Object: "account:1"}}) == nil {
		t.Error("a malformed tuple was taken")
	}
}

func TestReconcile(t *testing.T) {
	dir, ctx := t.TempDir(), context.Background()
	e := openEngine(t, dir, Options{})
	must(t, e.SetModels(ctx, []Model{{Name: "shop/shop", Text: testModel}}))
	stored := func() string {
		got, err := e.Read(ctx, "", Tuple{}, 0)
		must(t, err)
		var names []string
		for _, g := range got {
			names = append(names, strings.TrimPrefix(g.User, "user:"))
		}
		return strings.Join(names, " ")
	}
	one := func(users ...string) []Tuple {
		var out []Tuple
		for _, u := range users {
			out = append(out, Tuple{User: "user:" + u, Relation: "can_pay", Object: "account:1"})
		}
		return out
	}
	step := func(name string, want Reconciled, left string, users ...string) {
		t.Helper()
		got, err := e.Reconcile(ctx, "", one(users...))
		if err != nil || got != want || stored() != left {
			t.Fatalf("%s: %+v, %v, stored %q; want %+v, %q", name, got, err, stored(), want, left)
		}
	}
	must(t, e.Write(ctx, "", one("operator")))
	step("first", Reconciled{Written: 1}, "operator a", "a")
	step("again", Reconciled{}, "operator a", "a")
	step("one more", Reconciled{Written: 1}, "operator a b", "a", "b")
	step("one that the operator wrote", Reconciled{}, "operator a b", "a", "b", "operator")
	step("one less", Reconciled{Deleted: 1}, "operator b", "b")
	if ask(t, e, "user:b can_pay account:1") != flow.ReasonOK || ask(t, e, "user:a can_pay account:1") != flow.ReasonRelation {
		t.Fatal("the answers are others")
	}
	must(t, e.Delete(ctx, "", one("b")))
	step("one that the operator deleted", Reconciled{Withheld: 1}, "operator", "b")
	must(t, e.Close())
	e = openEngine(t, dir, Options{})
	must(t, e.SetModels(ctx, []Model{{Name: "shop/shop", Text: testModel}}))
	step("still after a restart", Reconciled{Withheld: 1}, "operator", "b")
	step("no longer named", Reconciled{Deleted: 1}, "operator")
	step("named anew", Reconciled{Written: 1}, "operator b", "b")
	must(t, e.Write(ctx, "", one("b")))
	step("taken over by the operator", Reconciled{}, "operator b")
	// Broken off between mark and tuple: completed by the next.
	m := e.models.Load().only
	must(t, e.mark(ctx, m, one("c"), false))
	step("broken off", Reconciled{Written: 1}, "operator b c", "c")
	lease := one("c")
	lease[0].Expires = time.Now().Add(time.Hour)
	if got, err := e.Reconcile(ctx, "", lease); err != nil || got.Written != 1 {
		t.Fatalf("a lease: %+v, %v", got, err)
	}
	if got, err := e.Reconcile(ctx, "", lease); err != nil || got.Written != 0 {
		t.Fatalf("the lease again: %+v, %v", got, err)
	}
	if _, err := e.Reconcile(ctx, "", []Tuple{{User: "x"}}); err == nil {
		t.Fatal("a malformed tuple was taken")
	}
}

func TestContextualTuples(t *testing.T) {
	e, ctx := newTestEngine(t), context.Background()
	extra := tuples(t, "user:alice member group:eng")[0]
	must(t, e.Write(ctx, "", tuples(t, "group:eng#member can_pay account:1")))
	for range 2 {
		if _, reason, err := e.Check(ctx, "", "user:alice", "can_pay", "account:1", extra); reason != flow.ReasonOK {
			t.Fatalf("with it: %q, %v", reason, err)
		}
		if _, reason, _ := e.Check(ctx, "", "user:alice", "can_pay", "account:1"); reason != flow.ReasonRelation {
			t.Fatalf("without it: %q", reason)
		}
	}
	if _, reason, _ := e.Check(ctx, "", "user:alice", "can_pay", "account:1", Tuple{User: "x"}); reason != flow.ReasonRelationUnavailable {
		t.Fatalf("a malformed one: %q", reason)
	}
}

func TestChangedIsTold(t *testing.T) {
	var told []string
	e := openEngine(t, t.TempDir(), Options{Changed: func(m string) { told = append(told, m) }})
	ctx := context.Background()
	must(t, e.SetModels(ctx, []Model{{"a/a", testModel}}))
	must(t, e.Write(ctx, "", tuples(t, "user:alice can_pay account:1")))
	must(t, e.Delete(ctx, "", tuples(t, "user:alice can_pay account:1")))
	must(t, e.SetModels(ctx, nil))
	if fmt.Sprint(told) != "[a/a a/a a/a]" {
		t.Fatalf("told %v", told)
	}
}

func TestEngineTooSlowDenies(t *testing.T) {
	e := openEngine(t, t.TempDir(), Options{Timeout: time.Second, Parallel: 1})
	ctx := context.Background()
	must(t, e.SetModels(ctx, []Model{{"a/a", testModel}}))
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

func TestOneQuestionForMany(t *testing.T) {
	e, ctx := newTestEngine(t), context.Background()
	must(t, e.Write(ctx, "", tuples(t, "user:alice can_pay account:1")))
	// All slots are taken, so that the first question waits and the rest join it.
	for range cap(e.slots) {
		e.slots <- struct{}{}
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, reason, err := e.Check(ctx, "", "user:alice", "can_pay", "account:1"); reason != flow.ReasonOK {
				t.Errorf("got %q, %v", reason, err)
			}
		})
	}
	for range cap(e.slots) {
		<-e.slots
	}
	wg.Wait()
	if s := e.Status(); s.Checks > 2 {
		t.Fatalf("50 questions at once reached the engine %d times", s.Checks)
	}
	if len(e.flights.all) != 0 {
		t.Fatalf("%d flights left", len(e.flights.all))
	}
}

// Questions that fan out hold connections to the store while they ask for
// more of them: many at once must not starve each other.
func TestManyWideQuestionsAtOnce(t *testing.T) {
	e, ctx := openEngine(t, t.TempDir(), Options{Timeout: time.Minute}), context.Background()
	must(t, e.SetModels(ctx, []Model{{"shop/shop", plainModel}}))
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

// A question that is asked after a write must not join one that the engine
// began to work on before it.
func TestQuestionAfterWriteIsAnother(t *testing.T) {
	for name, text := range map[string]string{"direct": "user:alice can_pay account:1", "group": "user:alice member group:eng"} {
		e, ctx := newEngineWith(t, plainModel), context.Background()
		m := e.models.Load().only
		ask := func() question { return question{m, "user:alice", "can_pay", "account:1", m.stamp("account:1")} }
		first, leader := e.flights.join(ask(), true)
		same, follower := e.flights.join(ask(), true)
		if !leader || follower || first != same {
			t.Fatalf("%s: the same question is not one", name)
		}
		must(t, e.Write(ctx, "", tuples(t, text)))
		if after, leader := e.flights.join(ask(), true); !leader || after == first {
			t.Fatalf("%s: a question after the write joined one from before", name)
		}
	}
}

func TestCloseLeavesNothingBehind(t *testing.T) {
	openEngine(t, t.TempDir(), Options{}).Close() // what the process starts once
	before := runtime.NumGoroutine()
	for range 3 {
		e := openEngine(t, t.TempDir(), Options{})
		must(t, e.SetModels(context.Background(), []Model{{"a/a", testModel}}))
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
