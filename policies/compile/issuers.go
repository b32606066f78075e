// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"encoding/json"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/relations"
	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
)

const (
	defaultLifetime = 15 * time.Minute
	maxLifetime     = 24 * time.Hour
	maxIssuer       = 512 // bytes of an iss value
	maxJWKS         = 64  // keys, as in userspace/token
)

func (c *compiler) compileIssuers() {
	// Of a namespace: what it says of an issuer is its own, so that none can
	// keep another from naming that issuer, nor vouch for it to others' rules.
	type named struct{ namespace, url string }
	byURL := make(map[named]*Issuer)
	for _, d := range c.set.Issuers {
		spec := &d.Value.Spec
		i := &Issuer{
			Namespace: d.Namespace, Name: d.Name, URL: spec.Issuer, Algorithms: spec.Algorithms, Audiences: spec.Audiences,
			MaxLifetime: defaultLifetime, Types: spec.Typ, Bound: spec.Binding == "required", Position: d.Position(),
		}
		if spec.MaxLifetime != nil {
			if i.MaxLifetime = time.Duration(*spec.MaxLifetime); i.MaxLifetime > maxLifetime {
				c.report.Errorf(d.At("spec", "maxLifetime"), "maxLifetime: is more than 24h")
			}
		}
		if len(i.Types) == 0 {
			i.Types = []string{"at+jwt"}
		}
		c.distinct(&d.Document, "algorithms", spec.Algorithms)
		c.distinct(&d.Document, "audiences", spec.Audiences)
		c.distinct(&d.Document, "typ", spec.Typ)
		switch other := byURL[named{i.Namespace, i.URL}]; {
		case i.URL == "":
			c.empty(&d.Document, "issuer", "spec", "issuer")
		case len(i.URL) > maxIssuer || strings.ContainsAny(i.URL, " \t\n"):
			c.report.Errorf(d.At("spec", "issuer"), "issuer: is not the iss of a token: at most %d characters without white space", maxIssuer)
		case other != nil:
			c.report.Errorf(d.At("spec", "issuer"), "issuer: %s is already that of %s at %s", i.URL, other.FullName(), other.Position)
		default:
			byURL[named{i.Namespace, i.URL}] = i
		}
		c.claims(i, d)
		c.introspection(i, d)
		c.jwks(i, d)
		c.tokenURL(i, d)
		c.issuers[i.FullName()] = i
		c.declare(toIssuer, i.Namespace, i.Name)
		c.plan.issuers = append(c.plan.issuers, i)
	}
	byName(c.plan.issuers)
}

// elsewhere are claims that are said otherwise: by which field.
var elsewhere = map[string]string{
	"iss": "issuer", "aud": "audiences, and a rule's audience", "exp": "maxLifetime", "nbf": "nothing: it is always looked at", "iat": "maxLifetime",
	"jti": "sallyport revoke jti", "cnf": "a rule's boundTo", "scope": "a rule's scopes",
}

const maxClaims = 32 // that an issuer's tokens must have

// claims reads the claims that each token of an issuer must have.
func (c *compiler) claims(i *Issuer, d *load.Doc[v1alpha1.TokenIssuer]) {
	spec := d.Value.Spec.Claims
	if len(spec) > maxClaims {
		c.report.Errorf(d.Key("spec", "claims"), "claims: at most %d, these are %d", maxClaims, len(spec))
		return
	}
	if _, ok := d.Lookup("spec", "claims"); ok && len(spec) == 0 && d.Empty("spec", "claims") {
		c.report.Errorf(d.Key("spec", "claims"), "claims: without any says nothing; leave the field out or fill it")
	}
	for _, name := range slices.Sorted(maps.Keys(spec)) {
		if instead, ok := elsewhere[name]; ok {
			c.report.Errorf(d.Key("spec", "claims", name), "claims: %s is said by %s", name, instead)
			continue
		}
		if name == "" || strings.ContainsAny(name, " \t\n") || len(name) > maxIssuer {
			c.report.Errorf(d.Key("spec", "claims", name), "claims: %q is not a claim's name", name)
		}
		if len(spec[name]) == 1 { // the bare text, or a list of one
			c.empty(&d.Document, "claims."+name, "spec", "claims", name)
			c.empty(&d.Document, "claims."+name, "spec", "claims", name, 0)
		} else {
			c.distinct(&d.Document, "claims."+name, spec[name], "spec", "claims", name)
		}
		i.Claims = append(i.Claims, Claim{name, spec[name]})
	}
}

// empty reports a text that is there without anything in it; one that is
// missing was reported.
func (c *compiler) empty(d *load.Document, field string, at ...any) {
	if pos, ok := d.Lookup(at...); ok && d.Empty(at...) && d.Text(at...) == "" {
		c.report.Errorf(pos, "%s: is empty", field)
	}
}

// distinct refuses empty texts and repetitions in a list of the spec.
func (c *compiler) distinct(d *load.Document, field string, list []string, at ...any) {
	if len(at) == 0 {
		at = []any{"spec", field}
	}
	seen := make(map[string]bool, len(list))
	for i, s := range list {
		pos := append(slices.Clone(at), i)
		switch {
		case s == "":
			c.empty(d, field, pos...)
		case seen[s]:
			c.report.Errorf(d.At(pos...), "%s: %q is there twice", field, s)
		}
		seen[s] = true
	}
}

// introspection reads where opaque tokens are asked about.
func (c *compiler) introspection(i *Issuer, d *load.Doc[v1alpha1.TokenIssuer]) {
	spec := d.Value.Spec.Introspection
	if spec == nil {
		return
	}
	i.IntrospectionURL, i.IntrospectionCredentials = spec.URL, spec.Credentials
	for _, f := range [...]string{"url", "credentials"} {
		c.empty(&d.Document, f, "spec", "introspection", f)
	}
	u, err := url.Parse(spec.URL)
	if spec.URL != "" && (err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.Fragment != "" || len(spec.URL) > 2048) {
		c.report.Errorf(d.At("spec", "introspection", "url"), "url: is not an https:// URL without user and fragment")
	}
	if p := spec.Credentials; p != "" && (!path.IsAbs(p) || path.Clean(p) != p) {
		c.report.Errorf(d.At("spec", "introspection", "credentials"), "credentials: %q is not a clean absolute path", p)
	}
}

func (c *compiler) jwks(i *Issuer, d *load.Doc[v1alpha1.TokenIssuer]) {
	j := &d.Value.Spec.JWKS
	_, keys := d.Lookup("spec", "jwks")
	_, algorithms := d.Lookup("spec", "algorithms")
	switch _, asks := d.Lookup("spec", "introspection"); {
	case keys && !algorithms:
		c.report.Errorf(d.Key("spec"), "algorithms is missing")
	case !keys && !asks:
		c.report.Errorf(d.Key("spec"), "jwks is missing: say where the issuer's keys are, or by introspection where tokens are asked about")
	}
	written := 0
	for _, f := range [...]string{"url", "file", "keys"} {
		if _, ok := d.Lookup("spec", "jwks", f); ok {
			written++
		}
	}
	if written != 1 {
		if _, ok := d.Lookup("spec", "jwks"); ok {
			c.report.Errorf(d.Key("spec", "jwks"), "jwks: want one of url, file and keys, got %d of them", written)
		}
		return
	}
	switch {
	case j.URL != "":
		i.JWKSURL = j.URL
		u, err := url.Parse(j.URL)
		if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != "" || len(j.URL) > 2048 {
			c.report.Errorf(d.At("spec", "jwks", "url"), "url: is not an https:// URL without user and fragment")
		}
	case j.File != "":
		i.JWKSFile = j.File
		if !path.IsAbs(j.File) || path.Clean(j.File) != j.File {
			c.report.Errorf(d.At("spec", "jwks", "file"), "file: %q is not a clean absolute path", j.File)
		}
	case len(j.Keys) > 0:
		c.inlineKeys(i, d)
	default:
		for _, f := range [...]string{"url", "file"} {
			c.empty(&d.Document, f, "spec", "jwks", f)
		}
	}
}

// privateMembers are those of a private or symmetric JWK, RFC 7518 sections
// 6.2.2, 6.3.2 and 6.4.
var privateMembers = []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"}

func (c *compiler) inlineKeys(i *Issuer, d *load.Doc[v1alpha1.TokenIssuer]) {
	keys := d.Value.Spec.JWKS.Keys
	if len(keys) > maxJWKS {
		c.report.Errorf(d.At("spec", "jwks", "keys"), "keys: a set may have %d keys, this one has %d", maxJWKS, len(keys))
		return
	}
	for n, k := range keys {
		for _, m := range privateMembers {
			if _, ok := k[m]; ok {
				c.report.Errorf(d.Key("spec", "jwks", "keys", n, m), "keys: %q belongs to a private key; write the public key here and replace the key pair", m)
			}
		}
		if kty, _ := k["kty"].(string); kty != "EC" && kty != "RSA" && kty != "OKP" {
			c.report.Errorf(d.At("spec", "jwks", "keys", n), "keys: kty is not one of EC, RSA, OKP")
		}
	}
	doc, err := json.Marshal(map[string]any{"keys": keys})
	if err != nil {
		c.report.Errorf(d.At("spec", "jwks", "keys"), "keys: %v", err)
	}
	i.JWKS = doc
}

func (c *compiler) compileModels() {
	cost := 0 // of reading them
	for i, d := range c.set.Models {
		if i == relations.MaxModels {
			c.report.Errorf(d.Position(), "a set has at most %d RelationModels; this is one more", relations.MaxModels)
		}
		m := &Model{Namespace: d.Namespace, Name: d.Name, Text: d.Value.Spec.Model, Position: d.Position()}
		_, hasModel := d.Lookup("spec", "model")
		filePos, hasFile := d.Lookup("spec", "file")
		from := modelText{d: d, field: "model"}
		switch {
		case hasModel && hasFile:
			c.report.Errorf(filePos, "file: there is a model as well; keep one")
		case hasFile && d.Value.Spec.File != "":
			from.field = "file"
			m.Text, from.path = c.modelFile(d, filePos)
		case hasFile:
			c.empty(&d.Document, "file", "spec", "file")
		}
		c.engine(m, d)
		before := cost
		if one := relations.Cost(m.Text); one <= relations.MaxCost { // else it is not read
			cost += one
		}
		switch {
		case i >= relations.MaxModels:
		case cost > relations.MaxSetCost:
			if before <= relations.MaxSetCost { // said once
				c.report.Errorf(d.Position(), "the RelationModels up to this one take too long to read (%d units, more than %d): make them smaller", cost, relations.MaxSetCost)
			}
		case hasModel != hasFile && m.Text != "", !hasModel && !hasFile:
			var errs []*relations.Error
			m.Relations, errs = relations.Parse(m.Text)
			for _, err := range errs {
				c.badModel(from, err)
			}
		case hasModel && !hasFile:
			c.report.Errorf(d.At("spec", "model"), "model: empty; leave it out for the default model")
		}
		c.models[m.FullName()] = m
		c.declare(toModel, m.Namespace, m.Name)
		c.plan.models = append(c.plan.models, m)
	}
	byName(c.plan.models)
}

const maxStore = 64 // characters of a store's name, as OpenFGA has it

// engine reads where a model's relations are.
func (c *compiler) engine(m *Model, d *load.Doc[v1alpha1.RelationModel]) {
	spec := &d.Value.Spec
	for _, f := range [...]string{"address", "store", "credentials"} {
		c.empty(&d.Document, f, "spec", f)
		if _, ok := d.Lookup("spec", f); ok && spec.Engine != "openfga" {
			c.report.Errorf(d.Key("spec", f), "%s: goes with engine: openfga", f)
		}
	}
	if spec.Engine != "openfga" {
		return
	}
	for _, f := range [...]string{"address", "store"} {
		if _, ok := d.Lookup("spec", f); !ok {
			c.report.Errorf(d.Key("spec"), "%s is missing; an engine elsewhere has one", f)
		}
	}
	if spec.Address != "" {
		host, port, err := net.SplitHostPort(spec.Address)
		n, portErr := strconv.ParseUint(port, 10, 16)
		if _, addrErr := netip.ParseAddr(host); err != nil || portErr != nil || n == 0 || addrErr != nil && !isHost(strings.ToLower(host)) {
			c.report.Errorf(d.At("spec", "address"), "address: %q is not HOST:PORT, such as openfga.example:8081", spec.Address)
		}
	}
	if len(spec.Store) > maxStore || strings.ContainsFunc(spec.Store, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		c.report.Errorf(d.At("spec", "store"), "store: %q is not the name of a store: at most %d printable characters", spec.Store, maxStore)
	}
	if p := spec.Credentials; p != "" && (!path.IsAbs(p) || path.Clean(p) != p) {
		c.report.Errorf(d.At("spec", "credentials"), "credentials: %q is not a clean absolute path", p)
	}
	m.Address, m.Store, m.Credentials = spec.Address, spec.Store, spec.Credentials
}

// modelText is where a model's text stands: in a field, or in the file at
// path that the field names.
type modelText struct {
	d           *load.Doc[v1alpha1.RelationModel]
	field, path string
}

func (c *compiler) badModel(from modelText, err *relations.Error) {
	hint := c.report.Suggest(err.Name, err.Known)
	if from.path != "" {
		c.report.Errorf(load.Position{File: from.path, Line: max(1, err.Line), Column: max(1, err.Column)}, "%s%s", err.Message, hint)
		return
	}
	c.report.Errorf(from.d.At("spec", from.field), "%s: %s%s", from.field, err, hint)
}

// modelFile returns the text that a RelationModel's file holds, and the
// file's path.
func (c *compiler) modelFile(d *load.Doc[v1alpha1.RelationModel], pos load.Position) (text, path string) {
	name := d.Value.Spec.File
	if filepath.Base(name) != name || !strings.HasSuffix(name, ".fga") && !strings.HasSuffix(name, ".fga.json") {
		c.report.Errorf(pos, "file: %q is not the name of a *.fga or *.fga.json file beside the policies", name)
		return "", ""
	}
	path = filepath.Join(d.Dir(), name)
	text, ok := c.set.Texts[path]
	if !ok {
		var names []string
		for p := range c.set.Texts {
			names = append(names, filepath.Base(p))
		}
		c.report.Errorf(pos, "file: there is no file %q beside the policies%s", name, c.report.Suggest(name, names))
		return "", ""
	}
	if strings.TrimSpace(text) == "" {
		c.report.Errorf(pos, "file: %q is empty", name)
		return "", ""
	}
	return text, path
}

func (c *compiler) compileTuples() {
	for _, d := range c.set.Tuples {
		var m *Model
		if ref := d.Value.Model; ref != "" {
			if m = c.models[fullName(v1alpha1.DefaultNamespace, ref)]; m == nil {
				c.dangling(d.At("model"), "model", toModel, v1alpha1.DefaultNamespace, ref)
			}
		} else if len(c.plan.models) == 1 {
			m = c.plan.models[0]
		} else {
			c.report.Errorf(d.Position(), "model is missing: the set has %d RelationModels; write model: NAMESPACE/NAME and the list under tuples:", len(c.plan.models))
		}
		if m != nil && m.Address != "" {
			c.report.Errorf(d.Position(), "model: the relations of %s are at %s; write them there", m.FullName(), m.Address)
		}
		for i, t := range d.Value.Tuples {
			good := true
			for _, f := range [...]struct {
				name, value string
				ok          bool
			}{
				{"user", t.User, isTupleEnd(t.User, true)},
				{"relation", t.Relation, isRelationName(t.Relation)},
				{"object", t.Object, isTupleEnd(t.Object, false)},
			} {
				good = good && f.ok
				if pos, written := d.Lookup("tuples", i, f.name); written && !f.ok {
					c.report.Errorf(pos, "%s: %q cannot stand in a relation", f.name, f.value)
				}
			}
			if good && m != nil && m.Relations != nil {
				if err := m.Relations.CheckTuple(t.User, t.Relation, t.Object); err != nil {
					c.report.Errorf(d.At("tuples", i), "%s%s", err, c.report.Suggest(err.Name, err.Known))
				}
			}
			c.plan.tuples = append(c.plan.tuples, Tuple{m, t.User, t.Relation, t.Object, d.At("tuples", i)})
		}
	}
}

// isTupleEnd says whether s is TYPE:NAME, for a user also TYPE:* and
// TYPE:NAME#RELATION.
func isTupleEnd(s string, user bool) bool {
	typ, name, ok := strings.Cut(s, ":")
	if !ok || !isRelationName(typ) || len(s) > 512 {
		return false
	}
	if user {
		if name == "*" {
			return true
		}
		if n, relation, ok := strings.Cut(name, "#"); ok {
			if !isRelationName(relation) {
				return false
			}
			name = n
		}
	}
	return ValidRelationValue([]byte(strings.ReplaceAll(name, "|", ".")))
}

func isRelationName(s string) bool { return isIdentifier(strings.ReplaceAll(s, "-", "_")) }
