// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAWorkloadThatHasJustStarted calls from a cgroup that was made a moment
// ago, as a unit does that is restarted: its first call is served, on the same
// node and to the other one, and who has no identity gets nothing by being new.
// Where the namespace too is new, the kernel refuses until there are listeners.
func TestAWorkloadThatHasJustStarted(t *testing.T) {
	require(t, "nginx", "curl")
	t.Parallel()
	a, b := two(t)
	startNginx(t, b.group("web"), b.ns, 8080)
	b.start()
	a.start()
	b.served("web")
	if got := a.get(); got != "200" && !strings.HasPrefix(got, "refused: exit status 7") {
		t.Errorf("the first call from a new namespace: %s", got)
	}
	a.awaitServed()
	// From here on both namespaces are somebody's, and stay so.
	for _, n := range []*node{a, b} {
		act(t, n.group("outcast"), n.ns, "idle").line(t)
		n.served("outcast")
	}
	for i := range 5 {
		for _, n := range []*node{b, a} {
			from := [2]int64{a.mark(), b.mark()}
			below := fmt.Sprintf("client/%d", i)
			for who, want := range map[string]string{"client": "200", below: "200", fmt.Sprintf("nobody%d", i): "403 mtls_required"} {
				if got := code(t, n.group(who), n.ns, webURL+"/files/hello"); got != want {
					t.Errorf("the first call of %s on node %s: %s, want %s\n%+v\n%+v", who, n.name, got, want, a.records(from[0]), b.records(from[1]))
				}
			}
			// The next round makes it anew, with another id.
			for _, dir := range []string{n.group(below), n.group("client")} {
				eventually(t, "remove "+dir, func() string {
					if err := unix.Rmdir(dir); err != nil && !os.IsNotExist(err) {
						return err.Error()
					}
					return ""
				})
			}
		}
	}
}

// TestAServerThatHasJustStarted restarts nginx in the same cgroup and in a new
// one: while it is down, callers are told that nothing is there, and once it
// listens they are served.
func TestAServerThatHasJustStarted(t *testing.T) {
	t.Parallel()
	n, w, stranger := enforced(t)
	n.settled(stranger)
	for i := range 4 {
		w.terminate(t)
		if got := n.get(); got != "503 upstream_gone" && got != "502 upstream" {
			t.Errorf("while the server is down: %s", got)
		}
		if i%2 == 1 {
			dir := n.group("web")
			eventually(t, "remove "+dir, func() string {
				if err := unix.Rmdir(dir); err != nil {
					return err.Error()
				}
				return ""
			})
		}
		from := n.mark()
		w = startNginx(t, filepath.Join(n.cgroup, "web"), n.ns, 8080)
		if got := n.get(); got != "200" {
			t.Errorf("the first call after restart %d: %s\n%+v", i, got, n.records(from))
		}
		n.awaitServed()
	}
	n.settled(stranger)
}
