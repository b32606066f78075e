// SPDX-License-Identifier: Apache-2.0

package diff_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sallyport-dev/sallyport/policies/diff"
	"github.com/sallyport-dev/sallyport/policies/load"
)

func set(t *testing.T, files ...string) *load.Set {
	t.Helper()
	var list []load.File
	for i := 0; i < len(files); i += 2 {
		list = append(list, load.File{Path: files[i], Content: []byte(files[i+1])})
	}
	s, problems := load.Load(list)
	if load.HasErrors(problems) {
		t.Fatal(problems)
	}
	return s
}

const issuer = `apiVersion: sallyport.dev/v1alpha1
kind: TokenIssuer
metadata: {name: sso, labels: {a: b}}
spec:
  issuer: https://sso.example
  algorithms: [ES256, ES384, ES384]
  jwks: {keys: [{kty: EC, kid: k1}]}
`

func TestCompare(t *testing.T) {
	base := []string{"a.yaml", issuer, "m.fga", "model\n", "t.tuples.yaml", `[{user: "user:a", relation: r, object: "o:1"}]`}
	for name, c := range map[string]struct {
		files []string
		want  string
	}{
		"nothing":     {base, ""},
		"another one": {[]string{"b.yaml", strings.Replace(issuer, "sso,", "other,", 1)}, "added TokenIssuer default/other; removed TokenIssuer default/sso; removed relation user:a r o:1; removed text m.fga"},
		"fields": {[]string{
			"a.yaml", strings.NewReplacer("ES256, ES384, ES384", "ES384, EdDSA", "k1", "k2", "{a: b}", "{a: c}").Replace(issuer),
			"m.fga", "model 2\n", "x.fga", "", "t.tuples.yaml", `{model: default/m, tuples: [{user: "user:a", relation: r, object: "o:1"}, {user: "user:a", relation: r, object: "o:1"}]}`,
		}, "changed TokenIssuer default/sso [metadata.labels.a b>c, spec.algorithms ES256>-, spec.algorithms ES384>-, spec.algorithms ->EdDSA, " +
			"spec.jwks.keys {kid: k1, kty: EC}>{kid: k2, kty: EC}]; added relation default/m user:a r o:1; removed relation user:a r o:1; " +
			"changed text m.fga; added text x.fga"},
	} {
		var got []string
		for _, ch := range diff.Compare(set(t, base...), set(t, c.files...)) {
			text := ch.What + " " + ch.Kind + " " + ch.Name
			if ch.Kind != "text" && ch.Position.Line == 0 {
				t.Errorf("%s: %+v has no place", name, ch)
			}
			var fields []string
			for _, f := range ch.Fields {
				show := func(s *string) string {
					if s == nil {
						return "-"
					}
					return *s
				}
				fields = append(fields, fmt.Sprintf("%s %s>%s", f.Path, show(f.Old), show(f.New)))
			}
			if fields != nil {
				text += " [" + strings.Join(fields, ", ") + "]"
			}
			got = append(got, text)
		}
		if text := strings.Join(got, "; "); text != c.want {
			t.Errorf("%s:\ngot  %s\nwant %s", name, text, c.want)
		}
	}
}
