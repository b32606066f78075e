// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/line"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
	"github.com/sallyport-dev/sallyport/userspace/proxy"
)

// agent is the privileged process as the proxy sees it.
type agent struct {
	conn *line.Conn
	log  *slog.Logger
}

// Dial implements proxy.Agent.
func (a agent) Dial(r proxy.DialRequest, done func(fd int, reason flow.Reason, err error)) {
	m := &linepb.Message{Body: &linepb.Message_Dial{Dial: &linepb.Dial{
		Kind: linepb.DialKind(r.Kind), NetnsCookie: r.Netns, Address: r.Address.Addr().AsSlice(), Port: uint32(r.Address.Port()),
		ClientAddress: r.Client.Addr().AsSlice(), ClientPort: uint32(r.Client.Port()),
		SourceIdentity: uint32(r.Source), TargetIdentity: uint32(r.Target), Host: r.Host,
	}}}
	a.conn.Go(m, func(m *linepb.Message, fds []int, err error) {
		reply := m.GetDialReply()
		switch {
		case err != nil:
			closeAll(fds)
			done(-1, flow.ReasonLineRefused, fmt.Errorf("ask the agent: %w", err))
		case reply.GetError() != "" || len(fds) != 1:
			closeAll(fds)
			done(-1, flow.Reason(reply.GetReason()), errors.New(reply.GetError()))
		default:
			done(fds[0], flow.ReasonOK, nil)
		}
	})
}

// Sign implements proxy.Agent.
func (a agent) Sign(r proxy.SignRequest, done func([]byte, error)) {
	m := &linepb.Message{Body: &linepb.Message_AppSign{AppSign: &linepb.AppSign{Api: r.API, Message: r.Message, Hash: uint32(r.Hash), Pss: r.PSS}}}
	a.conn.Go(m, func(m *linepb.Message, fds []int, err error) {
		closeAll(fds)
		reply := m.GetAppSignReply()
		switch {
		case err != nil:
			done(nil, fmt.Errorf("ask the agent: %w", err))
		case reply.GetError() != "" || len(reply.GetSignature()) == 0:
			done(nil, errors.New("the agent does not sign: "+reply.GetError()))
		default:
			done(reply.GetSignature(), nil)
		}
	})
}

// PutVerdict implements proxy.Agent.
func (a agent) PutVerdict(v flow.Verdict, generation uint64) {
	m := &linepb.Message{Body: &linepb.Message_Verdict{Verdict: &linepb.Verdict{
		SourceIdentity: uint32(v.Source), SourceNetns: v.SourceNetns, Address: v.Destination.Addr().AsSlice(),
		Port: uint32(v.Destination.Port()), Action: uint32(v.Action), TtlNs: int64(v.Expires), PolicyGeneration: generation,
	}}}
	a.conn.Go(m, func(m *linepb.Message, fds []int, err error) {
		closeAll(fds)
		if err == nil && m.GetVerdictReply().GetError() != "" {
			err = errors.New(m.GetVerdictReply().GetError())
		}
		if err != nil {
			a.log.Debug("verdict not taken", "destination", v.Destination, "err", err)
		}
	})
}

// dialIssuer has the agent connect to an issuer's token endpoint.
func (p *process) dialIssuer(ctx context.Context, id, issuer string) (net.Conn, error) {
	m, fds, err := p.conn.Call(ctx, &linepb.Message{Body: &linepb.Message_DialIssuer{DialIssuer: &linepb.DialIssuer{Id: id, Issuer: issuer}}})
	if err == nil && m.GetDialReply().GetError() != "" {
		err = errors.New(m.GetDialReply().GetError())
	}
	return connection(fds, err)
}

// introspect has the agent ask an issuer about a token.
func (p *process) introspect(ctx context.Context, issuer, token string) ([]byte, error) {
	m, fds, err := p.conn.Call(ctx, &linepb.Message{Body: &linepb.Message_Introspect{Introspect: &linepb.Introspect{Issuer: issuer, Token: token}}})
	closeAll(fds)
	if err == nil && m.GetIntrospectReply().GetError() != "" {
		err = errors.New(m.GetIntrospectReply().GetError())
	}
	return m.GetIntrospectReply().GetAnswer(), err
}

// dialEngine has the agent connect to the relation engine of a model, and tell
// the key that it is to be shown.
func (p *process) dialEngine(ctx context.Context, model string) (net.Conn, string, error) {
	m, fds, err := p.conn.Call(ctx, &linepb.Message{Body: &linepb.Message_DialEngine{DialEngine: &linepb.DialEngine{Model: model}}})
	reply := m.GetDialEngineReply()
	if err == nil && reply.GetError() != "" {
		err = errors.New(reply.GetError())
	}
	conn, err := connection(fds, err)
	return conn, reply.GetSecret(), err
}

// connection makes one of the descriptor that came with an answer.
func connection(fds []int, err error) (net.Conn, error) {
	if err == nil && len(fds) != 1 {
		err = errors.New("the agent sent no connection")
	}
	if err != nil {
		closeAll(fds)
		return nil, err
	}
	f := os.NewFile(uintptr(fds[0]), "connection")
	defer f.Close() //nolint:errcheck // the connection is a copy
	return net.FileConn(f)
}

// sign asks the agent for a leaf; it holds the request against what this node
// may issue and against the workloads that it knows.
func (p *process) sign(ctx context.Context, id string, csr []byte) ([][]byte, error) {
	m, fds, err := p.conn.Call(ctx, &linepb.Message{Body: &linepb.Message_Sign{Sign: &linepb.Sign{Id: id, Csr: csr}}})
	closeAll(fds)
	if err != nil {
		return nil, fmt.Errorf("ask the agent for a certificate: %w", err)
	}
	r := m.GetSignReply()
	if r.GetError() != "" {
		return nil, errors.New(r.GetError())
	}
	if len(r.GetChain()) == 0 {
		return nil, errors.New("ask the agent for a certificate: empty answer")
	}
	return r.GetChain(), nil
}

// refreshKeys asks the agent to fetch an issuer's keys. It does not wait.
func (p *process) refreshKeys(issuer string) {
	m := &linepb.Message{Body: &linepb.Message_RefreshKeys{RefreshKeys: &linepb.RefreshKeys{Issuer: issuer}}}
	if err := p.conn.Notify(m); err != nil {
		p.log.Warn("keys not asked for", "issuer", issuer, "err", err)
	}
}

// revoked tells the agent what an anomaly threshold has revoked, so that it
// outlives this process. It does not wait.
func (p *process) revoked(kind identity.RevocationKind, value string, until time.Time, why string) {
	m := &linepb.Message{Body: &linepb.Message_Revoke{Revoke: &linepb.Revoke{
		Kind: string(kind), Value: value, UntilUnixNs: until.UnixNano(), Why: why,
	}}}
	if err := p.conn.Notify(m); err != nil {
		p.log.Error("revocation by score not kept", "kind", string(kind), "err", err)
	}
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd) //nolint:errcheck // nothing to be done about it
	}
}

// timeOf reads a time of the line: Unix nanoseconds, 0 for none.
func timeOf(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}
