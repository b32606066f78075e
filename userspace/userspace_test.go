// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/line"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

const (
	patience = 20 * time.Second
	clientID = "spiffe://test.sallyport/node/here/client"
)

const documents = `
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: client, namespace: t}
spec: {owner: a@test, select: {cgroup: {path: /client}}, mode: enforce, mayCall: [server]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: server, namespace: t}
spec: {owner: a@test, select: {cgroup: {path: /server}}, endpoints: ["192.0.2.10:8080"], mode: enforce}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: server, namespace: t}
spec:
  mode: enforce
  protect: {identity: server, ports: [8080], protocol: tcp}
  rules: [{name: r, from: [client]}]
`

// half is a whole userspace half in the test's process, and the agent's end
// of its line, with a real CA behind it.
type half struct {
	*line.Conn
	t     *testing.T
	ca    *identity.CA
	stop  context.CancelFunc
	ended chan struct{}
	err   error // why it ended; after ended
	ready chan string
	signs chan string // the IDs that leaves were asked for
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func sockets(t *testing.T) (agent, userspace *line.Socket) {
	t.Helper()
	mine, theirs, err := line.Pair()
	must(t, err)
	agent, err = line.NewSocket(mine, false)
	must(t, err)
	userspace, err = line.NewSocket(theirs, true)
	must(t, err)
	return agent, userspace
}

func startMessage(dir string, goroutines bool) *linepb.Message {
	return &linepb.Message{Body: &linepb.Message_Start{Start: &linepb.Start{
		Node: "here", TrustDomain: "test.sallyport", StateDir: dir, ModeCeiling: uint32(flow.ModeEnforce), Loops: 1, Goroutines: goroutines,
		TunnelPort: 15008, Anchor: flow.AnchorSoftware.String(), LeafTtlNs: int64(10 * time.Minute),
	}}}
}

func startHalf(t *testing.T, goroutines bool) *half {
	t.Helper()
	return startHalfIn(t, t.TempDir(), goroutines)
}

// startHalfIn is startHalf with a state directory.
func startHalfIn(t *testing.T, dir string, goroutines bool) *half {
	t.Helper()
	ca, err := identity.OpenCA(identity.CAOptions{StateDir: t.TempDir(), TrustDomain: "test.sallyport", Node: "here", TPM: "none"})
	must(t, err)
	t.Cleanup(func() { ca.Close() })
	agent, other := sockets(t)
	ctx, stop := context.WithCancel(context.Background())
	h := &half{t: t, ca: ca, stop: stop, ended: make(chan struct{}), ready: make(chan string, 1), signs: make(chan string, 16)}
	h.Conn = line.NewConn(agent, line.Options{Handle: h.handle})
	go func() {
		defer close(h.ended)
		h.err = Run(ctx, other, "test", quiet(), nil)
	}()
	t.Cleanup(func() {
		h.stop()
		h.Close()
		<-h.ended
	})
	must(t, h.Notify(startMessage(dir, goroutines)))
	select {
	case v := <-h.ready:
		if v != "test" {
			t.Errorf("ready as version %q", v)
		}
	case <-h.ended:
		t.Fatalf("ended at once: %v", h.err)
	case <-time.After(patience):
		t.Fatal("not ready")
	}
	return h
}

func (h *half) handle(_ context.Context, in *line.Incoming) {
	switch b := in.Message.GetBody().(type) {
	case *linepb.Message_Ready:
		h.ready <- b.Ready.GetVersion()
	case *linepb.Message_Sign:
		reply := &linepb.SignReply{}
		chain, err := h.ca.Sign(b.Sign.GetCsr(), b.Sign.GetId(), 0)
		if reply.Chain = chain; err != nil {
			reply.Error = err.Error()
		}
		_ = in.Reply(&linepb.Message{Body: &linepb.Message_SignReply{SignReply: reply}})
		h.signs <- b.Sign.GetId()
	}
}

func (h *half) ask(m *linepb.Message, fds ...int) *linepb.Message {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	reply, got, err := h.Call(ctx, m, fds...)
	closeAll(got)
	must(h.t, err)
	return reply
}

func (h *half) policies(generation uint64, text string) string {
	h.t.Helper()
	raw, err := proto.Marshal(&linepb.PolicyFiles{Files: []*linepb.PolicyFile{{Path: "set.yaml", Content: []byte(text)}}})
	must(h.t, err)
	fd, err := line.Sealed("policies", raw)
	must(h.t, err)
	defer unix.Close(fd)
	r := h.ask(&linepb.Message{Body: &linepb.Message_Policies{Policies: &linepb.Policies{Generation: generation}}}, fd).GetPoliciesReply()
	if taken := !strings.Contains(r.GetError(), "compile policy set"); taken != (r.GetGeneration() == generation) {
		h.t.Errorf("it goes by generation %d after %d was sent: %s", r.GetGeneration(), generation, r.GetError())
	}
	return r.GetError()
}

func (h *half) status() Status {
	h.t.Helper()
	var s Status
	r := h.ask(&linepb.Message{Body: &linepb.Message_Status{Status: &linepb.StatusRequest{}}})
	must(h.t, json.Unmarshal(r.GetStatusReply().GetJson(), &s))
	return s
}

// ordered waits until what was sent before has been carried out.
func (h *half) ordered() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_, _, err := h.Call(ctx, &linepb.Message{Body: &linepb.Message_Ready{Ready: &linepb.Ready{}}})
	if err == nil || !strings.Contains(err.Error(), "not a message for userspace") {
		h.t.Fatalf("a message that is not for userspace: %v", err)
	}
}

// serve hands over a listener and returns where it listens.
func (h *half) serve(kind linepb.ListenerKind, netns uint64) string {
	h.t.Helper()
	var c net.ListenConfig
	c.SetMultipathTCP(false)
	l, err := c.Listen(h.t.Context(), "tcp4", "127.0.0.1:0")
	must(h.t, err)
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	must(h.t, err)
	defer f.Close()
	must(h.t, h.Notify(&linepb.Message{Body: &linepb.Message_Listeners{Listeners: &linepb.Listeners{
		Listeners: []*linepb.Listener{{Kind: kind, NetnsCookie: netns, Family: 4}}}}}, int(f.Fd())))
	h.ordered()
	return l.Addr().String()
}

func dial(t *testing.T, at string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp", at, patience)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// tunnelled dials a tunnel listener and says nothing: a connection that lives.
func (h *half) tunnelled(at string) net.Conn {
	h.t.Helper()
	before := h.status().Engine.Accepted
	c := dial(h.t, at)
	for late := time.Now().Add(patience); h.status().Engine.Accepted == before; {
		if time.Now().After(late) {
			h.t.Fatal("not accepted")
		}
	}
	return c
}

func refused(t *testing.T, what, at string) {
	t.Helper()
	c, err := net.DialTimeout("tcp", at, patience)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("%s: %v, want it refused", what, err)
	}
}

func (h *half) awaitEnd() error {
	h.t.Helper()
	select {
	case <-h.ended:
		return h.err
	case <-time.After(patience):
		h.t.Fatal("it did not end")
	}
	return nil
}

func (h *half) trustOf() *linepb.Message {
	d := h.ca.Trust()
	return &linepb.Message{Body: &linepb.Message_Trust{Trust: &linepb.Trust{Domains: []*linepb.TrustDomain{{Name: d.Name, Roots: d.Roots}}}}}
}

func (h *half) identities(ids ...string) {
	h.t.Helper()
	m := &linepb.Identities{}
	for i, id := range ids {
		m.Identities = append(m.Identities, &linepb.Identity{Number: uint32(i + 7), Id: id})
	}
	must(h.t, h.Notify(&linepb.Message{Body: &linepb.Message_Identities{Identities: m}}))
}

// Policies are taken over or refused with where they are wrong; a set that is
// refused leaves the one before in force.
func TestPolicies(t *testing.T) {
	h := startHalf(t, false)
	if why := h.policies(1, documents); why != "" {
		t.Fatal(why)
	}
	for name, c := range map[string]struct{ text, why string }{
		"not YAML":             {"a: [", "set.yaml:1:"},
		"an unknown field":     {strings.Replace(documents, "owner: a@test,", "owner: a@test, color: red,", 1), "set.yaml:5:"},
		"a dangling reference": {strings.Replace(documents, "from: [client]", "from: [nobody]", 1), "set.yaml:18:"},
	} {
		if why := h.policies(2, c.text); !strings.Contains(why, c.why) || !strings.Contains(why, "compile policy set 2") {
			t.Errorf("%s: %q, want %q", name, why, c.why)
		}
	}
	if why := h.policies(3, documents); why != "" {
		t.Errorf("afterwards: %s", why)
	}
}

// A set must come in a memfd that nobody can change any more.
func TestPoliciesMustBeSealed(t *testing.T) {
	h := startHalf(t, false)
	f, err := os.CreateTemp(t.TempDir(), "")
	must(t, err)
	defer f.Close()
	m := &linepb.Message{Body: &linepb.Message_Policies{Policies: &linepb.Policies{Generation: 1}}}
	if why := h.ask(m, int(f.Fd())).GetPoliciesReply().GetError(); !strings.Contains(why, "sealed") {
		t.Errorf("a plain file: %q", why)
	}
	fd, err := line.Sealed("rubbish", []byte("rubbish"))
	must(t, err)
	defer unix.Close(fd)
	m = &linepb.Message{Body: &linepb.Message_Policies{Policies: &linepb.Policies{Generation: 1}}}
	if why := h.ask(m, fd).GetPoliciesReply().GetError(); !strings.Contains(why, "decode policy set 1") {
		t.Errorf("rubbish: %q", why)
	}
}

// Each identity gets a leaf of its own from the agent's CA, and loses it when
// it goes.
func TestIdentitiesGetLeaves(t *testing.T) {
	h := startHalf(t, false)
	must(t, h.Notify(h.trustOf()))
	h.identities(clientID)
	select {
	case id := <-h.signs:
		if id != clientID {
			t.Errorf("a leaf was asked for %s", id)
		}
	case <-time.After(patience):
		t.Fatal("no leaf was asked for")
	}
	var leaf LeafStatus
	for late := time.Now().Add(patience); leaf.Serial == "" && time.Now().Before(late); {
		if s := h.status(); len(s.Leaves) == 1 {
			leaf = s.Leaves[0]
		}
	}
	if leaf.ID != clientID || len(leaf.Thumbprint) != 64 || !leaf.NotAfter.After(time.Now()) {
		t.Errorf("the leaf: %+v", leaf)
	}
	h.identities()
	h.ordered()
	if s := h.status(); len(s.Leaves) != 0 {
		t.Errorf("the leaves of nobody: %+v", s.Leaves)
	}
}

// opened is the half with everything open and no line to speak of.
func opened(t *testing.T) *process {
	t.Helper()
	agent, other := sockets(t)
	p := &process{log: quiet(), start: startMessage(t.TempDir(), false).GetStart(), conn: line.NewConn(other, line.Options{})}
	t.Cleanup(func() { agent.Close(); p.conn.Close() })
	must(t, p.open(t.Context()))
	t.Cleanup(p.close)
	return p
}

// A list of revocations that a newer one has overtaken changes nothing.
func TestOlderRevocationsAreIgnored(t *testing.T) {
	p := opened(t)
	list := func(generation uint64, serials ...string) *linepb.Revocations {
		m := &linepb.Revocations{Generation: generation}
		for _, s := range serials {
			m.Revocations = append(m.Revocations, &linepb.Revocation{Kind: "serial", Value: s, SinceUnixNs: time.Now().UnixNano()})
		}
		return m
	}
	for _, c := range []struct {
		name    string
		m       *linepb.Revocations
		want    uint64
		revoked bool
	}{
		{"the first", list(4, "2a"), 4, true},
		{"an older one", list(3), 4, true},
		{"the same again", list(4, "2a"), 4, true},
		{"a newer one", list(5), 5, false},
		{"the older one again", list(4, "2a"), 5, false},
	} {
		must(t, p.setRevocations(c.m))
		r := p.verifier.Revocations()
		if r.Generation() != c.want {
			t.Errorf("%s: generation %d, want %d", c.name, r.Generation(), c.want)
		}
		if got := r.Len() == 1; got != c.revoked {
			t.Errorf("%s: %d entries", c.name, r.Len())
		}
	}
}

// What cannot be understood leaves what is in force.
func TestBadMessagesChangeNothing(t *testing.T) {
	p := opened(t)
	ca, err := identity.OpenCA(identity.CAOptions{StateDir: t.TempDir(), TrustDomain: "test.sallyport", Node: "here", TPM: "none"})
	must(t, err)
	defer ca.Close()
	must(t, p.setTrust(&linepb.Trust{Domains: []*linepb.TrustDomain{{Name: "test.sallyport", Roots: ca.Trust().Roots}}}))
	for name, err := range map[string]error{
		"a root that is no certificate": p.setTrust(&linepb.Trust{Domains: []*linepb.TrustDomain{{Name: "test.sallyport", Roots: [][]byte{{1, 2}}}}}),
		"an address of 5 bytes":         p.setAddresses(&linepb.Addresses{Netns: []*linepb.NetnsAddresses{{NetnsCookie: 1, Addresses: [][]byte{{1, 2, 3, 4, 5}}}}}),
		"keys of no issuer":             p.setKeys(&linepb.KeySet{Issuer: "t/nobody", Jwks: []byte("{}")}),
		"an unknown relation op":        p.relationOp(t.Context(), &linepb.RelationRequest{Op: "drop"}, &linepb.RelationReply{}),
	} {
		if err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(t, err)
	chain, err := ca.Sign(csr, clientID, 0)
	must(t, err)
	if _, err := p.verifier.VerifyDER(chain, identity.RoleClient, time.Now()); err != nil {
		t.Errorf("the roots are not those any more: %v", err)
	}
}

// The end of the line closes the listeners at once and the connections after
// their grace, and leaves nothing behind.
func TestEndOfTheLine(t *testing.T) {
	for name, goroutines := range map[string]bool{"event loops": false, "goroutines": true} {
		t.Run(name, func(t *testing.T) {
			warm := startHalf(t, goroutines) // what the first one starts for good
			warm.Close()
			must(t, warm.awaitEnd())
			fds, running := descriptors(t), runtime.NumGoroutine()
			h := startHalf(t, goroutines)
			must(t, h.Notify(h.trustOf()))
			h.identities(clientID)
			if why := h.policies(1, documents); why != "" {
				t.Fatal(why)
			}
			at := h.serve(linepb.ListenerKind_TUNNEL, 9)
			inbound := h.serve(linepb.ListenerKind_INBOUND, 9)
			c := h.tunnelled(at)
			began := time.Now()
			h.Close()
			if err := c.SetReadDeadline(began.Add(time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the connection within its grace: %v", err)
			}
			refused(t, "the tunnel's listener", at)
			refused(t, "the inbound listener", inbound)
			must(t, h.awaitEnd())
			if d := time.Since(began); d < 4*time.Second || d > patience {
				t.Errorf("it ended after %s", d)
			}
			must(t, c.SetReadDeadline(time.Now().Add(patience)))
			if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the connection after its grace: %v", err)
			}
			c.Close()
			h.ca.Close()
			settle(t, "descriptors", fds, func() int { return descriptors(t) })
			settle(t, "goroutines", running, runtime.NumGoroutine)
		})
	}
}

// One that was told to drain lets live connections end by themselves, though
// nobody is there any more.
func TestDrain(t *testing.T) {
	h := startHalf(t, false)
	at := h.serve(linepb.ListenerKind_TUNNEL, 9)
	c := h.tunnelled(at)
	must(t, h.Notify(&linepb.Message{Body: &linepb.Message_Drain{Drain: &linepb.Drain{}}}))
	h.ordered()
	refused(t, "the listener", at)
	if n := h.status().Engine.Conns; n != 1 {
		t.Errorf("%d connections live", n)
	}
	h.Close()
	must(t, c.SetReadDeadline(time.Now().Add(500*time.Millisecond)))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the live connection: %v", err)
	}
	select {
	case <-h.ended:
		t.Fatalf("it ended with a connection that lives: %v", h.err)
	default:
	}
	c.Close()
	must(t, h.awaitEnd())
}

// Told to end, it ends, though its line is still there.
func TestEndOfTheContext(t *testing.T) {
	h := startHalf(t, false)
	at := h.serve(linepb.ListenerKind_TUNNEL, 9)
	h.stop()
	must(t, h.awaitEnd())
	refused(t, "the listener", at)
	select {
	case <-h.Done():
	case <-time.After(patience):
		t.Error("the agent does not see it")
	}
}

func TestCloseListenersOfANamespace(t *testing.T) {
	h := startHalf(t, false)
	one, two := h.serve(linepb.ListenerKind_TUNNEL, 9), h.serve(linepb.ListenerKind_TUNNEL, 10)
	must(t, h.Notify(&linepb.Message{Body: &linepb.Message_CloseListeners{CloseListeners: &linepb.CloseListeners{NetnsCookie: 9}}}))
	h.ordered()
	refused(t, "the one that is closed", one)
	h.tunnelled(two)
}

// A listener that cannot be served ends the process: the agent would believe
// that it is.
func TestListenerThatCannotBeServed(t *testing.T) {
	h := startHalf(t, false)
	f, err := os.Open(os.DevNull)
	must(t, err)
	defer f.Close()
	must(t, h.Notify(&linepb.Message{Body: &linepb.Message_Listeners{Listeners: &linepb.Listeners{
		Listeners: []*linepb.Listener{{Kind: linepb.ListenerKind_TUNNEL, NetnsCookie: 9, Family: 4}}}}}, int(f.Fd())))
	must(t, h.awaitEnd())
}

// A connection that the kernel vouches for nowhere is refused: without the
// flow map nobody is known.
func TestWithoutFlowMapNobodyIsKnown(t *testing.T) {
	h := startHalf(t, false)
	if why := h.policies(1, documents); why != "" {
		t.Fatal(why)
	}
	at := h.serve(linepb.ListenerKind_OUTBOUND, 9)
	c, err := net.DialTimeout("tcp", at, patience)
	if errors.Is(err, unix.ECONNRESET) {
		return // refused before connect(2) had returned
	}
	must(t, err)
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(patience)))
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n") // it may be closed by now
	if b, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) || strings.HasPrefix(string(b), "HTTP/1.1 200") {
		t.Errorf("%q, %v", b, err)
	}
}

func TestFirstMessageMustBeStart(t *testing.T) {
	for name, m := range map[string]*linepb.Message{
		"another": {Body: &linepb.Message_Drain{Drain: &linepb.Drain{}}},
		"none":    nil,
	} {
		agent, other := sockets(t)
		if m != nil {
			must(t, agent.Send(m))
		}
		agent.Close()
		if err := Run(t.Context(), other, "test", quiet(), nil); err == nil {
			t.Errorf("%s: it ran", name)
		}
		other.Close()
	}
}

// The confinement is entered before anything else is looked at, and one that
// fails is the end.
func TestConfinedFirst(t *testing.T) {
	agent, other := sockets(t)
	defer other.Close()
	dir := t.TempDir()
	must(t, agent.Send(startMessage(dir, false)))
	var asked atomic.Value
	err := Run(t.Context(), other, "test", quiet(), func(d string) error {
		asked.Store(d)
		return errors.New("no Landlock")
	})
	if err == nil || err.Error() != "no Landlock" || asked.Load() != dir {
		t.Errorf("%v, for %v", err, asked.Load())
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("it wrote %v, %v", left, err)
	}
	agent.Close()
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(all)
}

// settle waits until what ends by itself has ended.
func settle(t *testing.T, what string, most int, count func() int) {
	t.Helper()
	n := count()
	for late := time.Now().Add(5 * time.Second); n > most && time.Now().Before(late); n = count() {
		time.Sleep(5 * time.Millisecond)
	}
	if n > most {
		t.Errorf("%d %s, %d before", n, what, most)
	}
}

// TestProofsThatCannotBeNoted says so in its status, and takes them once they
// can be.
func TestProofsThatCannotBeNoted(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "proofs")
	must(t, os.Mkdir(path, 0o700))
	h := startHalfIn(t, dir, false)
	if s := h.status(); !strings.Contains(s.Proofs.Problem, path) {
		t.Errorf("%+v", s.Proofs)
	}
	must(t, os.Remove(path))
	for late := time.Now().Add(patience); h.status().Proofs.Problem != ""; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(late) {
			t.Fatalf("%+v", h.status().Proofs)
		}
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}
