// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// fullWorld has the whole way on one API: bound token, relation, anomaly.
func fullRequest(w *world) *flow.Request {
	w.api("payments").Anomaly = w.api("watched").Anomaly
	return w.request("POST /v1/payments?currency=EUR&amount=1200", bearer(w.token()), header("X-Account", "a1"), header("Accept", "*/*"))
}

func benchmarkDecide(b *testing.B, w *world, r *flow.Request, api string) {
	src, a := w.identity("checkout"), w.api(api)
	var d flow.Decision
	for range 400 {
		w.p.Decide(w.env, r, src, a, &d)
	}
	if d.Effect != flow.EffectAllow {
		b.Fatalf("%+v", d)
	}
	b.ReportAllocs()
	b.ResetTimer()
	for b.Loop() {
		w.p.Decide(w.env, r, src, a, &d)
	}
}

func BenchmarkDecide(b *testing.B) {
	b.Run("identity-only", func(b *testing.B) {
		w := newWorld(b, "enforce")
		benchmarkDecide(b, w, w.request(""), "ledger")
	})
	b.Run("rules", func(b *testing.B) {
		w := newWorld(b, "enforce")
		benchmarkDecide(b, w, w.request("GET /ok"), "payments")
	})
	b.Run("token", func(b *testing.B) {
		w := newWorld(b, "enforce")
		benchmarkDecide(b, w, w.request("GET /v1/payments/5", bearer(w.token())), "payments")
	})
	b.Run("anomaly", func(b *testing.B) {
		w := newWorld(b, "enforce")
		benchmarkDecide(b, w, w.request("GET /items/7?page=3&kind=book"), "watched")
	})
	b.Run("token+relation+anomaly", func(b *testing.B) {
		w := newWorld(b, "enforce")
		r := fullRequest(w)
		w.api("payments").Rules[0].When = nil
		benchmarkDecide(b, w, r, "payments")
	})
	b.Run("token+relation+condition+anomaly", func(b *testing.B) {
		w := newWorld(b, "enforce")
		benchmarkDecide(b, w, fullRequest(w), "payments")
	})
}

func BenchmarkRecord(b *testing.B) {
	w := newWorld(b, "enforce")
	r := w.request("GET /ok")
	var d flow.Decision
	w.p.Decide(w.env, r, w.identity("checkout"), w.api("payments"), &d)
	d.Steps = d.Steps[:0] // as of all but a few a second
	o := Outcome{Destination: w.identity("payments"), Took: time.Microsecond}
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		w.env.Loop.Record(r, w.api("payments"), &d, o)
		if n++; n%queueSize == 0 {
			b.StopTimer()
			w.p.TakeRecords(queueSize)
			b.StartTimer()
		}
	}
}

func BenchmarkNewID(b *testing.B) {
	l := New(Options{}).NewLoop()
	var id [flow.IDLength]byte
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		l.PutID(&id, now)
	}
}

// TestAllocations holds the cached ways to nothing allocated; a condition is
// CEL's, which allocates.
func TestAllocations(t *testing.T) {
	w := newWorld(t, "enforce")
	full := fullRequest(w)
	w.api("payments").Rules[0].When = nil
	src := w.identity("checkout")
	var d flow.Decision
	for _, c := range []struct {
		name string
		r    *flow.Request
		api  string
	}{{"identity only", w.request(""), "ledger"}, {"rules", w.request("GET /items/7?page=1&kind=book"), "watched"}, {"token, relation, anomaly", full, "payments"}} {
		a := w.api(c.api)
		for range 300 {
			w.p.Decide(w.env, c.r, src, a, &d)
		}
		if d.Effect != flow.EffectAllow {
			t.Fatalf("%s: %+v", c.name, d)
		}
		if n := testing.AllocsPerRun(100, func() { w.p.Decide(w.env, c.r, src, a, &d) }); n != 0 {
			t.Errorf("%s: %v allocations", c.name, n)
		}
	}
	o := Outcome{Destination: src}
	d.Steps = d.Steps[:0] // as of all but a few a second
	w.env.Loop.Record(full, w.api("payments"), &d, o)
	w.p.TakeRecords(1)
	for range queueSize {
		w.env.Loop.Record(full, w.api("payments"), &d, o)
	}
	for range 2 * queueSize {
		w.p.TakeRecords(1)
	}
	if n := testing.AllocsPerRun(100, func() { w.env.Loop.Record(full, w.api("payments"), &d, o) }); n != 0 {
		t.Errorf("a record: %v allocations", n)
	}
}
