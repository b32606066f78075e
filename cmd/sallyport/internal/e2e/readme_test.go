// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/agent/testenv"
)

const root = "../../../.." // of the module

// TestReadmeFirstLook runs the README's lines for one systemd unit of one's
// own, with nginx in a cgroup that is named as a unit's is.
func TestReadmeFirstLook(t *testing.T) {
	require(t, "nginx", "curl", "sh", "sed")
	t.Parallel()
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(text), "<!-- test: first look -->\n```sh\n")
	script, _, end := strings.Cut(after, "```")
	if !ok || !end || strings.Count(script, "\n") != 5 {
		t.Fatalf("the README has no first look of five lines: %q", script)
	}
	n := newNode(t, "host", testenv.NewNetns(t))
	w := startNginx(t, n.group("system.slice/nginx.service"), n.ns, 80)
	eventually(t, "nginx to answer before there is an agent", func() string {
		if got := code(t, "", n.ns, "http://127.0.0.1/healthz"); got != "404" {
			return got
		}
		return ""
	})
	// The places of a whole machine become those of this test; nothing else
	// of the lines is changed.
	script = strings.NewReplacer("/etc/sallyport/policies", n.path("policies"), "bin/sallyport", sallyport).Replace(script)
	policies, err := filepath.Abs(filepath.Join(root, "policies"))
	if err != nil {
		t.Fatal(err)
	}
	cwd := folder(t)
	if err := os.Symlink(policies, filepath.Join(cwd, "policies")); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir = cwd
	cmd.Env = append(os.Environ(), "SALLYPORT_POLICY_DIR="+n.path("policies"), "SALLYPORT_STATE_DIR="+n.path("state"), "SALLYPORT_PIN_DIR="+n.pinDir,
		"SALLYPORT_CONTROL_SOCKET="+n.path("control.sock"), "SALLYPORT_KERNEL_CGROUP_ROOT="+n.cgroup, "SALLYPORT_IDENTITY_TPM=none")
	n.agent = start(t, n.cgroup, n.ns, cmd)
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(cwd, "agent.log"))
			t.Logf("agent.log: %s\nobserve: %s", b, n.agent.errs)
		}
		// The shell's own end does not end what it started in the background.
		if err := os.WriteFile(filepath.Join(n.cgroup, "cgroup.kill"), []byte("1"), 0); err != nil {
			t.Error(err)
		}
		<-n.agent.done
		eventually(t, "the agent to end", func() string {
			if out, err := exec.Command(sallyport, "agent", "uninstall", "--pin-dir", n.pinDir).CombinedOutput(); err != nil {
				return fmt.Sprintf("%v: %s", err, out)
			}
			return ""
		})
	})
	lines := make(chan string, 1024)
	go func() {
		defer close(lines)
		for {
			l, err := n.agent.out.ReadString('\n')
			if err != nil {
				return
			}
			lines <- l
		}
	}()
	// Both lines of the README, in the form in which it shows them. A call that
	// is made before the agent serves is not judged, and never refused.
	seen := map[string]bool{}
	want := map[string]*regexp.Regexp{
		"":        regexp.MustCompile(`^\d\d:\d\d:\d\d\.\d{3} decision 127\.0\.0\.1:\d+ -> default/web  GET  wouldDeny identity/no_identity  by default/web  web\.yaml:11  \w+\n$`),
		"healthz": regexp.MustCompile(`^\d\d:\d\d:\d\d\.\d{3} decision 127\.0\.0\.1:\d+ -> default/web  GET /healthz  allow  by default/web health web\.yaml:19  \w+\n$`),
	}
	deadline := time.Now().Add(patience)
	for len(seen) < len(want) {
		if time.Now().After(deadline) {
			t.Fatalf("observe showed %v of the two decisions", seen)
		}
		for path := range want {
			if got := code(t, "", n.ns, "http://127.0.0.1/"+path); got != "404" && got != "403" || strings.Contains(got, " ") {
				t.Fatalf("audit mode changed a call of /%s: %s", path, got)
			}
		}
		for more := true; more; {
			select {
			case l, open := <-lines:
				if !open {
					t.Fatalf("observe ended: %s", n.agent.errs)
				}
				for path, form := range want {
					seen[path] = seen[path] || form.MatchString(l)
				}
				for path := range seen {
					if !seen[path] {
						delete(seen, path)
					}
				}
			case <-time.After(poll):
				more = false
			}
		}
	}
	if w.requests() == 0 {
		t.Error("nginx saw no call")
	}
}
