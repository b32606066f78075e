// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// installSelf puts this test's own binary at a path by rename, with tail
// behind it, and returns the digest of what is there then.
func installSelf(t *testing.T, file, tail string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	b = append(b, tail...)
	if err := os.WriteFile(file+".new", b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// as starts an actor that is another file than this test's binary.
func (n *node) as(file, cgroup, name string, stdin string, args ...string) *program {
	n.t.Helper()
	cmd := exec.Command(file, args...)
	cmd.Env = append(os.Environ(), actorVar+"="+name)
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	return start(n.t, cgroup, n.ns, cmd)
}

// TestDigestOfWhatRuns has a client that is told by the digest of its binary:
// one byte more and it is nobody, and its cgroup's name alone is nothing.
func TestDigestOfWhatRuns(t *testing.T) {
	require(t, "nginx")
	t.Parallel()
	n, _ := one(t)
	file, group := n.path("caller"), n.group("client")
	right := installSelf(t, file, "")
	byDigest := strings.Replace(shopIn("enforce"), "{cgroup: {path: /client}}",
		"{cgroup: {path: /client}, process: {binary: "+file+", digest: \""+right+"\"}}", 1)
	n.policy("shop.yaml", byDigest)
	startNginx(t, n.group("web"), n.ns, 8080)
	n.start()
	call := func() string {
		t.Helper()
		p := n.as(file, group, "dial", "GET /files/hello HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n", addrB+":8080", "all")
		var out strings.Builder
		p.out.WriteTo(&out) //nolint:errcheck // what came is judged
		<-p.done
		head, _, _ := strings.Cut(out.String(), "\r\n")
		return head
	}
	served := func() string {
		if got := call(); got != "HTTP/1.1 200 OK" {
			return "got " + got
		}
		return ""
	}
	idle := n.as(file, group, "idle", "")
	idle.line(t)
	eventually(t, "the right content to be served", served)
	if out := n.mustRun("identity", "list"); strings.Contains(out, group) {
		t.Errorf("what is right is listed as nobody:\n%s", out)
	}

	// Another content at the same path: the one that still runs does not
	// count for it.
	wrong := installSelf(t, file, "x")
	second := n.as(file, group, "idle", "")
	second.line(t)
	told := "process.digest: is " + wrong + ", want " + right
	unrecognised := func() string {
		if out := n.mustRun("identity", "list"); !strings.Contains(out, told) {
			return out
		}
		return ""
	}
	eventually(t, "identity list to name the digest", unrecognised)
	denied := func(when string) {
		t.Helper()
		mark := n.mark()
		if got := call(); strings.Contains(got, " 200 ") {
			t.Fatalf("%s: got %s", when, got)
		}
		n.decided(mark, when, func(r *record) bool { return r.Decision == "deny" && r.Reason == "mtls_required" })
	}
	denied("both contents in the cgroup")
	idle.kill()
	eventually(t, "identity list to name the digest still", unrecognised)
	denied("only the wrong content")

	// A cgroup that is made again has no identity by its path: not even the
	// first call counts.
	second.kill()
	for range 5 {
		removeTree(t, group)
		denied("the wrong content in a new cgroup")
	}

	installSelf(t, file, "")
	n.as(file, group, "idle", "").line(t)
	eventually(t, "the right content to be served again", served)
}
