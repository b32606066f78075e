// SPDX-License-Identifier: Apache-2.0

package line

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

// workers are the goroutines that handle concurrent requests, and what waits
// for one of them.
type workers struct {
	mu      sync.Mutex
	running int
	waiting []*Incoming
	bytes   int
}

// next returns what waits longest, or, where nothing does, nil: then the
// caller is no worker any more.
func (w *workers) next() *Incoming {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.waiting) == 0 {
		w.running--
		w.waiting = nil
		return nil
	}
	in := w.waiting[0]
	w.waiting[0] = nil
	w.waiting = w.waiting[1:]
	w.bytes -= in.size
	return in
}

// drop closes the descriptors of what waits; the workers find nothing more.
func (w *workers) drop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, in := range w.waiting {
		in.close()
	}
	w.waiting, w.bytes = nil, 0
}

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
