// SPDX-License-Identifier: Apache-2.0

package trial

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/sallyport-dev/sallyport/policies/compile"
)

const (
	keyID           = "trial"
	defaultLifetime = 5 * time.Minute
	rsaBits         = 2048
)

// signer stands for an issuer's key set.
type signer struct {
	issuer *compile.Issuer
	method jwt.SigningMethod
	key    crypto.Signer
	jwks   []byte
}

// newSigner makes a key for the first of the issuer's algorithms.
func newSigner(i *compile.Issuer) (*signer, error) {
	algorithm := "ES256" // where the issuer signs nothing
	if len(i.Algorithms) > 0 {
		algorithm = i.Algorithms[0]
	}
	s := &signer{issuer: i, method: jwt.GetSigningMethod(algorithm)}
	var err error
	jwk := map[string]any{"kid": keyID, "use": "sig", "alg": algorithm}
	encode := base64.RawURLEncoding.EncodeToString
	switch name := algorithm; {
	case s.method == nil:
		return nil, fmt.Errorf("algorithm %s cannot be signed with", name)
	case name == "EdDSA":
		var public ed25519.PublicKey
		public, s.key, err = ed25519.GenerateKey(rand.Reader)
		jwk["kty"], jwk["crv"], jwk["x"] = "OKP", "Ed25519", encode(public)
	case strings.HasPrefix(name, "ES"):
		curve := map[string]elliptic.Curve{"ES256": elliptic.P256(), "ES384": elliptic.P384(), "ES512": elliptic.P521()}[name]
		var key *ecdsa.PrivateKey
		if key, err = ecdsa.GenerateKey(curve, rand.Reader); err != nil {
			break
		}
		var point []byte
		if point, err = key.PublicKey.Bytes(); err != nil {
			break
		}
		half := len(point) / 2
		s.key = key
		jwk["kty"], jwk["crv"], jwk["x"], jwk["y"] = "EC", curve.Params().Name, encode(point[1:1+half]), encode(point[1+half:])
	default:
		var key *rsa.PrivateKey
		if key, err = rsa.GenerateKey(rand.Reader, rsaBits); err != nil {
			break
		}
		s.key = key
		jwk["kty"], jwk["n"], jwk["e"] = "RSA", encode(key.N.Bytes()), encode(big.NewInt(int64(key.E)).Bytes())
	}
	if err != nil {
		return nil, fmt.Errorf("make a key for %s: %w", i.FullName(), err)
	}
	if s.jwks, err = json.Marshal(map[string]any{"keys": []any{jwk}}); err != nil {
		return nil, fmt.Errorf("make a key for %s: %w", i.FullName(), err)
	}
	if pss, ok := s.method.(*jwt.SigningMethodRSAPSS); ok { // RFC 7518 section 3.5: a salt as long as the hash
		s.method = &jwt.SigningMethodRSAPSS{SigningMethodRSA: pss.SigningMethodRSA,
			Options: &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: pss.Options.Hash}}
	}
	return s, nil
}

// sign makes the token of a call.
func (s *signer) sign(b *Bearer, caller string, audience []string, bound [][sha256.Size]byte, key [sha256.Size]byte, jwk map[string]any, now time.Time) (string, error) {
	issued := now.Add(-age(b.Age, 0))
	lifetime := age(b.Lifetime, min(defaultLifetime, s.issuer.MaxLifetime))
	claims := jwt.MapClaims{
		"iss": s.issuer.URL, "sub": caller, "client_id": caller, "jti": "trial",
		"iat": issued.Unix(), "exp": issued.Add(lifetime).Unix(),
	}
	switch len(audience) {
	case 0:
	case 1:
		claims["aud"] = audience[0]
	default:
		claims["aud"] = audience
	}
	if len(b.Scopes) > 0 {
		claims["scope"] = strings.Join(b.Scopes, " ")
	}
	switch {
	case len(bound) > 0:
		claims["cnf"] = map[string]any{"x5t#S256": base64.RawURLEncoding.EncodeToString(bound[0][:])}
	case jwk != nil:
		claims["cnf"] = map[string]any{"jwk": jwk}
	case key != [sha256.Size]byte{}:
		claims["cnf"] = map[string]any{"jkt": base64.RawURLEncoding.EncodeToString(key[:])}
	}
	for name, v := range b.Claims {
		if v == nil {
			delete(claims, name)
			continue
		}
		claims[name] = v
	}
	t := jwt.NewWithClaims(s.method, claims)
	t.Header["kid"], t.Header["typ"] = keyID, cmp.Or(s.issuer.Types...)
	text, err := t.SignedString(s.key)
	if err != nil {
		return "", fmt.Errorf("sign a token as %s: %w", s.issuer.FullName(), err)
	}
	return text, nil
}

// publicKey is an Ed25519 key made of a seed.
func publicKey(seed [sha256.Size]byte) map[string]any {
	public := ed25519.NewKeyFromSeed(seed[:]).Public().(ed25519.PublicKey)
	return map[string]any{"kty": "OKP", "crv": "Ed25519", "x": base64.RawURLEncoding.EncodeToString(public)}
}
