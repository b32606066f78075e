// SPDX-License-Identifier: Apache-2.0

package relation

import (
	"hash/maphash"
	"math/bits"
	"sync/atomic"
)

const (
	ways    = 8    // decisions that share a bucket
	stripes = 1024 // object generations of a model
)

// decision is an answer and what it was given under. All but used is constant.
type decision struct {
	model                     *model
	subject, relation, object string
	hash                      uint64
	stamp                     stamp
	answer                    Answer
	expires                   int64       // Unix nanoseconds
	used                      atomic.Bool // since the last decision of its bucket was replaced
}

// stamp is the state of a model's tuples that an answer about one object
// rests on: as long as both counters stand, so does the answer.
type stamp struct{ model, object uint64 }

// cache is a set-associative table of pointers under a keyed hash with a
// random seed. A hit compares the whole question, so no collision can turn
// one answer into another's. Reads are atomic loads; two writers of a bucket
// may lose a decision, which costs a question to the engine and nothing else.
type cache struct {
	seed  maphash.Seed
	slots []atomic.Pointer[decision]
	mask  uint64 // of buckets
}

func (c *cache) init(entries int) {
	buckets := uint64(1) << bits.Len64(uint64(max(entries/ways, 1)-1))
	c.seed = maphash.MakeSeed()
	c.slots, c.mask = make([]atomic.Pointer[decision], buckets*ways), buckets-1
}

func (c *cache) hash(subject, relation, object string) uint64 {
	var h maphash.Hash
	h.SetSeed(c.seed)
	h.WriteString(subject)
	h.WriteByte(' ') // no part holds a space
	h.WriteString(relation)
	h.WriteByte(' ')
	h.WriteString(object)
	return h.Sum64()
}

func (c *cache) bucket(hash uint64) []atomic.Pointer[decision] {
	at := (hash & c.mask) * ways
	return c.slots[at : at+ways]
}

func (c *cache) get(m *model, hash uint64, subject, relation, object string, now int64) (Answer, bool) {
	b := c.bucket(hash)
	for n := range b {
		d := b[n].Load()
		if d == nil || d.hash != hash || d.model != m || d.subject != subject || d.relation != relation || d.object != object {
			continue
		}
		if now >= d.expires || d.stamp != m.stamp(object) {
			return Answer{}, false
		}
		if !d.used.Load() {
			d.used.Store(true)
		}
		return d.answer, true
	}
	return Answer{}, false
}

// put remembers a decision in the place of the same question's, of one that
// no longer holds, of an unused one, or of any.
func (c *cache) put(d *decision, now int64) {
	b := c.bucket(d.hash)
	victim, rank := 0, -1
	for n := range b {
		if r := replaceable(b[n].Load(), d, now); r > rank {
			victim, rank = n, r
		}
	}
	if rank == 0 {
		victim = int(d.hash>>60) % ways
		for n := range b {
			if old := b[n].Load(); old != nil {
				old.used.Store(false)
			}
		}
	}
	b[victim].Store(d)
}

// replaceable ranks a slot for a new decision, the highest first.
func replaceable(old, d *decision, now int64) int {
	switch {
	case old == nil:
		return 3
	case old.hash == d.hash && old.model == d.model && old.subject == d.subject && old.relation == d.relation && old.object == d.object:
		return 4
	case now >= old.expires || old.model.replaced.Load() || old.stamp != old.model.stamp(old.object):
		return 2
	case !old.used.Load():
		return 1
	}
	return 0
}
