// SPDX-License-Identifier: Apache-2.0

package v1alpha1

// PostureProfileSpec is what a node and a program must prove. What is not
// written is not asked for.
type PostureProfileSpec struct {
	// Evidence is how facts must be proven: claimed, signed by the node
	// alone, or attested, signed by the authority. Attested if absent.
	Evidence string           `json:"evidence" oneof:"attested|claimed"`
	Node     *NodePosture     `json:"node"`
	Binary   *BinaryPosture   `json:"binary"`
	Software *SoftwarePosture `json:"software"`
	Risk     *RiskPosture     `json:"risk"`
	// OnUnknown is what happens where a fact is not known or is stale; deny
	// if absent. Warn lets the call pass and records it.
	OnUnknown string `json:"onUnknown" oneof:"deny|warn"`
}

// NodePosture is what a node must prove.
type NodePosture struct {
	// TPMQuoteMaxAge is how old the last good quote may be.
	TPMQuoteMaxAge *Duration `json:"tpmQuoteMaxAge"`
	// SecureBoot says that it must have booted with secure boot on.
	SecureBoot bool `json:"secureBoot"`
	// Lockdown is the least kernel lockdown mode, kernel_lockdown(7).
	Lockdown string `json:"lockdown" oneof:"integrity|confidentiality"`
}

// BinaryPosture is what a workload's program must be.
type BinaryPosture struct {
	// Digest is known, listed in an inventory, or signed.
	Digest string `json:"digest" oneof:"known|signed"`
	// ExecAfterConnect is what happens where a process ran another program
	// after it had opened the connection; deny if absent.
	ExecAfterConnect string `json:"execAfterConnect" oneof:"allow|deny"`
	// Privileged is what happens where it is a privileged container, or one
	// in the host's PID namespace; allow if absent.
	Privileged string `json:"privileged" oneof:"allow|deny"`
}

// SoftwarePosture is what must be known of the software that runs.
type SoftwarePosture struct {
	Provenance *Provenance `json:"provenance"`
	SBOM       *SBOM       `json:"sbom"`
	// Vulnerabilities are what is done about known ones, each severity once.
	Vulnerabilities []Vulnerabilities `json:"vulnerabilities"`
}

// Provenance says who must have built it (SLSA).
type Provenance struct {
	// Builder is the builder's ID; a * at the end stands for any rest.
	Builder string `json:"builder" required:"true"`
	// Issuer is that of the builder's signing certificate, https.
	Issuer string `json:"issuer" required:"true"`
	// OnMissing is what happens without any; deny if absent.
	OnMissing string `json:"onMissing" oneof:"deny|warn"`
}

// SBOM says that the software's bill of materials must be known.
type SBOM struct {
	// Required says that a program without one does not suffice.
	Required bool `json:"required"`
	// MaxAge is how old it may be.
	MaxAge *Duration `json:"maxAge"`
}

// Vulnerabilities say what is done about known ones from a severity on.
type Vulnerabilities struct {
	// Severity is the least that counts.
	Severity string `json:"severity" required:"true" oneof:"low|medium|high|critical"`
	// InLoadedModules counts those alone that are in what is loaded.
	InLoadedModules bool `json:"inLoadedModules"`
	// VEX says whether a statement of not affected is believed; honor if
	// absent.
	VEX string `json:"vex" oneof:"honor|ignore"`
	// GraceAfterPublish is how long nothing is done.
	GraceAfterPublish *Duration `json:"graceAfterPublish"`
	// Action is what happens where one is found; warn lets the call pass and
	// records it.
	Action string `json:"action" required:"true" oneof:"deny|warn"`
}

// RiskPosture bounds the risk level that was received of a workload or node.
type RiskPosture struct {
	// Max is the highest level that suffices.
	Max string `json:"max" required:"true" oneof:"low|medium|high"`
}
