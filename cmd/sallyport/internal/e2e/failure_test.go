// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/testenv"
)

// enforced starts one node with nginx under shop's policies in enforce.
func enforced(t *testing.T) (n *node, w *web, stranger *testenv.Netns) {
	t.Helper()
	require(t, "nginx", "curl")
	n, stranger = one(t)
	n.policy("shop.yaml", shopIn("enforce"))
	w = startNginx(t, n.group("web"), n.ns, 8080)
	n.start()
	act(t, n.group("client"), n.ns, "idle").line(t)
	n.served("client", "web")
	return n, w, stranger
}

func (n *node) get() string { return code(n.t, n.group("client"), n.ns, webURL+"/files/hello") }

// awaitServed waits until the client's call is served.
func (n *node) awaitServed() {
	n.t.Helper()
	eventually(n.t, "the client to be served", func() string {
		if got := n.get(); got != "200" {
			return got
		}
		return ""
	})
}

// refusesAll checks that nobody gets through at the moment.
func (n *node) refusesAll(when string, stranger *testenv.Netns) {
	n.t.Helper()
	for _, c := range []struct {
		who, cgroup string
		ns          *testenv.Netns
	}{{"the client", n.group("client"), n.ns}, {"nobody", n.group("nobody"), n.ns}, {"a process outside", "", n.ns}, {"a stranger", "", stranger}} {
		if got := code(n.t, c.cgroup, c.ns, webURL+"/files/hello"); !strings.HasPrefix(got, "refused: ") {
			n.t.Errorf("%s: %s got %s", when, c.who, got)
		}
	}
}

func (n *node) settled(stranger *testenv.Netns) {
	n.t.Helper()
	n.awaitServed()
	for _, c := range []struct {
		who, cgroup string
		ns          *testenv.Netns
	}{{"nobody", n.group("nobody"), n.ns}, {"a stranger", "", stranger}} {
		if got := code(n.t, c.cgroup, c.ns, webURL+"/files/hello"); got != "403 mtls_required" {
			n.t.Errorf("%s got %s", c.who, got)
		}
	}
}

// TestUserspaceHasNoPrivilege reads what the kernel says of the process that
// parses what strangers send. That it can neither call bpf() nor open the
// policy directory is tested in agent/supervise.
func TestUserspaceHasNoPrivilege(t *testing.T) {
	t.Parallel()
	n, _, _ := enforced(t)
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.userspacePID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`(?m)^NoNewPrivs:\s+1$`, `(?m)^CapInh:\s+0+$`, `(?m)^CapPrm:\s+0+$`, `(?m)^CapEff:\s+0+$`, `(?m)^CapBnd:\s+0+$`, `(?m)^CapAmb:\s+0+$`,
		`(?m)^Uid:\s+([1-9]\d*)\s+[1-9]\d*\s+[1-9]\d*\s+[1-9]\d*$`,
	} {
		if !regexp.MustCompile(want).Match(b) {
			t.Errorf("no %s in %s", want, b)
		}
	}
	group, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", n.userspacePID()))
	if err != nil || strings.Contains(string(group), "/sallyport/agent\n") || !strings.Contains(string(group), "/sallyport/userspace") {
		t.Errorf("it lives in %s %v", group, err)
	}
}

// TestUserspaceIsKilled kills the unprivileged half: nothing passes while it
// is away, and it comes back.
func TestUserspaceIsKilled(t *testing.T) {
	t.Parallel()
	n, w, stranger := enforced(t)
	n.settled(stranger)
	served := w.requests()
	pid := n.userspacePID()
	// The agent is held so that it cannot start another one meanwhile.
	n.agent.signal(unix.SIGSTOP)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its listeners to close", func() string {
		if got := n.get(); !strings.HasPrefix(got, "refused: ") {
			return got
		}
		return ""
	})
	n.refusesAll("userspace is dead", stranger)
	if now := w.requests(); now != served {
		t.Errorf("nginx was reached %d times", now-served)
	}
	n.agent.signal(unix.SIGCONT)
	s := n.await("run another", func(s *controlpb.StatusReply) bool {
		return s.GetUserspace().GetReady() && int(s.GetUserspace().GetPid()) != pid && s.GetReady()
	})
	if s.GetUserspace().GetRestarts() != 1 {
		t.Errorf("%d restarts", s.GetUserspace().GetRestarts())
	}
	n.settled(stranger)
}

// TestAgentStopsAndReturns ends the agent in order and by SIGKILL: what it
// enforced stays so, and the next one takes over.
func TestAgentStopsAndReturns(t *testing.T) {
	t.Parallel()
	n, w, stranger := enforced(t)
	n.settled(stranger)
	for _, end := range []struct {
		name string
		f    func()
	}{{"SIGTERM", n.stop}, {"SIGKILL", func() { n.hangUp(); n.agent.kill() }}} {
		served := w.requests()
		end.f()
		if pins, err := os.ReadDir(n.pinDir); err != nil || len(pins) == 0 {
			t.Fatalf("after %s there are no pins: %v", end.name, err)
		}
		eventually(t, "the listeners to close", func() string {
			if got := n.get(); !strings.HasPrefix(got, "refused: ") {
				return got
			}
			return ""
		})
		n.refusesAll("after "+end.name, stranger)
		if now := w.requests(); now != served {
			t.Errorf("after %s nginx was reached %d times", end.name, now-served)
		}
		n.start()
		n.settled(stranger)
	}
	log, err := os.ReadFile(n.path("agent.log"))
	if err != nil || strings.Count(string(log), `"tookOver":true`) != 2 || strings.Count(string(log), `"tookOver":false`) != 1 {
		t.Errorf("it did not take over twice: %v", err)
	}
}

// TestUninstallLeavesNothing uninstalls after the agent has ended, and asks
// the kernel what is left.
func TestUninstallLeavesNothing(t *testing.T) {
	t.Parallel()
	n, _, stranger := enforced(t)
	n.settled(stranger)
	if len(attached(t, n)) == 0 {
		t.Fatal("nothing is attached while the agent runs: this test asks wrongly")
	}
	out, err := exec.Command(sallyport, "agent", "uninstall", "--pin-dir", n.pinDir).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "stop it first") {
		t.Errorf("uninstall beside a running agent: %v %s", err, out)
	}
	n.awaitServed()
	n.stop()
	out, err = exec.Command(sallyport, "agent", "uninstall", "--pin-dir", n.pinDir).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "nothing is enforced from there any more") {
		t.Fatalf("uninstall: %v %s", err, out)
	}
	if _, err := os.Stat(n.pinDir); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", n.pinDir, err)
	}
	if left := attached(t, n); len(left) != 0 {
		t.Errorf("still attached: %v", left)
	}
	for who, ns := range map[string]*testenv.Netns{"one of this node": n.ns, "a stranger": stranger} {
		if got := code(t, "", ns, webURL+"/files/hello"); got != "200" {
			t.Errorf("%s got %s though nothing is installed", who, got)
		}
	}
}

// attached lists the programs on the node's cgroup, namespace and interfaces.
func attached(t *testing.T, n *node) []string {
	t.Helper()
	var found []string
	query := func(what string, target int, a ebpf.AttachType) {
		r, err := link.QueryPrograms(link.QueryOptions{Target: target, Attach: a})
		if err != nil {
			t.Fatalf("query %s %v: %v", what, a, err)
		}
		for range r.Programs {
			found = append(found, fmt.Sprintf("%s %v", what, a))
		}
	}
	dir, err := os.Open(n.cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, a := range []ebpf.AttachType{
		ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupInet4Bind, ebpf.AttachCGroupInet6Bind,
		ebpf.AttachCGroupInet4PostBind, ebpf.AttachCGroupInet6PostBind, ebpf.AttachCGroupInetSockCreate, ebpf.AttachCGroupSockOps,
		ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg, ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername,
	} {
		query("cgroup", int(dir.Fd()), a)
	}
	query("netns", int(n.ns.File.Fd()), ebpf.AttachSkLookup)
	err = n.ns.Do(func() error {
		for index := 1; index <= 2; index++ {
			for _, a := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
				r, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: a})
				if err != nil {
					continue // no interface with that index
				}
				for range r.Programs {
					found = append(found, fmt.Sprintf("interface %d %v", index, a))
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
