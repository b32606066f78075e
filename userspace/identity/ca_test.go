// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/tpm"
	"github.com/sallyport-dev/sallyport/userspace/tpm/tpmtest"
)

func openCA(t testing.TB, o CAOptions) *CA {
	t.Helper()
	if o.TrustDomain == "" {
		o.TrustDomain = "td"
	}
	if o.Node == "" {
		o.Node = "n1"
	}
	if o.TPM == "" {
		o.TPM = "none"
	}
	ca, err := OpenCA(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ca.Close() })
	return ca
}

func bundleOf(t testing.TB, domains ...TrustDomain) *Bundle {
	t.Helper()
	b, err := NewBundle(domains)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSignEmbedded(t *testing.T) {
	now := testNow.Add(300 * time.Millisecond)
	ca := openCA(t, CAOptions{StateDir: t.TempDir(), Now: func() time.Time { return now }})
	chain, err := ca.Sign(csrOf(t, newKey(t), "spiffe://td/other"), testID, 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 1 {
		t.Fatalf("%d certificates, want the leaf alone", len(chain))
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if id, err := leafID(leaf); err != nil || id.String() != testID {
		t.Errorf("the leaf names %v (%v): the request's own name must not count", id, err)
	}
	if want := testNow.Add(10*time.Minute + time.Second); !leaf.NotAfter.Equal(want) {
		t.Errorf("NotAfter %v, want %v", leaf.NotAfter, want)
	}
	if want := testNow.Add(-30 * time.Second); !leaf.NotBefore.Equal(want) {
		t.Errorf("NotBefore %v, want %v", leaf.NotBefore, want)
	}
	if leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.ExtKeyUsage) != 2 || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 || leaf.IsCA {
		t.Errorf("usage %v %v, names %v", leaf.KeyUsage, leaf.ExtKeyUsage, leaf.DNSNames)
	}
	verifier := NewVerifier(VerifierOptions{Bundle: bundleOf(t, ca.Trust())})
	for _, role := range []Role{RoleClient, RoleServer} {
		if peer, err := verifier.VerifyDER(chain, role, now); err != nil || peer.ID != testID || peer.Node != "" {
			t.Errorf("%s: %+v, %v", role, peer, err)
		}
	}
	if _, limited := ca.Scope(); limited {
		t.Error("a root is limited")
	}
}

func TestSignRefuses(t *testing.T) {
	ca := openCA(t, CAOptions{StateDir: t.TempDir()})
	good := csrOf(t, newKey(t))
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Setenv("GODEBUG", "rsa1024min=0")
		if small, err = rsa.GenerateKey(rand.Reader, 1024); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		csr    []byte
		id     string
		reason flow.Reason
	}{
		"not DER":      {[]byte("x"), testID, flow.ReasonCertMalformed},
		"huge":         {make([]byte, maxRequest+1), testID, flow.ReasonCertMalformed},
		"forged":       {forged, testID, flow.ReasonCertKeyUnproven},
		"P-521":        {csrOf(t, p521), testID, flow.ReasonCertKey},
		"RSA 1024":     {csrOf(t, small), testID, flow.ReasonCertKey},
		"trust domain": {good, "spiffe://other/a", flow.ReasonCertTrustDomain},
		"bad id":       {good, "spiffe://td/a/", flow.ReasonCertID},
	} {
		chain, err := ca.Sign(c.csr, c.id, 0)
		if reason, _ := ReasonOf(err); reason != c.reason || chain != nil {
			t.Errorf("%s: %v; want %s", name, err, c.reason)
		}
	}
	for _, ttl := range []time.Duration{-1, time.Second, 25 * time.Hour} {
		if _, err := ca.Sign(good, testID, ttl); err == nil {
			t.Errorf("a leaf for %v", ttl)
		}
	}
	if _, err := ca.Issue(good, scopeOf(t, "n2", testID), time.Hour); err == nil {
		t.Error("a node's root issued an intermediate")
	}
}

func TestRootSurvivesRestart(t *testing.T) {
	dir := t.TempDir()
	first := openCA(t, CAOptions{StateDir: dir})
	second := openCA(t, CAOptions{StateDir: dir})
	if !bytes.Equal(first.Trust().Roots[0], second.Trust().Roots[0]) {
		t.Error("another root after the restart")
	}
	if !strings.Contains(second.Banner(), "NO TPM") || second.Anchor() != flow.AnchorSoftware {
		t.Errorf("banner %q, anchor %v", second.Banner(), second.Anchor())
	}
	// In its last year the root is issued anew under the same key, and what
	// trusts the old one trusts leaves of the new one.
	later := time.Now().Add(rootTTL - rootRenew + time.Hour)
	third := openCA(t, CAOptions{StateDir: dir, Now: func() time.Time { return later }})
	if bytes.Equal(first.Trust().Roots[0], third.Trust().Roots[0]) {
		t.Fatal("the root was not renewed")
	}
	chain, err := third.Sign(csrOf(t, newKey(t)), testID, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewVerifier(VerifierOptions{Bundle: bundleOf(t, first.Trust())}).VerifyDER(chain, RoleClient, later); err != nil {
		t.Errorf("a leaf under the renewed root: %v", err)
	}
}

// A command and the server may both be the first.
func TestFirstOpenAtOnce(t *testing.T) {
	dir := t.TempDir()
	roots := make([]string, 8)
	var group sync.WaitGroup
	for i := range roots {
		group.Go(func() {
			ca, err := OpenCA(CAOptions{StateDir: dir, TrustDomain: "td", Node: "n1", TPM: "none"})
			if err != nil {
				t.Error(err)
				return
			}
			defer ca.Close()
			roots[i] = string(ca.Trust().Roots[0])
		})
	}
	group.Wait()
	if slices.Sort(roots); len(slices.Compact(roots)) != 1 {
		t.Error("more than one root was made")
	}
}

func TestSignRefusesOutsideTheIssuersLife(t *testing.T) {
	now := time.Now()
	ca := openCA(t, CAOptions{StateDir: t.TempDir(), Now: func() time.Time { return now }})
	csr := csrOf(t, newKey(t))
	now = now.Add(rootTTL - time.Minute)
	chain, err := ca.Sign(csr, testID, 10*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(ca.Trust().Roots[0])
	if err != nil {
		t.Fatal(err)
	}
	if leaf.NotAfter.After(root.NotAfter) {
		t.Errorf("the leaf outlives its issuer: %v, %v", leaf.NotAfter, root.NotAfter)
	}
	for _, at := range []time.Duration{2 * time.Minute, -rootTTL - 2*time.Hour} {
		saved := now
		now = now.Add(at)
		if _, err := ca.Sign(csr, testID, 0); err == nil {
			t.Errorf("signed at %v", now)
		} else if reason, _ := ReasonOf(err); reason != flow.ReasonEnrolmentMissing {
			t.Errorf("%v", err)
		}
		now = saved
	}
}

func TestOpenCAErrors(t *testing.T) {
	touch := func(name string, mode os.FileMode, content string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, []byte(content), mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	keyed := func(then ...func(*testing.T, string)) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			openCA(t, CAOptions{StateDir: dir})
			for _, f := range then {
				f(t, dir)
			}
		}
	}
	remove := func(name string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		prepare func(*testing.T, string)
		change  func(*CAOptions)
		want    string
	}{
		"trust domain":          {nil, func(o *CAOptions) { o.TrustDomain = "TD" }, "in trust domain"},
		"node":                  {nil, func(o *CAOptions) { o.Node = "a/b" }, "node name"},
		"leaf TTL":              {nil, func(o *CAOptions) { o.LeafTTL = time.Second }, "not between 2s"},
		"required but none":     {nil, func(o *CAOptions) { o.RequireTPM = true }, "requireTPM is set and tpm is none"},
		"required, old key":     {keyed(), func(o *CAOptions) { o.RequireTPM, o.TPM = true, "auto" }, "is a software key"},
		"TPM not there":         {nil, func(o *CAOptions) { o.TPM = "/nonexistent/tpm" }, "set tpm to none"},
		"TPM key, tpm none":     {touch("ca.tpmkey", 0o600, ""), nil, "was made in a TPM and tpm is none"},
		"both keys":             {keyed(touch("ca.tpmkey", 0o600, "")), nil, "both"},
		"key readable":          {keyed(func(t *testing.T, d string) { chmod(t, filepath.Join(d, "ca.key"), 0o640) }), nil, "group or others may use it"},
		"secret readable":       {keyed(func(t *testing.T, d string) { chmod(t, filepath.Join(d, "ca.secret"), 0o604) }), nil, "group or others may use it"},
		"directory writable":    {func(t *testing.T, d string) { chmod(t, d, 0o777) }, nil, "may write to it"},
		"secret gone":           {keyed(remove("ca.secret")), nil, "it does not exist; restore it"},
		"another secret":        {keyed(touch("ca.secret", 0o600, strings.Repeat("x", 32))), nil, "another secret"},
		"short secret":          {keyed(touch("ca.secret", 0o600, "x")), nil, "at least 32"},
		"damaged key":           {keyed(touch("ca.key", 0o600, softMagic+"x")), nil, "damaged"},
		"not a key":             {keyed(touch("ca.key", 0o600, "x")), nil, "not a key file"},
		"root gone bad":         {keyed(touch("ca.pem", 0o600, "x")), nil, "not PEM"},
		"root of another key":   {keyed(remove("ca.key")), nil, "its key is not the one"},
		"root of another td":    {keyed(), func(o *CAOptions) { o.TrustDomain = "td2" }, "the configuration says td2"},
		"authority with master": {nil, func(o *CAOptions) { o.Authority, o.Enroller = true, enrollerFunc(nil) }, "cannot enrol"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if c.prepare != nil {
				c.prepare(t, dir)
			}
			o := CAOptions{StateDir: dir, TrustDomain: "td", Node: "n1", TPM: "none"}
			if c.change != nil {
				c.change(&o)
			}
			ca, err := OpenCA(o)
			if err == nil {
				ca.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v; want %q", err, c.want)
			}
		})
	}
}

func chmod(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// The key of a stolen file is worth nothing without its secret, and one name's
// key is not taken for another's.
func TestSoftwareKeyIsEncrypted(t *testing.T) {
	dir := t.TempDir()
	k, err := OpenKey(KeyOptions{Dir: dir, Name: "ca", TPM: "none", SecretFile: filepath.Join(t.TempDir(), "s")})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k.Signer.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := k.Signer.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(b, der) || bytes.Contains(b, scalar) {
		t.Error("the key is in the file as it is")
	}
	if _, err := os.Stat(filepath.Join(dir, "ca.secret")); !errors.Is(err, os.ErrNotExist) {
		t.Error("the secret is not where it was told to be")
	}
	if err := os.Rename(filepath.Join(dir, "ca.key"), filepath.Join(dir, "node.key")); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenKey(KeyOptions{Dir: dir, Name: "node", TPM: "none", SecretFile: filepath.Join(t.TempDir(), "s")}); err == nil {
		t.Error("opened without the secret")
	}
}

func TestCAInTPM(t *testing.T) {
	soft := tpmtest.Start(t)
	dir := t.TempDir()
	ca := openCA(t, CAOptions{StateDir: dir, TPM: soft.Socket, RequireTPM: true})
	if ca.Anchor() != flow.AnchorTPM || ca.Banner() != "" || ca.key.Place != soft.Socket+" (IBM SW   TPM)" {
		t.Errorf("anchor %v, banner %q, place %q", ca.Anchor(), ca.Banner(), ca.key.Place)
	}
	chain, err := ca.Sign(csrOf(t, newKey(t)), testID, 0)
	if err != nil {
		t.Fatal(err)
	}
	ca.Close()
	if _, err := ca.Sign(csrOf(t, newKey(t)), testID, 0); err == nil {
		t.Error("signed after Close")
	}
	soft.Restart(t)
	again := openCA(t, CAOptions{StateDir: dir, TPM: soft.Socket})
	if _, err := NewVerifier(VerifierOptions{Bundle: bundleOf(t, again.Trust())}).VerifyDER(chain, RoleClient, time.Now()); err != nil {
		t.Errorf("a leaf from before the restart: %v", err)
	}
	if _, err := again.Sign(csrOf(t, newKey(t)), testID, 0); err != nil {
		t.Error(err)
	}
	o := CAOptions{StateDir: dir, TrustDomain: "td", Node: "n1", TPM: tpmtest.Start(t).Socket}
	if _, err := OpenCA(o); !errors.Is(err, tpm.ErrForeignKey) {
		t.Errorf("another TPM: %v; want ErrForeignKey", err)
	}
	soft.Stop(t)
	o.TPM = soft.Socket
	if _, err := OpenCA(o); err == nil {
		t.Error("opened without the TPM that holds the key")
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add(csrOf(f, newKey(f), testID))
	f.Add([]byte{0x30, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		request, err := ParseRequest(b)
		if err == nil && CheckKey(request.PublicKey) != nil {
			t.Errorf("accepted a request over %T", request.PublicKey)
		}
	})
}

func BenchmarkSign(b *testing.B) {
	csr := csrOf(b, newKey(b))
	for name, address := range map[string]func() string{"software": func() string { return "none" }, "swtpm": func() string { return tpmtest.Start(b).Socket }} {
		b.Run(name, func(b *testing.B) {
			ca := openCA(b, CAOptions{StateDir: b.TempDir(), TPM: address()})
			for b.Loop() {
				if _, err := ca.Sign(csr, testID, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
