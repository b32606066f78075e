// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"crypto/sha256"
	"encoding/json"
	"strings"
)

// Requires says what the rule asks for beyond caller, host, method and path,
// in the order of the stages: nil where those alone decide.
func (r *Rule) Requires() (asks []string) {
	if r.Posture != nil {
		asks = append(asks, "posture "+r.Posture.FullName())
	}
	if t := r.Token; t != nil {
		s := "token of " + t.Issuer.FullName() + " for " + t.Audience
		if len(t.Scopes) > 0 {
			s += " with " + strings.Join(t.Scopes, " ")
		}
		switch t.Bound {
		case BoundMTLS:
			s += ", bound to mtls"
		case BoundDPoP:
			s += ", bound to dpop"
		case BoundSignature:
			s += ", bound to signature"
		}
		if t.Challenge != "" {
			s += t.Challenge
		}
		asks = append(asks, s)
	}
	if l := r.Relation; l != nil {
		asks = append(asks, "relation "+l.User.String()+" "+l.Relation+" "+l.Object.String())
	}
	if r.When != nil {
		asks = append(asks, "when "+r.When.Text)
	}
	return asks
}

// Fingerprint tells whether the rule asks for the same as one of another plan
// does, with the issuers, models and profiles that it names: its effect, hosts,
// upgrade and all that Requires tells, but neither callers, methods nor paths.
func (r *Rule) Fingerprint() (sum [sha256.Size]byte) {
	h := sha256.New()
	e := json.NewEncoder(h)
	write(e, r.Deny, r.Hosts, r.Upgrade, r.Requires())
	r.named(e)
	h.Sum(sum[:0])
	return sum
}

// String writes the template as policies do.
func (t Template) String() string {
	var b strings.Builder
	for _, p := range t.parts {
		switch p.source {
		case fromLiteral:
			b.WriteString(p.literal)
		case fromParam:
			b.WriteString("{param." + p.name + "}")
		case fromToken:
			b.WriteString("{token." + p.name + "}")
		case fromHeader:
			b.WriteString("{header." + p.name + "}")
		case fromSource:
			b.WriteString("{source." + p.name + "}")
		}
	}
	return b.String()
}
