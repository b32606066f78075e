// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// Issuers are a plan's, as its token stage pins them.
func Issuers(plan *compile.Plan) []token.Issuer {
	issuers := make([]token.Issuer, 0, len(plan.Issuers()))
	for _, i := range plan.Issuers() {
		var require []token.Requirement
		for _, c := range i.Claims {
			require = append(require, token.Requirement{Claim: c.Name, Values: c.Values})
		}
		issuers = append(issuers, token.Issuer{
			Name: i.FullName(), URL: i.URL, Algorithms: i.Algorithms, Audiences: i.Audiences,
			Types: i.Types, MaxLifetime: i.MaxLifetime, Require: require, RequireBinding: i.Bound,
			Introspect: i.IntrospectionURL != "", NoKeys: !i.HasKeys(),
		})
	}
	return issuers
}

// Models are a plan's, as its relation stage asks them, and the relations
// that its files hold for each, by the model's name.
func Models(plan *compile.Plan) ([]relation.Model, map[string][]relation.Tuple) {
	models := make([]relation.Model, 0, len(plan.Models()))
	tuples := make(map[string][]relation.Tuple, len(plan.Models()))
	for _, m := range plan.Models() {
		one := relation.Model{Name: m.FullName(), Text: m.Text}
		if m.Address != "" {
			one.Remote = &relation.Remote{Address: m.Address, Store: m.Store}
		} else {
			tuples[m.FullName()] = nil
		}
		models = append(models, one)
	}
	for _, t := range plan.Tuples() {
		if t.Model != nil {
			name := t.Model.FullName()
			tuples[name] = append(tuples[name], relation.Tuple{User: t.User, Relation: t.Relation, Object: t.Object})
		}
	}
	return models, tuples
}
