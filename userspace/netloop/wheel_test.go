// SPDX-License-Identifier: Apache-2.0

package netloop

import (
	"math/rand/v2"
	"testing"
	"time"
)

// TestWheel runs random timers over a wheel and holds it to what each was set to.
func TestWheel(t *testing.T) {
	for _, span := range []time.Duration{3 * time.Millisecond, time.Second, 10 * time.Minute, 40 * time.Hour} {
		t.Run(span.String(), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(1, uint64(span)))
			var w wheel
			var now int64
			timers := make([]timer, 500)
			fired := 0
			for round := range 2000 {
				for range 5 {
					tm := &timers[rnd.IntN(len(timers))]
					if rnd.IntN(4) == 0 {
						w.clear(tm)
						continue
					}
					w.set(tm, now+1+rnd.Int64N(int64(span)))
				}
				next, ok := w.next()
				pending := 0
				earliest := int64(-1)
				for i := range timers {
					if when := timers[i].when; when != 0 {
						pending++
						if earliest < 0 || when < earliest {
							earliest = when
						}
					}
				}
				if pending != w.count || ok != (pending > 0) {
					t.Fatalf("round %d: %d timers are set, the wheel counts %d", round, pending, w.count)
				}
				// It may wake early to sort, never late by more than a tick.
				if ok && next > earliest+tick {
					t.Fatalf("round %d: next at %d, a timer is due at %d", round, next, earliest)
				}
				switch rnd.IntN(3) {
				case 0:
					now += rnd.Int64N(int64(span) / 50)
				case 1:
					now += rnd.Int64N(2 * int64(time.Millisecond))
				default:
					now = max(now, next)
				}
				w.advance(now, func(tm *timer) {
					fired++
					if tm.when != 0 {
						t.Fatal("fired while still placed")
					}
				})
				for i := range timers {
					if when := timers[i].when; when != 0 && when <= now-tick {
						t.Fatalf("round %d: due at %d, now %d, not fired", round, when, now)
					}
				}
			}
			if fired == 0 {
				t.Error("nothing fired")
			}
		})
	}
}

func TestWheelFiresNotBefore(t *testing.T) {
	var w wheel
	for _, d := range []int64{1, tick - 1, tick, tick + 1, 255 * tick, 256 * tick, 257 * tick, 65535 * tick, 65536 * tick, 65537 * tick, farthest * tick, 2 * farthest * tick} {
		for _, start := range []int64{0, 255, 256, 65535} {
			w = wheel{cur: start}
			now := start * tick
			tm := &timer{}
			due := now + d
			w.set(tm, due)
			fired := int64(0)
			for fired == 0 {
				next, ok := w.next()
				if !ok {
					t.Fatalf("start %d, in %d: lost", start, d)
				}
				now = next
				w.advance(now, func(tm *timer) { fired = now })
			}
			// Beyond the last level the owner is woken early and sets it again.
			if fired > due+tick || fired < due && d <= farthest*tick {
				t.Errorf("start tick %d, in %d: fired at %d, due %d", start, d, fired, due)
			}
		}
	}
}
