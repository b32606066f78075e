// SPDX-License-Identifier: Apache-2.0

package netloop

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// loop is what tasks that take turns have in common. On the epoll engine it is driven by r, else its lock is held by
// whichever task runs.
type loop struct {
	e     *Engine
	index int
	r     *reactor // nil on the goroutine engine
	mu    sync.Mutex
	conns map[uint64]*Conn // goroutine engine; a reactor has a table by descriptor

	cur      *Task // running
	all      *Task // list of live tasks
	stopping bool
	local    map[any]any
	buffers  [][]byte

	load                    atomic.Int64 // live tasks and connections, for placement
	bytesRead, bytesWritten atomic.Uint64
}

// Task is one piece of sequential code on a loop. Its methods may be called only by the task itself.
type Task struct {
	l          *loop
	f          func(*Task)
	w          *worker    // epoll engine, once it has started
	wakeup     chan error // goroutine engine
	interrupt  func()     // goroutine engine: ends a wait for a connection
	prev, next *Task      // loop.all
	conns      []*Conn    // owned
	timer      timer

	parked  bool
	blocked bool   // in Block, which nothing but its function can end
	done    bool   // f has returned
	parks   uint32 // tells one park from the next
	err     error  // what the park returns

	queue                *queue // waited in
	queuePrev, queueNext *Task
	want                 int // Conn.Flushed
}

// spawn adds a task to the loop.
func (l *loop) spawn(f func(*Task)) *Task {
	t := &Task{l: l, f: f}
	t.timer.task = t
	if t.next = l.all; t.next != nil {
		t.next.prev = t
	}
	l.all = t
	l.e.tasks.Add(1)
	l.load.Add(1)
	if l.r != nil {
		l.r.runq = append(l.r.runq, t)
	} else {
		l.startPlain(t)
	}
	return t
}

// run is the body of a task: f, and the end of all it owns.
func (t *Task) run() {
	defer func() {
		cause := error(nil)
		if p := recover(); p != nil {
			t.l.e.panics.Add(1)
			t.l.e.log.Error("task panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			cause = ErrPanicked
		}
		t.finish(cause)
	}()
	t.f(t)
}

// finish closes what the task owns; with a cause, as after a panic, it aborts, since nobody knows what was half said.
func (t *Task) finish(cause error) {
	l := t.l
	for len(t.conns) > 0 {
		c := t.conns[len(t.conns)-1]
		if cause != nil {
			c.abort(cause)
		} else {
			_ = c.Close()
		}
	}
	if t.prev != nil {
		t.prev.next = t.next
	} else {
		l.all = t.next
	}
	if t.next != nil {
		t.next.prev = t.prev
	}
	t.prev, t.next, t.f, t.done = nil, nil, nil, true
	l.load.Add(-1)
	l.e.taskGone()
}

// park gives the loop to others until wake or the deadline on the engine's clock.
func (t *Task) park(deadline int64) error {
	l := t.l
	if l.cur != t {
		panic("netloop: called outside the task's turn")
	}
	if l.stopping && !t.blocked {
		return ErrClosed
	}
	t.parked = true
	t.parks++
	if l.r == nil {
		return t.parkPlain(deadline)
	}
	if deadline != noDeadline {
		l.r.wheel.set(&t.timer, deadline)
	}
	t.w.yield(struct{}{})
	err := t.err
	t.err = nil
	return err
}

// wake ends a park; it does nothing to a task that runs or is about to, nor to one in Block.
func (t *Task) wake(err error) {
	if !t.parked || t.blocked {
		return
	}
	t.parked = false
	if t.queue != nil {
		t.queue.remove(t)
	}
	if r := t.l.r; r != nil {
		r.wheel.clear(&t.timer)
		t.err = err
		r.runq = append(r.runq, t)
		return
	}
	t.wakeup <- err
}

// current is the task that runs on the loop.
func (l *loop) current() *Task {
	if l.cur == nil {
		panic("netloop: connection used outside its loop")
	}
	return l.cur
}

// stop wakes every task with ErrClosed and ends every connection.
func (l *loop) stop() {
	l.stopping = true
	l.eachConn(func(c *Conn) { c.abort(ErrClosed) })
	for t := l.all; t != nil; t = t.next {
		if t.interrupt != nil {
			t.interrupt()
		}
		t.wake(ErrClosed)
	}
}

// Loop is the index of the task's loop, 0 to Engine.Loops()-1.
func (t *Task) Loop() int { return t.l.index }

// Engine is the engine the task runs on.
func (t *Task) Engine() *Engine { return t.l.e }

// Go runs f as another task of the same loop. It starts after the caller parks.
func (t *Task) Go(f func(*Task)) { t.l.spawn(f) }

// Sleep parks for d. Its only error is ErrClosed.
func (t *Task) Sleep(d time.Duration) error {
	if d <= 0 {
		return t.Yield()
	}
	if err := t.park(t.l.e.after(d)); !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

// Yield lets the other tasks of the loop have a turn.
func (t *Task) Yield() error {
	if t.l.stopping {
		return ErrClosed
	}
	if r := t.l.r; r != nil {
		r.later = append(r.later, parking{t, t.parks + 1})
		return t.park(noDeadline)
	}
	t.l.leave(t)
	t.l.enter(t)
	return nil
}

// Block runs f in an ordinary goroutine while the task, not the loop, waits for it. f must not touch the loop's tasks,
// connections or events. It cannot be interrupted; a panic of f is the task's.
func (t *Task) Block(f func()) {
	if t.l.r == nil {
		t.l.leave(t)
		defer t.l.enter(t)
		f()
		return
	}
	t.blocked = true
	var panicked any
	r := t.l.r
	go func() {
		defer r.post(func(*loop) {
			t.blocked = false
			t.wake(nil)
		})
		defer func() {
			if p := recover(); p != nil {
				panicked = fmt.Sprintf("%v\n%s", p, debug.Stack())
			}
		}()
		f()
	}()
	_ = t.park(noDeadline)
	if panicked != nil {
		panic(panicked)
	}
}

// Event is a place where tasks of one loop wait. The zero Event is ready to use. It has no memory: a signal with nobody waiting is
// lost, which is safe because tasks take turns, so the usual form is
//
//	for !condition {
//		if err := t.Wait(&event); err != nil { ... }
//	}
//
// From another goroutine signal through Engine.Post.
type Event struct{ waiting queue }

// Signal wakes the task that has waited longest, if any.
func (ev *Event) Signal() {
	if t := ev.waiting.head; t != nil {
		t.wake(nil)
	}
}

// Broadcast wakes all waiting tasks.
func (ev *Event) Broadcast() {
	for ev.waiting.head != nil {
		ev.waiting.head.wake(nil)
	}
}

// Wait parks until ev is signalled. Its only error is ErrClosed.
func (t *Task) Wait(ev *Event) error { return t.waitIn(&ev.waiting, noDeadline) }

// WaitTimeout is Wait for at most d, after which it returns os.ErrDeadlineExceeded.
func (t *Task) WaitTimeout(ev *Event, d time.Duration) error {
	return t.waitIn(&ev.waiting, t.l.e.after(d))
}

// WaitUntil is Wait up to a time, after which it returns os.ErrDeadlineExceeded; the zero time is no limit.
func (t *Task) WaitUntil(ev *Event, deadline time.Time) error {
	return t.waitIn(&ev.waiting, t.l.e.at(deadline))
}

func (t *Task) waitIn(q *queue, deadline int64) error {
	if q.head != nil && q.head.l != t.l {
		panic("netloop: tasks of two loops wait for one event")
	}
	q.push(t)
	err := t.park(deadline)
	if t.queue != nil { // not parked at all: the engine is closing
		q.remove(t)
	}
	return err
}

// queue is a list of parked tasks, longest waiting first.
type queue struct{ head, tail *Task }

func (q *queue) push(t *Task) {
	t.queue = q
	if t.queuePrev = q.tail; q.tail != nil {
		q.tail.queueNext = t
	} else {
		q.head = t
	}
	q.tail = t
}

func (q *queue) pushFront(t *Task) {
	t.queue = q
	if t.queueNext = q.head; q.head != nil {
		q.head.queuePrev = t
	} else {
		q.tail = t
	}
	q.head = t
}

func (q *queue) remove(t *Task) {
	if t.queuePrev != nil {
		t.queuePrev.queueNext = t.queueNext
	} else {
		q.head = t.queueNext
	}
	if t.queueNext != nil {
		t.queueNext.queuePrev = t.queuePrev
	} else {
		q.tail = t.queuePrev
	}
	t.queue, t.queuePrev, t.queueNext = nil, nil, nil
}

// Local is a value for each loop: pools, caches and idle connections that need no lock. Keep it in a variable and use it by
// address.
type Local[T any] struct {
	New func(*Task) *T // makes a loop's value at its first use; nil: new(T)
}

// Get is the value of the task's loop.
func (k *Local[T]) Get(t *Task) *T {
	if v, ok := t.l.local[k]; ok {
		return v.(*T)
	}
	var v *T
	if k.New != nil {
		v = k.New(t)
	} else {
		v = new(T)
	}
	t.l.local[k] = v
	return v
}

// BufferSize is the length of the buffers that Task.Buffer lends.
const BufferSize = 32 << 10

const keptBuffers = 256 // 8 MiB a loop

// Buffer lends a buffer of BufferSize bytes with arbitrary contents.
func (t *Task) Buffer() []byte {
	l := t.l
	if n := len(l.buffers); n > 0 {
		b := l.buffers[n-1]
		l.buffers = l.buffers[:n-1]
		return b
	}
	return make([]byte, BufferSize)
}

// Release gives a buffer back to the loop of the task; it may be any part of one that starts where it started.
func (t *Task) Release(b []byte) {
	if cap(b) >= BufferSize && len(t.l.buffers) < keptBuffers {
		t.l.buffers = append(t.l.buffers, b[:BufferSize])
	}
}
