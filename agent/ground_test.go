// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/agent/loader"
	"github.com/sallyport-dev/sallyport/agent/supervise"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/agent/workload"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/watch"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/line"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

// The test's binary is an actor's process too, and, started by the supervisor,
// a userspace process.
func TestMain(m *testing.M) {
	if os.Args[0] == "sallyport" {
		hang()
	}
	testenv.Main(m)
}

const (
	patience    = 20 * time.Second
	trustDomain = "test.sallyport"
	nodeName    = "here"
)

var (
	serverAt = netip.MustParseAddrPort("192.0.2.10:8080")
	webAt    = netip.MustParseAddrPort("192.0.2.10:8081")
	clientIP = netip.MustParseAddr("192.0.2.11")
)

// documents is what the tests run under: client may call server by identity
// alone at 8080 and by what it asks for at 8081; stranger may call nobody;
// lapsed may call server and is past its validity; soft is only audited; far
// serves elsewhere, and host 203.0.113.9 is nobody's.
const documents = `
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: client, namespace: t}
spec: {owner: a@test, select: {cgroup: {path: /client}}, mode: enforce, mayCall: [server, far], egress: [{cidr: 203.0.113.0/24, ports: [443]}]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: stranger, namespace: t}
spec: {owner: a@test, select: {cgroup: {path: /stranger}}, mode: enforce}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: lapsed, namespace: t}
spec: {owner: a@test, select: {cgroup: {path: /lapsed}}, mode: enforce, mayCall: [server, far], expires: 2020-01-01}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: soft, namespace: t}
spec: {owner: a@test, select: {cgroup: {path: /soft}}, mode: audit}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: server, namespace: t}
spec: {owner: a@test, select: {cgroup: {path: /server}}, endpoints: ["192.0.2.10:8080", "192.0.2.10:8081"], mode: enforce}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: far, namespace: t}
spec: {owner: a@test, select: {cgroup: {path: /far}}, endpoints: ["198.51.100.7:9000"], mode: enforce}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: server, namespace: t}
spec:
  mode: enforce
  protect: {identity: server, ports: [8080], protocol: tcp}
  rules: [{name: r, from: [client, lapsed]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: web, namespace: t}
spec:
  mode: enforce
  protect: {identity: server, ports: [8081], protocol: http}
  rules: [{name: r, from: [client], http: [GET /v1/items]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: far, namespace: t}
spec:
  mode: enforce
  protect: {identity: far, ports: [9000], protocol: tcp}
  rules: [{name: r, from: [client]}]
`

// ground is an agent whose kernel half, certificates, revocations and
// workloads are real, on a cgroup subtree of its own, with two network
// namespaces: everybody lives in near but stranger, who lives in other. Only
// the userspace process is the test's.
type ground struct {
	*Agent
	t            *testing.T
	near, other  *testenv.Netns
	nearCgroup   map[string]*testenv.Cgroup
	client       *testenv.Actor
	server       *testenv.Actor
	changed      chan struct{} // a table of workloads was taken in
	metricsAt    netip.AddrPort
	stopWorkload context.CancelFunc
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// openDir makes a directory that another user may pass through, as the state
// directory has to be.
func openDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sallyport-test-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	return dir
}

// freePort returns a port of a loopback address of its own, so that nobody else
// on the machine takes it before the agent does.
func freePort(t testing.TB) netip.AddrPort {
	t.Helper()
	at := [4]byte{127}
	rand.Read(at[1:])
	l, err := net.Listen("tcp", netip.AddrPortFrom(netip.AddrFrom4(at), 0).String())
	must(t, err)
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String())
}

// enterSubtree has the test's process come back from the agent's cgroup, in
// which the agent puts itself, before the cgroups are removed.
func enterSubtree(t testing.TB, root *testenv.Cgroup) {
	t.Helper()
	mount, err := workload.CgroupRoot()
	must(t, err)
	own, err := ownCgroup()
	must(t, err)
	t.Cleanup(func() {
		if err := os.WriteFile(filepath.Join(mount, own, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
			t.Fatalf("leave the agent's cgroup: %v", err)
		}
		for _, leaf := range []string{"agent", "userspace", ""} {
			if err := unix.Rmdir(filepath.Join(root.Path, "sallyport", leaf)); err != nil && err != unix.ENOENT {
				t.Errorf("remove the agent's cgroup: %v", err)
			}
		}
	})
}

func newGround(t *testing.T) *ground {
	t.Helper()
	testenv.RequireRoot(t)
	g := &ground{t: t, nearCgroup: map[string]*testenv.Cgroup{}, changed: make(chan struct{}, 1)}
	cfg, root := g.configure()
	ctx, cancel := context.WithCancel(context.Background())
	g.Agent = newAgent(ctx, Options{Config: cfg, Version: "test", Logger: slog.New(slog.DiscardHandler), Decisions: io.Discard})
	closers, err := g.open(ctx, io.Discard)
	t.Cleanup(func() {
		cancel()
		g.serving.Lock()
		g.closeNamespaces()
		for _, closer := range slices.Backward(closers) {
			closer()
		}
	})
	must(t, err)
	g.populate(root)
	g.revoked.OnChange(g.revocationsChanged)
	g.policy(documents)
	g.recognise()
	return g
}

// configure makes what an agent stands on.
func (g *ground) configure() (*config.Config, *testenv.Cgroup) {
	t := g.t
	t.Helper()
	root := testenv.NewCgroup(t, nil)
	cfg := config.Defaults(nodeName)
	cfg.TrustDomain, cfg.StateDir, cfg.PinDir, cfg.Kernel.CgroupRoot = trustDomain, openDir(t), filepath.Join(testenv.BPFFS(t), "sallyport"), root.Path
	cfg.PolicyDir, cfg.Identity.TPM, cfg.Userspace.User = t.TempDir(), "none", "65527"
	cfg.ControlSocket = filepath.Join(t.TempDir(), "control.sock")
	g.metricsAt = freePort(t)
	cfg.Listen.Metrics = g.metricsAt
	g.near, g.other = testenv.NewNetns(t), testenv.NewNetns(t)
	testenv.Veth(t, "eth0", g.near, g.other,
		[]netip.Prefix{netip.PrefixFrom(serverAt.Addr(), 24), netip.PrefixFrom(clientIP, 24)}, []netip.Prefix{netip.MustParsePrefix("192.0.2.20/24")})
	enterSubtree(t, root)
	t.Cleanup(func() {
		if _, err := loader.Uninstall(cfg.PinDir); err != nil {
			t.Errorf("uninstall: %v", err)
		}
	})
	return cfg, root
}

// populate starts a process of each identity.
func (g *ground) populate(root *testenv.Cgroup) {
	t := g.t
	t.Helper()
	for _, name := range []string{"client", "lapsed", "soft", "server", "stranger"} {
		g.nearCgroup[name] = testenv.MakeCgroup(t, filepath.Join(root.Path, name))
	}
	g.client, g.server = testenv.NewActor(t, g.nearCgroup["client"], g.near), testenv.NewActor(t, g.nearCgroup["server"], g.near)
	testenv.NewActor(t, g.nearCgroup["lapsed"], g.near)
	testenv.NewActor(t, g.nearCgroup["soft"], g.near)
	testenv.NewActor(t, g.nearCgroup["stranger"], g.other)
}

// recognise starts looking for workloads, and waits until all are found.
func (g *ground) recognise() {
	g.t.Helper()
	ctx, stop := context.WithCancel(g.current)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := g.finder.Run(ctx, func(table *workload.Table) {
			g.workloadsChanged(table)
			select {
			case g.changed <- struct{}{}:
			default:
			}
		}); err != nil {
			g.t.Errorf("recognise workloads: %v", err)
		}
	})
	g.stopWorkload = func() { stop(); wg.Wait() }
	g.t.Cleanup(g.stopWorkload)
	g.await("everybody is recognised", func(v *view) bool {
		for _, name := range []string{"client", "lapsed", "soft", "server"} {
			if !v.livesIn(g.id(v, name), g.near.Cookie) {
				return false
			}
		}
		return v.livesIn(g.id(v, "stranger"), g.other.Cookie)
	})
	if g.again.Load() {
		g.t.Fatalf("not brought in line: %v", g.health.Problems())
	}
}

// await waits for a table of workloads that makes a view as wanted.
func (g *ground) await(what string, ok func(*view) bool) *view {
	g.t.Helper()
	late := time.After(patience)
	for {
		if v := g.view.Load(); v != nil && ok(v) {
			return v
		}
		select {
		case <-g.changed:
		case <-late:
			g.t.Fatalf("waited in vain: %s; problems: %v", what, g.health.Problems())
		}
	}
}

// policy puts a set of documents in force.
func (g *ground) policy(text string) {
	g.t.Helper()
	files := []load.File{{Path: "set.yaml", Content: []byte(text)}}
	plan, problems := compile.Build(files, compile.Options{TrustDomain: trustDomain, Node: nodeName})
	if plan == nil {
		g.t.Fatal(problems)
	}
	g.policiesChanged(watch.Event{Plan: plan, Files: files})
	if g.stopWorkload == nil {
		return // nobody looks for workloads yet
	}
	// It comes into force with the first table of its identities.
	for late := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		g.mu.Lock()
		applied := g.applied
		g.mu.Unlock()
		if applied == plan {
			return
		}
		if time.Now().After(late) {
			g.t.Fatalf("the policies did not come into force; problems: %v", g.health.Problems())
		}
	}
}

func (g *ground) id(v *view, name string) *compile.Identity {
	for _, id := range v.plan.Identities() {
		if id.Name == name {
			return id
		}
	}
	g.t.Fatalf("no identity %s", name)
	return nil
}

func (g *ground) number(name string) uint32 {
	v := g.view.Load()
	return uint32(v.numbers[g.id(v, name)])
}

func (g *ground) spiffe(name string) string { return g.id(g.view.Load(), name).ID }

// metric reads a counter as it is exported, 0 where it is not there yet.
func (g *ground) metric(name string) float64 {
	g.t.Helper()
	res, err := http.Get("http://" + g.metricsAt.String() + "/metrics")
	must(g.t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	must(g.t, err)
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`).FindSubmatch(b)
	if m == nil {
		return 0
	}
	v, err := strconv.ParseFloat(string(m[1]), 64)
	must(g.t, err)
	return v
}

func (g *ground) refusals(kind string) float64 {
	return g.metric(fmt.Sprintf("sallyport_line_refusals_total{request=%q}", kind))
}

// hostile is the other end of the line: a userspace process that does as the
// test tells it.
type hostile struct {
	*line.Conn
	g         *ground
	process   *supervise.Process
	started   chan struct{}             // closed when the agent is done with its start
	got       chan *linepb.Message      // what came and is not answered below
	answer    func(*line.Incoming) bool // true: dealt with
	mu        sync.Mutex
	fds       []int
	listeners map[uint64][]int // by namespace
}

// connect starts a session with a process whose end is the test's.
func (g *ground) connect(answer func(*line.Incoming) bool) *hostile {
	g.t.Helper()
	mine, theirs, err := line.Pair()
	must(g.t, err)
	agents, err := line.NewSocket(mine, false)
	must(g.t, err)
	other, err := line.NewSocket(theirs, true)
	must(g.t, err)
	h := &hostile{
		g: g, process: supervise.NewProcess(os.Getpid(), agents), started: make(chan struct{}), got: make(chan *linepb.Message, 1024), answer: answer,
		listeners: map[uint64][]int{},
	}
	h.Conn = line.NewConn(other, line.Options{Handle: h.handle})
	go func() {
		defer close(h.started)
		g.userspaceStarted(h.process)
	}()
	g.t.Cleanup(func() {
		h.Close()
		<-h.started
		h.drop()
	})
	must(g.t, h.Notify(&linepb.Message{Body: &linepb.Message_Ready{Ready: &linepb.Ready{Version: "hostile"}}}))
	return h
}

// drop closes what the process was given.
func (h *hostile) drop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	closeAll(h.fds)
	h.fds = nil
	for cookie, fds := range h.listeners {
		closeAll(fds)
		delete(h.listeners, cookie)
	}
}

// up waits until the agent has told everything.
func (h *hostile) up() *hostile {
	h.g.t.Helper()
	select {
	case <-h.started:
	case <-time.After(patience):
		h.g.t.Fatal("the session did not come up")
	}
	if h.g.session.Load() == nil {
		h.g.t.Fatal("there is no session")
	}
	return h
}

// ready is up, and all of that is taken note of.
func (h *hostile) ready() *hostile {
	h.g.t.Helper()
	h.up()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	// What it does not answer is refused in order, after all that came before.
	_, _, err := h.g.session.Load().conn.Call(ctx, &linepb.Message{Body: &linepb.Message_Drain{Drain: &linepb.Drain{}}})
	if err == nil || !strings.Contains(err.Error(), "not answered") {
		h.g.t.Fatalf("what was told has not been read: %v", err)
	}
	return h
}

func (h *hostile) handle(_ context.Context, in *line.Incoming) {
	h.mu.Lock()
	fds := in.TakeFDs()
	switch b := in.Message.GetBody().(type) {
	case *linepb.Message_Listeners:
		h.listeners[b.Listeners.GetListeners()[0].GetNetnsCookie()] = fds
	case *linepb.Message_CloseListeners:
		closeAll(h.listeners[b.CloseListeners.GetNetnsCookie()])
		delete(h.listeners, b.CloseListeners.GetNetnsCookie())
	default:
		h.fds = append(h.fds, fds...)
	}
	h.mu.Unlock()
	if h.answer != nil && h.answer(in) {
		return
	}
	switch b := in.Message.GetBody().(type) {
	case *linepb.Message_Policies:
		_ = in.Reply(&linepb.Message{Body: &linepb.Message_PoliciesReply{PoliciesReply: &linepb.PoliciesReply{Generation: b.Policies.GetGeneration()}}})
	case *linepb.Message_Status:
		_ = in.Reply(&linepb.Message{Body: &linepb.Message_StatusReply{StatusReply: &linepb.StatusReply{Json: []byte("{}")}}})
	}
	select {
	case h.got <- in.Message:
	default:
	}
}

// ask puts a request to the agent.
func (h *hostile) ask(m *linepb.Message) (*linepb.Message, []int) {
	h.g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	reply, fds, err := h.Call(ctx, m)
	if err != nil {
		h.g.t.Fatalf("ask the agent: %v", err)
	}
	return reply, fds
}

// dial returns the reason of a refusal, or the socket.
func (h *hostile) dial(d *linepb.Dial) (flow.Reason, string, int) {
	h.g.t.Helper()
	m, fds := h.ask(&linepb.Message{Body: &linepb.Message_Dial{Dial: d}})
	r := m.GetDialReply()
	if r.GetError() == "" {
		if len(fds) != 1 {
			h.g.t.Fatalf("%d descriptors", len(fds))
		}
		return flow.ReasonOK, "", fds[0]
	}
	return flow.Reason(r.GetReason()), r.GetError(), -1
}

func (h *hostile) verdict(v *linepb.Verdict) string {
	h.g.t.Helper()
	m, _ := h.ask(&linepb.Message{Body: &linepb.Message_Verdict{Verdict: v}})
	return m.GetVerdictReply().GetError()
}

func (h *hostile) sign(id string, csr []byte) ([][]byte, string) {
	h.g.t.Helper()
	m, _ := h.ask(&linepb.Message{Body: &linepb.Message_Sign{Sign: &linepb.Sign{Id: id, Csr: csr}}})
	return m.GetSignReply().GetChain(), m.GetSignReply().GetError()
}

// settled has the agent handle everything that was sent without asking for an
// answer, which is handled in order.
func (h *hostile) settled() {
	h.g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	// Not one of userspace's requests, so one that is in order.
	_, _, err := h.Call(ctx, &linepb.Message{Body: &linepb.Message_Drain{Drain: &linepb.Drain{}}})
	if err == nil || !strings.Contains(err.Error(), "not a request") {
		h.g.t.Fatalf("an unknown request: %v", err)
	}
}
