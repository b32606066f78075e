// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/control"
	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/testenv"
)

const (
	trustDomain = "e2e.sallyport"
	// patience bounds every wait for something that is to happen. It is long
	// because the machine may be busy; nothing waits for it to pass.
	patience = 90 * time.Second
	poll     = 20 * time.Millisecond
)

// eventually waits until ok says "" and fails with what it said last.
func eventually(t *testing.T, what string, ok func() string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		why := ok()
		if why == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %s", what, why)
		}
		time.Sleep(poll)
	}
}

// node is one machine: a network namespace, a cgroup subtree, an agent.
type node struct {
	t      *testing.T
	name   string
	ns     *testenv.Netns
	cgroup string // absolute
	dir    string
	pinDir string
	// extra are further lines of agent.yaml.
	extra          string
	identity       string   // the whole line, embedded by default
	authorityFlags []string // of the shared authority, nil without
	env            []string // beside the test's own
	wrap           []string // a command that runs the agent, nil for none
	agent          *program
	client         *control.Client
	decisions      *os.File
}

// newNode makes a node that has not been started. Everything of it is gone at
// the end of the test.
func newNode(t *testing.T, name string, ns *testenv.Netns) *node {
	t.Helper()
	suffix := testenv.Suffix()
	n := &node{t: t, name: name, ns: ns, pinDir: "/sys/fs/bpf/sallyport-e2e-" + suffix, identity: "identity: {tpm: none}"}
	n.cgroup = filepath.Join(testenv.CgroupMount(t), "sallyport-e2e-"+suffix)
	if err := os.Mkdir(n.cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeTree(t, n.cgroup) })
	n.dir = folder(t)
	if err := os.MkdirAll(n.path("policies"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.close)
	return n
}

// folder is a temporary one that every user can reach.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sallyport-e2e-node-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

// close stops the agent, shows its log where the test failed, and uninstalls.
func (n *node) close() {
	n.stop()
	if n.t.Failed() {
		for _, f := range []string{"agent.log", "decisions.json"} {
			b, _ := os.ReadFile(n.path(f))
			lines := strings.Split(strings.TrimSpace(string(b)), "\n")
			lines = lines[max(0, len(lines)-8):]
			for i, l := range lines {
				lines[i] = l[:min(len(l), 400)]
			}
			n.t.Logf("node %s, the end of %s:\n%s", n.name, f, strings.Join(lines, "\n"))
		}
	}
	if _, err := os.Stat(n.pinDir); err != nil {
		return
	}
	out, err := exec.Command(sallyport, "agent", "uninstall", "--pin-dir", n.pinDir).CombinedOutput()
	// An agent that was refused at its start has pinned nothing.
	if err != nil && !strings.Contains(string(out), "uninstall: no pins at") {
		n.t.Errorf("uninstall: %v: %s", err, out)
	}
}

// policy writes a policy file as an editor does.
func (n *node) policy(name, text string) {
	n.t.Helper()
	file := n.path("policies/" + name)
	if err := os.WriteFile(file+".new", []byte(text), 0o644); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) writeConfig() {
	n.t.Helper()
	text := fmt.Sprintf(`trustDomain: %s
node: %s
policyDir: %s
stateDir: %s
pinDir: %s
controlSocket: %s
kernel: {cgroupRoot: %s}
%s
%s
`, trustDomain, n.name, n.path("policies"), n.path("state"), n.pinDir, n.path("control.sock"), n.cgroup, n.identity, n.extra)
	if err := os.WriteFile(n.path("agent.yaml"), []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// launch starts the agent and does not wait for it.
func (n *node) launch() *program {
	n.t.Helper()
	n.hangUp()
	n.writeConfig()
	var err error
	if n.decisions, err = os.OpenFile(n.path("decisions.json"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		n.t.Fatal(err)
	}
	defer n.decisions.Close()
	log, err := os.OpenFile(n.path("agent.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	command := append(slices.Clone(n.wrap), sallyport, "agent", "--config", n.path("agent.yaml"))
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdout, cmd.Stderr = n.decisions, log
	cmd.Env = append(os.Environ(), n.env...)
	n.agent = start(n.t, n.cgroup, n.ns, cmd)
	return n.agent
}

// start starts the agent and waits until it serves.
func (n *node) start() {
	n.t.Helper()
	n.launch()
	n.await("be ready", func(s *controlpb.StatusReply) bool {
		return s.GetReady() && s.GetUserspace().GetReady() && s.GetPolicySet().GetGeneration() > 0
	})
}

func (n *node) hangUp() {
	if n.client != nil {
		n.client.Close() //nolint:errcheck // its other end may be gone
		n.client = nil
	}
}

// stop ends the agent in order.
func (n *node) stop() {
	n.hangUp()
	if n.agent != nil {
		n.agent.terminate(n.t)
	}
}

func (n *node) status() (*controlpb.StatusReply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if n.client == nil {
		c, err := control.Dial(ctx, n.path("control.sock"))
		if err != nil {
			return nil, err
		}
		n.client = c
	}
	return n.client.Status(ctx, &controlpb.StatusRequest{})
}

// await waits until the status is as wanted.
func (n *node) await(what string, ok func(*controlpb.StatusReply) bool) *controlpb.StatusReply {
	n.t.Helper()
	var last *controlpb.StatusReply
	eventually(n.t, "node "+n.name+" to "+what, func() string {
		select {
		case <-n.agent.done:
			n.t.Fatalf("node %s to %s: its agent ended: %v", n.name, what, n.agent.err)
		default:
		}
		s, err := n.status()
		if err != nil {
			return err.Error()
		}
		if last = s; ok(s) {
			return ""
		}
		return fmt.Sprintf("ready %t, policies %v, problems %v", s.GetReady(), s.GetPolicySet(), s.GetProblems())
	})
	return last
}

// served waits until every one of these identities has a certificate, and what
// was changed is in force.
func (n *node) served(identities ...string) {
	n.t.Helper()
	n.await("have certificates of "+strings.Join(identities, ", "), func(s *controlpb.StatusReply) bool {
		have := map[string]bool{}
		for _, l := range proxyOf(s).Leaves {
			have[l.ID] = l.Thumbprint != ""
		}
		for _, i := range identities {
			if !have[n.id(i)] {
				return false
			}
		}
		return s.GetReady()
	})
}

// change edits policies and waits for the set to be in force.
func (n *node) change(edit func()) {
	n.t.Helper()
	s, err := n.status()
	if err != nil {
		n.t.Fatal(err)
	}
	edit()
	n.await("take the policies over", func(now *controlpb.StatusReply) bool {
		return now.GetPolicySet().GetGeneration() > s.GetPolicySet().GetGeneration() && now.GetReady() && now.GetUserspace().GetReady()
	})
}

// id is the derived SPIFFE ID of an identity in namespace shop.
func (n *node) id(identity string) string {
	return fmt.Sprintf("spiffe://%s/node/%s/ns/shop/%s", trustDomain, n.name, identity)
}

// proxyStatus is what these tests read of userspace's status.
type proxyStatus struct {
	Streams int
	Engine  map[string]any
	Proxy   map[string]any
	Leaves  []struct{ ID, Thumbprint, Serial string }
	Issuers []struct {
		Name, Problem string
		Keys          int
	}
}

func proxyOf(s *controlpb.StatusReply) proxyStatus {
	var p proxyStatus
	json.Unmarshal(s.GetUserspace().GetJson(), &p) //nolint:errcheck // not there yet: nothing in it
	return p
}

// run runs a verb against this node's agent.
func (n *node) run(args ...string) (string, error) {
	n.t.Helper()
	out, err := exec.Command(sallyport, append(args, "--control-socket", n.path("control.sock"))...).CombinedOutput()
	return string(out), err
}

func (n *node) mustRun(args ...string) string {
	n.t.Helper()
	out, err := n.run(args...)
	if err != nil {
		n.t.Fatalf("sallyport %q: %v: %s", args, err, out)
	}
	return out
}

// record is what these tests read of a line of the decision log.
type record struct {
	RequestID, Decision, Mode, Stage, Reason, Method, Source, Channel, Hook, Rule, Upgrade string
	WouldDeny                                                                              bool
	Client, Address                                                                        netip.AddrPort
}

// mark is where the decision log ends now.
func (n *node) mark() int64 {
	info, err := os.Stat(n.path("decisions.json"))
	if err != nil {
		return 0
	}
	return info.Size()
}

func (n *node) records(from int64) []record {
	b, err := os.ReadFile(n.path("decisions.json"))
	if err != nil {
		return nil
	}
	var out []record
	for l := range bytes.Lines(b[min(int(from), len(b)):]) {
		var r record
		if json.Unmarshal(l, &r) == nil {
			out = append(out, r)
		}
	}
	return out
}

// decided waits for a decision since a mark that fits.
func (n *node) decided(from int64, what string, fits func(*record) bool) record {
	n.t.Helper()
	var found record
	eventually(n.t, "decision: "+what, func() string {
		all := n.records(from)
		for i := range all {
			if fits(&all[i]) {
				found = all[i]
				return ""
			}
		}
		return fmt.Sprintf("not among %+v", all)
	})
	return found
}

// userspacePID returns the process id of the unprivileged half.
func (n *node) userspacePID() int {
	n.t.Helper()
	s := n.await("run userspace", func(s *controlpb.StatusReply) bool { return s.GetUserspace().GetReady() })
	return int(s.GetUserspace().GetPid())
}

// program is a process in a cgroup and a namespace.
type program struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	done chan struct{}
	err  error // once done is closed
	errs *lockedBuffer
}

// start starts cmd in the cgroup folder ("" for the test's own) and namespace.
func start(t *testing.T, cgroup string, ns *testenv.Netns, cmd *exec.Cmd) *program {
	t.Helper()
	p := &program{cmd: cmd, done: make(chan struct{}), errs: &lockedBuffer{}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if cgroup != "" {
		if err := os.MkdirAll(cgroup, 0o755); err != nil {
			t.Fatal(err)
		}
		dir, err := os.Open(cgroup)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	var err error
	if cmd.Stdin == nil {
		if p.in, err = cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
	}
	if cmd.Stderr == nil {
		cmd.Stderr = p.errs
	}
	var theirs *os.File
	if cmd.Stdout == nil {
		var ours *os.File
		if ours, theirs, err = os.Pipe(); err != nil {
			t.Fatal(err)
		}
		cmd.Stdout = theirs
		p.out = bufio.NewReader(ours)
		t.Cleanup(func() { ours.Close() })
	}
	err = ns.Do(cmd.Start)
	if theirs != nil {
		theirs.Close()
	}
	if err != nil {
		t.Fatalf("start %s: %v", cmd.Path, err)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.signal(unix.SIGKILL)
		<-p.done
	})
	return p
}

func (p *program) signal(s syscall.Signal) {
	select {
	case <-p.done:
	default:
		p.cmd.Process.Signal(s) //nolint:errcheck // it may have ended meanwhile
	}
}

// terminate ends the program by SIGTERM; one that does not go is a failure.
func (p *program) terminate(t *testing.T) {
	t.Helper()
	p.signal(unix.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(patience):
		t.Errorf("%s did not end by SIGTERM", p.cmd.Path)
		p.signal(unix.SIGKILL)
		<-p.done
	}
}

func (p *program) kill() {
	p.signal(unix.SIGKILL)
	<-p.done
}

// line reads one line of the program's output.
func (p *program) line(t *testing.T) string {
	t.Helper()
	type result struct {
		s   string
		err error
	}
	c := make(chan result, 1)
	go func() {
		s, err := p.out.ReadString('\n')
		c <- result{s, err}
	}()
	select {
	case r := <-c:
		if r.err != nil {
			t.Fatalf("output of %s: %v: %s", p.cmd.Path, r.err, p.errs)
		}
		return strings.TrimSpace(r.s)
	case <-time.After(patience):
		t.Fatalf("no output of %s", p.cmd.Path)
	}
	return ""
}

// act starts an actor.
func act(t *testing.T, cgroup string, ns *testenv.Netns, name string, args ...string) *program {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), actorVar+"="+name)
	return start(t, cgroup, ns, cmd)
}

// server starts an actor that listens, and waits until it does.
func server(t *testing.T, cgroup string, ns *testenv.Netns, name string, args ...string) *program {
	t.Helper()
	p := act(t, cgroup, ns, name, args...)
	if got := p.line(t); got != "listening" {
		t.Fatalf("%s: %s %s", name, got, p.errs)
	}
	return p
}

// say sends bytes over one connection, half-closes it, and returns all that
// came back. A connection that is refused or reset is the error.
func say(t *testing.T, cgroup string, ns *testenv.Netns, addr, data string) (string, error) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", addr, "all")
	cmd.Env = append(os.Environ(), actorVar+"=dial")
	cmd.Stdin = strings.NewReader(data)
	var out lockedBuffer
	cmd.Stdout = &out
	p := start(t, cgroup, ns, cmd)
	select {
	case <-p.done:
	case <-time.After(patience):
		p.kill()
		return out.String(), errors.New("no end of the connection")
	}
	if p.err != nil {
		return out.String(), errors.New(strings.TrimSpace(strings.TrimPrefix(p.errs.String(), "connected\n")))
	}
	return out.String(), nil
}

// lockedBuffer is a bytes.Buffer for a program's output.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// removeTree kills what lives in a cgroup subtree and removes it.
func removeTree(t *testing.T, root string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(root, "cgroup.kill"), []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("kill %s: %v", root, err)
	}
	eventually(t, "remove cgroup "+root, func() string {
		var dirs []string
		filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error { //nolint:errcheck // each error is of one that is gone
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for _, dir := range slices.Backward(dirs) {
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Sprintf("%s: %v", dir, err)
			}
		}
		return ""
	})
}
