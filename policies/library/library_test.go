// SPDX-License-Identifier: Apache-2.0

package library_test

import (
	"errors"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/library"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/trial"
)

func build(t *testing.T, name string) *compile.Plan {
	t.Helper()
	files, err := library.Files(name)
	if err != nil {
		t.Fatal(err)
	}
	files = slices.DeleteFunc(files, func(f load.File) bool { return !load.IsPolicyFile(f.Path) })
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

// TestEveryExampleHoldsItsTests runs the tests that lie in each example; every
// rule has a case.
func TestEveryExampleHoldsItsTests(t *testing.T) {
	for _, name := range library.Names() {
		t.Run(name, func(t *testing.T) {
			plan := build(t, name)
			if !relation.Built && len(plan.Models()) > 0 {
				t.Skip("built without the relation engine")
			}
			files, err := library.Files(name)
			if err != nil {
				t.Fatal(err)
			}
			tr, err := trial.New(t.Context(), plan, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			defer tr.Close()
			var coverage trial.Coverage
			cases := 0
			for _, f := range files {
				if !load.IsTestFile(f.Path) {
					continue
				}
				tests, problems := tr.Tests(f)
				for _, p := range problems {
					t.Error(p)
				}
				for _, one := range tests {
					cases++
					r, err := tr.Run(t.Context(), one)
					if err != nil {
						t.Fatal(err)
					}
					if r.Differs != "" {
						t.Errorf("%s: %s", one.Name, r.Differs)
					}
					coverage.Add(&r.Outcome.Decision)
				}
			}
			missing, rules := coverage.Missing(plan)
			if len(missing) > 0 || cases < rules+1 {
				t.Errorf("%d cases for %d rules, none for %v", cases, rules, missing)
			}
		})
	}
}

// TestEveryExampleHasAPage holds that who starts from an example is told what
// it is for and what to change.
func TestEveryExampleHasAPage(t *testing.T) {
	for _, name := range library.Names() {
		files, err := library.Files(name)
		if err != nil {
			t.Fatal(err)
		}
		page := ""
		for _, f := range files {
			if f.Path == "README.md" {
				page = string(f.Content)
			}
		}
		if !strings.HasPrefix(page, "# "+name+"\n\n") || len(library.Summary(name)) < 30 || len(page) < 200 {
			t.Errorf("%s: %q: %s", name, library.Summary(name), page)
		}
	}
	if _, err := library.Files("nothing"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
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
	if api.Match(&m, nil, compile.Call{Host: "web.example", Method: "GET", Path: "/healthz"}); len(m.Rules) != 1 || m.Refusal != flow.ReasonOK {
		t.Errorf("%+v", m)
	}
}
