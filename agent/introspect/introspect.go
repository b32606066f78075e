// SPDX-License-Identifier: Apache-2.0

// Package introspect asks issuers about opaque tokens (RFC 7662), with
// credentials that stay in the privileged process.
package introspect

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/token"
)

const (
	// Timeout bounds a question.
	Timeout = 5 * time.Second
	// AtOnce bounds the questions under way, to all issuers together.
	AtOnce = 128

	maxCredentials = 4 << 10 // bytes of a file with credentials
)

// ErrBusy says that as many questions as may be are under way.
var ErrBusy = errors.New("too many questions to issuers are under way")

// Client asks. It is safe for concurrent use.
type Client struct {
	http  http.Client
	slots chan struct{}
}

// New returns a client that believes what leads to those roots, nil for the
// system's.
func New(roots *x509.CertPool) *Client {
	return &Client{slots: make(chan struct{}, AtOnce), http: http.Client{
		Transport: &http.Transport{
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots},
			ForceAttemptHTTP2:      true,
			MaxResponseHeaderBytes: 32 << 10,
			MaxConnsPerHost:        16,
			MaxIdleConnsPerHost:    4,
			IdleConnTimeout:        time.Minute,
			DisableCompression:     true,
		},
		// Credentials and token go to the URL that the policy names, and nowhere
		// else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("it redirects") },
	}}
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Ask asks about a token at an introspection endpoint and returns the answer,
// JSON of at most token.MaxAnswer bytes. credentials is the path of the file
// with those. Errors hold neither.
func (c *Client) Ask(ctx context.Context, endpoint, credentials, raw string) ([]byte, error) {
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	default:
		return nil, ErrBusy
	}
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	header, err := authorization(credentials)
	if err != nil {
		return nil, err
	}
	form := url.Values{"token": {raw}, "token_type_hint": {"access_token"}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint, strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	req.Header = http.Header{"Authorization": {header}, "Content-Type": {"application/x-www-form-urlencoded"}, "Accept": {"application/json"}, "User-Agent": {"sallyport"}}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	kind, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
	coding := res.Header.Get("Content-Encoding")
	switch {
	case res.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("the answer is %d", res.StatusCode)
	case kind != "application/json":
		return nil, errors.New("the answer is not application/json")
	case coding != "" && coding != "identity":
		return nil, errors.New("the answer is compressed")
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, token.MaxAnswer+1))
	if err == nil && len(body) > token.MaxAnswer {
		err = fmt.Errorf("the answer is over %d bytes", token.MaxAnswer)
	}
	return body, err
}

// Check says what is wrong with a file of credentials.
func Check(path string) error {
	_, err := authorization(path)
	return err
}

// authorization reads credentials, as the value of an Authorization field.
func authorization(path string) (string, error) {
	line, err := Secret(path)
	if err != nil {
		return "", err
	}
	if bearer, ok := strings.CutPrefix(line, "Bearer "); ok {
		return "Bearer " + bearer, nil
	}
	id, secret, ok := strings.Cut(line, ":")
	if !ok || id == "" {
		return "", fmt.Errorf("read credentials: %s is neither CLIENT_ID:CLIENT_SECRET nor Bearer and a token", path)
	}
	// RFC 6749 section 2.3.1: both are form-encoded first.
	r := http.Request{Header: http.Header{}}
	r.SetBasicAuth(url.QueryEscape(id), url.QueryEscape(secret))
	return r.Header.Get("Authorization"), nil
}

// Secret reads a file of one line that others must not read. Errors do not
// hold it.
func Secret(path string) (string, error) {
	// Without waiting for who writes into a pipe.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", fmt.Errorf("read credentials: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("read credentials: %w", err)
	}
	switch {
	case !info.Mode().IsRegular():
		return "", fmt.Errorf("read credentials: %s is not a regular file", path)
	case info.Mode().Perm()&0o007 != 0:
		return "", fmt.Errorf("read credentials: %s may be read by everybody; chmod 600 it", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxCredentials+1))
	if err != nil {
		return "", fmt.Errorf("read credentials: %w", err)
	}
	line := strings.TrimRight(string(b), "\r\n")
	if len(b) > maxCredentials || line == "" || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return "", fmt.Errorf("read credentials: %s is not one line of printable characters", path)
	}
	return line, nil
}
