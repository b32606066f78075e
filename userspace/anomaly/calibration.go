// SPDX-License-Identifier: Apache-2.0

package anomaly

import "math"

const (
	calibrationSteps = 48
	firstAging       = 512
)

// calibration is a histogram of scores that were given to learned requests
// before they were learned. The scores of a young model are high and say
// little, so at every power of two from 512 on the past counts half. Steps are a quarter of a bit wide up to 8 bits,
// one bit up to 16, four beyond.
type calibration struct {
	Counts  [calibrationSteps]uint16
	Total   uint32
	Added   uint32  // since the start
	Highest float32 // the greatest score of a request that was learned
}

func calibrationStep(bits float64) int {
	switch {
	case !(bits > 0):
		return 0
	case bits < 8:
		return int(bits * 4)
	case bits < 16:
		return 32 + int(bits-8)
	}
	return min(40+int((bits-16)/4), calibrationSteps-1)
}

func stepStart(i int) float64 {
	switch {
	case i < 32:
		return float64(i) / 4
	case i < 40:
		return float64(i - 24)
	}
	return float64(16 + 4*(i-40))
}

// rank returns the conformal p-value, and the same continued beyond the
// highest calibrated score by halving for each bit: scores are negative
// logarithms of probabilities, so that is their own scale.
func (c *calibration) rank(bits float64) (p, tail float64) {
	at := calibrationStep(bits)
	above := uint32(0)
	for i := at; i < calibrationSteps; i++ {
		above += uint32(c.Counts[i])
	}
	p = float64(above+1) / float64(c.Total+1)
	tail = p
	if beyond := bits - float64(c.Highest); beyond > 0 {
		tail *= math.Exp2(-min(beyond, 64))
	}
	return p, tail
}

// add counts a score. That of a request held in quarantine counts as just
// above the highest learned one: the share of such requests stays honest, and
// yet nobody can raise by it what a real attack is measured against.
func (c *calibration) add(bits float64, held bool) {
	at := calibrationStep(bits)
	if held {
		at = min(at, calibrationStep(float64(c.Highest))+1, calibrationSteps-1)
	} else {
		c.Highest = max(c.Highest, float32(bits))
	}
	c.Counts[at]++
	c.Total++
	c.Added++
	if c.Total >= ageAt || c.Added >= firstAging && c.Added&(c.Added-1) == 0 {
		c.Total = 0
		for i := range c.Counts {
			c.Counts[i] /= 2
			c.Total += uint32(c.Counts[i])
		}
	}
}

const smallSteps = 20

// small is a coarser calibration, one for each parameter: what is rare for
// one is common for another.
type small struct {
	Counts  [smallSteps]uint16
	Total   uint16
	_       [2]uint8
	Highest float32
}

func smallStep(bits float64) int {
	switch {
	case !(bits > 0):
		return 0
	case bits < 18:
		return int(bits / 1.5)
	}
	return min(12+int((bits-18)/6), smallSteps-1)
}

// bits returns the tail of a score in bits, continued beyond the highest
// calibrated one.
func (c *small) bits(score float64) float64 {
	above := uint32(0)
	for i := smallStep(score); i < smallSteps; i++ {
		above += uint32(c.Counts[i])
	}
	out := -math.Log2(float64(above+1) / float64(c.Total+1))
	if beyond := score - float64(c.Highest); beyond > 0 {
		out += beyond
	}
	return out
}

func (c *small) add(score float64) {
	c.Highest = max(c.Highest, float32(score))
	c.Counts[smallStep(score)]++
	c.Total++
	if c.Total >= ageAt {
		c.Total = 0
		for i := range c.Counts {
			c.Counts[i] /= 2
			c.Total += c.Counts[i]
		}
	}
}

// quantile returns the least score that a share q of what was calibrated
// stayed under.
func (c *calibration) quantile(q float64) float64 {
	left := uint32(float64(c.Total) * (1 - q))
	above := uint32(0)
	for i := calibrationSteps - 1; i >= 0; i-- {
		above += uint32(c.Counts[i])
		if above > left {
			return min(stepStart(min(i+1, calibrationSteps-1)), max(float64(c.Highest), stepStart(i)))
		}
	}
	return 0
}
