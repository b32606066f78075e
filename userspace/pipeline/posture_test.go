// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// full is a vector that satisfies every profile here.
func full(now time.Time) *Facts {
	return &Facts{
		Quote:      fact(true, now, 10*time.Minute),
		SecureBoot: fact(true, now, time.Hour), Lockdown: fact(compile.LockdownConfidentiality, now, time.Hour),
		Digest: fact(compile.DigestSigned, now, time.Hour), Exec: fact(false, now, time.Hour), Privileged: fact(false, now, time.Hour),
		Provenance:      fact([]Build{{"https://ci.example/build@v1", "https://issuer.example"}}, now, time.Hour),
		SBOM:            fact(Bill{true, now.Add(-24 * time.Hour)}, now, time.Hour),
		Vulnerabilities: fact[[]Vulnerability](nil, now, time.Hour), Risk: fact(compile.LevelLow, now, time.Hour),
	}
}

func fact[T any](v T, now time.Time, ttl time.Duration) Fact[T] {
	return Fact[T]{Value: v, Source: "test", Measured: now, TTL: ttl, Attested: true}
}

func profile(t testing.TB, spec string) *compile.Posture {
	t.Helper()
	plan, problems := compile.Build([]load.File{{Path: "p.yaml", Content: []byte("apiVersion: sallyport.dev/v1alpha1\nkind: PostureProfile\nmetadata: {name: prod}\nspec: " + spec + "\n")}},
		compile.Options{TrustDomain: "example.org"})
	if plan == nil {
		t.Fatal(problems)
	}
	return plan.Postures()[0]
}

func TestFactsAgainstRequirements(t *testing.T) {
	now := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	vulnerability := func(edit func(*Vulnerability)) func(*Facts) {
		v := Vulnerability{Severity: compile.LevelCritical, Loaded: true, Published: now.Add(-100 * time.Hour)}
		edit(&v)
		return func(f *Facts) { f.Vulnerabilities.Value = []Vulnerability{v} }
	}
	for _, c := range []struct {
		name, spec string
		edit       func(*Facts)
		want       standing
		until      time.Duration
	}{
		{"quote", "{node: {tpmQuoteMaxAge: 5m}}", nil, suffices, 5 * time.Minute},
		{"quote, ended by its TTL", "{node: {tpmQuoteMaxAge: 15m}}", nil, suffices, 10 * time.Minute},
		{"quote is bad", "{node: {tpmQuoteMaxAge: 5m}}", func(f *Facts) { f.Quote.Value = false }, fails, 5 * time.Minute},
		{"quote is old", "{node: {tpmQuoteMaxAge: 5m}}", func(f *Facts) { f.Quote.Measured = now.Add(-5 * time.Minute) }, fails, 0},
		{"quote is stale", "{node: {tpmQuoteMaxAge: 15m}}", func(f *Facts) { f.Quote.Measured = now.Add(-10 * time.Minute) }, unknown, 0},
		{"quote of the future", "{node: {tpmQuoteMaxAge: 5m}}", func(f *Facts) { f.Quote.Measured = now.Add(2 * time.Minute) }, unknown, 0},
		{"quote of a clock that is ahead", "{node: {tpmQuoteMaxAge: 5m}}", func(f *Facts) { f.Quote.Measured = now.Add(time.Minute) }, suffices, 6 * time.Minute},
		{"no source", "{node: {secureBoot: true}}", func(f *Facts) { f.SecureBoot.Source = "" }, unknown, 0},
		{"never measured", "{node: {secureBoot: true}}", func(f *Facts) { f.SecureBoot.Measured = time.Time{} }, unknown, 0},
		{"no TTL", "{node: {secureBoot: true}}", func(f *Facts) { f.SecureBoot.TTL = 0 }, unknown, 0},
		{"claimed where attested is asked for", "{node: {secureBoot: true}}", func(f *Facts) { f.SecureBoot.Attested = false }, unknown, 0},
		{"claimed where that does", "{evidence: claimed, node: {secureBoot: true}}", func(f *Facts) { f.SecureBoot.Attested = false }, suffices, time.Hour},
		{"secure boot off", "{node: {secureBoot: true}}", func(f *Facts) { f.SecureBoot.Value = false }, fails, time.Hour},
		{"lockdown is more", "{node: {lockdown: integrity}}", nil, suffices, time.Hour},
		{"lockdown is less", "{node: {lockdown: confidentiality}}", func(f *Facts) { f.Lockdown.Value = compile.LockdownIntegrity }, fails, time.Hour},
		{"digest signed is known", "{binary: {digest: known, execAfterConnect: allow}}", nil, suffices, time.Hour},
		{"digest known is not signed", "{binary: {digest: signed, execAfterConnect: allow}}", func(f *Facts) { f.Digest.Value = compile.DigestKnown }, fails, time.Hour},
		{"digest unlisted", "{binary: {digest: known, execAfterConnect: allow}}", func(f *Facts) { f.Digest.Value = compile.DigestUnlisted }, fails, time.Hour},
		{"exec after connect", "{binary: {execAfterConnect: deny}}", func(f *Facts) { f.Exec.Value = true }, fails, time.Hour},
		{"privileged", "{binary: {execAfterConnect: allow, privileged: deny}}", func(f *Facts) { f.Privileged.Value = true }, fails, time.Hour},
		{"built", "{software: {provenance: {builder: 'https://ci.example/build@v1', issuer: 'https://issuer.example'}}}", nil, suffices, time.Hour},
		{"built, any rest", "{software: {provenance: {builder: 'https://ci.example/build@v*', issuer: 'https://issuer.example'}}}", nil, suffices, time.Hour},
		{"built by more than is said", "{software: {provenance: {builder: 'https://ci.example/build', issuer: 'https://issuer.example'}}}", nil, fails, time.Hour},
		{"built, another issuer", "{software: {provenance: {builder: 'https://ci.example/build@v1', issuer: 'https://issuer.example/x', onMissing: warn}}}", nil, fails, time.Hour},
		{"built by nobody", "{software: {provenance: {builder: 'https://ci.example/build@v1', issuer: 'https://issuer.example'}}}", func(f *Facts) { f.Provenance.Value = nil }, fails, time.Hour},
		{"built by nobody, said", "{software: {provenance: {builder: 'https://ci.example/build@v1', issuer: 'https://issuer.example', onMissing: warn}}}", func(f *Facts) { f.Provenance.Value = nil }, warns, time.Hour},
		{"bill", "{software: {sbom: {required: true}}}", func(f *Facts) { f.SBOM.Value.Made = time.Time{} }, suffices, time.Hour},
		{"no bill", "{software: {sbom: {required: true}}}", func(f *Facts) { f.SBOM.Value = Bill{} }, fails, time.Hour},
		{"bill is too old soon", "{software: {sbom: {required: true, maxAge: 24h30m}}}", nil, suffices, 30 * time.Minute},
		{"bill is too old", "{software: {sbom: {required: true, maxAge: 1d}}}", nil, fails, 0},
		{"none known", "{software: {vulnerabilities: [{severity: low, action: deny}]}}", nil, suffices, time.Hour},
		{"critical", "{software: {vulnerabilities: [{severity: high, action: deny}]}}", vulnerability(func(*Vulnerability) {}), fails, time.Hour},
		{"critical, said", "{software: {vulnerabilities: [{severity: high, action: warn}]}}", vulnerability(func(*Vulnerability) {}), warns, time.Hour},
		{"medium where high is asked", "{software: {vulnerabilities: [{severity: high, action: deny}]}}", vulnerability(func(v *Vulnerability) { v.Severity = compile.LevelMedium }), suffices, time.Hour},
		{"not loaded", "{software: {vulnerabilities: [{severity: high, action: deny, inLoadedModules: true}]}}", vulnerability(func(v *Vulnerability) { v.Loaded = false }), suffices, time.Hour},
		{"not loaded, all asked", "{software: {vulnerabilities: [{severity: high, action: deny}]}}", vulnerability(func(v *Vulnerability) { v.Loaded = false }), fails, time.Hour},
		{"not affected", "{software: {vulnerabilities: [{severity: high, action: deny}]}}", vulnerability(func(v *Vulnerability) { v.NotAffected = true }), suffices, time.Hour},
		{"not affected, not believed", "{software: {vulnerabilities: [{severity: high, action: deny, vex: ignore}]}}", vulnerability(func(v *Vulnerability) { v.NotAffected = true }), fails, time.Hour},
		{"grace", "{software: {vulnerabilities: [{severity: high, action: deny, graceAfterPublish: 101h}]}}", vulnerability(func(v *Vulnerability) { v.Published = now.Add(-101*time.Hour + time.Minute) }), suffices, time.Minute},
		{"grace is over", "{software: {vulnerabilities: [{severity: high, action: deny, graceAfterPublish: 100h}]}}", vulnerability(func(*Vulnerability) {}), fails, time.Hour},
		{"published in the future", "{software: {vulnerabilities: [{severity: high, action: deny, graceAfterPublish: 100h}]}}", vulnerability(func(v *Vulnerability) { v.Published = now.Add(time.Hour) }), fails, time.Hour},
		{"never published", "{software: {vulnerabilities: [{severity: high, action: deny, graceAfterPublish: 100h}]}}", vulnerability(func(v *Vulnerability) { v.Published = time.Time{} }), fails, time.Hour},
		{"risk", "{risk: {max: medium}}", func(f *Facts) { f.Risk.Value = compile.LevelMedium }, suffices, time.Hour},
		{"more risk", "{risk: {max: medium}}", func(f *Facts) { f.Risk.Value = compile.LevelHigh }, fails, time.Hour},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, f := profile(t, c.spec), full(now)
			if len(p.Requirements) != 1 {
				t.Fatalf("%d requirements", len(p.Requirements))
			}
			if c.edit != nil {
				c.edit(f)
			}
			got, until := f.hold(&p.Requirements[0], p.Attested, now)
			if got != c.want {
				t.Errorf("stands %d, want %d", got, c.want)
			}
			if got != unknown && c.until != 0 && !until.Equal(now.Add(c.until)) {
				t.Errorf("until %s, want %s", until, now.Add(c.until))
			}
			if got, _ := (*Facts)(nil).hold(&p.Requirements[0], p.Attested, now); got != unknown {
				t.Errorf("without facts it stands %d", got)
			}
		})
	}
}

// posturePolicies: POSTURE is that of the policy, OWN that of rule own.
const posturePolicies = `
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: checkout, namespace: shop}
spec: {owner: o, spiffeID: "spiffe://example.org/checkout", mayCall: [payments]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: payments, namespace: shop}
spec: {owner: o, spiffeID: "spiffe://example.org/payments", endpoints: ["10.0.0.11:8080"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: PostureProfile
metadata: {name: hard, namespace: shop}
spec: {node: {tpmQuoteMaxAge: 5m, secureBoot: true}, binary: {execAfterConnect: deny}}
---
apiVersion: sallyport.dev/v1alpha1
kind: PostureProfile
metadata: {name: soft, namespace: shop}
spec: {risk: {max: low}, software: {vulnerabilities: [{severity: high, action: warn}]}, onUnknown: warn}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: payments, namespace: shop}
spec:
  mode: enforce
  protect: {identity: payments, ports: [8080], protocol: http}
  POSTURE
  otherwise: allow
  rules:
    - {name: plain, from: [checkout], http: [GET /plain]}
    - {name: own, from: [checkout], http: [GET /own, GET /both]OWN}
    - {name: never, effect: deny, http: [GET /no]}
`

type postureWorld struct {
	*Pipeline
	env   Env
	plan  *compile.Plan
	now   time.Time
	facts *Facts
}

func newPostureWorld(t testing.TB, policy, rule string) *postureWorld {
	t.Helper()
	w := &postureWorld{now: time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)}
	text := strings.NewReplacer("POSTURE", policy, "OWN", rule).Replace(posturePolicies)
	var problems []load.Problem
	if w.plan, problems = compile.Build([]load.File{{Path: "p.yaml", Content: []byte(text)}}, compile.Options{TrustDomain: "example.org"}); w.plan == nil {
		t.Fatal(problems)
	}
	w.Pipeline = New(Options{Ceiling: flow.ModeEnforce, Now: func() time.Time { return w.now },
		Posture: func(*flow.Request, *compile.Identity) *Facts { return w.facts }})
	w.SetPlan(w.plan)
	w.env = Env{Loop: w.NewLoop(), Task: Direct{}}
	return w
}

func (w *postureWorld) decide(path string, d *flow.Decision) {
	r := &flow.Request{Protocol: flow.ProtocolHTTP, Method: "GET", Path: path, Host: "h", Peer: flow.Peer{ID: "spiffe://example.org/checkout", Channel: flow.ChannelTunnel}}
	src, _, _ := w.plan.Identity(r.Peer.ID)
	w.Decide(w.env, r, src, w.plan.APIs()[0], d)
}

func TestPostureStage(t *testing.T) {
	insecure := func(f *Facts) { f.SecureBoot.Value = false }
	noQuote := func(f *Facts) { f.Quote.Source = "" }
	both := func(f *Facts) { insecure(f); noQuote(f) }
	risky := func(f *Facts) { f.Risk.Value = compile.LevelHigh }
	noRisk := func(f *Facts) { f.Risk.TTL = 0 }
	for _, c := range []struct {
		name, policy, rule, path string
		edit                     func(*Facts)
		nothing                  bool // no facts at all
		reason                   flow.Reason
		named, detail            string
	}{
		{name: "none asked for", path: "/plain", nothing: true},
		{name: "all known", policy: "posture: hard", path: "/plain"},
		{name: "nothing known", policy: "posture: hard", path: "/plain", nothing: true, reason: flow.ReasonPostureUnknown, detail: "posture shop/hard: node.tpmQuoteMaxAge is not known"},
		{name: "one unknown", policy: "posture: hard", path: "/plain", edit: noQuote, reason: flow.ReasonPostureUnknown, detail: "posture shop/hard: node.tpmQuoteMaxAge is not known"},
		{name: "one falls short", policy: "posture: hard", path: "/plain", edit: insecure, reason: flow.ReasonPosture, detail: "posture shop/hard: node.secureBoot is not satisfied"},
		{name: "what falls short before what is unknown", policy: "posture: hard", path: "/plain", edit: both, reason: flow.ReasonPosture, detail: "posture shop/hard: node.secureBoot is not satisfied"},
		{name: "otherwise too", policy: "posture: hard", path: "/else", edit: noQuote, reason: flow.ReasonPostureUnknown, detail: "posture shop/hard: node.tpmQuoteMaxAge is not known"},
		{name: "unknown, said", policy: "posture: soft", path: "/plain", nothing: true},
		{name: "unknown, said, but risky", policy: "posture: soft", path: "/plain", edit: risky, reason: flow.ReasonPosture, detail: "posture shop/soft: risk.max is not satisfied"},
		{name: "rule's own in place of the policy's", policy: "posture: hard", rule: ", posture: soft", path: "/own", edit: both},
		{name: "rule's own falls short", policy: "posture: soft", rule: ", posture: hard", path: "/own", edit: insecure, reason: flow.ReasonPosture, named: "own", detail: "posture shop/hard: node.secureBoot is not satisfied"},
		{name: "the others keep the policy's", policy: "posture: hard", rule: ", posture: soft", path: "/plain", edit: noQuote, reason: flow.ReasonPostureUnknown, named: "plain", detail: "posture shop/hard: node.tpmQuoteMaxAge is not known"},
		{name: "otherwise keeps the policy's", policy: "posture: hard", rule: ", posture: soft", path: "/else", edit: noQuote, reason: flow.ReasonPostureUnknown, detail: "posture shop/hard: node.tpmQuoteMaxAge is not known"},
		{name: "rule's own alone", rule: ", posture: hard", path: "/own", nothing: true, reason: flow.ReasonPostureUnknown, named: "own", detail: "posture shop/hard: node.tpmQuoteMaxAge is not known"},
		{name: "rule's own alone, another rule", rule: ", posture: hard", path: "/plain", nothing: true},
		{name: "a deny rule has none", policy: "posture: soft", rule: ", posture: soft", path: "/no", edit: noRisk, reason: flow.ReasonDenyRule, named: "never"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newPostureWorld(t, c.policy, c.rule)
			w.SetTracing(true)
			if !c.nothing {
				w.facts = full(w.now)
			}
			if c.edit != nil {
				c.edit(w.facts)
			}
			var d flow.Decision
			w.decide(c.path, &d)
			if d.Reason != c.reason || d.Rule != c.named && c.reason != "" || d.Detail != c.detail || !d.Enforced {
				t.Errorf("%+v", d)
			}
			if (d.Effect == flow.EffectAllow) != (c.reason == "") {
				t.Errorf("effect %s for %q", d.Effect, d.Reason)
			}
			if c.reason != "" && c.detail != "" && d.Stage != flow.StagePosture {
				t.Errorf("stage %s", d.Stage)
			}
			for _, s := range d.Steps {
				if s.Stage == flow.StagePosture && s.Detail == "" {
					t.Errorf("a step without words: %+v", s)
				}
			}
		})
	}
}

// TestPostureWarningsAreShown holds that what a profile only asks to say is
// in the trace.
func TestPostureWarningsAreShown(t *testing.T) {
	w := newPostureWorld(t, "posture: soft", "")
	w.SetTracing(true)
	w.facts = full(w.now)
	w.facts.Risk.Source = ""
	w.facts.Vulnerabilities.Value = []Vulnerability{{Severity: compile.LevelCritical}}
	var d flow.Decision
	w.decide("/plain", &d)
	var said []string
	for _, s := range d.Steps {
		if s.Stage == flow.StagePosture {
			said = append(said, s.Detail)
		}
	}
	want := []string{"posture shop/soft: software.vulnerabilities.high is not satisfied", "posture shop/soft: risk.max is not known", "posture shop/soft"}
	if d.Effect != flow.EffectAllow || strings.Join(said, "|") != strings.Join(want, "|") {
		t.Errorf("%s, said %q", d.Effect, said)
	}
}

// TestPostureEndsTheDecision holds that what an allowed call rests on ends
// with the facts.
func TestPostureEndsTheDecision(t *testing.T) {
	for _, c := range []struct{ policy, rule, path string }{
		{"posture: hard", "", "/plain"}, {"posture: hard", "", "/else"}, {"posture: soft", ", posture: hard", "/own"},
	} {
		w := newPostureWorld(t, c.policy, c.rule)
		w.facts = full(w.now)
		var d flow.Decision
		w.decide(c.path, &d)
		if want := w.now.Add(5 * time.Minute); d.Effect != flow.EffectAllow || !d.Until.Equal(want) {
			t.Errorf("%s %s: %s until %s, want %s", c.policy, c.path, d.Effect, d.Until, want)
		}
		w.now = w.now.Add(5 * time.Minute)
		w.decide(c.path, &d)
		if d.Effect != flow.EffectDeny || d.Reason != flow.ReasonPosture {
			t.Errorf("%s %s: then %s %s", c.policy, c.path, d.Effect, d.Reason)
		}
	}
}

func TestPostureDoesNotAllocate(t *testing.T) {
	w := newPostureWorld(t, "posture: soft", ", posture: hard")
	w.facts = full(w.now)
	var d flow.Decision
	r := &flow.Request{Protocol: flow.ProtocolHTTP, Method: "GET", Path: "/own", Host: "h", Peer: flow.Peer{ID: "spiffe://example.org/checkout", Channel: flow.ChannelTunnel}}
	src, _, _ := w.plan.Identity(r.Peer.ID)
	w.Decide(w.env, r, src, w.plan.APIs()[0], &d)
	if n := testing.AllocsPerRun(100, func() { w.Decide(w.env, r, src, w.plan.APIs()[0], &d) }); n != 0 || d.Effect != flow.EffectAllow {
		t.Errorf("%v allocations, %s", n, d.Effect)
	}
}

// TestPostureNeedsTheProxy holds that the kernel never keeps a verdict that
// rests on a posture.
func TestPostureNeedsTheProxy(t *testing.T) {
	w := newPostureWorld(t, "posture: soft", "")
	api := w.plan.APIs()[0]
	for _, id := range w.plan.Identities() {
		if allow, decided := api.IdentityOnly(id); allow && decided {
			t.Errorf("%s: allowed by identity alone", id.Name)
		}
	}
}
