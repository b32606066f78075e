// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"cmp"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const (
	maxSpiffeID   = 2048 // bytes, SPIFFE-ID section 2.3
	expiryWarning = 30 * 24 * time.Hour
)

type identityDoc = load.Doc[v1alpha1.MachineIdentity]

// compileIdentities makes all identities, then what they say of each other.
func (c *compiler) compileIdentities() {
	docs := make(map[*Identity]*identityDoc, len(c.set.Identities))
	for _, d := range c.set.Identities {
		id := c.identity(d)
		docs[id] = d
		c.identities[id.fullName] = id
		c.declare(toIdentity, id.Namespace, id.Name)
		c.plan.identities = append(c.plan.identities, id)
	}
	byName(c.plan.identities)
	c.checkIDs(docs)
	c.checkSelectors(docs)
	for _, id := range c.plan.identities {
		d := docs[id]
		id.MayCall = c.identityRefs(&d.Document, "mayCall", id.Namespace, d.Value.Spec.MayCall, "spec", "mayCall")
		byName(id.MayCall)
		id.mayCall = make(map[*Identity]struct{}, len(id.MayCall))
		for _, callee := range id.MayCall {
			id.mayCall[callee] = struct{}{}
		}
		c.endpoints(id, d, docs)
	}
}

func (c *compiler) identity(d *identityDoc) *Identity {
	spec := &d.Value.Spec
	id := &Identity{
		Namespace: d.Namespace, Name: d.Name, fullName: d.FullName(), Owner: spec.Owner, Position: d.Position(),
		Mode: mode(spec.Mode),
	}
	if c.empty(&d.Document, "owner", "spec", "owner"); spec.Owner != "" && strings.TrimSpace(spec.Owner) == "" {
		c.report.Errorf(d.At("spec", "owner"), "owner: is blank")
	}
	if spec.Expires != nil {
		id.Expires = time.Time(*spec.Expires)
		switch pos := d.At("spec", "expires"); {
		case id.Expired(c.now):
			c.report.Warnf(pos, "expires: %s has expired: it is denied", id.fullName)
		case id.Expired(c.now.Add(expiryWarning)):
			c.report.Warnf(pos, "expires: %s expires in less than 30 days; then it is denied", id.fullName)
		}
	}
	c.selector(id, d)
	c.egress(id, d)
	c.spiffeID(id, d)
	return id
}

// mode returns the mode that a document says, audit if it says none.
func mode(s string) flow.Mode {
	if m, ok := flow.ParseMode(s); ok {
		return m
	}
	return flow.ModeAudit
}

func (c *compiler) spiffeID(id *Identity, d *identityDoc) {
	explicit := d.Value.Spec.SpiffeID
	if _, written := d.Lookup("spec", "spiffeID"); written {
		if why := c.checkSpiffeID(explicit); why != "" {
			c.report.Errorf(d.At("spec", "spiffeID"), "spiffeID: %s", why)
		} else {
			c.foreign(d, explicit)
		}
		id.ID = explicit
		return
	}
	if s := id.Selector; s != nil && s.Kubernetes != nil {
		// The same on every node of the cluster.
		id.ID = "spiffe://" + c.trustDomain + "/ns/" + id.Namespace + "/sa/" + s.Kubernetes.ServiceAccount
		return
	}
	id.Derived = true
	tail := "ns/" + id.Namespace + "/" + id.Name
	if s := id.Selector; s != nil && s.SystemdUnit != "" {
		if isUnit(s.SystemdUnit) && !isPathSegment(s.SystemdUnit) {
			c.report.Errorf(d.At("spec", "select", "systemd", "unit"),
				"unit: %q has characters that a SPIFFE ID cannot hold; set spiffeID", s.SystemdUnit)
		}
		tail = "unit/" + s.SystemdUnit
	}
	id.ID = c.plan.nodePrefix + c.node + "/" + tail
}

// tail returns what follows the node's name in a derived ID.
func (c *compiler) tail(id string) (string, bool) {
	rest, ok := strings.CutPrefix(id, c.plan.nodePrefix)
	if !ok {
		return "", false
	}
	_, tail, ok := strings.Cut(rest, "/")
	return tail, ok
}

// foreign holds an ID of another trust domain against what this node can prove.
func (c *compiler) foreign(d *identityDoc, id string) {
	domain, _, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
	if c.anyDomain || domain == c.trustDomain {
		return
	}
	if _, selects := d.Lookup("spec", "select"); selects {
		c.report.Errorf(d.At("spec", "spiffeID"), "spiffeID: is of trust domain %s, and select recognises workloads of this node, which is of %s", domain, c.trustDomain)
	} else if c.domains != nil && !slices.Contains(c.domains, domain) {
		c.report.Warnf(d.At("spec", "spiffeID"), "spiffeID: nobody can prove it: identity.bundles has no roots of trust domain %s%s", domain, c.report.Suggest(domain, c.domains))
	}
}

// checkSpiffeID says what is wrong with an ID, "" where nothing is.
func (c *compiler) checkSpiffeID(s string) string {
	rest, ok := strings.CutPrefix(s, "spiffe://")
	if !ok {
		return "does not begin with spiffe://"
	}
	if len(s) > maxSpiffeID {
		return "is longer than 2048 bytes"
	}
	domain, p, ok := strings.Cut(rest, "/")
	if !ok {
		return "has no path: it would be the trust domain itself"
	}
	if !isTrustDomain(domain) {
		return "has a trust domain with other characters than a-z, 0-9, -, . and _"
	}
	for segment := range strings.SplitSeq(p, "/") {
		if !isPathSegment(segment) {
			return "has a path with an empty or dot segment, or with other characters than letters, digits, -, . and _"
		}
	}
	return ""
}

func isTrustDomain(s string) bool {
	return s != "" && len(s) <= 255 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-._") == ""
}

func isPathSegment(s string) bool {
	if s == "" || s == "." || s == ".." {
		return false
	}
	for i := range len(s) {
		if !isAlnum(s[i]) && s[i] != '-' && s[i] != '.' && s[i] != '_' {
			return false
		}
	}
	return true
}

// checkIDs refuses two identities of one ID, on this node or on any other.
func (c *compiler) checkIDs(docs map[*Identity]*identityDoc) {
	for _, id := range c.plan.identities {
		key, index := id.ID, c.plan.byID
		if id.Derived {
			key, _ = c.tail(id.ID)
			index = c.plan.byTail
		}
		if other := index[key]; other != nil {
			c.report.Errorf(docs[id].Position(), "%s has the same ID as %s: %s", id.fullName, c.other(other.fullName, other.Position), id.ID)
			continue
		}
		index[key] = id
	}
	for _, id := range c.plan.identities {
		if tail, ok := c.tail(id.ID); ok && !id.Derived {
			if other := c.plan.byTail[tail]; other != nil {
				c.report.Errorf(docs[id].At("spec", "spiffeID"), "spiffeID: is what %s derives on that node", c.other(other.fullName, other.Position))
			}
		}
	}
}

func (c *compiler) selector(id *Identity, d *identityDoc) {
	s := d.Value.Spec.Select
	if s == nil {
		if _, written := d.Lookup("spec", "select"); !written && d.Value.Spec.SpiffeID == "" {
			c.report.Errorf(d.Key("spec"), "select is missing: say how the workload is recognised, or give its spiffeID if it runs elsewhere")
		}
		return
	}
	out := &Selector{All: s.All}
	if s.UID != nil {
		out.UID, out.HasUID = *s.UID, true
	}
	if s.Process != nil {
		out.ProcessBinary = s.Process.Binary
		c.empty(&d.Document, "binary", "spec", "select", "process", "binary")
		if b := out.ProcessBinary; b != "" && (!path.IsAbs(b) || path.Clean(b) != b) {
			c.report.Errorf(d.At("spec", "select", "process", "binary"), "binary: %q is not a clean absolute path", b)
		}
		out.ProcessDigest = c.processDigest(d, s.Process.Digest)
	}
	key := d.Key("spec", "select")
	var places []string
	for _, p := range [...]struct {
		name string
		set  bool
	}{{"kubernetes", s.Kubernetes != nil}, {"systemd", s.Systemd != nil}, {"cgroup", s.Cgroup != nil}} {
		if p.set {
			places = append(places, p.name)
		}
	}
	switch {
	case s.All && (len(places) > 0 || s.UID != nil || s.Process != nil):
		c.report.Errorf(d.Key("spec", "select", "all"), "all: stands alone; without it the other lines say who is meant")
	case s.All:
		c.everything(id, d)
	case len(places) > 1:
		c.report.Errorf(key, "select: %s each name the workload's cgroup; keep one", strings.Join(places, " and "))
	case s.Kubernetes != nil:
		c.kubernetes(id, d, out)
	case s.Systemd != nil:
		out.SystemdUnit = s.Systemd.Unit
		c.unit(d, s.Systemd.Unit)
	case s.Cgroup != nil:
		out.CgroupPath = s.Cgroup.Path
		c.empty(&d.Document, "path", "spec", "select", "cgroup", "path")
		if p := s.Cgroup.Path; p != "" && (!path.IsAbs(p) || path.Clean(p) != p || p == "/" || len(p) > 4095) {
			c.report.Errorf(d.At("spec", "select", "cgroup", "path"), "path: %q is not a clean absolute path beneath the cgroup root", p)
		}
	case s.UID != nil || s.Process != nil:
		c.report.Errorf(key, "select: uid and process only narrow a service account, a systemd unit or a cgroup down; add one")
	case !d.Empty("spec", "select"): // what is there was reported
	default:
		c.report.Errorf(key, "select: empty would match every workload; write \"all: true\" if you mean it")
	}
	id.Selector = out
}

var digestForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// processDigest returns the digest of an executable as the agent writes it.
func (c *compiler) processDigest(d *identityDoc, text string) string {
	c.empty(&d.Document, "digest", "spec", "select", "process", "digest")
	digest := strings.ToLower(text)
	if digest != "" && !digestForm.MatchString(digest) {
		c.report.Errorf(d.At("spec", "select", "process", "digest"), "digest: %q is not sha256: and the 64 hexadecimal digits that sha256sum prints", text)
	}
	return digest
}

// everything holds an identity to what one can be that is every workload which
// no other selects: a caller, and the only one.
func (c *compiler) everything(id *Identity, d *identityDoc) {
	at := d.Key("spec", "select", "all")
	for _, other := range c.plan.identities {
		if other.Selector != nil && other.Selector.All {
			c.report.Errorf(at, "all: %s is all workloads already", c.other(other.fullName, other.Position))
		}
	}
	if _, ok := d.Lookup("spec", "endpoints"); ok {
		c.report.Errorf(d.Key("spec", "endpoints"), "endpoints: who is any workload serves nowhere; select the one that does")
	}
	if id.Mode == flow.ModeEnforce {
		c.report.Warnf(at, "all: in enforce the services of the system itself go nowhere that mayCall and egress do not list, sshd and what asks the resolver among them")
	}
}

func (c *compiler) unit(d *identityDoc, unit string) {
	pos := d.At("spec", "select", "systemd", "unit")
	switch {
	case unit == "":
		c.empty(&d.Document, "unit", "spec", "select", "systemd", "unit")
	case !strings.HasSuffix(unit, ".service") && !strings.HasSuffix(unit, ".scope"):
		c.report.Errorf(pos, "unit: %q is not the full name of a service or a scope, such as checkout.service", unit)
	case !isUnit(unit):
		c.report.Errorf(pos, "unit: %q is not the name of a unit", unit)
	}
}

// isUnit says whether s has the form of a unit's name, systemd.unit(5).
func isUnit(s string) bool {
	stem := strings.TrimSuffix(strings.TrimSuffix(s, ".service"), ".scope")
	if stem == "" || len(s) > 255 {
		return false
	}
	for i := range len(s) {
		if !isAlnum(s[i]) && strings.IndexByte(`:-_.\@`, s[i]) < 0 {
			return false
		}
	}
	return true
}

// checkSelectors refuses identities that would match one workload: it would
// be denied as either.
func (c *compiler) checkSelectors(docs map[*Identity]*identityDoc) {
	places := make(map[string][]*Identity)
	for _, id := range c.plan.identities {
		if p := id.Selector.place(); p != "" {
			places[p] = append(places[p], id)
		}
	}
	c.checkPods(docs)
	for _, id := range c.plan.identities {
		if id.Selector == nil || !id.Selector.All {
			continue
		}
		for _, other := range c.plan.identities {
			if other.Selector != nil && other.Selector.Kubernetes != nil {
				c.report.Errorf(docs[id].Key("spec", "select", "all"), "all: this version has no source of pods; those of %s would be taken for it", c.other(other.fullName, other.Position))
			}
		}
	}
	for _, id := range c.plan.identities {
		own := id.Selector.place()
		for p := own; p != "" && p != "/" && p != "."; p = path.Dir(p) {
			for _, other := range places[p] {
				if other == id || p == own && other.fullName > id.fullName || !id.Selector.meets(other.Selector) {
					continue
				}
				c.report.Errorf(docs[id].Key("spec", "select"), "select: a workload of %s would also match %s, and be denied as either",
					id.fullName, c.other(other.fullName, other.Position))
			}
		}
	}
}

// place is the cgroup where the selected workload begins, "" where none is
// selected.
func (s *Selector) place() string {
	if s == nil {
		return ""
	}
	return cmp.Or(UnitPath(s.SystemdUnit), s.CgroupPath)
}

// UnitPath is the cgroup in which the system manager puts a unit that has no
// Slice= of its own (systemd.slice(5), systemd.resource-control(5)), "" for
// what is no unit's name.
func UnitPath(unit string) string {
	if strings.ContainsAny(unit, "/\x00") || unit == "" || unit == "." || unit == ".." {
		return ""
	}
	if template, _, ok := strings.Cut(unit, "@"); ok && template != "" {
		// The slice of a template escapes the dash, which would mean a level.
		return "/system.slice/system-" + strings.ReplaceAll(template, "-", `\x2d`) + ".slice/" + unit
	}
	return "/system.slice/" + unit
}

// meets says whether one process could be of both, its place left aside.
func (s *Selector) meets(o *Selector) bool {
	if s.HasUID && o.HasUID && s.UID != o.UID {
		return false
	}
	if s.ProcessDigest != "" && o.ProcessDigest != "" && s.ProcessDigest != o.ProcessDigest {
		return false
	}
	return s.ProcessBinary == "" || o.ProcessBinary == "" || s.ProcessBinary == o.ProcessBinary
}

func (c *compiler) endpoints(id *Identity, d *identityDoc, docs map[*Identity]*identityDoc) {
	for i, text := range d.Value.Spec.Endpoints {
		pos := func() load.Position { return d.At("spec", "endpoints", i) }
		a, err := netip.ParseAddrPort(text)
		switch {
		case err != nil:
			c.report.Errorf(pos(), "endpoints: %q is not IP:PORT, such as 10.0.0.11:8080 or [fd00::11]:8080", text)
			continue
		case a.Port() == 0 || a.Addr().IsUnspecified() || a.Addr().IsMulticast() || a.Addr().Zone() != "":
			c.report.Errorf(pos(), "endpoints: %q is not the address of one server", text)
			continue
		}
		a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
		if other := c.plan.claims[a]; other != nil {
			c.report.Errorf(pos(), "endpoints: %s is already that of %s", a, c.other(other.fullName, docs[other].Key("spec", "endpoints")))
			continue
		}
		c.plan.claims[a] = id
		id.Endpoints = append(id.Endpoints, a)
	}
}

func (c *compiler) egress(id *Identity, d *identityDoc) {
	seen := map[string]bool{}
	if _, written := d.Lookup("spec", "egress"); written {
		id.Egress = []Egress{} // to nowhere is not the same as nothing said
	}
	for i, e := range d.Value.Spec.Egress {
		at := []any{"spec", "egress", i}
		if d.Empty(at...) {
			continue // and reported
		}
		_, host := d.Lookup("spec", "egress", i, "host")
		_, cidr := d.Lookup("spec", "egress", i, "cidr")
		one := Egress{}
		ok := false
		switch {
		case host && cidr:
			c.report.Errorf(d.At(at...), "egress: names a host and a cidr; write an entry for each")
		case host:
			one.Host, ok = c.egressHost(d, i, e.Host)
		case cidr:
			one.Prefix, ok = c.egressRange(d, i, e.CIDR)
		default:
			c.report.Errorf(d.At(at...), "egress: names neither a host nor a cidr")
		}
		one.Verify = e.TLS == "verify"
		if e.TLS != "" && !host {
			c.report.Errorf(d.Key("spec", "egress", i, "tls"), "tls: goes with host")
		}
		one.Ports = c.ports(&d.Document, e.Ports, "spec", "egress", i, "ports")
		if one.Host != "" && seen[one.Host] {
			c.report.Errorf(d.At("spec", "egress", i, "host"), "host: %q is there twice; write its ports in one entry", one.Host)
		}
		if seen[one.Host] = true; ok {
			id.Egress = append(id.Egress, one)
		}
	}
}

func (c *compiler) egressHost(d *identityDoc, i int, host string) (string, bool) {
	lower := strings.ToLower(host)
	_, err := netip.ParseAddr(host)
	switch {
	case host == "":
		c.empty(&d.Document, "host", "spec", "egress", i, "host")
	case strings.Contains(host, "*"):
		c.report.Errorf(d.At("spec", "egress", i, "host"), "host: %q: wildcards are not supported by this version", host)
	case err == nil:
		c.report.Errorf(d.At("spec", "egress", i, "host"), "host: %q is an address; write it as a cidr", host)
	case !isHost(lower):
		c.report.Errorf(d.At("spec", "egress", i, "host"), "host: %q is not a host's name without port", host)
	default:
		return lower, true
	}
	return "", false
}

func (c *compiler) egressRange(d *identityDoc, i int, cidr string) (netip.Prefix, bool) {
	prefix, err := netip.ParsePrefix(cidr)
	at := d.At("spec", "egress", i, "cidr")
	switch {
	case cidr == "":
		c.empty(&d.Document, "cidr", "spec", "egress", i, "cidr")
	case err != nil:
		c.report.Errorf(at, "cidr: %q is not ADDRESS/BITS, such as 10.9.0.0/16", cidr)
	case prefix.Addr().Is4In6():
		c.report.Errorf(at, "cidr: write %q as IPv4", cidr)
	case prefix.Masked() != prefix:
		c.report.Errorf(at, "cidr: %q has bits beyond its length; did you mean %q?", cidr, prefix.Masked())
	default:
		return prefix, true
	}
	return netip.Prefix{}, false
}

// ports checks a list of ports and returns it in ascending order.
func (c *compiler) ports(d *load.Document, ports []uint16, path ...any) []uint16 {
	seen := make(map[uint16]bool, len(ports))
	for i, p := range ports {
		at := append(slices.Clone(path), i)
		if p == 0 {
			if d.Text(at...) == "0" { // else it was no number, and reported
				c.report.Errorf(d.At(at...), "ports: 0 is not a port")
			}
			continue
		}
		if seen[p] {
			c.report.Errorf(d.At(at...), "ports: %d is there twice", p)
		}
		seen[p] = true
	}
	out := slices.Sorted(slices.Values(ports))
	return slices.Compact(out)
}
