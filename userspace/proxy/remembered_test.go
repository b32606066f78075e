// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// TestCachedAnswers has an issuer's keys grow too old between two calls with
// one token: with onError: cached it stays good for a while, another is not,
// and a revocation ends that.
func TestCachedAnswers(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.app2(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), 88)
		url := "http://" + in.out(clientNumber, serverPort(88)) + "/items/7"
		client := httpClient(t)
		get := func(token string) (int, flow.Reason) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Authorization", "Bearer "+token)
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode == http.StatusOK {
				resp.Body.Close()
				return resp.StatusCode, flow.ReasonOK
			}
			reason, _ := problem(t, resp)
			return resp.StatusCode, reason
		}
		token := app.mintsWith(t, jwt.MapClaims{"acr": "mfa"})
		if status, reason := get(token); status != http.StatusOK {
			t.Fatalf("while the keys are good: %d %s", status, reason)
		}
		if err := app.tokens.SetKeys("t/sso", app.jwks, time.Now().Add(-25*time.Hour)); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if status, reason := get(token); status != http.StatusOK {
				t.Errorf("once the keys are too old: %d %s", status, reason)
			}
		}
		if n := app.pipeline.Counters().Recalled; n != 2 {
			t.Errorf("%d cached answers", n)
		}
		said := 0
		for _, r := range app.records() {
			if r.Decision == "allow" && strings.HasPrefix(r.Detail, "cached answer of ") && strings.HasSuffix(r.Detail, "because token failed: token_keys_stale") {
				said++
			}
		}
		if said != 2 {
			t.Errorf("%d records say that they rest on a cached answer", said)
		}
		// The same claims and key under another signature are another token.
		if status, reason := get(token[:len(token)-1]); status == http.StatusOK {
			t.Errorf("another token: %d %s", status, reason)
		}
		app.pipeline.SetRevocations(nil)
		if status, reason := get(token); status != http.StatusServiceUnavailable || reason != flow.ReasonTokenKeysStale {
			t.Errorf("after a revocation: %d %s", status, reason)
		}
	})
}
