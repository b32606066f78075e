// SPDX-License-Identifier: Apache-2.0

package v1alpha1

// TokenIssuerSpec is what a TokenIssuer says.
type TokenIssuerSpec struct {
	// Issuer is the exact value of a token's iss.
	Issuer string `json:"issuer" required:"true"`
	// JWKS says where its keys are. It may be absent where there is
	// introspection: then the issuer is asked about every token.
	JWKS JWKS `json:"jwks"`
	// Algorithms are the signature algorithms (RFC 7518, RFC 8037) that are
	// accepted; never none, never a MAC. Required with jwks.
	Algorithms []string `json:"algorithms" oneof:"ES256|ES384|ES512|RS256|RS384|RS512|PS256|PS384|PS512|EdDSA"`
	// Audiences, where given, are the only ones that a rule may ask for.
	Audiences []string `json:"audiences"`
	// MaxLifetime is the longest that a token may live; 15 minutes if absent,
	// at most 24 hours.
	MaxLifetime *Duration `json:"maxLifetime"`
	// Typ lists the token types that are accepted in the JOSE header; at+jwt
	// (RFC 9068) if absent.
	Typ []string `json:"typ" oneof:"at+jwt|JWT"`
	// Claims are claims that each of its tokens must have, with one of the
	// values that are listed; a text stands for a list of one.
	Claims map[string]Words `json:"claims"`
	// Binding says whether each of its tokens must be bound to who presents it
	// (cnf, RFC 7800), whatever a rule says; optional if absent.
	Binding string `json:"binding" oneof:"required|optional"`
	// Introspection says where tokens that are no JWTs are asked about (RFC
	// 7662).
	Introspection *Introspection `json:"introspection"`
	// TokenURL is its token endpoint (RFC 6749 section 3.2), for the tokens
	// that MachineIdentities obtain; https only.
	TokenURL string `json:"tokenURL"`
}

// Introspection is an issuer's introspection endpoint (RFC 7662).
type Introspection struct {
	// URL is https only.
	URL string `json:"url" required:"true"`
	// Credentials is the absolute path of a file that the agent reads, with one
	// line: CLIENT_ID:CLIENT_SECRET (RFC 6749 section 2.3.1), or Bearer and a
	// token (RFC 6750). Others must not be able to read it.
	Credentials string `json:"credentials" required:"true"`
}

// JWKS says where a key set is: exactly one of the fields.
type JWKS struct {
	// URL is fetched by the agent; https only.
	URL string `json:"url"`
	// File is an absolute path that the agent reads and watches.
	File string `json:"file"`
	// Keys are public JWKs (RFC 7517), written in place.
	Keys []map[string]any `json:"keys"`
}

// RelationModelSpec is what a RelationModel says. Without model and file it
// is the model that is built in.
type RelationModelSpec struct {
	// Model is the model's text, in OpenFGA's language or as JSON.
	Model string `json:"model"`
	// File names a file beside the policies (*.fga or *.fga.json) with it.
	File string `json:"file"`
	// Engine is where the relations are; embedded if absent.
	Engine string `json:"engine" oneof:"embedded|openfga|spicedb"`
	// Address is that of an engine elsewhere, HOST:PORT; it is spoken to in
	// TLS, and its certificate must name the host.
	Address string `json:"address"`
	// Store is the name of the engine's store, which must be there.
	Store string `json:"store"`
	// Credentials is the absolute path of a file that the agent reads, with the
	// pre-shared key of the engine in one line; absent: it asks for none. Others
	// must not be able to read it.
	Credentials string `json:"credentials"`
}

// Tuple is one relation of a *.tuples.yaml file.
type Tuple struct {
	User     string `json:"user" required:"true"`
	Relation string `json:"relation" required:"true"`
	Object   string `json:"object" required:"true"`
}

// TupleFile is a *.tuples.yaml file; where only one model exists, the bare
// list of tuples suffices.
type TupleFile struct {
	// Model is the RelationModel, NAMESPACE/NAME.
	Model  string  `json:"model"`
	Tuples []Tuple `json:"tuples" required:"true"`
}
