// SPDX-License-Identifier: Apache-2.0

package trial_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/trial"
)

const policies = `
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: checkout, namespace: shop}
spec: {owner: a@b.example, expires: "2030-01-01", select: {systemd: {unit: checkout.service}}, mode: MODE, mayCall: [payments, guarded, db, strict]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: batch, namespace: shop}
spec: {owner: a@b.example, select: {systemd: {unit: batch.service}}, mode: MODE}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: payments, namespace: shop}
spec: {owner: a@b.example, select: {systemd: {unit: payments.service}}, endpoints: ["192.0.2.9:8080"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: guarded, namespace: shop}
spec: {owner: a@b.example, select: {systemd: {unit: guarded.service}}, endpoints: ["192.0.2.9:8081"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: db, namespace: shop}
spec: {owner: a@b.example, select: {systemd: {unit: db.service}}, endpoints: ["192.0.2.9:5432"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: strict, namespace: shop}
spec: {owner: a@b.example, expires: "2029-06-01", select: {systemd: {unit: strict.service}}, endpoints: ["192.0.2.9:8083"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso, namespace: shop}
spec: {issuer: "https://sso.example", jwks: {url: "https://sso.example/jwks"}, algorithms: [ALGORITHM], maxLifetime: 10m}
---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: binding, namespace: shop}
spec: {issuer: "https://binding.example", jwks: {url: "https://binding.example/jwks"}, algorithms: [ALGORITHM], binding: required}
---
apiVersion: sallyport.dev/v1alpha1
kind: RelationModel
metadata: {name: shop, namespace: shop}
spec: {file: shop.fga}
---
apiVersion: sallyport.dev/v1alpha1
kind: PostureProfile
metadata: {name: prod, namespace: shop}
spec: {node: {secureBoot: true, tpmQuoteMaxAge: 15m}, binary: {digest: known}, software: {vulnerabilities: [{severity: high, action: deny}]}, risk: {max: low}}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: payments, namespace: shop}
spec:
  protect: {identity: payments, ports: [8080], protocol: http}
  rules:
    - name: pay
      from: [checkout]
      hosts: [pay.example]
      http: [POST /v1/payments]
      token: {issuer: sso, audience: payments, scopes: [write], boundTo: mtls}
      relation: "user:{token.sub} can_pay account:{header.X-Account}"
      when: request.content_length < 10
  anomaly: {throttle: 0.5, warmup: {requests: 1, identities: 1}}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: guarded, namespace: shop}
spec:
  protect: {identity: guarded, ports: [8081], protocol: http}
  posture: prod
  rules: [{name: any, from: [checkout]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: strict, namespace: shop}
spec:
  protect: {identity: strict, ports: [8083], protocol: http}
  rules: [{name: any, from: [checkout], token: {issuer: binding, audience: strict}}]
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: db, namespace: shop}
spec:
  protect: {identity: db, ports: [5432], protocol: tcp}
  rules: [{name: any, from: [checkout]}]
`

const model = `model
  schema 1.1
type user
type account
  relations
    define owner: [user]
    define can_pay: owner
`

const suite = `
defaults:
  from: checkout
  to: payments
  http: POST /v1/payments
  headers: ["X-Account: a1"]
  token: {scopes: [write], claims: {sub: alice}}
  now: 2028-05-01
tuples: [{user: "user:alice", relation: owner, object: "account:a1"}]
cases:
  - {name: allowed, expect: {decision: allow, rule: pay}}
  - {name: allowed again, expect: allow}
  - {name: years later, now: 2029-12-31, expect: allow}
  - {name: expired identity, now: 2031-01-01, expect: {decision: deny, reason: identity_expired}}
  - {name: no token, without: [token], expect: {decision: deny, reason: token_missing}}
  - {name: two tokens, headers: ["X-Account: a1", "Authorization: Bearer x"], expect: {decision: deny, reason: token_place}}
  - {name: forged, without: [token], headers: ["X-Account: a1", "Authorization: Bearer e30.e30.AA"], expect: {decision: deny, stage: token}}
  - {name: another's token, token: {scopes: [write], bound: other, claims: {sub: alice}}, expect: {decision: deny, reason: token_binding}}
  - {name: unbound, token: {scopes: [write], bound: none, claims: {sub: alice}}, expect: {decision: deny, reason: token_unbound}}
  - {name: of an issuer that binds, to: strict, token: {bound: caller}, expect: allow}
  - {name: unbound of an issuer that binds, to: strict, token: {bound: none}, expect: {decision: deny, reason: token_unbound}}
  - {name: expired server, to: strict, now: 2029-07-01, token: {bound: caller}, expect: {decision: deny, reason: identity_expired}}
  - {name: no scope, token: {claims: {sub: alice}}, expect: {decision: deny, reason: token_scope}}
  - {name: old, token: {scopes: [write], age: 6m, claims: {sub: alice}}, expect: {decision: deny, reason: token_expired}}
  - {name: too long, token: {scopes: [write], lifetime: 11m, claims: {sub: alice}}, expect: {decision: deny, reason: token_lifetime}}
  - {name: no end, token: {scopes: [write], claims: {sub: alice, exp: null}}, expect: {decision: deny, reason: token_lifetime}}
  - {name: other audience, token: {audience: ledger, scopes: [write], claims: {sub: alice}}, expect: {decision: deny, reason: token_audience}}
  - {name: own name as subject, token: {scopes: [write]}, expect: {decision: deny, reason: relation_missing}}
  - {name: own name, token: {scopes: [write]}, tuples: [{user: "user:checkout", relation: owner, object: "account:a1"}], expect: allow}
  - {name: gone again, token: {scopes: [write]}, expect: {decision: deny, reason: relation_missing}}
  - {name: two accounts, headers: ["X-Account: a1", "X-Account: a2"], expect: {decision: deny, reason: http_header}}
  - {name: long, body: more than ten bytes, expect: {decision: deny, reason: condition}}
  - {name: chunked, headers: ["X-Account: a1", "Transfer-Encoding: chunked"], expect: allow}
  - {name: two lengths, headers: ["X-Account: a1", "Content-Length: 1", "Content-Length: 2"], expect: {decision: deny, reason: http_malformed}}
  - {name: other host, host: other.example, expect: {decision: deny, reason: no_rule, rule: none}}
  - {name: not called, from: batch, expect: {decision: deny, reason: may_call, refused: REFUSED}}
  - {name: not called from outside, from: batch, channel: tls, expect: {decision: deny, reason: may_call, refused: false}}
  - {name: nobody, from: none, expect: {decision: deny, reason: mtls_required}}
  - {name: unrecognised on the node, from: none, channel: kernel, expect: {decision: deny, reason: no_identity}}
  - {name: unknown, from: "spiffe://sallyport.local/x", expect: {decision: deny, reason: unknown_identity}}
  - {name: unprotected port, port: 9, without: [token], expect: {decision: deny, reason: no_policy}}
  - {name: a connection, to: db, without: [http, headers, token], expect: {decision: allow, policy: db}}
  - {name: nothing known, to: guarded, without: [headers, token], expect: {decision: deny, reason: posture_unknown}}
  - name: all known
    to: guarded
    without: [token]
    posture: KNOWN
    expect: allow
`

func plan(t testing.TB, mode, algorithm string) *compile.Plan {
	t.Helper()
	text := strings.NewReplacer("MODE", mode, "ALGORITHM", algorithm).Replace(policies)
	p, problems := compile.Build([]load.File{{Path: "shop.yaml", Content: []byte(text)}, {Path: "shop.fga", Content: []byte(model)}}, compile.Options{})
	if p == nil {
		t.Fatal(problems)
	}
	return p
}

func begin(t testing.TB, p *compile.Plan) *trial.Trial {
	t.Helper()
	tr, err := trial.New(t.Context(), p, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tr.Close)
	return tr
}

const known = `{node: {secureBoot: true, quoteAge: 10m}, binary: {digest: signed, execAfterConnect: false}, ` +
	`software: {vulnerabilities: {found: [{severity: medium}, {severity: high, notAffected: true}]}}, risk: low}`

func TestCases(t *testing.T) {
	if !relation.Built {
		t.Skip("built without the relation engine")
	}
	for _, algorithm := range []string{"ES256", "ES512", "EdDSA", "RS256", "PS384"} {
		for mode, refused := range map[string]string{"audit": "false", "enforce": "true"} {
			t.Run(algorithm+" "+mode, func(t *testing.T) {
				tr := begin(t, plan(t, mode, algorithm))
				text := strings.NewReplacer("REFUSED", refused, "KNOWN", known).Replace(suite)
				tests, problems := tr.Tests(load.File{Path: "shop_test.yaml", Content: []byte(text)})
				if len(problems) > 0 || len(tests) < 30 {
					t.Fatalf("%d cases: %v", len(tests), problems)
				}
				for _, one := range tests {
					r, err := tr.Run(t.Context(), one)
					if err != nil {
						t.Fatal(err)
					}
					if r.Differs != "" {
						t.Errorf("%s: %s: %+v", one.Name, r.Differs, r.Outcome.Decision)
					}
				}
			})
		}
	}
}

// TestGRPC holds described calls of gRPC against rules of both kinds.
func TestGRPC(t *testing.T) {
	p, problems := compile.Build([]load.File{{Path: "rpc.yaml", Content: []byte(`
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: a, namespace: shop}
spec: {owner: a@b.example, select: {systemd: {unit: a.service}}, mayCall: [s]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: s, namespace: shop}
spec: {owner: a@b.example, select: {systemd: {unit: s.service}}, endpoints: ["192.0.2.9:1", "192.0.2.9:2"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: rpc, namespace: shop}
spec:
  protect: {identity: s, ports: [1], protocol: grpc}
  rules: [{name: read, from: [a], grpc: [t.S/Read], when: "request.headers['content-type'].startsWith('application/grpc')"}]
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: both, namespace: shop}
spec:
  protect: {identity: s, ports: [2], protocol: auto}
  rules: [{name: read, from: [a], grpc: [t.S/Read]}, {name: http, from: [a], http: [POST /t.S/Write]}]
`)}}, compile.Options{})
	if load.HasErrors(problems) {
		t.Fatal(problems)
	}
	tr := begin(t, p)
	tests, problems := tr.Tests(load.File{Path: "rpc_test.yaml", Content: []byte(`
defaults: {from: a, to: s, port: 1, grpc: t.S/Read}
cases:
  - {name: read, expect: {decision: allow, rule: read}}
  - {name: write, grpc: t.S/Write, expect: {decision: deny, reason: no_rule}}
  - {name: no gRPC, http: POST /t.S/Read, expect: {decision: deny, reason: not_grpc, stage: protocol}}
  - {name: read of both, port: 2, expect: {decision: allow, rule: read}}
  - {name: write of both, port: 2, grpc: t.S/Write, expect: {decision: allow, rule: http}}
  - {name: no gRPC of both, port: 2, http: POST /t.S/Read, expect: {decision: deny, reason: no_rule}}
`)})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	for _, one := range tests {
		r, err := tr.Run(t.Context(), one)
		if err != nil {
			t.Fatal(err)
		}
		if r.Differs != "" {
			t.Errorf("%s: %s: %+v", one.Name, r.Differs, r.Outcome.Decision)
		}
	}
	_, problems = tr.Tests(load.File{Path: "rpc_test.yaml", Content: []byte(`
cases:
  - {name: one, from: a, to: s, port: 1, grpc: /t.S/Read, expect: allow}
  - {name: two, from: a, to: s, port: 1, grpc: t.S/Read, http: GET /, expect: allow}
  - {name: three, from: a, to: s, port: 1, expect: allow}
`)})
	if len(problems) != 3 {
		t.Errorf("%d problems: %v", len(problems), problems)
	}
}

// TestUpgrade holds described handshakes against rules with and without
// upgrade, as the pipeline judges them.
func TestUpgrade(t *testing.T) {
	p, problems := compile.Build([]load.File{{Path: "live.yaml", Content: []byte(`
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: a, namespace: shop}
spec: {owner: a@b.example, select: {systemd: {unit: a.service}}, mayCall: [s]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: s, namespace: shop}
spec: {owner: a@b.example, select: {systemd: {unit: s.service}}, endpoints: ["192.0.2.9:1", "192.0.2.9:2"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: live, namespace: shop}
spec:
  protect: {identity: s, ports: [1], protocol: http}
  rules:
    - {name: live, from: [a], http: ["* /live"], upgrade: [websocket]}
    - {name: plain, from: [a], http: ["* /plain"]}
    - {name: none, effect: deny, http: ["* /live/denied"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: any, namespace: shop}
spec: {protect: {identity: s, ports: [2]}, rules: [{name: any, from: [a]}]}
`)}}, compile.Options{})
	if load.HasErrors(problems) {
		t.Fatal(problems)
	}
	tr := begin(t, p)
	tests, problems := tr.Tests(load.File{Path: "live_test.yaml", Content: []byte(`
defaults: {from: a, to: s, port: 1, http: GET /live, upgrade: websocket}
cases:
  - {name: listed, expect: {decision: allow, rule: live}}
  - {name: without, without: [upgrade], expect: {decision: allow, rule: live}}
  - {name: not listed, http: GET /plain, expect: {decision: deny, reason: http_upgrade, stage: policy, rule: plain}}
  - {name: denied, http: GET /live/denied, expect: {decision: deny, reason: deny_rule}}
  - {name: no rule, http: GET /else, expect: {decision: deny, reason: no_rule}}
  - {name: no handshake, http: POST /live, expect: {decision: deny, reason: http_upgrade, stage: protocol}}
  - {name: content, body: x, expect: {decision: deny, reason: http_upgrade, stage: protocol}}
  - {name: by hand, without: [upgrade], headers: ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 8", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="], expect: {decision: deny, reason: http_upgrade, stage: protocol}}
  - {name: twice, headers: ["Upgrade: h2c"], expect: {decision: deny, reason: http_upgrade, stage: protocol}}
  - {name: by identity alone, port: 2, expect: {decision: allow, rule: any}}
`)})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	for _, one := range tests {
		r, err := tr.Run(t.Context(), one)
		if err != nil {
			t.Fatal(err)
		}
		if r.Differs != "" {
			t.Errorf("%s: %s: %+v", one.Name, r.Differs, r.Outcome.Decision)
		}
	}
}

func TestFactsThatFallShort(t *testing.T) {
	if !relation.Built {
		t.Skip("built without the relation engine")
	}
	tr := begin(t, plan(t, "audit", "ES256"))
	for from, to := range map[string]string{
		"secureBoot: true": "secureBoot: false", "quoteAge: 10m": "quoteAge: 16m", "digest: signed": "digest: unlisted",
		"execAfterConnect: false": "execAfterConnect: true", ", notAffected: true": "", "risk: low": "risk: medium",
		"{node:": "{evidence: claimed, node:",
	} {
		text := "cases: [{name: a, from: checkout, to: guarded, http: GET /, posture: " + strings.Replace(known, from, to, 1) + ", expect: {decision: deny, stage: posture}}]"
		tests, problems := tr.Tests(load.File{Path: "a_test.yaml", Content: []byte(text)})
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		if r, err := tr.Run(t.Context(), tests[0]); err != nil || r.Differs != "" {
			t.Errorf("%s: %s %v", to, r.Differs, err)
		}
	}
}

func TestFaults(t *testing.T) {
	if !relation.Built {
		t.Skip("built without the relation engine")
	}
	tr := begin(t, plan(t, "audit", "ES256"))
	for _, c := range []struct{ call, want string }{
		{"to: db", `from: is missing`},
		{"from: checkout", `to: is missing`},
		{"from: chekout, to: db", `no MachineIdentity "chekout" (did you mean "checkout"?)`},
		{"from: none, to: db, channel: tunnel", `channel: tunnel proves an identity`},
		{"from: checkout, to: db, channel: plaintext", `channel: plaintext proves no identity`},
		{"from: checkout, to: batch", `no APIPolicy protects shop/batch`},
		{"from: checkout, to: db, http: GET /", `leave it out`},
		{"from: checkout, to: payments", `so a call is a request`},
		{"from: checkout, to: payments, http: GET", `is not METHOD /path`},
		{"from: checkout, to: payments, http: GET /, headers: [X]", `is not a field line`},
		{"from: checkout, to: payments, http: GET /, headers: [\"Host: x\"]", `write host: for it`},
		{"from: checkout, to: guarded, http: GET /, token: {scopes: [x]}", `no rule of the policy asks for a token`},
		{"from: checkout, to: payments, http: GET /, token: {issuer: ssso}", `no TokenIssuer "ssso" (did you mean "sso"?)`},
		{"from: checkout, to: payments, grpc: a.B/C, upgrade: websocket", `upgrade: goes with http`},
		{"from: checkout, to: db, upgrade: websocket", `upgrade: goes with http`},
		{"from: checkout, to: payments, http: GET /, upgrade: h2c", `is not one of websocket`},
		{"from: checkout, to: db, token: {issuer: sso}", `belong to a request`},
		{"from: checkout, to: db, tuples: [{user: x, relation: owner, object: \"account:1\"}]", `the user is not TYPE:ID`},
		{"from: checkout, to: db, tuples: [{user: \"user:x\", relation: ownr, object: \"account:1\"}]", `type "account" of the model has no relation "ownr" (did you mean "owner"?)`},
		{"from: checkout, to: db, tuples: [{user: \"user:x\", relation: owner, object: \"account:1\", model: shp}]", `no RelationModel "shp" (did you mean "shop"?)`},
	} {
		_, problems := tr.Tests(load.File{Path: "a_test.yaml", Content: fmt.Appendf(nil, "cases: [{name: a, %s, expect: allow}]", c.call)})
		if len(problems) != 1 || !strings.Contains(problems[0].Message, c.want) || problems[0].Line != 1 {
			t.Errorf("%s: %v, want %s", c.call, problems, c.want)
		}
	}
}

func FuzzTests(f *testing.F) {
	if !relation.Built {
		f.Skip("built without the relation engine")
	}
	tr := begin(f, plan(f, "audit", "EdDSA"))
	f.Add(strings.NewReplacer("REFUSED", "true", "KNOWN", known).Replace(suite))
	f.Add("cases: [{name: a, from: none, to: db, expect: {decision: deny, refused: false}}]")
	f.Fuzz(func(t *testing.T, text string) {
		tests, problems := tr.Tests(load.File{Path: "f_test.yaml", Content: []byte(text)})
		if load.HasErrors(problems) && len(tests) > 0 {
			t.Fatal("cases of a file with errors")
		}
		for _, one := range tests {
			if r, err := tr.Run(t.Context(), one); err == nil && r.Differs == "" && r.Outcome.Decision.Stage.String() == "unknown" {
				t.Fatalf("no stage: %+v", r.Outcome)
			}
		}
	})
}
