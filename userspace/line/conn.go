// SPDX-License-Identifier: Apache-2.0

package line

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"

	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

// Defaults of Options.
const (
	DefaultWorkers = 64
	DefaultQueue   = 4096
	maxQueuedBytes = 8 << 20 // of messages in one queue
	maxPending     = 1 << 16 // calls without an answer
)

// Options configure a Conn.
type Options struct {
	// Handle is called with each message that is not a reply, one after the
	// other in the order of arrival, or, where Concurrent says so, beside
	// others. Descriptors that it does not take are closed when it returns. An
	// ordered Handle must not wait for an answer of the other end to more
	// than its own bounded time: what arrives meanwhile waits.
	Handle func(context.Context, *Incoming)
	// Concurrent says which requests need no order; nil: none.
	Concurrent func(*linepb.Message) bool
	Workers    int // concurrent requests handled at once
	// Queue bounds what waits: ordered messages, concurrent requests (beyond,
	// "overload" is answered), and messages to be sent (ErrBusy).
	Queue  int
	Logger *slog.Logger
}

// Conn is one end of the line with calls in both directions. Its methods may
// be used from any goroutine, those that do not wait also from an event loop.
type Conn struct {
	s      *Socket
	opt    Options
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	err     error // why the line ended; set once, before done is closed
	nextID  uint64
	pending map[uint64]func(*linepb.Message, []int, error)

	out     outbox
	ordered inbox
	workers workers
}

// NewConn starts calls and dispatch on s, which it takes over.
func NewConn(s *Socket, opt Options) *Conn {
	if opt.Workers <= 0 {
		opt.Workers = DefaultWorkers
	}
	if opt.Queue <= 0 {
		opt.Queue = DefaultQueue
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Conn{
		s: s, opt: opt,
		done:    make(chan struct{}),
		pending: make(map[uint64]func(*linepb.Message, []int, error)),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.out.wake = make(chan struct{}, 1)
	c.ordered.init()
	go c.read()
	go c.write()
	go c.handleOrdered()
	return c
}

// Done is closed when the line has ended; Err then says why.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err returns why the line ended, nil while it lives. The other end's going
// away is ErrClosed.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the line. Calls without an answer fail with ErrClosed.
func (c *Conn) Close() error {
	c.fail(ErrClosed)
	return nil
}

// Notify sends m, which asks for no answer, and duplicates of fds, which stay
// the caller's. It never waits: ErrBusy says that the other end does not keep
// up. Messages arrive in the order in which they were given.
func (c *Conn) Notify(m *linepb.Message, fds ...int) error {
	m.Id, m.Reply = 0, false
	return c.send(m, fds)
}

// Go sends the request m like Notify and returns; done is called once, with
// the answer or with why there is none, on a goroutine of the Conn, where it
// must not wait. The descriptors belong to done. m may be used again as soon
// as Go has returned.
func (c *Conn) Go(m *linepb.Message, done func(*linepb.Message, []int, error), fds ...int) {
	if _, err := c.start(m, done, fds); err != nil {
		done(nil, nil, err)
	}
}

// Call sends the request m and waits for the answer, whose descriptors are
// the caller's. An answer that comes after ctx has ended is dropped and its
// descriptors are closed.
func (c *Conn) Call(ctx context.Context, m *linepb.Message, fds ...int) (*linepb.Message, []int, error) {
	type answer struct {
		m   *linepb.Message
		fds []int
		err error
	}
	ch := make(chan answer, 1)
	id, err := c.start(m, func(m *linepb.Message, fds []int, err error) { ch <- answer{m, fds, err} }, fds)
	if err != nil {
		return nil, nil, err
	}
	select {
	case a := <-ch:
		return a.m, a.fds, a.err
	case <-ctx.Done():
	}
	if c.take(id) == nil { // it is being answered right now
		a := <-ch
		return a.m, a.fds, a.err
	}
	return nil, nil, fmt.Errorf("call on line: %w", context.Cause(ctx))
}

func (c *Conn) start(m *linepb.Message, done func(*linepb.Message, []int, error), fds []int) (uint64, error) {
	c.mu.Lock()
	if c.err != nil {
		err := c.err
		c.mu.Unlock()
		return 0, err
	}
	if len(c.pending) >= maxPending {
		c.mu.Unlock()
		return 0, ErrBusy
	}
	c.nextID++
	id := c.nextID
	c.pending[id] = done
	c.mu.Unlock()
	m.Id, m.Reply = id, false
	if err := c.send(m, fds); err != nil {
		if c.take(id) == nil { // fail has called done
			return 0, nil
		}
		return 0, err
	}
	return id, nil
}

// take removes a call; whoever gets it not nil answers it.
func (c *Conn) take(id uint64) func(*linepb.Message, []int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	done := c.pending[id]
	delete(c.pending, id)
	return done
}

// fail ends the line once.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	pending := c.pending
	c.pending = nil
	c.mu.Unlock()
	c.s.Close()
	c.cancel()
	c.out.close()
	c.ordered.close()
	c.workers.drop()
	close(c.done)
	for _, done := range pending {
		done(nil, nil, ErrClosed)
	}
}

// read is the one receiver.
func (c *Conn) read() {
	for {
		m, fds, err := c.s.Recv()
		switch {
		case err != nil && m != nil && m.Reply && errors.Is(err, ErrDescriptors):
			if !c.answer(m.Id, nil, nil, err) {
				return
			}
		case err != nil:
			c.fail(err)
			return
		case m.Reply:
			id := m.Id
			if m.Error != "" {
				m, err = nil, fmt.Errorf("refused by the other end: %s", m.Error)
			}
			if !c.answer(id, m, fds, err) {
				return
			}
		case m.Id != 0 && c.opt.Concurrent != nil && c.opt.Concurrent(m):
			c.spawn(m, fds)
		default:
			if !c.ordered.put(newIncoming(c, m, fds), c.opt.Queue) {
				closeAll(fds)
				return
			}
		}
	}
}

// answer gives a reply to its call. A reply to what was never asked ends the
// line.
func (c *Conn) answer(id uint64, m *linepb.Message, fds []int, err error) bool {
	if done := c.take(id); done != nil {
		done(m, fds, err)
		return true
	}
	closeAll(fds)
	c.mu.Lock()
	asked := id != 0 && id <= c.nextID
	c.mu.Unlock()
	if !asked {
		c.fail(fmt.Errorf("%w: a reply to what was not asked", ErrMalformed))
	}
	return asked
}

func (c *Conn) spawn(m *linepb.Message, fds []int) {
	in := newIncoming(c, m, fds)
	w := &c.workers
	w.mu.Lock()
	switch {
	case w.running < c.opt.Workers:
		w.running++
		w.mu.Unlock()
		go c.work(in)
		return
	case len(w.waiting) < c.opt.Queue && w.bytes < maxQueuedBytes:
		w.waiting = append(w.waiting, in)
		w.bytes += in.size
		w.mu.Unlock()
		return
	}
	w.mu.Unlock()
	in.Refuse("overload")
	in.close()
}

// work handles in and then what waits.
func (c *Conn) work(in *Incoming) {
	for in != nil {
		c.handle(in)
		in = c.workers.next()
	}
}

func (c *Conn) handleOrdered() {
	for {
		in := c.ordered.get()
		if in == nil {
			return
		}
		c.handle(in)
	}
}

// handle runs the handler; what it panics with is logged and answered, so
// that one message cannot end the process.
func (c *Conn) handle(in *Incoming) {
	defer in.close()
	defer func() {
		if r := recover(); r != nil {
			c.opt.Logger.Error("line handler panicked", "body", fmt.Sprintf("%T", in.Message.Body), "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
			in.Refuse("internal")
		}
	}()
	if c.opt.Handle == nil {
		in.Refuse("nothing is asked for here")
		return
	}
	c.opt.Handle(c.ctx, in)
	in.Refuse("not answered") // no effect after Reply, or where it was kept
}
