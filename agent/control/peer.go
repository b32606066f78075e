// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

// Peer is the process at the other end of the control socket, as the kernel
// says (SO_PEERCRED, SO_PEERGROUPS): who it was when it connected.
type Peer struct {
	PID    int
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary
}

// String names the peer for the log and for a revocation's author.
func (p Peer) String() string { return fmt.Sprintf("uid %d (pid %d)", p.UID, p.PID) }

// mayRead: root, and the group sallyport where there is one.
func (p Peer) mayRead(group int) bool {
	return p.UID == 0 || group >= 0 && (p.GID == uint32(group) || slices.Contains(p.Groups, uint32(group)))
}

// mayChange: root alone.
func (p Peer) mayChange() bool { return p.UID == 0 }

// peerCredentials are gRPC transport credentials that look at the other end
// of a unix socket in place of a handshake.
type peerCredentials struct{}

type authInfo struct {
	credentials.CommonAuthInfo
	Peer
}

func (authInfo) AuthType() string { return "unix" }

func (peerCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p, err := peerOf(c)
	if err != nil {
		return nil, nil, err
	}
	return c, authInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, p}, nil
}

func (peerCredentials) ClientHandshake(_ context.Context, _ string, c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p, err := peerOf(c)
	if err != nil {
		return nil, nil, err
	}
	// Whoever can make the socket's directory could stand in for the agent
	// and be told what root asks for.
	if p.UID != 0 {
		return nil, nil, fmt.Errorf("the control socket belongs to uid %d, not to root", p.UID)
	}
	return c, authInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, p}, nil
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

func (p peerCredentials) Clone() credentials.TransportCredentials { return p }

func (peerCredentials) OverrideServerName(string) error { return nil }

func peerOf(c net.Conn) (p Peer, err error) {
	u, ok := c.(syscall.Conn)
	if !ok || c.LocalAddr().Network() != "unix" {
		return Peer{}, errors.New("the control API is served on a unix socket only")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return Peer{}, fmt.Errorf("read peer of control socket: %w", err)
	}
	ctl := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil {
			return
		}
		p = Peer{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid}
		p.Groups, err = peerGroups(int(fd))
	})
	if err = errors.Join(ctl, err); err != nil {
		return Peer{}, fmt.Errorf("read peer of control socket: %w", err)
	}
	return p, nil
}

// peerGroups reads SO_PEERGROUPS (4.13).
func peerGroups(fd int) ([]uint32, error) {
	const maxGroups = 65536 // NGROUPS_MAX
	b := make([]byte, 4*64)
	for {
		n, err := getsockopt(fd, unix.SO_PEERGROUPS, b)
		if errors.Is(err, unix.ERANGE) && n > len(b) && n <= 4*maxGroups {
			b = make([]byte, n)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read groups: %w", err)
		}
		groups := make([]uint32, 0, n/4)
		for b := b[:n]; len(b) >= 4; b = b[4:] {
			groups = append(groups, binary.NativeEndian.Uint32(b))
		}
		return groups, nil
	}
}

// groupID returns the number of a group of this machine, -1 if there is none
// of that name. It reads /etc/group itself: os/user would ask a directory
// service, which the agent must not wait for.
func groupID(file, name string) int {
	f, err := os.Open(file)
	if err != nil {
		return -1
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Split(s.Text(), ":")
		if len(fields) >= 3 && fields[0] == name {
			if id, err := strconv.ParseUint(fields[2], 10, 31); err == nil {
				return int(id)
			}
		}
	}
	return -1
}
