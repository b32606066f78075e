// SPDX-License-Identifier: Apache-2.0

package v1alpha1

// MachineIdentitySpec is what a MachineIdentity says.
type MachineIdentitySpec struct {
	// SpiffeID is the workload's name. Absent, it is derived: for a systemd
	// unit spiffe://TRUSTDOMAIN/node/NODE/unit/UNIT, for the rest
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
	// Egress says where it may connect outside the mesh; absent: anywhere in
	// observe and audit, nowhere in enforce.
	Egress []Egress `json:"egress"`
}

// Selector says how the kernel recognises a workload.
type Selector struct {
	Systemd *SystemdSelector `json:"systemd"`
	Cgroup  *CgroupSelector  `json:"cgroup"`
	// UID is the numeric user that its processes run as; never alone.
	UID *uint32 `json:"uid"`
	// Process narrows by what runs; never alone.
	Process *ProcessSelector `json:"process"`
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
}

// Egress is a range of addresses outside the mesh.
type Egress struct {
	CIDR  string   `json:"cidr" required:"true"`
	Ports []uint16 `json:"ports" required:"true"`
}
