// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/cmd/sallyport/internal/lab"
)

// path is what every client asks for.
const path = "/v1/items/7"

// kind is what a variant is compared by.
type kind uint8

const (
	kindBare kind = iota // no proxy at all
	kindSame             // Sallyport, both ends on one node
	kindL4               // by identity alone, across nodes
	kindHTTP             // by method and path, across nodes
	kindFull             // all stages, across nodes
	kindPeerL4
	kindPeerHTTP
)

// variant is one way from wrk to nginx.
type variant struct {
	name    string
	kind    kind
	url     string
	space   string // of the client
	cgroup  string
	header  []string
	proxies []int       // roots of the process trees between the two
	nodes   []*lab.Node // whose decision logs are emptied after a run
	app     *lab.Process
	noFresh bool // not measured with one request a connection
}

// The names by which results are compared.
const (
	bareSame   = "direct, one node"
	bareAcross = "direct, across"
	same       = "one node, identity alone"
	sameHTTP   = "one node, method and path"
	acrossL4   = "across, identity alone"
	acrossHTTP = "across, method and path"
	acrossFull = "across, all stages"
)

func (t *testbed) variants(pairs []*pair) []*variant {
	full := []string{"Authorization: Bearer " + t.token, "X-Account: 42"}
	web := func(port string) string { return "http://" + nodeB + ":" + port + path }
	bare := "http://" + peerQ + ":" + portBare + path
	a, b := t.a.Agent.PID(), t.b.Agent.PID()
	one, two := []*lab.Node{t.b}, []*lab.Node{t.a, t.b}
	out := []*variant{
		{name: bareSame, kind: kindBare, url: bare, space: "q", app: t.bare},
		{name: bareAcross, kind: kindBare, url: bare, space: "p", app: t.bare},
		{name: same, kind: kindSame, url: web(portIdentity), space: "b", cgroup: t.local, proxies: []int{b}, nodes: one, app: t.web},
		{name: sameHTTP, kind: kindSame, url: web(portHTTP), space: "b", cgroup: t.local, proxies: []int{b}, nodes: one, app: t.web},
		{name: acrossL4, kind: kindL4, url: web(portIdentity), space: "a", cgroup: t.client, proxies: []int{a, b}, nodes: two, app: t.web},
		{name: acrossHTTP, kind: kindHTTP, url: web(portHTTP), space: "a", cgroup: t.client, proxies: []int{a, b}, nodes: two, app: t.web},
		{name: acrossFull, kind: kindFull, url: web(portFull), space: "a", cgroup: t.client, header: full, proxies: []int{a, b}, nodes: two, app: t.web, noFresh: true},
	}
	for _, p := range pairs {
		k := kindPeerL4
		if p.http {
			k = kindPeerHTTP
		}
		out = append(out, &variant{name: p.name, kind: k, url: p.url, space: "p", proxies: []int{p.client.PID(), p.server.PID()}, app: t.bare})
	}
	return out
}

// mode is how wrk connects.
type mode struct {
	connections int
	fresh       bool // one request a connection
}

func (m mode) String() string {
	if m.fresh {
		return fmt.Sprintf("new connections, %d at a time", m.connections)
	}
	return fmt.Sprintf("c=%d", m.connections)
}

// sample is one measurement.
type sample struct {
	found
	cpu    time.Duration // of what is between wrk and nginx
	agents time.Duration // the share of the agents, of Sallyport's
	mib    float64
	others float64 // cores that were busy with something else
	logged int64   // lines of the decision logs
}

// perRequest is the proxies' CPU time a request, in us: also the seconds for
// 100,000 requests, times ten.
func (s *sample) perRequest() float64 { return s.share(s.cpu) }

// share is a time's share of one request, in us.
func (s *sample) share(d time.Duration) float64 {
	return float64(d.Microseconds()) / float64(max(s.Requests, 1))
}

// results of a run: for each variant and mode one sample a round.
type results struct {
	o        options
	began    time.Time
	load     [2]string // before and after
	variants []*variant
	modes    []mode
	samples  map[string]map[mode][]sample
	missing  []string
	connect  struct{ bare, hooked []connectTimes }
	idleMiB  float64
	versions []string
}

func measure(ctx context.Context, o options) (_ *results, err error) {
	r := &results{o: o, began: time.Now(), samples: map[string]map[mode][]sample{}}
	r.load[0] = load()
	t, err := openTestbed(ctx, o.program)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	r.idleMiB = t.idleMiB
	pairs, missing, err := t.openPeers(ctx)
	if err != nil {
		return nil, err
	}
	r.missing = missing
	for _, v := range t.variants(pairs) {
		if v.kind == kindBare || o.only.MatchString(v.name) {
			r.variants = append(r.variants, v)
			r.samples[v.name] = map[mode][]sample{}
		}
	}
	for _, c := range o.connections {
		r.modes = append(r.modes, mode{c, false})
	}
	for _, c := range o.fresh {
		r.modes = append(r.modes, mode{c, true})
	}
	if err := r.warm(ctx, t); err != nil {
		return nil, err
	}
	for round := range o.rounds {
		o.progress("round %d of %d", round+1, o.rounds)
		if err := r.round(ctx, t); err != nil {
			return nil, err
		}
	}
	r.load[1] = load()
	r.versions = versions(ctx, t)
	return r, nil
}

// warm has every variant carry something before anything counts: tunnels,
// verdicts, caches, baselines. On a busy machine the first second may not do.
func (r *results) warm(ctx context.Context, t *testbed) error {
	for _, v := range r.variants {
		_, err := t.sample(ctx, v, mode{connections: 8}, 1)
		for again := 0; again < 4 && err != nil && ctx.Err() == nil; again++ {
			_, err = t.sample(ctx, v, mode{connections: 8}, 1)
		}
		if err != nil {
			return fmt.Errorf("warm %s: %w", v.name, err)
		}
	}
	return nil
}

func (r *results) round(ctx context.Context, t *testbed) error {
	for _, m := range r.modes {
		for _, v := range r.variants {
			if m.fresh && v.noFresh {
				continue
			}
			s, err := t.sample(ctx, v, m, r.o.seconds)
			if err != nil {
				return fmt.Errorf("measure %s, %s: %w", v.name, m, err)
			}
			r.samples[v.name][m] = append(r.samples[v.name][m], s)
			r.o.progress("  %-28s %-32s %9.0f/s  p50 %7.0f us  p99 %8.0f us  %6.2f us CPU  %d errors", v.name, m, s.perSecond(), s.P50, s.P99, s.perRequest(), s.Errors)
		}
	}
	return r.timeConnects(ctx, t)
}

// sample measures one variant.
func (t *testbed) sample(ctx context.Context, v *variant, m mode, seconds int) (sample, error) {
	var s sample
	header := v.header
	if m.fresh {
		header = append(slices.Clone(header), "Connection: close")
	}
	before, err := t.snapshot(v)
	if err != nil {
		return s, err
	}
	var own time.Duration
	s.found, own, err = wrk{v.url, m.connections, seconds, header}.run(ctx, t.lab, v.space, v.cgroup)
	if err != nil {
		return s, err
	}
	after, err := t.snapshot(v)
	if err != nil {
		return s, err
	}
	if len(v.nodes) > 0 {
		s.agents = after.proxies.roots - before.proxies.roots
	}
	s.cpu, s.mib = after.proxies.cpu-before.proxies.cpu, after.proxies.mib
	ours := s.cpu + own + after.app.cpu - before.app.cpu
	s.others = max(0, (after.busy-before.busy-ours).Seconds()/after.at.Sub(before.at).Seconds())
	if s.Requests == 0 {
		return s, fmt.Errorf("%s carried nothing: %d errors", v.name, s.Errors)
	}
	for _, n := range v.nodes {
		lines, err := emptyLog(n.Path("decisions.json"))
		if err != nil {
			return s, err
		}
		s.logged += lines
	}
	return s, nil
}

// snapshot is what had been used up at a moment.
type snapshot struct {
	at           time.Time
	proxies, app tree
	busy         time.Duration
}

func (t *testbed) snapshot(v *variant) (s snapshot, err error) {
	s.at = time.Now()
	if s.proxies, err = usage(v.proxies); err != nil {
		return s, err
	}
	if s.app, err = usage([]int{v.app.PID()}); err != nil {
		return s, err
	}
	s.busy, err = busy()
	return s, err
}

// emptyLog counts the lines of a decision log and empties it: the agent
// appends.
func emptyLog(file string) (int64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, fmt.Errorf("read decision log: %w", err)
	}
	if err := os.Truncate(file, 0); err != nil {
		return 0, fmt.Errorf("empty decision log: %w", err)
	}
	return int64(bytes.Count(b, []byte{'\n'})), nil
}

// connects is how often connect() is timed in a round, each way.
const connects = 3000

// timeConnects times connect() without hooks, in q, and with all of them and
// the verdict direct, on node b.
func (r *results) timeConnects(ctx context.Context, t *testbed) error {
	for _, c := range []struct {
		space, cgroup, addr string
		into                *[]connectTimes
	}{{"q", "", peerQ + ":" + portBare, &r.connect.bare}, {"b", t.local, nodeB + ":" + portIdentity, &r.connect.hooked}} {
		b, _, err := output(ctx, t.lab, c.space, c.cgroup, "/proc/self/exe", connectVerb, c.addr, fmt.Sprint(connects))
		if err != nil {
			return err
		}
		var one connectTimes
		if err := json.Unmarshal(b, &one); err != nil {
			return fmt.Errorf("read times of connect: %w", err)
		}
		*c.into = append(*c.into, one)
	}
	return nil
}
