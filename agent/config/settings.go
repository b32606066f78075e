// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// setting is one value of the configuration.
type setting struct {
	key  string // in the file; a dot is one level
	help string
	list bool // a sequence in the file, comma-separated elsewhere
	set  func(*Config, string) error
	// setList is for a list, in place of set.
	setList func(*Config, []string) error
	bool    bool // the flag needs no value
}

var settings = []setting{
	{key: "trustDomain", help: "trust domain of this node's identities", set: into(func(c *Config) *string { return &c.TrustDomain }, trustDomain)},
	{key: "node", help: "name of this node (default: the host's)", set: into(func(c *Config) *string { return &c.Node }, nodeName)},
	{key: "policyDir", help: "watched directory of policies", set: into(func(c *Config) *string { return &c.PolicyDir }, absolute)},
	{key: "stateDir", help: "directory of the node key, relations, baselines and revocations", set: into(func(c *Config) *string { return &c.StateDir }, absolute)},
	{key: "pinDir", help: "directory in bpffs for links and maps", set: into(func(c *Config) *string { return &c.PinDir }, absolute)},
	{key: "controlSocket", help: "unix socket of the control API", set: into(func(c *Config) *string { return &c.ControlSocket }, absolute)},
	{key: "listen.metrics", help: "address of /metrics, /healthz and /readyz", set: into(func(c *Config) *netip.AddrPort { return &c.Listen.Metrics }, addrPort)},
	{key: "listen.outbound", help: "port of the outbound listeners", set: into(func(c *Config) *uint16 { return &c.Listen.Outbound }, port)},
	{key: "listen.inbound", help: "port of the inbound listeners", set: into(func(c *Config) *uint16 { return &c.Listen.Inbound }, port)},
	{key: "listen.tunnel", help: "port of the tunnel listeners", set: into(func(c *Config) *uint16 { return &c.Listen.Tunnel }, port)},
	{key: "kernel.cgroupRoot", help: "subtree of cgroup2 to look after (default: all)", set: into(func(c *Config) *string { return &c.Kernel.CgroupRoot }, optional(absolute))},
	{key: "kernel.interfaces", help: "interfaces to sample and guard, or auto", list: true, setList: interfaces},
	{key: "identity.source", help: "where identities come from: embedded or authority", set: into(func(c *Config) *string { return &c.Identity.Source }, oneOf("embedded", "authority"))},
	{key: "identity.tpm", help: "TPM that holds the node key: auto, none, or a device or socket", set: into(func(c *Config) *string { return &c.Identity.TPM }, tpm)},
	{key: "identity.requireTPM", help: "refuse to start with a software key", bool: true, set: into(func(c *Config) *bool { return &c.Identity.RequireTPM }, boolean)},
	{key: "identity.authority.address", help: "address of the authority, HOST:PORT", set: into(func(c *Config) *string { return &c.Identity.Authority.Address }, optional(hostPort))},
	{key: "identity.authority.token", help: "join token, or the path of the file that holds it", set: into(func(c *Config) *Secret { return &c.Identity.Authority.Token }, secret)},
	{key: "identity.bundles", help: "roots of other trust domains, DOMAIN=FILE each", list: true, setList: bundles},
	{key: "identity.leafTTL", help: "lifetime of a workload's certificate", set: into(func(c *Config) *time.Duration { return &c.Identity.LeafTTL }, duration(2*time.Second, 24*time.Hour))},
	{key: "relation.engine", help: "engine of relations: embedded", set: into(func(c *Config) *string { return &c.Relation.Engine }, oneOf("embedded"))},
	{key: "relation.address", help: "address of a relation engine elsewhere", set: into(func(c *Config) *string { return &c.Relation.Address }, optional(notSupported))},
	{key: "modeCeiling", help: "strictest mode of any policy: observe, audit or enforce", set: into(func(c *Config) *flow.Mode { return &c.ModeCeiling }, mode)},
	{key: "log.level", help: "debug, info, warn or error", set: into(func(c *Config) *slog.Level { return &c.Log.Level }, level)},
	{key: "log.format", help: "json or text", set: into(func(c *Config) *string { return &c.Log.Format }, oneOf("json", "text"))},
	{key: "userspace.user", help: "user of the proxy's process, by name or number", set: into(func(c *Config) *string { return &c.Userspace.User }, userName)},
	{key: "userspace.loops", help: "event loops of the proxy (0: one a core)", set: into(func(c *Config) *int { return &c.Userspace.Loops }, count(1024))},
	{key: "userspace.goroutines", help: "run the proxy on goroutines in place of event loops", bool: true, set: into(func(c *Config) *bool { return &c.Userspace.Goroutines }, boolean)},
}

func settingOf(key string) *setting {
	i := slices.IndexFunc(settings, func(s setting) bool { return s.key == key })
	if i < 0 {
		return nil
	}
	return &settings[i]
}

// words splits a key at dots and humps: identity.leafTTL is identity, leaf,
// TTL.
func (s *setting) words(sep string) string {
	return hump.ReplaceAllString(strings.ReplaceAll(s.key, ".", sep), "${1}"+sep+"${2}")
}

var hump = regexp.MustCompile(`([a-z])([A-Z])`)

func (s *setting) env() string  { return "SALLYPORT_" + strings.ToUpper(s.words("_")) }
func (s *setting) flag() string { return strings.ToLower(s.words("-")) }

// AddFlags adds a flag for each value to f.
func AddFlags(f *pflag.FlagSet) {
	for i := range settings {
		s := &settings[i]
		if s.bool {
			f.Bool(s.flag(), false, s.help)
		} else {
			f.String(s.flag(), "", s.help)
		}
	}
}

// Given returns the flags of AddFlags that were given, as Sources wants them.
func Given(f *pflag.FlagSet) map[string]string {
	given := map[string]string{}
	for i := range settings {
		if fl := f.Lookup(settings[i].flag()); fl != nil && fl.Changed {
			given[settings[i].key] = fl.Value.String()
		}
	}
	return given
}

// into makes a setting's set from where its value goes and how it is read.
func into[T any](field func(*Config) *T, parse func(string) (T, error)) func(*Config, string) error {
	return func(c *Config, text string) error {
		v, err := parse(text)
		if err == nil {
			*field(c) = v
		}
		return err
	}
}

func optional(parse func(string) (string, error)) func(string) (string, error) {
	return func(s string) (string, error) {
		if s == "" {
			return "", nil
		}
		return parse(s)
	}
}

func oneOf(words ...string) func(string) (string, error) {
	return func(s string) (string, error) {
		if !slices.Contains(words, s) {
			return "", fmt.Errorf("%q is not one of %s", s, strings.Join(words, ", "))
		}
		return s, nil
	}
}

func notSupported(string) (string, error) {
	return "", fmt.Errorf("is not supported by this version")
}

func absolute(s string) (string, error) {
	if !filepath.IsAbs(s) || filepath.Clean(s) != s || strings.ContainsRune(s, 0) {
		return "", fmt.Errorf("%q is not a clean absolute path", s)
	}
	return s, nil
}

// trustDomain checks against the SPIFFE ID specification, section 2.1.
func trustDomain(s string) (string, error) {
	if !regexp.MustCompile(`^[a-z0-9._-]{1,255}$`).MatchString(s) {
		return "", fmt.Errorf("%q is not a trust domain: 1 to 255 of a-z, 0-9, '.', '-', '_'", s)
	}
	return s, nil
}

// nodeName is a segment of derived SPIFFE IDs.
func nodeName(s string) (string, error) {
	if !regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,251}[a-z0-9])?$`).MatchString(s) {
		return "", fmt.Errorf("%q is not a node name: letters a-z, digits, and '.', '-', '_' between them", s)
	}
	return s, nil
}

func addrPort(s string) (netip.AddrPort, error) {
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Port() == 0 {
		return a, fmt.Errorf("%q is not ADDRESS:PORT", s)
	}
	return a, nil
}

func hostPort(s string) (string, error) {
	i := strings.LastIndexByte(s, ':')
	if i <= 0 {
		return "", fmt.Errorf("%q is not HOST:PORT", s)
	}
	if _, err := port(s[i+1:]); err != nil {
		return "", fmt.Errorf("%q is not HOST:PORT", s)
	}
	return s, nil
}

func port(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is not a port: 1 to 65535", s)
	}
	return uint16(n), nil
}

func count(most int) func(string) (int, error) {
	return func(s string) (int, error) {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 || n > most {
			return 0, fmt.Errorf("%q is not a number from 0 to %d", s, most)
		}
		return n, nil
	}
}

func boolean(s string) (bool, error) {
	switch s {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, fmt.Errorf("%q is neither true nor false", s)
}

func duration(least, most time.Duration) func(string) (time.Duration, error) {
	return func(s string) (time.Duration, error) {
		d, err := time.ParseDuration(s)
		if err != nil || d < least || d > most {
			return 0, fmt.Errorf("%q is not a duration from %s to %s", s, least, most)
		}
		return d, nil
	}
}

func mode(s string) (flow.Mode, error) {
	m, ok := flow.ParseMode(s)
	if !ok {
		return m, fmt.Errorf("%q is not one of observe, audit, enforce", s)
	}
	return m, nil
}

func level(s string) (slog.Level, error) {
	switch s {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("%q is not one of debug, info, warn, error", s)
}

func tpm(s string) (string, error) {
	if s == "auto" || s == "none" {
		return s, nil
	}
	if _, err := absolute(s); err != nil {
		return "", fmt.Errorf("%q is not auto, none, or the absolute path of a device or socket", s)
	}
	return s, nil
}

func userName(s string) (string, error) {
	if s == "" || len(s) > 64 || s == "root" || strings.Trim(s, "0") == "" {
		return "", fmt.Errorf("%q is not a user for the proxy: any but root", s)
	}
	return s, nil
}

// secret does not repeat in its error what was given.
func secret(s string) (Secret, error) {
	if len(s) > maxToken {
		return "", fmt.Errorf("longer than %d bytes", maxToken)
	}
	return Secret(s), nil
}

func interfaces(c *Config, names []string) error {
	if len(names) == 0 || slices.Contains(names, "auto") && len(names) > 1 {
		return fmt.Errorf("name interfaces, or \"auto\" alone")
	}
	for _, n := range names {
		if n == "" || len(n) > 15 || strings.ContainsAny(n, "/ \t\n") {
			return fmt.Errorf("%q is not the name of an interface", n)
		}
	}
	c.Kernel.Interfaces = names
	return nil
}

func bundles(c *Config, entries []string) error {
	c.Identity.Bundles = nil
	for _, e := range entries {
		domain, file, ok := strings.Cut(e, "=")
		if !ok {
			return fmt.Errorf("%q is not DOMAIN=FILE", e)
		}
		if _, err := trustDomain(domain); err != nil {
			return err
		}
		if _, err := absolute(file); err != nil {
			return err
		}
		c.Identity.Bundles = append(c.Identity.Bundles, Bundle{domain, file})
	}
	return nil
}
