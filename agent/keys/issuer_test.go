// SPDX-License-Identifier: Apache-2.0

package keys

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// tokenIssuer signs tokens and publishes its keys over HTTPS. It can rotate
// them, go down, be slow and publish what it must not.
type tokenIssuer struct {
	*server
	mu      sync.Mutex
	keys    map[string]*ecdsa.PrivateKey
	private bool          // publishes a private key
	down    bool          // answers 503
	hold    chan struct{} // answers only when it is closed
}

func newTokenIssuer(t *testing.T) *tokenIssuer {
	t.Helper()
	i := &tokenIssuer{keys: make(map[string]*ecdsa.PrivateKey)}
	i.server = newServer(t, i.publish)
	return i
}

func (i *tokenIssuer) change(do func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	do()
}

func (i *tokenIssuer) rotate(t *testing.T, id string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i.change(func() { i.keys[id] = k })
}

func (i *tokenIssuer) publish(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	hold := i.hold
	i.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-r.Context().Done():
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.down {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	list := []map[string]string{}
	for id, k := range i.keys {
		point, err := k.PublicKey.Bytes()
		if err != nil {
			panic(err)
		}
		jwk := map[string]string{
			"kty": "EC", "crv": "P-256", "use": "sig", "kid": id,
			"x": base64.RawURLEncoding.EncodeToString(point[1:33]), "y": base64.RawURLEncoding.EncodeToString(point[33:]),
		}
		if i.private {
			jwk["d"] = "AAAA"
		}
		list = append(list, jwk)
	}
	json.NewEncoder(w).Encode(map[string]any{"keys": list})
}

func (i *tokenIssuer) issue(t *testing.T, kid string) []byte {
	t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	now := time.Now()
	tok := jwt.NewWithClaims(jwt.SigningMethodES256, jwt.MapClaims{
		"iss": i.URL, "sub": "alice", "aud": "payments", "iat": now.Unix(), "exp": now.Add(time.Minute).Unix(), "jti": rand.Text(),
	})
	tok.Header["kid"], tok.Header["typ"] = kid, "at+jwt"
	s, err := tok.SignedString(i.keys[kid])
	if err != nil {
		t.Fatal(err)
	}
	return []byte(s)
}

// An issuer's life as both halves see it: keys are fetched by one and judged
// by the other.
func TestIssuersLife(t *testing.T) {
	i := newTokenIssuer(t)
	i.rotate(t, "one")
	var f *Fetcher
	v := token.New(token.Options{Refresh: func(name string) {
		if err := f.Refresh(name); err != nil {
			t.Error(err)
		}
	}})
	if err := v.SetIssuer(token.Issuer{Name: issuer, URL: i.URL}); err != nil {
		t.Fatal(err)
	}
	delivered := make(chan error, 64)
	f = New(Options{
		RootCAs: i.roots(), Interval: time.Hour, LeastInterval: 20 * time.Millisecond,
		Deliver: func(name string, document []byte, fetched time.Time, err error) {
			if err != nil {
				v.KeysFailed(name, err.Error())
			} else {
				err = v.SetKeys(name, document, fetched)
			}
			delivered <- err
		},
	})
	t.Cleanup(f.Close)
	verify := func(raw []byte) (flow.Reason, error) {
		_, reason, err := v.Verify(raw, &token.Check{Issuer: issuer, Audience: "payments"})
		return reason, err
	}
	want := func(what string, raw []byte, want flow.Reason) {
		t.Helper()
		if reason, err := verify(raw); reason != want {
			t.Fatalf("%s: %q (%v), want %q", what, reason, err, want)
		}
	}
	first := i.issue(t, "one")
	hold := make(chan struct{})
	i.change(func() { i.hold = hold })
	if err := f.SetSources([]Source{{Issuer: issuer, URL: i.URL}}); err != nil {
		t.Fatal(err)
	}
	want("before the first answer", first, flow.ReasonTokenUnavailable)
	i.change(func() { i.hold = nil })
	close(hold)
	if err := <-delivered; err != nil {
		t.Fatal(err)
	}
	want("after it", first, flow.ReasonOK)

	// The token before made the verifier ask; that answer comes too.
	if err := <-delivered; err != nil {
		t.Fatal(err)
	}
	i.change(func() { i.private = true })
	if err := f.Refresh(issuer); err != nil {
		t.Fatal(err)
	}
	if err := <-delivered; err == nil {
		t.Fatal("a published private key was taken")
	}
	want("a private key published", first, flow.ReasonOK)

	i.change(func() { i.private, i.down = false, true })
	if err := f.Refresh(issuer); err != nil {
		t.Fatal(err)
	}
	if err := <-delivered; err == nil {
		t.Fatal("an issuer that is down delivered")
	}
	want("down", i.issue(t, "one"), flow.ReasonOK)
	if s := v.Status(time.Now()); s[0].Problem == "" || s[0].Keys != 1 {
		t.Fatalf("status %+v", s)
	}
}

// The first token of a rotated key is refused at once, and taken after the
// wait that the refusal offers.
func TestRotation(t *testing.T) {
	i := newTokenIssuer(t)
	i.rotate(t, "one")
	var f *Fetcher
	v := token.New(token.Options{Refresh: func(name string) { f.Refresh(name) }})
	if err := v.SetIssuer(token.Issuer{Name: issuer, URL: i.URL}); err != nil {
		t.Fatal(err)
	}
	delivered := make(chan error, 64)
	f = New(Options{
		RootCAs: i.roots(), Interval: time.Hour, LeastInterval: 20 * time.Millisecond,
		Deliver: func(name string, document []byte, fetched time.Time, err error) {
			delivered <- v.SetKeys(name, document, fetched)
		},
	})
	t.Cleanup(f.Close)
	if err := f.SetSources([]Source{{Issuer: issuer, URL: i.URL}}); err != nil {
		t.Fatal(err)
	}
	if err := <-delivered; err != nil {
		t.Fatal(err)
	}
	i.rotate(t, "two")
	c := &token.Check{Issuer: issuer, Audience: "payments"}
	raw := i.issue(t, "two")
	_, reason, err := v.Verify(raw, c)
	if reason != flow.ReasonTokenKey || !errors.Is(err, token.ErrKeysPending) {
		t.Fatalf("got %q, %v", reason, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := v.Await(ctx, issuer); err != nil {
		t.Fatal(err)
	}
	for _, kid := range []string{"one", "two"} {
		if _, reason, err := v.Verify(i.issue(t, kid), c); reason != flow.ReasonOK {
			t.Fatalf("key %s: %q, %v", kid, reason, err)
		}
	}
	if hits := i.hits.Load(); hits != 2 {
		t.Fatalf("%d fetches", hits)
	}
}
