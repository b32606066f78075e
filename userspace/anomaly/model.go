// SPDX-License-Identifier: Apache-2.0

package anomaly

import "math"

const (
	tableSize   = 8 // kinds of a shape, value or parameter set that are counted one by one
	lengthSteps = 24
	immature    = 8       // values of a parameter whose scores say nothing
	ageAt       = 1 << 15 // observations after which every count is halved
)

// table counts the kinds of an event. Those that find no place count as
// unseen.
type table struct {
	Kinds  [tableSize]uint32
	Counts [tableSize]uint16
	New    novelty
}

// novelty estimates the mass of what was never seen by how often something
// new came of late: at every power of two from 32 events on the past counts
// half.
type novelty struct {
	Misses uint16
	Tries  uint16
	Total  uint16
}

func (v *novelty) add(fresh bool) {
	v.Tries++
	v.Total++
	if fresh {
		v.Misses++
	}
	if v.Total >= 32 && v.Total&(v.Total-1) == 0 {
		v.Misses /= 2
		v.Tries /= 2
	}
	if v.Total >= ageAt {
		v.Total = ageAt / 2
	}
}

func (v *novelty) unseen() float64 {
	return min((float64(v.Misses)+0.5)/(float64(v.Tries)+1), 1)
}

// tail returns the probability of an event that is no more frequent than
// kind, the unseen included.
func (t *table) tail(kind uint64) float64 {
	k := uint32(kind>>32) | 1
	unseen := t.New.unseen()
	var mine, sum uint32
	for i, v := range t.Kinds {
		if v == k {
			mine = uint32(t.Counts[i])
		}
		sum += uint32(t.Counts[i])
	}
	if mine == 0 {
		return unseen
	}
	rarer := uint32(0)
	for _, c := range t.Counts {
		if uint32(c) <= mine {
			rarer += uint32(c)
		}
	}
	return min(unseen+float64(rarer)/(float64(sum)+1), 1)
}

func (t *table) add(kind uint64) {
	k := uint32(kind>>32) | 1
	free := -1
	found := false
	for i, v := range t.Kinds {
		if v == k && t.Counts[i] > 0 {
			t.Counts[i]++
			found = true
			break
		}
		if t.Counts[i] == 0 && free < 0 {
			free = i
		}
	}
	t.New.add(!found)
	if !found && free >= 0 {
		t.Kinds[free], t.Counts[free] = k, 1
	}
}

func (t *table) age() {
	for i := range t.Counts {
		t.Counts[i] /= 2
	}
}

// parameter is the model of one parameter's values. Counts are of values
// that have the feature.
type parameter struct {
	Present uint16 // requests that had it
	Values  uint16 // its values, more than Present where it repeats
	Longest uint32
	Highest [valueParts]float32 // bits of each part, of what was learned
	Sums    small
	Lengths [lengthSteps]uint16
	Symbols [symbolCount]uint16
	Twice   [32]uint16
	Pairs   [classCount * classCount]uint16
	Shapes  table
	Kinds   table
}

// lengthStep is exact up to 11 bytes, then by two up to 23, then coarser.
func lengthStep(n uint32) int {
	switch {
	case n < 12:
		return int(n)
	case n < 24:
		return 12 + int(n-12)/2
	case n < 32:
		return 18
	case n < 48:
		return 19
	case n < 80:
		return 20
	case n < 160:
		return 21
	case n < 1024:
		return 22
	}
	return 23
}

// score adds the bits of the value parts into sm, keeping for each part the
// greatest over the request's parameters and whose it is.
//
// What is rare for one parameter is common for another. So up to the highest
// that this parameter ever showed when it was learned, a part's bits count an
// eighth; beyond it, in full and four more.
func (p *parameter) score(f *feature, index uint8, sm *Sample) {
	n := float64(p.Values)
	raw := [valueParts]float64{
		PartLength:     p.lengthBits(f.length),
		PartCharacters: p.characterBits(f, n),
		PartPairs:      p.pairBits(f, n),
		PartShape:      surprise(p.Shapes.tail(f.shape)),
		PartValue:      surprise(p.Kinds.tail(f.value)),
	}
	sum := 0.0
	for i := PartLength; i < valueParts; i++ {
		bits := raw[i]
		f.bits[i] = float32(bits)
		if i != PartPairs { // it follows the characters too closely to count twice
			sum += bits
		}
		if beyond := bits - float64(p.Highest[i]); beyond > 0 {
			bits = beyond + 4
		} else {
			bits /= 8
		}
		sm.raise(i, bits, index)
	}
	f.sum = sum
	sm.raise(PartTogether, p.Sums.bits(sum), index)
}

func (sm *Sample) raise(part Part, bits float64, index uint8) {
	if bits > sm.bits[part] {
		sm.bits[part], sm.which[part] = bits, index
	}
}

// surprise is a probability in bits, at most about a thousand.
func surprise(p float64) float64 { return -math.Log2(max(p, 1e-300)) }

func (p *parameter) characterBits(f *feature, n float64) float64 {
	ratio := 1.0
	for m := f.symbols; m != 0; m &= m - 1 {
		ratio *= (float64(p.Symbols[trailing(m)]) + 0.5) / (n + 1)
	}
	for m := uint64(f.twice); m != 0; m &= m - 1 {
		ratio *= (float64(p.Twice[trailing(m)]) + 0.5) / (n + 1)
	}
	return surprise(ratio)
}

func (p *parameter) pairBits(f *feature, n float64) float64 {
	ratio := 1.0
	for m := f.pairs; m != 0; m &= m - 1 {
		ratio *= (float64(p.Pairs[trailing(m)]) + 0.5) / (n + 1)
	}
	return surprise(ratio)
}

// lengthBits is the two-sided tail of the length, and beyond the longest
// value ever learned two bits more for each doubling.
func (p *parameter) lengthBits(length uint32) float64 {
	at := lengthStep(length)
	var below, above uint32
	for i, c := range p.Lengths {
		if i <= at {
			below += uint32(c)
		}
		if i >= at {
			above += uint32(c)
		}
	}
	tail := 2 * (float64(min(below, above)) + 0.5) / (float64(p.Values) + 1)
	bits := -math.Log2(min(tail, 1))
	if length > p.Longest {
		bits += 2 * math.Log2(float64(length+1)/float64(p.Longest+1))
	}
	return bits
}

func (p *parameter) add(f *feature) {
	if p.Values > immature {
		p.Sums.add(f.sum)
		for i, b := range f.bits {
			p.Highest[i] = max(p.Highest[i], b)
		}
	}
	p.Values++
	p.Longest = max(p.Longest, f.length)
	p.Lengths[lengthStep(f.length)]++
	for m := f.symbols; m != 0; m &= m - 1 {
		p.Symbols[trailing(m)]++
	}
	for m := f.twice; m != 0; m &= m - 1 {
		p.Twice[trailing(uint64(m))]++
	}
	for m := f.pairs; m != 0; m &= m - 1 {
		p.Pairs[trailing(m)]++
	}
	p.Shapes.add(f.shape)
	p.Kinds.add(f.value)
	if p.Values >= ageAt {
		p.age()
	}
}

func (p *parameter) age() {
	p.Values /= 2
	halve(p.Lengths[:])
	halve(p.Symbols[:])
	halve(p.Twice[:])
	halve(p.Pairs[:])
	p.Shapes.age()
	p.Kinds.age()
}

func halve(c []uint16) {
	for i := range c {
		c[i] /= 2
	}
}
