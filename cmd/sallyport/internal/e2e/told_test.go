// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// problemDocument is what a refused caller reads (RFC 9457).
type problemDocument struct {
	Type, Title, Detail, Instance, Reason, RequestID string
	Status                                           int
}

// TestToldWhy follows refusals of a running node to their cause, by what the
// caller got, by the decision log and by the policies in force.
func TestToldWhy(t *testing.T) {
	t.Parallel()
	n, _, stranger := enforced(t)
	n.settled(stranger)

	out, err := curl(t, n.group("client"), n.ns, webURL+"/nothing/secret-name?secret=query")
	if err != nil {
		t.Fatal(err)
	}
	var doc problemDocument
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if doc.Reason != "no_rule" || doc.Type != flow.ReasonsURL+"no_rule"+flow.ReasonsSuffix || strings.Contains(out, "shop") {
		t.Errorf("the caller is told %s", out)
	}
	page := filepath.Join("../../../../docs/reasons", filepath.Base(doc.Type))
	if _, err := os.Stat(page); err != nil {
		t.Errorf("the problem document's type leads nowhere: %v", err)
	}
	trace := n.mustRun("explain", doc.RequestID)
	for _, want := range []string{"no_rule", "policy shop/web, rule -, shop.yaml:", "what to do: " + doc.Type, "governance"} {
		if !strings.Contains(trace, want) {
			t.Errorf("explain does not say %q: %s", want, trace)
		}
	}
	if strings.Contains(trace, "secret") {
		t.Errorf("explain shows what the caller sent: %s", trace)
	}

	// One id that never was, and one that a caller might try to inject.
	for _, id := range []string{"01ARZ3NDEKTSV4RRFFQ69G5FAV", "x\x1b[2J"} {
		out, err := n.run("explain", id)
		if err == nil || strings.Contains(out, "\x1b") || !strings.Contains(out, "no trace of request") {
			t.Errorf("explain %q: %v: %q", id, err, out)
		}
	}

	// A stranger gets an id as well, and no more than it needs.
	out, err = curl(t, "", stranger, webURL+"/files/hello")
	if err != nil {
		t.Fatal(err)
	}
	doc = problemDocument{}
	if err := json.Unmarshal([]byte(out), &doc); err != nil || doc.Reason != "mtls_required" {
		t.Fatalf("%v: %s", err, out)
	}
	if trace := n.mustRun("explain", doc.RequestID); !strings.Contains(trace, "mtls_required") {
		t.Errorf("explain says %s", trace)
	}

	// An allowed call.
	from := n.mark()
	if got := n.get(); got != "200" {
		t.Fatal(got)
	}
	r := n.decided(from, "an allowed call", func(r *record) bool { return r.Decision == "allow" && r.Source == n.id("client") })
	trace = n.mustRun("explain", r.RequestID)
	for _, want := range []string{"allow by stage policy", "rule read, shop.yaml:", "identity    -  ", "governance  -  "} {
		if !strings.Contains(trace, want) {
			t.Errorf("explain of an allowed call does not say %q: %s", want, trace)
		}
	}

	// A refusal of the kernel.
	from = n.mark()
	if out, err := say(t, n.group("client"), n.ns, "127.0.0.1:9", ""); err == nil {
		t.Errorf("the client got %q from a port that nobody has", out)
	}
	r = n.decided(from, "the egress of the client", func(r *record) bool { return r.Reason == "egress" && r.RequestID != "" })
	trace = n.mustRun("explain", r.RequestID)
	for _, want := range []string{"deny by stage kernel, egress: ", "shop.yaml:", "what to do: " + flow.ReasonsURL + "egress"} {
		if !strings.Contains(trace, want) {
			t.Errorf("explain of a refusal of the kernel does not say %q: %s", want, trace)
		}
	}
	if line := n.mustRun("observe", "--last", "50", "--kind", "event"); !strings.Contains(line, r.RequestID) {
		t.Errorf("observe does not show its id: %s", line)
	}

	// The same without sending anything.
	told := n.mustRun("explain", "--policies", "running", "--from", "client", "--to", "web", "--port", "8080", "GET", "/files/x")
	if !strings.Contains(told, "\nallow\n") {
		t.Errorf("explain says %s", told)
	}
	told = n.mustRun("explain", "--policies", "running", "--from", "client", "--to", "web", "--port", "8080", "GET", "/nothing")
	if !strings.Contains(told, "no_rule") || !strings.Contains(told, "the nearest first") {
		t.Errorf("explain says %s", told)
	}
}

// TestExpired holds that a workload whose identity has expired calls nothing of
// ours and nothing that its egress lists, and that status warned of it.
func TestExpired(t *testing.T) {
	t.Parallel()
	n, _, stranger := enforced(t)
	n.settled(stranger)
	const doc = "mayCall: [web, stream]}"
	n.change(func() {
		n.policy("shop.yaml", strings.Replace(shopIn("enforce"), doc, `mayCall: [web, stream], expires: "2020-01-01", egress: [{cidr: 127.0.0.1/32, ports: [9]}]}`, 1))
	})
	from := n.mark()
	if out, err := say(t, n.group("client"), n.ns, "127.0.0.1:9", ""); err == nil {
		t.Errorf("the client got %q from a port that nobody has", out)
	}
	r := n.decided(from, "the egress of the client", func(r *record) bool { return r.Reason == "identity_expired" && r.Stage == "kernel" })
	if trace := n.mustRun("explain", r.RequestID); !strings.Contains(trace, "deny by stage kernel, identity_expired: ") {
		t.Errorf("explain says %s", trace)
	}
	if got := n.get(); got != "403 identity_expired" {
		t.Errorf("a call: %s", got)
	}
	if status := n.mustRun("status"); !strings.Contains(status, "warning: shop.yaml:") || !strings.Contains(status, "has expired: it is denied") {
		t.Errorf("status says %s", status)
	}
}

// TestReplayOfTheLog judges the decision log of a running node by policies
// that are not in force yet.
func TestReplayOfTheLog(t *testing.T) {
	t.Parallel()
	n, _, stranger := enforced(t)
	n.settled(stranger)
	act(t, n.group("outcast"), n.ns, "idle").line(t)
	n.served("outcast")
	from := n.mark()
	for range 3 {
		if got := code(t, n.group("outcast"), n.ns, webURL+"/files/hello"); got != "403 no_rule" {
			t.Fatal(got)
		}
	}
	n.decided(from, "one whom no rule names", func(r *record) bool { return r.Reason == "no_rule" })
	log := n.path("decisions.json")
	same := n.mustRun("policy", "diff", n.path("policies"), "--replay", log, "--exit-code")
	if !strings.Contains(same, "the documents say the same") || !regexp.MustCompile(`\n[1-9]\d* calls: (\d+) as before, 0 otherwise, 0 cannot be told\n`).MatchString(same) {
		t.Errorf("its own log under its own policies: %s", same)
	}
	next := folder(t)
	text := strings.Replace(shopIn("enforce"), "from: [client]", "from: [client, outcast]", 1)
	if err := os.WriteFile(filepath.Join(next, "shop.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	differs, err := n.run("policy", "diff", next, "--replay", log, "--exit-code")
	if err != nil && !strings.Contains(differs, "calls: ") {
		t.Fatalf("%v: %s", err, differs)
	}
	for _, want := range []string{"~ APIPolicy shop/web", "+ spec.rules[read].from: outcast"} {
		if !strings.Contains(differs, want) {
			t.Errorf("diff does not say %q: %s", want, differs)
		}
	}
	// Of a call that no rule spoke of the path is not known; in audit it passes
	// whatever the rules say.
	if err := os.WriteFile(filepath.Join(next, "shop.yaml"), []byte(shopIn("audit")), 0o644); err != nil {
		t.Fatal(err)
	}
	differs, err = n.run("policy", "diff", next, "--replay", log, "--exit-code")
	if err == nil || !strings.Contains(differs, "refused -> let through, no_rule") || !strings.Contains(differs, "refused -> let through, mtls_required") {
		t.Errorf("%v: %s", err, differs)
	}
}
