// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/appcerts"
	"github.com/sallyport-dev/sallyport/agent/datapath"
	"github.com/sallyport-dev/sallyport/agent/keys"
	"github.com/sallyport-dev/sallyport/agent/metrics"
	"github.com/sallyport-dev/sallyport/agent/revocations"
	"github.com/sallyport-dev/sallyport/agent/workload"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/watch"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// ambiguousID is the name under which what several identities claim is known
// to the kernel: it is refused everything.
const ambiguousID = "ambiguous"

// policiesChanged takes what the watcher found. A set that was refused comes
// without a plan: the one in force stays.
func (a *Agent) policiesChanged(e watch.Event) {
	a.reconcile(func(in *inputs) {
		in.problems = e.Problems
		in.lastGood = e.FromLastGood || e.Rejected()
		a.noteProblems(e)
		if e.Plan == nil || e.Plan == in.plan {
			return
		}
		in.plan, in.files, in.loaded = e.Plan, e.Files, time.Now()
		in.generation++
	})
}

// noteProblems shows a refused set in log, metric and status.
func (a *Agent) noteProblems(e watch.Event) {
	var refused []string
	for _, p := range e.Problems {
		if p.Severity == load.Error {
			refused = append(refused, p.String())
			a.log.Error("policy refused", "problem", p.String())
		} else {
			a.log.Warn("policy warning", "problem", p.String())
		}
	}
	if len(refused) == 0 {
		a.health.Clear("policies")
		return
	}
	a.metrics.PolicyErrors.Inc()
	a.health.Set("policies", metrics.Degraded, fmt.Sprintf("%d errors in %s; the last good set stays in force: %s", len(refused), a.cfg.PolicyDir, refused[0]),
		fmt.Sprintf("sallyport policy validate --trust-domain %s --node %s %s", a.cfg.TrustDomain, a.cfg.Node, a.cfg.PolicyDir))
}

// workloadsChanged takes a new table of workloads. The namespaces of the one
// before are closed when it returns.
func (a *Agent) workloadsChanged(t *workload.Table) {
	a.reconcile(func(in *inputs) { in.table = t })
	a.health.Check("workloads", metrics.Degraded, textError(strings.Join(t.Problems, "; ")), "see the log")
}

// revocationsChanged takes the whole list of revocations.
func (a *Agent) revocationsChanged(entries []revocations.Entry, generation uint64) {
	if s := a.session.Load(); s != nil {
		s.sendRevocations(entries, generation)
	}
	a.reconcile(func(in *inputs) { in.revoked = revokedIdentities(entries) })
}

// reconcile changes an input and brings everything in line with it: listeners
// and programs in namespaces, the kernel's maps, the userspace process. It
// runs to its end before the next one starts.
func (a *Agent) reconcile(change func(*inputs)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.in.plan
	change(&a.in)
	if a.current.Err() != nil {
		return // nothing may be wired any more: what there is is being closed
	}
	shown := a.in
	a.shown.Store(&shown)
	if before != a.in.plan {
		a.planChanged()
	}
	if a.in.plan == nil || a.in.table == nil || a.in.table.Of < a.in.recognising {
		// Before the first plan the kernel holds what an earlier agent left,
		// and before workloads were looked for under the present one, what
		// was there before: a table of other identities would have the
		// enforced pass for nobody. The next table is on its way.
		return
	}
	errs := []error{a.openNamespaces()}
	v, err := a.makeView()
	errs = append(errs, err)
	if err != nil {
		// The plan in force stays so; what is revoked and who is gone is not
		// kept waiting.
		v = a.view.Load().without(a.in.table, a.in.revoked)
	}
	taken := false
	if v != nil {
		taken, err = a.bringInForce(v)
		errs = append(errs, err)
	}
	a.dropNamespaces()
	err = errors.Join(errs...)
	a.again.Store(err != nil)
	a.health.Check("reconcile", metrics.Unhealthy, err, "see the log; what is enforced refuses meanwhile, and it is tried again")
	if taken {
		a.inForce.Store(v) // after what went wrong is known: no status is ready without it
	}
	if err != nil {
		a.log.Error("state not brought in line", "err", err)
	}
}

// bringInForce makes a view what userspace and the kernel go by, and says
// whether they do; where there is no userspace process, the next one will.
func (a *Agent) bringInForce(v *view) (taken bool, err error) {
	var errs []error
	a.view.Store(v)
	a.readAppCertificates(v)
	a.followHosts(v)
	s := a.session.Load()
	if s != nil && v.plan == a.in.plan {
		errs = append(errs, s.sendView(v, a.in.files))
	}
	if a.applied != v.plan {
		a.followIssuers(v.plan)
	}
	applied := errors.Join(a.reserve(v), a.voidVerdicts(v, a.applied), a.applyState(a.state(v)))
	errs = append(errs, applied, a.adopt(v), a.sweepLive(v))
	a.applied = v.plan
	return applied == nil && (s == nil || s.generation == v.generation), errors.Join(errs...)
}

// followHosts has the hosts looked up that the egress of this node's
// identities names.
func (a *Agent) followHosts(v *view) {
	var list []string
	for _, id := range v.plan.Identities() {
		if id.Selector == nil {
			continue
		}
		for _, e := range id.Egress {
			if e.Host != "" {
				list = append(list, e.Host)
			}
		}
	}
	a.hosts.Set(list)
}

// readAppCertificates reads the certificates that the view's policies name.
func (a *Agent) readAppCertificates(v *view) {
	var list []appcerts.Source
	for _, api := range v.plan.APIs() {
		if api.AppTLS.Ends() && v.local[api.Identity] {
			list = append(list, appcerts.Source{API: api.Name, Certificate: api.Certificate, Key: api.Key, CA: api.CA})
		}
	}
	a.appcerts.Set(list)
	a.health.Check("app-certificates", metrics.Degraded, a.appcerts.Problem(), "mend the file; what was read of it before stays")
}

// rereadAppCertificates takes over what has changed in their files.
func (a *Agent) rereadAppCertificates() {
	a.appcerts.Reread()
	a.health.Check("app-certificates", metrics.Degraded, a.appcerts.Problem(), "mend the file; what was read of it before stays")
	a.mu.Lock()
	defer a.mu.Unlock()
	if s := a.session.Load(); s != nil && s.generation > 0 {
		if err := s.sendAppCertificates(); err != nil {
			a.log.Error("application certificates not sent", "err", err)
		}
	}
}

// maxShownChanges bounds how many changes of the kernel's state one reconcile
// logs.
const maxShownChanges = 100

// applyState brings the kernel in line with the state, also where that is the
// one of before: something else may have changed it meanwhile.
func (a *Agent) applyState(s datapath.State) error {
	if a.log.Enabled(a.current, slog.LevelDebug) {
		changes := a.wanted.Diff(s)
		for i, c := range changes {
			if i == maxShownChanges {
				a.log.Debug("more kernel state changes", "count", len(changes)-i)
				break
			}
			a.log.Debug("kernel state changes", "change", c.String())
		}
	}
	a.wanted = s
	return a.dp.Apply(s)
}

// planChanged tells those who follow the plan and not the view.
func (a *Agent) planChanged() {
	plan := a.in.plan
	ids := make([]workload.Identity, 0, len(plan.Identities()))
	for _, id := range plan.Identities() {
		if w, ok := recognised(id); ok {
			ids = append(ids, w)
		}
	}
	a.in.recognising = a.finder.SetIdentities(ids)
	a.log.Info("policies in force", "digest", plan.Digest(), "generation", a.in.generation, "identities", len(plan.Identities()), "policies", len(plan.APIs()))
}

// followIssuers has the keys of the plan's issuers fetched. Userspace knows
// the plan by then, so that it can take them.
func (a *Agent) followIssuers(plan *compile.Plan) {
	issuers := plan.Issuers()
	sources := make([]keys.Source, 0, len(issuers))
	for _, i := range issuers {
		if !i.HasKeys() {
			continue // it is asked about each token
		}
		sources = append(sources, keys.Source{Issuer: i.FullName(), URL: i.JWKSURL, File: i.JWKSFile, Document: i.JWKS})
	}
	a.checkIntrospection(issuers)
	a.health.Check("key-sources", metrics.Degraded, a.keys.SetSources(sources), "see the TokenIssuer documents")
}

// recognised returns an identity as the recogniser wants it. Pods are not
// recognised: the plan says so of each identity that selects some.
func recognised(id *compile.Identity) (workload.Identity, bool) {
	s := id.Selector
	if s == nil || s.Kubernetes != nil {
		return workload.Identity{}, false
	}
	w := workload.Identity{
		Name: id.FullName(), All: s.All, Unit: s.SystemdUnit, Path: s.CgroupPath, Binary: s.ProcessBinary, Digest: s.ProcessDigest, Endpoints: id.Endpoints,
	}
	if s.HasUID {
		w.UID = &s.UID
	}
	return w, true
}

// makeView puts plan, table, namespaces and addresses together.
func (a *Agent) makeView() (*view, error) {
	plan := a.in.plan
	v := &view{
		plan: plan, files: a.in.files, loaded: a.in.loaded, generation: a.in.generation, ceiling: a.cfg.ModeCeiling,
		byNumber: map[flow.IdentityNumber]*compile.Identity{}, numbers: map[*compile.Identity]flow.IdentityNumber{},
		local: map[*compile.Identity]bool{}, homes: homesOf(plan, a.in.table), protected: map[datapath.ProtectedPort]*compile.API{},
		namespaces: map[uint64]*namespace{}, addresses: map[netip.Addr][]uint64{}, revoked: a.in.revoked,
		disputed: map[datapath.ProtectedPort]flow.Mode{},
	}
	v.expired, v.expires = expiries(plan, time.Now())
	for _, id := range plan.Identities() {
		n, err := a.dp.AllocateNumber(id.ID)
		if err != nil {
			return nil, fmt.Errorf("give %s a number: %w", id.FullName(), err)
		}
		v.numbers[id], v.byNumber[n] = n, id
	}
	for _, n := range a.in.table.Netns {
		cookie, ns := n.Cookie(), a.namespaces[n.Cookie()]
		if ns == nil {
			continue // it could not be wired
		}
		v.namespaces[cookie] = ns
		for _, addr := range ns.addressList() {
			v.addresses[addr.Unmap()] = append(v.addresses[addr.Unmap()], cookie)
		}
	}
	v.resolved = v.elsewhere(a.hosts.Addresses())
	for _, id := range plan.Identities() {
		// Who neither lives nor serves here needs no certificate here.
		v.local[id] = id.Selector != nil && (len(v.homes[id]) > 0 || len(v.servesIn(id)) > 0)
	}
	a.protect(v)
	return v, nil
}

// protect says whose the protected ports are. One that two identities serve at
// is nobody's: it refuses, and the rest stands.
func (a *Agent) protect(v *view) {
	disputes := map[string]bool{}
	for _, api := range v.plan.APIs() {
		if !v.local[api.Identity] {
			continue
		}
		for _, cookie := range v.servesIn(api.Identity) {
			for _, port := range api.Ports {
				at := datapath.ProtectedPort{Netns: cookie, Port: port}
				other := v.protected[at]
				if other == nil || other.Identity == api.Identity {
					v.protected[at] = api
					continue
				}
				disputes[fmt.Sprintf("port %d: %s and %s both serve there", port, other.Identity.FullName(), api.Identity.FullName())] = true
				v.disputed[at] = max(v.disputed[at], v.mode(other.Mode), v.mode(api.Mode))
			}
		}
	}
	for at := range v.disputed {
		delete(v.protected, at)
	}
	a.health.Check("disputed-ports", metrics.Degraded, textError(strings.Join(slices.Sorted(maps.Keys(disputes)), "; ")),
		"give one of them another port, or endpoints that tell them apart")
}

// servesIn says where an identity's ports are protected: where its workloads
// live, and where its endpoints are though it is down. One with endpoints that
// only calls from a namespace is not protected there.
func (v *view) servesIn(id *compile.Identity) []uint64 {
	cookies := map[uint64]bool{}
	for _, e := range id.Endpoints {
		for _, cookie := range v.addresses[e.Addr().Unmap()] {
			cookies[cookie] = true
		}
	}
	for _, cookie := range v.homes[id] {
		if len(id.Endpoints) == 0 || slices.ContainsFunc(id.Endpoints, func(e netip.AddrPort) bool { return e.Addr().IsLoopback() }) {
			cookies[cookie] = true
		}
	}
	out := make([]uint64, 0, len(cookies))
	for c := range cookies {
		if v.namespaces[c] != nil {
			out = append(out, c)
		}
	}
	slices.Sort(out)
	return out
}

// state is what the kernel is to hold.
func (a *Agent) state(v *view) datapath.State {
	s := datapath.State{
		Identities: map[uint64]datapath.Identity{a.cgroups.agentID: {Flags: datapath.FlagAgent, Mode: flow.ModeEnforce}},
		Paths:      map[string]datapath.Identity{}, Claims: map[netip.AddrPort]flow.IdentityNumber{},
		Egress: map[datapath.EgressRule]datapath.EgressAction{}, Protected: map[datapath.ProtectedPort]datapath.Protection{},
	}
	names := map[string]*compile.Identity{}
	before := a.ambiguous
	a.ambiguous = map[string]bool{}
	for _, id := range v.plan.Identities() {
		names[id.FullName()] = id
		for _, e := range id.Endpoints {
			s.Claims[e] = v.numbers[id]
		}
		for _, e := range id.Egress {
			prefixes := []netip.Prefix{e.Prefix}
			if e.Host != "" {
				prefixes = prefixes[:0]
				for _, a := range v.resolved[e.Host] {
					prefixes = append(prefixes, netip.PrefixFrom(a, a.BitLen()))
				}
			}
			for _, prefix := range prefixes {
				for _, port := range e.Ports {
					rule := datapath.EgressRule{Identity: v.numbers[id], Prefix: prefix, Port: port, Protocol: unix.IPPROTO_TCP}
					if e.Verify {
						if s.Egress[rule] == 0 { // else another entry lets it go there anyway
							s.Egress[rule] = datapath.EgressProxy
						}
						continue
					}
					s.Egress[rule] = datapath.EgressLeave
					rule.Protocol = unix.IPPROTO_UDP
					s.Egress[rule] = datapath.EgressLeave
				}
			}
		}
		if path := a.exactPath(id); path != "" {
			s.Paths[path] = a.kernelIdentity(v, id, 0)
		}
	}
	for _, c := range a.in.table.Cgroups {
		switch id := names[c.Identity]; {
		case id != nil:
			flags := datapath.Flags(0)
			if !a.wired(c.Netns) {
				flags = datapath.FlagPending
			}
			s.Identities[c.ID] = a.kernelIdentity(v, id, flags)
		case len(c.Ambiguous) > 0:
			s.Identities[c.ID] = a.refuseAmbiguous(v, names, c.Ambiguous)
		}
	}
	for problem := range before {
		if !a.ambiguous[problem] {
			a.health.Clear(problem)
		}
	}
	for at, mode := range v.disputed {
		if mode == flow.ModeEnforce { // less breaks no traffic
			s.Protected[at] = datapath.Protection{Identity: a.nobody(), Mode: mode}
		}
	}
	for at, api := range v.protected {
		s.Protected[at] = datapath.Protection{Identity: v.numbers[api.Identity], Mode: v.mode(api.Mode)}
	}
	return s
}

func (a *Agent) kernelIdentity(v *view, id *compile.Identity, flags datapath.Flags) datapath.Identity {
	mode := v.mode(id.Mode)
	if mode == flow.ModeEnforce || mode == flow.ModeAudit && id.Egress != nil {
		flags |= datapath.FlagEgressDeny
	}
	if v.revoked[id.ID] {
		flags |= datapath.FlagRevoked
	}
	if id.Expired(time.Now()) { // the view is outdated then
		flags |= datapath.FlagExpired
	}
	return datapath.Identity{Number: v.numbers[id], Mode: mode, Flags: flags}
}

// refuseAmbiguous is what a workload gets that several identities claim: refused in
// the strictest of their modes.
func (a *Agent) refuseAmbiguous(v *view, names map[string]*compile.Identity, claimants []string) datapath.Identity {
	mode := flow.ModeObserve
	for _, name := range claimants {
		if id := names[name]; id != nil {
			mode = max(mode, v.mode(id.Mode))
		}
	}
	problem := "ambiguous/" + strings.Join(claimants, "+")
	a.ambiguous[problem] = true
	a.health.Set(problem, metrics.Degraded,
		"one workload matches "+strings.Join(claimants, " and ")+": it has no identity and is refused", "make their select lines exclude each other")
	return datapath.Identity{Number: a.nobody(), Mode: mode, Flags: datapath.FlagRevoked}
}

// nobody is the number of what is ambiguous.
func (a *Agent) nobody() flow.IdentityNumber {
	n, err := a.dp.AllocateNumber(ambiguousID)
	if err != nil {
		a.log.Error("no number for what is ambiguous", "err", err)
	}
	a.ambiguousNumber.Store(uint32(n))
	return n
}

// exactPath is the path in the cgroup2 hierarchy at which a cgroup is the
// identity's by its name alone, "" where more has to be looked at.
func (a *Agent) exactPath(id *compile.Identity) string {
	s := id.Selector
	if s == nil || s.HasUID || s.ProcessBinary != "" || s.ProcessDigest != "" {
		return ""
	}
	if s.CgroupPath != "" {
		return filepath.Join(a.scope, s.CgroupPath)
	}
	if s.SystemdUnit != "" && !strings.Contains(s.SystemdUnit, "@") && a.scope == "/" {
		return filepath.Join("/system.slice", s.SystemdUnit)
	}
	return ""
}

// voidVerdicts voids what was decided under an earlier plan, policy by policy,
// and every verdict to a revoked identity. (A revoked source is refused by the
// kernel itself.) The new view is in place by then: see putVerdict.
func (a *Agent) voidVerdicts(v *view, before *compile.Plan) error {
	var errs []error
	for _, api := range v.plan.APIs() {
		if v.revoked[api.Identity.ID] {
			errs = append(errs, a.dp.BumpGeneration(api.Name))
		}
	}
	if before == nil || before == v.plan {
		return errors.Join(errs...)
	}
	same := map[string][32]byte{}
	for _, api := range v.plan.APIs() {
		same[api.Name] = api.Fingerprint()
	}
	for _, api := range before.APIs() {
		if now, ok := same[api.Name]; !ok || now != api.Fingerprint() {
			errs = append(errs, a.dp.BumpGeneration(api.Name))
		}
	}
	return errors.Join(errs...)
}
