// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// enrollerFunc stands in for the authority, which is another process; current
// is nil when the node joins.
type enrollerFunc func(csr []byte, current *tls.Certificate) (Enrolment, error)

func (f enrollerFunc) Join(_ context.Context, csr []byte) (Enrolment, error) { return f(csr, nil) }
func (f enrollerFunc) Renew(_ context.Context, csr []byte, current tls.Certificate, _ [][]byte) (Enrolment, error) {
	return f(csr, &current)
}

// issuing answers as an authority with that scope does.
func issuing(t testing.TB, authority *CA, scope *Scope) enrollerFunc {
	return func(csr []byte, _ *tls.Certificate) (Enrolment, error) {
		der, err := authority.Issue(csr, *scope, time.Hour)
		if err != nil {
			t.Errorf("issue: %v", err)
		}
		return Enrolment{TrustDomain: "td", Intermediate: der, Roots: authority.Trust().Roots}, err
	}
}

func TestEnrolledNode(t *testing.T) {
	authority := openCA(t, CAOptions{StateDir: t.TempDir(), Authority: true, Node: "authority"})
	scope := scopeOf(t, "n1", testID)
	dir := t.TempDir()
	o := CAOptions{StateDir: dir, Enroller: issuing(t, authority, &scope)}
	ca := openCA(t, o)
	csr := csrOf(t, newKey(t))
	if _, err := ca.Sign(csr, testID, 0); err == nil {
		t.Fatal("signed before it was enrolled")
	} else if reason, _ := ReasonOf(err); reason != flow.ReasonEnrolmentMissing {
		t.Errorf("%v", err)
	}
	if !strings.Contains(ca.Problem(), "not enrolled") || ca.Trust().Roots != nil {
		t.Errorf("problem %q, trust %v", ca.Problem(), ca.Trust())
	}
	changed := ca.Changed()
	if err := ca.Enroll(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody was told")
	}
	if ca.Problem() != "" {
		t.Errorf("problem %q", ca.Problem())
	}
	chain, err := ca.Sign(csr, testID, 0)
	if err != nil || len(chain) != 2 {
		t.Fatalf("%d certificates, %v; want leaf and intermediate", len(chain), err)
	}
	verifier := NewVerifier(VerifierOptions{Bundle: bundleOf(t, authority.Trust())})
	if peer, err := verifier.VerifyDER(chain, RoleServer, time.Now()); err != nil || peer.ID != testID || peer.Node != "n1" {
		t.Errorf("%+v, %v", peer, err)
	}
	if _, err := ca.Sign(csr, "spiffe://td/b", 0); err == nil {
		t.Error("signed an ID outside its scope")
	} else if reason, _ := ReasonOf(err); reason != flow.ReasonScope {
		t.Errorf("%v", err)
	}

	// A restart keeps the enrolment and asks nobody.
	o.Enroller = enrollerFunc(func([]byte, *tls.Certificate) (Enrolment, error) {
		t.Error("asked the authority")
		return Enrolment{}, errors.New("no")
	})
	again := openCA(t, o)
	if s, limited := again.Scope(); !limited || s.Node != "n1" || !slices.Equal(s.IDs, scope.IDs) {
		t.Errorf("scope %+v, %v", s, limited)
	}
	if _, err := again.Sign(csr, testID, 0); err != nil {
		t.Error(err)
	}
	// After the intermediate's end it does not sign, and says what to do.
	o.Now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	late := openCA(t, o)
	if _, err := late.Sign(csr, testID, 0); err == nil || !strings.Contains(late.Problem(), "new join token") {
		t.Errorf("%v, problem %q", err, late.Problem())
	}
}

// A node with a changed CA signs outside its scope; peers refuse it.
func TestLeafOutsideScopeIsRefusedByPeers(t *testing.T) {
	authority := openCA(t, CAOptions{StateDir: t.TempDir(), Authority: true, Node: "authority"})
	scope := scopeOf(t, "n1", testID)
	ca := openCA(t, CAOptions{StateDir: t.TempDir(), Enroller: issuing(t, authority, &scope)})
	if err := ca.Enroll(t.Context()); err != nil {
		t.Fatal(err)
	}
	honest := ca.issuer.Load()
	wider := *honest
	wider.scope = nil
	ca.issuer.Store(&wider)
	chain, err := ca.Sign(csrOf(t, newKey(t)), "spiffe://td/stolen", 0)
	if err != nil {
		t.Fatal(err)
	}
	verifier := NewVerifier(VerifierOptions{Bundle: bundleOf(t, authority.Trust())})
	_, err = verifier.VerifyDER(chain, RoleClient, time.Now())
	if reason, _ := ReasonOf(err); reason != flow.ReasonScope {
		t.Errorf("%v; want certificate_scope", err)
	}
}

func TestEnrolmentIsChecked(t *testing.T) {
	authority := openCA(t, CAOptions{StateDir: t.TempDir(), Authority: true, Node: "authority"})
	other := openCA(t, CAOptions{StateDir: t.TempDir(), Authority: true, Node: "authority"})
	scope, another := scopeOf(t, "n1", testID), scopeOf(t, "n2", testID)
	issue := func(scope Scope, csr []byte) []byte {
		der, err := authority.Issue(csr, scope, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	for name, c := range map[string]struct {
		answer func(csr []byte) Enrolment
		want   string
	}{
		"trust domain": {func(csr []byte) Enrolment {
			return Enrolment{TrustDomain: "x", Intermediate: issue(scope, csr), Roots: authority.Trust().Roots}
		}, "of trust domain"},
		"not DER": {func([]byte) Enrolment {
			return Enrolment{TrustDomain: "td", Intermediate: []byte("x"), Roots: authority.Trust().Roots}
		}, "parse intermediate"},
		"no roots": {func(csr []byte) Enrolment { return Enrolment{TrustDomain: "td", Intermediate: issue(scope, csr)} }, "unknown authority"},
		"other roots": {func(csr []byte) Enrolment {
			return Enrolment{TrustDomain: "td", Intermediate: issue(scope, csr), Roots: other.Trust().Roots}
		}, "unknown authority"},
		"root not DER": {func(csr []byte) Enrolment {
			return Enrolment{TrustDomain: "td", Intermediate: issue(scope, csr), Roots: [][]byte{{1}}}
		}, "parse root"},
		"another node": {func(csr []byte) Enrolment {
			return Enrolment{TrustDomain: "td", Intermediate: issue(another, csr), Roots: authority.Trust().Roots}
		}, "names node n2, this is node n1"},
		"another key": {func([]byte) Enrolment {
			return Enrolment{TrustDomain: "td", Intermediate: issue(scope, csrOf(t, newKey(t))), Roots: authority.Trust().Roots}
		}, "not over this node's key"},
		"a root": {func([]byte) Enrolment {
			return Enrolment{TrustDomain: "td", Intermediate: authority.Trust().Roots[0], Roots: authority.Trust().Roots}
		}, "lists no scope"},
		"a leaf": {func(csr []byte) Enrolment {
			chain, err := authority.Sign(csr, testID, 0)
			if err != nil {
				t.Fatal(err)
			}
			return Enrolment{TrustDomain: "td", Intermediate: chain[0], Roots: authority.Trust().Roots}
		}, "lists no scope"},
	} {
		ca := openCA(t, CAOptions{StateDir: t.TempDir(), Enroller: enrollerFunc(func(csr []byte, _ *tls.Certificate) (Enrolment, error) {
			return c.answer(csr), nil
		})})
		if err := ca.Enroll(t.Context()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", name, err, c.want)
		}
		if _, err := ca.Sign(csrOf(t, newKey(t)), testID, 0); err == nil {
			t.Errorf("%s: it signs", name)
		}
	}
}

func TestVerifyNodeRefuses(t *testing.T) {
	root := newRoot(t)
	scope := scopeOf(t, "n1", testID)
	roots := []*x509.Certificate{root.cert}
	if got, err := VerifyNode(root.intermediate(t, &scope, nil).cert, roots, testNow); err != nil || got.Node != "n1" {
		t.Fatalf("%+v, %v", got, err)
	}
	for name, c := range map[string]struct {
		change func(*x509.Certificate)
		at     time.Duration
		reason flow.Reason
	}{
		"path length 1":   {func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false }, 0, flow.ReasonCertKeyUsage},
		"no path length":  {func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = -1, false }, 0, flow.ReasonCertKeyUsage},
		"not a CA":        {func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false }, 0, flow.ReasonCertKeyUsage},
		"no keyCertSign":  {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }, 0, flow.ReasonCertKeyUsage},
		"no scope":        {func(c *x509.Certificate) { c.ExtraExtensions = nil }, 0, flow.ReasonScope},
		"not critical":    {func(c *x509.Certificate) { c.ExtraExtensions[0].Critical = false }, 0, flow.ReasonScope},
		"ended":           {nil, 2 * time.Hour, flow.ReasonCertExpired},
		"not begun":       {nil, -2 * time.Hour, flow.ReasonCertNotYet},
		"of another root": {nil, 0, flow.ReasonCertUntrusted},
	} {
		ca := root
		if name == "of another root" {
			ca = newRoot(t)
		}
		scope := scopeOf(t, "n1", testID)
		_, err := VerifyNode(ca.intermediate(t, &scope, c.change).cert, roots, testNow.Add(c.at))
		if reason, _ := ReasonOf(err); reason != c.reason {
			t.Errorf("%s: %v; want %s", name, err, c.reason)
		}
	}
}

// The intermediate is renewed at about its half; while the authority is
// down the node works on until the end, and recovers.
func TestRunRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		authority := openCA(t, CAOptions{StateDir: t.TempDir(), Authority: true, Node: "authority"})
		scope := scopeOf(t, "n1", testID)
		answer := issuing(t, authority, &scope)
		var joins, renewals atomic.Int32
		var down atomic.Bool
		ca := openCA(t, CAOptions{StateDir: t.TempDir(), Enroller: enrollerFunc(func(csr []byte, current *tls.Certificate) (Enrolment, error) {
			if down.Load() {
				return Enrolment{}, errors.New("connection refused")
			}
			if current == nil {
				joins.Add(1)
			} else {
				renewals.Add(1)
			}
			return answer(csr, current)
		})})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- ca.Run(ctx) }()
		csr := csrOf(t, newKey(t))
		synctest.Wait()
		start := time.Now()
		if joins.Load() != 1 || renewals.Load() != 0 {
			t.Fatalf("%d joins, %d renewals; want 1, 0", joins.Load(), renewals.Load())
		}
		time.Sleep(23 * time.Minute)
		if renewals.Load() != 0 {
			t.Errorf("renewed before two fifths of its life")
		}
		time.Sleep(14 * time.Minute)
		synctest.Wait()
		if joins.Load() != 1 || renewals.Load() != 1 {
			t.Errorf("%d joins, %d renewals after %v; want 1, 1", joins.Load(), renewals.Load(), time.Since(start))
		}
		down.Store(true)
		time.Sleep(42 * time.Minute)
		synctest.Wait()
		if _, err := ca.Sign(csr, testID, 0); err != nil {
			t.Errorf("with the authority down: %v", err)
		}
		if !strings.Contains(ca.Problem(), "cannot be renewed") {
			t.Errorf("problem %q", ca.Problem())
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if _, err := ca.Sign(csr, testID, 0); err == nil {
			t.Error("signed after the intermediate's end")
		}
		if !strings.Contains(ca.Problem(), "new join token") {
			t.Errorf("problem %q", ca.Problem())
		}
		down.Store(false)
		time.Sleep(2 * enrolRetryMax)
		synctest.Wait()
		if _, err := ca.Sign(csr, testID, 0); err != nil || joins.Load() != 2 || ca.Problem() != "" {
			t.Errorf("after it came back: %v, %d joins, problem %q", err, joins.Load(), ca.Problem())
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func FuzzEnrolment(f *testing.F) {
	authority := openCA(f, CAOptions{StateDir: f.TempDir(), Authority: true, Node: "authority"})
	scope := scopeOf(f, "n1", testID)
	ca := openCA(f, CAOptions{StateDir: f.TempDir(), Enroller: enrollerFunc(nil)})
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, ca.key)
	if err != nil {
		f.Fatal(err)
	}
	der, err := authority.Issue(csr, scope, 24*time.Hour)
	if err != nil {
		f.Fatal(err)
	}
	root := authority.Trust().Roots[0]
	f.Add("td", der, root)
	f.Add("td", root, root)
	f.Add("other", der, root)
	f.Add("td", []byte{0x30}, []byte{})
	f.Fuzz(func(t *testing.T, domain string, intermediate, root []byte) {
		is, err := ca.checkEnrolment(Enrolment{TrustDomain: domain, Intermediate: intermediate, Roots: [][]byte{root}})
		if err == nil && (domain != "td" || is.scope.Node != "n1" || !samePublicKey(is.cert, ca.key)) {
			t.Errorf("took %q with scope %+v", domain, is.scope)
		}
	})
}
