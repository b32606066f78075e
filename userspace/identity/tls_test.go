// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// pair is a CA with a server and a client side on it.
type pair struct {
	ca       *CA
	leaves   *Leaves
	verifier *Verifier
	server   *tls.Config
	sessions *Sessions
}

func newPair(t testing.TB, ttl time.Duration) *pair {
	t.Helper()
	ca := openCA(t, CAOptions{StateDir: t.TempDir()})
	p := &pair{
		ca: ca, leaves: newLeaves(t, signWith(ca, ttl), testID, otherID),
		verifier: NewVerifier(VerifierOptions{Bundle: bundleOf(t, ca.Trust())}), sessions: NewSessions(16),
	}
	for _, id := range []string{testID, otherID} {
		if _, err := p.leaves.Wait(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	p.server = ServerConfig(ServerOptions{Leaves: p.leaves, Verifier: p.verifier})
	return p
}

func (p *pair) options() ClientOptions {
	return ClientOptions{Leaves: p.leaves, Verifier: p.verifier, ID: testID, Peer: otherID, Sessions: p.sessions}
}

func (p *pair) client(t testing.TB) *tls.Config {
	t.Helper()
	c, err := ClientConfig(p.options())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// outcome is what both ends of one connection saw.
type outcome struct {
	clientErr, serverErr error
	client, server       tls.ConnectionState
}

func (o outcome) err() error { return errors.Join(o.clientErr, o.serverErr) }

// connect makes one connection over a pipe and sends a byte each way, so
// that the client reads the server's ticket and its alert.
func connect(client, server *tls.Config) (o outcome) {
	a, b := newPipe()
	var group sync.WaitGroup
	group.Go(func() {
		c := tls.Server(b, server)
		defer b.Close()
		if o.serverErr = c.Handshake(); o.serverErr != nil {
			return
		}
		o.server = c.ConnectionState()
		if _, o.serverErr = c.Write([]byte("s")); o.serverErr == nil {
			_, o.serverErr = io.ReadFull(c, make([]byte, 1))
		}
	})
	group.Go(func() {
		c := tls.Client(a, client)
		defer a.Close()
		if o.clientErr = c.Handshake(); o.clientErr != nil {
			return
		}
		o.client = c.ConnectionState()
		if _, o.clientErr = io.ReadFull(c, make([]byte, 1)); o.clientErr == nil {
			_, o.clientErr = c.Write([]byte("c"))
		}
	})
	group.Wait()
	return o
}

// newPipe is a connection in memory whose writes do not wait for the reader,
// as those of a socket do not. Unlike a socket it lets a test's clock run.
func newPipe() (net.Conn, net.Conn) {
	ab, ba := newStream(), newStream()
	return &pipeEnd{in: ba, out: ab}, &pipeEnd{in: ab, out: ba}
}

type stream struct {
	mu     sync.Mutex
	more   *sync.Cond
	buffer bytes.Buffer
	closed bool
}

func newStream() *stream {
	s := &stream{}
	s.more = sync.NewCond(&s.mu)
	return s
}

func (s *stream) close() {
	s.mu.Lock()
	s.closed = true
	s.more.Broadcast()
	s.mu.Unlock()
}

// pipeEnd has no deadlines: the tests set none.
type pipeEnd struct {
	net.Conn
	in, out *stream
}

func (p *pipeEnd) Read(b []byte) (int, error) {
	p.in.mu.Lock()
	defer p.in.mu.Unlock()
	for p.in.buffer.Len() == 0 {
		if p.in.closed {
			return 0, io.EOF
		}
		p.in.more.Wait()
	}
	return p.in.buffer.Read(b)
}

func (p *pipeEnd) Write(b []byte) (int, error) {
	p.out.mu.Lock()
	defer p.out.mu.Unlock()
	if p.out.closed {
		return 0, io.ErrClosedPipe
	}
	p.out.more.Broadcast()
	return p.out.buffer.Write(b)
}

func (p *pipeEnd) Close() error {
	p.in.close()
	p.out.close()
	return nil
}

func (p *pipeEnd) SetDeadline(time.Time) error      { return nil }
func (p *pipeEnd) SetReadDeadline(time.Time) error  { return nil }
func (p *pipeEnd) SetWriteDeadline(time.Time) error { return nil }
func (p *pipeEnd) RemoteAddr() net.Addr             { return &net.UnixAddr{Name: "pipe", Net: "unix"} }
func (p *pipeEnd) LocalAddr() net.Addr              { return p.RemoteAddr() }

func TestHandshake(t *testing.T) {
	p := newPair(t, 0)
	o := connect(p.client(t), p.server)
	if o.err() != nil {
		t.Fatal(o.err())
	}
	if o.client.Version != tls.VersionTLS13 || o.client.NegotiatedProtocol != "h2" || o.client.CurveID != tls.X25519MLKEM768 {
		t.Errorf("%s, %q, %v", tls.VersionName(o.client.Version), o.client.NegotiatedProtocol, o.client.CurveID)
	}
	leaf, err := p.leaves.Get(testID)
	if err != nil {
		t.Fatal(err)
	}
	peer, err := p.verifier.PeerOf(o.server, RoleClient)
	if err != nil || peer.ID != testID || peer.Thumbprint != leaf.Thumbprint || peer.Serial != leaf.Serial || !peer.NotAfter.Equal(leaf.NotAfter) {
		t.Errorf("server sees %+v, %v", peer, err)
	}
	if peer, err := p.verifier.PeerOf(o.client, RoleServer); err != nil || peer.ID != otherID {
		t.Errorf("client sees %+v, %v", peer, err)
	}
}

// Each change that voids a session leads to a full handshake, or to a
// refusal; without a change it is resumed.
func TestResumption(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, 10*time.Minute)
		resumed := func(what string, want bool) {
			t.Helper()
			o := connect(p.client(t), p.server)
			if o.err() != nil {
				t.Fatalf("%s: %v", what, o.err())
			}
			if o.client.DidResume != want || o.server.DidResume != want {
				t.Errorf("%s: resumed %v/%v, want %v", what, o.client.DidResume, o.server.DidResume, want)
			}
		}
		resumed("first", false)
		resumed("second", true)
		resumed("third", true)
		if o := connect(p.client(t), p.server); o.err() != nil || len(o.server.PeerCertificates) == 0 {
			t.Errorf("a resumed client has no certificate: %v", o.err())
		}

		list, err := NewRevocations([]Revocation{{Kind: RevokeIdentity, Value: "spiffe://td/unrelated"}}, 1)
		if err != nil {
			t.Fatal(err)
		}
		p.verifier.SetRevocations(list)
		resumed("after a revocation of another", false)
		resumed("and once more", true)
		p.verifier.SetBundle(bundleOf(t, p.ca.Trust()))
		resumed("after a change of trust", false)
		resumed("and once more", true)

		changed, _ := p.leaves.Changed(testID)
		<-changed
		resumed("with a rotated leaf of its own", false)
		resumed("and once more", true)

		options := p.options()
		options.ID, options.Peer = otherID, testID
		c, err := ClientConfig(options)
		if err != nil {
			t.Fatal(err)
		}
		if o := connect(c, p.server); o.err() != nil || o.client.DidResume {
			t.Errorf("another identity: %v, resumed %v", o.err(), o.client.DidResume)
		}

		if list, err = NewRevocations([]Revocation{{Kind: RevokeIdentity, Value: testID}}, 2); err != nil {
			t.Fatal(err)
		}
		p.verifier.SetRevocations(list)
		o := connect(p.client(t), p.server)
		if reason, _ := ReasonOf(o.serverErr); reason != flow.ReasonIdentityRevoked {
			t.Errorf("the revoked client: %v", o.serverErr)
		}
	})
}

// A ticket that the server would still decrypt does not get a revoked client
// in: VerifyConnection asks again. Here the ticket keys are held still.
func TestRevokedOnResumption(t *testing.T) {
	for name, c := range map[string]struct {
		revoke func(t *testing.T, p *pair) Revocation
		reason flow.Reason
	}{
		"identity": {func(*testing.T, *pair) Revocation { return Revocation{Kind: RevokeIdentity, Value: testID} }, flow.ReasonIdentityRevoked},
		"serial": {func(t *testing.T, p *pair) Revocation {
			leaf, err := p.leaves.Get(testID)
			if err != nil {
				t.Fatal(err)
			}
			return Revocation{Kind: RevokeSerial, Value: leaf.Serial}
		}, flow.ReasonCertificateRevoked},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, 0)
			fixed, err := p.server.GetConfigForClient(nil)
			if err != nil {
				t.Fatal(err)
			}
			// The client knows nothing of the revocation and resumes.
			mine := NewVerifier(VerifierOptions{Bundle: bundleOf(t, p.ca.Trust())})
			options := p.options()
			options.Verifier = mine
			dial := func() outcome {
				config, err := ClientConfig(options)
				if err != nil {
					t.Fatal(err)
				}
				return connect(config, fixed)
			}
			if o := dial(); o.err() != nil {
				t.Fatal(o.err())
			}
			if o := dial(); o.err() != nil || !o.server.DidResume {
				t.Fatalf("%v, resumed %v: the test shows nothing", o.err(), o.server.DidResume)
			}
			list, err := NewRevocations([]Revocation{c.revoke(t, p)}, 1)
			if err != nil {
				t.Fatal(err)
			}
			p.verifier.SetRevocations(list)
			o := dial()
			if reason, _ := ReasonOf(o.serverErr); reason != c.reason || o.clientErr == nil {
				t.Errorf("server %v, client %v; want %s", o.serverErr, o.clientErr, c.reason)
			}
		})
	}
}

// The server alone decides that a ticket is void: this client keeps all.
func TestServerVoidsTickets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := openCA(t, CAOptions{StateDir: t.TempDir()})
		leaves := newLeaves(t, signWith(ca, 10*time.Hour), otherID)
		if _, err := leaves.Wait(t.Context(), otherID); err != nil {
			t.Fatal(err)
		}
		verifier := NewVerifier(VerifierOptions{Bundle: bundleOf(t, ca.Trust())})
		server := ServerConfig(ServerOptions{Leaves: leaves, Verifier: verifier})
		client := &tls.Config{
			InsecureSkipVerify: true, ServerName: ServerName(otherID), NextProtos: []string{"h2"}, ClientSessionCache: tls.NewLRUClientSessionCache(4),
		}
		present := func(ttl time.Duration) (end time.Time) {
			t.Helper()
			key := newKey(t)
			chain, err := ca.Sign(csrOf(t, key), testID, ttl)
			if err != nil {
				t.Fatal(err)
			}
			leaf, err := x509.ParseCertificate(chain[0])
			if err != nil {
				t.Fatal(err)
			}
			client.Certificates = []tls.Certificate{{Certificate: chain, PrivateKey: key}}
			return leaf.NotAfter
		}
		resumed := func(what string, want bool) {
			t.Helper()
			if o := connect(client, server); o.err() != nil || o.server.DidResume != want {
				t.Errorf("%s: %v, resumed %v, want %v", what, o.err(), o.server.DidResume, want)
			}
		}
		present(10 * time.Hour)
		resumed("first", false)
		resumed("second", true)
		list, err := NewRevocations([]Revocation{{Kind: RevokeIdentity, Value: "spiffe://td/unrelated"}}, 1)
		if err != nil {
			t.Fatal(err)
		}
		verifier.SetRevocations(list)
		resumed("after a revocation", false)
		resumed("once more", true)
		verifier.SetBundle(bundleOf(t, ca.Trust()))
		resumed("after a change of trust", false)
		resumed("once more", true)
		time.Sleep(ticketLife)
		resumed("with an old ticket key", false)

		client.ClientSessionCache = tls.NewLRUClientSessionCache(4)
		end := present(10 * time.Second)
		resumed("with a short leaf", false)
		resumed("once more", true)
		time.Sleep(time.Until(end) - sessionMargin/2)
		present(10 * time.Second)
		resumed("when the leaf of the session is about to end", false)
	})
}

// So does the client: the leaf of the server's side of a session must live.
func TestClientForgetsSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := openCA(t, CAOptions{StateDir: t.TempDir()})
		p := &pair{ca: ca, sessions: NewSessions(4), verifier: NewVerifier(VerifierOptions{Bundle: bundleOf(t, ca.Trust())})}
		p.leaves = newLeaves(t, func(_ context.Context, id string, csr []byte) ([][]byte, error) {
			if id == testID {
				return ca.Sign(csr, id, time.Hour)
			}
			return ca.Sign(csr, id, 20*time.Second)
		}, testID, otherID)
		for _, id := range []string{testID, otherID} {
			if _, err := p.leaves.Wait(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		p.server = ServerConfig(ServerOptions{Leaves: p.leaves, Verifier: p.verifier})
		served, err := p.leaves.Get(otherID)
		if err != nil {
			t.Fatal(err)
		}
		resumed := func(what string, want bool) {
			t.Helper()
			if o := connect(p.client(t), p.server); o.err() != nil || o.client.DidResume != want {
				t.Errorf("%s: %v, resumed %v, want %v", what, o.err(), o.client.DidResume, want)
			}
		}
		resumed("first", false)
		time.Sleep(time.Until(served.NotAfter) - 2*sessionMargin)
		resumed("with a server's leaf that lives", true)
		time.Sleep(time.Until(served.NotAfter) - sessionMargin/2)
		resumed("with one that is about to end", false)
	})
}

func TestHandshakeRefusals(t *testing.T) {
	p := newPair(t, 0)
	foreign := newPair(t, 0)
	root := newRoot(t)
	clientLeaf := func(ca *testCA, change func(*x509.Certificate)) *tls.Config {
		key, template := newKey(t), leafTemplate(testID)
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Minute)
		change(template)
		cert := certify(t, template, ca.cert, key.Public(), ca.key)
		c := p.client(t)
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}, nil
		}
		return c
	}
	with := func(change func(*tls.Config)) *tls.Config {
		c := p.client(t)
		change(c)
		return c
	}
	for name, c := range map[string]struct {
		client, server *tls.Config
		reason         flow.Reason // what the server finds
		clientReason   flow.Reason // what the client finds, where the server finds nothing
	}{
		"TLS 1.2": {client: with(func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }), reason: flow.ReasonTLSVersion},
		"no certificate": {client: with(func(c *tls.Config) {
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil }
		}), reason: flow.ReasonCertMissing},
		"no protocol":       {client: with(func(c *tls.Config) { c.NextProtos = nil }), reason: flow.ReasonTLSHandshake},
		"another protocol":  {client: with(func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }), reason: flow.ReasonTLSHandshake},
		"unknown authority": {client: clientLeaf(root, func(*x509.Certificate) {}), reason: flow.ReasonCertUntrusted},
		"a CA as client":    {client: clientLeaf(root, func(c *x509.Certificate) { c.IsCA = true }), reason: flow.ReasonCertIsCA},
		"unknown server name": {client: with(func(c *tls.Config) { c.ServerName = ServerName("spiffe://td/nobody") }),
			reason: flow.ReasonTLSHandshake},
		"unexpected client": {client: p.client(t), reason: flow.ReasonPeerMismatch, server: ServerConfig(ServerOptions{
			Leaves: p.leaves, Verifier: p.verifier, Expect: func(id string) bool { return id == otherID },
		})},
		"unexpected server": {client: p.client(t), clientReason: flow.ReasonPeerMismatch, server: ServerConfig(ServerOptions{
			Leaves: p.leaves, Verifier: p.verifier, Identity: func(*tls.ClientHelloInfo) (string, error) { return testID, nil },
		})},
		"server of another root": {client: p.client(t), clientReason: flow.ReasonCertUntrusted, server: ServerConfig(ServerOptions{
			Leaves: foreign.leaves, Verifier: p.verifier,
		})},
	} {
		t.Run(name, func(t *testing.T) {
			if c.server == nil {
				c.server = p.server
			}
			o := connect(c.client, c.server)
			if o.clientErr == nil || o.serverErr == nil {
				t.Fatalf("client %v, server %v: one end is content", o.clientErr, o.serverErr)
			}
			err, want := o.serverErr, c.reason
			if c.clientReason != "" {
				err, want = o.clientErr, c.clientReason
			}
			if reason, detail := ReasonOf(err); reason != want || detail == "" {
				t.Errorf("%v; want %s", err, want)
			}
		})
	}
	if reason, _ := ReasonOf(nil); reason != flow.ReasonOK {
		t.Error("success has a reason")
	}
}

func TestAnonymousClient(t *testing.T) {
	p := newPair(t, 0)
	server := ServerConfig(ServerOptions{Leaves: p.leaves, Verifier: p.verifier, Anonymous: true, NextProtos: []string{"http/1.1"}})
	options := p.options()
	options.NextProtos = []string{"http/1.1"}
	c, err := ClientConfig(options)
	if err != nil {
		t.Fatal(err)
	}
	if o := connect(c, server); o.err() != nil {
		t.Errorf("with a certificate: %v", o.err())
	}
	if c, err = ClientConfig(options); err != nil {
		t.Fatal(err)
	}
	c.GetClientCertificate, c.ClientSessionCache = nil, nil
	o := connect(c, server)
	if o.err() != nil {
		t.Fatalf("without a certificate: %v", o.err())
	}
	_, err = p.verifier.PeerOf(o.server, RoleClient)
	if reason, _ := ReasonOf(err); reason != flow.ReasonCertMissing {
		t.Errorf("%v; want cert_missing", err)
	}
	// One that presents a certificate is verified all the same.
	lenient := ServerConfig(ServerOptions{Leaves: p.leaves, Verifier: p.verifier, Anonymous: true, NextProtos: []string{"http/1.1", ""}})
	if c, err = ClientConfig(options); err != nil {
		t.Fatal(err)
	}
	c.NextProtos, c.VerifyConnection = nil, nil
	if o := connect(c, lenient); o.err() != nil || o.server.NegotiatedProtocol != "" {
		t.Errorf("without ALPN: %v, %q", o.err(), o.server.NegotiatedProtocol)
	}
	list, err := NewRevocations([]Revocation{{Kind: RevokeIdentity, Value: testID}}, 1)
	if err != nil {
		t.Fatal(err)
	}
	p.verifier.SetRevocations(list)
	if c, err = ClientConfig(options); err != nil {
		t.Fatal(err)
	}
	o = connect(c, server)
	if reason, _ := ReasonOf(o.serverErr); reason != flow.ReasonIdentityRevoked {
		t.Errorf("%v", o.serverErr)
	}
}

func TestClientConfigWithoutLeaf(t *testing.T) {
	p := newPair(t, 0)
	options := p.options()
	options.ID = "spiffe://td/nobody"
	if _, err := ClientConfig(options); !errors.Is(err, ErrNoLeaf) {
		t.Errorf("%v", err)
	}
}

// Under steady load with leaves of 2 s nothing is lost: new connections,
// resumed ones, and one that stays open throughout.
func TestRotationLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, 2*time.Second)
		const clients, length = 8, 20 * time.Second
		var made, resumed, failed atomic.Int32
		serials := make(map[string]bool)
		var mu sync.Mutex
		end := time.Now().Add(length)

		a, b := newPipe()
		defer a.Close()
		long := tls.Client(a, p.client(t))
		go func() {
			s := tls.Server(b, p.server)
			_, _ = io.Copy(s, s)
			b.Close()
		}()

		var group sync.WaitGroup
		for i := range clients {
			group.Go(func() {
				time.Sleep(time.Duration(i) * 7 * time.Millisecond)
				for time.Now().Before(end) {
					c, err := ClientConfig(p.options())
					if err != nil {
						t.Error(err)
						return
					}
					o := connect(c, p.server)
					if o.err() != nil {
						failed.Add(1)
						t.Errorf("after %v: %v", length-time.Until(end), o.err())
						return
					}
					made.Add(1)
					if o.client.DidResume {
						resumed.Add(1)
					}
					mu.Lock()
					serials[Serial(o.server.PeerCertificates[0].SerialNumber)] = true
					mu.Unlock()
					time.Sleep(83 * time.Millisecond)
				}
			})
		}
		group.Go(func() {
			buffer := make([]byte, 4)
			for n := 0; time.Now().Before(end); n++ {
				if _, err := fmt.Fprintf(long, "%04d", n); err != nil {
					t.Error(err)
					return
				}
				if _, err := io.ReadFull(long, buffer); err != nil || string(buffer) != fmt.Sprintf("%04d", n) {
					t.Errorf("echo %d: %q, %v", n, buffer, err)
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
		})
		group.Wait()
		a.Close()
		t.Logf("%d connections, %d resumed, %d failed, %d leaves", made.Load(), resumed.Load(), failed.Load(), len(serials))
		if made.Load() < 1200 || len(serials) < 12 || resumed.Load() == 0 || resumed.Load() == made.Load() {
			t.Errorf("%d connections, %d resumed over %d leaves: the test shows too little", made.Load(), resumed.Load(), len(serials))
		}
	})
}

// A dial may take longer than the leaf of its beginning lives.
func TestSlowDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, 2*time.Second)
		for range 2 { // the second time with a session that went stale
			c := p.client(t)
			time.Sleep(5 * time.Second)
			leaf, err := p.leaves.Get(testID)
			if err != nil {
				t.Fatal(err)
			}
			o := connect(c, p.server)
			if o.err() != nil {
				t.Fatal(o.err())
			}
			if got := Serial(o.server.PeerCertificates[0].SerialNumber); got != leaf.Serial {
				t.Errorf("presented %s, the leaf of the moment is %s", got, leaf.Serial)
			}
		}
	})
}

func TestSessionsAreBounded(t *testing.T) {
	p := newPair(t, 0)
	p.sessions = NewSessions(1)
	if o := connect(p.client(t), p.server); o.err() != nil {
		t.Fatal(o.err())
	}
	options := p.options()
	options.ID, options.Peer = otherID, testID
	c, err := ClientConfig(options)
	if err != nil {
		t.Fatal(err)
	}
	if o := connect(c, p.server); o.err() != nil {
		t.Fatal(o.err())
	}
	if len(p.sessions.items) != 1 || p.sessions.order.Len() != 1 {
		t.Errorf("%d, %d sessions; want 1", len(p.sessions.items), p.sessions.order.Len())
	}
	if o := connect(p.client(t), p.server); o.err() != nil || o.client.DidResume {
		t.Errorf("%v, resumed %v: the first was to make room", o.err(), o.client.DidResume)
	}
}

// A chain near the limit fails or works, and never panics in the ticket.
func TestLargeChain(t *testing.T) {
	ids := make([]string, 0, 300)
	for i := range 300 {
		ids = append(ids, fmt.Sprintf("spiffe://td/%04d/%s", i, strings.Repeat("x", 40)))
	}
	scope := scopeOf(t, "n1", append(ids, testID, otherID)...)
	authority := openCA(t, CAOptions{StateDir: t.TempDir(), Authority: true, Node: "authority"})
	ca := openCA(t, CAOptions{StateDir: t.TempDir(), Enroller: issuing(t, authority, &scope)})
	if err := ca.Enroll(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := &pair{ca: ca, leaves: newLeaves(t, signWith(ca, 0), testID, otherID), sessions: NewSessions(4),
		verifier: NewVerifier(VerifierOptions{Bundle: bundleOf(t, authority.Trust())})}
	for _, id := range []string{testID, otherID} {
		if _, err := p.leaves.Wait(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	p.server = ServerConfig(ServerOptions{Leaves: p.leaves, Verifier: p.verifier})
	for i, want := range []bool{false, true} {
		o := connect(p.client(t), p.server)
		if o.err() != nil || o.client.DidResume != want {
			t.Errorf("connection %d with a scope of %d bytes: %v, resumed %v", i, len(scope.marshal()), o.err(), o.client.DidResume)
		}
	}
}

// cpuTime is what the process has used: steadier than the clock on a busy
// machine.
func cpuTime(b *testing.B) time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func BenchmarkHandshake(b *testing.B) {
	p := newPair(b, 0)
	run := func(b *testing.B, sessions *Sessions, resume bool) {
		p.sessions = sessions
		if o := connect(p.client(b), p.server); o.err() != nil {
			b.Fatal(o.err())
		}
		n, before := 0, cpuTime(b)
		for b.Loop() {
			if o := connect(p.client(b), p.server); o.err() != nil || o.client.DidResume != resume {
				b.Fatalf("%v, resumed %v", o.err(), o.client.DidResume)
			}
			n++
		}
		b.ReportMetric(float64((cpuTime(b)-before).Nanoseconds())/float64(n), "cpu-ns/op")
	}
	b.Run("full", func(b *testing.B) { run(b, nil, false) })
	b.Run("resumed", func(b *testing.B) { run(b, NewSessions(4), true) })
}
