// SPDX-License-Identifier: Apache-2.0

package sockets

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/confine"
)

// Kind is what a listener is for. The values are those of the line's
// ListenerKind.
type Kind uint8

// The kinds of listeners.
const (
	Outbound Kind = iota + 1 // connect() is rewritten to it
	Inbound                  // sk_lookup steers SYNs to protected ports to it
	Tunnel                   // other nodes come in by it
)

// String returns the kind's word.
func (k Kind) String() string {
	switch k {
	case Outbound:
		return "outbound"
	case Inbound:
		return "inbound"
	case Tunnel:
		return "tunnel"
	}
	return "unknown"
}

// Ports are the listeners' ports, the same in every namespace.
type Ports struct{ Outbound, Inbound, Tunnel uint16 }

// Listener is a listening socket inside a namespace. Its descriptor is the
// holder's.
type Listener struct {
	Kind    Kind
	Family  int // 4 or 6
	Address netip.AddrPort
	FD      int
}

// DefaultBacklog is the listeners' queue length; the kernel caps it at
// net.core.somaxconn.
const DefaultBacklog = 4096

// Conflict says that a port of ours is held by somebody else, as beside
// another mesh. That namespace is refused: two proxies in one namespace would
// each see half of the traffic.
type Conflict struct {
	Netns   string
	Address netip.AddrPort
	Holder  string // "NAME (pid N, cgroup PATH)", "" where it could not be found
}

// Error says who holds the port and what to do.
func (e *Conflict) Error() string {
	by := e.Holder
	if by == "" {
		by = "a process that could not be found"
	}
	return fmt.Sprintf("%d is taken by %s at %s in netns %s: refusing that netns; stop the other proxy or move ours (listen: in agent.yaml)",
		e.Address.Port(), by, e.Address, e.Netns)
}

// ending is how long a port may still be held by a proxy process of ours that
// was killed with its agent.
const ending = 2 * time.Second

// Listen makes the listeners of the namespace, in IPv4 and, where the
// namespace has it, IPv6: all of them or none. A port that another holds is a
// *Conflict.
func (n *Netns) Listen(p Ports, backlog int) ([]Listener, error) {
	for until := time.Now().Add(ending); ; time.Sleep(20 * time.Millisecond) {
		ls, err := n.listen(p, backlog)
		c, ok := errors.AsType[*Conflict](err)
		if !ok {
			return ls, err
		}
		c.Holder = n.holder(c.Address)
		ours := c.Holder == "" || strings.HasPrefix(c.Holder, confine.Name+" ")
		if !ours || time.Now().After(until) {
			return nil, err
		}
	}
}

func (n *Netns) listen(p Ports, backlog int) (listeners []Listener, err error) {
	defer func() {
		if err != nil {
			CloseListeners(listeners)
			listeners = nil
		}
	}()
	loop4, loop6 := netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()
	want := []struct {
		kind Kind
		a    netip.AddrPort
	}{
		{Outbound, netip.AddrPortFrom(loop4, p.Outbound)},
		{Outbound, netip.AddrPortFrom(loop6, p.Outbound)},
		{Inbound, netip.AddrPortFrom(loop4, p.Inbound)},
		{Inbound, netip.AddrPortFrom(loop6, p.Inbound)},
		{Tunnel, netip.AddrPortFrom(netip.IPv4Unspecified(), p.Tunnel)},
		{Tunnel, netip.AddrPortFrom(netip.IPv6Unspecified(), p.Tunnel)},
	}
	err = n.In(func() error {
		for _, w := range want {
			fd, err := listen(w.a, backlog)
			switch {
			case errors.Is(err, unix.EAFNOSUPPORT) && w.a.Addr().Is6():
				continue // this kernel has no IPv6
			case errors.Is(err, unix.EADDRINUSE):
				return &Conflict{Netns: n.name, Address: w.a}
			case err != nil:
				return fmt.Errorf("listen on %s in netns %s: %w", w.a, n.name, err)
			}
			listeners = append(listeners, Listener{w.kind, family(w.a.Addr()), w.a, fd})
		}
		return nil
	})
	return listeners, err
}

// CloseListeners closes all of ls.
func CloseListeners(ls []Listener) {
	for _, l := range ls {
		unix.Close(l.FD)
	}
}

// listen makes one listening socket by hand: Go's own listeners are MPTCP,
// which no SOCKMAP takes, and are bound to the namespace of the moment.
func listen(a netip.AddrPort, backlog int) (int, error) {
	fd, err := unix.Socket(domain(a.Addr()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		return -1, err
	}
	// Freebind: a namespace's loopback may come up after its first process.
	opts := []struct{ level, name int }{
		{unix.SOL_SOCKET, unix.SO_REUSEADDR},
		{unix.SOL_IP, unix.IP_FREEBIND},
		{unix.IPPROTO_TCP, unix.TCP_NODELAY}, // accepted sockets inherit it
	}
	if a.Addr().Is6() {
		opts = append(opts[:1], opts[2], struct{ level, name int }{unix.SOL_IPV6, unix.IPV6_V6ONLY},
			struct{ level, name int }{unix.SOL_IPV6, unix.IPV6_FREEBIND})
	}
	for _, o := range opts {
		if err = unix.SetsockoptInt(fd, o.level, o.name, 1); err != nil {
			break
		}
	}
	if err == nil {
		err = unix.Bind(fd, sockaddr(a))
	}
	if err == nil {
		err = unix.Listen(fd, backlog)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func domain(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
