// SPDX-License-Identifier: Apache-2.0

package line

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

// Defaults of Options.
const (
	DefaultWorkers = 64
	DefaultQueue   = 1024
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
	Workers    int // concurrent requests handled at once; beyond, "overload" is answered
	Queue      int // messages waiting, in each direction
	Logger     *slog.Logger
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
	slots   chan struct{}
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
		slots:   make(chan struct{}, opt.Workers),
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
	select {
	case c.slots <- struct{}{}:
	default:
		in.Refuse("overload")
		in.close()
		return
	}
	go func() {
		defer func() { <-c.slots }()
		c.handle(in)
	}()
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

// Incoming is a message from the other end.
type Incoming struct {
	Message *linepb.Message
	conn    *Conn
	mu      sync.Mutex
	fds     []int
	replied bool
	later   bool
	size    int // as the queue counts it
}

func newIncoming(c *Conn, m *linepb.Message, fds []int) *Incoming {
	return &Incoming{Message: m, conn: c, fds: fds, size: proto.Size(m) + 64}
}

// Descriptors returns how many descriptors have not been taken.
func (in *Incoming) Descriptors() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.fds)
}

// TakeFDs returns the descriptors, which become the caller's.
func (in *Incoming) TakeFDs() []int {
	in.mu.Lock()
	defer in.mu.Unlock()
	fds := in.fds
	in.fds = nil
	return fds
}

// Later says that Reply will be called after the handler has returned.
func (in *Incoming) Later() {
	in.mu.Lock()
	in.later = true
	in.mu.Unlock()
}

// Reply answers a request, once; m may hold nothing but a body. A message
// that asked for no answer gets none. fds stay the caller's.
func (in *Incoming) Reply(m *linepb.Message, fds ...int) error {
	in.mu.Lock()
	first := !in.replied
	in.replied = true
	in.mu.Unlock()
	if in.Message.Id == 0 || !first {
		return nil
	}
	m.Id, m.Reply = in.Message.Id, true
	return in.conn.send(m, fds)
}

// Refuse answers a request with an error in place of a body, unless it has
// been answered or will be later.
func (in *Incoming) Refuse(why string) {
	in.mu.Lock()
	skip := in.later || in.replied
	in.mu.Unlock()
	if skip {
		return
	}
	if err := in.Reply(&linepb.Message{Error: why}); err != nil && !errors.Is(err, ErrClosed) {
		in.conn.opt.Logger.Warn("line request not answered", "body", fmt.Sprintf("%T", in.Message.Body), "err", err)
	}
}

func (in *Incoming) close() { closeAll(in.TakeFDs()) }

// inbox holds the ordered messages that wait for the handler. When it is full
// the reader waits, and with it the other end: nothing is lost.
type inbox struct {
	mu     sync.Mutex
	change *sync.Cond
	items  []*Incoming
	bytes  int
	closed bool
}

func (q *inbox) init() { q.change = sync.NewCond(&q.mu) }

func (q *inbox) put(in *Incoming, limit int) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.closed && len(q.items) > 0 && (len(q.items) >= limit || q.bytes >= maxQueuedBytes) {
		q.change.Wait()
	}
	if q.closed {
		return false
	}
	q.items = append(q.items, in)
	q.bytes += in.size
	q.change.Broadcast()
	return true
}

func (q *inbox) get() *Incoming {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.closed && len(q.items) == 0 {
		q.change.Wait()
	}
	if q.closed {
		return nil
	}
	in := q.items[0]
	q.items[0] = nil
	q.items = q.items[1:]
	q.bytes -= in.size
	q.change.Broadcast()
	return in
}

func (q *inbox) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	for _, in := range q.items {
		in.close()
	}
	q.items = nil
	q.change.Broadcast()
}

// outbox holds datagrams that did not fit into the socket.
type outbox struct {
	mu     sync.Mutex
	items  []datagram
	bytes  int
	closed bool
	wake   chan struct{}
	// sending: the first item is being sent; its descriptors are the
	// sender's to close.
	sending bool
}

type datagram struct {
	b   []byte
	fds []int // duplicates of ours
}

// send sends m now if nothing waits before it and the socket has room, and
// queues it otherwise.
func (c *Conn) send(m *linepb.Message, fds []int) error {
	b, fds, release, err := prepare(m, fds)
	if err != nil {
		return err
	}
	defer release()
	o := &c.out
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return ErrClosed
	}
	if len(o.items) == 0 {
		sent, err := c.s.trySend(b, fds)
		if sent || err != nil {
			return err
		}
	}
	full := len(o.items) >= c.opt.Queue || o.bytes+len(b) > maxQueuedBytes
	if full && !m.Reply {
		return ErrBusy
	}
	if full && len(o.items) >= 2*c.opt.Queue {
		// Whoever asks and reads no answer is not served any longer; a lost
		// answer would leave its caller waiting for ever.
		go c.fail(fmt.Errorf("%w: its answers are not read", ErrBusy))
		return ErrBusy
	}
	own, err := duplicate(fds)
	if err != nil {
		return err
	}
	o.items = append(o.items, datagram{b, own})
	o.bytes += len(b)
	select {
	case o.wake <- struct{}{}:
	default:
	}
	return nil
}

// write sends what was queued, waiting for room.
func (c *Conn) write() {
	for {
		select {
		case <-c.out.wake:
		case <-c.done:
			return
		}
		for {
			d, ok := c.out.first()
			if !ok {
				break
			}
			// first stays in the queue meanwhile, so that nothing overtakes it.
			_, _, err := c.s.conn.WriteMsgUnix(d.b, rights(d.fds), nil)
			c.out.drop(d)
			if err != nil {
				c.fail(sendError(err))
				return
			}
		}
	}
}

func (o *outbox) first() (datagram, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed || len(o.items) == 0 {
		return datagram{}, false
	}
	o.sending = true
	return o.items[0], true
}

func (o *outbox) drop(d datagram) {
	closeAll(d.fds)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sending = false
	if o.closed {
		return
	}
	o.items[0] = datagram{}
	o.items = o.items[1:]
	o.bytes -= len(d.b)
}

func (o *outbox) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	for i, d := range o.items {
		if i > 0 || !o.sending {
			closeAll(d.fds)
		}
	}
	o.items = nil
}

func duplicate(fds []int) ([]int, error) {
	var own []int
	for _, fd := range fds {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			closeAll(own)
			return nil, fmt.Errorf("duplicate descriptor for line: %w", err)
		}
		own = append(own, d)
	}
	return own, nil
}

// Orphan is what the userspace process does when the agent is gone: an
// orphan that kept its listeners would go on serving (a SOCKMAP entry lives
// as long as its socket), under rules that nobody can change any more.
type Orphan struct {
	Listeners   func()        // close the listeners; called at once
	Connections func()        // cut what still lives; called after Grace
	Draining    func() bool   // told to drain: connections then end by themselves
	Grace       time.Duration // 5 s where it is 0
}

// Watch waits for the end of c and acts it out; it returns when everything
// has been closed, or when the connections may end by themselves.
func (o Orphan) Watch(c *Conn) {
	<-c.Done()
	o.Listeners()
	if o.Draining != nil && o.Draining() {
		return
	}
	if o.Grace == 0 {
		o.Grace = 5 * time.Second
	}
	time.Sleep(o.Grace)
	o.Connections()
}
