// SPDX-License-Identifier: Apache-2.0

// Package line is the line between the agent and the userspace process: a
// SOCK_SEQPACKET socket (unix(7)) that carries one versioned protobuf message
// a datagram, with file descriptors attached where the message says so.
// Nothing else crosses: no pointer, no callback, no shared state. Each end
// takes what the other sends for hostile: sizes, counts, versions and
// descriptors are checked before a handler sees them.
package line

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

const (
	// Version is the version of the protocol; both ends are the same binary,
	// so any other is refused.
	Version = 1
	// MaxMessage bounds a datagram, in bytes: a key set of 256 KiB and what
	// is around it. The default net.core.wmem_max (208 KiB, doubled by the
	// kernel) has room for it.
	MaxMessage = 320 << 10
	// MaxSealed bounds what a sealed memfd may hold, in bytes: the largest
	// policy set (16 MiB) and what is around it.
	MaxSealed = 20 << 20
	// MaxDescriptors bounds the descriptors of one message; the kernel's own
	// bound is 253 (SCM_MAX_FD).
	MaxDescriptors = 128
)

// Errors that callers branch on.
var (
	// ErrClosed: the other end is gone, or the line was closed here.
	ErrClosed = errors.New("line closed")
	// ErrBusy: the bounded queue of messages not yet sent is full.
	ErrBusy = errors.New("line busy: too many messages wait to be sent")
	// ErrTruncated: a datagram was longer than MaxMessage.
	ErrTruncated = errors.New("message truncated")
	// ErrDescriptors: descriptors were lost, missing or not expected. All
	// that came have been closed.
	ErrDescriptors = errors.New("descriptors do not fit the message")
	// ErrVersion: the other end speaks another version.
	ErrVersion = errors.New("protocol version")
	// ErrMalformed: not a message of this protocol.
	ErrMalformed = errors.New("malformed message")
)

// Encode returns the datagram of m, with the version set in m.
func Encode(m *linepb.Message) ([]byte, error) {
	m.Version = Version
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode line message: %w", err)
	}
	return b, nil
}

// Decode reads the datagram b that came with nfds descriptors, and checks
// what can be checked without knowing its sender: version, known fields only,
// a reply has an id, and exactly the descriptors that its body calls for. On
// ErrDescriptors the message is returned with the error, so that the call it
// answers can be failed.
func Decode(b []byte, nfds int) (*linepb.Message, error) {
	m := new(linepb.Message)
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if m.Version != Version {
		return nil, fmt.Errorf("%w %d, want %d", ErrVersion, m.Version, Version)
	}
	if len(m.ProtoReflect().GetUnknown()) > 0 {
		return nil, fmt.Errorf("%w: unknown field", ErrMalformed)
	}
	if m.Reply && m.Id == 0 {
		return nil, fmt.Errorf("%w: a reply to nothing", ErrMalformed)
	}
	if m.Error != "" && (!m.Reply || m.Body != nil || m.Sealed) {
		return nil, fmt.Errorf("%w: an error that is not a bare reply", ErrMalformed)
	}
	if m.Body == nil && m.Error == "" && !m.Sealed {
		return nil, fmt.Errorf("%w: no body", ErrMalformed)
	}
	if m.Sealed && m.Body != nil {
		return nil, fmt.Errorf("%w: sealed, with a body", ErrMalformed)
	}
	if want := descriptors(m); nfds != want {
		return m, fmt.Errorf("%w: %d came, want %d", ErrDescriptors, nfds, want)
	}
	return m, nil
}

// descriptors says how many descriptors come with m.
func descriptors(m *linepb.Message) int {
	if m.Sealed {
		return 1
	}
	switch b := m.Body.(type) {
	case *linepb.Message_Policies, *linepb.Message_Maps:
		return 1
	case *linepb.Message_Listeners:
		return len(b.Listeners.GetListeners())
	case *linepb.Message_DialReply:
		if b.DialReply.GetError() == "" {
			return 1
		}
	case *linepb.Message_DialEngineReply:
		if b.DialEngineReply.GetError() == "" {
			return 1
		}
	}
	return 0
}
