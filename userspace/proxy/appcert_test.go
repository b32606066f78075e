// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// appKeyPair is an application's certificate with its key, which only the
// stand-in for the agent has.
type appKeyPair struct {
	der    []byte
	key    crypto.Signer
	pool   *x509.CertPool
	signed atomic.Int32
}

func newAppKeyPair(t testing.TB, key crypto.Signer, names ...string) *appKeyPair {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "app"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), DNSNames: names,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	p := &appKeyPair{der: der, key: key, pool: x509.NewCertPool()}
	p.pool.AddCert(cert)
	return p
}

func ecKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (p *appKeyPair) sign(r SignRequest) ([]byte, error) {
	if !bytes.Contains(r.Message, []byte("TLS 1.3, server CertificateVerify")) {
		return nil, fmt.Errorf("asked to sign %q", r.Message)
	}
	p.signed.Add(1)
	h := r.Hash.New()
	h.Write(r.Message)
	var opts crypto.SignerOpts = r.Hash
	if r.PSS {
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: r.Hash}
	}
	return p.key.Sign(rand.Reader, h.Sum(nil), opts)
}

// shows has the node end TLS for web with that certificate.
func (n *node) shows(p *appKeyPair) {
	n.mu.Lock()
	n.signer = p.sign
	n.mu.Unlock()
	n.proxy.SetAppCertificates([]AppCertificate{{API: "t/web", Chain: [][]byte{p.der}}})
}

const terminated = "ports: [80], protocol: http, app: {tls: terminate, certificate: /c.pem, key: /k.pem}}"

func terminating(t testing.TB) *compile.Plan {
	t.Helper()
	return changed(t, "ports: [80], protocol: http}", terminated)
}

func get(t testing.TB, c *http.Client, url string) *http.Response {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

// TestTerminate ends the TLS of callers, on the same node and through a
// tunnel, with a key that the proxy does not have; requests are judged as in
// plaintext, which is taken as well.
func TestTerminate(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string]crypto.Signer{"P-256": ecKey(t), "RSA": rsaKey} {
		t.Run(name, func(t *testing.T) {
			// However long the ClientHello takes.
			eachWay(t, nodeOptions{change: atOnce}, func(t *testing.T, in, app *node) {
				for _, n := range []*node{in, app} {
					n.proxy.SetPlan(terminating(t), 2)
				}
				pair := newAppKeyPair(t, key, "app.example")
				app.shows(pair)
				app.app(http.HandlerFunc(reflect), 80)
				addr := in.out(clientNumber, serverPort(80))
				c := httpClient(t)
				c.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: pair.pool, ServerName: "app.example"}
				c.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) { return dialLate(t, addr), nil }
				resp := get(t, c, "https://"+addr+"/a")
				if cert := resp.Header.Get("X-Client-Cert"); resp.StatusCode != 200 || !strings.HasSuffix(cert, "URI="+clientID) {
					t.Errorf("%d, the application saw %q", resp.StatusCode, cert)
				}
				if resp = get(t, c, "https://"+addr+"/debug/x"); resp.StatusCode != 403 {
					t.Errorf("denied by %d", resp.StatusCode)
				} else if reason, _ := problem(t, resp); reason != flow.ReasonDenyRule {
					t.Errorf("denied for %s", reason)
				}
				if resp = get(t, c, "http://"+addr+"/a"); resp.StatusCode != 200 {
					t.Errorf("plaintext got %d", resp.StatusCode)
				}
				if n := pair.signed.Load(); n != 1 {
					t.Errorf("%d signatures for one connection", n)
				}

				// Another certificate: for new connections from now on.
				next := newAppKeyPair(t, ecKey(t), "app.example")
				app.shows(next)
				fresh := httpClient(t)
				fresh.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: next.pool, ServerName: "app.example"}
				if resp = get(t, fresh, "https://"+addr+"/a"); resp.StatusCode != 200 {
					t.Errorf("with the next certificate: %d", resp.StatusCode)
				}
			})
		})
	}
}

// TestNothingToTerminateWith holds that a caller is refused, and the record
// says why, where there is no certificate or nobody signs.
func TestNothingToTerminateWith(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		for _, n := range []*node{in, app} {
			n.proxy.SetPlan(terminating(t), 2)
		}
		app.app(http.HandlerFunc(reflect), 80)
		addr := in.out(clientNumber, serverPort(80))
		pair := newAppKeyPair(t, ecKey(t), "app.example")
		fails := func(what string, reason flow.Reason, detail string) {
			t.Helper()
			c := tls.Client(dialTCP(t, addr), &tls.Config{RootCAs: pair.pool, ServerName: "app.example"})
			if err := c.Handshake(); err == nil {
				t.Errorf("%s: the handshake is done", what)
			}
			if r := app.recorded(reason); !strings.Contains(r.Detail, detail) || r.Decision != "deny" || r.WouldDeny {
				t.Errorf("%s: recorded as %+v", what, r)
			}
		}
		fails("nothing was handed over", flow.ReasonAppCertificate, "handed over no certificate")
		app.proxy.SetAppCertificates([]AppCertificate{{API: "t/web", Problem: "no such file"}})
		fails("no file", flow.ReasonAppCertificate, "no such file")
		app.proxy.SetAppCertificates([]AppCertificate{{API: "t/web", Chain: [][]byte{{1, 2}}}})
		fails("no certificate", flow.ReasonAppCertificate, "x509")
		app.shows(pair)
		app.mu.Lock()
		app.signer = func(SignRequest) ([]byte, error) { return nil, errors.New("it does not want to") }
		app.mu.Unlock()
		fails("nobody signs", flow.ReasonTLSHandshake, "it does not want to")
	})
}

// TestTerminateFromElsewhere has callers come from elsewhere: who they are is
// what their certificate proves, and no more.
func TestTerminateFromElsewhere(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		for _, mode := range []string{"enforce", "audit"} {
			t.Run(mode, func(t *testing.T) {
				n := oneNode(t, nodeOptions{goroutines: goroutines, mode: mode})
				addr, fd := listener(t, "127.0.0.1:0")
				real := netip.MustParseAddrPort(addr) // what a steered connection shows as its own
				text := strings.ReplaceAll(worldPolicies, "MODE", mode)
				text = strings.Replace(text, "ports: [80], protocol: http}", strings.Replace(terminated, "80", fmt.Sprint(real.Port()), 1), 1)
				n.proxy.SetPlan(build(t, text), 2)
				if err := n.proxy.Serve(fd, KindInbound, serverNetns); err != nil {
					t.Fatal(err)
				}
				n.app(http.HandlerFunc(reflect), 80)
				n.mu.Lock()
				n.apps[real] = n.apps[serverPort(80)]
				n.mu.Unlock()
				pair := newAppKeyPair(t, ecKey(t), "app.example")
				n.shows(pair)
				leaf, err := n.leaves.Get(clientID)
				if err != nil {
					t.Fatal(err)
				}
				foreign, err := x509.ParseCertificate(pair.der)
				if err != nil {
					t.Fatal(err)
				}
				const request = "GET /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
				as := func(certs ...tls.Certificate) (*http.Response, error) {
					t.Helper()
					return ask(t, tls.Client(dialTCP(t, addr), &tls.Config{RootCAs: pair.pool, ServerName: "app.example", Certificates: certs}), request)
				}
				resp, err := as(leaf.Certificate)
				if err != nil || resp.StatusCode != 200 || !strings.HasSuffix(resp.Header.Get("X-Client-Cert"), "URI="+clientID) {
					t.Fatalf("with a certificate of ours: %v %v", resp, err)
				}
				resp, err = as()
				switch {
				case err != nil:
					t.Fatal(err)
				case mode == "audit" && resp.StatusCode != 200:
					t.Errorf("without a certificate: %d", resp.StatusCode)
				case mode == "enforce":
					if reason, _ := problem(t, resp); reason != flow.ReasonMTLSRequired {
						t.Errorf("without a certificate: %s", reason)
					}
				}
				n.recorded(flow.ReasonMTLSRequired)
				resp, err = as(tls.Certificate{Certificate: [][]byte{pair.der}, PrivateKey: pair.key, Leaf: foreign})
				if mode == "enforce" && err == nil || mode == "audit" && (err != nil || resp.StatusCode != 200) {
					t.Errorf("with a certificate of another's: %v %v", resp, err)
				}
				if r := n.recorded(flow.ReasonCertNoID); r.WouldDeny != (mode == "audit") {
					t.Errorf("recorded as %+v", r)
				}
			})
		}
	})
}
