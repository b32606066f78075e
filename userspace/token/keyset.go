// SPDX-License-Identifier: Apache-2.0

package token

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"sync/atomic"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Bounds of a key set.
const (
	MaxKeySet = 256 << 10      // bytes of a JWKS document
	MaxKeys   = 64             // keys in it
	MaxKeyID  = 128            // bytes of a kid
	MaxKeyAge = 24 * time.Hour // how long a key set serves without a newer one
)

const (
	minRSABits, maxRSABits = 2048, 8192
	minRSAExponent         = 65537 // NIST SP 800-56B, 6.2
)

// family is what a key must be for an algorithm.
type family uint8

const (
	familyRSA family = iota + 1
	familyP256
	familyP384
	familyP521
	familyEd25519
)

// algorithm is one of RFC 7518's or RFC 8037's signature algorithms.
type algorithm struct {
	method    jwt.SigningMethod
	family    family
	signature int // bytes; 0: as long as the RSA modulus
}

// pss verifies with a salt exactly as long as the hash, as RFC 7518 section
// 3.5 says; the method that golang-jwt registers takes any.
func pss(name string, hash crypto.Hash) jwt.SigningMethod {
	salt := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash}
	return &jwt.SigningMethodRSAPSS{
		SigningMethodRSA: &jwt.SigningMethodRSA{Name: name, Hash: hash},
		Options:          salt, VerifyOptions: salt,
	}
}

var algorithms = map[string]*algorithm{
	"ES256": {jwt.SigningMethodES256, familyP256, 64},
	"ES384": {jwt.SigningMethodES384, familyP384, 96},
	"ES512": {jwt.SigningMethodES512, familyP521, 132},
	"EdDSA": {jwt.SigningMethodEdDSA, familyEd25519, ed25519.SignatureSize},
	"RS256": {jwt.SigningMethodRS256, familyRSA, 0},
	"RS384": {jwt.SigningMethodRS384, familyRSA, 0},
	"RS512": {jwt.SigningMethodRS512, familyRSA, 0},
	"PS256": {pss("PS256", crypto.SHA256), familyRSA, 0},
	"PS384": {pss("PS384", crypto.SHA384), familyRSA, 0},
	"PS512": {pss("PS512", crypto.SHA512), familyRSA, 0},
}

// key is one verification key and the one algorithm it is for.
type key struct {
	public    any
	family    family
	algorithm string // "" for an RSA key whose JWK does not say: the issuer's first RSA algorithm
	size      int    // bytes of an RSA modulus
}

// keySet is an issuer's keys. A set of other content is another keySet, so a
// pointer to it is the generation that cached tokens are held against.
type keySet struct {
	byID     map[string]*key
	only     *key // the only key that can verify, nil if there are several
	document [sha256.Size]byte
	fetched  atomic.Int64 // Unix nanoseconds
}

var errNoUsableKey = errors.New("no key in it can verify a signature")

// parseKeySet reads a JWKS document (RFC 7517). What must never be published
// (a private or a symmetric key), or makes a kid ambiguous, refuses the whole
// document; a key that is merely of no use here is left out.
func parseKeySet(document []byte) (*keySet, error) {
	if len(document) > MaxKeySet {
		return nil, fmt.Errorf("%d bytes are more than %d", len(document), MaxKeySet)
	}
	root, err := readObject(string(document), nil)
	if err != nil {
		return nil, err
	}
	list, ok := root["keys"].([]any)
	if !ok {
		return nil, errors.New("no array \"keys\"")
	}
	if len(list) > MaxKeys {
		return nil, fmt.Errorf("%d keys are more than %d", len(list), MaxKeys)
	}
	set := &keySet{byID: make(map[string]*key, len(list)), document: sha256.Sum256(document)}
	seen, usable := make(map[string]bool, len(list)), 0
	for i, item := range list {
		jwk, ok := item.(map[string]any)
		if !ok {
			return nil, fmt.Errorf("key %d is not an object", i)
		}
		id, k, err := parseKey(jwk)
		if err != nil {
			return nil, fmt.Errorf("key %d: %w", i, err)
		}
		if seen[id] {
			return nil, fmt.Errorf("key %d: its kid is another key's too", i)
		}
		seen[id] = true
		if k == nil {
			continue
		}
		usable++
		set.only = k
		if id != "" {
			set.byID[id] = k
		}
	}
	switch usable {
	case 0:
		return nil, errNoUsableKey
	case 1:
	default:
		set.only = nil
	}
	return set, nil
}

// parseKey reads one JWK. A nil key without error is one to leave out.
func parseKey(jwk map[string]any) (id string, k *key, err error) {
	for _, private := range [...]string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"} {
		if _, ok := jwk[private]; ok {
			return "", nil, fmt.Errorf("it holds the private member %q: the issuer must replace that key", private)
		}
	}
	kty, ok := jwk["kty"].(string)
	if !ok {
		return "", nil, errors.New("no kty")
	}
	if kty == "oct" {
		return "", nil, errors.New("it is symmetric (oct)")
	}
	if v, there := jwk["kid"]; there {
		if id, ok = v.(string); !ok || id == "" || len(id) > MaxKeyID {
			return "", nil, fmt.Errorf("its kid is not a string of 1 to %d bytes", MaxKeyID)
		}
	}
	if !mayVerify(jwk) {
		return id, nil, nil
	}
	return id, parsePublic(kty, jwk), nil
}

// mayVerify says whether use and key_ops (RFC 7517 sections 4.2 and 4.3)
// permit verifying signatures. A member of another type permits nothing.
func mayVerify(jwk map[string]any) bool {
	if use, there := jwk["use"]; there && use != "sig" {
		return false
	}
	ops, there := jwk["key_ops"]
	if !there {
		return true
	}
	list, ok := ops.([]any)
	if !ok {
		return false
	}
	for _, op := range list {
		if op == "verify" {
			return true
		}
	}
	return false
}

func parsePublic(kty string, jwk map[string]any) *key {
	alg := ""
	if v, there := jwk["alg"]; there {
		alg, _ = v.(string)
		if algorithms[alg] == nil {
			return nil
		}
	}
	var k *key
	switch kty {
	case "EC":
		k = parseEC(jwk)
	case "OKP":
		if x := octets(jwk["x"]); jwk["crv"] == "Ed25519" && len(x) == ed25519.PublicKeySize {
			k = &key{public: ed25519.PublicKey(x), family: familyEd25519, algorithm: "EdDSA"}
		}
	case "RSA":
		k = parseRSA(jwk)
	}
	if k == nil {
		return nil
	}
	if alg != "" {
		if algorithms[alg].family != k.family {
			return nil
		}
		k.algorithm = alg
	}
	return k
}

func parseEC(jwk map[string]any) *key {
	var curve elliptic.Curve
	k := &key{}
	switch jwk["crv"] {
	case "P-256":
		curve, k.family, k.algorithm = elliptic.P256(), familyP256, "ES256"
	case "P-384":
		curve, k.family, k.algorithm = elliptic.P384(), familyP384, "ES384"
	case "P-521":
		curve, k.family, k.algorithm = elliptic.P521(), familyP521, "ES512"
	default:
		return nil
	}
	size := (curve.Params().BitSize + 7) / 8
	x, y := octets(jwk["x"]), octets(jwk["y"])
	if len(x) != size || len(y) != size {
		return nil
	}
	// The uncompressed form of SEC 1, 2.3.3; parsing it checks that the point is on the curve.
	point := append(append([]byte{4}, x...), y...)
	public, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		return nil
	}
	k.public = public
	return k
}

func parseRSA(jwk map[string]any) *key {
	n, e := octets(jwk["n"]), octets(jwk["e"])
	if len(n) == 0 || len(n) > maxRSABits/8 || len(e) == 0 || len(e) > 4 {
		return nil
	}
	modulus, exponent := new(big.Int).SetBytes(n), new(big.Int).SetBytes(e).Int64()
	if modulus.BitLen() < minRSABits || modulus.Bit(0) == 0 {
		return nil
	}
	if exponent < minRSAExponent || exponent > 1<<31-1 || exponent&1 == 0 {
		return nil
	}
	return &key{
		public: &rsa.PublicKey{N: modulus, E: int(exponent)},
		family: familyRSA, size: (modulus.BitLen() + 7) / 8,
	}
}

// octets decodes a base64url member, nil for anything else.
func octets(v any) []byte {
	s, ok := v.(string)
	if !ok {
		return nil
	}
	b, err := decodeSegment(s)
	if err != nil {
		return nil
	}
	return b
}

var (
	base64url   = base64.RawURLEncoding.Strict()
	errEncoding = errors.New("decode base64url: not the one spelling of its bytes")
)

// decodeSegment decodes base64url as RFC 7515 section 2 has it: no padding,
// no line break (which encoding/base64 skips), unused bits zero, so that one
// token has one spelling.
func decodeSegment(s string) ([]byte, error) {
	for i := range len(s) {
		if !base64urlByte[s[i]] {
			return nil, errEncoding
		}
	}
	b, err := base64url.DecodeString(s)
	if err != nil {
		return nil, errEncoding
	}
	return b, nil
}

var base64urlByte = func() (t [256]bool) {
	for _, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") {
		t[c] = true
	}
	return t
}()
