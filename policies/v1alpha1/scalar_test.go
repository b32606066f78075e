// SPDX-License-Identifier: Apache-2.0

package v1alpha1

import (
	"encoding"
	"fmt"
	"testing"
	"time"
)

func TestScalars(t *testing.T) {
	var (
		duration    Duration
		date        Date
		size        Size
		rate        Rate
		probability Probability
	)
	day := func(s string) string {
		d, err := time.Parse(time.RFC3339, s)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(d.UTC())
	}
	for _, c := range []struct {
		into encoding.TextUnmarshaler
		show func() string
		ok   map[string]string
		bad  []string
	}{
		{&duration, func() string { return fmt.Sprint(time.Duration(duration)) },
			map[string]string{"15m": "15m0s", "1h30m": "1h30m0s", "90d": "2160h0m0s"}, []string{"", "15", "-5m", "0s", "5 m", "0d", "1.5d", "-1d", "99999d"}},
		{&date, func() string { return fmt.Sprint(time.Time(date)) },
			map[string]string{"2027-06-30": day("2027-07-01T00:00:00Z"), "2027-06-30T12:00:00+02:00": day("2027-06-30T10:00:00Z")},
			[]string{"", "2027-6-30", "2027-02-30", "30.06.2027", "2027-06-30T12:00:00"}},
		{&size, func() string { return fmt.Sprint(int64(size)) },
			map[string]string{"1": "1", "65536": "65536", "64KiB": "65536", "1MiB": "1048576", "4294967295GiB": "4611686017353646080"},
			[]string{"", "0", "-1", "64kb", "64KB", "1.5MiB", "KiB", "4294967296", "0x10"}},
		{&rate, func() string { return fmt.Sprint(rate.Events, rate.Per) },
			map[string]string{"5/day": "5 24h0m0s", "1/hour": "1 1h0m0s", "20/week": "20 168h0m0s"},
			[]string{"", "5", "0/day", "5/month", "-1/day", "/day", "1.5/day", "5/day/day"}},
		{&probability, func() string { return fmt.Sprint(float64(probability)) },
			map[string]string{"1e-4": "0.0001", "0.5": "0.5"}, []string{"", "0", "1", "-0.1", "NaN", "Inf", "5%"}},
	} {
		for text, want := range c.ok {
			if err := c.into.UnmarshalText([]byte(text)); err != nil || c.show() != want {
				t.Errorf("%T %q: %s, %v, want %s", c.into, text, c.show(), err, want)
			}
		}
		for _, text := range c.bad {
			if err := c.into.UnmarshalText([]byte(text)); err == nil {
				t.Errorf("%T %q: %s", c.into, text, c.show())
			}
		}
	}
}
