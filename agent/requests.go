// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/datapath"
	"github.com/sallyport-dev/sallyport/agent/metrics"
	"github.com/sallyport-dev/sallyport/agent/revocations"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/line"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

const (
	// maxVerdictTTL bounds what a verdict that userspace asks for may last.
	maxVerdictTTL = 5 * time.Minute
	// Revocations by a score: how many userspace may make in a window, and
	// how long one lasts at most. Beyond it refuses and says so: a process
	// that was taken over must not lock everybody out for good.
	maxScoredRevocations = 16
	scoredWindow         = time.Hour
	maxScoredTTL         = 24 * time.Hour
)

// refusal is why the agent does not do what userspace asked for.
type refusal struct {
	reason flow.Reason
	text   string
}

func (r *refusal) Error() string { return r.text }

func refuse(reason flow.Reason, format string, args ...any) error {
	return &refusal{reason, fmt.Sprintf(format, args...)}
}

// concurrent says which requests need no order.
func concurrent(m *linepb.Message) bool {
	switch m.GetBody().(type) {
	case *linepb.Message_Dial, *linepb.Message_Sign, *linepb.Message_Verdict, *linepb.Message_AppSign, *linepb.Message_DialIssuer, *linepb.Message_Introspect, *linepb.Message_DialEngine:
		return true
	}
	return false
}

// handle answers what the userspace process asks for. It is taken for
// hostile: everything is held against the agent's own view.
func (s *session) handle(_ context.Context, in *line.Incoming) {
	a := s.a
	a.serving.RLock()
	defer a.serving.RUnlock()
	if a.current.Err() != nil {
		return // what it would be done with is being closed
	}
	switch b := in.Message.GetBody().(type) {
	case *linepb.Message_Ready:
		s.once.Do(func() { close(s.ready) })
	case *linepb.Message_Dial:
		s.dial(in, b.Dial)
	case *linepb.Message_DialIssuer:
		s.dialIssuer(in, b.DialIssuer)
	case *linepb.Message_DialEngine:
		s.dialEngine(in, b.DialEngine)
	case *linepb.Message_Introspect:
		s.introspect(in, b.Introspect)
	case *linepb.Message_Sign:
		reply := &linepb.SignReply{}
		start := time.Now()
		chain, err := a.sign(b.Sign)
		a.metrics.SignSeconds.Observe(time.Since(start).Seconds())
		if reply.Chain = chain; err != nil {
			reply.Error = err.Error()
			s.refused(metrics.LineSign, err)
		}
		in.Reply(&linepb.Message{Body: &linepb.Message_SignReply{SignReply: reply}}) //nolint:errcheck // the line has ended
	case *linepb.Message_Verdict:
		reply := &linepb.VerdictReply{}
		if err := a.putVerdict(b.Verdict); err != nil {
			reply.Error = err.Error()
			s.refused(metrics.LineVerdict, err)
		}
		in.Reply(&linepb.Message{Body: &linepb.Message_VerdictReply{VerdictReply: reply}}) //nolint:errcheck // the line has ended
	case *linepb.Message_AppSign:
		reply := &linepb.AppSignReply{}
		var err error
		if reply.Signature, err = a.appcerts.Sign(b.AppSign.GetApi(), b.AppSign.GetMessage(), crypto.Hash(b.AppSign.GetHash()), b.AppSign.GetPss()); err != nil {
			reply.Error = err.Error()
			s.refused(metrics.LineSign, refuse(flow.ReasonLineRefused, "%v", err))
		}
		in.Reply(&linepb.Message{Body: &linepb.Message_AppSignReply{AppSignReply: reply}}) //nolint:errcheck // the line has ended
	case *linepb.Message_Decisions:
		a.records.take(b.Decisions.GetRecords(), b.Decisions.GetLost())
	case *linepb.Message_RefreshKeys:
		if err := a.keys.Refresh(b.RefreshKeys.GetIssuer()); err != nil {
			s.refused(metrics.LineOther, err)
		}
	case *linepb.Message_Revoke:
		if err := a.revokeByScore(b.Revoke); err != nil {
			s.refused(metrics.LineOther, err)
		}
	default:
		s.refused(metrics.LineOther, refuse(flow.ReasonLineRefused, "message %T", b))
		in.Refuse("not a request that userspace may make")
	}
}

func (s *session) refused(kind metrics.LineRequest, err error) {
	r, ok := errors.AsType[*refusal](err)
	if ok {
		s.a.metrics.LineRefused(kind)
	}
	if !s.complaints.allow(time.Now()) {
		return
	}
	if !ok {
		s.a.log.Warn("request of userspace failed", "request", kind.String(), "err", err)
		return
	}
	s.a.log.Warn("request of userspace refused", "request", kind.String(), "reason", string(r.reason), "why", r.text)
}

func (s *session) dial(in *line.Incoming, q *linepb.Dial) {
	start := time.Now()
	fd, err := s.a.dial(q)
	s.a.metrics.Dialled(metrics.DialKind(q.GetKind()), err)
	s.a.metrics.DialSeconds.Observe(time.Since(start).Seconds())
	s.answerDial(in, fd, err)
}

// answerDial hands a socket over, or says why there is none.
func (s *session) answerDial(in *line.Incoming, fd int, err error) {
	reply := &linepb.DialReply{}
	m := &linepb.Message{Body: &linepb.Message_DialReply{DialReply: reply}}
	if err == nil {
		in.Reply(m, fd) //nolint:errcheck // the line has ended
		unix.Close(fd)  //nolint:errcheck // a copy has been sent
		return
	}
	reply.Error, reply.Reason = err.Error(), string(flow.ReasonUpstream)
	if r, ok := errors.AsType[*refusal](err); ok {
		reply.Reason = string(r.reason)
		if r.reason == flow.ReasonLineRefused {
			s.refused(metrics.LineDial, err)
		}
	}
	in.Reply(m) //nolint:errcheck // the line has ended
}

// dial makes the socket that userspace asks for, if its plan needs it.
func (a *Agent) dial(q *linepb.Dial) (int, error) {
	v := a.view.Load()
	if v == nil {
		return -1, refuse(flow.ReasonNotReady, "no policies are in force yet")
	}
	addr, ok := netip.AddrFromSlice(q.GetAddress())
	if !ok || q.GetPort() > 65535 {
		return -1, refuse(flow.ReasonLineRefused, "dial: not an address")
	}
	to := netip.AddrPortFrom(addr.Unmap(), uint16(q.GetPort()))
	ns := v.namespaces[q.GetNetnsCookie()]
	if ns == nil {
		return -1, refuse(flow.ReasonLineRefused, "dial %s: namespace %d is not one of ours", to, q.GetNetnsCookie())
	}
	var source *compile.Identity
	if n := flow.IdentityNumber(q.GetSourceIdentity()); n != 0 {
		if source = v.byNumber[n]; source == nil || !v.local[source] {
			return -1, refuse(flow.ReasonLineRefused, "dial %s: number %d is no identity of this node", to, n)
		}
	}
	tag := datapath.DialTag{Source: flow.IdentityNumber(q.GetSourceIdentity())}
	var err error
	switch q.GetKind() {
	case linepb.DialKind_APPLICATION:
		err = a.checkApplication(v, q, ns, to, source, &tag)
	case linepb.DialKind_PEER:
		to = netip.AddrPortFrom(to.Addr(), a.ports.Tunnel)
		err = checkPeer(v, ns, to.Addr(), source)
	case linepb.DialKind_PLAIN:
		err = checkPlain(v, ns, to, source, q.GetHost())
	default:
		err = refuse(flow.ReasonLineRefused, "dial %s: unknown kind", to)
	}
	if err != nil {
		return -1, err
	}
	return ns.Dial(to, func(fd int) error { return a.dp.TagDial(fd, tag) })
}

// checkApplication: only a protected port of that namespace, only its own
// identity, only for callers who may call it, and only once its own server
// listens there.
func (a *Agent) checkApplication(v *view, q *linepb.Dial, ns *namespace, to netip.AddrPort, source *compile.Identity, tag *datapath.DialTag) error {
	at := datapath.ProtectedPort{Netns: ns.Cookie(), Port: to.Port()}
	api := v.protected[at]
	if api == nil || v.numbers[api.Identity] != flow.IdentityNumber(q.GetTargetIdentity()) {
		return refuse(flow.ReasonLineRefused, "dial %s: not a port of identity %d", to, q.GetTargetIdentity())
	}
	if !v.isAddressOf(to.Addr(), ns.Cookie()) {
		return refuse(flow.ReasonLineRefused, "dial %s: not an address of that namespace", to)
	}
	enforced := v.mode(api.Mode) == flow.ModeEnforce
	if source != nil && enforced {
		if !source.MayCallIdentity(api.Identity) {
			return refuse(flow.ReasonLineRefused, "dial %s: %s may not call %s", to, source.FullName(), api.Identity.FullName())
		}
		if err := v.barred(source); err != nil {
			return err
		}
	}
	client, ok := netip.AddrFromSlice(q.GetClientAddress())
	if !ok || q.GetClientPort() == 0 || q.GetClientPort() > 65535 {
		return refuse(flow.ReasonLineRefused, "dial %s: no client address", to)
	}
	if enforced {
		servers, err := a.dp.Servers(at)
		if err != nil {
			return err
		}
		if len(servers) == 0 {
			return refuse(flow.ReasonUpstreamGone, "nothing of %s listens at %s", api.Identity.FullName(), to)
		}
	}
	tag.Client = netip.AddrPortFrom(client.Unmap(), uint16(q.GetClientPort()))
	tag.Target = v.numbers[api.Identity]
	return nil
}

// checkPeer: only for an identity that lives there, only to a host where
// something serves that it may call.
func checkPeer(v *view, ns *namespace, host netip.Addr, source *compile.Identity) error {
	if source == nil || !v.livesIn(source, ns.Cookie()) {
		return refuse(flow.ReasonLineRefused, "dial node %s: the caller does not live in that namespace", host)
	}
	soft := v.mode(source.Mode) != flow.ModeEnforce
	if !soft {
		if err := v.barred(source); err != nil {
			return err
		}
	}
	for id := range v.numbers {
		if !soft && !source.MayCallIdentity(id) {
			continue
		}
		for _, e := range id.Endpoints {
			if e.Addr().Unmap() == host {
				return nil
			}
		}
	}
	return refuse(flow.ReasonLineRefused, "dial node %s: nothing that %s may call serves there", host, source.FullName())
}

// checkPlain: only for an identity that lives there and is not held back.
func checkPlain(v *view, ns *namespace, to netip.AddrPort, source *compile.Identity, host string) error {
	if source == nil || !v.livesIn(source, ns.Cookie()) {
		return refuse(flow.ReasonLineRefused, "dial %s: the caller does not live in that namespace", to)
	}
	if v.mode(source.Mode) != flow.ModeEnforce {
		return nil
	}
	if err := v.barred(source); err != nil {
		return err
	}
	if v.plan.Claimed(to) == nil && v.egress(source, to, host) {
		return nil
	}
	return refuse(flow.ReasonLineRefused, "dial %s: %s is enforced and may not connect there", to, source.FullName())
}

// sign issues a leaf for an identity that can have a workload here.
func (a *Agent) sign(q *linepb.Sign) ([][]byte, error) {
	v := a.view.Load()
	if v == nil {
		return nil, refuse(flow.ReasonNotReady, "no policies are in force yet")
	}
	id, node, ok := v.plan.Identity(q.GetId())
	if !ok || !v.local[id] || id.ID != q.GetId() || (node != "" && node != a.cfg.Node) {
		return nil, refuse(flow.ReasonLineRefused, "sign: %q is no identity of this node", q.GetId())
	}
	if v.revoked[id.ID] {
		return nil, refuse(flow.ReasonIdentityRevoked, "sign: %s is revoked", id.FullName())
	}
	if v.mode(id.Mode) == flow.ModeEnforce && id.Expired(time.Now()) {
		return nil, refuse(flow.ReasonIdentityExpired, "sign: %s has expired", id.FullName())
	}
	return a.ca.Sign(q.GetCsr(), q.GetId(), 0)
}

// putVerdict takes only what its own plan decides by identity alone: nothing
// else may go past the proxy. A view that is replaced meanwhile, as one is when
// a process has come or gone, has it look again.
func (a *Agent) putVerdict(q *linepb.Verdict) error {
	const tries = 4
	for range tries {
		v := a.view.Load()
		if err := a.putVerdictBy(v, q); !errors.Is(err, errOtherView) {
			return err
		}
	}
	return refuse(flow.ReasonNotReady, "verdict: the workloads change too often")
}

// errOtherView says that the view was replaced.
var errOtherView = errors.New("another view")

func (a *Agent) putVerdictBy(v *view, q *linepb.Verdict) error {
	if v == nil || v.generation != q.GetPolicyGeneration() {
		return refuse(flow.ReasonNotReady, "verdict: of another policy generation")
	}
	addr, ok := netip.AddrFromSlice(q.GetAddress())
	if !ok || q.GetPort() == 0 || q.GetPort() > 65535 || q.GetAction() != uint32(flow.ActionDirect) || q.GetTtlNs() <= 0 {
		return refuse(flow.ReasonLineRefused, "verdict: malformed")
	}
	to := netip.AddrPortFrom(addr.Unmap(), uint16(q.GetPort()))
	number := flow.IdentityNumber(q.GetSourceIdentity())
	source := v.byNumber[number]
	if source == nil || !v.livesIn(source, q.GetSourceNetns()) {
		return refuse(flow.ReasonLineRefused, "verdict to %s: the caller does not live in that namespace", to)
	}
	netns, api := v.serverOf(to, q.GetSourceNetns())
	if api == nil || !v.mayGoDirect(source, api) {
		return refuse(flow.ReasonLineRefused, "verdict to %s: not decided by identity alone", to)
	}
	generation, err := a.dp.GenerationOf(api.Name)
	if err != nil {
		return err
	}
	// A new view comes before the bump of what it voids: while this one is
	// still in place the generation is one under which it was decided.
	if a.view.Load() != v {
		return errOtherView
	}
	err = a.dp.PutVerdict(flow.Verdict{
		Source: number, SourceNetns: q.GetSourceNetns(), Destination: to, DestinationNetns: netns, Action: flow.ActionDirect,
		Expires: v.verdictTTL(time.Duration(q.GetTtlNs()), source, api.Identity),
	}, generation)
	if err == nil {
		a.metrics.VerdictPut(flow.ActionDirect)
	}
	return err
}

// serverOf finds which protected port of this node an address is, as seen
// from a namespace.
func (v *view) serverOf(to netip.AddrPort, from uint64) (netns uint64, api *compile.API) {
	cookies := v.addresses[to.Addr()]
	if to.Addr().IsLoopback() {
		cookies = []uint64{from}
	}
	for _, c := range cookies {
		if api := v.protected[datapath.ProtectedPort{Netns: c, Port: to.Port()}]; api != nil {
			return c, api
		}
	}
	return 0, nil
}

// mayGoDirect says whether identity alone allows a call, now.
func (v *view) mayGoDirect(source *compile.Identity, api *compile.API) bool {
	allow, decided := api.IdentityOnly(source)
	now := time.Now()
	return decided && allow && source.MayCallIdentity(api.Identity) &&
		!source.Expired(now) && !api.Identity.Expired(now) && !v.revoked[source.ID] && !v.revoked[api.Identity.ID]
}

// verdictTTL bounds how long a verdict lasts: no longer than either end's
// identity is valid.
func (v *view) verdictTTL(asked time.Duration, ends ...*compile.Identity) time.Duration {
	ttl := min(asked, maxVerdictTTL)
	for _, id := range ends {
		if !id.Expires.IsZero() {
			ttl = min(ttl, time.Until(id.Expires))
		}
	}
	return ttl
}

// revokeByScore keeps a revocation that an anomaly threshold made.
func (a *Agent) revokeByScore(q *linepb.Revoke) error {
	kind := revocations.Kind(q.GetKind())
	if kind != revocations.Identity && kind != revocations.Subject && kind != revocations.JTI {
		return refuse(flow.ReasonLineRefused, "revoke: a score revokes identities, subjects and tokens, not %q", q.GetKind())
	}
	ttl := time.Until(time.Unix(0, q.GetUntilUnixNs()))
	if ttl <= 0 || ttl > maxScoredTTL {
		ttl = maxScoredTTL
	}
	if !a.scored.allow(time.Now()) {
		a.health.Set("scored-revocations", metrics.Degraded, fmt.Sprintf("more than %d revocations by score within %s: further ones are refused", maxScoredRevocations, scoredWindow),
			"look at `sallyport revoke list` and at what the scores saw")
		return refuse(flow.ReasonThrottled, "revoke: over the cap")
	}
	// What an operator revoked for longer must not end sooner by it.
	_, err := a.revoked.Extend(kind, q.GetValue(), ttl, "anomaly: "+clip(q.GetWhy(), 200), "anomaly")
	return err
}

// budget allows so many in a window that moves.
type budget struct {
	limit  int
	window time.Duration

	mu    sync.Mutex
	times []time.Time
}

func (b *budget) allow(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	kept := b.times[:0]
	for _, t := range b.times {
		if now.Sub(t) < b.window {
			kept = append(kept, t)
		}
	}
	b.times = kept
	if len(kept) >= b.limit {
		return false
	}
	b.times = append(b.times, now)
	return true
}

// clip returns at most n bytes of a text, all of them printable: one that is
// not would be no reason to keep nothing of the rest.
func clip(s string, n int) string {
	printable := func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}
	return strings.Map(printable, strings.ToValidUTF8(s[:min(len(s), n)], "?"))
}
