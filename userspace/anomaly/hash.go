// SPDX-License-Identifier: Apache-2.0

package anomaly

import (
	"crypto/rand"
	"encoding/binary"
	"math/bits"
)

// The hash is keyed by a seed that never leaves the state directory, so that
// a sender can neither aim at a collision nor a reader of statistics guess a
// value. It multiplies 64 by 64 to 128 bits and folds, eight bytes a step.

const (
	mix1 = 0x9e3779b97f4a7c15
	mix2 = 0xd6e8feb86659fd93
)

// Tags keep the kinds of what is hashed apart.
const (
	tagIdentity = iota + 1
	tagAPI
	tagMethod
	tagTemplate
	tagSegment
	tagQuery
	tagForm
	tagJSON
	tagPath
	tagMark
	tagValue
)

func newSeed() [2]uint64 {
	var b [16]byte
	rand.Read(b[:]) // never fails: crypto/rand.Read aborts the process instead
	return [2]uint64{binary.LittleEndian.Uint64(b[:8]) | 1, binary.LittleEndian.Uint64(b[8:]) | 1}
}

func fold(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	return hi ^ lo
}

// step mixes one word into h.
func (s *Scorer) step(h, word uint64) uint64 { return fold(h^word^s.seed[0], s.seed[1]^mix1) }

func (s *Scorer) start(tag uint64) uint64 { return fold(s.seed[0]^tag*mix1, mix2^s.seed[1]) }

func (s *Scorer) hashString(tag uint64, v string) uint64 { return s.addString(s.start(tag), v) }

func (s *Scorer) addString(h uint64, v string) uint64 {
	n := len(v)
	for len(v) >= 8 {
		h = s.step(h, uint64(v[0])|uint64(v[1])<<8|uint64(v[2])<<16|uint64(v[3])<<24|
			uint64(v[4])<<32|uint64(v[5])<<40|uint64(v[6])<<48|uint64(v[7])<<56)
		v = v[8:]
	}
	var w uint64
	for i := range len(v) {
		w |= uint64(v[i]) << (8 * i)
	}
	return s.step(s.step(h, w), uint64(n)+mix2)
}

// byteHash is the same hash fed byte by byte, for what is decoded on the
// way.
type byteHash struct {
	s    *Scorer
	h, w uint64
	n    uint64
}

func (b *byteHash) add(c byte) {
	b.w |= uint64(c) << (8 * (b.n & 7))
	b.n++
	if b.n&7 == 0 {
		b.h, b.w = b.s.step(b.h, b.w), 0
	}
}

func (b *byteHash) sum() uint64 { return b.s.step(b.s.step(b.h, b.w), b.n+mix2) }
