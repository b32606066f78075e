// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/agent/control"
	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/events"
	"github.com/sallyport-dev/sallyport/userspace"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const (
	trustDomain = "demo.sallyport"
	// startTimeout bounds a node's way to ready: the relation store's first
	// migration on a busy machine included.
	startTimeout = 60 * time.Second
	// settleTimeout bounds the way of a change through a running node.
	settleTimeout = 15 * time.Second
	pollInterval  = 20 * time.Millisecond
)

//go:embed policies/*.yaml
var policyFiles embed.FS

// node is one machine of the demo: an agent in its namespace with its own
// cgroup subtree, policies, state and pins.
type node struct {
	lab     *lab
	name    string // also its namespace
	dir     string
	cgroup  string
	config  string
	ceiling flow.Mode
	leafTTL time.Duration
	tpm     string // socket of a software TPM, "none" without
	agent   *process
	client  *control.Client
}

func (l *lab) newNode(name string, ceiling flow.Mode, joinToken, jwks string) (*node, error) {
	n := &node{lab: l, name: name, dir: filepath.Join(l.dir, name), ceiling: ceiling, leafTTL: 10 * time.Minute, tpm: "none"}
	if err := os.MkdirAll(filepath.Join(n.dir, "policies"), 0o755); err != nil {
		return nil, fmt.Errorf("make folder of node %s: %w", name, err)
	}
	var err error
	if n.cgroup, err = l.addCgroup(name); err != nil {
		return nil, err
	}
	n.config = filepath.Join(n.dir, "agent.yaml")
	if err := os.WriteFile(n.path("join-token"), []byte(joinToken+"\n"), 0o600); err != nil {
		return nil, fmt.Errorf("write join token of node %s: %w", name, err)
	}
	l.pinDirs = append(l.pinDirs, n.pinDir())
	return n, n.writePolicies(jwks)
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }
func (n *node) pinDir() string          { return "/sys/fs/bpf/" + n.lab.name + "-" + n.name }

// id is the SPIFFE ID that a MachineIdentity of the demo has on this node.
func (n *node) id(identity string) string {
	return fmt.Sprintf("spiffe://%s/node/%s/ns/shop/%s", trustDomain, n.name, identity)
}

func (n *node) writePolicies(jwks string) error {
	return fs.WalkDir(policyFiles, "policies", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := policyFiles.ReadFile(p)
		if err != nil {
			return err
		}
		return os.WriteFile(n.path(p), bytes.ReplaceAll(b, []byte("JWKS_FILE"), []byte(jwks)), 0o644)
	})
}

func (n *node) writeConfig() error {
	text := fmt.Sprintf(`trustDomain: %s
node: %s
policyDir: %s
stateDir: %s
pinDir: %s
controlSocket: %s
kernel: {cgroupRoot: %s}
identity:
  source: authority
  tpm: %s
  leafTTL: %s
  authority: {address: "%s", token: %s}
modeCeiling: %s
`, trustDomain, n.name, n.path("policies"), n.path("state"), n.pinDir(), n.path("control.sock"), n.cgroup, n.tpm, n.leafTTL,
		authorityAddress, n.path("join-token"), n.ceiling)
	if err := os.WriteFile(n.config, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write configuration of node %s: %w", n.name, err)
	}
	return nil
}

// start starts the agent and waits until it serves: policies in force,
// userspace there, nothing unhealthy.
func (n *node) start(ctx context.Context) error {
	if err := n.writeConfig(); err != nil {
		return err
	}
	decisions, err := os.OpenFile(n.path("decisions.json"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open decision log of node %s: %w", n.name, err)
	}
	defer decisions.Close()
	n.agent, err = n.lab.start(n.name, n.cgroup, "agent-"+n.name, decisions, "/proc/self/exe", "agent", "--config", n.config)
	if err != nil {
		return err
	}
	return n.ready(ctx)
}

func (n *node) ready(ctx context.Context) error {
	return n.await(ctx, startTimeout, "be ready", func(s *controlpb.StatusReply) bool {
		return s.GetReady() && s.GetUserspace().GetReady() && s.GetPolicySet().GetGeneration() > 0
	})
}

// await asks for the status until it is as wanted.
func (n *node) await(ctx context.Context, timeout time.Duration, what string, ok func(*controlpb.StatusReply) bool) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var last *controlpb.StatusReply
	var lastErr error
	for {
		last, lastErr = n.status(ctx)
		if lastErr == nil && ok(last) {
			return nil
		}
		select {
		case <-n.agent.done:
			return fmt.Errorf("node %s to %s: its agent ended: %w\n%s", n.name, what, n.agent.err, n.agent.lastLines(5))
		case <-ctx.Done():
			return fmt.Errorf("node %s to %s: %w; last: %v %v\n%s", n.name, what, ctx.Err(), last.GetProblems(), lastErr, n.agent.lastLines(5))
		case <-time.After(pollInterval):
		}
	}
}

func (n *node) status(ctx context.Context) (*controlpb.StatusReply, error) {
	c, err := n.control(ctx)
	if err != nil {
		return nil, err
	}
	return c.Status(ctx, &controlpb.StatusRequest{})
}

func (n *node) control(ctx context.Context) (*control.Client, error) {
	if n.client != nil {
		return n.client, nil
	}
	c, err := control.Dial(ctx, n.path("control.sock"))
	if err == nil {
		n.client = c
	}
	return c, err
}

// hangUp forgets the control connection, which ends with the agent.
func (n *node) hangUp() {
	if n.client != nil {
		n.client.Close() //nolint:errcheck // its other end may be gone
		n.client = nil
	}
}

// stop ends the agent as an operator would.
func (n *node) stop() {
	n.hangUp()
	if n.agent != nil {
		n.agent.stop(15 * time.Second)
	}
}

// thumbprint is that of the certificate which an identity has now.
func (n *node) thumbprint(ctx context.Context, identity string) (string, error) {
	var found string
	err := n.await(ctx, settleTimeout, "have a certificate of "+identity, func(s *controlpb.StatusReply) bool {
		found = leafOf(s, n.id(identity)).Thumbprint
		return found != ""
	})
	return found, err
}

func leafOf(s *controlpb.StatusReply, id string) userspace.LeafStatus {
	var st userspace.Status
	if json.Unmarshal(s.GetUserspace().GetJson(), &st) == nil {
		for _, l := range st.Leaves {
			if l.ID == id {
				return l
			}
		}
	}
	return userspace.LeafStatus{}
}

// counter reads one of the kernel's counters, 0 where it has none.
func (n *node) counter(ctx context.Context, name string) uint64 {
	s, err := n.status(ctx)
	if err != nil {
		return 0
	}
	for _, c := range s.GetCounters() {
		if c.GetName() == name {
			return c.GetValue()
		}
	}
	return 0
}

// kernelRefusals reads from the pins, which outlive the agent, how often the
// kernel refused for a reason.
func (n *node) kernelRefusals(reason flow.Reason) (uint64, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(n.pinDir(), "maps", "counters"), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return 0, fmt.Errorf("read counters of node %s: %w", n.name, err)
	}
	defer m.Close()
	var sum uint64
	for code := range uint8(events.ReasonCount) {
		if r, ok := events.ReasonOf(code); !ok || r != reason {
			continue
		}
		var perCPU []uint64
		if err := m.Lookup(uint32(code), &perCPU); err != nil {
			return 0, fmt.Errorf("read counters of node %s: %w", n.name, err)
		}
		for _, c := range perCPU {
			sum += c
		}
	}
	return sum, nil
}

// decidedByKernel says whether the kernel has refused for want of a listener
// since a count was taken.
func (n *node) decidedByKernel(before uint64) (string, error) {
	now, err := n.kernelRefusals(flow.ReasonListenerGone)
	if err != nil || now == before {
		return "", err
	}
	return flow.StageKernel.String(), nil
}

// sallyport runs a verb of the command line against this node's agent.
func (n *node) sallyport(ctx context.Context, args ...string) (string, error) {
	return command(ctx, append(args, "--control-socket", n.path("control.sock"))...)
}

// command runs this program and returns its standard output.
func command(ctx context.Context, args ...string) (string, error) {
	var errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("sallyport %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(errOut.Bytes()))
	}
	return string(out), err
}

// record is what the demo reads of a line of the decision log.
type record struct {
	RequestID string         `json:"requestID"`
	Client    netip.AddrPort `json:"client"`
	Address   netip.AddrPort `json:"address"`
	Decision  string         `json:"decision"`
	WouldDeny bool           `json:"wouldDeny"`
	Stage     string         `json:"stage"`
	Reason    string         `json:"reason"`
	Hook      string         `json:"hook"`
}

// decided waits for a line of the decision log, from the byte offset on, that
// fits, and returns it.
func (n *node) decided(ctx context.Context, offset int64, fits func(*record) bool) (*record, error) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for {
		b, err := os.ReadFile(n.path("decisions.json"))
		if err != nil {
			return nil, fmt.Errorf("read decision log of node %s: %w", n.name, err)
		}
		for l := range bytes.Lines(b[min(int(offset), len(b)):]) {
			var r record
			if json.Unmarshal(l, &r) == nil && fits(&r) {
				return &r, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, errors.New("no such decision in the log of node " + n.name)
		case <-time.After(pollInterval):
		}
	}
}

// logEnd is where the decision log ends now.
func (n *node) logEnd() int64 {
	info, err := os.Stat(n.path("decisions.json"))
	if err != nil {
		return 0
	}
	return info.Size()
}
