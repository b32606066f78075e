// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// docCall is one call, described in the words of the documents.
type docCall struct {
	to        string // the policy
	src       string // a MachineIdentity, "" for nobody, "unknown" for an ID of no document
	plaintext bool
	method    string
	path      string
	length    int64
	accounts  []string // of its X-Account header
	kind      string   // of its X-Kind header, "" for none
	token     *docToken
}

type docToken struct {
	sub, aud     string
	scopes       []string
	bound, other bool // to the caller's certificate, to another
	expired      bool
}

// reader reads the documents in the plainest way and knows nothing of plans.
type reader struct {
	policies   map[string]*v1alpha1.APIPolicySpec
	identities map[string]*v1alpha1.MachineIdentitySpec
}

// judge says whether a call is allowed, and by which rules it may be said so:
// those that allow it, or the deny rules that meet it.
func (n *reader) judge(c docCall) (allowed bool, by []string, what string) {
	p := n.policies[c.to]
	required := p.MTLS != "permissive"
	src := c.src
	if c.plaintext {
		src = ""
	}
	switch {
	case src == "" && required:
		return false, nil, "nobody"
	case src != "" && n.identities[src] == nil:
		return false, nil, "unknown"
	}
	if n.expired(src) || n.expired(p.Protect.Identity) {
		return false, nil, "expired"
	}
	for _, r := range p.Rules {
		if r.Effect == "deny" && speaks(&r, src, c) && holds(&r, c) {
			by = append(by, r.Name)
		}
	}
	if len(by) > 0 {
		return false, by, "denied"
	}
	if src != "" && !slices.Contains(n.identities[src].MayCall, p.Protect.Identity) {
		return false, nil, "may not call"
	}
	spoken := false
	for _, r := range p.Rules {
		if r.Effect == "deny" || !speaks(&r, src, c) {
			continue
		}
		spoken = true
		if proven(&r, c) && related(&r, c) && holds(&r, c) {
			by = append(by, r.Name)
		}
	}
	switch {
	case len(by) > 0:
		return true, by, "allowed"
	case spoken:
		return false, nil, "not satisfied"
	}
	return p.Otherwise == "allow", nil, "otherwise " + p.Otherwise
}

func (n *reader) expired(name string) bool {
	id := n.identities[name]
	return id != nil && id.Expires != nil && time.Time(*id.Expires).Before(time.Now())
}

func speaks(r *v1alpha1.Rule, src string, c docCall) bool {
	if len(r.From) > 0 && !slices.Contains(r.From, src) {
		return false
	}
	return len(r.HTTP) == 0 || slices.ContainsFunc(r.HTTP, func(p string) bool {
		method, path, _ := strings.Cut(p, " ")
		if method != "*" && method != c.method {
			return false
		}
		switch path {
		case "/acc/{id}":
			return strings.HasPrefix(c.path, "/acc/")
		case "/b/**":
			return c.path == "/b" || strings.HasPrefix(c.path, "/b/")
		}
		return path == c.path
	})
}

// proven says whether the call brings the token that the rule asks for.
func proven(r *v1alpha1.Rule, c docCall) bool {
	switch t := c.token; {
	case r.Token == nil:
		return true
	case t == nil || t.expired || t.aud != r.Token.Audience:
		return false
	case t.bound && (c.plaintext || c.src == "") || t.other: // a bound one must be proven, asked for or not
		return false
	case r.Token.BoundTo == "mtls" && !t.bound:
		return false
	default:
		return !slices.ContainsFunc(r.Token.Scopes, func(s string) bool { return !slices.Contains(t.scopes, s) })
	}
}

// related says whether the rule's relation is in the store: alice may pay from
// a1, bob from a2.
func related(r *v1alpha1.Rule, c docCall) bool {
	if r.Relation == nil {
		return true
	}
	account := ""
	switch {
	case strings.Contains(r.Relation.Check, "{header.X-Account}") && len(c.accounts) == 1:
		account = c.accounts[0]
	case strings.Contains(r.Relation.Check, "{param.id}"):
		account = strings.TrimPrefix(c.path, "/acc/")
	}
	return c.token.sub == "alice" && account == "a1" || c.token.sub == "bob" && account == "a2"
}

// holds reads the conditions that randomDocRule writes. What cannot be told
// allows nothing, and denies.
func holds(r *v1alpha1.Rule, c docCall) bool {
	var n int64
	switch r.When {
	case "":
		return true
	case "request.headers['x-kind'] == 'bad'":
		return c.kind == "bad" || c.kind == "" && r.Effect == "deny"
	case "token.sub == 'alice'":
		return c.token.sub == "alice"
	}
	if _, err := fmt.Sscanf(r.When, "request.content_length < %d", &n); err != nil {
		panic(err)
	}
	return c.length < n
}

const docIdentities = `
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: a}
spec: {owner: o, spiffeID: "spiffe://example.org/a", mayCall: [one, two]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: b}
spec: {owner: o, spiffeID: "spiffe://example.org/b", mayCall: [one, old]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: gone}
spec: {owner: o, spiffeID: "spiffe://example.org/gone", expires: "2020-01-01", mayCall: [one, two, old]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: one}
spec: {owner: o, spiffeID: "spiffe://example.org/one", endpoints: ["10.0.0.1:80"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: two}
spec: {owner: o, spiffeID: "spiffe://example.org/two", endpoints: ["10.0.0.2:80"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: old}
spec: {owner: o, spiffeID: "spiffe://example.org/old", expires: "2020-01-01", endpoints: ["10.0.0.3:80"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso}
spec: {issuer: "` + issuerURL + `", jwks: {url: "https://sso.shop.example/jwks"}, algorithms: [ES256]}
---
apiVersion: sallyport.dev/v1alpha1
kind: RelationModel
metadata: {name: shop}
spec: {file: shop.fga}
`

func one[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

func randomDocRule(r *rand.Rand, i int) string {
	deny := r.IntN(5) == 0
	var b strings.Builder
	fmt.Fprintf(&b, "    - {name: %s%d, effect: %[1]s", map[bool]string{true: "deny", false: "allow"}[deny], i)
	from := one(r, "", "[a]", "[a, b]", "[gone, a, b]")
	if from != "" {
		b.WriteString(", from: " + from)
	} else if !deny {
		b.WriteString(", all: true")
	}
	http := one(r, "", "GET /x", "GET /acc/{id}", "* /b/**", "POST /x")
	if http != "" {
		b.WriteString(`, http: ["` + http + `"]`)
	}
	conditions := []string{"", "", "request.content_length < 5", "request.headers['x-kind'] == 'bad'"}
	if !deny && r.IntN(2) == 0 {
		fmt.Fprintf(&b, ", token: {issuer: sso, audience: %s%s%s}", one(r, "pay", "pay", "see"), one(r, "", "", ", scopes: [read]", ", scopes: [read, write]"), one(r, "", ", boundTo: mtls"))
		conditions = append(conditions, "token.sub == 'alice'")
		switch {
		case r.IntN(2) == 0:
		case http == "GET /acc/{id}":
			b.WriteString(`, relation: "user:{token.sub} can_pay account:{param.id}"`)
		default:
			b.WriteString(`, relation: "user:{token.sub} can_pay account:{header.X-Account}"`)
		}
	}
	if when := one(r, conditions...); when != "" {
		b.WriteString(`, when: "` + when + `"`)
	}
	return b.String() + "}\n"
}

func randomDocPolicy(r *rand.Rand, name string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "---\napiVersion: sallyport.dev/v1alpha1\nkind: APIPolicy\nmetadata: {name: %[1]s}\nspec:\n  mode: %[2]s\n  protect: {identity: %[1]s, ports: [80], protocol: http}\n  mtls: %[3]s\n  otherwise: %[4]s\n  rules:\n",
		name, one(r, "enforce", "audit", "observe"), one(r, "required", "required", "permissive"), one(r, "deny", "allow"))
	for i := range 1 + r.IntN(8) {
		b.WriteString(randomDocRule(r, i))
	}
	return b.String()
}

func randomDocCall(r *rand.Rand) docCall {
	c := docCall{
		to: one(r, "one", "one", "two", "old"), src: one(r, "a", "a", "b", "gone", "", "unknown"), plaintext: r.IntN(6) == 0, method: one(r, "GET", "GET", "POST"),
		path: one(r, "/x", "/acc/a1", "/acc/a2", "/b", "/b/c/d", "/y"), length: int64(r.IntN(10)), kind: one(r, "", "bad", "good"),
		accounts: one(r, nil, []string{"a1"}, []string{"a2"}, []string{"a1", "a1"}),
	}
	if r.IntN(4) > 0 {
		c.token = &docToken{sub: one(r, "alice", "bob"), aud: one(r, "pay", "pay", "see"), scopes: one(r, nil, []string{"read"}, []string{"read", "write"}),
			bound: r.IntN(3) > 0, expired: r.IntN(8) == 0}
		c.token.other = c.token.bound && r.IntN(8) == 0
	}
	return c
}

// TestDecisionsAgainstDocuments holds what the stages decide, one after another,
// against the plainest reading of the same documents, on random policies and
// calls: with real tokens, a real relation engine and real conditions.
func TestDecisionsAgainstDocuments(t *testing.T) {
	if !relation.Built {
		t.Skip("built without the relation engine")
	}
	const sets, calls = 500, 60
	w := newWorld(t, "enforce")
	keys := w.jwks
	w.tokens = token.New(token.Options{Now: func() time.Time { return w.now }})
	if err := w.relations.SetModels(t.Context(), []relation.Model{{Name: "default/shop", Text: worldModel}}); err != nil {
		t.Fatal(err)
	}
	for user, account := range map[string]string{"alice": "a1", "bob": "a2"} {
		if err := w.relations.Write(t.Context(), "default/shop", []relation.Tuple{{User: "user:" + user, Relation: "can_pay", Object: "account:" + account}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.tokens.SetIssuer(token.Issuer{Name: "default/sso", URL: issuerURL, Algorithms: []string{"ES256"}, MaxLifetime: 15 * time.Minute}); err != nil {
		t.Fatal(err)
	}
	if err := w.tokens.SetKeys("default/sso", keys, w.now); err != nil {
		t.Fatal(err)
	}
	signed := map[string]string{}
	seen := map[string]int{}
	for seed := range uint64(sets) {
		r := rand.New(rand.NewPCG(seed, 2))
		text := docIdentities + randomDocPolicy(r, "one") + randomDocPolicy(r, "two") + randomDocPolicy(r, "old")
		files := []load.File{{Path: "p.yaml", Content: []byte(text)}, {Path: "shop.fga", Content: []byte(worldModel)}}
		set, problems := load.Load(files)
		plan, more := compile.Compile(set, compile.Options{TrustDomain: "example.org", Node: "n1"})
		if plan == nil {
			t.Fatalf("seed %d: %v %v\n%s", seed, problems, more, text)
		}
		n := &reader{map[string]*v1alpha1.APIPolicySpec{}, map[string]*v1alpha1.MachineIdentitySpec{}}
		for _, d := range set.Policies {
			n.policies[d.Name] = &d.Value.Spec
		}
		for _, d := range set.Identities {
			n.identities[d.Name] = &d.Value.Spec
		}
		w.plan = plan
		w.p = New(Options{Node: "n1", Ceiling: flow.ModeEnforce, Tokens: w.tokens, Relations: w.relations, Now: func() time.Time { return w.now }})
		w.p.SetPlan(plan)
		w.env = Env{Loop: w.p.NewLoop(), Task: w}
		for range calls {
			c := randomDocCall(r)
			allowed, by, what := n.judge(c)
			seen[what]++
			d := w.decideDocument(c, signed)
			said := d.Effect == flow.EffectAllow
			mode := n.policies[c.to].Mode
			switch {
			case said != allowed, d.Refused() != (!allowed && mode == "enforce"), len(by) > 0 && !slices.Contains(by, d.Rule), allowed && len(by) == 0 && d.Rule != "":
				t.Fatalf("seed %d, %+v %+v:\n got  %s/%s by rule %q (%s), refused %v\n want allowed %v by %q (%s)\n%s",
					seed, c, c.token, d.Stage, d.Reason, d.Rule, d.Detail, d.Refused(), allowed, by, what, text)
			case what == "denied" && d.Reason != flow.ReasonDenyRule && d.Stage != flow.StageCondition:
				t.Fatalf("seed %d, %+v: denied for %s\n%s", seed, c, d.Reason, text)
			}
		}
	}
	for _, what := range []string{"nobody", "unknown", "expired", "denied", "may not call", "allowed", "not satisfied", "otherwise allow", "otherwise deny"} {
		if seen[what] < calls {
			t.Errorf("%s: %d calls only", what, seen[what])
		}
	}
}

// decideDocument has the pipeline judge a call.
func (w *world) decideDocument(c docCall, signed map[string]string) flow.Decision {
	w.t.Helper()
	req := &flow.Request{
		ID: w.env.Loop.NewID(w.now), Time: w.now, Protocol: flow.ProtocolHTTP, Method: c.method, Path: c.path, Host: "pay.example", ContentLength: c.length,
		Destination: netip.MustParseAddrPort("10.0.0.1:80"),
		Peer: flow.Peer{ID: "spiffe://example.org/" + c.src, Address: netip.MustParseAddrPort("10.0.0.9:40000"), Channel: flow.ChannelTunnel,
			Thumbprints: [][32]byte{thumbprint}, NotAfter: w.now.Add(10 * time.Minute), Anchor: flow.AnchorTPM},
	}
	if c.src == "" || c.plaintext {
		anonymous(req)
		req.Peer.Channel, req.Peer.Thumbprints = flow.ChannelPlaintext, nil
	}
	for _, a := range c.accounts {
		header("X-Account", a)(req)
	}
	if c.kind != "" {
		header("X-Kind", c.kind)(req)
	}
	if t := c.token; t != nil {
		key := fmt.Sprintf("%+v", *t)
		if signed[key] == "" {
			edits := []string{fmt.Sprintf("sub=%q", t.sub), fmt.Sprintf("aud=%q", t.aud), fmt.Sprintf("scope=%q", strings.Join(t.scopes, " "))}
			switch {
			case !t.bound:
				edits = append(edits, "cnf")
			case t.other:
				edits = append(edits, fmt.Sprintf(`cnf={"x5t#S256":%q}`, base64.RawURLEncoding.EncodeToString(make([]byte, 32))))
			}
			if t.expired {
				edits = append(edits, fmt.Sprintf("iat=%d", w.now.Add(-time.Hour).Unix()), fmt.Sprintf("exp=%d", w.now.Add(-time.Hour+time.Minute).Unix()))
			}
			signed[key] = w.token(edits...)
		}
		bearer(signed[key])(req)
	}
	var d flow.Decision
	src, _, _ := w.plan.Identity(req.Peer.ID)
	for _, a := range w.plan.APIs() {
		if a.Name == "default/"+c.to {
			w.p.Decide(w.env, req, src, a, &d)
			return d
		}
	}
	w.t.Fatalf("no policy %s", c.to)
	return d
}
