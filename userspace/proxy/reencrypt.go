// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

// appSessions bounds the TLS sessions that are kept of an application.
const appSessions = 32

var (
	errNoRoots = errors.New("there are no roots to hold the application's certificate against")
	errNoName  = errors.New("the application's own certificate names no host to ask for; a wildcard alone tells none")
	errNoH2    = errors.New("the application does not offer HTTP/2 (ALPN h2)")
)

// reencrypt makes the connection to an application one of TLS, in which it has
// to prove itself. Where the policy is not enforced one that does not is spoken
// to all the same, and that is recorded.
func (c *call) reencrypt(conn *netloop.Conn, host string, speaks []string, deadline time.Time) (netloop.Stream, error) {
	a := c.p.view.Load().apps[c.api.Name]
	if a == nil {
		a = &appTLS{}
	}
	name, fault := a.name(c.serverName(), host)
	config := &tls.Config{
		ServerName: name, NextProtos: speaks, MinVersion: tls.VersionTLS12, ClientSessionCache: a.sessions,
		InsecureSkipVerify: true, //nolint:gosec // verified below, where it can be said what follows
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
	secured := tls.Client(conn, config)
	_ = conn.SetDeadline(deadline)
	err := secured.Handshake()
	if err == nil && slices.Contains(speaks, "h2") && secured.ConnectionState().NegotiatedProtocol != "h2" {
		err = errNoH2
	}
	if err != nil {
		conn.Abort()
		return nil, &refusal{flow.StageUpstream, flow.ReasonUpstreamTLS, err.Error()}
	}
	if fault != nil {
		c.noteUpstream(fault)
	}
	_ = conn.SetDeadline(time.Time{})
	return secured, nil
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
// else the first that is.
func (a *appTLS) name(asked ...string) (string, error) {
	if a.leaf == nil {
		return "", errNoRoots
	}
	for _, n := range asked {
		if n != "" && a.leaf.VerifyHostname(n) == nil {
			return n, nil
		}
	}
	for _, n := range a.leaf.DNSNames {
		if !strings.HasPrefix(n, "*") {
			return n, nil
		}
	}
	if len(a.leaf.IPAddresses) > 0 {
		return a.leaf.IPAddresses[0].String(), nil
	}
	return "", errNoName
}

// verify holds what the application has shown against the roots.
func (a *appTLS) verify(cs tls.ConnectionState, name string) error {
	if a.roots == nil || len(cs.PeerCertificates) == 0 {
		return errNoRoots
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
func (c *call) noteUpstream(fault error) {
	req, allowed := c.req, c.d
	if req.ID == "" { // of streams, which have requests of their own
		c.begin(flow.ProtocolTCP)
	}
	c.d.Steps = nil
	c.refuse(flow.StageUpstream, flow.ReasonUpstreamTLS, fault.Error())
	c.record(0, 0)
	c.req, c.d = req, allowed
}
