// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/anomaly"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/netloop"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/token"
	"golang.org/x/sys/unix"
)

// worldPolicies protect one server with a port for each protocol; MODE is
// replaced. The addresses exist only in the stand-in for the agent.
const worldPolicies = `
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: client, namespace: t}
spec: {owner: c@t.example, spiffeID: "spiffe://example.org/client", select: {systemd: {unit: client.service}}, endpoints: ["10.0.1.1:9"], mode: enforce, mayCall: [server], egress: [{cidr: 10.0.2.0/24, ports: [6000]}]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: other, namespace: t}
spec: {owner: o@t.example, spiffeID: "spiffe://example.org/other", select: {systemd: {unit: other.service}}, mode: enforce, mayCall: [client]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: server, namespace: t}
spec: {owner: s@t.example, spiffeID: "spiffe://example.org/server", select: {systemd: {unit: server.service}}, endpoints: ["10.0.2.1:80", "10.0.2.1:81", "10.0.2.1:82", "10.0.2.1:83", "10.0.2.1:84", "10.0.2.1:88", "10.0.2.1:7", "10.0.2.1:99"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: web, namespace: t}
spec:
  mode: MODE
  protect: {identity: server, ports: [80], protocol: http}
  rules:
    - {name: all, from: [client], http: ["* /**"]}
    - {name: no-debug, effect: deny, http: ["* /debug/**"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: auto, namespace: t}
spec:
  mode: MODE
  protect: {identity: server, ports: [81], protocol: auto}
  rules:
    - {name: anything, from: [client]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: inspected, namespace: t}
spec:
  mode: MODE
  protect: {identity: server, ports: [82], protocol: http}
  body: {inspect: 1KiB, over: deny}
  rules:
    - {name: all, from: [client], http: ["* /**"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: tls, namespace: t}
spec:
  mode: MODE
  protect: {identity: server, ports: [83], protocol: tls, app: {tls: passthrough}}
  rules:
    - {name: named, from: [client], hosts: [app.example]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: rpc, namespace: t}
spec:
  mode: MODE
  protect: {identity: server, ports: [84], protocol: grpc}
  rules:
    - {name: calls, from: [client], grpc: [t.Echo/*]}
    - {name: paid, from: [client], grpc: [t.Paid/*], token: {issuer: sso, audience: server}}
    - {name: no-secret, effect: deny, grpc: [t.Echo/Secret]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: watched, namespace: t}
spec:
  mode: MODE
  protect: {identity: server, ports: [88], protocol: auto}
  rules:
    - {name: items, from: [client], http: ["GET /items/{id}"], token: {issuer: sso, audience: server, acr: [mfa, hwk]}}
    - {name: calls, from: [client], grpc: [t.Echo/*], token: {issuer: sso, audience: server}}
  onError: cached
  anomaly: {stepUp: 0.02, stepUpMaxAge: 2m, warmup: {requests: 100, identities: 1}}
---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso, namespace: t}
spec: {issuer: "https://sso.t.example", jwks: {url: "https://sso.t.example/jwks"}, algorithms: [ES256]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: echo, namespace: t}
spec:
  mode: MODE
  protect: {identity: server, ports: [7], protocol: tcp}
  rules:
    - {name: anything, from: [client]}
`

const (
	clientID = "spiffe://example.org/client"
	otherID  = "spiffe://example.org/other"
	serverID = "spiffe://example.org/server"

	clientNumber = flow.IdentityNumber(11)
	otherNumber  = flow.IdentityNumber(12)
	serverNumber = flow.IdentityNumber(13)

	clientNetns = uint64(101)
	serverNetns = uint64(102)
)

var (
	clientAddr = netip.MustParseAddr("10.0.1.1")
	serverAddr = netip.MustParseAddr("10.0.2.1")
)

func serverPort(port uint16) netip.AddrPort { return netip.AddrPortFrom(serverAddr, port) }

func plan(t testing.TB, mode string) *compile.Plan {
	t.Helper()
	return build(t, strings.ReplaceAll(worldPolicies, "MODE", mode))
}

// changed is the enforcing plan with one text in place of another.
func changed(t testing.TB, from, to string) *compile.Plan {
	t.Helper()
	text := strings.ReplaceAll(worldPolicies, "MODE", "enforce")
	if !strings.Contains(text, from) {
		t.Fatalf("the policies do not hold %q", from)
	}
	return build(t, strings.ReplaceAll(text, from, to))
}

// steeredPlan is the enforcing plan with the port of one policy replaced: a
// steered connection shows the port that it was made to.
func steeredPlan(t testing.TB, real, port uint16) *compile.Plan {
	t.Helper()
	return changed(t, fmt.Sprintf("ports: [%d]", port), fmt.Sprintf("ports: [%d]", real))
}

func build(t testing.TB, text string) *compile.Plan {
	t.Helper()
	return buildOn(t, "n", text)
}

// buildOn builds the plan of a node of that name.
func buildOn(t testing.TB, node, text string) *compile.Plan {
	t.Helper()
	p, problems := compile.Build([]load.File{{Path: "world.yaml", Content: []byte(text)}},
		compile.Options{TrustDomain: "example.org", Node: node})
	for _, problem := range problems {
		if problem.Severity == load.Error {
			t.Fatal(problem)
		}
	}
	return p
}

// authority is the CA that all nodes of a world share.
func authority(t testing.TB) *identity.CA {
	t.Helper()
	ca, err := identity.OpenCA(identity.CAOptions{StateDir: t.TempDir(), TrustDomain: "example.org", Node: "n", TPM: "none"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ca.Close() })
	return ca
}

// node is one node: an engine with a proxy, and a stand-in for the kernel
// and the agent.
type node struct {
	t        testing.TB
	engine   *netloop.Engine
	proxy    *Proxy
	pipeline *pipeline.Pipeline
	tokens   *token.Verifier
	leaves   *identity.Leaves
	verifier *identity.Verifier
	jwks     []byte // of the tokens minted last

	mu       sync.Mutex
	apps     map[netip.AddrPort]string // real addresses
	tunnels  map[netip.Addr]string
	dials    []DialRequest
	verdicts []flow.Verdict
	flows    map[uint16]flow.Flow // by the outbound listener's port
	// signer has the applications' keys; nil refuses.
	signer func(SignRequest) ([]byte, error)
}

type nodeOptions struct {
	plan       *compile.Plan // nil: that of mode
	goroutines bool
	mode       string
	ttl        time.Duration
	ids        map[flow.IdentityNumber]string
	addresses  []NetnsAddresses
	change     func(*Options)
}

func newNode(t testing.TB, ca *identity.CA, o nodeOptions) *node {
	t.Helper()
	if o.ttl == 0 {
		o.ttl = time.Minute
	}
	n := &node{t: t, apps: map[netip.AddrPort]string{}, tunnels: map[netip.Addr]string{}, flows: map[uint16]flow.Flow{}}
	bundle, err := identity.NewBundle([]identity.TrustDomain{ca.Trust()})
	if err != nil {
		t.Fatal(err)
	}
	n.verifier = identity.NewVerifier(identity.VerifierOptions{Bundle: bundle})
	n.leaves = identity.NewLeaves(identity.LeavesOptions{Sign: func(_ context.Context, id string, csr []byte) ([][]byte, error) {
		return ca.Sign(csr, id, o.ttl)
	}})
	t.Cleanup(n.leaves.Close)
	var ids []string
	var local []LocalIdentity
	for number, id := range o.ids {
		ids = append(ids, id)
		local = append(local, LocalIdentity{number, id})
	}
	if err := n.leaves.Set(ids); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if _, err := n.leaves.Wait(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if n.engine, err = netloop.New(netloop.Options{Loops: 1, Goroutines: o.goroutines}); err != nil {
		t.Fatal(err)
	}
	n.tokens = token.New(token.Options{Refresh: func(issuer string) { go n.tokens.KeysFailed(issuer, "down") }})
	anomalies, err := anomaly.New(anomaly.Options{})
	if err != nil {
		t.Fatal(err)
	}
	n.pipeline = pipeline.New(pipeline.Options{Node: "n", Ceiling: flow.ModeEnforce, Tokens: n.tokens, Anomalies: anomalies})
	options := Options{Pipeline: n.pipeline, Agent: n, Flows: n, Leaves: n.leaves, Verifier: n.verifier}
	options.Detect = 10 * time.Second // only those that mean to be silent are taken for it
	if o.change != nil {
		o.change(&options)
	}
	n.proxy = New(n.engine, options)
	n.proxy.SetIdentities(local)
	n.proxy.SetAddresses(o.addresses)
	if o.plan == nil {
		o.plan = plan(t, o.mode)
	}
	n.proxy.SetPlan(o.plan, 1)
	t.Cleanup(func() {
		n.proxy.CloseListeners()
		n.engine.Close()
		if s := n.engine.Stats(); s.Panics != 0 || s.Conns != 0 || s.Tasks != 0 {
			t.Errorf("left behind: %+v", s)
		}
		if live := n.pipeline.Live().Len(); live != 0 {
			t.Errorf("%d live streams are left", live)
		}
	})
	return n
}

// Dial implements Agent.
func (n *node) Dial(r DialRequest, done func(int, flow.Reason, error)) {
	n.mu.Lock()
	n.dials = append(n.dials, r)
	to := n.apps[r.Address]
	if r.Kind == DialPeer {
		to = n.tunnels[r.Address.Addr()]
	}
	n.mu.Unlock()
	go func() {
		a, err := netip.ParseAddrPort(to)
		if err != nil {
			done(-1, flow.ReasonLineRefused, errors.New("the plan forbids it"))
			return
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err == nil {
			if err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}); errors.Is(err, unix.EINPROGRESS) {
				err = nil
			}
		}
		if err != nil {
			done(-1, flow.ReasonOK, err)
			return
		}
		done(fd, flow.ReasonOK, nil)
	}()
}

// Sign implements Agent.
func (n *node) Sign(r SignRequest, done func([]byte, error)) {
	n.mu.Lock()
	signer := n.signer
	n.mu.Unlock()
	go func() {
		if signer == nil {
			done(nil, errors.New("no key"))
			return
		}
		done(signer(r))
	}()
}

// PutVerdict implements Agent.
func (n *node) PutVerdict(v flow.Verdict, _ uint64) {
	n.mu.Lock()
	n.verdicts = append(n.verdicts, v)
	n.mu.Unlock()
}

// Lookup implements Flows.
func (n *node) Lookup(netns uint64, src, dst netip.AddrPort) (flow.Flow, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f, ok := n.flows[dst.Port()]
	f.NetnsCookie = netns
	f.Source = src
	return f, ok
}

// listener opens a loopback port.
func listener(t testing.TB, address string) (string, int) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(t.Context(), "tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	t.Cleanup(func() { f.Close() })
	return ln.Addr().String(), int(f.Fd())
}

// out opens an outbound listener: what connects to it is a flow of that
// identity to that destination.
func (n *node) out(id flow.IdentityNumber, dst netip.AddrPort) string {
	n.t.Helper()
	addr, fd := listener(n.t, "127.0.0.1:0")
	n.mu.Lock()
	n.flows[netip.MustParseAddrPort(addr).Port()] = flow.Flow{Destination: dst, Identity: id, Mode: flow.ModeEnforce}
	n.mu.Unlock()
	if err := n.proxy.Serve(fd, KindOutbound, clientNetns); err != nil {
		n.t.Fatal(err)
	}
	return addr
}

func (n *node) tunnelListener() string {
	n.t.Helper()
	addr, fd := listener(n.t, "127.0.0.1:0")
	if err := n.proxy.Serve(fd, KindTunnel, serverNetns); err != nil {
		n.t.Fatal(err)
	}
	return addr
}

// records are the decisions that were recorded so far.
func (n *node) records() (list []pipeline.Record) {
	n.t.Helper()
	raw, lost := n.pipeline.TakeRecords(10000)
	if lost != 0 {
		n.t.Errorf("%d records lost", lost)
	}
	for _, b := range raw {
		var r pipeline.Record
		if err := json.Unmarshal(b, &r); err != nil {
			n.t.Fatalf("%v: %s", err, b)
		}
		list = append(list, r)
	}
	return list
}

// recorded waits for a record with that reason.
func (n *node) recorded(reason flow.Reason) pipeline.Record {
	n.t.Helper()
	timeout := time.After(10 * time.Second)
	var seen []string
	for {
		for _, r := range n.records() {
			if r.Reason == reason {
				return r
			}
			seen = append(seen, string(r.Reason)+": "+r.Detail)
		}
		select {
		case <-n.pipeline.Wake():
		case <-timeout:
			n.t.Fatalf("no record with reason %q; seen %q", reason, seen)
		}
	}
}

// app runs an HTTP server as the application on those ports.
func (n *node) app(h http.Handler, ports ...uint16) {
	n.t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	go s.Serve(ln)
	n.t.Cleanup(func() { s.Close() })
	n.at(ln.Addr().String(), ports...)
}

// at says where the application really listens.
func (n *node) at(addr string, ports ...uint16) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range ports {
		n.apps[serverPort(p)] = addr
	}
}

// raw runs f for each connection to the application on those ports.
func (n *node) raw(f func(*net.TCPConn), ports ...uint16) {
	n.t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				f(c.(*net.TCPConn))
			})
		}
	})
	n.t.Cleanup(func() { ln.Close(); wg.Wait() })
	n.at(ln.Addr().String(), ports...)
}

func echo(c *net.TCPConn) {
	_, _ = io.Copy(c, c)
	_ = c.CloseWrite()
}

// oneNode is a node that has both client and server.
func oneNode(t testing.TB, o nodeOptions) *node {
	t.Helper()
	if o.mode == "" {
		o.mode = "enforce"
	}
	o.ids = map[flow.IdentityNumber]string{clientNumber: clientID, otherNumber: otherID, serverNumber: serverID}
	o.addresses = []NetnsAddresses{{clientNetns, []netip.Addr{clientAddr}}, {serverNetns, []netip.Addr{serverAddr}}}
	return newNode(t, authority(t), o)
}

// twoNodes are a client's and a server's node with a tunnel between them.
func twoNodes(t testing.TB, o nodeOptions) (a, b *node) {
	t.Helper()
	if o.mode == "" {
		o.mode = "enforce"
	}
	ca := authority(t)
	b = newNode(t, ca, nodeOptions{plan: o.plan, goroutines: o.goroutines, mode: o.mode, ttl: o.ttl, change: o.change,
		ids: map[flow.IdentityNumber]string{serverNumber: serverID}, addresses: []NetnsAddresses{{serverNetns, []netip.Addr{serverAddr}}}})
	a = newNode(t, ca, nodeOptions{plan: o.plan, goroutines: o.goroutines, mode: o.mode, ttl: o.ttl, change: o.change,
		ids: map[flow.IdentityNumber]string{clientNumber: clientID, otherNumber: otherID}, addresses: []NetnsAddresses{{clientNetns, []netip.Addr{clientAddr}}}})
	a.tunnels[serverAddr] = b.tunnelListener()
	return a, b
}

// eachWay runs a test on both engines, on one node and through a tunnel: in
// is where the client is, app where the application.
func eachWay(t *testing.T, o nodeOptions, f func(t *testing.T, in, app *node)) {
	for _, goroutines := range []bool{false, true} {
		o.goroutines = goroutines
		t.Run(fmt.Sprintf("goroutines=%v/same node", goroutines), func(t *testing.T) {
			n := oneNode(t, o)
			f(t, n, n)
		})
		t.Run(fmt.Sprintf("goroutines=%v/tunnel", goroutines), func(t *testing.T) {
			a, b := twoNodes(t, o)
			f(t, a, b)
		})
	}
}

func eachEngine(t *testing.T, f func(t *testing.T, goroutines bool)) {
	for _, goroutines := range []bool{false, true} {
		t.Run(fmt.Sprintf("goroutines=%v", goroutines), func(t *testing.T) { f(t, goroutines) })
	}
}

// dialTCP connects to an address with a time limit on everything.
func dialTCP(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp4", addr)
	for tries := 0; errors.Is(err, unix.ECONNRESET) && tries < 20; tries++ {
		// It was accepted and reset before connect returned.
		c, err = net.Dial("tcp4", addr)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(15 * time.Second))
	return c.(*net.TCPConn)
}

// httpClient keeps its connections.
func httpClient(t testing.TB) *http.Client {
	tr := &http.Transport{MaxIdleConnsPerHost: 10, DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

// atOnce has a node take clients that do not begin at once for silent ones.
func atOnce(o *Options) { o.Detect = time.Nanosecond }

// dialLate is dialTCP for a client that such a node has taken for silent by the
// time it returns.
func dialLate(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	c := dialTCP(t, addr)
	time.Sleep(20 * time.Millisecond)
	return c
}

// problem reads a problem document and holds it against the response.
func problem(t testing.TB, resp *http.Response) (reason flow.Reason, id string) {
	t.Helper()
	defer resp.Body.Close()
	var doc struct {
		Type, Title, Detail, Instance, RequestID string
		Reason                                   flow.Reason
		Status                                   int
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		t.Fatalf("%v: %q", err, b)
	}
	about := "about:blank"
	if doc.Reason != flow.ReasonOK {
		about = flow.ReasonsURL + string(doc.Reason) + flow.ReasonsSuffix
	}
	if resp.Header.Get("Content-Type") != "application/problem+json" || resp.Header.Get("Cache-Control") != "no-store" ||
		doc.Status != resp.StatusCode || doc.Reason != flow.ReasonOK && doc.Reason.Status() != doc.Status || doc.Type != about ||
		len(doc.RequestID) != flow.IDLength || doc.RequestID != resp.Header.Get("X-Sallyport-Request-Id") ||
		doc.Instance != "urn:sallyport:request:"+doc.RequestID {
		t.Errorf("problem document %s with status %d, header %v", b, resp.StatusCode, resp.Header)
	}
	return doc.Reason, doc.RequestID
}

// ask sends raw bytes and reads one response.
func ask(t testing.TB, c net.Conn, request string) (*http.Response, error) {
	t.Helper()
	if _, err := io.WriteString(c, request); err != nil {
		return nil, err
	}
	return http.ReadResponse(bufio.NewReader(c), nil)
}
