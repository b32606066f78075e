// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"errors"
	"net/url"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func TestParseID(t *testing.T) {
	for _, c := range []struct{ in, want string }{ // want: "" for valid, else a part of the detail
		{"spiffe://td/a", ""},
		{"spiffe://sallyport.local/node/host-1/unit/nginx.service", ""},
		{"spiffe://a-b_c.d/A.B-c_9/...x", ""},
		{"spiffe://td/" + strings.Repeat("a", 2048-len("spiffe://td/")), ""},
		{"spiffe://" + strings.Repeat("a", 255) + "/x", ""},
		{"spiffe://td/" + strings.Repeat("a", 2049-len("spiffe://td/")), "longer than 2048"},
		{"spiffe://" + strings.Repeat("a", 256) + "/x", "trust domain longer"},
		{"", "scheme"},
		{"td/a", "scheme"},
		{"http://td/a", "scheme"},
		{"SPIFFE://td/a", "scheme"},
		{"spiffe:/td/a", "scheme"},
		{" spiffe://td/a", "scheme"},
		{"spiffe:///a", "no trust domain"},
		{"spiffe://", "no trust domain"},
		{"spiffe://td", "no path"},
		{"spiffe://td/", "empty path segment"},
		{"spiffe://td/a/", "empty path segment"},
		{"spiffe://td//a", "empty path segment"},
		{"spiffe://td/./a", "dot path segment"},
		{"spiffe://td/a/..", "dot path segment"},
		{"spiffe://td/../a", "dot path segment"},
		{"spiffe://td/a?b", "query"},
		{"spiffe://td/a?", "query"},
		{"spiffe://td?x/a", "query"},
		{"spiffe://td/a#b", "fragment"},
		{"spiffe://td/a#", "fragment"},
		{"spiffe://td:80/a", "port"},
		{"spiffe://td:/a", "port"},
		{"spiffe://u@td/a", "userinfo"},
		{"spiffe://u:p@td/a", "userinfo"},
		{"spiffe://td/%61", "percent-encoding"},
		{"spiffe://t%64/a", "percent-encoding"},
		{"spiffe://TD/a", "in trust domain"},
		{"spiffe://tд/a", "in trust domain"},
		{"spiffe://t d/a", "in trust domain"},
		{"spiffe://[::1]/a", "port"},
		{"spiffe://td/a b", "in path"},
		{"spiffe://td/a:b", "in path"},
		{"spiffe://td/a@b", "in path"},
		{"spiffe://td/ä", "in path"},
		{"spiffe://td/a\x00", "in path"},
		{"spiffe://td/a\n", "in path"},
		{"spiffe://td/a\\b", "in path"},
		{"spiffe://td/*", "in path"},
		{"spiffe://td/a\xff", "in path"},
	} {
		id, err := ParseID(c.in)
		if c.want == "" {
			if err != nil || id.String() != c.in || "spiffe://"+id.TrustDomain()+id.Path() != c.in {
				t.Errorf("%.60q: %v, parts %q %q", c.in, err, id.TrustDomain(), id.Path())
			}
			continue
		}
		var r *Refusal
		if !errors.As(err, &r) || r.Reason != flow.ReasonCertID || !strings.Contains(r.Detail, c.want) {
			t.Errorf("%.60q: %v; want cert_id with %q", c.in, err, c.want)
		}
	}
	if (ID{}).TrustDomain() != "" || (ID{}).Path() != "" || (ID{}).String() != "" {
		t.Error("the zero ID is something")
	}
}

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"spiffe://td/a", "spiffe://td/a/../b", "spiffe://td:1/a?b#c", "spiffe://u@td/%2e", "spiffe://td/a#"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		if err != nil {
			if _, ok := errors.AsType[*Refusal](err); !ok {
				t.Errorf("%q: %v is no *Refusal", s, err)
			}
			return
		}
		u, err := url.Parse(s)
		if err != nil || u.String() != s || u.Scheme != "spiffe" || u.Host != id.TrustDomain() || u.Path != id.Path() || u.Path == "" ||
			u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.User != nil || u.Port() != "" {
			t.Errorf("%q: accepted, but as URL it is %#v (%v)", s, u, err)
		}
	})
}

func TestCheckNodeName(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "host-1": true, "a.b.c": true, "9": true, strings.Repeat("a", 63): true,
		"": false, strings.Repeat("a", 64): false, "-a": false, "a-": false, ".a": false, "a.": false, "a..b": false,
		"A": false, "a/b": false, "a_b": false, "..": false, "a\x00b": false, "ä": false,
	} {
		if err := CheckNodeName(name); (err == nil) != want {
			t.Errorf("%q: %v", name, err)
		}
	}
}
