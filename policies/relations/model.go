// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relations

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"

	openfgav1 "github.com/openfga/api/proto/openfga/v1"
	"github.com/openfga/language/pkg/go/transformer"
	"github.com/openfga/openfga/pkg/typesystem"
	"google.golang.org/protobuf/proto"
)

// Built says whether models are read: not in a binary without the relation
// engine (build tag norelation).
const Built = true

// Model is a relation model that was read and is good. It does not change
// and is safe for concurrent use.
type Model struct {
	proto *openfgav1.AuthorizationModel
	types *typesystem.TypeSystem
}

// Parse reads a model's text, "" for Default. With errors there is no model.
func Parse(text string) (m *Model, errs []*Error) {
	// OpenFGA's code has been seen to panic on odd input.
	defer func() {
		if r := recover(); r != nil {
			m, errs = nil, []*Error{wrong(0, "it cannot be read")}
		}
	}()
	if text == "" {
		text = Default
	}
	if err := shape(text); err != nil {
		return nil, []*Error{err}
	}
	parsed, errs := parse(text)
	if errs != nil {
		return nil, errs
	}
	if err := stored(parsed); err != nil {
		return nil, []*Error{err}
	}
	r := &reader{model: parsed}
	if !isJSON(text) {
		r.lines = linesOf(text)
	}
	if r.index(); len(r.errs) == 0 {
		r.references()
	}
	if len(r.errs) == 0 {
		r.bound()
	}
	if len(r.errs) > 0 {
		return nil, r.errs
	}
	types, err := typesystem.NewAndValidate(context.Background(), parsed)
	if err != nil {
		return nil, []*Error{r.explain(err)}
	}
	return &Model{parsed, types}, nil
}

// Proto returns the model as OpenFGA stores it, without an ID. It is not to
// be changed.
func (m *Model) Proto() *openfgav1.AuthorizationModel { return m.proto }

func parse(text string) (parsed *openfgav1.AuthorizationModel, errs []*Error) {
	var err error
	if isJSON(text) {
		parsed, err = transformer.LoadJSONStringToProto(text)
	} else {
		parsed, err = transformer.TransformDSLToProto(text)
	}
	if err != nil {
		return nil, syntax(err)
	}
	parsed.Id = ""
	return parsed, nil
}

// stored holds a model against what OpenFGA stores at all.
func stored(model *openfgav1.AuthorizationModel) *Error {
	if n := len(model.GetTypeDefinitions()); n > MaxTypes {
		return wrong(0, "%d types are more than %d", n, MaxTypes)
	}
	if n := proto.Size(model); n > MaxSize {
		return wrong(0, "%d bytes, as OpenFGA stores it, are more than %d", n, MaxSize)
	}
	request := &openfgav1.WriteAuthorizationModelRequest{
		StoreId: strings.Repeat("0", 26), SchemaVersion: model.GetSchemaVersion(),
		TypeDefinitions: model.GetTypeDefinitions(), Conditions: model.GetConditions(),
	}
	if len(model.GetTypeDefinitions()) == 0 {
		return wrong(0, "it defines no type")
	}
	if err := request.Validate(); err != nil {
		return wrong(0, "%s", printable(err.Error()))
	}
	return nil
}

// syntax takes the parser's errors apart: it counts lines from 0 and says
// them in the text alone.
func syntax(err error) []*Error {
	all := []error{err}
	if many, ok := errors.AsType[*transformer.OpenFgaDslSyntaxMultipleError](err); ok {
		all = many.Errors
	}
	var out []*Error
	for _, one := range all[:min(len(all), maxErrors)] {
		e := wrong(0, "%s", printable(one.Error()))
		var line, column int
		if n, _ := fmt.Sscanf(one.Error(), "syntax error at line=%d, column=%d:", &line, &column); n == 2 {
			_, why, _ := strings.Cut(e.Message, ": ")
			e = wrong(line+1, "%s", why)
			e.Column = column + 1
		}
		out = append(out, e)
	}
	return out
}

// printable keeps a message of somebody else's text on one line, and short.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) {
			return ' '
		}
		return r
	}, s)
	return strings.TrimSpace(s[:min(len(s), 300)])
}

// linesOf finds the line that defines each type, "TYPE", and each relation,
// "TYPE#RELATION".
func linesOf(text string) map[string]int {
	lines, typ, n := make(map[string]int), "", 0
	for line := range strings.Lines(text) {
		n++
		switch words := strings.Fields(line); {
		case len(words) < 2:
		case words[0] == "type":
			typ = words[1]
			lines[typ] = n
		case words[0] == "define":
			name, _, _ := strings.Cut(words[1], ":")
			lines[typ+"#"+name] = n
		}
	}
	return lines
}

// reader holds a model against what OpenFGA asks of one.
type reader struct {
	model *openfgav1.AuthorizationModel
	lines map[string]int
	types map[string]*openfgav1.TypeDefinition
	errs  []*Error
	cost  int
}

func (r *reader) wrong(typ, relation, format string, args ...any) *Error {
	at := typ
	if relation != "" {
		at += "#" + relation
	}
	e := wrong(r.lines[at], "%s: "+format, append([]any{at}, args...)...)
	if len(r.errs) < maxErrors {
		r.errs = append(r.errs, e)
	}
	return e
}

func (r *reader) index() {
	r.types = make(map[string]*openfgav1.TypeDefinition)
	for _, t := range r.model.GetTypeDefinitions() {
		if r.types[t.GetType()] != nil {
			r.wrong(t.GetType(), "", "the type is defined twice")
		}
		r.types[t.GetType()] = t
	}
}

// direct are the types that a relation takes as they are.
func direct(t *openfgav1.TypeDefinition, relation string) []*openfgav1.RelationReference {
	return t.GetMetadata().GetRelations()[relation].GetDirectlyRelatedUserTypes()
}

// references finds every name that leads nowhere.
func (r *reader) references() {
	for _, t := range r.model.GetTypeDefinitions() {
		for _, relation := range slices.Sorted(maps.Keys(t.GetRelations())) {
			for _, ref := range direct(t, relation) {
				r.reference(t, relation, ref)
			}
			operands(t.GetRelations()[relation], func(u *openfgav1.Userset) { r.operand(t, relation, u) })
		}
	}
}

func (r *reader) reference(t *openfgav1.TypeDefinition, relation string, ref *openfgav1.RelationReference) {
	other := r.types[ref.GetType()]
	if other == nil {
		e := r.wrong(t.GetType(), relation, "there is no type %q", ref.GetType())
		e.Name, e.Known = ref.GetType(), slices.Collect(maps.Keys(r.types))
		return
	}
	if name := ref.GetRelation(); name != "" && other.GetRelations()[name] == nil {
		r.noRelation(t, relation, other, name)
	}
	if name := ref.GetCondition(); name != "" && r.model.GetConditions()[name] == nil {
		e := r.wrong(t.GetType(), relation, "there is no condition %q", name)
		e.Name, e.Known = name, slices.Collect(maps.Keys(r.model.GetConditions()))
	}
}

func (r *reader) noRelation(t *openfgav1.TypeDefinition, relation string, other *openfgav1.TypeDefinition, name string) {
	e := r.wrong(t.GetType(), relation, "type %q has no relation %q", other.GetType(), name)
	e.Name, e.Known = name, slices.Collect(maps.Keys(other.GetRelations()))
}

func (r *reader) operand(t *openfgav1.TypeDefinition, relation string, u *openfgav1.Userset) {
	if name := u.GetComputedUserset().GetRelation(); name != "" && t.GetRelations()[name] == nil {
		r.noRelation(t, relation, t, name)
	}
	follow := u.GetTupleToUserset()
	if follow == nil {
		return
	}
	over, name := follow.GetTupleset().GetRelation(), follow.GetComputedUserset().GetRelation()
	if t.GetRelations()[over] == nil {
		r.noRelation(t, relation, t, over)
		return
	}
	var known []string
	for _, ref := range direct(t, over) {
		relations := r.types[ref.GetType()].GetRelations()
		if relations[name] != nil {
			return
		}
		known = append(known, slices.Collect(maps.Keys(relations))...)
	}
	e := r.wrong(t.GetType(), relation, "no type that %q leads to has a relation %q", over, name)
	e.Name, e.Known = name, known
}

// operands yields what a definition is made of.
func operands(u *openfgav1.Userset, yield func(*openfgav1.Userset)) {
	var within []*openfgav1.Userset
	switch s := u.GetUserset().(type) {
	case *openfgav1.Userset_Union:
		within = s.Union.GetChild()
	case *openfgav1.Userset_Intersection:
		within = s.Intersection.GetChild()
	case *openfgav1.Userset_Difference:
		within = []*openfgav1.Userset{s.Difference.GetBase(), s.Difference.GetSubtract()}
	default:
		yield(u)
	}
	for _, one := range within {
		operands(one, yield)
	}
}

// explain finds the place of what OpenFGA says of a model.
func (r *reader) explain(err error) *Error {
	relation, ok := errors.AsType[*typesystem.InvalidRelationError](err)
	if !ok {
		return wrong(0, "%s", printable(err.Error()))
	}
	why := printable(relation.Cause.Error())
	switch {
	case errors.Is(relation.Cause, typesystem.ErrNoEntrypoints), errors.Is(relation.Cause, typesystem.ErrNoEntryPointsLoop):
		why = "nobody can ever have this relation: it leads to no type in brackets"
	case errors.Is(relation.Cause, typesystem.ErrCycle), errors.Is(relation.Cause, typesystem.ErrInvalidUsersetRewrite):
		why = "it is defined by itself"
	}
	return r.wrong(relation.ObjectType, relation.Relation, "%s", why)
}
