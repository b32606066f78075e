// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// serveActor answers questions until the other end of the line is closed.
func serveActor(line int) {
	unix.CloseOnExec(line)
	var mu sync.Mutex
	for {
		var q question
		file, err := recvJSON(line, &q)
		if err != nil {
			return
		}
		go func() {
			ans := answer{ID: q.ID}
			give, err := q.answer(&ans, file)
			if err != nil && !errors.As(err, &ans.Errno) {
				ans.Errno = unix.EINVAL
			}
			mu.Lock()
			defer mu.Unlock()
			_ = sendJSON(line, &ans, give) // an error means that the test has ended
			if give != nil {
				_ = give.Close()
			}
		}()
	}
}

func (q *question) answer(ans *answer, file *os.File) (give *os.File, err error) {
	switch q.Op {
	case "socket":
		if ans.FD, err = unix.Socket(q.Args[0], q.Args[1]|unix.SOCK_CLOEXEC, q.Args[2]); err == nil {
			err = timeout(ans.FD, 5*time.Second)
		}
	case "adopt":
		if file == nil {
			return nil, unix.EBADF
		}
		defer file.Close()
		ans.FD, err = unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	case "bind":
		err = withAddr(q.FD, q.Addr, unix.Bind)
	case "listen":
		err = unix.Listen(q.FD, 16)
	case "connect":
		err = withAddr(q.FD, q.Addr, func(fd int, sa unix.Sockaddr) error {
			// Once under way, connect(2) goes on waiting for what it began.
			return uninterrupted(func() error { return unix.Connect(fd, sa) })
		})
	case "disconnect":
		var unspec [16]byte
		if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(q.FD), uintptr(unsafe.Pointer(&unspec)), 16); errno != 0 {
			err = errno
		}
	case "accept":
		var sa unix.Sockaddr
		err = uninterrupted(func() (err error) {
			ans.FD, sa, err = unix.Accept4(q.FD, unix.SOCK_CLOEXEC)
			return err
		})
		if err == nil {
			ans.Addr = addrPort(sa)
			err = timeout(ans.FD, 5*time.Second)
		}
	case "getpeername":
		ans.Addr, err = name(q.FD, unix.Getpeername)
	case "getsockname":
		ans.Addr, err = name(q.FD, unix.Getsockname)
	case "give":
		fd, err := unix.FcntlInt(uintptr(q.FD), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), "socket"), nil
	case "close":
		err = unix.Close(q.FD)
	default:
		err = q.transfer(ans)
	}
	return nil, err
}

func (q *question) transfer(ans *answer) (err error) {
	switch q.Op {
	case "send":
		for b := q.Data; len(b) > 0 && err == nil; {
			var n int
			err = uninterrupted(func() (err error) {
				n, err = unix.SendmsgN(q.FD, b, nil, nil, unix.MSG_NOSIGNAL)
				return err
			})
			b = b[n:]
		}
	case "frame":
		err = sendFrame(q.Args[0], q.Data)
	case "sendto":
		err = withAddr(q.FD, q.Addr, func(fd int, sa unix.Sockaddr) error { return unix.Sendto(fd, q.Data, unix.MSG_NOSIGNAL|q.Args[0], sa) })
	case "recv":
		b := make([]byte, min(max(q.Args[0], 0), 64<<10))
		var n int
		err = uninterrupted(func() (err error) {
			n, _, err = unix.Recvfrom(q.FD, b, 0)
			return err
		})
		if err == nil {
			ans.Data = b[:n]
		}
	case "setint":
		err = unix.SetsockoptInt(q.FD, q.Args[0], q.Args[1], q.Args[2])
	case "setstring":
		err = unix.SetsockoptString(q.FD, q.Args[0], q.Args[1], string(q.Data))
	case "timeout":
		err = timeout(q.FD, time.Duration(q.Args[0]))
	default:
		err = unix.ENOSYS
	}
	return err
}

func sendFrame(ifindex int, frame []byte) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: ifindex})
}

func timeout(fd int, d time.Duration) error {
	tv := unix.NsecToTimeval(int64(d))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return err
	}
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
}

// uninterrupted calls again what a signal of the Go runtime cut short: with a
// time-out on the socket the kernel does not go on by itself (signal(7)).
func uninterrupted(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func withAddr(fd int, addr netip.AddrPort, f func(int, unix.Sockaddr) error) error {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return err
	}
	if domain == unix.AF_INET6 {
		return f(fd, &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()})
	}
	if !addr.Addr().Unmap().Is4() {
		return unix.EAFNOSUPPORT
	}
	return f(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().Unmap().As4()})
}

func name(fd int, f func(int) (unix.Sockaddr, error)) (netip.AddrPort, error) {
	sa, err := f(fd)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return addrPort(sa), nil
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func sendJSON(line int, v any, file *os.File) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	return unix.Sendmsg(line, b, rights, nil, unix.MSG_NOSIGNAL)
}

func recvJSON(line int, v any) (*os.File, error) {
	b, oob := make([]byte, 256<<10), make([]byte, unix.CmsgSpace(4))
	n, oobn, flags, _, err := recvmsg(line, b, oob)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return nil, fmt.Errorf("receive from actor: truncated message")
	}
	var file *os.File
	if oobn > 0 {
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			return nil, err
		}
		for i := range msgs {
			fds, err := unix.ParseUnixRights(&msgs[i])
			if err != nil {
				return nil, err
			}
			for _, fd := range fds {
				file = os.NewFile(uintptr(fd), "socket")
			}
		}
	}
	return file, json.Unmarshal(b[:n], v)
}

func recvmsg(line int, b, oob []byte) (n, oobn, flags int, from unix.Sockaddr, err error) {
	for {
		n, oobn, flags, from, err = unix.Recvmsg(line, b, oob, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, syscall.EINTR) {
			return n, oobn, flags, from, err
		}
	}
}
