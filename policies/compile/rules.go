// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/relations"
	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
)

// ruleSource is a rule while it is compiled.
type ruleSource struct {
	*Rule
	spec     *v1alpha1.Rule
	doc      *policyDoc
	index    int
	from     []*Identity
	hosts    []string
	patterns []*pattern
}

func (r *ruleSource) at(path ...any) load.Position {
	return r.doc.At(append([]any{"spec", "rules", r.index}, path...)...)
}

func (r *ruleSource) key(path ...any) load.Position {
	return r.doc.Key(append([]any{"spec", "rules", r.index}, path...)...)
}

// conditional says whether more than the caller's identity decides.
func (r *ruleSource) conditional() bool {
	return len(r.hosts) > 0 || len(r.patterns) > 0 || r.Token != nil || r.Relation != nil || r.When != nil || r.Posture != nil
}

func (c *compiler) rules(a *API, d *policyDoc) {
	errors := c.report.Errors()
	names := make(map[string]int)
	sources := make([]*ruleSource, 0, len(d.Value.Spec.Rules))
	for i := range d.Value.Spec.Rules {
		r := c.rule(a, d, i)
		if first, ok := names[r.Name]; ok && r.Name != "" {
			c.report.Errorf(r.at("name"), "name: rule %q is there twice: first at %s", r.Name, d.At("spec", "rules", first, "name"))
		}
		names[r.Name] = i
		sources = append(sources, r)
		a.Rules = append(a.Rules, r.Rule)
	}
	c.layOut(a, sources)
	if c.report.Errors() == errors { // else they are not what was meant
		c.shadows(sources)
	}
	c.beyondBudget(a)
	a.decide(sources)
	a.Headers = headersOf(sources)
}

// layOut orders the rules and enters them into the trees.
func (c *compiler) layOut(a *API, sources []*ruleSource) {
	order := 0
	for _, deny := range [...]bool{true, false} {
		t := &a.allow
		if deny {
			t = &a.deny
		}
		for _, r := range sources {
			if r.Deny != deny {
				continue
			}
			r.order = order
			order++
			if !deny && len(r.from) == 0 && !r.spec.All {
				continue // an error, and reported
			}
			n := max(1, len(r.hosts)) * max(1, len(r.patterns)) * max(1, len(r.from))
			if c.entries += n; c.entries > maxEntries {
				if c.entries-n <= maxEntries {
					c.report.Errorf(r.at(), "rule %q: the set's rules have more than %d combinations of caller, host and path", r.Name, maxEntries)
				}
				continue
			}
			t.add(r.Rule, r.from, r.hosts, r.patterns)
		}
	}
}

// decide finds for whom identity alone decides.
func (a *API) decide(sources []*ruleSource) {
	const (
		denies = 1 << iota
		mayDeny
		allows
		mayAllow
	)
	var anybody uint8
	flags := make(map[*Identity]uint8)
	for _, r := range sources {
		f := uint8(allows)
		if r.conditional() {
			f = mayAllow
		}
		if r.Deny {
			f >>= 2
		}
		if len(r.from) == 0 {
			anybody |= f
		}
		for _, id := range r.from {
			flags[id] |= f
		}
	}
	// Where requests are read or TLS ends anyway, what cannot be read is refused, and an
	// upgrade that no rule lists; what is scored or held depends on the request, and posture on the moment.
	reads := a.Protocol.reads() || a.AppTLS.Ends() || a.Posture != nil || a.Anomaly != nil || a.Body.Inspect > 0
	outcome := func(f uint8) decidedBy {
		switch {
		case f&denies != 0:
			return decidedDeny
		case f&mayDeny != 0:
			return undecided
		case f&allows != 0 || f&mayAllow == 0 && a.OtherwiseAllow:
			if reads {
				return undecided
			}
			return decidedAllow
		case f&mayAllow != 0:
			return undecided
		}
		return decidedDeny
	}
	a.decided = make(map[*Identity]decidedBy, len(flags))
	for id, f := range flags {
		a.decided[id] = outcome(f | anybody)
	}
	a.decidedElse = outcome(anybody)
}

func headersOf(sources []*ruleSource) []string {
	var out []string
	add := func(name string) { out = append(out, strings.ToLower(name)) }
	for _, r := range sources {
		if r.When != nil {
			for _, h := range r.When.headers {
				add(h)
			}
		}
		if r.Relation != nil {
			r.Relation.names(fromHeader, add)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (c *compiler) rule(a *API, d *policyDoc, i int) *ruleSource {
	spec := &d.Value.Spec.Rules[i]
	r := &ruleSource{
		Rule: &Rule{Name: spec.Name, Position: d.At("spec", "rules", i), Deny: spec.Effect == "deny"},
		spec: spec, doc: d, index: i,
	}
	if spec.Name != "" && (len(spec.Name) > 63 || !isPathSegment(spec.Name)) {
		c.report.Errorf(r.at("name"), "name: %q is not a name: at most 63 letters, digits, -, . and _", spec.Name)
	}
	if spec.Name == "" {
		c.empty(&d.Document, "name", "spec", "rules", i, "name")
	}
	c.callers(a, r)
	c.hosts(a, r)
	c.patterns(a, r)
	c.methods(a, r)
	c.upgrade(a, r)
	c.token(a, r)
	c.relation(a, r)
	c.condition(a, r)
	c.posture(a, r)
	r.Rule.From, r.Rule.Hosts, r.Calls = r.from, r.hosts, slices.Concat(spec.HTTP, spec.GRPC)
	return r
}

func (c *compiler) posture(a *API, r *ruleSource) {
	if _, written := r.doc.Lookup("spec", "rules", r.index, "posture"); !written {
		return
	}
	if r.Deny {
		c.report.Errorf(r.key("posture"), "posture: a deny rule has from, hosts, http, grpc and when")
		return
	}
	r.Posture = c.postureRef(a, &r.doc.Document, r.spec.Posture, "spec", "rules", r.index, "posture")
	a.RulePosture = a.RulePosture || r.Posture != nil
}

// notTrue are the ways in which "all: true" is not there; another text was
// reported.
var notTrue = []string{"", "false", "False", "FALSE"}

func (c *compiler) callers(a *API, r *ruleSource) {
	_, written := r.doc.Lookup("spec", "rules", r.index, "from")
	switch {
	case written && r.spec.All:
		c.report.Errorf(r.key("all"), "all: with from, one of them is not meant")
	case !written && !r.spec.All && !r.Deny && slices.Contains(notTrue, r.doc.Text("spec", "rules", r.index, "all")):
		c.report.Errorf(r.at(), `rule %q: from is missing; name the callers, or write "all: true" if you mean every one`, r.Name)
	}
	r.from = c.identityRefs(&r.doc.Document, "from", r.doc.Namespace, r.spec.From, "spec", "rules", r.index, "from")
	if r.Deny || a.Identity == nil || len(r.from) == 0 || len(r.from) != len(r.spec.From) {
		return
	}
	callee := a.Identity.fullName
	if strings.HasPrefix(callee, r.doc.Namespace+"/") {
		callee = a.Identity.Name
	}
	var lacking []string
	for i, id := range r.from {
		if c.tenant.stranger(id.Namespace) {
			continue // what it says is not for the tenant to know
		}
		if _, ok := slices.BinarySearchFunc(id.MayCall, a.Identity, func(x, y *Identity) int { return strings.Compare(x.fullName, y.fullName) }); !ok {
			lacking = append(lacking, `"`+r.spec.From[i]+`"`)
		}
	}
	switch {
	case len(lacking) == len(r.from):
		verb := "lacks"
		if len(lacking) > 1 {
			verb = "lack"
		}
		c.report.Warnf(r.at(), "rule %q is unreachable: %s %s mayCall %s", r.Name, listed(lacking), verb, callee)
	case len(lacking) > 0:
		c.report.Warnf(r.at("from"), "rule %q: %s cannot use it without mayCall %s", r.Name, listed(lacking), callee)
	}
}

func listed(names []string) string {
	const most = 5
	if len(names) > most {
		return strings.Join(names[:most], ", ") + ", ..."
	}
	return strings.Join(names, ", ")
}

func (c *compiler) hosts(a *API, r *ruleSource) {
	if len(r.spec.Hosts) == 0 {
		return
	}
	if a.Protocol == ProtocolTCP {
		c.report.Errorf(r.key("hosts"), "hosts: cannot be judged with protocol: tcp")
	}
	for i, h := range r.spec.Hosts {
		switch lower := strings.ToLower(h); {
		case h == "":
			c.empty(&r.doc.Document, "hosts", "spec", "rules", r.index, "hosts", i)
		case strings.Contains(h, "*"):
			c.report.Errorf(r.at("hosts", i), "hosts: %q: wildcards are not supported by this version", h)
		case !isHost(lower):
			c.report.Errorf(r.at("hosts", i), "hosts: %q is not a host's name or IPv4 address without port", h)
		case slices.Contains(r.hosts, lower):
			c.report.Errorf(r.at("hosts", i), "hosts: %q is there twice", h)
		default:
			r.hosts = append(r.hosts, lower)
		}
	}
}

func isHost(s string) bool {
	if len(s) > 253 {
		return false
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return a.Is4()
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			if !isAlnum(label[i]) && label[i] != '-' && label[i] != '_' {
				return false
			}
		}
	}
	return true
}

func (c *compiler) patterns(a *API, r *ruleSource) {
	if len(r.spec.HTTP) == 0 {
		return
	}
	if a.Protocol == ProtocolGRPC {
		c.report.Errorf(r.key("http"), "http: cannot be judged with protocol: grpc; write grpc: PACKAGE.SERVICE/METHOD, or protocol: auto for both")
	} else {
		c.needsHTTP(a, r.key("http"), "http")
	}
	seen := make(map[string]bool, len(r.spec.HTTP))
	for i, s := range r.spec.HTTP {
		if s == "" {
			c.empty(&r.doc.Document, "http", "spec", "rules", r.index, "http", i)
			continue
		}
		p, err := parsePattern(s)
		switch {
		case err != nil:
			c.report.Errorf(r.at("http", i), "http: %v", err)
		case seen[s]:
			c.report.Errorf(r.at("http", i), "http: %q is there twice", s)
		default:
			r.patterns = append(r.patterns, p)
		}
		seen[s] = true
	}
}

// methods reads the rule's grpc list, whose entries are patterns as well.
func (c *compiler) methods(a *API, r *ruleSource) {
	if len(r.spec.GRPC) == 0 {
		return
	}
	c.needsHTTP(a, r.key("grpc"), "grpc")
	seen := make(map[string]bool, len(r.spec.GRPC))
	for i, s := range r.spec.GRPC {
		if s == "" {
			c.empty(&r.doc.Document, "grpc", "spec", "rules", r.index, "grpc", i)
			continue
		}
		p, err := parseMethod(s)
		switch {
		case err != nil:
			c.report.Errorf(r.at("grpc", i), "grpc: %v", err)
		case seen[s]:
			c.report.Errorf(r.at("grpc", i), "grpc: %q is there twice", s)
		default:
			r.patterns = append(r.patterns, p)
		}
		seen[s] = true
	}
}

// upgrade reads what a connection may switch to: WebSocket is all there is.
func (c *compiler) upgrade(a *API, r *ruleSource) {
	if len(r.spec.Upgrade) == 0 {
		return
	}
	c.distinct(&r.doc.Document, "upgrade", r.spec.Upgrade, "spec", "rules", r.index, "upgrade")
	opens := func(p *pattern) bool { return !p.grpc && (p.method == "" || p.method == http.MethodGet) }
	switch pos := r.key("upgrade"); {
	case r.Deny:
		c.report.Errorf(pos, "upgrade: a deny rule has from, hosts, http, grpc and when")
	case a.Protocol == ProtocolGRPC:
		c.report.Errorf(pos, "upgrade: cannot be with protocol: grpc; WebSocket begins with a request of HTTP/1.1")
	case c.needsHTTP(a, pos, "upgrade") && len(r.patterns) == len(r.spec.HTTP)+len(r.spec.GRPC) &&
		len(r.patterns) > 0 && !slices.ContainsFunc(r.patterns, opens):
		c.report.Errorf(pos, "upgrade: WebSocket begins with GET, and nothing in http has that method")
	}
	r.Upgrade = true
}

func (c *compiler) token(a *API, r *ruleSource) {
	t := r.spec.Token
	if t == nil {
		return
	}
	if r.Deny {
		c.report.Errorf(r.key("token"), "token: a deny rule has from, hosts, http, grpc and when")
	}
	c.needsHTTP(a, r.key("token"), "token")
	r.Token = &TokenRule{Audience: t.Audience, Scopes: t.Scopes}
	if t.Issuer != "" {
		if r.Token.Issuer = c.issuers[fullName(r.doc.Namespace, t.Issuer)]; r.Token.Issuer == nil {
			c.dangling(r.at("token", "issuer"), "issuer", toIssuer, r.doc.Namespace, t.Issuer)
		}
	} else {
		c.empty(&r.doc.Document, "issuer", "spec", "rules", r.index, "token", "issuer")
	}
	switch i := r.Token.Issuer; {
	case t.Audience == "":
		c.empty(&r.doc.Document, "audience", "spec", "rules", r.index, "token", "audience")
	case i != nil && !c.tenant.stranger(i.Namespace) && i.Audiences != nil && !slices.Contains(i.Audiences, t.Audience):
		c.report.Errorf(r.at("token", "audience"), "audience: %q is not one of the audiences of %s%s", t.Audience, i.FullName(),
			c.report.Suggest(t.Audience, i.Audiences))
	}
	c.distinct(&r.doc.Document, "scopes", t.Scopes, "spec", "rules", r.index, "token", "scopes")
	for i, s := range t.Scopes {
		if !isScope(s) {
			c.report.Errorf(r.at("token", "scopes", i), "scopes: %q is not a scope", s)
		}
	}
	c.authentication(a, r, t)
	if t.BoundTo == "dpop" {
		r.Token.Bound = BoundDPoP
	}
	if t.BoundTo == "signature" {
		r.Token.Bound = BoundSignature
		switch body := r.doc.Value.Spec.Body; {
		case a.Protocol == ProtocolGRPC:
			c.report.Errorf(r.at("token", "boundTo"), "boundTo: \"signature\" cannot be held against streams; use dpop or mtls for gRPC")
		case body == nil || body.Inspect == 0 || body.Over == "skip":
			c.report.Errorf(r.at("token", "boundTo"), "boundTo: \"signature\" needs body: {inspect: SIZE, over: deny}: the content is held against its signed digest")
		}
	}
	if t.BoundTo == "mtls" {
		r.Token.Bound = BoundMTLS
		if a.MTLS == MTLSOff && !slices.ContainsFunc(a.Rules, (*Rule).boundToMTLS) { // said once
			c.report.Errorf(r.doc.At("spec", "mtls"), `mtls: "off" with token.boundTo: mtls can never be satisfied`)
		}
	}
}

// authentication reads how and when the token's subject must have
// authenticated, always and for an unusual call.
func (c *compiler) authentication(a *API, r *ruleSource, t *v1alpha1.Token) {
	r.Token.ACR = t.ACR
	c.distinct(&r.doc.Document, "acr", t.ACR, "spec", "rules", r.index, "token", "acr")
	for i, s := range t.ACR {
		// They stand in a quoted list that is parted by spaces.
		if strings.ContainsFunc(s, func(x rune) bool { return x <= ' ' || x >= 0x7f || x == '"' || x == '\\' }) {
			c.report.Errorf(r.at("token", "acr", i), "acr: %q is not an authentication context class", s)
		}
	}
	if t.MaxAge != nil {
		r.Token.MaxAge = time.Duration(*t.MaxAge)
		c.wholeSeconds(r.at("token", "maxAge"), "maxAge", r.Token.MaxAge)
	}
	r.Token.Challenge = challenge(t.ACR, r.Token.MaxAge)
	if a.Anomaly == nil || a.Anomaly.StepUpMaxAge == 0 {
		return
	}
	r.Token.StepUpChallenge = challenge(t.ACR, a.Anomaly.StepUpMaxAge)
	if t.MaxAge != nil && r.Token.MaxAge <= a.Anomaly.StepUpMaxAge {
		c.report.Warnf(r.at("token", "maxAge"), "maxAge: asks of every call what anomaly.stepUp would ask of unusual ones; give stepUpMaxAge less")
	}
}

// challenge is what RFC 9470 section 3 adds to WWW-Authenticate.
func challenge(acr []string, maxAge time.Duration) (s string) {
	if acr != nil {
		s = `, acr_values="` + strings.Join(acr, " ") + `"`
	}
	if maxAge > 0 {
		s += ", max_age=" + strconv.FormatInt(int64(maxAge/time.Second), 10)
	}
	return s
}

func (r *Rule) boundToMTLS() bool { return r.Token != nil && r.Token.Bound == BoundMTLS }

func (c *compiler) relation(a *API, r *ruleSource) {
	s := r.spec.Relation
	if s == nil {
		return
	}
	if r.Deny {
		c.report.Errorf(r.key("relation"), "relation: a deny rule has from, hosts, http, grpc and when")
		return
	}
	check := r.at("relation")
	if _, ok := r.doc.Lookup("spec", "rules", r.index, "relation", "check"); ok {
		check = r.at("relation", "check")
	}
	if s.Check == "" {
		c.empty(&r.doc.Document, "relation", "spec", "rules", r.index, "relation", "check")
		c.empty(&r.doc.Document, "relation", "spec", "rules", r.index, "relation")
		return
	}
	rel, err := parseRelation(s.Check)
	if err != nil {
		c.report.Errorf(check, "relation: %v", err)
		return
	}
	r.Relation = rel
	rel.Model = c.modelOf(r, s.Model)
	c.askable(rel, check)
	rel.names(fromToken, func(name string) {
		if r.spec.Token == nil {
			c.report.Errorf(check, "relation: {token.%s} is used, but the rule asks for no token", name)
		}
	})
	rel.names(fromHeader, func(string) { c.needsHTTP(a, check, "relation: a header") })
	rel.names(fromParam, func(name string) { c.hasParam(r, check, "relation: {param."+name+"}", name) })
	rel.names(fromSource, func(string) {
		if r.spec.All {
			c.report.Warnf(check, "relation: a caller without an identity has no source and is denied")
		}
	})
}

// askable holds a relation against its model.
func (c *compiler) askable(rel *Relation, pos load.Position) {
	if rel.Model == nil || rel.Model.Relations == nil || c.tenant.stranger(rel.Model.Namespace) {
		return
	}
	m := rel.Model.Relations
	user, of := rel.User.kind()
	object, _ := rel.Object.kind()
	errs := [...]*relations.Error{m.CheckUser(user, of), m.CheckRelation(object, rel.Relation)}
	good := true
	for _, err := range errs {
		if err != nil {
			good = false
			c.report.Errorf(pos, "relation: %s%s", err, c.report.Suggest(err.Name, err.Known))
		}
	}
	if good && !c.reaches(m, user, of, object, rel.Relation) {
		c.report.Warnf(pos, "relation: the model gives %s of type %q to nobody of type %q; this can never hold", rel.Relation, object, user)
	}
}

// maxReached bounds the search for relations that nobody can have: it only
// warns, and takes up to 10 ms in the largest model.
const maxReached = 200

// reaches says whether the model gives users of a type a relation, as far as
// that is looked at.
func (c *compiler) reaches(m *relations.Model, user, of, object, relation string) bool {
	q := reached{m, user, of, object, relation}
	yes, known := c.reached[q]
	if !known {
		if yes = true; len(c.reached) < maxReached {
			yes = m.Reaches(user, of, object, relation)
			c.reached[q] = yes
		}
	}
	return yes
}

func (c *compiler) modelOf(r *ruleSource, ref string) *Model {
	if ref != "" {
		m := c.models[fullName(r.doc.Namespace, ref)]
		if m == nil {
			c.dangling(r.at("relation", "model"), "model", toModel, r.doc.Namespace, ref)
		}
		return m
	}
	switch names := c.names[toModel][r.doc.Namespace]; len(names) {
	case 1:
		return c.models[fullName(r.doc.Namespace, names[0])]
	case 0:
		c.report.Errorf(r.key("relation"), "relation: namespace %s has no RelationModel; add one, or write model: NAMESPACE/NAME and check:", r.doc.Namespace)
	default:
		c.report.Errorf(r.key("relation"), "relation: namespace %s has %d RelationModels; write model: and check:", r.doc.Namespace, len(names))
	}
	return nil
}

// hasParam holds the use of a parameter against every template of the rule.
func (c *compiler) hasParam(r *ruleSource, pos load.Position, what, name string) {
	if len(r.spec.HTTP) == 0 {
		c.report.Errorf(pos, "%s is used, but the rule has no http template", what)
		return
	}
	for _, p := range r.patterns {
		if !slices.Contains(p.params, name) {
			c.report.Errorf(pos, "%s is used, but %q has no {%s}%s", what, p.template, name, load.DidYouMean(name, p.params, `"`))
			return
		}
	}
}

type compiled struct {
	condition *Condition
	errors    []exprError
}

func (c *compiler) condition(a *API, r *ruleSource) {
	text := r.spec.When
	if text == "" {
		c.empty(&r.doc.Document, "when", "spec", "rules", r.index, "when")
		return
	}
	known := c.conditions[text]
	if known == nil {
		known = new(compiled)
		known.condition, known.errors = compileCondition(text)
		c.conditions[text] = known
	}
	for _, e := range known.errors {
		c.report.ErrorHint(r.doc.Within(e.line, e.column, "spec", "rules", r.index, "when"), "when: "+e.message, e.hint)
	}
	if r.When = known.condition; r.When == nil {
		return
	}
	pos := r.at("when")
	if r.When.usesToken && r.spec.Token == nil {
		c.report.Errorf(pos, "when: token is used, but the rule asks for none")
	}
	if len(r.When.headers) > 0 {
		c.needsHTTP(a, pos, "when: a header")
	}
	for _, name := range r.When.params {
		c.hasParam(r, pos, "when: params."+name, name)
	}
}
