// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/flow/abi"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"golang.org/x/sys/unix"
)

// DialKind says what a socket is wanted for. The numbers are those of the
// line's DialKind.
type DialKind uint8

// The kinds of a dial.
const (
	DialApplication DialKind = iota + 1 // the protected server of an identity on this node
	DialPeer                            // the tunnel port of another node
	DialPlain                           // an address that no identity claims, or for a caller that is not enforced
)

// DialRequest asks for a socket inside a network namespace of this node.
type DialRequest struct {
	Kind    DialKind
	Netns   uint64              // cookie: where the socket is made
	Address netip.AddrPort      // of the destination; the port is ignored for DialPeer
	Client  netip.AddrPort      // the true client, DialApplication only
	Source  flow.IdentityNumber // on whose behalf, 0 for a caller elsewhere
	Target  flow.IdentityNumber // DialApplication: the protected identity
	Host    string              // DialPlain: the host whose address it is, for egress that verifies
}

// Agent is the privileged process as the proxy needs it, behind the line.
// Its methods may be called from any goroutine and never block.
type Agent interface {
	// Dial asks for a connected or connecting TCP socket. done is called once,
	// from any goroutine, and owns fd, which is -1 where err is not nil; reason
	// is then why, ReasonOK if the agent gave none.
	Dial(r DialRequest, done func(fd int, reason flow.Reason, err error))
	// Sign asks for a signature with an application's key. done is called once,
	// from any goroutine.
	Sign(r SignRequest, done func(signature []byte, err error))
	// PutVerdict asks for a verdict in the kernel. generation is that of the
	// plan it rests on.
	PutVerdict(v flow.Verdict, generation uint64)
}

// Flows finds what the kernel knows of a connection to the outbound
// listener.
type Flows interface {
	// Lookup finds the flow that a socket in the network namespace with that
	// cookie opened from src to dst, as on the wire.
	Lookup(netns uint64, src, dst netip.AddrPort) (f flow.Flow, ok bool)
}

// KernelFlows is the kernel's flow map.
type KernelFlows struct{ Map abi.FlowMap }

// Lookup implements Flows.
func (k KernelFlows) Lookup(netns uint64, src, dst netip.AddrPort) (flow.Flow, bool) {
	key := abi.Key(netns, src, dst)
	var v abi.FlowValue
	if k.Map.Lookup(&key, &v) != nil || v.Kind != abi.KindOut {
		return flow.Flow{}, false
	}
	return flow.Flow{Cookie: v.Cookie, NetnsCookie: netns, Source: src, Destination: v.Original(),
		Identity: flow.IdentityNumber(v.Identity), Target: flow.IdentityNumber(v.Target), Mode: flow.Mode(v.Mode)}, true
}

// refusal is an error that carries why.
type refusal struct {
	stage  flow.Stage
	reason flow.Reason
	detail string
}

func (r *refusal) Error() string { return r.detail + " (" + string(r.reason) + ")" }

// reasonOf returns the reason of an error, or the one given.
func reasonOf(err error, otherwise flow.Reason) *refusal {
	if r, ok := errors.AsType[*refusal](err); ok {
		return r
	}
	return &refusal{flow.StageUpstream, otherwise, err.Error()}
}

// dialed is the answer to a dial, on its way to the task that waits.
type dialed struct {
	fd     int
	reason flow.Reason
	err    error
	done   bool
	gone   bool // nobody waits any more
	ready  netloop.Event
}

// dial has the agent make a connection and waits for it on t's loop.
func (p *Proxy) dial(t *netloop.Task, r DialRequest, deadline time.Time) (*netloop.Conn, error) {
	otherwise := flow.ReasonUpstream
	if r.Kind == DialPeer {
		otherwise = flow.ReasonTunnel
	}
	d := &dialed{fd: -1}
	engine, loop := t.Engine(), t.Loop()
	p.counts.dials.Add(1)
	p.opt.Agent.Dial(r, func(fd int, reason flow.Reason, err error) {
		var claimed atomic.Bool // by the task, or by who closes what no task takes
		engine.Post(loop, func(*netloop.Task) {
			if !claimed.CompareAndSwap(false, true) {
				fd, err = -1, netloop.ErrClosed
			}
			d.fd, d.reason, d.err, d.done = fd, reason, err, true
			if d.gone && fd >= 0 {
				_ = unix.Close(fd)
			}
			d.ready.Signal()
		})
		if engine.Draining() && fd >= 0 {
			// An engine that is closed runs nothing more.
			time.AfterFunc(p.opt.ConnectTimeout, func() {
				if claimed.CompareAndSwap(false, true) {
					_ = unix.Close(fd)
				}
			})
		}
	})
	for !d.done {
		if err := t.WaitUntil(&d.ready, deadline); err != nil && !d.done {
			d.gone = true
			p.counts.dialErrors.Add(1)
			return nil, &refusal{flow.StageUpstream, otherwise, "the agent did not answer a dial in time"}
		}
	}
	if d.err != nil {
		p.counts.dialErrors.Add(1)
		if d.reason != flow.ReasonOK {
			otherwise = d.reason
		}
		return nil, &refusal{flow.StageUpstream, otherwise, fmt.Sprintf("dial %s: %v", r.Address, d.err)}
	}
	c, err := t.AdoptBy(d.fd, deadline)
	if err != nil {
		p.counts.dialErrors.Add(1)
		if r.Kind == DialApplication && errors.Is(err, unix.ECONNREFUSED) {
			otherwise = flow.ReasonUpstreamGone
		}
		return nil, &refusal{flow.StageUpstream, otherwise, fmt.Sprintf("connect to %s: %v", r.Address, err)}
	}
	return c, nil
}
