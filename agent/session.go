// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/agent/datapath"
	"github.com/sallyport-dev/sallyport/agent/metrics"
	"github.com/sallyport-dev/sallyport/agent/revocations"
	"github.com/sallyport-dev/sallyport/agent/supervise"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/line"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

const (
	// readyTimeout bounds the start of the userspace process, the migration
	// of its relation store included.
	readyTimeout = 60 * time.Second
	// policiesTimeout bounds its taking over a policy set.
	policiesTimeout = 60 * time.Second
	// policiesPatience is how long everything else waits for that: the kernel
	// follows a process that is as quick as it should be, and a revocation
	// does not wait for one that is not.
	policiesPatience = 2 * time.Second
	// questionTimeout bounds what an operator asks through the agent.
	questionTimeout = 10 * time.Second
	// maxSilence is how many questions in a row the process may leave without
	// an answer before it is taken for hanging, and ended.
	maxSilence    = 3
	listenBacklog = 4096
	// What it does that is refused is logged so many times a second, and
	// counted always.
	maxComplaints = 16
	// maxCounted bounds the kinds of decisions that it may count.
	maxCounted = 4096
)

// session is the line to one userspace process, from its start to its end.
type session struct {
	a       *Agent
	conn    *line.Conn
	process *supervise.Process
	ready   chan struct{} // closed at its first message
	once    sync.Once
	trust   sync.Mutex // held while the roots are read and sent: the last sent are the newest

	// What it was sent last; guarded by Agent.mu.
	generation uint64            // of the policies that it has taken over
	handover   *handover         // of those that it is taking over, nil for none
	sent       map[string][]byte // encoded messages by name, to send differences alone

	complaints budget // of log lines on what was refused

	// The ticker's alone.
	counted  map[decisionKey]uint64 // decisions taken over so far
	recalled uint64                 // and cached answers
	silent   int                    // questions in a row without an answer
}

// handover is a policy set that was sent and is not in force yet.
type handover struct {
	generation uint64
	done       chan struct{} // closed when it is answered, or never will be
	err        error         // why it is not in force; after done
}

var errUntold = errors.New("it does not say why")

// newSession takes over the line to a process. What ends the line ends the
// process, whether that sees it or not.
func (a *Agent) newSession(p *supervise.Process) *session {
	s := &session{
		a: a, process: p, ready: make(chan struct{}), sent: map[string][]byte{}, counted: map[decisionKey]uint64{},
		complaints: budget{limit: maxComplaints, window: time.Second},
	}
	s.conn = line.NewConn(p.Socket, line.Options{Handle: s.handle, Concurrent: concurrent, Logger: a.log})
	go func() {
		<-s.conn.Done()
		if err := s.conn.Err(); !errors.Is(err, line.ErrClosed) {
			a.log.Error("line to userspace broken, ending the process", "pid", p.PID, "err", err)
		}
		p.End()
	}()
	return s
}

// userspaceStarted speaks to a new userspace process: who it is for first, and
// when it is ready everything that it needs to work.
func (a *Agent) userspaceStarted(p *supervise.Process) {
	s := a.newSession(p)
	start := &linepb.Start{
		Node: a.cfg.Node, TrustDomain: a.cfg.TrustDomain, StateDir: a.userspaceDir(), ModeCeiling: uint32(a.cfg.ModeCeiling),
		Loops: uint32(a.cfg.Userspace.Loops), Goroutines: a.cfg.Userspace.Goroutines, TunnelPort: uint32(a.ports.Tunnel),
		Anchor: a.ca.Anchor().String(), LeafTtlNs: int64(a.cfg.Identity.LeafTTL),
	}
	if s.notify(&linepb.Message{Body: &linepb.Message_Start{Start: start}}) != nil {
		return
	}
	timeout := time.NewTimer(a.waits.ready)
	defer timeout.Stop()
	select {
	case <-s.ready:
	case <-s.conn.Done():
		return
	case <-timeout.C:
		a.log.Error("userspace did not become ready", "pid", p.PID, "after", a.waits.ready)
		s.conn.Close() //nolint:errcheck // it is ended by that
		return
	}
	if err := a.adoptSession(s); err != nil {
		a.log.Error("userspace not taken into service", "pid", p.PID, "err", err)
		s.conn.Close() //nolint:errcheck // it is ended by that
		return
	}
	a.reconcile(func(*inputs) {})
	a.keys.Replay()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.session.Load() == s {
		a.health.Clear("userspace")
	}
}

// adoptSession makes s the present session. It knows whom to trust and what
// is revoked before anything brings it a listener.
func (a *Agent) adoptSession(s *session) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.current.Err(); err != nil {
		return err
	}
	if s.process.Ended() {
		// Its end has been seen to: nobody would take it away again.
		return errors.New("it has ended")
	}
	if err := s.sendMaps(); err != nil {
		return fmt.Errorf("hand over the flow map: %w", err)
	}
	// From here on changes reach it too; an older list that comes later is
	// told by its generation.
	a.session.Store(s)
	s.sendTrust()
	s.sendRevocations(a.revoked.List())
	for _, ns := range a.namespaces {
		ns.setListening(false)
	}
	return nil
}

// userspaceExited takes note that a process is gone, and its listeners with
// it: what they stood before refuses until the next one is there.
func (a *Agent) userspaceExited(p *supervise.Process, err error) {
	a.mu.Lock()
	if s := a.session.Load(); s != nil && s.process == p {
		s.conn.Close() //nolint:errcheck // its other end is gone
		a.session.Store(nil)
	}
	a.mu.Unlock()
	a.metrics.UserspaceRestarts.Inc()
	if a.current.Err() == nil {
		a.health.Set("userspace", metrics.Unhealthy, fmt.Sprintf("the userspace process ended: %v; it is started again", err), "see the log for why")
	}
}

// notify sends a message; one that cannot be sent ends the process, because
// it would go on under something old.
func (s *session) notify(m *linepb.Message, fds ...int) error {
	err := s.conn.Notify(m, fds...)
	if err != nil && !errors.Is(err, line.ErrClosed) {
		s.a.log.Error("userspace does not take messages, ending it", "err", err)
		s.conn.Close() //nolint:errcheck // it is ended by that
	}
	return err
}

// notifyChanged is notify for what replaces an earlier message of that name,
// unless it is the same again. Agent.mu is held.
func (s *session) notifyChanged(name string, m *linepb.Message) error {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode %s: %w", name, err)
	}
	if slices.Equal(raw, s.sent[name]) {
		return nil
	}
	if err := s.notify(m); err != nil {
		return fmt.Errorf("send %s: %w", name, err)
	}
	s.sent[name] = raw
	return nil
}

func (s *session) sendMaps() error {
	f, err := s.a.dp.FlowMapReadOnly()
	if err != nil {
		return err
	}
	defer f.Close()
	return s.notify(&linepb.Message{Body: &linepb.Message_Maps{Maps: &linepb.Maps{}}}, int(f.Fd()))
}

// sendTrust sends the roots to verify peers by.
func (s *session) sendTrust() {
	s.trust.Lock()
	defer s.trust.Unlock()
	m := &linepb.Trust{}
	for _, d := range s.a.trust() {
		if len(d.Roots) > 0 {
			m.Domains = append(m.Domains, &linepb.TrustDomain{Name: d.Name, Roots: d.Roots, Foreign: d.Foreign})
		}
	}
	s.notify(&linepb.Message{Body: &linepb.Message_Trust{Trust: m}}) //nolint:errcheck // notify ends it
}

func (s *session) sendRevocations(entries []revocations.Entry, generation uint64) {
	m := &linepb.Revocations{Generation: generation}
	for _, e := range entries {
		r := &linepb.Revocation{Kind: string(e.Kind), Value: e.Value, SinceUnixNs: e.Since.UnixNano()}
		if !e.Until.IsZero() {
			r.UntilUnixNs = e.Until.UnixNano()
		}
		m.Revocations = append(m.Revocations, r)
	}
	s.notify(&linepb.Message{Body: &linepb.Message_Revocations{Revocations: m}}) //nolint:errcheck // notify ends it
}

// sendView brings the process in line with a view: identities and addresses,
// then the policies that speak of them, then the listeners through which
// traffic comes. Agent.mu is held.
func (s *session) sendView(v *view, files []load.File) error {
	ids := &linepb.Identities{}
	for n, id := range v.byNumber {
		if v.local[id] {
			ids.Identities = append(ids.Identities, &linepb.Identity{Number: uint32(n), Id: id.ID, Name: id.FullName()})
		}
	}
	slices.SortFunc(ids.Identities, func(a, b *linepb.Identity) int { return int(a.Number) - int(b.Number) })
	addresses := &linepb.Addresses{}
	for cookie, ns := range v.namespaces {
		n := &linepb.NetnsAddresses{NetnsCookie: cookie}
		for _, a := range ns.addressList() {
			n.Addresses = append(n.Addresses, a.AsSlice())
		}
		addresses.Netns = append(addresses.Netns, n)
	}
	slices.SortFunc(addresses.Netns, func(a, b *linepb.NetnsAddresses) int {
		if a.NetnsCookie < b.NetnsCookie {
			return -1
		}
		return 1
	})
	errs := []error{
		s.notifyChanged("identities", &linepb.Message{Body: &linepb.Message_Identities{Identities: ids}}),
		s.notifyChanged("addresses", &linepb.Message{Body: &linepb.Message_Addresses{Addresses: addresses}}),
		s.sendAppCertificates(),
	}
	if s.generation != v.generation {
		errs = append(errs, s.sendPolicies(v.generation, files))
	}
	if s.generation == 0 {
		return errors.Join(errs...) // nothing may come before there is a plan
	}
	for cookie, ns := range v.namespaces {
		if !ns.isListening() {
			errs = append(errs, s.listen(cookie, ns))
		}
	}
	return errors.Join(errs...)
}

// sendAppCertificates sends what callers are shown whose TLS ends at the proxy.
// Agent.mu is held.
func (s *session) sendAppCertificates() error {
	m := &linepb.AppCertificates{}
	for _, c := range s.a.appcerts.Certificates() {
		one := &linepb.AppCertificate{Api: c.API, Chain: c.Chain, Roots: c.Roots}
		if c.Err != nil {
			one.Error = c.Err.Error()
		}
		m.Certificates = append(m.Certificates, one)
	}
	return s.notifyChanged("application certificates", &linepb.Message{Body: &linepb.Message_AppCertificates{AppCertificates: m}})
}

// sendPolicies hands over the documents and waits a little until they are in
// force. Where that takes longer it is an error, and a later call finds out.
func (s *session) sendPolicies(generation uint64, files []load.File) error {
	if s.handover == nil || s.handover.generation != generation {
		h, err := s.handOver(generation, files)
		if err != nil {
			return fmt.Errorf("hand over policies: %w", err)
		}
		s.handover = h
		patience := time.NewTimer(s.a.waits.patience)
		defer patience.Stop()
		select {
		case <-h.done:
		case <-patience.C:
		}
	}
	select {
	case <-s.handover.done:
	default:
		return errors.New("hand over policies: userspace has not taken them over yet")
	}
	err := s.handover.err
	s.handover = nil
	if err != nil {
		return fmt.Errorf("hand over policies: %w", err)
	}
	s.generation = generation
	return nil
}

// handOver sends the documents. A process that does not take them over in
// time is ended: it would go on under old rules.
func (s *session) handOver(generation uint64, files []load.File) (*handover, error) {
	set := &linepb.PolicyFiles{}
	for _, f := range files {
		set.Files = append(set.Files, &linepb.PolicyFile{Path: f.Path, Content: f.Content})
	}
	raw, err := proto.Marshal(set)
	if err != nil {
		return nil, err
	}
	fd, err := line.Sealed("policies", raw)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // a copy has been sent
	h := &handover{generation: generation, done: make(chan struct{})}
	late := time.AfterFunc(s.a.waits.policies, func() {
		s.a.log.Error("userspace does not take policies over, ending it", "generation", generation, "after", s.a.waits.policies)
		s.conn.Close() //nolint:errcheck // it is ended by that
	})
	m := &linepb.Message{Body: &linepb.Message_Policies{Policies: &linepb.Policies{Generation: generation}}}
	s.conn.Go(m, func(m *linepb.Message, fds []int, err error) {
		late.Stop()
		closeAll(fds)
		if h.err = err; err == nil {
			why := textError(m.GetPoliciesReply().GetError())
			s.a.health.Check("policies-userspace", metrics.Degraded, why, "what the message names is refused meanwhile")
			if at := m.GetPoliciesReply().GetGeneration(); at != generation {
				h.err = fmt.Errorf("userspace goes by generation %d and not by %d: %w", at, generation, cmp.Or(why, errUntold))
			}
		}
		close(h.done)
	}, fd)
	return h, nil
}

// listen makes the listeners of a namespace, puts them where the kernel steers
// to, and hands them over. No copy stays here: the process's end closes them.
func (s *session) listen(cookie uint64, ns *namespace) error {
	list, err := ns.Listen(s.a.ports, listenBacklog)
	s.a.health.Check(fmt.Sprintf("listeners/%d", cookie), metrics.Unhealthy, err, "end what holds the port, or choose another with listen.* in agent.yaml")
	if err != nil {
		return err
	}
	m := &linepb.Listeners{}
	var fds []int
	for _, l := range list {
		fds = append(fds, l.FD)
	}
	defer closeAll(fds)
	for _, l := range list {
		if err := s.a.dp.SetListener(cookie, datapath.ListenerKind(l.Kind), l.Family, l.FD); err != nil {
			return fmt.Errorf("register %s listener of %s: %w", l.Kind, ns.Netns, err)
		}
		m.Listeners = append(m.Listeners, &linepb.Listener{Kind: linepb.ListenerKind(l.Kind), NetnsCookie: cookie, Family: uint32(l.Family)})
	}
	if err := s.notify(&linepb.Message{Body: &linepb.Message_Listeners{Listeners: m}}, fds...); err != nil {
		return fmt.Errorf("hand over listeners of %s: %w", ns.Netns, err)
	}
	ns.setListening(true)
	return nil
}

func (s *session) closeListeners(cookie uint64) {
	s.notify(&linepb.Message{Body: &linepb.Message_CloseListeners{CloseListeners: &linepb.CloseListeners{NetnsCookie: cookie}}}) //nolint:errcheck // notify ends it
}

// ask puts a question to the userspace process.
func (a *Agent) ask(ctx context.Context, m *linepb.Message) (*linepb.Message, error) {
	s := a.session.Load()
	if s == nil {
		return nil, errors.New("the userspace process is not running; see `sallyport status`")
	}
	return s.ask(ctx, m)
}

func (s *session) ask(ctx context.Context, m *linepb.Message) (*linepb.Message, error) {
	ctx, cancel := context.WithTimeout(ctx, s.a.waits.question)
	defer cancel()
	reply, fds, err := s.conn.Call(ctx, m)
	closeAll(fds)
	return reply, err
}

// deliverKeys hands an issuer's keys to the userspace process.
func (a *Agent) deliverKeys(issuer string, document []byte, fetched time.Time, err error) {
	m := &linepb.KeySet{Issuer: issuer, Jwks: document}
	if !fetched.IsZero() {
		m.FetchedUnixNs = fetched.UnixNano()
	}
	if err != nil {
		m.Error = err.Error()
	}
	a.health.Check("keys/"+issuer, metrics.Degraded, err, "is the issuer's key set where its TokenIssuer says?")
	s := a.session.Load()
	if s != nil {
		s.notify(&linepb.Message{Body: &linepb.Message_KeySet{KeySet: m}}) //nolint:errcheck // notify ends it
	}
}

// trust is every root that this node trusts: its own domain's, and those of
// the bundles that the configuration names.
func (a *Agent) trust() []identity.TrustDomain {
	return append([]identity.TrustDomain{a.ca.Trust()}, *a.bundles.Load()...)
}

// bundlesRead is how often the files of identity.bundles are read again.
const bundlesRead = 30 * time.Second

// followTrust sends the roots again when enrolment or the bundles' files
// change them.
func (a *Agent) followTrust(ctx context.Context) error {
	again := time.NewTicker(bundlesRead)
	defer again.Stop()
	for {
		changed := a.ca.Changed()
		if s := a.session.Load(); s != nil {
			s.sendTrust()
		}
		for same := true; same; {
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
				same = false
			case <-again.C:
				same = !a.rereadBundles()
			}
		}
	}
}

// rereadBundles says whether the roots of other trust domains have changed.
// Files that are not good any more change nothing.
func (a *Agent) rereadBundles() bool {
	bundles, err := readBundles(a.cfg.Identity.Bundles, a.cfg.TrustDomain)
	if err == nil {
		_, err = identity.NewBundle(append([]identity.TrustDomain{a.ca.Trust()}, bundles...))
	}
	a.health.Check("bundles", metrics.Degraded, err, "mend the file that identity.bundles names; the roots read before stay")
	if err != nil || reflect.DeepEqual(bundles, *a.bundles.Load()) {
		return false
	}
	a.bundles.Store(&bundles)
	return true
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd) //nolint:errcheck // nothing to be done about it
	}
}
