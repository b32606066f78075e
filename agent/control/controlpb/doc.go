// SPDX-License-Identifier: Apache-2.0

// Package controlpb is control.proto as Go: the messages and the service of
// the control API.
package controlpb
