// SPDX-License-Identifier: Apache-2.0

// Package identity gives workloads their names and proves those of others:
// SPIFFE IDs, the node's certificate authority, short-lived leaves that
// rotate, the verification of a peer's chain, revocations, and the TLS 1.3
// configurations built from them.
//
// The agent owns the CA (OpenCA, CA.Sign); the unprivileged userspace
// process owns the leaves' keys (Leaves) and verifies peers (Verifier,
// ServerConfig, ClientConfig). Between the two only a certificate request
// and a chain cross. Formats follow RFC 5280, RFC 8446 and the SPIFFE
// standards SPIFFE-ID and X509-SVID.
package identity

import (
	"fmt"
	"strings"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Limits of a SPIFFE ID in bytes (SPIFFE-ID, 2.3).
const (
	maxID          = 2048
	maxTrustDomain = 255
)

const scheme = "spiffe://"

// ID is a workload's SPIFFE ID, valid by construction and comparable. The
// zero ID is none.
type ID struct {
	text string
	path int // where the path begins in text
}

// ParseID parses a workload's SPIFFE ID: lower-case scheme and trust domain,
// a path of at least one segment, none of them empty, "." or "..", and
// nothing else: no port, user, query, fragment or percent-encoding. The
// error is a *Refusal with ReasonCertID whose detail names the fault.
func ParseID(s string) (ID, error) {
	rest, ok := strings.CutPrefix(s, scheme)
	switch {
	case len(s) > maxID:
		return ID{}, badID("longer than %d bytes", maxID)
	case !ok:
		return ID{}, badID("scheme is not spiffe://")
	}
	if err := charactersFault(rest); err != nil {
		return ID{}, err
	}
	td, path, ok := strings.Cut(rest, "/")
	if err := CheckTrustDomain(td); err != nil {
		return ID{}, err
	}
	if !ok {
		return ID{}, badID("no path")
	}
	for segment := range strings.SplitSeq(path, "/") {
		switch segment {
		case "":
			return ID{}, badID("empty path segment")
		case ".", "..":
			return ID{}, badID("dot path segment")
		}
		if i := strings.IndexFunc(segment, func(r rune) bool { return !isPathRune(r) }); i >= 0 {
			return ID{}, badID("character %q in path", segment[i])
		}
	}
	return ID{text: s, path: len(scheme) + len(td)}, nil
}

// charactersFault names the URI features that SPIFFE excludes, so that a
// refusal says more than "character".
func charactersFault(rest string) error {
	authority, _, _ := strings.Cut(rest, "/")
	switch {
	case strings.ContainsRune(rest, '%'):
		return badID("percent-encoding")
	case strings.ContainsRune(rest, '?'):
		return badID("query")
	case strings.ContainsRune(rest, '#'):
		return badID("fragment")
	case strings.ContainsRune(authority, '@'):
		return badID("userinfo")
	case strings.ContainsRune(authority, ':'):
		return badID("port")
	}
	return nil
}

// CheckTrustDomain says why s is not the name of a trust domain: 1 to 255
// bytes of a-z, 0-9, ".", "-" and "_".
func CheckTrustDomain(s string) error {
	switch {
	case s == "":
		return badID("no trust domain")
	case len(s) > maxTrustDomain:
		return badID("trust domain longer than %d bytes", maxTrustDomain)
	}
	for i := range len(s) {
		if c := s[i]; !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_') {
			return badID("character %q in trust domain", c)
		}
	}
	return nil
}

func isPathRune(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '-' || r == '_'
}

func badID(format string, args ...any) error {
	return refuse(flow.ReasonCertID, "SPIFFE ID: "+format, args...)
}

// String returns the whole ID.
func (id ID) String() string { return id.text }

// TrustDomain returns the name of the trust domain.
func (id ID) TrustDomain() string {
	if id.text == "" {
		return ""
	}
	return id.text[len(scheme):id.path]
}

// Path returns the path with its leading slash.
func (id ID) Path() string { return id.text[id.path:] }

// CheckNodeName says why s cannot name a node: 1 to 63 bytes of a-z, 0-9,
// "." and "-", beginning and ending with a letter or digit, so that it is
// one path segment of an ID and one file name.
func CheckNodeName(s string) error {
	if s == "" || len(s) > 63 {
		return fmt.Errorf("node name %.70q: must have 1 to 63 characters", s)
	}
	for i := range len(s) {
		c := s[i]
		inner := i > 0 && i < len(s)-1
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || inner && (c == '-' || c == '.' && s[i-1] != '.')) {
			return fmt.Errorf("node name %q: only a-z, 0-9, and inside it - and single dots", s)
		}
	}
	return nil
}

// Refusal is why a certificate, a request for one or a handshake was
// refused.
type Refusal struct {
	Reason flow.Reason
	Detail string // for operators; names no secret
}

func (r *Refusal) Error() string { return r.Detail + " (" + string(r.Reason) + ")" }

func refuse(reason flow.Reason, format string, args ...any) *Refusal {
	return &Refusal{Reason: reason, Detail: fmt.Sprintf(format, args...)}
}
