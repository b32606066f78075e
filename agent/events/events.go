// SPDX-License-Identifier: Apache-2.0

// Package events turns the records of the kernel's two ring buffers into
// typed refusals and samples. What did not fit into a ring is counted by the
// kernel; see Counters of agent/datapath.
package events

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Sizes of the records: struct event and struct sample of bpf/include/abi.h.
// A test of agent/datapath holds them and the offsets below against the BTF.
const (
	EventSize  = 80
	SampleSize = 280
)

// Hook is where the kernel decided: enum hook of bpf/include/abi.h.
type Hook uint8

// The hooks.
const (
	HookSocket  Hook = 1 + iota // socket(2)
	HookBind                    // bind(2), and the port that it gave
	HookConnect                 // connect(2)
	HookSendmsg                 // sendto(2) on a datagram socket
	HookListen                  // listen(2): the socket got no slot
	HookSteer                   // a SYN on its way to a listener
	HookEgress                  // a packet on its way out
)

var hookNames = [...]string{"", "socket", "bind", "connect", "sendmsg", "listen", "steer", "egress"}

// String returns the hook's word.
func (h Hook) String() string {
	if h != 0 && int(h) < len(hookNames) {
		return hookNames[h]
	}
	return "unknown"
}

// reasons are enum counter of bpf/include/abi.h from 1 on.
var reasons = [...]flow.Reason{
	flow.ReasonOK, flow.ReasonVerdictDeny, flow.ReasonBindGuard, flow.ReasonUnguarded, flow.ReasonListenerGone,
	flow.ReasonServerGone, flow.ReasonUntagged, flow.ReasonMapFull, flow.ReasonForeignSocket, flow.ReasonDevice,
	flow.ReasonSocketKind, flow.ReasonEgress, flow.ReasonIdentityRevoked, flow.ReasonNotReady,
	flow.ReasonIdentityExpired,
}

// ReasonCount is one more than the largest reason code of the kernel.
const ReasonCount = len(reasons)

// ReasonOf returns the reason of a code of the kernel.
func ReasonOf(code uint8) (flow.Reason, bool) {
	if code == 0 || int(code) >= len(reasons) {
		return "", false
	}
	return reasons[code], true
}

// Event is a refusal, or in observe and audit what would have been one.
type Event struct {
	Time        time.Duration // CLOCK_BOOTTIME
	NetnsCookie uint64
	CgroupID    uint64 // of the caller, 0 where there is none
	Cookie      uint64 // of the socket, 0 where there is none
	Source      netip.AddrPort
	Destination netip.AddrPort
	Identity    flow.IdentityNumber // who did it, 0 if nobody that is known
	Target      flow.IdentityNumber // whose address or port it was
	Reason      flow.Reason
	Hook        Hook
	Enforced    bool // it was refused
	Protocol    uint8
}

// DecodeEvent reads one record of the events ring.
func DecodeEvent(b []byte) (Event, error) {
	if len(b) < EventSize {
		return Event{}, fmt.Errorf("decode event: %d bytes, not %d", len(b), EventSize)
	}
	le := binary.LittleEndian
	reason, ok := ReasonOf(b[76])
	if !ok {
		return Event{}, fmt.Errorf("decode event: unknown reason %d", b[76])
	}
	return Event{
		Time:        time.Duration(le.Uint64(b)),
		NetnsCookie: le.Uint64(b[8:]),
		CgroupID:    le.Uint64(b[16:]),
		Cookie:      le.Uint64(b[24:]),
		Source:      addrPort(b[32:], b[72:]),
		Destination: addrPort(b[48:], b[74:]),
		Identity:    flow.IdentityNumber(le.Uint32(b[64:])),
		Target:      flow.IdentityNumber(le.Uint32(b[68:])),
		Reason:      reason,
		Hook:        Hook(b[77]),
		Enforced:    b[78] == uint8(flow.ModeEnforce),
		Protocol:    b[79],
	}, nil
}

// Sample is the metadata of the first request of a connection, read in the
// kernel: never a query, a body, or a header other than Host.
type Sample struct {
	Time        time.Duration // CLOCK_BOOTTIME
	NetnsCookie uint64
	Source      netip.AddrPort
	Destination netip.AddrPort
	Identity    flow.IdentityNumber // source, 0 if the kernel does not know
	Payload     uint32              // bytes of the segment
	Interface   int
	Kind        uint8 // abi.Kind..., 0 if there is no flow entry
	Ingress     bool
	Method      string
	Path        string // at most 128 bytes
	Host        string // at most 64 bytes
	PathCut     bool
	HostCut     bool
}

// Flags of struct sample.
const (
	sampleIngress = 1
	samplePathCut = 2
	sampleHostCut = 4
)

// Offsets of the text of struct sample.
const (
	methodAt, methodSize = 80, 8
	pathAt, pathSize     = 88, 128
	hostAt, hostSize     = 216, 64
)

// DecodeSample reads one record of the samples ring. The text is as the
// peer sent it: whoever shows it must quote it.
func DecodeSample(b []byte) (Sample, error) {
	if len(b) < SampleSize {
		return Sample{}, fmt.Errorf("decode sample: %d bytes, not %d", len(b), SampleSize)
	}
	le := binary.LittleEndian
	method, path, host, flags := int(b[64]), int(b[65]), int(b[66]), b[67]
	if method > methodSize || path > pathSize || host > hostSize {
		return Sample{}, fmt.Errorf("decode sample: lengths %d, %d, %d", method, path, host)
	}
	return Sample{
		Time:        time.Duration(le.Uint64(b)),
		NetnsCookie: le.Uint64(b[8:]),
		Source:      addrPort(b[16:], b[60:]),
		Destination: addrPort(b[32:], b[62:]),
		Identity:    flow.IdentityNumber(le.Uint32(b[48:])),
		Payload:     le.Uint32(b[52:]),
		Interface:   int(le.Uint32(b[56:])),
		Kind:        b[68],
		Ingress:     flags&sampleIngress != 0,
		PathCut:     flags&samplePathCut != 0,
		HostCut:     flags&sampleHostCut != 0,
		Method:      string(b[methodAt : methodAt+method]),
		Path:        string(b[pathAt : pathAt+path]),
		Host:        string(b[hostAt : hostAt+host]),
	}, nil
}

func addrPort(addr, port []byte) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(addr[:16])).Unmap(), binary.LittleEndian.Uint16(port))
}

// Reader reads one ring.
type Reader[T any] struct {
	ring   *ringbuf.Reader
	decode func([]byte) (T, error)
	record ringbuf.Record
}

// NewEventReader reads the events ring.
func NewEventReader(ring *ebpf.Map) (*Reader[Event], error) { return newReader(ring, DecodeEvent) }

// NewSampleReader reads the samples ring.
func NewSampleReader(ring *ebpf.Map) (*Reader[Sample], error) { return newReader(ring, DecodeSample) }

func newReader[T any](ring *ebpf.Map, decode func([]byte) (T, error)) (*Reader[T], error) {
	r, err := ringbuf.NewReader(ring)
	if err != nil {
		return nil, fmt.Errorf("read ring: %w", err)
	}
	return &Reader[T]{ring: r, decode: decode}, nil
}

// Read waits for the next record. Its error is os.ErrClosed after Close,
// and os.ErrDeadlineExceeded after the deadline. It is for one goroutine.
func (r *Reader[T]) Read() (T, error) {
	if err := r.ring.ReadInto(&r.record); err != nil {
		var none T
		if errors.Is(err, ringbuf.ErrClosed) {
			err = os.ErrClosed
		}
		return none, err
	}
	return r.decode(r.record.RawSample)
}

// SetDeadline sets when Read gives up, never for the zero time.
func (r *Reader[T]) SetDeadline(t time.Time) { r.ring.SetDeadline(t) }

// Close ends a waiting Read.
func (r *Reader[T]) Close() error { return r.ring.Close() }
