// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"testing"
)

func TestMatchGRPC(t *testing.T) {
	plan, api := buildAPI(t, `
  rules:
    - {name: create, from: [a], grpc: [shop.v1.Payments/Create, shop.v1.Refunds/*]}
    - {name: hosted, from: [b], hosts: [one.example], grpc: [shop.v1.Payments/Create]}
    - {name: both, from: [b], grpc: [shop.v1.Ledger/Read], http: ["GET /v1/ledger/{id}", "POST /shop.v1.Ledger/Read"]}
    - {name: no-debug, effect: deny, grpc: [shop.v1.Debug/*, shop.v1.Refunds/Purge]}
    - {name: no-b-refunds, effect: deny, from: [b], hosts: [two.example], grpc: [shop.v1.Refunds/*]}
`)
	for _, c := range []struct{ src, host, method, path, want string }{
		{"a", "x", "POST", "/shop.v1.Payments/Create", "create shop.v1.Payments/Create"},
		{"a", "x", "POST", "/shop.v1.Payments/%43reate", "create shop.v1.Payments/Create"},
		{"a", "x", "GET", "/shop.v1.Payments/Create", ""},
		{"a", "x", "post", "/shop.v1.Payments/Create", ""},
		{"a", "x", "POST", "/shop.v1.Payments/create", ""},
		{"a", "x", "POST", "/shop.v1.payments/Create", ""},
		{"a", "x", "POST", "/shop.v1.Payments/Create/", ""},
		{"a", "x", "POST", "/shop.v1.Payments/", ""},
		{"a", "x", "POST", "/shop.v1.Payments/CreateMore", ""},
		{"a", "x", "POST", "/shop.v1.Refunds/Any", "create shop.v1.Refunds/*"},
		{"a", "x", "POST", "/shop.v1.Refunds/", ""},
		{"a", "x", "POST", "/shop.v1.Refunds", ""},
		{"a", "x", "POST", "/shop.v1.Refunds/a/b", ""},
		{"a", "x", "POST", "/api/shop.v1.Refunds/Any", ""},
		{"a", "x", "POST", "//shop.v1.Refunds/Any", "!http_target"},
		{"a", "x", "POST", "/shop.v1.Refunds/../shop.v1.Payments/Create", "!http_target"},
		{"a", "x", "POST", "*", ""},
		{"b", "one.example", "POST", "/shop.v1.Payments/Create", "hosted shop.v1.Payments/Create"},
		{"b", "two.example", "POST", "/shop.v1.Payments/Create", ""},
		{"b", "x", "POST", "/shop.v1.Ledger/Read", "both shop.v1.Ledger/Read"},
		{"b", "x", "GET", "/v1/ledger/7", "both /v1/ledger/{id} id=7"},
		// Denied however the call is spelt.
		{"a", "x", "POST", "/shop.v1.Debug/Dump", "no-debug shop.v1.Debug/*"},
		{"a", "x", "GET", "/shop.v1.Debug/Dump", "no-debug shop.v1.Debug/*"},
		{"a", "x", "pOsT", "/shop.v1.Debug/Dump/", "no-debug shop.v1.Debug/*"},
		{"a", "x", "POST", "/shop.v1.Debug", "no-debug shop.v1.Debug/*"},
		{"a", "x", "POST", "/shop.v1.Debug/a/b", "no-debug shop.v1.Debug/*"},
		{"a", "x", "POST", "/shop.v1%2EDebug/D%75mp", "no-debug shop.v1.Debug/*"},
		{"a", "x", "POST", "/shop.v1.Refunds/Purge", "no-debug shop.v1.Refunds/Purge; create shop.v1.Refunds/*"},
		{"a", "x", "PUT", "/shop.v1.Refunds/%50urge/", "no-debug shop.v1.Refunds/Purge"},
		{"a", "x", "POST", "/shop.v1.Refunds/Purged", "create shop.v1.Refunds/*"},
		{"b", "TWO.example.", "GET", "/shop.v1.Refunds/Any", "no-b-refunds shop.v1.Refunds/*"},
		{"a", "two.example", "POST", "/shop.v1.Refunds/Any", "create shop.v1.Refunds/*"},
		{"a", "", "POST", "/shop.v1.Refunds/Any", "!http_target"},
		// An opaque connection cannot be held against them.
		{"a", "x", "", "", "no-debug"},
		{"b", "", "", "", "no-debug; no-b-refunds"},
	} {
		var m Matches
		api.Match(&m, caller(t, plan, c.src), Call{Host: c.host, Method: c.method, Path: c.path, GRPC: c.method == "POST"})
		if got := found(&m); got != c.want {
			t.Errorf("%s: %s %s%s:\n got  %s\n want %s", c.src, c.method, c.host, c.path, got, c.want)
		}
	}
}

// TestOnlyGRPC holds that a request by POST that is no call of gRPC meets what
// speaks of requests, and of what speaks of gRPC only denials.
func TestOnlyGRPC(t *testing.T) {
	plan, api := buildAPI(t, `
  rules:
    - {name: grpc, from: [a], grpc: [s.S/*]}
    - {name: http, from: [a], http: ["POST /s.S/Both"]}
    - {name: deny, effect: deny, grpc: [s.S/Purge]}
`)
	for path, want := range map[string][2]string{ // by a call of gRPC, by another request
		"/s.S/Read":  {"grpc s.S/*", ""},
		"/s.S/Both":  {"grpc s.S/*; http /s.S/Both", "http /s.S/Both"},
		"/s.S/Purge": {"deny s.S/Purge; grpc s.S/*", "deny s.S/Purge"},
	} {
		for i, want := range want {
			var m Matches
			api.Match(&m, caller(t, plan, "a"), Call{Host: "h", Method: "POST", Path: path, GRPC: i == 0})
			if got := found(&m); got != want {
				t.Errorf("%s, gRPC %v: %q, want %q", path, i == 0, got, want)
			}
		}
	}
	if near := api.Near(caller(t, plan, "a"), Call{Host: "h", Method: "POST", Path: "/s.S/Read"}); len(near) == 0 || near[0].Rule != "grpc" {
		t.Errorf("nearest is %+v", near)
	}
}

// TestGRPCIsNoIdentityOnly holds that calls of a gRPC API are always read.
func TestGRPCIsNoIdentityOnly(t *testing.T) {
	for _, spec := range []string{
		"  rules: [{name: r, from: [a], grpc: [s.S/*]}]\n",
		"  rules: [{name: r, from: [a]}, {name: d, effect: deny, grpc: [s.S/*]}]\n",
	} {
		plan, api := buildAPI(t, spec)
		if _, decided := api.IdentityOnly(caller(t, plan, "a")); decided {
			t.Errorf("decided by identity alone:\n%s", spec)
		}
	}
}

// FuzzMethod holds that a method that is accepted matches the call that it
// spells and no other, and that its denial takes no other service along.
func FuzzMethod(f *testing.F) {
	for _, s := range []string{"a.B/C", "a.B/*", "B/C", "/a.B/C", "a.B", "a.*/C", "a.B/**", "a..B/C", "POST /a.B/C"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if hint := nearMethod(s); hint != "" {
			if _, err := parseMethod(hint); err != nil {
				t.Errorf("%q suggests %q: %v", s, hint, err)
			}
		}
		p, err := parseMethod(s)
		if err != nil {
			return
		}
		call := "/" + s
		if s[len(s)-1] == '*' {
			call = call[:len(call)-1] + "Any"
		}
		for _, deny := range []bool{false, true} {
			a := &API{}
			table := &a.allow
			if deny {
				table = &a.deny
			}
			table.add(&Rule{Deny: deny}, nil, nil, []*pattern{p})
			for path, want := range map[string]bool{call: true, call + "/": deny, "/x" + s: false, "/x/" + s: false, call[:len(call)-1] + "\u00e9": p.segments[1].param} {
				var m Matches
				a.Match(&m, nil, Call{Host: "h", Method: "POST", Path: path, GRPC: true})
				if (len(m.Rules) == 1) != want {
					t.Errorf("%q, deny %v, %q: matches %v", s, deny, path, !want)
				}
			}
		}
	})
}
