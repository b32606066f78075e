// SPDX-License-Identifier: Apache-2.0

package token

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// TestProofs holds what is remembered, and what happens when it is too much.
func TestProofs(t *testing.T) {
	p, now := NewProofs(), time.Now()
	id := func(n int) *[32]byte {
		s := sha256.Sum256([]byte(fmt.Sprint(n)))
		return &s
	}
	keyOf := func(n int) *[32]byte { return id(-1 - n%1000) }
	for n := range 1000 {
		if reason, err := p.use(id(n), keyOf(n), now.Add(time.Minute), now); reason != flow.ReasonOK {
			t.Fatal(reason, err)
		}
	}
	for n := range 1000 {
		if reason, _ := p.use(id(n), keyOf(n), now.Add(time.Minute), now.Add(59*time.Second)); reason != flow.ReasonProofReplayed {
			t.Fatalf("%d: %q", n, reason)
		}
	}
	full := 0
	for n := 1000; n < maxProofs+maxProofs/8; n++ {
		switch reason, _ := p.use(id(n), keyOf(n), now.Add(time.Minute), now); reason {
		case flow.ReasonOK:
		case flow.ReasonOverload:
			full++
		default:
			t.Fatal(reason)
		}
	}
	if full == 0 {
		t.Error("any number is remembered")
	}
	if reason, _ := p.use(id(1), keyOf(1), now.Add(time.Minute), now); reason != flow.ReasonProofReplayed {
		t.Errorf("one is forgotten for others: %q", reason)
	}
	later := now.Add(5 * time.Minute)
	if reason, err := p.use(id(1), keyOf(1), later.Add(time.Minute), later); reason != flow.ReasonOK {
		t.Errorf("once it has ended: %q (%v)", reason, err)
	}
	for n := range 2 * maxProofs / 3 {
		if reason, err := p.use(id(-5000-n), keyOf(n), later.Add(time.Minute), later); reason != flow.ReasonOK {
			t.Fatalf("once they have ended: %q (%v)", reason, err)
		}
	}
}

// TestProofsOfOneKey holds that a key that makes any number of proofs keeps no
// other out.
func TestProofsOfOneKey(t *testing.T) {
	p, now := NewProofs(), time.Now()
	use := func(key, n int) flow.Reason {
		k, id := sha256.Sum256([]byte{byte(key)}), sha256.Sum256(fmt.Appendf(nil, "%d %d", key, n))
		reason, _ := p.use(&id, &k, now.Add(time.Minute), now)
		return reason
	}
	taken := 0
	for n := range 2 * maxProofs {
		if use(1, n) == flow.ReasonOK {
			taken++
		}
	}
	if taken > maxProofs/2 || taken < maxProofs/3 {
		t.Errorf("%d are taken of one key", taken)
	}
	for key := 2; key < 22; key++ {
		for n := range 1000 {
			if reason := use(key, n); reason != flow.ReasonOK {
				t.Fatalf("key %d, %d: %q", key, n, reason)
			}
		}
	}
	if got := p.Len(); got != taken+20*1000 {
		t.Errorf("%d, want %d", got, taken+20*1000)
	}
	now = now.Add(2 * time.Minute)
	if reason := use(1, 0); reason != flow.ReasonOK {
		t.Errorf("once they have ended: %q", reason)
	}
	for i := range p.shards {
		s, n := &p.shards[i], 0
		s.sweep(now.Add(time.Hour).Unix())
		for _, count := range s.byKey {
			n += count
		}
		if n != 0 || len(s.used) != 0 {
			t.Errorf("shard %d: %d of keys, %d used", i, n, len(s.used))
		}
	}
}

// TestProofOfBefore holds that a proof is refused that may have been used before
// anything was remembered, for as long as it could be used again.
func TestProofOfBefore(t *testing.T) {
	began := time.Unix(1_800_000_000, 900e6)
	p, key := NewProofs(), &[32]byte{1}
	p.since = began
	n := byte(0)
	for _, c := range []struct {
		issued, now time.Duration // after the beginning
		want        flow.Reason
	}{
		{-time.Second, 0, flow.ReasonProofStale}, {0, 0, flow.ReasonProofStale}, {MaxProofLead - time.Nanosecond, MaxProofLead, flow.ReasonProofStale},
		{MaxProofLead, MaxProofLead, flow.ReasonOK}, {MaxProofLead - time.Nanosecond, MaxProofAge + MaxProofLead, flow.ReasonProofStale},
		{-time.Hour, time.Hour, flow.ReasonOK}, // the clock was set back: not here for the proof's age
	} {
		n++
		if reason, err := p.use(&[32]byte{n}, key, began.Add(c.issued).Add(MaxProofAge), began.Add(c.now)); reason != c.want {
			t.Errorf("%+v: %q (%v)", c, reason, err)
		}
	}
}

// TestProofsOutlive holds that what was used is known after an end of the
// process, and that nothing is taken for known that is not.
func TestProofsOutlive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "proofs")
	now := time.Unix(1_800_000_000, 0)
	id := func(n int) *[32]byte {
		s := sha256.Sum256([]byte(fmt.Sprint(n)))
		return &s
	}
	open := func(boot string, now time.Time) *Proofs {
		t.Helper()
		p, err := OpenProofs(t.Context(), path, boot, now)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p
	}
	const n = 20_000
	use := func(p *Proofs, n int, now time.Time) flow.Reason {
		reason, _ := p.use(id(n), id(-1-n%100), now.Add(MaxProofAge), now)
		return reason
	}
	p := open("a", now.Add(-time.Hour))
	for i := range n {
		if reason := use(p, i, now); reason != flow.ReasonOK {
			t.Fatalf("%d: %q", i, reason)
		}
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if _, err := OpenProofs(ended, path, "a", now); err == nil {
		t.Error("two processes have it")
	}
	for round := range 3 {
		p.file.Close() // nothing else is done at the end
		now = now.Add(time.Second)
		if p = open("a", now); p.Len() != n+round {
			t.Fatalf("%d are known, want %d", p.Len(), n+round)
		}
		for i := range n {
			if reason := use(p, i, now); reason != flow.ReasonProofReplayed {
				t.Fatalf("%d: %q", i, reason)
			}
		}
		if reason := use(p, n+round, now); reason != flow.ReasonOK {
			t.Errorf("a new one: %q", reason)
		}
	}
	for i := range p.shards {
		places := map[int]bool{}
		for _, u := range p.shards[i].used {
			if places[u.place] || u.place >= p.shards[i].next {
				t.Fatalf("shard %d: place %d of %d twice", i, u.place, p.shards[i].next)
			}
			places[u.place] = true
		}
	}
	p.file.Close()
	later := now.Add(MaxProofAge + MaxProofLead)
	if p = open("a", later); p.Len() != 0 || use(p, 1, later) != flow.ReasonOK {
		t.Errorf("%d are known that can be used no more", p.Len())
	}
	p.file.Close()
	// What is not known to be whole.
	for _, c := range []struct {
		name, boot string
		at         time.Time
		size       int64 // -1: as it is
	}{
		{"another boot", "b", later, -1}, {"a clock that went back", "b", later.Add(-2 * time.Hour), -1},
		{"another length", "b", later, proofsHead + 100}, {"nothing", "b", later, 0},
	} {
		if c.size >= 0 {
			if err := os.Truncate(path, c.size); err != nil {
				t.Fatal(err)
			}
		}
		name, at := c.name, c.at
		p := open(c.boot, at)
		if reason := use(p, 7, at); reason != flow.ReasonProofStale {
			t.Errorf("%s: %q", name, reason)
		}
		if reason := use(p, 7, at.Add(MaxProofLead)); reason != flow.ReasonOK {
			t.Errorf("%s, then: %q", name, reason)
		}
		p.file.Close()
		p = open(c.boot, at.Add(time.Second))
		if reason := use(p, 8, at.Add(time.Second)); reason != flow.ReasonProofStale {
			t.Errorf("%s, begun again: %q", name, reason)
		}
		p.file.Close()
	}
	// What cannot be written down is not taken.
	p = open("c", now)
	p.file.Close()
	if reason := use(p, 9, now.Add(time.Minute)); reason != flow.ReasonOverload {
		t.Errorf("without a file: %q", reason)
	}
	if p.Len() != 0 {
		t.Error("it is remembered")
	}
	if err := errors.Join(os.Remove(path), os.Symlink("/dev/null", path)); err != nil {
		t.Fatal(err)
	}
	_, err := OpenProofs(t.Context(), path, "a", now)
	if err == nil {
		t.Fatal("a link is followed")
	}
	if reason := use(UnavailableProofs(err), 1, now); reason != flow.ReasonOverload {
		t.Errorf("a proof that cannot be written down: %q", reason)
	}
}

func BenchmarkUseProof(b *testing.B) {
	now := time.Now()
	for name, p := range map[string]*Proofs{"memory": NewProofs(), "file": nil} {
		if p == nil {
			var err error
			if p, err = OpenProofs(b.Context(), filepath.Join(b.TempDir(), "proofs"), "", now.Add(-time.Hour)); err != nil {
				b.Fatal(err)
			}
			defer p.Close()
		}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var id, key [32]byte
			at := now
			for n := 0; b.Loop(); n++ {
				if n%100_000 == 0 {
					at = at.Add(2 * time.Minute)
				}
				binary.BigEndian.PutUint64(id[:], uint64(n))
				binary.BigEndian.PutUint16(id[16:], uint16(n))
				binary.BigEndian.PutUint64(key[:], uint64(n%1000))
				if reason, err := p.use(&id, &key, at.Add(time.Minute), at); reason != flow.ReasonOK {
					b.Fatal(n, reason, err)
				}
			}
		})
	}
}
