// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/agent/datapath"
	"github.com/sallyport-dev/sallyport/agent/events"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// TestBlame holds which document each kind of refusal of the kernel goes back
// to.
func TestBlame(t *testing.T) {
	plan, problems := compile.Build([]load.File{{Path: "p.yaml", Content: []byte(`apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: app}
spec: {owner: a@b.example, select: {cgroup: {path: /app}}, mode: observe, mayCall: [server]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: server}
spec: {owner: a@b.example, select: {cgroup: {path: /server}}}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: api}
spec: {protect: {identity: server, ports: [80]}, rules: [{name: r, from: [app]}]}
`)}}, compile.Options{TrustDomain: "example.org", Node: "n"})
	if plan == nil {
		t.Fatal(problems)
	}
	app, server := plan.Identities()[0], plan.Identities()[1]
	v := &view{
		ceiling: flow.ModeEnforce,
		plan:    plan, byNumber: map[flow.IdentityNumber]*compile.Identity{1: app, 2: server},
		protected: map[datapath.ProtectedPort]*compile.API{{Netns: 7, Port: 80}: plan.APIs()[0]},
	}
	modes := map[string]flow.Mode{"": flow.ModeAudit, "default/apip.yaml:11": flow.ModeAudit, "p.yaml:1": flow.ModeObserve}
	here, port := netip.MustParseAddrPort("10.0.0.1:40000"), netip.MustParseAddrPort("10.0.0.2:80")
	for _, c := range []struct {
		name string
		e    events.Event
		want string
	}{
		{"a squatter", events.Event{Hook: events.HookBind, Identity: 1, Target: 2, Source: port, NetnsCookie: 7}, "default/api p.yaml:11"},
		{"a squatter that nobody knows", events.Event{Hook: events.HookBind, Target: 2, Source: port, NetnsCookie: 7}, "default/api p.yaml:11"},
		{"a server that is gone", events.Event{Hook: events.HookSteer, Source: here, Destination: port, NetnsCookie: 7}, "default/api p.yaml:11"},
		{"one of our own ports", events.Event{Hook: events.HookSteer, Source: here, Destination: here, NetnsCookie: 7}, " "},
		{"egress", events.Event{Hook: events.HookConnect, Identity: 1, Source: here, Destination: port, NetnsCookie: 7}, " p.yaml:1"},
		{"a foreign socket", events.Event{Hook: events.HookConnect, Identity: 1, Target: 2, Source: here, Destination: port}, " p.yaml:1"},
		{"an ambiguous workload", events.Event{Hook: events.HookConnect, Identity: 9, Target: 2, Source: here, Destination: port}, "default/api p.yaml:11"},
		{"nobody, to nobody", events.Event{Hook: events.HookSocket}, " "},
	} {
		policy, position, mode := v.blame(&c.e)
		if got := policy + " " + position; got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
		if want := modes[policy+position]; mode != want {
			t.Errorf("%s: %s, want %s", c.name, mode, want)
		}
	}
	if policy, position, mode := (*view)(nil).blame(&events.Event{}); policy+position != "" || mode != flow.ModeAudit {
		t.Error("without a view", policy, position, mode)
	}
}

// TestKernelRefusalsAreKept holds that the latest can be explained, and that
// no more are kept.
func TestKernelRefusalsAreKept(t *testing.T) {
	var r refusals
	for i := range keptRefusals + 10 {
		r.put(&eventRecord{RequestID: fmt.Sprint(i), Reason: flow.ReasonEgress, Hook: "connect", Stage: "kernel", Decision: "deny"})
	}
	for id, want := range map[string]bool{"0": false, "9": false, "10": true, fmt.Sprint(keptRefusals + 9): true, "": false} {
		e, ok := r.explain(id)
		if ok != want || ok && (e.RequestID != id || len(e.Steps) != 1 || e.Steps[0].Detail == "" || e.Detail == "") {
			t.Errorf("%q: %+v, %t", id, e, ok)
		}
	}
	if len(r.ring) != keptRefusals {
		t.Errorf("%d kept", len(r.ring))
	}
}

// TestEveryKernelReasonHasAText holds that no refusal of the kernel is
// explained by nothing.
func TestEveryKernelReasonHasAText(t *testing.T) {
	for code := 1; code < events.ReasonCount; code++ {
		reason, ok := events.ReasonOf(uint8(code))
		if !ok || kernelDetails[reason] == "" {
			t.Errorf("%s has no text", reason)
		}
	}
}

// TestOutdated holds that a view is made anew when an identity expires, and
// when a clock that is set back makes one valid again.
func TestOutdated(t *testing.T) {
	at := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	var docs strings.Builder
	for i, e := range []string{"", `expires: "2029-12-31T23:00:00Z", `, `expires: "2030-01-01T01:00:00Z", `, `expires: "2020-01-01T00:00:00Z", `} {
		fmt.Fprintf(&docs, "---\napiVersion: sallyport.dev/v1alpha1\nkind: MachineIdentity\nmetadata: {name: i%d}\nspec: {owner: o, %sselect: {cgroup: {path: /%[1]d}}}\n", i, e)
	}
	plan, problems := compile.Build([]load.File{{Path: "p.yaml", Content: []byte(docs.String())}}, compile.Options{})
	if plan == nil {
		t.Fatal(problems)
	}
	v := &view{plan: plan}
	v.expired, v.expires = expiries(plan, at)
	for after, want := range map[time.Duration]bool{0: false, -time.Hour: false, -time.Hour - time.Second: true, time.Hour - time.Second: false, time.Hour: true} {
		if got := v.outdated(at.Add(after)); got != want {
			t.Errorf("%s later: %v", after, got)
		}
	}
	if (&view{}).outdated(at) || (*view)(nil).outdated(at) {
		t.Error("without expiries")
	}
}
