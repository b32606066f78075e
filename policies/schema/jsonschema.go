// SPDX-License-Identifier: Apache-2.0

package schema

import (
	"bytes"
	"encoding/json"
	"math"
	"reflect"

	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
)

// The forms of names (DNS-1123, as Kubernetes has them; dots in names only).
const (
	NamePattern      = `^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$`
	NamespacePattern = `^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`
)

// MaxList is how many entries a list may have, MaxMap a map.
const (
	MaxList = 10_000
	MaxMap  = 1_000
)

// ID is the published JSON Schema's own address.
const ID = "https://github.com/sallyport-dev/sallyport/blob/main/policies/schema/sallyport.schema.json"

// node is a JSON Schema (draft 7, which editors know best).
type node map[string]any

// JSON returns the JSON Schema of a kind of document, "" for all of them:
// what an editor can tell while a policy is written. Whatever the loader
// accepts satisfies it; that references lead somewhere, conditions compile
// and so on, only the loader knows. It fails with an *UnknownError.
func JSON(kind string) ([]byte, error) {
	g := generator{definitions: node{}}
	root := node{"$schema": "http://json-schema.org/draft-07/schema#", "title": "Sallyport " + v1alpha1.APIVersion}
	if kind == "" {
		root["$id"] = ID
		var cases []node
		for _, d := range documents {
			cases = append(cases, node{
				"if":   node{"properties": node{"kind": node{"const": d.kind}}, "required": []string{"kind"}},
				"then": node{"$ref": g.document(d.kind, d.t)},
			})
		}
		root["type"] = "object"
		root["required"] = []string{"apiVersion", "kind", "metadata"}
		root["properties"] = node{"apiVersion": node{"const": v1alpha1.APIVersion}, "kind": node{"enum": Kinds()}}
		root["allOf"] = cases
	} else {
		t := typeOf(kind)
		if t == nil {
			return nil, &UnknownError{Name: kind, Known: Kinds()}
		}
		root["allOf"] = []node{{"$ref": g.document(kind, t)}}
	}
	root["definitions"] = g.definitions
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", " ")
	err := e.Encode(root)
	return b.Bytes(), err
}

type generator struct{ definitions node }

// document defines a kind and returns the reference to it.
func (g *generator) document(kind string, t reflect.Type) string {
	ref := g.object(t)
	def := g.definitions[t.Name()].(node)
	def["properties"].(node)["apiVersion"] = node{"const": v1alpha1.APIVersion, "description": "apiVersion is always " + v1alpha1.APIVersion + "."}
	def["properties"].(node)["kind"] = node{"const": kind}
	def["required"] = append([]string{"apiVersion", "kind"}, def["required"].([]string)...)
	return ref
}

// object defines a struct and returns the reference to it.
func (g *generator) object(t reflect.Type) string {
	ref := "#/definitions/" + t.Name()
	if _, ok := g.definitions[t.Name()]; ok {
		return ref
	}
	properties, required := node{}, []string{}
	def := node{"type": "object", "description": comments[t.Name()], "properties": properties, "additionalProperties": false}
	g.definitions[t.Name()] = def
	for _, f := range Fields(t) {
		properties[f.Name] = g.field(f)
		if f.Required {
			required = append(required, f.Name)
		}
	}
	if len(required) > 0 {
		def["required"] = required
	}
	return ref
}

func (g *generator) field(f Field) node {
	doc := docOf(f)
	if Refused(f.Owner, f.Name) {
		return node{"description": doc + "\n\nIt " + NotSupported + ".", "not": node{}}
	}
	n := g.of(f.Type, f)
	if ref, ok := n["$ref"]; ok { // draft 7 reads nothing beside a $ref
		n = node{"allOf": []node{{"$ref": ref}}}
	}
	n["description"] = doc
	return n
}

func (g *generator) of(t reflect.Type, f Field) node {
	if t.Kind() == reflect.Pointer {
		return g.of(t.Elem(), f)
	}
	switch t {
	case durationType:
		return node{"type": "string", "pattern": `^([0-9]{1,5}d|\+?(([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|h|m|s))+)$`}
	case dateType:
		return node{"type": "string", "pattern": `^[0-9]{4}-[0-9]{2}-[0-9]{2}(T.+)?$`}
	case sizeType:
		return node{"type": []string{"string", "integer"}, "pattern": `^[0-9]+(KiB|MiB|GiB)?$`, "minimum": 1}
	case rateType:
		return node{"type": "string", "pattern": `^[0-9]+/(hour|day|week)$`}
	case probabilityType:
		return node{"type": []string{"number", "string"}, "exclusiveMinimum": 0, "exclusiveMaximum": 1}
	case wordsType:
		return node{"anyOf": []node{{"type": "string"}, list(node{"type": "string"})}}
	case relationType:
		return node{"anyOf": []node{{"type": "string"}, {"$ref": g.object(t)}}}
	}
	switch t.Kind() {
	case reflect.Struct:
		return node{"$ref": g.object(t)}
	case reflect.Slice:
		return list(g.of(t.Elem(), f))
	case reflect.Map:
		return node{"type": "object", "additionalProperties": g.of(t.Elem(), Field{}), "maxProperties": MaxMap}
	case reflect.Interface:
		return node{}
	case reflect.Bool:
		return node{"type": "boolean"}
	case reflect.Uint16:
		return node{"type": "integer", "minimum": 0, "maximum": math.MaxUint16}
	case reflect.Uint32:
		return node{"type": "integer", "minimum": 0, "maximum": math.MaxUint32}
	case reflect.String:
		return g.text(f)
	}
	panic("schema: a field of kind " + t.Kind().String() + " has no JSON Schema")
}

func (*generator) text(f Field) node {
	n := node{"type": "string"}
	var words []string
	for _, w := range f.Words {
		if !RefusedWord(f.Owner, f.Name, w) {
			words = append(words, w)
		}
	}
	if words != nil {
		n["enum"] = words
	}
	switch f.Owner + "." + f.Name {
	case "Metadata.name":
		n["pattern"] = NamePattern
	case "Metadata.namespace":
		n["pattern"] = NamespacePattern
	}
	return n
}

func list(items node) node {
	return node{"type": "array", "items": items, "minItems": 1, "maxItems": MaxList}
}
