// SPDX-License-Identifier: Apache-2.0

// Package config reads the agent's configuration: flags over environment over
// /etc/sallyport/agent.yaml, each of them optional. One table (settings.go)
// says for each value its key in the file, and with it its variable and flag:
// listen.metrics is SALLYPORT_LISTEN_METRICS and --listen-metrics.
package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// DefaultFile is where the file is looked for.
const DefaultFile = "/etc/sallyport/agent.yaml"

const (
	maxFile  = 1 << 20
	maxToken = 4096
)

// Config is the agent's configuration, complete and validated.
type Config struct {
	TrustDomain   string
	Node          string // default: the host's name
	PolicyDir     string
	StateDir      string
	PinDir        string
	ControlSocket string
	Listen        Listen
	Kernel        Kernel
	Identity      Identity
	Relation      Relation
	ModeCeiling   flow.Mode
	Log           Log
	Userspace     Userspace
}

// Listen says where the agent and the proxy listen.
type Listen struct {
	Metrics                   netip.AddrPort
	Outbound, Inbound, Tunnel uint16 // in each enforced namespace
}

// Kernel narrows what the kernel half is attached to.
type Kernel struct {
	CgroupRoot string   // a subtree of cgroup2, "" for all of it
	Interfaces []string // names, or "auto" alone: those that carry workloads' traffic
}

// Bundle says where the roots of another trust domain are.
type Bundle struct {
	Domain string
	File   string // PEM, absolute
}

// Identity says where identities come from.
type Identity struct {
	Source string // embedded | authority
	TPM    string // auto | none | the path of a device or of swtpm's socket
	// RequireTPM refuses to start with a software key.
	RequireTPM bool
	Authority  Authority
	Bundles    []Bundle // roots of other trust domains
	LeafTTL    time.Duration
}

// Domains are the trust domains besides its own whose roots the node has.
func (i *Identity) Domains() []string {
	list := []string{}
	for _, b := range i.Bundles {
		list = append(list, b.Domain)
	}
	return list
}

// Authority is the small fleet's CA.
type Authority struct {
	Address string
	Token   Secret // a join token, or the absolute path of a file that holds it
}

// Relation says where relations are kept.
type Relation struct {
	Engine  string
	Address string
}

// Log says how the log is written.
type Log struct {
	Level  slog.Level
	Format string // json | text
}

// Userspace says how the unprivileged process runs.
type Userspace struct {
	User       string // a name or number; "auto": sallyport where there is one, else one of its own, by number
	Loops      int    // 0: one a core
	Goroutines bool   // goroutines in place of the event loops
}

// Secret is a value that is never shown.
type Secret string

// String says only whether there is one.
func (s Secret) String() string {
	if s == "" {
		return "none"
	}
	return "(set)"
}

// LogValue is String, for log/slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText is String, for JSON.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// GoString is String, for %#v.
func (s Secret) GoString() string { return s.String() }

// Sources are what the configuration is made of, weakest first.
type Sources struct {
	Hostname string
	File     string // named in problems
	Content  []byte // of the file
	Env      []string
	Flags    map[string]string // key in the file -> value, of the flags that were given
}

// Load makes the configuration. Every problem is returned, in the order of
// the file; with an error among them the Config is nil.
func Load(s Sources) (*Config, []load.Problem) {
	c := Defaults(s.Hostname)
	r := reader{config: c, from: map[string]load.Position{}}
	r.file(s.File, s.Content)
	r.env(s.Env)
	r.flags(s.Flags)
	r.validate()
	problems := load.Sort(r.problems)
	if load.HasErrors(problems) {
		return nil, problems
	}
	return c, problems
}

// ReadFile returns the content of the file at path, nil where the default
// file is not there.
func ReadFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) && path == DefaultFile {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("read configuration %s: more than %d bytes", path, maxFile)
	}
	return b, nil
}

// Defaults is the configuration of a host without any setting.
func Defaults(hostname string) *Config {
	return &Config{
		TrustDomain:   "sallyport.local",
		Node:          strings.ToLower(hostname),
		PolicyDir:     "/etc/sallyport/policies",
		StateDir:      "/var/lib/sallyport",
		PinDir:        "/sys/fs/bpf/sallyport",
		ControlSocket: "/run/sallyport/control.sock",
		Listen: Listen{
			Metrics:  netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 15020),
			Outbound: 15001, Inbound: 15006, Tunnel: 15008,
		},
		Kernel:      Kernel{Interfaces: []string{"auto"}},
		Identity:    Identity{Source: "embedded", TPM: "auto", LeafTTL: 10 * time.Minute},
		Relation:    Relation{Engine: "embedded"},
		ModeCeiling: flow.ModeEnforce,
		Log:         Log{Level: slog.LevelInfo, Format: "json"},
		Userspace:   Userspace{User: "auto"},
	}
}
