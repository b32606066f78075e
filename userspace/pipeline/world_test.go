// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/anomaly"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

const issuerURL = "https://sso.shop.example"

// worldPolicies protect five APIs; MODE is replaced.
const worldPolicies = `
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: checkout, namespace: shop}
spec:
  owner: team-checkout@shop.example
  expires: "2090-01-01"
  select: {systemd: {unit: checkout.service}}
  mode: enforce
  mayCall: [payments, ledger, shared, watched, odd, guarded]
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: stranger, namespace: shop}
spec:
  owner: team-x@shop.example
  select: {systemd: {unit: stranger.service}}
  mayCall: [ledger]
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: retired, namespace: shop}
spec:
  owner: team-old@shop.example
  expires: "2020-01-01"
  select: {systemd: {unit: retired.service}}
  mayCall: [payments]
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: payments, namespace: shop}
spec: {owner: p@shop.example, select: {systemd: {unit: payments.service}}, endpoints: ["10.0.0.11:8080"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: ledger, namespace: shop}
spec: {owner: l@shop.example, select: {systemd: {unit: ledger.service}}, endpoints: ["10.0.0.12:5000"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: shared, namespace: shop}
spec: {owner: s@shop.example, select: {systemd: {unit: shared.service}}, endpoints: ["10.0.0.13:80"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: watched, namespace: shop}
spec: {owner: w@shop.example, select: {systemd: {unit: watched.service}}, endpoints: ["10.0.0.14:80"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: odd, namespace: shop}
spec: {owner: o@shop.example, select: {systemd: {unit: odd.service}}, endpoints: ["10.0.0.15:80"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: guarded, namespace: shop}
spec: {owner: g@shop.example, select: {systemd: {unit: guarded.service}}, endpoints: ["10.0.0.16:80"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso, namespace: shop}
spec:
  issuer: https://sso.shop.example
  jwks: {url: https://sso.shop.example/jwks}
  algorithms: [ES256]
  maxLifetime: 15m
---
apiVersion: sallyport.dev/v1alpha1
kind: RelationModel
metadata: {name: shop, namespace: shop}
spec: {file: shop.fga}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: payments, namespace: shop}
spec:
  mode: MODE
  protect: {identity: payments, ports: [8080], protocol: http}
  mtls: required
  rules:
    - name: create
      from: [checkout, retired]
      http: [POST /v1/payments]
      token: {issuer: sso, audience: payments, scopes: ["payments:write"], boundTo: mtls}
      relation: "user:{token.sub} can_pay account:{header.X-Account}"
      when: request.content_length < 1000 && !('test' in token.groups)
    - name: read
      from: [checkout]
      http: ["GET /v1/payments/{id}"]
      token: {issuer: sso, audience: payments}
    - name: export-weak
      from: [checkout]
      http: [GET /v1/export]
      token: {issuer: sso, audience: payments, scopes: ["export"]}
    - name: export-strong
      from: [checkout]
      http: [GET /v1/export]
      token: {issuer: sso, audience: payments}
      when: token.sub == 'root'
    - name: claims
      from: [checkout]
      http: [GET /v1/claims]
      token: {issuer: sso, audience: payments}
      when: token.claims.level > 3
    - name: no-debug
      effect: deny
      http: ["* /debug/**"]
    - name: any-debug
      from: [checkout]
      http: ["GET /debug/{x}", GET /ok, GET /when]
    - name: no-when
      effect: deny
      http: [GET /when]
      when: request.headers['X-Kind'] == 'bad'
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: ledger, namespace: shop}
spec:
  mode: MODE
  protect: {identity: ledger, ports: [5000], protocol: tcp}
  rules:
    - {name: settle, from: [checkout]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: shared, namespace: shop}
spec:
  mode: MODE
  mtls: permissive
  protect: {identity: shared, ports: [80], protocol: http}
  rules:
    - {name: hello, all: true, http: [GET /hello]}
    - {name: inner, from: [checkout], http: [GET /inner]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: watched, namespace: shop}
spec:
  mode: MODE
  protect: {identity: watched, ports: [80], protocol: http}
  rules:
    - {name: items, from: [checkout], http: ["GET /items/{id}"]}
  anomaly: {warn: 0.4, throttle: 0.02, warmup: {requests: 200, identities: 1}}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: odd, namespace: shop}
spec:
  mode: MODE
  protect: {identity: odd, ports: [80], protocol: http}
  otherwise: allow
  rules:
    - {name: items, from: [checkout], http: ["GET /items/{id}"], relation: "service:{source.name} caller endpoint:{param.id}"}
    - {name: plain, from: [checkout], http: ["GET /live/{id}"]}
    - {name: live, from: [checkout], http: ["GET /live/{id}"], upgrade: [websocket], when: params.id != 'closed'}
    - {name: no-live, effect: deny, http: [GET /live/denied]}
  anomaly: {revoke: 0.02, warmup: {requests: 200, identities: 1}}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: guarded, namespace: shop}
spec:
  mode: MODE
  protect: {identity: guarded, ports: [80], protocol: http}
  rules:
    - {name: items, from: [checkout], http: ["GET /items/{id}"], token: {issuer: sso, audience: payments}}
  anomaly: {warn: 0.4, stepUp: 0.02, warmup: {requests: 200, identities: 1}}
`

const worldModel = `model
  schema 1.1
type user
type service
type endpoint
  relations
    define caller: [service]
type account
  relations
    define can_pay: [user]
`

// world is a Pipeline over the real stages.
type world struct {
	t         testing.TB
	p         *Pipeline
	env       Env
	plan      *compile.Plan
	tokens    *token.Verifier
	relations *relation.Engine
	anomalies *anomaly.Scorer
	key       *ecdsa.PrivateKey
	jwks      []byte
	now       time.Time
	blocks    int // how often a decision had to wait
}

// Block counts and runs f in place.
func (w *world) Block(f func()) { w.blocks++; f() }

func newWorld(t testing.TB, mode string) *world {
	t.Helper()
	w := &world{t: t, now: time.Now().Truncate(time.Second)}
	var problems []load.Problem
	w.plan, problems = compile.Build([]load.File{
		{Path: "world.yaml", Content: []byte(strings.ReplaceAll(worldPolicies, "MODE", mode))},
		{Path: "shop.fga", Content: []byte(worldModel)},
	}, compile.Options{TrustDomain: "example.org", Node: "n1"})
	for _, p := range problems {
		if p.Severity == load.Error {
			t.Fatal(p)
		}
	}
	w.newTokens()
	var err error
	if w.relations, err = relation.Open(t.Context(), relation.Options{StateDir: t.TempDir(), Timeout: time.Minute}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.relations.Close() })
	if err = w.relations.SetModels(t.Context(), []relation.Model{{Name: "shop/shop", Text: worldModel}}); err != nil {
		t.Fatal(err)
	}
	w.write("user:alice can_pay account:a1")
	w.write("service:checkout caller endpoint:7")
	if w.anomalies, err = anomaly.New(anomaly.Options{}); err != nil {
		t.Fatal(err)
	}
	w.p = New(Options{Node: "n1", Ceiling: flow.ModeEnforce, Tokens: w.tokens, Relations: w.relations, Anomalies: w.anomalies})
	w.p.SetPlan(w.plan)
	w.env = Env{Loop: w.p.NewLoop(), Task: w}
	return w
}

func (w *world) newTokens() {
	var err error
	if w.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		w.t.Fatal(err)
	}
	point, err := w.key.PublicKey.Bytes()
	if err != nil {
		w.t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	keys, err := json.Marshal(map[string]any{"keys": []any{map[string]any{
		"kid": "k1", "kty": "EC", "crv": "P-256", "use": "sig", "x": b64(point[1:33]), "y": b64(point[33:])}}})
	if err != nil {
		w.t.Fatal(err)
	}
	w.jwks = keys
	w.tokens = token.New(token.Options{})
	if err := w.tokens.SetIssuer(token.Issuer{Name: "shop/sso", URL: issuerURL, Algorithms: []string{"ES256"}, MaxLifetime: 15 * time.Minute}); err != nil {
		w.t.Fatal(err)
	}
	if err := w.tokens.SetKeys("shop/sso", keys, w.now); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) write(tuple string) {
	w.t.Helper()
	words := strings.Fields(tuple)
	tu := relation.Tuple{User: words[0], Relation: words[1], Object: words[2]}
	if err := w.relations.Write(context.Background(), "shop/shop", []relation.Tuple{tu}); err != nil {
		w.t.Fatal(err)
	}
}

var thumbprint = [32]byte{1, 2, 3}

// token signs claims changed by edit, "name=JSON value" or "name" to drop one.
func (w *world) token(edits ...string) string {
	w.t.Helper()
	claims := jwt.MapClaims{
		"iss": issuerURL, "sub": "alice", "aud": "payments", "client_id": "web", "jti": "t1",
		"iat": w.now.Unix(), "exp": w.now.Add(5 * time.Minute).Unix(), "scope": "payments:write payments:read",
		"groups": []string{"staff"},
		"cnf":    map[string]any{"x5t#S256": base64.RawURLEncoding.EncodeToString(thumbprint[:])},
	}
	for _, e := range edits {
		name, value, set := strings.Cut(e, "=")
		if !set {
			delete(claims, name)
			continue
		}
		var v any
		if err := json.Unmarshal([]byte(value), &v); err != nil {
			w.t.Fatal(err)
		}
		claims[name] = v
	}
	t := jwt.NewWithClaims(jwt.SigningMethodES256, claims)
	t.Header["kid"], t.Header["typ"] = "k1", "at+jwt"
	s, err := t.SignedString(w.key)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// identity returns a MachineIdentity by its name in namespace shop.
func (w *world) identity(name string) *compile.Identity {
	w.t.Helper()
	for _, i := range w.plan.Identities() {
		if i.Name == name {
			return i
		}
	}
	w.t.Fatalf("no identity %s", name)
	return nil
}

func (w *world) api(name string) *compile.API {
	w.t.Helper()
	for _, a := range w.plan.APIs() {
		if a.Name == "shop/"+name {
			return a
		}
	}
	w.t.Fatalf("no API %s", name)
	return nil
}

// request is one by checkout over a tunnel; edits change it.
func (w *world) request(line string, edits ...func(*flow.Request)) *flow.Request {
	method, target, _ := strings.Cut(line, " ")
	path, query, _ := strings.Cut(target, "?")
	r := &flow.Request{
		ID: w.env.Loop.NewID(w.now), Time: w.now, Protocol: flow.ProtocolHTTP, Method: method, Path: path, Query: query, Host: "pay.shop.example",
		Destination: netip.MustParseAddrPort("10.0.0.11:8080"),
		Peer: flow.Peer{ID: w.identity("checkout").ID, Address: netip.MustParseAddrPort("10.0.0.1:40000"), Channel: flow.ChannelTunnel,
			Thumbprints: [][32]byte{thumbprint}, Serial: "abc1", NotAfter: w.now.Add(10 * time.Minute), Anchor: flow.AnchorTPM},
	}
	if method == "" {
		r.Protocol = flow.ProtocolTCP
	}
	for _, e := range edits {
		e(r)
	}
	return r
}

func header(name, value string) func(*flow.Request) {
	return func(r *flow.Request) {
		r.Headers = append(r.Headers, flow.Header{Name: []byte(name), Value: []byte(value)})
	}
}

func bearer(t string) func(*flow.Request) { return header("Authorization", "Bearer "+t) }

func channel(c flow.Channel) func(*flow.Request) {
	return func(r *flow.Request) { r.Peer.Channel = c }
}

func (w *world) as(name string) func(*flow.Request) {
	return func(r *flow.Request) { r.Peer.ID = w.identity(name).ID }
}

func anonymous(r *flow.Request) { r.Peer.ID, r.Peer.Serial, r.Peer.NotAfter = "", "", time.Time{} }

// decide looks the caller up as the proxy does.
func (w *world) decide(r *flow.Request, api string) flow.Decision {
	w.t.Helper()
	var d flow.Decision
	src, _, _ := w.plan.Identity(r.Peer.ID)
	w.p.Decide(w.env, r, src, w.api(api), &d)
	return d
}

// warm teaches an API 300 requests for numbered items.
func (w *world) warm(api string, edits ...func(*flow.Request)) {
	w.t.Helper()
	for i := range 300 {
		r := w.request(fmt.Sprintf("GET /items/7?page=%d&kind=book", i%40), edits...)
		r.Time = w.now.Add(time.Duration(i) * time.Second)
		if d := w.decide(r, api); d.Effect != flow.EffectAllow {
			w.t.Fatalf("request %d of the warm-up: %+v", i, d)
		}
	}
}
