// SPDX-License-Identifier: Apache-2.0

package sockets

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of linux/sock_diag.h and linux/inet_diag.h, which x/sys/unix lacks.
const (
	sockDiagByFamily = 20
	diagCgroupID     = 21 // INET_DIAG_CGROUP_ID, 5.9
	tcpListen        = 10
	diagRequestSize  = 56
	diagMessageSize  = 72
	maxListening     = 1 << 16 // sockets of one namespace that are looked at
)

// Listening is a listening TCP socket of a namespace, whoever made it.
type Listening struct {
	Address netip.AddrPort
	Inode   uint64 // the socket's, as in /proc/PID/fd: "socket:[INODE]"
	Cookie  uint64 // SO_COOKIE
	// Cgroup is the cgroup2 id of who made the socket, 0 where the kernel
	// does not say.
	Cgroup uint64
}

// Listening lists the listening TCP sockets of the namespace (sock_diag(7)).
func (n *Netns) Listening() (all []Listening, err error) {
	err = n.In(func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			got, err := listening(family)
			if err != nil {
				return fmt.Errorf("list listening sockets of netns %s: %w", n.name, err)
			}
			all = append(all, got...)
		}
		return nil
	})
	return all, err
}

func listening(family uint8) ([]Listening, error) {
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, err
	}
	defer unix.Close(s)
	// The kernel answers at once; the bound is for what should not happen.
	if err := unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return nil, err
	}
	req := make([]byte, unix.SizeofNlMsghdr+diagRequestSize)
	h := (*unix.NlMsghdr)(unsafe.Pointer(&req[0]))
	*h = unix.NlMsghdr{Len: uint32(len(req)), Type: sockDiagByFamily, Flags: unix.NLM_F_REQUEST | unix.NLM_F_DUMP, Seq: 1}
	body := req[unix.SizeofNlMsghdr:]
	body[0], body[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(body[4:], 1<<tcpListen)
	if err := unix.Sendto(s, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	var all []Listening
	buf := make([]byte, 64<<10)
	for {
		got, _, err := unix.Recvfrom(s, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		msgs, err := syscall.ParseNetlinkMessage(buf[:got])
		if err != nil {
			return nil, err
		}
		for _, m := range msgs {
			switch m.Header.Type {
			case unix.NLMSG_DONE:
				return all, nil
			case unix.NLMSG_ERROR:
				return nil, netlinkError(m.Data)
			}
			l, err := parseListening(m.Data)
			if err != nil {
				return nil, err
			}
			if all = append(all, l); len(all) > maxListening {
				return nil, fmt.Errorf("more than %d", maxListening)
			}
		}
	}
}

func netlinkError(b []byte) error {
	if len(b) < 4 {
		return errors.New("a cut netlink error")
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(b)))
}

// parseListening reads a struct inet_diag_msg and the cgroup id behind it.
func parseListening(b []byte) (Listening, error) {
	if len(b) < diagMessageSize {
		return Listening{}, errors.New("a cut inet_diag_msg")
	}
	var a netip.Addr
	if b[0] == unix.AF_INET {
		a = netip.AddrFrom4([4]byte(b[8:12]))
	} else {
		a = netip.AddrFrom16([16]byte(b[8:24]))
	}
	l := Listening{
		Address: netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[4:])),
		Cookie:  uint64(binary.NativeEndian.Uint32(b[44:])) | uint64(binary.NativeEndian.Uint32(b[48:]))<<32,
		Inode:   uint64(binary.NativeEndian.Uint32(b[68:])),
	}
	for b = b[diagMessageSize:]; len(b) >= unix.SizeofRtAttr; {
		size, kind := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])
		if size < unix.SizeofRtAttr || size > len(b) {
			return Listening{}, errors.New("a cut netlink attribute")
		}
		if kind == diagCgroupID && size == unix.SizeofRtAttr+8 {
			l.Cgroup = binary.NativeEndian.Uint64(b[unix.SizeofRtAttr:])
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return l, nil
}
