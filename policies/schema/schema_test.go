// SPDX-License-Identifier: Apache-2.0

package schema_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/schema"
)

// TestDocumented holds that every kind and field says what it is, and that
// what this version refuses is there.
func TestDocumented(t *testing.T) {
	fields := 0
	var walk func(e *schema.Entry)
	walk = func(e *schema.Entry) {
		fields++
		if len(e.Doc) < 15 || strings.Contains(e.Doc, "\n") && !strings.Contains(e.Doc, "\n\n") {
			t.Errorf("%s.%s: %q", e.Kind, e.Path, e.Doc)
		}
		for i := range e.Fields {
			walk(&e.Fields[i])
		}
	}
	for _, kind := range schema.Kinds() {
		e, err := schema.Explain(strings.ToLower(kind), true)
		if err != nil || e.Kind != kind || len(e.Fields) != 2 {
			t.Fatalf("%s: %+v, %v", kind, e, err)
		}
		walk(&e)
	}
	if fields < 100 {
		t.Errorf("%d fields: they were not walked", fields)
	}
}

func TestExplain(t *testing.T) {
	e, err := schema.Explain("APIPolicy.spec.rules.token.boundTo", false)
	if err != nil || e.Path != "spec.rules.token.boundTo" || e.Type != "text" || !slices.Equal(e.Words, []string{"mtls", "dpop", "signature"}) ||
		len(e.RefusedWords) != 0 || e.Required || len(e.Fields) != 0 {
		t.Errorf("%+v, %v", e, err)
	}
	e, err = schema.Explain("machineidentity.spec.tokens", false)
	if err != nil || e.Refused || e.Type != "list of fields" || len(e.Fields) != 5 || !e.Fields[0].Required || len(e.Fields[0].Fields) != 0 {
		t.Errorf("%+v, %v", e, err)
	}
	for path, want := range map[string]schema.UnknownError{
		"policy":                            {Name: "policy", Known: schema.Kinds()},
		"":                                  {Name: "", Known: schema.Kinds()},
		"apipolicy.":                        {In: "APIPolicy", Name: "", Known: []string{"metadata", "spec"}},
		"apipolicy.spec.protect.app.tsl":    {In: "APIPolicy.spec.protect.app", Name: "tsl", Known: []string{"tls", "certificate", "key", "ca"}},
		"apipolicy.spec.mode.x":             {In: "APIPolicy.spec.mode", Name: "x"},
		"machineidentity.spec.expires.Time": {In: "MachineIdentity.spec.expires", Name: "Time"},
	} {
		_, err := schema.Explain(path, false)
		var got *schema.UnknownError
		if !errors.As(err, &got) || !reflect.DeepEqual(*got, want) {
			t.Errorf("%q: %#v", path, err)
		}
	}
}

func compiled(t *testing.T, kind string) *jsonschema.Schema {
	t.Helper()
	content, err := schema.JSON(kind)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("mem:///s.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("mem:///s.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// value is a YAML node as JSON has it.
func value(n *yaml.Node) any {
	switch n.Kind {
	case yaml.MappingNode:
		m := map[string]any{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			m[n.Content[i].Value] = value(n.Content[i+1])
		}
		return m
	case yaml.SequenceNode:
		l := []any{}
		for _, c := range n.Content {
			l = append(l, value(c))
		}
		return l
	}
	switch n.Tag {
	case "!!null":
		return nil
	case "!!bool", "!!int", "!!float":
		var v any
		if err := n.Decode(&v); err == nil {
			if _, err := json.Marshal(v); err == nil {
				return v
			}
		}
	}
	return n.Value
}

// structural are the errors that a JSON Schema can see as well.
var structural = regexp.MustCompile(`unknown field|: "[^"]*" is not one of [^(]*$|is missing|has no value|an empty list|want (fields|a list|a text|a text or a list|true or false|a whole number)|is not supported by`)

// TestAgainstLoader holds the JSON Schema against the loader: on every
// document of the table of errors and of the library, it takes what the
// loader takes and refuses what is wrong in form.
func TestAgainstLoader(t *testing.T) {
	all := compiled(t, "")
	byKind := map[string]*jsonschema.Schema{}
	for _, k := range schema.Kinds() {
		byKind[k] = compiled(t, k)
	}
	archive, err := txtar.ParseFile("../testdata/errors.txtar")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for _, f := range archive.Files {
		if strings.HasSuffix(f.Name, ".yaml") && !strings.HasSuffix(f.Name, ".tuples.yaml") {
			files[f.Name] = f.Data
		}
	}
	err = filepath.WalkDir("../library", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".yaml") || strings.HasSuffix(path, ".tuples.yaml") || strings.HasSuffix(path, "_test.yaml") {
			return err
		}
		files[path], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	taken, refused := 0, 0
	for _, name := range slices.Sorted(maps.Keys(files)) {
		dec := yaml.NewDecoder(bytes.NewReader(files[name]))
		for {
			var doc yaml.Node
			if err := dec.Decode(&doc); err != nil {
				if !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "yaml:") {
					t.Fatal(name, err)
				}
				break // what does not parse is for nobody's schema
			}
			text, err := yaml.Marshal(&doc)
			if err != nil || doc.Content[0].Tag == "!!null" {
				continue
			}
			_, problems := load.Load([]load.File{{Path: "f.yaml", Content: text}})
			encoded, err := json.Marshal(value(doc.Content[0]))
			if err != nil {
				continue
			}
			v, err := jsonschema.UnmarshalJSON(bytes.NewReader(encoded))
			if err != nil {
				t.Fatal(name, err)
			}
			said := all.Validate(v)
			if m, ok := v.(map[string]any); ok {
				if kind, _ := m["kind"].(string); byKind[kind] != nil {
					if alone := byKind[kind].Validate(v); (alone == nil) != (said == nil) {
						t.Errorf("%s: the schema of %s says %v, that of all kinds %v\n%s", name, kind, alone, said, text)
					}
				}
			}
			switch {
			case !load.HasErrors(problems):
				if taken++; said != nil {
					t.Errorf("%s: the loader takes it, the schema does not: %v\n%s", name, said, text)
				}
			case slices.ContainsFunc(problems, func(p load.Problem) bool { return structural.MatchString(p.Message) }):
				if refused++; said == nil {
					t.Errorf("%s: the schema takes what the loader refuses:\n%s\n%v", name, text, problems)
				}
			}
		}
	}
	if taken < 100 || refused < 30 {
		t.Errorf("%d documents taken and %d refused: the table was not read", taken, refused)
	}
}
