// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/relations"
	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
)

// DefaultTrustDomain is that of a node that names none.
const DefaultTrustDomain = "sallyport.local"

// Options are what a plan depends on besides the documents.
type Options struct {
	// TrustDomain is the node's own; every identity must be of it. Empty, as
	// in a validation away from any node, any will do.
	TrustDomain string
	// Domains are the other trust domains whose roots the node has; nil: not
	// known here.
	Domains []string
	// Node is the node's name, which derived IDs hold; "localhost" if empty.
	Node string
	// Tenant holds the documents to what a tenant of a cluster may say; nil
	// for those of the node's own directory, which may say anything.
	Tenant *Tenancy
	// Now tells which identities have expired; time.Now if nil.
	Now func() time.Time
}

// Build loads and compiles a set of files. With errors among the problems
// there is no plan.
func Build(files []load.File, opt Options) (*Plan, []load.Problem) {
	set, problems := load.Load(files)
	plan, more := Compile(set, opt)
	problems = opt.Tenant.Told(load.Sort(append(problems, more...)))
	if load.HasErrors(problems) {
		return nil, problems
	}
	return plan, problems
}

// Compile compiles a set that was loaded. With errors among the problems, or
// in the set, there is no plan; of a set with errors it finds what else is
// wrong.
func Compile(set *load.Set, opt Options) (*Plan, []load.Problem) {
	c := &compiler{
		set: set, trustDomain: cmp.Or(opt.TrustDomain, DefaultTrustDomain), anyDomain: opt.TrustDomain == "", domains: opt.Domains,
		node: cmp.Or(opt.Node, "localhost"), now: time.Now(), tenant: opt.Tenant,
		identities: make(map[string]*Identity), issuers: make(map[string]*Issuer), models: make(map[string]*Model), postures: make(map[string]*Posture),
		names: make(map[reference]map[string][]string), reached: make(map[reached]bool),
	}
	if opt.Now != nil {
		c.now = opt.Now()
	}
	c.plan = &Plan{
		digest: set.Digest, nodePrefix: "spiffe://" + c.trustDomain + "/node/",
		byID: make(map[string]*Identity), byTail: make(map[string]*Identity),
		claims: make(map[netip.AddrPort]*Identity), byPort: make(map[apiKey]*API),
	}
	if !isTrustDomain(c.trustDomain) || !isPathSegment(c.node) {
		c.report.Errorf(load.Position{}, "trust domain %q or node %q has characters that a SPIFFE ID cannot hold", c.trustDomain, c.node)
	}
	c.compileIdentities()
	c.compileIssuers()
	c.compileModels()
	c.compileTuples()
	c.compilePostures()
	c.compilePolicies()
	c.compileTokens()
	c.compileTenancy(opt.Tenant)
	if set.Failed || c.report.Failed() {
		return nil, c.report.Problems()
	}
	return c.plan, c.report.Problems()
}

type compiler struct {
	set         *load.Set
	report      load.Report
	plan        *Plan
	trustDomain string
	anyDomain   bool
	tenant      *Tenancy // nil for the node's own documents
	domains     []string // of others, nil where they are not known
	node        string
	now         time.Time
	identities  map[string]*Identity // by NAMESPACE/NAME
	issuers     map[string]*Issuer
	models      map[string]*Model
	postures    map[string]*Posture
	names       map[reference]map[string][]string // by kind and namespace; "" has the full names
	entries     int                               // in all trees
	conditions  map[string]*compiled
	reached     map[reached]bool
}

// reached is the question whether a model gives users of a type a relation to
// objects of another.
type reached struct {
	model                      *relations.Model
	user, of, object, relation string
}

type reference string

const (
	toIdentity reference = v1alpha1.KindMachineIdentity
	toIssuer   reference = v1alpha1.KindTokenIssuer
	toModel    reference = v1alpha1.KindRelationModel
	toPosture  reference = v1alpha1.KindPostureProfile
)

// declare enters a name for suggestions.
func (c *compiler) declare(kind reference, namespace, name string) {
	m := c.names[kind]
	if m == nil {
		m = make(map[string][]string)
		c.names[kind] = m
	}
	m[namespace] = append(m[namespace], name)
	m[""] = append(m[""], namespace+"/"+name)
}

func fullName(namespace, ref string) string {
	if strings.Contains(ref, "/") {
		return ref
	}
	return namespace + "/" + ref
}

// dangling reports a reference that leads nowhere; a set of which parts
// could not be read has worse problems.
func (c *compiler) dangling(pos load.Position, field string, kind reference, namespace, ref string) {
	if c.set.Incomplete {
		c.report.Errorf(pos, "%s: no %s %q among the documents that could be read", field, kind, ref)
		return
	}
	near, all := c.names[kind][namespace], c.names[kind][""]
	if c.tenant != nil { // who is not told what else there is
		near, all = nil, nil
		for _, name := range c.names[kind][c.tenant.Namespace] {
			all = append(all, c.tenant.Namespace+"/"+name)
		}
		if !c.tenant.stranger(namespace) {
			near = c.names[kind][namespace]
		}
	}
	if strings.Contains(ref, "/") {
		c.report.Errorf(pos, "%s: no %s %q%s", field, kind, ref, c.report.Suggest(ref, all))
		return
	}
	hint := c.report.Suggest(ref, near)
	if hint.Name == "" && c.report.Suggests() {
		for _, full := range all {
			if _, name, _ := strings.Cut(full, "/"); name == ref {
				hint = load.Perhaps(full)
				break
			}
		}
	}
	c.report.Errorf(pos, "%s: no %s %q in namespace %s%s", field, kind, ref, namespace, hint)
}

// identityRefs resolves a list of references to identities, each once.
func (c *compiler) identityRefs(d *load.Document, field, namespace string, refs []string, path ...any) []*Identity {
	var out []*Identity
	seen := make(map[*Identity]bool, len(refs))
	for i, ref := range refs {
		pos := func() load.Position { return d.At(append(slices.Clone(path), i)...) }
		if ref == "" {
			c.empty(d, field, append(slices.Clone(path), i)...)
			continue
		}
		id := c.identities[fullName(namespace, ref)]
		switch {
		case id == nil:
			c.dangling(pos(), field, toIdentity, namespace, ref)
		case seen[id]:
			c.report.Errorf(pos(), "%s: %q is there twice", field, ref)
		default:
			seen[id] = true
			out = append(out, id)
		}
	}
	return out
}

func byName[T interface{ FullName() string }](list []T) {
	slices.SortFunc(list, func(a, b T) int { return cmp.Compare(a.FullName(), b.FullName()) })
}
