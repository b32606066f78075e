// SPDX-License-Identifier: Apache-2.0

package token

import (
	"crypto/sha256"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func boundToken(t testing.TB, s *signer) ([]byte, *Check) {
	leaf := sha256.Sum256([]byte("leaf"))
	c := check()
	c.BoundTo, c.Scopes, c.Thumbprints = BindingMTLS, []string{"payments:write"}, [][32]byte{leaf}
	return s.sign(t, s.header(), with(claimsAt(time.Now()), "cnf", map[string]any{"x5t#S256": b64(leaf[:])})), c
}

// A hit of the cache allocates nothing.
func TestHitAllocatesNothing(t *testing.T) {
	ec := newES256(t, "ec")
	v := newVerifier(t, ec)
	if err := v.SetRevocations([]Revocation{{Kind: "jti", Value: "x"}}); err != nil {
		t.Fatal(err)
	}
	token, c := boundToken(t, ec)
	expect(t, v, token, c, flow.ReasonOK)
	if n := testing.AllocsPerRun(200, func() {
		if _, _, err := v.Verify(token, c); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}

func BenchmarkVerifyHit(b *testing.B) {
	ec := newES256(b, "ec")
	v := newVerifier(b, ec)
	if err := v.SetRevocations([]Revocation{{Kind: "jti", Value: "x"}}); err != nil {
		b.Fatal(err)
	}
	token, c := boundToken(b, ec)
	b.ReportAllocs()
	b.RunParallel(func(p *testing.PB) {
		c := *c
		for p.Next() {
			if _, _, err := v.Verify(token, &c); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func benchmarkMiss(b *testing.B, s *signer) {
	v := newVerifier(b, s)
	v.cache.init(ways, 0)
	token, c := boundToken(b, s)
	b.ReportAllocs()
	for b.Loop() {
		clear(v.cache.slots)
		v.cache.bytes.Store(0)
		if _, _, err := v.Verify(token, c); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerifyMissES256(b *testing.B) { benchmarkMiss(b, newES256(b, "ec")) }
func BenchmarkVerifyMissEdDSA(b *testing.B) { benchmarkMiss(b, newEdDSA(b, "ed")) }
func BenchmarkVerifyMissRS256(b *testing.B) {
	benchmarkMiss(b, newRSA(b, "rs", jwt.SigningMethodRS256))
}

func BenchmarkScan(b *testing.B) {
	token, _ := boundToken(b, newES256(b, "ec"))
	raw := string(token)
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := scan(raw); err != nil {
			b.Fatal(err)
		}
	}
}
