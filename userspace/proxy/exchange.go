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
	c.resolve()
	x.c, x.t, x.s = c, t, s
	x.src, x.target, x.api, x.generation = c.src, c.target, c.api, c.generation
	return x
}

// finish ends both streams and the use of the exchange. A response that is
// not complete must not look so.
func (x *exchange) finish() {
	if x.handle != 0 {
		x.c.p.opt.Pipeline.Live().Remove(x.handle)
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
}

// describe fills in what is asked for.
func (x *exchange) describe(req *flow.Request) {
	h := &x.head
	req.Method, req.Path, req.Query, req.Host = h.Method, h.Path, h.Query, h.Host
	req.Headers, req.ContentLength = h.Fields, h.ContentLength
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

// forward begins the request at the application.
func (x *exchange) forward() error {
	if x.s.Over() {
		return errNoClient
	}
	x.s.Ended = x.onClient
	app, err := x.c.application(x.t)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(x.c.p.opt.ConnectTimeout)
	if err := app.Await(x.t, deadline); err != nil {
		if app.Full() {
			return &refusal{flow.StageUpstream, flow.ReasonOverload, "the application takes no more streams"}
		}
		return &refusal{flow.StageUpstream, flow.ReasonUpstream, "the application does not answer in HTTP/2"}
	}
	if x.s.Over() {
		return errNoClient
	}
	end := x.s.Head().End
	if x.up, err = app.Open(x.t, x.fields(), end, deadline); err != nil {
		return err
	}
	x.up.Ended = x.onApp
	if !end {
		x.pumping = true
		x.t.Go(x.pump)
	}
	return nil
}

// fields is the header list as it goes on: as received, less the fields that
// only we may write, with the one that tells who calls.
func (x *exchange) fields() []http2.Field {
	x.list = x.list[:0]
	authority := x.head.Authority // "" where it could not be read
	for _, f := range x.s.Head().Fields {
		switch {
		case f.Name == ":authority":
			authority = ""
		case authority != "" && !strings.HasPrefix(f.Name, ":"):
			x.list = append(x.list, http2.Field{Name: ":authority", Value: authority})
			authority = ""
		}
		if !http1.IsIdentity([]byte(f.Name)) && (f.Name != "host" || x.head.Authority == "") {
			x.list = append(x.list, f)
		}
	}
	if x.c.h2.cert != "" {
		x.list = append(x.list, http2.Field{Name: "x-forwarded-client-cert", Value: x.c.h2.cert})
	}
	return x.list
}

// clientEnded takes the request back from the application where the client
// took it back.
func (x *exchange) clientEnded() {
	if x.up != nil && !x.s.Orderly() {
		x.up.Reset(http2.CodeCancel, errNoClient)
	}
}

// appEnded has nobody wait for content that the application does not take.
func (x *exchange) appEnded() { _ = x.s.SetReadDeadline(time.Unix(1, 0)) }

// pump carries the content of the request while the response may already
// come.
func (x *exchange) pump(t *netloop.Task) {
	serial, up := x.serial, x.up
	err := x.pumpBody(t)
	if x.serial != serial {
		return // the engine is closing
	}
	if err != nil {
		x.fault = err
		up.Reset(http2.CodeCancel, err) // the application must not take it for complete
	}
	x.pumping = false
	x.pumped.Broadcast()
}

func (x *exchange) pumpBody(t *netloop.Task) error {
	serial, s, up := x.serial, x.s, x.up
	if held := x.held; len(held) > 0 {
		x.held = nil
		x.received = int64(len(held))
		if _, err := up.Write(held); err != nil {
			return err
		}
	}
	for {
		if err := up.Flushed(streamLimit); err != nil || x.serial != serial {
			return err
		}
		_ = s.SetReadDeadline(x.moved.Add(x.idle()))
		err := s.AwaitRead()
		switch {
		case x.serial != serial || up.Over():
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded) && time.Since(x.moved) < x.idle():
			continue
		case err != nil:
			return err
		}
		buf := t.Buffer()
		n, err := s.Read(buf)
		if n > 0 {
			x.moved = time.Now()
			if err = x.measure(n, false); err == nil {
				_, err = up.Write(buf[:n])
			}
		}
		t.Release(buf)
		if errors.Is(err, io.EOF) {
			return x.endBody()
		}
		if err != nil {
			return err
		}
	}
}

// endBody ends the request as the client ended it.
func (x *exchange) endBody() error {
	if err := x.measure(0, true); err != nil {
		return err
	}
	trailers := x.s.Trailers()
	if trailers == nil {
		return x.up.CloseWrite()
	}
	if err := http2.CheckTrailers(trailers, &x.head); err != nil && (x.enforced() || trailers.Long) {
		return err
	}
	return x.up.SendTrailers(trailers.Fields)
}

// idle is how long neither side may say anything.
func (x *exchange) idle() time.Duration {
	if x.head.GRPC {
		return x.c.p.opt.RelayIdle // a subscription may have nothing to say
	}
	return x.c.p.opt.ResponseTimeout
}

// await waits for what the application says next, a header list or content.
// An exchange that takes its time is registered.
func (x *exchange) await(head bool) (h http2.Head, err error) {
	for {
		until := x.moved.Add(x.idle())
		if p := x.patience(); !p.IsZero() {
			until = earlier(until, p)
		}
		_ = x.up.SetReadDeadline(until)
		if head {
			h, err = x.up.ReadHead()
		} else {
			err = x.up.AwaitRead()
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return h, err
		}
		if err := x.lasts(time.Now()); err != nil {
			return h, err
		}
		if time.Since(x.moved) >= x.idle() {
			return h, err
		}
	}
}

// lasts registers the exchange if it is time.
func (x *exchange) lasts(now time.Time) error {
	if x.handle == 0 && now.Sub(x.req.Time) >= patience && !x.watch() {
		return errEnded
	}
	return nil
}

// respond relays the response.
func (x *exchange) respond() error {
	for interim := 0; ; interim++ {
		h, err := x.await(true)
		if err == nil && interim > maxInterim {
			err = errInterim
		}
		if err != nil {
			return err
		}
		if err := x.resp.Parse(&h, x.req.Method); err != nil {
			return err
		}
		if err := x.c.h2.session.Room(x.t); err != nil {
			return err
		}
		x.moved = time.Now()
		if x.resp.Interim() {
			if err := x.s.SendInterim(h.Fields); err != nil {
				return err
			}
			continue
		}
		x.record()
		if err := x.s.SendHead(h.Fields, h.End); err != nil {
			return err
		}
		x.answered, x.complete = true, h.End
		if !h.End {
			if err := x.respondBody(); err != nil {
				return err
			}
		}
		return x.rest()
	}
}

// rest waits for the rest of the request, which the application may still
// take after its response.
func (x *exchange) rest() error {
	for x.pumping {
		if err := x.t.WaitUntil(&x.pumped, x.patience()); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if err := x.lasts(time.Now()); err != nil {
			return err
		}
	}
	return nil
}

// flushed waits until at most limit bytes of the response wait for the
// client's window.
func (x *exchange) flushed(limit int) error {
	for {
		_ = x.s.SetWriteDeadline(x.patience())
		err := x.s.Flushed(limit)
		_ = x.s.SetWriteDeadline(time.Time{})
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if err := x.lasts(time.Now()); err != nil {
			return err
		}
	}
}

// patience is when an exchange lasts, the zero time once it is registered.
func (x *exchange) patience() time.Time {
	if x.handle != 0 {
		return time.Time{}
	}
	return x.req.Time.Add(patience)
}

func (x *exchange) respondBody() error {
	for {
		if _, err := x.await(false); err != nil {
			return err
		}
		buf := x.t.Buffer()
		n, err := x.up.Read(buf)
		if n > 0 {
			_, err = x.s.Write(buf[:n])
		}
		x.t.Release(buf)
		x.sent += int64(n)
		if length := x.resp.ContentLength; length >= 0 && (x.sent > length || errors.Is(err, io.EOF) && x.sent < length) {
			return http2.ErrContent
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = x.flushed(streamLimit)
		}
		if err != nil {
			return err
		}
		x.moved = time.Now()
		if err := x.lasts(x.moved); err != nil {
			return err
		}
	}
	trailers := x.up.Trailers()
	var err error
	if trailers == nil {
		err = x.s.CloseWrite()
	} else if err = http2.CheckTrailers(trailers, nil); err == nil {
		err = x.s.SendTrailers(trailers.Fields)
	}
	if err != nil {
		return err
	}
	x.complete = true
	return x.flushed(0) // and can be ended so long
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
func (x *exchange) watch() bool {
	engine, loop, serial := x.t.Engine(), x.t.Loop(), x.serial
	s := x.c.lives(&x.d, x.req.Time, x.enforced())
	s.Kill = func(reason flow.Reason) {
		engine.Post(loop, func(*netloop.Task) {
			if x.serial == serial {
				x.end(reason)
			}
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
		x.recheck(x.t)
	}
	return x.reason == flow.ReasonOK
}

// recheck judges the request again.
func (x *exchange) recheck(t *netloop.Task) {
	c, serial, now := x.c, x.serial, time.Now()
	c.resolve()
	req := c.request(c.l.judge.NewID(now), now, x.req.Protocol)
	x.describe(&req)
	req.Headers = slices.Clone(req.Headers) // their storage is the exchange's
	var d flow.Decision
	c.p.opt.Pipeline.Decide(pipeline.Env{Loop: c.l.judge, Task: t}, &req, c.src, c.api, &d)
	if x.serial == serial && d.Refused() {
		x.end(endOf(d.Reason))
	}
}

// end resets both streams. Clients of gRPC read the code as PERMISSION_DENIED.
func (x *exchange) end(reason flow.Reason) {
	if x.reason != flow.ReasonOK || !x.enforced() {
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
	if challenge := challengeOf(d.Reason, d.Reason.Status()); challenge != "" {
		if d.Reason == flow.ReasonStepUp {
			challenge += d.Challenge
		}
		list = append(list, http2.Field{Name: "www-authenticate", Value: "Bearer" + challenge})
	}
	return list
}
