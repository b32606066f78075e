// SPDX-License-Identifier: Apache-2.0

// Package compile turns policy documents into a Plan: references resolved,
// defaults filled in, rules laid out so that the cost of a look-up does not
// grow with their number. Build is the one way from files to a Plan, for
// validation, reload and start-up alike.
package compile

import (
	"net/netip"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/relations"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Plan is a compiled set of documents. It is immutable and safe for
// concurrent use; no look-up allocates.
type Plan struct {
	digest     string
	identities []*Identity
	byID       map[string]*Identity // explicit ones
	byTail     map[string]*Identity // derived ones, by what follows the node's name
	nodePrefix string               // spiffe://TRUSTDOMAIN/node/
	claims     map[netip.AddrPort]*Identity
	apis       []*API
	byPort     map[apiKey]*API
	issuers    []*Issuer
	models     []*Model
	tuples     []Tuple
	postures   []*Posture
}

type apiKey struct {
	identity *Identity
	port     uint16
}

// Digest is the SHA-256 of the documents, in hex: two plans of the same
// digest and options are the same.
func (p *Plan) Digest() string { return p.digest }

// Identities returns all identities, by namespace and name.
func (p *Plan) Identities() []*Identity { return p.identities }

// APIs returns all APIs, by namespace and name.
func (p *Plan) APIs() []*API { return p.apis }

// Issuers returns all token issuers, by namespace and name.
func (p *Plan) Issuers() []*Issuer { return p.issuers }

// Models returns all relation models, by namespace and name.
func (p *Plan) Models() []*Model { return p.models }

// Postures returns all posture profiles, by namespace and name.
func (p *Plan) Postures() []*Posture { return p.postures }

// Tuples returns the relations that the set's files hold.
func (p *Plan) Tuples() []Tuple { return p.tuples }

// Identity returns the identity of that SPIFFE ID. A derived ID matches its
// name on any node, and node is the one it names; node is "" for an
// explicit ID. Whether that node may issue the ID is for the verifier of
// its certificate to say.
func (p *Plan) Identity(spiffeID string) (id *Identity, node string, ok bool) {
	if id, ok := p.byID[spiffeID]; ok {
		return id, "", true
	}
	rest, ok := strings.CutPrefix(spiffeID, p.nodePrefix)
	if !ok {
		return nil, "", false
	}
	node, tail, ok := strings.Cut(rest, "/")
	if !ok || node == "" {
		return nil, "", false
	}
	id, ok = p.byTail[tail]
	if !ok {
		return nil, "", false
	}
	return id, node, true
}

// Claimed returns the identity that serves at that address, nil if nobody
// says so. A v4-mapped address is that of IPv4.
func (p *Plan) Claimed(a netip.AddrPort) *Identity {
	if a.Addr().Is4In6() {
		a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	}
	return p.claims[a]
}

// API returns what protects that port of the identity, nil if nothing does.
func (p *Plan) API(id *Identity, port uint16) *API { return p.byPort[apiKey{id, port}] }

// Identity is a compiled MachineIdentity.
type Identity struct {
	Namespace, Name string
	// ID is its SPIFFE ID; a derived one holds this node's name. That of a
	// service account is derived from it, and the same on every node.
	ID      string
	Derived bool
	Owner   string
	// Expires is the first instant at which it is denied, zero if never.
	Expires time.Time
	// Selector is nil where no workload of this node can be it.
	Selector  *Selector
	Endpoints []netip.AddrPort
	Mode      flow.Mode // of its outbound side
	// MayCall is the ceiling of what it may call, by namespace and name.
	MayCall []*Identity
	// Egress is where it may connect outside the mesh: nil, where nothing is
	// said of it, is anywhere until it is enforced, and then nowhere.
	Egress []Egress
	// Tokens are obtained for its calls, at most one for each callee.
	Tokens []Obtain
	// Position is that of the document.
	Position load.Position

	fullName string
	mayCall  map[*Identity]struct{}
}

// FullName returns NAMESPACE/NAME.
func (i *Identity) FullName() string { return i.fullName }

// MayCallIdentity says whether dst is within the ceiling of what i may call.
func (i *Identity) MayCallIdentity(dst *Identity) bool {
	_, ok := i.mayCall[dst]
	return ok
}

// Expired says whether the identity's validity has ended at that time.
func (i *Identity) Expired(now time.Time) bool { return !i.Expires.IsZero() && !now.Before(i.Expires) }

// Expiry says whom to ask about an identity that has expired, and when it did.
func (i *Identity) Expiry() string {
	return "owner " + i.Owner + ", expired " + i.Expires.Format(time.DateOnly)
}

// Changes returns when next an identity will be about to expire or have expired,
// which Build warns of; zero for never.
func (p *Plan) Changes(now time.Time) (next time.Time) {
	for _, i := range p.identities {
		if i.Expires.IsZero() {
			continue
		}
		for _, at := range []time.Time{i.Expires.Add(-expiryWarning), i.Expires} {
			if now.Before(at) && (next.IsZero() || at.Before(next)) {
				next = at
			}
		}
	}
	return next
}

// Selector says how the kernel recognises a workload; every field that is
// set must match. Exactly one of All, Kubernetes, SystemdUnit and
// CgroupPath is set.
type Selector struct {
	// All selects what no other identity does; it stands alone.
	All           bool
	Kubernetes    *Kubernetes
	SystemdUnit   string // full unit name, of the system manager
	CgroupPath    string // clean and absolute beneath the cgroup root, the cgroup and what is beneath it
	UID           uint32
	HasUID        bool
	ProcessBinary string // absolute path, "" for any
	ProcessDigest string // of its content, sha256: and 64 lower-case digits, "" for any; with ProcessBinary
}

// Egress is a range of addresses outside the mesh, or a host in lower case
// whose addresses the agent follows, with its ports in ascending order.
type Egress struct {
	Prefix netip.Prefix // of a host the zero Prefix, which contains nothing
	Host   string       // "" for a range
	Ports  []uint16
	// Verify has what goes to the host be TLS under its name, at an address
	// that proves it.
	Verify bool
}

// Issuer is a compiled TokenIssuer. One of JWKSURL, JWKSFile and JWKS is set,
// or none where there is an IntrospectionURL.
type Issuer struct {
	Namespace, Name string
	URL             string // exact value of iss
	JWKSURL         string // https
	JWKSFile        string // absolute path
	JWKS            []byte // a JSON document, RFC 7517 section 5
	Algorithms      []string
	Audiences       []string // nil: whatever rules ask for
	MaxLifetime     time.Duration
	Types           []string // accepted typ values, at+jwt or JWT
	Claims          []Claim  // that each token must have, by name
	Bound           bool     // each token must be bound to who presents it
	TokenURL        string   // https, "" where no tokens are obtained of it
	// IntrospectionURL is where opaque tokens are asked about, "" for nowhere,
	// with what the file IntrospectionCredentials holds.
	IntrospectionURL, IntrospectionCredentials string
	Position                                   load.Position
}

// Claim is a claim that a token must have, with one of the values.
type Claim struct {
	Name   string
	Values []string
}

// HasKeys says whether it signs tokens by keys that are known.
func (i *Issuer) HasKeys() bool { return i.JWKSURL != "" || i.JWKSFile != "" || i.JWKS != nil }

// FullName returns NAMESPACE/NAME.
func (i *Issuer) FullName() string { return i.Namespace + "/" + i.Name }

// Model is a compiled RelationModel.
type Model struct {
	Namespace, Name string
	// Text is the model in OpenFGA's language or as JSON; "" is the model that
	// is built in.
	Text string
	// Relations is what Text says.
	Relations *relations.Model
	Position  load.Position
	// Address is that of the OpenFGA server that has the relations, HOST:PORT,
	// "" for the node itself, with the name of the Store there and the file that
	// has its Credentials, "" for none.
	Address, Store, Credentials string
}

// FullName returns NAMESPACE/NAME.
func (m *Model) FullName() string { return m.Namespace + "/" + m.Name }

// Tuple is one relation of a *.tuples.yaml file.
type Tuple struct {
	Model                  *Model
	User, Relation, Object string
	Position               load.Position
}
