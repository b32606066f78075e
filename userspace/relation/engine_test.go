// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/relations"
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
	if opt.Timeout == 0 {
		opt.Timeout = time.Minute // tests of it say so
	}
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
		out[i], err = parseTuple(l)
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
	must(t, e.SetModels(ctx, []Model{{Name: a, Text: testModel}, {Name: b, Text: testModel}}))
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
	// A new version voids what was answered under the old one.
	must(t, e.SetModels(ctx, []Model{{Name: a, Text: strings.Replace(testModel, "can_pay: [user, user with lease, group#member]", "can_pay: [group#member]", 1)}}))
	if check(a) != flow.ReasonRelation {
		t.Fatal("the old version answers")
	}
	text, err := e.ModelText(ctx, "")
	if err != nil || !strings.Contains(text, "can_pay: [group#member]") {
		t.Fatalf("got %q, %v", text, err)
	}
	// Back again: the tuples were kept.
	must(t, e.SetModels(ctx, []Model{{Name: a, Text: testModel}}))
	if check(a) != flow.ReasonOK {
		t.Fatal("the first version does not answer again")
	}
	for name, text := range map[string]string{
		"not a model": "modell", "no types": "model\n  schema 1.1\n", "undefined type": "model\n  schema 1.1\ntype a\n  relations\n    define x: [b]\n",
		"undefined relation": "model\n  schema 1.1\ntype a\n  relations\n    define x: y\n", "broken JSON": "{", "JSON of something else": `{"a":1}`,
	} {
		if err := e.SetModels(ctx, []Model{{Name: b, Text: testModel}, {Name: a, Text: text}}); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	if e.SetModels(ctx, []Model{{Name: a, Text: testModel}, {Name: a, Text: testModel}}) == nil || e.SetModels(ctx, []Model{{Name: "", Text: testModel}}) == nil {
		t.Error("models without a name of their own were taken")
	}
	if s := e.Status(); !s.Ready || s.Models != 1 || check(a) != flow.ReasonOK {
		t.Fatalf("a refused set changed something: %+v", s)
	}
	json := `{"schema_version":"1.1","type_definitions":[{"type":"user"},{"type":"door","relations":{"may_open":{"this":{}}},"metadata":{"relations":{"may_open":{"directly_related_user_types":[{"type":"user"}]}}}}]}`
	must(t, e.SetModels(ctx, []Model{{Name: a, Text: json}}))
	must(t, e.Write(ctx, a, tuples(t, "user:alice may_open door:1")))
	// What the loader takes the engine takes: as many types as there may be.
	var most strings.Builder
	most.WriteString("model\n  schema 1.1\ntype user\n")
	for i := range relations.MaxTypes - 1 {
		fmt.Fprintf(&most, "type t%d\n  relations\n    define a: [user] or b\n    define b: [user]\n", i)
	}
	must(t, e.SetModels(ctx, []Model{{Name: a, Text: most.String()}}))
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
