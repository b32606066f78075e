// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"errors"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http2"
)

const (
	// maxStreams is how many requests of one connection may be under way.
	maxStreams = 250
	// streamLimit is the output of a stream, beyond the peer's window, at which
	// the other side waits.
	streamLimit = 64 << 10
	// appPing is the silence after which an application is pinged: servers of
	// gRPC take more than one in 5 minutes for an attack, and what is on this
	// node does not go without its connection being closed.
	appPing = 10 * time.Minute
)

// duplex is a client's connection that speaks HTTP/2, and the one to the
// application on which its streams go on: one to one, so that either side
// sees of the other what it would see without us.
type duplex struct {
	session   *http2.Session // with the client
	app       *http2.Session // nil until the first request was allowed
	proof     proof          // of app
	dialing   bool
	dialled   netloop.Event
	exchanges int    // under way
	over      bool   // the client's connection has ended
	cert      string // the value of X-Forwarded-Client-Cert, "" for none
}

// settings are those of the client's connection.
func (c *call) settings() http2.Config {
	cfg := http2.Config{MaxStreams: maxStreams, MaxHeaderList: http1.MaxHead, Trailers: true,
		Handshake: c.p.opt.HeadTimeout, Idle: c.p.opt.IdleTimeout, Stall: c.p.opt.ResponseTimeout, DrainTimeout: c.p.opt.DrainTimeout,
		Ending: c.ending}
	if !c.peer.NotAfter.IsZero() {
		cfg.NotAfter = c.lastCall()
	}
	return cfg
}

// serveHTTP2 serves the streams of a connection whose preface was received.
func (c *call) serveHTTP2() {
	c.resolve()
	if !c.watchRequests() {
		return
	}
	if len(c.add) > 0 {
		_, value, _ := strings.Cut(string(c.add), ": ")
		c.h2.cert = strings.TrimSuffix(value, "\r\n")
	}
	c.streams(c.settings(), func(x *exchange) { x.serve() })
	if c.h2.app != nil {
		c.h2.app.Drain()
	}
}

// refuseStreams answers each request with the decision on the connection, of
// a client that speaks HTTP/2.
func (c *call) refuseStreams() {
	c.resolve()
	d, cfg := c.d, c.settings()
	cfg.Idle = c.p.opt.HeadTimeout
	c.streams(cfg, func(x *exchange) {
		_ = x.head.Parse(x.s.Head())
		x.begin()
		x.d = flow.Decision{Effect: d.Effect, Enforced: d.Enforced, Stage: d.Stage, Reason: d.Reason}
		x.deny()
		c.h2.session.Drain()
	})
}

// streams runs f for each request of the connection until it has ended.
func (c *call) streams(cfg http2.Config, f func(*exchange)) {
	client := c.client
	if c.w > c.r {
		client = &peeked{c.client, bytes.Clone(c.buf[c.r:c.w])}
	}
	c.putBuffer()
	err := http2.Serve(c.t, client, cfg, func(t *netloop.Task, s *http2.Stream) {
		c.h2.session = s.Session()
		c.h2.exchanges++
		x := c.newExchange(t, s)
		f(x)
		x.finish()
		c.h2.exchanges--
		if c.h2.over {
			c.release()
		}
	})
	if fault, ok := errors.AsType[*http2.FaultError](err); ok && fault.Code != http2.CodeNone && c.reason == flow.ReasonOK {
		reason := flow.ReasonMalformed
		if fault.Code == http2.CodeEnhanceYourCalm {
			reason = flow.ReasonTooLarge
		}
		c.begin(flow.ProtocolHTTP)
		c.refuse(flow.StageProtocol, reason, fault.Text)
		c.d.Enforced = true // there is nothing to pass on
		c.record(0, 0)
	}
}

var errNoClient = errors.New("the client's connection has ended")

// application returns the session with the application, which the first
// request makes that is allowed.
func (c *call) application(t *netloop.Task, host string) (*http2.Session, error) {
	h := &c.h2
	for h.dialing {
		if err := t.Wait(&h.dialled); err != nil {
			return nil, err
		}
	}
	if h.app != nil {
		if !c.vouched(h.proof) {
			h.app.Drain() // the client makes another connection
		}
		return h.app, nil
	}
	h.dialing = true
	conn, proven, err := c.dialApplication(t, host, []string{"h2"})
	h.dialing = false
	h.dialled.Broadcast()
	switch {
	case err != nil:
		return nil, err
	case h.over || c.reason != flow.ReasonOK:
		abort(conn)
		return nil, errNoClient
	}
	h.proof = proven
	// That the application ends its connection is said to the client, which
	// makes another one, as it would without us; what is under way goes on.
	h.app = http2.Dial(t, conn, http2.Config{MaxHeaderList: http1.MaxHead, Trailers: true, Idle: 2 * c.p.opt.IdleTimeout,
		Handshake: c.p.opt.ConnectTimeout, Stall: c.p.opt.ResponseTimeout, DrainTimeout: c.p.opt.RelayIdle, Ping: appPing, OnDrain: h.session.Retire})
	return h.app, nil
}
