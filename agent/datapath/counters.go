// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/events"
	"github.com/sallyport-dev/sallyport/bpf"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Counters are the kernel's, since the maps were made.
type Counters struct {
	Refused     map[flow.Reason]uint64 // by what was refused
	WouldRefuse map[flow.Reason]uint64 // by what would have been in enforce

	Proxied  uint64 // connections rewritten to the outbound listener
	Direct   uint64 // connections let through by a verdict
	Dialled  uint64 // connections of the agent
	Steered  uint64 // SYNs given to an inbound listener
	Served   uint64 // SYNs of known flows given to their server
	Stale    uint64 // direct verdicts not used because the heartbeat was stale
	Void     uint64 // verdicts not used: expired or generation bumped
	Bypassed uint64 // observe, audit: no listener there, left alone

	Events         uint64
	EventsLost     uint64 // the ring was full
	EventsLimited  uint64 // over the limit per identity and reason
	Samples        uint64
	SamplesLost    uint64 // the ring was full
	SamplesLimited uint64 // over the budget
	ServersFull    uint64 // listeners of a protected port without a free slot
	Adopted        uint64 // sockets tagged after they were made
}

// Counters reads all counters.
func (d *Datapath) Counters() (Counters, error) { return readCounters(d.maps.Counters) }

func readCounters(m *ebpf.Map) (Counters, error) {
	var n [bpf.KernelCounterCOUNTERS]uint64
	var perCPU []uint64
	for i := range n {
		if err := m.Lookup(uint32(i), &perCPU); err != nil {
			return Counters{}, fmt.Errorf("read counters: %w", err)
		}
		for _, v := range perCPU {
			n[i] += v
		}
	}
	c := Counters{
		Refused: map[flow.Reason]uint64{}, WouldRefuse: map[flow.Reason]uint64{},
		Proxied: n[bpf.KernelCounterCOUNT_PROXIED], Direct: n[bpf.KernelCounterCOUNT_DIRECT],
		Dialled: n[bpf.KernelCounterCOUNT_DIALLED], Steered: n[bpf.KernelCounterCOUNT_STEERED],
		Served: n[bpf.KernelCounterCOUNT_SERVED], Stale: n[bpf.KernelCounterCOUNT_STALE],
		Void: n[bpf.KernelCounterCOUNT_VOID], Bypassed: n[bpf.KernelCounterCOUNT_BYPASSED],
		Events: n[bpf.KernelCounterCOUNT_EVENTS], EventsLost: n[bpf.KernelCounterCOUNT_EVENTS_LOST],
		EventsLimited: n[bpf.KernelCounterCOUNT_EVENTS_LIMITED], Samples: n[bpf.KernelCounterCOUNT_SAMPLES],
		SamplesLost: n[bpf.KernelCounterCOUNT_SAMPLES_LOST], SamplesLimited: n[bpf.KernelCounterCOUNT_SAMPLES_LIMITED],
		ServersFull: n[bpf.KernelCounterCOUNT_SERVERS_FULL], Adopted: n[bpf.KernelCounterCOUNT_ADOPTED],
	}
	for code := 1; code < events.ReasonCount; code++ {
		reason, _ := events.ReasonOf(uint8(code))
		c.Refused[reason] = n[code]
		c.WouldRefuse[reason] = n[int(bpf.KernelCounterWOULD_REFUSE)+code]
	}
	return c, nil
}

// Events reads the kernel's refusals. There is one reader at a time.
func (d *Datapath) Events() (*events.Reader[events.Event], error) {
	return events.NewEventReader(d.maps.Events)
}

// Samples reads the kernel's samples. There is one reader at a time.
func (d *Datapath) Samples() (*events.Reader[events.Sample], error) {
	return events.NewSampleReader(d.maps.Samples)
}

func dup(fd int, name string) (*os.File, error) {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate descriptor of %s: %w", name, err)
	}
	return os.NewFile(uintptr(n), name), nil
}
