// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sallyport-dev/sallyport/agent/control"
	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/events"
	"github.com/sallyport-dev/sallyport/userspace"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const (
	// TrustDomain is that of every lab.
	TrustDomain = "demo.sallyport"
	// startTimeout bounds a node's way to ready: the relation store's first
	// migration on a busy machine included.
	startTimeout = 60 * time.Second
	// SettleTimeout bounds the way of a change through a running node.
	SettleTimeout = 15 * time.Second
	// PollInterval is between two looks at what changes.
	PollInterval = 20 * time.Millisecond
)

// NodeOptions say what a node is.
type NodeOptions struct {
	Name      string // also its namespace
	Ceiling   flow.Mode
	LeafTTL   time.Duration
	JoinToken string
	Policies  fs.FS  // policy files; JWKS_FILE in them stands for JWKS
	JWKS      string // file with the issuer's keys
}

// Node is one machine of the lab: an agent in its namespace with its own
// cgroup subtree, policies, state and pins.
type Node struct {
	Name    string
	LeafTTL time.Duration // of the next start
	TPM     string        // socket of a software TPM, "none" without
	Agent   *Process
	lab     *Lab
	dir     string
	cgroup  string
	config  string
	ceiling flow.Mode
	client  *control.Client
}

// NewNode makes a node that is not started.
func (l *Lab) NewNode(o NodeOptions) (*Node, error) {
	n := &Node{lab: l, Name: o.Name, dir: filepath.Join(l.Dir, o.Name), ceiling: o.Ceiling, LeafTTL: o.LeafTTL, TPM: "none"}
	if err := os.MkdirAll(n.Path("policies"), 0o755); err != nil {
		return nil, fmt.Errorf("make folder of node %s: %w", n.Name, err)
	}
	var err error
	if n.cgroup, err = l.AddCgroup(n.Name); err != nil {
		return nil, err
	}
	n.config = n.Path("agent.yaml")
	if err := os.WriteFile(n.Path("join-token"), []byte(o.JoinToken+"\n"), 0o600); err != nil {
		return nil, fmt.Errorf("write join token of node %s: %w", n.Name, err)
	}
	l.pinDirs = append(l.pinDirs, n.PinDir())
	return n, n.writePolicies(o.Policies, o.JWKS)
}

// Path is that of a file of the node.
func (n *Node) Path(name string) string { return filepath.Join(n.dir, name) }

// PinDir is where the node's agent pins.
func (n *Node) PinDir() string { return "/sys/fs/bpf/" + n.lab.name + "-" + n.Name }

// ID is the SPIFFE ID that a MachineIdentity of the lab has on this node.
func (n *Node) ID(identity string) string {
	return fmt.Sprintf("spiffe://%s/node/%s/ns/shop/%s", TrustDomain, n.Name, identity)
}

func (n *Node) writePolicies(files fs.FS, jwks string) error {
	return fs.WalkDir(files, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(files, p)
		if err != nil {
			return err
		}
		return os.WriteFile(n.Path(filepath.Join("policies", d.Name())), bytes.ReplaceAll(b, []byte("JWKS_FILE"), []byte(jwks)), 0o644)
	})
}

func (n *Node) writeConfig() error {
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
`, TrustDomain, n.Name, n.Path("policies"), n.Path("state"), n.PinDir(), n.Path("control.sock"), n.cgroup, n.TPM, n.LeafTTL,
		n.lab.authority, n.Path("join-token"), n.ceiling)
	if err := os.WriteFile(n.config, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write configuration of node %s: %w", n.Name, err)
	}
	return nil
}

// Start starts the agent and waits until it serves: policies in force,
// userspace there, nothing unhealthy.
func (n *Node) Start(ctx context.Context) error {
	if err := n.writeConfig(); err != nil {
		return err
	}
	decisions, err := os.OpenFile(n.Path("decisions.json"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open decision log of node %s: %w", n.Name, err)
	}
	defer decisions.Close()
	n.Agent, err = n.lab.Start(n.Name, n.cgroup, "agent-"+n.Name, decisions, n.lab.program, "agent", "--config", n.config)
	if err != nil {
		return err
	}
	return n.ready(ctx)
}

func (n *Node) ready(ctx context.Context) error {
	return n.Await(ctx, startTimeout, "be ready", func(s *controlpb.StatusReply) bool {
		return s.GetReady() && s.GetUserspace().GetReady() && s.GetPolicySet().GetGeneration() > 0
	})
}

// Await asks for the status until it is as wanted.
func (n *Node) Await(ctx context.Context, timeout time.Duration, what string, ok func(*controlpb.StatusReply) bool) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var last *controlpb.StatusReply
	var lastErr error
	for {
		last, lastErr = n.Status(ctx)
		if lastErr == nil && ok(last) {
			return nil
		}
		select {
		case <-n.Agent.Done:
			return fmt.Errorf("node %s to %s: its agent ended: %w\n%s", n.Name, what, n.Agent.Err, n.Agent.LastLines(5))
		case <-ctx.Done():
			return fmt.Errorf("node %s to %s: %w; last: %v\n%s", n.Name, what, errors.Join(ctx.Err(), lastErr), last.GetProblems(), n.Agent.LastLines(5))
		case <-time.After(PollInterval):
		}
	}
}

// Status asks the agent for its status.
func (n *Node) Status(ctx context.Context) (*controlpb.StatusReply, error) {
	c, err := n.control(ctx)
	if err != nil {
		return nil, err
	}
	return c.Status(ctx, &controlpb.StatusRequest{})
}

func (n *Node) control(ctx context.Context) (*control.Client, error) {
	if n.client != nil {
		return n.client, nil
	}
	c, err := control.Dial(ctx, n.Path("control.sock"))
	if err == nil {
		n.client = c
	}
	return c, err
}

// HangUp forgets the control connection, which ends with the agent.
func (n *Node) HangUp() {
	if n.client != nil {
		n.client.Close() //nolint:errcheck // its other end may be gone
		n.client = nil
	}
}

// Stop ends the agent as an operator would.
func (n *Node) Stop() {
	n.HangUp()
	if n.Agent != nil {
		n.Agent.Stop(15 * time.Second)
	}
}

// Thumbprint is that of the certificate which an identity has now.
func (n *Node) Thumbprint(ctx context.Context, identity string) (string, error) {
	var found string
	err := n.Await(ctx, SettleTimeout, "have a certificate of "+identity, func(s *controlpb.StatusReply) bool {
		found = LeafOf(s, n.ID(identity)).Thumbprint
		return found != ""
	})
	return found, err
}

// LeafOf is what a status says of the certificate of an ID.
func LeafOf(s *controlpb.StatusReply, id string) userspace.LeafStatus {
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

// Counter reads one of the kernel's counters, 0 where it has none.
func (n *Node) Counter(ctx context.Context, name string) uint64 {
	s, err := n.Status(ctx)
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

// KernelRefusals reads from the pins, which outlive the agent, how often the
// kernel refused for a reason.
func (n *Node) KernelRefusals(reason flow.Reason) (uint64, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(n.PinDir(), "maps", "counters"), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return 0, fmt.Errorf("read counters of node %s: %w", n.Name, err)
	}
	defer m.Close()
	var sum uint64
	for code := range uint8(events.ReasonCount) {
		if r, ok := events.ReasonOf(code); !ok || r != reason {
			continue
		}
		var perCPU []uint64
		if err := m.Lookup(uint32(code), &perCPU); err != nil {
			return 0, fmt.Errorf("read counters of node %s: %w", n.Name, err)
		}
		for _, c := range perCPU {
			sum += c
		}
	}
	return sum, nil
}

// DecidedByKernel says whether the kernel has refused for want of a listener
// since a count was taken.
func (n *Node) DecidedByKernel(before uint64) (string, error) {
	now, err := n.KernelRefusals(flow.ReasonListenerGone)
	if err != nil || now == before {
		return "", err
	}
	return flow.StageKernel.String(), nil
}

// Sallyport runs a verb of the command line against this node's agent.
func (n *Node) Sallyport(ctx context.Context, args ...string) (string, error) {
	return n.lab.Command(ctx, append(args, "--control-socket", n.Path("control.sock"))...)
}

// Record is what is read of a line of the decision log.
type Record struct {
	RequestID string         `json:"requestID"`
	Client    netip.AddrPort `json:"client"`
	Address   netip.AddrPort `json:"address"`
	Decision  string         `json:"decision"`
	WouldDeny bool           `json:"wouldDeny"`
	Stage     string         `json:"stage"`
	Reason    string         `json:"reason"`
	Hook      string         `json:"hook"`
}

// Decided waits for a line of the decision log, from the byte offset on, that
// fits, and returns it.
func (n *Node) Decided(ctx context.Context, offset int64, fits func(*Record) bool) (*Record, error) {
	ctx, cancel := context.WithTimeout(ctx, SettleTimeout)
	defer cancel()
	for {
		b, err := os.ReadFile(n.Path("decisions.json"))
		if err != nil {
			return nil, fmt.Errorf("read decision log of node %s: %w", n.Name, err)
		}
		for l := range bytes.Lines(b[min(int(offset), len(b)):]) {
			var r Record
			if json.Unmarshal(l, &r) == nil && fits(&r) {
				return &r, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, errors.New("no such decision in the log of node " + n.Name)
		case <-time.After(PollInterval):
		}
	}
}

// LogEnd is where the decision log ends now.
func (n *Node) LogEnd() int64 {
	info, err := os.Stat(n.Path("decisions.json"))
	if err != nil {
		return 0
	}
	return info.Size()
}
