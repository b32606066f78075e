// SPDX-License-Identifier: Apache-2.0

package trial

import (
	"cmp"
	"crypto/sha256"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
)

// Ending is how a call ends for its caller.
type Ending string

// The endings of a call.
const (
	Allowed     Ending = "allowed"
	LetThrough  Ending = "let through" // refused by the rules, and the mode lets it pass
	Denied      Ending = "refused"
	Unprotected Ending = "unprotected" // no policy is asked
	// Untold is that of a call that a record does not tell enough of.
	Untold Ending = "cannot be told"
)

// Replayed is what would become of a recorded call.
type Replayed struct {
	Before, After Ending
	Reason        flow.Reason // of After, where it is refused or let through
	Policy, Rule  string
	Position      string
	// Why says what a record does not tell, where After is Untold.
	Why string
}

// Changed says that the call would end otherwise.
func (r *Replayed) Changed() bool { return r.After != Untold && r.After != r.Before }

// Replay tells how recorded calls would end under another plan. A record
// holds neither hosts nor headers, tokens or values of a path: what depends
// on them is taken as it was where the plan that made the record and the
// other ask for the same, and else cannot be told.
type Replay struct {
	old, new *compile.Plan
	ceiling  flow.Mode
	now      time.Time
	sums     map[*compile.Rule][sha256.Size]byte
	// moved are the models whose relations in the sets' files differ.
	moved map[string]bool
	names map[string]*compile.Identity // of the new plan, by NAMESPACE/NAME
}

// NewReplay returns a replay of calls that were judged by one plan, under
// another and a node's mode ceiling.
func NewReplay(old, new *compile.Plan, ceiling flow.Mode, now time.Time) *Replay {
	r := &Replay{old: old, new: new, ceiling: ceiling, now: now, sums: map[*compile.Rule][sha256.Size]byte{}, moved: moved(old, new),
		names: make(map[string]*compile.Identity, len(new.Identities()))}
	for _, id := range new.Identities() {
		r.names[id.FullName()] = id
	}
	return r
}

// moved lists the models whose relations differ.
func moved(old, new *compile.Plan) map[string]bool {
	type tuple struct{ model, user, relation, object string }
	count := map[tuple]int{}
	for _, t := range old.Tuples() {
		count[tuple{t.Model.FullName(), t.User, t.Relation, t.Object}]++
	}
	for _, t := range new.Tuples() {
		count[tuple{t.Model.FullName(), t.User, t.Relation, t.Object}]--
	}
	out := map[string]bool{}
	for t, n := range count {
		if n != 0 {
			out[t.model] = true
		}
	}
	return out
}

// recorded is how the record says that the call ended.
func recorded(rec *pipeline.Record) Ending {
	switch {
	case rec.Decision == flow.EffectAllow.String():
		return Allowed
	case rec.WouldDeny:
		return LetThrough
	}
	return Denied
}

// Judge tells how one recorded call would end; false for a record of a
// call to what neither plan protects.
func (r *Replay) Judge(rec *pipeline.Record) (Replayed, bool) {
	if rec.Destination == "" || !rec.Address.IsValid() {
		return Replayed{}, false
	}
	out := Replayed{Before: recorded(rec)}
	old, new := r.look(rec)
	switch {
	case old.api == nil && new.api == nil:
		return Replayed{}, false
	case new.api == nil:
		out.After = Unprotected
		return out, true
	}
	out.Policy, out.Position = new.api.Name, new.api.Position.FileLine()
	if old.same(new) && !r.relationsMoved(new.api) && r.leaving(rec, new) == flow.ReasonOK {
		// Whatever it depends on, it is decided alike; the modes may differ.
		r.asBefore(&out, rec, new)
		return out, true
	}
	f := r.judge(rec, old, new)
	switch {
	case f.why != "":
		out.After, out.Why = Untold, f.why
	case f.asBefore:
		r.asBefore(&out, rec, new)
	default:
		r.end(&out, f, new)
	}
	return out, true
}

// scene is what a plan knows of a recorded call's two ends.
type scene struct {
	src *compile.Identity
	api *compile.API
}

func (r *Replay) look(rec *pipeline.Record) (old, new scene) {
	if rec.Source != "" {
		old.src, new.src = r.find(rec.Source)
	}
	before, after := r.find(rec.Destination)
	if before != nil {
		old.api = r.old.API(before, rec.Address.Port())
	}
	if after != nil {
		new.api = r.new.API(after, rec.Address.Port())
	}
	return old, new
}

// find finds an identity in both plans. One that nodes recognise, or know by
// where it serves, gets the ID that the policies give it: under a plan that gives
// it another one it is still the same. One that brings its ID is not.
func (r *Replay) find(spiffeID string) (before, after *compile.Identity) {
	before, _, _ = r.old.Identity(spiffeID)
	after, _, _ = r.new.Identity(spiffeID)
	if before != nil && given(before) {
		if same := r.names[before.FullName()]; same != nil && given(same) {
			after = same // also where the ID is another's by now
		}
	}
	return before, after
}

// given says whether nodes give an identity its ID.
func given(id *compile.Identity) bool { return id.Selector != nil || len(id.Endpoints) > 0 }

// same says that both plans decide the call alike: all that the policy names
// is the same, and so is the caller.
func (s scene) same(o scene) bool {
	if s.api == nil || s.api.RulesFingerprint() != o.api.RulesFingerprint() || (s.src == nil) != (o.src == nil) {
		return false
	}
	if s.src == nil {
		return true
	}
	return s.src.FullName() == o.src.FullName() && s.src.Expires.Equal(o.src.Expires) && s.src.MayCallIdentity(s.api.Identity) == o.src.MayCallIdentity(o.api.Identity)
}

func (r *Replay) relationsMoved(a *compile.API) bool {
	return slices.ContainsFunc(a.Rules, func(rule *compile.Rule) bool { return rule.Relation != nil && r.moved[rule.Relation.Model.FullName()] })
}

// finding is what the new plan makes of a call.
type finding struct {
	asBefore bool   // whatever the record says
	why      string // it cannot be told
	deny     bool
	leaving  bool // refused by the caller's own identity
	reason   flow.Reason
	rule     *compile.Rule
}

// asBefore ends a call as it was recorded, in the new mode.
func (r *Replay) asBefore(out *Replayed, rec *pipeline.Record, new scene) {
	out.Rule, out.Reason = rec.Rule, rec.Reason
	if out.Before == Allowed {
		out.After = Allowed
		return
	}
	out.After = r.refusal(new)
}

// refusal is how a call ends that the policy refuses.
func (r *Replay) refusal(s scene) Ending {
	if r.mode(s.api.Mode) == flow.ModeEnforce {
		return Denied
	}
	return LetThrough
}

func (r *Replay) end(out *Replayed, f finding, new scene) {
	if f.rule != nil {
		out.Rule, out.Position = f.rule.Name, f.rule.Position.FileLine()
	}
	switch {
	case !f.deny:
		out.After = Allowed
	case f.leaving:
		out.After, out.Reason, out.Policy, out.Position = Denied, f.reason, "", new.src.Position.FileLine()
	default:
		out.After, out.Reason = r.refusal(new), f.reason
	}
}

func (r *Replay) judge(rec *pipeline.Record, old, new scene) finding {
	api, src := new.api, new.src
	if reason := r.leaving(rec, new); reason != flow.ReasonOK {
		return finding{deny: true, leaving: true, reason: reason}
	}
	switch required := api.MTLS == compile.MTLSRequired; {
	case required && rec.Channel == flow.ChannelPlaintext.String():
		return finding{deny: true, reason: flow.ReasonMTLSRequired}
	case rec.Source == "" && required:
		return finding{deny: true, reason: flow.ReasonNoIdentity}
	case rec.Source != "" && src == nil:
		return finding{deny: true, reason: flow.ReasonUnknownIdentity}
	case api.Identity.Expired(r.now), src != nil && src.Expired(r.now):
		return finding{deny: true, reason: flow.ReasonIdentityExpired}
	}
	f := r.rules(rec, old, new)
	switch {
	case f.deny && f.reason == flow.ReasonDenyRule:
		return f
	case src != nil && !src.MayCallIdentity(api.Identity):
		return finding{deny: true, reason: flow.ReasonMayCall}
	case f.deny || f.why != "":
		return f
	}
	if old.api == nil || old.api.Protocol != api.Protocol || old.api.AppTLS != api.AppTLS || old.api.Body != api.Body || !slices.Equal(old.api.Headers, api.Headers) {
		return finding{why: "the policy reads connections otherwise: protocol, app.tls, body or the headers that rules read"}
	}
	if f.asBefore {
		return f
	}
	if stage := rec.Stage; rec.Decision != flow.EffectAllow.String() && unrepeated[stage] {
		return finding{why: "it was refused by stage " + stage + ", which a record does not repeat"}
	}
	if api.Posture != nil && !samePosture(old, api.Posture) {
		return finding{why: "posture " + api.Posture.FullName() + ": what was known of node and program is not in the record"}
	}
	return f
}

// leaving says why an enforced caller's own identity refuses the call where it
// leaves its node.
func (r *Replay) leaving(rec *pipeline.Record, new scene) flow.Reason {
	through := rec.Channel == flow.ChannelKernel.String() || rec.Channel == flow.ChannelTunnel.String()
	switch {
	case new.src == nil || !through || r.mode(new.src.Mode) != flow.ModeEnforce:
		return flow.ReasonOK
	case new.src.Expired(r.now):
		return flow.ReasonIdentityExpired
	case !new.src.MayCallIdentity(new.api.Identity):
		return flow.ReasonMayCall
	}
	return flow.ReasonOK
}

func (r *Replay) mode(m flow.Mode) flow.Mode { return flow.MinMode(m, r.ceiling) }

// unrepeated are the stages that depend on what no record holds.
var unrepeated = map[string]bool{
	flow.StageProtocol.String(): true, flow.StageUpstream.String(): true, flow.StageAnomaly.String(): true, flow.StagePosture.String(): true,
}

func samePosture(old scene, p *compile.Posture) bool {
	return old.api != nil && old.api.Posture != nil && old.api.Posture.Fingerprint() == p.Fingerprint()
}

// meets says whether a rule speaks of a call.
type meets uint8

const (
	no meets = iota
	maybe
	yes
)

func (r *Replay) rules(rec *pipeline.Record, old, new scene) finding {
	var allows, denies, may []*compile.Rule // certainly alone; perhaps
	// Where connections are read otherwise, it cannot be told anyway.
	asks := rec.Upgrade != "" && old.api != nil && old.api.Protocol == new.api.Protocol && new.api.AsksUpgrade(new.src)
	var refused finding // by a rule that lists no upgrade
	for _, rule := range new.api.Rules {
		m := r.meets(rec, old, new.src, rule)
		certain := m == yes && len(rule.Requires()) == 0
		switch {
		case m == no:
		case asks && !rule.Deny && !rule.Upgrade:
			if refused.rule == nil || m == yes && refused.why != "" {
				refused = noUpgrade(rule, m)
			}
		case !certain:
			may = append(may, rule)
		case rule.Deny:
			denies = append(denies, rule)
		default:
			allows = append(allows, rule)
		}
	}
	if len(denies) > 0 {
		return finding{deny: true, reason: flow.ReasonDenyRule, rule: denies[0]}
	}
	may = slices.DeleteFunc(may, func(rule *compile.Rule) bool { return rule.Deny && r.passedBefore(rec, old, rule) })
	mayDeny := slices.ContainsFunc(may, func(rule *compile.Rule) bool { return rule.Deny })
	switch {
	case len(allows) > 0 && !mayDeny:
		return finding{rule: allows[0]}
	case len(may) == 0 && refused.rule != nil:
		return refused
	case len(may) == 0 && asks && new.api.OtherwiseAllow:
		return finding{deny: true, reason: flow.ReasonUpgrade}
	case len(may) == 0 && new.api.OtherwiseAllow:
		return finding{}
	case len(may) == 0 && rec.Source == "":
		return finding{deny: true, reason: flow.ReasonNoIdentity}
	case len(may) == 0:
		return finding{deny: true, reason: flow.ReasonNoRule}
	}
	return r.dependent(rec, old, may, mayDeny)
}

// noUpgrade is the finding on a call that an allow rule speaks of, or may
// speak of, and does not let switch protocols.
func noUpgrade(rule *compile.Rule, m meets) finding {
	if m == maybe {
		return finding{rule: rule, why: "rule " + rule.Name + " lists no upgrade, if it speaks of the call at all"}
	}
	return finding{deny: true, reason: flow.ReasonUpgrade, rule: rule}
}

// dependent judges a call whose end depends on what a record does not hold:
// it is as before where the rule that decided then asks for the same.
func (r *Replay) dependent(rec *pipeline.Record, old scene, may []*compile.Rule, mayDeny bool) finding {
	before := ruleNamed(old.api, rec.Rule)
	for _, rule := range may {
		if before == nil || rule.Name != before.Name || r.sum(rule) != r.sum(before) || meetsCall(rule, rec) != yes ||
			rule.Relation != nil && r.moved[rule.Relation.Model.FullName()] {
			continue
		}
		if recorded(rec) == Allowed && !mayDeny || recorded(rec) != Allowed && (rule.Deny || len(may) == 1) {
			return finding{asBefore: true}
		}
	}
	for _, rule := range may {
		if mayDeny && !rule.Deny {
			continue
		}
		asks := rule.Requires()
		if len(rule.Hosts) > 0 {
			asks = append(asks, "hosts "+strings.Join(rule.Hosts, " "))
		}
		if len(asks) == 0 {
			asks = append(asks, "the path "+strings.Join(rule.Calls, ", "))
		}
		return finding{why: "rule " + rule.Name + " depends on " + strings.Join(asks, " and ")}
	}
	return finding{why: "it depends on what the record does not hold"}
}

// passedBefore says that the call got past that very deny rule of the old
// plan: it does not deny it now.
func (r *Replay) passedBefore(rec *pipeline.Record, old scene, rule *compile.Rule) bool {
	before := ruleNamed(old.api, rule.Name)
	if before == nil || r.sum(rule) != r.sum(before) || !slices.Equal(rule.Calls, before.Calls) || !sameCallers(rule, before) {
		return false
	}
	// Deny rules come first: whoever was allowed, or refused by or for want of
	// an allow rule, got past them.
	if recorded(rec) == Allowed || rec.Reason == flow.ReasonNoRule && rec.Policy != "" {
		return true
	}
	by := ruleNamed(old.api, rec.Rule)
	return by != nil && !by.Deny
}

func sameCallers(a, b *compile.Rule) bool {
	return slices.EqualFunc(a.From, b.From, func(x, y *compile.Identity) bool { return x.FullName() == y.FullName() })
}

func ruleNamed(a *compile.API, name string) *compile.Rule {
	if a == nil || name == "" {
		return nil
	}
	for _, rule := range a.Rules {
		if rule.Name == name {
			return rule
		}
	}
	return nil
}

func (r *Replay) sum(rule *compile.Rule) [sha256.Size]byte {
	s, ok := r.sums[rule]
	if !ok {
		s = rule.Fingerprint()
		r.sums[rule] = s
	}
	return s
}

// meets says whether a rule of the new plan speaks of the call.
func (r *Replay) meets(rec *pipeline.Record, old scene, src *compile.Identity, rule *compile.Rule) meets {
	if rule.From != nil && (src == nil || !slices.Contains(rule.From, src)) {
		return no
	}
	if rec.Rule == "" && recorded(rec) != Allowed && rec.Reason == flow.ReasonNoRule && !rule.Deny {
		// No rule of the old plan spoke of it: one that is still the same
		// does not now.
		before := ruleNamed(old.api, rule.Name)
		if before != nil && slices.Equal(before.Calls, rule.Calls) && slices.Equal(before.Hosts, rule.Hosts) && spokeOf(before, old.src) {
			return no
		}
	}
	m := meetsCall(rule, rec)
	if len(rule.Hosts) > 0 && m == yes {
		m = maybe
	}
	return m
}

func spokeOf(rule *compile.Rule, src *compile.Identity) bool {
	return rule.From == nil || src != nil && slices.Contains(rule.From, src)
}

// meetsCall holds a rule's methods and paths against a recorded method and
// template.
func meetsCall(rule *compile.Rule, rec *pipeline.Record) (best meets) {
	switch {
	case len(rule.Calls) == 0:
		return yes
	case rec.Method == "":
		if rule.Deny {
			return yes // what cannot be held against its paths is denied
		}
		return no
	}
	for _, call := range rule.Calls {
		method, path, ok := strings.Cut(call, " ")
		switch {
		case !ok && rec.Path == call:
			return yes
		case !ok: // a gRPC method
			best = max(best, maybe)
			continue
		case method != "*" && method != rec.Method && !(rule.Deny && strings.EqualFold(method, rec.Method)):
			continue
		case rec.Path == "":
			best = max(best, maybe)
			continue
		}
		if rule.Deny { // a slash at the end makes no difference to one
			best = max(best, overlap(strings.TrimSuffix(rec.Path, "/"), strings.TrimSuffix(path, "/")))
			continue
		}
		best = max(best, overlap(rec.Path, path))
	}
	return best
}

// overlap holds a recorded template, which stands for one path, against a
// rule's: yes where the rule's has all that it can stand for.
func overlap(template, path string) meets {
	if template == path {
		return yes
	}
	a, b := strings.Split(template, "/"), strings.Split(path, "/")
	out := yes
	for i := 0; ; i++ {
		switch {
		case i < len(b) && b[i] == "**":
			return out
		case i < len(a) && a[i] == "**":
			return maybe
		case i == len(a) && i == len(b):
			return out
		case i >= len(a) || i >= len(b):
			return no
		case isParam(b[i]):
		case isParam(a[i]):
			out = maybe
		case a[i] != b[i]:
			if !strings.EqualFold(a[i], b[i]) && !strings.Contains(a[i]+b[i], "%") {
				return no
			}
			out = maybe // written otherwise, perhaps the same
		}
	}
}

func isParam(segment string) bool { return strings.HasPrefix(segment, "{") }

// Key groups replayed calls that are alike.
type Key struct {
	Source, Destination, Method, Path string
	Replayed
}

// KeyOf returns the group of a replayed call.
func KeyOf(rec *pipeline.Record, out *Replayed) Key {
	return Key{cmp.Or(rec.Source, "-"), rec.Destination, rec.Method, rec.Path, *out}
}
