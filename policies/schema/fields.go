// SPDX-License-Identifier: Apache-2.0

// Package schema is the shape of policy documents, read from the types of
// v1alpha1: which fields there are, what they may hold, what their comments
// say, and what of it this version refuses. The loader decodes by it, the
// JSON Schema and the explanation of a field are made of it.
package schema

import (
	"reflect"
	"strings"

	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
)

// Field is what the tags of a struct field say.
type Field struct {
	Index    []int  // as reflect.Value.FieldByIndex takes it
	Name     string // in YAML
	GoName   string
	Owner    string // the struct's name
	Type     reflect.Type
	Words    []string // what a text may be; nil: anything
	Required bool
}

// Fields returns the fields of a struct, those of embedded structs as its
// own.
func Fields(t reflect.Type) []Field {
	out := make([]Field, 0, t.NumField())
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous {
			for _, e := range Fields(f.Type) {
				e.Index = append([]int{i}, e.Index...)
				out = append(out, e)
			}
			continue
		}
		e := Field{Index: []int{i}, Name: f.Tag.Get("json"), GoName: f.Name, Owner: t.Name(), Type: f.Type, Required: f.Tag.Get("required") == "true"}
		if words := f.Tag.Get("oneof"); words != "" {
			e.Words = strings.Split(words, "|")
		}
		out = append(out, e)
	}
	return out
}

// documents are the kinds with their types, in the order in which they are
// shown.
var documents = []struct {
	kind string
	t    reflect.Type
}{
	{v1alpha1.KindMachineIdentity, reflect.TypeFor[v1alpha1.MachineIdentity]()},
	{v1alpha1.KindTokenIssuer, reflect.TypeFor[v1alpha1.TokenIssuer]()},
	{v1alpha1.KindRelationModel, reflect.TypeFor[v1alpha1.RelationModel]()},
	{v1alpha1.KindAPIPolicy, reflect.TypeFor[v1alpha1.APIPolicy]()},
	{v1alpha1.KindPostureProfile, reflect.TypeFor[v1alpha1.PostureProfile]()},
}

// Kinds returns the kinds of documents.
func Kinds() []string {
	out := make([]string, len(documents))
	for i, d := range documents {
		out[i] = d.kind
	}
	return out
}

// typeOf returns a kind's type.
func typeOf(kind string) reflect.Type {
	for _, d := range documents {
		if d.kind == kind {
			return d.t
		}
	}
	return nil
}

// element is a field's type without pointers and lists.
func element(t reflect.Type) (elem reflect.Type, list bool) {
	for {
		switch {
		case t.Kind() == reflect.Pointer:
			t = t.Elem()
		case t.Kind() == reflect.Slice && t != wordsType:
			t, list = t.Elem(), true
		default:
			return t, list
		}
	}
}

// The types whose text has a form of its own.
var (
	durationType    = reflect.TypeFor[v1alpha1.Duration]()
	dateType        = reflect.TypeFor[v1alpha1.Date]()
	sizeType        = reflect.TypeFor[v1alpha1.Size]()
	rateType        = reflect.TypeFor[v1alpha1.Rate]()
	probabilityType = reflect.TypeFor[v1alpha1.Probability]()
	wordsType       = reflect.TypeFor[v1alpha1.Words]()
	relationType    = reflect.TypeFor[v1alpha1.Relation]()
)

// isScalar says whether a type has no fields for whoever writes YAML.
func isScalar(t reflect.Type) bool {
	switch t {
	case dateType, rateType:
		return true
	}
	return t.Kind() != reflect.Struct
}
