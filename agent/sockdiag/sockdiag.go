// SPDX-License-Identifier: Apache-2.0

// Package sockdiag lists the TCP sockets of a network namespace with the
// cgroup that made each, and destroys them, over NETLINK_SOCK_DIAG
// (sock_diag(7); cgroup ids from Linux 5.9, SOCK_DESTROY from 4.5).
package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// State is a TCP state, as the kernel numbers them.
type State uint8

// The states that callers ask for.
const (
	Established State = 1
	SynSent     State = 2
	Listen      State = 10
)

// Connected are all states of a connection that can still carry data.
var Connected = []State{Established, SynSent, 3, 4, 5, 8} // SYN_RECV, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT

// Socket is one TCP socket.
type Socket struct {
	Local, Remote netip.AddrPort // IPv4 unmapped
	State         State
	Cookie        uint64 // SO_COOKIE
	CgroupID      uint64 // of the cgroup that made it; 0: not a full socket (SYN_RECV, TIME_WAIT)
	UID           uint32
	Inode         uint32

	family uint8
	id     [sizeID]byte
}

// Sizes of linux/inet_diag.h.
const (
	sizeHeader  = 16
	sizeID      = 48
	sizeRequest = 8 + sizeID
	sizeMessage = 4 + sizeID + 20
	attrCgroup  = 21 // INET_DIAG_CGROUP_ID
)

// Numbers of linux/sock_diag.h.
const (
	sockDiagByFamily = 20
	sockDestroy      = 21
)

// Conn asks about one network namespace. It is for one goroutine at a time.
type Conn struct {
	fd  int
	seq uint32
	buf []byte
}

// Open asks about the network namespace behind netnsFD, or about the
// caller's own where it is negative. Close it.
func Open(netnsFD int) (*Conn, error) {
	c := &Conn{buf: make([]byte, 64<<10)}
	errs := make(chan error, 1)
	go func() {
		// A socket stays in the netns that its maker was in; the thread is
		// not given back.
		if netnsFD >= 0 {
			runtime.LockOSThread()
			if err := unix.Setns(netnsFD, unix.CLONE_NEWNET); err != nil {
				errs <- fmt.Errorf("enter netns: %w", err)
				return
			}
		}
		var err error
		c.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		errs <- err
	}()
	if err := <-errs; err != nil {
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	tv := unix.NsecToTimeval(int64(5 * time.Second))
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return nil, errors.Join(fmt.Errorf("open sock_diag: %w", err), c.Close())
	}
	return c, nil
}

// Close closes the connection to the kernel.
func (c *Conn) Close() error { return unix.Close(c.fd) }

// maxSockets bounds what List gives back.
const maxSockets = 1 << 20

// ErrTooMany means that a netns has more sockets than List gives back.
var ErrTooMany = errors.New("too many sockets")

// List returns the TCP sockets of both families in one of the states.
func (c *Conn) List(states ...State) ([]Socket, error) {
	var sockets []Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		var err error
		for range 5 { // a dump that others changed meanwhile is asked for again
			before := len(sockets)
			if sockets, err = c.dump(family, states, sockets); !errors.Is(err, unix.EINTR) {
				break
			}
			sockets = sockets[:before]
		}
		if err != nil {
			return nil, fmt.Errorf("list sockets: %w", err)
		}
	}
	return sockets, nil
}

func (c *Conn) dump(family uint8, states []State, sockets []Socket) ([]Socket, error) {
	var mask uint32
	for _, s := range states {
		mask |= 1 << s
	}
	if err := c.send(sockDiagByFamily, unix.NLM_F_DUMP, family, mask, nil); err != nil {
		return sockets, err
	}
	interrupted := false
	for {
		n, err := c.receive()
		if err != nil {
			return sockets, err
		}
		for b := c.buf[:n]; len(b) > 0; {
			h, body, rest, err := split(b)
			if err != nil {
				return sockets, err
			}
			b = rest
			if h.seq != c.seq {
				continue
			}
			interrupted = interrupted || h.flags&unix.NLM_F_DUMP_INTR != 0
			switch h.typ {
			case unix.NLMSG_DONE:
				if interrupted {
					return sockets, unix.EINTR
				}
				return sockets, nil
			case unix.NLMSG_ERROR:
				return sockets, errorOf(body)
			case sockDiagByFamily:
				s, err := parse(body)
				if err != nil {
					return sockets, err
				}
				if len(sockets) >= maxSockets {
					return sockets, ErrTooMany
				}
				sockets = append(sockets, s)
			}
		}
	}
}

// Destroy closes a socket at once: both ends see a reset. One that is gone
// is os.ErrNotExist.
func (c *Conn) Destroy(s *Socket) error {
	if err := c.send(sockDestroy, unix.NLM_F_ACK, s.family, 1<<s.State, &s.id); err != nil {
		return fmt.Errorf("destroy socket: %w", err)
	}
	for {
		n, err := c.receive()
		if err != nil {
			return fmt.Errorf("destroy socket: %w", err)
		}
		for b := c.buf[:n]; len(b) > 0; {
			h, body, rest, err := split(b)
			if err != nil {
				return fmt.Errorf("destroy socket: %w", err)
			}
			b = rest
			if h.seq != c.seq || h.typ != unix.NLMSG_ERROR {
				continue
			}
			if err := errorOf(body); err != nil {
				return fmt.Errorf("destroy socket %s to %s: %w", s.Local, s.Remote, err)
			}
			return nil
		}
	}
}

func (c *Conn) send(typ, flags uint16, family uint8, states uint32, id *[sizeID]byte) error {
	c.seq++
	var b [sizeHeader + sizeRequest]byte
	ne := binary.NativeEndian
	ne.PutUint32(b[0:], uint32(len(b)))
	ne.PutUint16(b[4:], typ)
	ne.PutUint16(b[6:], unix.NLM_F_REQUEST|flags)
	ne.PutUint32(b[8:], c.seq)
	b[16], b[17] = family, unix.IPPROTO_TCP
	ne.PutUint32(b[20:], states)
	if id != nil {
		copy(b[24:], id[:])
	}
	return unix.Sendto(c.fd, b[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// receive receives one datagram of the kernel's.
func (c *Conn) receive() (int, error) {
	for {
		n, _, flags, from, err := unix.Recvmsg(c.fd, c.buf, nil, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, err
		}
		if flags&unix.MSG_TRUNC != 0 {
			return 0, errors.New("truncated answer")
		}
		if nl, ok := from.(*unix.SockaddrNetlink); ok && nl.Pid == 0 {
			return n, nil
		}
	}
}

type header struct {
	typ, flags uint16
	seq        uint32
}

var errShort = errors.New("short message")

// split takes the first message off a datagram.
func split(b []byte) (h header, body, rest []byte, err error) {
	if len(b) < sizeHeader {
		return h, nil, nil, errShort
	}
	ne := binary.NativeEndian
	length := int(ne.Uint32(b))
	if length < sizeHeader || length > len(b) {
		return h, nil, nil, errShort
	}
	h = header{typ: ne.Uint16(b[4:]), flags: ne.Uint16(b[6:]), seq: ne.Uint32(b[8:])}
	return h, b[sizeHeader:length], b[min(align(length), len(b)):], nil
}

func align(n int) int { return (n + 3) &^ 3 }

func errorOf(body []byte) error {
	if len(body) < 4 {
		return errShort
	}
	code := int32(binary.NativeEndian.Uint32(body))
	if code == 0 {
		return nil
	}
	errno := unix.Errno(-code)
	if errno == unix.ENOENT {
		return os.ErrNotExist
	}
	return errno
}

// parse reads a struct inet_diag_msg and the attributes behind it.
func parse(b []byte) (s Socket, err error) {
	if len(b) < sizeMessage {
		return s, errShort
	}
	ne := binary.NativeEndian
	s.family, s.State = b[0], State(b[1])
	copy(s.id[:], b[4:])
	s.Local = endpoint(s.family, s.id[4:20], s.id[0:2])
	s.Remote = endpoint(s.family, s.id[20:36], s.id[2:4])
	s.Cookie = uint64(ne.Uint32(s.id[40:])) | uint64(ne.Uint32(s.id[44:]))<<32
	s.UID, s.Inode = ne.Uint32(b[64:]), ne.Uint32(b[68:])
	for a := b[sizeMessage:]; len(a) >= 4; {
		length := int(ne.Uint16(a))
		if length < 4 || length > len(a) {
			return s, errShort
		}
		if ne.Uint16(a[2:]) == attrCgroup && length >= 12 {
			s.CgroupID = ne.Uint64(a[4:])
		}
		a = a[min(align(length), len(a)):]
	}
	return s, nil
}

func endpoint(family uint8, addr, port []byte) netip.AddrPort {
	ip := netip.AddrFrom16([16]byte(addr)).Unmap()
	if family == unix.AF_INET {
		ip = netip.AddrFrom4([4]byte(addr[:4]))
	}
	return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(port))
}
