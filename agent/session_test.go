// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/metrics"
	"github.com/sallyport-dev/sallyport/agent/revocations"
	"github.com/sallyport-dev/sallyport/agent/supervise"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/line"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

// hang is a userspace process that says that it is ready and then neither
// reads nor ends.
func hang() {
	s, err := line.FromFD(3)
	if err == nil {
		err = s.Send(&linepb.Message{Body: &linepb.Message_Ready{Ready: &linepb.Ready{}}})
	}
	if err != nil {
		os.Exit(4)
	}
	time.Sleep(time.Hour)
}

// next waits for the next message of a kind.
func next[B any](h *hostile) B {
	h.g.t.Helper()
	late := time.After(patience)
	for {
		select {
		case m := <-h.got:
			if b, ok := any(m.GetBody()).(B); ok {
				return b
			}
		case <-late:
			var b B
			h.g.t.Fatalf("no %T came", b)
		}
	}
}

func (h *hostile) ended() {
	h.g.t.Helper()
	select {
	case <-h.Done():
	case <-time.After(patience):
		h.g.t.Fatal("the line did not end")
	}
}

// direct puts a verdict, opens a connection that goes by it, and returns the
// client's end.
func (g *ground) direct(h *hostile, l *testenv.Sock) *testenv.Sock {
	g.t.Helper()
	must(g.t, g.dp.Heartbeat())
	if why := h.verdict(&linepb.Verdict{
		SourceIdentity: g.number("client"), SourceNetns: g.near.Cookie, Address: serverAt.Addr().AsSlice(), Port: uint32(serverAt.Port()),
		Action: uint32(flow.ActionDirect), TtlNs: int64(time.Minute), PolicyGeneration: g.view.Load().generation,
	}); why != "" {
		g.t.Fatal(why)
	}
	c, err := g.client.Dial(serverAt)
	must(g.t, err)
	s, _, err := l.Accept()
	must(g.t, err)
	must(g.t, s.Send([]byte("x")))
	if _, err := c.Recv(1); err != nil {
		g.t.Fatal(err)
	}
	if local, err := c.Local(); err != nil {
		g.t.Fatal(err)
	} else if f, err := g.dp.LookupFlow(g.near.Cookie, local, serverAt); err != nil || f.Value.Kind == 0 {
		g.t.Fatalf("the flow: %+v, %v", f, err)
	}
	return c
}

// A process knows whom to trust and what is revoked before it gets the
// policies, and those before it gets a listener.
func TestNothingComesBeforeWhatItNeeds(t *testing.T) {
	g := newGround(t)
	h := g.connect(nil).ready()
	at := map[string]int{}
	for len(h.got) > 0 {
		name := reflect.TypeOf((<-h.got).GetBody()).Elem().Name()
		if _, seen := at[name]; !seen {
			at[name] = len(at)
		}
	}
	order := []string{"Message_Start", "Message_Maps", "Message_Trust", "Message_Revocations", "Message_Identities", "Message_Addresses", "Message_AppCertificates", "Message_Policies", "Message_Listeners"}
	for i, name := range order {
		if n, ok := at[name]; !ok || n != i {
			t.Errorf("%s came as number %d (%v)", name, n, at)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.fds) != 2 || len(h.listeners) != 2 { // the flow map, the policies
		t.Errorf("%d descriptors, listeners for %d namespaces", len(h.fds), len(h.listeners))
	}
	for cookie, fds := range h.listeners {
		if len(fds) != 6 {
			t.Errorf("%d listeners for %d", len(fds), cookie)
		}
	}
}

// A process that does not take policies over holds nothing up: a revocation
// cuts live connections meanwhile, and when the answer comes it is in force.
func TestRevocationDoesNotWaitForUserspace(t *testing.T) {
	g := newGround(t)
	held := make(chan *line.Incoming, 1)
	var sets int
	h := g.connect(func(in *line.Incoming) bool {
		if in.Message.GetPolicies() == nil {
			return false
		}
		if sets++; sets == 1 {
			return false
		}
		in.Later()
		held <- in
		return true
	}).ready()
	g.waits.patience = 50 * time.Millisecond
	c := g.direct(h, listen(t, g.server, serverAt))
	s := g.session.Load()
	before := s.generation
	g.policy(documents + "\n---\n" + strings.ReplaceAll(soleIdentity, "NAME", "late"))
	in := <-held
	if s.generation != before || !g.again.Load() {
		t.Errorf("generation %d was taken for in force", s.generation)
	}
	if r, err := (service{g.Agent}).Policies(g.current, &controlpb.PoliciesRequest{}); err != nil || r.GetSet().GetGeneration() != before {
		t.Errorf("generation %d is shown as in force: %v", r.GetSet().GetGeneration(), err)
	}
	began := time.Now()
	if _, err := g.revoked.Revoke(revocations.Identity, g.spiffe("client"), 0, "", ""); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("the revocation took %s", d)
	}
	if _, err := c.Recv(1); err == nil || errors.Is(err, unix.EAGAIN) {
		t.Errorf("the live connection of the revoked: %v", err)
	}
	must(t, in.Reply(&linepb.Message{Body: &linepb.Message_PoliciesReply{PoliciesReply: &linepb.PoliciesReply{Generation: before + 1}}}))
	<-s.handover.done
	g.reconcile(func(*inputs) {})
	if s.generation != before+1 || g.again.Load() {
		t.Errorf("generation %d, want %d; %v", s.generation, before+1, g.health.Problems())
	}
}

const soleIdentity = `
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: NAME, namespace: t}
spec: {owner: a@test, select: {cgroup: {path: /NAME}}, mode: enforce}
`

// Nobody who asks for the state of things waits for a reconcile.
func TestStatusDoesNotWait(t *testing.T) {
	g := newGround(t)
	g.mu.Lock()
	defer g.mu.Unlock()
	done := make(chan error, 1)
	go func() {
		r, err := service{g.Agent}.Status(context.Background())
		if err == nil && (len(r.GetWorkloads()) == 0 || r.GetPolicySet().GetGeneration() != 1) {
			err = fmt.Errorf("status: %v", r)
		}
		done <- err
	}()
	select {
	case err := <-done:
		must(t, err)
	case <-time.After(patience):
		t.Fatal("it waits")
	}
	if g.metric("sallyport_policies") != 3 {
		t.Error("not all policies are counted")
	}
}

// Nobody is told that a set is in force while userspace goes by the one before.
func TestSetIsShownWhenUserspaceHasIt(t *testing.T) {
	g := newGround(t)
	shown := func() uint64 {
		r, err := service{g.Agent}.Policies(g.current, &controlpb.PoliciesRequest{})
		must(t, err)
		return r.GetSet().GetGeneration()
	}
	during := make(chan uint64, 4) // the generation shown while another is handed over
	g.connect(func(in *line.Incoming) bool {
		if in.Message.GetPolicies() != nil {
			during <- shown()
		}
		return false
	}).ready()
	<-during
	before := shown()
	g.policy(documents + "\n---\n" + strings.ReplaceAll(soleIdentity, "NAME", "late"))
	if at, after := <-during, shown(); at != before || after != before+1 {
		t.Errorf("generation %d, then %d, and %d while that was handed over", before, after, at)
	}
}

// A set that userspace says it does not go by is not in force, and is sent
// again; one that it goes by, where something of it is refused, is.
func TestSetThatUserspaceDoesNotTake(t *testing.T) {
	g := newGround(t)
	var answer atomic.Pointer[linepb.PoliciesReply]
	g.connect(func(in *line.Incoming) bool {
		reply := answer.Load()
		if in.Message.GetPolicies() == nil || reply == nil {
			return false
		}
		must(t, in.Reply(&linepb.Message{Body: &linepb.Message_PoliciesReply{PoliciesReply: reply}}))
		return true
	}).ready()
	s := g.session.Load()
	before := s.generation
	shown := func() uint64 {
		r, err := service{g.Agent}.Policies(g.current, &controlpb.PoliciesRequest{})
		must(t, err)
		return r.GetSet().GetGeneration()
	}
	answer.Store(&linepb.PoliciesReply{Generation: before, Error: "compile policy set"})
	g.policy(documents + "\n---\n" + strings.ReplaceAll(soleIdentity, "NAME", "late"))
	if s.generation != before || shown() != before || !g.again.Load() {
		t.Errorf("generation %d, %d is shown, again %v", s.generation, shown(), g.again.Load())
	}
	answer.Store(&linepb.PoliciesReply{Generation: before + 1, Error: "set token issuers"})
	g.reconcile(func(*inputs) {})
	if s.generation != before+1 || shown() != before+1 || g.again.Load() {
		t.Errorf("generation %d, %d is shown, again %v", s.generation, shown(), g.again.Load())
	}
	if !slices.ContainsFunc(g.health.Problems(), func(p metrics.Problem) bool {
		return p.ID == "policies-userspace" && strings.Contains(p.Text, "set token issuers")
	}) {
		t.Errorf("problems %v", g.health.Problems())
	}
}

func TestProcessThatTakesNoPoliciesIsEnded(t *testing.T) {
	g := newGround(t)
	g.waits.patience, g.waits.policies = 20*time.Millisecond, 100*time.Millisecond
	h := g.connect(func(in *line.Incoming) bool {
		in.Later()
		return in.Message.GetPolicies() != nil
	}).up()
	h.ended()
	if g.session.Load().generation != 0 {
		t.Error("its policies are taken for in force")
	}
}

func TestSilentProcessIsEnded(t *testing.T) {
	g := newGround(t)
	answer := make(chan bool, 16)
	h := g.connect(func(in *line.Incoming) bool {
		if in.Message.GetStatus() == nil || <-answer {
			return false
		}
		in.Later()
		return true
	}).ready()
	for _, yes := range []bool{false, false, true, false, false} {
		answer <- yes
		g.waits.question = 20 * time.Millisecond
		if yes {
			g.waits.question = patience
		}
		g.fetchCounters(g.current)
	}
	if h.Err() != nil {
		t.Fatalf("ended too early: %v", h.Err())
	}
	answer <- false
	g.fetchCounters(g.current)
	h.ended()
}

func TestProcessThatIsNeverReadyIsEnded(t *testing.T) {
	g := newGround(t)
	g.waits.ready = 20 * time.Millisecond
	mine, theirs, err := line.Pair()
	must(t, err)
	agents, err := line.NewSocket(mine, false)
	must(t, err)
	g.userspaceStarted(supervise.NewProcess(0, agents))
	if g.session.Load() != nil {
		t.Error("it was taken into service")
	}
	other, err := line.NewSocket(theirs, true)
	must(t, err)
	defer other.Close()
	if m, _, err := other.Recv(); err != nil || m.GetStart().GetNode() != nodeName {
		t.Errorf("it was told %v, %v", m, err)
	}
	if m, _, err := other.Recv(); !errors.Is(err, line.ErrClosed) {
		t.Errorf("then %v, %v", m, err)
	}
}

// What is no message of the line, a reply to what was not asked, or a message
// with descriptors that it must not have, ends the line.
func TestProcessThatBreaksTheLineIsEnded(t *testing.T) {
	g := newGround(t)
	for name, send := range map[string]func(fd int) error{
		"rubbish": func(fd int) error { return unix.Send(fd, []byte("rubbish"), 0) },
		"a reply to nothing": func(fd int) error {
			b, err := line.Encode(&linepb.Message{Id: 99, Reply: true, Body: &linepb.Message_PoliciesReply{PoliciesReply: &linepb.PoliciesReply{}}})
			return errors.Join(err, unix.Send(fd, b, 0))
		},
		"another version": func(fd int) error { return unix.Send(fd, []byte{8, 9}, 0) },
		"a descriptor": func(fd int) error {
			b, err := line.Encode(&linepb.Message{Body: &linepb.Message_Ready{Ready: &linepb.Ready{}}})
			return errors.Join(err, unix.Sendmsg(fd, b, unix.UnixRights(0), nil, 0))
		},
		"its end closed": unix.Close,
	} {
		mine, theirs, err := line.Pair()
		must(t, err)
		agents, err := line.NewSocket(mine, false)
		must(t, err)
		s := g.newSession(supervise.NewProcess(0, agents))
		fd, err := unix.FcntlInt(theirs.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		must(t, err)
		theirs.Close()
		must(t, send(fd))
		select {
		case <-s.conn.Done():
		case <-time.After(patience):
			t.Errorf("%s: the line is still there", name)
		}
		if name != "its end closed" {
			unix.Close(fd)
		}
	}
}

// A real process that hangs is ended although it never looks at its line, and
// the next one is started.
func TestHangingProcessIsReplaced(t *testing.T) {
	g := newGround(t)
	g.waits.patience, g.waits.policies = 20*time.Millisecond, 50*time.Millisecond
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := g.super.Run(ctx); err != nil {
			t.Errorf("run userspace: %v", err)
		}
	})
	defer wg.Wait()
	defer stop()
	first := g.awaitPID(0)
	fd, err := unix.PidfdOpen(first, 0)
	must(t, err)
	defer unix.Close(fd)
	if ended, err := testenv.Ended(fd, patience); !ended {
		t.Fatalf("it is still there: %v", err)
	}
	if second := g.awaitPID(first); second == first {
		t.Error("the same process")
	}
}

func (g *ground) awaitPID(other int) int {
	g.t.Helper()
	for late := time.Now().Add(patience); time.Now().Before(late); time.Sleep(time.Millisecond) {
		if pid := g.super.Status().PID; pid != 0 && pid != other {
			return pid
		}
	}
	g.t.Fatal("no process was started")
	return 0
}

// Sessions come and go without leaving a descriptor or a goroutine behind.
func TestSessionsLeaveNothingBehind(t *testing.T) {
	g := newGround(t)
	round := func() {
		h := g.connect(nil).ready()
		h.Close()
		<-g.session.Load().conn.Done()
		g.userspaceExited(h.process, errors.New("test"))
		h.drop()
		if g.session.Load() != nil {
			t.Fatal("the session of a process that is gone is still there")
		}
	}
	round()
	fds, goroutines := descriptors(t), runtime.NumGoroutine()
	for range 5 {
		round()
	}
	settle(t, "descriptors", fds, func() int { return descriptors(t) })
	settle(t, "goroutines", goroutines, runtime.NumGoroutine)
	if n := g.metric("sallyport_userspace_restarts_total"); n != 6 {
		t.Errorf("%v restarts were counted", n)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	runtime.GC() // what is unreachable is closed by its finalizer, at any time
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

// What a hostile process counts neither runs backwards in the metrics nor
// fills the agent's memory.
func TestCountsOfAHostileProcess(t *testing.T) {
	g := newGround(t)
	var mu sync.Mutex
	var status userspace.Status
	g.connect(func(in *line.Incoming) bool {
		if in.Message.GetStatus() == nil {
			return false
		}
		mu.Lock()
		defer mu.Unlock()
		raw, err := json.Marshal(status)
		if err != nil {
			panic(err)
		}
		_ = in.Reply(&linepb.Message{Body: &linepb.Message_StatusReply{StatusReply: &linepb.StatusReply{Json: raw}}})
		return true
	}).ready()
	fetch := func(list ...userspace.DecisionCount) {
		mu.Lock()
		status.Decisions = list
		mu.Unlock()
		g.fetchCounters(g.current)
	}
	count := func(n uint64) {
		fetch(userspace.DecisionCount{Stage: "policy", Reason: "no_rule", Effect: "deny", Enforced: true, Count: n})
	}
	count(5)
	count(3)
	count(7)
	if n := g.metric(`sallyport_decisions_total{effect="deny",enforced="true",stage="policy"}`); n != 7 {
		t.Errorf("counted %v", n)
	}
	for i := range 40 {
		var list []userspace.DecisionCount
		for j := range 400 {
			list = append(list, userspace.DecisionCount{Stage: fmt.Sprint(i, "-", j), Effect: "deny", Count: 1})
		}
		fetch(list...)
	}
	if n := len(g.session.Load().counted); n > maxCounted {
		t.Errorf("%d kinds of decisions are kept", n)
	}
}

// Two identities that serve at one port leave that port to nobody, and
// everything else as it is: revocations go on.
func TestDisputedPortIsNobodys(t *testing.T) {
	g := newGround(t)
	h := g.connect(nil).ready()
	l := listen(t, g.server, serverAt)
	both := documents
	for _, name := range []string{"client", "soft"} {
		both += strings.ReplaceAll(`---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: of-NAME, namespace: t}
spec:
  mode: enforce
  protect: {identity: NAME, ports: [9000], protocol: tcp}
  rules: [{name: r, from: [server]}]
`, "NAME", name)
	}
	g.policy(both)
	if g.again.Load() {
		t.Fatalf("not brought in line: %v", g.health.Problems())
	}
	v := g.view.Load()
	if len(v.disputed) != 1 || v.generation != 2 {
		t.Fatalf("disputed: %v, generation %d", v.disputed, v.generation)
	}
	at := netip.AddrPortFrom(clientIP, 9000)
	if _, err := g.client.Listen(at); !errors.Is(err, unix.EPERM) {
		t.Errorf("one of the two binds it: %v", err)
	}
	reason, _, _ := h.dial(&linepb.Dial{
		Kind: linepb.DialKind_APPLICATION, NetnsCookie: g.near.Cookie, Address: clientIP.AsSlice(), Port: 9000, ClientAddress: clientIP.AsSlice(), ClientPort: 1,
		SourceIdentity: g.number("server"), TargetIdentity: g.number("client"),
	})
	if reason != flow.ReasonLineRefused {
		t.Errorf("dialled: %q", reason)
	}
	if !slices.ContainsFunc(g.health.Problems(), func(p metrics.Problem) bool { return p.ID == "disputed-ports" }) {
		t.Errorf("nothing says so: %v", g.health.Problems())
	}
	c := g.direct(h, l)
	if _, err := g.revoked.Revoke(revocations.Identity, g.spiffe("client"), 0, "", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Recv(1); err == nil || errors.Is(err, unix.EAGAIN) {
		t.Errorf("the live connection of the revoked: %v", err)
	}
	g.policy(documents)
	if slices.ContainsFunc(g.health.Problems(), func(p metrics.Problem) bool { return p.ID == "disputed-ports" }) {
		t.Error("it is still said to be disputed")
	}
}

// goesOn has the agent beat and tick until the test ends.
func (g *ground) goesOn() {
	ctx, stop := context.WithCancel(g.current)
	var wg sync.WaitGroup
	wg.Go(func() { _ = g.beat(ctx) })
	wg.Go(func() { _ = g.tick(ctx) })
	g.t.Cleanup(func() { stop(); wg.Wait() })
}

// endsAt waits for the end of a connection of an identity that expires then.
func (g *ground) endsAt(c *testenv.Sock, expires time.Time) {
	g.t.Helper()
	must(g.t, c.SetTimeout(patience))
	if _, err := c.Recv(1); err == nil || errors.Is(err, unix.EAGAIN) {
		g.t.Errorf("the connection: %v", err)
	}
	if d := time.Since(expires); d < 0 || d > patience {
		g.t.Errorf("it ended %s after the identity", d)
	}
	g.reconcile(func(*inputs) {}) // not before the sweep that ended it is over
	if n := g.metric(`sallyport_connections_closed_total{reason="identity_expired"}`); n != 1 {
		g.t.Errorf("counted %v", n)
	}
}

// A live direct connection ends when its caller's validity does.
func TestDirectEndsWithTheIdentity(t *testing.T) {
	g := newGround(t)
	ends := time.Now().Add(10 * time.Second).UTC().Truncate(time.Second)
	g.policy(strings.Replace(documents, "mayCall: [server, far], egress", "expires: "+ends.Format(time.RFC3339)+", mayCall: [server, far], egress", 1))
	h := g.connect(nil).ready()
	l := listen(t, g.server, serverAt)
	g.goesOn()
	c := g.direct(h, l)
	g.endsAt(c, ends)
	if _, err := g.client.Dial(serverAt); err == nil {
		if f, err := g.dp.Counters(); err != nil || f.Direct != 1 {
			t.Errorf("then %d went direct, %v", f.Direct, err)
		}
	}
}

// What egress lets out ends with the identity as well: live connections, and
// new ones in the kernel.
func TestEgressEndsWithTheIdentity(t *testing.T) {
	g := newGround(t)
	open := netip.MustParseAddrPort("192.0.2.20:443")
	ends := time.Now().Add(10 * time.Second).UTC().Truncate(time.Second)
	g.policy(strings.Replace(documents, "mayCall: [server, far], egress: [",
		"expires: "+ends.Format(time.RFC3339)+", mayCall: [server, far], egress: [{cidr: 192.0.2.20/32, ports: [443]}, ", 1))
	g.connect(nil).ready()
	l := listen(t, testenv.NewActor(t, nil, g.other), open)
	g.goesOn()
	c, err := g.client.Dial(open)
	must(t, err)
	_, _, err = l.Accept()
	must(t, err)
	g.endsAt(c, ends)
	if _, err := g.client.Dial(open); !errors.Is(err, unix.EPERM) {
		t.Errorf("then: %v", err)
	}
	if n, err := g.dp.Counters(); err != nil || n.Refused[flow.ReasonIdentityExpired] != 1 {
		t.Errorf("the kernel refused %v, %v", n.Refused, err)
	}
}

// A namespace in which nobody lives any more is let go of everywhere, and one
// that comes back is wired again.
func TestNamespacesComeAndGo(t *testing.T) {
	g := newGround(t)
	h := g.connect(nil).ready()
	here := func(v *view) bool { return v.namespaces[g.other.Cookie] != nil }
	gone := func(v *view) bool { return v.namespaces[g.other.Cookie] == nil }
	must(t, os.WriteFile(g.nearCgroup["stranger"].Path+"/cgroup.kill", []byte("1"), 0))
	v := g.await("the namespace is let go of", gone)
	if len(v.addresses[netip.MustParseAddr("192.0.2.20")]) != 0 {
		t.Error("its addresses are still taken for this node's")
	}
	if b := next[*linepb.Message_CloseListeners](h); b.CloseListeners.GetNetnsCookie() != g.other.Cookie {
		t.Errorf("listeners of %d are closed", b.CloseListeners.GetNetnsCookie())
	}
	reason, why, _ := h.dial(&linepb.Dial{Kind: linepb.DialKind_PEER, NetnsCookie: g.other.Cookie, Address: slice("198.51.100.7"), SourceIdentity: g.number("client")})
	if reason != flow.ReasonLineRefused || !strings.Contains(why, "not one of ours") {
		t.Errorf("a dial there: %q %s", reason, why)
	}
	// The one that lets go of it is over, and a change of its addresses that is
	// noticed late wires nothing.
	g.reconcile(func(*inputs) {})
	known, err := g.dp.Netns()
	must(t, err)
	if slices.Contains(known, g.other.Cookie) {
		t.Error("the kernel half still knows it")
	}
	testenv.NewActor(t, g.nearCgroup["client"], g.other)
	g.await("it is wired again", here)
	if b := next[*linepb.Message_Listeners](h); b.Listeners.GetListeners()[0].GetNetnsCookie() != g.other.Cookie {
		t.Errorf("listeners came for %d", b.Listeners.GetListeners()[0].GetNetnsCookie())
	}
}

// Once the agent ends nothing is wired any more.
func TestNothingIsWiredAtTheEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	a := &Agent{current: ctx}
	cancel()
	a.reconcile(func(in *inputs) { in.generation = 9 }) // would panic without a datapath
	if a.shown.Load() != nil || a.view.Load() != nil {
		t.Error("it went on")
	}
}
