// SPDX-License-Identifier: Apache-2.0

// Package testenv says what becomes of a test whose surroundings lack
// something. It is imported by tests only.
package testenv

import (
	"os"
	"os/exec"
	"testing"
)

// Strict is the variable that CI sets: what `make deps` installs is there then,
// and a test that lacks it fails.
const Strict = "SALLYPORT_TEST_STRICT"

// Missing skips the test for what is not there, or fails it under Strict.
func Missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv(Strict) == "1" {
		t.Fatalf("%s, and %s is set; `make deps` installs what the tests need", what, Strict)
	}
	t.Skip(what)
}

// Program returns the path of a program that `make deps` installs.
func Program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		Missing(t, name+" is not installed")
	}
	return path
}
