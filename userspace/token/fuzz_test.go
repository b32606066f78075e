// SPDX-License-Identifier: Apache-2.0

package token

import (
	"encoding/json"
	"math"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// FuzzReadObject holds the strict reader against encoding/json: what it takes
// the other takes too and reads alike.
func FuzzReadObject(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"a":1}`, ` { "a" : [ 1 , -2.5e3, true, null, "\u00e9\ud83d\ude00\n" ] } `, `{"a":{"b":{"c":[[]]}}}`,
		`{"exp":1,"EXP":2}`, `{"ſub":"x"}`, `{"a":01}`, `{"a":1e999}`, `{"a":"\ud800"}`, `{"a":"\u0000"}`, `{"a":1}x`, `{"a":-}`,
		`{"a":9223372036854775808}`, `{"a":1,}`, "{\"a\":\"\xff\"}", "{\"\x7f\":\"\t\"}",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := readObject(s, reservedClaims)
		if err != nil {
			return
		}
		var want map[string]any
		if err := json.Unmarshal([]byte(s), &want); err != nil {
			t.Fatalf("took what encoding/json refuses: %v", err)
		}
		if !reflect.DeepEqual(asFloats(got), asFloats(want)) {
			t.Fatalf("read %#v, encoding/json %#v", got, want)
		}
	})
}

func asFloats(v any) any {
	switch x := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(x))
		for k, e := range x {
			out[k] = asFloats(e)
		}
		return out
	case []any:
		out := make([]any, len(x))
		for i, e := range x {
			out[i] = asFloats(e)
		}
		return out
	case int64:
		return float64(x)
	case float64:
		if math.IsNaN(x) {
			panic("NaN from JSON")
		}
	}
	return v
}

// FuzzVerify: nothing but the tokens that were signed may verify, whatever
// the bytes, and nothing may panic.
func FuzzVerify(f *testing.F) {
	ec := newES256(f, "ec")
	v := newVerifier(f, ec)
	good := ec.sign(f, ec.header(), claimsAt(time.Now()))
	f.Add(string(good))
	f.Add("..")
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add(string(good[:len(good)-1]))
	f.Add(string(ec.raw(f, `{"alg":"ES256","kid":"ec"}`, `{"iss":"`+testURL+`"}`)))
	f.Fuzz(func(t *testing.T, raw string) {
		claims, reason, err := v.Verify([]byte(raw), check())
		if (claims == nil) != (err != nil) || (reason == flow.ReasonOK) != (err == nil) {
			t.Fatalf("claims %v, reason %q, error %v disagree", claims, reason, err)
		}
		if err == nil && raw != string(good) {
			t.Fatal("a token that nobody signed verified")
		}
	})
}

// FuzzClaims signs whatever claims, so that what follows the signature is
// reached: a token that verifies has the claims that were asked for.
func FuzzClaims(f *testing.F) {
	ed := newEdDSA(f, "ed")
	v := newVerifier(f, ed)
	f.Add(`{"iss":"` + testURL + `","sub":"a","aud":"payments","exp":4102444800}`)
	f.Add(`{"iss":"` + testURL + `","sub":"a","aud":["payments"],"exp":1,"cnf":{"x5t#S256":"AA"},"scope":" ","groups":[]}`)
	f.Fuzz(func(t *testing.T, claims string) {
		if len(claims) > 8<<10 {
			return
		}
		c := check()
		got, reason, err := v.Verify(ed.raw(t, `{"alg":"EdDSA","typ":"at+jwt","kid":"ed"}`, claims), c)
		if err != nil {
			if got != nil || reason == flow.ReasonOK {
				t.Fatalf("claims %v, reason %q, error %v disagree", got, reason, err)
			}
			return
		}
		if got.Issuer != testURL || got.Subject == "" || !slices.Contains(got.Audience, testAudience) || got.Bound || !got.Expiry.After(time.Now().Add(-time.Minute)) {
			t.Fatalf("verified %+v", got)
		}
	})
}

// FuzzKeySet: a document that is taken has keys, and none of them is private.
func FuzzKeySet(f *testing.F) {
	f.Add(jwks(f, newES256(f, "a").jwk(), newEdDSA(f, "b").jwk()))
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"AA"}]}`))
	f.Add([]byte(`{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}`))
	f.Add([]byte(`{"keys":[{"kty":"EC","crv":"P-256","x":"","y":""}]}`))
	f.Fuzz(func(t *testing.T, document []byte) {
		set, err := parseKeySet(document)
		if (set == nil) != (err != nil) {
			t.Fatalf("set %v, error %v disagree", set, err)
		}
		if err != nil {
			return
		}
		if set.only == nil && len(set.byID) == 0 {
			t.Fatal("a set without keys was taken")
		}
		for id, k := range set.byID {
			if k.public == nil || k.family == 0 || len(id) > MaxKeyID {
				t.Fatalf("key %q: %+v", id, k)
			}
		}
	})
}
