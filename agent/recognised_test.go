// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"testing"

	"github.com/sallyport-dev/sallyport/policies/compile"
)

// TestPodsAreNotRecognised holds that an identity that selects pods, of which
// this version has no source, matches nothing: neither by a scan nor by a
// path that the kernel knows.
func TestPodsAreNotRecognised(t *testing.T) {
	uid := &compile.Selector{Kubernetes: &compile.Kubernetes{ServiceAccount: "web"}, HasUID: true, UID: 1000}
	for _, s := range []*compile.Selector{nil, {Kubernetes: &compile.Kubernetes{ServiceAccount: "web"}}, uid} {
		id := &compile.Identity{Namespace: "shop", Name: "web", Selector: s}
		if w, ok := recognised(id); ok {
			t.Errorf("%+v is looked for as %+v", s, w)
		}
		if path := (&Agent{scope: "/"}).exactPath(id); path != "" {
			t.Errorf("%+v is at %s", s, path)
		}
	}
	if w, ok := recognised(&compile.Identity{Selector: &compile.Selector{SystemdUnit: "x.service"}}); !ok || w.Unit != "x.service" {
		t.Errorf("a unit is looked for as %+v, %v", w, ok)
	}
	if got, want := selectorText(uid), "kubernetes.serviceAccount=web uid=1000"; got != want {
		t.Errorf("shown as %q, want %q", got, want)
	}
}
