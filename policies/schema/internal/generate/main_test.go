// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"testing"

	"github.com/sallyport-dev/sallyport/policies/schema"
)

// TestGenerated holds what is committed against what would be generated.
func TestGenerated(t *testing.T) {
	for file, generate := range map[string]func() ([]byte, error){
		"comments.go":           func() ([]byte, error) { return comments("../../../v1alpha1") },
		"sallyport.schema.json": func() ([]byte, error) { return schema.JSON("") },
	} {
		want, err := generate()
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile("../../" + file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("policies/schema/%s is not what the types say; run go generate ./policies/...", file)
		}
	}
}
