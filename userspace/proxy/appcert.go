// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

// AppCertificate is what callers of an API are shown whose TLS ends here, and
// the roots by which its application is believed where it speaks TLS itself.
type AppCertificate struct {
	API     string   // namespace/name of the policy
	Chain   [][]byte // DER, leaf first; nil: there is none
	Roots   [][]byte // DER; nil: there are none
	Problem string   // why
}

// SignRequest asks for a signature of a TLS 1.3 handshake.
type SignRequest struct {
	API     string
	Message []byte      // what a server signs, RFC 8446 section 4.4.3
	Hash    crypto.Hash // 0 for Ed25519
	PSS     bool
}

// appTLS ends the TLS of an API's callers.
type appTLS struct {
	chain   [][]byte
	leaf    *x509.Certificate
	ders    [][]byte       // the roots that the application must lead to
	roots   *x509.CertPool // of them; nil: there are none
	problem string
	config  *tls.Config
	// sessions are those with the application. They are held against the
	// roots again when they are resumed.
	sessions tls.ClientSessionCache
}

// SetAppCertificates replaces what callers are shown. Session tickets of an
// API outlive a new certificate of it.
func (p *Proxy) SetAppCertificates(list []AppCertificate) {
	p.change(func(v *view) {
		apps := make(map[string]*appTLS, len(list))
		for _, c := range list {
			a := &appTLS{chain: c.Chain, problem: c.Problem}
			if len(c.Chain) > 0 {
				leaf, err := x509.ParseCertificate(c.Chain[0])
				if err != nil {
					a.chain, a.problem = nil, err.Error()
				} else {
					a.leaf = leaf
				}
			}
			old := v.apps[c.API]
			a.trust(c.Roots, old)
			if old != nil {
				a.config, a.sessions = old.config, old.sessions
			} else {
				a.config, a.sessions = p.appConfig(), tls.NewLRUClientSessionCache(appSessions)
			}
			apps[c.API] = a
		}
		v.apps = apps
	})
}

// appConfig makes the configuration of one API: a client certificate is asked
// for, and judged once the handshake is done.
func (p *Proxy) appConfig() *tls.Config {
	return identity.ServerConfig(identity.ServerOptions{
		Leaves: p.opt.Leaves, Verifier: p.opt.Verifier, Unproven: true,
		NextProtos: []string{"http/1.1", "h2", ""}, // "" is a client without ALPN
		Certificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			conn, ok := hello.Conn.(*appConn)
			if !ok {
				return nil, errNoServer
			}
			a := p.view.Load().apps[conn.api]
			if a == nil || a.chain == nil {
				return nil, errNoServer
			}
			return &tls.Certificate{Certificate: a.chain, PrivateKey: &appKey{p, conn, a.leaf.PublicKey}}, nil
		},
	})
}

// appConn is a connection whose TLS ends here.
type appConn struct {
	peeked
	task *netloop.Task
	api  string
}

// appKey is an application's key, which the agent keeps.
type appKey struct {
	p      *Proxy
	conn   *appConn
	public crypto.PublicKey
}

// Public implements crypto.Signer.
func (k *appKey) Public() crypto.PublicKey { return k.public }

var errDigest = errors.New("the agent signs messages, not digests")

// Sign implements crypto.Signer.
func (k *appKey) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, errDigest }

// SignMessage implements crypto.MessageSigner: it waits for the agent on the
// connection's own task.
func (k *appKey) SignMessage(_ io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	_, pss := opts.(*rsa.PSSOptions)
	t := k.conn.task
	var answer struct {
		signature []byte
		err       error
		done      bool
		ready     netloop.Event
	}
	engine, loop := t.Engine(), t.Loop()
	k.p.opt.Agent.Sign(SignRequest{k.conn.api, message, opts.HashFunc(), pss}, func(signature []byte, err error) {
		engine.Post(loop, func(*netloop.Task) {
			answer.signature, answer.err, answer.done = signature, err, true
			answer.ready.Signal()
		})
	})
	deadline := time.Now().Add(k.p.opt.ConnectTimeout)
	for !answer.done {
		if err := t.WaitUntil(&answer.ready, deadline); err != nil && !answer.done {
			return nil, fmt.Errorf("wait for the agent's signature: %w", err)
		}
	}
	return answer.signature, answer.err
}

// endTLS ends the callers' TLS where the policy says so and the caller speaks
// it, and says whether the call goes on. A client certificate tells who a
// caller is that nothing else has proven.
func (c *call) endTLS() bool {
	if !c.api.AppTLS.Ends() || c.ended {
		return true
	}
	c.ended = true
	if c.accept() != nil {
		return false
	}
	if c.begins(c.api) != spokenTLS {
		return true
	}
	a := c.p.view.Load().apps[c.api.Name]
	if a == nil || a.chain == nil {
		problem := "the agent has handed over no certificate"
		if a != nil && a.problem != "" {
			problem = a.problem
		}
		c.endsWith(flow.ReasonAppCertificate, problem)
		return false
	}
	conn := &appConn{peeked{c.client, append([]byte(nil), c.buf[c.r:c.w]...)}, c.t, c.api.Name}
	c.putBuffer()
	secured := tls.Server(conn, a.config)
	_ = c.client.SetDeadline(time.Now().Add(c.p.opt.ConnectTimeout))
	if err := secured.Handshake(); err != nil {
		c.p.counts.handshakes.Add(1)
		reason, detail := identity.ReasonOf(err)
		c.endsWith(reason, detail)
		return false
	}
	_ = c.client.SetDeadline(time.Time{})
	cs := secured.ConnectionState()
	c.client, c.opening = secured, spokenUnheard
	if c.peer.Channel != flow.ChannelPlaintext || len(cs.PeerCertificates) == 0 {
		return true
	}
	peer, err := c.p.opt.Verifier.PeerOf(cs, identity.RoleClient)
	if err != nil {
		reason, detail := identity.ReasonOf(err)
		if c.enforced() {
			c.endsWith(reason, detail)
			return false
		}
		c.begin(flow.ProtocolTCP) // it goes on as nobody
		c.refuse(flow.StageChannel, reason, detail)
		c.record(0, 0)
		return true
	}
	c.peer = proven(peer, c.peer.Address, flow.ChannelTLS)
	c.resolved = false
	c.identify()
	c.resolve()
	return c.api != nil
}

// endsWith records why a connection ends before anything was read of it.
func (c *call) endsWith(reason flow.Reason, detail string) {
	c.begin(flow.ProtocolTCP)
	c.refuse(flow.StageChannel, reason, detail)
	c.d.Enforced = true
	c.record(0, 0)
	// The alert that crypto/tls wrote still leaves.
	_ = c.client.Close()
}
