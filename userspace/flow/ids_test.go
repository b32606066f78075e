// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"strings"
	"testing"
	"time"
)

func TestIDs(t *testing.T) {
	a, b := NewIDs(), NewIDs()
	at := time.UnixMilli(1469918176385)
	seen := map[string]bool{}
	for range 5000 {
		for _, s := range []*IDs{&a, &b} {
			id := s.New(at)
			if len(id) != IDLength || !strings.HasPrefix(id, "01ARYZ6S41") || strings.Trim(id, idAlphabet) != "" || seen[id] {
				t.Fatalf("id %q", id)
			}
			seen[id] = true
		}
	}
	if first, second := a.New(at), a.New(at.Add(time.Millisecond)); first >= second {
		t.Errorf("%s does not sort before %s", first, second)
	}
}
