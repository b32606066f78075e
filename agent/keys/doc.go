// SPDX-License-Identifier: Apache-2.0

// Package keys gets the key sets (JWKS, RFC 7517) of token issuers for the
// process that verifies tokens and may open neither files nor connections:
// from a file, over HTTPS, or from the policy itself. It does not read what
// it gets, it bounds it: in size, in time, in where it may come from and in
// how often it is asked for.
package keys
