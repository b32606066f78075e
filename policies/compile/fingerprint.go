// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"time"

	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
)

// Fingerprint tells whether an API decides as one of the same name in another
// plan does: it covers the policy, whom it protects, who may call that, and
// the issuers, models and profiles that it names, but neither where they are
// written nor what relations there are. What was decided under an equal
// fingerprint still holds.
func (a *API) Fingerprint() [sha256.Size]byte { return a.fingerprint }

// RulesFingerprint is the Fingerprint of what is found of a call, whatever
// the modes, selectors and endpoints are.
func (a *API) RulesFingerprint() [sha256.Size]byte { return a.rulesFingerprint }

// fingerprints computes those of all APIs. docs has the document of each.
func (c *compiler) fingerprints(docs map[*API]*policyDoc) {
	callers := make(map[*Identity][]*Identity)
	for _, id := range c.plan.identities {
		for _, callee := range id.MayCall {
			callers[callee] = append(callers[callee], id)
		}
	}
	for _, a := range c.plan.apis {
		spec := docs[a].Value.Spec
		a.fingerprint = a.sum(spec, callers[a.Identity], (*Identity).fingerprint)
		spec.Mode = ""
		a.rulesFingerprint = a.sum(spec, callers[a.Identity], (*Identity).rulesFingerprint)
	}
}

func (a *API) sum(spec v1alpha1.APIPolicySpec, callers []*Identity, identity func(*Identity, *json.Encoder)) (sum [sha256.Size]byte) {
	h := sha256.New()
	// Every value is written as JSON, so that none can run into the next.
	e := json.NewEncoder(h)
	write(e, a.Name, spec)
	identity(a.Identity, e)
	for _, caller := range callers {
		identity(caller, e)
	}
	if a.Posture != nil {
		a.Posture.fingerprint(e)
	}
	for _, r := range a.Rules {
		r.named(e)
	}
	h.Sum(sum[:0])
	return sum
}

// named writes what a rule names: profile, issuer and model.
func (r *Rule) named(e *json.Encoder) {
	if r.Posture != nil {
		r.Posture.fingerprint(e)
	}
	if r.Token != nil {
		r.Token.Issuer.fingerprint(e)
	}
	if r.Relation != nil {
		write(e, r.Relation.Model.FullName(), r.Relation.Model.Text, r.Relation.Model.Address, r.Relation.Model.Store)
	}
}

func (i *Issuer) fingerprint(e *json.Encoder) {
	write(e, i.FullName(), i.URL, i.JWKSURL, i.JWKSFile, i.JWKS, i.Algorithms, i.Audiences, i.MaxLifetime, i.Types, i.Claims, i.Bound, i.IntrospectionURL)
}

// Fingerprint tells whether a profile asks for the same as one of another plan
// does.
func (p *Posture) Fingerprint() (sum [sha256.Size]byte) {
	h := sha256.New()
	p.fingerprint(json.NewEncoder(h))
	h.Sum(sum[:0])
	return sum
}

func (p *Posture) fingerprint(e *json.Encoder) {
	write(e, p.FullName(), p.Attested, p.WarnUnknown, p.Requirements)
}

func (i *Identity) fingerprint(e *json.Encoder) {
	write(e, i.fullName, i.ID, i.Expires.Format(time.RFC3339Nano), i.Selector, i.Endpoints, i.Mode)
	i.obtained(e)
}

func (i *Identity) rulesFingerprint(e *json.Encoder) {
	write(e, i.fullName, i.ID, i.Expires.Format(time.RFC3339Nano))
	i.obtained(e)
}

// obtained writes what the identity's calls bear.
func (i *Identity) obtained(e *json.Encoder) {
	for _, o := range i.Tokens {
		write(e, o.To.fullName, o.Issuer.FullName(), o.Issuer.TokenURL, o.ClientID, o.Audience, o.Scopes)
	}
}

func write(e *json.Encoder, values ...any) {
	for _, v := range values {
		if err := e.Encode(v); err != nil { // a hash takes everything, and these types are JSON's
			panic(fmt.Errorf("compile: fingerprint: %w", err))
		}
	}
}
