// SPDX-License-Identifier: Apache-2.0

package flow

import (
	crand "crypto/rand"
	"math/rand/v2"
	"time"
)

// IDLength is the length of a request id.
const IDLength = 26

// idAlphabet is Crockford's base 32, as ULIDs use it.
const idAlphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

// IDs makes request ids: 48 bits of the time in milliseconds, so that they
// sort, and 80 bits of a ChaCha8 stream that was seeded once from the kernel,
// so that they cannot be guessed and cost no system call. It is for one
// goroutine at a time.
type IDs struct{ random *rand.ChaCha8 }

// NewIDs returns a source of its own.
func NewIDs() IDs {
	var seed [32]byte
	crand.Read(seed[:]) // never fails: crypto/rand.Read aborts the process instead
	return IDs{rand.NewChaCha8(seed)}
}

// New returns a request id, 26 characters in the form of a ULID.
func (s *IDs) New(now time.Time) string {
	var b [IDLength]byte
	s.Put(&b, now)
	return string(b[:])
}

// Put writes a request id to b, for a caller that owns the memory.
func (s *IDs) Put(b *[IDLength]byte, now time.Time) {
	ms := uint64(now.UnixMilli()) & (1<<48 - 1)
	hi, lo := s.random.Uint64(), s.random.Uint64()
	for i := range 10 {
		b[i] = idAlphabet[ms>>(45-5*i)&31]
	}
	for i := range 8 {
		b[10+i] = idAlphabet[hi>>(5*i)&31]
		b[18+i] = idAlphabet[lo>>(5*i)&31]
	}
}
