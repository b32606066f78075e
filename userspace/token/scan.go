// SPDX-License-Identifier: Apache-2.0

package token

import (
	"errors"
	"strings"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Details of refusals. They go to operators and hold nothing of the token.
var (
	errMissing      = errors.New("verify token: there is none")
	errTooLarge     = errors.New("verify token: longer than 16 KiB")
	errForm         = errors.New("verify token: not three base64url segments (RFC 7515)")
	errHeaderJSON   = errors.New("verify token: its header is not one well-formed JSON object within bounds")
	errClaimsJSON   = errors.New("verify token: its claims are not one well-formed JSON object within bounds")
	errNames        = errors.New("verify token: two members that another reader could take for one")
	errHeaderMember = errors.New("verify token: its header has crit, b64, zip, jwk, jku, x5u or x5c")
	errHeaderShape  = errors.New("verify token: alg, typ or kid in its header is not a string of permitted length")
	errNoIssuer     = errors.New("verify token: the rule's issuer is not loaded")
	errIssuer       = errors.New("verify token: iss is not the rule's issuer")
	errAlgorithm    = errors.New("verify token: alg is not one that the issuer may use")
	errKeyAlgorithm = errors.New("verify token: alg is not its key's own")
	errSignature    = errors.New("verify token: the signature does not hold")
	errClaims       = errors.New("verify token: a claim is missing or of another type or size than RFC 9068 says")
	errType         = errors.New("verify token: typ is not one that the issuer's tokens have")
	errAudience     = errors.New("verify token: aud does not hold the rule's audience")
	errNoExpiry     = errors.New("verify token: it has no exp")
	errExpired      = errors.New("verify token: it has expired")
	errNotYet       = errors.New("verify token: nbf or iat is in the future")
	errLifetime     = errors.New("verify token: it lives longer than the issuer may give")
	errUnbound      = errors.New("verify token: it is not bound to its sender, which the rule asks for")
	errProof        = errors.New("verify token: it is bound to a key that this connection does not prove")
	errBinding      = errors.New("verify token: it is bound to another certificate")
	errRevoked      = errors.New("verify token: it, its subject or its issuer is revoked")
	errScope        = errors.New("verify token: a scope that the rule asks for is missing")
	errACR          = errors.New("verify token: its acr is none of those that are asked for")
	errNoAuthTime   = errors.New("verify token: it has no auth_time")
	errAuthTime     = errors.New("verify token: its subject authenticated too long ago")
	errRequired     = errors.New("verify token: a claim that the issuer's policy requires has another value")
	errNoKeyID      = errors.New("verify token: it names no key and the issuer has several")
	errUnknownKey   = errors.New("verify token: the issuer has no key of that kid")
	errKeysNever    = errors.New("verify token: the issuer's keys were never had")
	errKeysStale    = errors.New("verify token: the issuer's keys are older than 24 h")
)

// ErrKeysPending wraps the refusal of a token whose key is being asked for:
// after Await the same token may verify.
var ErrKeysPending = errors.New("the issuer's keys are being fetched")

// scanned is a token as read, nothing of it believed yet.
type scanned struct {
	signed    string // header and claims as they were signed
	signature []byte
	algorithm string
	typ       string // lower case, without "application/"
	keyID     string
	issuer    string
	claims    map[string]any
}

// scan reads a token strictly, so that no other reader can read it
// differently: compact form, one spelling of its base64url, no ambiguous
// member, no header that would choose the key or change what is signed.
func scan(raw string) (*scanned, flow.Reason, error) {
	first := strings.IndexByte(raw, '.')
	last := strings.LastIndexByte(raw, '.')
	if first <= 0 || last <= first+1 || strings.IndexByte(raw[first+1:last], '.') >= 0 {
		return nil, flow.ReasonTokenMalformed, errForm
	}
	head, err := decodeSegment(raw[:first])
	if err != nil {
		return nil, flow.ReasonTokenMalformed, errForm
	}
	body, err := decodeSegment(raw[first+1 : last])
	if err != nil {
		return nil, flow.ReasonTokenMalformed, errForm
	}
	t := &scanned{signed: raw[:last]}
	if t.signature, err = decodeSegment(raw[last+1:]); err != nil {
		return nil, flow.ReasonTokenMalformed, errForm
	}
	header, err := readObject(string(head), reservedHeaders)
	if err != nil {
		return nil, reasonOf(err), detailOf(err, errHeaderJSON)
	}
	if reason, err := t.readHeader(header); err != nil {
		return nil, reason, err
	}
	if t.claims, err = readObject(string(body), reservedClaims); err != nil {
		return nil, reasonOf(err), detailOf(err, errClaimsJSON)
	}
	t.issuer, _ = t.claims["iss"].(string)
	return t, flow.ReasonOK, nil
}

func (t *scanned) readHeader(header map[string]any) (flow.Reason, error) {
	for _, name := range [...]string{"crit", "b64", "zip", "jwk", "jku", "x5u", "x5c"} {
		if _, there := header[name]; there {
			return flow.ReasonTokenHeader, errHeaderMember
		}
	}
	typ := ""
	if !text(header, "alg", &t.algorithm, 16) || !text(header, "typ", &typ, 64) || !text(header, "kid", &t.keyID, MaxKeyID) {
		return flow.ReasonTokenMalformed, errHeaderShape
	}
	t.typ = mediaType(typ)
	return flow.ReasonOK, nil
}

func reasonOf(err error) flow.Reason {
	if errors.Is(err, errAmbiguous) {
		return flow.ReasonTokenAmbiguous
	}
	return flow.ReasonTokenMalformed
}

func detailOf(err, otherwise error) error {
	if errors.Is(err, errAmbiguous) {
		return errNames
	}
	return otherwise
}
