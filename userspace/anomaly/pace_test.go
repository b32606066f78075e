// SPDX-License-Identifier: Apache-2.0

package anomaly

import (
	"crypto/sha256"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// days feeds a pace n requests on each of some days, by identities in turn.
func (p *paceState) days(from, days, n int, identities ...uint64) (next int) {
	for d := from; d < from+days; d++ {
		for i := range n {
			p.add(identities[i%len(identities)], 1+int64(d)*daySeconds+int64(i)*daySeconds/int64(n+1))
		}
	}
	return from + days
}

func who(n int) (ids []uint64) {
	for i := range n {
		ids = append(ids, uint64(i+1)<<32)
	}
	return ids
}

func TestPace(t *testing.T) {
	var first paceState
	for i := range 1000 {
		first.add(1<<32, int64(1000+i))
	}
	if got := first.rate(1999); math.Abs(got/86486-1) > 0.01 { // one a second
		t.Errorf("on the first day %v a day", got)
	}
	var p paceState
	next := p.days(0, 10, 5000, who(1)...)
	p.add(1<<32, 1+int64(next)*daySeconds)
	if got := p.rate(0); got != 5000 {
		t.Errorf("after ten equal days %v a day", got)
	}
	// Days without a request say nothing.
	p.add(1<<32, 1+int64(next+30)*daySeconds)
	if got := p.rate(0); got > 5000 || got < 5000*6/7 {
		t.Errorf("after a pause %v a day", got)
	}
}

// TestPaceFlood holds what one caller, and many, can make of a policy's pace
// in a day, and that a real change is followed within weeks.
func TestPaceFlood(t *testing.T) {
	for _, c := range []struct {
		name        string
		identities  int
		most, least float64 // of the pace of before, after a day and after eight weeks
	}{{"one caller", 1, 1 + 0.25/7, 5}, {"many callers", 40, 1 + 1.0/7, 19}} {
		var p paceState
		next := p.days(0, 10, 1000, who(4)...)
		next = p.days(next, 1, 50_000, who(c.identities)...)
		p.add(1<<32, 1+int64(next)*daySeconds)
		if got := p.rate(0) / 1000; got > c.most+0.001 || got <= 1 {
			t.Errorf("%s: a day's flood makes it %.3f of what it was", c.name, got)
		}
		next = p.days(next, 56, 20_000, who(c.identities)...)
		p.add(1<<32, 1+int64(next)*daySeconds)
		if got := p.rate(0) / 1000; got < c.least {
			t.Errorf("%s: after eight weeks at twenty times as many it is %.1f", c.name, got)
		}
	}
}

// TestBudget has normal traffic keep to a budget that the thresholds as
// written would exceed.
func TestBudget(t *testing.T) {
	s, o, key := newScorer(t), newOrders(31), ordersKey(200, 1)
	key.API, key.Budget = "budgeted", 40
	var sm Sample
	const requests, gap = 20_000, 86400 / 4000 // 4000 a day
	acted, warm := 0, 0
	for i := range requests {
		r := o.next(i)
		r.Time = time.Unix(1e9+int64(i*gap), 0)
		sc := score(s, &sm, key, r)
		if i > 4000 {
			if sc.Limit > 1.3*key.Budget/4000 && sc.Limit > 1/float64(sc.N+1) || sc.Limit < 0.7*key.Budget/4000 {
				t.Fatalf("request %d: limit %v with n %d", i, sc.Limit, sc.N)
			}
			warm++
			if sc.P <= min(0.2, sc.Limit) {
				acted++
				s.Acted(&sm)
				continue
			}
		}
		s.Learn(&sm, "one")
	}
	if days := float64(warm) * gap / 86400; float64(acted) > 1.3*key.Budget*days {
		t.Errorf("%d actions upon normal requests in %.1f days, the budget is %v a day", acted, days, key.Budget)
	}
	b := s.Budgets()
	if len(b) != 1 || b[0].API != "budgeted" || b[0].PerDay != 40 || b[0].Acted != uint64(acted) || b[0].Scored == 0 || math.Abs(b[0].Requests/4000-1) > 0.05 {
		t.Errorf("budgets %+v", b)
	}
	// What stands out does not count, and says nothing of the next sample's.
	rate := s.pace(sm.policy)
	odd := request("GET", "/v1/orders/1'--", "qty=<b>&color=red&note=no+hurry", 0)
	odd.Time = time.Unix(1e9+requests*gap, 0)
	before := rate.state.Total
	if learn(s, &sm, key, odd, "one"); rate.state.Total != before {
		t.Error("what stands out counts")
	}
	other := key
	other.Template = "/v1/others"
	odd.Path = "/v1/others"
	if learn(s, &sm, other, odd, "one"); rate.state.Total != before+1 {
		t.Error("a new endpoint's first request does not count")
	}
	// An attack is still found, at the least P that there is if need be.
	bad := request("GET", "/v1/orders/1'--", "qty=<b>&color=red&note=no+hurry&x=1", 0)
	bad.Time = time.Unix(1e9+requests*gap, 0)
	key.Budget = 1e-9
	if sc := score(s, &sm, key, bad); sc.Limit != 1/float64(sc.N+1) || sc.P > sc.Limit {
		t.Errorf("an attack beyond the budget: P %v, limit %v, n %d", sc.P, sc.Limit, sc.N)
	}
	if n := s.Reset("budgeted", "", ""); n != 2 || len(s.Budgets()) != 0 {
		t.Errorf("after the reset of %d endpoints: %+v", n, s.Budgets())
	}
}

// TestPaceStored holds that the pace survives a restart, and that baselines
// of the version before are read.
func TestPaceStored(t *testing.T) {
	dir := t.TempDir()
	s, err := New(Options{StateDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	key := ordersKey(200, 1)
	key.Budget = 5
	var sm Sample
	o := newOrders(3)
	for i := range 300 {
		learn(s, &sm, key, o.next(i), fmt.Sprint("caller", i%3))
	}
	want := s.pace(sm.policy).state
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = New(Options{StateDir: dir}); err != nil {
		t.Fatal(err)
	}
	if got := s.pace(sm.policy); got == nil || got.state != want || want.Total == 0 || want.Known != 3 {
		t.Errorf("after a restart %+v, before %+v", got, want)
	}

	dir, data := stored(t) // without a pace, so that version 1 is all but the last four bytes
	data = data[:len(data)-4]
	order.PutUint32(data[len(fileMagic):], 1)
	body := data[len(fileMagic)+4+sha256.Size:]
	sum := sha256.Sum256(body)
	copy(data[len(fileMagic)+4:], sum[:])
	if err := os.WriteFile(filepath.Join(dir, fileName), data, 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err = New(Options{StateDir: dir}); err != nil || len(s.List()) == 0 {
		t.Errorf("version 1: %v", err)
	}
}
