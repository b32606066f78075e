// SPDX-License-Identifier: Apache-2.0

package sockets

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Dial makes a non-blocking TCP socket inside the namespace and starts to
// connect it: the descriptor, the caller's, may still be connecting. before
// is called with the descriptor before any packet leaves, to tag the socket;
// its error ends the dial. The kernel chooses the source address: for a
// destination of the same namespace that is a local one too.
func (n *Netns) Dial(to netip.AddrPort, before func(fd int) error) (fd int, err error) {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if !to.IsValid() || to.Port() == 0 || to.Addr().IsUnspecified() || to.Addr().IsMulticast() || to.Addr().Zone() != "" {
		return -1, fmt.Errorf("dial %s in netns %s: not an address to connect to", to, n.name)
	}
	err = n.In(func() error {
		fd, err = unix.Socket(domain(to.Addr()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("make socket in netns %s: %w", n.name, err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
			fd = -1
		}
	}()
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return fd, fmt.Errorf("dial %s in netns %s: %w", to, n.name, err)
	}
	if before != nil {
		if err := before(fd); err != nil {
			return fd, fmt.Errorf("tag socket to %s in netns %s: %w", to, n.name, err)
		}
	}
	for {
		// A connect that a signal interrupts goes on by itself: EALREADY.
		switch err := unix.Connect(fd, sockaddr(to)); err {
		case nil, unix.EINPROGRESS, unix.EALREADY, unix.EISCONN:
			return fd, nil
		case unix.EINTR:
		default:
			return fd, fmt.Errorf("connect to %s in netns %s: %w", to, n.name, err)
		}
	}
}
