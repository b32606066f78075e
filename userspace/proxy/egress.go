// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
)

const (
	// hostProofLife is how long an address counts as that of a host that it has
	// proven to be, hostProofPause how long one does not that has not.
	hostProofLife  = 5 * time.Minute
	hostProofPause = 2 * time.Second
	maxHostProofs  = 4096 // of a loop
)

// hostProofKey is a host at an address, as it is reached from a namespace.
type hostProofKey struct {
	netns uint64
	host  string
	at    netip.AddrPort
}

// hostProof is what is known of it.
type hostProof struct {
	err     *refusal  // nil: it has proven its name
	until   time.Time // that long
	probing bool
	beside  int // tasks that wait to tell of it
	changed netloop.Event
}

// question is whether an address is a host, for a caller in a namespace.
type question struct {
	p      *Proxy
	l      *loop
	about  hostProofKey
	source flow.IdentityNumber
}

func (c *call) question(host string) question {
	return question{c.p, c.l, hostProofKey{c.fromNetns, host, c.dst}, c.peer.Number}
}

// outside is a connection to an address that nobody claims, or to one of ours
// past its policies, as long as the caller's policy only observes.
type outside struct {
	host   string // that the client asks for and egress lists, "" for none
	proven bool
}

// plain carries a connection as it is, to an address that nobody claims, or
// for a caller whose policy only observes; the agent holds that against its
// own view, and what it has to refuse counts as an attack on it.
func (c *call) plain() {
	c.resolve()
	if c.enforced() && c.src != nil && c.src.Expired(time.Now()) {
		c.begin(flow.ProtocolTCP)
		c.fail(&refusal{flow.StageGovernance, flow.ReasonIdentityExpired, c.src.Expiry()})
		return
	}
	to := &outside{}
	if !egress(c.src, c.dst) && (c.enforced() || verifies(c.src, c.dst.Port())) {
		name, r := c.asksFor()
		switch {
		case name == "" && r == nil:
			return // the client has gone
		case r != nil:
		case c.enforced():
			r = c.question(name).prove(c.t)
			to.proven = r == nil
		default:
			r = c.proveBeside(name)
		}
		if to.host = name; r != nil {
			c.begin(flow.ProtocolTCP)
			if c.enforced() {
				c.fail(r)
				return
			}
			c.refuse(r.stage, r.reason, r.detail)
			c.record(0, 0)
		}
	}
	conn, err := c.p.dial(c.t, DialRequest{Kind: DialPlain, Netns: c.fromNetns, Address: c.dst, Source: c.peer.Number, Host: to.host},
		time.Now().Add(c.p.opt.ConnectTimeout))
	if err != nil {
		c.begin(flow.ProtocolTCP)
		c.fail(reasonOf(err, flow.ReasonUpstream))
		return
	}
	c.upstream = conn
	if c.watchOutside(to) {
		c.relayRest()
	}
}

// egress says whether an enforced identity may connect to an address that
// nobody claims, whatever is spoken there.
func egress(src *compile.Identity, dst netip.AddrPort) bool {
	return src != nil && slices.ContainsFunc(src.Egress, func(e compile.Egress) bool {
		return e.Prefix.Contains(dst.Addr()) && slices.Contains(e.Ports, dst.Port())
	})
}

// verifies says whether an identity's egress has a host at that port that must
// prove its name.
func verifies(src *compile.Identity, port uint16) bool {
	return src != nil && slices.ContainsFunc(src.Egress, func(e compile.Egress) bool { return e.Verify && slices.Contains(e.Ports, port) })
}

// verifiesHost says whether that host is one of them.
func verifiesHost(src *compile.Identity, host string, port uint16) bool {
	return src != nil && slices.ContainsFunc(src.Egress, func(e compile.Egress) bool {
		return e.Verify && e.Host == host && slices.Contains(e.Ports, port)
	})
}

// asksFor returns the host that the client asks for by its ClientHello, which
// is one that egress lists; neither where the client has gone.
func (c *call) asksFor() (host string, r *refusal) {
	if !verifies(c.src, c.dst.Port()) {
		return "", &refusal{flow.StagePolicy, flow.ReasonEgress, "nobody claims the address, and the caller's egress does not list it"}
	}
	patience := c.p.opt.HeadTimeout
	if !c.enforced() {
		patience = c.p.opt.Detect // a client that listens first must not wait for us
	}
	switch c.detect(patience, false) {
	case spokenEnd, spokenGone:
		return "", nil
	case spokenTLS:
	default:
		return "", &refusal{flow.StageChannel, flow.ReasonEgressTLS, "the host that egress lists there is spoken to in TLS, and no ClientHello came within " + patience.String()}
	}
	name, ok, err := c.hello()
	switch {
	case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
		return "", nil
	case !ok || name == "":
		return "", &refusal{flow.StageChannel, flow.ReasonEgressTLS, "the ClientHello names no host, or did not arrive in time"}
	case !verifiesHost(c.src, name, c.dst.Port()):
		return "", &refusal{flow.StageChannel, flow.ReasonEgressTLS, "the ClientHello asks for " + strconv.Quote(name) + ", which egress does not list there"}
	}
	return name, nil
}

// maxBeside is how many tasks wait to tell of one host.
const maxBeside = 4

// proveBeside returns what enforce would refuse, where that is known. Else it
// is told once it is, and nothing is held up.
func (c *call) proveBeside(host string) *refusal {
	q := c.question(host)
	known, r := q.known()
	switch {
	case r != nil:
		return r
	case !known.probing && time.Now().Before(known.until):
		return known.err
	case known.beside == maxBeside:
		return nil // others tell of it
	}
	known.beside++
	peer, mode := c.peer, c.fromMode
	c.t.Go(func(t *netloop.Task) {
		r := q.prove(t)
		known.beside--
		if r == nil {
			return
		}
		b := q.p.newCall(t, nil)
		defer b.release()
		b.leaving, b.peer, b.dst, b.fromNetns, b.fromMode = true, peer, q.about.at, q.about.netns, mode
		b.resolve()
		b.begin(flow.ProtocolTCP)
		b.refuse(r.stage, r.reason, r.detail)
		b.d.Enforced = false // the connection has gone on
		b.record(0, 0)
	})
	return nil
}

// known returns what is known of the host.
func (q question) known() (*hostProof, *refusal) {
	if p := q.l.hosts[q.about]; p != nil {
		return p, nil
	}
	if !q.l.roomForHost(time.Now()) {
		return nil, &refusal{flow.StageUpstream, flow.ReasonOverload, "too many hosts are being verified"}
	}
	p := &hostProof{}
	q.l.hosts[q.about] = p
	return p, nil
}

// prove has the address prove that it is the host; one task asks while the
// others wait.
func (q question) prove(t *netloop.Task) *refusal {
	deadline := time.Now().Add(q.p.opt.ConnectTimeout)
	for {
		p, r := q.known()
		switch {
		case r != nil:
			return r
		case p.probing:
			if err := t.WaitUntil(&p.changed, deadline); err != nil && p.probing {
				return &refusal{flow.StageUpstream, flow.ReasonEgressCertificate, "the host's certificate was not seen in time"}
			}
			continue
		case time.Now().Before(p.until):
			return p.err
		}
		p.probing = true
		p.until, p.err = q.probe(t, deadline)
		p.probing = false
		p.changed.Broadcast()
		return p.err
	}
}

// roomForHost makes room for another host, from those that are known no more.
func (l *loop) roomForHost(now time.Time) bool {
	if len(l.hosts) < maxHostProofs {
		return true
	}
	for k, p := range l.hosts {
		if !p.probing && p.beside == 0 && !now.Before(p.until) {
			delete(l.hosts, k)
		}
	}
	return len(l.hosts) < maxHostProofs
}

// probe makes a handshake of its own: that of the client shows no certificate
// (RFC 8446 section 4.4.2).
func (q question) probe(t *netloop.Task, deadline time.Time) (until time.Time, r *refusal) {
	host, at := q.about.host, q.about.at
	conn, err := q.p.dial(t, DialRequest{Kind: DialPlain, Netns: q.about.netns, Address: at, Source: q.source, Host: host}, deadline)
	if err != nil {
		return time.Now().Add(hostProofPause), reasonOf(err, flow.ReasonUpstream)
	}
	defer conn.Abort()
	_ = conn.SetDeadline(deadline)
	var signed keySigned
	var certificate *x509.Certificate
	err = tls.Client(conn, &tls.Config{ServerName: host, RootCAs: q.p.opt.Roots, MinVersion: tls.VersionTLS12, CipherSuites: signedSuites, KeyLogWriter: &signed,
		VerifyConnection: func(s tls.ConnectionState) error {
			certificate = s.PeerCertificates[0]
			return nil
		}}).Handshake()
	// What it asks of a client is the client's: a host that wants a certificate
	// has proven its own before it refuses.
	if err != nil && (certificate == nil || !bool(signed)) {
		return time.Now().Add(hostProofPause), &refusal{flow.StageUpstream, flow.ReasonEgressCertificate, at.String() + " does not prove to be " + host + ": " + err.Error()}
	}
	return earlier(time.Now().Add(hostProofLife), certificate.NotAfter), nil
}

// signedSuites are those of TLS 1.2 in which the host signs its key share (RFC
// 8422 section 5.4).
var signedSuites = func() (list []uint16) {
	for _, s := range tls.CipherSuites() { // of which none has the key agreed by RSA
		list = append(list, s.ID)
	}
	return list
}()

// keySigned is told that a handshake of TLS 1.2 has a master secret: with
// signedSuites, the host's signature over this handshake has been verified by
// then. It keeps nothing. A handshake of TLS 1.3 ends for a client only after
// that (RFC 8446 section 4.4), and says nothing here that counts.
type keySigned bool

func (k *keySigned) Write(line []byte) (int, error) {
	if bytes.HasPrefix(line, []byte("CLIENT_RANDOM ")) {
		*k = true
	}
	return len(line), nil
}

// watchOutside registers such a connection, so that it ends when what allowed
// it ends.
func (c *call) watchOutside(to *outside) bool {
	protocol := flow.ProtocolTCP
	if to.host != "" {
		protocol = flow.ProtocolTLS
	}
	c.begin(protocol)
	c.d = flow.Decision{Effect: flow.EffectAllow, Enforced: c.enforced(), Steps: c.d.Steps[:0], Until: c.expires()}
	c.outside = to
	return c.watch(true)
}

// expires is when the caller's validity ends, zero for never.
func (c *call) expires() time.Time {
	if c.src == nil {
		return time.Time{}
	}
	return c.src.Expires
}

// recheckOutside ends one that a new connection would not become any more.
func (c *call) recheckOutside(t *netloop.Task, serial uint64) {
	to := c.outside
	c.restsOn(c.handle, &flow.Decision{Until: c.expires()}, c.enforced())
	switch nobodys := c.targetID == "" && c.p.view.Load().claimed(c.dst) == nil; {
	case !c.enforced():
		return
	case c.src != nil && c.src.Expired(time.Now()):
		c.end(flow.ReasonExpired)
		return
	case nobodys && egress(c.src, c.dst):
		return
	case nobodys && to.host != "" && verifiesHost(c.src, to.host, c.dst.Port()):
		if to.proven {
			return
		}
		// Audit let it pass before that was known.
		r := c.question(to.host).prove(t)
		if c.serial != serial {
			return
		}
		if r == nil {
			to.proven = true
			return
		}
	}
	c.end(flow.ReasonPolicyChanged)
}
