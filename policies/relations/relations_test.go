// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relations

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/openfga/language/pkg/go/transformer"
)

const head = "model\n  schema 1.1\ntype user\n"

func told(errs []*Error) string {
	var b strings.Builder
	for _, e := range errs {
		fmt.Fprintln(&b, e)
	}
	return b.String()
}

func TestErrors(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"type user", "is neither JSON nor begins with \"model\"\n"},
		{"{", "is not JSON\n"},
		{"{}", "it defines no type\n"},
		{`{"schema_version":"1.1","type_definitions":1}`, ""},
		{"model\n  schema 1.1\n", "it defines no type\n"},
		{"model\n  schema 9.9\ntype user\n", "invalid WriteAuthorizationModelRequest.SchemaVersion: value must be in list"},
		{head + "type doc\n  relation\n", "line 5, column 3: no viable alternative"},
		{head + "type user\n", "line 4: user: the type is defined twice\n"},
		{head + "type doc\n  relations\n    define a: b\n    define c: [usr]\n    define d: [doc#f]\n    define e: [user with f]\n",
			"line 6: doc#a: type \"doc\" has no relation \"b\"\nline 7: doc#c: there is no type \"usr\"\n" +
				"line 8: doc#d: type \"doc\" has no relation \"f\"\nline 9: doc#e: there is no condition \"f\"\n"},
		{head + "type doc\n  relations\n    define p: [doc]\n    define a: [user] or b from p\n    define c: [user] or a from q\n",
			"line 7: doc#a: no type that \"p\" leads to has a relation \"b\"\nline 8: doc#c: type \"doc\" has no relation \"q\"\n"},
		{head + "type doc\n  relations\n    define a: [doc#a]\n", "line 6: doc#a: nobody can ever have this relation: it leads to no type in brackets\n"},
		{head + "type doc\n  relations\n    define a: [user] or b\n    define b: [user] or a\n", "line 6: doc#a: it is defined by itself\n"},
		{head + "type doc\n  relations\n    define self: [user]\n", "line 6: doc#self: self and this are reserved keywords\n"},
		{head + "type doc\n  relations\n    define a: [user with c]\ncondition c(x: string) {\n  x == 1\n}\n", "failed to compile expression on condition 'c'"},
		{strings.Repeat("#", MaxText+1), "262145 bytes are more than 262144\n"},
	} {
		m, errs := Parse(c.text)
		if got := told(errs); m != nil || len(errs) == 0 || !strings.HasPrefix(got, c.want) {
			t.Errorf("%.200q:\n%swant\n%s", c.text, got, c.want)
		}
	}
}

// hostile are models that OpenFGA's parser or its checks do not come to an
// end with, in any time that somebody would wait.
func hostile() map[string]string {
	var out = map[string]string{
		"nested":           head + "type doc\n  relations\n    define x: [user]\n    define r: " + strings.Repeat("(", 5000) + "x" + strings.Repeat(" or x)", 5000) + "\n",
		"nested condition": head + "condition c(a: string) {\n" + strings.Repeat("(", 20000) + "a" + strings.Repeat(")", 20000) + " == a\n}\n",
	}
	var b strings.Builder
	b.WriteString(head + "type doc\n  relations\n    define r0: [user]\n")
	for i := range 1500 {
		fmt.Fprintf(&b, "    define x%d: %sr0 or r0%s\n", i, strings.Repeat("(", 30), strings.Repeat(")", 30))
	}
	out["nested again and again"] = b.String()
	out["long condition"] = head + "condition c(a: string) {\n" + strings.Repeat("a == a && ", 12_000) + "a == a\n}\n"
	out["listed condition"] = head + "condition c(a: string) {\n" + strings.Repeat("[", 100_000) + "\n}\n"
	model := func(name string, write func()) {
		b.Reset()
		b.WriteString(head)
		write()
		out[name] = b.String()
	}
	model("doubling", func() {
		b.WriteString("type doc\n  relations\n    define r0: [user]\n")
		for i := 1; i < 40; i++ {
			fmt.Fprintf(&b, "    define r%d: r%d or r%d\n", i, i-1, i-1)
		}
	})
	model("linked types", func() {
		var all []string
		for i := range 30 {
			all = append(all, fmt.Sprint("t", i))
		}
		for _, name := range all {
			fmt.Fprintf(&b, "type %s\n  relations\n    define p: [%s]\n    define v: [user]\n    define w: v and w from p\n", name, strings.Join(all, ", "))
		}
	})
	model("linked usersets", func() {
		b.WriteString("type doc\n  relations\n")
		for i := range 100 {
			fmt.Fprintf(&b, "    define r%d: [user", i)
			for j := range 100 {
				fmt.Fprintf(&b, ", doc#r%d", j)
			}
			b.WriteString("]\n")
		}
	})
	model("linked tuplesets", func() {
		b.WriteString("type doc\n  relations\n    define p: [doc]\n")
		for i := range 100 {
			fmt.Fprintf(&b, "    define r%d: [user]", i)
			for j := range 100 {
				fmt.Fprintf(&b, " or r%d from p", j)
			}
			b.WriteString("\n")
		}
	})
	return out
}

func TestHostileModels(t *testing.T) {
	for name, text := range hostile() {
		t.Run(name, func(t *testing.T) {
			m, errs := Parse(text)
			if m != nil || !strings.Contains(told(errs), "too many") && !strings.Contains(told(errs), "more than") && !strings.Contains(told(errs), "too long") {
				t.Errorf("taken, or refused for something else: %s", told(errs))
			}
		})
	}
}

func TestLargeModelsAreTaken(t *testing.T) {
	var b strings.Builder
	b.WriteString(head)
	for i := range MaxTypes - 1 {
		fmt.Fprintf(&b, "type t%d\n  relations\n    define a: [user] or b\n    define b: [user]\n", i)
	}
	for _, text := range []string{b.String(), Default, ""} {
		if _, errs := Parse(text); errs != nil {
			t.Error(told(errs))
		}
	}
}

func TestJSON(t *testing.T) {
	text, err := transformer.TransformDSLToJSON(Default)
	if err != nil {
		t.Fatal(err)
	}
	if _, errs := Parse(text); errs != nil {
		t.Error(told(errs))
	}
}

func TestUses(t *testing.T) {
	m, errs := Parse("")
	if errs != nil {
		t.Fatal(told(errs))
	}
	say := func(e *Error) string {
		if e == nil {
			return ""
		}
		return e.Message
	}
	for _, c := range []struct{ got, want string }{
		{say(m.CheckRelation("document", "can_view")), ""},
		{say(m.CheckRelation("document", "can_vieww")), `type "document" of the model has no relation "can_vieww"`},
		{say(m.CheckRelation("documents", "can_view")), `the model has no type "documents"`},
		{say(m.CheckUser("user", "")), ""},
		{say(m.CheckUser("team", "member")), ""},
		{say(m.CheckUser("team", "members")), `type "team" of the model has no relation "members"`},
		{say(m.CheckTuple("user:a", "editor", "folder:x")), ""},
		{say(m.CheckTuple("user:*", "viewer", "folder:x")), ""},
		{say(m.CheckTuple("team:a#member", "viewer", "folder:x")), ""},
		{say(m.CheckTuple("user:*", "editor", "folder:x")), `editor of type "folder" takes user, user with lease, team#member`},
		{say(m.CheckTuple("team:a", "editor", "folder:x")), `editor of type "folder" takes user, user with lease, team#member`},
		{say(m.CheckTuple("user:a", "can_edit", "folder:x")), `can_edit of type "folder" follows from other relations and cannot be written`},
		{say(m.CheckTuple("usr:a", "editor", "folder:x")), `the model has no type "usr"`},
		{say(m.CheckTuple("user:a", "editor", "fold:x")), `the model has no type "fold"`},
	} {
		if c.got != c.want {
			t.Errorf("%q, want %q", c.got, c.want)
		}
	}
	if !m.Reaches("user", "", "document", "can_view") || !m.Reaches("service", "", "endpoint", "can_call") || m.Reaches("service", "", "document", "can_view") || m.Reaches("node", "", "document", "can_view") {
		t.Error("what leads where")
	}
	if e := m.CheckRelation("document", "can_vieww"); e.Name != "can_vieww" || !slices.Contains(e.Known, "can_view") {
		t.Errorf("%+v", e)
	}
	conditional, errs := Parse(head + "type doc\n  relations\n    define a: [user with c]\ncondition c(x: string) {\n  x == 'a'\n}\n")
	if errs != nil {
		t.Fatal(told(errs))
	}
	if e := say(conditional.CheckTuple("user:a", "a", "doc:x")); !strings.Contains(e, "only with a condition") {
		t.Error(e)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Default)
	for _, text := range hostile() {
		f.Add(text)
	}
	f.Add(`{"schema_version":"1.1","type_definitions":[{"type":"user"}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		m, errs := Parse(text)
		if (m == nil) == (len(errs) == 0) {
			t.Fatal("a model with errors, or neither")
		}
		for _, e := range errs {
			if strings.ContainsAny(e.Message, "\n\x1b") {
				t.Errorf("%q", e.Message)
			}
		}
	})
}
