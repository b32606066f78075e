// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/metrics"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/watch"
)

// When a port comes under enforce, the connections of whoever sat on it are
// closed, from wherever they came, and the listener is named until it is gone.
func TestSquattersConnectionsAreClosed(t *testing.T) {
	g := newGround(t)
	g.connect(nil).ready()
	at := netip.AddrPortFrom(serverAt.Addr(), 7000)
	// Not the test's own cgroup: that is the agent's.
	outside := testenv.NewCgroup(t, nil)
	squatter, local, stranger := testenv.NewActor(t, outside, g.near), testenv.NewActor(t, outside, g.near), testenv.NewActor(t, outside, g.other)
	l := listen(t, squatter, at)
	var live []*testenv.Sock
	for _, who := range []*testenv.Actor{local, stranger} {
		c, err := who.Dial(at)
		must(t, err)
		must(t, c.SetTimeout(patience))
		live = append(live, c)
	}
	foreign := func() bool {
		return slices.ContainsFunc(g.health.Problems(), func(p metrics.Problem) bool { return strings.HasPrefix(p.ID, "foreign-listener/") })
	}
	if foreign() {
		t.Fatal("a port that nothing protects has a foreign listener")
	}
	g.policy(documents + `---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: late, namespace: t}
spec:
  mode: enforce
  protect: {identity: server, ports: [7000], protocol: tcp}
  rules: [{name: r, from: [client]}]
`)
	for i, c := range live {
		if _, err := c.Recv(1); err == nil || errors.Is(err, unix.EAGAIN) {
			t.Errorf("connection %d is still open: %v", i, err)
		}
	}
	if !foreign() {
		t.Errorf("nobody says that somebody else listens: %v", g.health.Problems())
	}
	must(t, l.Close())
	g.reconcile(func(*inputs) {})
	if foreign() {
		t.Error("it is said to listen though it is gone")
	}
}

// A plan is brought into force only with workloads that were looked for under
// it: by a table of other identities, what is enforced would be nobody.
func TestPlanWaitsForItsWorkloads(t *testing.T) {
	g := newGround(t)
	g.connect(nil).ready()
	listen(t, g.server, serverAt)
	g.stopWorkload()
	before := g.applied
	text := strings.ReplaceAll(documents, "name: client", "name: renamed")
	text = strings.ReplaceAll(text, "[client", "[renamed")
	files := []load.File{{Path: "set.yaml", Content: []byte(text)}}
	plan, problems := compile.Build(files, compile.Options{TrustDomain: trustDomain, Node: nodeName})
	if plan == nil {
		t.Fatal(problems)
	}
	g.policiesChanged(watch.Event{Plan: plan, Files: files})
	if g.in.plan != plan || g.applied != before {
		t.Errorf("in force: %v", g.applied == plan)
	}
	if err := g.dp.Heartbeat(); err != nil {
		t.Fatal(err)
	}
	c, err := g.client.Dial(serverAt)
	if err == nil {
		// Its SYN may only have come to our own listener.
		must(t, c.Close())
	}
	if n, err := g.dp.Counters(); err != nil || n.Served != 0 {
		t.Errorf("%d connections reached the server, %v", n.Served, err)
	}
}
