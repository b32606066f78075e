// SPDX-License-Identifier: Apache-2.0

package netloop

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrClosed is what every parked task and every later call gets once Engine.Close was called.
	ErrClosed = errors.New("engine closed")
	// ErrKilled ends the connections of Engine.Kill calls that name no cause.
	ErrKilled = errors.New("connection killed")
	// ErrWriteLimit ends a connection whose writer never waited for its output to be sent.
	ErrWriteLimit = errors.New("write buffer limit exceeded")
	// ErrStalled ends a connection whose peer took no output for Options.StallTimeout.
	ErrStalled = errors.New("peer stopped reading")
	// ErrBusy is a second Read or AwaitRead while another task is in one.
	ErrBusy = errors.New("connection is being read by another task")
	// ErrPanicked ends the connections of a task that panicked, and a Relay in which something did.
	ErrPanicked = errors.New("task panicked")
	// ErrTooManyConns refuses a connection over Options.MaxConns.
	ErrTooManyConns = errors.New("too many connections")
)

// Options bound an Engine. Zero values take the defaults.
type Options struct {
	Loops          int           // number of loops; 0: GOMAXPROCS as it was at the first New
	Goroutines     bool          // run on package net and goroutines instead of epoll
	WriteLimit     int           // bytes; where Relay waits for output to be sent; a quarter of Write's hard bound (256 KiB)
	TurnBudget     int           // bytes that one connection may read before the others of its loop have their turn (64 KiB)
	MaxConns       int           // connections of the engine, both accepted and adopted (131072)
	ConnectTimeout time.Duration // how long Task.Adopt waits for a connection to be made (10 s)
	StallTimeout   time.Duration // how long output may wait without the peer taking any (60 s)
	Logger         *slog.Logger  // panics and accept errors; nil discards
}

// Engine runs tasks and the connections they own.
type Engine struct {
	opt   Options
	log   *slog.Logger
	start time.Time // zero of the engine's clock
	loops []*loop

	conns, tasks                       atomic.Int64
	accepted, refused, panics, stalled atomic.Uint64
	killed                             atomic.Uint64
	sequence                           atomic.Uint32
	draining                           atomic.Bool
	quiet                              chan struct{} // a hint for Shutdown that a last task or connection ended

	mu        sync.Mutex
	listeners map[*Listener]struct{}
	closing   bool
	wg        sync.WaitGroup // loops, and on the goroutine engine everything that runs
	closed    chan struct{}
}

// Stats are the counts of an Engine.
type Stats struct {
	Loops        int
	Conns        int    // live, including those closed with output still to be sent
	Tasks        int    // live
	Accepted     uint64 // since New, likewise the following
	Refused      uint64 // connections over MaxConns
	Panics       uint64 // tasks ended by a panic
	Stalled      uint64 // connections cut because the peer took no output
	Killed       uint64 // connections ended by Kill
	BytesRead    uint64
	BytesWritten uint64
}

var cores = sync.OnceValue(func() int { return runtime.GOMAXPROCS(0) })

// running are the loops of all epoll engines of the process.
var running struct {
	sync.Mutex
	loops int
}

// reserveSlots counts loops that start. It sets GOMAXPROCS even where that is high enough: until a process has done so once, the
// runtime lowers it by itself when the process gets fewer processors.
func reserveSlots(loops int) {
	running.Lock()
	defer running.Unlock()
	running.loops += loops
	runtime.GOMAXPROCS(max(running.loops+1, runtime.GOMAXPROCS(0)))
}

// releaseSlots counts loops that have ended. GOMAXPROCS stays: setting it stops the world.
func releaseSlots(loops int) {
	running.Lock()
	defer running.Unlock()
	running.loops -= loops
}

// New starts an engine. On the epoll engine it raises GOMAXPROCS of the process to its loops + 1, those of other engines
// included: a waiting loop keeps its scheduler slot for a few milliseconds, and without a spare one every goroutine beside
// the loops would wait as long.
func New(opt Options) (*Engine, error) {
	if opt.Loops == 0 {
		opt.Loops = cores()
	}
	if opt.Loops < 0 || opt.Loops > maxLoops {
		return nil, fmt.Errorf("start engine: %d loops, want 1 to %d", opt.Loops, maxLoops)
	}
	for _, d := range []struct {
		name  string
		value *int
		def   int
	}{{"WriteLimit", &opt.WriteLimit, 256 << 10}, {"TurnBudget", &opt.TurnBudget, 64 << 10}, {"MaxConns", &opt.MaxConns, 1 << 17}} {
		if *d.value < 0 {
			return nil, fmt.Errorf("start engine: %s %d is negative", d.name, *d.value)
		}
		if *d.value == 0 {
			*d.value = d.def
		}
	}
	if opt.ConnectTimeout <= 0 {
		opt.ConnectTimeout = 10 * time.Second
	}
	if opt.StallTimeout <= 0 {
		opt.StallTimeout = time.Minute
	}
	e := &Engine{opt: opt, log: opt.Logger, start: time.Now(), listeners: map[*Listener]struct{}{},
		quiet: make(chan struct{}, 1), closed: make(chan struct{})}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	for i := range opt.Loops {
		l := &loop{e: e, index: i, local: map[any]any{}}
		if opt.Goroutines {
			l.conns = map[uint64]*Conn{}
		} else if err := l.startReactor(); err != nil {
			for _, started := range e.loops {
				started.r.release()
			}
			return nil, fmt.Errorf("start loop %d: %w", i, err)
		}
		e.loops = append(e.loops, l)
	}
	if !opt.Goroutines {
		reserveSlots(opt.Loops)
		for _, l := range e.loops {
			e.wg.Go(l.r.run)
		}
	}
	return e, nil
}

const maxLoops = 256 // eight bits of a connection's ID

// Loops is the number of loops; they are numbered from 0.
func (e *Engine) Loops() int { return len(e.loops) }

// Listener is a socket that an engine accepts from.
type Listener struct {
	e    *Engine
	h    func(*Task, *Conn)
	addr netip.AddrPort
	net  net.Listener // goroutine engine

	mu      sync.Mutex // held while accepting, so that Close returns with the descriptor closed and not in use
	closed  bool
	paused  bool // not accepting for a while
	starved bool // the last accept failed for want of descriptors or memory
	fd      int
	r       *reactor
}

// Serve accepts from the listening socket fd, which it duplicates and makes non-blocking, and runs h for each connection in
// a task of the least loaded loop. When h returns, the connections its task owns are closed.
func (e *Engine) Serve(fd int, h func(*Task, *Conn)) (*Listener, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closing || e.draining.Load() {
		return nil, fmt.Errorf("serve descriptor %d: %w", fd, ErrClosed)
	}
	if n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil {
		return nil, fmt.Errorf("serve descriptor %d: %w", fd, err)
	} else if n == 0 {
		return nil, fmt.Errorf("serve descriptor %d: not a listening socket", fd)
	}
	ln := &Listener{e: e, h: h, fd: -1}
	open := e.listenPlain
	if !e.opt.Goroutines {
		open = e.listenReactor
	}
	if err := open(ln, fd); err != nil {
		return nil, fmt.Errorf("serve descriptor %d: %w", fd, err)
	}
	e.listeners[ln] = struct{}{}
	return ln, nil
}

// Addr is the address listened on; the zero AddrPort for families other than IP.
func (ln *Listener) Addr() netip.AddrPort { return ln.addr }

// Close stops accepting. When it returns the engine's descriptor is closed; connections already accepted live on. The caller's
// own descriptor, if still open, keeps the socket listening.
func (ln *Listener) Close() error {
	ln.e.mu.Lock()
	delete(ln.e.listeners, ln)
	ln.e.mu.Unlock()
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if ln.closed {
		return net.ErrClosed
	}
	ln.closed = true
	if ln.net != nil {
		return ln.net.Close()
	}
	ln.r.unlisten(ln.fd)
	return nil
}

// Go runs f as a task of the least loaded loop. After Close it does nothing.
func (e *Engine) Go(f func(*Task)) {
	l := e.leastLoaded(nil)
	l.load.Add(1) // at once, else a burst would all go to one loop
	l.system(func(l *loop) {
		l.load.Add(-1)
		if !l.stopping {
			l.spawn(f)
		}
	})
}

// Post runs f as a task of the given loop (0 to Loops()-1). It may be called from any goroutine and task, never runs f before
// it returns, and does nothing after Close.
func (e *Engine) Post(loop int, f func(*Task)) { e.loops[loop].post(f) }

// Kill aborts the connection with that ID, dropping unsent output and resetting the peer; its tasks get cause (nil: ErrKilled)
// from their next or current call. It may be called from any goroutine and does nothing if the connection is gone.
func (e *Engine) Kill(id uint64, cause error) {
	if cause == nil {
		cause = ErrKilled
	}
	if n := int(id >> 56); n < len(e.loops) {
		e.loops[n].system(func(l *loop) {
			if c := l.find(id); c != nil {
				e.killed.Add(1)
				c.abort(cause)
			}
		})
	}
}

// Stats is a snapshot; the counts are not taken at one instant.
func (e *Engine) Stats() Stats {
	s := Stats{Loops: len(e.loops), Conns: int(e.conns.Load()), Tasks: int(e.tasks.Load()), Accepted: e.accepted.Load(),
		Refused: e.refused.Load(), Panics: e.panics.Load(), Stalled: e.stalled.Load(), Killed: e.killed.Load()}
	for _, l := range e.loops {
		s.BytesRead += l.bytesRead.Load()
		s.BytesWritten += l.bytesWritten.Load()
	}
	return s
}

// Draining says whether Shutdown or Close was called; code that serves one request after another ends after the current one.
func (e *Engine) Draining() bool { return e.draining.Load() }

// Shutdown closes the listeners and the connections marked by Conn.SetIdle, waits until all tasks and connections have ended or
// ctx has, then closes the engine. It returns ctx's error if something was cut off.
func (e *Engine) Shutdown(ctx context.Context) error {
	e.draining.Store(true)
	e.closeListeners()
	for _, l := range e.loops {
		l.system(func(l *loop) { l.eachConn((*Conn).closeIdle) })
	}
	var err error
	for err == nil && (e.tasks.Load() > 0 || e.conns.Load() > 0) {
		select {
		case <-e.quiet:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	return errors.Join(err, e.Close())
}

// Close ends everything: parked tasks get ErrClosed, connections are aborted. It returns when every task has returned, so it must
// not be called from one, and waits for functions that are in Task.Block. A second call returns ErrClosed.
func (e *Engine) Close() error {
	e.draining.Store(true)
	e.mu.Lock()
	if e.closing {
		e.mu.Unlock()
		<-e.closed
		return ErrClosed
	}
	e.closing = true
	e.mu.Unlock()
	e.closeListeners()
	for _, l := range e.loops {
		if l.r != nil {
			l.r.post((*loop).stop)
			continue
		}
		l.mu.Lock()
		l.stop()
		l.mu.Unlock()
	}
	e.wg.Wait()
	if !e.opt.Goroutines {
		releaseSlots(len(e.loops))
	}
	close(e.closed)
	return nil
}

func (e *Engine) closeListeners() {
	e.mu.Lock()
	all := make([]*Listener, 0, len(e.listeners))
	for ln := range e.listeners {
		all = append(all, ln)
	}
	e.mu.Unlock()
	for _, ln := range all {
		_ = ln.Close()
	}
}

// leastLoaded prefers near, when it is among the least loaded, because work for it needs no waking.
func (e *Engine) leastLoaded(near *loop) *loop {
	best := near
	if best == nil {
		best = e.loops[0]
	}
	for _, l := range e.loops {
		if l.load.Load() < best.load.Load() {
			best = l
		}
	}
	return best
}

// admit reserves a connection.
func (e *Engine) admit() bool {
	if e.conns.Add(1) > int64(e.opt.MaxConns) {
		e.connGone()
		e.refused.Add(1)
		return false
	}
	return true
}

func (e *Engine) connGone() {
	if e.conns.Add(-1) == 0 && e.draining.Load() {
		e.hint()
	}
}

func (e *Engine) taskGone() {
	if e.tasks.Add(-1) == 0 && e.draining.Load() {
		e.hint()
	}
}

func (e *Engine) hint() {
	select {
	case e.quiet <- struct{}{}:
	default:
	}
}

// at converts to the engine's clock: nanoseconds since start, never 0 for a time that is set.
func (e *Engine) at(t time.Time) int64 {
	if t.IsZero() {
		return noDeadline
	}
	if d := int64(t.Sub(e.start)); d != noDeadline {
		return d
	}
	return 1
}

func (e *Engine) after(d time.Duration) int64 { return e.at(time.Now().Add(d)) }

func (e *Engine) clock() int64 { return int64(time.Since(e.start)) }
