// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"testing"

	"github.com/sallyport-dev/sallyport/policies/compile"
)

// TestPodsAreNotRecognised holds that an identity that selects pods, of which
// this version has no source, matches nothing: neither by a scan nor by a
// path that the kernel knows; and how others are looked for.
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
	// By a digest only after it was looked at: never by a path alone.
	digest := &compile.Selector{CgroupPath: "/x", ProcessBinary: "/bin/x", ProcessDigest: "sha256:00"}
	if w, ok := recognised(&compile.Identity{Selector: digest}); !ok || w.Path != "/x" || w.Binary != "/bin/x" || w.Digest != "sha256:00" {
		t.Errorf("a digest is looked for as %+v, %v", w, ok)
	}
	if path := (&Agent{scope: "/"}).exactPath(&compile.Identity{Selector: digest}); path != "" {
		t.Errorf("a digest is at %s", path)
	}
	if got, want := selectorText(digest), "cgroup.path=/x process.binary=/bin/x process.digest=sha256:00"; got != want {
		t.Errorf("shown as %q, want %q", got, want)
	}
	if got, want := selectorText(uid), "kubernetes.serviceAccount=web uid=1000"; got != want {
		t.Errorf("shown as %q, want %q", got, want)
	}
}
