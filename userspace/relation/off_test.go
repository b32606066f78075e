// SPDX-License-Identifier: Apache-2.0

//go:build norelation

package relation

import (
	"context"
	"errors"
	"testing"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

func TestLeftOutDenies(t *testing.T) {
	ctx := context.Background()
	_, err := Open(ctx, Options{StateDir: t.TempDir()})
	if !errors.Is(err, errNotBuilt) || Built {
		t.Fatalf("got %v", err)
	}
	e := Unavailable(err)
	if _, reason, cerr := e.Check(ctx, "", "user:a", "r", "o:1"); reason != flow.ReasonRelationUnavailable || !errors.Is(cerr, errNotBuilt) {
		t.Fatalf("got %q, %v", reason, cerr)
	}
	if _, ok := e.Cached("", "user:a", "r", "o:1"); ok {
		t.Fatal("an answer from nowhere")
	}
	if e.SetModels(ctx, nil) != nil || e.SetModels(ctx, []Model{{Name: "a/a"}}) == nil || e.Status().Ready {
		t.Fatal("models without an engine")
	}
}
