// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/statefile"
)

// Lifetimes and limits of what a CA issues.
const (
	DefaultLeafTTL = 10 * time.Minute
	MinLeafTTL     = 2 * time.Second
	MaxLeafTTL     = 24 * time.Hour
	// Backdate lets peers whose clocks are behind accept a fresh leaf.
	Backdate = 30 * time.Second

	rootTTL      = 10 * 365 * 24 * time.Hour
	rootRenew    = 365 * 24 * time.Hour // left when the root is issued anew
	rootBackdate = time.Hour
	maxRequest   = 16 << 10 // bytes of a PKCS#10 request
)

// CAOptions configures a CA.
type CAOptions struct {
	StateDir    string
	TrustDomain string
	Node        string
	TPM         string // see KeyOptions
	RequireTPM  bool
	SecretFile  string
	LeafTTL     time.Duration // 0: DefaultLeafTTL
	// Enroller, when set, makes this the CA of an enrolled node: it issues
	// under an intermediate that the authority gives it. Nil makes it a root
	// of its own.
	Enroller Enroller
	// Authority makes it the root of a shared authority, which issues
	// intermediates to nodes.
	Authority bool
	Now       func() time.Time // nil: time.Now
	Log       *slog.Logger     // nil discards
}

// CA issues leaves. It is safe for concurrent use.
type CA struct {
	o       CAOptions
	key     *Key
	now     func() time.Time
	log     *slog.Logger
	issuer  atomic.Pointer[issuer]
	problem atomic.Pointer[string]
	enrol   sync.Mutex // one enrolment at a time
	mu      sync.Mutex // guards changed
	changed chan struct{}
}

// issuer is what leaves are issued under at the moment.
type issuer struct {
	cert  *x509.Certificate
	chain [][]byte // what follows the leaf: the intermediate, nothing under a root
	roots [][]byte
	scope *Scope // nil under a root: everything in the trust domain
	since time.Time
}

// OpenCA opens the CA whose key and certificates are in StateDir, or makes
// it. It does not speak to the authority: Enroll or Run do.
func OpenCA(o CAOptions) (*CA, error) {
	if err := CheckTrustDomain(o.TrustDomain); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	if err := CheckNodeName(o.Node); err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	if o.LeafTTL == 0 {
		o.LeafTTL = DefaultLeafTTL
	}
	if o.LeafTTL < MinLeafTTL || o.LeafTTL > MaxLeafTTL {
		return nil, fmt.Errorf("open CA: a leaf's lifetime of %v is not between %v and %v", o.LeafTTL, MinLeafTTL, MaxLeafTTL)
	}
	if o.Authority && o.Enroller != nil {
		return nil, errors.New("open CA: an authority cannot enrol with another")
	}
	ca := &CA{o: o, now: o.Now, log: o.Log, changed: make(chan struct{})}
	if ca.now == nil {
		ca.now = time.Now
	}
	if ca.log == nil {
		ca.log = slog.New(slog.DiscardHandler)
	}
	if err := statefile.MakeDir(o.StateDir); err != nil {
		return nil, err
	}
	// A command and the server may both be the first to need a key.
	unlock, err := statefile.Lock(filepath.Join(o.StateDir, ca.stem()+".lock"))
	if err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	defer unlock()
	key, err := OpenKey(KeyOptions{
		Dir: o.StateDir, Name: ca.stem(), TPM: o.TPM, RequireTPM: o.RequireTPM, SecretFile: o.SecretFile,
	})
	if err != nil {
		return nil, err
	}
	ca.key = key
	if o.Enroller != nil {
		err = ca.loadEnrolment()
	} else {
		err = ca.loadRoot()
	}
	if err != nil {
		key.Close()
		return nil, err
	}
	ca.log.Info("certificate authority", "kind", ca.stem(), "trustDomain", o.TrustDomain, "anchor", key.Anchor.String(), "key", key.Place)
	return ca, nil
}

func (ca *CA) stem() string {
	switch {
	case ca.o.Authority:
		return "authority"
	case ca.o.Enroller != nil:
		return "node"
	}
	return "ca"
}

// Close closes the key. Sign fails afterwards where the key is in a TPM.
func (ca *CA) Close() error { return ca.key.Close() }

// Anchor says what the CA's key rests on.
func (ca *CA) Anchor() flow.Anchor { return ca.key.Anchor }

// Banner returns what to print loudly at start, "" where the key is in a TPM.
func (ca *CA) Banner() string { return ca.key.Banner() }

// Problem returns what an operator should know about the CA's health, ""
// when all is well.
func (ca *CA) Problem() string {
	if p := ca.problem.Load(); p != nil {
		return *p
	}
	return ""
}

func (ca *CA) setProblem(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	ca.problem.Store(&text)
}

// Trust returns the roots that leaves of this CA chain to, without roots
// while the node is not enrolled.
func (ca *CA) Trust() TrustDomain {
	d := TrustDomain{Name: ca.o.TrustDomain}
	if is := ca.issuer.Load(); is != nil {
		d.Roots = is.roots
	}
	return d
}

// Scope returns what the CA may issue; limited is false for a root, which
// may issue every ID of its trust domain.
func (ca *CA) Scope() (s Scope, limited bool) {
	is := ca.issuer.Load()
	switch {
	case is == nil:
		return Scope{Node: ca.o.Node}, true
	case is.scope == nil:
		return Scope{}, false
	}
	return *is.scope, true
}

// Changed returns a channel that is closed when Trust or Scope next change.
func (ca *CA) Changed() <-chan struct{} {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.changed
}

// Sign issues a leaf for id over the public key of a PKCS#10 request, which
// proves possession of the key and is believed in nothing else. The chain is
// leaf first, without the root. ttl 0 is the CA's own; the leaf never
// outlives its issuer. NotAfter is rounded up to a whole second, which is
// all that X.509 can say. A refusal is a *Refusal.
func (ca *CA) Sign(csr []byte, id string, ttl time.Duration) ([][]byte, error) {
	if ttl == 0 {
		ttl = ca.o.LeafTTL
	}
	if ttl < MinLeafTTL || ttl > MaxLeafTTL {
		return nil, fmt.Errorf("sign %s: a lifetime of %v is not between %v and %v", id, ttl, MinLeafTTL, MaxLeafTTL)
	}
	parsed, err := ParseID(id)
	if err != nil {
		return nil, err
	}
	if parsed.TrustDomain() != ca.o.TrustDomain {
		return nil, refuse(flow.ReasonCertTrustDomain, "%s is not of trust domain %s", id, ca.o.TrustDomain)
	}
	request, err := ParseRequest(csr)
	if err != nil {
		return nil, err
	}
	now := ca.now()
	is, err := ca.usableIssuer(now)
	if err != nil {
		return nil, err
	}
	if is.scope != nil && !is.scope.Permits(id) {
		return nil, refuse(flow.ReasonScope, "the authority does not let node %s issue %s", is.scope.Node, id)
	}
	uri, err := url.Parse(id)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", id, err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber:          newSerial(),
		NotBefore:             now.Add(-Backdate),
		NotAfter:              earlier(ceilSecond(now.Add(ttl)), is.cert.NotAfter),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:                  []*url.URL{uri},
		BasicConstraintsValid: true,
	}, is.cert, request.PublicKey, ca.key)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", id, err)
	}
	return append([][]byte{der}, is.chain...), nil
}

// Issue issues a node's intermediate: MaxPathLen 0 and the scope as critical
// extension. Only an Authority does.
func (ca *CA) Issue(csr []byte, scope Scope, ttl time.Duration) ([]byte, error) {
	if !ca.o.Authority {
		return nil, errors.New("issue intermediate: this CA is not an authority")
	}
	request, err := ParseRequest(csr)
	if err != nil {
		return nil, err
	}
	now := ca.now()
	is, err := ca.usableIssuer(now)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               pkix.Name{Organization: []string{"Sallyport"}, CommonName: "node " + scope.Node},
		NotBefore:             now.Add(-Backdate),
		NotAfter:              earlier(ceilSecond(now.Add(ttl)), is.cert.NotAfter),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		ExtraExtensions:       []pkix.Extension{scope.extension()},
	}, is.cert, request.PublicKey, ca.key)
	if err != nil {
		return nil, fmt.Errorf("issue intermediate of node %s: %w", scope.Node, err)
	}
	return der, nil
}

func (ca *CA) usableIssuer(now time.Time) (*issuer, error) {
	is := ca.issuer.Load()
	switch {
	case is == nil:
		return nil, refuse(flow.ReasonEnrolmentMissing, "node %s is not enrolled with the authority", ca.o.Node)
	case !now.Before(is.cert.NotAfter):
		return nil, refuse(flow.ReasonEnrolmentMissing, "the issuing certificate of node %s ended at %s", ca.o.Node, is.cert.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(is.cert.NotBefore):
		return nil, refuse(flow.ReasonEnrolmentMissing, "the issuing certificate of node %s begins at %s; is this machine's clock right?", ca.o.Node, is.cert.NotBefore.UTC().Format(time.RFC3339))
	}
	return is, nil
}

// loadRoot loads the self-signed root, or makes it, or makes it anew under
// the same key when it is in its last year.
func (ca *CA) loadRoot() error {
	path := filepath.Join(ca.o.StateDir, ca.stem()+".pem")
	found, err := statefile.Exists(path)
	if err != nil {
		return err
	}
	if found {
		certs, err := ReadCertificates(path)
		if err != nil {
			return err
		}
		root := certs[0]
		switch {
		case len(certs) != 1 || !root.IsCA:
			return fmt.Errorf("load root %s: not one CA certificate; remove the file to make a new one", path)
		case !samePublicKey(root, ca.key):
			return fmt.Errorf("load root %s: its key is not the one at %s; restore the key, or remove the file to make a new root, which all peers must then learn", path, ca.key.Place)
		case len(root.Subject.OrganizationalUnit) != 1 || root.Subject.OrganizationalUnit[0] != ca.o.TrustDomain:
			return fmt.Errorf("load root %s: it is of trust domain %v, the configuration says %s; remove the file to make a new root", path, root.Subject.OrganizationalUnit, ca.o.TrustDomain)
		case root.NotAfter.Sub(ca.now()) > rootRenew:
			ca.useRoot(root)
			return nil
		}
	}
	root, err := ca.makeRoot()
	if err != nil {
		return err
	}
	if err := writePEM(path, root); err != nil {
		return fmt.Errorf("store root: %w", err)
	}
	ca.useRoot(root)
	return nil
}

func (ca *CA) useRoot(root *x509.Certificate) {
	ca.issuer.Store(&issuer{cert: root, roots: [][]byte{root.Raw}, since: root.NotBefore})
}

func (ca *CA) makeRoot() (*x509.Certificate, error) {
	now := ca.now()
	template := &x509.Certificate{
		SerialNumber: newSerial(),
		Subject: pkix.Name{
			Organization: []string{"Sallyport"}, OrganizationalUnit: []string{ca.o.TrustDomain}, CommonName: "root of node " + ca.o.Node,
		},
		NotBefore:             now.Add(-rootBackdate),
		NotAfter:              now.Add(rootTTL),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	if ca.o.Authority {
		template.Subject.CommonName = "authority root"
		template.MaxPathLen, template.MaxPathLenZero = 1, false
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, ca.key.Public(), ca.key)
	if err != nil {
		return nil, fmt.Errorf("make root: %w", err)
	}
	return x509.ParseCertificate(der)
}

// ParseRequest parses a PKCS#10 request and proves that its key signed it.
// The error is a *Refusal.
func ParseRequest(der []byte) (*x509.CertificateRequest, error) {
	if len(der) > maxRequest {
		return nil, refuse(flow.ReasonCertMalformed, "certificate request of %d bytes, at most %d", len(der), maxRequest)
	}
	request, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, refuse(flow.ReasonCertMalformed, "certificate request: %v", err)
	}
	if err := CheckKey(request.PublicKey); err != nil {
		return nil, refuse(flow.ReasonCertKey, "certificate request: %v", err)
	}
	if !acceptedSignature(request.SignatureAlgorithm) {
		return nil, refuse(flow.ReasonCertSignature, "certificate request is signed with %v", request.SignatureAlgorithm)
	}
	if err := request.CheckSignature(); err != nil {
		return nil, refuse(flow.ReasonCertKeyUnproven, "certificate request: %v", err)
	}
	return request, nil
}

func samePublicKey(c *x509.Certificate, k *Key) bool {
	public, ok := k.Public().(*ecdsa.PublicKey)
	return ok && public.Equal(c.PublicKey)
}

// newSerial draws 126 random bits under a leading one, positive and never
// short (RFC 5280, 4.1.2.2).
func newSerial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b) // never fails, by its contract
	b[0] = b[0]&0x3f | 0x40
	return new(big.Int).SetBytes(b)
}

func ceilSecond(t time.Time) time.Time {
	if c := t.Truncate(time.Second); !c.Equal(t) {
		return c.Add(time.Second)
	}
	return t
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// Run keeps an enrolled node enrolled: it joins, then renews at half of the
// intermediate's life, until ctx ends. A root needs none of that; Run then
// only waits.
func (ca *CA) Run(ctx context.Context) error {
	if ca.o.Enroller == nil {
		<-ctx.Done()
		return nil
	}
	return ca.keepEnrolled(ctx)
}
