// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/datapath"
	"github.com/sallyport-dev/sallyport/agent/loader"
	"github.com/sallyport-dev/sallyport/agent/metrics"
	"github.com/sallyport-dev/sallyport/agent/sockets"
	"github.com/sallyport-dev/sallyport/agent/workload"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// namespace is a network namespace in which identities live, wired: guarded,
// steered, watched.
type namespace struct {
	*sockets.Netns
	interfaces []loader.Interface
	stop       context.CancelFunc
	watched    sync.WaitGroup

	mu        sync.Mutex
	addresses []netip.Addr
	listening bool // the present userspace process has its listeners
}

func (n *namespace) addressList() []netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.addresses
}

func (n *namespace) isListening() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.listening
}

func (n *namespace) setListening(on bool) {
	n.mu.Lock()
	n.listening = on
	n.mu.Unlock()
}

// openNamespaces wires the namespaces of the table that are new.
func (a *Agent) openNamespaces() error {
	var errs []error
	for _, n := range a.in.table.Netns {
		if a.namespaces[n.Cookie()] != nil {
			continue
		}
		ns, err := a.openNamespace(n.Netns)
		id := fmt.Sprintf("netns/%d", n.Cookie())
		a.health.Check(id, metrics.Unhealthy, err, "end what holds the ports, or choose others with listen.* in agent.yaml")
		if err != nil {
			errs = append(errs, fmt.Errorf("wire %s: %w", n.Netns, err))
			continue
		}
		a.namespaces[n.Cookie()] = ns
	}
	return errors.Join(errs...)
}

func (a *Agent) openNamespace(n *sockets.Netns) (_ *namespace, err error) {
	ns := &namespace{Netns: n}
	if ns.addresses, err = n.Addresses(); err != nil {
		return nil, err
	}
	// Connections are rewritten from AddNetns on: steering comes first, so
	// that none reaches another listener on our port.
	if err := a.kernel.AttachNetns(n.FD(), n.Cookie()); err != nil {
		return nil, errors.Join(err, a.dp.RemoveNetns(n.Cookie())) // of an earlier agent's
	}
	if err := a.dp.AddNetns(n.Cookie()); err != nil {
		return nil, errors.Join(err, a.kernel.DetachNetns(n.Cookie()))
	}
	// A node without tcx keeps every other guard: said by status, no reason
	// to leave the rest undone.
	a.attachInterfaces(ns)
	ctx, stop := context.WithCancel(a.current)
	ns.stop = stop
	ns.watched.Go(func() {
		err := n.WatchAddresses(ctx, func(list []netip.Addr) { a.addressesChanged(ns, list) })
		if err != nil && ctx.Err() == nil {
			a.log.Error("addresses not watched", "netns", n.String(), "err", err)
		}
	})
	a.log.Info("namespace wired", "netns", n.String(), "cookie", n.Cookie(), "interfaces", len(ns.interfaces))
	return ns, nil
}

// addressesChanged looks at a namespace again. It runs on the watcher's own
// goroutine, which closing the namespace waits for.
func (a *Agent) addressesChanged(ns *namespace, list []netip.Addr) {
	ns.mu.Lock()
	same := slices.Equal(ns.addresses, list)
	ns.addresses = list
	ns.mu.Unlock()
	if same {
		return
	}
	go a.reconcile(func(*inputs) {
		if a.namespaces[ns.Cookie()] == ns { // it may have been let go of since
			a.attachInterfaces(ns)
		}
	})
}

// attachInterfaces puts the backstop and the samples on the namespace's
// interfaces, those that came since included.
func (a *Agent) attachInterfaces(ns *namespace) {
	list, err := a.interfacesOf(ns.Netns)
	for _, i := range list {
		if slices.ContainsFunc(ns.interfaces, func(have loader.Interface) bool { return have.Index == i.Index }) {
			continue
		}
		if attachErr := a.kernel.AttachInterface(i); attachErr != nil {
			err = errors.Join(err, attachErr)
			continue
		}
		ns.interfaces = append(ns.interfaces, i)
	}
	a.health.Check(fmt.Sprintf("interfaces/%d", ns.Cookie()), metrics.Degraded, err, "sallyport check says what the kernel lacks")
}

// interfacesOf lists what is to be watched in a namespace: the configured
// names, or all that are up.
func (a *Agent) interfacesOf(n *sockets.Netns) (list []loader.Interface, err error) {
	auto := slices.Equal(a.cfg.Kernel.Interfaces, []string{"auto"})
	err = n.In(func() error {
		all, err := net.Interfaces()
		if err != nil {
			return fmt.Errorf("list interfaces: %w", err)
		}
		for _, i := range all {
			if auto && i.Flags&net.FlagUp != 0 || slices.Contains(a.cfg.Kernel.Interfaces, i.Name) {
				list = append(list, loader.Interface{NetnsFD: n.FD(), Index: i.Index, Cookie: n.Cookie()})
			}
		}
		return nil
	})
	return list, err
}

// wired says whether all of a workload's namespaces are.
func (a *Agent) wired(cookies []uint64) bool {
	for _, c := range cookies {
		if a.namespaces[c] == nil {
			return false
		}
	}
	return true
}

// dropNamespaces lets go of those that the table does not have any more.
func (a *Agent) dropNamespaces() {
	for cookie, ns := range a.namespaces {
		if slices.ContainsFunc(a.in.table.Netns, func(n workload.Netns) bool { return n.Cookie() == cookie }) {
			continue
		}
		delete(a.namespaces, cookie)
		ns.stop()
		if s := a.session.Load(); s != nil {
			s.closeListeners(cookie)
		}
		errs := []error{ns.ReservePorts(nil)}
		for _, i := range ns.interfaces {
			errs = append(errs, a.kernel.DetachInterface(i))
		}
		// In this order: what is registered is rewritten, and must be steered.
		err := a.dp.RemoveNetns(cookie)
		if err == nil {
			err = a.kernel.DetachNetns(cookie)
		}
		if err := errors.Join(append(errs, err)...); err != nil {
			a.log.Warn("namespace not let go of", "cookie", cookie, "err", err)
		}
		a.health.Clear(fmt.Sprintf("interfaces/%d", cookie))
	}
}

// closeNamespaces ends the watchers; programs and pins stay.
func (a *Agent) closeNamespaces() {
	a.mu.Lock()
	all := a.namespaces
	a.namespaces = map[uint64]*namespace{}
	a.mu.Unlock()
	for _, ns := range all {
		ns.stop()
		ns.watched.Wait()
	}
}

// reserve keeps protected ports from being given to who asks for any port.
func (a *Agent) reserve(v *view) error {
	ports := map[uint64][]uint16{}
	for at, api := range v.protected {
		if v.mode(api.Mode) == flow.ModeEnforce {
			ports[at.Netns] = append(ports[at.Netns], at.Port)
		}
	}
	for at, mode := range v.disputed {
		if mode == flow.ModeEnforce {
			ports[at.Netns] = append(ports[at.Netns], at.Port)
		}
	}
	var errs []error
	for cookie, ns := range a.namespaces {
		list := append(ports[cookie], a.ports.Outbound, a.ports.Inbound, a.ports.Tunnel)
		slices.Sort(list)
		if err := ns.ReservePorts(slices.Compact(list)); err != nil {
			errs = append(errs, fmt.Errorf("reserve ports in %s: %w", ns.Netns, err))
		}
	}
	return errors.Join(errs...)
}

// adopt registers the servers that listened before their port was protected.
func (a *Agent) adopt(v *view) error {
	names := make(map[string]flow.IdentityNumber, len(v.numbers))
	for id, n := range v.numbers {
		names[id.FullName()] = n
	}
	cgroups := make(map[uint64]flow.IdentityNumber, len(a.in.table.Cgroups))
	for _, c := range a.in.table.Cgroups {
		cgroups[c.ID] = names[c.Identity]
	}
	ports := map[uint64][]uint16{}
	for at := range v.protected {
		ports[at.Netns] = append(ports[at.Netns], at.Port)
	}
	var errs []error
	for cookie, list := range ports {
		ns := a.namespaces[cookie]
		found, err := ns.Adopt(list, func(cgroup uint64) bool { return cgroups[cgroup] != 0 })
		errs = append(errs, err)
		for _, s := range found {
			at := datapath.ProtectedPort{Netns: cookie, Port: s.Address.Port()}
			if api := v.protected[at]; api != nil && cgroups[s.Cgroup] == v.numbers[api.Identity] {
				errs = append(errs, a.adoptOne(at, s))
			}
			unix.Close(s.FD) //nolint:errcheck // the server has its own
		}
	}
	return errors.Join(errs...)
}

func (a *Agent) adoptOne(at datapath.ProtectedPort, s sockets.Adopted) error {
	err := a.dp.RegisterServer(at, s.FD, s.Cgroup)
	id := fmt.Sprintf("server/%d/%s", at.Netns, s.Address)
	if errors.Is(err, unix.EOPNOTSUPP) {
		// MPTCP: made before its identity was enforced.
		a.health.Set(id, metrics.Degraded, fmt.Sprintf("the server at %s listens with MPTCP: its calls are refused", s.Address), "restart it: under enforce it gets plain TCP")
		return nil
	}
	a.health.Clear(id)
	return err
}
