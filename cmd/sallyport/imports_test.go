// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/sallyport-dev/sallyport"

// listed is what the test needs of a package of `go list -json`.
type listed struct {
	ImportPath, ForTest                string
	Imports, TestImports, XTestImports []string
}

// layers are the rooms from the top down: an import goes down or stays.
var layers = []string{"cmd", "agent", "userspace", "policies", "userspace/flow"}

// layer returns how deep a package of ours lies, -1 for one that is in none.
func layer(path string) int {
	path = strings.TrimPrefix(path, module+"/")
	best, depth := -1, -1
	for i, l := range layers {
		if (path == l || strings.HasPrefix(path, l+"/")) && len(l) > depth {
			best, depth = i, len(l)
		}
	}
	return best
}

func ours(t *testing.T) []listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,ForTest,Imports,TestImports,XTestImports", module+"/...")
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("list packages: %v: %s", err, errOut.Bytes())
	}
	var all []listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// TestImportsRunOneWay: cmd -> agent -> userspace -> policies ->
// userspace/flow, and nobody but two rooms of the agent knows the kernel half.
func TestImportsRunOneWay(t *testing.T) {
	packages := ours(t)
	if len(packages) < 30 {
		t.Fatalf("%d packages: the list is not whole", len(packages))
	}
	reach := transitive(packages)
	for _, p := range packages {
		name := strings.TrimPrefix(p.ImportPath, module+"/")
		from := layer(p.ImportPath)
		for _, to := range p.Imports {
			if !strings.HasPrefix(to, module) {
				continue
			}
			short := strings.TrimPrefix(to, module+"/")
			switch {
			case short == "bpf":
				if name != "agent/loader" && name != "agent/datapath" && name != "bpf/genabi" {
					t.Errorf("%s imports bpf: agent/loader and agent/datapath alone may", name)
				}
			case strings.HasSuffix(short, "/testenv") && !strings.HasSuffix(name, "/testenv") && !strings.HasSuffix(name, "/tpmtest"):
				t.Errorf("%s imports %s: tests alone may", name, short)
			case from >= 0 && layer(to) >= 0 && layer(to) < from:
				t.Errorf("%s imports %s: imports run %s", name, short, strings.Join(layers, " -> "))
			case from < 0 && name != "bpf" && !strings.HasPrefix(name, "vmtests"):
				t.Errorf("%s is in no room", name)
			}
		}
		for _, to := range append(slices.Clone(p.TestImports), p.XTestImports...) {
			if to == module+"/bpf" && !strings.HasPrefix(name, "agent/") && name != "bpf" {
				t.Errorf("the test of %s imports bpf", name)
			}
		}
		if name == "userspace/flow" || strings.HasPrefix(name, "userspace/flow/") || name == "bpf" {
			for _, to := range p.Imports {
				if strings.HasPrefix(to, module) && !strings.HasPrefix(to, module+"/userspace/flow") {
					t.Errorf("%s imports %s: it is to import nothing of ours", name, to)
				}
			}
		}
		if strings.HasPrefix(name, "userspace") || strings.HasPrefix(name, "policies") {
			for _, to := range reach(p.ImportPath) {
				if short := strings.TrimPrefix(to, module+"/"); short == "bpf" || short == "agent" || strings.HasPrefix(short, "agent/") {
					t.Errorf("%s reaches %s", name, short)
				}
				if to == "github.com/cilium/ebpf/link" {
					t.Errorf("%s reaches %s: the unprivileged half attaches nothing", name, to)
				}
			}
		}
	}
}

// transitive returns what a package imports, through packages of ours.
func transitive(packages []listed) func(string) []string {
	imports := map[string][]string{}
	for _, p := range packages {
		imports[p.ImportPath] = p.Imports
	}
	return func(from string) []string {
		seen := map[string]bool{}
		for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
			for _, to := range imports[queue[0]] {
				if !seen[to] {
					seen[to] = true
					queue = append(queue, to)
				}
			}
		}
		out := make([]string, 0, len(seen))
		for s := range seen {
			out = append(out, s)
		}
		slices.Sort(out)
		return out
	}
}

// TestNoNetHTTPOnTheDataPath: what carries requests uses of net/http the
// names of status codes, and nothing that reads or writes.
func TestNoNetHTTPOnTheDataPath(t *testing.T) {
	rooms := []string{"netloop", "proxy", "proxy/http1", "proxy/http2", "proxy/tunnel", "pipeline"}
	files := 0
	for _, room := range rooms {
		names, err := filepath.Glob(filepath.Join("..", "..", "userspace", filepath.FromSlash(room), "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			files++
			f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range f.Imports {
				if i.Path.Value == `"golang.org/x/net/http2"` {
					t.Errorf("%s imports %s", name, i.Path.Value)
				}
			}
			ast.Inspect(f, func(n ast.Node) bool {
				s, ok := n.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				if p, ok := s.X.(*ast.Ident); ok && p.Name == "http" && !strings.HasPrefix(s.Sel.Name, "Status") {
					t.Errorf("%s uses http.%s", name, s.Sel.Name)
				}
				return true
			})
		}
	}
	if files < 2*len(rooms) {
		t.Errorf("%d files: some room is not where it was", files)
	}
}
