// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"cmp"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Posture is a compiled PostureProfile.
type Posture struct {
	Namespace, Name string
	// Attested says that only facts with the authority's signature count.
	Attested bool
	// WarnUnknown lets a call pass where a fact is not known, and says so.
	WarnUnknown  bool
	Requirements []Requirement // at least one, in the order of the document's fields
	// Held is what a decision says where all of them are satisfied.
	Held     string
	Position load.Position
}

// FullName returns NAMESPACE/NAME.
func (p *Posture) FullName() string { return p.Namespace + "/" + p.Name }

// Fact is what a requirement is held against.
type Fact uint8

// The facts.
const (
	FactQuote Fact = iota
	FactSecureBoot
	FactLockdown
	FactDigest
	FactExec
	FactPrivileged
	FactProvenance
	FactSBOM
	FactVulnerabilities
	FactRisk
)

// Requirement is one thing that must be proven.
type Requirement struct {
	Fact  Fact
	Field string // as in node.tpmQuoteMaxAge
	// Level is the least lockdown or digest status, the most risk, or the
	// severity from which on vulnerabilities count.
	Level  uint8
	MaxAge time.Duration // of a quote or a bill of materials, 0 for any
	// Builder and Issuer are who must have built it; with AnyRest Builder is
	// what the builder's ID begins with.
	Builder, Issuer string
	AnyRest         bool
	// Loaded counts only vulnerabilities in what is loaded, IgnoreVEX also
	// those that are said not to affect; Grace is how long after publication
	// they do not count.
	Loaded, IgnoreVEX bool
	Grace             time.Duration
	// Warn lets a call pass where it is not satisfied, and says so: of
	// provenance only where there is none.
	Warn bool
	// Unknown and Failed are what a decision says where the fact is not
	// known, and where it does not suffice.
	Unknown, Failed string
}

// Kernel lockdown, kernel_lockdown(7).
const (
	LockdownNone uint8 = iota
	LockdownIntegrity
	LockdownConfidentiality
)

// The status of a program's digest.
const (
	DigestUnlisted uint8 = iota // in no inventory
	DigestKnown
	DigestSigned
)

// The levels of severities and risks; there is no critical risk.
const (
	LevelLow uint8 = iota
	LevelMedium
	LevelHigh
	LevelCritical
)

var (
	lockdownWords = []string{"none", "integrity", "confidentiality"}
	digestWords   = []string{"unlisted", "known", "signed"}
	levelWords    = []string{"low", "medium", "high", "critical"}
)

func level(words []string, word string) uint8 { return uint8(max(0, slices.Index(words, word))) }

type postureDoc = load.Doc[v1alpha1.PostureProfile]

func (c *compiler) compilePostures() {
	for _, d := range c.set.Postures {
		spec := &d.Value.Spec
		p := &Posture{
			Namespace: d.Namespace, Name: d.Name, Position: d.Position(),
			Held: "posture " + d.FullName(), Attested: spec.Evidence != "claimed", WarnUnknown: spec.OnUnknown == "warn",
		}
		c.nodePosture(p, d)
		c.binaryPosture(p, d)
		c.softwarePosture(p, d)
		if r := spec.Risk; r != nil {
			p.require(Requirement{Fact: FactRisk, Field: "risk.max", Level: level(levelWords, r.Max)})
			if r.Max == "high" {
				c.report.Warnf(d.At("spec", "risk", "max"), "max: high bounds nothing: it only asks for a risk level to be known")
			}
		}
		if spec.Node == nil && spec.Binary == nil && spec.Software == nil && spec.Risk == nil {
			c.report.Errorf(d.Key("spec"), "spec: a profile that asks for nothing; give node, binary, software or risk")
		}
		c.postures[p.FullName()] = p
		c.declare(toPosture, p.Namespace, p.Name)
		c.plan.postures = append(c.plan.postures, p)
	}
	byName(c.plan.postures)
}

func (p *Posture) require(r Requirement) {
	r.Unknown = "posture " + p.FullName() + ": " + r.Field + " is not known"
	r.Failed = "posture " + p.FullName() + ": " + r.Field + " is not satisfied"
	p.Requirements = append(p.Requirements, r)
}

// asks reports a section of a profile that asks for nothing.
func (c *compiler) asks(p *Posture, d *postureDoc, before int, section ...any) {
	path := append([]any{"spec"}, section...)
	if len(p.Requirements) == before && d.Empty(path...) {
		c.report.Errorf(d.Key(path...), "%s: asks for nothing", section[len(section)-1])
	}
}

func (c *compiler) nodePosture(p *Posture, d *postureDoc) {
	n := d.Value.Spec.Node
	if n == nil {
		return
	}
	before := len(p.Requirements)
	if n.TPMQuoteMaxAge != nil {
		p.require(Requirement{Fact: FactQuote, Field: "node.tpmQuoteMaxAge", MaxAge: time.Duration(*n.TPMQuoteMaxAge)})
	}
	if n.SecureBoot {
		p.require(Requirement{Fact: FactSecureBoot, Field: "node.secureBoot"})
	} else {
		c.saysNothing(d, "secureBoot", "spec", "node", "secureBoot")
	}
	if n.Lockdown != "" {
		p.require(Requirement{Fact: FactLockdown, Field: "node.lockdown", Level: level(lockdownWords, n.Lockdown)})
	}
	c.asks(p, d, before, "node")
}

// saysNothing refuses a false where only true asks for something.
func (c *compiler) saysNothing(d *postureDoc, field string, path ...any) {
	if pos, ok := d.Lookup(path...); ok && slices.Contains(notTrue[1:], d.Text(path...)) {
		c.report.Errorf(pos, "%s: false asks for nothing; leave it out", field)
	}
}

func (c *compiler) binaryPosture(p *Posture, d *postureDoc) {
	b := d.Value.Spec.Binary
	if b == nil {
		return
	}
	before := len(p.Requirements)
	if b.Digest != "" {
		p.require(Requirement{Fact: FactDigest, Field: "binary.digest", Level: level(digestWords, b.Digest)})
	}
	if b.ExecAfterConnect != "allow" && !d.Empty("spec", "binary") {
		p.require(Requirement{Fact: FactExec, Field: "binary.execAfterConnect"})
	}
	if b.Privileged == "deny" {
		p.require(Requirement{Fact: FactPrivileged, Field: "binary.privileged"})
	}
	if len(p.Requirements) == before {
		c.report.Errorf(d.Key("spec", "binary"), "binary: asks for nothing")
	}
}

func (c *compiler) softwarePosture(p *Posture, d *postureDoc) {
	s := d.Value.Spec.Software
	if s == nil {
		return
	}
	before := len(p.Requirements)
	if s.Provenance != nil {
		c.provenance(p, d, s.Provenance)
	}
	if b := s.SBOM; b != nil {
		r := Requirement{Fact: FactSBOM, Field: "software.sbom"}
		if b.MaxAge != nil {
			r.MaxAge = time.Duration(*b.MaxAge)
		}
		switch {
		case b.Required:
			p.require(r)
		case b.MaxAge != nil:
			c.report.Errorf(d.At("spec", "software", "sbom", "maxAge"), "maxAge: what has no bill of materials would pass; add required: true")
		default:
			c.saysNothing(d, "required", "spec", "software", "sbom", "required")
			c.asks(p, d, len(p.Requirements), "software", "sbom")
		}
	}
	c.vulnerabilities(p, d, s.Vulnerabilities)
	c.asks(p, d, before, "software")
}

func (c *compiler) provenance(p *Posture, d *postureDoc, s *v1alpha1.Provenance) {
	at := []any{"spec", "software", "provenance"}
	builder, rest := strings.CutSuffix(s.Builder, "*")
	pos := func(field string) load.Position { return d.At(append(slices.Clone(at), field)...) }
	switch u, err := url.Parse(builder); {
	case s.Builder == "":
		c.empty(&d.Document, "builder", append(slices.Clone(at), "builder")...)
	case strings.Contains(builder, "*"):
		c.report.Errorf(pos("builder"), "builder: %q: * can only stand at the end", s.Builder)
	case err != nil || !isHTTPS(u):
		c.report.Errorf(pos("builder"), "builder: %q is not the https URL of a builder", s.Builder)
	case rest && len(strings.Trim(u.Path, "/")) == 0:
		c.report.Errorf(pos("builder"), "builder: %q: * behind the host alone would be any builder there", s.Builder)
	}
	switch u, err := url.Parse(s.Issuer); {
	case s.Issuer == "":
		c.empty(&d.Document, "issuer", append(slices.Clone(at), "issuer")...)
	case err != nil || !isHTTPS(u) || strings.Contains(s.Issuer, "*"):
		c.report.Errorf(pos("issuer"), "issuer: %q is not an https URL", s.Issuer)
	}
	p.require(Requirement{
		Fact: FactProvenance, Field: "software.provenance", Builder: builder, AnyRest: rest, Issuer: s.Issuer, Warn: s.OnMissing == "warn",
	})
}

func isHTTPS(u *url.URL) bool {
	return u.Scheme == "https" && u.Host != "" && u.User == nil && u.Fragment == "" && u.RawQuery == ""
}

// vulnerabilities refuses lists that say less of what is worse.
func (c *compiler) vulnerabilities(p *Posture, d *postureDoc, list []v1alpha1.Vulnerabilities) {
	type entry struct {
		*v1alpha1.Vulnerabilities
		index int
	}
	at := func(i int, field string) load.Position {
		return d.At("spec", "software", "vulnerabilities", i, field)
	}
	seen := map[string]int{}
	var entries []entry
	for i := range list {
		v := &list[i]
		if first, ok := seen[v.Severity]; ok && v.Severity != "" {
			c.report.Errorf(at(i, "severity"), "severity: %q is there twice: first at %s", v.Severity, at(first, "severity"))
			continue
		}
		seen[v.Severity] = i
		if v.GraceAfterPublish != nil && v.Action == "warn" {
			c.report.Errorf(at(i, "graceAfterPublish"), "graceAfterPublish: with action: warn there is nothing to wait with")
		}
		if slices.Contains(levelWords, v.Severity) && v.Action != "" {
			entries = append(entries, entry{v, i})
		}
		r := Requirement{
			Fact: FactVulnerabilities, Field: "software.vulnerabilities." + v.Severity, Level: level(levelWords, v.Severity),
			Loaded: v.InLoadedModules, IgnoreVEX: v.VEX == "ignore", Warn: v.Action == "warn",
		}
		if v.GraceAfterPublish != nil {
			r.Grace = time.Duration(*v.GraceAfterPublish)
		}
		p.require(r)
	}
	slices.SortFunc(entries, func(a, b entry) int {
		return cmp.Compare(level(levelWords, a.Severity), level(levelWords, b.Severity))
	})
	grace := func(e entry) time.Duration {
		if e.GraceAfterPublish == nil {
			return 0
		}
		return time.Duration(*e.GraceAfterPublish)
	}
	for i := 1; i < len(entries); i++ {
		less, more := entries[i-1], entries[i]
		switch {
		case less.Action == "deny" && more.Action == "warn":
			c.report.Errorf(at(more.index, "action"), "action: warn for %s, where %s is denied already", more.Severity, less.Severity)
		case less.Action == "deny" && grace(more) > grace(less):
			c.report.Errorf(at(more.index, "graceAfterPublish"), "graceAfterPublish: longer for %s than for %s", more.Severity, less.Severity)
		}
	}
}

// postureRef resolves a reference to a profile and warns that nothing serves
// it.
func (c *compiler) postureRef(a *API, d *load.Document, ref string, path ...any) *Posture {
	if ref == "" {
		c.empty(d, "posture", path...)
		return nil
	}
	p := c.postures[fullName(d.Namespace, ref)]
	if p == nil {
		c.dangling(d.At(path...), "posture", toPosture, d.Namespace, ref)
		return nil
	}
	fields := make([]string, len(p.Requirements))
	for i := range p.Requirements {
		fields[i] = p.Requirements[i].Field
	}
	what := "every call will be refused"
	switch {
	case p.WarnUnknown:
		what = "every call passes, and its record says so"
	case a.Mode != flow.ModeEnforce:
		what = "every call would be refused"
	}
	c.report.Warnf(d.At(path...), "posture: this version has no source of %s: %s", listed(fields), what)
	return p
}
