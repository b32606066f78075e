// SPDX-License-Identifier: Apache-2.0

// Package v1alpha1 is the policy API of group sallyport.dev: the documents
// that an operator writes, as Go types. A field's json tag is its name in
// YAML, its oneof tag lists the words it may hold, its required tag says
// that a document without it is refused.
//
// The types say what was written; defaults are filled in and references are
// resolved by policies/compile.
package v1alpha1

// APIVersion is what every document's apiVersion must be.
const APIVersion = "sallyport.dev/v1alpha1"

// DefaultNamespace is the namespace of a document that names none.
const DefaultNamespace = "default"

// The kinds of documents.
const (
	KindMachineIdentity = "MachineIdentity"
	KindTokenIssuer     = "TokenIssuer"
	KindRelationModel   = "RelationModel"
	KindPostureProfile  = "PostureProfile"
	KindAPIPolicy       = "APIPolicy"
)

// Metadata names a document. Labels and annotations are the operator's own;
// nothing here reads them.
type Metadata struct {
	// Name is unique in the namespace among the documents of its kind: at most
	// 63 lower-case letters, digits, - and . with a letter or digit at both
	// ends.
	Name string `json:"name" required:"true"`
	// Namespace is default if absent. A reference by name is to the same
	// namespace.
	Namespace string `json:"namespace"`
	// Labels are the operator's own.
	Labels map[string]string `json:"labels"`
	// Annotations are the operator's own.
	Annotations map[string]string `json:"annotations"`
}

// MachineIdentity is a workload: how the kernel recognises it, who owns it,
// and what it may call at most.
type MachineIdentity struct {
	Metadata Metadata            `json:"metadata" required:"true"`
	Spec     MachineIdentitySpec `json:"spec" required:"true"`
}

// TokenIssuer is an issuer of access tokens.
type TokenIssuer struct {
	Metadata Metadata        `json:"metadata" required:"true"`
	Spec     TokenIssuerSpec `json:"spec" required:"true"`
}

// RelationModel is an OpenFGA model and where its engine is.
type RelationModel struct {
	Metadata Metadata          `json:"metadata" required:"true"`
	Spec     RelationModelSpec `json:"spec"`
}

// PostureProfile is what a node and a program must prove.
type PostureProfile struct {
	Metadata Metadata           `json:"metadata" required:"true"`
	Spec     PostureProfileSpec `json:"spec" required:"true"`
}

// APIPolicy is an API: which identity it protects, the rules, and what
// happens otherwise.
type APIPolicy struct {
	Metadata Metadata      `json:"metadata" required:"true"`
	Spec     APIPolicySpec `json:"spec" required:"true"`
}
