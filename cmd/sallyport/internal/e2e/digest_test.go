// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestWorkloadByDigest: a workload is who it is by what its executable holds.
func TestWorkloadByDigest(t *testing.T) {
	require(t)
	t.Parallel()
	n, _ := one(t)
	self, err := os.Executable()
	if err == nil {
		self, err = filepath.EvalSymlinks(self)
	}
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	policies := func(sum [sha256.Size]byte) string {
		return strings.Replace(shopIn("enforce"), "select: {cgroup: {path: /client}}",
			fmt.Sprintf("select: {cgroup: {path: /client}, process: {binary: %q, digest: %q}}", self, fmt.Sprintf("sha256:%x", sum)), 1)
	}
	n.policy("shop.yaml", policies(sha256.Sum256(b)))
	server(t, n.group("stream"), n.ns, "echo", addrB+":9090")
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)
	n.served("client", "stream")
	reaches := func() bool {
		out, err := say(t, n.group("client"), n.ns, addrB+":9090", "hello\n")
		return err == nil && out == "hello\n"
	}
	eventually(t, "the workload to be who it is", func() string {
		if !reaches() {
			return "refused"
		}
		return ""
	})
	n.change(func() { n.policy("shop.yaml", policies(sha256.Sum256(append(b, 'x')))) })
	eventually(t, "another program to be nobody", func() string {
		if reaches() {
			return "it gets through"
		}
		return ""
	})
	eventually(t, "the list to say why", func() string {
		out := n.mustRun("identity", "list")
		if !strings.Contains(out, fmt.Sprintf("process.digest: is sha256:%x, want sha256:%x", sha256.Sum256(b), sha256.Sum256(append(b, 'x')))) {
			return out
		}
		return ""
	})
}
