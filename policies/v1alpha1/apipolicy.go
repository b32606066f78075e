// SPDX-License-Identifier: Apache-2.0

package v1alpha1

// APIPolicySpec is what an APIPolicy says.
type APIPolicySpec struct {
	// Mode is audit if absent.
	Mode    string  `json:"mode" oneof:"observe|audit|enforce"`
	Protect Protect `json:"protect" required:"true"`
	// MTLS is required if absent.
	MTLS  string `json:"mtls" oneof:"required|permissive|off"`
	Rules []Rule `json:"rules" required:"true"`
	// Anomaly turns scoring on; absent: off.
	Anomaly *Anomaly `json:"anomaly"`
	// Body turns the reading of bodies before the decision on; absent: off.
	Body *Body `json:"body"`
	// Otherwise is what happens where no rule says anything; deny if absent.
	Otherwise string `json:"otherwise" oneof:"deny|allow"`
	// OnError is what happens where a stage cannot answer; deny if absent.
	OnError string `json:"onError" oneof:"deny"`
}

// Protect says what a policy protects.
type Protect struct {
	// Identity is the MachineIdentity that serves.
	Identity string   `json:"identity" required:"true"`
	Ports    []uint16 `json:"ports" required:"true"`
	// Protocol is auto if absent.
	Protocol string `json:"protocol" oneof:"auto|http|tcp|tls"`
	App      *App   `json:"app"`
}

// App says what the application itself does.
type App struct {
	// TLS is none if absent, except for protocol tls.
	TLS string `json:"tls" oneof:"none|passthrough"`
}

// Rule allows or denies. Every line of a rule must be satisfied; any allow
// rule that is suffices, any deny rule that is denies.
type Rule struct {
	// Name is unique in its policy.
	Name string `json:"name" required:"true"`
	// Effect is allow if absent.
	Effect string `json:"effect" oneof:"allow|deny"`
	// From names the callers' MachineIdentities, NAME or NAMESPACE/NAME. An
	// allow rule has it or All; a deny rule without it denies anybody.
	From []string `json:"from"`
	// All says that any caller is meant, also one without an identity.
	All bool `json:"all"`
	// Hosts are the hosts asked for (SNI where TLS is passed through);
	// absent: any.
	Hosts []string `json:"hosts"`
	// HTTP are methods and path templates, "METHOD /path/{name}" or
	// "* /path/**"; absent: any.
	HTTP     []string  `json:"http"`
	Token    *Token    `json:"token"`
	Relation *Relation `json:"relation"`
	// When is a CEL expression of type bool.
	When string `json:"when"`
}

// Token says which access token a caller must show.
type Token struct {
	// Issuer is the TokenIssuer's name.
	Issuer   string   `json:"issuer" required:"true"`
	Audience string   `json:"audience" required:"true"`
	Scopes   []string `json:"scopes"`
	// BoundTo asks for a sender-constrained token (RFC 8705).
	BoundTo string `json:"boundTo" oneof:"mtls"`
}

// Relation is a relation that must hold; the bare string is Check.
type Relation struct {
	// Model is the RelationModel's name; absent where its namespace has one.
	Model string `json:"model"`
	// Check is "USER RELATION OBJECT" with placeholders in braces.
	Check string `json:"check" required:"true"`
}

// UnmarshalText takes the bare string.
func (r *Relation) UnmarshalText(b []byte) error {
	r.Check = string(b)
	return nil
}

// Anomaly says what is done at which p-value.
type Anomaly struct {
	Warn      *Probability `json:"warn"`
	Throttle  *Probability `json:"throttle"`
	Revoke    *Probability `json:"revoke"`
	Terminate *Probability `json:"terminate"`
	// Warmup is how long nothing is done; 1000 requests of 3 identities if
	// absent.
	Warmup *Warmup `json:"warmup"`
	// OnError is for this stage alone; deny if absent.
	OnError string `json:"onError" oneof:"ignore|deny"`
}

// Warmup is counted per endpoint.
type Warmup struct {
	Requests   *uint32 `json:"requests"`
	Identities *uint32 `json:"identities"`
}

// Body says how much of a body is read before the decision.
type Body struct {
	// Inspect is in bytes, at most 1 MiB.
	Inspect Size `json:"inspect" required:"true"`
	// Over is what happens to a longer one; deny if absent.
	Over string `json:"over" oneof:"deny|skip"`
}
