// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"
)

// TestWorkloadsThatAreNobodyElse: one identity is all the others, calls by its
// own rules, and is not who another identity would have been.
func TestWorkloadsThatAreNobodyElse(t *testing.T) {
	require(t, "nginx", "curl")
	t.Parallel()
	n, _ := one(t)
	n.policy("shop.yaml", strings.Replace(shopIn("enforce"), `from: [client], http: ["GET /files/{name}", "HEAD /files/{name}"]`, `from: [rest], http: ["GET /files/{name}"]`, 1)+`---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: rest, namespace: shop}
spec: {owner: a@b.example, select: {all: true}, mode: enforce, mayCall: [web]}
`)
	startNginx(t, n.group("web"), n.ns, 8080)
	n.start()
	for _, group := range []string{"client", "stray"} {
		act(t, n.group(group), n.ns, "idle").line(t)
	}
	n.served("client", "web", "rest")
	get := func(group string) string {
		t.Helper()
		return code(t, n.group(group), n.ns, webURL+"/files/hello")
	}
	eventually(t, "the rest to get through", func() string {
		if got := get("stray"); got != "200" {
			return got
		}
		return ""
	})
	if got := get("client"); got != "403 no_rule" {
		t.Errorf("who is somebody: %s", got)
	}
	from := n.mark()
	if out, err := say(t, n.group("stray"), n.ns, addrA+":9999", "x"); err == nil {
		t.Errorf("outside what it may call: %q", out)
	}
	n.decided(from, "the egress of the rest", func(r *record) bool { return r.Reason == "egress" && strings.HasSuffix(r.Source, "/rest") })
	if out := n.mustRun("identity", "list"); !strings.Contains(out, "/stray") {
		t.Errorf("identity list lacks the workload: %s", out)
	}
}
