// SPDX-License-Identifier: Apache-2.0

package library_test

import (
	"testing"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/library"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func build(t *testing.T, name string) *compile.Plan {
	t.Helper()
	files, err := library.Files(name)
	if err != nil {
		t.Fatal(err)
	}
	plan, problems := compile.Build(files, compile.Options{TrustDomain: "shop.example", Node: "host-1"})
	for _, p := range problems {
		t.Error(p)
	}
	if plan == nil {
		t.Fatal("no plan")
	}
	return plan
}

func identity(t *testing.T, plan *compile.Plan, name string) *compile.Identity {
	t.Helper()
	for _, id := range plan.Identities() {
		if id.FullName() == name {
			return id
		}
	}
	t.Fatalf("no identity %s", name)
	return nil
}

func TestEveryExampleBuildsWithoutProblems(t *testing.T) {
	if len(library.Names()) < 2 {
		t.Fatalf("examples: %v", library.Names())
	}
	for _, name := range library.Names() {
		t.Run(name, func(t *testing.T) { build(t, name) })
	}
}

func TestPayments(t *testing.T) {
	plan := build(t, "payments")
	checkout, payments := identity(t, plan, "shop/checkout"), identity(t, plan, "shop/payments")
	if checkout.ID != "spiffe://shop.example/node/host-1/unit/checkout.service" {
		t.Errorf("ID %s", checkout.ID)
	}
	api := plan.API(payments, 8080)
	if api == nil || plan.Claimed(payments.Endpoints[0]) != payments {
		t.Fatal("nothing protects the endpoint")
	}
	if _, decided := api.IdentityOnly(checkout); decided {
		t.Error("identity alone decides")
	}
	for _, c := range []struct {
		src                *compile.Identity
		host, method, path string
		rule               string
	}{
		{checkout, "pay.shop.example", "POST", "/v1/payments", "create-payment"},
		{checkout, "pay.shop.example", "GET", "/v1/payments/p-1", "read-payment"},
		{checkout, "other.example", "POST", "/v1/payments", ""},
		{checkout, "pay.shop.example", "DELETE", "/v1/payments/p-1", ""},
		{payments, "pay.shop.example", "POST", "/v1/payments", ""},
		{nil, "pay.shop.example", "POST", "/v1/payments", ""},
		{checkout, "pay.shop.example", "GET", "/debug/vars", "no-debug"},
		{checkout, "any.example", "GET", "/%64ebug/vars", "no-debug"},
	} {
		var m compile.Matches
		api.Match(&m, c.src, c.host, c.method, c.path)
		got := ""
		if len(m.Rules) > 0 {
			got = m.Rules[0].Rule.Name
		}
		if got != c.rule {
			t.Errorf("%s %s%s: rule %q, want %q", c.method, c.host, c.path, got, c.rule)
		}
	}
	if len(api.Headers) != 1 || api.Headers[0] != "x-account" {
		t.Errorf("headers %v", api.Headers)
	}
	if len(plan.Tuples()) != 3 || plan.Tuples()[0].Model.FullName() != "shop/shop" {
		t.Errorf("tuples %v", plan.Tuples())
	}
}

func TestIdentityOnly(t *testing.T) {
	plan := build(t, "identity-only")
	settlement, ledger := identity(t, plan, "finance/settlement"), identity(t, plan, "finance/ledger")
	api := plan.API(ledger, 5000)
	if allow, decided := api.IdentityOnly(settlement); !allow || !decided {
		t.Errorf("settlement: allow %v, decided %v", allow, decided)
	}
	if allow, decided := api.IdentityOnly(ledger); allow || !decided {
		t.Errorf("ledger: allow %v, decided %v", allow, decided)
	}
}

func TestFirstLookRefusesNobody(t *testing.T) {
	plan := build(t, "first-look")
	web := identity(t, plan, "default/web")
	api := plan.API(web, 80)
	if api.Mode == flow.ModeEnforce || web.Mode == flow.ModeEnforce {
		t.Errorf("modes %s, %s", api.Mode, web.Mode)
	}
	var m compile.Matches
	if api.Match(&m, nil, "web.example", "GET", "/healthz"); len(m.Rules) != 1 || m.Refusal != flow.ReasonOK {
		t.Errorf("%+v", m)
	}
}
