// SPDX-License-Identifier: Apache-2.0

// Package ungated lets tests under policies see what the loader makes of
// parts of the language that it refuses because nothing acts on them yet.
// Nothing but a test may lift a refusal.
package ungated

import "sync"

var (
	mu     sync.RWMutex
	lifted map[string]bool
)

// Test is the part of testing.TB that is needed here.
type Test interface{ Cleanup(func()) }

// Lift has the loader accept entries of its list until the test ends.
func Lift(t Test, entries ...string) {
	mu.Lock()
	defer mu.Unlock()
	before := lifted
	lifted = make(map[string]bool, len(before)+len(entries))
	for e := range before {
		lifted[e] = true
	}
	for _, e := range entries {
		lifted[e] = true
	}
	t.Cleanup(func() {
		mu.Lock()
		defer mu.Unlock()
		lifted = before
	})
}

// Lifted says whether a test has the entry accepted.
func Lifted(entry string) bool {
	mu.RLock()
	defer mu.RUnlock()
	return lifted[entry]
}
