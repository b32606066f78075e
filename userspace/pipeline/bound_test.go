// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/relation"
)

// TestOneRequestIsBounded holds that what the rules of a policy ask for one
// request has an end, that what is not asked any more does not open anything, and
// that the trace stays short and ends with what it rests on.
func TestOneRequestIsBounded(t *testing.T) {
	const costly = `"[1,2,3,4,5,6,7,8,9].exists(x, [1,2,3,4,5,6,7,8].exists(y, [1,2,3,4,5,6,7].exists(z, x+y+z == 100)))"`
	rules := func(n int, format string) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "    - "+format+"\n", i)
		}
		return b.String()
	}
	const everything = "    - {name: all, from: [app]}\n"
	for _, c := range []struct {
		name, rules string
		reason      flow.Reason
		rule        string
		long        bool
	}{
		{"few costly conditions", rules(5, "{name: r%d, from: [app], when: "+costly+"}") + everything, flow.ReasonOK, "all", false},
		{"many costly conditions", rules(3000, "{name: r%d, from: [app], when: "+costly+"}") +
			"    - {name: last, from: [app], when: request.method == 'GET'}\n", flow.ReasonConditionErr, "r19", true},
		{"few costly denials", rules(5, "{name: d%d, effect: deny, when: "+costly+"}") + everything, flow.ReasonOK, "all", false},
		{"a denial after many costly ones", rules(3000, "{name: d%d, effect: deny, when: "+costly+"}") + everything, flow.ReasonConditionErr, "d19", false},
		{"few relations", rules(60, `{name: r%d, from: [app], relation: "user:none can_pay account:%[1]d"}`) + everything, flow.ReasonOK, "all", false},
		{"many relations", rules(200, `{name: r%d, from: [app], relation: "user:none can_pay account:%[1]d"}`) +
			"    - {name: last, from: [app], relation: \"user:alice can_pay account:a1\"}\n", flow.ReasonRelation, "r0", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, "enforce")
			plan, problems := compile.Build([]load.File{{Path: "p.yaml", Content: []byte(`apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: app}
spec: {owner: a@b.example, mayCall: [server], spiffeID: "spiffe://example.org/app"}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: server}
spec: {owner: a@b.example, spiffeID: "spiffe://example.org/server", endpoints: ["192.0.2.9:80"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: RelationModel
metadata: {name: shop}
spec: {file: shop.fga}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: api}
spec:
  mode: enforce
  protect: {identity: server, ports: [80], protocol: http}
  rules:
` + c.rules)}, {Path: "shop.fga", Content: []byte(worldModel)}}, compile.Options{TrustDomain: "example.org"})
			if plan == nil {
				t.Fatal(problems)
			}
			if err := w.relations.SetModels(t.Context(), []relation.Model{{Name: "default/shop", Text: worldModel}}); err != nil {
				t.Fatal(err)
			}
			if err := w.relations.Write(t.Context(), "default/shop", []relation.Tuple{{User: "user:alice", Relation: "can_pay", Object: "account:a1"}}); err != nil {
				t.Fatal(err)
			}
			w.p.SetPlan(plan)
			src, _, _ := plan.Identity("spiffe://example.org/app")
			dst, _, _ := plan.Identity("spiffe://example.org/server")
			req := &flow.Request{ID: "01ARZ3NDEKTSV4RRFFQ69G5FAV", Method: "GET", Path: "/", Host: "server", Protocol: flow.ProtocolHTTP,
				Destination: netip.MustParseAddrPort("192.0.2.9:80"), Peer: flow.Peer{ID: "spiffe://example.org/app", Channel: flow.ChannelTunnel}}
			for range 2 { // the second is bounded as the first was
				var d flow.Decision
				w.p.Decide(w.env, req, src, plan.API(dst, 80), &d)
				if d.Reason != c.reason || d.Rule != c.rule {
					t.Fatalf("%s by %q: %s, want %s by %q", d.Reason, d.Rule, d.Detail, c.reason, c.rule)
				}
				if len(d.Steps) > maxSteps || c.long != (len(d.Steps) == maxSteps) {
					t.Errorf("%d steps", len(d.Steps))
				}
				if !c.long {
					continue
				}
				last, note := d.Steps[maxSteps-1], d.Steps[maxSteps-2]
				if last.Reason != d.Reason || last.Rule != d.Rule || !strings.HasSuffix(note.Detail, " steps are left out") {
					t.Errorf("ends with %+v, %+v", note, last)
				}
			}
		})
	}
}
