// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/datapath"
	"github.com/sallyport-dev/sallyport/agent/events"
	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
)

// eventRecord is a refusal of the kernel as the decision log writes it.
type eventRecord struct {
	Time        time.Time      `json:"time"`
	RequestID   string         `json:"requestID"` // that explain takes
	Node        string         `json:"node"`
	Source      string         `json:"source,omitempty"`
	Destination string         `json:"destination,omitempty"`
	Client      netip.AddrPort `json:"client,omitzero"`
	Address     netip.AddrPort `json:"address,omitzero"`
	Decision    string         `json:"decision"`
	Mode        string         `json:"mode"`
	WouldDeny   bool           `json:"wouldDeny,omitempty"`
	Stage       string         `json:"stage"`
	Hook        string         `json:"hook"`
	Policy      string         `json:"policy,omitempty"`   // that protects the port
	Position    string         `json:"position,omitempty"` // file:line of that policy, or of the identity that was refused
	Reason      flow.Reason    `json:"reason"`
	Cgroup      uint64         `json:"cgroup,omitempty"`
}

// readEvents logs what the kernel refused.
func (a *Agent) readEvents(ctx context.Context) error {
	r, err := a.dp.Events()
	if err != nil {
		return err
	}
	ids := flow.NewIDs()
	return drain(ctx, r, func(e events.Event) {
		if e.Reason == flow.ReasonIdentityRevoked && e.Identity != 0 && uint32(e.Identity) == a.ambiguousNumber.Load() {
			// The kernel refuses both alike; what to do about them differs.
			e.Reason = flow.ReasonAmbiguousIdentity
		}
		rec := eventRecord{
			Time: wallTime(e.Time), RequestID: ids.New(time.Now()), Node: a.cfg.Node, Source: a.idOf(e.Identity), Destination: a.idOf(e.Target),
			Client: e.Source, Address: e.Destination, Decision: flow.EffectDeny.String(), Mode: flow.ModeEnforce.String(),
			WouldDeny: !e.Enforced, Stage: flow.StageKernel.String(), Hook: e.Hook.String(), Reason: e.Reason, Cgroup: e.CgroupID,
		}
		var mode flow.Mode
		rec.Policy, rec.Position, mode = a.view.Load().blame(&e)
		if e.Reason == flow.ReasonEgress && a.view.Load().namesHosts(e.Identity) {
			a.hosts.Soon() // it may be an answer that is newer than ours
		}
		decision := rec.Decision
		if !e.Enforced {
			rec.Mode, decision = min(mode, flow.ModeAudit).String(), "wouldDeny"
		}
		raw, err := json.Marshal(rec)
		if err != nil {
			a.log.Error("kernel event not logged", "err", err)
			return
		}
		a.records.write(raw)
		a.refusals.put(&rec)
		a.hub.Publish(&controlpb.Observation{
			TimeUnixNs: rec.Time.UnixNano(), Kind: "event", From: a.flowEnd(e.Identity, e.Source), To: a.flowEnd(e.Target, e.Destination),
			Decision: decision, Reason: string(e.Reason), Stage: rec.Stage, Json: raw,
		})
	})
}

// blame names what an event goes back to: of a port that was bound or called,
// the policy that protects it; of what a workload tried, its own document. The
// mode is that document's, audit where there is none.
func (v *view) blame(e *events.Event) (policy, position string, mode flow.Mode) {
	if v == nil {
		return "", "", flow.ModeAudit
	}
	at := e.Destination
	served := e.Hook == events.HookSteer
	if e.Hook == events.HookBind || e.Hook == events.HookListen {
		at, served = e.Source, true
	}
	api := v.plan.API(v.byNumber[e.Target], at.Port())
	if api == nil && served {
		api = v.protected[datapath.ProtectedPort{Netns: e.NetnsCookie, Port: at.Port()}]
	}
	if id := v.byNumber[e.Identity]; id != nil && (!served || api == nil) {
		return "", id.Position.FileLine(), v.mode(id.Mode)
	}
	if api != nil {
		return api.Name, api.Position.FileLine(), v.mode(api.Mode)
	}
	return "", "", flow.ModeAudit
}

// namesHosts says whether the egress of an identity names hosts.
func (v *view) namesHosts(n flow.IdentityNumber) bool {
	return v != nil && v.byNumber[n] != nil && slices.ContainsFunc(v.byNumber[n].Egress, func(e compile.Egress) bool { return e.Host != "" })
}

// keptRefusals is how many of the kernel's refusals can be explained.
const keptRefusals = 512

// refusals is a ring of the latest refusals of the kernel.
type refusals struct {
	mu   sync.Mutex
	ring []eventRecord
	next int
}

func (r *refusals) put(rec *eventRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.ring) < keptRefusals {
		r.ring = append(r.ring, *rec)
		return
	}
	r.ring[r.next] = *rec
	r.next = (r.next + 1) % keptRefusals
}

// explain returns a refusal by its id, in the form of a decision.
func (r *refusals) explain(id string) (pipeline.Explained, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.ring, func(rec eventRecord) bool { return rec.RequestID == id })
	if i < 0 {
		return pipeline.Explained{}, false
	}
	rec := &r.ring[i]
	detail := kernelDetails[rec.Reason]
	return pipeline.Explained{
		Record: pipeline.Record{
			Time: rec.Time, RequestID: rec.RequestID, Node: rec.Node, Source: rec.Source, Destination: rec.Destination, Client: rec.Client,
			Address: rec.Address, Decision: rec.Decision, Mode: rec.Mode, WouldDeny: rec.WouldDeny, Stage: rec.Stage, Policy: rec.Policy,
			Position: rec.Position, Reason: rec.Reason, Detail: detail, Channel: flow.ChannelKernel.String(), Anchor: flow.AnchorNone.String(),
		},
		Steps: []pipeline.ExplainedStep{{Stage: rec.Hook, Reason: rec.Reason, Detail: detail}},
	}, true
}

// kernelDetails say in a line what each reason of the kernel means.
var kernelDetails = map[flow.Reason]string{
	flow.ReasonVerdictDeny:       "the kernel holds a verdict against it",
	flow.ReasonBindGuard:         "a protected port was bound by who is not its identity",
	flow.ReasonUnguarded:         "one of the agent's own ports was bound by another, or spoken to without a flow of its own",
	flow.ReasonListenerGone:      "the agent's listener is not there",
	flow.ReasonServerGone:        "the protected identity does not listen on its port",
	flow.ReasonUntagged:          "a packet of an enforced workload without a flow entry",
	flow.ReasonMapFull:           "a kernel map is full, or the identity has used up its share",
	flow.ReasonForeignSocket:     "the socket was made in another cgroup than the caller's",
	flow.ReasonDevice:            "a socket that is bound to a device cannot reach the listener on loopback",
	flow.ReasonSocketKind:        "a kind of socket that no hook sees",
	flow.ReasonEgress:            "nobody claims the address, and the caller's egress does not list it",
	flow.ReasonIdentityRevoked:   "the caller's identity is revoked",
	flow.ReasonAmbiguousIdentity: "several MachineIdentities match the workload",
	flow.ReasonNotReady:          "the workload is not wired up yet",
	flow.ReasonIdentityExpired:   "the caller's identity has expired",
}

// sampleRecord is a sample as `observe` shows it.
type sampleRecord struct {
	Time        time.Time      `json:"time"`
	Source      string         `json:"source,omitempty"`
	Client      netip.AddrPort `json:"client"`
	Address     netip.AddrPort `json:"address"`
	Method      string         `json:"method,omitempty"`
	Path        string         `json:"path,omitempty"`
	Host        string         `json:"host,omitempty"`
	Payload     uint32         `json:"payload"`
	Interface   int            `json:"interface"`
	Ingress     bool           `json:"ingress"`
	NetnsCookie uint64         `json:"netns"`
}

// readSamples shows what the kernel sampled to who observes.
func (a *Agent) readSamples(ctx context.Context) error {
	r, err := a.dp.Samples()
	if err != nil {
		return err
	}
	return drain(ctx, r, func(s events.Sample) {
		rec := sampleRecord{
			Time: wallTime(s.Time), Source: a.idOf(s.Identity), Client: s.Source, Address: s.Destination, Method: s.Method, Path: s.Path,
			Host: s.Host, Payload: s.Payload, Interface: s.Interface, Ingress: s.Ingress, NetnsCookie: s.NetnsCookie,
		}
		raw, err := json.Marshal(rec)
		if err != nil {
			a.log.Error("sample not shown", "err", err)
			return
		}
		a.hub.Publish(&controlpb.Observation{
			TimeUnixNs: rec.Time.UnixNano(), Kind: "sample", From: a.flowEnd(s.Identity, s.Source), To: s.Destination.String(),
			Method: s.Method, Path: s.Path, Json: raw,
		})
	})
}

// drain reads a ring until ctx ends. A record that cannot be read is skipped.
func drain[T any](ctx context.Context, r *events.Reader[T], f func(T)) error {
	stop := context.AfterFunc(ctx, func() { r.Close() }) //nolint:errcheck // nothing to be done about it
	defer stop()
	for bad := 0; ; {
		one, err := r.Read()
		switch {
		case errors.Is(err, os.ErrClosed):
			return nil
		case err != nil:
			if bad++; bad > 100 {
				return fmt.Errorf("read ring: %w", err)
			}
		default:
			bad = 0
			f(one)
		}
	}
}

// idOf returns the SPIFFE ID of a number, "" where there is none.
func (a *Agent) idOf(n flow.IdentityNumber) string {
	if v := a.view.Load(); v != nil {
		if id := v.byNumber[n]; id != nil {
			return id.ID
		}
	}
	return ""
}

// flowEnd names one end of a flow: NAMESPACE/NAME, or the address.
func (a *Agent) flowEnd(n flow.IdentityNumber, addr netip.AddrPort) string {
	if v := a.view.Load(); v != nil {
		if id := v.byNumber[n]; id != nil {
			return id.FullName()
		}
	}
	return addr.String()
}

// wallTime turns a time of CLOCK_BOOTTIME into one of the wall clock.
func wallTime(boot time.Duration) time.Time {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return time.Now()
	}
	return time.Now().Add(boot - time.Duration(now.Nano()))
}
