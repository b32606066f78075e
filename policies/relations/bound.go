// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relations

import (
	"maps"
	"slices"

	openfgav1 "github.com/openfga/api/proto/openfga/v1"
	"gonum.org/v1/gonum/graph/simple"
	"gonum.org/v1/gonum/graph/topo"
)

const (
	// maxCost is how many types OpenFGA's checks may copy into the paths that
	// they follow, over all relations of a model.
	maxCost = 1_000_000
	// maxCycle is how many references may lie among relations of which each
	// leads to each other. What OpenFGA derives of a model takes time that
	// grows with its square.
	maxCycle = 1000
)

// bound refuses a model that OpenFGA would not have checked in time. It
// follows the same paths as those checks, counting.
func (r *reader) bound() {
	r.cycles()
	for _, t := range r.model.GetTypeDefinitions() {
		for _, relation := range slices.Sorted(maps.Keys(t.GetRelations())) {
			if len(r.errs) > 0 {
				return
			}
			definition := t.GetRelations()[relation]
			r.founded(t, relation, definition, nil)
			r.expand(t, definition, map[string]bool{relation: true})
			if r.cost > maxCost {
				r.wrong(t.GetType(), relation, "there are too many paths through the relations of this model")
			}
		}
	}
}

// seen are the relations that a search came by, of each type. As in the
// search that it stands for, a copy has the types of its own and shares the
// relations of those that were there.
type seen map[string]map[string]bool

// founded says whether a definition leads to types in brackets, as far as
// the cost allows to look.
func (r *reader) founded(t *openfgav1.TypeDefinition, relation string, definition *openfgav1.Userset, before seen) bool {
	here := maps.Clone(before)
	if here == nil {
		here = make(seen)
	}
	if here[t.GetType()] == nil {
		here[t.GetType()] = make(map[string]bool)
	}
	here[t.GetType()][relation] = true
	if r.cost += 1 + len(here); r.cost > maxCost {
		return false
	}
	next := func(t *openfgav1.TypeDefinition, relation string) bool {
		return !here[t.GetType()][relation] && r.founded(t, relation, t.GetRelations()[relation], here)
	}
	within := func(u *openfgav1.Userset) bool { return r.founded(t, relation, u, before) }
	switch s := definition.GetUserset().(type) {
	case *openfgav1.Userset_This:
		for _, ref := range direct(t, relation) {
			if ref.GetRelation() == "" || next(r.types[ref.GetType()], ref.GetRelation()) {
				return true
			}
		}
	case *openfgav1.Userset_ComputedUserset:
		return next(t, s.ComputedUserset.GetRelation())
	case *openfgav1.Userset_TupleToUserset:
		name := s.TupleToUserset.GetComputedUserset().GetRelation()
		for _, ref := range direct(t, s.TupleToUserset.GetTupleset().GetRelation()) {
			other := r.types[ref.GetType()]
			if other.GetRelations()[name] != nil && next(other, name) {
				return true
			}
		}
	case *openfgav1.Userset_Union:
		return slices.ContainsFunc(s.Union.GetChild(), within)
	case *openfgav1.Userset_Intersection:
		return !slices.ContainsFunc(s.Intersection.GetChild(), func(u *openfgav1.Userset) bool { return !within(u) })
	case *openfgav1.Userset_Difference:
		return within(s.Difference.GetBase()) && within(s.Difference.GetSubtract())
	}
	return false
}

// expand writes a definition out, each relation of its own type replaced by
// its definition.
func (r *reader) expand(t *openfgav1.TypeDefinition, definition *openfgav1.Userset, above map[string]bool) {
	operands(definition, func(u *openfgav1.Userset) {
		if r.cost += 1 + len(above); r.cost > maxCost {
			return
		}
		name := u.GetComputedUserset().GetRelation()
		if name == "" || above[name] {
			return
		}
		above[name] = true
		r.expand(t, t.GetRelations()[name], above)
		delete(above, name)
	})
}

// cycles holds what leads in circles to maxCycle.
func (r *reader) cycles() {
	type place struct {
		t        *openfgav1.TypeDefinition
		relation string
	}
	ids, places := make(map[place]int64), []place{}
	id := func(t *openfgav1.TypeDefinition, relation string) simple.Node {
		p := place{t, relation}
		n, there := ids[p]
		if !there {
			n = int64(len(places))
			ids[p] = n
			places = append(places, p)
		}
		return simple.Node(n)
	}
	type edge struct{ from, to simple.Node }
	var edges []edge
	g := simple.NewDirectedGraph()
	for _, t := range r.model.GetTypeDefinitions() {
		for _, relation := range slices.Sorted(maps.Keys(t.GetRelations())) {
			from := id(t, relation)
			to := func(t *openfgav1.TypeDefinition, relation string) {
				if t.GetRelations()[relation] == nil {
					return
				}
				e := edge{from, id(t, relation)}
				edges = append(edges, e)
				if e.from != e.to { // which this graph cannot hold, and is a cycle of one
					g.SetEdge(simple.Edge{F: e.from, T: e.to})
				}
			}
			for _, ref := range direct(t, relation) {
				to(r.types[ref.GetType()], ref.GetRelation())
			}
			operands(t.GetRelations()[relation], func(u *openfgav1.Userset) {
				to(t, u.GetComputedUserset().GetRelation())
				if follow := u.GetTupleToUserset(); follow != nil {
					for _, ref := range direct(t, follow.GetTupleset().GetRelation()) {
						to(r.types[ref.GetType()], follow.GetComputedUserset().GetRelation())
					}
				}
			})
		}
	}
	within := make(map[int64]int)
	components := topo.TarjanSCC(g)
	for n, nodes := range components {
		for _, node := range nodes {
			within[node.ID()] = n
		}
	}
	count := make([]int, len(components))
	for _, e := range edges {
		if e.from == e.to || within[int64(e.from)] != within[int64(e.to)] {
			continue
		}
		if n := within[int64(e.from)]; count[n] <= maxCycle {
			if count[n]++; count[n] > maxCycle {
				p := places[e.from]
				r.wrong(p.t.GetType(), p.relation, "more than %d references lead in circles through this relation", maxCycle)
			}
		}
	}
}
