// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"fmt"
	"strings"
	"testing"
)

func TestNear(t *testing.T) {
	plan, api := buildAPI(t, `
  rules:
    - {name: other, from: [b], hosts: [b.example], http: ["GET /b", "POST /b/{x}"]}
    - {name: mine, from: [a], http: ["GET /a/{x}", "PUT /a/{x}", "GET /z/**"]}
    - {name: hosted, from: [a], hosts: [a.example], http: ["* /h"]}
    - {name: connection, from: [b], when: request.content_length == 0}
    - {name: refused, effect: deny, http: ["* /no"]}
`)
	for _, c := range []struct{ from, host, method, path, want string }{
		{"a", "a.example", "DELETE", "/a/1", `mine{http: this path by GET, PUT} connection{from: default/b} hosted{http: * /h} other{http: GET /b, POST /b/{x}; from: default/b; hosts: b.example}`},
		{"a", "c.example", "GET", "/h", `hosted{hosts: a.example} connection{from: default/b} mine{http: GET /a/{x}, PUT /a/{x}, GET /z/**} other{http: GET /b, POST /b/{x}; from: default/b; hosts: b.example}`},
		{"", "B.example.", "GET", "/b", `other{from: default/b} connection{from: default/b} mine{http: GET /a/{x}, PUT /a/{x}, GET /z/**; from: default/a} hosted{http: * /h; from: default/a; hosts: a.example}`},
		{"a", "", "", "", `connection{from: default/b} mine{http: GET /a/{x}, PUT /a/{x}, GET /z/**; a connection without a request meets none} hosted{http: * /h; a connection without a request meets none; hosts: a.example} other{http: GET /b, POST /b/{x}; a connection without a request meets none; from: default/b; hosts: b.example}`},
	} {
		var got []string
		for _, m := range api.Near(caller(t, plan, c.from), Call{Host: c.host, Method: c.method, Path: c.path}) {
			if m.Position.Line == 0 || len(m.Differs) == 0 {
				t.Errorf("%+v", m)
			}
			got = append(got, fmt.Sprintf("%s{%s}", m.Rule, strings.Join(m.Differs, "; ")))
		}
		if text := strings.Join(got, " "); text != c.want {
			t.Errorf("%+v:\ngot  %s\nwant %s", c, text, c.want)
		}
	}
}
