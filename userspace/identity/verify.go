// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Limits of a peer's chain: crypto/tls fails on a session ticket that holds
// a much larger one.
const (
	maxChain      = 8
	maxChainBytes = 64 << 10
)

// Limits of a trust bundle.
const (
	maxTrustDomains = 256
	maxRoots        = 64 // of one trust domain
)

// Role is the part that the peer plays in the handshake.
type Role uint8

// The roles of a peer.
const (
	RoleClient Role = iota
	RoleServer
)

func (r Role) usage() x509.ExtKeyUsage {
	if r == RoleServer {
		return x509.ExtKeyUsageServerAuth
	}
	return x509.ExtKeyUsageClientAuth
}

// String returns the role's word.
func (r Role) String() string {
	if r == RoleServer {
		return "server"
	}
	return "client"
}

// Peer is a verified peer.
type Peer struct {
	ID         string    // SPIFFE ID
	Serial     string    // of the leaf, as Serial writes it
	Thumbprint [32]byte  // SHA-256 of the leaf's DER, x5t#S256 of RFC 8705
	NotAfter   time.Time // the earliest of the chain
	Node       string    // the node that issued the leaf, "" where a root did
}

// TrustDomain holds the DER roots of one trust domain.
type TrustDomain struct {
	Name  string
	Roots [][]byte
	// Foreign says that it is another's: intermediates between its roots and
	// its leaves are its own business, where in ours each must say what it may
	// issue.
	Foreign bool
}

// Bundle is an immutable set of roots by trust domain.
type Bundle struct {
	domains map[string]*trustRoots
}

type trustRoots struct {
	pool    *x509.CertPool
	foreign bool
}

// NewBundle parses roots. A root must be a CA with a key that is accepted
// of peers, and its key may speak for one trust domain only. Entries of one
// trust domain add up; one without roots (a node that is not enrolled yet)
// trusts nobody.
func NewBundle(domains []TrustDomain) (*Bundle, error) {
	if len(domains) > maxTrustDomains {
		return nil, fmt.Errorf("build trust bundle: %d trust domains, at most %d", len(domains), maxTrustDomains)
	}
	b := &Bundle{domains: make(map[string]*trustRoots, len(domains))}
	counts := make(map[string]int, len(domains))
	speaksFor := make(map[string]string) // domains, by a root's SubjectPublicKeyInfo
	for _, d := range domains {
		if err := CheckTrustDomain(d.Name); err != nil {
			return nil, fmt.Errorf("build trust bundle: %q: %w", d.Name, err)
		}
		if len(d.Roots) == 0 {
			continue
		}
		if counts[d.Name] += len(d.Roots); counts[d.Name] > maxRoots {
			return nil, fmt.Errorf("build trust bundle: trust domain %s has %d roots, at most %d", d.Name, counts[d.Name], maxRoots)
		}
		roots := b.domains[d.Name]
		if roots == nil {
			roots = &trustRoots{x509.NewCertPool(), d.Foreign}
			b.domains[d.Name] = roots
		}
		if roots.foreign != d.Foreign {
			return nil, fmt.Errorf("build trust bundle: %s is the node's own trust domain and another's", d.Name)
		}
		for _, der := range d.Roots {
			root, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, fmt.Errorf("build trust bundle: root of %s: %w", d.Name, err)
			}
			if !root.IsCA || !root.BasicConstraintsValid {
				return nil, fmt.Errorf("build trust bundle: root %q of %s is not a CA", root.Subject, d.Name)
			}
			if err := CheckKey(root.PublicKey); err != nil {
				return nil, fmt.Errorf("build trust bundle: root %q of %s: %w", root.Subject, d.Name, err)
			}
			key := string(root.RawSubjectPublicKeyInfo)
			if other, ok := speaksFor[key]; ok && other != d.Name {
				return nil, fmt.Errorf("build trust bundle: the key of root %q would speak for both %s and %s", root.Subject, other, d.Name)
			}
			speaksFor[key] = d.Name
			roots.pool.AddCert(root)
		}
	}
	return b, nil
}

// VerifierOptions configures a Verifier.
type VerifierOptions struct {
	Bundle      *Bundle          // nil trusts nobody
	Revocations *Revocations     // nil revokes nothing
	Now         func() time.Time // nil: time.Now
}

// Verifier verifies peers' chains against a bundle and a deny list, both
// replaced while it works. It is safe for concurrent use and takes no lock.
type Verifier struct {
	bundle      atomic.Pointer[Bundle]
	revocations atomic.Pointer[Revocations]
	now         func() time.Time
	proven      [256]atomic.Pointer[proof]
}

// proof is a chain whose signatures, usages and scope were found good under
// one bundle. Time and revocations are asked anew at each use.
type proof struct {
	digest    [32]byte
	bundle    *Bundle
	peer      Peer
	notBefore time.Time // the latest of the chain
	serials   []string  // of the leaf and the intermediates
}

// NewVerifier returns a verifier.
func NewVerifier(o VerifierOptions) *Verifier {
	v := &Verifier{now: o.Now}
	if v.now == nil {
		v.now = time.Now
	}
	v.SetBundle(o.Bundle)
	v.revocations.Store(o.Revocations)
	return v
}

// SetBundle replaces the roots. Sessions made under the old ones are not
// resumed any more.
func (v *Verifier) SetBundle(b *Bundle) {
	if b == nil {
		b = &Bundle{}
	}
	v.bundle.Store(b)
}

// SetRevocations replaces the deny list. Session tickets made before are
// void; live connections are for the caller to sweep (Revoked).
func (v *Verifier) SetRevocations(r *Revocations) { v.revocations.Store(r) }

// Revocations returns the deny list in force.
func (v *Verifier) Revocations() *Revocations { return v.revocations.Load() }

// VerifyDER is Verify for certificates that are not parsed yet.
func (v *Verifier) VerifyDER(chain [][]byte, role Role, now time.Time) (Peer, error) {
	if err := checkSize(len(chain), func(i int) int { return len(chain[i]) }); err != nil {
		return Peer{}, err
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return Peer{}, refuse(flow.ReasonCertMalformed, "certificate %d: %v", i, err)
		}
		certs[i] = c
	}
	return v.Verify(certs, role, now)
}

// Verify verifies the chain of a peer that plays role, leaf first, at now.
// The error is a *Refusal.
func (v *Verifier) Verify(chain []*x509.Certificate, role Role, now time.Time) (Peer, error) {
	if err := checkSize(len(chain), func(i int) int { return len(chain[i].Raw) }); err != nil {
		return Peer{}, err
	}
	digest := digestChain(chain, role)
	bundle := v.bundle.Load()
	slot := &v.proven[digest[0]]
	p := slot.Load()
	if p == nil || p.digest != digest || p.bundle != bundle {
		var err error
		if p, err = prove(chain, role, bundle, now); err != nil {
			return Peer{}, err
		}
		p.digest, p.bundle = digest, bundle
		slot.Store(p)
	}
	if err := p.holds(now, v.revocations.Load()); err != nil {
		return Peer{}, err
	}
	return p.peer, nil
}

// holds asks what changes while a chain stays the same.
func (p *proof) holds(now time.Time, revocations *Revocations) error {
	switch {
	case now.After(p.peer.NotAfter):
		return refuse(flow.ReasonCertExpired, "the chain of %s ended at %s", p.peer.ID, p.peer.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(p.notBefore):
		return refuse(flow.ReasonCertNotYet, "the chain of %s begins at %s", p.peer.ID, p.notBefore.UTC().Format(time.RFC3339))
	}
	if _, ok := revocations.Find(RevokeIdentity, p.peer.ID, now); ok {
		return refuse(flow.ReasonIdentityRevoked, "%s is revoked", p.peer.ID)
	}
	for _, serial := range p.serials {
		if _, ok := revocations.Find(RevokeSerial, serial, now); ok {
			return refuse(flow.ReasonCertificateRevoked, "serial %s in the chain of %s is revoked", serial, p.peer.ID)
		}
	}
	return nil
}

func checkSize(n int, size func(int) int) error {
	if n == 0 {
		return refuse(flow.ReasonCertMissing, "no certificate")
	}
	if n > maxChain {
		return refuse(flow.ReasonCertChainSize, "chain of %d certificates, at most %d", n, maxChain)
	}
	total := 0
	for i := range n {
		total += size(i)
	}
	if total > maxChainBytes {
		return refuse(flow.ReasonCertChainSize, "chain of %d bytes, at most %d", total, maxChainBytes)
	}
	return nil
}

func digestChain(chain []*x509.Certificate, role Role) (digest [32]byte) {
	h := sha256.New()
	h.Write([]byte{byte(role)})
	for _, c := range chain { // DER carries its own length: no two chains look alike
		h.Write(c.Raw)
	}
	h.Sum(digest[:0])
	return digest
}

// prove checks all that depends on the chain, the bundle and the role.
func prove(chain []*x509.Certificate, role Role, bundle *Bundle, now time.Time) (*proof, error) {
	leaf := chain[0]
	p := &proof{notBefore: leaf.NotBefore, peer: Peer{
		Serial: Serial(leaf.SerialNumber), Thumbprint: sha256.Sum256(leaf.Raw), NotAfter: leaf.NotAfter,
	}}
	id, err := leafID(leaf)
	if err != nil {
		return nil, err
	}
	p.peer.ID = id.String()
	for i, c := range chain {
		if err := CheckKey(c.PublicKey); err != nil {
			return nil, refuse(flow.ReasonCertKey, "certificate %d: %v", i, err)
		}
		if !acceptedSignature(c.SignatureAlgorithm) {
			return nil, refuse(flow.ReasonCertSignature, "certificate %d is signed with %v", i, c.SignatureAlgorithm)
		}
	}
	if err := checkUsage(leaf, role); err != nil {
		return nil, err
	}
	roots := bundle.domains[id.TrustDomain()]
	if roots == nil {
		return nil, refuse(flow.ReasonCertTrustDomain, "no trust bundle for %s", id.TrustDomain())
	}
	// Time has reasons of its own and is asked at each use; here the chain
	// is built as of a moment at which it can hold.
	path, err := buildPath(chain, roots.pool, role, now)
	if err != nil {
		return nil, err
	}
	for i, c := range path[:len(path)-1] {
		p.serials = append(p.serials, Serial(c.SerialNumber))
		if c.NotAfter.Before(p.peer.NotAfter) {
			p.peer.NotAfter = c.NotAfter
		}
		if c.NotBefore.After(p.notBefore) {
			p.notBefore = c.NotBefore
		}
		if i == 0 {
			continue
		}
		scope, found, err := ScopeOf(c)
		switch {
		case err != nil:
			return nil, err
		case !found && roots.foreign:
			continue
		case !found:
			return nil, refuse(flow.ReasonScope, "the intermediate %q lists no scope", c.Subject)
		case !scope.Permits(p.peer.ID):
			return nil, refuse(flow.ReasonScope, "node %s may not issue %s", scope.Node, p.peer.ID)
		}
		p.peer.Node = scope.Node
	}
	if root := path[len(path)-1]; root.NotAfter.Before(p.peer.NotAfter) {
		p.peer.NotAfter = root.NotAfter
	}
	return p, nil
}

// buildPath returns the path from the leaf to a root.
func buildPath(chain []*x509.Certificate, roots *x509.CertPool, role Role, now time.Time) ([]*x509.Certificate, error) {
	for i, c := range chain {
		switch {
		case now.After(c.NotAfter):
			return nil, refuse(flow.ReasonCertExpired, "certificate %d ended at %s", i, c.NotAfter.UTC().Format(time.RFC3339))
		case now.Before(c.NotBefore):
			return nil, refuse(flow.ReasonCertNotYet, "certificate %d begins at %s", i, c.NotBefore.UTC().Format(time.RFC3339))
		}
	}
	intermediates := x509.NewCertPool()
	for _, c := range chain[1:] {
		intermediates.AddCert(withoutScope(c))
	}
	leaf := chain[0]
	paths, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{role.usage()},
	})
	if err == nil {
		return paths[0], nil
	}
	if len(leaf.UnhandledCriticalExtensions) != 0 {
		return nil, refuse(flow.ReasonCertMalformed, "critical extension %v is not understood", leaf.UnhandledCriticalExtensions[0])
	}
	if bytes.Equal(leaf.RawIssuer, leaf.RawSubject) && leaf.CheckSignature(leaf.SignatureAlgorithm, leaf.RawTBSCertificate, leaf.Signature) == nil {
		return nil, refuse(flow.ReasonCertSelfSigned, "the leaf signed itself")
	}
	return nil, refuse(flow.ReasonCertUntrusted, "%v", err)
}

func checkUsage(leaf *x509.Certificate, role Role) error {
	switch {
	case leaf.IsCA:
		return refuse(flow.ReasonCertIsCA, "a CA certificate as leaf")
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return refuse(flow.ReasonCertIsCA, "keyCertSign or cRLSign on a leaf")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return refuse(flow.ReasonCertKeyUsage, "keyUsage without digitalSignature")
	}
	for _, usage := range leaf.ExtKeyUsage {
		if usage == role.usage() {
			return nil
		}
	}
	return refuse(flow.ReasonCertExtKeyUsage, "extKeyUsage without %sAuth", role)
}

// CheckKey says why a public key is not accepted, nil where it is: P-256, P-384,
// Ed25519 and RSA of 2048 to 8192 bits are.
func CheckKey(key any) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
		return fmt.Errorf("curve %s; accepted are P-256 and P-384", k.Curve.Params().Name)
	case ed25519.PublicKey:
		return nil
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 8192 {
			return fmt.Errorf("RSA key of %d bits; accepted are 2048 to 8192", n)
		}
		return nil
	}
	return fmt.Errorf("key of kind %T; accepted are P-256, P-384, Ed25519 and RSA", key)
}

func acceptedSignature(a x509.SignatureAlgorithm) bool {
	switch a {
	case x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
		x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS,
		x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512, x509.PureEd25519:
		return true
	}
	return false
}

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// leafID returns the ID of the only URI SAN. It reads the extension itself:
// url.URL, which crypto/x509 offers, does not keep the exact bytes (an empty
// fragment or query disappears).
func leafID(c *x509.Certificate) (ID, error) {
	var uris []string
	for _, e := range c.Extensions {
		if !e.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(e.Value, &names); err != nil || len(rest) != 0 {
			return ID{}, refuse(flow.ReasonCertMalformed, "subjectAltName is not DER")
		}
		for _, n := range names {
			if n.Class == asn1.ClassContextSpecific && n.Tag == 6 { // uniformResourceIdentifier, RFC 5280, 4.2.1.6
				uris = append(uris, string(n.Bytes))
			}
		}
	}
	switch len(uris) {
	case 0:
		return ID{}, refuse(flow.ReasonCertNoID, "no URI SAN")
	case 1:
		return ParseID(uris[0])
	}
	return ID{}, refuse(flow.ReasonCertManyIDs, "%d URI SANs", len(uris))
}
