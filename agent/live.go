// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/sallyport-dev/sallyport/agent/datapath"
	"github.com/sallyport-dev/sallyport/agent/metrics"
	"github.com/sallyport-dev/sallyport/agent/sockdiag"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/flow/abi"
)

// flowAge is how old a flow entry must be before its socket is looked for: a
// younger one may belong to a socket that is just being made.
const flowAge = 10 * time.Second

// sweepLive closes the connections that would not be let through now: those of
// the enforced that no hook of ours ever saw, those that went past the proxy
// on a verdict that no longer holds, and those of the revoked.
func (a *Agent) sweepLive(v *view) error {
	// The sockets first: a connection has its entry before it is one, so that
	// whatever is listed here is among the flows that are read afterwards.
	var errs []error
	sockets := make(map[uint64][]sockdiag.Socket, len(v.namespaces))
	for cookie, ns := range v.namespaces {
		list, err := socketsOf(ns)
		errs, sockets[cookie] = append(errs, err), list
	}
	flows, err := a.dp.Flows()
	if err != nil {
		return err
	}
	s := &sweep{v: v, flows: make(map[abi.FlowKey]*datapath.Flow, len(flows)), cgroups: map[uint64]*compile.Identity{},
		agent: a.cgroups.agentID, problems: map[string]bool{}}
	for i := range flows {
		s.flows[flows[i].Key] = &flows[i]
	}
	names := map[string]*compile.Identity{}
	for _, id := range v.plan.Identities() {
		names[id.FullName()] = id
	}
	for _, c := range a.in.table.Cgroups {
		if id := names[c.Identity]; id != nil {
			s.cgroups[c.ID] = id
		}
	}
	for cookie, ns := range v.namespaces {
		errs = append(errs, a.sweepNetns(s, cookie, ns, sockets[cookie]))
	}
	for problem := range a.foreign {
		if !s.problems[problem] {
			a.health.Clear(problem)
		}
	}
	a.foreign = s.problems
	return errors.Join(errs...)
}

// socketsOf lists the sockets of a namespace that listen or are connected.
func socketsOf(ns *namespace) ([]sockdiag.Socket, error) {
	c, err := sockdiag.Open(ns.FD())
	if err != nil {
		return nil, err
	}
	defer c.Close() //nolint:errcheck // nothing to be done about it
	list, err := c.List(append([]sockdiag.State{sockdiag.Listen}, sockdiag.Connected...)...)
	if err != nil {
		return nil, fmt.Errorf("list sockets of %s: %w", ns.Netns, err)
	}
	return list, nil
}

// sweep is what one pass goes by.
type sweep struct {
	v       *view
	flows   map[abi.FlowKey]*datapath.Flow
	cgroups map[uint64]*compile.Identity
	// listening holds the ports of the present netns at which somebody
	// listens: what came to one was accepted and goes by no egress rule.
	listening map[uint16]bool
	agent     uint64          // cgroup id of the agent's own leaf
	problems  map[string]bool // health problems that this pass raised
}

func (a *Agent) sweepNetns(s *sweep, cookie uint64, ns *namespace, list []sockdiag.Socket) error {
	c, err := sockdiag.Open(ns.FD())
	if err != nil {
		return err
	}
	defer c.Close() //nolint:errcheck // nothing to be done about it
	s.listening = map[uint16]bool{}
	for i := range list {
		if list[i].State == sockdiag.Listen {
			s.listening[list[i].Local.Port()] = true
			s.foreign(a, cookie, &list[i])
		}
	}
	var errs []error
	for i := range list {
		if list[i].State == sockdiag.Listen {
			continue
		}
		reason := s.judge(cookie, &list[i])
		if reason == flow.ReasonOK {
			continue
		}
		if err := c.Destroy(&list[i]); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("close %s to %s: %w", list[i].Local, list[i].Remote, err))
			continue
		}
		a.metrics.ConnectionsClosed(reason, 1)
		a.log.Info("connection closed", "reason", string(reason), "local", list[i].Local, "remote", list[i].Remote, "netns", cookie)
	}
	return errors.Join(errs...)
}

// judge says why a live socket is to be closed, ReasonOK if it is not.
func (s *sweep) judge(netns uint64, sock *sockdiag.Socket) flow.Reason {
	mine := s.flows[abi.Key(netns, sock.Local, sock.Remote)]
	theirs := s.flows[abi.Key(netns, sock.Remote, sock.Local)]
	if api := s.v.protected[datapath.ProtectedPort{Netns: netns, Port: sock.Local.Port()}]; api != nil && s.accepted(sock, mine) {
		// The server's end, whoever serves there: the client's entry, or the
		// agent's dial, says that it was let through.
		if s.v.mode(api.Mode) == flow.ModeEnforce && theirs == nil {
			return flow.ReasonUntagged
		}
		return flow.ReasonOK
	}
	id := s.cgroups[sock.CgroupID]
	if id == nil {
		return flow.ReasonOK
	}
	if s.v.revoked[id.ID] && (mine != nil || s.v.mode(id.Mode) == flow.ModeEnforce) {
		return flow.ReasonIdentityRevoked
	}
	if mine != nil {
		if mine.Value.Kind == abi.KindDirect {
			return s.judgeDirect(netns, sock, id)
		}
		return flow.ReasonOK
	}
	switch {
	case s.v.mode(id.Mode) != flow.ModeEnforce || theirs != nil || s.listening[sock.Local.Port()]:
		return flow.ReasonOK
	case !s.permitted(id, sock.Remote):
		return flow.ReasonUntagged
	case id.Expired(time.Now()):
		return flow.ReasonIdentityExpired
	}
	return flow.ReasonOK
}

// accepted says whether a socket is one that a server of its local port has
// accepted; our own inbound listeners answer for every protected port.
func (s *sweep) accepted(sock *sockdiag.Socket, mine *datapath.Flow) bool {
	return mine == nil && s.listening[sock.Local.Port()] && sock.CgroupID != 0 && sock.CgroupID != s.agent
}

// foreign tells of listeners on a protected port that are not its identity's.
// They are given nothing, but keep the server from its port.
func (s *sweep) foreign(a *Agent, netns uint64, sock *sockdiag.Socket) {
	api := s.v.protected[datapath.ProtectedPort{Netns: netns, Port: sock.Local.Port()}]
	if api == nil || sock.CgroupID == s.agent || s.cgroups[sock.CgroupID] == api.Identity {
		return
	}
	problem := fmt.Sprintf("foreign-listener/%d/%s", netns, sock.Local)
	s.problems[problem] = true
	a.health.Set(problem, metrics.Degraded,
		fmt.Sprintf("somebody else (uid %d, cgroup id %d) listens at %s, a port of %s", sock.UID, sock.CgroupID, sock.Local, api.Identity.FullName()),
		"end it: in enforce it is given no connection, but it keeps the server from its port")
}

func (s *sweep) judgeDirect(netns uint64, sock *sockdiag.Socket, id *compile.Identity) flow.Reason {
	_, api := s.v.serverOf(sock.Remote, netns)
	if api == nil {
		return flow.ReasonPolicyChanged
	}
	if s.v.mode(api.Mode) != flow.ModeEnforce || s.v.mayGoDirect(id, api) {
		return flow.ReasonOK
	}
	if s.v.revoked[id.ID] || s.v.revoked[api.Identity.ID] {
		return flow.ReasonIdentityRevoked
	}
	if now := time.Now(); id.Expired(now) || api.Identity.Expired(now) {
		return flow.ReasonIdentityExpired
	}
	return flow.ReasonPolicyChanged
}

// permitted says whether an enforced identity may connect to an address by
// its egress, without any flow entry.
func (s *sweep) permitted(id *compile.Identity, to netip.AddrPort) bool {
	return s.v.plan.Claimed(to) == nil && s.v.egress(id, to, "")
}

// reconcileFlows drops the flow entries whose sockets are gone.
func (a *Agent) reconcileFlows() error {
	a.mu.Lock() // the namespaces of the view stay open meanwhile
	defer a.mu.Unlock()
	v := a.view.Load()
	if v == nil {
		return nil
	}
	live := map[[2]uint64]bool{}
	for cookie, ns := range v.namespaces {
		c, err := sockdiag.Open(ns.FD())
		if err != nil {
			return err
		}
		list, err := c.List(sockdiag.Connected...)
		c.Close() //nolint:errcheck // nothing to be done about it
		if err != nil {
			return fmt.Errorf("list sockets of %s: %w", ns.Netns, err)
		}
		for _, s := range list {
			live[[2]uint64{cookie, s.Cookie}] = true
		}
	}
	removed, err := a.dp.ReconcileFlows(flowAge, func(netns, cookie uint64) bool { return live[[2]uint64{netns, cookie}] })
	if removed > 0 {
		a.log.Info("flow entries of sockets that are gone removed", "entries", removed)
	}
	return err
}
