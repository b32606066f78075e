// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"slices"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Limits of a scope. The bytes bound a chain to far under what a TLS
// session ticket holds (64 KiB).
const (
	MaxScopeIDs   = 1024
	maxScopeBytes = 24 << 10
)

// oidScope names the critical extension that lists what a node's
// intermediate may issue. The arc 1.2.840.113556.1.8000.2554 is open to
// anyone who appends a GUID; this one was drawn for it.
var oidScope = asn1.ObjectIdentifier{1, 2, 840, 113556, 1, 8000, 2554, 16743, 56413, 25379, 17456, 37174, 15918047, 2165403}

// Scope is what an authority lets a node issue.
type Scope struct {
	Node string   // the node's name
	IDs  []string // the exact SPIFFE IDs, sorted, each once
}

// scopeDER is the extension's value:
//
//	Scope ::= SEQUENCE { node UTF8String, ids SEQUENCE OF IA5String }
type scopeDER struct {
	Node string `asn1:"utf8"`
	IDs  []asn1.RawValue
}

// NewScope validates and sorts: every ID within the trust domain, at most
// MaxScopeIDs of them.
func NewScope(trustDomain, node string, ids []string) (Scope, error) {
	s := Scope{Node: node, IDs: slices.Compact(slices.Sorted(slices.Values(ids)))}
	if err := CheckNodeName(node); err != nil {
		return Scope{}, err
	}
	if len(s.IDs) > MaxScopeIDs {
		return Scope{}, fmt.Errorf("scope of node %s: %d IDs, at most %d", node, len(s.IDs), MaxScopeIDs)
	}
	for _, text := range s.IDs {
		id, err := ParseID(text)
		if err != nil {
			return Scope{}, fmt.Errorf("scope of node %s: %q: %w", node, text, err)
		}
		if id.TrustDomain() != trustDomain {
			return Scope{}, fmt.Errorf("scope of node %s: %q is not of trust domain %s", node, text, trustDomain)
		}
	}
	if n := len(s.marshal()); n > maxScopeBytes {
		return Scope{}, fmt.Errorf("scope of node %s: %d bytes, at most %d; spread the workloads over more nodes or shorten the IDs", node, n, maxScopeBytes)
	}
	return s, nil
}

// Permits says whether the scope lists the ID.
func (s *Scope) Permits(id string) bool {
	_, ok := slices.BinarySearch(s.IDs, id)
	return ok
}

func (s *Scope) marshal() []byte {
	der := scopeDER{Node: s.Node, IDs: make([]asn1.RawValue, len(s.IDs))}
	for i, id := range s.IDs {
		der.IDs[i] = asn1.RawValue{Tag: asn1.TagIA5String, Bytes: []byte(id)}
	}
	b, err := asn1.Marshal(der)
	if err != nil {
		// Names and IDs are ASCII by construction, which is all that can fail.
		panic(err)
	}
	return b
}

func (s *Scope) extension() pkix.Extension {
	return pkix.Extension{Id: oidScope, Critical: true, Value: s.marshal()}
}

// ParseScope parses the extension's value, in its one canonical form: DER,
// IDs valid, sorted and unique.
func ParseScope(b []byte) (Scope, error) {
	if len(b) > maxScopeBytes {
		return Scope{}, refuse(flow.ReasonScope, "scope extension of %d bytes", len(b))
	}
	var der scopeDER
	if rest, err := asn1.Unmarshal(b, &der); err != nil || len(rest) != 0 {
		return Scope{}, refuse(flow.ReasonScope, "scope extension is not DER")
	}
	if len(der.IDs) > MaxScopeIDs {
		return Scope{}, refuse(flow.ReasonScope, "scope extension of %d IDs", len(der.IDs))
	}
	if err := CheckNodeName(der.Node); err != nil {
		return Scope{}, refuse(flow.ReasonScope, "scope extension: %v", err)
	}
	s := Scope{Node: der.Node, IDs: make([]string, len(der.IDs))}
	for i, raw := range der.IDs {
		text := string(raw.Bytes)
		if raw.Class != asn1.ClassUniversal || raw.Tag != asn1.TagIA5String || raw.IsCompound {
			return Scope{}, refuse(flow.ReasonScope, "scope extension: an ID is not an IA5String")
		}
		if _, err := ParseID(text); err != nil {
			return Scope{}, refuse(flow.ReasonScope, "scope extension: %q: %v", text, err)
		}
		if i > 0 && s.IDs[i-1] >= text {
			return Scope{}, refuse(flow.ReasonScope, "scope extension: IDs are not sorted and unique")
		}
		s.IDs[i] = text
	}
	if !bytes.Equal(s.marshal(), b) {
		return Scope{}, refuse(flow.ReasonScope, "scope extension is not canonical DER")
	}
	return s, nil
}

// ScopeOf returns the scope that a certificate carries; found is false
// where it carries none. A scope that is not critical is refused: verifiers
// that do not know it would let the node issue anything.
func ScopeOf(c *x509.Certificate) (s Scope, found bool, err error) {
	for _, e := range c.Extensions {
		if !e.Id.Equal(oidScope) {
			continue
		}
		if !e.Critical {
			return Scope{}, true, refuse(flow.ReasonScope, "scope extension is not critical")
		}
		s, err = ParseScope(e.Value)
		return s, true, err
	}
	return Scope{}, false, nil
}

// withoutScope returns a copy of c on which x509.Verify accepts the scope
// extension, and only that. It never changes c, which crypto/tls shares
// between connections.
func withoutScope(c *x509.Certificate) *x509.Certificate {
	clone := *c
	clone.UnhandledCriticalExtensions = nil
	for _, oid := range c.UnhandledCriticalExtensions {
		if !oid.Equal(oidScope) {
			clone.UnhandledCriticalExtensions = append(clone.UnhandledCriticalExtensions, oid)
		}
	}
	return &clone
}
