// SPDX-License-Identifier: Apache-2.0

package flow

import "testing"

// TestReasonGRPC holds the codes of gRPC against those of HTTP.
func TestReasonGRPC(t *testing.T) {
	for reason, want := range map[Reason][2]int{
		ReasonMalformed:    {400, 3},
		ReasonNotGRPC:      {415, 3},
		ReasonTokenMissing: {401, 16},
		ReasonNoRule:       {403, 7},
		ReasonTokenScope:   {403, 7},
		ReasonTimeout:      {408, 4},
		ReasonTooLarge:     {413, 8},
		ReasonThrottled:    {429, 8},
		ReasonInternal:     {500, 13},
		ReasonUpstream:     {502, 14},
		ReasonOverload:     {503, 14},
	} {
		if got := [2]int{reason.Status(), reason.GRPC()}; got != want {
			t.Errorf("%s: HTTP and gRPC %v, want %v", reason, got, want)
		}
	}
}
