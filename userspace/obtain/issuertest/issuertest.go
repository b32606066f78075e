// SPDX-License-Identifier: Apache-2.0

// Package issuertest is a token issuer for tests: an HTTPS server that gives
// access tokens to clients that show a certificate, bound to it (RFC 6749
// section 4.4, RFC 8705).
package issuertest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// Request is what a client asked for.
type Request struct {
	Form url.Values
	// ID is the URI of the certificate that it showed.
	ID         string
	Thumbprint [32]byte
}

// Issuer gives tokens. Its fields may be changed between requests under Lock.
type Issuer struct {
	sync.Mutex
	URL     string // the iss of its tokens
	Subject string // "" for the client's ID
	Life    time.Duration
	// Pad adds that many bytes to each token.
	Pad int
	// Answer, where it is not nil, answers in place of the issuer, and says
	// whether it has.
	Answer func(http.ResponseWriter, *http.Request) bool

	Certificate tls.Certificate
	Roots       *x509.CertPool
	Root        []byte // DER of the only one of Roots

	t        testing.TB
	key      *ecdsa.PrivateKey
	requests []Request
	changed  chan struct{}
	server   *http.Server
}

// New makes an issuer whose server has that name or address.
func New(t testing.TB, url, host string) *Issuer {
	t.Helper()
	i := &Issuer{URL: url, Life: 5 * time.Minute, t: t, changed: make(chan struct{})}
	var err error
	if i.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "issuer"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if ip := net.ParseIP(host); ip != nil {
		c.IPAddresses = []net.IP{ip}
	} else {
		c.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &i.key.PublicKey, i.key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	i.Certificate, i.Roots, i.Root = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: i.key}, x509.NewCertPool(), der
	i.Roots.AddCert(root)
	return i
}

// JWKS is its key set.
func (i *Issuer) JWKS() []byte {
	point, err := i.key.PublicKey.Bytes()
	if err != nil {
		i.t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	set, err := json.Marshal(map[string]any{"keys": []any{map[string]any{
		"kid": "k1", "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "x": b64(point[1:33]), "y": b64(point[33:])}}})
	if err != nil {
		i.t.Fatal(err)
	}
	return set
}

// Serve serves on a listener, until the test ends or Close.
func (i *Issuer) Serve(l net.Listener) {
	i.server = &http.Server{Handler: i, ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{i.Certificate}, ClientAuth: tls.RequireAnyClientCert}}
	go i.server.ServeTLS(l, "", "") //nolint:errcheck // ends with the listener
	i.t.Cleanup(i.Close)
}

// Close ends the server.
func (i *Issuer) Close() { i.server.Close() }

// Requests are those that came so far.
func (i *Issuer) Requests() []Request {
	i.Lock()
	defer i.Unlock()
	return append([]Request(nil), i.requests...)
}

// Await waits until n requests have come.
func (i *Issuer) Await(n int) []Request {
	i.t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		i.Lock()
		list, changed := append([]Request(nil), i.requests...), i.changed
		i.Unlock()
		if len(list) >= n {
			return list
		}
		select {
		case <-changed:
		case <-timeout:
			i.t.Fatalf("%d requests for tokens came, want %d", len(list), n)
		}
	}
}

// ServeHTTP is the token endpoint.
func (i *Issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	i.Lock()
	defer i.Unlock()
	if err := r.ParseForm(); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	cert := r.TLS.PeerCertificates[0]
	one := Request{Form: r.PostForm, Thumbprint: sha256.Sum256(cert.Raw)}
	if len(cert.URIs) == 1 {
		one.ID = cert.URIs[0].String()
	}
	i.requests = append(i.requests, one)
	close(i.changed)
	i.changed = make(chan struct{})
	if i.Answer != nil && i.Answer(w, r) {
		return
	}
	subject := i.Subject
	if subject == "" {
		subject = one.ID
	}
	now := time.Now()
	claims := jwt.MapClaims{"iss": i.URL, "sub": subject, "aud": one.Form.Get("audience"), "client_id": one.Form.Get("client_id"), "scope": one.Form.Get("scope"),
		"iat": now.Unix(), "exp": now.Add(i.Life + time.Second - 1).Unix(), // no less than was promised
		"cnf": map[string]any{"x5t#S256": base64.RawURLEncoding.EncodeToString(one.Thumbprint[:])}}
	if i.Pad > 0 {
		claims["pad"] = strings.Repeat("x", i.Pad)
	}
	k := jwt.NewWithClaims(jwt.SigningMethodES256, claims)
	k.Header["typ"], k.Header["kid"] = "at+jwt", "k1"
	signed, err := k.SignedString(i.key)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{"access_token": signed, "token_type": "Bearer", "expires_in": int(i.Life.Seconds())}) //nolint:errcheck // the client has gone
}
