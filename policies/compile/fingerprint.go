// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"time"
)

// Fingerprint tells whether an API decides as one of the same name in another
// plan does: it covers the policy, whom it protects, who may call that, and
// the issuers, models and profiles that it names, but neither where they are
// written nor what relations there are. What was decided under an equal
// fingerprint still holds.
func (a *API) Fingerprint() [sha256.Size]byte { return a.fingerprint }

// fingerprints computes those of all APIs. docs has the document of each.
func (c *compiler) fingerprints(docs map[*API]*policyDoc) {
	callers := make(map[*Identity][]*Identity)
	for _, id := range c.plan.identities {
		for _, callee := range id.MayCall {
			callers[callee] = append(callers[callee], id)
		}
	}
	for _, a := range c.plan.apis {
		h := sha256.New()
		// Every value is written as JSON, so that none can run into the next.
		e := json.NewEncoder(h)
		write(e, a.Name, docs[a].Value.Spec)
		a.Identity.fingerprint(e)
		for _, caller := range callers[a.Identity] {
			caller.fingerprint(e)
		}
		if a.Posture != nil {
			a.Posture.fingerprint(e)
		}
		for _, r := range a.Rules {
			if r.Posture != nil {
				r.Posture.fingerprint(e)
			}
			if r.Token != nil {
				i := *r.Token.Issuer
				write(e, i.FullName(), i.URL, i.JWKSURL, i.JWKSFile, i.JWKS, i.Algorithms, i.Audiences, i.MaxLifetime, i.Types)
			}
			if r.Relation != nil {
				write(e, r.Relation.Model.FullName(), r.Relation.Model.Text)
			}
		}
		h.Sum(a.fingerprint[:0])
	}
}

func (p *Posture) fingerprint(e *json.Encoder) {
	write(e, p.FullName(), p.Attested, p.WarnUnknown, p.Requirements)
}

func (i *Identity) fingerprint(e *json.Encoder) {
	write(e, i.fullName, i.ID, i.Expires.Format(time.RFC3339Nano), i.Selector, i.Endpoints, i.Mode)
}

func write(e *json.Encoder, values ...any) {
	for _, v := range values {
		if err := e.Encode(v); err != nil { // a hash takes everything, and these types are JSON's
			panic(fmt.Errorf("compile: fingerprint: %w", err))
		}
	}
}
