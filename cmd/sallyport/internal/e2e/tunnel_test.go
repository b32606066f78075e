// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace/authority"
	"github.com/sallyport-dev/sallyport/userspace/identity"
)

func init() { actors["join"] = actJoin }

// joined is what actJoin prints.
type joined struct{ Key, Intermediate []byte }

// actJoin joins the authority at ADDRESS with TOKEN, as a node does, and
// prints what it got: it is a node of the fleet, and what it does next is up
// to it.
func actJoin(args []string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	client, err := authority.NewClient(args[0], trustDomain, args[1])
	if err != nil {
		return err
	}
	e, err := client.Join(context.Background(), csr)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	b, err := json.Marshal(joined{der, e.Intermediate})
	fmt.Println(string(b))
	return err
}

// peer is a node of the fleet whose software is not ours.
type peer struct {
	t      *testing.T
	ns     *testenv.Netns
	key    *ecdsa.PrivateKey
	parent *x509.Certificate
}

// leaf signs a certificate for an ID.
func (p *peer) leaf(id string, notAfter time.Time) tls.Certificate {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	u, err := url.Parse(id)
	if err != nil {
		p.t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		p.t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, URIs: []*url.URL{u}, NotBefore: notAfter.Add(-10 * time.Minute), NotAfter: notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, p.parent, &key.PublicKey, p.key)
	if err != nil {
		p.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der, p.parent.Raw}, PrivateKey: key}
}

// tunnel opens a tunnel to a server's identity on node b by x/net's HTTP/2.
func (p *peer) tunnel(cert *tls.Certificate, server string) (*http2.ClientConn, error) { //nolint:staticcheck // x/net's own implementation is wanted, not net/http's
	p.t.Helper()
	var c net.Conn
	err := p.ns.Do(func() (err error) {
		d := net.Dialer{Timeout: patience}
		d.SetMultipathTCP(false)
		c, err = d.Dial("tcp4", addrB+":15008")
		return err
	})
	if err != nil {
		return nil, err
	}
	p.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ServerName: identity.ServerName(server), InsecureSkipVerify: true}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	secured := tls.Client(c, config)
	if err := secured.Handshake(); err != nil {
		return nil, err
	}
	return (&http2.Transport{}).NewClientConn(secured) //nolint:staticcheck // see above
}

// connect asks for a CONNECT stream. It returns the status, and on 200 what
// came back for the bytes that were sent.
func connect(cc *http2.ClientConn, authority, forwarded, send string) (status int, got string, err error) { //nolint:staticcheck // see above
	body, w := io.Pipe()
	defer w.Close()
	q := &http.Request{Method: http.MethodConnect, URL: &url.URL{Host: authority}, Host: authority, Header: http.Header{}, Body: body, ContentLength: -1}
	if forwarded != "" {
		q.Header.Set("Forwarded", forwarded)
	}
	r, err := cc.RoundTrip(q)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		b, err := io.ReadAll(io.LimitReader(r.Body, 4096))
		return r.StatusCode, string(b), err
	}
	if _, err := io.WriteString(w, send); err != nil {
		return r.StatusCode, "", err
	}
	answer, err := http.ReadResponse(bufio.NewReader(r.Body), nil)
	if err != nil {
		return r.StatusCode, "", err
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	return r.StatusCode, fmt.Sprintf("%d %s", answer.StatusCode, b), err
}

// TestTunnelFromAPeerOfItsOwnMind speaks to the tunnel with another HTTP/2
// stack and certificates that a node of the fleet could make.
func TestTunnelFromAPeerOfItsOwnMind(t *testing.T) {
	require(t, "nginx", "curl")
	t.Parallel()
	a, b := two(t)
	b.policy("shop.yaml", shopIn("enforce")+`---
apiVersion: sallyport.dev/v1alpha1
kind: MachineIdentity
metadata: {name: former, namespace: shop}
spec: {owner: a@b.example, expires: "2020-01-01", select: {cgroup: {path: /former}}, mode: enforce, mayCall: [web, stream]}
`)
	// The third node's join token names more than the policies know.
	var ids []string
	third := func(name string) string { return fmt.Sprintf("spiffe://%s/node/c/ns/shop/%s", trustDomain, name) }
	for _, i := range []string{"client", "former", "unheard"} {
		ids = append(ids, "--id", third(i))
	}
	token := strings.TrimSpace(b.authority(append([]string{"token", "create", "--node", "c"}, ids...)...))
	w := startNginx(t, b.group("web"), b.ns, 8080)
	b.start()
	server(t, b.group("stream"), b.ns, "echo", addrB+":9090")
	b.served("web", "stream")

	p := &peer{t: t, ns: a.ns}
	var got joined
	if err := json.Unmarshal([]byte(act(t, "", b.ns, "join", addrB+":15443", token).line(t)), &got); err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(got.Key)
	if err != nil {
		t.Fatal(err)
	}
	p.key = key.(*ecdsa.PrivateKey)
	if p.parent, err = x509.ParseCertificate(got.Intermediate); err != nil {
		t.Fatal(err)
	}
	soon := time.Now().Add(5 * time.Minute)
	client := p.leaf(third("client"), soon)
	hello := "GET /files/hello HTTP/1.1\r\nHost: " + addrB + ":8080\r\nConnection: close\r\n\r\n"

	cc, err := p.tunnel(&client, b.id("web"))
	if err != nil {
		t.Fatal(err)
	}
	t.Run("an honest one", func(t *testing.T) {
		from := b.mark()
		status, answer, err := connect(cc, addrB+":8080", "for="+addrA, hello)
		if err != nil || status != 200 || answer != "200 hello\n" {
			t.Fatalf("got %d %q %v", status, answer, err)
		}
		b.decided(from, "the call", func(r *record) bool {
			return r.Decision == "allow" && r.Source == third("client") && r.Channel == "tunnel" && r.Client.Addr().String() == addrA
		})
	})
	served := w.requests()
	for _, c := range []struct {
		name, authority, forwarded, reason string
		status                             int
	}{
		{"an address of another node", "10.78.1.9:8080", "", "not_this_node", 404},
		{"the caller's own address", addrA + ":8080", "", "not_this_node", 404},
		{"loopback", "127.0.0.1:8080", "", "not_this_node", 404},
		{"a port that nobody protects", addrB + ":22", "", "not_this_node", 404},
		{"the authority's port", addrB + ":15443", "", "not_this_node", 404},
		{"another identity's port", addrB + ":9090", "", "not_this_node", 404},
		{"a name", "localhost:8080", "", "not_this_node", 404},
		{"a client that is not its own", addrB + ":8080", "for=10.9.9.9", "forwarded_address", 403},
		{"a client that is the node itself", addrB + ":8080", "for=127.0.0.1", "forwarded_address", 403},
		{"a Forwarded that cannot be read", addrB + ":8080", "for=unknown", "forwarded_address", 403},
		{"two clients", addrB + ":8080", "for=" + addrA + ", for=10.9.9.9", "forwarded_address", 403},
	} {
		t.Run(c.name, func(t *testing.T) {
			from := b.mark()
			status, answer, err := connect(cc, c.authority, c.forwarded, hello)
			if err != nil || status != c.status {
				t.Fatalf("got %d %q %v, want %d", status, answer, err, c.status)
			}
			r := b.decided(from, c.reason, func(r *record) bool { return r.Reason == c.reason })
			if r.Decision != "deny" || r.Stage != "channel" {
				t.Errorf("decided %+v", r)
			}
		})
	}
	t.Run("another method", func(t *testing.T) {
		r, err := cc.RoundTrip(&http.Request{Method: "GET", URL: &url.URL{Scheme: "https", Host: addrB + ":8080", Path: "/files/hello"}, Header: http.Header{}})
		if err == nil && r.StatusCode < 400 {
			t.Errorf("got %d", r.StatusCode)
		}
	})
	former, unheard := p.leaf(third("former"), soon), p.leaf(third("unheard"), soon)
	for _, c := range []struct {
		name, reason string
		cert         *tls.Certificate
	}{
		{"an identity that has expired", "identity_expired", &former},
		{"an identity that no policy knows", "unknown_identity", &unheard},
	} {
		t.Run(c.name, func(t *testing.T) {
			from := b.mark()
			cc, err := p.tunnel(c.cert, b.id("web"))
			if err != nil {
				t.Fatal(err)
			}
			status, answer, err := connect(cc, addrB+":8080", "", hello)
			if err == nil && status == 200 && !strings.HasPrefix(answer, "403 ") {
				t.Errorf("got %d %q", status, answer)
			}
			b.decided(from, c.reason, func(r *record) bool { return r.Reason == c.reason && r.Decision == "deny" })
		})
	}
	past, foreign := p.leaf(third("client"), time.Now().Add(-time.Minute)), p.leaf(b.id("client"), soon)
	self := p.selfSigned(third("client"))
	for _, c := range []struct {
		name, reason string
		cert         *tls.Certificate
	}{
		{"no certificate", "cert_missing", nil},
		{"a certificate that has expired", "cert_expired", &past},
		{"an ID of another node", "certificate_scope", &foreign},
		{"a certificate of nobody's", "cert_", self},
	} {
		t.Run(c.name, func(t *testing.T) {
			from := b.mark()
			// TLS 1.3 tells a client that it was refused at its first read.
			cc, err := p.tunnel(c.cert, b.id("web"))
			if err == nil {
				var status int
				if status, _, err = connect(cc, addrB+":8080", "", hello); err == nil {
					t.Errorf("got %d", status)
				}
			}
			b.decided(from, c.reason, func(r *record) bool {
				return strings.HasPrefix(r.Reason, c.reason) && r.Decision == "deny" && r.Stage == "channel"
			})
		})
	}
	t.Run("a server that is not here", func(t *testing.T) {
		if cc, err := p.tunnel(&client, a.id("web")); err == nil {
			if status, answer, err := connect(cc, addrB+":8080", "", hello); err == nil {
				t.Errorf("got %d %q", status, answer)
			}
		}
	})
	t.Run("bytes that are no TLS", func(t *testing.T) {
		out, err := say(t, "", a.ns, addrB+":15008", hello)
		if strings.Contains(out, "hello") {
			t.Errorf("got %q %v", out, err)
		}
	})
	if now := w.requests(); now != served {
		t.Errorf("nginx was reached %d times by what was refused: %s", now-served, w.log("access.log"))
	}
	if status, answer, err := connect(cc, addrB+":8080", "", hello); err != nil || status != 200 || answer != "200 hello\n" {
		t.Errorf("the honest tunnel is gone after all this: %d %q %v", status, answer, err)
	}
	b.await("be healthy", func(s *controlpb.StatusReply) bool { return s.GetReady() && s.GetUserspace().GetRestarts() == 0 })
}

func (p *peer) selfSigned(id string) *tls.Certificate {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	u, err := url.Parse(id)
	if err != nil {
		p.t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(7), URIs: []*url.URL{u}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Minute),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		p.t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// authority runs a verb of the shared authority that two made.
func (n *node) authority(args ...string) string {
	n.t.Helper()
	var errOut bytes.Buffer
	cmd := exec.Command(sallyport, append(append([]string{"authority"}, args...), n.authorityFlags...)...)
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		n.t.Fatal(errors.Join(err, errors.New(errOut.String())))
	}
	return string(out)
}
