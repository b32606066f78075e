// SPDX-License-Identifier: Apache-2.0

package load

import (
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Document is one policy document with the places of what it says.
type Document struct {
	Kind, Namespace, Name string

	root   *yaml.Node
	source *source
}

// source is the text that nodes point into.
type source struct {
	file string
	text *lines
	skip int // lines before the document's part of the file
}

// lines is the text of a file, by line.
type lines struct {
	content []byte
	starts  []int // of the lines, once asked for
}

// Doc is a document of one kind.
type Doc[T any] struct {
	Document
	Value T
}

// FullName returns NAMESPACE/NAME.
func (d *Document) FullName() string { return d.Namespace + "/" + d.Name }

// Position returns the place of the whole document.
func (d *Document) Position() Position { return d.source.at(d.root) }

// At returns the place of a value; the path is made of field names and of
// list indices. What is not there is placed at the nearest that encloses it.
func (d *Document) At(path ...any) Position {
	_, value := d.find(path)
	return d.source.at(value)
}

// Key returns the place of a field's name, otherwise like At.
func (d *Document) Key(path ...any) Position {
	key, _ := d.find(path)
	return d.source.at(key)
}

// Lookup returns the place of a value, if it is written at all.
func (d *Document) Lookup(path ...any) (Position, bool) {
	n := d.node(path)
	if n == nil {
		return Position{}, false
	}
	return d.source.at(n), true
}

// Text returns a value as it is written, "" for what is not a scalar.
func (d *Document) Text(path ...any) string {
	if n := d.node(path); n != nil && n.Kind == yaml.ScalarNode {
		return n.Value
	}
	return ""
}

// Empty says whether a value is written without anything in it.
func (d *Document) Empty(path ...any) bool {
	n := d.node(path)
	return n != nil && len(n.Content) == 0
}

func (d *Document) node(path []any) *yaml.Node {
	n := d.root
	for _, step := range path {
		if _, n = child(n, step); n == nil {
			return nil
		}
	}
	return n
}

// FieldText is one value of a document: the path of its field and its text.
type FieldText struct{ Path, Text string }

// Fields returns all values of a document but apiVersion, kind and its name.
// The entries of a list have the list's path; those that are fields have
// their name in it, LIST[NAME].FIELD, or without one are one value, written as
// {FIELD: VALUE, ...}.
func (d *Document) Fields() []FieldText {
	var out []FieldText
	for i := 0; i+1 < len(d.root.Content); i += 2 {
		switch name := d.root.Content[i].Value; name {
		case "apiVersion", "kind":
		case "metadata":
			for _, f := range fieldTexts(nil, name, d.root.Content[i+1]) {
				if f.Path != "metadata.name" && f.Path != "metadata.namespace" {
					out = append(out, f)
				}
			}
		default:
			out = fieldTexts(out, name, d.root.Content[i+1])
		}
	}
	return out
}

func fieldTexts(out []FieldText, path string, n *yaml.Node) []FieldText {
	switch n.Kind {
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			out = fieldTexts(out, path+"."+n.Content[i].Value, n.Content[i+1])
		}
	case yaml.SequenceNode:
		for _, item := range n.Content {
			_, name := child(item, "name")
			if name == nil || name.Kind != yaml.ScalarNode {
				out = append(out, FieldText{path, flowText(item)})
				continue
			}
			for i := 0; i+1 < len(item.Content); i += 2 {
				if k := item.Content[i].Value; k != "name" {
					out = fieldTexts(out, path+"["+name.Value+"]."+k, item.Content[i+1])
				}
			}
		}
	default:
		out = append(out, FieldText{path, n.Value})
	}
	return out
}

// flowText writes a value in one line.
func flowText(n *yaml.Node) string {
	var parts []string
	switch n.Kind {
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			parts = append(parts, n.Content[i].Value+": "+flowText(n.Content[i+1]))
		}
		slices.Sort(parts)
		return "{" + strings.Join(parts, ", ") + "}"
	case yaml.SequenceNode:
		for _, item := range n.Content {
			parts = append(parts, flowText(item))
		}
		return "[" + strings.Join(parts, ", ") + "]"
	}
	return n.Value
}

// File returns the document's file.
func (d *Document) File() string { return d.source.file }

// Dir returns the folder of the document's file.
func (d *Document) Dir() string { return filepath.Dir(d.source.file) }

func (d *Document) find(path []any) (key, value *yaml.Node) {
	key, value = d.root, d.root
	for _, step := range path {
		k, v := child(value, step)
		if v == nil {
			return key, key
		}
		key, value = k, v
	}
	return key, value
}

func child(n *yaml.Node, step any) (key, value *yaml.Node) {
	switch step := step.(type) {
	case string:
		if n.Kind != yaml.MappingNode {
			return nil, nil
		}
		for i := 0; i+1 < len(n.Content); i += 2 {
			if n.Content[i].Value == step {
				return n.Content[i], n.Content[i+1]
			}
		}
	case int:
		if n.Kind == yaml.SequenceNode && step < len(n.Content) {
			return n.Content[step], n.Content[step]
		}
	}
	return nil, nil
}

func (s *source) at(n *yaml.Node) Position {
	return Position{File: s.file, Line: n.Line + s.skip, Column: n.Column}
}

// Within returns the place of a character inside of a text value: its line
// counted from 1 and its column counted from 0 in the text. Where the YAML
// writes the text in another form than it has (escapes, folding), it is the
// place of the value.
func (d *Document) Within(line, column int, path ...any) Position {
	_, n := d.find(path)
	p := d.source.at(n)
	if n.Kind != yaml.ScalarNode || line < 1 || column < 0 {
		return p
	}
	switch n.Style &^ yaml.TaggedStyle {
	case yaml.LiteralStyle:
		return d.source.withinBlock(p, line, column)
	case yaml.DoubleQuotedStyle, yaml.SingleQuotedStyle:
		if line == 1 && d.source.verbatim(p, 1, n.Value) {
			p.Column += 1 + column
		}
	default:
		if line == 1 && d.source.verbatim(p, 0, n.Value) {
			p.Column += column
		}
	}
	return p
}

// verbatim says whether the text stands at that place as it is.
func (s *source) verbatim(p Position, quote int, text string) bool {
	line := []rune(s.line(p.Line))
	from := p.Column - 1 + quote
	to := from + utf8.RuneCountInString(text)
	return from >= 0 && to <= len(line) && string(line[from:to]) == text
}

// withinBlock finds a place in a literal block, whose first line with text
// tells the indentation.
func (s *source) withinBlock(p Position, line, column int) Position {
	for i := 1; i <= line; i++ {
		text := s.line(p.Line + i)
		if trimmed := strings.TrimLeft(text, " "); trimmed != "" {
			return Position{File: p.File, Line: p.Line + line, Column: len(text) - len(trimmed) + column + 1}
		}
	}
	return p
}

func (s *source) line(n int) string { return s.text.line(n) }

// line returns a line, counted from 1, without its end.
func (l *lines) line(n int) string {
	l.index()
	if n < 1 || n > len(l.starts) {
		return ""
	}
	rest := l.content[l.starts[n-1]:]
	if n < len(l.starts) {
		rest = l.content[l.starts[n-1] : l.starts[n]-1]
	}
	return strings.TrimSuffix(string(rest), "\r")
}

// count returns how many lines there are, the one after the last end of line
// included.
func (l *lines) count() int {
	l.index()
	return len(l.starts)
}

func (l *lines) index() {
	if l.starts != nil {
		return
	}
	l.starts = []int{0}
	for i, c := range l.content {
		if c == '\n' {
			l.starts = append(l.starts, i+1)
		}
	}
}
