// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

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
	must(t, e.SetModels(ctx, []Model{{Name: "a/a", Text: testModel}}))
	must(t, e.Write(ctx, "", tuples(t, "user:alice can_pay account:1")))
	must(t, e.Delete(ctx, "", tuples(t, "user:alice can_pay account:1")))
	must(t, e.SetModels(ctx, nil))
	if fmt.Sprint(told) != "[a/a a/a a/a]" {
		t.Fatalf("told %v", told)
	}
}
