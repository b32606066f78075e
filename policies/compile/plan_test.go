// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/relations"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

var wholeSet = `
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: unit, namespace: shop, labels: {a: b}}
spec: {owner: o, expires: 2026-11-30, select: {systemd: {unit: checkout.service}, uid: 0, process: {binary: /bin/x, digest: "sha256:` + strings.Repeat("A0", 32) + `"}}, mayCall: [cgroup, fixed]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: cgroup, namespace: shop}
spec:
  owner: o
  mode: enforce
  expires: "2026-11-01T12:00:00Z"
  select: {cgroup: {path: /shop/pay}}
  endpoints: ["10.0.0.1:80", "[fd00::1]:80", "[::ffff:10.0.0.2]:81"]
  egress: [{cidr: 10.9.0.0/16, ports: [5432, 80]}]
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: fixed}
spec: {owner: o, spiffeID: "spiffe://example.org/ns/shop/sa/fixed", endpoints: ["10.0.0.3:80"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: fixed, namespace: shop}
spec: {owner: o, spiffeID: "spiffe://example.org/node/far/unit/other.service"}
---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso, namespace: shop}
spec: {issuer: x, jwks: {keys: [{kty: EC, crv: P-256, kid: "1", x: a, y: b}]}, algorithms: [ES256, EdDSA], typ: [JWT], maxLifetime: 5m}
---
apiVersion: sallyport.dev/v1alpha1
kind: RelationModel
metadata: {name: builtin, namespace: shop}
spec: {engine: embedded}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: pay, namespace: shop}
spec:
  mode: enforce
  mtls: permissive
  otherwise: allow
  protect: {identity: cgroup, ports: [81, 80], protocol: http}
  rules:
    - {name: r, from: [unit], relation: "service:{source.name} can_call endpoint:{header.X-B}", when: "request.headers['X-A'] == request.headers['x-b']"}
    - {name: t, from: [unit], token: {issuer: sso, audience: pay, scopes: [s], boundTo: mtls}}
  anomaly: {warn: 1e-2, throttle: 0.001, warmup: {requests: 60}, onError: ignore}
  body: {inspect: 2KiB, over: skip}
`

func TestPlan(t *testing.T) {
	files := []load.File{
		{Path: "a.yaml", Content: []byte(wholeSet)},
		{Path: "b.tuples.yaml", Content: []byte(`[{user: "user:a", relation: viewer, object: "document:1"}]`)},
	}
	plan, problems := Build(files, testOptions())
	if plan == nil || len(problems) != 2 { // the expiries
		t.Fatal(problems)
	}
	names := make(map[string]*Identity)
	for _, id := range plan.Identities() {
		names[id.FullName()] = id
	}
	unit, cgroup, fixed := names["shop/unit"], names["shop/cgroup"], names["default/fixed"]
	for id, want := range map[*Identity]string{
		unit: "spiffe://example.org/node/node-1/unit/checkout.service", cgroup: "spiffe://example.org/node/node-1/ns/shop/cgroup",
		fixed: "spiffe://example.org/ns/shop/sa/fixed",
	} {
		if id.ID != want {
			t.Errorf("%s: ID %s", id.FullName(), id.ID)
		}
	}
	if s := unit.Selector; *s != (Selector{SystemdUnit: "checkout.service", HasUID: true, ProcessBinary: "/bin/x", ProcessDigest: "sha256:" + strings.Repeat("a0", 32)}) {
		t.Errorf("selector %+v", s)
	}
	if unit.Mode != flow.ModeAudit || cgroup.Mode != flow.ModeEnforce || fixed.Selector != nil || unit.Position.String() != "a.yaml:2:1" {
		t.Errorf("modes %s, %s, selector %v, position %s", unit.Mode, cgroup.Mode, fixed.Selector, unit.Position)
	}
	if !unit.MayCallIdentity(cgroup) || cgroup.MayCallIdentity(unit) || unit.MayCallIdentity(fixed) {
		t.Error("mayCall")
	}
	if e := cgroup.Egress; len(e) != 1 || e[0].Prefix != netip.MustParsePrefix("10.9.0.0/16") || e[0].Ports[0] != 80 || e[0].Ports[1] != 5432 {
		t.Errorf("egress %v", e)
	}
	// A day is valid to its end, an instant to itself.
	day := time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
	if unit.Expired(day.Add(-1)) || !unit.Expired(day) || fixed.Expired(day.AddDate(1000, 0, 0)) || !cgroup.Expired(testNow) || cgroup.Expired(testNow.Add(-1)) {
		t.Error("expiry")
	}
	testIdentityLookup(t, plan, unit, fixed)
	for address, want := range map[string]*Identity{"10.0.0.1:80": cgroup, "[::ffff:10.0.0.1]:80": cgroup, "[fd00::1]:80": cgroup, "10.0.0.2:81": cgroup, "10.0.0.1:81": nil, "10.0.0.3:80": fixed} {
		if got := plan.Claimed(netip.MustParseAddrPort(address)); got != want {
			t.Errorf("%s: %v", address, got)
		}
	}
	testAPI(t, plan, cgroup)
}

func testIdentityLookup(t *testing.T, plan *Plan, unit, fixed *Identity) {
	for _, c := range []struct {
		id   string
		want *Identity
		node string
	}{
		{"spiffe://example.org/node/node-1/unit/checkout.service", unit, "node-1"},
		{"spiffe://example.org/node/far/unit/checkout.service", unit, "far"},
		{"spiffe://example.org/node//unit/checkout.service", nil, ""},
		{"spiffe://example.org/node/unit/checkout.service", nil, ""},
		{"spiffe://other.org/node/far/unit/checkout.service", nil, ""},
		{"spiffe://example.org/ns/shop/sa/fixed", fixed, ""},
		{"spiffe://example.org/ns/shop/sa/fixed/", nil, ""},
		{"spiffe://example.org/node/near/unit/other.service", nil, ""},
		{"", nil, ""},
	} {
		id, node, ok := plan.Identity(c.id)
		if id != c.want || node != c.node || ok != (c.want != nil) {
			t.Errorf("%s: %v, %q, %v", c.id, id, node, ok)
		}
	}
	if id, node, ok := plan.Identity("spiffe://example.org/node/far/unit/other.service"); !ok || node != "" || id.FullName() != "shop/fixed" {
		t.Errorf("explicit: %v, %q, %v", id, node, ok)
	}
}

func testAPI(t *testing.T, plan *Plan, cgroup *Identity) {
	api := plan.API(cgroup, 80)
	if api == nil || plan.API(cgroup, 81) != api || plan.API(cgroup, 82) != nil || plan.API(nil, 80) != nil {
		t.Fatal("API by port")
	}
	if api.Name != "shop/pay" || api.Mode != flow.ModeEnforce || api.MTLS != MTLSPermissive || !api.OtherwiseAllow ||
		api.Protocol != ProtocolHTTP || api.AppTLS != AppTLSNone || strings.Join(api.Headers, ",") != "x-a,x-b" {
		t.Errorf("%+v", api)
	}
	if want := (Anomaly{Warn: .01, Throttle: .001, WarmupRequests: 60, WarmupIdentities: 3, IgnoreErrors: true}); *api.Anomaly != want {
		t.Errorf("anomaly %+v", *api.Anomaly)
	}
	if api.Body != (Body{2048, true}) {
		t.Errorf("body %+v", api.Body)
	}
	issuer := plan.Issuers()[0]
	if token := api.Rules[1].Token; token.Issuer != issuer || token.Bound != BoundMTLS || token.Audience != "pay" || token.Scopes[0] != "s" {
		t.Errorf("token %+v", token)
	}
	var jwks struct{ Keys []map[string]string }
	if err := json.Unmarshal(issuer.JWKS, &jwks); err != nil || len(jwks.Keys) != 1 || jwks.Keys[0]["kid"] != "1" {
		t.Errorf("JWKS %s: %v", issuer.JWKS, err)
	}
	if issuer.MaxLifetime != 5*time.Minute || issuer.Types[0] != "JWT" || issuer.URL != "x" {
		t.Errorf("issuer %+v", issuer)
	}
	if r := api.Rules[0]; r.Relation.Model != plan.Models()[0] || r.When == nil || r.Position.FileLine() != "a.yaml:47" {
		t.Errorf("rule %+v at %s", r, r.Position)
	}
	if tuple := plan.Tuples()[0]; tuple.Model != plan.Models()[0] || tuple.User != "user:a" || tuple.Position.String() != "b.tuples.yaml:1:2" {
		t.Errorf("tuple %+v", tuple)
	}
}

func TestDigest(t *testing.T) {
	a, b := load.File{Path: "a.yaml", Content: []byte("x")}, load.File{Path: "b.yaml", Content: []byte("y")}
	if load.Digest([]load.File{a, b}) != load.Digest([]load.File{b, a}) {
		t.Error("depends on the order")
	}
	for _, other := range [][]load.File{{a}, {a, {Path: "b.yaml", Content: []byte("z")}}, {a, {Path: "c.yaml", Content: []byte("y")}}, {{Path: "a.yamlx", Content: nil}, b}} {
		if load.Digest([]load.File{a, b}) == load.Digest(other) {
			t.Errorf("the same for %v", other)
		}
	}
}

func TestBadOptions(t *testing.T) {
	for _, o := range []Options{{Node: "a/b"}, {Node: ".."}, {TrustDomain: "A"}, {TrustDomain: "a/b"}} {
		if plan, problems := Build(nil, o); plan != nil || len(problems) != 1 {
			t.Errorf("%+v: %v", o, problems)
		}
	}
	if plan, problems := Build(nil, Options{}); plan == nil || len(problems) != 0 {
		t.Errorf("empty: %v", problems)
	}
}

// TestFingerprint holds that what an API decides by is in its fingerprint,
// and nothing that belongs to others.
func TestFingerprint(t *testing.T) {
	of := func(spec string) [32]byte {
		t.Helper()
		_, api := buildAPI(t, spec)
		return api.Fingerprint()
	}
	const spec = "  rules: [{name: r, from: [a]}]\n"
	const other = "---\napiVersion: sallyport.dev/v1alpha1\nkind: MachineIdentity\nmetadata: {name: %s}\nspec: {owner: o, spiffeID: \"spiffe://example.org/%s\"%s}\n"
	base := of(spec)
	for name, same := range map[string]string{
		"again":          spec,
		"a line further": "\n" + spec,
		"another":        spec + fmt.Sprintf(other, "x", "x", ""),
		"a stranger":     spec + fmt.Sprintf(other, "x", "x", ", mayCall: [b]"),
	} {
		if of(same) != base {
			t.Errorf("%s: differs", name)
		}
	}
	for name, changed := range map[string]string{
		"rule":     "  rules: [{name: r, from: [b]}]\n",
		"mode":     "  mode: enforce\n" + spec,
		"a caller": spec + fmt.Sprintf(other, "x", "x", ", mayCall: [server]"),
		"anomaly":  "  anomaly: {warn: 1e-3}\n" + spec,
	} {
		if of(changed) == base {
			t.Errorf("%s: the same", name)
		}
	}
	expiring := strings.Replace(preamble, "spiffe://example.org/a\"", "spiffe://example.org/a\", expires: 2030-01-01", 1)
	plan, problems := Build([]load.File{{Path: "p.yaml", Content: []byte(expiring + spec)}}, testOptions())
	if plan == nil {
		t.Fatal(problems)
	}
	if plan.APIs()[0].Fingerprint() == base {
		t.Error("a caller's expiry: the same")
	}
}

// TestModelsOfASetAreBounded holds that too many models, or models that take
// too long together, are told once, and that what names them is not told off.
func TestModelsOfASetAreBounded(t *testing.T) {
	if !relations.Built {
		t.Skip("built without the relation engine: models are not read")
	}
	long := "model\n  schema 1.1\n" + strings.Repeat("# "+strings.Repeat("x", 98)+"\n", 2500) + "type user\n"
	for want, c := range map[string]struct {
		text string
		n    int
	}{
		"a set has at most 256 RelationModels":                    {"model\n  schema 1.1\ntype user\n", relations.MaxModels + 2},
		"the RelationModels up to this one take too long to read": {long, 7},
	} {
		var b strings.Builder
		files := []load.File{{Path: "m.fga", Content: []byte(c.text)}}
		for i := range c.n {
			fmt.Fprintf(&b, "---\napiVersion: sallyport.dev/v1alpha1\nkind: RelationModel\nmetadata: {name: m%d}\nspec: {file: m.fga}\n", i)
		}
		files = append(files, load.File{Path: "p.yaml", Content: []byte(b.String())},
			load.File{Path: "a.tuples.yaml", Content: fmt.Appendf(nil, "model: default/m%d\ntuples: [{user: \"user:a\", relation: x, object: \"user:b\"}]\n", c.n-1)})
		plan, problems := Build(files, testOptions())
		if plan != nil || len(problems) != 1 || !strings.Contains(problems[0].Message, want) {
			t.Errorf("%s: %d problems: %.300v", want, len(problems), problems)
		}
	}
}
