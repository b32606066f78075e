// SPDX-License-Identifier: Apache-2.0

// Package diff tells what differs between two sets of policy documents, by
// document and field. Where a document is written, in which order, and how its
// YAML is laid out is no difference.
package diff

import (
	"cmp"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/policies/load"
)

// What happened to a document.
const (
	Added   = "added"
	Removed = "removed"
	Changed = "changed"
)

// Change is one document that differs. What is no document has the kind
// relation (a tuple of a *.tuples.yaml file, named by its model) or text (a
// model's file, named by its base name).
type Change struct {
	What string `json:"what"`
	Kind string `json:"kind"`
	Name string `json:"name"` // NAMESPACE/NAME
	// Position is in the new set, of what was removed in the old.
	Position load.Position `json:"position"`
	Fields   []Field       `json:"fields,omitempty"` // that differ, in the order of their paths
}

// Field is one that differs: Old is nil for what was added, New for what was
// removed. A list's entries have the list's path, entries with a name their
// name in it: spec.rules[create-payment].http.
type Field struct {
	Path string  `json:"path"`
	Old  *string `json:"old,omitempty"`
	New  *string `json:"new,omitempty"`
}

// Compare returns what differs from one set to another, by kind and name.
func Compare(old, new *load.Set) []Change {
	var out []Change
	before, after := old.Documents(), new.Documents()
	type key struct{ kind, name string }
	index := func(docs []*load.Document) map[key]*load.Document {
		m := make(map[key]*load.Document, len(docs))
		for _, d := range docs {
			m[key{d.Kind, d.FullName()}] = d
		}
		return m
	}
	olds, news := index(before), index(after)
	for k, d := range news {
		was, ok := olds[k]
		if !ok {
			out = append(out, Change{What: Added, Kind: k.kind, Name: k.name, Position: d.Position()})
		} else if fields := compare(was.Fields(), d.Fields()); len(fields) > 0 {
			out = append(out, Change{What: Changed, Kind: k.kind, Name: k.name, Position: d.Position(), Fields: fields})
		}
	}
	for k, d := range olds {
		if news[k] == nil {
			out = append(out, Change{What: Removed, Kind: k.kind, Name: k.name, Position: d.Position()})
		}
	}
	slices.SortFunc(out, func(a, b Change) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name))
	})
	return append(out, others(old, new)...)
}

// compare holds the values of two documents against each other: those of one
// path as a set, for no list of the language has an order that matters. One
// value that took another's place is one field.
func compare(old, new []load.FieldText) []Field {
	type values struct{ gone, come []string }
	byPath := map[string]*values{}
	at := func(path string) *values {
		if byPath[path] == nil {
			byPath[path] = &values{}
		}
		return byPath[path]
	}
	count := map[load.FieldText]int{}
	for _, f := range old {
		count[f]++
	}
	for _, f := range new {
		if count[f]--; count[f] < 0 {
			at(f.Path).come = append(at(f.Path).come, f.Text)
		}
	}
	for _, f := range old {
		if count[f] > 0 {
			count[f]--
			at(f.Path).gone = append(at(f.Path).gone, f.Text)
		}
	}
	var out []Field
	for _, path := range slices.Sorted(maps.Keys(byPath)) {
		v := byPath[path]
		if len(v.gone) == 1 && len(v.come) == 1 {
			out = append(out, Field{path, &v.gone[0], &v.come[0]})
			continue
		}
		for i := range v.gone {
			out = append(out, Field{Path: path, Old: &v.gone[i]})
		}
		for i := range v.come {
			out = append(out, Field{Path: path, New: &v.come[i]})
		}
	}
	return out
}

// others compares relations and the files of models.
func others(old, new *load.Set) []Change {
	var out []Change
	type tuple struct{ model, text string }
	places := map[tuple]load.Position{}
	count := map[tuple]int{}
	read := func(set *load.Set, n int) {
		for _, d := range set.Tuples {
			for i, t := range d.Value.Tuples {
				k := tuple{d.Value.Model, t.User + " " + t.Relation + " " + t.Object}
				count[k] += n
				places[k] = d.At("tuples", i)
			}
		}
	}
	read(old, -1)
	read(new, 1)
	for k, n := range count {
		what := Added
		if n < 0 {
			what = Removed
		}
		if n != 0 {
			out = append(out, Change{What: what, Kind: "relation", Name: strings.TrimPrefix(k.model+" "+k.text, " "), Position: places[k]})
		}
	}
	slices.SortFunc(out, func(a, b Change) int { return cmp.Compare(a.Name, b.Name) })
	texts := func(set *load.Set) map[string]string {
		m := make(map[string]string, len(set.Texts))
		for path, text := range set.Texts {
			m[filepath.Base(path)] = text
		}
		return m
	}
	was, is := texts(old), texts(new)
	for _, name := range slices.Sorted(maps.Keys(is)) {
		if text, ok := was[name]; !ok {
			out = append(out, Change{What: Added, Kind: "text", Name: name})
		} else if text != is[name] {
			out = append(out, Change{What: Changed, Kind: "text", Name: name})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(was)) {
		if _, ok := is[name]; !ok {
			out = append(out, Change{What: Removed, Kind: "text", Name: name})
		}
	}
	return out
}
