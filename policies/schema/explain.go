// SPDX-License-Identifier: Apache-2.0

package schema

import (
	"fmt"
	"reflect"
	"strings"
)

// Entry explains a kind or a field.
type Entry struct {
	Kind string `json:"kind"`
	// Path is the field's place in the document, "" for the kind itself; a
	// list's entries are at the list's own.
	Path string `json:"path"`
	// Type says what is written there: text, whole number, fields, list of
	// text and so on.
	Type     string   `json:"type"`
	Required bool     `json:"required"`
	Words    []string `json:"words,omitempty"`
	// Refused says that this version refuses the field, RefusedWords which of
	// the words.
	Refused      bool     `json:"refused,omitempty"`
	RefusedWords []string `json:"refusedWords,omitempty"`
	Doc          string   `json:"doc"`
	Fields       []Entry  `json:"fields,omitempty"`

	name string
}

// Name is the last part of the entry's path.
func (e *Entry) Name() string { return e.name }

// UnknownError says which part of a path is not there, and what is.
type UnknownError struct {
	// In is the path of what was looked into, "" for the kinds.
	In, Name string
	Known    []string
}

func (e *UnknownError) Error() string {
	if e.In == "" {
		return fmt.Sprintf("no kind %q", e.Name)
	}
	return fmt.Sprintf("%s has no field %q", e.In, e.Name)
}

// Explain explains KIND or KIND.FIELD.FIELD, the kind in any case, with the
// fields beneath it: their own too if all is set. It fails with an
// *UnknownError.
func Explain(path string, all bool) (Entry, error) {
	name, rest, deeper := strings.Cut(path, ".")
	kind := ""
	for _, k := range Kinds() {
		if strings.EqualFold(k, name) {
			kind = k
		}
	}
	if kind == "" {
		return Entry{}, &UnknownError{Name: name, Known: Kinds()}
	}
	t := typeOf(kind)
	e := Entry{Kind: kind, Type: "fields", Doc: comments[t.Name()], name: kind}
	for deeper {
		name, rest, deeper = strings.Cut(rest, ".")
		elem, _ := element(t)
		var known []string
		found := false
		if !isScalar(elem) {
			for _, f := range Fields(elem) {
				if f.Name == name {
					e, t, found = entry(kind, e.Path, f), f.Type, true
					break
				}
				known = append(known, f.Name)
			}
		}
		if !found {
			return Entry{}, &UnknownError{In: strings.TrimSuffix(kind+"."+e.Path, "."), Name: name, Known: known}
		}
	}
	e.fill(t, all)
	return e, nil
}

// entry explains one field, without those beneath it.
func entry(kind, parent string, f Field) Entry {
	e := Entry{Kind: kind, Path: strings.TrimPrefix(parent+"."+f.Name, "."), Type: written(f.Type), Required: f.Required, Words: f.Words,
		Refused: Refused(f.Owner, f.Name), name: f.Name}
	for _, w := range f.Words {
		if RefusedWord(f.Owner, f.Name, w) {
			e.RefusedWords = append(e.RefusedWords, w)
		}
	}
	e.Doc = docOf(f)
	return e
}

// docOf is a field's comment, or that of its type; a comment begins with the
// Go name, a text for operators with the one in YAML.
func docOf(f Field) string {
	if doc, ok := comments[f.Owner+"."+f.GoName]; ok {
		if rest, ok := strings.CutPrefix(doc, f.GoName+" "); ok {
			return f.Name + " " + rest
		}
		return doc
	}
	elem, _ := element(f.Type)
	return comments[elem.Name()]
}

// fill adds the fields beneath, one level of them or all.
func (e *Entry) fill(t reflect.Type, all bool) {
	elem, _ := element(t)
	if isScalar(elem) {
		return
	}
	for _, f := range Fields(elem) {
		sub := entry(e.Kind, e.Path, f)
		if all {
			sub.fill(f.Type, all)
		}
		e.Fields = append(e.Fields, sub)
	}
}

// written says what is written for a type.
func written(t reflect.Type) string {
	elem, list := element(t)
	s := ""
	switch elem {
	case durationType:
		s = "duration"
	case dateType:
		s = "date or time"
	case sizeType:
		s = "size in bytes"
	case rateType:
		s = "number/unit"
	case probabilityType:
		s = "probability"
	case wordsType:
		s = "text or list of text"
	case relationType:
		s = "text or fields"
	default:
		switch elem.Kind() {
		case reflect.Struct:
			s = "fields"
		case reflect.Map:
			s = "map to " + written(elem.Elem())
		case reflect.Bool:
			s = "true or false"
		case reflect.String:
			s = "text"
		case reflect.Interface:
			s = "any"
		default:
			s = "whole number"
		}
	}
	if list {
		return "list of " + s
	}
	return s
}
