// SPDX-License-Identifier: Apache-2.0

// Package relation answers "may this subject have that relation to this
// object" from stored relation tuples (Zanzibar style), with OpenFGA in the
// process on sqlite, and a decision cache of our own in front of it.
//
// Every write goes through the Engine, so the cache is exact: when Write or
// Delete has returned, no answer from before it is served any more. An engine
// that cannot answer denies; an answer is never guessed.
//
// The build tag norelation leaves OpenFGA out: every Check then denies.
package relation
