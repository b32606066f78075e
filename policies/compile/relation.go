// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Relation is a relation that must hold for a rule.
type Relation struct {
	Model    *Model
	User     Template
	Relation string
	Object   Template
}

// Template is a text with placeholders.
type Template struct{ parts []part }

type part struct {
	literal string
	source  source
	name    string
}

type source uint8

const (
	fromLiteral source = iota
	fromToken
	fromHeader
	fromParam
	fromSource
)

// maxRelationValue bounds one value in a relation, in bytes: OpenFGA's own
// bound for a whole user or object is 256 and more.
const maxRelationValue = 256

// Append appends the text for a request. A value that is not there or that
// a relation cannot take gives ReasonRelationTemplate, a header that came
// more than once ReasonHeaderAmbiguous; dst is then without use. It does not
// allocate where dst has room.
func (t *Template) Append(dst []byte, a *Activation) ([]byte, flow.Reason) {
	for i := range t.parts {
		p := &t.parts[i]
		if p.source == fromLiteral {
			dst = append(dst, p.literal...)
			continue
		}
		n := len(dst)
		var r flow.Reason
		if dst, r = p.append(dst, a); r != flow.ReasonOK {
			return dst, r
		}
		if !ValidRelationValue(dst[n:]) {
			return dst, flow.ReasonRelationTemplate
		}
	}
	return dst, flow.ReasonOK
}

func (p *part) append(dst []byte, a *Activation) ([]byte, flow.Reason) {
	value, ok := "", false
	switch p.source {
	case fromHeader:
		v, n := a.Request.HeaderValue(p.name)
		if n > 1 {
			return dst, flow.ReasonHeaderAmbiguous
		}
		return append(dst, v...), flow.ReasonOK
	case fromParam:
		if a.Match != nil {
			value, ok = a.Match.Param(p.name)
		}
	case fromToken:
		value, ok = a.Token.text(p.name)
	case fromSource:
		if ok = a.Source != nil; ok {
			value = a.Source.Name
			if p.name == "namespace" {
				value = a.Source.Namespace
			}
		}
	}
	if !ok {
		return dst, flow.ReasonRelationTemplate
	}
	return append(dst, value...), flow.ReasonOK
}

func (c *Claims) text(name string) (string, bool) {
	if c == nil {
		return "", false
	}
	switch name {
	case "sub":
		return c.Subject, true
	case "iss":
		return c.Issuer, true
	case "client_id":
		return c.ClientID, true
	}
	s, ok := c.Raw[name].(string)
	return s, ok
}

// ValidRelationValue says whether a value may stand in a relation: not
// empty, valid UTF-8, without white space, control characters and what
// separates or widens (: # @ * |).
func ValidRelationValue(v []byte) bool {
	if len(v) == 0 || len(v) > maxRelationValue {
		return false
	}
	for i := 0; i < len(v); {
		c := v[i]
		if c < utf8.RuneSelf {
			if c <= ' ' || c == 0x7f || c == ':' || c == '#' || c == '@' || c == '*' || c == '|' {
				return false
			}
			i++
			continue
		}
		r, n := utf8.DecodeRune(v[i:])
		if r == utf8.RuneError && n == 1 || unicode.IsSpace(r) || unicode.IsControl(r) || unicode.Is(unicode.Cf, r) {
			return false
		}
		i += n
	}
	return true
}

// parseRelation reads "USER RELATION OBJECT", USER and OBJECT being
// TYPE:NAME with placeholders in NAME.
func parseRelation(s string) (*Relation, error) {
	if len(s) > 1024 {
		return nil, fmt.Errorf("a relation may have 1024 bytes, this one has %d", len(s))
	}
	fields := strings.Fields(s)
	if len(fields) != 3 {
		return nil, fmt.Errorf("%q is not USER RELATION OBJECT, such as \"user:{token.sub} can_pay account:{header.X-Account}\"", s)
	}
	if !isRelationName(fields[1]) {
		return nil, fmt.Errorf("%q is not the name of a relation", fields[1])
	}
	user, err := parseTemplate(fields[0])
	if err != nil {
		return nil, err
	}
	object, err := parseTemplate(fields[2])
	if err != nil {
		return nil, err
	}
	for _, t := range [...]*Template{&user, &object} {
		for i, p := range t.parts {
			switch before, of, userset := strings.Cut(p.literal, "#"); {
			case !userset:
			case t == &object:
				return nil, fmt.Errorf("%q is not TYPE:NAME", fields[2])
			case i < len(t.parts)-1 || i == 1 && before == "" || !isRelationName(of):
				return nil, fmt.Errorf("%q is not TYPE:NAME or TYPE:NAME#RELATION", fields[0])
			}
		}
	}
	return &Relation{User: user, Relation: fields[1], Object: object}, nil
}

// kind returns the type of what the template names, and the relation where
// it names a userset.
func (t *Template) kind() (typ, relation string) {
	_, relation, _ = strings.Cut(t.parts[len(t.parts)-1].literal, "#")
	return strings.TrimSuffix(t.parts[0].literal, ":"), relation
}

func parseTemplate(s string) (Template, error) {
	typ, rest, ok := strings.Cut(s, ":")
	if !ok || rest == "" || !isRelationName(typ) {
		return Template{}, fmt.Errorf("%q is not TYPE:NAME", s)
	}
	t := Template{parts: []part{{literal: typ + ":"}}}
	for rest != "" {
		open := strings.IndexByte(rest, '{')
		if open < 0 {
			open = len(rest)
		}
		if lit := rest[:open]; lit != "" {
			if strings.ContainsAny(lit, "}:@*") || !ValidRelationValue([]byte(strings.ReplaceAll(strings.ReplaceAll(lit, "|", "."), "#", "."))) {
				return Template{}, fmt.Errorf("%q cannot stand in %q", lit, s)
			}
			t.parts = append(t.parts, part{literal: lit})
		}
		if rest = rest[open:]; rest == "" {
			break
		}
		inside, after, ok := strings.Cut(rest[1:], "}")
		if !ok {
			return Template{}, fmt.Errorf("%q: { without }", s)
		}
		p, err := parsePlaceholder(inside)
		if err != nil {
			return Template{}, err
		}
		t.parts = append(t.parts, p)
		rest = after
	}
	return t, nil
}

func parsePlaceholder(s string) (part, error) {
	kind, name, _ := strings.Cut(s, ".")
	switch {
	case name == "" || strings.ContainsAny(name, "{} \t"):
	case kind == "token":
		return part{source: fromToken, name: name}, nil
	case kind == "header" && isToken(name):
		return part{source: fromHeader, name: name}, nil
	case kind == "param" && isIdentifier(name):
		return part{source: fromParam, name: name}, nil
	case s == "source.name" || s == "source.namespace":
		return part{source: fromSource, name: name}, nil
	case s == "source.id":
		return part{}, fmt.Errorf("{source.id} holds colons and can never stand in a relation; use {source.namespace} and {source.name}")
	}
	return part{}, fmt.Errorf("{%s} is not one of {token.CLAIM}, {header.NAME}, {param.NAME}, {source.name}, {source.namespace}", s)
}

// names yields the names of one kind of placeholder.
func (r *Relation) names(kind source, yield func(string)) {
	for _, t := range [...]*Template{&r.User, &r.Object} {
		for _, p := range t.parts {
			if p.source == kind {
				yield(p.name)
			}
		}
	}
}
