// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// FuzzDecide sends what a parser might let through: a decision never panics,
// is the same twice (but for the anomaly stage), refuses with a reason, allows without one, and never
// allows the APIs that need a token without a rule.
func FuzzDecide(f *testing.F) {
	w := newWorld(f, "enforce")
	good := w.token()
	for _, s := range []struct{ method, path, query, host, auth, account string }{
		{"POST", "/v1/payments", "", "pay.shop.example", "Bearer " + good, "a1"},
		{"GET", "/v1/payments/%35", "a=b", "PAY.shop.example.", "bearer " + good, ""},
		{"GET", "/debug/../ok", "", "", "", "a1"},
		{"get", "/DEBUG/x", "access_token=1", "x", "Basic eA==", "a1|b"},
		{"", "*", "", "\x00", "DPoP x", "\xff"},
	} {
		f.Add(s.method, s.path, s.query, s.host, s.auth, s.account, byte(flow.ChannelTunnel))
	}
	f.Fuzz(func(t *testing.T, method, path, query, host, auth, account string, ch byte) {
		w.t = t
		r := w.request("GET /", header("Authorization", auth), header("X-Account", account))
		r.Method, r.Path, r.Query, r.Host = method, path, query, host
		r.Peer.Channel = flow.Channel(ch % 4)
		for _, api := range []string{"payments", "ledger", "shared", "watched", "odd"} {
			d, again := w.decide(r, api), w.decide(r, api)
			if (d.Effect == flow.EffectAllow) != (d.Reason == flow.ReasonOK) {
				t.Fatalf("%s: effect %s with reason %q", api, d.Effect, d.Reason)
			}
			if d.Effect == flow.EffectTerminate || d.Effect == flow.EffectThrottle {
				w.p.blocked.Store(&blockList{}) // what was learned on the way made it unusual
				continue
			}
			if d.Reason != again.Reason || d.Rule != again.Rule {
				t.Fatalf("%s: %s by %q, then %s by %q", api, d.Reason, d.Rule, again.Reason, again.Rule)
			}
			if d.Effect == flow.EffectAllow && api != "odd" && d.Rule == "" {
				t.Fatalf("%s: allowed by no rule: %+v", api, d)
			}
			if d.Rule == "create" && d.Effect == flow.EffectAllow && (auth[max(0, len(auth)-len(good)):] != good || account != "a1") {
				t.Fatalf("allowed with %q for account %q", auth, account)
			}
			w.env.Loop.Record(r, w.api(api), &d, Outcome{})
		}
		w.p.TakeRecords(10)
	})
}
