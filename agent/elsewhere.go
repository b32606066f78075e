// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/url"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/introspect"
	"github.com/sallyport-dev/sallyport/agent/metrics"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/line"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

const (
	// issuerDialTimeout bounds a connection to an issuer, its look-up included.
	issuerDialTimeout = 10 * time.Second
	// maxIssuerDials bounds how many are under way.
	maxIssuerDials = 16
)

// dialIssuer connects to an issuer's token endpoint. It may take long, so that
// nothing else waits for it.
func (s *session) dialIssuer(in *line.Incoming, q *linepb.DialIssuer) {
	endpoint, err := s.a.tokenEndpoint(q)
	if err != nil {
		s.answerDial(in, -1, err)
		return
	}
	if s.a.issuerDials.Add(1) > maxIssuerDials {
		s.a.issuerDials.Add(-1)
		s.answerDial(in, -1, refuse(flow.ReasonOverload, "too many connections to issuers are being made"))
		return
	}
	in.Later()
	go func() {
		defer s.a.issuerDials.Add(-1)
		fd, err := dialTCP(s.a.current, endpoint)
		s.answerDial(in, fd, err)
	}()
}

// tokenEndpoint returns the address, HOST:PORT, to which the plan has userspace
// turn for an identity.
func (a *Agent) tokenEndpoint(q *linepb.DialIssuer) (string, error) {
	v := a.view.Load()
	if v == nil {
		return "", refuse(flow.ReasonNotReady, "no policies are in force yet")
	}
	id, _, ok := v.plan.Identity(q.GetId())
	if !ok || !v.local[id] || id.ID != q.GetId() {
		return "", refuse(flow.ReasonLineRefused, "dial issuer: %q is no identity of this node", q.GetId())
	}
	issuer := issuerOf(id, q.GetIssuer())
	if issuer == nil {
		return "", refuse(flow.ReasonLineRefused, "dial issuer: %s obtains no token of %q", id.FullName(), q.GetIssuer())
	}
	if err := v.barred(id); err != nil {
		return "", err
	}
	u, err := url.Parse(issuer.TokenURL)
	if err != nil {
		return "", err // it was parsed before
	}
	return net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "443")), nil
}

// issuerOf returns the issuer of that name of which an identity obtains tokens.
func issuerOf(id *compile.Identity, name string) *compile.Issuer {
	for _, o := range id.Tokens {
		if o.Issuer.FullName() == name {
			return o.Issuer
		}
	}
	return nil
}

// dialTCP makes a connection outside all workloads and returns its descriptor,
// which is the caller's.
func dialTCP(ctx context.Context, address string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, issuerDialTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return -1, err
	}
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	var dupErr error
	err = raw.Control(func(own uintptr) { fd, dupErr = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) })
	return fd, errors.Join(err, dupErr)
}

// introspect asks an issuer of the plan about a token. It may take long, so
// that nothing else waits for it.
func (s *session) introspect(in *line.Incoming, q *linepb.Introspect) {
	answer := func(body []byte, err error) {
		reply := &linepb.IntrospectReply{Answer: body}
		if err != nil {
			reply.Error = err.Error()
		}
		in.Reply(&linepb.Message{Body: &linepb.Message_IntrospectReply{IntrospectReply: reply}}) //nolint:errcheck // the line has ended
	}
	issuer, err := s.a.introspects(q)
	if err != nil {
		s.refused(metrics.LineOther, err)
		answer(nil, err)
		return
	}
	in.Later()
	go func() {
		body, err := s.a.introspection.Ask(s.a.current, issuer.IntrospectionURL, issuer.IntrospectionCredentials, q.GetToken())
		s.a.health.Check("introspection/"+issuer.FullName(), metrics.Degraded, err, "does the issuer answer, and are the credentials of its TokenIssuer right?")
		answer(body, err)
	}()
}

// introspects returns the issuer that userspace wants to ask about a token.
func (a *Agent) introspects(q *linepb.Introspect) (*compile.Issuer, error) {
	v := a.view.Load()
	if v == nil {
		return nil, refuse(flow.ReasonNotReady, "no policies are in force yet")
	}
	if n := len(q.GetToken()); n == 0 || n > token.MaxToken {
		return nil, refuse(flow.ReasonLineRefused, "introspect: a token of %d bytes", n)
	}
	for _, i := range v.plan.Issuers() {
		if i.FullName() == q.GetIssuer() && i.IntrospectionURL != "" {
			return i, nil
		}
	}
	return nil, refuse(flow.ReasonLineRefused, "introspect: %q is no issuer that is asked about tokens", q.GetIssuer())
}

// checkIntrospection says what is wrong with credentials before they are
// needed.
func (a *Agent) checkIntrospection(issuers []*compile.Issuer) {
	before := a.introspected
	a.introspected = map[string]bool{}
	for _, i := range issuers {
		if i.IntrospectionURL == "" {
			continue
		}
		id := "introspection/" + i.FullName()
		a.introspected[id] = true
		a.health.Check(id, metrics.Degraded, introspect.Check(i.IntrospectionCredentials), "see introspection.credentials of its TokenIssuer")
	}
	for id := range before {
		if !a.introspected[id] {
			a.health.Clear(id)
		}
	}
}

// dialEngine connects to the relation engine of a model, and hands its key
// over. It may take long, so that nothing else waits for it.
func (s *session) dialEngine(in *line.Incoming, q *linepb.DialEngine) {
	answer := func(fd int, secret string, err error) {
		reply := &linepb.DialEngineReply{Secret: secret}
		m := &linepb.Message{Body: &linepb.Message_DialEngineReply{DialEngineReply: reply}}
		if err != nil {
			reply.Error = err.Error()
			in.Reply(m) //nolint:errcheck // the line has ended
			return
		}
		in.Reply(m, fd) //nolint:errcheck // the line has ended
		unix.Close(fd)  //nolint:errcheck // a copy has been sent
	}
	model, err := s.a.engine(q)
	if err == nil && s.a.issuerDials.Add(1) > maxIssuerDials {
		s.a.issuerDials.Add(-1)
		err = refuse(flow.ReasonOverload, "too many connections are being made")
	}
	if err != nil {
		s.refused(metrics.LineDial, err)
		answer(-1, "", err)
		return
	}
	in.Later()
	go func() {
		defer s.a.issuerDials.Add(-1)
		var secret string
		var err error
		if model.Credentials != "" {
			secret, err = introspect.Secret(model.Credentials)
		}
		fd := -1
		if err == nil {
			fd, err = dialTCP(s.a.current, model.Address)
		}
		answer(fd, secret, err)
	}()
}

// engine returns the model whose engine elsewhere userspace wants.
func (a *Agent) engine(q *linepb.DialEngine) (*compile.Model, error) {
	v := a.view.Load()
	if v == nil {
		return nil, refuse(flow.ReasonNotReady, "no policies are in force yet")
	}
	for _, m := range v.plan.Models() {
		if m.FullName() == q.GetModel() && m.Address != "" {
			return m, nil
		}
	}
	return nil, refuse(flow.ReasonLineRefused, "dial engine: %q is no model with an engine elsewhere", q.GetModel())
}
