// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"encoding/base64"
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

// present gives the other node the tokens that this one obtains for the
// caller's calls to whom the tunnel is for, now and each time that they change.
func (c *call) present(m *tunnel.Session, deadline time.Time) {
	source, id, to := c.p.opt.Obtained, c.peer.ID, c.target.FullName()
	if source == nil || c.src == nil || c.src.ObtainFor(c.target) == nil {
		return
	}
	if source.Pending(id, to) {
		c.awaitToken(c.t, earlier(deadline, time.Now().Add(obtainWait)))
	}
	log := c.p.opt.Logger
	giving, again := false, false
	give := func(t *netloop.Task) {
		again = true
		if giving {
			return // who gives sees to it
		}
		giving = true
		for again {
			again = false
			list := source.All(id, to)
			if err := m.Present(t, appendTokens(nil, list[max(0, len(list)-maxPresented):]), time.Now().Add(obtainWait)); err != nil {
				log.Warn("tokens not presented to the other node", "identity", id, "to", to, "error", err)
			}
		}
		giving = false
	}
	engine, loop := c.t.Engine(), c.t.Loop()
	var stop func()
	stop = source.Watch(id, to, func() {
		engine.Post(loop, func(t *netloop.Task) {
			if m.Over() {
				stop()
				return
			}
			give(t)
		})
	})
	give(c.t)
}

// awaitToken waits for the first try to obtain the caller's token.
func (c *call) awaitToken(t *netloop.Task, deadline time.Time) {
	id, to := c.peer.ID, c.target.FullName()
	t.Block(func() {
		ctx, cancel := context.WithDeadline(context.Background(), deadline)
		defer cancel()
		c.p.opt.Obtained.Await(ctx, id, to)
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
	if c.p.opt.Obtained.Pending(c.peer.ID, to) {
		c.awaitToken(t, time.Now().Add(obtainWait))
	}
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
