// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// TestSigned holds that a request with content gets through that its token's
// key has signed, over HTTP/1.1 and HTTP/2, and none that was changed.
func TestSigned(t *testing.T) {
	eachWay(t, nodeOptions{plan: changed(t, "body: {inspect: 1KiB, over: deny}\n  rules:\n    - {name: all, from: [client], http: [\"* /**\"]}",
		"body: {inspect: 1KiB, over: deny}\n  rules:\n    - {name: all, from: [client], http: [\"* /**\"], token: {issuer: sso, audience: server, boundTo: signature}}")}, func(t *testing.T, in, app *node) {
		for name, client := range map[string]*http.Client{"HTTP/1.1": httpClient(t), "HTTP/2": http2Client(t)} {
			serve := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
			if name == "HTTP/2" {
				app.app2(serve, 82)
			} else {
				app.app(serve, 82)
			}
			k := newKeyholder(t, app)
			// The same, with the key itself.
			claims := jwt.MapClaims{}
			if _, _, err := jwt.NewParser().ParseUnverified(k.token, claims); err != nil {
				t.Fatal(err)
			}
			claims["cnf"] = map[string]any{"jwk": k.jwk}
			token := k.sign(claims)
			host := in.out(clientNumber, serverPort(82))
			url := "http://" + host + "/pay?a=b"
			n := 0
			send := func(method, body, signed string, chunked bool) *http.Response {
				t.Helper()
				n++
				digest := sha256.Sum256([]byte(signed))
				field := "sha-256=:" + base64.StdEncoding.EncodeToString(digest[:]) + ":"
				params := fmt.Sprintf(`("@method" "@target-uri" "authorization" "content-digest");created=%d;nonce="n%d"`, time.Now().Unix(), n)
				base := "\"@method\": " + method + "\n\"@target-uri\": " + url + "\n\"authorization\": Bearer " + token + "\n\"content-digest\": " + field + "\n\"@signature-params\": " + params
				sum := sha256.Sum256([]byte(base))
				r, s, err := ecdsa.Sign(rand.Reader, k.key, sum[:])
				if err != nil {
					t.Fatal(err)
				}
				value := append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
				var content io.Reader = strings.NewReader(body)
				if chunked {
					content = io.MultiReader(content) // of a length that is not known
				}
				req, err := http.NewRequest("POST", url, content)
				if err != nil {
					t.Fatal(err)
				}
				for name, v := range map[string]string{"Authorization": "Bearer " + token, "Content-Digest": field, "Signature-Input": "sig=" + params,
					"Signature": "sig=:" + base64.StdEncoding.EncodeToString(value) + ":"} {
					req.Header.Set(name, v)
				}
				resp, err := client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				return resp
			}
			for _, c := range []struct {
				method, body, signed string
				chunked              bool
				want                 flow.Reason
			}{
				{"POST", "pay 1", "pay 1", false, flow.ReasonOK}, {"POST", "pay 1", "pay 1", true, flow.ReasonOK},
				{"POST", "pay 2", "pay 1", false, flow.ReasonSignatureDigest}, {"POST", "pay 2", "pay 1", true, flow.ReasonSignatureDigest},
				{"PUT", "pay 1", "pay 1", false, flow.ReasonSignatureMalformed}, {"POST", strings.Repeat("x", 2000), strings.Repeat("x", 2000), false, flow.ReasonTooLarge},
			} {
				resp := send(c.method, c.body, c.signed, c.chunked)
				if c.want != flow.ReasonOK {
					if reason, _ := problem(t, resp); reason != c.want {
						t.Errorf("%s: %+v: %d %s", name, c, resp.StatusCode, reason)
					}
					continue
				}
				b, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || resp.StatusCode != 200 || string(b) != c.body {
					t.Errorf("%s: %+v: %d %q %v", name, c, resp.StatusCode, b, err)
				}
			}
		}
	})
}
