// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

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
	must(t, e.SetModels(ctx, []Model{{Name: "shop/shop", Text: plainModel}}))
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

// asking counts the goroutines that wait for an answer, or to be let ask for
// one.
func asking() (n int) {
	buf := make([]byte, 4<<20)
	for one := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		head, _, _ := strings.Cut(one, "\n")
		if strings.Contains(head, "[select") && strings.Contains(one, "(*Engine).ask(") {
			n++
		}
	}
	return n
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
	for asking() < 50 {
		runtime.Gosched()
	}
	for range cap(e.slots) {
		<-e.slots
	}
	wg.Wait()
	if s := e.Status(); s.Checks > 1 {
		t.Fatalf("50 questions at once reached the engine %d times", s.Checks)
	}
	if len(e.flights.all) != 0 {
		t.Fatalf("%d flights left", len(e.flights.all))
	}
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
