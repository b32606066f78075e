// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"os"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/obtain"
	"github.com/sallyport-dev/sallyport/userspace/proxy/tunnel"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

const (
	// obtainWait is how long a caller's first connection waits for the token
	// that is obtained for it.
	obtainWait = 3 * time.Second
	// presentAgain is after how long tokens that did not get to the other node
	// are presented again, twice as long each time up to presentAgainMax.
	presentAgain    = time.Second
	presentAgainMax = time.Minute
	// maxPresented bounds the tokens that a tunnel's peer may present.
	maxPresented = 16
)

var (
	authorization = []byte("Authorization")
	bearer        = []byte("Bearer ")
)

// presented is what the node of a tunnel's peer has obtained for it, as it is
// bound to the certificate that the tunnel was made with. It belongs to the
// tunnel's loop.
type presented struct{ field []byte }

// take replaces it by what is in a list for a certificate with that thumbprint.
func (p *presented) take(list []byte, thumbprint [32]byte) bool {
	tokens, ok := parseTokens(list)
	if !ok {
		return false
	}
	p.field = nil
	for _, t := range tokens {
		if t.Thumbprint == thumbprint {
			p.field = t.Field
		}
	}
	return true
}

// appendTokens encodes tokens: a line for each, of the thumbprint in base64url
// and the value of the Authorization field.
func appendTokens(b []byte, list []obtain.Token) []byte {
	for _, t := range list {
		b = append(base64.RawURLEncoding.AppendEncode(b, t.Thumbprint[:]), ' ')
		b = append(append(b, t.Field...), '\n')
	}
	return b
}

// parseTokens reads what appendTokens writes.
func parseTokens(b []byte) ([]obtain.Token, bool) {
	var list []obtain.Token
	for len(b) > 0 {
		line, rest, ended := bytes.Cut(b, []byte{'\n'})
		print, field, parted := bytes.Cut(line, []byte{' '})
		value, isBearer := bytes.CutPrefix(field, bearer)
		var t obtain.Token
		if !ended || !parted || !isBearer || len(list) == maxPresented || len(print) != base64.RawURLEncoding.EncodedLen(len(t.Thumbprint)) || !token.WellFormed(value) {
			return nil, false
		}
		if _, err := base64.RawURLEncoding.Strict().Decode(t.Thumbprint[:], print); err != nil {
			return nil, false
		}
		t.Field = bytes.Clone(field)
		list, b = append(list, t), rest
	}
	return list, true
}

// presenter gives the other node of a tunnel the tokens that this one obtains
// for the caller's calls to whom the tunnel is for, and each time that they
// change. It belongs to the tunnel's loop.
type presenter struct {
	p       *Proxy
	m       *tunnel.Session
	id, to  string
	given   bool // the other node has some
	changed bool // what it has may not be what there is
	running bool // in a task that sees to it
	woken   netloop.Event
	stop    func() // ends it, with the tunnel; any number of times
}

// presenter returns that of a tunnel of the caller.
func (c *call) presenter() *presenter {
	g := &presenter{p: c.p, id: c.peer.ID, to: c.target.FullName(), stop: func() {}}
	if g.p.opt.Obtained != nil {
		engine, loop := c.t.Engine(), c.t.Loop()
		g.stop = g.p.opt.Obtained.Watch(g.id, g.to, func() { engine.Post(loop, g.change) })
	}
	return g
}

// begin gives what there is before anything is asked for.
func (g *presenter) begin(t *netloop.Task, m *tunnel.Session, deadline time.Time) {
	g.m = m
	if g.p.opt.Obtained == nil {
		return
	}
	g.running = true
	if g.give(t, deadline) != nil {
		g.changed = true
	}
	t.Go(g.run)
}

// change takes note of a change.
func (g *presenter) change(t *netloop.Task) {
	g.changed = true
	switch {
	case g.running:
		g.woken.Signal()
	case g.m != nil:
		g.running = true
		g.run(t)
	}
}

// run gives until there is nothing new, and again what did not get there; not
// what the other node refuses for good.
func (g *presenter) run(t *netloop.Task) {
	defer func() { g.running = false }()
	told := ""
	for wait := presentAgain; g.changed && !g.m.Over(); {
		g.changed = false
		err := g.give(t, time.Now().Add(2*obtainWait))
		if err == nil {
			wait, told = presentAgain, ""
			continue
		}
		if g.m.Over() {
			return
		}
		if text := err.Error(); text != told {
			told = text
			g.p.opt.Logger.Warn("tokens not presented to the other node", "identity", g.id, "to", g.to, "error", err)
		}
		if refused, ok := errors.AsType[*tunnel.RefusedError](err); ok && refused.Status/100 == 4 && refused.Status != http.StatusTooManyRequests {
			continue
		}
		g.changed = true
		if err := t.WaitTimeout(&g.woken, wait); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		wait = min(2*wait, presentAgainMax)
	}
}

// give presents what there is, once there can be something.
func (g *presenter) give(t *netloop.Task, deadline time.Time) error {
	g.p.awaitToken(t, g.id, g.to, earlier(deadline, time.Now().Add(obtainWait)))
	list := g.p.opt.Obtained.All(g.id, g.to)
	if len(list) == 0 && !g.given {
		return nil
	}
	// Whether it has got there is not known where it fails.
	g.given = true
	if err := g.m.Present(t, appendTokens(nil, list[max(0, len(list)-maxPresented):]), earlier(deadline, time.Now().Add(obtainWait))); err != nil {
		return err
	}
	g.given = len(list) > 0
	return nil
}

// awaitToken waits for the first try to obtain a token for an identity's calls
// to another, if there is to be one.
func (p *Proxy) awaitToken(t *netloop.Task, id, to string, deadline time.Time) {
	if !p.opt.Obtained.Pending(id, to) {
		return
	}
	t.Block(func() {
		ctx, cancel := context.WithDeadline(context.Background(), deadline)
		defer cancel()
		p.opt.Obtained.Await(ctx, id, to)
	})
}

// obtained returns the value of an Authorization field for a request that
// brings none, from the token that the caller's own node has obtained for it;
// nil for none.
func (c *call) obtained(t *netloop.Task, req *flow.Request) []byte {
	own := c.presented == nil && c.p.opt.Obtained != nil && c.peer.Channel == flow.ChannelKernel && c.src != nil && c.src.Tokens != nil && c.target != nil
	if c.presented == nil && !own {
		return nil
	}
	if _, count := req.HeaderValue("Authorization"); count > 0 {
		return nil
	}
	if c.presented != nil {
		return c.presented.field
	}
	to := c.target.FullName()
	c.p.awaitToken(t, c.peer.ID, to, time.Now().Add(obtainWait))
	found := c.p.opt.Obtained.Newest(c.peer.ID, to)
	if found == nil {
		return nil
	}
	// The leaf that it is bound to may have come while it was waited for.
	req.Peer.Thumbprints = c.p.opt.Leaves.Thumbprints(c.peer.ID)
	return found.Field
}

// bearing adds an Authorization field to the header list of a request, nil
// adds none.
func bearing(list []flow.Header, field []byte) []flow.Header {
	if field == nil {
		return list
	}
	return append(list, flow.Header{Name: authorization, Value: field})
}
