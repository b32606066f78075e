// SPDX-License-Identifier: Apache-2.0

package load

import (
	"encoding"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"

	"github.com/sallyport-dev/sallyport/policies/schema"
)

// Bounds of a document.
const (
	maxDepth     = 32
	maxString    = 256 << 10
	maxShownText = 80
)

// decoder fills Go values from YAML nodes by the tags that v1alpha1
// describes, and reports everything that does not fit.
type decoder struct {
	source *source
	report *Report
}

func (d *decoder) errorf(n *yaml.Node, format string, args ...any) {
	d.report.Errorf(d.source.at(n), format, args...)
}

// inspect refuses what no policy needs and what makes YAML dangerous:
// aliases, tags, deep nesting. It must pass before decode.
func (d *decoder) inspect(n *yaml.Node, depth int) bool {
	switch {
	case depth > maxDepth:
		d.errorf(n, "nested deeper than %d", maxDepth)
		return false
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		d.errorf(n, "anchors and aliases are not accepted; write the value out")
		return false
	case n.Style&yaml.TaggedStyle != 0:
		d.errorf(n, "tags are not accepted")
		return false
	}
	ok := true
	for _, c := range n.Content {
		ok = d.inspect(c, depth+1) && ok
	}
	return ok
}

// mapping decodes a mapping into a struct, leaving out the keys in skip.
func (d *decoder) mapping(n *yaml.Node, v reflect.Value, key *yaml.Node, name string, skip ...string) {
	if n.Kind != yaml.MappingNode {
		d.errorf(n, "%s: want fields, got %s", name, describe(n))
		return
	}
	fields := schema.Fields(v.Type())
	seen := d.keys(n)
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, value := n.Content[i], n.Content[i+1]
		if seen[k.Value] != k || slices.Contains(skip, k.Value) {
			continue
		}
		f := lookup(fields, k.Value)
		if f == nil {
			d.unknown(k, fields)
			continue
		}
		if schema.Refused(f.Owner, f.Name) {
			d.errorf(k, "%s %s", k.Value, schema.NotSupported)
			continue
		}
		d.value(value, v.FieldByIndex(f.Index), k, f)
	}
	for i := range fields {
		if f := &fields[i]; f.Required && seen[f.Name] == nil {
			if key == nil {
				key = n
			}
			d.errorf(key, "%s is missing", f.Name)
		}
	}
}

// keys returns the first node of each key and reports what is not a key or
// stands there twice.
func (d *decoder) keys(n *yaml.Node) map[string]*yaml.Node {
	seen := make(map[string]*yaml.Node, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		if k.Kind != yaml.ScalarNode || k.Tag == "!!merge" {
			d.errorf(k, "want a field's name, got %s", describe(k))
			continue
		}
		if first := seen[k.Value]; first != nil {
			d.errorf(k, "field %q stands here twice: first at %s", shown(k.Value), d.source.at(first))
			continue
		}
		seen[k.Value] = k
	}
	return seen
}

func (d *decoder) unknown(k *yaml.Node, fields []schema.Field) {
	var names []string
	for i := range fields {
		if !schema.Refused(fields[i].Owner, fields[i].Name) {
			names = append(names, fields[i].Name)
		}
	}
	d.errorf(k, "unknown field %q%s", shown(k.Value), d.report.Suggest(k.Value, names))
}

// value decodes a field's value.
func (d *decoder) value(n *yaml.Node, v reflect.Value, key *yaml.Node, f *schema.Field) {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		d.errorf(key, "%s has no value", f.Name)
		return
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	if u, ok := reflect.TypeAssert[encoding.TextUnmarshaler](v.Addr()); ok && n.Kind == yaml.ScalarNode {
		if v.Kind() == reflect.Slice && n.Tag != "!!str" { // a text for a list of one
			d.errorf(n, "%s: want a text or a list, got %s; put it in quotes", f.Name, describe(n))
			return
		}
		d.text(n, u, f)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.mapping(n, v, key, f.Name)
	case reflect.Slice:
		d.list(n, v, key, f)
	case reflect.Map:
		d.dictionary(n, v, f)
	default:
		d.scalar(n, v, f)
	}
}

func (d *decoder) text(n *yaml.Node, u encoding.TextUnmarshaler, f *schema.Field) {
	if !d.plain(n, f) {
		return
	}
	if err := u.UnmarshalText([]byte(n.Value)); err != nil {
		d.errorf(n, "%s: %v", f.Name, err)
	}
}

func (d *decoder) list(n *yaml.Node, v reflect.Value, key *yaml.Node, f *schema.Field) {
	switch {
	case n.Kind != yaml.SequenceNode:
		d.errorf(n, "%s: want a list, got %s", f.Name, describe(n))
		return
	case len(n.Content) == 0 && f.Name == "from":
		d.errorf(key, `from: an empty list would match no caller or every one; write "all: true" if you mean every one`)
		return
	case len(n.Content) == 0 && f.Required:
		d.errorf(key, "%s: an empty list says nothing; fill it", f.Name)
		return
	case len(n.Content) == 0:
		d.errorf(key, "%s: an empty list says nothing; leave the field out or fill it", f.Name)
		return
	case len(n.Content) > schema.MaxList:
		d.errorf(n, "%s: a list may have %d entries, this one has %d", f.Name, schema.MaxList, len(n.Content))
		return
	}
	out := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, item := range n.Content {
		d.value(item, out.Index(i), item, f)
	}
	v.Set(out)
}

// dictionary decodes a map of strings, or of anything.
func (d *decoder) dictionary(n *yaml.Node, v reflect.Value, f *schema.Field) {
	if n.Kind != yaml.MappingNode {
		d.errorf(n, "%s: want fields, got %s", f.Name, describe(n))
		return
	}
	if len(n.Content)/2 > schema.MaxMap {
		d.errorf(n, "%s: may have %d entries, this one has %d", f.Name, schema.MaxMap, len(n.Content)/2)
		return
	}
	seen := d.keys(n)
	out := reflect.MakeMapWithSize(v.Type(), len(seen))
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, value := n.Content[i], n.Content[i+1]
		if seen[k.Value] != k {
			continue
		}
		item := reflect.New(v.Type().Elem()).Elem()
		if item.Kind() == reflect.Interface {
			if x := d.any(value, f); x != nil {
				item.Set(reflect.ValueOf(x))
			}
		} else {
			d.value(value, item, k, &schema.Field{Name: f.Name + "." + shown(k.Value)})
		}
		out.SetMapIndex(reflect.ValueOf(k.Value), item)
	}
	v.Set(out)
}

// any decodes a value as JSON has it: strings, integers, booleans, lists
// and objects.
func (d *decoder) any(n *yaml.Node, f *schema.Field) any {
	switch n.Kind {
	case yaml.MappingNode:
		out := make(map[string]any)
		seen := d.keys(n)
		for i := 0; i+1 < len(n.Content); i += 2 {
			if k := n.Content[i]; seen[k.Value] == k {
				out[k.Value] = d.any(n.Content[i+1], f)
			}
		}
		return out
	case yaml.SequenceNode:
		out := make([]any, 0, len(n.Content))
		for _, item := range n.Content {
			out = append(out, d.any(item, f))
		}
		return out
	}
	switch n.Tag {
	case "!!bool":
		var b bool
		d.scalar(n, reflect.ValueOf(&b).Elem(), f)
		return b
	case "!!int":
		var i int64
		d.scalar(n, reflect.ValueOf(&i).Elem(), f)
		return i
	case "!!null":
		return nil
	}
	var s string
	d.scalar(n, reflect.ValueOf(&s).Elem(), f)
	return s
}

func (d *decoder) scalar(n *yaml.Node, v reflect.Value, f *schema.Field) {
	if n.Kind != yaml.ScalarNode {
		d.errorf(n, "%s: want %s, got %s", f.Name, wanted(v.Kind()), describe(n))
		return
	}
	if !d.plain(n, f) {
		return
	}
	switch v.Kind() {
	case reflect.String:
		if n.Tag != "!!str" {
			d.errorf(n, "%s: want a text, got %s; put it in quotes", f.Name, describe(n))
			return
		}
		v.SetString(n.Value)
		d.oneof(n, f)
	case reflect.Bool:
		if n.Tag != "!!bool" {
			d.errorf(n, "%s: want true or false, got %s", f.Name, describe(n))
			return
		}
		v.SetBool(n.Value[0] == 't' || n.Value[0] == 'T')
	case reflect.Uint16, reflect.Uint32:
		u, err := strconv.ParseUint(n.Value, 10, v.Type().Bits())
		if n.Tag != "!!int" || err != nil || strconv.FormatUint(u, 10) != n.Value {
			d.errorf(n, "%s: want a whole number from 0 to %d, got %s", f.Name, uint64(1)<<v.Type().Bits()-1, describe(n))
			return
		}
		v.SetUint(u)
	case reflect.Int64:
		i, err := strconv.ParseInt(n.Value, 10, 64)
		if n.Tag != "!!int" || err != nil {
			d.errorf(n, "%s: want a whole number, got %s", f.Name, describe(n))
			return
		}
		v.SetInt(i)
	default:
		panic("load: a field of kind " + v.Kind().String() + " has no decoder")
	}
}

// plain refuses the words that YAML 1.1 readers take for booleans, control
// characters and texts over the bound.
func (d *decoder) plain(n *yaml.Node, f *schema.Field) bool {
	if n.Style == 0 && n.Tag == "!!str" {
		switch strings.ToLower(n.Value) {
		case "yes", "no", "on", "off":
			d.errorf(n, "%s: %s without quotes is a boolean to many YAML readers; write %q", f.Name, n.Value, n.Value)
			return false
		}
	}
	if len(n.Value) > maxString {
		d.errorf(n, "%s: a text may have %d bytes, this one has %d", f.Name, maxString, len(n.Value))
		return false
	}
	if i := strings.IndexFunc(n.Value, func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' }); i >= 0 {
		d.errorf(n, "%s: holds a control character", f.Name)
		return false
	}
	return true
}

func (d *decoder) oneof(n *yaml.Node, f *schema.Field) {
	if schema.RefusedWord(f.Owner, f.Name, n.Value) {
		d.errorf(n, "%s: %q %s", f.Name, n.Value, schema.NotSupported)
		return
	}
	if len(f.Words) == 0 || slices.Contains(f.Words, n.Value) {
		return
	}
	words := accepted(f) // all of which the message names; which was meant is for machines
	d.report.ErrorHint(d.source.at(n), fmt.Sprintf("%s: %q is not one of %s", f.Name, shown(n.Value), strings.Join(words, ", ")), d.report.Suggest(n.Value, words))
}

// accepted are the words that this version takes.
func accepted(f *schema.Field) (words []string) {
	for _, w := range f.Words {
		if !schema.RefusedWord(f.Owner, f.Name, w) {
			words = append(words, w)
		}
	}
	return words
}

func lookup(fields []schema.Field, name string) *schema.Field {
	for i := range fields {
		if fields[i].Name == name {
			return &fields[i]
		}
	}
	return nil
}

// describe says what a node is, for an error.
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "fields"
	case yaml.SequenceNode:
		return "a list"
	}
	switch n.Tag {
	case "!!null":
		return "nothing"
	case "!!str":
		return fmt.Sprintf("%q", shown(n.Value))
	}
	return shown(n.Value)
}

func wanted(k reflect.Kind) string {
	switch k {
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "a text"
	}
	return "a whole number"
}

// shown shortens a text for an error.
func shown(s string) string {
	if len(s) > maxShownText {
		return strings.ToValidUTF8(s[:maxShownText], "") + "..."
	}
	return s
}
