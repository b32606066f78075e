// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
)

// ends waits until an agent that cannot run has ended, and returns what it
// said.
func (n *node) ends() string {
	n.t.Helper()
	n.launch()
	<-n.agent.done
	b, err := os.ReadFile(n.path("agent.log"))
	if err != nil {
		n.t.Fatal(err)
	}
	if n.agent.err == nil {
		n.t.Errorf("the agent ended well: %s", b)
	}
	return string(b)
}

// TestTwoAgents starts a second agent on the pins, and one on the cgroups, of
// one that runs.
func TestTwoAgents(t *testing.T) {
	t.Parallel()
	first, _, stranger := enforced(t)
	for _, c := range []struct {
		name string
		set  func(*node)
	}{
		{"the same pins", func(n *node) { n.pinDir = first.pinDir }},
		{"the same cgroups", func(n *node) { n.cgroup = first.cgroup }},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, ns := join(t)
			second := newNode(t, "second", ns)
			pins, cgroup := second.pinDir, second.cgroup
			c.set(second)
			said := second.ends()
			second.pinDir, second.cgroup = pins, cgroup
			if !strings.Contains(said, "another agent is running: stop it, or give this one another pinDir and cgroupRoot") {
				t.Errorf("it said %s", said)
			}
			first.settled(stranger)
		})
	}
}

// TestPinsOfAnotherLayout starts an agent on pins that it cannot read.
func TestPinsOfAnotherLayout(t *testing.T) {
	require(t)
	t.Parallel()
	n, _ := one(t)
	n.policy("shop.yaml", shopIn("enforce"))
	n.start()
	n.stop()
	if err := os.Remove(filepath.Join(n.pinDir, "layout")); err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "layout", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Put(uint32(0), uint32(9999)); err != nil {
		t.Fatal(err)
	}
	if err := m.Pin(filepath.Join(n.pinDir, "layout")); err != nil {
		t.Fatal(err)
	}
	before := len(attached(t, n))
	if said := n.ends(); !strings.Contains(said, "pins of another layout version: it has 9999, this binary ") ||
		!strings.Contains(said, "run 'sallyport agent uninstall' and start again") {
		t.Errorf("it said %s", said)
	}
	if after := len(attached(t, n)); before == 0 || after != before {
		t.Errorf("what was enforced is not any more: %d programs, then %d", before, after)
	}
	if out, err := exec.Command(sallyport, "agent", "uninstall", "--pin-dir", n.pinDir).CombinedOutput(); err != nil {
		t.Fatalf("uninstall: %v %s", err, out)
	}
	n.start()
}

// TestBpffsIsNotMounted starts an agent where there is no bpffs.
func TestBpffsIsNotMounted(t *testing.T) {
	require(t, "unshare", "umount")
	t.Parallel()
	n, _ := one(t)
	n.policy("shop.yaml", shopIn("enforce"))
	n.writeConfig()
	log, err := os.Create(n.path("agent.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("unshare", "--mount", "sh", "-c",
		`while umount /sys/fs/bpf 2>/dev/null; do :; done; grep -q " /sys/fs/bpf " /proc/self/mounts && exit 9; exec "$0" agent --config "$1"`, sallyport, n.path("agent.yaml"))
	cmd.Stdout, cmd.Stderr = log, log
	n.agent = start(t, n.cgroup, n.ns, cmd)
	n.await("be ready", func(s *controlpb.StatusReply) bool { return s.GetReady() && s.GetUserspace().GetReady() })
	b, err := os.ReadFile(n.path("agent.log"))
	if err != nil || !strings.Contains(string(b), `"msg":"mounted bpffs","path":"/sys/fs/bpf"`) {
		t.Errorf("it did not say that it mounted one: %v %s", err, b)
	}
	if _, err := os.Stat(n.pinDir); err == nil {
		t.Error("the pins are on the bpffs of everybody: this test did not take it away")
	}
}
