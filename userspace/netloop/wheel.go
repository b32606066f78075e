// SPDX-License-Identifier: Apache-2.0

package netloop

import (
	"math/bits"
	"time"
)

const (
	tick       = int64(4 * time.Millisecond)
	slotBits   = 8
	slots      = 1 << slotBits
	levels     = 3
	farthest   = int64(1)<<(slotBits*levels) - 1 // ticks; later timers wait there and are placed again
	noDeadline = int64(0)
)

// timer is an entry of a wheel, embedded in what it wakes; exactly one of task, conn and relay is set.
type timer struct {
	prev, next *timer
	when       int64 // nanoseconds on the engine's clock; 0 while not in a wheel
	level      uint8
	slot       uint8
	task       *Task
	conn       *Conn
	relay      *relay
}

// wheel is a hierarchical timer wheel: three levels of 256 slots, 4 ms each at the lowest, so that setting and clearing a
// deadline costs a few pointer writes whatever the number of connections.
type wheel struct {
	cur      int64 // the last tick that was expired
	count    int
	occupied [levels][slots / 64]uint64
	head     [levels][slots]*timer
}

// set places tm at when, moving it if it is already placed. It fires at the first advance after when.
func (w *wheel) set(tm *timer, when int64) {
	w.clear(tm)
	if when <= 0 {
		when = 1
	}
	tm.when = when
	w.place(tm, w.cur+1)
	w.count++
}

func (w *wheel) place(tm *timer, earliest int64) {
	at := (tm.when + tick - 1) / tick
	at = min(max(at, earliest), w.cur+farthest)
	level := 0
	for d := at - w.cur; d >= slots; d >>= slotBits {
		level++
	}
	slot := (at >> (slotBits * level)) & (slots - 1)
	tm.level, tm.slot = uint8(level), uint8(slot)
	tm.prev, tm.next = nil, w.head[level][slot]
	if tm.next != nil {
		tm.next.prev = tm
	}
	w.head[level][slot] = tm
	w.occupied[level][slot/64] |= 1 << (slot % 64)
}

// clear takes tm out; it does nothing if tm is in no wheel.
func (w *wheel) clear(tm *timer) {
	if tm.when == 0 {
		return
	}
	w.unlink(tm)
	tm.when = 0
	w.count--
}

func (w *wheel) unlink(tm *timer) {
	if tm.prev != nil {
		tm.prev.next = tm.next
	} else {
		w.head[tm.level][tm.slot] = tm.next
		if tm.next == nil {
			w.occupied[tm.level][tm.slot/64] &^= 1 << (tm.slot % 64)
		}
	}
	if tm.next != nil {
		tm.next.prev = tm.prev
	}
	tm.prev, tm.next = nil, nil
}

// advance moves the wheel to now and calls fire for each timer that is due, already taken out.
func (w *wheel) advance(now int64, fire func(*timer)) {
	target := now / tick
	for w.cur < target {
		if w.count == 0 {
			w.cur = target
			return
		}
		if w.occupied[0] == [slots / 64]uint64{} {
			// Nothing before the next cascade.
			w.cur = min(target, w.cur|(slots-1))
			if w.cur == target {
				return
			}
		}
		w.cur++
		for level := 1; level < levels && w.cur&(1<<(slotBits*level)-1) == 0; level++ {
			w.cascade(level)
		}
		slot := w.cur & (slots - 1)
		for tm := w.head[0][slot]; tm != nil; tm = w.head[0][slot] {
			w.clear(tm)
			fire(tm)
		}
	}
}

// cascade spreads the current slot of a level over the levels below, the tick about to expire included.
func (w *wheel) cascade(level int) {
	slot := (w.cur >> (slotBits * level)) & (slots - 1)
	for tm := w.head[level][slot]; tm != nil; {
		next := tm.next
		w.unlink(tm)
		w.place(tm, w.cur)
		tm = next
	}
}

// next is the time of the next tick at which something may happen, in nanoseconds on the engine's clock.
func (w *wheel) next() (when int64, ok bool) {
	if w.count == 0 {
		return 0, false
	}
	best := int64(-1)
	for level := range levels {
		base := w.cur >> (slotBits * level)
		if d := w.distance(level, int(base+1)&(slots-1)); d >= 0 {
			at := (base + 1 + int64(d)) << (slotBits * level)
			if best < 0 || at < best {
				best = at
			}
		}
	}
	return best * tick, true
}

// distance is how many slots after from the first occupied one lies, going round; -1 if the level is empty.
func (w *wheel) distance(level, from int) int {
	words := &w.occupied[level]
	for i := 0; i <= len(words); i++ {
		word := (from/64 + i) % len(words)
		b := words[word]
		switch i {
		case 0:
			b &= ^uint64(0) << (from % 64)
		case len(words):
			b &= 1<<(from%64) - 1
		}
		if b != 0 {
			return (word*64 + bits.TrailingZeros64(b) - from + slots) % slots
		}
	}
	return -1
}
