// SPDX-License-Identifier: Apache-2.0

package flow

// Reason is the code of why a request or a connection was refused. It is
// what a denial, the decision log, a metric's label and docs/reasons share.
type Reason string

// ReasonsURL, a code and ReasonsSuffix lead to the code's page: the type of
// a problem document (RFC 9457, section 3.1.1).
const (
	ReasonsURL    = "https://github.com/sallyport-dev/sallyport/blob/main/docs/reasons/"
	ReasonsSuffix = ".md"
)

// ReasonOK is the reason of what was not refused.
const ReasonOK Reason = ""

// Channel and identity.
const (
	ReasonMTLSRequired       Reason = "mtls_required"       // plaintext where the policy asks for mTLS
	ReasonTLSInApp           Reason = "tls_in_app"          // a ClientHello on an app.tls: none port
	ReasonTLSHandshake       Reason = "tls_handshake"       // the handshake was refused; Detail says why
	ReasonNoIdentity         Reason = "no_identity"         // nothing proves who calls
	ReasonUnknownIdentity    Reason = "unknown_identity"    // proven, but no MachineIdentity has that ID
	ReasonAmbiguousIdentity  Reason = "ambiguous_identity"  // two MachineIdentities match one workload
	ReasonIdentityExpired    Reason = "identity_expired"    // past MachineIdentity.expires
	ReasonPeerMismatch       Reason = "peer_mismatch"       // the other end is not the identity that the address belongs to
	ReasonScope              Reason = "certificate_scope"   // an ID that the issuing node may not issue
	ReasonCertificateRevoked Reason = "certificate_revoked" // serial, ID or node revoked
	ReasonIdentityRevoked    Reason = "identity_revoked"    // the caller's identity is revoked
	ReasonNotThisNode        Reason = "not_this_node"       // a CONNECT authority that is not protected here
	ReasonForwardedAddress   Reason = "forwarded_address"   // a client address that is neither the peer's nor one of its identity's
	ReasonNoFlow             Reason = "no_flow"             // a connection to our listener that the kernel did not send
	ReasonAppCertificate     Reason = "app_certificate"     // there is no certificate to end the caller's TLS with
)

// Certificates: what userspace/identity refuses in a peer's chain.
const (
	ReasonCertMissing      Reason = "cert_missing"       // no certificate was presented
	ReasonCertChainSize    Reason = "cert_chain_size"    // more than 8 certificates or 64 KiB
	ReasonCertMalformed    Reason = "cert_malformed"     // not DER, or an extension that is not understood
	ReasonCertKey          Reason = "cert_key"           // not P-256, P-384, Ed25519 or RSA of 2048 to 8192 bits
	ReasonCertSignature    Reason = "cert_signature"     // signed with SHA-1 or another algorithm that is not accepted
	ReasonCertSelfSigned   Reason = "cert_self_signed"   // the leaf signed itself
	ReasonCertUntrusted    Reason = "cert_untrusted"     // no chain to a root of its trust domain
	ReasonCertExpired      Reason = "cert_expired"       // a certificate of the chain is past its NotAfter
	ReasonCertNotYet       Reason = "cert_not_yet"       // a certificate of the chain is before its NotBefore
	ReasonCertIsCA         Reason = "cert_is_ca"         // a CA certificate, or keyCertSign, on a leaf
	ReasonCertKeyUsage     Reason = "cert_key_usage"     // keyUsage without digitalSignature
	ReasonCertExtKeyUsage  Reason = "cert_ext_key_usage" // extKeyUsage without the role
	ReasonCertNoID         Reason = "cert_no_id"         // no URI SAN
	ReasonCertManyIDs      Reason = "cert_many_ids"      // two URI SANs
	ReasonCertID           Reason = "cert_id"            // not a SPIFFE ID by the specification
	ReasonCertTrustDomain  Reason = "cert_trust_domain"  // a trust domain without a bundle here
	ReasonCertKeyUnproven  Reason = "cert_key_unproven"  // a certificate request that its key did not sign
	ReasonTLSVersion       Reason = "tls_version"        // below TLS 1.3
	ReasonEnrolmentToken   Reason = "enrolment_token"    // a join token that is unknown, used, expired or revoked
	ReasonEnrolmentNode    Reason = "enrolment_node"     // a node that the authority does not know, or with another key
	ReasonEnrolmentMissing Reason = "enrolment_missing"  // no valid node certificate at the moment
)

// Policy.
const (
	ReasonNoPolicy     Reason = "no_policy"     // nothing protects that address
	ReasonNoRule       Reason = "no_rule"       // no rule allows it: otherwise deny
	ReasonDenyRule     Reason = "deny_rule"     // a rule with effect deny
	ReasonMayCall      Reason = "may_call"      // not in the source's mayCall
	ReasonEgress       Reason = "egress"        // outside the mesh and not in the source's egress
	ReasonEgressTLS    Reason = "egress_tls"    // egress asks for TLS to a host by its name
	ReasonCondition    Reason = "condition"     // `when` is false
	ReasonConditionErr Reason = "condition_err" // `when` cannot be evaluated
	ReasonNotReady     Reason = "not_ready"     // no policy set has been loaded yet
	ReasonPosture      Reason = "posture"       // a fact about the caller's node or program does not suffice

	// The address proves no certificate of the host that egress lists.
	ReasonEgressCertificate Reason = "egress_certificate"
	// A fact that the posture asks for is not known, or is stale.
	ReasonPostureUnknown Reason = "posture_unknown"
)

// Token.
const (
	ReasonTokenMissing       Reason = "token_missing"
	ReasonTokenMalformed     Reason = "token_malformed"
	ReasonTokenTooLarge      Reason = "token_too_large"
	ReasonTokenAmbiguous     Reason = "token_ambiguous"     // duplicate or case-folded member names
	ReasonTokenPlace         Reason = "token_place"         // two Authorization headers, or in the query
	ReasonTokenAlgorithm     Reason = "token_algorithm"     // none, not the key's own, not allowed
	ReasonTokenHeader        Reason = "token_header"        // crit, b64, jwk, jku, x5u
	ReasonTokenType          Reason = "token_type"          // typ
	ReasonTokenIssuer        Reason = "token_issuer"        // iss
	ReasonTokenAudience      Reason = "token_audience"      // aud
	ReasonTokenKey           Reason = "token_key"           // unknown kid
	ReasonTokenSignature     Reason = "token_signature"     // does not verify
	ReasonTokenExpired       Reason = "token_expired"       // exp
	ReasonTokenNotYet        Reason = "token_not_yet"       // nbf or iat in the future
	ReasonTokenLifetime      Reason = "token_lifetime"      // no exp, or longer than the issuer may give
	ReasonTokenClaims        Reason = "token_claims"        // a claim's type or required value
	ReasonTokenScope         Reason = "token_scope"         // scopes
	ReasonTokenBinding       Reason = "token_binding"       // bound to another certificate or key
	ReasonTokenProof         Reason = "token_proof"         // bound, and no proof came with it
	ReasonProofMissing       Reason = "dpop_missing"        // bound to a key, and no DPoP proof came
	ReasonProofMalformed     Reason = "dpop_malformed"      // a DPoP proof that cannot be read or verified
	ReasonProofMismatch      Reason = "dpop_mismatch"       // htm, htu or ath
	ReasonProofStale         Reason = "dpop_stale"          // iat
	ReasonProofReplayed      Reason = "dpop_replayed"       // jti
	ReasonSignatureMissing   Reason = "signature_missing"   // bound to a key that signs requests, and none came
	ReasonSignatureMalformed Reason = "signature_malformed" // one that cannot be read or verified
	ReasonSignatureCovers    Reason = "signature_covers"    // it does not cover all that it must
	ReasonSignatureDigest    Reason = "signature_digest"    // the content is another
	ReasonSignatureStale     Reason = "signature_stale"     // created, expires
	ReasonSignatureReplayed  Reason = "signature_replayed"  // nonce
	ReasonTokenUnbound       Reason = "token_unbound"       // the rule asks for a bound token
	ReasonTokenInactive      Reason = "token_inactive"      // the issuer says so (RFC 7662)
	ReasonTokenRevoked       Reason = "token_revoked"       // jti, subject or issuer revoked
	ReasonTokenKeysStale     Reason = "token_keys_stale"    // the issuer's keys are older than the hard limit
	ReasonTokenUnavailable   Reason = "token_unavailable"   // the issuer's keys were never had
	ReasonStepUp             Reason = "step_up"             // acr or auth_time not enough (RFC 9470)
)

// Relation and anomaly.
const (
	ReasonRelation            Reason = "relation_missing"
	ReasonRelationTemplate    Reason = "relation_template" // a value that a relation cannot take
	ReasonRelationUnavailable Reason = "relation_unavailable"
	ReasonAnomaly             Reason = "anomaly"
	ReasonAnomalyStepUp       Reason = "anomaly_step_up" // unusual, and no fresh authentication (RFC 9470)
	ReasonThrottled           Reason = "throttled"
	ReasonAnomalyErr          Reason = "anomaly_err"
)

// Protocol and upstream.
const (
	ReasonMalformed       Reason = "http_malformed" // what two parsers could read differently
	ReasonTooLarge        Reason = "http_too_large" // a limit on line, header or body
	ReasonTarget          Reason = "http_target"    // a target that is refused
	ReasonHeaderAmbiguous Reason = "http_header"    // a header that a policy reads came more than once
	ReasonUpgrade         Reason = "http_upgrade"   // CONNECT, an upgrade to something else than WebSocket, or one that no rule lists
	ReasonNotHTTP         Reason = "not_http"       // a protocol: http port that is spoken to otherwise
	ReasonNotGRPC         Reason = "not_grpc"       // a request other than a call of gRPC on a protocol: grpc port
	ReasonTimeout         Reason = "timeout"        // header, body or idle
	ReasonUpstream        Reason = "upstream"       // the application refused or broke off
	ReasonUpstreamGone    Reason = "upstream_gone"  // nothing of the protected identity listens
	ReasonUpstreamTLS     Reason = "upstream_tls"   // the application did not prove itself by app.ca
	ReasonTunnel          Reason = "tunnel"         // the tunnel to the other node could not be had
	ReasonTunnelRefused   Reason = "tunnel_refused" // the other node refused the stream
	ReasonOverload        Reason = "overload"       // a bound of ours was reached
	ReasonRevoked         Reason = "revoked"        // what had allowed a live connection was revoked
	ReasonPolicyChanged   Reason = "policy_changed" // a live connection is no longer allowed
	ReasonExpired         Reason = "expired"        // what had allowed a live connection ended
	ReasonInternal        Reason = "internal"       // a fault of ours
	ReasonLineRefused     Reason = "line_refused"   // the agent refused what userspace asked for
)

// Kernel.
const (
	ReasonVerdictDeny   Reason = "verdict_deny"
	ReasonBindGuard     Reason = "bind_guard"     // a listener's or protected port bound by another
	ReasonListenerGone  Reason = "listener_gone"  // the agent's listener is not there
	ReasonServerGone    Reason = "server_gone"    // the protected identity does not listen
	ReasonUntagged      Reason = "untagged"       // a packet of an enforced workload without flow tag
	ReasonMapFull       Reason = "map_full"       // a kernel map is full: denied and counted
	ReasonForeignSocket Reason = "foreign_socket" // an enforced caller with a socket made elsewhere
	ReasonDevice        Reason = "bound_device"   // bound to a device, cannot reach the loopback listener
	ReasonSocketKind    Reason = "socket_kind"    // a socket type that no hook sees
	ReasonUnguarded     Reason = "own_port"       // a packet from elsewhere to one of our own ports
)

// Status returns the HTTP status of a refusal with this reason.
func (r Reason) Status() int {
	switch r {
	case ReasonTokenPlace, ReasonMalformed, ReasonTarget, ReasonHeaderAmbiguous, ReasonNotHTTP:
		return 400
	case ReasonTokenMissing, ReasonTokenMalformed, ReasonTokenTooLarge, ReasonTokenAmbiguous, ReasonTokenAlgorithm,
		ReasonTokenHeader, ReasonTokenType, ReasonTokenIssuer, ReasonTokenAudience, ReasonTokenKey,
		ReasonTokenSignature, ReasonTokenExpired, ReasonTokenNotYet, ReasonTokenLifetime, ReasonTokenClaims,
		ReasonTokenBinding, ReasonTokenProof, ReasonTokenUnbound, ReasonTokenRevoked, ReasonTokenInactive, ReasonStepUp, ReasonAnomalyStepUp,
		ReasonProofMissing, ReasonProofMalformed, ReasonProofMismatch, ReasonProofStale, ReasonProofReplayed,
		ReasonSignatureMissing, ReasonSignatureMalformed, ReasonSignatureCovers, ReasonSignatureDigest, ReasonSignatureStale, ReasonSignatureReplayed:
		return 401
	case ReasonTimeout:
		return 408
	case ReasonTooLarge:
		return 413
	case ReasonNotGRPC:
		return 415
	case ReasonThrottled:
		return 429
	case ReasonInternal:
		return 500
	case ReasonUpstream, ReasonUpstreamTLS, ReasonEgressCertificate, ReasonTunnel, ReasonTunnelRefused:
		return 502
	case ReasonUpstreamGone, ReasonOverload, ReasonNotReady, ReasonTokenKeysStale, ReasonTokenUnavailable,
		ReasonRelationUnavailable, ReasonLineRefused:
		return 503
	}
	return 403
}

// StepUp says whether a stronger or fresher authentication mends it, so that
// its challenge is that of RFC 9470.
func (r Reason) StepUp() bool { return r == ReasonStepUp || r == ReasonAnomalyStepUp }

// GRPC returns the status code of gRPC that a refused call gets: the code of
// google.rpc.Code that stands for Status.
func (r Reason) GRPC() int {
	const (
		invalidArgument   = 3
		deadlineExceeded  = 4
		permissionDenied  = 7
		resourceExhausted = 8
		internal          = 13
		unavailable       = 14
		unauthenticated   = 16
	)
	switch r.Status() {
	case 400, 415:
		return invalidArgument
	case 401:
		return unauthenticated
	case 408:
		return deadlineExceeded
	case 413, 429:
		return resourceExhausted
	case 500:
		return internal
	case 502, 503:
		return unavailable
	}
	return permissionDenied
}

// Told is the code that a refused caller learns, ReasonOK where it learns
// none. A caller that has proven who it is learns every code; a stranger
// only what is about the request that it sent itself and that it can mend:
// whether a key, a scope or a relation exists is not for it to find out.
func (r Reason) Told(proven bool) Reason {
	if proven {
		return r
	}
	switch r {
	case ReasonNoIdentity, ReasonMTLSRequired,
		ReasonTokenMissing, ReasonTokenMalformed, ReasonTokenTooLarge, ReasonTokenAmbiguous, ReasonTokenPlace,
		ReasonTokenScope, ReasonStepUp,
		ReasonProofMissing, ReasonProofMalformed, ReasonProofMismatch, ReasonProofStale, ReasonProofReplayed,
		ReasonSignatureMissing, ReasonSignatureMalformed, ReasonSignatureCovers, ReasonSignatureDigest, ReasonSignatureStale, ReasonSignatureReplayed,
		ReasonMalformed, ReasonTooLarge, ReasonTarget, ReasonHeaderAmbiguous, ReasonUpgrade, ReasonNotHTTP, ReasonNotGRPC, ReasonTimeout,
		ReasonThrottled, ReasonAnomalyStepUp:
		return r
	}
	return ReasonOK
}

// Public is the text that a refused caller sees: enough to know what to
// mend, nothing about policies, rules or other callers.
func (r Reason) Public() string {
	switch r.Status() {
	case 400:
		return "The request cannot be read unambiguously."
	case 401:
		return "The access token is missing or was not accepted."
	case 408:
		return "The request did not arrive in time."
	case 413:
		return "The request is larger than is accepted here."
	case 415:
		return "The request is not a call of gRPC."
	case 429:
		return "Too many or unusual requests; try again later."
	case 500, 502, 503:
		return "The service cannot be reached at the moment."
	}
	return "The call is not permitted."
}
