// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bytes"
	"context"
	"crypto/subtle"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
)

const (
	clientTime = 20 * time.Second // one exchange, from dial to last byte
	maxAnswer  = 512 << 10
)

// Client speaks to an authority; it is the identity.Enroller of a node.
type Client struct {
	address     string
	trustDomain string
	token       string // itself, or a file's path
}

// NewClient returns a client of the authority at address (host:port). token
// is a join token or the path of a file that holds one, "" for a node that
// is enrolled already. The file is read only when the node joins and may be
// gone afterwards.
func NewClient(address, trustDomain, token string) (*Client, error) {
	if _, _, err := net.SplitHostPort(address); err != nil {
		return nil, fmt.Errorf("authority address %q: must be host:port: %w", address, err)
	}
	if err := identity.CheckTrustDomain(trustDomain); err != nil {
		return nil, fmt.Errorf("authority of trust domain %q: %w", trustDomain, err)
	}
	if strings.HasPrefix(token, tokenPrefix) {
		if _, err := ParseToken(token); err != nil {
			return nil, err
		}
	}
	return &Client{address: address, trustDomain: trustDomain, token: token}, nil
}

// Join implements identity.Enroller. The authority is known by the hash of
// its root's key in the join token.
func (c *Client) Join(ctx context.Context, csr []byte) (identity.Enrolment, error) {
	if c.token == "" {
		return identity.Enrolment{}, errors.New("join authority: there is no join token; make one with `sallyport authority token create` and set identity.authority.token")
	}
	token, err := LoadToken(c.token)
	if err != nil {
		return identity.Enrolment{}, err
	}
	pinned := func(cs tls.ConnectionState) ([][]byte, error) {
		for _, cert := range cs.PeerCertificates {
			if pin := pinOf(cert); subtle.ConstantTimeCompare(pin[:], token.Pin[:]) == 1 {
				return [][]byte{cert.Raw}, nil
			}
		}
		return nil, &identity.Refusal{Reason: flow.ReasonCertUntrusted, Detail: "the server is not the authority that made the join token"}
	}
	e, err := c.exchange(ctx, "/v1/join", joinRequest{Token: token.Encode(), CSR: csr}, nil, pinned)
	if err != nil {
		return identity.Enrolment{}, fmt.Errorf("join authority %s: %w", c.address, err)
	}
	return e, nil
}

// Renew implements identity.Enroller. The authority is known by roots.
func (c *Client) Renew(ctx context.Context, csr []byte, current tls.Certificate, roots [][]byte) (identity.Enrolment, error) {
	known := func(tls.ConnectionState) ([][]byte, error) { return roots, nil }
	e, err := c.exchange(ctx, "/v1/renew", renewRequest{CSR: csr}, &current, known)
	if err != nil {
		return identity.Enrolment{}, fmt.Errorf("renew at authority %s: %w", c.address, err)
	}
	return e, nil
}

// exchange makes one request on a connection of its own. rootsOf says which
// roots the server is to be verified by; nothing is sent before it is.
func (c *Client) exchange(ctx context.Context, path string, body any, current *tls.Certificate, rootsOf func(tls.ConnectionState) ([][]byte, error)) (identity.Enrolment, error) {
	ctx, cancel := context.WithTimeout(ctx, clientTime)
	defer cancel()
	payload, err := json.Marshal(body)
	if err != nil {
		return identity.Enrolment{}, err
	}
	transport := &http.Transport{
		Proxy:                  nil, // the authority is reached directly, whatever the environment says
		DisableKeepAlives:      true,
		MaxResponseHeaderBytes: maxHeader,
		TLSClientConfig:        c.tlsConfig(current, rootsOf),
	}
	defer transport.CloseIdleConnections()
	web := &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+c.address+path, bytes.NewReader(payload))
	if err != nil {
		return identity.Enrolment{}, err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := web.Do(request)
	if err != nil {
		return identity.Enrolment{}, err
	}
	defer response.Body.Close()
	b, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	if err != nil {
		return identity.Enrolment{}, err
	}
	if len(b) > maxAnswer {
		return identity.Enrolment{}, fmt.Errorf("the answer has more than %d bytes", maxAnswer)
	}
	if response.StatusCode != http.StatusOK {
		var refusal refusalAnswer
		if json.Unmarshal(b, &refusal) != nil || refusal.Reason == "" {
			return identity.Enrolment{}, fmt.Errorf("the server answers %s", response.Status)
		}
		return identity.Enrolment{}, &identity.Refusal{Reason: refusal.Reason, Detail: refusal.Error}
	}
	var a answer
	if err := decodeStrict(b, &a); err != nil {
		return identity.Enrolment{}, fmt.Errorf("the answer is not what an authority sends: %w", err)
	}
	return identity.Enrolment{TrustDomain: a.TrustDomain, Intermediate: a.Intermediate, Roots: a.Roots}, nil
}

func (c *Client) tlsConfig(current *tls.Certificate, rootsOf func(tls.ConnectionState) ([][]byte, error)) *tls.Config {
	config := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{"http/1.1"},
		CurvePreferences:   []tls.CurveID{tls.X25519MLKEM768, tls.CurveP256, tls.X25519},
		InsecureSkipVerify: true, // the name is a SPIFFE ID: VerifyConnection does it all
		VerifyConnection: func(cs tls.ConnectionState) error {
			roots, err := rootsOf(cs)
			if err != nil {
				return err
			}
			bundle, err := identity.NewBundle([]identity.TrustDomain{{Name: c.trustDomain, Roots: roots}})
			if err != nil {
				return err
			}
			peer, err := identity.NewVerifier(identity.VerifierOptions{Bundle: bundle}).PeerOf(cs, identity.RoleServer)
			if err != nil {
				return err
			}
			if peer.ID != ServerID(c.trustDomain) {
				return &identity.Refusal{Reason: flow.ReasonPeerMismatch, Detail: "the server is " + peer.ID + ", not the authority"}
			}
			return nil
		},
	}
	if current != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return current, nil }
	}
	return config
}

var _ identity.Enroller = (*Client)(nil)
