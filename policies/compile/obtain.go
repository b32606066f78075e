// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"net/url"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
)

// Obtain is an access token that a workload's node obtains for it and puts on
// its calls to another identity.
type Obtain struct {
	To     *Identity
	Issuer *Issuer // with a TokenURL
	// ClientID is what the issuer knows the workload by (RFC 6749 section 2.2).
	ClientID string
	Audience string
	Scopes   []string
}

const (
	maxObtain   = 64  // tokens of one identity
	maxClientID = 512 // bytes
)

// ObtainFor returns what is obtained for calls to an identity, nil for
// nothing.
func (i *Identity) ObtainFor(to *Identity) *Obtain {
	for n := range i.Tokens {
		if i.Tokens[n].To == to {
			return &i.Tokens[n]
		}
	}
	return nil
}

// compileTokens reads which tokens identities obtain, once the issuers and the
// rules are known.
func (c *compiler) compileTokens() {
	apis := map[*Identity][]*API{}
	for _, a := range c.plan.apis {
		apis[a.Identity] = append(apis[a.Identity], a)
	}
	for _, d := range c.set.Identities {
		id := c.identities[d.FullName()]
		if len(d.Value.Spec.Tokens) > maxObtain {
			c.report.Errorf(d.Key("spec", "tokens"), "tokens: at most %d, these are %d", maxObtain, len(d.Value.Spec.Tokens))
			continue
		}
		if _, ok := d.Lookup("spec", "tokens"); ok && id.Selector == nil && !d.Empty("spec", "tokens") {
			c.report.Errorf(d.Key("spec", "tokens"), "tokens: are obtained on the workload's own node; %s has no select", id.fullName)
		}
		for n := range d.Value.Spec.Tokens {
			if !d.Empty("spec", "tokens", n) { // else it was reported
				c.obtain(id, d, n, apis)
			}
		}
	}
}

func (c *compiler) obtain(id *Identity, d *identityDoc, n int, apis map[*Identity][]*API) {
	spec := &d.Value.Spec.Tokens[n]
	at := func(field string) load.Position { return d.At("spec", "tokens", n, field) }
	o := Obtain{Audience: spec.Audience, Scopes: spec.Scopes, ClientID: spec.ClientID}
	if o.ClientID == "" {
		o.ClientID = id.ID
	}
	good := true
	for _, f := range [...]string{"to", "issuer", "audience", "clientID"} {
		c.empty(&d.Document, f, "spec", "tokens", n, f)
	}
	if spec.To != "" {
		switch o.To = c.identities[fullName(id.Namespace, spec.To)]; {
		case o.To == nil:
			c.dangling(at("to"), "to", toIdentity, id.Namespace, spec.To)
		case !id.MayCallIdentity(o.To):
			c.report.Errorf(at("to"), "to: %q is not in mayCall: no call would bear the token", spec.To)
		case id.ObtainFor(o.To) != nil:
			c.report.Errorf(at("to"), "to: %q is there twice; a call bears one token", spec.To)
			good = false
		}
	}
	if spec.Issuer != "" {
		switch o.Issuer = c.issuers[fullName(id.Namespace, spec.Issuer)]; {
		case o.Issuer == nil:
			c.dangling(at("issuer"), "issuer", toIssuer, id.Namespace, spec.Issuer)
		case c.tenant.stranger(o.Issuer.Namespace): // reported
		case o.Issuer.TokenURL == "":
			c.report.Errorf(at("issuer"), "issuer: %s has no tokenURL: no token can be had of it", o.Issuer.FullName())
		case spec.Audience != "" && o.Issuer.Audiences != nil && !slices.Contains(o.Issuer.Audiences, spec.Audience):
			c.report.Errorf(at("audience"), "audience: %q is not one of the audiences of %s%s", spec.Audience, o.Issuer.FullName(),
				c.report.Suggest(spec.Audience, o.Issuer.Audiences))
		}
	}
	if strings.ContainsFunc(spec.ClientID, func(x rune) bool { return x < ' ' || x >= 0x7f }) || len(spec.ClientID) > maxClientID {
		c.report.Errorf(at("clientID"), "clientID: is not a client's identifier: at most %d printable characters", maxClientID)
	}
	c.distinct(&d.Document, "scopes", spec.Scopes, "spec", "tokens", n, "scopes")
	for k, s := range spec.Scopes {
		if !isScope(s) {
			c.report.Errorf(d.At("spec", "tokens", n, "scopes", k), "scopes: %q is not a scope", s)
		}
	}
	if !good || o.To == nil || o.Issuer == nil || o.Audience == "" {
		return
	}
	id.Tokens = append(id.Tokens, o)
	if on := apis[o.To]; on != nil && !c.tenant.stranger(o.To.Namespace) && !c.report.Failed() && !asks(on, id, &o) {
		c.report.Warnf(d.At("spec", "tokens", n), "tokens: no rule for %s's calls to %s asks for a token of %s with that audience", id.fullName, o.To.fullName, o.Issuer.FullName())
	}
}

// asks says whether a rule wants what is obtained.
func asks(apis []*API, id *Identity, o *Obtain) bool {
	for _, a := range apis {
		for _, r := range a.Rules {
			if r.Token != nil && r.Token.Issuer == o.Issuer && r.Token.Audience == o.Audience && (r.From == nil || slices.Contains(r.From, id)) {
				return true
			}
		}
	}
	return false
}

// isScope says whether s is one scope (RFC 6749 section 3.3).
func isScope(s string) bool {
	return !strings.ContainsFunc(s, func(x rune) bool { return x <= ' ' || x >= 0x7f || x == '"' || x == '\\' })
}

// tokenURL reads an issuer's token endpoint.
func (c *compiler) tokenURL(i *Issuer, d *load.Doc[v1alpha1.TokenIssuer]) {
	i.TokenURL = d.Value.Spec.TokenURL
	if _, ok := d.Lookup("spec", "tokenURL"); !ok {
		return
	}
	u, err := url.Parse(i.TokenURL)
	switch {
	case i.TokenURL == "":
		c.empty(&d.Document, "tokenURL", "spec", "tokenURL")
	case err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.Fragment != "" || len(i.TokenURL) > 2048:
		c.report.Errorf(d.At("spec", "tokenURL"), "tokenURL: is not an https:// URL without user and fragment")
	}
}
