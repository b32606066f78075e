// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// FuzzBuild holds that no document brings the loader or the compiler down,
// that every problem has a place, and that a plan comes exactly without
// errors.
func FuzzBuild(f *testing.F) {
	archive, err := txtar.ParseFile(errorTable)
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range archive.Files {
		if strings.HasSuffix(file.Name, ".yaml") {
			f.Add(file.Data)
		}
	}
	example, err := os.ReadFile("../library/payments/payments.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	f.Add([]byte(wholeSet))
	f.Fuzz(func(t *testing.T, data []byte) {
		plan, problems := Build([]load.File{{Path: "f.yaml", Content: data}}, testOptions())
		if (plan == nil) != load.HasErrors(problems) {
			t.Fatalf("plan %v with %v", plan != nil, problems)
		}
		lines := strings.Count(string(data), "\n") + 1
		for _, p := range problems {
			if p.Message == "" || p.Line > lines || (p.Line == 0) != (p.Column == 0) {
				t.Errorf("problem %q of %d lines", p, lines)
			}
		}
		opt := testOptions()
		opt.Tenant = &Tenancy{Namespace: "shop", Hosts: []string{"sso.shop.example"}}
		if held, _ := Build([]load.File{{Path: "f.yaml", Content: data}}, opt); held != nil {
			if plan == nil {
				t.Fatal("a tenant may say what nobody may")
			}
			for _, id := range held.Identities() {
				if id.Namespace != "shop" || id.Selector == nil || id.Selector.Kubernetes == nil || len(id.Endpoints) > 0 || !strings.Contains(id.ID, "/ns/shop/sa/") {
					t.Errorf("a tenant's %+v", id)
				}
			}
			for _, i := range held.Issuers() {
				if i.JWKSFile != "" || i.JWKSURL != "" && !strings.HasPrefix(strings.ToLower(i.JWKSURL), "https://sso.shop.example") {
					t.Errorf("a tenant's %+v", i)
				}
			}
		}
		if plan == nil {
			return
		}
		var m Matches
		for _, a := range plan.APIs() {
			for _, src := range append(plan.Identities(), nil) {
				a.Match(&m, src, Call{Host: "pay.shop.example", Method: "GET", Path: "/v1/payments/%7B1"})
				allow, decided := a.IdentityOnly(src)
				if allow && m.Refusal == flow.ReasonMayCall || allow && !decided {
					t.Errorf("%s: allowed though refused", a.Name)
				}
			}
		}
	})
}

// FuzzMatch holds that a path that reads the same to an application cannot
// get past a deny rule, nor an other path through an allow rule.
func FuzzMatch(f *testing.F) {
	plan, api := buildAPI(f, `
  rules:
    - {name: deny-admin, effect: deny, http: ["* /admin/**", "POST /v1/{id}/close"]}
    - {name: allow, from: [a], http: ["* /v1/{id}/**", "GET /a%20b"]}
`)
	a := caller(f, plan, "a")
	for _, p := range []string{"/admin", "/%61dmin/", "/v1/x/close", "/v1/%2e%2e/close", "/v1//close", "/v1/a%2Fb", "*", "", "/a b", "/a%20b", "/v1/x/close/"} {
		f.Add(p, "POST")
		f.Add(p, "post")
	}
	f.Fuzz(func(t *testing.T, path, method string) {
		var m Matches
		api.Match(&m, a, Call{Host: "h", Method: method, Path: path})
		var names []string
		for i := range m.Rules {
			names = append(names, m.Rules[i].Rule.Name)
			for n := range m.Rules[i].Params() {
				if _, v := m.Rules[i].ParamAt(n); v == "" || strings.ContainsAny(v, "/\\\x00") || v == "." || v == ".." {
					t.Errorf("parameter %q of %q", v, path)
				}
			}
		}
		denied, allowed := slices.Contains(names, "deny-admin"), slices.Contains(names, "allow")
		if method == "" {
			if !denied || allowed {
				t.Errorf("opaque: %v", names)
			}
			return
		}
		decoded := unescaped(path)
		if m.Refusal == flow.ReasonOK {
			if strings.Contains(decoded, "//") || strings.Contains(decoded, "/../") || strings.ContainsAny(decoded, "\\\x00") {
				t.Errorf("%q let pass", path)
			}
			parts := strings.Split(strings.TrimSuffix(decoded, "/"), "/")
			wants := len(parts) > 1 && parts[1] == "admin" ||
				len(parts) == 4 && parts[1] == "v1" && parts[3] == "close" && strings.EqualFold(method, "POST")
			if wants != denied {
				t.Errorf("%q %q: denied %v", method, path, denied)
			}
		} else if allowed {
			t.Errorf("%q allowed though %s", path, m.Refusal)
		}
		if allowed && !strings.HasPrefix(decoded, "/v1/") && decoded != "/a b" {
			t.Errorf("%q allowed", path)
		}
	})
}

// FuzzPattern holds that a template that is accepted matches the path that
// it spells, and parses to what it is.
func FuzzPattern(f *testing.F) {
	for _, s := range []string{"GET /v1/payments/{id}", "* /debug/**", "POST /a%20b/", "GET /", "GET //", "x", "GET /{a}/{b}/**"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := parsePattern(s)
		if err != nil {
			return
		}
		var b strings.Builder
		for _, seg := range p.segments {
			b.WriteByte('/')
			if seg.param {
				b.WriteString("value")
			} else {
				b.WriteString(seg.literal)
			}
		}
		if b.Len() == 0 {
			b.WriteByte('/')
		}
		for _, deny := range []bool{false, true} {
			a := &API{}
			rule := &Rule{Deny: deny}
			table := &a.allow
			if deny {
				table = &a.deny
			}
			table.add(rule, nil, nil, []*pattern{p})
			method := p.method
			if method == "" {
				method = "ANY"
			}
			var m Matches
			a.Match(&m, nil, Call{Host: "h", Method: method, Path: b.String()})
			if len(m.Rules) != 1 || m.Refusal != flow.ReasonOK {
				t.Errorf("%q does not match %q: %s", s, b.String(), m.Refusal)
			}
		}
	})
}

// FuzzRelation holds that what a template accepts never comes out with more
// separators than it has itself.
func FuzzRelation(f *testing.F) {
	f.Add("user:{token.sub} can_pay account:{header.X-Account}", "alice")
	f.Add("user:{token.sub} can doc:1", "a:b")
	f.Add("team:x#member can endpoint:orders|GET|/v1/{token.sub}", "*")
	f.Fuzz(func(t *testing.T, text, value string) {
		r, err := parseRelation(text)
		if err != nil {
			return
		}
		a := activation()
		a.Token.Subject = value
		for _, template := range []*Template{&r.User, &r.Object} {
			out, reason := template.Append(nil, a)
			if reason != flow.ReasonOK {
				continue
			}
			if strings.Count(string(out), ":") != 1 || strings.ContainsAny(string(out), " \t\n*@\x00") {
				t.Errorf("%q with %q: %q", text, value, out)
			}
		}
	})
}
