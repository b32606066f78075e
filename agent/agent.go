// SPDX-License-Identifier: Apache-2.0

// Package agent is the privileged half as a process, and wiring only: it
// starts the rooms beneath it, brings what policy and workloads say into the
// kernel and to the userspace process, and holds everything that process asks
// for against its own plan.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/agent/appcerts"
	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/agent/control"
	"github.com/sallyport-dev/sallyport/agent/datapath"
	"github.com/sallyport-dev/sallyport/agent/hosts"
	"github.com/sallyport-dev/sallyport/agent/introspect"
	"github.com/sallyport-dev/sallyport/agent/keys"
	"github.com/sallyport-dev/sallyport/agent/loader"
	"github.com/sallyport-dev/sallyport/agent/metrics"
	"github.com/sallyport-dev/sallyport/agent/revocations"
	"github.com/sallyport-dev/sallyport/agent/sockets"
	"github.com/sallyport-dev/sallyport/agent/supervise"
	"github.com/sallyport-dev/sallyport/agent/workload"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/watch"
	"github.com/sallyport-dev/sallyport/userspace/authority"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
)

const (
	heartbeatInterval = time.Second
	// housekeeping is how often what has expired is swept.
	housekeeping = 30 * time.Second
	// countersInterval is how often userspace's counts are fetched.
	countersInterval = time.Second
	userspaceDir     = "userspace" // beneath the state directory
)

// Options are what Run needs.
type Options struct {
	Config    *config.Config
	Version   string
	Logger    *slog.Logger
	Decisions io.Writer // the decision log, one JSON object a line
	Notices   io.Writer // what a person at the terminal should see at start
}

// Agent is the running privileged half.
type Agent struct {
	cfg     *config.Config
	version string
	log     *slog.Logger
	started time.Time

	health        *metrics.Health
	metrics       *metrics.Metrics
	hub           *control.Hub
	kernel        *loader.Kernel
	dp            *datapath.Datapath
	ca            *identity.CA
	revoked       *revocations.Store
	keys          *keys.Fetcher
	appcerts      *appcerts.Store
	hosts         *hosts.Follower // of egress
	introspection *introspect.Client
	watch         *watch.Watcher
	finder        *workload.Recogniser
	super         *supervise.Supervisor

	controls *control.Server
	listener net.Listener // of the control API
	records  *recordLog
	refusals refusals // of the kernel
	scored   budget   // of revocations by score
	waits    waits
	bundles  atomic.Pointer[[]identity.TrustDomain] // of identity.bundles
	ports    sockets.Ports
	scope    string // cgroup subtree beneath the cgroup2 mount, "/" for all
	cgroups  ownCgroups

	view            atomic.Pointer[view]   // what requests are held against
	shown           atomic.Pointer[inputs] // what the present view is made of, to be shown
	issuerDials     atomic.Int32           // connections to issuers that are being made
	inForce         atomic.Pointer[view]   // the last view that userspace and the kernel were told of, to be shown
	ambiguousNumber atomic.Uint32          // of what several identities claim, 0 while nothing is
	again           atomic.Bool            // the last reconcile did not get everything done

	session atomic.Pointer[session] // to the userspace process, nil while there is none; changed under mu

	// serving is held, for reading, while a request of the userspace process
	// is carried out: the end waits for that.
	serving sync.RWMutex

	// mu serialises reconcile, and guards what it works on.
	mu           sync.Mutex
	in           inputs
	applied      *compile.Plan  // what the last reconcile brought into force
	wanted       datapath.State // what it wanted the kernel to hold
	namespaces   map[uint64]*namespace
	introspected map[string]bool // health problems of issuers that are asked
	ambiguous    map[string]bool // health problems raised for ambiguous workloads
	foreign      map[string]bool // and for others' listeners on protected ports
	current      context.Context // ends with Run
}

// waits are how long the agent waits for the userspace process.
type waits struct{ ready, policies, patience, question time.Duration }

// newAgent returns an agent of which nothing runs yet; it ends with ctx.
func newAgent(ctx context.Context, o Options) *Agent {
	a := &Agent{
		cfg: o.Config, version: o.Version, log: o.Logger, started: time.Now(),
		health: metrics.NewHealth(nil), hub: control.NewHub(),
		namespaces: map[uint64]*namespace{}, ambiguous: map[string]bool{},
		ports:   sockets.Ports{Outbound: o.Config.Listen.Outbound, Inbound: o.Config.Listen.Inbound, Tunnel: o.Config.Listen.Tunnel},
		waits:   waits{ready: readyTimeout, policies: policiesTimeout, patience: policiesPatience, question: questionTimeout},
		scored:  budget{limit: maxScoredRevocations, window: scoredWindow},
		current: ctx,
	}
	a.records = newRecordLog(o.Decisions, a)
	return a
}

// Run is the whole life of the agent. What is enforced stays enforced when it
// returns: the pins stay.
func Run(ctx context.Context, o Options) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a := newAgent(ctx, o)
	a.health.Set("userspace", metrics.Unhealthy, "the userspace process is starting", "wait; what is enforced refuses meanwhile")
	closers, err := a.open(ctx, o.Notices)
	defer func() {
		for _, c := range slices.Backward(closers) {
			c()
		}
	}()
	if err != nil {
		return err
	}
	return a.run(ctx, cancel)
}

// open starts everything that can fail at start, in the order in which a
// failure leaves the least behind: what only this process sees first, the lock
// against another agent before anything that it would share, and what a first
// start attached is taken away again where the rest fails.
func (a *Agent) open(ctx context.Context, notices io.Writer) (closers []func(), err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start agent: %w", err)
		}
	}()
	if err := a.findCgroups(); err != nil {
		return closers, err
	}
	if err := os.MkdirAll(a.cfg.StateDir, 0o755); err != nil {
		return closers, fmt.Errorf("make state directory: %w", err)
	}
	if a.revoked, err = revocations.Open(a.cfg.StateDir, nil); err != nil {
		return closers, err
	}
	if a.kernel, err = loader.Open(loader.Options{PinDir: a.cfg.PinDir, CgroupRoot: a.cgroups.root, Logger: a.log}); err != nil {
		return closers, err
	}
	closers = append(closers, func() { logClose(a.log, "kernel half", a.kernel.Close()) })
	rest, err := a.openOn(ctx, notices)
	closers = append(closers, rest...)
	if err != nil && !a.kernel.TookOver() {
		undo := func() {
			_, err := loader.Uninstall(a.cfg.PinDir)
			logClose(a.log, "pins", err)
		}
		// Closers run from the last: this one once the kernel half is closed.
		closers = append([]func(){undo}, closers...)
	}
	return closers, err
}

// openOn opens what works on the kernel half.
func (a *Agent) openOn(ctx context.Context, notices io.Writer) (closers []func(), err error) {
	if err := a.enterCgroup(); err != nil {
		return closers, err
	}
	a.dp, err = datapath.New(a.kernel, datapath.Options{
		Ports:   datapath.Ports{Outbound: a.ports.Outbound, Inbound: a.ports.Inbound, Tunnel: a.ports.Tunnel},
		Ceiling: a.cfg.ModeCeiling,
	})
	if err != nil {
		return closers, err
	}
	// Before the agent makes a socket: one made earlier is nobody's to the
	// kernel, neither a listener of ours nor a dial.
	own := datapath.Identity{Flags: datapath.FlagAgent, Mode: flow.ModeEnforce}
	if err := a.dp.SetIdentity(a.cgroups.agentID, own); err != nil {
		return closers, err
	}
	if err := a.dp.Heartbeat(); err != nil {
		return closers, err
	}
	if err := a.openSupervisor(); err != nil {
		return closers, err
	}
	a.metrics = metrics.New(a.metricSources())
	server, err := a.metrics.Serve(a.cfg.Listen.Metrics)
	if err != nil {
		return closers, err
	}
	server.SetReady(true) // /readyz then says what else is missing, as problems
	closers = append(closers, func() { logClose(a.log, "metrics", server.Close(ctx)) })
	a.controls = control.NewServer(control.Options{Agent: service{a}, Hub: a.hub, Revocations: a.revoked, Logger: a.log})
	if a.listener, err = a.controls.Listen(a.cfg.ControlSocket); err != nil {
		return closers, err
	}
	closers = append(closers, func() {
		a.controls.Close()
		a.listener.Close() //nolint:errcheck // served, it is closed by now
	})
	if err := a.openCA(notices); err != nil {
		return closers, err
	}
	closers = append(closers, func() { logClose(a.log, "node key", a.ca.Close()) })
	a.keys = keys.New(keys.Options{Deliver: a.deliverKeys, Log: a.log})
	closers = append(closers, a.keys.Close)
	a.appcerts = appcerts.New(nil)
	a.introspection = introspect.New(nil)
	closers = append(closers, a.introspection.Close)
	a.hosts = hosts.New(hosts.Options{Changed: func() { a.reconcile(func(*inputs) {}) }})
	a.finder, err = workload.New(workload.Options{Scope: a.scope, Own: a.cgroups.paths(), Logger: a.log})
	if err != nil {
		return closers, err
	}
	a.watch = watch.New(watch.Options{
		Dir: a.cfg.PolicyDir, StateDir: a.cfg.StateDir, Logger: a.log,
		Build: func(files []load.File) (*compile.Plan, []load.Problem) {
			return compile.Build(files, compile.Options{TrustDomain: a.cfg.TrustDomain, Node: a.cfg.Node, Domains: a.cfg.Identity.Domains()})
		},
	})
	return closers, nil
}

func (a *Agent) openCA(notices io.Writer) error {
	o := identity.CAOptions{
		StateDir: a.cfg.StateDir, TrustDomain: a.cfg.TrustDomain, Node: a.cfg.Node, TPM: a.cfg.Identity.TPM,
		RequireTPM: a.cfg.Identity.RequireTPM, LeafTTL: a.cfg.Identity.LeafTTL, Log: a.log,
	}
	if a.cfg.Identity.Source == "authority" {
		client, err := authority.NewClient(a.cfg.Identity.Authority.Address, a.cfg.TrustDomain, string(a.cfg.Identity.Authority.Token))
		if err != nil {
			return err
		}
		o.Enroller = client
	}
	bundles, err := readBundles(a.cfg.Identity.Bundles, a.cfg.TrustDomain)
	if err != nil {
		return err
	}
	a.bundles.Store(&bundles)
	if a.ca, err = identity.OpenCA(o); err != nil {
		return err
	}
	if banner := a.ca.Banner(); banner != "" {
		fmt.Fprintln(notices, banner)
		a.log.Warn("the node key is in software", "anchor", a.ca.Anchor().String())
	}
	return nil
}

// readBundles reads the roots of other trust domains. Which domain a file's
// roots speak for is what the configuration says; one that names itself by a
// URI (X509-SVID, section 3.2) must name that.
func readBundles(bundles []config.Bundle, own string) ([]identity.TrustDomain, error) {
	var list []identity.TrustDomain
	for _, b := range bundles {
		if b.Domain == own {
			return nil, fmt.Errorf("read bundle %s: %s is this node's own trust domain, whose roots come with its identity", b.File, own)
		}
		certs, err := identity.ReadCertificates(b.File)
		if err != nil {
			return nil, err
		}
		d := identity.TrustDomain{Name: b.Domain, Foreign: true}
		for _, c := range certs {
			for _, u := range c.URIs {
				if u.Scheme == "spiffe" && u.String() != "spiffe://"+b.Domain {
					return nil, fmt.Errorf("read bundle %s: root %q is of %s, not of %s", b.File, c.Subject, u, b.Domain)
				}
			}
			d.Roots = append(d.Roots, c.Raw)
		}
		list = append(list, d)
	}
	// What userspace would refuse is refused before anything is attached.
	if _, err := identity.NewBundle(list); err != nil {
		return nil, fmt.Errorf("read bundles: %w", err)
	}
	return list, nil
}

func (a *Agent) openSupervisor() error {
	user, err := supervise.LookupUser("/etc/passwd", a.cfg.Userspace.User)
	if err != nil {
		return err
	}
	if err := user.PrepareDir(a.userspaceDir()); err != nil {
		return err
	}
	a.super, err = supervise.New(supervise.Options{
		Args: []string{"sallyport", "userspace"}, User: user, Cgroup: a.cgroups.userspace, Env: userspaceEnv(),
		Started: a.userspaceStarted, Exited: a.userspaceExited,
		Output: func(line string) { a.records.process(line) }, Logger: a.log,
	})
	return err
}

func (a *Agent) userspaceDir() string { return filepath.Join(a.cfg.StateDir, userspaceDir) }

// userspaceEnv is the whole environment of the userspace process. It believes
// the servers that this process believes.
func userspaceEnv() []string {
	env := []string{"PATH=/nonexistent", "LANG=C.UTF-8"}
	for _, name := range []string{"SSL_CERT_FILE", "SSL_CERT_DIR"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// run keeps everything going until ctx ends or something that the agent
// cannot do without has ended.
func (a *Agent) run(ctx context.Context, cancel context.CancelFunc) error {
	var wg sync.WaitGroup
	var once sync.Once
	var first error
	part := func(name string, f func() error) {
		wg.Go(func() {
			if err := f(); err != nil && ctx.Err() == nil {
				once.Do(func() { first = fmt.Errorf("%s: %w", name, err) })
				cancel()
			}
		})
	}
	part("serve control API", func() error { return a.controls.Serve(a.listener) })
	part("keep heartbeat", func() error { return a.beat(ctx) })
	part("keep house", func() error { return a.tick(ctx) })
	part("keep node certificate", func() error { return a.ca.Run(ctx) })
	part("follow trust", func() error { return a.followTrust(ctx) })
	part("follow hosts", func() error { a.hosts.Run(ctx); return nil })
	part("read kernel events", func() error { return a.readEvents(ctx) })
	part("read samples", func() error { return a.readSamples(ctx) })
	a.revoked.OnChange(a.revocationsChanged)
	wg.Go(func() { a.watch.Run(ctx) })
	wg.Go(func() {
		for e := range a.watch.Events() {
			a.policiesChanged(e)
		}
	})
	part("recognise workloads", func() error { return a.finder.Run(ctx, a.workloadsChanged) })
	// The userspace process goes first at the end: its listeners close, and
	// what is protected refuses.
	userspace := make(chan error, 1)
	superCtx, superStop := context.WithCancel(context.WithoutCancel(ctx))
	defer superStop()
	go func() { userspace <- a.super.Run(superCtx) }()
	a.log.Info("agent started", "version", a.version, "node", a.cfg.Node, "trustDomain", a.cfg.TrustDomain,
		"policyDir", a.cfg.PolicyDir, "tookOver", a.kernel.TookOver(), "anchor", a.ca.Anchor().String())
	select {
	case <-ctx.Done():
	case err := <-userspace:
		userspace <- err
		once.Do(func() { first = fmt.Errorf("run userspace: %w", err) })
		cancel()
	}
	a.controls.Close()
	superStop()
	<-userspace
	wg.Wait()
	a.serving.Lock() // for good: what requests work on is closed next
	a.closeNamespaces()
	if errors.Is(first, context.Canceled) {
		return nil
	}
	return first
}

// beat gives the kernel its sign of life. Nothing else is done here: it must
// not come late because something else does.
func (a *Agent) beat(ctx context.Context) error {
	beat := time.NewTicker(heartbeatInterval)
	defer beat.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-beat.C:
			a.health.Check("heartbeat", metrics.Unhealthy, a.dp.Heartbeat(), "see the log; without it no call goes direct")
		}
	}
}

// tick looks after what nobody else starts: what failed is tried again, what
// has ended is swept.
func (a *Agent) tick(ctx context.Context) error {
	second := time.NewTicker(countersInterval)
	defer second.Stop()
	sweep := time.NewTicker(housekeeping)
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-second.C:
			a.health.Check("node-certificate", metrics.Degraded, textError(a.ca.Problem()), "is the authority reachable? see identity.authority in agent.yaml")
			a.health.Check("egress-hosts", metrics.Degraded, a.hosts.Problem(), "the resolver of this machine does not know the name; the addresses known before stay")
			a.fetchCounters(ctx)
			if a.again.Load() || a.view.Load().outdated(time.Now()) {
				a.reconcile(func(*inputs) {})
			}
		case <-sweep.C:
			a.housekeep()
			a.rereadAppCertificates()
		}
	}
}

func (a *Agent) housekeep() {
	a.health.Check("verdict-sweep", metrics.Warning, a.dp.SweepVerdicts(), "see the log")
	a.health.Check("revocation-sweep", metrics.Warning, a.revoked.Expire(), "is the state directory writable?")
	a.health.Check("flow-sweep", metrics.Warning, a.reconcileFlows(), "see the log")
	a.health.Check("pin-sweep", metrics.Warning, a.sweepNamespaces(), "see the log")
}

// sweepNamespaces lets go of network namespaces that went while no agent was
// there to see it.
func (a *Agent) sweepNamespaces() error {
	if err := a.kernel.Sweep(); err != nil {
		return err
	}
	steered, err := a.kernel.Netns()
	if err != nil {
		return err
	}
	known, err := a.dp.Netns()
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for _, cookie := range known {
		if a.namespaces[cookie] == nil && !slices.Contains(steered, cookie) {
			errs = append(errs, a.dp.RemoveNetns(cookie))
		}
	}
	return errors.Join(errs...)
}

func logClose(log *slog.Logger, what string, err error) {
	if err != nil {
		log.Warn("not closed", "what", what, "err", err)
	}
}

// textError is an error with that text, nil where there is none.
func textError(text string) error {
	if text == "" {
		return nil
	}
	return errors.New(text)
}
