// SPDX-License-Identifier: Apache-2.0

package v1alpha1

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Duration is a length of time, written as Go writes it, 15m or 1h30m, or in
// days, 90d.
type Duration time.Duration

const day = 24 * time.Hour

// UnmarshalText parses a positive duration.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if days, ok := strings.CutSuffix(string(b), "d"); ok && err != nil {
		var n uint64
		if n, err = strconv.ParseUint(days, 10, 16); err == nil {
			v = time.Duration(n) * day
		}
	}
	if err != nil {
		return fmt.Errorf("%q is not a duration such as 15m, 1h30m or 90d", b)
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

// Words is a list of texts; one text stands for a list of one.
type Words []string

// UnmarshalText takes the one text.
func (w *Words) UnmarshalText(b []byte) error {
	*w = Words{string(b)}
	return nil
}

// Rate is a number of events in a time, written as 5/day.
type Rate struct {
	Events uint32
	Per    time.Duration
}

// UnmarshalText parses NUMBER/UNIT.
func (r *Rate) UnmarshalText(b []byte) error {
	number, unit, _ := strings.Cut(string(b), "/")
	n, err := strconv.ParseUint(number, 10, 32)
	per := map[string]time.Duration{"hour": time.Hour, "day": day, "week": 7 * day}[unit]
	if err != nil || n == 0 || per == 0 {
		return fmt.Errorf("%q is not a rate such as 5/day, with hour, day or week", b)
	}
	*r = Rate{uint32(n), per}
	return nil
}
