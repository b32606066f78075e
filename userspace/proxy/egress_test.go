// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
)

const partner = "api.partner.test"

// partnerAt is where the plan lets the client reach the partner.
var partnerAt = netip.MustParseAddrPort("10.0.9.1:6000")

// hostCertificate makes a certificate for a name, and its roots.
func hostCertificate(t *testing.T, name string, end time.Time) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "host"}, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: end, DNSNames: []string{name},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

// partnered is a node whose client may reach a host that must prove its name.
type partnered struct {
	*node
	addr  string // where the client connects
	conns atomic.Int32
}

// newPartnered has the host show a certificate; each of change is done to what
// it speaks TLS by.
func newPartnered(t *testing.T, goroutines bool, mode string, cert tls.Certificate, roots *x509.CertPool, change ...func(*tls.Config)) *partnered {
	t.Helper()
	text := "mode: " + mode + ", mayCall: [server], egress: [{host: " + partner + ", ports: [6000], tls: verify}]"
	p := &partnered{node: oneNode(t, nodeOptions{goroutines: goroutines, plan: changed(t, "mode: enforce, mayCall: [server], egress: [{cidr: 10.0.2.0/24, ports: [6000]}]", text),
		change: func(o *Options) { o.Roots = roots }})}
	config := &tls.Config{Certificates: []tls.Certificate{cert}}
	for _, f := range change {
		f(config)
	}
	p.raw(func(c *net.TCPConn) {
		p.conns.Add(1)
		s := tls.Server(c, config)
		defer s.Close()
		_, _ = io.Copy(s, s)
	}, 6000)
	p.mu.Lock()
	p.apps[partnerAt] = p.apps[serverPort(6000)]
	p.mu.Unlock()
	p.addr = p.out(clientNumber, partnerAt)
	return p
}

// speak sends a word to the host in TLS and returns the connection, which
// trusts anybody: the proxy is to verify.
func (p *partnered) speak(t *testing.T, name string) (*tls.Conn, error) {
	t.Helper()
	c := tls.Client(dialTCP(t, p.addr), &tls.Config{ServerName: name, InsecureSkipVerify: true})
	t.Cleanup(func() { c.Close() })
	if _, err := c.Write([]byte("word")); err != nil {
		return c, err
	}
	b := make([]byte, 4)
	_, err := io.ReadFull(c, b)
	if err == nil && string(b) != "word" {
		err = errors.New("another word")
	}
	return c, err
}

// TestEgressVerified holds that a host outside is reached in TLS by its name,
// where it has proven it, and not otherwise.
func TestEgressVerified(t *testing.T) {
	good, goodRoots := hostCertificate(t, partner, time.Now().Add(time.Hour))
	other, otherRoots := hostCertificate(t, "other.test", time.Now().Add(time.Hour))
	ended, endedRoots := hostCertificate(t, partner, time.Now().Add(-time.Hour))
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := newPartnered(t, goroutines, "enforce", good, goodRoots)
		for range 3 {
			if _, err := n.speak(t, partner); err != nil {
				t.Fatalf("%v: %+v", err, n.records())
			}
		}
		if got := n.conns.Load(); got != 4 {
			t.Errorf("%d connections came to the host, want those of the client and one to see its certificate", got)
		}
		n.mu.Lock()
		for _, d := range n.dials {
			if d.Kind != DialPlain || d.Host != partner || d.Address != partnerAt {
				t.Errorf("dial %+v", d)
			}
		}
		n.mu.Unlock()
		for _, name := range []string{"other.test", "xapi.partner.test"} {
			if _, err := n.speak(t, name); err == nil {
				t.Errorf("%s was reached", name)
			}
			n.recorded(flow.ReasonEgressTLS)
		}
		c := tls.Client(dialTCP(t, n.addr), &tls.Config{InsecureSkipVerify: true}) // no server name
		if err := c.Handshake(); err == nil {
			t.Error("a ClientHello without a name got through")
		}
		c.Close()
		n.recorded(flow.ReasonEgressTLS)
		resp, err := ask(t, dialTCP(t, n.addr), "GET / HTTP/1.1\r\nHost: "+partner+"\r\n\r\n")
		if err != nil {
			t.Fatal(err)
		}
		if reason, _ := problem(t, resp); reason != flow.ReasonEgressTLS || resp.StatusCode != 403 {
			t.Errorf("without TLS: %d %s", resp.StatusCode, reason)
		}
		if got := n.conns.Load(); got != 4 {
			t.Errorf("%d connections came to the host", got)
		}
		for name, x := range map[string]*partnered{
			"another name": newPartnered(t, goroutines, "enforce", other, otherRoots), "an end": newPartnered(t, goroutines, "enforce", ended, endedRoots),
			"unknown roots": newPartnered(t, goroutines, "enforce", good, otherRoots),
		} {
			if _, err := x.speak(t, partner); err == nil {
				t.Errorf("%s: it was reached", name)
			}
			x.recorded(flow.ReasonEgressCertificate)
		}
	})
}

// TestEgressVerifiedAsksTheClient holds that a host is proven before it refuses
// the proxy, which has no certificate for it.
func TestEgressVerifiedAsksTheClient(t *testing.T) {
	good, roots := hostCertificate(t, partner, time.Now().Add(time.Hour))
	other, _ := hostCertificate(t, "other.test", time.Now().Add(time.Hour))
	eachEngine(t, func(t *testing.T, goroutines bool) {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			n := newPartnered(t, goroutines, "enforce", good, roots, func(c *tls.Config) {
				c.ClientAuth, c.MaxVersion = tls.RequireAnyClientCert, version
			})
			own := tls.Client(dialTCP(t, n.addr), &tls.Config{ServerName: partner, InsecureSkipVerify: true, Certificates: []tls.Certificate{other}})
			defer own.Close()
			if _, err := own.Write([]byte("x")); err != nil {
				t.Error(err)
			}
			if _, err := own.Read(make([]byte, 1)); err != nil {
				t.Errorf("%s: a host that asks for a certificate: %v", tls.VersionName(version), err)
			}
		}
	})
}

// TestEgressCertificateOfAnother holds that a certificate proves nothing by
// itself: everybody has it.
func TestEgressCertificateOfAnother(t *testing.T) {
	good, roots := hostCertificate(t, partner, time.Now().Add(time.Hour))
	other, _ := hostCertificate(t, partner, time.Now().Add(time.Hour))
	shown := tls.Certificate{Certificate: good.Certificate, PrivateKey: other.PrivateKey}
	for _, suite := range signedSuites {
		if name := tls.CipherSuiteName(suite); strings.HasPrefix(name, "TLS_RSA_") {
			t.Errorf("%s has no key share that is signed", name)
		}
	}
	eachEngine(t, func(t *testing.T, goroutines bool) {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			for _, auth := range []tls.ClientAuthType{tls.NoClientCert, tls.RequireAnyClientCert} {
				n := newPartnered(t, goroutines, "enforce", shown, roots, func(c *tls.Config) { c.MaxVersion, c.ClientAuth = version, auth })
				if _, err := n.speak(t, partner); err == nil {
					t.Errorf("%s, %s: it was reached", tls.VersionName(version), auth)
				}
				n.recorded(flow.ReasonEgressCertificate)
				if got := n.conns.Load(); got != 1 {
					t.Errorf("%s, %s: %d connections came to it", tls.VersionName(version), auth, got)
				}
			}
		}
		// One that leaves its key share out, and then everything else.
		for upTo := range 3 {
			n := newPartnered(t, goroutines, "enforce", shown, roots)
			n.raw(func(c *net.TCPConn) { _, _ = c.Write(showing(t, c, good.Certificate[0], upTo)) }, 6000)
			n.mu.Lock()
			n.apps[partnerAt] = n.apps[serverPort(6000)]
			n.mu.Unlock()
			if _, err := n.speak(t, partner); err == nil {
				t.Errorf("%d: it was reached", upTo)
			}
			n.recorded(flow.ReasonEgressCertificate)
		}
	})
}

// showing reads a ClientHello and answers with one of TLS 1.2 and a certificate
// that anybody may show; further messages follow up to a kind.
func showing(t *testing.T, c *net.TCPConn, der []byte, upTo int) []byte {
	t.Helper()
	if _, err := c.Read(make([]byte, 16<<10)); err != nil {
		return nil
	}
	message := func(kind byte, body ...byte) []byte {
		n := len(body)
		return append([]byte{22, 3, 3, byte((n + 4) >> 8), byte(n + 4), kind, 0, byte(n >> 8), byte(n)}, body...)
	}
	n := len(der)
	hello := append([]byte{3, 3}, make([]byte, 33)...)                                                                         // random, no session
	out := message(2, append(hello, 0xc0, 0x2b, 0)...)                                                                         // TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
	out = append(out, message(11, append([]byte{0, byte((n + 3) >> 8), byte(n + 3), 0, byte(n >> 8), byte(n)}, der...)...)...) // Certificate
	if upTo > 0 {
		out = append(out, message(13, 1, 64, 0, 2, 4, 3, 0, 0)...) // CertificateRequest
	}
	if upTo > 1 {
		out = append(out, message(14)...) // ServerHelloDone
	}
	return append(out, 21, 3, 3, 0, 2, 2, 40) // alert: handshake_failure
}

// TestEgressVerifiedInAudit holds that audit says what enforce would refuse,
// and stops nothing.
func TestEgressVerifiedInAudit(t *testing.T) {
	good, _ := hostCertificate(t, partner, time.Now().Add(time.Hour))
	_, otherRoots := hostCertificate(t, partner, time.Now().Add(time.Hour))
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := newPartnered(t, goroutines, "audit", good, otherRoots)
		for name, reason := range map[string]flow.Reason{partner: flow.ReasonEgressCertificate, "other.test": flow.ReasonEgressTLS} {
			if _, err := n.speak(t, name); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if r := n.recorded(reason); !r.WouldDeny {
				t.Errorf("%s: %+v", name, r)
			}
		}
		// A client that waits for the server to speak.
		n = newPartnered(t, goroutines, "audit", good, otherRoots)
		atOnce(&n.proxy.opt)
		n.raw(func(c *net.TCPConn) { _, _ = c.Write([]byte("hello")) }, 6000)
		n.mu.Lock()
		n.apps[partnerAt] = n.apps[serverPort(6000)]
		n.mu.Unlock()
		if got, err := io.ReadAll(dialTCP(t, n.addr)); err != nil || string(got) != "hello" {
			t.Errorf("%q %v", got, err)
		}
		if r := n.recorded(flow.ReasonEgressTLS); !r.WouldDeny {
			t.Errorf("%+v", r)
		}
	})
}

// TestEgressOfTheExpired holds that a host is no more reached by who has
// expired, whatever it proves.
func TestEgressOfTheExpired(t *testing.T) {
	good, roots := hostCertificate(t, partner, time.Now().Add(time.Hour))
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := newPartnered(t, goroutines, "enforce", good, roots)
		live, err := n.speak(t, partner)
		if err != nil {
			t.Fatal(err)
		}
		n.conns.Store(0)
		n.proxy.SetPlan(changed(t, "mode: enforce, mayCall: [server], egress: [{cidr: 10.0.2.0/24, ports: [6000]}]",
			`mode: enforce, expires: "2020-01-01", mayCall: [server], egress: [{host: `+partner+`, ports: [6000], tls: verify}]`), 2)
		n.pipeline.SetPlan(n.proxy.view.Load().plan)
		if _, err := live.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("what was open goes on: %v", err)
		}
		n.recorded(flow.ReasonExpired)
		if _, err := n.speak(t, partner); err == nil {
			t.Error("it reaches the host")
		}
		if r := n.recorded(flow.ReasonIdentityExpired); r.Stage != "governance" || r.WouldDeny {
			t.Errorf("%+v", r)
		}
		if c := n.conns.Load(); c != 0 {
			t.Errorf("the host had %d connections", c)
		}
	})
}

// TestEgressVerifiedBesideInAudit holds that audit holds a connection up by no
// host that is slow to prove its name.
func TestEgressVerifiedBesideInAudit(t *testing.T) {
	good, roots := hostCertificate(t, partner, time.Now().Add(time.Hour))
	eachEngine(t, func(t *testing.T, goroutines bool) {
		asked, answer := make(chan struct{}), make(chan struct{})
		n := newPartnered(t, goroutines, "audit", good, roots, func(c *tls.Config) {
			c.NextProtos = []string{"own"}
			c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
				if len(h.SupportedProtos) > 0 {
					return nil, nil
				}
				close(asked)
				<-answer
				return nil, errors.New("no")
			}
		})
		c := tls.Client(dialTCP(t, n.addr), &tls.Config{ServerName: partner, InsecureSkipVerify: true, NextProtos: []string{"own"}})
		defer c.Close()
		if _, err := c.Write([]byte("word")); err != nil {
			t.Error(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
			t.Error(err)
		}
		select {
		case <-asked:
		case <-time.After(10 * time.Second):
			t.Fatal("nobody asked")
		}
		if list := n.records(); len(list) > 0 {
			t.Errorf("told before it is known: %+v", list)
		}
		close(answer)
		if r := n.recorded(flow.ReasonEgressCertificate); !r.WouldDeny {
			t.Errorf("%+v", r)
		}
	})
}

// say sends a word to a server that sends it back.
func say(c net.Conn) error {
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Write([]byte("word")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 4))
	return err
}

// cut waits until a connection is ended by a change of the policies.
func (n *node) cut(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("it goes on: %v", err)
	}
	n.recorded(flow.ReasonPolicyChanged)
}

// TestEgressAuditToEnforce holds that what audit let pass ends once it is
// enforced, unless it would pass then.
func TestEgressAuditToEnforce(t *testing.T) {
	good, roots := hostCertificate(t, partner, time.Now().Add(time.Hour))
	_, otherRoots := hostCertificate(t, partner, time.Now().Add(time.Hour))
	const before = "mode: enforce, mayCall: [server], egress: [{cidr: 10.0.2.0/24, ports: [6000]}]"
	enforced := changed(t, before, "mode: enforce, mayCall: [server], egress: [{host: "+partner+", ports: [6000], tls: verify}]")
	eachEngine(t, func(t *testing.T, goroutines bool) {
		for _, to := range []struct {
			name  string
			roots *x509.CertPool
			stays bool
		}{{partner, roots, true}, {partner, otherRoots, false}, {"other.test", roots, false}} {
			n := newPartnered(t, goroutines, "audit", good, to.roots)
			c, err := n.speak(t, to.name)
			if err != nil {
				t.Fatal(err)
			}
			n.proxy.SetPlan(enforced, 2)
			if to.stays {
				if err := say(c); err != nil {
					t.Errorf("%s: %v", to.name, err)
				}
				n.proxy.SetPlan(plan(t, "enforce"), 3)
			}
			n.cut(t, c)
		}
		// One that nothing verifies, and that enforce does not list.
		n := newPartnered(t, goroutines, "audit", good, roots)
		n.raw(echo, 7)
		at := netip.MustParseAddrPort("10.0.9.1:7")
		n.mu.Lock()
		n.apps[at] = n.apps[serverPort(7)]
		n.mu.Unlock()
		c := dialTCP(t, n.out(clientNumber, at))
		if err := say(c); err != nil {
			t.Fatal(err)
		}
		n.proxy.SetPlan(enforced, 2)
		n.cut(t, c)
	})
}

// TestEgressClaimed holds that a connection to nobody's address ends once that
// is somebody's.
func TestEgressClaimed(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := oneNode(t, nodeOptions{goroutines: goroutines, plan: plan(t, "enforce")})
		n.raw(echo, 6000)
		c := dialTCP(t, n.out(clientNumber, serverPort(6000)))
		if err := say(c); err != nil {
			t.Fatal(err)
		}
		n.proxy.SetPlan(plan(t, "enforce"), 2)
		if err := say(c); err != nil {
			t.Errorf("the same rules again: %v", err)
		}
		n.proxy.SetPlan(changed(t, `"10.0.2.1:99"]`, `"10.0.2.1:99", "10.0.2.1:6000"]`), 3)
		n.cut(t, c)
	})
}

// TestEgressBesideBounded holds that a host which says nothing has few wait to
// tell of it.
func TestEgressBesideBounded(t *testing.T) {
	good, roots := hostCertificate(t, partner, time.Now().Add(time.Hour))
	eachEngine(t, func(t *testing.T, goroutines bool) {
		answer := make(chan struct{})
		n := newPartnered(t, goroutines, "audit", good, roots, func(c *tls.Config) {
			c.NextProtos = []string{"own"}
			c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
				if len(h.SupportedProtos) > 0 {
					return nil, nil
				}
				<-answer
				return nil, errors.New("no")
			}
		})
		connect := func() {
			t.Helper()
			c := tls.Client(dialTCP(t, n.addr), &tls.Config{ServerName: partner, InsecureSkipVerify: true, NextProtos: []string{"own"}})
			if err := c.Handshake(); err != nil {
				t.Fatal(err)
			}
			c.Close()
		}
		for range 8 * maxBeside {
			connect()
		}
		close(answer)
		told := 0
		until := func(want int) {
			t.Helper()
			for late := time.After(20 * time.Second); told < want; {
				for _, r := range n.records() {
					if r.Reason == flow.ReasonEgressCertificate {
						told++
					}
				}
				if told >= want {
					return
				}
				select {
				case <-n.pipeline.Wake():
				case <-late:
					t.Fatalf("told of %d, want %d", told, want)
				}
			}
		}
		until(maxBeside)
		// What is known now is told by the connection itself, after all who waited.
		connect()
		until(maxBeside + 1)
		if told != maxBeside+1 {
			t.Errorf("%d waited to tell of it", told-1)
		}
	})
}

// TestEgressVerifiedEnds holds that a connection ends with what allowed it.
func TestEgressVerifiedEnds(t *testing.T) {
	good, roots := hostCertificate(t, partner, time.Now().Add(time.Hour))
	eachEngine(t, func(t *testing.T, goroutines bool) {
		for what, end := range map[string]func(n *partnered){
			"policy": func(n *partnered) { n.proxy.SetPlan(plan(t, "enforce"), 2) },
			"revocation": func(n *partnered) {
				r, err := identity.NewRevocations([]identity.Revocation{{Kind: identity.RevokeIdentity, Value: clientID}}, 2)
				if err != nil {
					t.Fatal(err)
				}
				n.pipeline.SetRevocations(r)
			},
		} {
			n := newPartnered(t, goroutines, "enforce", good, roots)
			c, err := n.speak(t, partner)
			if err != nil {
				t.Fatal(err)
			}
			end(n)
			if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("%s: the connection lives: %v", what, err)
			}
			if !slices.ContainsFunc(n.records(), func(r pipeline.Record) bool {
				return r.Reason == flow.ReasonPolicyChanged || r.Reason == flow.ReasonRevoked
			}) {
				t.Errorf("%s: not recorded", what)
			}
		}
	})
}
