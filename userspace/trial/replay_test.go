// SPDX-License-Identifier: Apache-2.0

package trial_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/trial"
)

const replayHead = `
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: server}
spec: {owner: a@b.example, spiffeID: "spiffe://example.org/server", endpoints: ["192.0.2.9:80", "192.0.2.9:81"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: guest}
spec: {owner: a@b.example, spiffeID: "spiffe://example.org/guest"}
---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso}
spec: {issuer: "https://sso.example", jwks: {url: "https://sso.example/jwks"}, algorithms: [ES256]}
---
apiVersion: sallyport.dev/v1alpha1
kind: RelationModel
metadata: {name: shop}
spec: {file: shop.fga}
---
`

const replayModel = "model\n  schema 1.1\ntype user\ntype account\n  relations\n    define can_pay: [user]\n"

// replaySets are sets that differ in one thing or several.
var replaySets = map[string]string{
	"base": caller("") + policy("enforce", `
    - {name: list, from: [app], http: [GET /items]}
    - {name: item, from: [app], http: ["GET /items/{id}"], token: {issuer: sso, audience: items}}
    - {name: hosted, from: [app], hosts: [a.example], http: [GET /hosted]}
    - {name: conditional, from: [app], http: [POST /items], when: request.content_length < 5}
    - {name: related, from: [app], http: ["GET /docs/{doc}"], relation: "user:{source.name} can_pay account:{param.doc}"}
    - {name: no-debug, effect: deny, http: ["* /items/debug"]}`),
	"audit": caller("") + policy("audit", `
    - {name: list, from: [app], http: [GET /items]}
    - {name: item, from: [app], http: ["GET /items/{id}"], token: {issuer: sso, audience: items}}
    - {name: hosted, from: [app], hosts: [a.example], http: [GET /hosted]}
    - {name: conditional, from: [app], http: [POST /items], when: request.content_length < 5}
    - {name: related, from: [app], http: ["GET /docs/{doc}"], relation: "user:{source.name} can_pay account:{param.doc}"}
    - {name: no-debug, effect: deny, http: ["* /items/debug"]}`),
	"other token": caller("") + policy("enforce", `
    - {name: list, from: [app], http: [GET /items], token: {issuer: sso, audience: items}}
    - {name: item, from: [app], http: ["GET /items/{id}"], token: {issuer: sso, audience: items, scopes: [read]}}
    - {name: hosted, from: [app], hosts: [b.example], http: [GET /hosted]}
    - {name: conditional, from: [app], http: [POST /items], when: request.content_length < 2}
    - {name: related, from: [app], http: ["GET /docs/{doc}"]}`),
	"wide": caller("") + policy("enforce", `
    - {name: everything, from: [app], http: ["* /**"]}
    - {name: no-debug, effect: deny, http: ["* /items/debug"]}
    - {name: no-big, effect: deny, http: ["POST /**"], when: request.content_length > 3}`),
	"narrow": caller("") + policy("enforce", `
    - {name: one, from: [app], http: [GET /items/1]}
    - {name: docs, from: [app], http: ["GET /docs/**"]}`),
	"more denied": caller("") + policy("enforce", `
    - {name: list, from: [app], http: [GET /items]}
    - {name: item, from: [app], http: ["GET /items/{id}"], token: {issuer: sso, audience: items}}
    - {name: no-items, effect: deny, http: ["GET /items/**"]}
    - {name: no-hosted, effect: deny, hosts: [a.example]}`),
	"permissive": caller("") + policy("enforce", `
    - {name: list, all: true, http: [GET /items]}`) + "  mtls: permissive\n",
	"otherwise": caller("") + policy("enforce", `
    - {name: no-debug, effect: deny, http: ["* /items/debug"]}`) + "  otherwise: allow\n",
	"no mayCall":    withoutMayCall(""),
	"enforced app":  withoutMayCall("mode: enforce, "),
	"expired":       caller(`expires: "2026-01-01", `) + policy("enforce", "\n    - {name: list, from: [app], http: [GET /items]}"),
	"renamed":       caller("") + policy("enforce", "\n    - {name: items, from: [app], http: [GET /items]}\n    - {name: list, from: [app], http: [\"GET /docs/{doc}\"]}"),
	"posture":       caller("") + profile + policy("enforce", "\n    - {name: list, from: [app], http: [GET /items]}") + "  posture: prod\n",
	"posture rule":  caller("") + profile + policy("enforce", "\n    - {name: list, from: [app], http: [GET /items], posture: prod}\n    - {name: item, from: [app], http: [\"GET /items/{id}\"]}"),
	"live":          caller("") + policy("enforce", live("[websocket]")),
	"not live":      caller("") + policy("enforce", strings.ReplaceAll(live(""), ", upgrade: ", "")),
	"live by token": caller("") + policy("enforce", strings.Replace(live("[websocket]"), "upgrade", "token: {issuer: sso, audience: items}, upgrade", 1)),
	"live, other":   caller("") + policy("enforce", live("[websocket]")) + "  otherwise: allow\n",
	"live, scored":  caller("") + strings.Replace(policy("enforce", "\n    - {name: list, from: [app]}"), ", protocol: http", ", protocol: auto", 1) + "  anomaly: {warn: 0.1}\n",
	"any bytes":     caller("") + strings.Replace(policy("enforce", "\n    - {name: list, from: [app]}"), ", protocol: http", ", protocol: auto", 1),
	"elsewhere":     caller("") + `{apiVersion: sallyport.dev/v1alpha1, kind: APIPolicy, metadata: {name: api}, spec: {protect: {identity: server, ports: [81]}, rules: [{name: list, from: [app]}]}}` + "\n",
	"tuples":        caller("") + policy("enforce", "\n    - {name: related, from: [app], http: [\"GET /docs/{doc}\"], relation: \"user:{source.name} can_pay account:{param.doc}\"}"),
	"tuples, other": caller("") + policy("enforce", "\n    - {name: related, from: [app], http: [\"GET /docs/{doc}\"], relation: \"user:{source.name} can_pay account:{param.doc}\"}"),
}

const profile = `{apiVersion: sallyport.dev/v1alpha1, kind: PostureProfile, metadata: {name: prod}, spec: {node: {secureBoot: true}}}
---
`

func live(upgrade string) string {
	return `
    - {name: list, from: [app], http: ["GET /items/{id}"], upgrade: ` + upgrade + `}
    - {name: docs, from: [app], http: ["GET /docs/**"]}
    - {name: hosted, from: [app], hosts: [a.example], upgrade: ` + upgrade + `}`
}

func caller(more string) string {
	return `{apiVersion: sallyport.dev/v1alpha1, kind: MachineIdentity, metadata: {name: app}, spec: {owner: a@b.example, ` + more +
		`spiffeID: "spiffe://example.org/app", mayCall: [server]}}
---
`
}

func withoutMayCall(more string) string {
	return `{apiVersion: sallyport.dev/v1alpha1, kind: MachineIdentity, metadata: {name: app}, spec: {owner: a@b.example, ` + more +
		`spiffeID: "spiffe://example.org/app"}}
---
` + policy("audit", "\n    - {name: list, from: [app], http: [GET /items]}")
}

func policy(mode, rules string) string {
	return `apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: api}
spec:
  mode: ` + mode + `
  protect: {identity: server, ports: [80], protocol: http}
  rules:` + rules + "\n"
}

const replayCalls = `
{from: app, to: server, port: 80, http: GET /items}
{from: app, to: server, port: 80, http: GET /items, token: {issuer: sso, audience: items}}
{from: app, to: server, port: 80, http: GET /items/1}
{from: app, to: server, port: 80, http: GET /items/1, token: {issuer: sso, audience: items}}
{from: app, to: server, port: 80, http: GET /items/1, token: {issuer: sso, audience: items, scopes: [read]}}
{from: app, to: server, port: 80, http: GET /items/2, token: {issuer: sso, audience: other}}
{from: app, to: server, port: 80, http: GET /items/debug, token: {issuer: sso, audience: items}}
{from: app, to: server, port: 80, http: GET /hosted, host: a.example}
{from: app, to: server, port: 80, http: GET /hosted, host: b.example}
{from: app, to: server, port: 80, http: POST /items, body: "1"}
{from: app, to: server, port: 80, http: POST /items, body: "1234"}
{from: app, to: server, port: 80, http: POST /items, body: "123456"}
{from: app, to: server, port: 80, http: DELETE /items}
{from: app, to: server, port: 80, http: GET /docs/a-1}
{from: app, to: server, port: 80, http: GET /docs/a-2}
{from: app, to: server, port: 80, http: GET /docs/a-1/part}
{from: app, to: server, port: 80, http: GET /nothing}
{from: app, to: server, port: 80, http: GET /items/../x}
{from: app, to: server, port: 80, http: GET /items, upgrade: websocket}
{from: app, to: server, port: 80, http: GET /items/1, upgrade: websocket}
{from: app, to: server, port: 80, http: GET /items/1, upgrade: websocket, token: {issuer: sso, audience: items}}
{from: app, to: server, port: 80, http: GET /items/debug, upgrade: websocket}
{from: app, to: server, port: 80, http: GET /docs/a-1, upgrade: websocket}
{from: app, to: server, port: 80, http: GET /hosted, host: a.example, upgrade: websocket}
{from: app, to: server, port: 80, http: GET /hosted, host: b.example, upgrade: websocket}
{from: app, to: server, port: 80, http: GET /nothing, upgrade: websocket}
{from: app, to: server, port: 80, http: POST /items, upgrade: websocket}
{from: guest, to: server, port: 80, http: GET /items/1, upgrade: websocket}
{from: none, to: server, port: 80, http: GET /items/1, upgrade: websocket}
{from: guest, to: server, port: 80, http: GET /items}
{from: guest, to: server, port: 80, http: GET /items/debug}
{from: none, to: server, port: 80, http: GET /items}
{from: none, to: server, port: 80, http: GET /nothing}
{from: none, channel: kernel, to: server, port: 80, http: GET /items}
{from: "spiffe://example.org/unknown", to: server, port: 80, http: GET /items}
`

// TestReplay holds replay against the pipeline: whatever a set made of a call,
// and whatever its record leaves out, what replay tells of another set is what
// the pipeline then makes of the very call.
func TestReplay(t *testing.T) {
	if !relation.Built {
		t.Skip("built without the relation engine")
	}
	now := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	plans, trials := map[string]*compile.Plan{}, map[string]*trial.Trial{}
	for name, text := range replaySets {
		files := []load.File{
			{Path: "p.yaml", Content: []byte(replayHead + text)},
			{Path: "shop.fga", Content: []byte(replayModel)},
		}
		if name != "tuples, other" {
			files = append(files, load.File{Path: "a.tuples.yaml", Content: []byte(`[{user: "user:app", relation: can_pay, object: "account:a-1"}]`)})
		}
		p, problems := compile.Build(files, compile.Options{TrustDomain: "example.org", Node: "n", Now: func() time.Time { return now }})
		if p == nil {
			t.Fatal(name, problems)
		}
		tr, err := trial.New(t.Context(), p, now)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(tr.Close)
		plans[name], trials[name] = p, tr
	}
	docs, problems := load.Documents[trial.Call](load.File{Path: "calls", Content: []byte("---\n" + replaceLines(replayCalls))}, "a call")
	if len(problems) > 0 || len(docs) < 20 {
		t.Fatal(len(docs), problems)
	}
	told, untold, changed, wrong := 0, 0, 0, 0
	for before := range replaySets {
		for _, d := range docs {
			rec, ok := recordOf(t, trials[before], &d.Value)
			if !ok {
				continue
			}
			for after := range replaySets {
				what := fmt.Sprintf("%s -> %s: %+v", before, after, d.Value)
				got, ok := trial.NewReplay(plans[before], plans[after], flow.ModeEnforce, now).Judge(&rec)
				if !ok {
					t.Fatalf("%s: not replayed: %+v", what, rec)
				}
				real, protected := recordOf(t, trials[after], &d.Value)
				want := trial.Unprotected
				switch {
				case !protected:
				case real.Decision == "allow":
					want = trial.Allowed
				case real.WouldDeny:
					want = trial.LetThrough
				default:
					want = trial.Denied
				}
				switch {
				case got.After == trial.Untold:
					untold++
					if before == after {
						t.Errorf("%s: the same set: %+v", what, got)
					}
				case got.After != want:
					if wrong++; wrong < 10 {
						t.Errorf("%s:\nreplay says %+v,\nthe pipeline %s: %s %s %s, before %s", what, got, want, real.Decision, real.Reason, real.Rule, rec.Reason)
					}
				case got.Changed():
					changed++
					fallthrough
				default:
					told++
				}
			}
		}
	}
	t.Logf("%d told, %d of them changed, %d cannot be told", told, changed, untold)
	if told < untold || changed < 500 {
		t.Errorf("%d told, %d of them changed, %d cannot be told", told, changed, untold)
	}
}

// TestReplayedUpgradeWithoutRequests holds that nothing is told of an upgrade
// where connections are not read any more.
func TestReplayedUpgradeWithoutRequests(t *testing.T) {
	var plans []*compile.Plan
	for _, text := range []string{replaySets["live"], caller("") + strings.Replace(policy("enforce", "\n    - {name: list, from: [app], when: \"source.name != ''\"}"), "http", "tcp", 1)} {
		p, problems := compile.Build([]load.File{{Path: "p.yaml", Content: []byte(replayHead + text)}, {Path: "shop.fga", Content: []byte("model\n  schema 1.1\ntype user\n")}},
			compile.Options{TrustDomain: "example.org", Node: "n"})
		if p == nil {
			t.Fatal(problems)
		}
		plans = append(plans, p)
	}
	rec := pipeline.Record{Source: "spiffe://example.org/app", Destination: "spiffe://example.org/server", Address: netip.MustParseAddrPort("192.0.2.9:80"), Method: "GET",
		Path: "/items/{id}", Upgrade: "websocket", Decision: "allow", Stage: "policy", Policy: "default/api", Rule: "list", Channel: "tunnel"}
	if got, ok := trial.NewReplay(plans[0], plans[1], flow.ModeEnforce, time.Now()).Judge(&rec); !ok || got.After != trial.Untold {
		t.Errorf("%+v", got)
	}
}

func replaceLines(s string) string {
	out := ""
	for _, c := range s {
		if out += string(c); c == '\n' {
			out += "---\n"
		}
	}
	return out
}

// recordOf judges a call and writes what its record would hold; false where
// nothing protects what is called.
func recordOf(t *testing.T, tr *trial.Trial, call *trial.Call) (pipeline.Record, bool) {
	t.Helper()
	c, faults := tr.Resolve(call)
	if len(faults) > 0 {
		t.Fatalf("%+v: %v", call, faults)
	}
	if c.API == nil {
		return pipeline.Record{}, false
	}
	out, err := tr.Judge(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	d := &out.Decision
	upgrade := ""
	if c.Upgrade {
		upgrade = "websocket"
	}
	return pipeline.Record{
		Upgrade: upgrade, Source: c.Peer().ID, Destination: c.Target.ID, Address: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.9"), c.Port), Method: c.Method,
		Path: d.Template, Decision: d.Effect.String(), WouldDeny: d.WouldDeny(), Stage: d.Stage.String(), Policy: d.Policy, Rule: d.Rule,
		Position: d.Position, Reason: d.Reason, Channel: c.Peer().Channel.String(),
	}, true
}

// TestReplayUnderOtherIDs holds that who gets another ID of the policies stays
// who he was, and that who brings his own does not.
func TestReplayUnderOtherIDs(t *testing.T) {
	build := func(domain, app, server string) *compile.Plan {
		p, problems := compile.Build([]load.File{{Path: "p.yaml", Content: fmt.Appendf(nil, `apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: app}
spec: {owner: a@b.example, mayCall: [server]%s}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: server}
spec: {owner: a@b.example%s, select: {cgroup: {path: /server}}}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: api}
spec: {mode: enforce, protect: {identity: server, ports: [80]}, rules: [{name: r, from: [app]}]}
`, app, server)}}, compile.Options{TrustDomain: domain, Node: "n"})
		if p == nil {
			t.Fatal(problems)
		}
		return p
	}
	const here = ", select: {cgroup: {path: /app}}"
	named := func(id string) string { return `, spiffeID: "spiffe://example.org/` + id + `"` }
	for _, c := range []struct {
		what     string
		old, new *compile.Plan
		source   string
		want     trial.Ending
	}{
		{"both", build("example.org", here+named("app"), named("server")), build("example.org", here, ""), "spiffe://example.org/app", trial.Allowed},
		{"IDs that change places", build("example.org", here+named("app"), named("server")), build("example.org", here+named("server"), named("app")), "spiffe://example.org/app", trial.Allowed},
		{"a caller that brings its ID", build("example.org", named("app"), named("server")), build("example.org", named("app2"), ""), "spiffe://example.org/app", trial.Denied},
	} {
		got, ok := trial.NewReplay(c.old, c.new, flow.ModeEnforce, time.Now()).Judge(&pipeline.Record{
			Source: c.source, Destination: "spiffe://example.org/server", Address: netip.MustParseAddrPort("192.0.2.9:80"), Protocol: "http", Method: "GET", Path: "/",
			Decision: "allow", Stage: "policy", Policy: "default/api", Rule: "r", Channel: flow.ChannelTunnel.String(),
		})
		if !ok || got.After != c.want {
			t.Errorf("%s: %+v", c.what, got)
		}
	}
}

// FuzzRecords holds that no decision log breaks the reader, and that what it
// reads can be judged.
func FuzzRecords(f *testing.F) {
	plan, problems := compile.Build([]load.File{
		{Path: "p.yaml", Content: []byte(replayHead + replaySets["base"])},
		{Path: "shop.fga", Content: []byte(replayModel)},
	}, compile.Options{TrustDomain: "example.org", Node: "n"})
	if plan == nil {
		f.Fatal(problems)
	}
	for _, line := range []string{
		`{"destination":"spiffe://example.org/server","source":"spiffe://example.org/app","address":"192.0.2.9:80","method":"GET","path":"/items/{id}","decision":"allow","rule":"item"}`,
		`{"kind":"decision","record":{"destination":"spiffe://example.org/server","address":"192.0.2.9:80","decision":"deny","reason":"no_rule","policy":"default/api"}}`,
		`{"decision":"deny","stage":"kernel"}`, "{}", "[]", "\n\n", `{"kind":"decision"}`, `{"address":"x"}`,
	} {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, log []byte) {
		r := trial.NewReplay(plan, plan, flow.ModeAudit, time.Unix(0, 0))
		_ = trial.ReadRecords(bytes.NewReader(log), func(rec *pipeline.Record) error {
			out, ok := r.Judge(rec)
			if ok && (out.After == "" || out.Before == "" || (out.After == trial.Untold) != (out.Why != "")) {
				t.Errorf("%+v: %+v", rec, out)
			}
			if ok && out.After == trial.Denied {
				t.Errorf("%+v: refused under a ceiling of audit", rec)
			}
			return nil
		})
	})
}

func TestRecordsTooLong(t *testing.T) {
	err := trial.ReadRecords(strings.NewReader("\n"+strings.Repeat("x", 1<<20)), func(*pipeline.Record) error { return nil })
	if err == nil || err.Error() != "line 2: longer than 64 KiB" {
		t.Error(err)
	}
}

// BenchmarkReplay judges records, as many as it can: what of `policy diff
// --replay` grows with the log.
func BenchmarkReplay(b *testing.B) {
	var plans []*compile.Plan
	for _, name := range []string{"base", "wide"} {
		p, problems := compile.Build([]load.File{
			{Path: "p.yaml", Content: []byte(replayHead + replaySets[name])}, {Path: "shop.fga", Content: []byte(replayModel)},
		}, compile.Options{TrustDomain: "example.org", Node: "n"})
		if p == nil {
			b.Fatal(problems)
		}
		plans = append(plans, p)
	}
	line := `{"time":"2026-11-27T00:00:00Z","requestID":"01ARZ3NDEKTSV4RRFFQ69G5FAV","source":"spiffe://example.org/app","destination":"spiffe://example.org/server",` +
		`"address":"192.0.2.9:80","protocol":"http","method":"GET","path":"/items/{id}","decision":"allow","mode":"enforce","stage":"policy","policy":"default/api",` +
		`"rule":"item","latencyMicros":1,"channel":"tunnel","anchor":"tpm"}` + "\n"
	log := strings.Repeat(line, 1000)
	r := trial.NewReplay(plans[0], plans[1], flow.ModeEnforce, time.Now())
	b.SetBytes(int64(len(log)))
	for b.Loop() {
		if err := trial.ReadRecords(strings.NewReader(log), func(rec *pipeline.Record) error {
			if _, ok := r.Judge(rec); !ok {
				b.Fatal("not judged")
			}
			return nil
		}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)*1000/b.Elapsed().Seconds(), "records/s")
}
