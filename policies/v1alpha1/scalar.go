// SPDX-License-Identifier: Apache-2.0

package v1alpha1

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Duration is a length of time, written as Go writes it: 15m, 1h30m.
type Duration time.Duration

// UnmarshalText parses a positive duration.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q is not a duration such as 15m or 1h30m", b)
	}
	if v <= 0 {
		return fmt.Errorf("%q is not a positive duration", b)
	}
	*d = Duration(v)
	return nil
}

// Date is an instant. Written as a day it is the end of that day in UTC.
type Date time.Time

// UnmarshalText parses YYYY-MM-DD or RFC 3339.
func (d *Date) UnmarshalText(b []byte) error {
	if t, err := time.Parse(time.DateOnly, string(b)); err == nil {
		*d = Date(t.AddDate(0, 0, 1))
		return nil
	}
	t, err := time.Parse(time.RFC3339, string(b))
	if err != nil {
		return fmt.Errorf("%q is neither a day such as 2027-06-30 nor a time such as 2027-06-30T12:00:00Z", b)
	}
	*d = Date(t.UTC())
	return nil
}

// Size is a number of bytes, written as 65536, 64KiB or 1MiB.
type Size int64

// UnmarshalText parses a positive size.
func (s *Size) UnmarshalText(b []byte) error {
	text, unit := string(b), int64(1)
	for _, u := range [...]struct {
		suffix string
		bytes  int64
	}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}} {
		if t, ok := strings.CutSuffix(text, u.suffix); ok {
			text, unit = t, u.bytes
			break
		}
	}
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil || n == 0 {
		return fmt.Errorf("%q is not a size in bytes such as 65536 or 64KiB", b)
	}
	*s = Size(int64(n) * unit)
	return nil
}

// Probability is a number above 0 and below 1.
type Probability float64

// UnmarshalText parses a decimal or scientific number.
func (p *Probability) UnmarshalText(b []byte) error {
	v, err := strconv.ParseFloat(string(b), 64)
	if err != nil || math.IsNaN(v) || v <= 0 || v >= 1 {
		return fmt.Errorf("%q is not a probability above 0 and below 1, such as 1e-4", b)
	}
	*p = Probability(v)
	return nil
}
