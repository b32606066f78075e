// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	crand "crypto/rand"
	"math/rand/v2"
	"time"
)

// IDLength is the length of a request id.
const IDLength = 26

// idAlphabet is Crockford's base 32, as ULIDs use it.
const idAlphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

// idSource makes request ids: 48 bits of the time in milliseconds, so that
// they sort, and 80 bits of a ChaCha8 stream that was seeded once from the
// kernel, so that they cannot be guessed and cost no system call.
type idSource struct{ random *rand.ChaCha8 }

func newIDSource() idSource {
	var seed [32]byte
	crand.Read(seed[:]) // never fails: crypto/rand.Read aborts the process instead
	return idSource{rand.NewChaCha8(seed)}
}

// NewID returns a request id, 26 characters in the form of a ULID.
func (l *Loop) NewID(now time.Time) string {
	var b [IDLength]byte
	l.PutID(&b, now)
	return string(b[:])
}

// PutID writes a request id to b, for a caller that owns the memory.
func (l *Loop) PutID(b *[IDLength]byte, now time.Time) {
	ms := uint64(now.UnixMilli()) & (1<<48 - 1)
	hi, lo := l.ids.random.Uint64(), l.ids.random.Uint64()
	for i := range 10 {
		b[i] = idAlphabet[ms>>(45-5*i)&31]
	}
	for i := range 8 {
		b[10+i] = idAlphabet[hi>>(5*i)&31]
		b[18+i] = idAlphabet[lo>>(5*i)&31]
	}
}
