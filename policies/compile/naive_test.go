// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// call is one call to the protected server.
type call struct {
	src                string // NAMESPACE/NAME, "" without identity
	host, method, path string // an opaque connection has no method
	grpc, upgrade      bool
	length             int64
}

// naive reads documents in the plainest way, rule by rule, and knows nothing
// of how they are compiled.
type naive struct {
	policy     *v1alpha1.APIPolicySpec
	namespace  string
	identities map[string]*v1alpha1.MachineIdentitySpec // by NAMESPACE/NAME
}

func newNaive(set *load.Set) *naive {
	d := set.Policies[0]
	n := &naive{&d.Value.Spec, d.Namespace, map[string]*v1alpha1.MachineIdentitySpec{}}
	for _, i := range set.Identities {
		n.identities[i.FullName()] = &i.Value.Spec
	}
	return n
}

// in resolves a reference of a document in a namespace.
func in(namespace, ref string) string {
	if strings.Contains(ref, "/") {
		return ref
	}
	return namespace + "/" + ref
}

// judgement is what the documents say of a call: the rules that speak of it
// and their postures, "NAME" or "NAME:PROFILE" and "!" where its condition is
// false, and what refuses it whatever they say.
type judgement struct {
	rules   []string
	refusal flow.Reason
	// allowed is the outcome where all facts of all profiles are known and
	// suffice.
	allowed bool
}

func (n *naive) judge(c call) (j judgement) {
	var denied, permitted bool
	for _, deny := range []bool{true, false} {
		if !deny {
			j.refusal = n.refusal(c)
			if j.refusal != flow.ReasonOK {
				break
			}
		}
		for i := range n.policy.Rules {
			r := &n.policy.Rules[i]
			if (r.Effect == "deny") != deny || !n.speaks(r, c) {
				continue
			}
			text, holds := r.Name, n.holds(r, c)
			if p := r.Posture; p != "" {
				text += ":" + in(n.namespace, p)
			}
			if !holds {
				text += "!"
			}
			j.rules = append(j.rules, text)
			denied, permitted = denied || deny && holds, permitted || !deny && holds && (!c.upgrade || n.switches(r, c))
		}
	}
	spoken := slices.ContainsFunc(j.rules, func(s string) bool { return !strings.HasPrefix(s, "deny") })
	j.allowed = !denied && j.refusal == flow.ReasonOK && (permitted || !spoken && n.policy.Otherwise == "allow" && (!c.upgrade || n.anything(c)))
	return j
}

// switches says whether a connection may switch protocols by a rule.
func (n *naive) switches(r *v1alpha1.Rule, c call) bool {
	return slices.Contains(r.Upgrade, "websocket") || n.anything(c)
}

// anything says that the documents ask for nothing of what the caller sends,
// but for who it is: then it may be whatever bytes it likes.
func (n *naive) anything(c call) bool {
	if c.src == "" || n.policy.Protect.Protocol != "auto" || n.policy.Posture != "" {
		return false
	}
	bare, asking := false, false
	for i := range n.policy.Rules {
		r := &n.policy.Rules[i]
		if len(r.From) > 0 && !slices.ContainsFunc(r.From, func(ref string) bool { return in(n.namespace, ref) == c.src }) {
			continue
		}
		if r.Effect == "deny" {
			return false
		}
		plain := len(r.Hosts)+len(r.HTTP)+len(r.GRPC) == 0 && r.When == "" && r.Posture == ""
		bare, asking = bare || plain, asking || !plain
	}
	return bare || !asking && n.policy.Otherwise == "allow"
}

// refusal is the ceiling: who is known must list the server in its mayCall.
func (n *naive) refusal(c call) flow.Reason {
	if id := n.identities[c.src]; id != nil {
		namespace, _, _ := strings.Cut(c.src, "/")
		if !slices.ContainsFunc(id.MayCall, func(ref string) bool { return in(namespace, ref) == in(n.namespace, n.policy.Protect.Identity) }) {
			return flow.ReasonMayCall
		}
	}
	return flow.ReasonOK
}

// holds reads the conditions that randomRule writes.
func (n *naive) holds(r *v1alpha1.Rule, c call) bool {
	if r.When == "" {
		return true
	}
	var most int64
	if _, err := fmt.Sscanf(r.When, "request.content_length < %d", &most); err != nil {
		panic(err)
	}
	if c.method == "" {
		return r.Effect == "deny" // there is no request: it cannot be told
	}
	return c.length < most
}

func (n *naive) speaks(r *v1alpha1.Rule, c call) bool {
	if len(r.From) > 0 && !slices.ContainsFunc(r.From, func(ref string) bool { return in(n.namespace, ref) == c.src }) {
		return false
	}
	deny := r.Effect == "deny"
	if c.method == "" && deny && len(r.HTTP)+len(r.GRPC) > 0 {
		return true // it cannot be held against it
	}
	if c.method == "" && deny && len(r.Hosts) > 0 && c.host == "" {
		return true
	}
	if len(r.Hosts) > 0 && !n.hosted(r, c) {
		return false
	}
	if len(r.HTTP)+len(r.GRPC) == 0 {
		return true
	}
	if c.method == "" {
		return false
	}
	return slices.ContainsFunc(r.HTTP, func(p string) bool { return naiveHTTP(p, c, deny) }) ||
		slices.ContainsFunc(r.GRPC, func(p string) bool { return naiveGRPC(p, c, deny) })
}

func (n *naive) hosted(r *v1alpha1.Rule, c call) bool {
	return slices.ContainsFunc(r.Hosts, func(h string) bool { return strings.EqualFold(h, strings.TrimSuffix(c.host, ".")) })
}

func naiveHTTP(p string, c call, deny bool) bool {
	m, template, _ := strings.Cut(p, " ")
	if deny {
		return (m == "*" || strings.EqualFold(m, c.method)) && naivePath(unescaped(template), unescaped(c.path), true)
	}
	return (m == "*" || m == c.method) && naivePath(unreserved(template), unreserved(c.path), false)
}

func naiveGRPC(p string, c call, deny bool) bool {
	service, method, _ := strings.Cut(p, "/")
	if deny { // any method, and whatever is beneath the service
		at := strings.TrimSuffix(unescaped(c.path), "/")
		return at == "/"+p || method == "*" && strings.HasPrefix(at+"/", "/"+service+"/")
	}
	rest, ok := strings.CutPrefix(unreserved(c.path), "/"+service+"/")
	return ok && c.grpc && (rest == method || method == "*" && rest != "" && !strings.Contains(rest, "/"))
}

func naivePath(template, path string, deny bool) bool {
	if deny && len(path) > 1 {
		path = strings.TrimSuffix(path, "/")
	}
	if deny && len(template) > 1 {
		template = strings.TrimSuffix(template, "/")
	}
	ts, ps := strings.Split(template, "/"), strings.Split(path, "/")
	for i, s := range ts {
		if s == "**" {
			return true
		}
		if i >= len(ps) {
			return false
		}
		if strings.HasPrefix(s, "{") {
			if ps[i] == "" {
				return false
			}
		} else if s != ps[i] {
			return false
		}
		if i == len(ts)-2 && ts[i+1] == "**" && i == len(ps)-1 {
			return true
		}
	}
	return len(ts) == len(ps)
}

func unescaped(s string) string {
	u, err := url.PathUnescape(s)
	if err != nil {
		return s
	}
	return u
}

func unreserved(s string) string {
	for c := range 256 {
		b := byte(c)
		if isUnreserved(b) {
			s = strings.ReplaceAll(strings.ReplaceAll(s, fmt.Sprintf("%%%02X", b), string(rune(b))), fmt.Sprintf("%%%02x", b), string(rune(b)))
		}
	}
	return strings.ReplaceAll(strings.ReplaceAll(s, "%3a", "%3A"), "%2b", "%2B")
}

func pick[T any](r *rand.Rand, list ...T) T { return list[r.IntN(len(list))] }

func randomPattern(r *rand.Rand) string {
	var b strings.Builder
	b.WriteString(pick(r, "GET", "POST", "*") + " ")
	n := r.IntN(4)
	for i := range n {
		b.WriteString("/" + pick(r, "a", "b", "a", "x:y", "%61", "c%3Ad", fmt.Sprintf("{p%d}", i)))
	}
	b.WriteString(pick(r, "", "", "/", "/**"))
	if strings.HasSuffix(b.String(), " ") {
		b.WriteString("/")
	}
	return b.String()
}

func randomPath(r *rand.Rand) string {
	var b strings.Builder
	for range r.IntN(5) {
		b.WriteString("/" + pick(r, "a", "b", "a", "b", "x:y", "x%3ay", "%61", "c%3ad", "c%3Ad", "c:d", "z", "%62"))
	}
	b.WriteString(pick(r, "", "", "", "/"))
	if b.Len() == 0 {
		return "/"
	}
	return b.String()
}

// naiveIdentities are the callers; stranger may not call the server.
const naiveIdentities = `
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: a}
spec: {owner: o, spiffeID: "spiffe://example.org/a", mayCall: [server]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: b}
spec: {owner: o, spiffeID: "spiffe://example.org/b", mayCall: [server, a]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: a, namespace: other}
spec: {owner: o, spiffeID: "spiffe://example.org/other/a", mayCall: [default/server]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: stranger, namespace: other}
spec: {owner: o, spiffeID: "spiffe://example.org/stranger", mayCall: [a]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: server}
spec: {owner: o, spiffeID: "spiffe://example.org/server", endpoints: ["10.0.0.1:80"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: PostureProfile
metadata: {name: p}
spec: {risk: {max: low}}
---
apiVersion: sallyport.dev/v1alpha1
kind: PostureProfile
metadata: {name: p, namespace: other}
spec: {node: {secureBoot: true}}
---
`

func randomMethod(r *rand.Rand) string {
	return pick(r, "s.S/", "s.T/", "a/") + pick(r, "M", "N", "*", "a")
}

// randomRule writes a rule; a bare one names callers alone.
func randomRule(r *rand.Rand, i int, grpcOnly, bare bool) string {
	deny := r.IntN(4) == 0
	var b strings.Builder
	list := func(field string, items []string) {
		if len(items) > 0 {
			fmt.Fprintf(&b, ", %s: [\"%s\"]", field, strings.Join(items, `", "`))
		}
	}
	distinct := func(n int, next func() string) (out []string) {
		for range n {
			if s := next(); !slices.Contains(out, s) {
				out = append(out, s)
			}
		}
		return out
	}
	fmt.Fprintf(&b, "    - {name: %s%d, effect: %[1]s", map[bool]string{true: "deny", false: "allow"}[deny], i)
	from := pick(r, nil, []string{"a"}, []string{"b"}, []string{"a", "b"}, []string{"other/a"}, []string{"default/a", "other/stranger"})
	list("from", from)
	if len(from) == 0 && !deny {
		b.WriteString(", all: true")
	}
	if bare {
		return b.String() + "}\n"
	}
	list("hosts", pick(r, nil, nil, []string{"one"}, []string{"One", "two"}))
	var http []string
	if !grpcOnly {
		http = distinct(r.IntN(4), func() string { return randomPattern(r) })
	}
	grpc := distinct(max(0, r.IntN(6)-3), func() string { return randomMethod(r) })
	list("http", http)
	list("grpc", grpc)
	opens := func(p string) bool { return !strings.HasPrefix(p, "POST ") }
	if !deny && !grpcOnly && r.IntN(3) == 0 && (len(http)+len(grpc) == 0 || slices.ContainsFunc(http, opens)) {
		list("upgrade", []string{"websocket"})
	}
	if r.IntN(3) == 0 {
		fmt.Fprintf(&b, ", when: \"request.content_length < %d\"", r.IntN(4))
	}
	if !deny && r.IntN(3) == 0 {
		b.WriteString(", posture: " + pick(r, "p", "other/p"))
	}
	return b.String() + "}\n"
}

func randomPolicy(r *rand.Rand) string {
	protocol, posture, rules := pick(r, "auto", "auto", "http", "grpc"), pick(r, "", "  posture: p\n", "  posture: other/p\n"), 1+r.IntN(12)
	bare := r.IntN(4) == 0
	if bare {
		protocol, posture, rules = "auto", "", 1+r.IntN(2)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: sallyport.dev/v1alpha1\nkind: APIPolicy\nmetadata: {name: api}\nspec:\n  protect: {identity: server, ports: [80], protocol: %s}\n  otherwise: %s\n",
		protocol, pick(r, "deny", "allow"))
	b.WriteString(posture + "  rules:\n")
	for i := range rules {
		b.WriteString(randomRule(r, i, protocol == "grpc", bare))
	}
	return b.String()
}

func randomCall(r *rand.Rand) call {
	c := call{
		src: pick(r, "default/a", "default/b", "other/a", "other/stranger", ""), host: pick(r, "one", "ONE", "two.", "three"),
		method: pick(r, "GET", "POST", "POST", "get", "post", "PUT"), path: randomPath(r), length: int64(r.IntN(4)) - 1,
	}
	switch r.IntN(4) {
	case 0:
		c.path = pick(r, "/s.S/", "/s%2ES/", "/s.T/", "/a/", "/s.s/") + pick(r, "M", "%4d", "N", "m", "M/", "M/N", "", "Other")
	case 1:
		if r.IntN(3) == 0 {
			c.method, c.path, c.host = "", "", pick(r, c.host, "")
		}
	}
	c.grpc = c.method == "POST" && r.IntN(4) > 0
	c.upgrade = c.method == "GET" && r.IntN(2) == 0
	return c
}

// byPlan judges the call by the plan.
func (j *judgement) byPlan(t *testing.T, plan *Plan, c call) {
	api := plan.APIs()[0]
	var src *Identity
	for _, id := range plan.Identities() {
		if id.FullName() == c.src {
			src = id
		}
	}
	var m Matches
	api.Match(&m, src, Call{Host: c.host, Method: c.method, Path: c.path, GRPC: c.grpc, Upgrade: c.upgrade})
	var denied, permitted, spoken bool
	a := &Activation{Request: &flow.Request{Method: c.method, Path: c.path, Host: c.host, ContentLength: c.length}, Source: src}
	for i := range m.Rules {
		r := m.Rules[i].Rule
		text, holds := r.Name, true
		if r.Posture != nil {
			text += ":" + r.Posture.FullName()
		}
		if r.When != nil {
			var err error
			if holds, err = r.When.Eval(a); err != nil {
				if c.method != "" {
					t.Fatal(err)
				}
				holds = r.Deny
			}
		}
		if !holds {
			text += "!"
		}
		j.rules = append(j.rules, text)
		switches := !c.upgrade || r.Upgrade || !api.AsksUpgrade(src)
		denied, permitted, spoken = denied || r.Deny && holds, permitted || !r.Deny && holds && switches, spoken || !r.Deny
	}
	j.refusal = m.Refusal
	j.allowed = !denied && m.Refusal == flow.ReasonOK && (permitted || !spoken && api.OtherwiseAllow && (!c.upgrade || !api.AsksUpgrade(src)))
	if allow, decided := api.IdentityOnly(src); decided && allow != j.allowed {
		t.Errorf("by identity alone %v, for this call %v", allow, j.allowed)
	}
}

// TestPlanAgainstDocuments holds the plan against the plainest reading of the
// same documents, on random policies and calls.
func TestPlanAgainstDocuments(t *testing.T) {
	const policies, calls = 400, 200
	seen := map[string]int{}
	for seed := range uint64(policies) {
		differ(t, seed, calls, seen)
	}
	for _, what := range []string{"allowed", "refused", "rules", "grpc", "posture", "opaque", "may_call", "otherwise", "upgrade", "no upgrade", "anything", "idle"} {
		if seen[what] < calls {
			t.Errorf("%s: %d calls only: the calls do not meet the policies", what, seen[what])
		}
	}
}

// FuzzPlanAgainstDocuments is the same with seeds of the fuzzer's choice.
func FuzzPlanAgainstDocuments(f *testing.F) {
	f.Add(uint64(1_000_000))
	f.Fuzz(func(t *testing.T, seed uint64) { differ(t, seed, 50, map[string]int{}) })
}

func differ(t *testing.T, seed uint64, calls int, seen map[string]int) {
	r := rand.New(rand.NewPCG(seed, 1))
	text := naiveIdentities + randomPolicy(r)
	files := []load.File{{Path: "p.yaml", Content: []byte(text)}}
	set, problems := load.Load(files)
	plan, more := Compile(set, testOptions())
	if plan == nil {
		t.Fatalf("seed %d: %v %v\n%s", seed, problems, more, text)
	}
	n := newNaive(set)
	if p := plan.APIs()[0].Posture; (p == nil) != (n.policy.Posture == "") || p != nil && p.FullName() != in(n.namespace, n.policy.Posture) {
		t.Fatalf("seed %d: posture %v of %q", seed, p, n.policy.Posture)
	}
	idle := n.without(more)
	seen["idle"] += len(idle)
	for range calls {
		c := randomCall(r)
		want := n.judge(c)
		var got judgement
		got.byPlan(t, plan, c)
		if got.refusal == flow.ReasonTarget { // what no document can allow
			if got.allowed || strings.Contains(c.path, "//") == false && c.host != "" {
				t.Fatalf("seed %d, %+v: refused as a target", seed, c)
			}
			continue
		}
		if got.refusal != want.refusal || got.allowed != want.allowed || !slices.Equal(got.rules, want.rules) || t.Failed() {
			t.Fatalf("seed %d, %+v:\n got  %+v\n want %+v\n%s", seed, c, got, want, text)
		}
		for name, without := range idle {
			if j := without.judge(c); j.allowed != want.allowed {
				t.Fatalf("seed %d, %+v: without rule %s, said to have no effect, allowed is %v\n%s", seed, c, name, j.allowed, text)
			}
		}
		count(seen, c, want)
		if c.upgrade {
			plain := c
			plain.upgrade = false
			for what, is := range map[string]bool{
				"upgrade": want.allowed, "no upgrade": !want.allowed && n.judge(plain).allowed, "anything": want.allowed && n.anything(c),
			} {
				if is {
					seen[what]++
				}
			}
		}
	}
}

var hasNoEffect = regexp.MustCompile(`^rule "(\w+)" (?:never allows|has no effect|says the same)`)

// without returns the documents less each rule that is said to have no
// effect, by its name.
func (n *naive) without(problems []load.Problem) map[string]*naive {
	out := map[string]*naive{}
	for _, p := range problems {
		m := hasNoEffect.FindStringSubmatch(p.Message)
		if m == nil {
			continue
		}
		policy := *n.policy
		policy.Rules = slices.DeleteFunc(slices.Clone(policy.Rules), func(r v1alpha1.Rule) bool { return r.Name == m[1] })
		out[m[1]] = &naive{&policy, n.namespace, n.identities}
	}
	return out
}

func count(seen map[string]int, c call, j judgement) {
	for what, is := range map[string]bool{
		"allowed": j.allowed, "refused": !j.allowed, "rules": len(j.rules) > 1, "opaque": c.method == "", "may_call": j.refusal == flow.ReasonMayCall,
		"grpc": strings.HasPrefix(c.path, "/s.S/M") && len(j.rules) > 0, "otherwise": j.allowed && len(j.rules) == 0,
		"posture": slices.ContainsFunc(j.rules, func(s string) bool { return strings.Contains(s, ":") }),
	} {
		if is {
			seen[what]++
		}
	}
}
