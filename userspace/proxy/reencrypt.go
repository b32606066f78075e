// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

const (
	appSessions = 32  // TLS sessions that are kept of an application
	maxFault    = 512 // bytes that are told of a handshake: it quotes the other end's certificate
)

var (
	errNoRoots = errors.New("there are no roots to hold the application's certificate against")
	errNoName  = errors.New("app.certificate names no host that the application could prove to be")
	errNoH2    = errors.New("the application does not agree on HTTP/2 (ALPN h2)")
)

// proof is what a connection to an application was held against; the zero
// proof is that of plaintext. A pool stands for what is in it: it is the same
// as long as that is.
type proof struct {
	secured  bool
	roots    *x509.CertPool
	unproven bool // audit let it pass
}

// reencrypts says whether an API's application is spoken to in TLS.
func reencrypts(api *compile.API) bool { return api != nil && api.AppTLS == compile.AppTLSReencrypt }

// vouched says whether a connection to the application is what the policy
// asks for now.
func (c *call) vouched(p proof) bool {
	if !reencrypts(c.api) {
		return !p.secured
	}
	a := c.p.view.Load().apps[c.api.Name]
	return p.secured && a != nil && a.roots == p.roots && !(p.unproven && c.enforced())
}

// trust takes over the roots that the application's certificate must lead to.
func (a *appTLS) trust(roots [][]byte, old *appTLS) {
	if a.ders = roots; len(roots) == 0 {
		return
	}
	if old != nil && old.roots != nil && slices.EqualFunc(roots, old.ders, slices.Equal) {
		a.roots = old.roots
		return
	}
	pool := x509.NewCertPool()
	for _, der := range roots {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			a.problem = err.Error()
			return
		}
		pool.AddCert(c)
	}
	a.roots = pool
}

// reencrypt makes the connection to an application one of TLS, in which it has
// to prove itself. Where the policy is not enforced one that does not is spoken
// to all the same, and that is recorded.
func (c *call) reencrypt(conn *netloop.Conn, api *compile.API, host string, speaks []string, deadline time.Time) (netloop.Stream, proof, error) {
	a := c.p.view.Load().apps[api.Name]
	if a == nil {
		a = &appTLS{problem: "the agent has handed over none"}
	}
	name, fault := a.name(c.serverName(), host)
	config := &tls.Config{
		NextProtos: speaks, MinVersion: tls.VersionTLS12, ClientSessionCache: a.sessions,
		InsecureSkipVerify: true, //nolint:gosec // verified below, where it can be said what follows, and a wildcard can be proven
		VerifyConnection: func(cs tls.ConnectionState) error {
			if fault == nil {
				fault = a.verify(cs, name)
			}
			if c.enforced() {
				return fault
			}
			return nil
		},
	}
	if !strings.Contains(name, "*") {
		config.ServerName = name
	}
	secured := tls.Client(conn, config)
	_ = conn.SetDeadline(deadline)
	err := secured.Handshake()
	if err == nil && slices.Contains(speaks, "h2") && secured.ConnectionState().NegotiatedProtocol != "h2" {
		err = errNoH2 // RFC 9113, 3.2
	}
	if err != nil {
		c.p.counts.dialErrors.Add(1)
		_ = conn.Close() // the alert that crypto/tls wrote still leaves
		return nil, proof{}, &refusal{flow.StageUpstream, flow.ReasonUpstreamTLS, a.told(err, name)}
	}
	if fault != nil {
		c.noteUpstream(a.told(fault, name))
	}
	_ = conn.SetDeadline(time.Time{})
	return secured, proof{secured: true, roots: a.roots, unproven: fault != nil}, nil
}

// told is what is said of a handshake that was not good.
func (a *appTLS) told(err error, name string) string {
	why := err.Error()
	if errors.Is(err, errNoRoots) && a.problem != "" {
		why += ": " + a.problem
	}
	if name != "" {
		why = "as " + name + ": " + why
	}
	return why[:min(len(why), maxFault)]
}

// serverName is the name that a caller asked for whose TLS has ended here.
func (c *call) serverName() string {
	if secured, ok := c.client.(*tls.Conn); ok && c.ended {
		return secured.ConnectionState().ServerName
	}
	return ""
}

// name is the name by which the application is asked for and has to prove
// itself: what the caller asked for, if that is one of the application's own,
// else the first that is. Of wildcards alone it is the first, which only the
// same wildcard proves.
func (a *appTLS) name(asked ...string) (string, error) {
	if a.leaf == nil || a.roots == nil {
		return "", errNoRoots
	}
	for _, n := range asked {
		if n != "" && a.leaf.VerifyHostname(n) == nil {
			return strings.Clone(n), nil // it outlives the buffer that Host is read from, in the sessions too
		}
	}
	names := slices.Clone(a.leaf.DNSNames)
	for _, ip := range a.leaf.IPAddresses {
		names = append(names, ip.String())
	}
	for _, n := range names {
		if n != "" && !strings.Contains(n, "*") {
			return n, nil
		}
	}
	if len(names) == 0 || names[0] == "" {
		return "", errNoName
	}
	return names[0], nil
}

// verify holds what the application has shown against the roots and a name.
func (a *appTLS) verify(cs tls.ConnectionState, name string) error {
	if a.roots == nil || name == "" || len(cs.PeerCertificates) == 0 {
		return errNoRoots // an empty name would be any
	}
	between := x509.NewCertPool()
	for _, c := range cs.PeerCertificates[1:] {
		between.AddCert(c)
	}
	_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{DNSName: name, Roots: a.roots, Intermediates: between})
	return err
}

// noteUpstream records that an enforcing policy would not have gone on to the
// application.
func (c *call) noteUpstream(fault string) {
	req, allowed := c.req, c.d
	if req.ID == "" { // of streams, which have requests of their own
		c.begin(flow.ProtocolTCP)
	}
	c.d.Steps = nil
	c.refuse(flow.StageUpstream, flow.ReasonUpstreamTLS, fault)
	c.record(0, 0)
	c.req, c.d = req, allowed
}

// gone says whether the application is known to have ended its connection.
func gone(s netloop.Stream) bool {
	if secured, ok := s.(*tls.Conn); ok {
		s, _ = secured.NetConn().(netloop.Stream)
	}
	conn, ok := s.(*netloop.Conn)
	return !ok || conn.Gone()
}
