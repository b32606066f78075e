// SPDX-License-Identifier: Apache-2.0

package hosts

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// resolver answers what a test has told it to.
type resolver struct {
	mu      sync.Mutex
	answers map[string][]netip.Addr
	asked   int
}

func (r *resolver) set(name string, addresses ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []netip.Addr
	for _, a := range addresses {
		list = append(list, netip.MustParseAddr(a))
	}
	r.answers[name] = list
}

func (r *resolver) lookup(_ context.Context, name string) ([]netip.Addr, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked++
	list, ok := r.answers[name]
	if !ok {
		return nil, errors.New("no such host")
	}
	return list, nil
}

// following runs a test with a follower, in a bubble with its own clock.
func following(t *testing.T, f func(t *testing.T, r *resolver, h *Follower, changes *int)) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		r, changes := &resolver{answers: map[string][]netip.Addr{}}, 0
		h := New(Options{Lookup: r.lookup, Changed: func() { changes++ }})
		done := make(chan struct{})
		go func() { h.Run(ctx); close(done) }()
		f(t, r, h, &changes)
		cancel()
		<-done
	})
}

func shown(h *Follower) string { return fmt.Sprint(h.Addresses()) }

func TestFollow(t *testing.T) {
	following(t, func(t *testing.T, r *resolver, h *Follower, changes *int) {
		r.set("a.example", "192.0.2.2", "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.3")
		h.Set([]string{"a.example", "b.example"})
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := shown(h); got != "map[a.example:[192.0.2.1 192.0.2.2 192.0.2.3 2001:db8::1] b.example:[]]" || *changes != 1 {
			t.Errorf("%s, %d changes", got, *changes)
		}
		if err := h.Problem(); err == nil || err.Error() != "resolve b.example: no such host" {
			t.Error(err)
		}
		// Another part of its addresses: those of before stay for a while.
		r.set("a.example", "192.0.2.9")
		r.set("b.example", "192.0.2.7")
		time.Sleep(Interval + 2*time.Second)
		synctest.Wait()
		if got := shown(h); got != "map[a.example:[192.0.2.1 192.0.2.2 192.0.2.3 192.0.2.9 2001:db8::1] b.example:[192.0.2.7]]" || h.Problem() != nil {
			t.Errorf("%s, %v", got, h.Problem())
		}
		// While nobody answers nothing is forgotten.
		r.mu.Lock()
		delete(r.answers, "b.example")
		r.mu.Unlock()
		time.Sleep(2 * Keep)
		synctest.Wait()
		if got := shown(h); got != "map[a.example:[192.0.2.9] b.example:[192.0.2.7]]" || h.Problem() == nil {
			t.Errorf("%s, %v", got, h.Problem())
		}
		h.Set([]string{"b.example"})
		if got := shown(h); got != "map[b.example:[192.0.2.7]]" {
			t.Error(got)
		}
		h.Set(nil)
		if got := shown(h); got != "map[]" || h.Problem() != nil {
			t.Error(got, h.Problem())
		}
	})
}

// TestSoon holds that one who hurries is answered, and cannot make a flood of
// it.
func TestSoon(t *testing.T) {
	following(t, func(t *testing.T, r *resolver, h *Follower, _ *int) {
		r.set("a.example", "192.0.2.1")
		h.Set([]string{"a.example"})
		time.Sleep(3 * time.Second)
		synctest.Wait()
		r.set("a.example", "192.0.2.2")
		before := r.asked
		for range 1000 {
			h.Soon()
		}
		time.Sleep(100 * time.Millisecond)
		synctest.Wait()
		if got := shown(h); got != "map[a.example:[192.0.2.1 192.0.2.2]]" {
			t.Error(got)
		}
		for range 1000 {
			h.Soon()
			time.Sleep(time.Millisecond)
		}
		synctest.Wait()
		if asked := r.asked - before; asked > 3 {
			t.Errorf("asked %d times within about a second", asked)
		}
	})
}

// TestAnswersThatOpenNothing holds what no answer can open.
func TestAnswersThatOpenNothing(t *testing.T) {
	for a, want := range map[string]bool{
		"192.0.2.1": true, "10.0.0.1": true, "2001:db8::1": true, "fd00::1": true,
		"127.0.0.1": false, "127.9.9.9": false, "::1": false, "0.0.0.0": false, "::": false, "169.254.169.254": false, "fe80::1": false,
		"224.0.0.1": false, "ff02::1": false, "255.255.255.255": false, "fe80::1%eth0": false,
	} {
		if Usable(netip.MustParseAddr(a)) != want {
			t.Errorf("%s: not %t", a, want)
		}
	}
	following(t, func(t *testing.T, r *resolver, h *Follower, changes *int) {
		r.set("a.example", "169.254.169.254", "::ffff:127.0.0.1")
		h.Set([]string{"a.example"})
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := shown(h); got != "map[a.example:[]]" || *changes != 0 {
			t.Errorf("%s, %d changes", got, *changes)
		}
		if err := h.Problem(); err == nil || !strings.Contains(err.Error(), "no address that may be connected to") {
			t.Error(err)
		}
	})
}

// TestManyAddresses holds that an answer cannot fill the kernel's map.
func TestManyAddresses(t *testing.T) {
	following(t, func(t *testing.T, r *resolver, h *Follower, _ *int) {
		for round := range 3 {
			var list []string
			for i := range 200 {
				list = append(list, fmt.Sprintf("10.0.%d.%d", round, i))
			}
			r.set("a.example", list...)
			h.Set([]string{"a.example"})
			h.Soon()
			time.Sleep(2 * time.Second)
		}
		synctest.Wait()
		got := h.Addresses()["a.example"]
		if len(got) != MaxAddresses || got[len(got)-1] != netip.MustParseAddr("10.0.2.199") {
			t.Errorf("%d addresses, to %v", len(got), got[len(got)-1])
		}
	})
}
