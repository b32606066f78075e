// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"net/netip"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http2"
	"github.com/sallyport-dev/sallyport/userspace/proxy/tunnel"
)

// tunnelKey is what a tunnel is for. Two identities never share one.
type tunnelKey struct {
	netns  uint64
	source flow.IdentityNumber
	peer   netip.Addr
	target string // full name of the identity that is expected there
}

// tunnelPool holds a loop's tunnels of one key.
type tunnelPool struct {
	sessions []pooledSession
	dialing  bool
	attempts uint64        // dials that have ended
	failed   error         // of the last one
	ended    time.Time     // the last one
	took     time.Duration // the last one
	changed  netloop.Event
}

type pooledSession struct {
	*tunnel.Session
	renew time.Time // from then on new streams take a younger one
}

const (
	maxPools    = 1024
	maxSessions = 16 // of one pool
	openTries   = 3

	// A caller that is not enforced would reach the other node without us: it
	// waits for no tunnel longer than lenientWait, and for one that failed not
	// at all for lenientShare times as long as that took.
	lenientWait  = 500 * time.Millisecond
	lenientShare = 60
	lenientHold  = 30 * time.Second
	// An enforced one can only wait, so it is kept from a peer that is slow to
	// fail no longer than that took.
	enforcedHold = time.Second
)

// held returns the error of the last dial while it is too soon for another.
func (tp *tunnelPool) held(now time.Time, enforced bool) error {
	hold := min(tp.took*lenientShare, lenientHold)
	if r, ok := errors.AsType[*refusal](tp.failed); enforced || ok && r.stage == flow.StageIdentity {
		hold = min(tp.took, enforcedHold) // a leaf of ours may come at any time
	}
	if now.Sub(tp.ended) < hold {
		return tp.failed
	}
	return nil
}

// pick returns a tunnel that takes another stream, and lets go of those that
// have had their time.
func (tp *tunnelPool) pick(now time.Time) *tunnel.Session {
	kept := tp.sessions[:0]
	var found *tunnel.Session
	for _, s := range tp.sessions {
		switch {
		case s.Over() || s.Draining():
			continue
		case now.After(s.renew):
			s.Retire()
			continue
		case found == nil && s.Usable():
			found = s.Session
		}
		kept = append(kept, s)
	}
	clear(tp.sessions[len(kept):])
	tp.sessions = kept
	return found
}

// open returns a stream to c.dst. A stream that a tunnel did not take, since
// it is about to end, is asked for again: nothing was sent on it.
func (p *Proxy) open(c *call) (*tunnel.Stream, error) {
	wait := p.opt.ConnectTimeout
	if !c.enforced() {
		wait = min(wait, lenientWait)
	}
	deadline := time.Now().Add(wait)
	tp := p.pool(c)
	for range openTries {
		s, err := p.session(c, tp, deadline)
		if err != nil {
			return nil, err
		}
		stream, err := s.Open(c.t, c.dst.String(), `for="`+c.peer.Address.String()+`"`, deadline)
		if !errors.Is(err, http2.ErrDraining) {
			return stream, err
		}
	}
	return nil, &refusal{flow.StageUpstream, flow.ReasonTunnel, "every tunnel to the other node is ending"}
}

func (p *Proxy) pool(c *call) *tunnelPool {
	key := tunnelKey{c.fromNetns, c.peer.Number, c.dst.Addr(), c.target.FullName()}
	tp := c.l.tunnels[key]
	if tp == nil {
		if len(c.l.tunnels) >= maxPools {
			for k, other := range c.l.tunnels {
				if other.pick(time.Now()); len(other.sessions) == 0 && !other.dialing {
					delete(c.l.tunnels, k)
				}
			}
		}
		tp = &tunnelPool{}
		c.l.tunnels[key] = tp
	}
	return tp
}

// session returns a tunnel that takes another stream: one of the pool's, or
// a new one, for which one task dials while the others wait.
func (p *Proxy) session(c *call, tp *tunnelPool, deadline time.Time) (*tunnel.Session, error) {
	for {
		began := time.Now()
		if s := tp.pick(began); s != nil {
			return s, nil
		}
		if !tp.dialing {
			if err := tp.held(began, c.enforced()); err != nil {
				return nil, err
			}
			if len(tp.sessions) >= maxSessions {
				return nil, &refusal{flow.StageUpstream, flow.ReasonOverload, "too many streams to the other node"}
			}
			tp.dialing = true
			s, err := p.dialTunnel(c, deadline)
			tp.dialing, tp.failed, tp.ended = false, err, time.Now()
			tp.took = tp.ended.Sub(began)
			tp.attempts++
			if err == nil {
				tp.sessions = append(tp.sessions, s)
			}
			tp.changed.Broadcast()
			return s.Session, err
		}
		for before := tp.attempts; tp.attempts == before; {
			if err := c.t.WaitUntil(&tp.changed, deadline); err != nil && tp.attempts == before {
				return nil, &refusal{flow.StageUpstream, flow.ReasonTunnel, "the other node did not answer in time"}
			}
		}
		if tp.failed != nil {
			return nil, tp.failed
		}
	}
}

// dialTunnel makes a tunnel as the caller's identity.
func (p *Proxy) dialTunnel(c *call, deadline time.Time) (s pooledSession, err error) {
	leaf, err := p.leaf(c, deadline)
	if err != nil {
		return s, &refusal{flow.StageIdentity, flow.ReasonTunnel, err.Error()}
	}
	plan, target := p.view.Load().plan, c.target
	name := target.ID
	if target.Derived {
		name = target.FullName() // its ID names its node, which is not known here
	}
	config, err := identity.ClientConfig(identity.ClientOptions{Leaves: p.opt.Leaves, Verifier: p.opt.Verifier, ID: c.peer.ID, Peer: name,
		Expect: func(id string) bool {
			found, _, ok := plan.Identity(id)
			return ok && found.FullName() == target.FullName()
		}, Sessions: p.sessions})
	if err != nil {
		return s, &refusal{flow.StageIdentity, flow.ReasonTunnel, err.Error()}
	}
	config.DynamicRecordSizingDisabled = true
	conn, err := p.dial(c.t, DialRequest{Kind: DialPeer, Netns: c.fromNetns, Address: c.dst, Source: c.peer.Number}, deadline)
	if err != nil {
		return s, err
	}
	_ = conn.SetDeadline(deadline)
	secured := tls.Client(conn, config)
	if err := secured.Handshake(); err != nil {
		conn.Abort()
		p.counts.handshakes.Add(1)
		reason, detail := identity.ReasonOf(err)
		if reason == flow.ReasonTLSHandshake {
			reason = flow.ReasonTunnel
		}
		return s, &refusal{flow.StageChannel, reason, "tunnel to " + c.dst.Addr().String() + ": " + detail}
	}
	_ = conn.SetDeadline(time.Time{})
	peer, err := p.opt.Verifier.PeerOf(secured.ConnectionState(), identity.RoleServer)
	if err != nil {
		conn.Abort()
		reason, detail := identity.ReasonOf(err)
		return s, &refusal{flow.StageChannel, reason, detail}
	}
	cfg := p.opt.Tunnel
	cfg.NotAfter = earlier(leaf.NotAfter, peer.NotAfter)
	p.counts.tunnelDials.Add(1)
	now := time.Now()
	tokens := c.presenter()
	cfg.OnEnd = tokens.stop
	s = pooledSession{tunnel.Dial(c.t, secured, cfg), now.Add(cfg.NotAfter.Sub(now) / 2)}
	tokens.begin(c.t, s.Session, deadline)
	return s, nil
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// leaf returns the caller's leaf, and waits for its first one; not where a
// caller that is not enforced would wait for one that could not be had.
func (p *Proxy) leaf(c *call, deadline time.Time) (*identity.Leaf, error) {
	leaf, err := p.opt.Leaves.Get(c.peer.ID)
	if err == nil || !c.enforced() && !errors.Is(err, identity.ErrUnsigned) {
		return leaf, err
	}
	id := c.peer.ID
	c.t.Block(func() {
		ctx, cancel := context.WithDeadline(context.Background(), deadline)
		defer cancel()
		leaf, err = p.opt.Leaves.Wait(ctx, id)
	})
	return leaf, err
}

// forwardedFor reads the client's address from a Forwarded field (RFC 7239,
// 4) of one element, and gives the port of the connection where it has none.
func forwardedFor(field string, port uint16) (netip.AddrPort, bool) {
	var value string
	for rest, more := field, true; more; {
		var pair string
		pair, rest, more = strings.Cut(rest, ";")
		name, v, ok := strings.Cut(strings.Trim(pair, " \t"), "=")
		if !ok || strings.ContainsAny(v, ",") {
			return netip.AddrPort{}, false
		}
		if strings.EqualFold(name, "for") {
			if value != "" {
				return netip.AddrPort{}, false
			}
			value = v
		}
	}
	if len(value) >= 2 && value[0] == '"' && value[len(value)-1] == '"' {
		value = value[1 : len(value)-1]
	}
	if a, err := netip.ParseAddrPort(value); err == nil && a.Addr().Zone() == "" {
		return unmap(a), true
	}
	a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(value, "["), "]"))
	if err != nil || a.Zone() != "" {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(a.Unmap(), port), true
}

// believed says whether a tunnel's peer may speak for a client with that
// address: its own, or one of its identity's endpoints'.
func believed(client, peer netip.Addr, src *compile.Identity) bool {
	if client == peer.Unmap() {
		return true
	}
	if src != nil {
		for _, e := range src.Endpoints {
			if e.Addr().Unmap() == client {
				return true
			}
		}
	}
	return false
}
