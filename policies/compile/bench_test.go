// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/policies/load"
)

var sizes = []int{1, 100, 9_998}

// BenchmarkMatchRules looks a call up in one policy of n rules and two, of
// which two match it; 10,000 is the longest list.
func BenchmarkMatchRules(b *testing.B) {
	for _, n := range sizes {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			plan, api := buildAPI(b, manyRules(n))
			src := caller(b, plan, "a")
			path := fmt.Sprintf("/v1/area%d/items/i-4711", n/2)
			var m Matches
			b.ReportAllocs()
			for b.Loop() {
				api.Match(&m, src, Call{Host: "pay.shop.example", Method: "GET", Path: path})
			}
			if len(m.Rules) != 2 {
				b.Fatal(found(&m))
			}
		})
	}
}

func manyRules(n int) string {
	var s strings.Builder
	s.WriteString("  rules:\n    - {name: health, from: [a], http: [\"GET /v1/**\"]}\n    - {name: no-debug, effect: deny, http: [\"* /debug/**\"]}\n")
	for i := range n {
		fmt.Fprintf(&s, "    - {name: r%d, from: [%s], http: [\"GET /v1/area%d/items/{id}\"]}\n", i, [...]string{"a", "b"}[(n/2+i)%2], i)
	}
	return s.String()
}

// manyPolicies makes n pairs of a caller and a server with its policy.
func manyPolicies(n int) []load.File {
	const perFile = 1000
	var files []load.File
	for from := 0; from < n; from += perFile {
		var s strings.Builder
		for i := from; i < min(n, from+perFile); i++ {
			fmt.Fprintf(&s, `---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: s%[1]d}
spec: {owner: o, spiffeID: "spiffe://example.org/s%[1]d", mayCall: [s%[1]d], endpoints: ["10.%[2]d.%[3]d.1:80"]}
---
apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: p%[1]d}
spec: {protect: {identity: s%[1]d, ports: [80]}, rules: [{name: r, from: [s%[1]d], http: ["GET /v1/{id}"], when: "request.content_length < 100"}]}
`, i, i/250, i%250)
		}
		files = append(files, load.File{Path: fmt.Sprintf("p%d.yaml", from), Content: []byte(s.String())})
	}
	return files
}

// BenchmarkMatchPolicies finds what protects an address and looks a call up
// in it, in a plan of n policies and as many identities.
func BenchmarkMatchPolicies(b *testing.B) {
	for _, n := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			plan, problems := Build(manyPolicies(n), testOptions())
			if plan == nil {
				b.Fatal(problems)
			}
			address := netip.MustParseAddrPort(fmt.Sprintf("10.%d.%d.1:80", n/2/250, n/2%250))
			id := fmt.Sprintf("spiffe://example.org/s%d", n/2)
			var m Matches
			b.ReportAllocs()
			for b.Loop() {
				server := plan.Claimed(address)
				src, _, _ := plan.Identity(id)
				plan.API(server, 80).Match(&m, src, Call{Host: "h", Method: "GET", Path: "/v1/4711"})
			}
			if len(m.Rules) != 1 {
				b.Fatal(found(&m))
			}
		})
	}
}

// BenchmarkBuild compiles n policies and as many identities.
func BenchmarkBuild(b *testing.B) {
	for _, n := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			files := manyPolicies(n)
			b.ReportAllocs()
			for b.Loop() {
				if plan, problems := Build(files, testOptions()); plan == nil {
					b.Fatal(problems)
				}
			}
		})
	}
}

func BenchmarkCondition(b *testing.B) {
	for _, text := range []string{"request.content_length < 65536 && !('test' in token.groups)", "params.id == 'p 1' && request.headers['X-Account'] == 'a-1'"} {
		cond, errs := compileCondition(text)
		if errs != nil {
			b.Fatal(errs)
		}
		b.Run(text[:10], func(b *testing.B) {
			a := activation()
			b.ReportAllocs()
			for b.Loop() {
				a.spent = 0 // as of another request
				if _, err := cond.Eval(a); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkRelation(b *testing.B) {
	r, err := parseRelation("user:{token.sub} can_pay account:{header.X-Account}")
	if err != nil {
		b.Fatal(err)
	}
	a := activation()
	buf := make([]byte, 0, 512)
	b.ReportAllocs()
	for b.Loop() {
		out, _ := r.User.Append(buf, a)
		if out, _ = r.Object.Append(out, a); len(out) == 0 {
			b.Fatal("nothing")
		}
	}
}

// BenchmarkConditionCost measures what a unit of cost takes, at its worst.
func BenchmarkConditionCost(b *testing.B) {
	for name, text := range map[string]string{
		"nested":  "token.groups.all(a, token.groups.all(b, a + b != b + 'x'))",
		"regex":   "token.groups.all(a, a.matches('(a|b)*c?(d|e)*f'))",
		"in":      "token.groups.all(a, a in token.groups)",
		"claims":  "token.groups.all(a, token.claims.tenant != a)",
		"split":   "token.groups.all(a, size(request.path + a) > 0)",
		"trivial": "request.method == 'GET'",
		"path":    "request.path != 'x'",
		"param":   "params.id != 'x'",
		"header":  "request.headers['X-Account'] != 'x'",
		"literal": "[1,2,3,4,5,6,7,8,9].exists(x, [1,2,3,4,5,6,7,8].exists(y, [1,2,3,4,5,6,7].exists(z, x+y+z == 100)))",
	} {
		cond, errs := compileCondition(text)
		if errs != nil {
			b.Fatal(errs)
		}
		b.Run(name, func(b *testing.B) {
			a := activation()
			a.Request.Path = "/" + strings.Repeat("x", 4000)
			a.Token.Groups = make([]string, 30)
			for i := range a.Token.Groups {
				a.Token.Groups[i] = strings.Repeat("g", 40)
			}
			var spent uint64
			for b.Loop() {
				a.spent = 0
				_, _ = cond.Eval(a)
				spent += a.spent
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(spent), "ns/unit")
		})
	}
}
