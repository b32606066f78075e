// SPDX-License-Identifier: Apache-2.0

package line

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

// Socket is one end of the line: whole messages, in order, without calls.
// Send may be used from any goroutine, Recv from one.
type Socket struct {
	conn *net.UnixConn
	raw  syscall.RawConn
	buf  []byte // of the one receiver
	oob  []byte
	// sealed says whether messages in a sealed memfd are taken.
	sealed bool
}

// Pair makes both ends of a line. The files are close-on-exec; a child gets
// its end as an extra file.
func Pair() (agent, userspace *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make line: %w", err)
	}
	for _, fd := range fds {
		if err := setSendBuffer(fd); err != nil {
			closeAll(fds[:])
			return nil, nil, err
		}
	}
	return os.NewFile(uintptr(fds[0]), "line:agent"), os.NewFile(uintptr(fds[1]), "line:userspace"), nil
}

// setSendBuffer makes room for the largest datagram, which must fit whole. The
// kernel doubles the value, keeps some of it for itself, and, without
// CAP_NET_ADMIN, caps it at net.core.wmem_max.
func setSendBuffer(fd int) error {
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, MaxMessage)
	if err == unix.EPERM {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, MaxMessage)
	}
	if err != nil {
		return fmt.Errorf("set send buffer of line: %w", err)
	}
	got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		return fmt.Errorf("read send buffer of line: %w", err)
	}
	if got < MaxMessage+4096 {
		return fmt.Errorf("set send buffer of line: it is %d bytes; raise net.core.wmem_max to %d", got, MaxMessage)
	}
	return nil
}

// NewSocket takes over f, one end of a line, and closes it on error. Only
// the end that trusts the other to hold memory (userspace trusts the agent)
// sets sealed.
func NewSocket(f *os.File, sealed bool) (*Socket, error) {
	defer f.Close() // FileConn has a duplicate
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("open line: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("open line: not a unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("open line: %w", err)
	}
	kind := 0
	ctl := raw.Control(func(fd uintptr) { kind, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE) })
	err = errors.Join(ctl, err)
	if err == nil && kind != unix.SOCK_SEQPACKET {
		err = errors.New("not a SOCK_SEQPACKET socket")
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("open line: %w", err)
	}
	return &Socket{
		conn: u, raw: raw, sealed: sealed,
		buf: make([]byte, MaxMessage+1),
		oob: make([]byte, unix.CmsgSpace(4*253)),
	}, nil
}

// FromFD takes over the inherited descriptor fd, as the userspace process
// does with 3, and marks it close-on-exec.
func FromFD(fd int) (*Socket, error) {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
		return nil, fmt.Errorf("open line on descriptor %d: %w; this process is started by the agent", fd, err)
	}
	return NewSocket(os.NewFile(uintptr(fd), "line"), true)
}

// Send sends m and duplicates of fds, which stay the caller's. It waits
// while the other end does not read.
func (s *Socket) Send(m *linepb.Message, fds ...int) error {
	b, send, release, err := prepare(m, fds)
	if err != nil {
		return err
	}
	defer release()
	if _, _, err := s.conn.WriteMsgUnix(b, rights(send), nil); err != nil {
		return sendError(err)
	}
	return nil
}

// trySend sends one datagram without waiting.
func (s *Socket) trySend(b []byte, fds []int) (sent bool, err error) {
	ctl := s.raw.Control(func(fd uintptr) {
		for {
			_, err = unix.SendmsgN(int(fd), b, rights(fds), nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			if err != unix.EINTR {
				return
			}
		}
	})
	switch {
	case ctl != nil:
		return false, ErrClosed
	case err == unix.EAGAIN:
		return false, nil
	case err != nil:
		return false, sendError(err)
	}
	return true, nil
}

// Recv waits for one message. The descriptors are the caller's. A malformed
// message is an error, and every descriptor that came with it is closed; the
// socket can be read on.
func (s *Socket) Recv() (*linepb.Message, []int, error) {
	n, oobn, flags, _, err := s.conn.ReadMsgUnix(s.buf, s.oob)
	// Descriptors can come with an empty datagram, which reads like the end.
	fds, perr := parseRights(s.oob[:max(oobn, 0)])
	if err != nil {
		closeAll(fds)
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET) {
			return nil, nil, ErrClosed
		}
		return nil, nil, fmt.Errorf("receive on line: %w", err)
	}
	if flags&unix.MSG_TRUNC != 0 || n > MaxMessage {
		closeAll(fds)
		return nil, nil, ErrTruncated
	}
	if flags&unix.MSG_CTRUNC != 0 || perr != nil || len(fds) > MaxDescriptors {
		// Decoded all the same: a call whose descriptor was lost (this
		// process has too many) is failed, not left waiting.
		closeAll(fds)
		m, err := Decode(s.buf[:n], 0)
		if err == nil || errors.Is(err, ErrDescriptors) {
			return m, nil, fmt.Errorf("%w: some were lost on the way", ErrDescriptors)
		}
		return nil, nil, err
	}
	m, err := Decode(s.buf[:n], len(fds))
	if err == nil && m.Sealed {
		m, fds, err = s.unseal(m, fds)
	}
	if err != nil {
		closeAll(fds)
		return m, nil, err
	}
	return m, fds, nil
}

// unseal reads the message that a sealed memfd holds.
func (s *Socket) unseal(outer *linepb.Message, fds []int) (*linepb.Message, []int, error) {
	defer closeAll(fds)
	if !s.sealed {
		return nil, nil, fmt.Errorf("%w: this end takes no sealed message", ErrMalformed)
	}
	b, err := ReadSealed(fds[0])
	if err != nil {
		return nil, nil, err
	}
	m, err := Decode(b, 0)
	if err != nil {
		return nil, nil, err
	}
	if m.Sealed || m.Id != outer.Id || m.Reply != outer.Reply {
		return nil, nil, fmt.Errorf("%w: a sealed message unlike its cover", ErrMalformed)
	}
	return m, nil, nil
}

// Close closes the socket; a Recv that waits returns ErrClosed.
func (s *Socket) Close() error { return s.conn.Close() }

// prepare encodes m; one that is too large for a datagram goes into a sealed
// memfd, which release closes.
func prepare(m *linepb.Message, fds []int) (b []byte, send []int, release func(), err error) {
	if len(fds) > MaxDescriptors {
		return nil, nil, nil, fmt.Errorf("%w: %d, at most %d", ErrDescriptors, len(fds), MaxDescriptors)
	}
	if want := descriptors(m); want != len(fds) {
		return nil, nil, nil, fmt.Errorf("%w: %d given, want %d", ErrDescriptors, len(fds), want)
	}
	if b, err = Encode(m); err != nil {
		return nil, nil, nil, err
	}
	if len(b) <= MaxMessage {
		return b, fds, func() {}, nil
	}
	if len(fds) > 0 {
		return nil, nil, nil, fmt.Errorf("send on line: a message of %d bytes with descriptors", len(b))
	}
	fd, err := Sealed("line-message", b)
	if err != nil {
		return nil, nil, nil, err
	}
	cover, err := Encode(&linepb.Message{Id: m.Id, Reply: m.Reply, Sealed: true})
	if err != nil {
		unix.Close(fd)
		return nil, nil, nil, err
	}
	return cover, []int{fd}, func() { unix.Close(fd) }, nil
}

func rights(fds []int) []byte {
	if len(fds) == 0 {
		return nil
	}
	return unix.UnixRights(fds...)
}

// parseRights returns every descriptor in oob, also beside an error.
func parseRights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for i := range msgs {
		got, perr := unix.ParseUnixRights(&msgs[i])
		if perr != nil {
			err = perr
			continue
		}
		fds = append(fds, got...)
	}
	return fds, err
}

func sendError(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return ErrClosed
	}
	return fmt.Errorf("send on line: %w", err)
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
