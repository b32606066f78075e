// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"io"
	"os"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
)

// serveHTTP serves one request after another. What was received before is
// in the buffer.
func (c *call) serveHTTP() {
	c.resolve()
	if !c.watchRequests() {
		return
	}
	for {
		err := c.readHead()
		switch {
		case c.reason != flow.ReasonOK:
			return
		case err == nil:
			if !c.serveRequest() {
				return
			}
		case c.w == c.r:
			return // it ended between two requests
		default:
			if !c.unreadable(err) {
				return
			}
		}
	}
}

// readHead receives and parses a head. Between requests it holds no buffer.
func (c *call) readHead() error {
	var scan http1.Scan
	started := false
	for {
		if c.w > c.r {
			n, err := scan.End(c.buf[c.r:c.w])
			if err != nil {
				return err
			}
			if n > 0 {
				return c.head.Parse(c.buf[c.r : c.r+n])
			}
			if !started {
				started = true
				_ = c.client.SetReadDeadline(time.Now().Add(c.p.opt.HeadTimeout))
			}
		} else if err := c.idle(); err != nil {
			return err
		}
		c.getBuffer()
		c.room(http1.MaxHead)
		n, err := c.client.Read(c.buf[c.w:])
		c.w += n
		if n == 0 && err != nil {
			return err
		}
	}
}

// idle waits for the next request.
func (c *call) idle() error {
	until := time.Now().Add(c.p.opt.IdleTimeout)
	if !c.peer.NotAfter.IsZero() {
		until = earlier(until, c.peer.NotAfter.Add(-idleMargin))
	}
	_ = c.client.SetReadDeadline(until)
	if s, ok := c.client.(interface{ AwaitRead() error }); ok {
		c.putBuffer()
		return s.AwaitRead()
	}
	return nil
}

// unreadable is asked what to do with what is no request.
func (c *call) unreadable(err error) bool {
	c.resolve()
	var fault *http1.Error
	c.begin(flow.ProtocolHTTP)
	switch {
	case errors.As(err, &fault):
		c.refuse(flow.StageProtocol, fault.Reason, fault.Text)
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.refuse(flow.StageProtocol, flow.ReasonTimeout, "the head did not arrive in time")
	default:
		return false // the client went away in the middle of a head
	}
	c.record(0, 0)
	if !c.d.Refused() {
		c.passOn()
		return false
	}
	c.head.Method = nil
	return c.deny(false)
}

// passOn carries the rest of the connection as it is.
func (c *call) passOn() {
	if err := c.connect(); err != nil {
		abort(c.client)
		return
	}
	c.relayRest()
}

// relayRest carries what was received and what comes, both ways.
func (c *call) relayRest() {
	if c.w > c.r {
		if _, err := c.upstream.Write(c.buf[c.r:c.w]); err != nil {
			return
		}
	}
	c.putBuffer()
	c.relay(c.upstream)
}

// relay copies both ways to the end of both.
func (c *call) relay(to netloop.Stream) (in, out int64) {
	in, out, err := netloop.Relay(c.t, c.client, to, netloop.RelayOptions{Idle: c.p.opt.RelayIdle})
	if err != nil {
		// It must not look complete.
		abort(c.client)
		abort(to)
	}
	return in, out
}

// methods are the usual ones as strings that outlive the buffer.
var methods = [...]string{"GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS"}

func methodOf(b []byte) string {
	for _, m := range methods {
		if string(b) == m {
			return m
		}
	}
	return string(b)
}

// serveRequest judges the request whose head was read, and carries it.
func (c *call) serveRequest() bool {
	c.p.counts.requests.Add(1)
	c.started = false
	c.resolve()
	req := c.begin(flow.ProtocolHTTP)
	h := &c.head
	req.Method = methodOf(h.Method)
	if err := c.inspect(req); err != nil {
		return c.stop(err)
	}
	// What inspect received may have moved the head.
	req.Path, req.Query, req.Host, req.Headers, req.ContentLength = text(h.Path), text(h.Query), text(h.Host), h.Fields, h.ContentLength
	req.Upgrade, req.Authority = h.Upgrade(), text(h.Authority)
	c.auth = c.obtained(c.t, req)
	req.Headers = bearing(h.Fields, c.auth)
	h.Fields = req.Headers[:len(h.Fields)] // with its room
	c.p.opt.Pipeline.Decide(c.env(), req, c.src, c.api, &c.d)
	if c.reason != flow.ReasonOK {
		return false
	}
	if c.d.Refused() {
		c.record(0, 0)
		whole := c.skipBody()
		return c.deny(whole && c.d.Effect != flow.EffectTerminate)
	}
	if c.d.DirectOK {
		c.direct(&c.d)
	}
	if err := c.connect(); err != nil {
		return c.stop(reasonOf(err, flow.ReasonUpstream))
	}
	return c.exchange()
}

// stop ends a request that was allowed, or not judged, for a reason outside
// the pipeline.
func (c *call) stop(err error) bool {
	var fault *http1.Error
	var r *refusal
	switch {
	case c.reason != flow.ReasonOK:
		return false
	case errors.As(err, &fault):
		c.refuse(flow.StageProtocol, fault.Reason, fault.Text)
		if !c.d.Enforced && !c.started {
			c.record(0, 0)
			c.passOn()
			return false
		}
	case errors.As(err, &r):
		c.refuse(r.stage, r.reason, r.detail)
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.refuse(flow.StageProtocol, flow.ReasonTimeout, "the body did not arrive in time")
	default:
		return false // the client went away
	}
	c.d.Enforced = true // there is nothing to pass on
	c.record(0, 0)
	return c.deny(!c.started && c.skipBody())
}

// skipBody steps over the content of a request that does not go on, if all
// of it is there.
func (c *call) skipBody() bool {
	body := c.head.BodyFor()
	at := min(c.r+c.head.Len, c.w)
	n, err := body.Next(c.buf[at:c.w])
	c.r = at + n
	return err == nil && body.Done()
}

// inspect receives as much of the content as the policy wants to see before
// the decision.
func (c *call) inspect(req *flow.Request) error {
	if c.api == nil || c.api.Body.Inspect == 0 || c.head.ContentLength == 0 {
		return nil
	}
	if c.peer.ID == "" && c.api.MTLS == compile.MTLSRequired {
		return nil // nothing is held for who is refused anyway
	}
	limit := c.api.Body.Inspect
	if c.head.ContentLength > int64(limit) || c.head.Expect || c.encoded() {
		return c.over("the content is longer than is inspected, encoded, or waits for 100 (Continue)")
	}
	if c.head.ContentLength > 0 {
		want := c.head.Len + int(c.head.ContentLength)
		for c.w-c.r < want {
			if err := c.more(want); err != nil {
				return err
			}
		}
		req.Body = c.buf[c.r+c.head.Len : c.r+want]
		return nil
	}
	return c.inspectChunks(req, limit)
}

// inspectChunks is inspect for a chunked body, of which it makes a copy.
func (c *call) inspectChunks(req *flow.Request, limit int) error {
	body := c.head.BodyFor()
	var content []byte
	for at := c.head.Len; ; {
		for raw := c.buf[c.r+at : c.w]; len(raw) > 0 && !body.Done(); {
			from, to, used, err := body.Split(raw)
			if err != nil {
				return err
			}
			if content = append(content, raw[from:to]...); len(content) > limit {
				return c.over("the content is longer than is inspected")
			}
			raw = raw[used:]
			at += used
		}
		if body.Done() {
			req.Body = content
			return nil
		}
		if err := c.more(c.head.Len + 2*limit + 32<<10); err != nil {
			return err
		}
	}
}

// over refuses content that cannot be inspected, or leaves it be.
func (c *call) over(why string) error {
	if c.api.Body.SkipOver || !c.enforced() {
		return nil
	}
	return &refusal{flow.StageProtocol, flow.ReasonTooLarge, why}
}

func (c *call) encoded() bool {
	for i := range c.head.Fields {
		f := &c.head.Fields[i]
		if len(f.Name) == len("content-encoding") && strings.EqualFold(text(f.Name), "content-encoding") && !strings.EqualFold(text(f.Value), "identity") {
			return true
		}
	}
	return false
}

// more receives more of the content, up to limit bytes from the head on, and
// parses the head again where the buffer has moved.
func (c *call) more(limit int) error {
	before := &c.buf[c.r]
	c.room(limit)
	if c.w == len(c.buf) {
		return &refusal{flow.StageProtocol, flow.ReasonTooLarge, "more chunk framing than content"}
	}
	if &c.buf[c.r] != before {
		if err := c.head.Parse(c.buf[c.r : c.r+c.head.Len]); err != nil {
			return err
		}
	}
	_ = c.client.SetReadDeadline(time.Now().Add(c.p.opt.BodyTimeout))
	n, err := c.client.Read(c.buf[c.w:])
	c.w += n
	if n > 0 {
		return nil
	}
	return err
}

// exchange sends the request and relays the response.
func (c *call) exchange() bool {
	c.started = false
	add := c.lines()
	c.front(len(add))
	at := c.r + c.head.Len
	c.body = c.head.BodyFor()
	n, err := c.body.Next(c.buf[at:c.w])
	if err != nil {
		return c.stop(err)
	}
	begin := c.head.Compact(c.buf, c.r, add)
	// The head's storage is void now.
	c.req.Path, c.req.Query, c.req.Host, c.req.Authority, c.req.Headers, c.req.Body = "", "", "", "", nil, nil
	head := c.req.Method == "HEAD"
	c.old = c.head.Minor == 0
	if _, err := c.upstream.Write(c.buf[begin : at+n]); err != nil {
		return c.broken(err)
	}
	c.r = at + n
	c.started, c.pumpErr = true, nil
	c.round++
	c.sent, c.sentAt = c.sent[:0], [2]int{begin, at}
	if !c.body.Done() {
		c.keepHead() // the body takes its place
		c.pumping = true
		c.t.Go(c.pump)
	}
	keep, err := c.respond(head)
	if errors.Is(err, errSwitched) {
		c.relayRest()
		return false
	}
	early := c.pumping
	if early {
		keep = false
		c.stopPump()
	}
	switch {
	case err != nil:
		return false
	case early:
		c.lingerOn()
	case !keep:
		c.linger()
	}
	return keep
}

// lines are the field lines that the request gets from us.
func (c *call) lines() []byte {
	c.resp.Accept = c.head.Accept()
	if c.resp.Accept == "" && c.auth == nil {
		return c.add
	}
	b := append(c.scratch[:0], c.add...)
	if c.auth != nil {
		b = append(append(append(append(b, authorization...), ": "...), c.auth...), "\r\n"...)
	}
	if c.resp.Accept != "" {
		c.head.DropConnection()
		b = append(b, http1.SwitchLines...)
	}
	c.scratch = b
	return b
}

// front makes sure that n bytes are free in front of the head. Where it moves,
// its fields are void.
func (c *call) front(n int) {
	if n <= c.r {
		return
	}
	larger := make([]byte, n+len(c.buf))
	w := n + copy(larger[n:], c.buf[c.r:c.w])
	c.putBuffer()
	c.buf, c.r, c.w = larger, n, w
}

// keepHead copies the head that was sent, so that an exchange that lasts can
// be judged again.
func (c *call) keepHead() {
	if len(c.sent) == 0 {
		c.sent = append(c.sent, c.buf[c.sentAt[0]:c.sentAt[1]]...)
	}
}

// pump carries the rest of the request body while the response may already
// come.
func (c *call) pump(*netloop.Task) {
	serial, client, upstream := c.serial, c.client, c.upstream
	err := c.pumpBody(client, upstream)
	if err != nil {
		abort(upstream) // the application must not take it for complete
	}
	if c.serial == serial { // else the engine is closing
		c.pumping, c.pumpErr = false, err
		c.pumped.Broadcast()
	}
}

func (c *call) pumpBody(client, upstream netloop.Stream) error {
	serial := c.serial
	for !c.body.Done() {
		c.room(netloop.BufferSize)
		limit := c.p.opt.BodyTimeout
		if c.body.UntilClose() {
			limit = c.p.opt.RelayIdle
		}
		_ = client.SetReadDeadline(time.Now().Add(limit))
		n, err := client.Read(c.buf[c.w:])
		if c.serial != serial {
			return netloop.ErrClosed
		}
		if n == 0 && err != nil {
			if errors.Is(err, io.EOF) && c.body.UntilClose() {
				return upstream.CloseWrite()
			}
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		c.w += n
		used, err := c.body.Next(c.buf[c.r:c.w])
		if err != nil && c.enforced() {
			return err
		}
		if err != nil {
			// Where the content ends cannot be said: all that comes goes on.
			c.noteFault(err)
			c.body, used = http1.UntilClose(), c.w-c.r
		}
		if _, err := upstream.Write(c.buf[c.r : c.r+used]); err != nil {
			return err
		}
		c.r += used
		if c.body.Done() {
			return nil
		}
		if err := netloop.Flushed(upstream, flushLimit); err != nil {
			return err
		}
	}
	return nil
}

// noteFault records what an enforcing policy would have refused, while the
// request itself goes on.
func (c *call) noteFault(err error) {
	if fault, ok := errors.AsType[*http1.Error](err); ok {
		allowed := c.d
		c.d.Steps = nil
		c.refuse(flow.StageProtocol, fault.Reason, fault.Text)
		c.record(0, 0)
		c.d = allowed
	}
}

// stopPump ends a body that nobody waits for any more.
func (c *call) stopPump() {
	_ = c.client.SetReadDeadline(time.Unix(1, 0))
	if c.upstream != nil {
		_ = c.upstream.SetWriteDeadline(time.Unix(1, 0))
	}
	for c.pumping {
		if c.t.Wait(&c.pumped) != nil {
			return
		}
	}
}

// broken ends an exchange that the application broke off. Where the client
// has nothing yet, it is told; where the application ended a connection that
// it had kept, the client sees that too, as it would without us, and may
// send an idempotent request again.
func (c *call) broken(err error) bool {
	cause := c.pumpErr
	if c.pumping {
		c.stopPump() // else two tasks would read the client
	}
	switch {
	case c.reason != flow.ReasonOK:
		return false
	case cause != nil:
		return c.stop(cause)
	case c.used && !errors.Is(err, os.ErrDeadlineExceeded) && !isFault(err):
		c.record(0, 0)
		abort(c.client)
		return false
	}
	c.refuse(flow.StageUpstream, flow.ReasonUpstream, err.Error())
	c.d.Enforced = true
	c.record(0, 0)
	c.head.Close = true
	return c.deny(false)
}

func isFault(err error) bool {
	_, ok := errors.AsType[*http1.Error](err)
	return ok
}
