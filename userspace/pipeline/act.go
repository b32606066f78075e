// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/anomaly"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
)

const (
	maxBlocked   = 4096             // revocations by anomaly that are held at once
	blockFor     = 15 * time.Minute // how long such a revocation lasts here
	actWindow    = time.Hour
	actsPerGroup = 3    // identities of one group that are revoked or terminated in a window
	maxGroups    = 1024 // groups that are counted
)

// anomaly scores an allowed request and acts by the policy's thresholds. What
// was acted upon is never learned.
func (r *run) anomaly(m *compile.Match) {
	a := r.api.Anomaly
	if r.p.opt.Anomalies == nil {
		if !a.IgnoreErrors {
			r.refuse(flow.StageAnomaly, flow.ReasonAnomalyErr, "no anomaly scorer")
		}
		return
	}
	key := anomaly.Key{API: r.api.Name, Method: r.req.Method,
		Warmup: anomaly.Warmup{Requests: int(a.WarmupRequests), Identities: int(a.WarmupIdentities)}, Budget: a.Budget}
	if m != nil {
		key.Template = m.Template
	}
	r.p.opt.Anomalies.Read(&r.sample, key, r.req)
	sc := r.p.opt.Anomalies.Score(&r.sample)
	if sc.Warm && sc.P <= max(a.Warn, a.StepUp, a.Throttle, a.Revoke, a.Terminate) {
		if r.act(a, m, &sc) {
			r.p.opt.Anomalies.Acted(&r.sample)
			return
		}
	} else {
		r.step(flow.StageAnomaly, flow.ReasonOK, "", r.d.Rule)
	}
	r.p.opt.Anomalies.Learn(&r.sample, r.req.Peer.ID)
}

// act does what the lowest threshold that P is under asks for, as far as the
// budget of false positives goes, and says whether the request is refused.
func (r *run) act(a *compile.Anomaly, m *compile.Match, sc *anomaly.Score) bool {
	detail := explain(sc)
	d := r.d
	under := func(threshold float64) bool { return sc.P <= min(threshold, sc.Limit) }
	hard := under(a.Terminate) || under(a.Revoke)
	if hard && d.Enforced && !r.p.acts.permit(r.api.Name, r.group(), r.req.Peer.ID, r.now) {
		r.p.opt.Logger.Error("anomaly acts upon too many identities of one group: throttling instead", "policy", r.api.Name, "group", r.group())
		hard = false
		detail = "cap of revocations reached, throttled instead; " + detail
	}
	switch {
	case hard:
		r.refuse(flow.StageAnomaly, flow.ReasonAnomaly, detail)
		d.Effect = flow.EffectTerminate
		if d.Enforced {
			r.punish(under(a.Revoke), detail)
		}
	case under(a.Throttle) || under(a.Terminate) || under(a.Revoke):
		r.refuse(flow.StageAnomaly, flow.ReasonThrottled, detail)
		d.Effect = flow.EffectThrottle
	case under(a.StepUp) && !r.fresh(m, a.StepUpMaxAge):
		r.refuse(flow.StageAnomaly, flow.ReasonAnomalyStepUp, detail)
		d.Effect = flow.EffectStepUp
	case under(a.StepUp):
		detail = "the authentication is fresh; " + detail
		fallthrough
	default: // warn, or beyond the budget
		if sc.P <= max(a.StepUp, a.Throttle, a.Revoke, a.Terminate) && sc.P > sc.Limit {
			detail = "above what falsePositives lets act; " + detail
		}
		r.step(flow.StageAnomaly, flow.ReasonOK, detail, d.Rule)
		if d.Detail != "" {
			d.Detail += "; "
		}
		d.Detail += "unusual: " + detail
		return false
	}
	return true
}

// fresh says whether the token that let the call in shows a fresh
// authentication, on which it then rests; else the challenge is that of its
// rule.
func (r *run) fresh(m *compile.Match, maxAge time.Duration) bool {
	if m == nil || m.Rule.Token == nil || r.verified == nil {
		return false // the loader leaves no such rule
	}
	if !r.verified.Fresh(maxAge, r.now) {
		r.d.Challenge = m.Rule.Token.StepUpChallenge
		return false
	}
	r.until(r.verified.AuthTime.Add(maxAge))
	return true
}

// group is whom a cap of revocations is shared with: the namespace.
func (r *run) group() string {
	if r.src == nil {
		return ""
	}
	return r.src.Namespace
}

// punish closes the caller's streams; with revoke, its token (or, without
// one, its identity) is blocked as well.
func (r *run) punish(revoke bool, why string) {
	p, id := r.p, r.req.Peer.ID
	if revoke {
		kind, value := identity.RevokeIdentity, id
		if c := r.verified; c != nil && c.ID != "" {
			kind, value = identity.RevokeJTI, c.TokenKey // another issuer's may have the same ID
		}
		if value != "" {
			until := r.now.Add(blockFor)
			p.block(kind, strings.Clone(value), until, r.now)
			if p.opt.Revoked != nil {
				p.opt.Revoked(kind, strings.Clone(value), until, why)
			}
		}
	}
	if id != "" {
		p.live.closeMatching(func(s *Stream) flow.Reason {
			if s.Subjects[0] == id {
				return flow.ReasonAnomaly
			}
			return flow.ReasonOK
		})
	}
}

// explain lists the components that stand out.
func explain(sc *anomaly.Score) string {
	var b strings.Builder
	for i := range sc.Components {
		c := &sc.Components[i]
		if i > 0 && (c.Observed == 0 || c.P > 0.2) {
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(c.Explain(sc.N))
	}
	return b.String()
}

// blockList is what anomaly thresholds revoked, replaced as a whole.
type blockList struct{ entries map[blockKey]time.Time }

type blockKey struct {
	kind  identity.RevocationKind
	value string
}

func (b *blockList) has(kind identity.RevocationKind, value string, now time.Time) bool {
	if len(b.entries) == 0 || value == "" {
		return false
	}
	until, ok := b.entries[blockKey{kind, value}]
	return ok && now.Before(until)
}

// block adds an entry; where the list is full of entries that still hold, it
// is not added: the request itself is refused all the same.
func (p *Pipeline) block(kind identity.RevocationKind, value string, until, now time.Time) {
	for {
		old := p.blocked.Load()
		entries := make(map[blockKey]time.Time, len(old.entries)+1)
		for k, v := range old.entries {
			if now.Before(v) {
				entries[k] = v
			}
		}
		if len(entries) >= maxBlocked {
			p.opt.Logger.Error("list of revocations by anomaly is full", "size", maxBlocked)
			return
		}
		entries[blockKey{kind, value}] = until
		if p.blocked.CompareAndSwap(old, &blockList{entries}) {
			p.generation.Add(1)
			return
		}
	}
}

// acts bounds how many identities of a group are hit in a window, so that a
// poisoned or broken baseline does not take a whole fleet down.
type acts struct {
	mu     sync.Mutex
	groups map[actKey]*actGroup
}

type actKey struct{ policy, group string }

type actGroup struct {
	since      time.Time
	identities []string
}

func (a *acts) permit(policy, group, id string, now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	k := actKey{policy, group}
	g := a.groups[k]
	if g == nil {
		if len(a.groups) >= maxGroups {
			a.expire(now)
		}
		if len(a.groups) >= maxGroups {
			return false
		}
		if a.groups == nil {
			a.groups = map[actKey]*actGroup{}
		}
		g = &actGroup{since: now}
		a.groups[k] = g
	}
	if now.Sub(g.since) >= actWindow {
		g.since, g.identities = now, g.identities[:0]
	}
	if slices.Contains(g.identities, id) {
		return true
	}
	if len(g.identities) >= actsPerGroup {
		return false
	}
	g.identities = append(g.identities, strings.Clone(id))
	return true
}

func (a *acts) expire(now time.Time) {
	for k, g := range a.groups {
		if now.Sub(g.since) >= actWindow {
			delete(a.groups, k)
		}
	}
}
