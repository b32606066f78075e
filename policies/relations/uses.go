// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relations

import (
	"maps"
	"slices"
	"strings"

	openfgav1 "github.com/openfga/api/proto/openfga/v1"
	"github.com/openfga/openfga/pkg/tuple"
)

func (m *Model) relations(typ string) (map[string]*openfgav1.Userset, *Error) {
	t, ok := m.types.GetTypeDefinition(typ)
	if ok {
		return t.GetRelations(), nil
	}
	e := wrong(0, "the model has no type %q", typ)
	e.Name = typ
	for _, t := range m.proto.GetTypeDefinitions() {
		e.Known = append(e.Known, t.GetType())
	}
	return nil, e
}

// CheckRelation says what is wrong with asking for a relation to an object
// of that type, nil for nothing.
func (m *Model) CheckRelation(objectType, relation string) *Error {
	relations, err := m.relations(objectType)
	if err == nil && relations[relation] == nil {
		err = wrong(0, "type %q of the model has no relation %q", objectType, relation)
		err.Name, err.Known = relation, slices.Collect(maps.Keys(relations))
	}
	return err
}

// CheckUser says what is wrong with a user of that type; userRelation is that
// of a userset, "" for another.
func (m *Model) CheckUser(userType, userRelation string) *Error {
	if userRelation != "" {
		return m.CheckRelation(userType, userRelation)
	}
	_, err := m.relations(userType)
	return err
}

// Reaches says whether any tuples could give a user of that type the
// relation. All four are of the model.
func (m *Model) Reaches(userType, userRelation, objectType, relation string) bool {
	user := userType + ":x"
	if userRelation != "" {
		user += "#" + userRelation
	}
	ok, err := m.types.PathExists(user, relation, objectType)
	return ok && err == nil // an error: the user's type is used nowhere
}

// CheckTuple says why a tuple without a condition cannot be stored, nil if
// it can. Its form is good.
func (m *Model) CheckTuple(user, relation, object string) *Error {
	objectType, _, _ := strings.Cut(object, ":")
	if err := m.CheckRelation(objectType, relation); err != nil {
		return err
	}
	typ, id, userRelation := tuple.ToUserParts(user)
	if err := m.CheckUser(typ, userRelation); err != nil {
		return err
	}
	refs, err := m.types.GetDirectlyRelatedUserTypes(objectType, relation)
	if err != nil || len(refs) == 0 {
		return wrong(0, "%s of type %q follows from other relations and cannot be written", relation, objectType)
	}
	var takes []string
	conditional := false
	for _, ref := range refs {
		same := ref.GetType() == typ && ref.GetRelation() == userRelation && (ref.GetWildcard() != nil) == (id == "*")
		if same && ref.GetCondition() == "" {
			return nil
		}
		conditional = conditional || same
		takes = append(takes, written(ref))
	}
	if conditional {
		return wrong(0, "%s of type %q takes this user only with a condition, which a file of relations cannot give", relation, objectType)
	}
	return wrong(0, "%s of type %q takes %s", relation, objectType, strings.Join(takes[:min(len(takes), 10)], ", "))
}

// written is a type in brackets as a model writes it.
func written(ref *openfgav1.RelationReference) string {
	s := ref.GetType()
	switch {
	case ref.GetRelation() != "":
		s += "#" + ref.GetRelation()
	case ref.GetWildcard() != nil:
		s += ":*"
	}
	if ref.GetCondition() != "" {
		s += " with " + ref.GetCondition()
	}
	return s
}
