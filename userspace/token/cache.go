// SPDX-License-Identifier: Apache-2.0

package token

import (
	"crypto/sha256"
	"encoding/binary"
	"math/bits"
	"sync/atomic"
)

const (
	ways               = 8 // entries that share a bucket
	defaultEntries     = 32 << 10
	defaultBytes       = 64 << 20
	entryOverhead      = 1 << 10 // bytes of the structures around one token's claims
	overheadPerRawByte = 4       // the claims as a tree, at most about so many times the token
)

// entry says that the bytes of this digest were read and that their
// signature held under this key set of this issuer. All but used is constant.
type entry struct {
	sum    [sha256.Size]byte
	issuer *issuer
	keys   *keySet
	claims *Claims
	cost   int64
	used   atomic.Bool // since the last entry of its bucket was replaced
}

// cache is a set-associative table of pointers: reads are atomic loads,
// writes replace one pointer. Two writers of a bucket may lose one of the
// entries, which costs a verification and nothing else. Only tokens that
// verified get in, so a stranger cannot fill it.
type cache struct {
	slots []atomic.Pointer[entry]
	mask  uint64 // of buckets
	bytes atomic.Int64
	most  int64
}

func (c *cache) init(entries int, most int64) {
	if entries <= 0 {
		entries = defaultEntries
	}
	if most <= 0 {
		most = defaultBytes
	}
	buckets := uint64(1) << bits.Len64(uint64(max(entries/ways, 1)-1))
	c.slots, c.mask, c.most = make([]atomic.Pointer[entry], buckets*ways), buckets-1, most
}

func (c *cache) bucket(sum *[sha256.Size]byte) []atomic.Pointer[entry] {
	at := (binary.LittleEndian.Uint64(sum[:]) & c.mask) * ways
	return c.slots[at : at+ways]
}

// get returns the claims of a token that verified under the same issuer and
// the same key set, nil otherwise.
func (c *cache) get(sum *[sha256.Size]byte, i *issuer, keys *keySet) *Claims {
	b := c.bucket(sum)
	for n := range b {
		e := b[n].Load()
		if e == nil || e.sum != *sum || e.issuer != i || e.keys != keys {
			continue
		}
		if !e.used.Load() {
			e.used.Store(true)
		}
		return e.claims
	}
	return nil
}

// put remembers a token, in the place of the same token, of one that no key
// set can vouch for any more, of an unused one, or of any.
func (c *cache) put(sum *[sha256.Size]byte, i *issuer, keys *keySet, claims *Claims, raw int) {
	e := &entry{sum: *sum, issuer: i, keys: keys, claims: claims, cost: int64(raw)*overheadPerRawByte + entryOverhead}
	b := c.bucket(sum)
	victim, rank := 0, -1
	for n := range b {
		if r := replaceable(b[n].Load(), e); r > rank {
			victim, rank = n, r
		}
	}
	if rank == 0 {
		victim = int(sum[8]) % ways
		for n := range b {
			if old := b[n].Load(); old != nil {
				old.used.Store(false)
			}
		}
	}
	old := b[victim].Load()
	freed := int64(0)
	if old != nil {
		freed = old.cost
	}
	if c.bytes.Load()+e.cost-freed > c.most {
		return
	}
	if b[victim].CompareAndSwap(old, e) {
		c.bytes.Add(e.cost - freed)
	}
}

// replaceable ranks a slot for a new entry, the highest first.
func replaceable(old, e *entry) int {
	switch {
	case old == nil:
		return 3
	case old.sum == e.sum:
		return 4
	case old.issuer.keys.Load() != old.keys && old.keys != &old.issuer.questions.marker:
		return 2
	case !old.used.Load():
		return 1
	}
	return 0
}
