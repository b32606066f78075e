// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// rememberingWorld is one whose policy for payments has onError: cached, in
// which a test moves the clock.
func rememberingWorld(t testing.TB) *world {
	t.Helper()
	w := newWorld(t, "enforce")
	w.p.opt.Now = func() time.Time { return w.now }
	w.tokens = token.New(token.Options{Now: w.p.opt.Now, Refresh: func(issuer string) { go w.tokens.KeysFailed(issuer, "down") }})
	w.p.opt.Tokens = w.tokens
	if err := w.tokens.SetIssuer(token.Issuer{Name: "shop/sso", URL: issuerURL, Algorithms: []string{"ES256"}, MaxLifetime: time.Hour}); err != nil {
		t.Fatal(err)
	}
	w.fetched(w.now)
	w.api("payments").CacheErrors = true
	return w
}

// fetched says when the issuer's keys were last had.
func (w *world) fetched(at time.Time) {
	w.t.Helper()
	if err := w.tokens.SetKeys("shop/sso", w.jwks, at); err != nil {
		w.t.Fatal(err)
	}
}

// failures are the ways in which a stage fails, and its reason.
var failures = []struct {
	name   string
	reason flow.Reason
	fail   func(*world)
}{
	{"keys", flow.ReasonTokenKeysStale, func(w *world) { w.fetched(w.now.Add(-25 * time.Hour)) }},
	{"engine", flow.ReasonRelationUnavailable, func(w *world) { w.p.opt.Relations = relation.Unavailable(errors.New("gone")) }},
}

func TestRemembered(t *testing.T) {
	for _, f := range failures {
		t.Run(f.name, func(t *testing.T) {
			w := rememberingWorld(t)
			soon, later := fmt.Sprintf("exp=%d", w.now.Add(2*time.Minute).Unix()), fmt.Sprintf("exp=%d", w.now.Add(30*time.Minute).Unix())
			long, short, other := w.token(later), w.token(soon, `jti="short"`), w.token(later, `jti="other"`)
			pay := func(token, account string, edits ...func(*flow.Request)) flow.Decision {
				all := append([]func(*flow.Request){bearer(token), header("X-Account", account), func(r *flow.Request) { r.Peer.NotAfter = time.Time{} }}, edits...)
				return w.decide(w.request("POST /v1/payments", all...), "payments")
			}
			for _, token := range []string{long, short} {
				if d := pay(token, "a1"); d.Effect != flow.EffectAllow || d.Detail != "" {
					t.Fatalf("while all is well: %+v", d)
				}
			}
			if d := pay(long, "a2"); d.Reason != flow.ReasonRelation {
				t.Fatalf("no relation: %+v", d)
			}
			f.fail(w)
			w.now = w.now.Add(time.Minute)
			given := w.now.Add(-time.Minute)

			w.p.SetTracing(true)
			d := pay(long, "a1")
			want := "cached answer of " + given.UTC().Format(time.RFC3339) + ", because "
			if d.Effect != flow.EffectAllow || !strings.HasPrefix(d.Detail, want) || !strings.HasSuffix(d.Detail, string(f.reason)) || !d.Until.Equal(given.Add(rememberFor)) {
				t.Errorf("the same call: %+v", d)
			}
			told := false
			for _, s := range d.Steps {
				told = told || s.Reason == flow.ReasonOK && s.Detail == d.Detail && s.Rule == "create"
			}
			if !told || w.p.Counters().Recalled != 1 {
				t.Errorf("told %v, counted %d", told, w.p.Counters().Recalled)
			}
			if d := pay(long, "a2"); d.Effect == flow.EffectAllow {
				t.Errorf("another account: %+v", d)
			}
			if f.name == "keys" {
				for name, d := range map[string]flow.Decision{
					"another token":       pay(other, "a1"),
					"another certificate": pay(long, "a1", func(r *flow.Request) { r.Peer.Thumbprints = [][32]byte{{9}} }),
					"another rule":        w.decide(w.request("GET /v1/payments/5", bearer(long)), "payments"),
				} {
					if d.Reason != f.reason {
						t.Errorf("%s: %+v", name, d)
					}
				}
			}
			w.now = given.Add(2 * time.Minute)
			if d := pay(short, "a1"); d.Effect == flow.EffectAllow {
				t.Errorf("past the token's end: %+v", d)
			}
			w.now = given.Add(rememberFor - time.Second)
			if d := pay(long, "a1"); d.Effect != flow.EffectAllow {
				t.Errorf("a second before the end: %+v", d)
			}
			w.now = given.Add(rememberFor) // what was recalled has not renewed it
			if d := pay(long, "a1"); d.Reason != f.reason {
				t.Errorf("at the end: %+v", d)
			}
		})
	}
}

// TestRememberedIsVoid holds that an answer does not outlive what it rested
// on, nor is one held where the policy does not ask for it.
func TestRememberedIsVoid(t *testing.T) {
	for name, void := range map[string]func(*world){
		"onError: deny": func(w *world) { w.api("payments").CacheErrors = false },
		"a revocation of anything": func(w *world) {
			list, err := identity.NewRevocations([]identity.Revocation{{Kind: identity.RevokeJTI, Value: "x"}}, 1)
			if err != nil {
				w.t.Fatal(err)
			}
			w.p.SetRevocations(list)
		},
		"a revocation by anomaly": func(w *world) {
			w.p.block(identity.RevokeJTI, "t1", w.now.Add(time.Hour), w.now)
		},
		"a change of relations": func(w *world) { w.p.RelationsChanged("shop/shop") },
		"another plan":          func(w *world) { w.p.SetPlan(w.plan) },
		"another loop":          func(w *world) { w.env.Loop = w.p.NewLoop() },
	} {
		for _, f := range failures {
			w := rememberingWorld(t)
			call := w.request("POST /v1/payments", bearer(w.token()), header("X-Account", "a1"))
			if d := w.decide(call, "payments"); d.Effect != flow.EffectAllow {
				t.Fatalf("while all is well: %+v", d)
			}
			f.fail(w)
			if name != "onError: deny" {
				if d := w.decide(call, "payments"); d.Effect != flow.EffectAllow {
					t.Fatalf("%s, %s, before: %+v", name, f.name, d)
				}
			}
			void(w)
			if d := w.decide(call, "payments"); d.Effect == flow.EffectAllow {
				t.Errorf("%s, %s: %+v", name, f.name, d)
			}
		}
	}
}

// TestQuestions holds that whatever a stage looks at makes another question.
func TestQuestions(t *testing.T) {
	w := rememberingWorld(t)
	var d flow.Decision
	ask := func(edit func(*run)) [2]question {
		r := w.env.Loop.take()
		defer w.env.Loop.put(r)
		r.start(w.p, w.env, w.request("POST /v1/payments"), w.identity("checkout"), w.api("payments"), &d)
		r.raw, r.user, r.object = []byte("t1"), append(r.user[:0], "user:a"...), append(r.object[:0], "account:b"...)
		edit(r)
		rule := r.api.Rules[0]
		return [2]question{r.tokenQuestion(rule), r.relationQuestion(rule, "m")}
	}
	first := ask(func(*run) {})
	if first != ask(func(*run) {}) {
		t.Error("the same question is another")
	}
	for name, c := range map[string]struct {
		edit      func(*run)
		of, notOf []int
	}{
		"caller":     {func(r *run) { r.req.Peer.ID += "x" }, []int{0, 1}, nil},
		"policy":     {func(r *run) { r.api = w.api("odd") }, []int{0, 1}, nil},
		"generation": {func(r *run) { r.generation++ }, []int{0, 1}, nil},
		"token":      {func(r *run) { r.raw = []byte("t2") }, []int{0}, []int{1}},
		"proof":      {func(r *run) { r.req.Peer.Thumbprints = nil }, []int{0}, []int{1}},
		"user":       {func(r *run) { r.user = append(r.user[:0], "user:c"...) }, []int{1}, []int{0}},
		"object":     {func(r *run) { r.object = append(r.object[:0], "account:c"...) }, []int{1}, []int{0}},
	} {
		got := ask(c.edit)
		for _, i := range c.of {
			if got[i] == first[i] {
				t.Errorf("another %s is the same question %d", name, i)
			}
		}
		for _, i := range c.notOf {
			if got[i] != first[i] {
				t.Errorf("another %s is another question %d", name, i)
			}
		}
	}
}

// TestDenialIsNotRemembered asks again once the relation is gone and the
// engine too.
func TestDenialIsNotRemembered(t *testing.T) {
	w := rememberingWorld(t)
	call := w.request("POST /v1/payments", bearer(w.token()), header("X-Account", "a1"))
	if err := w.relations.Delete(context.Background(), "shop/shop", []relation.Tuple{{User: "user:alice", Relation: "can_pay", Object: "account:a1"}}); err != nil {
		t.Fatal(err)
	}
	if d := w.decide(call, "payments"); d.Reason != flow.ReasonRelation {
		t.Fatalf("without the relation: %+v", d)
	}
	failures[1].fail(w)
	if d := w.decide(call, "payments"); d.Reason != flow.ReasonRelationUnavailable {
		t.Errorf("without the engine: %+v", d)
	}
}

// TestRememberedPlaces fills a loop's memory over and over.
func TestRememberedPlaces(t *testing.T) {
	w := rememberingWorld(t)
	l := w.env.Loop
	for i := range 3 * maxRemembered {
		var q question
		q[0], q[1] = byte(i), byte(i>>8)
		l.memory.put(remembered{question: q, given: w.now})
		if a := l.memory.place(&q); a == nil || a.question != q {
			t.Fatalf("answer %d is not at its place", i)
		}
	}
	if len(l.memory.answers) != maxRemembered {
		t.Errorf("%d answers", len(l.memory.answers))
	}
}

// TestRememberedAllocations holds that remembering costs no memory a call.
func TestRememberedAllocations(t *testing.T) {
	w := rememberingWorld(t)
	call := w.request("POST /v1/payments", bearer(w.token()), header("X-Account", "a1"))
	src := w.identity("checkout")
	var d flow.Decision
	decide := func(api *compile.API) float64 {
		return testing.AllocsPerRun(100, func() { w.p.Decide(w.env, call, src, api, &d) })
	}
	api := w.api("payments")
	with := decide(api)
	api.CacheErrors = false
	if without := decide(api); with > without {
		t.Errorf("%v allocations with onError: cached, %v without", with, without)
	}
}
