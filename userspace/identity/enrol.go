// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	randv2 "math/rand/v2"
	"path/filepath"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/statefile"
)

// Enrolment is what an authority answers: the node's intermediate and the
// roots of the trust domain, DER.
type Enrolment struct {
	TrustDomain  string
	Intermediate []byte
	Roots        [][]byte
}

// Enroller speaks to an authority, which is another process
// (userspace/authority has the client).
type Enroller interface {
	// Join enrols a node for the first time.
	Join(ctx context.Context, csr []byte) (Enrolment, error)
	// Renew proves possession of the current intermediate's key and gets
	// the next one. roots are those to trust the authority by.
	Renew(ctx context.Context, csr []byte, current tls.Certificate, roots [][]byte) (Enrolment, error)
}

// Enrolment's pace.
const (
	enrolTime     = 30 * time.Second // of one exchange
	enrolRetryMin = time.Second
	enrolRetryMax = 5 * time.Minute
)

// Enroll joins the authority or, where the node holds a valid intermediate,
// renews it now. A node that the authority does not know any more tries to
// join.
func (ca *CA) Enroll(ctx context.Context) error {
	if ca.o.Enroller == nil {
		return errors.New("enrol: this CA is a root")
	}
	ca.enrol.Lock()
	defer ca.enrol.Unlock()
	ctx, cancel := context.WithTimeout(ctx, enrolTime)
	defer cancel()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Organization: []string{"Sallyport"}, CommonName: "node " + ca.o.Node},
	}, ca.key)
	if err != nil {
		return fmt.Errorf("enrol node %s: make request: %w", ca.o.Node, err)
	}
	var e Enrolment
	is := ca.issuer.Load()
	if is != nil && ca.now().Before(is.cert.NotAfter) {
		current := tls.Certificate{Certificate: [][]byte{is.cert.Raw}, PrivateKey: ca.key.Signer, Leaf: is.cert}
		e, err = ca.o.Enroller.Renew(ctx, csr, current, is.roots)
		var refusal *Refusal
		if errors.As(err, &refusal) && refusal.Reason == flow.ReasonEnrolmentNode {
			// The operator removed the node. A new join token brings it back
			// at once, an old one changes nothing.
			if joined, jerr := ca.o.Enroller.Join(ctx, csr); jerr == nil {
				e, err = joined, nil
			}
		}
	} else {
		e, err = ca.o.Enroller.Join(ctx, csr)
	}
	if err != nil {
		ca.enrolProblem(is, err)
		return fmt.Errorf("enrol node %s: %w", ca.o.Node, err)
	}
	next, err := ca.checkEnrolment(e)
	if err == nil {
		err = ca.storeEnrolment(next)
	}
	if err != nil {
		ca.enrolProblem(is, err)
		return fmt.Errorf("enrol node %s: %w", ca.o.Node, err)
	}
	ca.issuer.Store(next)
	ca.problem.Store(nil)
	ca.mu.Lock()
	close(ca.changed)
	ca.changed = make(chan struct{})
	ca.mu.Unlock()
	ca.log.Info("enrolled", "node", ca.o.Node, "serial", Serial(next.cert.SerialNumber), "ids", len(next.scope.IDs), "until", next.cert.NotAfter)
	return nil
}

func (ca *CA) enrolProblem(is *issuer, cause error) {
	switch {
	case is == nil:
		ca.setProblem("node %s is not enrolled and issues no identities: %v", ca.o.Node, cause)
	case !ca.now().Before(is.cert.NotAfter):
		ca.setProblem("the certificate of node %s ended at %s and it issues no identities; give it a new join token: %v", ca.o.Node, is.cert.NotAfter.UTC().Format(time.RFC3339), cause)
	default:
		ca.setProblem("the certificate of node %s cannot be renewed; identities are issued until %s: %v", ca.o.Node, is.cert.NotAfter.UTC().Format(time.RFC3339), cause)
	}
}

// checkEnrolment takes nothing from the authority that this node could not
// issue valid leaves under.
func (ca *CA) checkEnrolment(e Enrolment) (*issuer, error) {
	if e.TrustDomain != ca.o.TrustDomain {
		return nil, fmt.Errorf("the authority is of trust domain %q, the configuration says %s", e.TrustDomain, ca.o.TrustDomain)
	}
	cert, err := x509.ParseCertificate(e.Intermediate)
	if err != nil {
		return nil, fmt.Errorf("parse intermediate: %w", err)
	}
	roots := make([]*x509.Certificate, len(e.Roots))
	for i, der := range e.Roots {
		if roots[i], err = x509.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("parse root: %w", err)
		}
	}
	scope, err := VerifyNode(cert, roots, ca.now())
	if err != nil {
		return nil, err
	}
	if scope.Node != ca.o.Node {
		return nil, fmt.Errorf("the join token names node %s, this is node %s", scope.Node, ca.o.Node)
	}
	if !samePublicKey(cert, ca.key) {
		return nil, errors.New("the intermediate is not over this node's key")
	}
	return &issuer{cert: cert, chain: [][]byte{cert.Raw}, roots: e.Roots, scope: &scope, since: ca.now()}, nil
}

// VerifyNode verifies a node's intermediate against the roots of its
// authority at now. Presented as a client certificate it proves possession
// of the node's key. The error is a *Refusal.
func VerifyNode(cert *x509.Certificate, roots []*x509.Certificate, now time.Time) (Scope, error) {
	scope, found, err := ScopeOf(cert)
	switch {
	case err != nil:
		return Scope{}, err
	case !found:
		return Scope{}, refuse(flow.ReasonScope, "not a node's intermediate: it lists no scope")
	case !cert.IsCA || !cert.BasicConstraintsValid || !cert.MaxPathLenZero || cert.MaxPathLen != 0 || cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return Scope{}, refuse(flow.ReasonCertKeyUsage, "not a node's intermediate: not a CA with MaxPathLen 0")
	case now.After(cert.NotAfter):
		return Scope{}, refuse(flow.ReasonCertExpired, "the intermediate of node %s ended at %s", scope.Node, cert.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(cert.NotBefore):
		return Scope{}, refuse(flow.ReasonCertNotYet, "the intermediate of node %s begins at %s", scope.Node, cert.NotBefore.UTC().Format(time.RFC3339))
	}
	if err := CheckKey(cert.PublicKey); err != nil {
		return Scope{}, refuse(flow.ReasonCertKey, "the intermediate of node %s: %v", scope.Node, err)
	}
	if !acceptedSignature(cert.SignatureAlgorithm) {
		return Scope{}, refuse(flow.ReasonCertSignature, "the intermediate of node %s is signed with %v", scope.Node, cert.SignatureAlgorithm)
	}
	pool := x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root)
	}
	_, err = withoutScope(cert).Verify(x509.VerifyOptions{
		Roots: pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return Scope{}, refuse(flow.ReasonCertUntrusted, "the intermediate of node %s: %v", scope.Node, err)
	}
	return scope, nil
}

func (ca *CA) enrolmentFile() string { return filepath.Join(ca.o.StateDir, "enrolment.pem") }

// storeEnrolment writes one file, the intermediate first, so that it and its
// roots are never of two enrolments.
func (ca *CA) storeEnrolment(is *issuer) error {
	certs := []*x509.Certificate{is.cert}
	for _, der := range is.roots {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		certs = append(certs, root)
	}
	if err := writePEM(ca.enrolmentFile(), certs...); err != nil {
		return fmt.Errorf("store enrolment: %w", err)
	}
	return nil
}

// loadEnrolment takes up a stored enrolment. One that has ended is left
// aside: the node must join again.
func (ca *CA) loadEnrolment() error {
	found, err := statefile.Exists(ca.enrolmentFile())
	if err != nil {
		return err
	}
	if !found {
		ca.setProblem("node %s is not enrolled yet and issues no identities", ca.o.Node)
		return nil
	}
	certs, err := ReadCertificates(ca.enrolmentFile())
	if err != nil {
		return err
	}
	e := Enrolment{TrustDomain: ca.o.TrustDomain, Intermediate: certs[0].Raw}
	for _, root := range certs[1:] {
		e.Roots = append(e.Roots, root.Raw)
	}
	is, err := ca.checkEnrolment(e)
	if err != nil {
		ca.setProblem("the stored enrolment of node %s is not usable and it issues no identities; give it a new join token: %v", ca.o.Node, err)
		return nil
	}
	is.since = is.cert.NotBefore.Add(Backdate)
	ca.issuer.Store(is)
	return nil
}

func (ca *CA) keepEnrolled(ctx context.Context) error {
	retry := enrolRetryMin
	due := time.Time{}
	if is := ca.issuer.Load(); is != nil {
		due = renewAt(is.since, is.cert.NotAfter)
	}
	for {
		if !sleep(ctx, min(due.Sub(wall(ca.now())), clockStep)) {
			return nil
		}
		if due.After(wall(ca.now())) {
			continue
		}
		err := ca.Enroll(ctx)
		switch {
		case err == nil:
			retry = enrolRetryMin
			is := ca.issuer.Load()
			due = renewAt(is.since, is.cert.NotAfter)
		case ctx.Err() != nil:
			return nil
		default:
			ca.log.Warn("enrol", "node", ca.o.Node, "error", err, "retry", retry)
			due = wall(ca.now()).Add(jitter(retry))
			retry = min(2*retry, enrolRetryMax)
		}
	}
}

// clockStep bounds a wait: timers stand still while a machine is suspended,
// the life of certificates does not.
const clockStep = time.Minute

// wall strips the monotonic reading, which a suspended machine stops.
func wall(t time.Time) time.Time { return t.Round(0) }

// renewAt is the half of a life, a tenth of it earlier or later, so that
// what was issued together is not renewed together.
func renewAt(since, until time.Time) time.Time {
	since = wall(since)
	life := until.Sub(since)
	return since.Add(life*2/5 + time.Duration(randomBelow(int64(life/5))))
}

func jitter(d time.Duration) time.Duration { return d - d/4 + time.Duration(randomBelow(int64(d/2))) }

func randomBelow(n int64) int64 {
	if n <= 0 {
		return 0
	}
	return randv2.Int64N(n)
}

// sleep returns false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

const maxPEMFile = 256 << 10

// ReadCertificates reads a file of one or more PEM certificates and nothing
// else, at most 256 KiB.
func ReadCertificates(path string) ([]*x509.Certificate, error) {
	b, err := statefile.Read(path, maxPEMFile)
	if err != nil {
		return nil, fmt.Errorf("read certificates: %w", err)
	}
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("read certificates %s: a PEM block of type %q", path, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("read certificates %s: %w", path, err)
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 || len(bytes.TrimSpace(b)) != 0 {
		return nil, fmt.Errorf("read certificates %s: not PEM; remove the file to make a new one", path)
	}
	return certs, nil
}

func writePEM(path string, certs ...*x509.Certificate) error {
	var b bytes.Buffer
	for _, c := range certs {
		if err := pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			return err
		}
	}
	return statefile.Write(path, b.Bytes())
}
