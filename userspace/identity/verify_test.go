// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const testID = "spiffe://td/a"

func TestVerifyAccepts(t *testing.T) {
	root := newRoot(t)
	scope := scopeOf(t, "n1", testID, "spiffe://td/b")
	node := root.intermediate(t, &scope, nil)
	verifier := NewVerifier(VerifierOptions{Bundle: root.trust(t, "td")})
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	over := func(public crypto.PublicKey) []*x509.Certificate {
		return append([]*x509.Certificate{certify(t, leafTemplate(testID), node.cert, public, node.key)}, node.chain...)
	}
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		node  string
	}{
		"under a root":        {root.leaf(t, testID, nil), ""},
		"under a node":        {node.leaf(t, testID, nil), "n1"},
		"with its root":       {append(node.leaf(t, testID, nil), root.cert), "n1"},
		"root leaf with root": {append(root.leaf(t, testID, nil), root.cert), ""},
		"with a DNS name too": {root.leaf(t, testID, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{mixedSAN(testID, "example.org")}
		}), ""},
		"Ed25519":  {over(ed), "n1"},
		"P-384":    {over(p384.Public()), "n1"},
		"RSA 2048": {over(rsa2048.Public()), "n1"},
	} {
		for _, role := range []Role{RoleClient, RoleServer} {
			for range 2 { // the second time from memory
				peer, err := verifier.Verify(c.chain, role, testNow)
				if err != nil {
					t.Errorf("%s as %s: %v", name, role, err)
					continue
				}
				want := Peer{ID: testID, Serial: Serial(c.chain[0].SerialNumber), Thumbprint: sha256.Sum256(c.chain[0].Raw), NotAfter: testNow.Add(10 * time.Minute), Node: c.node}
				if peer != want {
					t.Errorf("%s as %s: %+v, want %+v", name, role, peer, want)
				}
			}
		}
	}
}

func mixedSAN(uri, dns string) pkix.Extension {
	b, err := asn1.Marshal([]asn1.RawValue{
		{Class: asn1.ClassContextSpecific, Tag: 2, Bytes: []byte(dns)}, {Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)},
	})
	if err != nil {
		panic(err)
	}
	return pkix.Extension{Id: oidSubjectAltName, Critical: true, Value: b}
}

// refusalCase is one row of what must be refused.
type refusalCase struct {
	name   string
	chain  func(t *testing.T, root *testCA) []*x509.Certificate
	reason flow.Reason
	detail string
	role   Role
	at     time.Duration // from testNow
}

func changed(change func(*x509.Certificate)) func(*testing.T, *testCA) []*x509.Certificate {
	return func(t *testing.T, root *testCA) []*x509.Certificate { return root.leaf(t, testID, change) }
}

func named(ids ...string) func(*testing.T, *testCA) []*x509.Certificate {
	return changed(func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{sanExtension(6, ids...)} })
}

func underNode(ids []string, change func(*x509.Certificate)) func(*testing.T, *testCA) []*x509.Certificate {
	return func(t *testing.T, root *testCA) []*x509.Certificate {
		scope := scopeOf(t, "n1", ids...)
		return root.intermediate(t, &scope, change).leaf(t, testID, nil)
	}
}

func overKey(make func() (crypto.PublicKey, error)) func(*testing.T, *testCA) []*x509.Certificate {
	return func(t *testing.T, root *testCA) []*x509.Certificate {
		public, err := make()
		if err != nil {
			t.Fatal(err)
		}
		return []*x509.Certificate{certify(t, leafTemplate(testID), root.cert, public, root.key)}
	}
}

var refusals = []refusalCase{
	{name: "no certificate", chain: func(*testing.T, *testCA) []*x509.Certificate { return nil }, reason: flow.ReasonCertMissing},
	{name: "nine certificates", reason: flow.ReasonCertChainSize, detail: "9 certificates", chain: func(t *testing.T, root *testCA) []*x509.Certificate {
		chain := root.leaf(t, testID, nil)
		for len(chain) < maxChain+1 {
			chain = append(chain, root.cert)
		}
		return chain
	}},
	{name: "over 64 KiB", reason: flow.ReasonCertChainSize, detail: "bytes", chain: changed(func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: make([]byte, maxChainBytes)})
	})},
	{name: "no URI", reason: flow.ReasonCertNoID, chain: changed(func(c *x509.Certificate) { c.ExtraExtensions = nil; c.DNSNames = []string{"a.td"} })},
	{name: "no SAN", reason: flow.ReasonCertNoID, chain: changed(func(c *x509.Certificate) { c.ExtraExtensions = nil; c.Subject.CommonName = "a" })},
	{name: "two URIs", reason: flow.ReasonCertManyIDs, chain: named(testID, "spiffe://td/b")},
	{name: "one URI twice", reason: flow.ReasonCertManyIDs, chain: named(testID, testID)},
	{name: "https URI", reason: flow.ReasonCertID, detail: "scheme", chain: named("https://td/a")},
	{name: "query", reason: flow.ReasonCertID, detail: "query", chain: named(testID + "?x")},
	{name: "empty fragment", reason: flow.ReasonCertID, detail: "fragment", chain: named(testID + "#")},
	{name: "empty query", reason: flow.ReasonCertID, detail: "query", chain: named(testID + "?")},
	{name: "port", reason: flow.ReasonCertID, detail: "port", chain: named("spiffe://td:1/a")},
	{name: "userinfo", reason: flow.ReasonCertID, detail: "userinfo", chain: named("spiffe://u@td/a")},
	{name: "percent-encoding", reason: flow.ReasonCertID, detail: "percent", chain: named("spiffe://td/%61")},
	{name: "dot segment", reason: flow.ReasonCertID, detail: "dot", chain: named("spiffe://td/b/../a")},
	{name: "empty segment", reason: flow.ReasonCertID, detail: "empty", chain: named("spiffe://td//a")},
	{name: "trust domain alone", reason: flow.ReasonCertID, detail: "no path", chain: named("spiffe://td")},
	{name: "wrong trust domain", reason: flow.ReasonCertTrustDomain, chain: named("spiffe://other/a")},
	{name: "no digitalSignature", reason: flow.ReasonCertKeyUsage, chain: changed(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment })},
	{name: "no keyUsage", reason: flow.ReasonCertKeyUsage, chain: changed(func(c *x509.Certificate) { c.KeyUsage = 0 })},
	{name: "keyCertSign", reason: flow.ReasonCertIsCA, chain: changed(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign })},
	{name: "cRLSign", reason: flow.ReasonCertIsCA, chain: changed(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign })},
	{name: "CA as leaf", reason: flow.ReasonCertIsCA, chain: changed(func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign })},
	{name: "client without clientAuth", reason: flow.ReasonCertExtKeyUsage, detail: "clientAuth", chain: changed(func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	})},
	{name: "server without serverAuth", role: RoleServer, reason: flow.ReasonCertExtKeyUsage, detail: "serverAuth", chain: changed(func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	})},
	{name: "anyExtendedKeyUsage", reason: flow.ReasonCertExtKeyUsage, chain: changed(func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
	})},
	{name: "no extKeyUsage", reason: flow.ReasonCertExtKeyUsage, chain: changed(func(c *x509.Certificate) { c.ExtKeyUsage = nil })},
	{name: "expired", at: 11 * time.Minute, reason: flow.ReasonCertExpired, chain: changed(nil)},
	{name: "not yet valid", at: -2 * time.Minute, reason: flow.ReasonCertNotYet, chain: changed(nil)},
	{name: "expired intermediate", at: 2 * time.Hour, reason: flow.ReasonCertExpired, detail: "certificate 1", chain: func(t *testing.T, root *testCA) []*x509.Certificate {
		scope := scopeOf(t, "n1", testID)
		return root.intermediate(t, &scope, nil).leaf(t, testID, func(c *x509.Certificate) { c.NotAfter = testNow.Add(20 * time.Hour) })
	}},
	{name: "intermediate not yet valid", at: -30 * time.Minute, reason: flow.ReasonCertNotYet, detail: "certificate 1", chain: func(t *testing.T, root *testCA) []*x509.Certificate {
		scope := scopeOf(t, "n1", testID)
		return root.intermediate(t, &scope, func(c *x509.Certificate) { c.NotBefore = testNow.Add(-time.Minute) }).
			leaf(t, testID, func(c *x509.Certificate) { c.NotBefore = testNow.Add(-time.Hour) })
	}},
	{name: "self-signed", reason: flow.ReasonCertSelfSigned, chain: func(t *testing.T, _ *testCA) []*x509.Certificate {
		key, template := newKey(t), leafTemplate(testID)
		return []*x509.Certificate{certify(t, template, template, key.Public(), key)}
	}},
	{name: "another root", reason: flow.ReasonCertUntrusted, chain: func(t *testing.T, _ *testCA) []*x509.Certificate {
		other := newRoot(t)
		return append(other.leaf(t, testID, nil), other.cert)
	}},
	{name: "signature by another key", reason: flow.ReasonCertUntrusted, chain: func(t *testing.T, root *testCA) []*x509.Certificate {
		forged := &testCA{cert: root.cert, key: root.key}
		chain := forged.leaf(t, testID, nil)
		raw := bytes.Clone(chain[0].Raw)
		raw[len(raw)-1] ^= 1
		c, err := x509.ParseCertificate(raw)
		if err != nil {
			t.Skip("the flipped bit broke the encoding")
		}
		return []*x509.Certificate{c}
	}},
	{name: "P-224", reason: flow.ReasonCertKey, detail: "P-224", chain: overKey(func() (crypto.PublicKey, error) {
		k, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
		return &k.PublicKey, err
	})},
	{name: "P-521", reason: flow.ReasonCertKey, detail: "P-521", chain: overKey(func() (crypto.PublicKey, error) {
		k, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
		return &k.PublicKey, err
	})},
	{name: "RSA 1024", reason: flow.ReasonCertKey, detail: "1024 bits", chain: func(t *testing.T, root *testCA) []*x509.Certificate {
		t.Setenv("GODEBUG", "rsa1024min=0")
		k, err := rsa.GenerateKey(rand.Reader, 1024)
		if err != nil {
			t.Fatal(err)
		}
		return []*x509.Certificate{certify(t, leafTemplate(testID), root.cert, k.Public(), root.key)}
	}},
	{name: "SHA-1", reason: flow.ReasonCertSignature, detail: "SHA1", chain: sha1Leaf},
	{name: "outside the node's scope", reason: flow.ReasonScope, detail: "node n1 may not issue", chain: underNode([]string{"spiffe://td/b"}, nil)},
	{name: "empty scope", reason: flow.ReasonScope, chain: underNode(nil, nil)},
	{name: "intermediate without scope", reason: flow.ReasonScope, detail: "lists no scope", chain: func(t *testing.T, root *testCA) []*x509.Certificate {
		return root.intermediate(t, nil, nil).leaf(t, testID, nil)
	}},
	{name: "scope not critical", reason: flow.ReasonScope, detail: "not critical", chain: underNode([]string{testID}, func(c *x509.Certificate) {
		c.ExtraExtensions[0].Critical = false
	})},
	{name: "scope damaged", reason: flow.ReasonScope, detail: "not DER", chain: underNode([]string{testID}, func(c *x509.Certificate) {
		c.ExtraExtensions[0].Value = []byte{1, 2, 3}
	})},
	{name: "scope on a leaf", reason: flow.ReasonCertMalformed, detail: "critical extension", chain: changed(func(c *x509.Certificate) {
		scope := Scope{Node: "n1", IDs: []string{testID}}
		c.ExtraExtensions = append(c.ExtraExtensions, scope.extension())
	})},
	{name: "unknown critical extension on a leaf", reason: flow.ReasonCertMalformed, detail: "1.2.3", chain: changed(func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
	})},
	{name: "unknown critical extension on an intermediate", reason: flow.ReasonCertUntrusted, chain: underNode([]string{testID}, func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
	})},
	{name: "intermediate under a node's intermediate", reason: flow.ReasonCertUntrusted, chain: func(t *testing.T, root *testCA) []*x509.Certificate {
		scope := scopeOf(t, "n1", testID)
		return root.intermediate(t, &scope, nil).intermediate(t, &scope, nil).leaf(t, testID, nil)
	}},
	{name: "leaf under a leaf", reason: flow.ReasonCertUntrusted, chain: func(t *testing.T, root *testCA) []*x509.Certificate {
		key := newKey(t)
		parent := certify(t, leafTemplate("spiffe://td/parent"), root.cert, key.Public(), root.key)
		return []*x509.Certificate{certify(t, leafTemplate(testID), parent, newKey(t).Public(), key), parent}
	}},
	{name: "intermediate without the role", role: RoleServer, reason: flow.ReasonCertUntrusted, chain: underNode([]string{testID}, func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	})},
}

// sha1Leaf rewrites a leaf's signature algorithm: crypto/x509 makes none
// with SHA-1, but parses them.
func sha1Leaf(t *testing.T, _ *testCA) []*x509.Certificate {
	t.Helper()
	key, template := newKey(t), leafTemplate(testID)
	der := certify(t, template, template, key.Public(), key).Raw
	// ecdsa-with-SHA256 1.2.840.10045.4.3.2 -> ecdsa-with-SHA1 1.2.840.10045.4.1, one byte shorter:
	// rebuilt from its parts.
	var c struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &c); err != nil {
		t.Fatal(err)
	}
	sha1Algorithm := pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 1}}
	old, err := asn1.Marshal(c.Algorithm)
	if err != nil {
		t.Fatal(err)
	}
	replacement, err := asn1.Marshal(sha1Algorithm)
	if err != nil {
		t.Fatal(err)
	}
	body := bytes.Replace(c.TBS.Bytes, old, replacement, 1)
	tbs, err := asn1.Marshal(asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: body})
	if err != nil {
		t.Fatal(err)
	}
	digest := sha1.Sum(tbs)
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	c.TBS, c.Algorithm, c.Signature = asn1.RawValue{FullBytes: tbs}, sha1Algorithm, asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}
	if der, err = asn1.Marshal(c); err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return []*x509.Certificate{leaf}
}

func TestVerifyRefuses(t *testing.T) {
	root := newRoot(t)
	verifier := NewVerifier(VerifierOptions{Bundle: root.trust(t, "td")})
	for _, c := range refusals {
		t.Run(c.name, func(t *testing.T) {
			chain := c.chain(t, root)
			peer, err := verifier.Verify(chain, c.role, testNow.Add(c.at))
			reason, detail := ReasonOf(err)
			if err == nil || reason != c.reason || !strings.Contains(detail, c.detail) {
				t.Errorf("%+v, %v; want %s with %q", peer, err, c.reason, c.detail)
			}
			if peer != (Peer{}) {
				t.Errorf("a refused peer is %+v", peer)
			}
			var der [][]byte
			for _, x := range chain {
				der = append(der, x.Raw)
			}
			if _, err := verifier.VerifyDER(der, c.role, testNow.Add(c.at)); err == nil {
				t.Error("VerifyDER accepts it")
			} else if r, _ := ReasonOf(err); r != c.reason {
				t.Errorf("VerifyDER: %v", err)
			}
		})
	}
}

// What held once is asked again for time, trust and revocations.
func TestVerifyAgain(t *testing.T) {
	root := newRoot(t)
	scope := scopeOf(t, "n1", testID)
	node := root.intermediate(t, &scope, nil)
	chain := node.leaf(t, testID, nil)
	verifier := NewVerifier(VerifierOptions{Bundle: root.trust(t, "td")})
	verify := func(at time.Duration, role Role) flow.Reason {
		_, err := verifier.Verify(chain, role, testNow.Add(at))
		reason, _ := ReasonOf(err)
		return reason
	}
	revoke := func(list ...Revocation) {
		t.Helper()
		r, err := NewRevocations(list, verifier.Revocations().Generation()+1)
		if err != nil {
			t.Fatal(err)
		}
		verifier.SetRevocations(r)
	}
	expect := func(what string, got, want flow.Reason) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	expect("first", verify(0, RoleClient), flow.ReasonOK)
	expect("later", verify(11*time.Minute, RoleClient), flow.ReasonCertExpired)
	expect("earlier", verify(-2*time.Minute, RoleClient), flow.ReasonCertNotYet)
	revoke(Revocation{Kind: RevokeIdentity, Value: testID, Until: testNow.Add(time.Minute)})
	expect("identity revoked", verify(0, RoleClient), flow.ReasonIdentityRevoked)
	expect("until it ends", verify(2*time.Minute, RoleClient), flow.ReasonOK)
	revoke(Revocation{Kind: RevokeIdentity, Value: "spiffe://td/b"})
	expect("another revoked", verify(0, RoleClient), flow.ReasonOK)
	revoke(Revocation{Kind: RevokeSerial, Value: Serial(chain[0].SerialNumber)})
	expect("leaf revoked", verify(0, RoleClient), flow.ReasonCertificateRevoked)
	revoke(Revocation{Kind: RevokeSerial, Value: "00:" + strings.ToUpper(Serial(node.cert.SerialNumber))})
	expect("node revoked", verify(0, RoleClient), flow.ReasonCertificateRevoked)
	revoke()
	expect("lifted", verify(0, RoleClient), flow.ReasonOK)
	verifier.SetBundle(newRoot(t).trust(t, "td"))
	expect("root replaced", verify(0, RoleClient), flow.ReasonCertUntrusted)
	verifier.SetBundle(root.trust(t, "other"))
	expect("trust domain gone", verify(0, RoleClient), flow.ReasonCertTrustDomain)
	verifier.SetBundle(nil)
	expect("no bundle", verify(0, RoleClient), flow.ReasonCertTrustDomain)

	// A chain proven as a client is not thereby one of a server.
	verifier.SetBundle(root.trust(t, "td"))
	chain = root.leaf(t, testID, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })
	expect("as client", verify(0, RoleClient), flow.ReasonOK)
	expect("as server", verify(0, RoleServer), flow.ReasonCertExtKeyUsage)
}

// crypto/tls shares parsed certificates between connections.
func TestVerifyChangesNoCertificate(t *testing.T) {
	root := newRoot(t)
	scope := scopeOf(t, "n1", testID)
	chain := root.intermediate(t, &scope, nil).leaf(t, testID, nil)
	verifier := NewVerifier(VerifierOptions{Bundle: root.trust(t, "td")})
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			if _, err := verifier.Verify(chain, RoleClient, testNow); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if len(chain[1].UnhandledCriticalExtensions) != 1 {
		t.Errorf("the intermediate was changed: %v", chain[1].UnhandledCriticalExtensions)
	}
}

func TestPeerOfOldTLS(t *testing.T) {
	verifier := NewVerifier(VerifierOptions{})
	_, err := verifier.PeerOf(tls.ConnectionState{Version: tls.VersionTLS12}, RoleClient)
	if reason, _ := ReasonOf(err); reason != flow.ReasonTLSVersion {
		t.Errorf("%v", err)
	}
}

func TestNewBundleRefuses(t *testing.T) {
	root := newRoot(t)
	good := root.cert.Raw
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	weak := caTemplate("weak")
	for name, c := range map[string]struct {
		domains []TrustDomain
		want    string
	}{
		"name":     {[]TrustDomain{{Name: "TD", Roots: [][]byte{good}}}, "in trust domain"},
		"many":     {[]TrustDomain{{Name: "td", Roots: [][]byte{good}}, {Name: "td", Roots: make([][]byte, maxRoots)}}, "65 roots"},
		"not DER":  {[]TrustDomain{{Name: "td", Roots: [][]byte{{1}}}}, "root of td"},
		"leaf":     {[]TrustDomain{{Name: "td", Roots: [][]byte{root.leaf(t, testID, nil)[0].Raw}}}, "not a CA"},
		"weak key": {[]TrustDomain{{Name: "td", Roots: [][]byte{certify(t, weak, weak, p224.Public(), p224).Raw}}}, "P-224"},
		"domains":  {make([]TrustDomain, maxTrustDomains+1), "at most 256"},
		"two":      {[]TrustDomain{{Name: "td", Roots: [][]byte{good}}, {Name: "other", Roots: [][]byte{good}, Foreign: true}}, "would speak for both td and other"},
		"both":     {[]TrustDomain{{Name: "td", Roots: [][]byte{good}}, {Name: "td", Roots: [][]byte{newRoot(t).cert.Raw}, Foreign: true}}, "own trust domain and another's"},
	} {
		if _, err := NewBundle(c.domains); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", name, err, c.want)
		}
	}
}

// TestForeignTrustDomain holds what of another trust domain is another's
// business, and what is not.
func TestForeignTrustDomain(t *testing.T) {
	ours, theirs := newRoot(t), newRoot(t)
	const theirID = "spiffe://partner/billing"
	v := NewVerifier(VerifierOptions{Bundle: bundleOf(t,
		TrustDomain{Name: "td", Roots: [][]byte{ours.cert.Raw}}, TrustDomain{Name: "partner", Roots: [][]byte{theirs.cert.Raw}, Foreign: true})})
	plain := theirs.intermediate(t, nil, nil)
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		want  flow.Reason
	}{
		"by its root":                      {theirs.leaf(t, theirID, nil), flow.ReasonOK},
		"by an intermediate without scope": {plain.leaf(t, theirID, nil), flow.ReasonOK},
		"by an intermediate in its scope":  {theirs.intermediate(t, &Scope{Node: "n", IDs: []string{theirID}}, nil).leaf(t, theirID, nil), flow.ReasonOK},
		"outside of it":                    {theirs.intermediate(t, &Scope{Node: "n", IDs: []string{"spiffe://partner/x"}}, nil).leaf(t, theirID, nil), flow.ReasonScope},
		"one of ours, by their root":       {theirs.leaf(t, testID, nil), flow.ReasonCertUntrusted},
		"one of ours, by their node":       {plain.leaf(t, testID, nil), flow.ReasonCertUntrusted},
		"one of theirs, by our root":       {ours.leaf(t, theirID, nil), flow.ReasonCertUntrusted},
		"ours, by a node without scope":    {ours.intermediate(t, nil, nil).leaf(t, testID, nil), flow.ReasonScope},
		"of a third":                       {theirs.leaf(t, "spiffe://third/x", nil), flow.ReasonCertTrustDomain},
	} {
		peer, err := v.Verify(c.chain, RoleClient, testNow)
		reason, _ := ReasonOf(err)
		if err == nil {
			reason = flow.ReasonOK
		}
		if reason != c.want {
			t.Errorf("%s: %v as %+v, want %s", name, err, peer, c.want)
		}
	}
}

func TestBundleAddsUp(t *testing.T) {
	one, two := newRoot(t), newRoot(t)
	verifier := NewVerifier(VerifierOptions{Bundle: bundleOf(t,
		TrustDomain{Name: "td", Roots: [][]byte{one.cert.Raw}}, TrustDomain{Name: "none", Roots: nil}, TrustDomain{Name: "td", Roots: [][]byte{two.cert.Raw}})})
	for _, root := range []*testCA{one, two} {
		if _, err := verifier.Verify(root.leaf(t, testID, nil), RoleClient, testNow); err != nil {
			t.Error(err)
		}
	}
	_, err := verifier.Verify(one.leaf(t, "spiffe://none/a", nil), RoleClient, testNow)
	if reason, _ := ReasonOf(err); reason != flow.ReasonCertTrustDomain {
		t.Errorf("a trust domain without roots: %v", err)
	}
}

func FuzzVerifyDER(f *testing.F) {
	root := newRoot(f)
	scope := scopeOf(f, "n1", testID)
	chain := root.intermediate(f, &scope, nil).leaf(f, testID, nil)
	good := [2]string{string(chain[0].Raw), string(chain[1].Raw)}
	verifier := NewVerifier(VerifierOptions{Bundle: root.trust(f, "td")})
	f.Add(chain[0].Raw, chain[1].Raw)
	f.Add(root.leaf(f, testID, nil)[0].Raw, root.cert.Raw)
	f.Add([]byte{0x30}, []byte{})
	f.Fuzz(func(t *testing.T, leaf, next []byte) {
		peer, err := verifier.VerifyDER([][]byte{leaf, next}, RoleClient, testNow)
		if err != nil {
			if r, _ := ReasonOf(err); r == flow.ReasonOK || r == flow.ReasonTLSHandshake {
				t.Errorf("a refusal without a reason: %v", err)
			}
			return
		}
		if peer.ID != testID || string(leaf) == good[0] && string(next) == good[1] && peer.Node != "n1" {
			t.Errorf("verified as %+v", peer)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	root := newRoot(b)
	scope := scopeOf(b, "n1", testID)
	chain := root.intermediate(b, &scope, nil).leaf(b, testID, nil)
	bundle := root.trust(b, "td")
	b.Run("first", func(b *testing.B) {
		for b.Loop() {
			if _, err := NewVerifier(VerifierOptions{Bundle: bundle}).Verify(chain, RoleClient, testNow); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("again", func(b *testing.B) {
		b.ReportAllocs()
		verifier := NewVerifier(VerifierOptions{Bundle: bundle})
		for b.Loop() {
			if _, err := verifier.Verify(chain, RoleClient, testNow); err != nil {
				b.Fatal(err)
			}
		}
	})
}
