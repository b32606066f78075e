// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/policies/load"
)

// Tenancy holds documents to what a tenant of a cluster may say, who can
// write in one namespace and is not trusted with the node: pods of that
// namespace, their derived IDs, no file and no address of the node, and URLs
// on hosts that an administrator has allowed.
type Tenancy struct {
	Namespace string
	// Hosts are those that URLs may name, HOST, or HOST:PORT where the port is
	// not 443, by case-insensitive comparison; none without any.
	Hosts []string
	// Context says which files are not the tenant's: what else the cluster
	// has, for references to lead to. nil: all are the tenant's.
	Context func(file string) bool
}

func (t *Tenancy) owns(d *load.Document) bool { return t.Context == nil || !t.Context(d.File()) }

// stranger says whether a namespace is none of the tenant's. What is in it is
// not suggested to the tenant.
func (t *Tenancy) stranger(namespace string) bool { return t != nil && namespace != t.Namespace }

// Told are the problems that the tenant learns of: none of documents that are
// not its own but that there are errors, for then the set is refused.
func (t *Tenancy) Told(problems []load.Problem) []load.Problem {
	if t == nil || t.Context == nil {
		return problems
	}
	hidden := false
	told := slices.DeleteFunc(slices.Clone(problems), func(p load.Problem) bool {
		foreign := t.Context(p.File)
		hidden = hidden || foreign && p.Severity == load.Error
		return foreign
	})
	if hidden {
		told = append(told, load.Problem{Message: "what else the cluster has is not valid together with these documents; have the administrator validate both without --tenant"})
	}
	return told
}

// other names a document that one of the set collides with, NAMESPACE/NAME at
// its place, unless it is not for the tenant to know.
func (c *compiler) other(fullName string, at load.Position) string {
	if namespace, _, _ := strings.Cut(fullName, "/"); c.tenant.stranger(namespace) {
		return "a document of another namespace"
	}
	return fmt.Sprintf("%s at %s", fullName, at)
}

// compileTenancy refuses what a tenant may not say.
func (c *compiler) compileTenancy(t *Tenancy) {
	if t == nil {
		return
	}
	for _, d := range c.set.Identities {
		if t.owns(&d.Document) {
			c.tenantNamespace(t, &d.Document)
			c.tenantIdentity(d)
		}
	}
	for _, d := range c.set.Issuers {
		if t.owns(&d.Document) {
			c.tenantNamespace(t, &d.Document)
			c.tenantMayNot(&d.Document, "file: a tenant has no files on the node; give url or keys", "spec", "jwks", "file")
			c.tenantURL(t, &d.Document, "url", "spec", "jwks", "url")
			c.tenantURL(t, &d.Document, "url", "spec", "introspection", "url")
			c.tenantMayNot(&d.Document, "credentials: a tenant has no files on the node, and so no introspection", "spec", "introspection", "credentials")
			c.tenantURL(t, &d.Document, "tokenURL", "spec", "tokenURL")
		}
	}
	for _, d := range c.set.Models {
		if t.owns(&d.Document) {
			c.tenantNamespace(t, &d.Document)
			c.tenantMayNot(&d.Document, "file: a tenant has no files on the node; write the model itself under model", "spec", "file")
			c.tenantMayNot(&d.Document, "credentials: a tenant has no files on the node; leave it out", "spec", "credentials")
			c.tenantMayNot(&d.Document, "address: a tenant names no engine; leave it out", "spec", "address")
		}
	}
	for _, d := range c.set.Postures {
		if t.owns(&d.Document) {
			c.tenantNamespace(t, &d.Document)
		}
	}
	for _, d := range c.set.Policies {
		if t.owns(&d.Document) {
			c.tenantNamespace(t, &d.Document)
			c.tenantPolicy(t, d)
		}
	}
	for _, d := range c.set.Tuples {
		if t.owns(&d.Document) {
			c.report.Errorf(d.Position(), "relations of files belong to the node; a tenant writes them over the API of its model's engine")
		}
	}
}

// tenantNamespace holds a document to its tenant's namespace.
func (c *compiler) tenantNamespace(t *Tenancy, d *load.Document) {
	if d.Namespace == t.Namespace {
		return
	}
	if pos, ok := d.Lookup("metadata", "namespace"); ok {
		c.report.Errorf(pos, "namespace: %q is not the tenant's; write %q", d.Namespace, t.Namespace)
		return
	}
	c.report.Errorf(d.Key("metadata"), "namespace is missing, which is %q; write %q", d.Namespace, t.Namespace)
}

// tenantMayNot refuses a field.
func (c *compiler) tenantMayNot(d *load.Document, why string, path ...any) {
	if _, ok := d.Lookup(path...); ok {
		c.report.Errorf(d.Key(path...), "%s", why)
	}
}

func (c *compiler) tenantIdentity(d *identityDoc) {
	doc := &d.Document
	for _, f := range [...]struct {
		why  string
		path []any
	}{
		{"spiffeID: a tenant's ID is derived from its service account; leave it out", []any{"spec", "spiffeID"}},
		{"endpoints: are filled from the tenant's pods; leave them out", []any{"spec", "endpoints"}},
		{"all: a tenant selects pods of its namespace; write select.kubernetes", []any{"spec", "select", "all"}},
		{"systemd: a tenant selects pods of its namespace; write select.kubernetes", []any{"spec", "select", "systemd"}},
		{"cgroup: a tenant selects pods of its namespace; write select.kubernetes", []any{"spec", "select", "cgroup"}},
		{"uid: is the node's, not the tenant's; leave it out", []any{"spec", "select", "uid"}},
	} {
		c.tenantMayNot(doc, f.why, f.path...)
	}
	for n, o := range d.Value.Spec.Tokens {
		if namespace, _, ok := strings.Cut(o.Issuer, "/"); ok && namespace != d.Namespace {
			c.report.Errorf(d.At("spec", "tokens", n, "issuer"), "issuer: %q is of another namespace; a tenant uses its own", o.Issuer)
		}
	}
	s := d.Value.Spec.Select
	switch {
	case s == nil && !d.Empty("spec", "select"):
		if _, written := d.Lookup("spec", "select"); !written {
			c.report.Errorf(d.Key("spec"), "select is missing: a tenant selects pods of its namespace by select.kubernetes")
		}
	case s != nil && s.Kubernetes == nil && s.Process != nil:
		c.report.Errorf(d.Key("spec", "select", "process"), "process: any container can have that program; it only narrows select.kubernetes down")
	}
}

func (c *compiler) tenantPolicy(t *Tenancy, d *policyDoc) {
	if namespace, _, ok := strings.Cut(d.Value.Spec.Protect.Identity, "/"); ok && namespace != t.Namespace {
		c.report.Errorf(d.At("spec", "protect", "identity"), "identity: %q is of another namespace; a tenant protects its own", d.Value.Spec.Protect.Identity)
	}
	elsewhere := func(field, ref string, at ...any) {
		if namespace, _, ok := strings.Cut(ref, "/"); ok && namespace != t.Namespace {
			c.report.Errorf(d.At(at...), "%s: %q is of another namespace; a tenant uses its own", field, ref)
		}
	}
	elsewhere("posture", d.Value.Spec.Posture, "spec", "posture")
	for i := range d.Value.Spec.Rules {
		r := &d.Value.Spec.Rules[i]
		elsewhere("posture", r.Posture, "spec", "rules", i, "posture")
		if r.Token != nil {
			elsewhere("issuer", r.Token.Issuer, "spec", "rules", i, "token", "issuer")
		}
		if r.Relation != nil {
			elsewhere("model", r.Relation.Model, "spec", "rules", i, "relation", "model")
		}
	}
	for _, f := range [...]string{"certificate", "key", "ca"} {
		c.tenantMayNot(&d.Document, f+": a tenant has no files on the node; leave it out", "spec", "protect", "app", f)
	}
}

// tenantURL holds a URL that the agent would fetch to what a tenant may make
// it fetch. Where a name leads is checked when it is fetched.
func (c *compiler) tenantURL(t *Tenancy, d *load.Document, field string, path ...any) {
	pos, ok := d.Lookup(path...)
	text := d.Text(path...)
	if !ok || text == "" {
		return
	}
	u, err := url.Parse(text)
	if err != nil || u.Hostname() == "" {
		return // no URL at all, and reported
	}
	host := strings.ToLower(strings.TrimSuffix(u.Hostname(), "."))
	at := host
	if p := u.Port(); p != "" && p != "443" {
		at = net.JoinHostPort(host, p)
	}
	switch {
	case u.Scheme != "https": // reported
	case isOwnHost(host):
		c.report.Errorf(pos, "%s: %q is an address of the node or of its network; a tenant names a public host", field, host)
	case !slices.ContainsFunc(t.Hosts, func(h string) bool { return strings.EqualFold(h, at) }):
		c.report.Errorf(pos, "%s: host %q is not allowed to tenants%s; have the administrator allow it (--allow-url-host)", field, at, c.report.Suggest(at, t.Hosts))
	}
}

// ownNames are names of the node itself and of its cloud's metadata service.
var ownNames = []string{"localhost", "metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"}

// carrierGrade is RFC 6598's range, which some clouds serve metadata from.
var carrierGrade = netip.MustParsePrefix("100.64.0.0/10")

// isOwnHost says whether a URL's host is, or could be read as, an address that
// is not public.
func isOwnHost(host string) bool {
	if slices.Contains(ownNames, host) || strings.HasSuffix(host, ".localhost") {
		return true
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		// Resolvers read 127.1, 0x7f000001 and 2130706433 as addresses.
		last := host[strings.LastIndexByte(host, '.')+1:]
		return last == "" || '0' <= last[0] && last[0] <= '9'
	}
	a = a.WithZone("").Unmap()
	return !a.IsGlobalUnicast() || a.IsPrivate() || carrierGrade.Contains(a) || embedsIPv4(a)
}

// embedsIPv4 says whether an IPv6 address leads to an IPv4 one: NAT64 (RFC
// 6052, RFC 8215), 6to4 (RFC 3056), Teredo (RFC 4380) or IPv4-compatible.
func embedsIPv4(a netip.Addr) bool {
	return a.Is6() && slices.ContainsFunc(embedding, func(p netip.Prefix) bool { return p.Contains(a) })
}

var embedding = []netip.Prefix{
	netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("64:ff9b:1::/48"), netip.MustParsePrefix("2002::/16"),
	netip.MustParsePrefix("2001::/32"), netip.MustParsePrefix("::/96"),
}
