// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func TestCachedAllocatesNothing(t *testing.T) {
	e := newTestEngine(t)
	must(t, e.Write(context.Background(), "", tuples(t, "user:alice can_pay account:1")))
	if got := ask(t, e, "user:alice can_pay account:1"); got != flow.ReasonOK {
		t.Fatal(got)
	}
	if n := testing.AllocsPerRun(200, func() {
		if a, ok := e.Cached("shop/shop", "user:alice", "can_pay", "account:1"); !ok || !a.Allowed {
			t.Fatal("no hit")
		}
	}); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}

func BenchmarkCached(b *testing.B) {
	e := newTestEngine(b)
	must(b, e.Write(context.Background(), "", tuples(b, "user:alice can_pay account:1")))
	if _, reason, err := e.Check(context.Background(), "", "user:alice", "can_pay", "account:1"); reason != flow.ReasonOK {
		b.Fatal(reason, err)
	}
	b.ReportAllocs()
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if a, ok := e.Cached("shop/shop", "user:alice", "can_pay", "account:1"); !ok || !a.Allowed {
				b.Fatal("no hit")
			}
		}
	})
}

func benchmarkEngine(b *testing.B, lastWrite time.Time, lines ...string) {
	e := newTestEngine(b)
	must(b, e.Write(context.Background(), "", tuples(b, lines...)))
	m := e.models.Load().only
	m.lastWrite.Store(lastWrite.UnixNano())
	m.leases, m.foreign = false, false
	q := question{m, "user:alice", "can_pay", "account:1", m.stamp("account:1")}
	b.ReportAllocs()
	for b.Loop() {
		a, err := e.evaluate(context.Background(), &q, nil, time.Now())
		if err != nil || !a.Allowed {
			b.Fatal(a, err)
		}
	}
}

var nested = []string{"group:a#member can_pay account:1", "group:b#member member group:a", "user:alice member group:b"}

func BenchmarkEngineDirect(b *testing.B) {
	benchmarkEngine(b, time.Unix(0, 0), "user:alice can_pay account:1")
}
func BenchmarkEngineNested(b *testing.B) { benchmarkEngine(b, time.Unix(0, 0), nested...) }
func BenchmarkEngineDirectAfterWrite(b *testing.B) {
	benchmarkEngine(b, time.Now().Add(time.Hour), "user:alice can_pay account:1")
}
func BenchmarkEngineNestedAfterWrite(b *testing.B) {
	benchmarkEngine(b, time.Now().Add(time.Hour), nested...)
}

// BenchmarkDeleteToDenied is the time from a delete of a tuple to the denied
// question, with the write that makes up for it left out.
func BenchmarkDeleteToDenied(b *testing.B) {
	e, ctx := newTestEngine(b), context.Background()
	tuple := tuples(b, "user:alice can_pay account:1")
	for n := range 1000 {
		must(b, e.Write(ctx, "", []Tuple{{User: fmt.Sprint("user:u", n), Relation: "can_pay", Object: "account:1"}}))
	}
	for b.Loop() {
		b.StopTimer()
		must(b, e.Write(ctx, "", tuple))
		b.StartTimer()
		must(b, e.Delete(ctx, "", tuple))
		if _, reason, err := e.Check(ctx, "", "user:alice", "can_pay", "account:1"); reason != flow.ReasonRelation {
			b.Fatal(reason, err)
		}
	}
}
