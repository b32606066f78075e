// SPDX-License-Identifier: Apache-2.0

package token

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"slices"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// judge holds authentic claims against the rule, the connection and the
// time: the part that runs on every request, cached or not.
func (v *Verifier) judge(t *Claims, i *issuer, keys *keySet, c *Check, now time.Time) (flow.Reason, error) {
	if !t.opaque && stale(keys, now) {
		return flow.ReasonTokenKeysStale, v.refresh(i, errKeysStale)
	}
	if !t.opaque && !slices.Contains(i.Types, t.kind) {
		return flow.ReasonTokenType, errType
	}
	for n := range i.Require {
		if r := &i.Require[n]; !has(t.Raw[r.Claim], r.Values) {
			return flow.ReasonTokenClaims, fmt.Errorf("%w: %s", errRequired, r.Claim)
		}
	}
	if !audience(t, i, c.Audience) {
		return flow.ReasonTokenAudience, errAudience
	}
	if reason, err := lifetime(t, i, now); err != nil {
		return reason, err
	}
	if reason, err := v.binding(t, i, c, now); err != nil {
		return reason, err
	}
	if v.revoked.Load().holds(t, i, now) {
		return flow.ReasonTokenRevoked, errRevoked
	}
	for _, scope := range c.Scopes {
		if !slices.Contains(t.Scopes, scope) {
			return flow.ReasonTokenScope, errScope
		}
	}
	return authentication(t, c, now)
}

// authentication holds how and when the subject authenticated against what is
// asked for (RFC 9470).
func authentication(t *Claims, c *Check, now time.Time) (flow.Reason, error) {
	switch {
	case c.ACR != nil && !slices.Contains(c.ACR, t.ACR):
		return flow.ReasonStepUp, errACR
	case c.MaxAge == 0:
		return flow.ReasonOK, nil
	case t.AuthTime.IsZero():
		return flow.ReasonStepUp, errNoAuthTime
	case !t.Fresh(c.MaxAge, now):
		return flow.ReasonStepUp, errAuthTime
	}
	return flow.ReasonOK, nil
}

// Fresh says whether the token shows that its subject authenticated less than
// maxAge ago.
func (t *Claims) Fresh(maxAge time.Duration, now time.Time) bool {
	return !t.AuthTime.IsZero() && !t.AuthTime.After(now.Add(leeway)) && now.Before(t.AuthTime.Add(maxAge))
}

func has(claim any, want []string) bool {
	if s, ok := claim.(string); ok {
		return slices.Contains(want, s)
	}
	items, _ := claim.([]any)
	for _, item := range items {
		if s, ok := item.(string); ok && slices.Contains(want, s) {
			return true
		}
	}
	return false
}

func audience(t *Claims, i *issuer, want string) bool {
	if want != "" {
		return (len(i.Audiences) == 0 || slices.Contains(i.Audiences, want)) && slices.Contains(t.Audience, want)
	}
	for _, a := range i.Audiences {
		if slices.Contains(t.Audience, a) {
			return true
		}
	}
	return false
}

func lifetime(t *Claims, i *issuer, now time.Time) (flow.Reason, error) {
	switch {
	case t.Expiry.IsZero():
		return flow.ReasonTokenLifetime, errNoExpiry
	case !now.Before(t.Expiry):
		return flow.ReasonTokenExpired, errExpired
	case t.NotBefore.After(now.Add(leeway)), t.IssuedAt.After(now.Add(leeway)):
		return flow.ReasonTokenNotYet, errNotYet
	}
	from := t.IssuedAt
	if from.IsZero() {
		from = now
	}
	if life := t.Expiry.Sub(from); life <= 0 || life > i.MaxLifetime {
		return flow.ReasonTokenLifetime, errLifetime
	}
	return flow.ReasonOK, nil
}

// binding holds cnf against this connection and request. A bound token without
// its proof is refused even where the rule asks for no binding: it may be
// stolen.
func (v *Verifier) binding(t *Claims, i *issuer, c *Check, now time.Time) (flow.Reason, error) {
	switch {
	case t.proof&cnfOther != 0:
		return flow.ReasonTokenProof, errProof
	case c.BoundTo == BindingMTLS && t.proof&cnfCertificate == 0, c.BoundTo == BindingDPoP && t.proof&cnfKey == 0,
		c.BoundTo == BindingSignature && t.proof&cnfSigner == 0, i.RequireBinding && t.proof == cnfAbsent:
		return flow.ReasonTokenUnbound, errUnbound
	case (t.proof&cnfKey != 0) != c.DPoP: // RFC 9449 section 7.2
		return flow.ReasonTokenProof, errProofScheme
	}
	if t.proof&cnfCertificate != 0 {
		if len(c.Thumbprints) == 0 {
			return flow.ReasonTokenProof, errProof
		}
		if !proves(&t.Thumbprint, c.Thumbprints) {
			return flow.ReasonTokenBinding, errBinding
		}
	}
	if t.proof&cnfSigner != 0 {
		return c.Proof.signed(t.signer, &t.KeyThumbprint, v.proofs.Load(), now)
	}
	if t.proof&cnfKey != 0 {
		return c.Proof.of(&t.KeyThumbprint, c.raw, v.proofs.Load(), now)
	}
	return flow.ReasonOK, nil
}

func proves(bound *[sha256.Size]byte, own [][sha256.Size]byte) bool {
	found := 0
	for n := range own {
		found |= subtle.ConstantTimeCompare(bound[:], own[n][:])
	}
	return found == 1
}
