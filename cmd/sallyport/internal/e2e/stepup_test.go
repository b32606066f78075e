// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace"
)

// TestStepUp has a client of a learned endpoint send something unusual: it is
// challenged as long as its authentication is old, and gets through with the
// token that the challenge asks for.
func TestStepUp(t *testing.T) {
	require(t, "nginx", "curl")
	for _, engine := range []struct{ name, extra string }{{"loops", ""}, {"goroutines", "userspace: {goroutines: true}"}} {
		t.Run(engine.name, func(t *testing.T) {
			t.Parallel()
			n, _ := one(t)
			n.extra = engine.extra
			s := newIssuer(t)
			file := n.path("jwks.json")
			if err := os.WriteFile(file, s.jwks, 0o644); err != nil {
				t.Fatal(err)
			}
			policy := strings.Replace(withToken(`{file: "`+file+`"}`, "enforce"), `    - {name: write, from: [client], http: ["PUT /up/{name}"]}
`, `  anomaly: {warn: 0.05, stepUp: 0.02, stepUpMaxAge: 2m, falsePositives: 100000/day, warmup: {requests: 200, identities: 1}}
`, 1)
			n.policy("shop.yaml", policy)
			n.policy("docs.tuples.yaml", `- {user: "user:alice", relation: can_read, object: "doc:1"}`+"\n")
			startNginx(t, n.group("web"), n.ns, 8080)
			n.start()
			act(t, n.group("client"), n.ns, "idle").line(t)
			n.served("client", "web")

			long := s.authenticated("alice", "a1", time.Now().Add(-time.Hour))
			n.awaitAs(long, "1", "200")
			get := func(query, token string, more ...string) string {
				t.Helper()
				args := append([]string{"-H", "Authorization: Bearer " + token, "-H", "X-Doc: 1"}, more...)
				return code(t, n.group("client"), n.ns, webURL+"/files/hello?page="+query, args...)
			}
			if got := get("[1-400]", long, "-o", "/dev/null"); !strings.HasSuffix(got, "200") {
				t.Fatalf("the warm-up got %s", got)
			}
			const unusual = "1%27%20OR%20%271%27=%271--%3Cscript%3E"
			from := n.mark()
			head, err := curl(t, n.group("client"), n.ns, "-i", webURL+"/files/hello?page="+unusual, "-H", "Authorization: Bearer "+long, "-H", "X-Doc: 1")
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(head, "HTTP/1.1 401 ") || !strings.Contains(head, `WWW-Authenticate: Bearer error="insufficient_user_authentication", max_age=120`) {
				t.Errorf("the challenge: %s", head)
			}
			r := n.decided(from, "the challenge", func(r *record) bool { return r.Reason == "anomaly_step_up" })
			if trace := n.mustRun("explain", r.RequestID); !strings.Contains(trace, "anomaly_step_up") || !strings.Contains(trace, "expected up to") || strings.Contains(trace, "script") {
				t.Errorf("explain says %s", trace)
			}
			if got := get(unusual, long); got != "401 anomaly_step_up" {
				t.Errorf("the same again: %s", got)
			}
			fresh := s.authenticated("alice", "a2", time.Now())
			for range 2 {
				if got := get(unusual, fresh); got != "200" {
					t.Errorf("as the challenge asked: %s", got)
				}
			}
			var status struct {
				Proxy struct{ Budgets []userspace.Budget }
			}
			if err := json.Unmarshal([]byte(n.mustRun("status", "-o", "json")), &status); err != nil {
				t.Fatal(err)
			}
			if b := status.Proxy.Budgets; len(b) != 1 || b[0].API != "shop/web" || b[0].PerDay != 100000 || b[0].Acted != 2 ||
				b[0].Requests < 400 || b[0].Threshold < 0.02 || b[0].Threshold >= 1 {
				t.Errorf("budgets %+v", b)
			}
			if got := get("222", long); got != "200" {
				t.Errorf("an ordinary call with the old token: %s", got)
			}
		})
	}
}
