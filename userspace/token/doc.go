// SPDX-License-Identifier: Apache-2.0

// Package token verifies JWT access tokens (RFC 7519, RFC 9068) and their
// binding to a client certificate (RFC 8705), without I/O: key sets are
// handed to it.
//
// The order of a verification is fixed: size, strict reading, the pinned
// issuer, the cache, the signature, typ and claims, the audience, the
// lifetime, the binding, revocation, scopes. What the cache remembers is that
// the bytes were read and their signature held under a key set; everything
// that depends on the time, the connection, the rule or a revocation is
// judged again on every request, by the same function.
package token
