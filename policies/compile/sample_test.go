// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"slices"
	"testing"

	"github.com/sallyport-dev/sallyport/policies/internal/ungated"
	"github.com/sallyport-dev/sallyport/policies/load"
)

// sample has a mistake of each kind that the design shows the message of.
const sample = `apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: checkout, namespace: shop}
spec: {owner: o, spiffeID: "spiffe://example.org/checkout"}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: payments, namespace: shop}
spec: {owner: o, spiffeID: "spiffe://example.org/payments", endpoints: ["10.0.0.1:8080"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: every, namespace: shop}
spec:
  owner: o
  select: {}
---
apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso, namespace: shop}
spec: {issuer: "https://sso.example", jwks: {url: "https://sso.example/jwks"}, algorithms: [ES256]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: payments, namespace: shop}
spec:
  mode: enforced
  protect: {identity: payments, ports: [8080]}
  mtls: "off"
  rules:
    - name: settle
      from: [checkout]
    - name: typo
      from: [chekout]
      when: tokn.sub == 'x'
    - name: bound
      from: [payments]
      token:
        issuer: sso
        audience: payments
        scope: ["x"]
        boundTo: mtls
`

// TestSampleMessages holds the messages of the design word for word, at their
// places.
func TestSampleMessages(t *testing.T) {
	ungated.Lift(t, "Selector.all") // of which one of them speaks
	want := []string{
		`payments.yaml:41:9: unknown field "scope" (did you mean "scopes"?)`,
		`payments.yaml:27:9: mode: "enforced" is not one of observe, audit, enforce`,
		`payments.yaml:34:14: from: no MachineIdentity "chekout" in namespace shop (did you mean "checkout"?)`,
		`payments.yaml:35:13: when: undeclared reference to 'tokn' (did you mean 'token'?)`,
		`payments.yaml:16:3: select: empty would match every workload; write "all: true" if you mean it`,
		`payments.yaml:29:9: mtls: "off" with token.boundTo: mtls can never be satisfied`,
		`warning: payments.yaml:31:7: rule "settle" is unreachable: "checkout" lacks mayCall payments`,
	}
	_, problems := Build([]load.File{{Path: "payments.yaml", Content: []byte(sample)}}, testOptions())
	var said []string
	for _, p := range problems {
		said = append(said, p.String())
	}
	for _, w := range want {
		if !slices.Contains(said, w) {
			t.Errorf("not said: %s", w)
		}
	}
	if t.Failed() {
		for _, s := range said {
			t.Log(s)
		}
	}
}
