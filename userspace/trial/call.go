// SPDX-License-Identifier: Apache-2.0

package trial

import (
	"fmt"
	"time"

	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Call describes one call. The tags are those of policy documents: it is what
// a test file writes.
type Call struct {
	// From is who calls: a MachineIdentity, NAME or NAMESPACE/NAME, a SPIFFE
	// ID, or none for a caller that proves no identity.
	From string `json:"from"`
	// To is the MachineIdentity that is called, NAME or NAMESPACE/NAME.
	To string `json:"to"`
	// Port is the one that is called; absent: the only one that is protected.
	Port uint16 `json:"port"`
	// Channel is how the caller comes; absent: tunnel, and plaintext from none.
	Channel string `json:"channel" oneof:"kernel|tunnel|tls|plaintext"`
	// HTTP is METHOD and target, "GET /v1/payments?page=2"; absent: the call
	// is an opaque connection.
	HTTP string `json:"http"`
	// GRPC is a call of gRPC, "package.Service/Method"; absent: see http.
	GRPC string `json:"grpc"`
	// Upgrade is what the request asks to switch to; absent: nothing. The
	// fields of the handshake come with it.
	Upgrade string `json:"upgrade" oneof:"websocket"`
	// Host is the host asked for, or the SNI of a connection; absent: the only
	// one that the policy's rules name, else the called identity's name.
	Host string `json:"host"`
	// Headers are field lines, "Name: value".
	Headers []string `json:"headers"`
	// Body is the content.
	Body string `json:"body"`
	// Token is the access token that the call brings; absent: none.
	Token *Bearer `json:"token"`
	// Posture is what is known of the caller's node and program; absent:
	// nothing.
	Posture *Posture `json:"posture"`
	// Tuples are relations that hold beside those of the policies' files.
	Tuples []Tuple `json:"tuples"`
	// Now is when the call is made; absent: when the trial was begun.
	Now *Instant `json:"now"`
}

// Bearer describes an access token. It is signed by a key that the trial made
// for the issuer, and that nothing but the trial accepts.
type Bearer struct {
	// Issuer is the TokenIssuer, NAME or NAMESPACE/NAME; absent: the only one
	// that the policy's rules ask for.
	Issuer string `json:"issuer"`
	// Audience is aud; absent: the only one that the policy's rules ask for.
	Audience v1alpha1.Words `json:"audience"`
	// Scopes make scope.
	Scopes []string `json:"scopes"`
	// Bound is what the token is bound to: the caller's certificate (RFC 8705)
	// or a key of which the call brings a proof (RFC 9449, RFC 9421), another of the
	// kind that the policy's rules ask for, or nothing; absent: what a rule of
	// the policy asks for by boundTo, else none.
	Bound string `json:"bound" oneof:"caller|key|other|none"`
	// Age is how long ago it was issued; absent: just now.
	Age *v1alpha1.Duration `json:"age"`
	// Lifetime is from its issue to its end; absent: 5 minutes, or the
	// issuer's maxLifetime where that is less.
	Lifetime *v1alpha1.Duration `json:"lifetime"`
	// Claims are put over the others; null leaves one out. sub and client_id
	// are the caller's name where they are not written.
	Claims map[string]any `json:"claims"`
}

// Tuple is a relation, in the words of a *.tuples.yaml file.
type Tuple struct {
	User     string `json:"user" required:"true"`
	Relation string `json:"relation" required:"true"`
	Object   string `json:"object" required:"true"`
	// Model is the RelationModel; absent where the policies have only one.
	Model string `json:"model"`
}

// Instant is a time, written as RFC 3339 has it, or a day, which begins at
// midnight UTC.
type Instant time.Time

// UnmarshalText parses an instant.
func (i *Instant) UnmarshalText(b []byte) error {
	for _, layout := range [...]string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(layout, string(b)); err == nil {
			*i = Instant(t.UTC())
			return nil
		}
	}
	return fmt.Errorf("%q is neither a time such as 2026-06-30T12:00:00Z nor a day such as 2026-06-30", b)
}

// over fills what a call leaves open from another.
func (c Call) over(d *Call) Call {
	if d == nil {
		return c
	}
	out := *d
	set(&out.From, c.From)
	set(&out.To, c.To)
	set(&out.Port, c.Port)
	set(&out.Channel, c.Channel)
	if c.HTTP != "" || c.GRPC != "" { // one takes the place of the other
		out.HTTP, out.GRPC = c.HTTP, c.GRPC
	}
	set(&out.Upgrade, c.Upgrade)
	set(&out.Host, c.Host)
	set(&out.Body, c.Body)
	set(&out.Token, c.Token)
	set(&out.Posture, c.Posture)
	set(&out.Now, c.Now)
	if c.Headers != nil {
		out.Headers = c.Headers
	}
	if c.Tuples != nil {
		out.Tuples = c.Tuples
	}
	return out
}

func set[T comparable](to *T, v T) {
	var zero T
	if v != zero {
		*to = v
	}
}

var channels = map[string]flow.Channel{
	"kernel": flow.ChannelKernel, "tunnel": flow.ChannelTunnel, "tls": flow.ChannelTLS, "plaintext": flow.ChannelPlaintext,
}
