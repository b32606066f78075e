// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"testing"

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
	e := openEngine(t, t.TempDir(), Options{})
	if err := e.SetModels(context.Background(), []Model{{Name: "shop/shop", Text: testModel}}); err != nil {
		t.Fatal(err)
	}
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
	e, ctx := newTestEngine(t), context.Background()
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
