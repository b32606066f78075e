// SPDX-License-Identifier: Apache-2.0

// Command generate writes what the comments of policies/v1alpha1 say as a Go
// map, or, with -schema, the published JSON Schema. It is run by go generate
// in policies/schema.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"log"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/policies/schema"
)

func main() {
	log.SetFlags(0)
	types := flag.String("types", "../v1alpha1", "folder of the Go types")
	published := flag.Bool("schema", false, "write the JSON Schema")
	out := flag.String("o", "", "file to write")
	flag.Parse()
	var content []byte
	var err error
	if *published {
		content, err = schema.JSON("")
	} else {
		content, err = comments(*types)
	}
	if err == nil {
		err = os.WriteFile(*out, content, 0o644)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// comments returns the Go source of a map from TYPE and TYPE.FIELD to what
// their comments say, without line breaks inside of a paragraph.
func comments(dir string) ([]byte, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.TYPE {
				continue
			}
			for _, spec := range g.Specs {
				collect(found, g, spec.(*ast.TypeSpec))
			}
		}
	}
	var b bytes.Buffer
	b.WriteString("// SPDX-License-Identifier: Apache-2.0\n\n// Code generated from policies/v1alpha1 by internal/generate; DO NOT EDIT.\n\npackage schema\n\n" +
		"// comments are what the Go types say, by TYPE and TYPE.FIELD.\nvar comments = map[string]string{\n")
	for _, k := range slices.Sorted(maps.Keys(found)) {
		fmt.Fprintf(&b, "%q: %q,\n", k, found[k])
	}
	b.WriteString("}\n")
	return format.Source(b.Bytes())
}

func collect(found map[string]string, g *ast.GenDecl, t *ast.TypeSpec) {
	doc := t.Doc
	if doc == nil {
		doc = g.Doc
	}
	add(found, t.Name.Name, doc)
	s, ok := t.Type.(*ast.StructType)
	if !ok {
		return
	}
	for _, f := range s.Fields.List {
		for _, n := range f.Names {
			add(found, t.Name.Name+"."+n.Name, f.Doc)
		}
	}
}

func add(found map[string]string, key string, doc *ast.CommentGroup) {
	if text := strings.TrimSpace(doc.Text()); text != "" {
		found[key] = strings.ReplaceAll(strings.ReplaceAll(strings.ReplaceAll(text, "\n\n", "\x00"), "\n", " "), "\x00", "\n\n")
	}
}
