// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/cmd/sallyport/internal/lab"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// The namespaces: a and b are nodes with agents, p and q are bare. Clients run
// in a and p, applications in b and q, a-b and p-q are joined.
const (
	nodeB     = "10.77.1.2"
	peerP     = "10.77.2.1"
	peerQ     = "10.77.2.2"
	authority = nodeB + ":15443"

	portIdentity = "9090" // judged by identity alone
	portHTTP     = "8080" // by method and path too
	portFull     = "8081" // by all stages
	portBare     = "8080" // of the application in q

	leafTTL   = 12 * time.Hour // so that the token stays bound
	tokenLife = 2 * time.Hour
)

//go:embed policies/*.yaml
var policyFiles embed.FS

// testbed is what is measured.
type testbed struct {
	lab       *lab.Lab
	a, b      *lab.Node
	processes []*lab.Process
	token     string
	web, bare *lab.Process // the applications, in b and in q
	client    string       // cgroup of the clients of node a
	local     string       // and of node b
	idleMiB   float64      // of node a, before any traffic
}

func openTestbed(ctx context.Context, program string) (_ *testbed, err error) {
	t := &testbed{}
	if t.lab, err = lab.New("sallyport-bench", program); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.close())
		}
	}()
	for _, s := range []string{"a", "b", "p", "q"} {
		if err := t.lab.AddSpace(s); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(t.lab.Link("a", "b", 1), t.lab.Link("p", "q", 2)); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(t.lab.Dir, "done.lua"), []byte(doneScript), 0o644); err != nil {
		return nil, fmt.Errorf("write script of wrk: %w", err)
	}
	if err := t.openNodes(ctx); err != nil {
		return nil, err
	}
	return t, t.openApplications(ctx)
}

// openNodes starts the authority and both agents, and a workload on each that
// keeps the client's identity alive between two runs of wrk.
func (t *testbed) openNodes(ctx context.Context) error {
	issuer, err := lab.NewIssuer()
	if err != nil {
		return err
	}
	jwks := filepath.Join(t.lab.Dir, "jwks.json")
	if err := issuer.Publish(jwks); err != nil {
		return err
	}
	policies, err := fs.Sub(policyFiles, "policies")
	if err != nil {
		return fmt.Errorf("read policies: %w", err)
	}
	for _, n := range []struct {
		name string
		node **lab.Node
	}{{"a", &t.a}, {"b", &t.b}} {
		join, err := t.lab.JoinToken(ctx, n.name, "client", "web")
		if err != nil {
			return err
		}
		if *n.node, err = t.lab.NewNode(lab.NodeOptions{
			Name: n.name, Ceiling: flow.ModeEnforce, LeafTTL: leafTTL, JoinToken: join, Policies: policies, JWKS: jwks,
		}); err != nil {
			return err
		}
	}
	p, err := t.lab.StartAuthority(ctx, "b", authority)
	if p != nil {
		t.processes = append(t.processes, p)
	}
	if err != nil {
		return err
	}
	for _, n := range []*lab.Node{t.b, t.a} {
		if err := n.Start(ctx); err != nil {
			return err
		}
	}
	for space, cgroup := range map[string]*string{"a": &t.client, "b": &t.local} {
		if *cgroup, err = t.lab.AddCgroup(space + "/client"); err != nil {
			return err
		}
		if err := t.start(space, *cgroup, "keep-"+space, "sleep", "infinity"); err != nil {
			return err
		}
	}
	thumbprint, err := t.a.Thumbprint(ctx, "client")
	if err != nil {
		return err
	}
	idle, err := usage([]int{t.a.Agent.PID()})
	if err != nil {
		return err
	}
	t.idleMiB = idle.mib
	t.token, err = issuer.Token("alice", thumbprint, tokenLife)
	return err
}

func (t *testbed) start(space, cgroup, name string, argv ...string) error {
	p, err := t.lab.Start(space, cgroup, name, nil, argv...)
	if err == nil {
		t.processes = append(t.processes, p)
	}
	return err
}

// openApplications starts the same nginx twice: behind the agent of node b and
// bare in q. Each answers with 1 KiB.
func (t *testbed) openApplications(ctx context.Context) error {
	cgroup, err := t.lab.AddCgroup("b/web")
	if err != nil {
		return err
	}
	if t.web, err = t.nginx(ctx, "b", cgroup, "web", "", application(nodeB, portIdentity, portHTTP, portFull), nodeB+":"+portHTTP); err != nil {
		return err
	}
	if _, err := t.b.Thumbprint(ctx, "web"); err != nil {
		return err
	}
	t.bare, err = t.nginx(ctx, "q", "", "bare", "", application(peerQ, portBare), peerQ+":"+portBare)
	return err
}

func application(addr string, ports ...string) string {
	var listen strings.Builder
	for _, p := range ports {
		fmt.Fprintf(&listen, "    listen %s:%s;\n", addr, p)
	}
	return fmt.Sprintf(`http {
  access_log off;
  keepalive_requests 1000000000;
  keepalive_timeout 600s;
  server {
%s    location / { default_type text/plain; return 200 "%s"; }
  }
}
`, listen.String(), strings.Repeat("x", 1024))
}

// nginx starts one with two workers and waits until it listens. head is what
// has to come first in its configuration.
func (t *testbed) nginx(ctx context.Context, space, cgroup, name, head, body, listens string) (*lab.Process, error) {
	dir := filepath.Join(t.lab.Dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make folder of %s: %w", name, err)
	}
	conf := fmt.Sprintf(`%sworker_processes 2;
worker_rlimit_nofile 65536;
daemon off;
pid %s/pid;
error_log stderr error;
events { worker_connections 8192; }
%s`, head, dir, body)
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
		return nil, fmt.Errorf("write configuration of %s: %w", name, err)
	}
	return t.server(ctx, space, cgroup, name, listens, "nginx", "-e", "stderr", "-p", dir, "-c", file)
}

// server starts a program and waits until it listens where its namespace says.
func (t *testbed) server(ctx context.Context, space, cgroup, name, listens string, argv ...string) (*lab.Process, error) {
	if err := t.start(space, cgroup, name, argv...); err != nil {
		return nil, err
	}
	p := t.processes[len(t.processes)-1]
	return p, lab.WaitFor(ctx, p, "listen at "+listens, func() bool { return t.lab.Listening(space, netip.MustParseAddrPort(listens)) })
}

// close ends what was started and takes the ground away.
func (t *testbed) close() error {
	var errs []error
	for _, n := range []*lab.Node{t.a, t.b} {
		if n != nil {
			n.Stop()
		}
	}
	for _, p := range slices.Backward(t.processes) {
		p.Stop(2 * time.Second)
	}
	for _, n := range []*lab.Node{t.a, t.b} {
		if n != nil && n.Agent != nil {
			_, err := t.lab.Command(context.Background(), "agent", "uninstall", "--pin-dir", n.PinDir())
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, t.lab.Close())...)
}
