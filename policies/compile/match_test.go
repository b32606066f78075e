// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const preamble = `
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: a}
spec: {owner: o, spiffeID: "spiffe://example.org/a", mayCall: [server]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: b}
spec: {owner: o, spiffeID: "spiffe://example.org/b", mayCall: [server]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: stranger}
spec: {owner: o, spiffeID: "spiffe://example.org/c"}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: server}
spec: {owner: o, spiffeID: "spiffe://example.org/server", endpoints: ["10.0.0.1:80"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: api}
spec:
  protect: {identity: server, ports: [80]}
`

func buildAPI(t testing.TB, spec string) (*Plan, *API) {
	t.Helper()
	plan, problems := Build([]load.File{{Path: "p.yaml", Content: []byte(preamble + spec)}}, testOptions())
	if plan == nil {
		for _, p := range problems {
			t.Log(p)
		}
		t.Fatalf("no plan for:\n%.2000s", spec)
	}
	return plan, plan.APIs()[0]
}

func caller(t testing.TB, plan *Plan, name string) *Identity {
	t.Helper()
	if name == "" {
		return nil
	}
	i := slices.IndexFunc(plan.Identities(), func(i *Identity) bool { return i.Name == name })
	if i < 0 {
		t.Fatalf("no identity %s", name)
	}
	return plan.Identities()[i]
}

// found writes what Match found: refusal, then rules with template and
// parameters.
func found(m *Matches) string {
	var out []string
	if m.Refusal != flow.ReasonOK {
		out = append(out, "!"+string(m.Refusal))
	}
	for i := range m.Rules {
		r := &m.Rules[i]
		s := r.Rule.Name
		if r.Template != "" {
			s += " " + r.Template
		}
		for n := range r.Params() {
			name, value := r.ParamAt(n)
			s += " " + name + "=" + value
		}
		out = append(out, s)
	}
	return strings.Join(out, "; ")
}

func TestMatch(t *testing.T) {
	plan, api := buildAPI(t, `
  rules:
    - {name: read, from: [a], http: ["GET /v1/payments/{id}", "GET /v1/payments"]}
    - {name: any-a, from: [a], hosts: [one.example]}
    - {name: no-debug, effect: deny, http: ["* /debug/**"]}
    - {name: no-secret, effect: deny, from: [b], http: ["POST /v1/secret:key/"]}
    - {name: files, from: [a, b], http: ["GET /files/{top}/**", "GET /files/{top}/index"]}
    - {name: colon, from: [b], http: ["GET /v1/a:b", "GET /v1/c%20d"]}
    - {name: everyone, all: true, http: ["GET /health"]}
    - {name: no-evil, effect: deny, hosts: [evil.example]}
    - {name: root, from: [b], http: ["GET /", "OPTIONS /**"]}
`)
	for _, c := range []struct{ src, host, method, path, want string }{
		{"a", "x", "GET", "/v1/payments/7", "read /v1/payments/{id} id=7"},
		{"a", "x", "GET", "/v1/payments", "read /v1/payments"},
		{"a", "x", "GET", "/v1/payments/", ""},
		{"a", "x", "GET", "/v1/payments/7/", ""},
		{"a", "x", "HEAD", "/v1/payments", ""},
		{"a", "x", "get", "/v1/payments", ""},
		{"a", "x", "GET", "/V1/payments", ""},
		{"a", "x", "GET", "/v1/%70ayments/%37", "read /v1/payments/{id} id=7"},
		{"a", "x", "GET", "/v1/payments/a%3ab", "read /v1/payments/{id} id=a:b"},
		{"a", "x", "GET", "/v1/payments/a%2525b", "read /v1/payments/{id} id=a%25b"},
		{"a", "one.example", "GET", "/v1/payments/7", "read /v1/payments/{id} id=7; any-a"},
		{"a", "ONE.example.", "PUT", "/x", "any-a"},
		{"b", "one.example", "PUT", "/x", ""},
		{"", "x", "GET", "/health", "everyone /health"},
		{"stranger", "x", "GET", "/health", "!may_call"},
		{"stranger", "x", "GET", "/debug/x", "!may_call; no-debug /debug/**"},
		{"a", "x", "GET", "/health", "everyone /health"},
		{"", "x", "GET", "/debug", "no-debug /debug/**"},
		{"", "x", "GET", "/debug/", "no-debug /debug/**"},
		{"", "x", "brew", "/debug/pprof/heap", "no-debug /debug/**"},
		{"", "x", "GET", "/%64ebug/x", "no-debug /debug/**"},
		{"", "x", "GET", "/debugger", ""},
		{"b", "x", "POST", "/v1/secret:key", "no-secret /v1/secret:key/"},
		{"b", "x", "post", "/v1/secret%3akey/", "no-secret /v1/secret:key/"},
		{"a", "x", "POST", "/v1/secret:key", ""},
		{"b", "x", "GET", "/v1/a:b", "colon /v1/a:b"},
		{"b", "x", "GET", "/v1/a%3Ab", ""},
		{"b", "x", "GET", "/v1/c%20d", "colon /v1/c%20d"},
		{"a", "x", "GET", "/files/t/a/b", "files /files/{top}/** top=t"},
		{"a", "x", "GET", "/files/t", "files /files/{top}/** top=t"},
		{"a", "x", "GET", "/files/t/index", "files /files/{top}/index top=t"},
		{"a", "x", "GET", "/files/", ""},
		{"b", "x", "GET", "/", "root /"},
		{"b", "x", "OPTIONS", "*", "root /**"},
		{"b", "x", "OPTIONS", "/any/thing", "root /**"},
		{"a", "evil.example", "GET", "/v1/payments", "no-evil; read /v1/payments"},
		{"a", "evil.example.", "GET", "/v1/payments", "no-evil; read /v1/payments"},
		{"a", "EVIL.example", "GET", "/v1/payments", "no-evil; read /v1/payments"},
		{"a", "", "GET", "/v1/payments", "!http_target"},
		{"a", "x", "GET", "", "!http_target"},
		{"a", "x", "GET", "v1/payments", "!http_target"},
		{"a", "x", "GET", "//v1/payments", "!http_target"},
		{"a", "x", "GET", "/v1//payments", "!http_target"},
		{"a", "x", "GET", "/v1/./payments", "!http_target"},
		{"a", "x", "GET", "/v1/x/../payments", "!http_target"},
		{"a", "x", "GET", "/v1/x/%2e%2E/payments", "!http_target"},
		{"a", "x", "GET", "/v1/x/.%2e", "!http_target"},
		{"a", "x", "GET", "/v1/payments/a%2Fb", "!http_target"},
		{"a", "x", "GET", "/v1/payments/a%5Cb", "!http_target"},
		{"a", "x", "GET", `/v1/payments/a\b`, "!http_target"},
		{"a", "x", "GET", "/v1/payments/a%00b", "!http_target"},
		{"a", "x", "GET", "/v1/payments/%zz", "!http_target"},
		{"a", "x", "GET", "/v1/payments/%4", "!http_target"},
		{"a", "x", "GET", "/v1/payments?x", "!http_target"},
		{"a", "x", "GET", "/v1/payments#x", "!http_target"},
		{"a", "x", "GET", "/v1/payments/...", "read /v1/payments/{id} id=..."},
		{"a", "x", "GET", "/v1/payments/.a", "read /v1/payments/{id} id=.a"},
		{"a", "x", "GET", "/" + strings.Repeat("a", 70000), "!http_too_large"},
		// Opaque: what cannot be judged is denied by deny rules, and not
		// allowed by allow rules.
		{"a", "", "", "", "no-debug; no-evil"},
		{"b", "", "", "", "no-debug; no-secret; no-evil"},
		{"a", "one.example", "", "", "no-debug; any-a"},
		{"a", "evil.example", "", "", "no-debug; no-evil"},
	} {
		var m Matches
		api.Match(&m, caller(t, plan, c.src), Call{Host: c.host, Method: c.method, Path: c.path})
		if got := found(&m); got != c.want {
			t.Errorf("%s: %s %s%.40s:\n got  %s\n want %s", c.src, c.method, c.host, c.path, got, c.want)
		}
	}
}

func TestMatchForgetsTheCallBefore(t *testing.T) {
	plan, api := buildAPI(t, `
  rules:
    - {name: read, from: [a], http: ["GET /x/{id}"]}
    - {name: nope, effect: deny, http: ["GET /no"]}
`)
	var m Matches
	a := caller(t, plan, "a")
	api.Match(&m, a, Call{Host: "h", Method: "GET", Path: "/x/1"})
	api.Match(&m, a, Call{Host: "h", Method: "GET", Path: "/bad%"})
	api.Match(&m, a, Call{Host: "h", Method: "GET", Path: "/no"})
	if got := found(&m); got != "nope /no" {
		t.Errorf("got %s", got)
	}
}

func TestMatchDoesNotAllocate(t *testing.T) {
	plan, api := buildAPI(t, `
  rules:
    - {name: read, from: [a], http: ["GET /v1/payments/{id}", "* /v1/**"]}
    - {name: all, all: true}
    - {name: nope, effect: deny, http: ["* /debug/**"]}
`)
	var m Matches
	a := caller(t, plan, "a")
	for _, path := range []string{"/v1/payments/77", "/debug/x", "/other"} {
		if n := testing.AllocsPerRun(100, func() { api.Match(&m, a, Call{Host: "host.example", Method: "GET", Path: path}) }); n != 0 {
			t.Errorf("%s: %v allocations", path, n)
		}
	}
}

func TestPlanIsSafeForConcurrentUse(t *testing.T) {
	plan, api := buildAPI(t, manyRules(50))
	a := caller(t, plan, "a")
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			var m Matches
			for i := range 500 {
				n := 25 + 2*(i%10)
				api.Match(&m, a, Call{Host: "h", Method: "GET", Path: fmt.Sprintf("/v1/area%d/items/g%d", n, g)})
				if _, v := m.Rules[len(m.Rules)-1].ParamAt(0); v != fmt.Sprintf("g%d", g) {
					t.Errorf("%d, %d: %s", g, i, found(&m))
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestIdentityOnly(t *testing.T) {
	for _, c := range []struct{ name, spec, src, want string }{
		{"allow", "rules: [{name: r, from: [a]}]", "a", "allow"},
		{"everyone", "rules: [{name: r, all: true}]", "a", "allow"},
		{"unnamed", "rules: [{name: r, from: [a]}]", "b", "deny"},
		{"may call", "rules: [{name: r, all: true}]", "stranger", "deny"},
		{"nobody", "rules: [{name: r, all: true}]", "", "undecided"},
		{"otherwise", "otherwise: allow\n  rules: [{name: r, from: [a]}]", "b", "allow"},
		{"deny beats", "rules: [{name: r, from: [a]}, {name: d, effect: deny, from: [a]}]", "a", "deny"},
		{"deny of another", "rules: [{name: r, from: [a]}, {name: d, effect: deny, from: [b]}]", "a", "allow"},
		{"deny of a path", `rules: [{name: r, from: [a]}, {name: d, effect: deny, http: ["* /x"]}]`, "a", "undecided"},
		{"deny of another's path", `rules: [{name: r, from: [a]}, {name: d, effect: deny, from: [b], http: ["* /x"]}]`, "a", "allow"},
		{"path", `rules: [{name: r, from: [a], http: ["* /x"]}]`, "a", "undecided"},
		{"host", `rules: [{name: r, from: [a], hosts: [x]}]`, "a", "undecided"},
		{"condition", `rules: [{name: r, from: [a], when: "true"}]`, "a", "undecided"},
		{"or without a path", `rules: [{name: r, from: [a], http: ["* /x"]}, {name: s, from: [a]}]`, "a", "allow"},
		{"anomaly", "anomaly: {warn: 0.1}\n  rules: [{name: r, from: [a]}]", "a", "undecided"},
		{"anomaly, denied anyway", "anomaly: {warn: 0.1}\n  rules: [{name: r, from: [a]}]", "b", "deny"},
		{"body", "body: {inspect: 1KiB}\n  rules: [{name: r, from: [a]}]", "a", "undecided"},
	} {
		t.Run(c.name, func(t *testing.T) {
			plan, api := buildAPI(t, "  "+c.spec+"\n")
			allow, decided := api.IdentityOnly(caller(t, plan, c.src))
			got := map[bool]string{true: "allow", false: "deny"}[allow]
			if !decided {
				got = "undecided"
			}
			if got != c.want || allow && !decided {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
	plan, problems := Build([]load.File{{Path: "p.yaml", Content: []byte(strings.Replace(preamble, "ports: [80]", "ports: [80], protocol: http", 1) +
		"  rules: [{name: r, from: [a]}]\n")}}, testOptions())
	if plan == nil {
		t.Fatal(problems)
	}
	if _, decided := plan.APIs()[0].IdentityOnly(caller(t, plan, "a")); decided {
		t.Error("protocol: http is decided by identity alone, though what is not HTTP is refused")
	}
}
