// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"crypto/tls"
	"net/http"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
	"github.com/sallyport-dev/sallyport/userspace/proxy/tunnel"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

const (
	// headroom is what a buffer keeps free in front of a head, for the field
	// lines that we add.
	headroom   = 4 << 10
	flushLimit = 256 << 10 // output of one side at which the other waits
	spareCalls = 256       // kept by a loop
)

// call is one client's connection, or stream, to a protected address, while
// it is judged and carried. It belongs to one loop and is used again.
type call struct {
	p      *Proxy
	t      *netloop.Task
	l      *loop
	serial uint64 // of its use

	client    netloop.Stream
	netns     uint64    // where the application is
	fromNetns uint64    // where the client is, on the same node
	fromMode  flow.Mode // in which the kernel held it
	peer      flow.Peer
	dst       netip.AddrPort
	targetID  string
	opening   spoken // what its first bytes told
	waited    bool   // for them as long as for a request
	ended     bool   // endTLS was there already

	resolved   bool
	generation uint64
	src        *compile.Identity
	target     *compile.Identity
	api        *compile.API

	req     flow.Request
	d       flow.Decision
	id      [flow.IDLength]byte
	head    http1.Request
	resp    http1.Response
	buf     []byte // received from the client: buf[r:w]
	r, w    int
	scratch []byte
	add     []byte // field lines that tell the application who calls

	leaving  bool           // to another node, or to what no policy protects: judged as such
	host     string         // of an opaque connection: the SNI
	offered  *tunnel.Stream // a CONNECT that is not answered yet
	onward   netloop.Stream // the tunnel's stream to the other node
	outside  *outside       // nil for what is judged by policies of ours
	upstream netloop.Stream // to the application
	proof    proof          // of upstream
	used     bool           // the upstream has answered a request
	h2       duplex

	presented *presented // by the tunnel's peer, nil without a tunnel
	auth      []byte     // the Authorization field that the request gets, nil for none

	// The request body, while it goes on beside the response.
	body    http1.Body
	sent    []byte // the head that went to the application, of an exchange that lasts
	sentAt  [2]int // where it lies in buf, until something else is received
	round   uint64 // counts exchanges
	started bool   // something of the request has gone to the application
	old     bool   // HTTP/1.0
	pumping bool
	pumpErr error
	pumped  netloop.Event

	handle  uint64      // in pipeline.Live, 0 while there is none
	cut     *cut        // of what handle stands for
	looking *looking    // how that is judged again
	reason  flow.Reason // why it was ended from outside
}

// newCall takes a spare call of the loop.
func (p *Proxy) newCall(t *netloop.Task, client netloop.Stream) *call {
	l := p.loops.Get(t)
	var c *call
	if n := len(l.calls); n > 0 {
		c = l.calls[n-1]
		l.calls = l.calls[:n-1]
	} else {
		c = &call{p: p, l: l}
	}
	c.t, c.client = t, client
	return c
}

// release ends the use of a call, once the last of its exchanges has ended:
// nothing of a peer stays in it.
func (c *call) release() {
	if c.h2.exchanges > 0 {
		c.h2.over = true
		return
	}
	if c.handle != 0 {
		c.p.opt.Pipeline.Live().Remove(c.handle)
		if reason := c.cut.reason(); reason != flow.ReasonOK {
			c.end(reason)
		}
	}
	if c.upstream != nil {
		_ = c.upstream.Close()
	}
	if c.onward != nil {
		_ = c.onward.Close()
	}
	c.putBuffer()
	steps := c.d.Steps[:0]
	clear(c.d.Steps[:cap(c.d.Steps)])
	fresh := call{p: c.p, l: c.l, serial: c.serial + 1, scratch: c.scratch[:0], add: c.add[:0], sent: c.sent[:0]}
	fresh.head.Fields, fresh.resp.Fields = forget(c.head.Fields), forget(c.resp.Fields)
	*c = fresh
	c.d.Steps = steps
	if cap(c.scratch) > 4<<10 {
		c.scratch = nil
	}
	if clear(c.sent[:cap(c.sent)]); cap(c.sent) > 4<<10 {
		c.sent = nil
	}
	if len(c.l.calls) < spareCalls {
		c.l.calls = append(c.l.calls, c)
	}
}

// forget clears what points into a buffer and keeps the storage.
func forget(f []flow.Header) []flow.Header {
	clear(f[:cap(f)])
	return f[:0]
}

func (c *call) getBuffer() {
	if c.buf == nil {
		c.buf = c.t.Buffer()
		c.r, c.w = headroom, headroom
	}
}

func (c *call) putBuffer() {
	if len(c.buf) == netloop.BufferSize {
		c.t.Release(c.buf)
	}
	c.buf, c.r, c.w = nil, 0, 0
}

// room makes sure that at least one more byte can be received, unless there
// are limit bytes already.
func (c *call) room(limit int) {
	if c.r == c.w {
		c.r, c.w = headroom, headroom
	}
	if c.w < len(c.buf) {
		return
	}
	if c.r > headroom {
		c.w = headroom + copy(c.buf[headroom:], c.buf[c.r:c.w])
		c.r = headroom
		return
	}
	size := min(2*len(c.buf), headroom+limit+1)
	if size <= len(c.buf) {
		return
	}
	larger := make([]byte, size)
	copy(larger, c.buf[:c.w])
	r, w := c.r, c.w
	c.putBuffer()
	c.buf, c.r, c.w = larger, r, w
}

// resolve looks up who calls and what protects the destination, again after
// the plan, the revocations or the relations changed.
func (c *call) resolve() {
	g := c.p.opt.Pipeline.Generation()
	if c.resolved && g == c.generation {
		return
	}
	v := c.p.view.Load()
	c.resolved, c.generation = true, g
	c.src = v.source(c.peer.ID)
	c.target = v.source(c.targetID)
	c.api = v.api(c.target, c.dst.Port())
}

func (c *call) env() pipeline.Env { return pipeline.Env{Loop: c.l.judge, Task: c.t} }

// enforced says whether a refusal refuses.
func (c *call) enforced() bool {
	if c.leaving {
		mode := c.fromMode
		if c.src != nil {
			mode = c.src.Mode
		}
		return flow.MinMode(mode, c.p.opt.Pipeline.Mode(nil)) == flow.ModeEnforce
	}
	return c.p.opt.Pipeline.Mode(c.api) == flow.ModeEnforce
}

// text views b as a string that is valid as long as b is.
func text(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// begin starts the request that a decision is about.
func (c *call) begin(protocol flow.Protocol) *flow.Request {
	now := time.Now()
	c.l.judge.PutID(&c.id, now)
	c.req = c.request(text(c.id[:]), now, protocol)
	return &c.req
}

// request begins what a decision is about.
func (c *call) request(id string, now time.Time, protocol flow.Protocol) flow.Request {
	req := flow.Request{ID: id, Time: now, Peer: c.peer, Destination: c.dst, Protocol: protocol}
	_, req.TLS = c.client.(*tls.Conn)
	if c.peer.Channel == flow.ChannelKernel {
		req.Peer.Thumbprints = c.p.opt.Leaves.Thumbprints(c.peer.ID)
	}
	return req
}

// refuse makes a decision of what was found outside the pipeline.
func (c *call) refuse(stage flow.Stage, reason flow.Reason, detail string) {
	c.refuseBy(&c.d, c.api, c.enforced(), stage, reason, detail)
}

// refuseBy is refuse for a decision that is not the connection's own.
func (c *call) refuseBy(d *flow.Decision, api *compile.API, enforced bool, stage flow.Stage, reason flow.Reason, detail string) {
	steps := append(d.Steps[:0], flow.Step{Stage: stage, Reason: reason, Detail: detail})
	*d = flow.Decision{Effect: flow.EffectDeny, Enforced: enforced, Stage: stage, Reason: reason, Detail: detail, Steps: steps}
	d.Subjects[0] = c.peer.ID
	switch {
	case api != nil:
		d.Policy, d.Position = api.Name, api.Position.FileLine()
	case c.leaving && c.src != nil:
		d.Position = c.src.Position.FileLine()
	}
}

// record notes the decision, once.
func (c *call) record(in, out int64) {
	c.l.judge.Record(&c.req, c.api, &c.d, pipeline.Outcome{Destination: c.target, Took: time.Since(c.req.Time), BytesIn: in, BytesOut: out})
}

// connect has the agent dial the application for this client, unless it is
// connected already.
func (c *call) connect() error {
	if c.upstream != nil {
		if !gone(c.upstream) && c.vouched(c.proof) {
			return nil
		}
		// The application ended it while it was idle, or has to prove something
		// else by now; nothing was asked yet.
		_ = c.upstream.Close()
		c.upstream, c.proof, c.used = nil, proof{}, false
	}
	var speaks []string
	if c.req.Protocol == flow.ProtocolHTTP {
		speaks = []string{"http/1.1"}
	}
	conn, proven, err := c.dialApplication(c.t, c.req.Host, speaks)
	if err != nil {
		return err
	}
	c.upstream, c.proof = conn, proven
	if c.reason != flow.ReasonOK { // ended while the agent dialled
		return &refusal{flow.StagePolicy, c.reason, "ended before it was connected"}
	}
	return nil
}

// dialApplication has the agent make a connection to the application. Where
// that is spoken to in TLS, host is what the caller asked for, "" if that is
// not known, and speaks are the protocols for ALPN.
func (c *call) dialApplication(t *netloop.Task, host string, speaks []string) (netloop.Stream, proof, error) {
	deadline, api := time.Now().Add(c.p.opt.ConnectTimeout), c.api // under which the call was judged
	conn, err := c.p.dial(t, DialRequest{Kind: DialApplication, Netns: c.netns, Address: c.dst, Client: c.peer.Address,
		Source: c.peer.Number, Target: c.p.view.Load().numbers[c.targetID]}, deadline)
	if err != nil {
		return nil, proof{}, err
	}
	if !reencrypts(api) {
		return conn, proof{}, nil
	}
	return c.reencrypt(conn, api, host, speaks, deadline)
}

// lives is what a decision allowed, as it is registered.
func (c *call) lives(d *flow.Decision, issued time.Time, enforced bool) pipeline.Stream {
	s := pipeline.Stream{Subjects: d.Subjects, Serial: c.peer.Serial, Issued: issued, Until: d.Until}
	s.Subjects[0] = c.peer.ID
	if !s.Until.IsZero() && s.Until.Equal(c.peer.NotAfter) {
		// What is under way may end in order while the tunnel drains.
		s.Until = s.Until.Add(c.p.opt.DrainTimeout)
	}
	if !enforced {
		s.Until = time.Time{}
	}
	return s
}

// restsOn has what is registered end with what a later decision rests on.
func (c *call) restsOn(handle uint64, d *flow.Decision, enforced bool) {
	s := c.lives(d, time.Time{}, enforced)
	c.p.opt.Pipeline.Live().Update(handle, s.Subjects, s.Until)
}

// watchRequests is watch for a connection of which each request is judged by
// itself: it rests on none of their decisions.
func (c *call) watchRequests() bool {
	c.d.Until, c.d.Subjects = time.Time{}, [4]string{}
	c.sent = c.sent[:0]
	return c.watch(false)
}

// cut is why something live is to be ended, from before its own loop hears of
// it: what carried it may end sooner, and hide the reason.
type cut struct{ why atomic.Pointer[flow.Reason] }

func (c *cut) store(reason flow.Reason) { c.why.Store(&reason) }

func (c *cut) reason() flow.Reason {
	if r := c.why.Load(); r != nil {
		return *r
	}
	return flow.ReasonOK
}

// looking is how something live is judged again: by one task at a time.
type looking struct {
	under bool // one is at it
	again bool // something has changed since it began
}

// until judges until nothing has changed meanwhile: judge returns what refuses
// it, and false where there is nothing to be judged any more. It returns what
// refuses it now. One refusal may be older than a change; after a second one no
// change counts, so that none can come too often for a refusal to count at all.
func (l *looking) until(p *pipeline.Pipeline, judge func() (flow.Reason, bool)) flow.Reason {
	if l.under {
		l.again = true
		return flow.ReasonOK
	}
	l.under = true
	defer func() { l.under = false }()
	for twice := false; ; {
		l.again = false
		generation := p.Generation()
		refused, ok := judge()
		changed := l.again || p.Generation() != generation
		switch {
		case !ok:
			return flow.ReasonOK
		case refused != flow.ReasonOK && (twice || !changed):
			return refused
		case !changed:
			return flow.ReasonOK
		}
		twice = refused != flow.ReasonOK
	}
}

// watch registers the call, so that it ends when what allowed it ends. It
// returns false where that has happened meanwhile.
func (c *call) watch(opaque bool) bool { return c.watchBy(c.t, opaque) }

func (c *call) watchBy(t *netloop.Task, opaque bool) bool {
	engine, loop, serial := t.Engine(), t.Loop(), c.serial
	s, cut, l := c.lives(&c.d, c.req.Time, c.enforced()), &cut{}, &looking{}
	c.cut, c.looking = cut, l
	s.Kill = func(reason flow.Reason) {
		cut.store(reason)
		engine.Post(loop, func(t *netloop.Task) {
			if c.serial != serial {
				return
			}
			if c.resolve(); !c.enforced() && c.cut == cut {
				c.watchBy(t, opaque) // it goes on, and a policy may be enforced yet
				return
			}
			c.end(reason)
		})
	}
	if opaque || len(c.sent) > 0 {
		s.Recheck = func() {
			engine.Post(loop, func(t *netloop.Task) {
				if c.serial == serial && c.looking == l {
					c.recheck(t, serial)
				}
			})
		}
	}
	live := c.p.opt.Pipeline.Live()
	if c.handle != 0 {
		live.Remove(c.handle)
	}
	c.handle = live.Add(s)
	if c.p.opt.Pipeline.Generation() == c.generation {
		return true
	}
	if s.Recheck == nil {
		return true // the next request is judged anew
	}
	c.recheck(t, c.serial)
	return c.reason == flow.ReasonOK
}

// recheck judges an opaque call, or an exchange that lasts, again.
func (c *call) recheck(t *netloop.Task, serial uint64) {
	c.resolve()
	if c.outside != nil {
		c.recheckOutside(t, serial)
		return
	}
	l, round, handle := c.looking, c.round, c.handle
	refused := l.until(c.p.opt.Pipeline, func() (flow.Reason, bool) {
		c.resolve()
		var d flow.Decision
		switch known := c.judgeAgain(t, &d); {
		case c.serial != serial || c.looking != l || c.round != round: // it is over
			return flow.ReasonOK, false
		case !known:
			return flow.ReasonPolicyChanged, true // what cannot be judged again is not allowed
		case d.Refused():
			return endOf(d.Reason), true
		}
		c.restsOn(handle, &d, c.enforced())
		return flow.ReasonOK, true
	})
	if refused != flow.ReasonOK {
		c.end(refused)
	}
}

// judgeAgain decides anew, and says whether what was sent is known.
func (c *call) judgeAgain(t *netloop.Task, d *flow.Decision) bool {
	now := time.Now()
	req := flow.Request{ID: c.l.judge.NewID(now), Time: now, Peer: c.req.Peer, Destination: c.dst, Protocol: c.req.Protocol, Host: c.host}
	if len(c.sent) > 0 {
		var h http1.Request
		if h.ParseSent(bytes.Clone(c.sent)) != nil {
			return false
		}
		req.Method, req.Path, req.Query, req.Host = text(h.Method), text(h.Path), text(h.Query), text(h.Host)
		req.Headers, req.ContentLength, req.Upgrade = h.Fields, h.ContentLength, h.Upgrade()
		req.Authority, req.TLS, req.ProvenKey = text(h.Authority), c.req.TLS, c.d.ProvenKey
	}
	env := pipeline.Env{Loop: c.l.judge, Task: t, Again: true}
	if c.leaving {
		c.p.opt.Pipeline.DecideOutbound(env, &req, c.src, c.target, c.fromMode, d)
	} else {
		c.p.opt.Pipeline.Decide(env, &req, c.src, c.api, d)
	}
	return true
}

// endOf is why a live call ends that would be refused now.
func endOf(refused flow.Reason) flow.Reason {
	switch refused {
	case flow.ReasonIdentityRevoked, flow.ReasonCertificateRevoked, flow.ReasonTokenRevoked:
		return flow.ReasonRevoked
	}
	return flow.ReasonPolicyChanged
}

// end cuts the call; its tasks get errors from what they wait for.
func (c *call) end(reason flow.Reason) {
	if c.reason != flow.ReasonOK || !c.enforced() {
		return
	}
	c.reason = reason
	c.recordEnd(reason, c.req.Protocol, c.api, c.target)
	abort(c.client)
	if c.upstream != nil {
		abort(c.upstream)
	}
	if c.onward != nil {
		abort(c.onward)
	}
}

// recordEnd notes that something live was ended. A decision of the call's own
// may be under way in c.req and c.d.
func (c *call) recordEnd(reason flow.Reason, protocol flow.Protocol, api *compile.API, target *compile.Identity) {
	c.p.counts.killed.Add(1)
	now := time.Now()
	req := flow.Request{ID: c.l.judge.NewID(now), Time: now, Peer: c.peer, Destination: c.dst, Protocol: protocol}
	d := flow.Decision{Effect: flow.EffectTerminate, Enforced: true, Stage: flow.StagePolicy, Reason: reason, Detail: "a live connection was ended"}
	if api != nil {
		d.Policy, d.Position = api.Name, api.Position.FileLine()
	}
	c.l.judge.Record(&req, api, &d, pipeline.Outcome{Destination: target})
}

// abort resets a connection of whatever kind.
func abort(s netloop.Stream) {
	switch v := s.(type) {
	case *tunnel.Stream:
		v.Abort()
	case *netloop.Conn:
		v.Abort()
	case *peeked:
		abort(v.Stream)
	case *guarded:
		abort(v.Stream)
	case *appConn:
		abort(v.Stream)
	case *tls.Conn:
		if inner, ok := v.NetConn().(netloop.Stream); ok {
			abort(inner)
		}
	}
}

// ending says that the connection should end after the current response.
func (c *call) ending() bool {
	if c.t.Engine().Draining() {
		return true
	}
	if s, ok := c.client.(*tunnel.Stream); ok && s.Draining() {
		return true
	}
	return !c.peer.NotAfter.IsZero() && time.Now().After(c.lastCall())
}

// lastCall is from when on each response says that it is the last, because
// the peer's certificate is about to end.
func (c *call) lastCall() time.Time { return c.peer.NotAfter.Add(-lastCallMargin) }

const (
	lastCallMargin = 500 * time.Millisecond
	// idleMargin is when a connection without a request is closed: late, since
	// a request that is on its way just then is lost.
	idleMargin = 100 * time.Millisecond
)

// deny answers the request with the decision, as a problem document, and
// says whether the connection can go on.
func (c *call) deny(whole bool) bool {
	keep := whole && !c.head.Close && !c.ending()
	b := appendDenial(c.scratch[:0], &c.d, c.proven(), text(c.id[:]), c.req.Method == "HEAD", keep)
	c.scratch = b
	if _, err := c.client.Write(b); err != nil {
		return false
	}
	if netloop.Flushed(c.client, flushLimit) != nil {
		return false
	}
	if !keep {
		c.linger()
	}
	return keep
}

// linger ends the sending side and reads on for a moment: closing at once,
// with bytes unread, would reset the connection and take the answer away.
func (c *call) linger() { c.readOn(256<<10, time.Second, time.Second) }

// lingerOn is linger for a client whose request was allowed and answered before
// all of it had come: it may go on sending, as it would to the application.
func (c *call) lingerOn() { c.readOn(64<<20, 5*time.Second, 30*time.Second) }

// readOn reads at most so many bytes, for pauses of idle and altogether limit.
func (c *call) readOn(most int, idle, limit time.Duration) {
	if c.client.CloseWrite() != nil {
		return
	}
	end := time.Now().Add(limit)
	c.getBuffer()
	for read := 0; read < most; {
		_ = c.client.SetReadDeadline(earlier(end, time.Now().Add(idle)))
		n, err := c.client.Read(c.buf)
		if err != nil {
			return
		}
		read += n
	}
}

// proven says that the caller is not a stranger: the kernel knows its
// identity, or a certificate or another node proved it.
func (c *call) proven() bool { return c.peer.ID != "" || c.peer.Number != 0 }

// appendDenial appends the answer to a refused request: RFC 9457, with the
// challenge of RFC 6750 and RFC 9470 where a token would mend it. It says
// nothing about policies, and to a stranger not even every reason.
func appendDenial(b []byte, d *flow.Decision, proven bool, id string, head, keep bool) []byte {
	reason := d.Reason
	status := reason.Status()
	title := http.StatusText(status)
	b = append(b, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(append(append(b, ' '), title...), "\r\nContent-Type: application/problem+json\r\nCache-Control: no-store\r\nX-Sallyport-Request-Id: "...)
	b = append(append(b, id...), "\r\n"...)
	if challenge := challengeOf(d); challenge != "" {
		b = append(append(append(b, "WWW-Authenticate: "...), challenge...), "\r\n"...)
	}
	if status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable {
		b = append(b, "Retry-After: 1\r\n"...)
	}
	if !keep {
		b = append(b, "Connection: close\r\n"...)
	}
	var room [problemRoom]byte
	body := appendProblem(room[:0], reason, proven, id)
	b = append(b, "Content-Length: "...)
	b = append(strconv.AppendInt(b, int64(len(body)), 10), "\r\n\r\n"...)
	if head {
		return b
	}
	return append(b, body...)
}

// problemRoom is more than a problem document takes, in bytes.
const problemRoom = 768

// appendProblem appends the problem document of a refusal.
func appendProblem(b []byte, reason flow.Reason, proven bool, id string) []byte {
	status := reason.Status()
	told := string(reason.Told(proven))
	if told == "" {
		b = append(b, `{"type":"about:blank`...)
	} else {
		b = append(append(append(b, `{"type":"`+flow.ReasonsURL...), told...), flow.ReasonsSuffix...)
	}
	b = append(append(b, `","title":"`...), http.StatusText(status)...)
	b = append(strconv.AppendInt(append(b, `","status":`...), int64(status), 10), `,"detail":"`...)
	b = append(append(append(b, reason.Public()...), `","instance":"urn:sallyport:request:`...), id...)
	if told != "" {
		b = append(append(b, `","reason":"`...), told...)
	}
	return append(append(append(b, `","requestID":"`...), id...), "\"}\n"...)
}

// challengeOf returns the value of a WWW-Authenticate field (RFC 6750, RFC
// 9449 section 7.1, RFC 9470), "" for none.
func challengeOf(d *flow.Decision) string {
	var what string
	switch {
	case d.Reason == flow.ReasonTokenScope:
		what = `error="insufficient_scope"`
	case d.Reason.Status() != http.StatusUnauthorized:
		return ""
	case d.Reason == flow.ReasonTokenMissing:
		what = `realm="sallyport"`
	case d.Reason.StepUp():
		what = `error="insufficient_user_authentication"` + d.Challenge
	case d.Reason == flow.ReasonProofMissing, d.Reason == flow.ReasonProofMalformed, d.Reason == flow.ReasonProofMismatch,
		d.Reason == flow.ReasonProofStale, d.Reason == flow.ReasonProofReplayed:
		return `DPoP error="invalid_dpop_proof", algs="` + token.ProofAlgorithms + `"`
	default:
		what = `error="invalid_token"`
	}
	if d.DPoP {
		return "DPoP " + what + `, algs="` + token.ProofAlgorithms + `"`
	}
	return "Bearer " + what
}
