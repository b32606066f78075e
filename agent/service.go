// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/datapath"
	"github.com/sallyport-dev/sallyport/agent/metrics"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
	"github.com/sallyport-dev/sallyport/userspace/obtain"
)

// service answers the control API from the running agent.
type service struct{ a *Agent }

// Status implements control.Agent.
func (s service) Status(ctx context.Context) (*controlpb.StatusReply, error) {
	a := s.a
	r := &controlpb.StatusReply{
		Version: a.version, Node: a.cfg.Node, TrustDomain: a.cfg.TrustDomain, Anchor: a.ca.Anchor().String(),
		StartedUnixNs: a.started.UnixNano(), ModeCeiling: a.cfg.ModeCeiling.String(), Kernel: release(),
	}
	in, v := a.picture() // before health, which then knows what went wrong with it
	worst, wrong := a.health.Worst()
	r.Ready = !wrong || worst != metrics.Unhealthy
	for _, p := range a.health.Problems() {
		r.Problems = append(r.Problems, &controlpb.Problem{Id: p.ID, Severity: p.Severity.String(), Text: p.Text, Remedy: p.Remedy, SinceUnixNs: p.Since.UnixNano()})
	}
	for _, lost := range a.kernel.Lost() {
		r.Features = append(r.Features, &controlpb.Feature{Name: "kernel", Lost: lost})
	}
	r.PolicySet, r.Policies = policySet(in, v), policies(v)
	r.Workloads = s.workloads(in, v)
	if c, err := a.dp.Counters(); err == nil {
		r.Counters = counters(c)
	}
	entries, _ := a.revoked.List()
	r.Revocations = uint32(len(entries))
	st := a.super.Status()
	r.Userspace = &controlpb.Userspace{Pid: int32(st.PID), Restarts: uint32(st.Restarts)}
	if !st.Started.IsZero() {
		r.Userspace.StartedUnixNs = st.Started.UnixNano()
	}
	if m, err := a.ask(ctx, &linepb.Message{Body: &linepb.Message_Status{Status: &linepb.StatusRequest{}}}); err == nil {
		r.Userspace.Ready, r.Userspace.Json = true, m.GetStatusReply().GetJson()
	}
	return r, nil
}

// picture returns the inputs as they are now, and the view that is in force,
// nil before the first. A newer one that userspace or the kernel has yet to
// take over is not shown.
func (a *Agent) picture() (inputs, *view) {
	if in := a.shown.Load(); in != nil {
		return *in, a.inForce.Load()
	}
	return inputs{}, nil
}

// policySet says which set is in force, which is the view's, and what is wrong
// with the directory's, which may be another.
func policySet(in inputs, v *view) *controlpb.PolicySet {
	set := &controlpb.PolicySet{LastGood: in.lastGood}
	if v != nil {
		set.Digest, set.LoadedUnixNs, set.Generation = v.plan.Digest(), v.loaded.UnixNano(), v.generation
	}
	for _, p := range in.problems {
		if p.Severity == load.Error {
			set.Errors = append(set.Errors, p.String())
		} else {
			set.Warnings = append(set.Warnings, p.String())
		}
	}
	return set
}

func policies(v *view) (list []*controlpb.PolicyStatus) {
	if v == nil {
		return nil
	}
	for _, api := range v.plan.APIs() {
		var at []string
		for _, port := range api.Ports {
			at = append(at, fmt.Sprintf("%s:%d", api.Identity.FullName(), port))
		}
		list = append(list, &controlpb.PolicyStatus{
			Kind: "APIPolicy", Name: api.Name, Position: api.Position.FileLine(), Mode: api.Mode.String(),
			EffectiveMode: v.mode(api.Mode).String(), Protects: strings.Join(at, ","),
		})
	}
	for _, id := range v.plan.Identities() {
		list = append(list, &controlpb.PolicyStatus{
			Kind: "MachineIdentity", Name: id.FullName(), Position: id.Position.FileLine(), Mode: id.Mode.String(), EffectiveMode: v.mode(id.Mode).String(),
		})
	}
	return list
}

func (s service) workloads(in inputs, v *view) (list []*controlpb.Workload) {
	if v == nil {
		return nil
	}
	ids := map[string]*compile.Identity{}
	for _, id := range v.plan.Identities() {
		ids[id.FullName()] = id
	}
	for _, c := range in.table.Cgroups {
		if !c.Top && c.Processes == 0 {
			continue
		}
		w := &controlpb.Workload{
			Cgroup: c.Path, CgroupId: c.ID, Identity: c.Identity, Ambiguous: c.Ambiguous, RecognisedBy: c.By, Netns: c.Netns, Processes: uint32(c.Processes),
			Unconfined: c.Unconfined,
		}
		if id := ids[c.Identity]; id != nil {
			w.SpiffeId, w.Number, w.Mode = id.ID, uint32(v.numbers[id]), v.mode(id.Mode).String()
		}
		list = append(list, w)
	}
	return list
}

func counters(c datapath.Counters) (list []*controlpb.Counter) {
	add := func(name string, n uint64) { list = append(list, &controlpb.Counter{Name: name, Value: n}) }
	for _, r := range slices.Sorted(maps.Keys(c.Refused)) {
		add("refused/"+string(r), c.Refused[r])
	}
	for _, r := range slices.Sorted(maps.Keys(c.WouldRefuse)) {
		add("would-refuse/"+string(r), c.WouldRefuse[r])
	}
	for _, one := range []struct {
		name string
		n    uint64
	}{
		{"proxied", c.Proxied}, {"direct", c.Direct}, {"dialled", c.Dialled}, {"steered", c.Steered}, {"served", c.Served}, {"stale", c.Stale},
		{"void", c.Void}, {"bypassed", c.Bypassed}, {"events", c.Events}, {"events-lost", c.EventsLost}, {"events-limited", c.EventsLimited},
		{"samples", c.Samples}, {"samples-lost", c.SamplesLost}, {"samples-limited", c.SamplesLimited}, {"servers-full", c.ServersFull},
	} {
		add(one.name, one.n)
	}
	return list
}

// Explain implements control.Agent.
func (s service) Explain(ctx context.Context, q *controlpb.ExplainRequest) (*controlpb.ExplainReply, error) {
	if e, ok := s.a.refusals.explain(q.GetRequestId()); ok {
		raw, err := json.Marshal(e)
		if err != nil {
			return nil, fmt.Errorf("encode a refusal of the kernel: %w", err)
		}
		return &controlpb.ExplainReply{Json: raw}, nil
	}
	m, err := s.a.ask(ctx, &linepb.Message{Body: &linepb.Message_Explain{Explain: &linepb.ExplainRequest{RequestId: q.GetRequestId()}}})
	if err != nil {
		return nil, err
	}
	if e := m.GetExplainReply().GetError(); e != "" {
		return nil, status.Error(codes.NotFound, e)
	}
	return &controlpb.ExplainReply{Json: m.GetExplainReply().GetJson()}, nil
}

// Identities implements control.Agent.
func (s service) Identities(_ context.Context, q *controlpb.IdentitiesRequest) (*controlpb.IdentitiesReply, error) {
	in, v := s.a.picture()
	r := &controlpb.IdentitiesReply{}
	if v == nil {
		return r, nil
	}
	for _, id := range v.plan.Identities() {
		r.Identities = append(r.Identities, identityInfo(v, id))
	}
	r.Workloads = s.workloads(in, v)
	if !q.GetUnrecognised() {
		return r, nil
	}
	strangers, _, err := s.a.finder.Unrecognised()
	if err != nil {
		return nil, err
	}
	for _, u := range strangers {
		if s.a.cgroups.own(u.Path) {
			continue
		}
		r.Workloads = append(r.Workloads, &controlpb.Workload{Cgroup: u.Path, CgroupId: u.ID, Processes: uint32(u.Processes), Nearest: u.Nearest, Mismatch: u.Mismatch})
	}
	return r, nil
}

func identityInfo(v *view, id *compile.Identity) *controlpb.IdentityInfo {
	i := &controlpb.IdentityInfo{
		Name: id.FullName(), SpiffeId: id.ID, Owner: id.Owner, Mode: id.Mode.String(), EffectiveMode: v.mode(id.Mode).String(),
		Position: id.Position.FileLine(), Number: uint32(v.numbers[id]), Selector: selectorText(id.Selector),
	}
	if !id.Expires.IsZero() {
		i.ExpiresUnixNs = id.Expires.UnixNano()
	}
	for _, e := range id.Endpoints {
		i.Endpoints = append(i.Endpoints, e.String())
	}
	for _, m := range id.MayCall {
		i.MayCall = append(i.MayCall, m.FullName())
	}
	return i
}

func selectorText(s *compile.Selector) string {
	if s == nil {
		return ""
	}
	var lines []string
	if s.All {
		lines = append(lines, "all")
	}
	if k := s.Kubernetes; k != nil {
		lines = append(lines, "kubernetes.serviceAccount="+k.ServiceAccount)
		for _, name := range slices.Sorted(maps.Keys(k.Labels)) {
			lines = append(lines, "kubernetes.labels."+name+"="+k.Labels[name])
		}
	}
	if s.SystemdUnit != "" {
		lines = append(lines, "systemd.unit="+s.SystemdUnit)
	}
	if s.CgroupPath != "" {
		lines = append(lines, "cgroup.path="+s.CgroupPath)
	}
	if s.HasUID {
		lines = append(lines, fmt.Sprintf("uid=%d", s.UID))
	}
	if s.ProcessBinary != "" {
		lines = append(lines, "process.binary="+s.ProcessBinary)
	}
	if s.ProcessDigest != "" {
		lines = append(lines, "process.digest="+s.ProcessDigest)
	}
	return strings.Join(lines, " ")
}

// Policies implements control.Agent.
func (s service) Policies(_ context.Context, q *controlpb.PoliciesRequest) (*controlpb.PoliciesReply, error) {
	in, v := s.a.picture()
	r := &controlpb.PoliciesReply{Set: policySet(in, v), Policies: policies(v)}
	if q.GetFiles() && v != nil {
		for _, f := range v.files {
			r.Files = append(r.Files, &controlpb.PolicyFile{Path: f.Path, Content: f.Content})
		}
	}
	return r, nil
}

// Relation implements control.Agent.
func (s service) Relation(ctx context.Context, q *controlpb.RelationRequest) (*controlpb.RelationReply, error) {
	m := &linepb.RelationRequest{Op: q.GetOp(), Model: q.GetModel(), Type: q.GetType(), Limit: q.GetLimit()}
	for _, t := range q.GetTuples() {
		m.Tuples = append(m.Tuples, &linepb.Tuple{User: t.GetUser(), Relation: t.GetRelation(), Object: t.GetObject()})
	}
	answer, err := s.a.ask(ctx, &linepb.Message{Body: &linepb.Message_Relation{Relation: m}})
	if err != nil {
		return nil, err
	}
	b := answer.GetRelationReply()
	if b.GetError() != "" {
		return nil, errors.New(b.GetError())
	}
	r := &controlpb.RelationReply{Allowed: b.GetAllowed(), Objects: b.GetObjects(), Text: b.GetText()}
	for _, t := range b.GetTuples() {
		r.Tuples = append(r.Tuples, &controlpb.Tuple{User: t.GetUser(), Relation: t.GetRelation(), Object: t.GetObject()})
	}
	return r, nil
}

// fetchCounters takes over what userspace has counted since the last time.
func (a *Agent) fetchCounters(ctx context.Context) {
	s := a.session.Load()
	if s == nil {
		return
	}
	m, err := s.ask(ctx, &linepb.Message{Body: &linepb.Message_Status{Status: &linepb.StatusRequest{}}})
	if err != nil {
		s.unanswered(ctx, err)
		return
	}
	s.silent = 0
	var st userspace.Status
	if json.Unmarshal(m.GetStatusReply().GetJson(), &st) != nil {
		return
	}
	for _, d := range st.Decisions {
		key := decisionKey{d.Stage, d.Reason, d.Effect, d.Enforced}
		had, known := s.counted[key]
		if d.Count < had || !known && len(s.counted) == maxCounted {
			continue // not what it counts
		}
		delta := d.Count - had
		s.counted[key] = d.Count
		a.metrics.Decided(d.Effect, d.Stage, flow.Reason(d.Reason), d.Enforced, delta)
	}
	if st.Recalled > s.recalled {
		a.metrics.CachedAnswers.Add(float64(st.Recalled - s.recalled))
		s.recalled = st.Recalled
	}
	a.health.Check("tokens", metrics.Degraded, notObtained(st.Obtained), "see tokenURL of the TokenIssuer, and whether it knows the client by its certificate")
	a.health.Check("proofs", metrics.Degraded, textError(st.Proofs.Problem), "mend what it says of userspace/proofs in the state directory, which must be its user's; what needs a proof is denied meanwhile, and it is tried again")
	a.health.Check("relations", metrics.Degraded, textError(st.Relations.Problem), "see the log; what needs a relation is denied")
}

// notObtained says which tokens cannot be had.
func notObtained(list []obtain.Status) error {
	const most = 4
	var errs []error
	for _, o := range list {
		switch {
		case o.Error == "":
			continue
		case len(errs) == most:
			return errors.Join(append(errs, errors.New("and more"))...)
		}
		errs = append(errs, fmt.Errorf("%s for its calls to %s: %s", o.ID, o.To, o.Error))
	}
	return errors.Join(errs...)
}

// unanswered ends a process that has stopped answering: it would hold on to
// its listeners and do nothing with what comes.
func (s *session) unanswered(ctx context.Context, err error) {
	if s.silent++; s.silent < maxSilence || ctx.Err() != nil {
		return
	}
	s.silent = 0
	s.a.log.Error("userspace does not answer, ending it", "pid", s.process.PID, "err", err)
	s.conn.Close() //nolint:errcheck // it is ended by that
}

// decisionKey is what decisions are counted by.
type decisionKey struct {
	stage, reason, effect string
	enforced              bool
}

// metricSources are what is read at a scrape.
func (a *Agent) metricSources() metrics.Sources {
	return metrics.Sources{
		Version: a.version, Health: a.health,
		Kernel: func() map[string]uint64 {
			c, err := a.dp.Counters()
			if err != nil {
				return nil
			}
			m := map[string]uint64{}
			for r, n := range c.Refused {
				m[string(r)] = n
			}
			return m
		},
		EventsLost:  func() uint64 { c, _ := a.dp.Counters(); return c.EventsLost },
		SamplesLost: func() uint64 { c, _ := a.dp.Counters(); return c.SamplesLost },
		Identities: func() int {
			in, _ := a.picture()
			if in.table == nil {
				return 0
			}
			return len(in.table.Cgroups)
		},
		Netns: func() int {
			if v := a.view.Load(); v != nil {
				return len(v.namespaces)
			}
			return 0
		},
		Policies: func() int {
			if v := a.inForce.Load(); v != nil {
				return len(v.plan.APIs())
			}
			return 0
		},
		Generation: func() uint64 {
			if v := a.inForce.Load(); v != nil {
				return v.generation
			}
			return 0
		},
		Revocations: func() int {
			entries, _ := a.revoked.List()
			return len(entries)
		},
		UserspaceUp:         func() bool { return a.super.Status().PID != 0 && a.session.Load() != nil },
		ObservationsRefused: a.hub.Refused,
	}
}

// release is the kernel's, as uname -r says.
func release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}
