// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

type decisionCase struct {
	name    string
	api     string
	request *flow.Request
	stage   flow.Stage
	reason  flow.Reason
	rule    string
}

func upgrade(r *flow.Request) { r.Upgrade = true }

func decisionCases(w *world) []decisionCase {
	req := w.request
	account := header("X-Account", "a1")
	good := w.token()
	return []decisionCase{
		{"allowed with everything", "payments", req("POST /v1/payments", bearer(good), account), flow.StagePolicy, "", "create"},
		{"allowed by token alone", "payments", req("GET /v1/payments/5", bearer(w.token("cnf"))), flow.StagePolicy, "", "read"},
		{"plaintext", "payments", req("GET /ok", channel(flow.ChannelPlaintext), anonymous), flow.StageChannel, flow.ReasonMTLSRequired, ""},
		{"no identity on this node", "payments", req("GET /ok", channel(flow.ChannelKernel), anonymous), flow.StageIdentity, flow.ReasonNoIdentity, ""},
		{"unknown identity", "payments", req("GET /ok", func(r *flow.Request) { r.Peer.ID = "spiffe://example.org/who" }), flow.StageIdentity, flow.ReasonUnknownIdentity, ""},
		{"certificate over", "payments", req("GET /ok", func(r *flow.Request) { r.Peer.NotAfter = w.now.Add(-time.Second) }), flow.StageIdentity, flow.ReasonExpired, ""},
		{"identity over", "payments", req("POST /v1/payments", w.as("retired"), bearer(good), account), flow.StageGovernance, flow.ReasonIdentityExpired, ""},
		{"outside mayCall", "payments", req("GET /ok", w.as("stranger")), flow.StagePolicy, flow.ReasonMayCall, ""},
		{"no rule", "payments", req("DELETE /v1/payments"), flow.StagePolicy, flow.ReasonNoRule, ""},
		{"another method", "payments", req("GET /v1/payments", bearer(good)), flow.StagePolicy, flow.ReasonNoRule, ""},
		{"deny beats allow", "payments", req("GET /debug/vars"), flow.StagePolicy, flow.ReasonDenyRule, "no-debug"},
		{"deny rule, condition false", "payments", req("GET /when", header("X-Kind", "good")), flow.StagePolicy, "", "any-debug"},
		{"deny rule, condition true", "payments", req("GET /when", header("X-Kind", "bad")), flow.StagePolicy, flow.ReasonDenyRule, "no-when"},
		{"deny rule, condition errs", "payments", req("GET /when"), flow.StageCondition, flow.ReasonConditionErr, "no-when"},
		{"unclean target", "payments", req("GET /a//b"), flow.StageProtocol, flow.ReasonTarget, ""},
		{"no token", "payments", req("GET /v1/payments/5"), flow.StageToken, flow.ReasonTokenMissing, "read"},
		{"token twice", "payments", req("GET /v1/payments/5", bearer(good), bearer(good)), flow.StageToken, flow.ReasonTokenPlace, "read"},
		{"token in the query", "payments", req("GET /v1/payments/5?access_token=x"), flow.StageToken, flow.ReasonTokenPlace, "read"},
		{"not a token", "payments", req("GET /v1/payments/5", bearer("abc")), flow.StageToken, flow.ReasonTokenMalformed, "read"},
		{"token expired", "payments", req("GET /v1/payments/5", bearer(w.token("exp=1700000000", "iat=1699999900"))), flow.StageToken, flow.ReasonTokenExpired, "read"},
		{"other audience", "payments", req("GET /v1/payments/5", bearer(w.token(`aud="other"`))), flow.StageToken, flow.ReasonTokenAudience, "read"},
		{"other issuer", "payments", req("GET /v1/payments/5", bearer(w.token(`iss="https://evil.example"`))), flow.StageToken, flow.ReasonTokenIssuer, "read"},
		{"scope missing", "payments", req("POST /v1/payments", bearer(w.token(`scope="payments:read"`)), account), flow.StageToken, flow.ReasonTokenScope, "create"},
		{"token unbound", "payments", req("POST /v1/payments", bearer(w.token("cnf")), account), flow.StageToken, flow.ReasonTokenUnbound, "create"},
		{"bound to another", "payments", req("POST /v1/payments", bearer(good), account, func(r *flow.Request) { r.Peer.Thumbprints = [][32]byte{{9}} }), flow.StageToken, flow.ReasonTokenBinding, "create"},
		{"signature broken", "payments", req("GET /v1/payments/5", bearer(good[:len(good)-4]+"AAAA")), flow.StageToken, flow.ReasonTokenSignature, "read"},
		{"relation missing", "payments", req("POST /v1/payments", bearer(w.token(`sub="bob"`, `jti="t2"`)), account), flow.StageRelation, flow.ReasonRelation, "create"},
		{"relation's value", "payments", req("POST /v1/payments", bearer(good), header("X-Account", "a1 or:all")), flow.StageRelation, flow.ReasonRelationTemplate, "create"},
		{"header twice", "payments", req("POST /v1/payments", bearer(good), account, account), flow.StageRelation, flow.ReasonHeaderAmbiguous, "create"},
		{"condition false", "payments", req("POST /v1/payments", bearer(w.token(`groups=["test"]`, `jti="t3"`)), account), flow.StageCondition, flow.ReasonCondition, "create"},
		{"condition errs", "payments", req("GET /v1/claims", bearer(good)), flow.StageCondition, flow.ReasonConditionErr, "claims"},
		{"the farthest rule explains", "payments", req("GET /v1/export", bearer(good)), flow.StageCondition, flow.ReasonCondition, "export-strong"},
		{"opaque, identity alone", "ledger", req("", channel(flow.ChannelKernel)), flow.StagePolicy, "", "settle"},
		{"opaque, another identity", "ledger", req("", w.as("stranger")), flow.StagePolicy, flow.ReasonNoRule, ""},
		{"permissive plaintext", "shared", req("GET /hello", channel(flow.ChannelPlaintext), anonymous), flow.StagePolicy, "", "hello"},
		{"permissive, a rule with from", "shared", req("GET /inner", channel(flow.ChannelPlaintext), anonymous), flow.StageIdentity, flow.ReasonNoIdentity, ""},
		{"otherwise allow", "odd", req("GET /else"), flow.StagePolicy, "", ""},
		{"otherwise allow, a rule speaks of it", "odd", req("GET /items/8"), flow.StageRelation, flow.ReasonRelation, "items"},
		{"upgrade by the rule that lists it", "odd", req("GET /live/7", upgrade), flow.StagePolicy, "", "live"},
		{"the same without upgrade", "odd", req("GET /live/7"), flow.StagePolicy, "", "plain"},
		{"upgrade, the rule that lists it explains", "odd", req("GET /live/closed", upgrade), flow.StageCondition, flow.ReasonCondition, "live"},
		{"upgrade that a deny rule speaks of", "odd", req("GET /live/denied", upgrade), flow.StagePolicy, flow.ReasonDenyRule, "no-live"},
		{"upgrade, otherwise allow", "odd", req("GET /else", upgrade), flow.StagePolicy, flow.ReasonUpgrade, ""},
		{"upgrade that the rule does not list", "watched", req("GET /items/8", upgrade), flow.StagePolicy, flow.ReasonUpgrade, "items"},
		{"upgrade that no rule speaks of", "watched", req("GET /else", upgrade), flow.StagePolicy, flow.ReasonNoRule, ""},
		{"relation from the path", "odd", req("GET /items/7"), flow.StagePolicy, "", "items"},
	}
}

func TestDecisions(t *testing.T) {
	enforce, audit := newWorld(t, "enforce"), newWorld(t, "audit")
	audit.key, audit.tokens = enforce.key, enforce.tokens // so that both judge the same tokens
	audit.p.opt.Tokens = enforce.tokens
	audit.now = enforce.now
	for _, c := range decisionCases(enforce) {
		t.Run(c.name, func(t *testing.T) {
			d := enforce.decide(c.request, c.api)
			if d.Stage != c.stage || d.Reason != c.reason || d.Rule != c.rule {
				t.Fatalf("got %s/%s by rule %q (%s), want %s/%s by %q", d.Stage, d.Reason, d.Rule, d.Detail, c.stage, c.reason, c.rule)
			}
			if (c.reason == "") != (d.Effect == flow.EffectAllow) || d.Refused() != (c.reason != "") {
				t.Errorf("effect %s, enforced %v", d.Effect, d.Enforced)
			}
			if d.Policy != "shop/"+c.api || !strings.HasPrefix(d.Position, "world.yaml:") || strings.Count(d.Position, ":") != 1 {
				t.Errorf("policy %q at %q", d.Policy, d.Position)
			}
			checkTrace(t, &d)
			// Audit judges the same and refuses nothing.
			a := audit.decide(c.request, c.api)
			if a.Effect != d.Effect || a.Stage != d.Stage || a.Reason != d.Reason || a.Rule != d.Rule || a.Position != d.Position || a.DirectOK != d.DirectOK {
				t.Errorf("audit decides %s/%s by %q, enforce %s/%s by %q", a.Stage, a.Reason, a.Rule, d.Stage, d.Reason, d.Rule)
			}
			if a.Refused() || a.WouldDeny() != (c.reason != "") {
				t.Errorf("audit: refused %v, would deny %v", a.Refused(), a.WouldDeny())
			}
		})
	}
}

// checkTrace holds the trace of a refusal against its decision.
func checkTrace(t *testing.T, d *flow.Decision) {
	t.Helper()
	if d.Effect == flow.EffectAllow {
		if len(d.Steps) == 0 {
			return // more came in this second than are kept
		}
		if d.Steps[0].Stage != flow.StageChannel {
			t.Errorf("the trace of an allowed call begins with %+v", d.Steps[0])
		}
		return
	}
	found := false
	for i, s := range d.Steps {
		found = found || s.Stage == d.Stage && s.Reason == d.Reason
		if i > 0 && s.Stage == d.Steps[i-1].Stage && s == d.Steps[i-1] {
			t.Errorf("step %d twice: %+v", i, s)
		}
	}
	if !found {
		t.Errorf("the trace does not hold what was decided: %+v", d.Steps)
	}
}

// TestReasonsReached names the reasons of the stages that no case above
// reaches because they are reached in tests of their own or by others.
func TestReasonsReached(t *testing.T) {
	w := newWorld(t, "enforce")
	reached := map[flow.Reason]bool{}
	for _, c := range decisionCases(w) {
		reached[c.reason] = true
	}
	for _, r := range []flow.Reason{
		flow.ReasonMTLSRequired, flow.ReasonNoIdentity, flow.ReasonUnknownIdentity, flow.ReasonIdentityExpired, flow.ReasonExpired,
		flow.ReasonNoRule, flow.ReasonDenyRule, flow.ReasonMayCall, flow.ReasonCondition, flow.ReasonConditionErr,
		flow.ReasonTokenMissing, flow.ReasonTokenPlace, flow.ReasonTokenMalformed, flow.ReasonTokenExpired, flow.ReasonTokenAudience,
		flow.ReasonTokenIssuer, flow.ReasonTokenScope, flow.ReasonTokenUnbound, flow.ReasonTokenBinding, flow.ReasonTokenSignature,
		flow.ReasonRelation, flow.ReasonRelationTemplate, flow.ReasonHeaderAmbiguous, flow.ReasonTarget, flow.ReasonUpgrade,
	} {
		if !reached[r] {
			t.Errorf("no case reaches %s", r)
		}
	}
}

// TestCeilingComposes holds every mode under every ceiling, where a call
// arrives and where it leaves: the stages find the same, the smaller of the two
// says whether it has an effect, and the record says so.
func TestCeilingComposes(t *testing.T) {
	modes := []flow.Mode{flow.ModeObserve, flow.ModeAudit, flow.ModeEnforce}
	for _, mode := range modes {
		for _, ceiling := range modes {
			w := newWorld(t, mode.String())
			w.p.opt.Ceiling = ceiling
			enforced := mode == flow.ModeEnforce && ceiling == flow.ModeEnforce
			for reason, req := range map[flow.Reason]*flow.Request{
				flow.ReasonOK:           w.request("POST /v1/payments", bearer(w.token()), header("X-Account", "a1")),
				flow.ReasonNoRule:       w.request("DELETE /v1/payments"),
				flow.ReasonTokenMissing: w.request("POST /v1/payments", header("X-Account", "a1")),
				flow.ReasonDenyRule:     w.request("GET /debug/x"),
			} {
				d := w.decide(req, "payments")
				refusal := reason != flow.ReasonOK
				if d.Reason != reason || d.Refused() != (refusal && enforced) || d.WouldDeny() != (refusal && !enforced) || refusal && len(d.Steps) == 0 {
					t.Errorf("%s under %s, %q: %+v", mode, ceiling, reason, d)
				}
				w.env.Loop.Record(req, w.api("payments"), &d, Outcome{})
				raw, _ := w.p.TakeRecords(1)
				var rec Record
				if len(raw) != 1 || json.Unmarshal(raw[0], &rec) != nil {
					t.Fatalf("recorded %q", raw)
				}
				if rec.WouldDeny != d.WouldDeny() || rec.Mode != flow.MinMode(mode, ceiling).String() || rec.Reason != reason {
					t.Errorf("%s under %s, %q is recorded as %+v", mode, ceiling, reason, rec)
				}
			}
			src := *w.identity("checkout")
			src.Mode = mode
			var d flow.Decision
			w.p.DecideOutbound(w.env, w.request("GET /"), &src, w.identity("checkout"), flow.ModeObserve, &d)
			if d.Reason != flow.ReasonMayCall || d.Refused() != enforced || d.WouldDeny() == enforced {
				t.Errorf("%s under %s, leaving: %+v", mode, ceiling, d)
			}
		}
	}
}

func TestWithoutPlan(t *testing.T) {
	p := New(Options{Ceiling: flow.ModeEnforce})
	env := Env{Loop: p.NewLoop(), Task: Direct{}}
	var d flow.Decision
	p.Decide(env, &flow.Request{Method: "GET", Path: "/"}, nil, nil, &d)
	if !d.Refused() || d.Reason != flow.ReasonNotReady {
		t.Errorf("without a plan: %+v", d)
	}
	w := newWorld(t, "enforce")
	w.p.Decide(w.env, w.request("GET /"), w.identity("checkout"), nil, &d)
	if !d.Refused() || d.Reason != flow.ReasonNoPolicy {
		t.Errorf("without a policy: %+v", d)
	}
}

// TestWithoutEngines refuses what needs a stage that is not there.
func TestWithoutEngines(t *testing.T) {
	w := newWorld(t, "enforce")
	good := w.request("POST /v1/payments", bearer(w.token()), header("X-Account", "a1"))
	w.p.opt.Relations = nil
	if d := w.decide(good, "payments"); !d.Refused() || d.Reason != flow.ReasonRelationUnavailable {
		t.Errorf("without relations: %+v", d)
	}
	w.p.opt.Relations = relation.Unavailable(relation.ErrNoModel)
	if d := w.decide(good, "payments"); !d.Refused() || d.Reason != flow.ReasonRelationUnavailable {
		t.Errorf("with an engine that is down: %+v", d)
	}
	w.p.opt.Tokens = nil
	if d := w.decide(good, "payments"); !d.Refused() || d.Reason != flow.ReasonTokenUnavailable {
		t.Errorf("without tokens: %+v", d)
	}
	w.p.opt.Anomalies = nil
	if d := w.decide(w.request("GET /items/7"), "watched"); !d.Refused() || d.Reason != flow.ReasonAnomalyErr {
		t.Errorf("without anomalies: %+v", d)
	}
}

func TestRevocations(t *testing.T) {
	w := newWorld(t, "enforce")
	revoke := func(kind identity.RevocationKind, value string) {
		t.Helper()
		r := identity.Revocation{Kind: kind, Value: value, Since: w.now}
		list, err := identity.NewRevocations([]identity.Revocation{r}, 2)
		if err != nil {
			t.Fatal(err)
		}
		w.p.SetRevocations(list)
		if err := w.tokens.SetRevocations([]token.Revocation{{Kind: string(kind), Value: value, Since: w.now}}); err != nil {
			t.Fatal(err)
		}
	}
	r := w.request("GET /v1/payments/5", bearer(w.token()))
	if d := w.decide(r, "payments"); d.Effect != flow.EffectAllow {
		t.Fatalf("before: %+v", d)
	}
	for _, c := range []struct {
		kind   identity.RevocationKind
		value  string
		reason flow.Reason
	}{
		{identity.RevokeIdentity, w.identity("checkout").ID, flow.ReasonIdentityRevoked},
		{identity.RevokeSerial, "abc1", flow.ReasonCertificateRevoked},
		{identity.RevokeJTI, "t1", flow.ReasonTokenRevoked},
		{identity.RevokeSubject, issuerURL + "|alice", flow.ReasonTokenRevoked},
		{identity.RevokeIssuer, issuerURL, flow.ReasonTokenRevoked},
	} {
		before := w.p.Generation()
		revoke(c.kind, c.value)
		if w.p.Generation() == before {
			t.Errorf("%s: the generation stayed", c.kind)
		}
		if d := w.decide(r, "payments"); !d.Refused() || d.Reason != c.reason {
			t.Errorf("%s: %s/%s, want %s", c.kind, d.Stage, d.Reason, c.reason)
		}
	}
	w.p.SetRevocations(nil)
	if err := w.tokens.SetRevocations(nil); err != nil {
		t.Fatal(err)
	}
	if d := w.decide(r, "payments"); d.Effect != flow.EffectAllow {
		t.Errorf("after: %+v", d)
	}
}

// TestGrant checks what an allowed call rests on.
func TestGrant(t *testing.T) {
	w := newWorld(t, "enforce")
	d := w.decide(w.request("POST /v1/payments", bearer(w.token()), header("X-Account", "a1")), "payments")
	if want := w.now.Add(5 * time.Minute); !d.Until.Equal(want) {
		t.Errorf("until %v, want the token's end %v", d.Until, want)
	}
	if d.Subjects[0] != w.identity("checkout").ID || d.Subjects[1] != issuerURL+"|alice" || d.Subjects[2] != issuerURL+"|t1" {
		t.Errorf("subjects %q", d.Subjects)
	}
	if d.Template != "/v1/payments" || d.DirectOK {
		t.Errorf("template %q, direct %v", d.Template, d.DirectOK)
	}
	d = w.decide(w.request("", channel(flow.ChannelKernel)), "ledger")
	if !d.DirectOK || !d.Until.Equal(w.now.Add(10*time.Minute)) {
		t.Errorf("same node, identity alone: direct %v, until %v", d.DirectOK, d.Until)
	}
	if d = w.decide(w.request(""), "ledger"); d.DirectOK {
		t.Error("direct across nodes")
	}
}

// TestRelationWaits asks the engine once and then the cache; a deleted tuple
// refuses at once.
func TestRelationWaits(t *testing.T) {
	w := newWorld(t, "enforce")
	r := w.request("POST /v1/payments", bearer(w.token()), header("X-Account", "a1"))
	for i := range 3 {
		if d := w.decide(r, "payments"); d.Effect != flow.EffectAllow {
			t.Fatalf("%d: %+v", i, d)
		}
	}
	if w.blocks != 1 {
		t.Errorf("waited %d times, want once", w.blocks)
	}
	tu := relation.Tuple{User: "user:alice", Relation: "can_pay", Object: "account:a1"}
	if err := w.relations.Delete(t.Context(), "shop/shop", []relation.Tuple{tu}); err != nil {
		t.Fatal(err)
	}
	if d := w.decide(r, "payments"); d.Reason != flow.ReasonRelation {
		t.Errorf("after the delete: %+v", d)
	}
}

func TestOutbound(t *testing.T) {
	w := newWorld(t, "enforce")
	decide := func(src, dst string, edits ...func(*flow.Request)) flow.Decision {
		var d flow.Decision
		r := w.request("", append([]func(*flow.Request){w.as(src), channel(flow.ChannelKernel)}, edits...)...)
		w.p.DecideOutbound(w.env, r, w.identity(src), w.identity(dst), flow.ModeEnforce, &d)
		return d
	}
	if d := decide("checkout", "payments"); d.Effect != flow.EffectAllow {
		t.Errorf("within mayCall: %+v", d)
	}
	if d := decide("checkout", "stranger"); !d.Refused() || d.Reason != flow.ReasonMayCall || !strings.HasPrefix(d.Position, "world.yaml:") {
		t.Errorf("outside mayCall: %+v", d)
	}
	if d := decide("stranger", "payments"); d.Refused() || !d.WouldDeny() {
		t.Errorf("outside mayCall, audit: %+v", d)
	}
	if d := decide("retired", "payments"); d.Reason != flow.ReasonIdentityExpired {
		t.Errorf("expired: %+v", d)
	}
	var d flow.Decision
	w.p.DecideOutbound(w.env, w.request("", anonymous), nil, w.identity("payments"), flow.ModeEnforce, &d)
	if !d.Refused() || d.Reason != flow.ReasonNoIdentity {
		t.Errorf("no identity: %+v", d)
	}
	w.p.DecideOutbound(w.env, w.request("", anonymous), nil, w.identity("payments"), flow.ModeAudit, &d)
	if d.Refused() || !d.WouldDeny() || d.Reason != flow.ReasonNoIdentity {
		t.Errorf("no identity, where the kernel is in audit: %+v", d)
	}
}

func TestPlanSwap(t *testing.T) {
	w := newWorld(t, "enforce")
	r := w.request("GET /ok")
	old, before := w.api("payments"), w.p.Generation()
	rechecked := 0
	h := w.p.Live().Add(Stream{Kill: func(flow.Reason) {}, Recheck: func() { rechecked++ }})
	defer w.p.Live().Remove(h)
	plan, problems := compile.Build([]load.File{
		{Path: "other.yaml", Content: []byte(strings.ReplaceAll(strings.ReplaceAll(worldPolicies, "MODE", "enforce"), "GET /ok", "GET /okay"))},
		{Path: "shop.fga", Content: []byte(worldModel)},
	}, compile.Options{TrustDomain: "example.org", Node: "n1"})
	if plan == nil {
		t.Fatal(problems)
	}
	w.p.SetPlan(plan)
	w.plan = plan
	if w.p.Generation() == before || rechecked != 1 {
		t.Errorf("generation %d, rechecked %d", w.p.Generation(), rechecked)
	}
	if d := w.decide(r, "payments"); d.Reason != flow.ReasonNoRule || !strings.HasPrefix(d.Position, "other.yaml:") {
		t.Errorf("under the new plan: %+v", d)
	}
	var d flow.Decision // a connection that still holds the old one
	w.p.Decide(w.env, r, nil, old, &d)
	if !strings.HasPrefix(d.Position, "world.yaml:") {
		t.Errorf("position of the old plan: %q", d.Position)
	}
}
