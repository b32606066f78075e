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
	// Posture is the PostureProfile that callers must satisfy; absent: none.
	Posture string `json:"posture"`
	// Anomaly turns scoring on; absent: off.
	Anomaly *Anomaly `json:"anomaly"`
	// Body turns the reading of bodies before the decision on; absent: off.
	Body *Body `json:"body"`
	// Otherwise is what happens where no rule says anything; deny if absent.
	Otherwise string `json:"otherwise" oneof:"deny|allow"`
	// OnError is what happens where a token's or a relation's stage cannot
	// answer: deny, or for five minutes what it allowed to the same call
	// before. Deny if absent.
	OnError string `json:"onError" oneof:"deny|cached"`
}

// Protect says what a policy protects.
type Protect struct {
	// Identity is the MachineIdentity that serves.
	Identity string `json:"identity" required:"true"`
	// Ports are the TCP ports that it serves at.
	Ports []uint16 `json:"ports" required:"true"`
	// Protocol is auto if absent.
	Protocol string `json:"protocol" oneof:"auto|http|grpc|tcp|tls"`
	App      *App   `json:"app"`
}

// App says what the application itself does.
type App struct {
	// TLS is none if absent, except for protocol tls. With terminate the
	// callers' TLS ends at the proxy, which shows the application's own
	// certificate; with reencrypt the application is spoken to in TLS again.
	TLS string `json:"tls" oneof:"none|passthrough|terminate|reencrypt"`
	// Certificate and Key are absolute paths of PEM files that the agent
	// reads, again every 30 s: what callers are shown.
	Certificate string `json:"certificate"`
	// Key is the certificate's private key; others must not be able to read it.
	Key string `json:"key"`
	// CA is the absolute path of a PEM file with the roots that the
	// application's own certificate must lead to; for reencrypt.
	CA string `json:"ca"`
}

// Rule allows or denies. Every line of a rule must be satisfied; any allow
// rule that is suffices, any deny rule that is denies.
type Rule struct {
	// Name is unique in its policy.
	Name string `json:"name" required:"true"`
	// Effect is allow if absent.
	Effect string `json:"effect" oneof:"allow|deny"`
	// From names the callers' MachineIdentities, NAME or NAMESPACE/NAME. An
	// allow rule has it or all; a deny rule without it denies anybody.
	From []string `json:"from"`
	// All says that any caller is meant, also one without an identity.
	All bool `json:"all"`
	// Hosts are the hosts asked for (SNI where TLS is passed through);
	// absent: any.
	Hosts []string `json:"hosts"`
	// HTTP are methods and path templates, "METHOD /path/{name}" or
	// "* /path/**"; absent: any.
	HTTP []string `json:"http"`
	// GRPC are methods, package.Service/Method or package.Service/*.
	GRPC []string `json:"grpc"`
	// Upgrade lists the protocols that a connection may switch to (RFC 9110
	// section 7.8) after the application's 101, beside the requests that the
	// rule allows anyway; absent: none. WebSocket (RFC 6455) begins with GET,
	// over HTTP/1.1.
	Upgrade  []string  `json:"upgrade" oneof:"websocket"`
	Token    *Token    `json:"token"`
	Relation *Relation `json:"relation"`
	// When is a CEL expression of type bool.
	When string `json:"when"`
	// Posture is a PostureProfile that callers by this rule must satisfy, in
	// place of the policy's.
	Posture string `json:"posture"`
}

// Token says which access token a caller must show.
type Token struct {
	// Issuer is the TokenIssuer's name.
	Issuer string `json:"issuer" required:"true"`
	// Audience must be among the token's aud.
	Audience string `json:"audience" required:"true"`
	// Scopes must all be among those of the token; absent: none is asked for.
	Scopes []string `json:"scopes"`
	// BoundTo asks for a sender-constrained token: by certificate (RFC 8705),
	// by DPoP (RFC 9449) or by HTTP message signature (RFC 9421).
	BoundTo string `json:"boundTo" oneof:"mtls|dpop|signature"`
	// ACR lists the authentication context classes of which the token must
	// show one (RFC 9470).
	ACR []string `json:"acr"`
	// MaxAge is how long ago the authentication may have been (RFC 9470).
	MaxAge *Duration `json:"maxAge"`
}

// Relation is a relation that must hold; the bare string is check.
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
	Warn *Probability `json:"warn"`
	// StepUp asks for a token whose subject has authenticated of late (RFC
	// 9470), and lets the same call pass with one.
	StepUp *Probability `json:"stepUp"`
	// StepUpMaxAge is how long ago that may have been; 5m if absent.
	StepUpMaxAge *Duration `json:"stepUpMaxAge"`

	Throttle  *Probability `json:"throttle"`
	Revoke    *Probability `json:"revoke"`
	Terminate *Probability `json:"terminate"`
	// Warmup is how long nothing is done; 1000 requests of 3 identities if
	// absent.
	Warmup *Warmup `json:"warmup"`
	// FalsePositives is how many actions upon normal calls the policy bears, as
	// NUMBER/UNIT with hour, day or week: thresholds are lowered to keep to it.
	FalsePositives *Rate `json:"falsePositives"`
	// OnError is for this stage alone; deny if absent.
	OnError string `json:"onError" oneof:"ignore|deny"`
}

// Warmup is counted per endpoint.
type Warmup struct {
	// Requests is how many must have been learnt from; 1000 if absent.
	Requests *uint32 `json:"requests"`
	// Identities is of how many callers; 3 if absent.
	Identities *uint32 `json:"identities"`
}

// Body says how much of a body is read before the decision.
type Body struct {
	// Inspect is in bytes, at most 1 MiB.
	Inspect Size `json:"inspect" required:"true"`
	// Over is what happens to a longer one; deny if absent.
	Over string `json:"over" oneof:"deny|skip"`
}
