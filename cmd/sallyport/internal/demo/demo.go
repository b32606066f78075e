// SPDX-License-Identifier: Apache-2.0

// Package demo runs two nodes on one machine and judges, case by case, what
// real programs saw: the client, the server, or a squatter, never the agent
// alone.
package demo

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/sallyport-dev/sallyport/cmd/sallyport/internal/lab"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

const (
	authorityHost    = "10.77.1.2"
	authorityAddress = authorityHost + ":15443"
	nodeB            = "10.77.1.2"
	nodeB6           = "[fd77:1::2]"
	paymentsURL      = "http://" + nodeB + ":8080"
	catalogURL       = "http://" + nodeB + ":8081"
	ledgerAddr       = nodeB + ":9090"
	vaultAddr        = nodeB + ":7070"
)

// Options of Run.
type Options struct {
	Out      io.Writer
	JSON     bool
	Ceiling  flow.Mode
	KeepLogs bool
}

// demo is one run.
type demo struct {
	o         Options
	lab       *lab.Lab
	issuer    *lab.Issuer
	a, b      *lab.Node
	apps      map[string]*application
	processes []*lab.Process
	passed    int
	failed    int
}

// Run runs the demo and says whether every case passed. It cleans up whatever
// happens, also when ctx ends.
func Run(ctx context.Context, o Options) (passed bool, err error) {
	// A broken pipe is an error of a write and not the end of the process.
	signal.Ignore(syscall.SIGPIPE)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	o.Out = endOnError{o.Out, cancel}
	d := &demo{o: o, apps: map[string]*application{}}
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.open(ctx); err != nil {
		return false, err
	}
	for _, c := range cases {
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		d.run(ctx, c)
	}
	d.summary()
	return d.failed == 0, nil
}

// scenario is one case: how it is tried, what the programs have to see, and
// where it has to be decided ("" where nothing decides).
type scenario struct {
	name     string
	expected string
	decided  string
	try      func(context.Context, *demo) (got, decidedBy string, err error)
}

// outcome is a line of -o json.
type outcome struct {
	Case      string `json:"case"`
	Expected  string `json:"expected"`
	Got       string `json:"got"`
	DecidedBy string `json:"decidedBy"`
	Pass      bool   `json:"pass"`
}

func (d *demo) run(ctx context.Context, c scenario) {
	got, by, err := c.try(ctx, d)
	if err != nil {
		got = strings.TrimSpace(got + " error: " + err.Error())
	}
	r := outcome{c.name, c.expected, got, by, err == nil && got == c.expected && by == c.decided}
	if r.Pass {
		d.passed++
	} else {
		d.failed++
	}
	if d.o.JSON {
		d.writeJSON(r)
		return
	}
	mark := "ok  "
	if !r.Pass {
		mark = "FAIL"
	}
	line := fmt.Sprintf("%s %-74s %s", mark, r.Case, r.Got)
	if !r.Pass {
		line += fmt.Sprintf("\n     expected %s, decided by %s", r.Expected, orNobody(c.decided))
	}
	fmt.Fprintf(d.o.Out, "%s  [%s]\n", line, orNobody(r.DecidedBy))
}

func orNobody(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (d *demo) writeJSON(v any) {
	e := json.NewEncoder(d.o.Out)
	e.SetEscapeHTML(false)
	e.Encode(v) //nolint:errcheck // standard output is gone
}

func (d *demo) summary() {
	if d.o.JSON {
		d.writeJSON(map[string]any{"summary": map[string]int{"passed": d.passed, "failed": d.failed}})
		return
	}
	fmt.Fprintf(d.o.Out, "%d passed, %d failed\n", d.passed, d.failed)
}

// say tells a person what is going on.
func (d *demo) say(format string, args ...any) {
	if !d.o.JSON {
		fmt.Fprintf(d.o.Out, format+"\n", args...)
	}
}

//go:embed policies/*.yaml
var policyFiles embed.FS

// openLab makes the namespaces a, b and x (a stranger) and the links a-b and
// x-b between them, over IPv4 and IPv6.
func openLab() (*lab.Lab, error) {
	l, err := lab.New("sallyport-demo", "/proc/self/exe")
	if err != nil {
		return nil, err
	}
	for _, s := range []string{"a", "b", "x"} {
		if err := l.AddSpace(s); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	if err := errors.Join(l.Link("a", "b", 1), l.Link("x", "b", 3)); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// open brings both nodes up with their applications.
func (d *demo) open(ctx context.Context) error {
	var err error
	if d.lab, err = openLab(); err != nil {
		return err
	}
	if d.issuer, err = lab.NewIssuer(); err != nil {
		return err
	}
	jwks := filepath.Join(d.lab.Dir, "jwks.json")
	if err := d.issuer.Publish(jwks); err != nil {
		return err
	}
	if err := d.openAuthority(ctx, jwks); err != nil {
		return err
	}
	if err := d.openTPM(ctx); err != nil {
		return err
	}
	// A stranger takes the vault's port before node b's agent starts.
	if err := d.app("b", "", "early-squatter"); err != nil {
		return err
	}
	if r := d.apps["early-squatter"].do(appRequest{Op: "serve", Kind: "tcp", Addr: "0.0.0.0:7070"}); r.Err != "" {
		return fmt.Errorf("squat on the vault's port: %s", r.Err)
	}
	for _, n := range []*lab.Node{d.b, d.a} {
		if err := n.Start(ctx); err != nil {
			return err
		}
	}
	d.say("node a: anchor %s, node b: anchor %s; trust domain %s, one authority", anchorWord(d.a), "software", lab.TrustDomain)
	for _, w := range []struct{ space, name string }{
		{"a", "checkout"}, {"a", "reports"}, {"a", "nobody"},
		{"b", "payments"}, {"b", "catalog"}, {"b", "ledger"}, {"b", "auditor"}, {"b", "nobody-b"},
	} {
		if err := d.app(w.space, w.name, w.name); err != nil {
			return err
		}
	}
	for _, s := range []struct{ space, name string }{{"a", "outsider-a"}, {"b", "outsider-b"}, {"x", "stranger"}} {
		if err := d.app(s.space, "", s.name); err != nil {
			return err
		}
	}
	return d.openServers(ctx)
}

func anchorWord(n *lab.Node) string {
	if n.TPM == "none" {
		return "software"
	}
	return "tpm"
}

// openAuthority starts the shared CA and makes a join token for each node. The
// one of node a does not name the ID of reports.
func (d *demo) openAuthority(ctx context.Context, jwks string) error {
	policies, err := fs.Sub(policyFiles, "policies")
	if err != nil {
		return fmt.Errorf("read policies: %w", err)
	}
	tokenA, err := d.lab.JoinToken(ctx, "a", "checkout")
	if err != nil {
		return err
	}
	tokenB, err := d.lab.JoinToken(ctx, "b", "payments", "catalog", "ledger", "auditor", "vault")
	if err != nil {
		return err
	}
	for _, n := range []struct {
		name, token string
		node        **lab.Node
	}{{"a", tokenA, &d.a}, {"b", tokenB, &d.b}} {
		if *n.node, err = d.lab.NewNode(lab.NodeOptions{
			Name: n.name, Ceiling: d.o.Ceiling, LeafTTL: 10 * time.Minute, JoinToken: n.token, Policies: policies, JWKS: jwks,
		}); err != nil {
			return err
		}
	}
	p, err := d.lab.StartAuthority(ctx, "b", authorityAddress)
	if p != nil {
		d.processes = append(d.processes, p)
	}
	return err
}

// openTPM puts a software TPM under node a where there is one.
func (d *demo) openTPM(ctx context.Context) error {
	path, err := exec.LookPath("swtpm")
	if err != nil {
		d.say("swtpm is not installed: node a has a software key too")
		return nil
	}
	dir := filepath.Join(d.lab.Dir, "tpm")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make folder of the TPM: %w", err)
	}
	socket := filepath.Join(dir, "sock")
	p, err := d.lab.Start("a", "", "swtpm", nil, path, "socket", "--tpm2", "--server", "type=unixio,path="+socket,
		"--ctrl", "type=unixio,path="+socket+".ctrl", "--flags", "not-need-init,startup-clear", "--tpmstate", "dir="+dir)
	if err != nil {
		return err
	}
	d.processes = append(d.processes, p)
	d.a.TPM = socket
	return lab.WaitFor(ctx, p, "make its socket", func() bool { _, err := os.Stat(socket); return err == nil })
}

// app starts an application, in a cgroup of its node's subtree or, where that
// is "", outside of both.
func (d *demo) app(space, cgroup, name string) error {
	dir := ""
	var err error
	if cgroup != "" {
		if dir, err = d.lab.AddCgroup(filepath.Join(space, cgroup)); err != nil {
			return err
		}
	}
	a, err := startApp(d.lab, space, dir, name)
	if err != nil {
		return err
	}
	d.apps[name] = a
	d.processes = append(d.processes, a.Process)
	return nil
}

// openServers has the servers listen once their workloads are recognised, and
// waits until both nodes have certificates for who calls and who serves.
func (d *demo) openServers(ctx context.Context) error {
	for n, ids := range map[*lab.Node][]string{d.a: {"checkout"}, d.b: {"payments", "catalog", "ledger", "auditor"}} {
		for _, id := range ids {
			if _, err := n.Thumbprint(ctx, id); err != nil {
				return err
			}
		}
	}
	for name, q := range map[string]appRequest{
		"payments": {Kind: "http", Addr: ":8080"}, "catalog": {Kind: "http", Addr: ":8081"}, "ledger": {Kind: "tcp", Addr: ":9090"},
	} {
		q.Op = "serve"
		if r := d.apps[name].do(q); r.Err != "" {
			return fmt.Errorf("%s to listen: %s", name, r.Err)
		}
	}
	return nil
}

// close ends every process that the demo started and takes the ground away.
func (d *demo) close() error {
	for _, n := range []*lab.Node{d.a, d.b} {
		if n != nil {
			n.Stop()
		}
	}
	for _, p := range slices.Backward(d.processes) {
		p.Stop(2 * time.Second)
	}
	if d.lab == nil {
		return nil
	}
	var errs []error
	for _, n := range []*lab.Node{d.a, d.b} {
		if n != nil && n.Agent != nil {
			if _, err := os.Stat(n.PinDir()); errors.Is(err, fs.ErrNotExist) {
				continue // its agent attached nothing
			}
			if _, err := d.lab.Command(context.Background(), "agent", "uninstall", "--pin-dir", n.PinDir()); err != nil {
				errs = append(errs, err)
			}
		}
	}
	if d.o.KeepLogs {
		kept := d.lab.Dir + "-logs"
		errs = append(errs, keepLogs(d.lab.Dir, kept))
		d.say("logs: %s", kept)
	}
	return errors.Join(append(errs, d.lab.Close())...)
}

// keepLogs copies what the programs wrote, and nothing that is secret: the
// nodes' keys lie beside it.
func keepLogs(from, to string) error {
	if err := os.Mkdir(to, 0o700); err != nil {
		return fmt.Errorf("keep logs: %w", err)
	}
	return filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || filepath.Ext(path) != ".log" && e.Name() != "decisions.json" {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("keep logs: %w", err)
		}
		name := strings.ReplaceAll(strings.TrimPrefix(strings.TrimPrefix(path, from), "/"), "/", "-")
		return os.WriteFile(filepath.Join(to, name), content, 0o600)
	})
}

// endOnError ends a run whose output nobody reads any more, so that it cleans
// up behind itself.
type endOnError struct {
	io.Writer
	end context.CancelFunc
}

func (w endOnError) Write(b []byte) (int, error) {
	n, err := w.Writer.Write(b)
	if err != nil {
		w.end()
	}
	return n, err
}
