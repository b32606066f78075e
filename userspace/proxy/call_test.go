// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
)

// TestDenial reads every kind of denial with net/http and with our own
// parser.
func TestDenial(t *testing.T) {
	const id = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
	for reason, want := range map[flow.Reason]struct {
		status    int
		challenge string
		retry     bool
	}{
		flow.ReasonNoRule:              {403, "", false},
		flow.ReasonTokenMissing:        {401, `Bearer realm="sallyport"`, false},
		flow.ReasonTokenExpired:        {401, `Bearer error="invalid_token"`, false},
		flow.ReasonTokenScope:          {403, `Bearer error="insufficient_scope"`, false},
		flow.ReasonStepUp:              {401, `Bearer error="insufficient_user_authentication"`, false},
		flow.ReasonMalformed:           {400, "", false},
		flow.ReasonTimeout:             {408, "", false},
		flow.ReasonTooLarge:            {413, "", false},
		flow.ReasonThrottled:           {429, "", true},
		flow.ReasonUpstream:            {502, "", false},
		flow.ReasonRelationUnavailable: {503, "", true},
	} {
		for _, head := range []bool{false, true} {
			for _, keep := range []bool{false, true} {
				b := appendDenial(nil, &flow.Decision{Reason: reason}, true, id, head, keep)
				method := "GET"
				if head {
					method = "HEAD"
				}
				br := bufio.NewReader(bytes.NewReader(b))
				resp, err := http.ReadResponse(br, &http.Request{Method: method})
				if err != nil {
					t.Fatalf("%s: %v", reason, err)
				}
				if resp.StatusCode != want.status || resp.Header.Get("WWW-Authenticate") != want.challenge || (resp.Header.Get("Retry-After") != "") != want.retry || resp.Close == keep {
					t.Errorf("%s: status %d, header %v, close %v", reason, resp.StatusCode, resp.Header, resp.Close)
				}
				if head {
					if rest, _ := io.ReadAll(br); len(rest) != 0 {
						t.Errorf("%s: HEAD is answered with content", reason)
					}
				} else if got, _ := problem(t, resp); got != reason {
					t.Errorf("%s: the document says %s", reason, got)
				}
				var scan http1.Scan
				n, err := scan.End(b)
				if err != nil || n == 0 {
					t.Fatalf("%s: %d %v", reason, n, err)
				}
				var ours http1.Response
				if err := ours.Parse(b[:n]); err != nil || ours.Close == keep {
					t.Errorf("%s: %v", reason, err)
				}
			}
		}
	}
}

// TestStepUpChallenge holds that a caller is told how to authenticate (RFC
// 9470, section 3), and by no other denial.
func TestStepUpChallenge(t *testing.T) {
	const id, more = "01ARZ3NDEKTSV4RRFFQ69G5FAV", `, acr_values="mfa", max_age=300`
	for reason, want := range map[flow.Reason]string{
		flow.ReasonStepUp:        `Bearer error="insufficient_user_authentication", acr_values="mfa", max_age=300`,
		flow.ReasonAnomalyStepUp: `Bearer error="insufficient_user_authentication", acr_values="mfa", max_age=300`,
		flow.ReasonTokenExpired:  `Bearer error="invalid_token"`,
	} {
		resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(appendDenial(nil, &flow.Decision{Reason: reason, Challenge: more}, true, id, false, false))), nil)
		if err != nil {
			t.Fatal(err)
		}
		problem(t, resp)
		if got := resp.Header.Get("WWW-Authenticate"); got != want {
			t.Errorf("%s: challenge %q, want %q", reason, got, want)
		}
	}
}

// TestDenialToStrangers holds that one who has not proven who it is cannot
// tell one refusal of the policy from another.
func TestDenialToStrangers(t *testing.T) {
	const id = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
	hidden := appendDenial(nil, &flow.Decision{Reason: flow.ReasonNoRule}, false, id, false, false)
	for _, reason := range []flow.Reason{flow.ReasonDenyRule, flow.ReasonCondition, flow.ReasonConditionErr, flow.ReasonRelation,
		flow.ReasonMayCall, flow.ReasonPosture, flow.ReasonAnomaly, flow.ReasonNoPolicy, flow.ReasonUnknownIdentity, flow.ReasonIdentityRevoked} {
		if got := appendDenial(nil, &flow.Decision{Reason: reason}, false, id, false, false); !bytes.Equal(got, hidden) {
			t.Errorf("%s differs from %s:\n%s\n%s", reason, flow.ReasonNoRule, got, hidden)
		}
	}
	token := appendDenial(nil, &flow.Decision{Reason: flow.ReasonTokenSignature}, false, id, false, false)
	for _, reason := range []flow.Reason{flow.ReasonTokenExpired, flow.ReasonTokenKey, flow.ReasonTokenIssuer, flow.ReasonTokenAudience, flow.ReasonTokenRevoked} {
		if got := appendDenial(nil, &flow.Decision{Reason: reason}, false, id, false, false); !bytes.Equal(got, token) {
			t.Errorf("%s differs from %s:\n%s\n%s", reason, flow.ReasonTokenSignature, got, token)
		}
	}
	for reason, want := range map[flow.Reason]flow.Reason{
		flow.ReasonNoRule: flow.ReasonOK, flow.ReasonTokenSignature: flow.ReasonOK, flow.ReasonNoIdentity: flow.ReasonNoIdentity, flow.ReasonMalformed: flow.ReasonMalformed,
	} {
		resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(appendDenial(nil, &flow.Decision{Reason: reason}, false, id, false, false))), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := problem(t, resp); got != want {
			t.Errorf("%s: a stranger is told %q, want %q", reason, got, want)
		}
	}
}

// TestDenialUnderHead holds that a denied HEAD leaves the connection in
// step.
func TestDenialUnderHead(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.app(http.HandlerFunc(reflect), 80)
		conn := dialTCP(t, in.out(clientNumber, serverPort(80)))
		io.WriteString(conn, "HEAD /debug/x HTTP/1.1\r\nHost: a\r\n\r\nPOST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok")
		br := bufio.NewReader(conn)
		resp, err := http.ReadResponse(br, &http.Request{Method: "HEAD"})
		if err != nil || resp.StatusCode != 403 || resp.Close {
			t.Fatal(resp, err)
		}
		resp, err = http.ReadResponse(br, nil)
		if err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		if b, _ := io.ReadAll(resp.Body); string(b) != "ok" {
			t.Errorf("got %q", b)
		}
	})
}

// TestDeniedBody holds that a denied request with a body that is not there
// yet cannot become the next request.
func TestDeniedBody(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		app.app(http.HandlerFunc(reflect), 80)
		addr := in.out(clientNumber, serverPort(80))
		const smuggled = "GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
		whole := dialTCP(t, addr)
		// All of the body is there: it is stepped over.
		io.WriteString(whole, "POST /debug/x HTTP/1.1\r\nHost: a\r\nContent-Length: 28\r\n\r\n"+smuggled+"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nnext")
		br := bufio.NewReader(whole)
		for i, want := range []int{403, 200} {
			resp, err := http.ReadResponse(br, nil)
			if err != nil || resp.StatusCode != want {
				t.Fatal(i, resp, err)
			}
			if b, _ := io.ReadAll(resp.Body); want == 200 && string(b) != "next" {
				t.Errorf("got %q", b)
			}
		}
		part := dialTCP(t, addr)
		io.WriteString(part, "POST /debug/x HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
		br = bufio.NewReader(part)
		resp, err := http.ReadResponse(br, nil)
		if err != nil || resp.StatusCode != 403 || !resp.Close {
			t.Fatal(resp, err)
		}
		io.Copy(io.Discard, resp.Body)
		io.WriteString(part, strings.Repeat(smuggled, 3))
		if rest, _ := io.ReadAll(br); len(rest) != 0 {
			t.Errorf("more was answered: %q", rest)
		}
	})
}
