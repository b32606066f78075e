// SPDX-License-Identifier: Apache-2.0

package sockets

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/sallyport-dev/sallyport/agent/sockdiag"
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

// Listening lists the listening TCP sockets of the namespace.
func (n *Netns) Listening() (all []Listening, err error) {
	n.open.RLock()
	defer n.open.RUnlock()
	if n.closed {
		return nil, fmt.Errorf("list listening sockets of netns %s: %w", n.name, ErrClosed)
	}
	c, err := sockdiag.Open(n.fd)
	if err != nil {
		return nil, fmt.Errorf("list listening sockets of netns %s: %w", n.name, err)
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	found, err := c.List(sockdiag.Listen)
	if err != nil {
		return nil, fmt.Errorf("list listening sockets of netns %s: %w", n.name, err)
	}
	for _, s := range found {
		all = append(all, Listening{Address: s.Local, Inode: uint64(s.Inode), Cookie: s.Cookie, Cgroup: s.CgroupID})
	}
	return all, nil
}
