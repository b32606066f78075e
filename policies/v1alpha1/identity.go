// SPDX-License-Identifier: Apache-2.0

package v1alpha1

// MachineIdentitySpec is what a MachineIdentity says.
type MachineIdentitySpec struct {
	// SpiffeID is the workload's name. Absent, it is derived: for a systemd
	// unit spiffe://TRUSTDOMAIN/node/NODE/unit/UNIT, for a service account
	// spiffe://TRUSTDOMAIN/ns/NAMESPACE/sa/ACCOUNT, for the rest
	// spiffe://TRUSTDOMAIN/node/NODE/ns/NAMESPACE/NAME.
	SpiffeID string `json:"spiffeID"`
	// Owner is whom to ask: a team's address. Required.
	Owner string `json:"owner" required:"true"`
	// Expires is the last day (UTC, inclusive) or the instant (RFC 3339) of
	// its validity; after it the identity is denied.
	Expires *Date `json:"expires"`
	// Select says how it is recognised; every line must match. Absent, no
	// workload of this node is it: it runs elsewhere.
	Select *Selector `json:"select"`
	// Endpoints are the addresses it serves at, IP:PORT.
	Endpoints []string `json:"endpoints"`
	// Mode is that of its outbound side; audit if absent.
	Mode string `json:"mode" oneof:"observe|audit|enforce"`
	// MayCall names the MachineIdentities that it may call at most; absent:
	// none.
	MayCall []string `json:"mayCall"`
	// Tokens are the access tokens that the agent obtains for it and puts on
	// its calls.
	Tokens []Obtain `json:"tokens"`
	// Egress says where it may connect outside the mesh; absent: anywhere in
	// observe and audit, nowhere in enforce.
	Egress []Egress `json:"egress"`
}

// Obtain is an access token that the agent obtains for a workload by the
// workload's certificate (RFC 6749 section 4.4, RFC 8705) and puts on its calls
// that bring none.
type Obtain struct {
	// To is the MachineIdentity that is called.
	To string `json:"to" required:"true"`
	// Issuer is the TokenIssuer's name; it needs a tokenURL.
	Issuer string `json:"issuer" required:"true"`
	// Audience is asked for as audience, and where it is a URI as resource
	// (RFC 8707).
	Audience string `json:"audience" required:"true"`
	// Scopes are asked for; absent: what the issuer gives by itself.
	Scopes []string `json:"scopes"`
	// ClientID is what the issuer knows the workload by; its SPIFFE ID if
	// absent.
	ClientID string `json:"clientID"`
}

// Selector says how the kernel recognises a workload.
type Selector struct {
	// All says that every workload of the node is meant that no other
	// MachineIdentity selects. It stands alone, and only calls: it has no
	// endpoints, and no APIPolicy protects it.
	All        bool                `json:"all"`
	Kubernetes *KubernetesSelector `json:"kubernetes"`
	Systemd    *SystemdSelector    `json:"systemd"`
	Cgroup     *CgroupSelector     `json:"cgroup"`
	// UID is the numeric user that its processes run as; never alone.
	UID *uint32 `json:"uid"`
	// Process narrows by what runs; never alone.
	Process *ProcessSelector `json:"process"`
}

// KubernetesSelector selects pods of the document's namespace.
type KubernetesSelector struct {
	// ServiceAccount is the name of the one that the pod runs as.
	ServiceAccount string `json:"serviceAccount" required:"true"`
	// Labels must all be on the pod.
	Labels map[string]string `json:"labels"`
}

// SystemdSelector selects a unit of the system manager.
type SystemdSelector struct {
	// Unit is the unit's full name, with its suffix.
	Unit string `json:"unit" required:"true"`
}

// CgroupSelector selects a cgroup and what is beneath it.
type CgroupSelector struct {
	// Path is absolute beneath the agent's cgroup root.
	Path string `json:"path" required:"true"`
}

// ProcessSelector selects by the program that runs.
type ProcessSelector struct {
	// Binary is the absolute path of the executable.
	Binary string `json:"binary" required:"true"`
	// Digest is that of the executable's content, sha256: and the 64
	// hexadecimal digits that sha256sum prints. A script's is its
	// interpreter's.
	Digest string `json:"digest"`
}

// Egress is a host or a range of addresses outside the mesh: host or cidr.
type Egress struct {
	// Host is a name, without port.
	Host string `json:"host"`
	// CIDR is a range of addresses, 10.9.0.0/16 or 2001:db8::/32.
	CIDR string `json:"cidr"`
	// Ports are those that may be connected to there.
	Ports []uint16 `json:"ports" required:"true"`
	// TLS, with a host, is how it is spoken to: verify asks for TLS to that
	// name (SNI) at an address that proves the name by a certificate, over TCP;
	// any, the default, takes what is spoken to the addresses that the name
	// resolves to.
	TLS string `json:"tls" oneof:"verify|any"`
}
