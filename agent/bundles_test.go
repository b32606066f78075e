// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/agent/config"
)

// rootOf makes a root with these URIs, as PEM.
func rootOf(t *testing.T, key *ecdsa.PrivateKey, ca bool, uris ...string) string {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), IsCA: ca, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
	for _, text := range uris {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		c.URIs = append(c.URIs, u)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// TestReadBundles holds that a file's roots speak for the domain that the
// operator named, and for no other whatever the file says.
func TestReadBundles(t *testing.T) {
	dir := t.TempDir()
	newKey := func() *ecdsa.PrivateKey {
		t.Helper()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	key := newKey()
	for name, text := range map[string]string{
		"plain": rootOf(t, key, true), "named": rootOf(t, newKey(), true, "spiffe://b.example"), "web": rootOf(t, newKey(), true, "https://b.example"),
		"two": rootOf(t, newKey(), true) + rootOf(t, newKey(), true), "leaf": rootOf(t, newKey(), false),
		"path": rootOf(t, newKey(), true, "spiffe://b.example/x"), "text": "hello", "none": "",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for what, c := range map[string]struct {
		bundles []string // DOMAIN=NAME
		roots   int
		want    string // of the error
	}{
		"nothing":                     {nil, 0, ""},
		"a root without a name":       {[]string{"b.example=plain"}, 1, ""},
		"one that names its domain":   {[]string{"b.example=named"}, 1, ""},
		"one with another URI":        {[]string{"b.example=web"}, 1, ""},
		"two in a file":               {[]string{"b.example=two"}, 2, ""},
		"two files of a domain":       {[]string{"b.example=plain", "b.example=two"}, 3, ""},
		"one that names another":      {[]string{"c.example=named"}, 0, "is of spiffe://b.example, not of c.example"},
		"one that names a workload":   {[]string{"b.example=path"}, 0, "is of spiffe://b.example/x, not of b.example"},
		"our own domain":              {[]string{"example.org=plain"}, 0, "this node's own trust domain"},
		"one key for two domains":     {[]string{"b.example=plain", "c.example=plain"}, 0, "would speak for both b.example and c.example"},
		"a certificate that is no CA": {[]string{"b.example=leaf"}, 0, "is not a CA"},
		"no certificate":              {[]string{"b.example=text"}, 0, "not PEM"},
		"an empty file":               {[]string{"b.example=none"}, 0, "not PEM"},
		"no file":                     {[]string{"b.example=missing"}, 0, "no such file"},
	} {
		var bundles []config.Bundle
		for _, b := range c.bundles {
			domain, name, _ := strings.Cut(b, "=")
			bundles = append(bundles, config.Bundle{Domain: domain, File: filepath.Join(dir, name)})
		}
		got, err := readBundles(bundles, "example.org")
		roots := 0
		for _, d := range got {
			roots += len(d.Roots)
			if !d.Foreign {
				t.Errorf("%s: %s is taken for our own", what, d.Name)
			}
		}
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) || roots != c.roots {
			t.Errorf("%s: %d roots, %v; want %d, %q", what, roots, err, c.roots, c.want)
		}
	}
}
