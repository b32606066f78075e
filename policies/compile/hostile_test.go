// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/load"
)

func list(n int, item func(i int) string) string {
	items := make([]string, n)
	for i := range items {
		items[i] = item(i)
	}
	return "[" + strings.Join(items, ", ") + "]"
}

// TestHostileSetsAreCheap holds that no set of a legal size takes long to
// refuse or to compile, nor much memory for its trees.
func TestHostileSetsAreCheap(t *testing.T) {
	rules := func(n int, rest func(i int) string) string {
		return preamble + "  rules: " + list(n, func(i int) string { return fmt.Sprintf("{name: r%d, %s}\n   ", i, rest(i)) }) + "\n"
	}
	sameCgroup := ""
	for i := range 3000 {
		sameCgroup += fmt.Sprintf("---\n{apiVersion: sallyport.dev/v1alpha1, kind: MachineIdentity, metadata: {name: i%d}, spec: {owner: o, select: {cgroup: {path: /a}, uid: %d}}}\n", i, i)
	}
	for name, content := range map[string]string{
		"dangling callers": rules(1, func(int) string {
			return "from: " + list(10_000, func(i int) string { return fmt.Sprintf("nobody%d", i) })
		}),
		"bad conditions": rules(2000, func(i int) string { return fmt.Sprintf(`from: [a], when: "tokn.x%d == 1"`, i) }),
		"conditions":     rules(2000, func(i int) string { return fmt.Sprintf(`from: [a], when: "request.content_length < %d"`, i) }),
		"bad paths": rules(1, func(int) string {
			return "from: [a], http: " + list(10_000, func(i int) string { return fmt.Sprintf(`"GET //%d"`, i) })
		}),
		"hosts by paths": rules(1, func(int) string {
			return "from: [a], hosts: " + list(5000, func(i int) string { return fmt.Sprintf("h%d", i) }) + ", http: " + list(5000, func(i int) string { return fmt.Sprintf(`"GET /%d"`, i) })
		}),
		"one cgroup, many users": sameCgroup,
		"one name":               rules(9000, func(int) string { return "name: x" }),
	} {
		if len(content) > load.MaxFileBytes {
			t.Fatalf("%s: %d bytes", name, len(content))
		}
		start := time.Now()
		_, problems := Build([]load.File{{Path: "f.yaml", Content: []byte(content)}}, testOptions())
		took := time.Since(start)
		if took > time.Minute || len(problems) > 2002 {
			t.Errorf("%s: %s, %d problems", name, took, len(problems))
		}
		first := ""
		if len(problems) > 0 {
			first = problems[0].String()
		}
		t.Logf("%s: %s, %d problems, %s", name, took, len(problems), first)
	}
}
