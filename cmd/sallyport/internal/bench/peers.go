// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/cmd/sallyport/internal/lab"
)

// peerName is what both ends' certificate says.
const peerName = "peer.bench.sallyport"

// streamModule is where distributions have nginx's stream module.
const streamModule = "/usr/lib/nginx/modules/ngx_stream_module.so"

// pair is a peer: a program at each end, mutual TLS 1.3 between them.
type pair struct {
	name   string
	http   bool
	url    string
	client *lab.Process
	server *lab.Process
}

// recipe says how a pair is made, or, by missing, what is not installed.
type recipe struct {
	name    string
	http    bool
	port    int // of the client side; the server side's is 1000 higher
	missing func() string
	start   func(ctx context.Context, t *testbed, r *recipe, side side) (*lab.Process, error)
}

// side is one end of a pair.
type side struct {
	space, name, listens, to string
	server                   bool
}

var recipes = []recipe{
	{"nginx stream", false, 18080, noStream, nginxStream},
	{"haproxy tcp", false, 18081, noHAProxy, haproxy},
	{"nginx http", true, 18082, func() string { return "" }, nginxHTTP},
	{"haproxy http", true, 18083, noHAProxy, haproxy},
}

func noStream() string {
	if _, err := os.Stat(streamModule); err != nil {
		return "nginx's stream module (libnginx-mod-stream)"
	}
	return ""
}

func noHAProxy() string {
	if _, err := exec.LookPath("haproxy"); err != nil {
		return "haproxy"
	}
	return ""
}

// openPeers starts the pairs that can be, and names what the others lack.
func (t *testbed) openPeers(ctx context.Context) (pairs []*pair, missing []string, err error) {
	if err := writeCertificates(t.lab.Dir); err != nil {
		return nil, nil, err
	}
	for _, r := range recipes {
		if m := r.missing(); m != "" {
			missing = append(missing, fmt.Sprintf("%s: %s is not installed", r.name, m))
			continue
		}
		front := fmt.Sprintf("%s:%d", peerP, r.port)
		slug := strings.ReplaceAll(r.name, " ", "-")
		back := fmt.Sprintf("%s:%d", peerQ, r.port+1000)
		p := &pair{name: r.name, http: r.http, url: "http://" + front + path}
		if p.server, err = r.start(ctx, t, &r, side{"q", slug + "-server", back, peerQ + ":" + portBare, true}); err != nil {
			return nil, nil, err
		}
		if p.client, err = r.start(ctx, t, &r, side{"p", slug + "-client", front, back, false}); err != nil {
			return nil, nil, err
		}
		pairs = append(pairs, p)
	}
	return pairs, missing, nil
}

func nginxStream(ctx context.Context, t *testbed, _ *recipe, s side) (*lab.Process, error) {
	return t.nginx(ctx, s.space, "", s.name, "load_module "+streamModule+";\n", fmt.Sprintf(`stream {
  server {
    listen %s%s backlog=4096;
    proxy_pass %s;
    proxy_ssl %s;
%s  }
}
`, s.listens, sslWord(s), s.to, map[bool]string{true: "off", false: "on"}[s.server], nginxTLS(t.lab.Dir, s)), s.listens)
}

func nginxHTTP(ctx context.Context, t *testbed, _ *recipe, s side) (*lab.Process, error) {
	scheme := "https"
	if s.server {
		scheme = "http"
	}
	return t.nginx(ctx, s.space, "", s.name, "", fmt.Sprintf(`http {
  access_log off;
  keepalive_requests 1000000000;
  upstream next { server %s; keepalive 1024; keepalive_requests 1000000000; }
  server {
    listen %s%s backlog=4096;
    location / {
      proxy_pass %s://next;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
    }
%s  }
}
`, s.to, s.listens, sslWord(s), scheme, nginxTLS(t.lab.Dir, s)), s.listens)
}

func sslWord(s side) string {
	if s.server {
		return " ssl"
	}
	return ""
}

func nginxTLS(dir string, s side) string {
	if s.server {
		return fmt.Sprintf(`    ssl_protocols TLSv1.3;
    ssl_certificate %[1]s/peer.crt;
    ssl_certificate_key %[1]s/peer.key;
    ssl_client_certificate %[1]s/ca.crt;
    ssl_verify_client on;
`, dir)
	}
	return fmt.Sprintf(`    proxy_ssl_protocols TLSv1.3;
    proxy_ssl_certificate %[1]s/peer.crt;
    proxy_ssl_certificate_key %[1]s/peer.key;
    proxy_ssl_trusted_certificate %[1]s/ca.crt;
    proxy_ssl_verify on;
    proxy_ssl_name %[2]s;
`, dir, peerName)
}

func haproxy(ctx context.Context, t *testbed, r *recipe, s side) (*lab.Process, error) {
	mode := "tcp"
	if r.http {
		mode = "http"
	}
	dir := t.lab.Dir
	bind, to := "", fmt.Sprintf("ssl crt %[1]s/peer.pem ca-file %[1]s/ca.crt verify required sni str(%[2]s) verifyhost %[2]s ssl-min-ver TLSv1.3", dir, peerName)
	if s.server {
		bind, to = fmt.Sprintf("ssl crt %[1]s/peer.pem ca-file %[1]s/ca.crt verify required ssl-min-ver TLSv1.3", dir), ""
	}
	conf := fmt.Sprintf(`global
  nbthread 2
  maxconn 8192
defaults
  mode %s
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout http-keep-alive 600s
listen pair
  bind %s %s
%s  server next %s %s
`, mode, s.listens, bind, map[bool]string{true: "  http-reuse always\n"}[r.http], s.to, to)
	file := filepath.Join(dir, s.name+".cfg")
	if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
		return nil, fmt.Errorf("write configuration of %s: %w", s.name, err)
	}
	return t.server(ctx, s.space, "", s.name, s.listens, "haproxy", "-f", file)
}

// writeCertificates makes a CA and one certificate for both ends, on P-256.
func writeCertificates(dir string) error {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make key: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make key: %w", err)
	}
	from, to := time.Now().Add(-time.Minute), time.Now().Add(24*time.Hour)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, NotBefore: from, NotAfter: to,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return fmt.Errorf("make certificate: %w", err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: peerName}, DNSNames: []string{peerName}, NotBefore: from, NotAfter: to,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	if err != nil {
		return fmt.Errorf("make certificate: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode key: %w", err)
	}
	crt := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	pk := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	for name, b := range map[string][]byte{
		"ca.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER}), "peer.crt": crt, "peer.key": pk,
		"peer.pem": append(append([]byte(nil), crt...), pk...),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			return fmt.Errorf("write certificate: %w", err)
		}
	}
	return nil
}
