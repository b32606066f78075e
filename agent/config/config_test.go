// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// whole sets every value to another than its default.
const whole = `
trustDomain: example.org
node: n1
policyDir: /p
stateDir: /s
pinDir: /sys/fs/bpf/x
controlSocket: /run/x.sock
listen: {metrics: "127.0.0.1:16020", outbound: 16001, inbound: 16006, tunnel: 16008}
kernel:
  cgroupRoot: /test
  interfaces: [eth0, lo]
identity:
  source: authority
  tpm: /run/swtpm.sock
  requireTPM: true
  authority: {address: "ca.example.org:8443", token: /etc/token}
  bundles: [b.example=/etc/b.pem]
  leafTTL: 2s
relation: {engine: embedded, address: ""}
modeCeiling: audit
log: {level: debug, format: text}
userspace: {user: "1234", loops: 3, goroutines: true}
`

// documented is the file as the documentation shows it, every line with its
// default.
const documented = `
trustDomain: sallyport.local
node: host-1                        # default: the host's name
policyDir: /etc/sallyport/policies
stateDir: /var/lib/sallyport
pinDir: /sys/fs/bpf/sallyport
controlSocket: /run/sallyport/control.sock
listen: {metrics: "127.0.0.1:15020", outbound: 15001, inbound: 15006, tunnel: 15008}
kernel: {cgroupRoot: "", interfaces: [auto]}
identity: {source: embedded, tpm: auto, authority: {address: "", token: ""}, bundles: []}
relation: {engine: embedded, address: ""}
modeCeiling: enforce
log: {level: info, format: json}
`

func TestDocumentedFileIsTheDefaults(t *testing.T) {
	c, problems := parse(t, Sources{File: "agent.yaml", Content: []byte(documented)})
	if problems != "" {
		t.Fatal(problems)
	}
	want, _ := parse(t, Sources{})
	c.Identity.Bundles = want.Identity.Bundles // empty either way
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func parse(t *testing.T, s Sources) (*Config, string) {
	t.Helper()
	if s.Hostname == "" {
		s.Hostname = "Host-1"
	}
	c, problems := Load(s)
	var lines []string
	for _, p := range problems {
		lines = append(lines, p.String())
	}
	return c, strings.Join(lines, "\n")
}

func TestDefaults(t *testing.T) {
	c, problems := parse(t, Sources{})
	if problems != "" {
		t.Fatal(problems)
	}
	want := Config{TrustDomain: "sallyport.local", Node: "host-1", PolicyDir: "/etc/sallyport/policies", StateDir: "/var/lib/sallyport",
		PinDir: "/sys/fs/bpf/sallyport", ControlSocket: "/run/sallyport/control.sock", ModeCeiling: flow.ModeEnforce}
	got := *c
	if got.Listen.Metrics.String() != "127.0.0.1:15020" || got.Listen.Outbound != 15001 || got.Listen.Inbound != 15006 || got.Listen.Tunnel != 15008 {
		t.Errorf("listen %+v", got.Listen)
	}
	if got.Identity.Source != "embedded" || got.Identity.TPM != "auto" || got.Identity.LeafTTL != 10*time.Minute {
		t.Errorf("identity %+v", got.Identity)
	}
	if got.Relation.Engine != "embedded" || got.Log.Format != "json" || got.Userspace.User != "auto" || fmt.Sprint(got.Kernel.Interfaces) != "[auto]" {
		t.Errorf("got %+v", got)
	}
	got.Listen, got.Identity, got.Relation, got.Log, got.Userspace, got.Kernel = want.Listen, want.Identity, want.Relation, want.Log, want.Userspace, want.Kernel
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

func TestWholeFile(t *testing.T) {
	c, problems := parse(t, Sources{File: "agent.yaml", Content: []byte(whole)})
	if problems != "" {
		t.Fatal(problems)
	}
	r := reader{config: Defaults("x"), from: map[string]load.Position{}}
	r.file("agent.yaml", []byte(whole))
	for _, s := range settings {
		if _, ok := r.from[s.key]; !ok {
			t.Errorf("%s: not in the test's file", s.key)
		}
	}
	if c.Node != "n1" || c.Kernel.CgroupRoot != "/test" || c.Identity.Authority.Token != "/etc/token" || c.Userspace.Loops != 3 ||
		!c.Userspace.Goroutines || c.ModeCeiling != flow.ModeAudit || c.Identity.LeafTTL != 2*time.Second || c.Listen.Tunnel != 16008 {
		t.Errorf("got %+v", c)
	}
}

func TestFlagsOverEnvironmentOverFile(t *testing.T) {
	f := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	AddFlags(f)
	if err := f.Parse([]string{"--node=flag", "--userspace-goroutines", "--kernel-interfaces=a,b"}); err != nil {
		t.Fatal(err)
	}
	c, problems := parse(t, Sources{
		File: "agent.yaml", Content: []byte("{node: file, trustDomain: file.org, stateDir: /file}"),
		Env:   []string{"SALLYPORT_NODE=env", "SALLYPORT_TRUST_DOMAIN=env.org", "HOME=/", "SALLYPORT_IDENTITY_LEAF_TTL=3s"},
		Flags: Given(f),
	})
	if problems != "" {
		t.Fatal(problems)
	}
	if c.Node != "flag" || c.TrustDomain != "env.org" || c.StateDir != "/file" || !c.Userspace.Goroutines ||
		fmt.Sprint(c.Kernel.Interfaces) != "[a b]" || c.Identity.LeafTTL != 3*time.Second {
		t.Errorf("got %+v", c)
	}
}

func TestProblems(t *testing.T) {
	cases := []struct {
		name, yaml, want string
		env              []string
		flags            map[string]string
	}{
		{"unknown key", "trustdomain: x", `agent.yaml:1:1: unknown key "trustdomain" (did you mean "trustDomain"?)`, nil, nil},
		{"unknown key below", "log:\n  levl: info", `agent.yaml:2:3: unknown key "log.levl" (did you mean "log.level"?)`, nil, nil},
		{"unknown group", "kernal: {cgroupRoot: /x}", `agent.yaml:1:1: unknown key "kernal" (did you mean "kernel"?)`, nil, nil},
		{"twice", "node: a\nnode: b", `agent.yaml:2:1: "node" is set twice; first at agent.yaml:1:1`, nil, nil},
		{"all at once", "node: _\nlog: {level: loud, format: xml}", "agent.yaml:1:7: node: \"_\" is not a node name: letters a-z, digits, and '.', '-', '_' between them\n" +
			"agent.yaml:2:14: log.level: \"loud\" is not one of debug, info, warn, error\n" +
			"agent.yaml:2:28: log.format: \"xml\" is not one of json, text", nil, nil},
		{"not YAML", "a: [", `agent.yaml:1: did not find expected node content`, nil, nil},
		{"two documents", "node: a\n---\nnode: b", `agent.yaml:2:1: one document is all that is read`, nil, nil},
		{"an alias", "node: &n a\nstateDir: *n", `agent.yaml:2:11: stateDir: one value is needed`, nil, nil},
		{"a list", "- a", `agent.yaml:1:1: the file: keys and values are needed`, nil, nil},
		{"a group without keys", "listen: 80", `agent.yaml:1:9: listen: keys and values are needed`, nil, nil},
		{"a value with keys", "node: {a: b}", `agent.yaml:1:7: node: one value is needed`, nil, nil},
		{"not a list", "kernel: {interfaces: eth0}", `agent.yaml:1:22: kernel.interfaces: a list is needed: [...]`, nil, nil},
		{"auto and more", "kernel: {interfaces: [auto, eth0]}", `agent.yaml:1:22: kernel.interfaces: name interfaces, or "auto" alone`, nil, nil},
		{"yes", "userspace: {goroutines: yes}", `agent.yaml:1:25: userspace.goroutines: yes is read differently by different YAML readers: quote it`, nil, nil},
		{"port", "listen: {tunnel: 0}", `agent.yaml:1:18: listen.tunnel: "0" is not a port: 1 to 65535`, nil, nil},
		{"same port", "listen: {tunnel: 15001}", `agent.yaml:1:18: listen.tunnel: port 15001 is another listener's already`, nil, nil},
		{"relative", "stateDir: state", `agent.yaml:1:11: stateDir: "state" is not a clean absolute path`, nil, nil},
		{"dots", "stateDir: /var/../etc", `agent.yaml:1:11: stateDir: "/var/../etc" is not a clean absolute path`, nil, nil},
		{"mode", "modeCeiling: strict", `agent.yaml:1:14: modeCeiling: "strict" is not one of observe, audit, enforce`, nil, nil},
		{"trust domain", "trustDomain: Example.org", `agent.yaml:1:14: trustDomain: "Example.org" is not a trust domain: 1 to 255 of a-z, 0-9, '.', '-', '_'`, nil, nil},
		{"short leaf", "identity: {leafTTL: 1s}", `agent.yaml:1:21: identity.leafTTL: "1s" is not a duration from 2s to 24h0m0s`, nil, nil},
		{"source without address", "identity: {source: authority}", `agent.yaml:1:20: identity.authority.address: needed with source: authority`, nil, nil},
		{"address without source", `identity: {authority: {address: "a:1"}}`, `agent.yaml:1:33: identity.authority.address: has no effect with source: embedded; write source: authority`, nil, nil},
		{"remote relations", `relation: {address: "a:1"}`, `agent.yaml:1:21: relation.address: is not supported by this version`, nil, nil},
		{"root", "userspace: {user: root}", `agent.yaml:1:19: userspace.user: "root" is not a user for the proxy: any but root`, nil, nil},
		{"uid 0", "userspace: {user: 00}", `agent.yaml:1:19: userspace.user: "00" is not a user for the proxy: any but root`, nil, nil},
		{"variable", "", `$SALLYPORT_LISTEN_TUNNEL: listen.tunnel: "x" is not a port: 1 to 65535`, []string{"SALLYPORT_LISTEN_TUNNEL=x"}, nil},
		{"unknown variable", "", `warning: $SALLYPORT_LISTEN_TUNEL: no setting has that variable (did you mean SALLYPORT_LISTEN_TUNNEL?)`, []string{"SALLYPORT_LISTEN_TUNEL=1"}, nil},
		{"flag", "", `--log-level: log.level: "x" is not one of debug, info, warn, error`, nil, map[string]string{"log.level": "x"}},
		{"token on the command line", "", `--identity-authority-token: name a file: everybody on this machine can read a command line`, nil, map[string]string{"identity.authority.token": "sjt1.secret"}},
		{"metrics for all", `listen: {metrics: "0.0.0.0:1"}`, `warning: agent.yaml:1:19: listen.metrics: 0.0.0.0:1 can be reached from other hosts, without any authentication`, nil, nil},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got, problems := parse(t, Sources{File: "agent.yaml", Content: []byte(c.yaml), Env: c.env, Flags: c.flags})
			if problems != c.want {
				t.Errorf("got\n%s\nwant\n%s", problems, c.want)
			}
			if warn := strings.HasPrefix(c.want, "warning: "); warn != (got != nil) {
				t.Errorf("config %v", got)
			}
		})
	}
	if _, problems := parse(t, Sources{Hostname: "my host"}); !strings.Contains(problems, `node: the host's name "my host" cannot name a node`) {
		t.Errorf("host name: %s", problems)
	}
}

func TestSecretIsNeverShown(t *testing.T) {
	c, problems := parse(t, Sources{File: "a", Content: []byte("identity: {source: authority, authority: {address: 'a:1', token: sjt1.hidden}}")})
	if problems != "" {
		t.Fatal(problems)
	}
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{fmt.Sprintf("%v %+v %#v %s", c, c, c, c.Identity.Authority.Token), string(b)} {
		if strings.Contains(s, "hidden") {
			t.Errorf("shown: %s", s)
		}
	}
}

func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadFile(filepath.Join(dir, "none")); err == nil {
		t.Error("a file that was asked for and is not there")
	}
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, make([]byte, maxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadFile(big); err == nil {
		t.Error("a huge file was read")
	}
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte("a: &a [*a, *a]"))
	f.Add([]byte("{node: &n x, trustDomain: *n}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, problems := Load(Sources{Hostname: "h", File: "f", Content: b})
		if (c == nil) != load.HasErrors(problems) {
			t.Fatalf("config %v with %v", c, problems)
		}
	})
}
