// SPDX-License-Identifier: Apache-2.0

// Package lab makes nodes on one machine: network namespaces joined by veth
// pairs, each with its own agent, cgroup subtree, policies and state, under a
// shared authority. The demo judges what happens there, the benchmark how fast.
package lab
