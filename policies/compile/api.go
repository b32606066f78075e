// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"time"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Protocol is what a policy says is spoken on a protected port.
type Protocol uint8

// The protocols of a policy.
const (
	ProtocolAuto Protocol = iota // told from the first bytes
	ProtocolHTTP
	ProtocolTCP
	ProtocolTLS
	ProtocolGRPC
)

var protocolNames = [...]string{"auto", "http", "tcp", "tls", "grpc"}

// String returns the protocol as policies write it.
func (p Protocol) String() string { return protocolNames[p] }

// reads says whether whatever comes is read as requests, or refused.
func (p Protocol) reads() bool { return p == ProtocolHTTP || p == ProtocolGRPC }

// AppTLS says what TLS the application speaks itself.
type AppTLS uint8

// What an application does about TLS.
const (
	AppTLSNone        AppTLS = iota // plaintext; a ClientHello is refused
	AppTLSPassthrough               // its own; only identity and SNI can be judged
	AppTLSTerminate                 // the proxy ends the callers' for it, with the application's certificate
	AppTLSReencrypt                 // the same, and the application is spoken to in TLS again
)

// Ends says whether the callers' TLS ends at the proxy.
func (t AppTLS) Ends() bool { return t == AppTLSTerminate || t == AppTLSReencrypt }

// String returns the word that policies write.
func (t AppTLS) String() string {
	return [...]string{"none", "passthrough", "terminate", "reencrypt"}[t]
}

// MTLS says whether a caller must come over a channel that proves it.
type MTLS uint8

// The values of mtls, strictest first.
const (
	MTLSRequired MTLS = iota
	MTLSPermissive
	MTLSOff
)

var mtlsNames = [...]string{"required", "permissive", "off"}

// String returns the word that policies write.
func (m MTLS) String() string { return mtlsNames[m] }

// API is a compiled APIPolicy.
type API struct {
	// Name is NAMESPACE/NAME of the policy.
	Name     string
	Position load.Position
	Identity *Identity // whom it protects
	Ports    []uint16  // ascending
	Protocol Protocol
	AppTLS   AppTLS
	// Certificate and Key are absolute paths, where the callers' TLS ends; CA is
	// one, of AppTLSReencrypt.
	Certificate, Key, CA string
	Mode                 flow.Mode
	MTLS                 MTLS
	// OtherwiseAllow says that what no rule speaks of is allowed, within
	// mayCall and what else refuses.
	OtherwiseAllow bool
	// CacheErrors lets what a stage answered to the same call a while ago stand
	// in where it cannot answer.
	CacheErrors bool
	// Posture is what callers must prove, nil for nothing; a rule with one of
	// its own is judged by that alone.
	Posture     *Posture
	RulePosture bool     // a rule has one of its own
	Anomaly     *Anomaly // nil: no scoring
	Body        Body
	Rules       []*Rule // in document order
	// Headers are the fields that its rules read, in lower case and
	// ascending: each must come once, not as a trailer, and not be named in
	// Connection.
	Headers []string

	fingerprint, rulesFingerprint [32]byte
	deny, allow                   table
	decided                       map[*Identity]decidedBy
	decidedElse                   decidedBy
}

// Rule is one rule of an API.
type Rule struct {
	Name     string
	Position load.Position
	Deny     bool
	// From are its callers, nil for anybody. Hosts, in lower case, and Calls,
	// "METHOD /path/{name}" or package.Service/Method as written, are what
	// may be asked for; nil for anything.
	From     []*Identity
	Hosts    []string
	Calls    []string
	Upgrade  bool       // its requests may switch to WebSocket
	Token    *TokenRule // nil: no token is asked for
	Relation *Relation  // nil: no relation
	When     *Condition // nil: no condition
	Posture  *Posture   // nil: the policy's

	order int // deny rules first, then allow rules, each in document order
}

// Bound says what a token must be bound to.
type Bound uint8

// The bindings of a token.
const (
	BoundNone      Bound = iota // a bearer token will do; one that is bound must still be proven
	BoundMTLS                   // the certificate of the channel, RFC 8705
	BoundDPoP                   // a key, by a proof with each request, RFC 9449
	BoundSignature              // a key, which signs each request, RFC 9421
)

// TokenRule is the access token that a rule asks for.
type TokenRule struct {
	Issuer   *Issuer
	Audience string
	Scopes   []string // all of them
	Bound    Bound
	// ACR are the authentication context classes of which one must be shown,
	// MaxAge is how long ago the subject may have authenticated (RFC 9470);
	// nil and 0: neither is asked for. Challenge says so to a caller.
	ACR       []string
	MaxAge    time.Duration
	Challenge string
	// StepUpChallenge is that of an unusual call (Anomaly.StepUpMaxAge).
	StepUpChallenge string
}

// Anomaly holds p-value thresholds; 0 is one that is not set.
type Anomaly struct {
	Warn, StepUp, Throttle, Revoke, Terminate float64
	// StepUpMaxAge is how long ago the subject of a call under StepUp may have
	// authenticated.
	StepUpMaxAge     time.Duration
	WarmupRequests   uint32
	WarmupIdentities uint32
	// Budget is how many actions a day upon normal calls are borne, warnings
	// aside; 0: as many as the thresholds make.
	Budget float64
	// IgnoreErrors lets a request pass that cannot be scored.
	IgnoreErrors bool
}

// Body says how much of a body is held before the decision.
type Body struct {
	Inspect  int  // bytes, 0: none
	SkipOver bool // a longer one is not inspected; false: it is refused
}

// Claims are what a condition or a relation may read of a verified token.
type Claims struct {
	Subject  string
	Issuer   string
	ID       string // jti
	ClientID string
	Scopes   []string
	Groups   []string
	// Raw are all claims, with the types that encoding/json decodes into any.
	Raw map[string]any
}

// Activation is what a condition and a relation template see of a request,
// and counts what the request's conditions have cost: another request has
// another, in the same memory.
type Activation struct {
	Request *flow.Request
	Source  *Identity // nil: no identity was proven
	Token   *Claims   // nil: the rule asks for none
	Match   *Match
	Time    time.Time

	spent uint64 // by conditions so far
	path  string // the request's, decoded, once asked for
}

type decidedBy uint8

const (
	undecided decidedBy = iota
	decidedAllow
	decidedDeny
)

// AsksUpgrade says whether a caller's connection switches protocols only by
// a rule with upgrade. Where identity alone decides, whatever the caller
// sends is allowed, and connections go direct.
func (a *API) AsksUpgrade(src *Identity) bool {
	anything, _ := a.IdentityOnly(src)
	return !anything
}

// IdentityOnly says whether the decision for callers of that identity
// depends on nothing but the identity, and then whether it is allow. The
// identity's own validity and revocation, and the channel, are not part of
// it.
func (a *API) IdentityOnly(src *Identity) (allow, decided bool) {
	if src == nil {
		return false, false
	}
	if !src.MayCallIdentity(a.Identity) {
		return false, true
	}
	d, ok := a.decided[src]
	if !ok {
		d = a.decidedElse
	}
	return d == decidedAllow, d != undecided
}
