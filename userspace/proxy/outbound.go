// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"strconv"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
	"github.com/sallyport-dev/sallyport/userspace/proxy/tunnel"
)

// outbound serves a connection that the kernel rewrote to the listener in
// the caller's namespace: it knows who calls, and where to.
func (p *Proxy) outbound(t *netloop.Task, conn *netloop.Conn, ns *namespace) {
	c := p.newCall(t, conn)
	defer c.release()
	c.fromNetns = ns.cookie
	f, ok := p.opt.Flows.Lookup(ns.cookie, conn.RemoteAddrPort(), conn.LocalAddrPort())
	if !ok {
		p.counts.noFlow.Add(1)
		c.peer = flow.Peer{Address: conn.RemoteAddrPort(), Channel: flow.ChannelKernel}
		c.begin(flow.ProtocolTCP)
		c.refuse(flow.StageKernel, flow.ReasonNoFlow, "the kernel did not send this connection")
		c.d.Enforced = true
		c.record(0, 0)
		conn.Abort()
		return
	}
	c.fromMode = f.Mode
	v, err := p.recognise(t, f.Identity)
	if err != nil {
		conn.Abort()
		return
	}
	caller := v.ids[f.Identity]
	if !p.take(caller) {
		conn.Abort()
		return
	}
	defer p.give(caller)
	c.dst = f.Destination
	c.peer = flow.Peer{ID: caller, Number: f.Identity, Address: v.client(ns.cookie, f.Source, f.Destination), Channel: flow.ChannelKernel, Anchor: p.opt.Anchor}
	c.leave(v, v.asked(ns.cookie, f.Destination, f.Target))
}

const (
	// recogniseTimeout is how long a caller waits that the kernel knows
	// already and the agent does not: an exact path is given its identity
	// before mkdir returns, its processes are found a moment later.
	recogniseTimeout = 2 * time.Second
	recogniseEvery   = 5 * time.Millisecond
)

// recognise returns the view, one with that caller if there is one soon.
func (p *Proxy) recognise(t *netloop.Task, n flow.IdentityNumber) (*view, error) {
	v := p.view.Load()
	if _, known := v.ids[n]; known || n == 0 {
		return v, nil
	}
	for deadline := time.Now().Add(recogniseTimeout); time.Now().Before(deadline); {
		if err := t.Sleep(recogniseEvery); err != nil {
			return nil, err
		}
		v = p.view.Load()
		if _, known := v.ids[n]; known {
			break
		}
	}
	return v, nil
}

// leave judges what can be judged here and takes the way to the
// destination, which target serves, nil for nobody.
func (c *call) leave(v *view, target *compile.Identity) {
	c.leaving = true
	if target == nil {
		c.plain()
		return
	}
	c.targetID = target.ID
	c.resolve()
	req := c.begin(flow.ProtocolTCP)
	c.p.opt.Pipeline.DecideOutbound(c.env(), req, c.src, c.target, c.fromMode, &c.d)
	if c.d.Effect != flow.EffectAllow {
		c.record(0, 0)
	}
	if c.d.Refused() {
		c.refuseEarly()
		return
	}
	home, known := v.home(c.fromNetns, c.dst.Addr())
	switch {
	case !known:
		c.remote()
	case home == 0:
		c.fail(&refusal{flow.StageUpstream, flow.ReasonUpstreamGone, "several namespaces of this node have the address"})
	case v.api(target, c.dst.Port()) == nil:
		c.netns = home
		c.unprotected()
	default:
		c.netns, c.leaving = home, false
		c.identify()
		c.serve()
	}
}

// fail ends a call that cannot go on for a reason outside the pipeline.
func (c *call) fail(r *refusal) {
	c.refuse(r.stage, r.reason, r.detail)
	c.d.Enforced = true
	c.record(0, 0)
	c.refuseEarly()
}

// maxRefusing is how many refused callers of a loop have the time that a head
// may take to begin; more could keep others from their places.
const maxRefusing = 256

// refuseEarly refuses a connection before anything was read of it: a client
// that speaks HTTP is told why, others are reset.
func (c *call) refuseEarly() {
	switch c.refusedBegins() {
	case spokenHTTP:
	case spokenHTTP2:
		c.refuseStreams()
		return
	default:
		abort(c.client)
		return
	}
	var scan http1.Scan
	if n, err := scan.End(c.buf[c.r:c.w]); err == nil && n > 0 && c.head.Parse(c.buf[c.r:c.r+n]) == nil {
		c.req.Method = methodOf(c.head.Method)
	}
	c.deny(false)
}

// refusedBegins tells how a refused connection begins.
func (c *call) refusedBegins() spoken {
	if c.api == nil || !callerFirst(c.api) || c.l.refusing >= maxRefusing {
		return c.detect(c.p.opt.Detect, false)
	}
	c.l.refusing++
	defer func() { c.l.refusing-- }()
	return c.detect(c.p.opt.HeadTimeout, false)
}

// unprotected ends a call to a local identity's port that no policy protects:
// nothing says who may serve there. A caller whose policy only observes goes
// on as it would without us.
func (c *call) unprotected() {
	if !c.enforced() {
		c.plain()
		return
	}
	c.fail(&refusal{flow.StagePolicy, flow.ReasonNoPolicy, "the address is " + c.target.FullName() + "'s, and no policy protects that port"})
}

// remote carries a connection through a tunnel to the node that has the
// destination; it is judged there.
func (c *call) remote() {
	s, err := c.p.open(c)
	if err != nil {
		r := reasonOf(err, flow.ReasonTunnel)
		if refused, ok := errors.AsType[*tunnel.RefusedError](err); ok {
			r = &refusal{flow.StageUpstream, flow.ReasonTunnelRefused,
				"the other node refused with status " + strconv.Itoa(refused.Status) + " " + refused.Reason}
		}
		if c.enforced() || c.reason != flow.ReasonOK {
			c.fail(r)
			return
		}
		// A caller whose policy only observes goes on as it would without us:
		// the other node may have no tunnel at all.
		c.refuse(r.stage, r.reason, r.detail)
		c.record(0, 0)
		c.plain()
		return
	}
	c.onward = s
	s.Local, s.Remote = c.peer.Address, c.dst
	if !c.watch(true) {
		return
	}
	c.p.counts.streams.Add(1)
	c.relay(s)
	c.p.counts.streams.Add(-1)
}
