// SPDX-License-Identifier: Apache-2.0

package netloop

import (
	"encoding/binary"
	"fmt"
	"iter"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	holdMillis   = 5 // how long a wait keeps its scheduler slot before it becomes an ordinary system call
	acceptBatch  = 64
	acceptPause  = 100 * time.Millisecond // after EMFILE and its like
	tasksPerTurn = 4096
	idleWorkers  = 256
	streamEvents = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET
)

// reactor drives the tasks of one loop: wait for readiness, run who can go on, send what they wrote.
type reactor struct {
	l          *loop
	epfd, evfd int
	events     [256]unix.EpollEvent
	now        int64 // engine's clock at the start of the turn
	turn       uint64
	wheel      wheel

	conns     []*Conn // by descriptor
	listeners map[int]*Listener
	accepting []*Listener // with connections perhaps left to accept

	runq    []*Task   // to be resumed, in order
	later   []parking // to be resumed next turn
	pumps   []*relay  // with something to do
	pumped  []*relay  // storage for the next pumps
	holding []*Conn   // with input that was read ahead in this turn
	dirty   []*Conn   // with output to be sent at the end of the turn
	free    []*worker

	scratch      []byte   // what Read reads into before it knows how much there is
	small, large [][]byte // spare output buffers
	inputs       [][]byte // spare scratches
	relayed      []byte   // what a relay has in hand

	mu    sync.Mutex
	inbox []func(*loop)
	gone  bool // the loop takes no more posts
	rung  atomic.Bool
	read  uint64
	wrote uint64
}

// parking names one park of a task, so that it is not resumed from a later one.
type parking struct {
	t    *Task
	park uint32
}

// worker is a coroutine that runs one task after another.
type worker struct {
	t     *Task
	next  func() (struct{}, bool)
	stop  func()
	yield func(struct{}) bool
}

func newWorker() *worker {
	w := &worker{}
	w.next, w.stop = iter.Pull(func(yield func(struct{}) bool) {
		w.yield = yield
		for {
			w.t.run()
			w.t = nil
			if !yield(struct{}{}) {
				return
			}
		}
	})
	return w
}

func (l *loop) startReactor() error {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("create epoll: %w", err)
	}
	evfd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		sysClose(epfd)
		return fmt.Errorf("create eventfd: %w", err)
	}
	// Edge-triggered, so that it need not be read.
	if err := epollControl(epfd, unix.EPOLL_CTL_ADD, evfd, unix.EPOLLIN|unix.EPOLLET, uint64(evfd)); err != nil {
		sysClose(epfd)
		sysClose(evfd)
		return fmt.Errorf("watch eventfd: %w", err)
	}
	l.r = &reactor{l: l, epfd: epfd, evfd: evfd, listeners: map[int]*Listener{}, scratch: make([]byte, scratchSize)}
	return nil
}

func (r *reactor) release() {
	sysClose(r.epfd)
	sysClose(r.evfd)
}

// run is the loop. A task that calls runtime.Goexit ends in order but takes this goroutine with it, so the loop goes on in another.
func (r *reactor) run() {
	done := false
	defer func() {
		if done {
			return
		}
		r.l.cur = nil
		r.l.e.wg.Go(r.run)
	}()
	for !r.finished() {
		r.step()
	}
	for _, w := range r.free {
		w.stop()
	}
	r.free = nil
	r.release()
	done = true
}

// step is one turn.
func (r *reactor) step() {
	r.wait()
	r.wheel.advance(r.now, r.expire)
	r.accept()
	r.resumeAll()
	r.pumpAll()
	r.flushAll()
	for _, c := range r.holding {
		c.compact()
	}
	clear(r.holding)
	r.holding = r.holding[:0]
	if r.read != 0 {
		r.l.bytesRead.Add(r.read)
		r.read = 0
	}
	if r.wrote != 0 {
		r.l.bytesWritten.Add(r.wrote)
		r.wrote = 0
	}
}

// finished says whether the loop may end: told to stop, no task left, and no post that came in meanwhile.
func (r *reactor) finished() bool {
	if !r.l.stopping || r.l.all != nil {
		return false
	}
	r.mu.Lock()
	r.gone = true
	rest := r.inbox
	r.inbox = nil
	r.mu.Unlock()
	for _, f := range rest {
		f(r.l)
	}
	return true
}

// wait collects readiness. It does not wait if something is left from the turn before.
func (r *reactor) wait() {
	n := 0
	if len(r.runq)+len(r.later)+len(r.pumps)+len(r.dirty)+len(r.accepting) > 0 {
		n = epollWait(r.epfd, r.events[:], 0, true)
	} else {
		ms := r.untilTimer(r.now)
		n = epollWait(r.epfd, r.events[:], int(min(uint(ms), holdMillis)), true)
		if n == 0 && uint(ms) > holdMillis {
			if ms = r.untilTimer(r.l.e.clock()); ms != 0 {
				n = epollWait(r.epfd, r.events[:], ms, false)
			}
		}
	}
	r.now = r.l.e.clock()
	r.turn++
	for i := range r.events[:n] {
		r.event(&r.events[i])
	}
	for _, p := range r.later {
		if p.t.parks == p.park {
			p.t.wake(nil)
		}
	}
	clear(r.later)
	r.later = r.later[:0]
}

// untilTimer is the time to the next timer in milliseconds, rounded up; -1 if there is none.
func (r *reactor) untilTimer(now int64) int {
	when, ok := r.wheel.next()
	if !ok {
		return -1
	}
	return int(max(0, min((when-now+int64(time.Millisecond)-1)/int64(time.Millisecond), 1<<30)))
}

func (r *reactor) event(ev *unix.EpollEvent) {
	data := epollData(ev)
	fd, generation := int(uint32(data)), uint32(data>>32)
	switch {
	case generation != 0:
		// An event may be older than the connection that has its descriptor now.
		if fd < len(r.conns) && r.conns[fd] != nil && uint32(r.conns[fd].id) == generation {
			r.conns[fd].event(ev.Events)
		}
	case fd == r.evfd:
		r.takePosts()
	default:
		if ln := r.listeners[fd]; ln != nil {
			r.accepting = append(r.accepting, ln)
		}
	}
}

func (r *reactor) expire(tm *timer) {
	switch {
	case tm.task != nil:
		tm.task.wake(os.ErrDeadlineExceeded)
	case tm.conn != nil:
		tm.conn.stallTimer()
	case tm.relay != nil:
		tm.relay.idleTimer()
	}
}

// post runs f on the loop; false if the loop has ended.
func (r *reactor) post(f func(*loop)) bool {
	r.mu.Lock()
	if r.gone {
		r.mu.Unlock()
		return false
	}
	r.inbox = append(r.inbox, f)
	ring := r.rung.CompareAndSwap(false, true)
	if ring {
		// Under the lock: the loop closes the descriptor once it took the lock for the last time.
		_, _ = unix.Write(r.evfd, binary.NativeEndian.AppendUint64(nil, 1))
	}
	r.mu.Unlock()
	return true
}

func (r *reactor) takePosts() {
	r.rung.Store(false)
	r.mu.Lock()
	posts := r.inbox
	r.inbox = nil
	r.mu.Unlock()
	for _, f := range posts {
		f(r.l)
	}
}

// post runs f as a task of the loop, from anywhere.
func (l *loop) post(f func(*Task)) {
	l.system(func(l *loop) {
		if !l.stopping {
			l.spawn(f)
		}
	})
}

// system runs f with the loop to itself, not in a task.
func (l *loop) system(f func(*loop)) {
	if l.r != nil {
		l.r.post(f)
	} else {
		l.systemPlain(f)
	}
}

// resumeAll runs the tasks that can go on, and those they wake, up to a bound.
func (r *reactor) resumeAll() {
	n := 0
	for ; n < len(r.runq) && n < tasksPerTurn; n++ {
		t := r.runq[n]
		r.runq[n] = nil
		if t != nil {
			r.resume(t)
		}
	}
	rest := copy(r.runq, r.runq[n:])
	clear(r.runq[rest:])
	r.runq = r.runq[:rest]
}

func (r *reactor) resume(t *Task) {
	if t.w == nil {
		if n := len(r.free); n > 0 {
			t.w, r.free = r.free[n-1], r.free[:n-1]
		} else {
			t.w = newWorker()
		}
		t.w.t = t
	}
	r.l.cur = t
	t.w.next()
	r.l.cur = nil
	if t.done {
		w := t.w
		t.w = nil
		if len(r.free) < idleWorkers {
			r.free = append(r.free, w)
		} else {
			w.stop()
		}
	}
}

func (r *reactor) pumpAll() {
	due := r.pumps
	r.pumps = r.pumped[:0]
	for _, p := range due {
		r.pump(p)
	}
	clear(due)
	r.pumped = due
}

// pump moves a relay on. A panic there, in crypto/tls or below, ends that relay alone.
func (r *reactor) pump(p *relay) {
	defer func() {
		if cause := recover(); cause != nil {
			r.l.e.panics.Add(1)
			r.l.e.log.Error("relay panicked", "panic", fmt.Sprint(cause), "stack", string(debug.Stack()))
			p.finish(ErrPanicked)
		}
	}()
	p.scheduled = false
	p.run()
}

func (r *reactor) flushAll() {
	for i := 0; i < len(r.dirty); i++ {
		c := r.dirty[i]
		r.dirty[i] = nil
		c.dirty = false
		c.flush()
	}
	r.dirty = r.dirty[:0]
}

// add takes a descriptor into the loop.
func (r *reactor) add(fd int, remote netip.AddrPort) (*Conn, error) {
	c := &Conn{l: r.l, fd: fd, remote: remote, id: r.l.newID(fd)}
	c.stall.conn = c
	if err := epollControl(r.epfd, unix.EPOLL_CTL_ADD, fd, streamEvents, uint64(fd)|uint64(uint32(c.id))<<32); err != nil {
		return nil, err
	}
	for fd >= len(r.conns) {
		r.conns = append(r.conns, make([]*Conn, max(256, len(r.conns)))...)
	}
	r.conns[fd] = c
	r.l.load.Add(1)
	return c, nil
}

// newID packs loop, descriptor and a sequence number that is never 0.
func (l *loop) newID(fd int) uint64 {
	seq := l.e.sequence.Add(1)
	for seq == 0 {
		seq = l.e.sequence.Add(1)
	}
	return uint64(l.index)<<56 | uint64(fd&0xffffff)<<32 | uint64(seq)
}

func (l *loop) find(id uint64) *Conn {
	if l.r == nil {
		return l.conns[id]
	}
	fd := int(id >> 32 & 0xffffff)
	if fd < len(l.r.conns) && l.r.conns[fd] != nil && l.r.conns[fd].id == id {
		return l.r.conns[fd]
	}
	return nil
}

func (l *loop) eachConn(f func(*Conn)) {
	if l.r == nil {
		for _, c := range l.conns {
			f(c)
		}
		return
	}
	for _, c := range l.r.conns {
		if c != nil {
			f(c)
		}
	}
}

func (e *Engine) listenReactor(ln *Listener, fd int) error {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("duplicate: %w", err)
	}
	if err := unix.SetNonblock(own, true); err != nil {
		sysClose(own)
		return fmt.Errorf("make non-blocking: %w", err)
	}
	tune(own) // inherited by what is accepted
	ln.addr, _ = sysName(unix.SYS_GETSOCKNAME, own)
	ln.fd, ln.r = own, e.leastLoaded(nil).r
	ln.r.l.load.Add(1)
	ln.r.post(func(l *loop) {
		ln.mu.Lock()
		defer ln.mu.Unlock()
		if ln.closed {
			return
		}
		if err := epollControl(l.r.epfd, unix.EPOLL_CTL_ADD, own, unix.EPOLLIN|unix.EPOLLET, uint64(own)); err != nil {
			e.log.Error("cannot watch listener", "address", ln.addr, "error", err)
			return
		}
		l.r.listeners[own] = ln
	})
	return nil
}

// unlisten closes the descriptor at once and lets the loop forget it.
func (r *reactor) unlisten(fd int) {
	_ = epollControl(r.epfd, unix.EPOLL_CTL_DEL, fd, 0, 0)
	sysClose(fd)
	r.l.load.Add(-1)
	r.post(func(l *loop) {
		if ln := l.r.listeners[fd]; ln != nil && ln.isClosed() {
			delete(l.r.listeners, fd)
		}
	})
}

func (ln *Listener) isClosed() bool {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	return ln.closed
}

func (r *reactor) accept() {
	due := r.accepting
	r.accepting = nil
	for _, ln := range due {
		if r.acceptSome(ln) {
			r.accepting = append(r.accepting, ln)
		}
	}
}

// acceptSome says whether there may be more to accept.
func (r *reactor) acceptSome(ln *Listener) bool {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	for range acceptBatch {
		if ln.closed || ln.paused || !acceptable(ln.fd) {
			return false
		}
		fd, remote, e := sysAccept(ln.fd)
		switch e {
		case 0:
			ln.starved = false
			r.place(ln, fd, remote)
		case syscall.EAGAIN:
			return false
		case syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM:
			// The queue stays full, so there would be no end of trying.
			ln.cannotAccept(e)
			ln.paused = true
			r.l.spawn(func(t *Task) {
				_ = t.Sleep(acceptPause)
				ln.resume()
				r.accepting = append(r.accepting, ln)
			})
			return false
		}
		// Anything else concerns the connection that was to be accepted (accept(2), "Error handling").
	}
	return true
}

// cannotAccept logs the first of a series of failures.
func (ln *Listener) cannotAccept(err error) {
	if !ln.starved {
		ln.starved = true
		ln.e.log.Warn("cannot accept; trying again", "address", ln.addr, "error", err, "every", acceptPause)
	}
}

func (ln *Listener) resume() {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	ln.paused = false
}

// place gives an accepted connection to the least loaded loop.
func (r *reactor) place(ln *Listener, fd int, remote netip.AddrPort) {
	e := r.l.e
	if !e.admit() {
		sysClose(fd)
		return
	}
	to := e.leastLoaded(r.l)
	if to == r.l {
		to.serve(ln.h, fd, remote)
		return
	}
	to.load.Add(2) // its connection and its task, at once, else a burst would all go to one loop
	if !to.r.post(func(l *loop) {
		l.serve(ln.h, fd, remote)
		l.load.Add(-2)
	}) {
		sysClose(fd)
		e.connGone()
	}
}

func (l *loop) serve(h func(*Task, *Conn), fd int, remote netip.AddrPort) {
	if l.stopping {
		sysClose(fd)
		l.e.connGone()
		return
	}
	c, err := l.r.add(fd, remote)
	if err != nil {
		l.e.log.Warn("cannot watch connection", "remote", remote, "error", err)
		sysClose(fd)
		l.e.connGone()
		return
	}
	l.e.accepted.Add(1)
	t := l.spawn(func(t *Task) { h(t, c) })
	t.own(c)
}
