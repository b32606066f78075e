// SPDX-License-Identifier: Apache-2.0

package line

import (
	"errors"
	"fmt"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

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
