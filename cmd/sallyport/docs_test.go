// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/trial"
)

const top = "../.."

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(top, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// pages lists the Markdown files of the tree, from its top.
func pages(t *testing.T) (list []string) {
	t.Helper()
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if filepath.Ext(path) == ".md" {
			name, _ := filepath.Rel(top, path)
			list = append(list, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

var (
	fenced  = regexp.MustCompile("(?ms)^```([^\n]*)\n(.*?)^```$")
	inCode  = regexp.MustCompile("`[^`\n]*`")
	link    = regexp.MustCompile(`\]\(([^()\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.+)$`)
	anchor  = regexp.MustCompile(`<a id="([^"]+)"></a>`)
	notSlug = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// anchors are the fragments that lead into a page: those of its headings, as
// GitHub makes them, and those that are written out.
func anchors(text string) map[string]bool {
	found := map[string]bool{}
	for _, m := range heading.FindAllStringSubmatch(fenced.ReplaceAllString(text, ""), -1) {
		found[strings.ReplaceAll(notSlug.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-")] = true
	}
	for _, m := range anchor.FindAllStringSubmatch(text, -1) {
		found[m[1]] = true
	}
	return found
}

func TestDocsLinks(t *testing.T) {
	all := pages(t)
	for _, must := range []string{"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/reasons/README.md", "docs/reasons/no_rule.md", "docs/policies.md", "docs/operations.md"} {
		if !slices.Contains(all, must) {
			t.Errorf("%s is missing", must)
		}
	}
	for _, page := range all {
		text := read(t, page)
		// A label may be code; what is code otherwise is no link.
		prose := inCode.ReplaceAllString(fenced.ReplaceAllString(text, ""), "")
		for _, m := range link.FindAllStringSubmatch(prose, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			path, fragment, _ := strings.Cut(m[1], "#")
			target := page
			if path != "" {
				target = filepath.Join(filepath.Dir(page), path)
			}
			if _, err := os.Stat(filepath.Join(top, target)); err != nil {
				t.Errorf("%s: link to %s: %v", page, m[1], err)
			} else if fragment != "" && !anchors(read(t, target))[fragment] {
				t.Errorf("%s: link to %s: no such heading", page, m[1])
			}
		}
	}
}

var (
	reasonConst = regexp.MustCompile(`\bReason = "([^"]+)"`)
	reasonRow   = regexp.MustCompile("(?m)^\\| \\[`([a-z0-9_]+)`\\]\\(([a-z0-9_]+)\\.md\\) \\| (\\d+|-) \\| (?:[^|]|\\\\\\|)+ \\|$")
	reasonPage  = regexp.MustCompile("^# `([a-z0-9_]+)`\n\n[^\n]+\n\n\\| HTTP \\| decided by \\|\n\\|---\\|---\\|\n\\| (\\d+|-) \\| [^|]+ \\|\n\n")
	reasonTold  = regexp.MustCompile(`(?m)^\| anybody else \| [^:]+: ([^.]+)\.`)
)

func TestDocsReasons(t *testing.T) {
	codes := map[string]bool{}
	files, err := filepath.Glob(filepath.Join(top, "userspace/flow/*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range reasonConst.FindAllSubmatch(b, -1) {
			codes[string(m[1])] = true
		}
	}
	if len(codes) < 50 {
		t.Fatalf("%d reason codes found: they are written otherwise now", len(codes))
	}
	const dir = "docs/reasons/"
	if !strings.HasSuffix(flow.ReasonsURL, "/"+dir) {
		t.Errorf("ReasonsURL %s does not lead to %s", flow.ReasonsURL, dir)
	}
	index := read(t, dir+"README.md")
	rows := map[string]string{}
	for _, m := range reasonRow.FindAllStringSubmatch(index, -1) {
		code, status := m[1], m[3]
		switch {
		case m[2] != code:
			t.Errorf("%s: %s leads to %s", dir, code, m[2])
		case rows[code] != "":
			t.Errorf("%s: %s is there twice", dir, code)
		case !codes[code]:
			t.Errorf("%s: no reason has the code %s", dir, code)
		case status != "-" && status != fmt.Sprint(flow.Reason(code).Status()):
			t.Errorf("%s: %s has status %d, not %s", dir, code, flow.Reason(code).Status(), status)
		}
		rows[code] = status
	}
	var told []string
	for code := range codes {
		if rows[code] == "" {
			t.Errorf("%s: %s has no row", dir, code)
		}
		if flow.Reason(code).Told(false) != flow.ReasonOK {
			told = append(told, "`"+code+"`")
		}
		page := code + flow.ReasonsSuffix
		m := reasonPage.FindStringSubmatch(read(t, dir+page))
		switch {
		case m == nil:
			t.Errorf("%s: not in the form of the others", page)
		case m[1] != code || m[2] != rows[code]:
			t.Errorf("%s: speaks of %s with status %s, not %s", page, m[1], m[2], rows[code])
		}
	}
	m := reasonTold.FindStringSubmatch(index)
	if m == nil {
		t.Fatalf("%s does not say what strangers learn", dir)
	}
	said := strings.Split(m[1], ", ")
	slices.Sort(said)
	slices.Sort(told)
	if !slices.Equal(said, told) {
		t.Errorf("%s: strangers learn %s, not %s", dir, told, said)
	}
	pages, err := filepath.Glob(filepath.Join(top, dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pages {
		if code := strings.TrimSuffix(filepath.Base(p), flow.ReasonsSuffix); code != "README" && !codes[code] {
			t.Errorf("%s%s: no reason has that code", dir, filepath.Base(p))
		}
	}
}

// TestDocsPolicies holds the YAML of docs/policies.md, as one set, against
// the check that the agent makes.
func TestDocsPolicies(t *testing.T) {
	var files []load.File
	for _, m := range fenced.FindAllStringSubmatch(read(t, "docs/policies.md"), -1) {
		if name, ok := strings.CutPrefix(m[1], "yaml "); ok {
			files = append(files, load.File{Path: name, Content: []byte(m[2])})
		} else if m[1] != "text" {
			t.Errorf("a block is neither text nor YAML with the name of its file: %q", m[1])
		}
	}
	d := config.Defaults("node")
	plan, problems := compile.Build(files, compile.Options{TrustDomain: d.TrustDomain, Node: d.Node})
	for _, p := range problems {
		t.Error(p)
	}
	if plan == nil || len(plan.APIs()) == 0 {
		t.Fatal("no policies")
	}
}

// TestDocsPolicyTests runs the test of docs/testing-policies.md against the
// policies of docs/policies.md, and wants a row for each of its fields.
func TestDocsPolicyTests(t *testing.T) {
	if !relation.Built {
		t.Skip("built without the relation engine")
	}
	var files []load.File
	for _, m := range fenced.FindAllStringSubmatch(read(t, "docs/policies.md"), -1) {
		if name, ok := strings.CutPrefix(m[1], "yaml "); ok {
			files = append(files, load.File{Path: name, Content: []byte(m[2])})
		}
	}
	plan, problems := compile.Build(files, compile.Options{})
	if plan == nil {
		t.Fatal(problems)
	}
	tr, err := trial.New(t.Context(), plan, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	const name = "docs/testing-policies.md"
	page := read(t, name)
	ran := 0
	for _, m := range fenced.FindAllStringSubmatch(page, -1) {
		file, ok := strings.CutPrefix(m[1], "yaml ")
		if !ok {
			continue
		}
		tests, problems := tr.Tests(load.File{Path: file, Content: []byte(m[2])})
		for _, p := range problems {
			t.Error(p)
		}
		for _, one := range tests {
			ran++
			if r, err := tr.Run(t.Context(), one); err != nil || r.Differs != "" {
				t.Errorf("%s: %s, %v: %+v", one.Name, r.Differs, err, r.Outcome.Decision)
			}
		}
	}
	if ran == 0 {
		t.Error("no case")
	}
	for _, source := range []string{"call.go", "suite.go", "posture.go"} {
		for _, m := range regexp.MustCompile("`json:\"([^\"]+)\"").FindAllStringSubmatch(read(t, "userspace/trial/"+source), -1) {
			if !regexp.MustCompile("\\b" + m[1] + "\\b").MatchString(page) {
				t.Errorf("%s does not name the field %s", name, m[1])
			}
		}
	}
}

// TestDocsFields: each field of the policy language has a row.
func TestDocsFields(t *testing.T) {
	page := read(t, "docs/policies.md")
	files, err := filepath.Glob(filepath.Join(top, "policies/v1alpha1/*.go"))
	if err != nil {
		t.Fatal(err)
	}
	field := regexp.MustCompile("`json:\"([^\"]+)\"")
	found := 0
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range field.FindAllSubmatch(b, -1) {
			found++
			name := regexp.QuoteMeta(string(m[1]))
			if !regexp.MustCompile("`[^`\n]*\\b" + name + "\\b[^`\n]*`").MatchString(page) {
				t.Errorf("docs/policies.md does not name the field %s", m[1])
			}
		}
	}
	if found < 30 {
		t.Fatalf("%d fields found: they are written otherwise now", found)
	}
}

var tableKey = regexp.MustCompile("(?m)^\\| `([a-zA-Z.]+)` \\|[^|]*\\| ")

func TestDocsSettings(t *testing.T) {
	_, section, ok := strings.Cut(read(t, "README.md"), "\n## Configuration\n")
	if !ok {
		t.Fatal("README.md has no section Configuration")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	hump := regexp.MustCompile(`([a-z])([A-Z])`)
	documented := map[string]bool{}
	for _, m := range tableKey.FindAllStringSubmatch(section, -1) {
		documented[strings.ToLower(hump.ReplaceAllString(strings.ReplaceAll(m[1], ".", "-"), "$1-$2"))] = true
	}
	flags := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	config.AddFlags(flags)
	flags.VisitAll(func(f *pflag.Flag) {
		if !documented[f.Name] {
			t.Errorf("README.md: the table lacks the setting of --%s", f.Name)
		}
		delete(documented, f.Name)
	})
	for name := range documented {
		t.Errorf("README.md: there is no setting of --%s", name)
	}
}

// TestDocsConfiguration reads every agent.yaml that a page shows.
func TestDocsConfiguration(t *testing.T) {
	found := 0
	for _, page := range pages(t) {
		for _, m := range fenced.FindAllStringSubmatch(read(t, page), -1) {
			if m[1] != "yaml agent.yaml" {
				continue
			}
			found++
			_, problems := config.Load(config.Sources{Hostname: "node", File: page, Content: []byte(m[2])})
			for _, p := range problems {
				t.Error(p)
			}
		}
	}
	if found == 0 {
		t.Error("no page shows one")
	}
}

func TestDocsMetrics(t *testing.T) {
	page := read(t, "docs/operations.md")
	names := regexp.MustCompile(`"(sallyport_[a-z_]+)"`).FindAllStringSubmatch(read(t, "agent/metrics/metrics.go"), -1)
	if len(names) < 10 {
		t.Fatalf("%d metrics found: they are written otherwise now", len(names))
	}
	for _, m := range names {
		if !strings.Contains(page, "`"+m[1]+"`") {
			t.Errorf("docs/operations.md does not name %s", m[1])
		}
	}
}

// TestDocsProblems: each problem of the agent's health has a row.
func TestDocsProblems(t *testing.T) {
	page := read(t, "docs/operations.md")
	files, err := filepath.Glob(filepath.Join(top, "agent/*.go"))
	if err != nil {
		t.Fatal(err)
	}
	raised := regexp.MustCompile(`health\.(?:Set|Check)\((?:fmt\.Sprintf\()?"([a-z-]+)`)
	found := 0
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range raised.FindAllSubmatch(b, -1) {
			found++
			if !regexp.MustCompile("`" + string(m[1]) + "(/[^`]*)?`").MatchString(page) {
				t.Errorf("docs/operations.md does not name the problem %s", m[1])
			}
		}
	}
	if found < 10 {
		t.Fatalf("%d problems found: they are raised otherwise now", found)
	}
}

// TestDocsCommands: each command and verb of the help has a row.
func TestDocsCommands(t *testing.T) {
	page := read(t, "README.md")
	for _, c := range newRoot().Commands() {
		if c.Hidden || c.Name() == "completion" || c.Name() == "help" {
			continue
		}
		if !strings.Contains(page, "| `sallyport "+c.Name()) {
			t.Errorf("README.md has no row for sallyport %s", c.Name())
		}
	}
}

// TestPackageComments: each package has one comment, in one file.
func TestPackageComments(t *testing.T) {
	comments := map[string]int{}
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		dir, text := filepath.Dir(path), f.Doc.Text()
		comments[dir] += 0
		begins := "Package " + f.Name.Name + " "
		if f.Name.Name == "main" {
			begins = "Command " + filepath.Base(dir) + " "
		}
		switch {
		case strings.HasPrefix(text, begins):
			comments[dir]++
		case text != "":
			t.Errorf("%s: the package comment does not begin with %q", path, begins)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for dir, n := range comments {
		if n != 1 {
			t.Errorf("%s: %d package comments, want 1", dir, n)
		}
	}
}
