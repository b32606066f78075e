// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http2"
)

// spareExchanges are kept by a loop.
const spareExchanges = 512

// exchange is one request of HTTP/2 and its response, while it is judged and
// carried: a stream of the client's and one of the application's.
type exchange struct {
	c      *call
	t      *netloop.Task // of the response
	s      *http2.Stream // with the client
	up     *http2.Stream // with the application, once the request is allowed
	serial uint64        // of its use

	onClient, onApp func() // clientEnded and appEnded

	src, target *compile.Identity
	api         *compile.API
	generation  uint64

	head http2.Request
	resp http2.Response
	req  flow.Request
	d    flow.Decision
	id   [flow.IDLength]byte
	list []http2.Field // that is sent
	held []byte        // content that was received for the decision
	auth []byte        // the Authorization field that the request gets, nil for none

	received int64 // bytes of the request's content
	sent     int64 // bytes of the response's content
	moved    time.Time
	recorded bool
	answered bool // the client has the head of the response, or a denial
	complete bool // and all of the response

	pumping bool
	pumped  netloop.Event
	fault   error       // of what the client sent, or of nobody taking it
	handle  uint64      // in pipeline.Live, 0 while there is none
	cut     *cut        // of what handle stands for
	looking *looking    // how that is judged again
	reason  flow.Reason // why it was ended from outside
}

// newExchange takes a spare exchange of the loop.
func (c *call) newExchange(t *netloop.Task, s *http2.Stream) *exchange {
	var x *exchange
	if n := len(c.l.spare); n > 0 {
		x = c.l.spare[n-1]
		c.l.spare = c.l.spare[:n-1]
	} else {
		x = &exchange{}
		x.onClient, x.onApp = x.clientEnded, x.appEnded
	}
	x.c, x.t, x.s = c, t, s
	x.resolve()
	return x
}

// resolve looks up who is meant, as policies are now.
func (x *exchange) resolve() {
	c := x.c
	c.resolve()
	x.src, x.target, x.api, x.generation = c.src, c.target, c.api, c.generation
}

// finish ends both streams and the use of the exchange. A response that is
// not complete must not look so.
func (x *exchange) finish() {
	if x.handle != 0 {
		x.c.p.opt.Pipeline.Live().Remove(x.handle)
		if reason := x.cut.reason(); reason != flow.ReasonOK && !x.complete {
			x.end(reason)
		}
	}
	x.s.Ended = nil
	if x.up != nil {
		x.up.Ended = nil
		x.up.Reset(http2.CodeCancel, errNoClient)
		x.appEnded()
	}
	if !x.complete {
		x.s.Reset(http2.CodeCancel, io.ErrUnexpectedEOF)
	}
	if x.wait() != nil {
		return // the engine is closing: the other task may still look at it
	}
	l := x.c.l
	clear(x.d.Steps[:cap(x.d.Steps)])
	clear(x.list[:cap(x.list)])
	fresh := exchange{serial: x.serial + 1, onClient: x.onClient, onApp: x.onApp, list: x.list[:0]}
	fresh.head.Fields, fresh.d.Steps = forget(x.head.Fields), x.d.Steps[:0]
	*x = fresh
	if len(l.spare) < spareExchanges {
		l.spare = append(l.spare, x)
	}
}

// wait waits for the task that carries the request.
func (x *exchange) wait() error {
	for x.pumping {
		if err := x.t.Wait(&x.pumped); err != nil {
			return err
		}
	}
	return nil
}

func (x *exchange) enforced() bool {
	if x.c.leaving {
		return x.c.enforced()
	}
	return x.c.p.opt.Pipeline.Mode(x.api) == flow.ModeEnforce
}

// begin starts the request that a decision is about.
func (x *exchange) begin() {
	now := time.Now()
	x.moved = now
	x.c.l.judge.PutID(&x.id, now)
	protocol := flow.ProtocolHTTP
	if x.head.GRPC {
		protocol = flow.ProtocolGRPC
	}
	x.req = x.c.request(text(x.id[:]), now, protocol)
	x.describe(&x.req)
	if x.auth = x.c.obtained(x.t, &x.req); x.auth != nil {
		x.describe(&x.req)
	}
}

// describe fills in what is asked for.
func (x *exchange) describe(req *flow.Request) {
	h := &x.head
	req.Method, req.Path, req.Query, req.Host, req.Authority = h.Method, h.Path, h.Query, h.Host, h.Authority
	req.Headers, req.ContentLength = bearing(h.Fields, x.auth), h.ContentLength
}

func (x *exchange) refuse(stage flow.Stage, reason flow.Reason, detail string) {
	x.c.refuseBy(&x.d, x.api, x.enforced(), stage, reason, detail)
}

// record notes the decision, once.
func (x *exchange) record() {
	x.recorded = true
	x.c.l.judge.Record(&x.req, x.api, &x.d, pipeline.Outcome{Destination: x.target, Took: time.Since(x.req.Time),
		BytesIn: x.received, BytesOut: max(x.resp.ContentLength, 0)})
}

// serve judges the request and carries it.
func (x *exchange) serve() {
	c := x.c
	c.p.counts.requests.Add(1)
	fault := x.head.Parse(x.s.Head())
	x.begin()
	if fault == nil {
		fault = x.inspect()
	}
	if fault != nil {
		if !x.unreadable(fault) {
			return
		}
	} else {
		c.p.opt.Pipeline.Decide(pipeline.Env{Loop: c.l.judge, Task: x.t}, &x.req, x.src, x.api, &x.d)
		if c.reason != flow.ReasonOK {
			return
		}
		if x.d.Refused() {
			x.record()
			x.deny()
			if x.d.Effect == flow.EffectTerminate {
				c.h2.session.Drain()
			}
			return
		}
		if x.d.DirectOK {
			c.direct(&x.d)
		}
	}
	err := x.forward()
	if err == nil {
		err = x.respond()
	}
	if err != nil {
		x.broken(err)
	}
}

// unreadable is asked what to do with a request that was not judged, and says
// whether it goes on.
func (x *exchange) unreadable(err error) bool {
	if x.s.Over() || x.c.reason != flow.ReasonOK {
		return false
	}
	fault, unread := errors.AsType[*http1.Error](err)
	r, refused := errors.AsType[*refusal](err)
	switch {
	case unread:
		x.refuse(flow.StageProtocol, fault.Reason, fault.Text)
	case refused:
		x.refuse(r.stage, r.reason, r.detail)
	case errors.Is(err, os.ErrDeadlineExceeded):
		x.refuse(flow.StageProtocol, flow.ReasonTimeout, "the content did not arrive in time")
	default:
		return false // the client took it back
	}
	x.d.Enforced = x.d.Enforced || !unread || x.s.Head().Long // then there is nothing to pass on
	x.record()
	if !x.d.Refused() {
		return true
	}
	x.deny()
	return false
}

// inspect receives as much of the content as the policy wants to see before
// the decision.
func (x *exchange) inspect() error {
	if x.api == nil || x.api.Body.Inspect == 0 || x.head.ContentLength == 0 {
		return nil
	}
	if x.c.peer.ID == "" && x.api.MTLS == compile.MTLSRequired {
		return nil // nothing is held for who is refused anyway
	}
	limit := x.api.Body.Inspect
	if x.head.ContentLength > int64(limit) || x.head.Expect || x.encoded() {
		return x.over("the content is longer than is inspected, encoded, or waits for 100 (Continue)")
	}
	buf := x.t.Buffer()
	defer x.t.Release(buf)
	for {
		_ = x.s.SetReadDeadline(time.Now().Add(x.c.p.opt.BodyTimeout))
		n, err := x.s.Read(buf)
		x.held = append(x.held, buf[:n]...)
		switch {
		case errors.Is(err, io.EOF):
			x.req.Body = x.held
			return x.measure(0, true)
		case err != nil:
			return err
		case len(x.held) > limit:
			return x.over("the content is longer than is inspected")
		}
	}
}

// over refuses content that cannot be inspected, or leaves it be.
func (x *exchange) over(why string) error {
	if x.api.Body.SkipOver || !x.enforced() {
		return nil
	}
	return &refusal{flow.StageProtocol, flow.ReasonTooLarge, why}
}

func (x *exchange) encoded() bool {
	for i := range x.head.Fields {
		f := &x.head.Fields[i]
		switch string(f.Name) {
		case "content-encoding", "grpc-encoding":
			if !strings.EqualFold(text(f.Value), "identity") {
				return true
			}
		}
	}
	return false
}

// measure counts content of the request and holds it against Content-Length.
func (x *exchange) measure(n int, end bool) error {
	x.received += int64(n)
	total := x.received + int64(len(x.held))
	if length := x.head.ContentLength; length >= 0 && (total > length || end && total < length) && x.enforced() {
		return http2.ErrContent
	}
	return nil
}

// broken ends an exchange that either side broke off. A client that has
// nothing yet is told; what the application did to the stream is done to the
// client's.
func (x *exchange) broken(err error) {
	if x.fault != nil {
		err = x.fault
	}
	if x.s.Over() || x.reason != flow.ReasonOK || x.c.reason != flow.ReasonOK {
		if !x.recorded {
			x.record()
		}
		return
	}
	stage, reason, detail, code := flow.StageUpstream, flow.ReasonUpstream, err.Error(), http2.CodeInternal
	reset, isReset := errors.AsType[*http2.ResetError](err)
	fault, isFault := errors.AsType[*http1.Error](err)
	tell := !x.answered
	switch {
	case errors.Is(err, http2.ErrDraining):
		code, tell = http2.CodeRefused, false
	case isReset:
		if tell = false; reset.Code != http2.CodeNone {
			code = reset.Code
		}
	case isFault && x.fault != nil:
		stage, reason, code = flow.StageProtocol, fault.Reason, http2.CodeProtocol
	case x.fault != nil && errors.Is(err, os.ErrDeadlineExceeded):
		stage, reason, detail = flow.StageProtocol, flow.ReasonTimeout, "the content did not arrive in time"
	default:
		r := reasonOf(err, flow.ReasonUpstream)
		stage, reason, detail = r.stage, r.reason, r.detail
	}
	if !x.recorded || stage == flow.StageProtocol {
		x.refuse(stage, reason, detail)
		x.d.Enforced = true
		x.record()
	}
	if tell {
		x.deny()
		return
	}
	x.s.Reset(code, err)
}

// watch registers the exchange, so that it ends when what allowed it ends. It
// returns false where that has happened meanwhile.
func (x *exchange) watch() bool { return x.watchBy(x.t) }

func (x *exchange) watchBy(t *netloop.Task) bool {
	engine, loop, serial := t.Engine(), t.Loop(), x.serial
	s, cut := x.c.lives(&x.d, x.req.Time, x.enforced()), &cut{}
	x.cut, x.looking = cut, &looking{}
	s.Kill = func(reason flow.Reason) {
		cut.store(reason)
		engine.Post(loop, func(t *netloop.Task) {
			if x.serial != serial {
				return
			}
			if x.resolve(); !x.enforced() && x.cut == cut {
				x.watchBy(t) // it goes on, and a policy may be enforced yet
				return
			}
			x.end(reason)
		})
	}
	s.Recheck = func() {
		engine.Post(loop, func(t *netloop.Task) {
			if x.serial == serial {
				x.recheck(t)
			}
		})
	}
	x.handle = x.c.p.opt.Pipeline.Live().Add(s)
	if x.c.p.opt.Pipeline.Generation() != x.generation {
		x.recheck(t)
	}
	return x.reason == flow.ReasonOK
}

// recheck judges the request again.
func (x *exchange) recheck(t *netloop.Task) {
	c, serial := x.c, x.serial
	refused := x.looking.until(c.p.opt.Pipeline, func() (flow.Reason, bool) {
		now := time.Now()
		x.resolve()
		req := c.request(c.l.judge.NewID(now), now, x.req.Protocol)
		x.describe(&req)
		req.Headers = slices.Clone(req.Headers) // their storage is the exchange's
		req.ProvenKey = x.d.ProvenKey
		var d flow.Decision
		c.p.opt.Pipeline.Decide(pipeline.Env{Loop: c.l.judge, Task: t, Again: true}, &req, x.src, x.api, &d)
		switch {
		case x.serial != serial: // it is over
			return flow.ReasonOK, false
		case d.Refused():
			return endOf(d.Reason), true
		}
		x.resolve()
		c.restsOn(x.handle, &d, x.enforced())
		return flow.ReasonOK, true
	})
	if refused != flow.ReasonOK && x.serial == serial {
		x.end(refused)
	}
}

// end resets both streams. Clients of gRPC read the code as PERMISSION_DENIED.
func (x *exchange) end(reason flow.Reason) {
	if x.reason != flow.ReasonOK {
		return
	}
	if x.resolve(); !x.enforced() {
		return
	}
	x.reason = reason
	x.c.recordEnd(reason, x.req.Protocol, x.api, x.target)
	x.s.Reset(http2.CodeInadequateSecure, errEnded)
	if x.up != nil {
		x.up.Reset(http2.CodeCancel, errEnded)
	}
}

// deny answers the request with the decision.
func (x *exchange) deny() {
	if x.c.h2.session.Room(x.t) != nil || x.s.Over() {
		return
	}
	x.answered, x.complete = true, true
	// The encoder keeps what it is given.
	reason, proven, id := x.d.Reason, x.c.proven(), string(x.id[:])
	if x.head.GRPC {
		_ = x.s.SendHead(appendStatus(x.list[:0], &x.d, proven, id), true)
		return
	}
	var room [problemRoom]byte
	body := appendProblem(room[:0], reason, proven, id)
	status := reason.Status()
	list := append(x.list[:0], http2.Field{Name: ":status", Value: strconv.Itoa(status)},
		http2.Field{Name: "content-type", Value: "application/problem+json"}, http2.Field{Name: "content-length", Value: strconv.Itoa(len(body))})
	list = appendTold(list, &x.d, id)
	if status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable {
		list = append(list, http2.Field{Name: "retry-after", Value: "1"})
	}
	head := x.head.Method == "HEAD"
	if x.s.SendHead(list, head) != nil || head {
		return
	}
	if _, err := x.s.Write(body); err == nil {
		_ = x.s.CloseWrite()
	}
}

// appendTold appends the fields that every refusal has.
func appendTold(list []http2.Field, d *flow.Decision, id string) []http2.Field {
	list = append(list, http2.Field{Name: "cache-control", Value: "no-store"},
		http2.Field{Name: "x-sallyport-request-id", Value: id, Sensitive: true}) // each has another
	if challenge := challengeOf(d); challenge != "" {
		list = append(list, http2.Field{Name: "www-authenticate", Value: challenge})
	}
	return list
}
