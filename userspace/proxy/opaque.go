// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http2"
)

// peeked is a connection of which some bytes were read ahead.
type peeked struct {
	netloop.Stream
	ahead []byte
}

// Read gives out what was read ahead first.
func (p *peeked) Read(b []byte) (int, error) {
	if len(p.ahead) > 0 {
		n := copy(b, p.ahead)
		p.ahead = p.ahead[n:]
		return n, nil
	}
	return p.Stream.Read(b)
}

// NetConn is the connection beneath, for netloop.Flushed.
func (p *peeked) NetConn() net.Conn { return p.Stream }

// AwaitRead is that of the connection beneath, once nothing is ahead.
func (p *peeked) AwaitRead() error {
	if s, ok := p.Stream.(interface{ AwaitRead() error }); ok && len(p.ahead) == 0 {
		return s.AwaitRead()
	}
	return nil
}

// guarded is a connection whose first bytes should be no ClientHello.
type guarded struct {
	netloop.Stream
	looked bool
	hello  func() error // says what becomes of one
}

var errHello = errors.New("a ClientHello where the application speaks no TLS")

// Read looks at the first bytes.
func (g *guarded) Read(b []byte) (int, error) {
	n, err := g.Stream.Read(b)
	if !g.looked && n > 0 {
		g.looked = true
		if looksLikeTLS(b[:n]) {
			if err := g.hello(); err != nil {
				return 0, err
			}
		}
	}
	return n, err
}

// NetConn is the connection beneath, for netloop.Flushed.
func (g *guarded) NetConn() net.Conn { return g.Stream }

// AwaitRead is that of the connection beneath.
func (g *guarded) AwaitRead() error {
	if s, ok := g.Stream.(interface{ AwaitRead() error }); ok {
		return s.AwaitRead()
	}
	return nil
}

// looksLikeTLS says whether b begins a TLS handshake record (RFC 8446, 5.1).
func looksLikeTLS(b []byte) bool {
	return len(b) >= 3 && b[0] == 0x16 && b[1] == 3 && b[2] <= 4
}

// spoken is what the first bytes of a connection tell.
type spoken uint8

const (
	spokenUnheard spoken = iota // nobody has looked yet
	spokenNothing               // none came in time
	spokenHTTP
	spokenHTTP2
	spokenTLS
	spokenOther
	spokenEnd  // the client said nothing and ended its sending side
	spokenGone // the client has gone
)

// detect looks at the first bytes, for at most limit. Where HTTP is expected,
// the beginning of a request line is enough, and what has begun has the time
// limit of a head.
func (c *call) detect(limit time.Duration, expected bool) spoken {
	s := c.look(limit, expected)
	if s == spokenNothing {
		// What came in time counts, however late this node gets round to it.
		s = c.look(time.Millisecond, expected)
	}
	return s
}

func (c *call) look(limit time.Duration, expected bool) spoken {
	_ = c.client.SetReadDeadline(time.Now().Add(limit))
	if s, ok := c.client.(interface{ AwaitRead() error }); ok && c.buf == nil {
		switch err := s.AwaitRead(); {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return spokenNothing
		case err != nil:
			return spokenGone
		}
	}
	c.getBuffer()
	for begun := false; ; {
		if b := c.buf[c.r:c.w]; len(b) > 0 {
			if expected && !begun {
				begun = true
				_ = c.client.SetReadDeadline(time.Now().Add(c.p.opt.HeadTimeout))
			}
			if looksLikeTLS(b) {
				return spokenTLS
			}
			n := min(len(b), len(http2.Preface))
			begins := string(b[:n]) == http2.Preface[:n]
			if begins && n == len(http2.Preface) {
				return spokenHTTP2
			}
			yes, more := http1.LooksLikeHTTP1(b)
			switch { // the first letter of POST is also that of the preface
			case begins:
			case yes || more && expected && b[0] != 0x16:
				return spokenHTTP
			case !more && (len(b) >= 3 || b[0] != 0x16):
				return spokenOther
			}
		}
		c.room(http1.MaxHead)
		n, err := c.client.Read(c.buf[c.w:])
		c.w += n
		switch {
		case n > 0 || err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded) && c.w == c.r:
			return spokenNothing
		case errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) && c.w > c.r:
			return spokenOther
		case errors.Is(err, io.EOF):
			return spokenEnd
		default:
			return spokenGone
		}
	}
}

// serve judges and carries the call by what its policy says is spoken.
func (c *call) serve() {
	c.resolve()
	if c.api == nil {
		c.serveOpaque(flow.ProtocolTCP)
		return
	}
	if !c.endTLS() || c.opening == spokenGone {
		return
	}
	switch c.api.Protocol {
	case compile.ProtocolHTTP, compile.ProtocolGRPC, compile.ProtocolAuto:
		if c.accept() != nil {
			return
		}
		c.serveDetected(c.begins(c.api))
	case compile.ProtocolTLS:
		c.servePassthrough()
	default:
		c.serveOpaque(flow.ProtocolTCP)
	}
}

// callerFirst says whether the caller speaks first, whatever it speaks.
func callerFirst(api *compile.API) bool {
	return api.Protocol == compile.ProtocolHTTP || api.Protocol == compile.ProtocolGRPC
}

// begins tells how a connection begins, which is looked at once: as late as a
// request may come where the caller speaks first, and else before it could be
// taken for waiting.
func (c *call) begins(api *compile.API) spoken {
	first := callerFirst(api)
	if c.opening == spokenUnheard || c.opening == spokenNothing && first && !c.waited { // as the policy was then
		if c.waited = first; first {
			c.opening = c.detect(c.p.opt.IdleTimeout, true)
		} else {
			c.opening = c.detect(c.p.opt.Detect, false)
		}
	}
	return c.opening
}

func (c *call) serveDetected(s spoken) {
	switch {
	case s == spokenGone, callerFirst(c.api) && (s == spokenNothing || s == spokenEnd):
	case s == spokenTLS:
		c.cutOff(flow.ReasonTLSInApp, errHello.Error())
	case s == spokenHTTP:
		c.serveHTTP()
	case s == spokenHTTP2:
		c.serveHTTP2()
	case callerFirst(c.api):
		c.unreadable(&http1.Error{Reason: flow.ReasonNotHTTP, Text: "what came first is no request"})
	default:
		c.serveOpaque(flow.ProtocolTCP)
	}
}

// accept answers a CONNECT that was not answered yet.
func (c *call) accept() error {
	s := c.offered
	c.offered = nil
	if s == nil {
		return nil
	}
	return s.Accept()
}

// reject ends an opaque connection that was refused.
func (c *call) reject() {
	if s := c.offered; s != nil {
		c.offered = nil
		c.p.counts.refused.Add(1)
		_ = s.Refuse(c.d.Reason.Status(), string(c.d.Reason))
		return
	}
	abort(c.client)
}

// cutOff refuses a connection for what was seen on it, or passes it on where
// the policy only observes.
func (c *call) cutOff(reason flow.Reason, detail string) {
	c.begin(flow.ProtocolTCP)
	c.refuse(flow.StageChannel, reason, detail)
	c.record(0, 0)
	if c.d.Refused() {
		c.reject()
		return
	}
	c.passOn()
}

// servePassthrough judges TLS of the application by identity and SNI.
func (c *call) servePassthrough() {
	if c.accept() != nil {
		return
	}
	s := c.detect(c.p.opt.HeadTimeout, false)
	if s == spokenEnd || s == spokenGone {
		return
	}
	if s != spokenTLS {
		c.cutOff(flow.ReasonTLSHandshake, "no ClientHello on a port of TLS")
		return
	}
	name, ok, err := c.hello()
	switch {
	case ok:
		c.host = name
		c.serveOpaque(flow.ProtocolTLS)
	case err == nil:
		c.cutOff(flow.ReasonTLSHandshake, "a ClientHello that cannot be read")
	}
}

// hello receives the rest of a ClientHello and reads its server name; err is
// that of the client where not all of it came.
func (c *call) hello() (name string, ok bool, err error) {
	for {
		name, more, ok := serverName(c.buf[c.r:c.w])
		if ok || !more || c.w-c.r > maxHello {
			return name, ok, nil
		}
		c.room(maxHello + 1)
		n, err := c.client.Read(c.buf[c.w:])
		c.w += n
		if n == 0 && err != nil {
			return "", false, err
		}
	}
}

// serveOpaque judges the connection as a whole and copies it.
func (c *call) serveOpaque(protocol flow.Protocol) {
	c.p.counts.opaque.Add(1)
	req := c.begin(protocol)
	req.Host = c.host
	c.p.opt.Pipeline.Decide(c.env(), req, c.src, c.api, &c.d)
	c.record(0, 0)
	if c.d.Refused() {
		c.reject()
		return
	}
	if c.d.DirectOK {
		c.direct(&c.d)
	}
	if c.connectOpaque() != nil || !c.watch(true) {
		return
	}
	if c.api != nil && c.api.Protocol == compile.ProtocolTCP && c.api.AppTLS == compile.AppTLSNone {
		c.client = &guarded{Stream: c.client, hello: c.refuseHello}
	}
	c.passOn()
}

// refuseHello is for a ClientHello on an opaque connection; it returns an
// error where the connection must not go on.
func (c *call) refuseHello() error {
	c.refuse(flow.StageChannel, flow.ReasonTLSInApp, errHello.Error())
	c.record(0, 0)
	if c.d.Refused() {
		return errHello
	}
	return nil
}

// connectOpaque connects to the application and answers a CONNECT by what
// came of it.
func (c *call) connectOpaque() error {
	err := c.connect()
	if err != nil {
		r := reasonOf(err, flow.ReasonUpstream)
		c.refuse(r.stage, r.reason, r.detail)
		c.d.Enforced = true
		c.record(0, 0)
		c.reject()
		return err
	}
	return c.accept()
}

type verdictKey struct {
	source flow.IdentityNumber
	netns  uint64
	dst    netip.AddrPort
}

const (
	verdictPause = time.Second // between two wishes for the same verdict
	keptVerdicts = 4096
)

// direct asks for the verdict that later connections of this kind need no
// proxy.
func (c *call) direct(d *flow.Decision) {
	if c.peer.Channel != flow.ChannelKernel || c.peer.Number == 0 || c.fromNetns == 0 {
		return
	}
	now := time.Now()
	ttl := c.p.opt.VerdictTTL
	if !d.Until.IsZero() {
		ttl = min(ttl, d.Until.Sub(now))
	}
	key := verdictKey{c.peer.Number, c.fromNetns, c.dst}
	if ttl <= 0 || now.Sub(c.l.verdicts[key]) < verdictPause {
		return
	}
	if len(c.l.verdicts) >= keptVerdicts {
		clear(c.l.verdicts)
	}
	c.l.verdicts[key] = now
	c.p.counts.verdicts.Add(1)
	c.p.opt.Agent.PutVerdict(flow.Verdict{Source: c.peer.Number, SourceNetns: c.fromNetns, Destination: c.dst,
		DestinationNetns: c.netns, Action: flow.ActionDirect, Expires: ttl}, c.p.view.Load().generation)
}
