// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/tpm/tpmtest"
)

const (
	idA = "spiffe://td/a"
	idB = "spiffe://td/b"
)

// clock can be set forward.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

// syncBuffer is a log that a test reads afterwards.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// testAuthority is a running authority.
type testAuthority struct {
	o       Options
	address string
	clock   *clock
	log     *syncBuffer
	stop    func()
}

func options(t testing.TB) Options {
	return Options{StateDir: t.TempDir(), TrustDomain: "td", TPM: "none"}
}

func start(t testing.TB, o Options) *testAuthority {
	t.Helper()
	a := &testAuthority{clock: &clock{}, log: &syncBuffer{}}
	var err error
	if o.Listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	o.Now, o.Log = a.clock.now, slog.New(slog.NewJSONHandler(a.log, nil))
	a.o, a.address = o, o.Listener.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, o) }()
	a.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(a.stop)
	return a
}

func (a *testAuthority) token(t testing.TB, node string, ids ...string) string {
	t.Helper()
	text, info, err := CreateToken(a.o, node, ids, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if info.Node != node || !slices.Equal(info.IDs, ids) {
		t.Fatalf("%+v", info)
	}
	return text
}

func (a *testAuthority) client(t testing.TB, token string) *Client {
	t.Helper()
	c, err := NewClient(a.address, "td", token)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// node opens the CA of a node that enrols here.
func (a *testAuthority) node(t testing.TB, name, token string, change ...func(*identity.CAOptions)) *identity.CA {
	t.Helper()
	o := identity.CAOptions{StateDir: t.TempDir(), TrustDomain: "td", Node: name, TPM: "none", Enroller: a.client(t, token), Now: a.clock.now}
	for _, f := range change {
		f(&o)
	}
	ca, err := identity.OpenCA(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ca.Close() })
	return ca
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csrOf(t testing.TB, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func wantReason(t testing.TB, what string, err error, want flow.Reason) {
	t.Helper()
	if reason, _ := identity.ReasonOf(err); err == nil || reason != want {
		t.Errorf("%s: %v; want %s", what, err, want)
	}
}

// Two nodes under one authority trust each other's leaves over real TLS, and
// neither can issue the other's.
func TestTwoNodes(t *testing.T) {
	a := start(t, options(t))
	type side struct {
		ca       *identity.CA
		leaves   *identity.Leaves
		verifier *identity.Verifier
	}
	build := func(node, id string) side {
		ca := a.node(t, node, a.token(t, node, id))
		if err := ca.Enroll(t.Context()); err != nil {
			t.Fatal(err)
		}
		leaves := identity.NewLeaves(identity.LeavesOptions{Sign: func(_ context.Context, id string, csr []byte) ([][]byte, error) {
			return ca.Sign(csr, id, 0)
		}})
		t.Cleanup(leaves.Close)
		if err := leaves.Set([]string{id}); err != nil {
			t.Fatal(err)
		}
		if _, err := leaves.Wait(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		bundle, err := identity.NewBundle([]identity.TrustDomain{ca.Trust()})
		if err != nil {
			t.Fatal(err)
		}
		return side{ca, leaves, identity.NewVerifier(identity.VerifierOptions{Bundle: bundle})}
	}
	one, two := build("n1", idA), build("n2", idB)

	listener, err := tls.Listen("tcp", "127.0.0.1:0", identity.ServerConfig(identity.ServerOptions{Leaves: two.leaves, Verifier: two.verifier}))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	seen := make(chan error, 1)
	go func() {
		c, err := listener.Accept()
		if err != nil {
			seen <- err
			return
		}
		defer c.Close()
		if err = c.(*tls.Conn).Handshake(); err == nil {
			var peer identity.Peer
			if peer, err = two.verifier.PeerOf(c.(*tls.Conn).ConnectionState(), identity.RoleClient); err == nil && (peer.ID != idA || peer.Node != "n1") {
				err = fmt.Errorf("the client is %+v", peer)
			}
		}
		seen <- err
	}()
	config, err := identity.ClientConfig(identity.ClientOptions{Leaves: one.leaves, Verifier: one.verifier, ID: idA, Peer: idB})
	if err != nil {
		t.Fatal(err)
	}
	c, err := tls.Dial("tcp", listener.Addr().String(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := <-seen; err != nil {
		t.Error(err)
	}
	if peer, err := one.verifier.PeerOf(c.ConnectionState(), identity.RoleServer); err != nil || peer.ID != idB || peer.Node != "n2" {
		t.Errorf("%+v, %v", peer, err)
	}
	_, err = one.ca.Sign(csrOf(t, newKey(t)), idB, 0)
	wantReason(t, "an ID of the other node", err, flow.ReasonScope)
}

func TestTokenIsUsedOnce(t *testing.T) {
	a := start(t, options(t))
	text := a.token(t, "n1", idA)
	key := newKey(t)
	c := a.client(t, text)
	if _, err := c.Join(t.Context(), csrOf(t, key)); err != nil {
		t.Fatal(err)
	}
	// Another key never; the same key only while the answer may have been lost.
	_, err := c.Join(t.Context(), csrOf(t, newKey(t)))
	wantReason(t, "another key", err, flow.ReasonEnrolmentToken)
	if _, err := c.Join(t.Context(), csrOf(t, key)); err != nil {
		t.Errorf("the same key at once: %v", err)
	}
	a.clock.advance(repeatTime + time.Second)
	_, err = c.Join(t.Context(), csrOf(t, key))
	wantReason(t, "the same key later", err, flow.ReasonEnrolmentToken)

	// Nor after the authority was started again.
	a.stop()
	b := start(t, Options{StateDir: a.o.StateDir, TrustDomain: "td", TPM: "none"})
	_, err = b.client(t, text).Join(t.Context(), csrOf(t, newKey(t)))
	wantReason(t, "after a restart", err, flow.ReasonEnrolmentToken)

	if log := a.log.String() + b.log.String(); strings.Contains(log, text[60:]) || !strings.Contains(log, "used before") {
		t.Errorf("the log holds the token, or not the cause:\n%s", log)
	}
	err = filepath.WalkDir(a.o.StateDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if token, perr := ParseToken(text); perr != nil || bytes.Contains(b, token.secret[:]) || bytes.Contains(b, []byte(text[50:])) {
			t.Errorf("%s holds the secret (%v)", path, perr)
		}
		if info, ierr := d.Info(); ierr != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v; want mode 0600", path, info.Mode(), ierr)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestTokenUnderConcurrentUse(t *testing.T) {
	a := start(t, options(t))
	c := a.client(t, a.token(t, "n1", idA))
	var won atomic.Int32
	var group sync.WaitGroup
	for range 12 {
		key := newKey(t)
		group.Go(func() {
			_, err := c.Join(t.Context(), csrOf(t, key))
			if err == nil {
				won.Add(1)
				return
			}
			wantReason(t, "a loser", err, flow.ReasonEnrolmentToken)
		})
	}
	group.Wait()
	if won.Load() != 1 {
		t.Errorf("%d of 12 joined, want 1", won.Load())
	}
}

func TestJoinRefusals(t *testing.T) {
	a := start(t, options(t))
	known, err := ParseToken(a.token(t, "n9", idA))
	if err != nil {
		t.Fatal(err)
	}
	unknown := known
	unknown.secret[0] ^= 1
	_, err = a.client(t, unknown.Encode()).Join(t.Context(), csrOf(t, newKey(t)))
	wantReason(t, "unknown", err, flow.ReasonEnrolmentToken)

	wrongPin := known
	wrongPin.Pin[0] ^= 1
	_, err = a.client(t, wrongPin.Encode()).Join(t.Context(), csrOf(t, newKey(t)))
	wantReason(t, "another authority", err, flow.ReasonCertUntrusted)

	expired := a.token(t, "n1", idA)
	a.clock.advance(time.Hour)
	_, err = a.client(t, expired).Join(t.Context(), csrOf(t, newKey(t)))
	wantReason(t, "expired", err, flow.ReasonEnrolmentToken)

	revoked := a.token(t, "n1", idA)
	store, err := OpenStore(a.o.StateDir, "td")
	if err != nil {
		t.Fatal(err)
	}
	token, err := ParseToken(revoked)
	if err != nil {
		t.Fatal(err)
	}
	if err := store.RevokeToken(token.ID()); err != nil {
		t.Fatal(err)
	}
	_, err = a.client(t, revoked).Join(t.Context(), csrOf(t, newKey(t)))
	wantReason(t, "revoked", err, flow.ReasonEnrolmentToken)

	forged := csrOf(t, newKey(t))
	forged[len(forged)-1] ^= 1
	c := a.client(t, a.token(t, "n1", idA))
	_, err = c.Join(t.Context(), forged)
	wantReason(t, "forged request", err, flow.ReasonCertKeyUnproven)
	_, err = c.Join(t.Context(), []byte("x"))
	wantReason(t, "no request", err, flow.ReasonCertMalformed)
	if _, err = c.Join(t.Context(), csrOf(t, newKey(t))); err != nil {
		t.Errorf("a refused request used up the token: %v", err)
	}
	if _, err := a.client(t, "").Join(t.Context(), csrOf(t, newKey(t))); err == nil || !strings.Contains(err.Error(), "token create") {
		t.Errorf("without a token: %v", err)
	}

	// A node that says it is another than its token names does not enrol.
	ca := a.node(t, "n2", a.token(t, "n3", idA))
	if err := ca.Enroll(t.Context()); err == nil || !strings.Contains(err.Error(), "names node n3, this is node n2") {
		t.Errorf("another node's token: %v", err)
	}
	if _, err := ca.Sign(csrOf(t, newKey(t)), idA, 0); err == nil {
		t.Error("it signs")
	}
}

// A renewal brings the operator's present list; a removed node gets none.
func TestRenew(t *testing.T) {
	a := start(t, options(t))
	dir := t.TempDir()
	inDir := func(o *identity.CAOptions) { o.StateDir = dir }
	ca := a.node(t, "n1", a.token(t, "n1", idA), inDir)
	if err := ca.Enroll(t.Context()); err != nil {
		t.Fatal(err)
	}
	store, err := OpenStore(a.o.StateDir, "td")
	if err != nil {
		t.Fatal(err)
	}
	if err := store.SetScope("n1", []string{idB}); err != nil {
		t.Fatal(err)
	}
	if scope, _ := ca.Scope(); !slices.Equal(scope.IDs, []string{idA}) {
		t.Errorf("%v before the renewal", scope.IDs)
	}
	// The token file may be gone by then.
	again := a.node(t, "n1", "/nonexistent/token", inDir)
	if err := again.Enroll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if scope, _ := again.Scope(); scope.Node != "n1" || !slices.Equal(scope.IDs, []string{idB}) {
		t.Errorf("%+v after it", scope)
	}
	csr := csrOf(t, newKey(t))
	_, err = again.Sign(csr, idA, 0)
	wantReason(t, "an ID that was taken away", err, flow.ReasonScope)
	if _, err := again.Sign(csr, idB, 0); err != nil {
		t.Error(err)
	}
	nodes, err := store.Nodes()
	if err != nil || len(nodes) != 1 || nodes[0].Node != "n1" || nodes[0].Serial == "" {
		t.Fatalf("%+v, %v", nodes, err)
	}
	serial, err := store.RemoveNode("n1")
	if err != nil || serial != nodes[0].Serial {
		t.Errorf("%q, %v", serial, err)
	}
	wantReason(t, "a removed node", again.Enroll(t.Context()), flow.ReasonEnrolmentNode)
	if !strings.Contains(again.Problem(), "cannot be renewed") {
		t.Errorf("problem %q", again.Problem())
	}
	if _, err := again.Sign(csr, idB, 0); err != nil {
		t.Errorf("it is to sign until its intermediate ends: %v", err)
	}
	// A new token brings it back at once.
	back := a.node(t, "n1", a.token(t, "n1", idA), inDir)
	if err := back.Enroll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if scope, _ := back.Scope(); !slices.Equal(scope.IDs, []string{idA}) || back.Problem() != "" {
		t.Errorf("%v, problem %q", scope.IDs, back.Problem())
	}
	a.clock.advance(time.Hour + time.Minute)
	_, err = again.Sign(csr, idB, 0)
	wantReason(t, "after the intermediate's end", err, flow.ReasonEnrolmentMissing)
}

// enrolled joins by hand and returns the intermediate with its key.
func enrolled(t *testing.T, a *testAuthority, node string, ids ...string) (tls.Certificate, identity.Enrolment, *ecdsa.PrivateKey) {
	t.Helper()
	key := newKey(t)
	e, err := a.client(t, a.token(t, node, ids...)).Join(t.Context(), csrOf(t, key))
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{e.Intermediate}, PrivateKey: key}, e, key
}

func TestRenewRefusals(t *testing.T) {
	a := start(t, options(t))
	current, e, key := enrolled(t, a, "n1", idA)
	c := a.client(t, "")
	renew := func(cert tls.Certificate, csr []byte) error {
		_, err := c.Renew(t.Context(), csr, cert, e.Roots)
		return err
	}
	if err := renew(current, csrOf(t, key)); err != nil {
		t.Fatal(err)
	}
	wantReason(t, "no client certificate", renew(tls.Certificate{}, csrOf(t, key)), flow.ReasonCertMissing)
	wantReason(t, "a request over another key", renew(current, csrOf(t, newKey(t))), flow.ReasonCertKeyUnproven)

	// What is refused in the handshake reaches the client as an alert; the
	// reason is in no answer.
	refusedInHandshake := func(what string, cert tls.Certificate) {
		t.Helper()
		if err := renew(cert, csrOf(t, key)); err == nil || !strings.Contains(err.Error(), "tls:") {
			t.Errorf("%s: %v; want a refused handshake", what, err)
		}
	}
	stolen := current
	stolen.PrivateKey = newKey(t)
	refusedInHandshake("an intermediate without its key", stolen)

	other := start(t, options(t))
	foreign, _, _ := enrolled(t, other, "n1", idA)
	refusedInHandshake("an intermediate of another authority", foreign)

	leafKey := newKey(t)
	s, err := newServer(Options{StateDir: a.o.StateDir, TrustDomain: "td", TPM: "none"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	chain, err := s.ca.Sign(csrOf(t, leafKey), idA, 0)
	if err != nil {
		t.Fatal(err)
	}
	refusedInHandshake("a leaf", tls.Certificate{Certificate: chain, PrivateKey: leafKey})
	refusedInHandshake("a chain", tls.Certificate{Certificate: [][]byte{e.Intermediate, e.Roots[0]}, PrivateKey: key})

	// A node that joined again with another key leaves the old one behind.
	_, _, _ = enrolled(t, a, "n1", idA)
	wantReason(t, "an outdated key", renew(current, csrOf(t, key)), flow.ReasonEnrolmentNode)

	late, _, lateKey := enrolled(t, a, "n4", idA)
	a.clock.advance(2 * time.Hour)
	if err := renew(late, csrOf(t, lateKey)); err == nil {
		t.Error("an intermediate that has ended was renewed")
	}
	// The client does not take another server for its authority.
	_, err = c.Renew(t.Context(), csrOf(t, key), current, other.roots(t))
	wantReason(t, "another authority", err, flow.ReasonCertUntrusted)
}

func (a *testAuthority) roots(t *testing.T) [][]byte {
	t.Helper()
	certs, err := identity.ReadCertificates(filepath.Join(a.o.StateDir, "authority.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return [][]byte{certs[0].Raw}
}

// A node's own leaf chains to the authority's root too; it is not the
// authority for that, neither to who joins nor to who renews.
func TestNodeIsNotTheAuthority(t *testing.T) {
	a := start(t, options(t))
	text := a.token(t, "n2", idB)
	rogue := a.node(t, "n1", a.token(t, "n1", idA))
	if err := rogue.Enroll(t.Context()); err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	chain, err := rogue.Sign(csrOf(t, key), idA, 0)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{{Certificate: append(chain, a.roots(t)...), PrivateKey: key}}, ClientAuth: tls.RequestClientCert,
	})
	if err != nil {
		t.Fatal(err)
	}
	var told atomic.Bool
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			if n, _ := c.Read(make([]byte, 1)); n != 0 {
				told.Store(true)
			}
			c.Close()
		}
	}()
	c, err := NewClient(listener.Addr().String(), "td", text)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Join(t.Context(), csrOf(t, newKey(t)))
	wantReason(t, "join", err, flow.ReasonPeerMismatch)
	_, err = c.Renew(t.Context(), csrOf(t, key), tls.Certificate{}, a.roots(t))
	wantReason(t, "renew", err, flow.ReasonPeerMismatch)
	listener.Close()
	<-served
	if told.Load() {
		t.Error("it was told something")
	}
}

func TestCreateTokenRefuses(t *testing.T) {
	o := options(t)
	for name, c := range map[string]struct {
		node string
		ids  []string
		ttl  time.Duration
		want string
	}{
		"node":         {"N/1", []string{idA}, time.Hour, "node name"},
		"no ids":       {"n1", nil, time.Hour, "would issue nothing"},
		"bad id":       {"n1", []string{"spiffe://td/a/../b"}, time.Hour, "dot path segment"},
		"wildcard":     {"n1", []string{"spiffe://td/*"}, time.Hour, "in path"},
		"trust domain": {"n1", []string{"spiffe://other/a"}, time.Hour, "not of trust domain"},
		"reserved":     {"n1", []string{ServerID("td")}, time.Hour, "reserved"},
		"short":        {"n1", []string{idA}, time.Second, "not between"},
		"long":         {"n1", []string{idA}, 8 * 24 * time.Hour, "not between"},
	} {
		if text, _, err := CreateToken(o, c.node, c.ids, c.ttl); err == nil || !strings.Contains(err.Error(), c.want) || text != "" {
			t.Errorf("%s: %v; want %q", name, err, c.want)
		}
	}
	o.TrustDomain = "TD"
	if _, _, err := CreateToken(o, "n1", []string{idA}, time.Hour); err == nil {
		t.Error("a bad trust domain was taken")
	}
}

func TestStore(t *testing.T) {
	o := options(t)
	c := &clock{}
	o.Now = c.now
	text, info, err := CreateToken(o, "n1", []string{idB, idA, idA}, time.Hour)
	if err != nil || !slices.Equal(info.IDs, []string{idA, idB}) {
		t.Fatalf("%+v, %v", info, err)
	}
	if _, _, err := CreateToken(o, "n2", []string{idA}, 2*time.Hour); err != nil {
		t.Fatal(err)
	}
	store, err := o.store()
	if err != nil {
		t.Fatal(err)
	}
	list, err := store.Tokens()
	if err != nil || len(list) != 2 {
		t.Fatalf("%+v, %v", list, err)
	}
	token, err := ParseToken(text)
	if err != nil {
		t.Fatal(err)
	}
	if token.ID() != info.ID {
		t.Errorf("id %s, %s", token.ID(), info.ID)
	}
	for _, id := range []string{"", "../../x", strings.Repeat("g", 32), strings.Repeat("a", 32), info.ID + "/"} {
		if err := store.RevokeToken(id); err == nil {
			t.Errorf("revoked %q", id)
		}
	}
	if err := store.SetScope("n1", []string{idA}); err == nil {
		t.Error("set the scope of a node that never joined")
	}
	if _, err := store.RemoveNode("../n1"); err == nil {
		t.Error("removed ../n1")
	}
	if _, err := store.RemoveNode("n1"); err == nil {
		t.Error("removed a node that never joined")
	}
	if _, err := store.claim(token, "k"); err != nil {
		t.Fatal(err)
	}
	// Expired and long used tokens are swept when the next is made.
	c.advance(keepUsed + time.Hour)
	if _, _, err := CreateToken(o, "n3", []string{idA}, time.Hour); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]int{"tokens": 1, "tokens/used": 0} {
		if n, err := count(filepath.Join(o.StateDir, dir)); err != nil || n != want {
			t.Errorf("%s: %d records, %v; want %d", dir, n, err, want)
		}
	}
	// A damaged record is an error, not an empty list.
	if err := os.WriteFile(filepath.Join(o.StateDir, "nodes", "x.json"), []byte(`{"node":"x"} {}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Nodes(); err == nil {
		t.Error("a damaged record was passed over")
	}
}

// The server's own bounds, spoken to as a stranger would.
func TestServerBounds(t *testing.T) {
	a := start(t, options(t))
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: 20 * time.Second}
	defer web.CloseIdleConnections()
	post := func(path, body string) (int, refusalAnswer) {
		t.Helper()
		r, err := web.Post("https://"+a.address+path, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		var answer refusalAnswer
		_ = json.Unmarshal(b, &answer) // the mux answers in text
		return r.StatusCode, answer
	}
	for name, c := range map[string]struct {
		path, body string
		status     int
		reason     flow.Reason
	}{
		"no JSON":    {"/v1/join", "x", 400, flow.ReasonMalformed},
		"unknown":    {"/v1/join", `{"tokn":"x"}`, 400, flow.ReasonMalformed},
		"two values": {"/v1/join", `{"token":"x"}{}`, 400, flow.ReasonMalformed},
		"huge":       {"/v1/join", `{"token":"` + strings.Repeat("x", maxBody) + `"}`, 400, flow.ReasonMalformed},
		"bad token":  {"/v1/join", `{"token":"x"}`, 403, flow.ReasonEnrolmentToken},
		"anonymous":  {"/v1/renew", `{}`, 403, flow.ReasonCertMissing},
		"other path": {"/v1/other", `{}`, 404, ""},
		"other verb": {"/v1/bundle", `{}`, 405, ""},
	} {
		if status, answer := post(c.path, c.body); status != c.status || answer.Reason != c.reason {
			t.Errorf("%s: %d %+v; want %d %s", name, status, answer, c.status, c.reason)
		}
	}
	r, err := web.Get("https://" + a.address + "/v1/bundle")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	var bundle answer
	if err := json.NewDecoder(r.Body).Decode(&bundle); err != nil || bundle.TrustDomain != "td" || len(bundle.Roots) != 1 || !bytes.Equal(bundle.Roots[0], a.roots(t)[0]) {
		t.Errorf("%+v, %v", bundle, err)
	}

	if _, err := tls.Dial("tcp", a.address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		t.Error("spoke TLS 1.2")
	}

	throttled := false
	for range 3 * sourceBurst {
		status, answer := post("/v1/join", `{"token":"x"}`)
		if throttled = status == http.StatusTooManyRequests && answer.Reason == flow.ReasonThrottled; throttled {
			break
		}
	}
	if !throttled {
		t.Error("never throttled")
	}
}

func TestLimiter(t *testing.T) {
	now := time.Now()
	l := newLimiter(now)
	take := func(address string, at time.Duration) int {
		n := 0
		for range 10 * sourceBurst {
			if !l.allow(netip.MustParseAddr(address), now.Add(at)) {
				break
			}
			n++
		}
		return n
	}
	if n := take("192.0.2.1", 0); n != sourceBurst {
		t.Errorf("%d at once, want %d", n, sourceBurst)
	}
	if n := take("::ffff:192.0.2.1", 0); n != 0 {
		t.Errorf("the mapped form is another source: %d", n)
	}
	if n := take("192.0.2.1", 5*time.Second); n != 5 {
		t.Errorf("%d after 5 s, want 5", n)
	}
	if n := take("2001:db8::1", 5*time.Second); n != sourceBurst {
		t.Errorf("%d, want %d", n, sourceBurst)
	}
	if n := take("2001:db8::ffff:2", 5*time.Second); n != 0 {
		t.Errorf("the same /64 is another source: %d", n)
	}
	if n := take("192.0.2.1", 0); n != 0 {
		t.Errorf("a clock set back gives %d", n)
	}
	total := 0
	for i := range 1000 {
		if l.allow(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), now.Add(5*time.Second)) {
			total++
		}
	}
	if total > totalBurst || total < totalBurst/2 {
		t.Errorf("%d of all together, want at most %d", total, totalBurst)
	}
}

func TestRunErrors(t *testing.T) {
	o := options(t)
	o.IntermediateTTL = time.Second
	if err := Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "not between") {
		t.Errorf("%v", err)
	}
	o = options(t)
	o.RequireTPM = true
	if err := Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "requireTPM") {
		t.Errorf("%v", err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	o = options(t)
	o.Listen = taken.Addr().String()
	var banner bytes.Buffer
	o.Banner = &banner
	if err := Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("%v", err)
	}
	if !strings.Contains(banner.String(), "NO TPM") {
		t.Errorf("banner %q", banner.String())
	}
	for _, address := range []string{"", "host", "host:1:2"} {
		if _, err := NewClient(address, "td", ""); err == nil {
			t.Errorf("address %q was taken", address)
		}
	}
	if _, err := NewClient("h:1", "td", "sjt1.x"); err == nil {
		t.Error("a bad token was taken")
	}
}

// The authority is down: a first start says so, and an enrolled node works on.
func TestAuthorityDown(t *testing.T) {
	a := start(t, options(t))
	ca := a.node(t, "n1", a.token(t, "n1", idA))
	if err := ca.Enroll(t.Context()); err != nil {
		t.Fatal(err)
	}
	fresh := a.node(t, "n2", a.token(t, "n2", idB))
	a.stop()
	if err := ca.Enroll(t.Context()); err == nil {
		t.Fatal("renewed without an authority")
	}
	if _, err := ca.Sign(csrOf(t, newKey(t)), idA, 0); err != nil || !strings.Contains(ca.Problem(), "cannot be renewed") {
		t.Errorf("%v, problem %q", err, ca.Problem())
	}
	if err := fresh.Enroll(t.Context()); err == nil || !strings.Contains(fresh.Problem(), "not enrolled") {
		t.Errorf("%v, problem %q", err, fresh.Problem())
	}
}

func TestAuthorityInTPM(t *testing.T) {
	o := options(t)
	o.TPM, o.RequireTPM = tpmtest.Start(t).Socket, true
	a := start(t, o)
	token := a.token(t, "n1", idA)
	nodeTPM := tpmtest.Start(t)
	ca := a.node(t, "n1", token, func(o *identity.CAOptions) { o.TPM, o.RequireTPM = nodeTPM.Socket, true })
	if err := ca.Enroll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := ca.Enroll(t.Context()); err != nil {
		t.Errorf("renew, client authentication by the TPM: %v", err)
	}
	chain, err := ca.Sign(csrOf(t, newKey(t)), idA, 0)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := identity.NewBundle([]identity.TrustDomain{ca.Trust()})
	if err != nil {
		t.Fatal(err)
	}
	if peer, err := identity.NewVerifier(identity.VerifierOptions{Bundle: bundle}).VerifyDER(chain, identity.RoleClient, time.Now()); err != nil || peer.Node != "n1" {
		t.Errorf("%+v, %v", peer, err)
	}
	if ca.Anchor() != flow.AnchorTPM {
		t.Errorf("anchor %v", ca.Anchor())
	}
}

// Neither an authority nor its clients leave goroutines or descriptors.
func TestNothingLeaks(t *testing.T) {
	once := func() {
		a := start(t, options(t))
		ca := a.node(t, "n1", a.token(t, "n1", idA))
		for range 3 {
			if err := ca.Enroll(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		_, err := a.client(t, a.token(t, "n2", idA)).Join(t.Context(), []byte("x"))
		wantReason(t, "a refused one", err, flow.ReasonCertMalformed)
		a.stop()
	}
	descriptors := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	once()
	goroutines, files := runtime.NumGoroutine(), descriptors()
	for range 5 {
		once()
	}
	deadline := time.Now().Add(10 * time.Second)
	for runtime.NumGoroutine() > goroutines+2 || descriptors() > files+2 {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, were %d; %d descriptors, were %d", runtime.NumGoroutine(), goroutines, descriptors(), files)
		}
		time.Sleep(10 * time.Millisecond) // the ends of connections are nobody's event
	}
}

func FuzzBodies(f *testing.F) {
	s, err := newServer(options(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(s.close)
	good, err := json.Marshal(joinRequest{Token: sampleToken().Encode(), CSR: csrOf(f, newKey(f))})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"token":"sjt1.","csr":"AAAA"}`))
	f.Add([]byte(`{"csr":null}`))
	f.Add([]byte(`{"token":"x"}{}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		for path, handle := range map[string]http.HandlerFunc{"/v1/join": s.join, "/v1/renew": s.renew} {
			r := httptest.NewRequest(http.MethodPost, path, bytes.NewReader(body))
			r.TLS = &tls.ConnectionState{Version: tls.VersionTLS13}
			w := httptest.NewRecorder()
			handle(w, r)
			var answer refusalAnswer
			if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || answer.Reason == "" || w.Code != 400 && w.Code != 403 {
				t.Errorf("%s: %d %s (%v)", path, w.Code, w.Body, err)
			}
		}
	})
}
