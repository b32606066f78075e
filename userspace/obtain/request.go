// SPDX-License-Identifier: Apache-2.0

package obtain

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

const (
	maxAnswer = 64 << 10 // bytes of an issuer's answer, its head included
	// unsaid is how long a token is kept whose issuer does not say how long it
	// lives.
	unsaid  = time.Minute
	maxLife = 24 * time.Hour
)

// request obtains a token that is bound to a leaf, by a connection of its own:
// the certificate that it shows is what the token is bound to (RFC 8705 section
// 3).
func (s *Source) request(ctx context.Context, w *Want, leaf *identity.Leaf) (value string, life time.Duration, err error) {
	u, err := url.Parse(w.URL)
	if err != nil {
		return "", 0, errorf(w, "%w", err)
	}
	raw, err := s.opt.Dial(ctx, w.ID, w.Issuer)
	if err != nil {
		return "", 0, errorf(w, "%w", err)
	}
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })()
	conn := tls.Client(raw, &tls.Config{
		MinVersion: tls.VersionTLS12, ServerName: u.Hostname(), RootCAs: s.opt.Roots, NextProtos: []string{"http/1.1"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &leaf.Certificate, nil },
	})
	if err := conn.HandshakeContext(ctx); err != nil {
		return "", 0, errorf(w, "%w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.URL, strings.NewReader(w.form().Encode()))
	if err != nil {
		return "", 0, errorf(w, "%w", err)
	}
	req.Header = http.Header{"Content-Type": {"application/x-www-form-urlencoded"}, "Accept": {"application/json"}, "User-Agent": {"sallyport"}}
	req.Close = true
	if err := req.Write(conn); err != nil {
		return "", 0, errorf(w, "%w", err)
	}
	from := &remembering{Reader: io.LimitReader(conn, maxAnswer)}
	res, err := http.ReadResponse(bufio.NewReader(from), req)
	if err != nil {
		return "", 0, errorf(w, "%w", from.reason())
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return "", 0, errorf(w, "%w", from.reason())
	}
	a, err := parseAnswer(res.StatusCode, res.Header, body)
	if err != nil {
		return "", 0, errorf(w, "%w", err)
	}
	return a.token, min(a.life, w.MaxLifetime), nil
}

// remembering keeps the error of a reader. What a parser of HTTP says of what
// was read may quote it.
type remembering struct {
	io.Reader
	err error
}

func (r *remembering) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if err != nil {
		r.err = err
	}
	return n, err
}

// reason is why no answer could be read.
func (r *remembering) reason() error {
	if r.err == nil || errors.Is(r.err, io.EOF) {
		return errors.New("the answer is not HTTP, longer than 64 KiB, or not whole")
	}
	return r.err
}

// form is the body of a request.
func (w *Want) form() url.Values {
	form := url.Values{"grant_type": {"client_credentials"}, "client_id": {w.ClientID}, "audience": {w.Audience}}
	if u, err := url.Parse(w.Audience); err == nil && u.IsAbs() && u.Fragment == "" {
		form.Set("resource", w.Audience) // RFC 8707 section 2
	}
	if len(w.Scopes) > 0 {
		form.Set("scope", strings.Join(w.Scopes, " "))
	}
	return form
}

type answer struct {
	token string
	life  time.Duration
}

// parseAnswer reads the answer of a token endpoint (RFC 6749 sections 5.1 and
// 5.2). Its errors hold no part of a token.
func parseAnswer(status int, h http.Header, body []byte) (answer, error) {
	kind, _, _ := mime.ParseMediaType(h.Get("Content-Type"))
	if coding := h.Get("Content-Encoding"); coding != "" && coding != "identity" {
		return answer{}, errors.New("the answer is compressed")
	}
	if status != http.StatusOK {
		var why struct {
			Error string `json:"error"`
		}
		if kind == "application/json" && json.Unmarshal(body, &why) == nil && isErrorCode(why.Error) {
			return answer{}, errors.New("the answer is " + why.Error)
		}
		return answer{}, fmt.Errorf("the answer is %d", status)
	}
	if kind != "application/json" {
		return answer{}, errors.New("the answer is not application/json")
	}
	var m struct {
		Token   string       `json:"access_token"`
		Type    string       `json:"token_type"`
		Expires *json.Number `json:"expires_in"`
	}
	d := json.NewDecoder(bytes.NewReader(body))
	if err := d.Decode(&m); err != nil {
		return answer{}, errors.New("the answer is not JSON of the form of RFC 6749")
	}
	switch {
	case !strings.EqualFold(m.Type, "Bearer"):
		return answer{}, errors.New("the token is not of type Bearer")
	case !token.WellFormed([]byte(m.Token)):
		return answer{}, errors.New("the token has no form that a request could bear")
	case m.Expires == nil:
		return answer{m.Token, unsaid}, nil
	}
	seconds, err := m.Expires.Float64()
	if err != nil || seconds < 1 {
		return answer{}, errors.New("the token does not live for a second")
	}
	return answer{m.Token, time.Duration(min(seconds, maxLife.Seconds())) * time.Second}, nil
}

// isErrorCode says whether s is an error code of RFC 6749 section 5.2, which
// may be shown.
func isErrorCode(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool { return (r < 'a' || r > 'z') && r != '_' })
}
