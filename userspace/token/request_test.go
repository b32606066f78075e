// SPDX-License-Identifier: Apache-2.0

package token

import (
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func request(query string, fields ...string) *flow.Request {
	r := &flow.Request{Query: query}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, "=")
		r.Headers = append(r.Headers, flow.Header{Name: []byte(name), Value: []byte(value)})
	}
	return r
}

func TestFromRequest(t *testing.T) {
	tests := []struct {
		name    string
		request *flow.Request
		token   string
		want    flow.Reason
	}{
		{"bearer", request("", "Host=a", "Authorization=Bearer a.b.c"), "a.b.c", flow.ReasonOK},
		{"other case", request("", "authorization=bEARER a.b.c"), "a.b.c", flow.ReasonOK},
		{"two spaces", request("", "Authorization=Bearer  a.b.c"), "a.b.c", flow.ReasonOK},
		{"harmless query", request("q=access_token&x_access_token=1&access_tokens=2", "Authorization=Bearer a.b.c"), "a.b.c", flow.ReasonOK},
		{"none", request(""), "", flow.ReasonTokenMissing},
		{"basic", request("", "Authorization=Basic YTpi"), "", flow.ReasonTokenMissing},
		{"scheme only", request("", "Authorization=Bearer"), "", flow.ReasonTokenMissing},
		{"scheme and space", request("", "Authorization=Bearer "), "", flow.ReasonTokenMissing},
		{"scheme runs on", request("", "Authorization=Bearera.b.c"), "", flow.ReasonTokenMissing},
		{"DPoP", request("", "Authorization=DPoP a.b.c"), "a.b.c", flow.ReasonOK},
		{"a tab", request("", "Authorization=Bearer\ta.b.c"), "", flow.ReasonTokenMalformed},
		{"two tokens in one field", request("", "Authorization=Bearer a.b.c, Bearer d.e.f"), "", flow.ReasonTokenMalformed},
		{"a control character", request("", "Authorization=Bearer a.b\x01.c"), "", flow.ReasonTokenMalformed},
		{"too large", request("", "Authorization=Bearer "+strings.Repeat("a", MaxToken+1)), "", flow.ReasonTokenTooLarge},
		{"two fields", request("", "Authorization=Bearer a.b.c", "authorization=Bearer a.b.c"), "", flow.ReasonTokenPlace},
		{"two fields, one basic", request("", "Authorization=Basic YTpi", "Authorization=Bearer a.b.c"), "", flow.ReasonTokenPlace},
		{"query", request("access_token=a.b.c"), "", flow.ReasonTokenPlace},
		{"query and field", request("x=1&access_token=a", "Authorization=Bearer a.b.c"), "", flow.ReasonTokenPlace},
		{"query without value", request("x&access_token"), "", flow.ReasonTokenPlace},
		{"query, escaped", request("x=1&%61ccess%5Ftoken=a"), "", flow.ReasonTokenPlace},
		{"query, other case", request("Access_Token=a"), "", flow.ReasonTokenPlace},
		{"query, semicolon", request("x=1;access_token=a"), "", flow.ReasonTokenPlace},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			raw, dpop, reason := FromRequest(test.request)
			if dpop != (test.name == "DPoP") {
				t.Errorf("DPoP: %t", dpop)
			}
			if string(raw) != test.token || reason != test.want {
				t.Fatalf("got %q, %q", raw, reason)
			}
			if reason == flow.ReasonTokenPlace && reason.Status() != 400 {
				t.Fatalf("%q answers %d, want 400", reason, reason.Status())
			}
		})
	}
	r := request("a=1&b=2", "Host=x", "Authorization=Bearer a.b.c")
	if n := testing.AllocsPerRun(100, func() { FromRequest(r) }); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}
