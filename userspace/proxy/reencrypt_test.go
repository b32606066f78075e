// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const reencrypted = "app: {tls: reencrypt, certificate: /c.pem, key: /k.pem, ca: /ca.pem}}"

// appAuthority is a CA of an application's own.
type appAuthority struct {
	t    testing.TB
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(t testing.TB) *appAuthority {
	t.Helper()
	a := &appAuthority{t: t, key: ecKey(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "inner"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err == nil {
		a.cert, err = x509.ParseCertificate(der)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// issue makes a server's certificate.
func (a *appAuthority) issue(ends time.Time, names ...string) *tls.Certificate {
	a.t.Helper()
	key := ecKey(a.t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: ends, DNSNames: names,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// believes has the node end TLS for an API, and hold its application against
// those roots.
func (n *node) believes(api string, p *appKeyPair, roots ...*appAuthority) {
	c := AppCertificate{API: api, Chain: [][]byte{p.der}}
	for _, r := range roots {
		c.Roots = append(c.Roots, r.cert.Raw)
	}
	n.mu.Lock()
	n.signer = p.sign
	n.mu.Unlock()
	n.proxy.SetAppCertificates([]AppCertificate{c})
}

// secureApp is an application that speaks TLS itself.
type secureApp struct {
	cert     atomic.Pointer[tls.Certificate]
	accepted atomic.Int32
	resumed  atomic.Int32
}

// secureApp runs a server that speaks HTTP/1.1 over TLS.
func (n *node) secureApp(cert *tls.Certificate, h http.Handler, ports ...uint16) *secureApp {
	n.t.Helper()
	a := &secureApp{}
	a.cert.Store(cert)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS.DidResume {
			a.resumed.Add(1)
		}
		w.Header().Set("X-Asked-For", r.TLS.ServerName+" "+r.Proto)
		h.ServeHTTP(w, r)
	}), ErrorLog: log.New(io.Discard, "", 0), TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){}, ConnState: func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			a.accepted.Add(1)
		}
	}, TLSConfig: &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return a.cert.Load(), nil }}}
	go s.ServeTLS(ln, "", "")
	n.t.Cleanup(func() { s.Close() })
	n.at(ln.Addr().String(), ports...)
	return a
}

// trusting is a client that believes that certificate.
func trusting(t testing.TB, p *appKeyPair, name string) *http.Client {
	t.Helper()
	c := httpClient(t)
	c.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: p.pool, ServerName: name}
	return c
}

// TestReencrypt speaks TLS to an application that speaks it itself, for
// callers in TLS and in plaintext, on the same node and through a tunnel.
func TestReencrypt(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		for _, n := range []*node{in, app} {
			n.proxy.SetPlan(changed(t, "ports: [80], protocol: http}", "ports: [80], protocol: http, "+reencrypted), 2)
		}
		ca := newAuthority(t)
		pair := newAppKeyPair(t, ecKey(t), "app.example", "other.example")
		app.believes("t/web", pair, newAuthority(t), ca)
		server := app.secureApp(ca.issue(time.Now().Add(time.Hour), "app.example", "other.example"), http.HandlerFunc(reflect), 80)
		addr := in.out(clientNumber, serverPort(80))
		for scheme, names := range map[string]string{"http": "app.example", "https": "other.example"} {
			c := trusting(t, pair, "other.example")
			resp := get(t, c, scheme+"://"+addr+"/a")
			if asked := resp.Header.Get("X-Asked-For"); resp.StatusCode != 200 || asked != names+" HTTP/1.1" || !strings.HasSuffix(resp.Header.Get("X-Client-Cert"), "URI="+clientID) {
				t.Errorf("%s: %d, asked for %q", scheme, resp.StatusCode, asked)
			}
			if resp = get(t, c, scheme+"://"+addr+"/debug/x"); resp.StatusCode != 403 {
				t.Errorf("%s: denied by %d", scheme, resp.StatusCode)
			}
			if b, err := io.ReadAll(get(t, c, scheme+"://"+addr+"/stream").Body); string(b) != "part 0\npart 1\npart 2\n" {
				t.Errorf("%s: %q, %v", scheme, b, err)
			}
			big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
			resp, err := c.Post(scheme+"://"+addr+"/a", "text/plain", bytes.NewReader(big))
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(resp.Body); !bytes.Equal(b, big) {
				t.Errorf("%s: %d bytes came back, %v", scheme, len(b), err)
			}
			resp.Body.Close()
		}
		// What the caller asks for is asked of the application, if it is its own.
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+addr+"/a", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "other.example:80"
		resp, err := httpClient(t).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if asked := resp.Header.Get("X-Asked-For"); asked != "other.example HTTP/1.1" {
			t.Errorf("with its name in Host: asked for %q", asked)
		}
		if server.resumed.Load() == 0 {
			t.Error("no session with the application was resumed")
		}
	})
}

// TestReencryptToAnother holds that nothing of a request reaches what does
// not prove to be the application, and that audit breaks nobody.
func TestReencryptToAnother(t *testing.T) {
	ca, soon := newAuthority(t), time.Now().Add(time.Hour)
	good := ca.issue(soon, "app.example")
	for name, c := range map[string]struct {
		cert   *tls.Certificate
		roots  []*appAuthority
		detail string
	}{
		"another authority":   {newAuthority(t).issue(soon, "app.example"), []*appAuthority{ca}, "unknown authority"},
		"another name":        {ca.issue(soon, "app.example.org"), []*appAuthority{ca}, "not app.example"},
		"ended":               {ca.issue(time.Now().Add(-time.Minute), "app.example"), []*appAuthority{ca}, "expired"},
		"no roots":            {good, nil, "no roots"},
		"plaintext":           {nil, []*appAuthority{ca}, "tls: first record does not look like a TLS handshake"},
		"itself, for control": {good, []*appAuthority{ca}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			eachEngine(t, func(t *testing.T, goroutines bool) {
				for _, mode := range []string{"enforce", "audit"} {
					n := oneNode(t, nodeOptions{goroutines: goroutines, mode: mode})
					text := strings.ReplaceAll(worldPolicies, "MODE", mode)
					n.proxy.SetPlan(build(t, strings.Replace(text, "ports: [80], protocol: http}", "ports: [80], protocol: http, "+reencrypted, 1)), 2)
					n.believes("t/web", newAppKeyPair(t, ecKey(t), "app.example"), c.roots...)
					var asked atomic.Int32
					h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { asked.Add(1); reflect(w, r) })
					if c.cert == nil {
						n.app(h, 80)
					} else {
						n.secureApp(c.cert, h, 80)
					}
					resp := get(t, httpClient(t), "http://"+n.out(clientNumber, serverPort(80))+"/a")
					if c.detail == "" || mode == "audit" && c.cert != nil {
						if resp.StatusCode != 200 || asked.Load() != 1 {
							t.Errorf("%s: %d, asked %d times", mode, resp.StatusCode, asked.Load())
						}
					} else {
						if reason, _ := problem(t, resp); reason != flow.ReasonUpstreamTLS || resp.StatusCode != 502 {
							t.Errorf("%s: %d %s", mode, resp.StatusCode, reason)
						}
						if asked.Load() != 0 {
							t.Errorf("%s: it was asked", mode)
						}
					}
					if c.detail == "" {
						continue
					}
					if r := n.recorded(flow.ReasonUpstreamTLS); !strings.Contains(r.Detail, c.detail) || r.WouldDeny != (mode == "audit" && c.cert != nil) || r.Stage != "upstream" {
						t.Errorf("%s: recorded as %+v", mode, r)
					}
				}
			})
		})
	}
}

// TestReencryptRotates changes the roots and the application's certificate: a
// session of before is held against the roots of now.
func TestReencryptRotates(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := oneNode(t, nodeOptions{goroutines: goroutines})
		n.proxy.SetPlan(changed(t, "ports: [80], protocol: http}", "ports: [80], protocol: http, "+reencrypted), 2)
		pair, soon := newAppKeyPair(t, ecKey(t), "app.example"), time.Now().Add(time.Hour)
		first, second := newAuthority(t), newAuthority(t)
		server := n.secureApp(first.issue(soon, "app.example"), http.HandlerFunc(reflect), 80)
		addr := n.out(clientNumber, serverPort(80))
		status := func() int { return get(t, httpClient(t), "http://"+addr+"/a").StatusCode }
		n.believes("t/web", pair, first)
		if got := status(); got != 200 {
			t.Fatalf("%d", got)
		}
		n.believes("t/web", pair, second)
		if got := status(); got != 502 {
			t.Errorf("under other roots: %d", got)
		}
		server.cert.Store(second.issue(soon, "app.example"))
		if got := status(); got != 200 {
			t.Errorf("with a certificate of theirs: %d", got)
		}
	})
}

// TestReencryptStreams speaks HTTP/2 over TLS to an application, which must
// offer it; and WebSocket.
func TestReencryptStreams(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		for _, n := range []*node{in, app} {
			n.proxy.SetPlan(changed(t, "ports: [84], protocol: grpc}", "ports: [84], protocol: grpc, "+reencrypted), 2)
		}
		ca := newAuthority(t)
		app.believes("t/rpc", newAppKeyPair(t, ecKey(t), "echo.example"), ca)
		cert := ca.issue(time.Now().Add(time.Hour), "echo.example")
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		server, _ := newEchoService(grpc.Creds(credentials.NewServerTLSFromCert(cert)))
		go server.Serve(ln)
		t.Cleanup(server.Stop)
		app.at(ln.Addr().String(), 84)
		addr := in.out(clientNumber, serverPort(84))
		if got, err := call1(t.Context(), rpcClient(t, addr, nil), "/t.Echo/Unary", "hello"); err != nil || got != "hello" {
			t.Errorf("%q, %v", got, err)
		}
		// One that speaks HTTP/1.1 alone.
		app.secureApp(cert, http.HandlerFunc(reflect), 84)
		_, err = call1(t.Context(), rpcClient(t, addr, nil), "/t.Echo/Unary", "hello")
		refusedCall(t, err, codes.Unavailable, flow.ReasonUpstreamTLS)
	})
	eachLive(t, "enforce", nodeOptions{}, func(t *testing.T, in, app *node, addr string) {
		for _, n := range []*node{in, app} {
			n.proxy.SetPlan(livePlan(t, "enforce", "ports: [85], protocol: http}", "ports: [85], protocol: http, "+reencrypted), 3)
		}
		ca := newAuthority(t)
		app.believes("t/live", newAppKeyPair(t, ecKey(t), "app.example"), ca)
		app.secureApp(ca.issue(time.Now().Add(time.Hour), "app.example"), echoes(), 85)
		ws := opened(t, dialTCP(t, addr), "/feed/x")
		if err := said(ws, bytes.Repeat([]byte("x"), 200_000)); err != nil {
			t.Error(err)
		}
		ws.Close()
	})
}
