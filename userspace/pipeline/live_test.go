// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
)

func TestLiveRevoked(t *testing.T) {
	now := time.Now()
	stream := Stream{Subjects: [4]string{"spiffe://d/a", "https://iss|alice", "https://iss|t1"}, Serial: "ab", Issued: now}
	for _, c := range []struct {
		kind   identity.RevocationKind
		value  string
		since  time.Time
		closed bool
	}{
		{identity.RevokeIdentity, "spiffe://d/a", now, true},
		{identity.RevokeIdentity, "spiffe://d/b", now, false},
		{identity.RevokeSerial, "AB", now, true},
		{identity.RevokeJTI, "t1", now, true},
		{identity.RevokeJTI, "t2", now, false},
		{identity.RevokeJTI, "https://iss|t1", now, true},
		{identity.RevokeJTI, "https://other|t1", now, false},
		{identity.RevokeSubject, "https://iss|alice", now, true},
		{identity.RevokeSubject, "https://iss|alice", now.Add(-time.Hour), false}, // allowed by what was issued since
		{identity.RevokeIssuer, "https://iss", now, true},
	} {
		p := New(Options{Now: func() time.Time { return now }})
		var got []flow.Reason
		s := stream
		s.Kill = func(r flow.Reason) { got = append(got, r) }
		p.Live().Add(s)
		list, err := identity.NewRevocations([]identity.Revocation{{Kind: c.kind, Value: c.value, Since: c.since}}, 1)
		if err != nil {
			t.Fatal(err)
		}
		p.SetRevocations(list)
		p.SetRevocations(list) // a second time finds nothing
		if closed := len(got) == 1 && got[0] == flow.ReasonRevoked; closed != c.closed || len(got) > 1 {
			t.Errorf("%s %s: %v, want closed %v", c.kind, c.value, got, c.closed)
		}
	}
}

func TestLiveExpires(t *testing.T) {
	now := time.Now()
	p := New(Options{})
	var got flow.Reason
	h := p.Live().Add(Stream{Until: now.Add(time.Minute), Kill: func(r flow.Reason) { got = r }})
	p.Live().Add(Stream{Kill: func(flow.Reason) { t.Error("one without end was closed") }})
	p.live.closeExpired(now.Add(59 * time.Second))
	if got != "" {
		t.Error("closed early")
	}
	p.Live().Update(h, [4]string{}, now.Add(time.Hour))
	p.live.closeExpired(now.Add(time.Minute))
	if got != "" {
		t.Error("closed although a later decision renewed it")
	}
	p.live.closeExpired(now.Add(time.Hour))
	if got != flow.ReasonExpired || p.Live().Len() != 1 {
		t.Errorf("closed for %q, %d left", got, p.Live().Len())
	}
}

// TestLiveConcurrent adds, removes, revokes and swaps at once; Kill calls
// back into the registry, as a connection's clean-up does.
func TestLiveConcurrent(t *testing.T) {
	p := New(Options{})
	list, err := identity.NewRevocations([]identity.Revocation{{Kind: identity.RevokeIdentity, Value: "bad"}}, 1)
	if err != nil {
		t.Fatal(err)
	}
	var wg, kills sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 500 {
				id := "good"
				if i%3 == 0 {
					id = "bad"
				}
				var once sync.Once
				h := make(chan uint64, 1)
				done := func(flow.Reason) {
					once.Do(func() {
						n := <-h
						p.Live().Remove(n)
						h <- n
					})
				}
				n := p.Live().Add(Stream{Subjects: [4]string{id}, Kill: func(r flow.Reason) { kills.Go(func() { done(r) }) }, Recheck: func() {}})
				h <- n
				if i%2 == 0 {
					p.Live().Remove(n)
				}
				if g == 0 && i%50 == 0 {
					p.SetRevocations(list)
					p.RelationsChanged("m")
				}
			}
		})
	}
	wg.Wait()
	p.SetRevocations(list)
	kills.Wait()
	for i := range p.live.shards {
		for _, s := range p.live.shards[i].m {
			if s.Subjects[0] == "bad" {
				t.Fatal("a revoked stream is still registered")
			}
		}
	}
}

// TestWhatIsCarriedEndsFirst holds that what others go over is ended after
// them.
func TestWhatIsCarriedEndsFirst(t *testing.T) {
	l := newLive()
	var order []string
	add := func(name string, carries bool) {
		l.Add(Stream{Subjects: [4]string{"a"}, Carries: carries, Kill: func(flow.Reason) { order = append(order, name) }})
	}
	for range liveShards {
		add("tunnel", true)
		add("stream", false)
	}
	l.closeMatching(func(*Stream) flow.Reason { return flow.ReasonRevoked })
	if len(order) != 2*liveShards || slices.Contains(order[liveShards:], "stream") {
		t.Errorf("%q", order)
	}
}
