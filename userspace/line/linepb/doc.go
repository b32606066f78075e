// SPDX-License-Identifier: Apache-2.0

// Package linepb is line.proto as Go: what the agent and the userspace process
// say to each other.
package linepb
