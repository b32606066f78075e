// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
)

// dpopPlan asks for tokens that are bound to a key.
func dpopPlan(t *testing.T) *compile.Plan {
	t.Helper()
	return changed(t, "{name: all, from: [client], http: [\"* /**\"]}\n    - {name: no-debug",
		"{name: all, from: [client], http: [\"* /**\"], token: {issuer: sso, audience: server, boundTo: dpop}}\n    - {name: no-debug")
}

// keyholder is a client with a key, and a token that is bound to it.
type keyholder struct {
	t     *testing.T
	key   *ecdsa.PrivateKey
	jwk   map[string]any
	token string
	made  int
	// issuer signs its tokens.
	issuer *ecdsa.PrivateKey
}

// newKeyholder makes one, whose token's issuer the node knows.
func newKeyholder(t *testing.T, n *node) *keyholder {
	t.Helper()
	b64 := base64.RawURLEncoding.EncodeToString
	newKey := func() (*ecdsa.PrivateKey, map[string]any) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		point, err := key.PublicKey.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		return key, map[string]any{"kty": "EC", "crv": "P-256", "x": b64(point[1:33]), "y": b64(point[33:])}
	}
	k := &keyholder{t: t}
	k.key, k.jwk = newKey()
	thumb, err := json.Marshal(k.jwk)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(thumb)
	issuer, public := newKey()
	public["kid"] = "k1"
	set, err := json.Marshal(map[string]any{"keys": []any{public}})
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range pipeline.Issuers(n.pipeline.Plan()) {
		if err := errors.Join(n.tokens.SetIssuer(i), n.tokens.SetKeys(i.Name, set, time.Now())); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	k.issuer = issuer
	k.token = k.sign(jwt.MapClaims{"iss": "https://sso.t.example", "sub": "alice", "aud": "server", "client_id": "c",
		"jti": "t1", "iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(), "cnf": map[string]any{"jkt": b64(sum[:])}})
	return k
}

// sign makes a token of the issuer.
func (k *keyholder) sign(claims jwt.MapClaims) string {
	k.t.Helper()
	signed := jwt.NewWithClaims(jwt.SigningMethodES256, claims)
	signed.Header["kid"], signed.Header["typ"] = "k1", "at+jwt"
	s, err := signed.SignedString(k.issuer)
	if err != nil {
		k.t.Fatal(err)
	}
	return s
}

// proof is one for a request.
func (k *keyholder) proof(method, url string) string {
	k.t.Helper()
	k.made++
	sum := sha256.Sum256([]byte(k.token))
	p := jwt.NewWithClaims(jwt.SigningMethodES256, jwt.MapClaims{"jti": fmt.Sprint(k.made), "htm": method, "htu": url, "iat": time.Now().Unix(),
		"ath": base64.RawURLEncoding.EncodeToString(sum[:])})
	p.Header["typ"], p.Header["jwk"] = "dpop+jwt", k.jwk
	s, err := p.SignedString(k.key)
	if err != nil {
		k.t.Fatal(err)
	}
	return s
}

func (k *keyholder) call(c *http.Client, url, proof string) *http.Response {
	k.t.Helper()
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		k.t.Fatal(err)
	}
	req.Header.Set("Authorization", "DPoP "+k.token)
	if proof != "" {
		req.Header.Set("DPoP", proof)
	}
	resp, err := c.Do(req)
	if err != nil {
		k.t.Fatal(err)
	}
	return resp
}

// TestDPoP holds that a request with a proof of its own gets through, over
// HTTP/1.1 and HTTP/2, and any other does not, and is told what is wanted.
func TestDPoP(t *testing.T) {
	eachWay(t, nodeOptions{plan: dpopPlan(t)}, func(t *testing.T, in, app *node) {
		for name, client := range map[string]*http.Client{"HTTP/1.1": httpClient(t), "HTTP/2": http2Client(t)} {
			serve := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Header.Get("Authorization")) })
			if name == "HTTP/2" {
				app.app2(serve, 80)
			} else {
				app.app(serve, 80)
			}
			k := newKeyholder(t, app)
			url := "http://" + in.out(clientNumber, serverPort(80)) + "/pay"
			proof := k.proof("GET", url)
			for n, c := range []struct {
				url, proof string
				want       flow.Reason
			}{
				{url, proof, flow.ReasonOK}, {url + "?a=b", k.proof("GET", url), flow.ReasonOK}, {url, proof, flow.ReasonProofReplayed}, {url, "", flow.ReasonProofMissing},
				{url, k.proof("POST", url), flow.ReasonProofMismatch}, {url + "/7", k.proof("GET", url), flow.ReasonProofMismatch}, {url, "x.y.z", flow.ReasonProofMalformed},
			} {
				resp := k.call(client, c.url, c.proof)
				if c.want == flow.ReasonOK {
					b, err := io.ReadAll(resp.Body)
					resp.Body.Close()
					if err != nil || resp.StatusCode != 200 || string(b) != "DPoP "+k.token {
						t.Errorf("%s, %d: status %d, %d bytes, %v", name, n, resp.StatusCode, len(b), err)
					}
					continue
				}
				challenge := resp.Header.Get("WWW-Authenticate")
				if reason, _ := problem(t, resp); reason != c.want || resp.StatusCode != 401 ||
					!strings.HasPrefix(challenge, `DPoP error="invalid_dpop_proof", algs="ES256 `) {
					t.Errorf("%s, %d: %d %s, %s", name, n, resp.StatusCode, reason, challenge)
				}
			}
			resp, err := client.Get(url)
			if err != nil {
				t.Fatal(err)
			}
			challenge := resp.Header.Get("WWW-Authenticate")
			if reason, _ := problem(t, resp); reason != flow.ReasonTokenMissing || !strings.HasPrefix(challenge, `DPoP realm="sallyport", algs="`) {
				t.Errorf("%s: without a token: %s, %s", name, reason, challenge)
			}
		}
	})
}

// TestDPoPJudgedAgain holds that a proof is no replay of itself where what it
// let through is judged again.
func TestDPoPJudgedAgain(t *testing.T) {
	eachWay(t, nodeOptions{plan: dpopPlan(t)}, func(t *testing.T, in, app *node) {
		for name, client := range map[string]*http.Client{"HTTP/1.1": httpClient(t), "HTTP/2": http2Client(t)} {
			next := make(chan struct{})
			serve := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				for {
					io.WriteString(w, "tick")
					w.(http.Flusher).Flush()
					select {
					case <-next:
					case <-r.Context().Done():
						return
					}
				}
			})
			if name == "HTTP/2" {
				app.app2(serve, 80)
			} else {
				app.app(serve, 80)
			}
			k := newKeyholder(t, app)
			url := "http://" + in.out(clientNumber, serverPort(80)) + "/pay"
			resp := k.call(client, url, k.proof("GET", url))
			if resp.StatusCode != 200 {
				t.Fatal(resp.StatusCode)
			}
			tick := func() error {
				_, err := io.ReadFull(resp.Body, make([]byte, 4))
				return err
			}
			// An exchange is registered once it has lasted a second.
			began := time.Now()
			for time.Since(began) < patience+200*time.Millisecond {
				if err := tick(); err != nil {
					t.Fatalf("%s: %v: %+v", name, err, app.records())
				}
				next <- struct{}{}
			}
			app.proxy.SetPlan(dpopPlan(t), 2)
			for range 3 {
				if err := tick(); err != nil {
					t.Fatalf("%s: the same rules again: %v: %+v", name, err, app.records())
				}
				next <- struct{}{}
			}
			app.proxy.SetPlan(plan(t, "enforce"), 3)
			app.proxy.SetPlan(changed(t, `{name: all, from: [client], http: ["* /**"]}`, `{name: all, from: [client], http: ["* /other/**"]}`), 4)
			if b, err := io.ReadAll(resp.Body); err == nil {
				t.Errorf("%s: it ended with %q", name, b)
			}
			resp.Body.Close()
			app.proxy.SetPlan(dpopPlan(t), 5)
		}
	})
}
