// SPDX-License-Identifier: Apache-2.0

package appcerts

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

var now = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)

func keyOf(t testing.TB, kind string) crypto.Signer {
	t.Helper()
	var key crypto.Signer
	var err error
	switch kind {
	case "P-256":
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "P-224":
		key, err = ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	case "Ed25519":
		_, key, err = ed25519.GenerateKey(rand.Reader)
	case "RSA":
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// write makes a certificate over the key, and both their files.
func write(t testing.TB, dir string, key crypto.Signer, change func(*x509.Certificate)) Source {
	t.Helper()
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), DNSNames: []string{"app.example"}}
	if change != nil {
		change(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	src := Source{API: "shop/web", Certificate: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}
	for name, block := range map[string]*pem.Block{src.Certificate: {Type: "CERTIFICATE", Bytes: der}, src.Key: {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return src
}

func newStore() *Store { return New(func() time.Time { return now }) }

// TestRead holds what is taken, what is taken and told, and what is not taken.
func TestRead(t *testing.T) {
	for name, c := range map[string]struct {
		kind    string
		change  func(*x509.Certificate)
		spoil   func(t *testing.T, src Source) error
		shown   bool
		problem string
	}{
		"good":           {kind: "P-256", shown: true},
		"Ed25519":        {kind: "Ed25519", shown: true},
		"RSA":            {kind: "RSA", shown: true},
		"a weak key":     {kind: "P-224", problem: "P-224"},
		"ended":          {kind: "P-256", change: func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) }, shown: true, problem: "ended at"},
		"not yet":        {kind: "P-256", change: func(c *x509.Certificate) { c.NotBefore = now.Add(time.Minute) }, shown: true, problem: "begins at"},
		"no name":        {kind: "P-256", change: func(c *x509.Certificate) { c.DNSNames = nil }, shown: true, problem: "names no host"},
		"no certificate": {kind: "P-256", spoil: func(_ *testing.T, s Source) error { return os.Remove(s.Certificate) }, problem: "no such file"},
		"no key":         {kind: "P-256", spoil: func(_ *testing.T, s Source) error { return os.Remove(s.Key) }, problem: "no such file"},
		"not PEM":        {kind: "P-256", spoil: func(_ *testing.T, s Source) error { return os.WriteFile(s.Certificate, []byte("x"), 0o600) }, problem: "PEM"},
		"a key for all":  {kind: "P-256", spoil: func(_ *testing.T, s Source) error { return os.Chmod(s.Key, 0o644) }, problem: "everybody may read"},
		"a pipe":         {kind: "P-256", spoil: func(_ *testing.T, s Source) error { return pipe(s.Certificate) }, problem: "not a regular file"},
		"a huge file":    {kind: "P-256", spoil: func(_ *testing.T, s Source) error { return os.Truncate(s.Certificate, maxFile+1) }, problem: "more than"},
		"another's key": {kind: "P-256", spoil: func(t *testing.T, s Source) error {
			return os.Rename(write(t, t.TempDir(), keyOf(t, "P-256"), nil).Key, s.Key)
		}, problem: "does not match"},
	} {
		t.Run(name, func(t *testing.T) {
			src := write(t, t.TempDir(), keyOf(t, c.kind), c.change)
			if c.spoil != nil {
				if err := c.spoil(t, src); err != nil {
					t.Fatal(err)
				}
			}
			s := newStore()
			s.Set([]Source{src})
			got := s.Certificates()
			if len(got) != 1 || got[0].API != src.API || (got[0].Chain != nil) != c.shown || (got[0].Err == nil) != c.shown {
				t.Errorf("shown %+v", got)
			}
			if err := s.Problem(); (err == nil) != (c.problem == "") || err != nil && !strings.Contains(err.Error(), c.problem) {
				t.Errorf("problem %v, want %q", err, c.problem)
			}
		})
	}
}

// TestRoots holds what is taken of an application's CA, and that a broken one
// leaves what was there while another one does not.
func TestRoots(t *testing.T) {
	dir := t.TempDir()
	src := write(t, dir, keyOf(t, "P-256"), nil)
	good, err := os.ReadFile(src.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(src.Key)
	if err != nil {
		t.Fatal(err)
	}
	src.CA = filepath.Join(dir, "ca.pem")
	put := func(content []byte) {
		t.Helper()
		if err := os.WriteFile(src.CA, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		content []byte
		problem string
	}{
		"nothing":            {nil, "holds no certificate"},
		"text":               {[]byte("roots"), "holds no certificate"},
		"a key":              {slices.Concat(good, key), `holds a "PRIVATE KEY" beside certificates`},
		"no certificate":     {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1, 2, 3}}), "x509"},
		"too many":           {bytes.Repeat(good, maxRoots+1), "more than 100 certificates"},
		"more than a file":   {bytes.Repeat([]byte("x"), maxFile+1), "read ca of shop/web"},
		"two, for control":   {slices.Concat(good, good), ""},
		"one, among remarks": {slices.Concat([]byte("# ours\n"), good, []byte("\n# end\n")), ""},
	} {
		put(c.content)
		s := newStore()
		s.Set([]Source{src})
		got := s.Certificates()[0]
		if (got.Roots != nil) != (c.problem == "") || (got.Err == nil) != (c.problem == "") || got.Chain == nil {
			t.Errorf("%s: %+v", name, got)
		}
		if err := s.Problem(); (err == nil) != (c.problem == "") || err != nil && !strings.Contains(err.Error(), c.problem) {
			t.Errorf("%s: %v", name, err)
		}
	}
	put(good)
	s := newStore()
	s.Set([]Source{src})
	put([]byte("half"))
	s.Reread()
	if got := s.Certificates()[0]; got.Roots == nil || s.Problem() == nil {
		t.Errorf("a broken one: %+v, %v", got, s.Problem())
	}
	put(good)
	if err := os.Chmod(src.CA, 0o646); err != nil {
		t.Fatal(err)
	}
	s = newStore()
	s.Set([]Source{src})
	if got := s.Certificates()[0]; got.Roots != nil || got.Err == nil || !strings.Contains(got.Err.Error(), "chmod o-w") {
		t.Errorf("one that everybody may change: %+v", got)
	}
	src.CA = filepath.Join(dir, "elsewhere.pem")
	s.Set([]Source{src})
	if got := s.Certificates()[0]; got.Roots != nil || got.Err == nil || got.Chain == nil {
		t.Errorf("another one, which is not there: %+v", got)
	}
}

// TestTotalIsBounded holds that what does not fit into one message is left out
// and told, and that the rest is shown.
func TestTotalIsBounded(t *testing.T) {
	dir := t.TempDir()
	src := write(t, dir, keyOf(t, "P-256"), nil)
	leaf, err := os.ReadFile(src.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	src.CA = filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(src.CA, bytes.Repeat(leaf, maxRoots), 0o600); err != nil {
		t.Fatal(err)
	}
	var list []Source
	for i := range 20 {
		one := src
		one.API = fmt.Sprintf("shop/web%02d", i)
		list = append(list, one)
	}
	s := newStore()
	s.Set(list)
	total, shown := 0, 0
	for i, c := range s.Certificates() {
		for _, der := range slices.Concat(c.Chain, c.Roots) {
			total += len(der)
		}
		if (c.Chain != nil) != (c.Roots != nil) || (c.Err == nil) != (c.Chain != nil) || c.Chain != nil && shown < i {
			t.Errorf("%s: %d certificates, %d roots, %v", c.API, len(c.Chain), len(c.Roots), c.Err)
		}
		if c.Chain != nil {
			shown++
		}
	}
	if shown == 0 || shown == len(list) || total > MaxTotal || total < MaxTotal*3/4 {
		t.Errorf("%d are shown, of %d bytes", shown, total)
	}
	if err := s.Problem(); err == nil || !strings.Contains(err.Error(), "bytes together") {
		t.Errorf("problem %v", err)
	}
	s.Set(list[:1])
	if err := s.Problem(); err != nil || s.Certificates()[0].Chain == nil {
		t.Errorf("one alone: %v", err)
	}
}

func pipe(path string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return syscall.Mkfifo(path, 0o600)
}

// TestReread holds that a new pair is taken over, and that a broken one leaves
// what was there.
func TestReread(t *testing.T) {
	dir := t.TempDir()
	src := write(t, dir, keyOf(t, "P-256"), nil)
	s := newStore()
	s.Set([]Source{src})
	first := s.Certificates()[0].Chain[0]
	if err := os.WriteFile(src.Key, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Reread()
	if got := s.Certificates()[0]; !bytes.Equal(got.Chain[0], first) || s.Problem() == nil {
		t.Errorf("a broken pair: %+v, %v", got, s.Problem())
	}
	if _, err := s.Sign(src.API, message(), crypto.SHA256, false); err != nil {
		t.Errorf("with the pair of before: %v", err)
	}
	write(t, dir, keyOf(t, "P-256"), nil)
	s.Reread()
	if got := s.Certificates()[0]; bytes.Equal(got.Chain[0], first) || s.Problem() != nil {
		t.Errorf("a new pair: %+v, %v", got, s.Problem())
	}
	good := s.Certificates()[0].Chain[0]
	write(t, dir, keyOf(t, "P-256"), func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) })
	s.Reread()
	s.Set([]Source{{API: src.API, Certificate: src.Certificate, Key: filepath.Join(dir, "elsewhere.pem")}})
	if got := s.Certificates()[0]; !bytes.Equal(got.Chain[0], good) || s.Problem() == nil {
		t.Errorf("one that has ended, and a path that leads nowhere, in place of a good one: %+v, %v", got, s.Problem())
	}
	s.Set(nil)
	if len(s.Certificates()) != 0 || s.Problem() != nil {
		t.Error("what no policy names is still there")
	}
	if _, err := s.Sign(src.API, message(), crypto.SHA256, false); err == nil {
		t.Error("it is still signed with")
	}
}

func message() []byte {
	transcript := sha256.Sum256([]byte("a handshake"))
	return append(append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, server CertificateVerify\x00"...), transcript[:]...)
}

// TestSign holds that a key signs handshakes of a server and nothing else.
func TestSign(t *testing.T) {
	s := newStore()
	keys := map[string]crypto.Signer{}
	var list []Source
	for _, kind := range []string{"P-256", "Ed25519", "RSA"} {
		keys[kind] = keyOf(t, kind)
		src := write(t, t.TempDir(), keys[kind], nil)
		src.API = kind
		list = append(list, src)
	}
	s.Set(list)
	client := bytes.Replace(message(), []byte("server"), []byte("client"), 1)
	for _, c := range []struct {
		name, api string
		message   []byte
		hash      crypto.Hash
		pss       bool
		ok        bool
	}{
		{"ECDSA", "P-256", message(), crypto.SHA256, false, true},
		{"Ed25519", "Ed25519", message(), 0, false, true},
		{"RSA-PSS", "RSA", message(), crypto.SHA384, true, true},
		{"RSA PKCS #1", "RSA", message(), crypto.SHA256, false, false},
		{"RSA without a hash", "RSA", message(), 0, true, false},
		{"ECDSA without a hash", "P-256", message(), 0, false, false},
		{"ECDSA as PSS", "P-256", message(), crypto.SHA256, true, false},
		{"SHA-1", "P-256", message(), crypto.SHA1, false, false},
		{"a hash that is none", "P-256", message(), 99, false, false},
		{"Ed25519 with a hash", "Ed25519", message(), crypto.SHA512, false, false},
		{"a client's handshake", "P-256", client, crypto.SHA256, false, false},
		{"a longer text", "P-256", append(message(), 'x'), crypto.SHA256, false, false},
		{"a shorter text", "P-256", message()[:100], crypto.SHA256, false, false},
		{"anything", "P-256", []byte("a certificate to be signed"), crypto.SHA256, false, false},
		{"nothing", "P-256", nil, crypto.SHA256, false, false},
		{"nobody's", "none", message(), crypto.SHA256, false, false},
	} {
		signature, err := s.Sign(c.api, c.message, c.hash, c.pss)
		if (err == nil) != c.ok || (signature != nil) != c.ok {
			t.Errorf("%s: %x, %v", c.name, signature, err)
		}
		if !c.ok {
			continue
		}
		digest := sha256.Sum256(c.message)
		switch public := keys[c.api].Public().(type) {
		case *ecdsa.PublicKey:
			if !ecdsa.VerifyASN1(public, digest[:], signature) {
				t.Errorf("%s: does not verify", c.name)
			}
		case ed25519.PublicKey:
			if !ed25519.Verify(public, c.message, signature) {
				t.Errorf("%s: does not verify", c.name)
			}
		}
	}
}

// FuzzSign holds that whatever is asked for, no signature comes of anything
// but a server's handshake.
func FuzzSign(f *testing.F) {
	s := newStore()
	s.Set([]Source{write(f, f.TempDir(), keyOf(f, "P-256"), nil)})
	f.Add(message(), uint32(crypto.SHA256), false)
	f.Add([]byte("x"), uint32(0), true)
	f.Fuzz(func(t *testing.T, b []byte, hash uint32, pss bool) {
		signature, err := s.Sign("shop/web", b, crypto.Hash(hash), pss)
		if err == nil && (signature == nil || !bytes.HasPrefix(b, verifyPrefix)) {
			t.Errorf("signed %q", b)
		}
	})
}
