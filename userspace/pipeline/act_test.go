// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/anomaly"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
)

const injection = "GET /items/7%27%20OR%201=1?page=1'+OR+'1'='1&kind=<script>"

func learned(w *world, api string) int {
	n := 0
	for _, i := range w.anomalies.List() {
		if i.API == "shop/"+api {
			n += i.Requests
		}
	}
	return n
}

func TestAnomalyThrottles(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		t.Run(mode, func(t *testing.T) {
			w := newWorld(t, mode)
			if d := w.decide(w.request(injection), "watched"); d.Effect != flow.EffectAllow {
				t.Errorf("before the warm-up it acts: %+v", d)
			}
			w.warm("watched")
			before := learned(w, "watched")
			d := w.decide(w.request(injection), "watched")
			if d.Effect != flow.EffectThrottle || d.Stage != flow.StageAnomaly || d.Reason != flow.ReasonThrottled || d.Enforced != (mode == "enforce") {
				t.Errorf("an injection: %+v", d)
			}
			if !strings.Contains(d.Detail, "expected up to") || strings.Contains(d.Detail, "script") || strings.Contains(d.Detail, "OR") {
				t.Errorf("detail %q", d.Detail)
			}
			checkTrace(t, &d)
			if n := learned(w, "watched"); n != before {
				t.Errorf("what was acted upon was learned: %d, then %d", before, n)
			}
			if d := w.decide(w.request("GET /items/7?page=3&kind=book"), "watched"); d.Effect != flow.EffectAllow {
				t.Errorf("a normal request: %+v", d)
			}
			if n := learned(w, "watched"); n != before+1 {
				t.Errorf("a normal request was not learned: %d, then %d", before, n)
			}
		})
	}
}

func TestAnomalyWarns(t *testing.T) {
	w := newWorld(t, "enforce")
	w.warm("watched")
	w.api("watched").Anomaly.Throttle = 0
	d := w.decide(w.request(injection), "watched")
	if d.Effect != flow.EffectAllow || !strings.HasPrefix(d.Detail, "unusual: ") {
		t.Errorf("under warn alone: %+v", d)
	}
}

// TestAnomalyStepsUp challenges a caller whose authentication is not fresh,
// and lets the same call pass once it is.
func TestAnomalyStepsUp(t *testing.T) {
	for _, mode := range []string{"enforce", "audit"} {
		w := newWorld(t, mode)
		authenticated := func(ago time.Duration) func(*flow.Request) {
			return bearer(w.token(fmt.Sprintf("auth_time=%d", w.now.Add(-ago).Unix())))
		}
		w.warm("guarded", authenticated(time.Hour))
		before := learned(w, "guarded")
		for name, token := range map[string]func(*flow.Request){
			"an hour ago": authenticated(time.Hour), "five minutes ago": authenticated(5 * time.Minute),
			"in an hour": authenticated(-time.Hour), "never": bearer(w.token()),
		} {
			d := w.decide(w.request(injection, token), "guarded")
			if d.Effect != flow.EffectStepUp || d.Stage != flow.StageAnomaly || d.Reason != flow.ReasonAnomalyStepUp || d.Challenge != ", max_age=300" || d.Enforced != (mode == "enforce") {
				t.Errorf("%s, authenticated %s: %+v", mode, name, d)
			}
			if d.Rule != "items" || !strings.Contains(d.Detail, "expected up to") || strings.Contains(d.Detail, "script") {
				t.Errorf("rule %q, detail %q", d.Rule, d.Detail)
			}
			checkTrace(t, &d)
		}
		if n := learned(w, "guarded"); n != before {
			t.Errorf("what was challenged was learned: %d, then %d", before, n)
		}
		for range 3 { // what the challenge asks for ends it
			d := w.decide(w.request(injection, authenticated(4*time.Minute)), "guarded")
			if d.Effect != flow.EffectAllow || !d.Until.Equal(w.now.Add(time.Minute)) || !strings.HasPrefix(d.Detail, "unusual: the authentication is fresh; ") {
				t.Errorf("%s, authenticated of late: %+v", mode, d)
			}
		}
		if d := w.decide(w.request("GET /items/7?page=3&kind=book", authenticated(time.Hour)), "guarded"); d.Effect != flow.EffectAllow {
			t.Errorf("a normal request: %+v", d)
		}
		w.api("guarded").Anomaly.Throttle = 0.02
		if d := w.decide(w.request(injection, authenticated(time.Second)), "guarded"); d.Reason != flow.ReasonThrottled {
			t.Errorf("what is stronger does not win: %+v", d)
		}
	}
}

// TestAnomalyRevokes blocks the caller's identity, closes its streams and
// nobody else's, and is told to the agent.
func TestAnomalyRevokes(t *testing.T) {
	w := newWorld(t, "enforce")
	var told []string
	w.p.opt.Revoked = func(kind identity.RevocationKind, value string, until time.Time, why string) {
		told = append(told, fmt.Sprint(kind, " ", value, " ", !until.Before(w.now.Add(blockFor-time.Minute))))
	}
	w.warm("odd")
	var closed []flow.Reason
	own := w.p.Live().Add(Stream{Subjects: [4]string{w.identity("checkout").ID}, Kill: func(r flow.Reason) { closed = append(closed, r) }})
	other := w.p.Live().Add(Stream{Subjects: [4]string{w.identity("stranger").ID}, Kill: func(flow.Reason) { t.Error("another's stream was closed") }})
	d := w.decide(w.request("GET /items/7?page=1'+OR+'1'='1&kind=<script>"), "odd")
	if d.Effect != flow.EffectTerminate || d.Reason != flow.ReasonAnomaly || !d.Refused() {
		t.Errorf("an injection: %+v", d)
	}
	if len(closed) != 1 || closed[0] != flow.ReasonAnomaly {
		t.Errorf("own stream: %v", closed)
	}
	if len(told) != 1 || told[0] != "identity "+w.identity("checkout").ID+" true" {
		t.Errorf("told %q", told)
	}
	if d := w.decide(w.request("GET /ok"), "payments"); d.Reason != flow.ReasonIdentityRevoked {
		t.Errorf("afterwards: %+v", d)
	}
	w.p.Live().Remove(own)
	w.p.Live().Remove(other)
	if w.p.Live().Len() != 0 {
		t.Error("streams are left")
	}
}

func TestAuditRevokesNobody(t *testing.T) {
	w := newWorld(t, "audit")
	w.warm("odd")
	w.p.Live().Add(Stream{Subjects: [4]string{w.identity("checkout").ID}, Kill: func(flow.Reason) { t.Error("audit closed a stream") }})
	d := w.decide(w.request("GET /items/7?page=1'+OR+'1'='1&kind=<script>"), "odd")
	if d.Effect != flow.EffectTerminate || d.Refused() || !d.WouldDeny() {
		t.Errorf("an injection: %+v", d)
	}
	if d := w.decide(w.request("GET /ok"), "payments"); d.Effect != flow.EffectAllow {
		t.Errorf("afterwards: %+v", d)
	}
}

// TestBlastRadius caps how many identities of one group are hit a window.
func TestBlastRadius(t *testing.T) {
	var a acts
	now := time.Now()
	for i := range actsPerGroup {
		if !a.permit("p", "shop", fmt.Sprint("id", i), now) {
			t.Errorf("identity %d is not permitted", i)
		}
	}
	if !a.permit("p", "shop", "id0", now) {
		t.Error("one that was hit already counts again")
	}
	if a.permit("p", "shop", "another", now) {
		t.Error("the cap does not hold")
	}
	if !a.permit("p", "finance", "another", now) || !a.permit("q", "shop", "another", now) {
		t.Error("the cap of one group is spent by another")
	}
	if !a.permit("p", "shop", "another", now.Add(actWindow)) {
		t.Error("the next window does not open")
	}
	for i := range maxGroups + 10 {
		a.permit("p", fmt.Sprint("g", i), "x", now)
	}
	if len(a.groups) > maxGroups {
		t.Errorf("%d groups", len(a.groups))
	}
}

// TestBlastRadiusThrottles throttles what the cap keeps from being revoked.
func TestBlastRadiusThrottles(t *testing.T) {
	w := newWorld(t, "enforce")
	w.warm("odd")
	for i := range actsPerGroup {
		w.p.acts.permit("shop/odd", "shop", fmt.Sprint("id", i), w.now)
	}
	d := w.decide(w.request("GET /items/7?page=1'+OR+'1'='1&kind=<script>"), "odd")
	if d.Effect != flow.EffectThrottle || d.Reason != flow.ReasonThrottled || !strings.HasPrefix(d.Detail, "cap of revocations") {
		t.Errorf("beyond the cap: %+v", d)
	}
	if d := w.decide(w.request("GET /ok"), "payments"); d.Effect != flow.EffectAllow {
		t.Errorf("afterwards: %+v", d)
	}
}

func TestBlockList(t *testing.T) {
	p := New(Options{})
	now := time.Now()
	for i := range maxBlocked + 5 {
		if i > 5 && i < maxBlocked-5 { // each block copies the list: the ends do
			p.blocked.Load().entries[blockKey{identity.RevokeJTI, fmt.Sprint(i)}] = now.Add(time.Minute)
			continue
		}
		p.block(identity.RevokeJTI, fmt.Sprint(i), now.Add(time.Minute), now)
	}
	if n := len(p.blocked.Load().entries); n != maxBlocked {
		t.Errorf("%d entries, at most %d", n, maxBlocked)
	}
	if !p.blocked.Load().has(identity.RevokeJTI, "0", now) || p.blocked.Load().has(identity.RevokeJTI, "0", now.Add(time.Minute)) {
		t.Error("an entry does not hold for its time")
	}
	p.block(identity.RevokeJTI, "later", now.Add(3*time.Minute), now.Add(2*time.Minute))
	if n := len(p.blocked.Load().entries); n != 1 {
		t.Errorf("%d entries after the others ended", n)
	}
}

// TestAnomalyBudget holds that a budget keeps actions back, and not warnings.
func TestAnomalyBudget(t *testing.T) {
	w := newWorld(t, "enforce")
	w.api("watched").Anomaly.Budget = 1e6
	w.warm("watched")
	if d := w.decide(w.request(injection), "watched"); d.Reason != flow.ReasonThrottled {
		t.Errorf("within the budget: %+v", d)
	}
	w.api("watched").Anomaly.Budget = 1e-3
	if d := w.decide(w.request(injection), "watched"); d.Reason != flow.ReasonThrottled {
		t.Errorf("what is as unusual as can be: %+v", d)
	}
	for _, c := range []struct {
		limit  float64
		refuse bool
		detail string
	}{{1, true, "length"}, {0.005, true, "length"}, {0.004, false, "unusual: above what falsePositives lets act; length"}} {
		var d flow.Decision
		r := w.env.Loop.take()
		r.start(w.p, w.env, w.request(injection), w.identity("checkout"), w.api("watched"), &d)
		sc := anomaly.Score{P: 0.005, N: 200, Warm: true, Limit: c.limit, Components: [3]anomaly.Component{{Part: anomaly.PartLength, Observed: 9, P: 0.005}}}
		if got := r.act(w.api("watched").Anomaly, nil, &sc); got != c.refuse || !strings.HasPrefix(d.Detail, c.detail) {
			t.Errorf("limit %v: refused %v: %+v", c.limit, got, d)
		}
		w.env.Loop.put(r)
	}
}
