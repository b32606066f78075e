// SPDX-License-Identifier: Apache-2.0

package schema

import (
	"maps"
	"reflect"
	"testing"
)

// TestUnsupportedIsThere holds that each entry of the list is a field or a
// word: a misspelt one would refuse nothing.
func TestUnsupportedIsThere(t *testing.T) {
	left := maps.Clone(unsupported)
	for _, d := range documents {
		delete(left, d.kind)
		for _, name := range structs(d.t) {
			for _, f := range Fields(name) {
				delete(left, f.Owner+"."+f.Name)
				for _, w := range f.Words {
					delete(left, f.Owner+"."+f.Name+"="+w)
				}
			}
		}
	}
	for entry := range left {
		t.Errorf("unsupported %s: there is no such field or word", entry)
	}
}

// structs returns a type and all that are beneath it.
func structs(t reflect.Type) []reflect.Type {
	t, _ = element(t)
	if isScalar(t) {
		return nil
	}
	out := []reflect.Type{t}
	for _, f := range Fields(t) {
		out = append(out, structs(f.Type)...)
	}
	return out
}
