// SPDX-License-Identifier: Apache-2.0

// Package proxy is the second door: it takes the connections that the kernel
// sends to the listeners inside workloads' network namespaces, has each
// request, or each opaque connection, judged by the pipeline, and carries what
// is allowed to the application, as the true client, or through a tunnel to
// the other node.
//
// It runs on package netloop: one task a connection, two while a request body
// and its response are under way at once; of HTTP/2 as many for each stream. The privileged process is behind
// Agent. Nothing here decides; what it cannot read unambiguously it refuses,
// or passes on untouched where the policy only observes.
package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/obtain"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/proxy/tunnel"
)

// Options of a Proxy. Zero durations and counts take the defaults.
type Options struct {
	Pipeline *pipeline.Pipeline
	Agent    Agent
	Flows    Flows
	Leaves   *identity.Leaves
	Verifier *identity.Verifier
	Obtained *obtain.Source // tokens for this node's identities; nil: none
	Roots    *x509.CertPool // that the certificates of hosts outside lead to; nil: the system's
	Anchor   flow.Anchor    // of this node's own identities
	Logger   *slog.Logger   // nil discards

	Tunnel tunnel.Config // NotAfter is set for each session

	HeadTimeout     time.Duration // for a head, from its first byte (15 s)
	BodyTimeout     time.Duration // between two reads of a body (60 s)
	IdleTimeout     time.Duration // between two requests (5 min)
	ResponseTimeout time.Duration // for the application to answer (5 min)
	RelayIdle       time.Duration // of an opaque connection (2 h)
	ConnectTimeout  time.Duration // to the application and to the other node (10 s)
	Detect          time.Duration // for the first bytes that tell the protocol (200 ms)
	VerdictTTL      time.Duration // of a direct verdict (5 min)
	DrainTimeout    time.Duration // for what is under way when the peer's certificate ends (30 s)

	MaxPerNetns    int // connections of one network namespace (16384)
	MaxPerIdentity int // connections of one caller, those without identity together (8192)
}

func (o Options) withDefaults() Options {
	for _, d := range []struct {
		value *time.Duration
		def   time.Duration
	}{{&o.HeadTimeout, 15 * time.Second}, {&o.BodyTimeout, time.Minute}, {&o.IdleTimeout, 5 * time.Minute},
		{&o.ResponseTimeout, 5 * time.Minute}, {&o.RelayIdle, 2 * time.Hour}, {&o.ConnectTimeout, 10 * time.Second},
		{&o.Detect, 200 * time.Millisecond}, {&o.VerdictTTL, 5 * time.Minute}, {&o.DrainTimeout, 30 * time.Second}} {
		if *d.value <= 0 {
			*d.value = d.def
		}
	}
	for _, d := range []struct {
		value *int
		def   int
	}{{&o.MaxPerNetns, 16384}, {&o.MaxPerIdentity, 8192}} {
		if *d.value <= 0 {
			*d.value = d.def
		}
	}
	if o.Tunnel.DrainTimeout <= 0 {
		o.Tunnel.DrainTimeout = o.DrainTimeout
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// Kind is what a listener is for. The numbers are those of the line's
// ListenerKind.
type Kind uint8

// The kinds of listeners.
const (
	KindOutbound Kind = iota + 1 // connect() is rewritten to it
	KindInbound                  // SYNs to protected ports are steered to it
	KindTunnel                   // other nodes' tunnels
)

// Proxy serves listeners on an engine.
type Proxy struct {
	opt      Options
	engine   *netloop.Engine
	loops    netloop.Local[loop]
	sessions *identity.Sessions
	view     atomic.Pointer[view]
	counts   counts

	mu     sync.Mutex // guards what follows, and changes of view
	netns  map[uint64]*namespace
	limits limits
}

// namespace is a network namespace with listeners of ours.
type namespace struct {
	cookie    uint64
	listeners []*netloop.Listener
	tunnelTLS *tls.Config
	steerTLS  *tls.Config
	conns     atomic.Int64
}

// loop is what belongs to one event loop.
type loop struct {
	judge    *pipeline.Loop
	tunnels  map[tunnelKey]*tunnelPool
	verdicts map[verdictKey]time.Time
	hosts    map[hostProofKey]*hostProof
	calls    []*call // spare
	spare    []*exchange
	refusing int // calls that refuseEarly is at
}

// New returns a proxy without listeners.
func New(e *netloop.Engine, o Options) *Proxy {
	p := &Proxy{opt: o.withDefaults(), engine: e, netns: map[uint64]*namespace{}, sessions: identity.NewSessions(4096)}
	p.loops.New = func(*netloop.Task) *loop {
		return &loop{judge: p.opt.Pipeline.NewLoop(), tunnels: map[tunnelKey]*tunnelPool{}, verdicts: map[verdictKey]time.Time{}, hosts: map[hostProofKey]*hostProof{}}
	}
	p.limits.of = map[string]int{}
	p.view.Store((&view{}).build())
	return p
}

// change swaps the view.
func (p *Proxy) change(f func(*view)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := *p.view.Load()
	f(&v)
	p.view.Store(v.build())
}

// SetPlan swaps the plan, here and in the pipeline. generation is the
// agent's, for verdicts.
func (p *Proxy) SetPlan(plan *compile.Plan, generation uint64) {
	p.change(func(v *view) { v.plan, v.generation = plan, generation })
	p.opt.Pipeline.SetPlan(plan)
}

// SetIdentities replaces the table of local identities.
func (p *Proxy) SetIdentities(list []LocalIdentity) {
	p.change(func(v *view) { v.local = list })
}

// SetAddresses replaces the table of this node's own addresses.
func (p *Proxy) SetAddresses(list []NetnsAddresses) {
	p.change(func(v *view) { v.addresses = list })
}

// Serve accepts from the listening socket fd, which stays the caller's.
func (p *Proxy) Serve(fd int, kind Kind, netns uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	ns := p.netns[netns]
	if ns == nil {
		ns = p.newNamespace(netns)
	}
	serve := map[Kind]func(*netloop.Task, *netloop.Conn, *namespace){
		KindOutbound: p.outbound, KindInbound: p.steered, KindTunnel: p.tunnel}[kind]
	if serve == nil {
		return errors.New("serve listener: unknown kind")
	}
	ln, err := p.engine.Serve(fd, func(t *netloop.Task, c *netloop.Conn) {
		p.counts.accepted[kind].Add(1)
		if ns.conns.Add(1) > int64(p.opt.MaxPerNetns) {
			p.counts.overload.Add(1)
			c.Abort()
		} else {
			serve(t, c, ns)
		}
		ns.conns.Add(-1)
	})
	if err != nil {
		return err
	}
	ns.listeners = append(ns.listeners, ln)
	p.netns[netns] = ns
	return nil
}

// newNamespace makes the TLS configurations of a namespace.
func (p *Proxy) newNamespace(netns uint64) *namespace {
	ns := &namespace{cookie: netns}
	ns.tunnelTLS = identity.ServerConfig(identity.ServerOptions{Leaves: p.opt.Leaves, Verifier: p.opt.Verifier,
		Identity: func(hello *tls.ClientHelloInfo) (string, error) {
			id, err := p.view.Load().server(netns, hello.ServerName)
			if err != nil {
				return "", err
			}
			return id.ID, nil
		}})
	ns.steerTLS = identity.ServerConfig(identity.ServerOptions{Leaves: p.opt.Leaves, Verifier: p.opt.Verifier,
		NextProtos: []string{"http/1.1", "h2", ""}, // "" is a client without ALPN
		Identity: func(hello *tls.ClientHelloInfo) (string, error) {
			dst, err := netip.ParseAddrPort(hello.Conn.LocalAddr().String())
			if err != nil {
				return "", err
			}
			api := p.view.Load().protected(netns, unmap(dst))
			if api == nil {
				return "", errNoServer
			}
			return api.Identity.ID, nil
		}})
	return ns
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// CloseNetns closes the listeners of a network namespace; connections live
// on.
func (p *Proxy) CloseNetns(netns uint64) {
	p.mu.Lock()
	ns := p.netns[netns]
	delete(p.netns, netns)
	p.mu.Unlock()
	if ns != nil {
		ns.close()
	}
}

// CloseListeners closes all listeners; connections live on.
func (p *Proxy) CloseListeners() {
	p.mu.Lock()
	all := p.netns
	p.netns = map[uint64]*namespace{}
	p.mu.Unlock()
	for _, ns := range all {
		ns.close()
	}
}

func (ns *namespace) close() {
	for _, ln := range ns.listeners {
		_ = ln.Close()
	}
}

// limits count the connections of each caller, so that one's flood denies
// only itself.
type limits struct {
	mu sync.Mutex // held for a map look-up, twice a connection
	of map[string]int
}

// take counts a connection of a caller, by its SPIFFE ID or what stands for
// one; it is refused if there are too many.
func (p *Proxy) take(caller string) bool {
	p.limits.mu.Lock()
	defer p.limits.mu.Unlock()
	n := p.limits.of[caller]
	if n >= p.opt.MaxPerIdentity {
		p.counts.overload.Add(1)
		return false
	}
	p.limits.of[caller] = n + 1
	return true
}

func (p *Proxy) give(caller string) {
	p.limits.mu.Lock()
	defer p.limits.mu.Unlock()
	if n := p.limits.of[caller]; n > 1 {
		p.limits.of[caller] = n - 1
	} else {
		delete(p.limits.of, caller)
	}
}

// counts are the proxy's own counters; decisions are counted by the
// pipeline.
type counts struct {
	accepted                              [KindTunnel + 1]atomic.Uint64
	overload, noFlow, handshakes, refused atomic.Uint64
	dials, dialErrors                     atomic.Uint64
	tunnels, streams                      atomic.Int64
	tunnelDials                           atomic.Uint64
	requests, opaque, killed, verdicts    atomic.Uint64
}

// Stats is a snapshot of the proxy's counters.
type Stats struct {
	Outbound, Inbound, Tunnel uint64 // connections accepted
	Overload                  uint64 // connections over a limit
	NoFlow                    uint64 // connections to the outbound listener that the kernel did not send
	HandshakesRefused         uint64
	StreamsRefused            uint64 // CONNECT requests
	Dials, DialErrors         uint64
	Tunnels                   int64  // live, from other nodes
	TunnelDials               uint64 // tunnels made to other nodes
	Streams                   int64  // live, both directions
	Requests, Opaque          uint64
	Killed                    uint64 // live connections that were ended by a revocation, a policy or the time
	Verdicts                  uint64 // direct verdicts asked for
}

// Stats returns the counters.
func (p *Proxy) Stats() Stats {
	c := &p.counts
	return Stats{
		Outbound: c.accepted[KindOutbound].Load(), Inbound: c.accepted[KindInbound].Load(), Tunnel: c.accepted[KindTunnel].Load(),
		Overload: c.overload.Load(), NoFlow: c.noFlow.Load(), HandshakesRefused: c.handshakes.Load(), StreamsRefused: c.refused.Load(),
		Dials: c.dials.Load(), DialErrors: c.dialErrors.Load(), Tunnels: c.tunnels.Load(), TunnelDials: c.tunnelDials.Load(), Streams: c.streams.Load(),
		Requests: c.requests.Load(), Opaque: c.opaque.Load(), Killed: c.killed.Load(), Verdicts: c.verdicts.Load(),
	}
}
