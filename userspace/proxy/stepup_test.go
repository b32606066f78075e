// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
)

// TestStepUp has a client challenged for an unusual call, over HTTP/1.1,
// HTTP/2 and gRPC, and the same call pass once it has done as the challenge
// says.
func TestStepUp(t *testing.T) {
	stale := jwt.MapClaims{"acr": "mfa", "auth_time": time.Now().Add(-10 * time.Minute).Unix()}
	fresh := func() jwt.MapClaims { return jwt.MapClaims{"acr": "mfa", "auth_time": time.Now().Unix()} }
	for _, c := range []struct {
		name   string
		client func(testing.TB) *http.Client
	}{{"HTTP1", httpClient}, {"HTTP2", http2Client}} {
		t.Run(c.name, func(t *testing.T) {
			eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
				app.app2(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), 88)
				url := "http://" + in.out(clientNumber, serverPort(88)) + "/items/7?page="
				client := c.client(t)
				get := func(query, token string) *http.Response {
					req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+query, nil)
					if err != nil {
						t.Fatal(err)
					}
					req.Header.Set("Authorization", "Bearer "+token)
					resp, err := client.Do(req)
					if err != nil {
						t.Fatal(err)
					}
					return resp
				}
				const unusual = "1%27+OR+%271%27=%271--<x>"
				token := app.mintsWith(t, stale)
				for i := range 200 {
					if resp := get(fmt.Sprint(i%40), token); resp.StatusCode != http.StatusOK {
						t.Fatalf("request %d: %s", i, resp.Status)
					} else {
						resp.Body.Close()
					}
				}
				for range 2 {
					resp := get(unusual, token)
					if reason, _ := problem(t, resp); resp.StatusCode != http.StatusUnauthorized || reason != flow.ReasonAnomalyStepUp {
						t.Fatalf("unusual: %s %s", resp.Status, reason)
					}
					if got, want := resp.Header.Get("WWW-Authenticate"), `Bearer error="insufficient_user_authentication", acr_values="mfa hwk", max_age=120`; got != want {
						t.Errorf("challenge %q, want %q", got, want)
					}
				}
				token = app.mintsWith(t, fresh())
				for range 2 {
					resp := get(unusual, token)
					resp.Body.Close()
					if resp.StatusCode != http.StatusOK {
						t.Fatalf("after the challenge was met: %s", resp.Status)
					}
				}
			})
		})
	}
	t.Run("gRPC", func(t *testing.T) {
		eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
			app.rpc(88)
			conn := rpcClient(t, in.out(clientNumber, serverPort(88)), nil)
			call := func(method string, authTime time.Time, opts ...grpc.CallOption) error {
				token := app.mintsWith(t, jwt.MapClaims{"auth_time": authTime.Unix()})
				_, err := call1(metadata.AppendToOutgoingContext(within(t), "authorization", "Bearer "+token), conn, method, "x", opts...)
				return err
			}
			ctx := metadata.AppendToOutgoingContext(within(t), "authorization", "Bearer "+app.mintsWith(t, stale))
			for i := range 200 {
				if _, err := call1(ctx, conn, "/t.Echo/Unary", "x"); err != nil {
					t.Fatalf("call %d: %v", i, err)
				}
			}
			var trailer metadata.MD
			err := call("/t.Echo/Secret", time.Now().Add(-time.Hour), grpc.Trailer(&trailer))
			refusedCall(t, err, codes.Unauthenticated, flow.ReasonAnomalyStepUp)
			if got, want := fmt.Sprint(trailer.Get("www-authenticate")), `[Bearer error="insufficient_user_authentication", max_age=120]`; got != want {
				t.Errorf("challenge %s, want %s", got, want)
			}
			if err := call("/t.Echo/Secret", time.Now()); err != nil {
				t.Errorf("after the challenge was met: %v", err)
			}
		})
	})
}
