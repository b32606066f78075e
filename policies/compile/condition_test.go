// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func activation() *Activation {
	return &Activation{
		Request: &flow.Request{
			Method: "POST", Path: "/v1/pay%6Dents/p%201", Host: "pay.example", ContentLength: 100,
			Headers: []flow.Header{
				{Name: []byte("X-Account"), Value: []byte("a-1")},
				{Name: []byte("x-twice"), Value: []byte("1")}, {Name: []byte("X-Twice"), Value: []byte("2")},
				{Name: []byte("X-Colon"), Value: []byte("a:b")},
			},
			Peer: flow.Peer{ID: "spiffe://example.org/node/far/unit/checkout.service"},
		},
		Source: &Identity{ID: "spiffe://example.org/node/near/unit/checkout.service", Name: "checkout", Namespace: "shop"},
		Token: &Claims{
			Subject: "alice", Issuer: "https://sso.example", ClientID: "c-1", Scopes: []string{"read", "write"}, Groups: []string{"staff"},
			Raw: map[string]any{"tenant": "t-1", "level": float64(3), "roles": []any{"admin"}, "act": map[string]any{"sub": "bob"}},
		},
		Match: &Match{
			Template: "/v1/payments/{id}", pattern: &pattern{params: []string{"id"}},
			path: "/v1/payments/p%201", encoded: true, spans: [maxParams]span{{13, 18}},
		},
		Time: time.Date(2026, 11, 1, 12, 30, 0, 0, time.UTC),
	}
}

func TestCondition(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"request.content_length < 65536 && !('test' in token.groups)", "true"},
		{"request.method == 'POST' && request.host == 'pay.example'", "true"},
		{"request.path == '/v1/payments/p 1'", "true"},
		{"request.path.startsWith('/v1/pay%6D')", "false"},
		{"request.path.matches('^/v1/[a-z]+/')", "true"},
		{"params.id == 'p 1' && params['id'].size() == 3", "true"},
		{"params.other == 'x'", "error"},
		{"'id' in params && !('other' in params)", "true"},
		{"request.headers['X-Account'] == 'a-1' && request.headers['x-account'] == 'a-1'", "true"},
		{"'X-Missing' in request.headers", "false"},
		{"request.headers['X-Missing'] == ''", "error"},
		{"request.headers['X-Twice'] == '1'", "error"},
		{"'X-Twice' in request.headers", "error"},
		{"source.name == 'checkout' && source.namespace == 'shop' && source.id.contains('/node/far/')", "true"},
		{"token.sub == 'alice' && token.iss == 'https://sso.example' && token.client_id == 'c-1'", "true"},
		{"token.scopes.exists(s, s == 'write')", "true"},
		{"token.claims.tenant == 't-1' && token.claims.level > 2.0 && 'admin' in token.claims.roles", "true"},
		{"token.claims.act.sub == 'bob' && has(token.claims.act) && !has(token.claims.none)", "true"},
		{"token.claims.none == 'x'", "error"},
		{"token.claims.tenant", "error"},
		{"time.getHours() == 12 && time < timestamp('2027-01-01T00:00:00Z')", "true"},
		{"1 / 0 == 1", "error"},
	} {
		cond, errs := compileCondition(c.text)
		if errs != nil {
			t.Errorf("%s: %v", c.text, errs)
			continue
		}
		got := "error"
		ok, err := cond.Eval(activation())
		if err == nil {
			got = map[bool]string{true: "true", false: "false"}[ok]
		} else if ok {
			t.Errorf("%s: true with error %v", c.text, err)
		}
		if got != c.want {
			t.Errorf("%s: %s (%v), want %s", c.text, got, err, c.want)
		}
	}
}

func TestConditionErrorsHoldNoValues(t *testing.T) {
	for text, want := range map[string]error{
		"token.claims[params.id] == 'x'":         errMissing,
		"token.claims.none == 'x'":               errMissing,
		"int(request.headers['X-Account']) == 1": errOperation,
		"timestamp(params.id) < time":            errOperation,
		"token.claims.tenant":                    errNotBool,
	} {
		cond, errs := compileCondition(text)
		if errs != nil {
			t.Fatal(errs)
		}
		if _, err := cond.Eval(activation()); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", text, err, want)
		}
	}
}

func TestConditionWithoutTokenOrSource(t *testing.T) {
	a := activation()
	a.Token, a.Source, a.Match, a.Request.Peer = nil, nil, nil, flow.Peer{}
	for text, want := range map[string]bool{"source.id == '' && source.name == ''": true, "token.sub == ''": false, "'id' in params": false} {
		cond, errs := compileCondition(text)
		if errs != nil {
			t.Fatal(errs)
		}
		if ok, _ := cond.Eval(a); ok != want {
			t.Errorf("%s: %v, want %v", text, ok, want)
		}
	}
}

func TestConditionCostIsLimited(t *testing.T) {
	cond, errs := compileCondition("token.groups.all(a, token.groups.all(b, token.groups.all(c, a + b != c + 'x')))")
	if errs != nil {
		t.Fatal(errs)
	}
	a := activation()
	if ok, err := cond.Eval(a); !ok || err != nil {
		t.Fatalf("small: %v, %v", ok, err)
	}
	a.Token.Groups = make([]string, 200)
	for i := range a.Token.Groups {
		a.Token.Groups[i] = strings.Repeat("g", 1+i)
	}
	if ok, err := cond.Eval(a); ok || err == nil || !errors.Is(err, errCost) {
		t.Errorf("large: %v, %v", ok, err)
	}
}

func TestRelation(t *testing.T) {
	for _, c := range []struct {
		text, user, object string
		reason             flow.Reason
	}{
		{text: "user:{token.sub} can_pay account:{header.x-account}", user: "user:alice", object: "account:a-1"},
		{text: "service:{source.namespace}/{source.name} can doc:{token.tenant}", user: "service:shop/checkout", object: "doc:t-1"},
		{text: "user:fixed can endpoint:orders|GET|/v1/{token.client_id}", user: "user:fixed", object: "endpoint:orders|GET|/v1/c-1"},
		{text: "team:x#member can doc:1", user: "team:x#member", object: "doc:1"},
		{text: "user:a can doc:{param.id}", reason: flow.ReasonRelationTemplate}, // holds a space
		{text: "user:{token.iss} can doc:1", reason: flow.ReasonRelationTemplate},
		{text: "user:{token.level} can doc:1", reason: flow.ReasonRelationTemplate},
		{text: "user:{token.none} can doc:1", reason: flow.ReasonRelationTemplate},
		{text: "user:{header.X-Missing} can doc:1", reason: flow.ReasonRelationTemplate},
		{text: "user:{header.X-Twice} can doc:1", reason: flow.ReasonHeaderAmbiguous},
		{text: "user:{header.X-Colon} can doc:1", reason: flow.ReasonRelationTemplate},
	} {
		r, err := parseRelation(c.text)
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		a := activation()
		user, reason := r.User.Append(nil, a)
		if reason == flow.ReasonOK {
			var object []byte
			if object, reason = r.Object.Append(nil, a); reason == flow.ReasonOK && (string(user) != c.user || string(object) != c.object) {
				t.Errorf("%s: %s, %s", c.text, user, object)
			}
		}
		if reason != c.reason {
			t.Errorf("%s: reason %q, want %q", c.text, reason, c.reason)
		}
	}
}

func TestRelationWithoutIdentityIsRefused(t *testing.T) {
	r, err := parseRelation("service:{source.name} can doc:{token.sub}")
	if err != nil {
		t.Fatal(err)
	}
	a := activation()
	a.Source, a.Token = nil, nil
	for _, template := range []*Template{&r.User, &r.Object} {
		if v, reason := template.Append(nil, a); reason != flow.ReasonRelationTemplate {
			t.Errorf("%s, %q", v, reason)
		}
	}
}

func TestValidRelationValue(t *testing.T) {
	for v, want := range map[string]bool{
		"a": true, "a-1_2.3/4": true, "ä": true, "": false, "a b": false, "a\tb": false, "a:b": false, "a#b": false, "a@b": false,
		"*": false, "a|b": false, "a\x00": false, "a\x7f": false, "a\u00a0b": false, "a\u2028": false, "a\u200b": false, "\xff": false,
		"a\u0085": false, strings.Repeat("a", 256): true, strings.Repeat("a", 257): false,
	} {
		if got := ValidRelationValue([]byte(v)); got != want {
			t.Errorf("%q: %v", v, got)
		}
	}
}

// TestConditionWithoutRequest holds that what is asked of a request cannot be
// told of an opaque connection: waiting until a port of protocol: auto takes a
// connection for opaque evades no deny rule.
func TestConditionWithoutRequest(t *testing.T) {
	for text, want := range map[string]bool{
		"request.path.startsWith('/admin')":                 false,
		"request.method == ''":                              false,
		"request.content_length < 10":                       false,
		"'X-Debug' in request.headers":                      false,
		"request.host == 'a.example'":                       false,
		"source.name == '' || request.path == '/x'":         true,
		"request.path == '/x' || source.name == ''":         true,
		"source.name == 'somebody' && request.path == '/x'": true,
		"time > timestamp('2020-01-01T00:00:00Z')":          true,
	} {
		c, errs := compileCondition(text)
		if len(errs) > 0 {
			t.Fatalf("%s: %v", text, errs)
		}
		if _, err := c.Eval(&Activation{Request: &flow.Request{}, Time: time.Now()}); (err == nil) != want {
			t.Errorf("%s: %v, told %t", text, err, want)
		}
	}
	c, _ := compileCondition("request.host == 'a.example'")
	if got, err := c.Eval(&Activation{Request: &flow.Request{Host: "a.example"}}); err != nil || !got {
		t.Errorf("of an SNI: %t, %v", got, err)
	}
}
