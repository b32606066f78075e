// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net/url"
	"time"

	"github.com/sallyport-dev/sallyport/cmd/sallyport/internal/lab"
	"github.com/sallyport-dev/sallyport/userspace/authority"
	"github.com/sallyport-dev/sallyport/userspace/identity"
)

// Rogue is what the stolen node of the demo does: it joins the authority as
// itself, then signs a certificate for an identity of another node with its
// intermediate, and opens a tunnel as that.
type Rogue struct {
	Token  string // join token of the rogue's own
	Claims string // SPIFFE ID that its join token does not name
	Server string // SPIFFE ID of the server that it calls
	Tunnel string // address of the tunnel
}

// Run reads a Rogue from in, does what it says, and writes an appReply: Err is
// what the tunnel made of it.
func (Rogue) Run(ctx context.Context, in io.Reader, out io.Writer) error {
	var r Rogue
	if err := json.NewDecoder(in).Decode(&r); err != nil {
		return fmt.Errorf("read order: %w", err)
	}
	chain, key, err := r.forge(ctx)
	if err != nil {
		return err
	}
	reply := appReply{Data: "let in"}
	if err := r.call(ctx, chain, key); err != nil {
		reply = appReply{Err: err.Error()}
	}
	return json.NewEncoder(out).Encode(reply)
}

func (r Rogue) forge(ctx context.Context) ([][]byte, *ecdsa.PrivateKey, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, caKey)
	if err != nil {
		return nil, nil, err
	}
	client, err := authority.NewClient(authorityAddress, lab.TrustDomain, r.Token)
	if err != nil {
		return nil, nil, err
	}
	e, err := client.Join(ctx, csr)
	if err != nil {
		return nil, nil, fmt.Errorf("join as the rogue: %w", err)
	}
	parent, err := x509.ParseCertificate(e.Intermediate)
	if err != nil {
		return nil, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	id, err := url.Parse(r.Claims)
	if err != nil {
		return nil, nil, err
	}
	leaf, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{}, URIs: []*url.URL{id},
		NotBefore: time.Now().Add(-30 * time.Second), NotAfter: time.Now().Add(5 * time.Minute),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, parent, &key.PublicKey, caKey)
	return [][]byte{leaf, e.Intermediate}, key, err
}

// call opens the tunnel. TLS 1.3 tells a client that its certificate was
// refused only at its first read.
func (r Rogue) call(ctx context.Context, chain [][]byte, key *ecdsa.PrivateKey) error {
	ctx, cancel := context.WithTimeout(ctx, appTimeout)
	defer cancel()
	d := tls.Dialer{Config: &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ServerName: identity.ServerName(r.Server),
		Certificates: []tls.Certificate{{Certificate: chain, PrivateKey: key}},
		// The rogue does not care whom it talks to.
		InsecureSkipVerify: true,
	}}
	c, err := d.DialContext(ctx, "tcp", r.Tunnel)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(appTimeout)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
		return err
	}
	_, err = io.ReadFull(c, make([]byte, 9))
	return err
}

// rogueNode has the stranger be such a node.
func rogueNode(ctx context.Context, d *demo) (string, string, error) {
	token, err := d.lab.JoinToken(ctx, "rogue", "anything")
	if err != nil {
		return "", "", err
	}
	offset := d.b.LogEnd()
	p, err := d.lab.Start("x", "", "rogue", nil, "/proc/self/exe", "demo", "rogue")
	if err != nil {
		return "", "", err
	}
	defer p.Stop(2 * time.Second)
	order := Rogue{Token: token, Claims: d.a.ID("checkout"), Server: d.b.ID("ledger"), Tunnel: nodeB + ":15008"}
	if err := json.NewEncoder(p.In).Encode(order); err != nil {
		return "", "", fmt.Errorf("order to the rogue: %w", err)
	}
	var reply appReply
	if err := json.NewDecoder(p.Out).Decode(&reply); err != nil {
		return "", "", fmt.Errorf("reply of the rogue: %w: %s", err, p.LastLines(3))
	}
	got := "let in"
	if reply.Err != "" {
		got = "refused"
	}
	rec, err := d.b.Decided(ctx, offset, func(r *lab.Record) bool { return r.Reason == "certificate_scope" })
	if err != nil {
		return got + " (" + reply.Err + ")", "", err
	}
	return got, rec.Stage, nil
}
