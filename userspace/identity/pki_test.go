// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net/url"
	"testing"
	"time"
)

// testNow is the moment of tests that do not look at the clock.
var testNow = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// testCA is an issuer made by hand, so that it may break rules.
type testCA struct {
	cert  *x509.Certificate
	key   crypto.Signer
	chain []*x509.Certificate // what follows a leaf
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func certify(t testing.TB, template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func caTemplate(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: newSerial(), Subject: pkix.Name{CommonName: name},
		NotBefore: testNow.Add(-time.Hour), NotAfter: testNow.Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLen: 1,
	}
}

func newRoot(t testing.TB) *testCA {
	t.Helper()
	key, template := newKey(t), caTemplate("test root")
	return &testCA{cert: certify(t, template, template, key.Public(), key), key: key}
}

// intermediate makes a node's intermediate, changed by change.
func (ca *testCA) intermediate(t testing.TB, scope *Scope, change func(*x509.Certificate)) *testCA {
	t.Helper()
	template := caTemplate("test node")
	template.NotAfter = testNow.Add(time.Hour)
	template.MaxPathLen, template.MaxPathLenZero = 0, true
	if scope != nil {
		template.ExtraExtensions = []pkix.Extension{scope.extension()}
	}
	if change != nil {
		change(template)
	}
	key := newKey(t)
	cert := certify(t, template, ca.cert, key.Public(), ca.key)
	return &testCA{cert: cert, key: key, chain: append([]*x509.Certificate{cert}, ca.chain...)}
}

func leafTemplate(ids ...string) *x509.Certificate {
	c := &x509.Certificate{
		SerialNumber: newSerial(), NotBefore: testNow.Add(-time.Minute), NotAfter: testNow.Add(10 * time.Minute),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	if len(ids) > 0 {
		c.ExtraExtensions = []pkix.Extension{sanExtension(6, ids...)}
	}
	return c
}

// sanExtension writes names that no URL type would let through.
func sanExtension(tag int, names ...string) pkix.Extension {
	raw := make([]asn1.RawValue, len(names))
	for i, n := range names {
		raw[i] = asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: []byte(n)}
	}
	b, err := asn1.Marshal(raw)
	if err != nil {
		panic(err)
	}
	return pkix.Extension{Id: oidSubjectAltName, Critical: true, Value: b}
}

// leaf issues a leaf over a fresh P-256 key, changed by change.
func (ca *testCA) leaf(t testing.TB, id string, change func(*x509.Certificate)) []*x509.Certificate {
	t.Helper()
	template := leafTemplate(id)
	if change != nil {
		change(template)
	}
	return append([]*x509.Certificate{certify(t, template, ca.cert, newKey(t).Public(), ca.key)}, ca.chain...)
}

func (ca *testCA) trust(t testing.TB, domain string) *Bundle {
	t.Helper()
	b, err := NewBundle([]TrustDomain{{Name: domain, Roots: [][]byte{ca.cert.Raw}}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func csrOf(t testing.TB, key crypto.Signer, ids ...string) []byte {
	t.Helper()
	template := &x509.CertificateRequest{}
	for _, id := range ids {
		u, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, u)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}
