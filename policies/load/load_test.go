// SPDX-License-Identifier: Apache-2.0

package load

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/schema"
	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
)

const head = "apiVersion: sallyport.dev/v1alpha1\nkind: MachineIdentity\n"

func identity(name string) string {
	return fmt.Sprintf(head+"metadata: {name: %s}\nspec: {owner: o, spiffeID: \"spiffe://example.org/%[1]s\"}\n", name)
}

func texts(problems []Problem) string {
	var b strings.Builder
	for _, p := range problems {
		b.WriteString(p.String() + "\n")
	}
	return b.String()
}

func TestDocumentsAreCutAtTheirMarkers(t *testing.T) {
	content := "--- # one\n" + identity("one") + "---\n" + head + "metadata: {name: two\n---\r\n" + identity("three") +
		"...\n" + identity("four") + "---\nspec: '\n---'\n--- {apiVersion: x}"
	set, problems := Load([]File{{Path: "f.yaml", Content: []byte(content)}})
	var names []string
	for _, d := range set.Identities {
		names = append(names, d.Name+"@"+d.Position().String()+"@"+d.At("metadata", "name").String())
	}
	want := "[one@f.yaml:2:1@f.yaml:4:18 three@f.yaml:11:1@f.yaml:13:18]"
	if got := fmt.Sprint(names); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if !set.Incomplete {
		t.Error("not incomplete")
	}
	const said = "f.yaml:9:1: YAML: did not find expected ',' or '}'\n" +
		"f.yaml:16:1: YAML: did not find expected <document start>\n" +
		"f.yaml:21:1: apiVersion is missing; it is sallyport.dev/v1alpha1\n" +
		"f.yaml:23:18: apiVersion: \"x\" is not sallyport.dev/v1alpha1\n"
	if got := texts(problems); got != said {
		t.Errorf("got\n%swant\n%s", got, said)
	}
}

func TestBounds(t *testing.T) {
	large := bytes.Repeat([]byte("# comment\n"), MaxFileBytes/10+1)
	var set []File
	for i := range MaxSetBytes/MaxFileBytes + 1 {
		set = append(set, File{Path: fmt.Sprintf("f%02d.yaml", i), Content: large[:MaxFileBytes]})
	}
	many := make([]File, MaxFiles+1)
	for i := range many {
		many[i].Path = fmt.Sprintf("f%05d.yaml", i)
	}
	var documents [3]bytes.Buffer
	for i := range MaxDocuments + 5 {
		fmt.Fprintf(&documents[i*3/(MaxDocuments+5)], "--- {apiVersion: sallyport.dev/v1alpha1, kind: RelationModel, metadata: {name: m%d}}\n", i)
	}
	deep := strings.Repeat("[", 100_000)
	for _, c := range []struct {
		name  string
		files []File
		want  string
	}{
		{"file", []File{{"f.yaml", large}}, "f.yaml: the file is larger than 1 MiB\n"},
		{"set", set, "f16.yaml: the set is larger than 16 MiB\n"},
		{"files", many, "f10000.yaml: the set has more than 10000 files\n"},
		{"documents", []File{{"f0.yaml", documents[0].Bytes()}, {"f1.yaml", documents[1].Bytes()}, {"f2.yaml", documents[2].Bytes()}}, "f2.yaml:8331:1: the set has more than 25000 documents\n"},
		{"twice", []File{{"f.yaml", nil}, {"f.yaml", nil}}, "f.yaml: the file is there twice\n"},
		{"not UTF-8", []File{{"f.yaml", []byte("a: \xff")}}, "f.yaml: the file is not UTF-8\n"},
		{"NUL", []File{{"f.yaml", []byte("a: \x00")}}, "f.yaml: the file holds a NUL character\n"},
		{"carriage return", []File{{"f.yaml", []byte("a: b\r\n# c\rspec: d\n")}}, "f.yaml:2:1: the line holds a line break"},
		{"line separator", []File{{"f.yaml", []byte("# c\u2028spec: d\n")}}, "f.yaml:1:1: the line holds a line break"},
		{"next line", []File{{"f.yaml", []byte("\n\n# c\u0085spec: d\n")}}, "f.yaml:3:1: the line holds a line break"},
		{"nested", []File{{"f.yaml", []byte(deep)}}, "f.yaml:1:1: YAML: exceeded max depth"},
		{"aliases", []File{{"f.yaml", []byte("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n")}}, "f.yaml:1:4: anchors and aliases are not accepted"},
		{"text", []File{{"f.yaml", []byte(head + "metadata: {name: x}\nspec: {owner: " + strings.Repeat("o", maxString+1) + "}\n")}}, "f.yaml:4:15: owner: a text may have 262144 bytes"},
		{"list", []File{{"f.yaml", []byte(head + "metadata: {name: x}\nspec: {owner: o, mayCall: [" + strings.Repeat("a,", schema.MaxList+1) + "]}\n")}}, "f.yaml:4:27: mayCall: a list may have 10000 entries"},
		{"tuples", tupleFiles(), "f0.tuples.yaml:1:1: the set has more than 100000 tuples"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, problems := Load(c.files)
			found := false
			for _, p := range problems {
				found = found || strings.HasPrefix(p.String()+"\n", c.want)
			}
			if !found {
				t.Errorf("got\n%.500s\nwant %s", texts(problems), c.want)
			}
			if len(problems) > maxProblems+1 {
				t.Errorf("%d problems", len(problems))
			}
		})
	}
}

func tupleFiles() []File {
	line := `- {user: "user:a", relation: r, object: "d:1"}` + "\n"
	var files []File
	files = append(files, File{Path: "f0.tuples.yaml", Content: []byte("tuples:\n" + strings.Repeat(line, 11))})
	for i := range 10 {
		files = append(files, File{Path: fmt.Sprintf("e%02d.tuples.yaml", i), Content: []byte("tuples:\n" + strings.Repeat(line, 9_999))})
	}
	return files
}

func TestFilesByTheirNames(t *testing.T) {
	set, problems := Load([]File{
		{"a.yaml", []byte(identity("a"))}, {"a_test.yaml", []byte("nonsense")}, {"b_test.yml", []byte("nonsense")},
		{"m.fga", []byte("model\n")}, {"m.fga.json", []byte("{}")}, {"t.tuples.yml", []byte("- {user: a, relation: b, object: c}")},
		{"no-extension", []byte(identity("b"))},
	})
	if len(problems) != 0 || len(set.Identities) != 2 || len(set.Texts) != 2 || len(set.Tuples) != 1 || set.Texts["m.fga"] != "model\n" {
		t.Errorf("%+v\n%s", set, texts(problems))
	}
}

func TestReadDir(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "secret.yaml")
	dir := t.TempDir()
	write := func(path, content string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := func(target, name string) {
		t.Helper()
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	write(outside, "secret")
	for _, name := range []string{"a.yaml", "b.yml", "c.tuples.yaml", "d.fga", "e.fga.json", "x_test.yaml", "README.md", ".hidden.yaml", "f.yaml~", "g.json", "..1/z.yaml", "sub/y.yaml"} {
		write(filepath.Join(dir, name), name)
	}
	write(filepath.Join(dir, "large.yaml"), strings.Repeat("#", MaxFileBytes+1))
	link("..1", "..data")
	link("..data/z.yaml", "z.yaml")
	link(outside, "absolute.yaml")
	link("../"+filepath.Base(filepath.Dir(outside))+"/secret.yaml", "escapes.yaml")
	link("nowhere.yaml", "dangling.yaml")
	link("loop.yaml", "loop.yaml")
	link("sub", "folder.yaml")
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	files, problems, err := ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, f.Path)
		if want := strings.Replace(f.Path, "z.yaml", "..1/z.yaml", 1); string(f.Content) != want {
			t.Errorf("%s holds %q", f.Path, f.Content)
		}
	}
	if want := []string{"a.yaml", "b.yml", "c.tuples.yaml", "d.fga", "e.fga.json", "z.yaml"}; !reflect.DeepEqual(names, want) {
		t.Errorf("read %v", names)
	}
	var refused []string
	for _, p := range problems {
		refused = append(refused, p.File)
	}
	if want := []string{"absolute.yaml", "dangling.yaml", "escapes.yaml", "fifo.yaml", "folder.yaml", "large.yaml", "loop.yaml"}; !reflect.DeepEqual(refused, want) {
		t.Errorf("refused\n%s", texts(problems))
	}
	if _, _, err := ReadDir(filepath.Join(dir, "missing")); !os.IsNotExist(unwrapAll(err)) {
		t.Errorf("missing: %v", err)
	}
	if _, _, err := ReadDir(filepath.Join(dir, "a.yaml")); err == nil {
		t.Error("a file is no folder")
	}
}

func unwrapAll(err error) error {
	for {
		u, ok := err.(interface{ Unwrap() error })
		if !ok || os.IsNotExist(err) {
			return err
		}
		err = u.Unwrap()
	}
}

func TestProblemAsText(t *testing.T) {
	p := Problem{Position: Position{"f.yaml", 3, 7}, Severity: Warning, Message: "m"}
	if got := p.String(); got != "warning: f.yaml:3:7: m" || p.FileLine() != "f.yaml:3" {
		t.Errorf("%s, %s", got, p.FileLine())
	}
	if got := (Problem{Message: "m"}).String(); got != "m" {
		t.Error(got)
	}
	if got, err := json.Marshal(p); err != nil || string(got) != `{"file":"f.yaml","line":3,"column":7,"severity":"warning","message":"m"}` {
		t.Errorf("%s, %v", got, err)
	}
	sorted := Sort([]Problem{{}, {Position: Position{"b", 1, 1}}, {Position: Position{"a", 2, 1}}, {Position: Position{"a", 1, 9}}, {Position: Position{"b", 1, 1}}})
	if len(sorted) != 4 || sorted[0].Line != 1 || sorted[2].File != "b" || sorted[3].File != "" {
		t.Errorf("%v", sorted)
	}
}

func TestDidYouMean(t *testing.T) {
	names := []string{"payments", "checkout", "ledger", "a"}
	for name, want := range map[string]string{
		"paymets": "payments", "Payments": "payments", "paymenst": "payments", "chekout": "checkout", "ledgers": "ledger",
		"pay": "", "zzzzzz": "", "": "", "b": "a", strings.Repeat("x", 100): "", "payments": "",
	} {
		if got := nearest(name, names); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}

// TestEveryFieldCanBeDecoded holds the API's types against what the decoder
// needs: a name for each field and a kind that is known.
func TestEveryFieldCanBeDecoded(t *testing.T) {
	seen := make(map[reflect.Type]bool)
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
			typ = typ.Elem()
		}
		if typ.Kind() != reflect.Struct || seen[typ] || typ.PkgPath() != reflect.TypeFor[v1alpha1.Rule]().PkgPath() {
			return
		}
		if _, ok := reflect.TypeAssert[interface{ UnmarshalText([]byte) error }](reflect.New(typ)); ok && typ.Name() != "Relation" {
			return
		}
		seen[typ] = true
		for _, f := range schema.Fields(typ) {
			if f.Name == "" {
				t.Errorf("%s has a field without name", typ)
			}
			walk(typ.FieldByIndex(f.Index).Type)
			kind := typ.FieldByIndex(f.Index).Type
			for kind.Kind() == reflect.Pointer || kind.Kind() == reflect.Slice || kind.Kind() == reflect.Map {
				kind = kind.Elem()
			}
			_, text := reflect.TypeAssert[interface{ UnmarshalText([]byte) error }](reflect.New(kind))
			switch kind.Kind() {
			case reflect.Struct, reflect.String, reflect.Bool, reflect.Uint16, reflect.Uint32, reflect.Int64, reflect.Interface:
			default:
				if !text {
					t.Errorf("%s.%s is a %s, which has no decoder", typ.Name(), f.Name, kind)
				}
			}
		}
	}
	for _, typ := range []reflect.Type{
		reflect.TypeFor[v1alpha1.MachineIdentity](), reflect.TypeFor[v1alpha1.TokenIssuer](), reflect.TypeFor[v1alpha1.RelationModel](),
		reflect.TypeFor[v1alpha1.APIPolicy](), reflect.TypeFor[v1alpha1.PostureProfile](), reflect.TypeFor[v1alpha1.TupleFile](),
	} {
		walk(typ)
	}
}

// TestHostileDocumentsAreCheap holds that no document of the largest size
// takes long, whatever is in it.
func TestHostileDocumentsAreCheap(t *testing.T) {
	fill := func(start, s string) []byte {
		return []byte(start + strings.Repeat(s, (MaxFileBytes-len(start))/len(s)))
	}
	const spec = head + "metadata: {name: x}\nspec:\n"
	for name, content := range map[string][]byte{
		"brackets": fill("", "["), "braces": fill("", "{"), "dashes": fill("", "- "), "question marks": fill("", "? "), "quotes": fill("", "\"'"),
		"colons": fill("", "a: "), "commas": fill("a: [", "a,"), "keys": fill(spec, "  a: b\n"), "same key": fill("", "a: b\n"),
		"markers": fill("", "---\n"), "documents": fill("", "--- a\n"), "comments": fill("", "#\n"), "comments between": fill("", "a:\n#\n"),
		"anchors": fill("", "- &a a\n"), "aliases": fill("- &a a\n", "- *a\n"), "tags": fill("", "- !a a\n"), "tabs": fill("", "\t"), "block": fill("a: |\n", "  \n"),
		"indents": fill("", " \n  \n"), "long key": fill("", "a"), "unreadable": fill("", "---\n{\n"), "escapes": fill("\"", "\\u0041"),
	} {
		start := time.Now()
		_, problems := Load([]File{{"f.yaml", content}})
		if took := time.Since(start); took > time.Minute {
			t.Errorf("%s: %s", name, took)
		} else {
			t.Logf("%s: %s, %d problems", name, took, len(problems))
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte(identity("a")), "f.yaml")
	f.Add([]byte("- {user: a, relation: b, object: c}"), "f.tuples.yaml")
	f.Add([]byte("model: x\ntuples: [{user: a}]"), "f.tuples.yaml")
	f.Add([]byte("? [a]\n: {<<: *x}\n--- |\n  x\n---\n%YAML 1.1"), "f.yaml")
	f.Fuzz(func(t *testing.T, content []byte, path string) {
		set, problems := Load([]File{{Path: path, Content: content}})
		for _, d := range set.Identities {
			if d.Name == "" || d.Namespace == "" {
				t.Error("an identity without name")
			}
		}
		for _, p := range problems {
			if p.File != path || p.Message == "" {
				t.Errorf("problem %+v", p)
			}
		}
	})
}
