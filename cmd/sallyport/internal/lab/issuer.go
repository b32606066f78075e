// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	issuerURL = "https://sso.demo.sallyport"
	keyID     = "demo-1"
	audience  = "payments"
)

// Issuer is an identity provider: it signs access tokens (RFC 9068) and
// Publishes its key set as a file.
type Issuer struct {
	key *ecdsa.PrivateKey
	jti int
}

// NewIssuer makes an issuer with a key of its own.
func NewIssuer() (*Issuer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make issuer key: %w", err)
	}
	return &Issuer{key: key}, nil
}

// Publish writes the JWK set (RFC 7517).
func (s *Issuer) Publish(file string) error {
	pub, err := s.key.PublicKey.Bytes() // 0x04, X, Y
	if err != nil {
		return fmt.Errorf("encode issuer key: %w", err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	doc, err := json.Marshal(map[string]any{"keys": []map[string]string{{
		"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": keyID, "x": b64(pub[1:33]), "y": b64(pub[33:65]),
	}}})
	if err != nil {
		return fmt.Errorf("encode key set: %w", err)
	}
	if err := os.WriteFile(file, doc, 0o644); err != nil {
		return fmt.Errorf("publish key set: %w", err)
	}
	return nil
}

// Token signs an access token for subject that ends after life (a negative
// one has ended already) and is bound to the certificate with that SHA-256
// thumbprint, in hex (RFC 8705 section 3.1).
func (s *Issuer) Token(subject, thumbprint string, life time.Duration) (string, error) {
	digest, err := hex.DecodeString(thumbprint)
	if err != nil {
		return "", fmt.Errorf("read thumbprint: %w", err)
	}
	s.jti++
	now := time.Now()
	issued := now
	if life < 0 {
		issued = now.Add(2 * life)
	}
	t := jwt.NewWithClaims(jwt.SigningMethodES256, jwt.MapClaims{
		"iss": issuerURL, "sub": subject, "aud": audience, "client_id": "demo", "scope": "payments:write",
		"iat": issued.Unix(), "exp": now.Add(life).Unix(), "jti": fmt.Sprintf("demo-%d", s.jti),
		"cnf": map[string]string{"x5t#S256": base64.RawURLEncoding.EncodeToString(digest)},
	})
	t.Header["typ"] = "at+jwt"
	t.Header["kid"] = keyID
	signed, err := t.SignedString(s.key)
	if err != nil {
		return "", fmt.Errorf("sign token: %w", err)
	}
	return signed, nil
}
