// SPDX-License-Identifier: Apache-2.0

package trial

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/proxy/http1"
	"github.com/sallyport-dev/sallyport/userspace/relation"
)

var (
	errNoRelations = errors.New("this binary is built without the relation engine")
	errHead        = errors.New("the head does not end")
)

// Nobody is what From says of a caller that proves no identity.
const Nobody = "none"

// Fault is something that is wrong with a description.
type Fault struct {
	Path    []any // the field, as load.Document.At takes it
	Message string
}

// Resolved is a described call whose names were looked up.
type Resolved struct {
	// Source is the caller, nil for one that proves no identity or one that
	// no MachineIdentity has.
	Source *compile.Identity
	Target *compile.Identity
	// API is what protects the target's port, nil if nothing does.
	API *compile.API
	// Method, Path and Host are what is asked for; Method is "" for an opaque
	// connection.
	Method, Path, Host string
	GRPC, Upgrade      bool
	Port               uint16
	// Assumed says what the description left open.
	Assumed []string

	target      string // of the request line
	peer        flow.Peer
	destination netip.AddrPort
	headers     []string
	body        string
	token       *Bearer
	issuer      *compile.Issuer
	audience    []string
	bound       [][sha256.Size]byte
	key         [sha256.Size]byte // thumbprint of that which the token is bound to, zero for none
	provenKey   [sha256.Size]byte // of which the call brings a proof
	signs       bool              // the proof is a signature: the token has the key itself
	posture     *Posture
	tuples      map[string][]relation.Tuple
	now         time.Time
}

// Call is what is asked for, as policies match it.
func (c *Resolved) Call() compile.Call {
	return compile.Call{Host: c.Host, Method: c.Method, Path: c.Path, GRPC: c.GRPC, Upgrade: c.Upgrade}
}

// caller names who calls, for a token.
func (c *Resolved) caller() string {
	switch {
	case c.Source != nil:
		return c.Source.Name
	case c.peer.ID != "":
		return c.peer.ID
	}
	return "nobody"
}

// resolver turns a description into a call and notes what is wrong with it.
type resolver struct {
	t      *Trial
	in     *Call
	out    *Resolved
	faults []Fault
}

func (r *resolver) fault(path []any, format string, args ...any) {
	r.faults = append(r.faults, Fault{path, fmt.Sprintf("%v: ", path[0]) + fmt.Sprintf(format, args...)})
}

// Resolve looks up what a description names. It returns no call where
// anything is wrong with it.
func (t *Trial) Resolve(in *Call) (*Resolved, []Fault) {
	r := &resolver{t: t, in: in, out: &Resolved{now: t.now, posture: in.Posture, headers: in.Headers, body: in.Body}}
	if in.Now != nil {
		r.out.now = time.Time(*in.Now)
	}
	r.who()
	r.where()
	r.what()
	r.fields()
	r.bearer()
	r.relations()
	if len(r.faults) > 0 {
		return nil, r.faults
	}
	return r.out, nil
}

// who finds the caller and how it comes.
func (r *resolver) who() {
	out := r.out
	switch from := r.in.From; {
	case from == "":
		r.fault([]any{"from"}, `is missing; name a MachineIdentity, a SPIFFE ID, or %q for a caller without identity`, Nobody)
	case from == Nobody:
	case strings.HasPrefix(from, "spiffe://"):
		out.peer.ID = from
		out.Source, _, _ = r.t.plan.Identity(from)
	default:
		if out.Source = r.identity("from", from); out.Source != nil {
			out.peer.ID = out.Source.ID
		}
	}
	channel := cmp.Or(r.in.Channel, map[bool]string{true: "plaintext", false: "tunnel"}[r.in.From == Nobody])
	out.peer.Channel = channels[channel]
	switch {
	case r.in.From == Nobody && (channel == "tunnel" || channel == "tls"):
		r.fault([]any{"channel"}, "%s proves an identity; with from: %s it is plaintext, or kernel for a workload of the node that nobody recognised", channel, Nobody)
	case r.in.From != Nobody && channel == "plaintext":
		r.fault([]any{"channel"}, "plaintext proves no identity; write from: %s", Nobody)
	}
	out.peer.Address = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 1}), 40000) // RFC 5737
	if out.peer.ID != "" {
		out.peer.Thumbprints = [][sha256.Size]byte{certificate(out.peer.ID)}
	}
}

// certificate stands for the digest of the one that an identity shows.
func certificate(id string) [sha256.Size]byte {
	return sha256.Sum256([]byte("trial certificate of " + id))
}

// identity finds a MachineIdentity by NAMESPACE/NAME, or by a name that only
// one has.
func (r *resolver) identity(field, name string) *compile.Identity {
	var found []*compile.Identity
	var known []string
	for _, id := range r.t.plan.Identities() {
		if id.FullName() == name || id.Name == name {
			found = append(found, id)
		}
		known = append(known, id.Name, id.FullName())
	}
	switch len(found) {
	case 1:
		return found[0]
	case 0:
		r.fault([]any{field}, "no MachineIdentity %q%s", name, load.DidYouMean(name, known, `"`))
	default:
		r.fault([]any{field}, "several MachineIdentities are named %q; write %s", name, either(found))
	}
	return nil
}

func either[T interface{ FullName() string }](list []T) string {
	var names []string
	for _, x := range list {
		names = append(names, x.FullName())
	}
	return strings.Join(names, " or ")
}

// where finds what is called.
func (r *resolver) where() {
	out := r.out
	if r.in.To == "" {
		r.fault([]any{"to"}, "is missing; name the MachineIdentity that is called")
		return
	}
	if out.Target = r.identity("to", r.in.To); out.Target == nil {
		return
	}
	var ports []uint16
	for _, a := range r.t.plan.APIs() {
		if a.Identity == out.Target {
			ports = append(ports, a.Ports...)
		}
	}
	slices.Sort(ports)
	switch {
	case r.in.Port != 0:
		out.Port = r.in.Port
	case len(ports) == 1:
		out.Port = ports[0]
	case len(ports) == 0:
		r.fault([]any{"to"}, "no APIPolicy protects %s; name a port to try it all the same", out.Target.FullName())
	default:
		r.fault([]any{"port"}, "is missing; %s is protected at %s", out.Target.FullName(), strings.Trim(fmt.Sprint(ports), "[]"))
	}
	out.API = r.t.plan.API(out.Target, out.Port)
	address := netip.AddrFrom4([4]byte{192, 0, 2, 2})
	for _, e := range out.Target.Endpoints {
		if e.Port() == out.Port {
			address = e.Addr()
			break
		}
	}
	out.destination = netip.AddrPortFrom(address, out.Port)
}

// what reads the request line, and holds it against what the port speaks.
func (r *resolver) what() {
	out := r.out
	if r.in.HTTP != "" {
		method, target, ok := strings.Cut(r.in.HTTP, " ")
		if !ok || strings.ContainsAny(target, " \t\r\n") || target == "" || strings.ContainsAny(method, "\t\r\n") || method == "" {
			r.fault([]any{"http"}, `%q is not METHOD /path, as in "GET /v1/payments?page=2"`, r.in.HTTP)
			return
		}
		out.Method, out.target = method, target
		out.Path, _, _ = strings.Cut(target, "?")
	}
	if r.in.GRPC != "" {
		service, method, ok := strings.Cut(r.in.GRPC, "/")
		if !ok || service == "" || method == "" || strings.ContainsAny(r.in.GRPC, " \t\r\n?") {
			r.fault([]any{"grpc"}, "%q is not PACKAGE.SERVICE/METHOD", r.in.GRPC)
			return
		}
		if r.in.HTTP != "" {
			r.fault([]any{"grpc"}, "with http, one of them is not meant")
		}
		out.Method, out.target, out.Path, out.GRPC = "POST", "/"+r.in.GRPC, "/"+r.in.GRPC, true
	}
	if a := out.API; a != nil {
		field := "http"
		if out.GRPC || a.Protocol == compile.ProtocolGRPC {
			field = "grpc"
		}
		switch connection := out.Method == ""; {
		case connection && (a.Protocol == compile.ProtocolHTTP || a.Protocol == compile.ProtocolGRPC):
			r.fault([]any{field}, "is missing; %s has protocol: %s, so a call is a request", a.Name, a.Protocol)
		case !connection && (a.Protocol == compile.ProtocolTCP || a.Protocol == compile.ProtocolTLS):
			r.fault([]any{field}, "%s has protocol: %s, whose connections are judged without reading requests; leave it out", a.Name, a.Protocol)
		}
	}
	out.Host = r.in.Host
	if hosts := hosts(out.API); out.Host == "" && len(hosts) == 1 {
		out.Host = hosts[0]
		out.Assumed = append(out.Assumed, "host "+out.Host+", the only one that the policy names")
	} else if out.Host == "" && out.Method != "" && out.Target != nil {
		out.Host = out.Target.Name
		out.Assumed = append(out.Assumed, "host "+out.Host)
	}
}

// hosts are those that an API's rules name.
func hosts(a *compile.API) []string {
	if a == nil {
		return nil
	}
	var out []string
	for _, r := range a.Rules {
		out = append(out, r.Hosts...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// fields holds the field lines against the form; what is wrong with what they
// say is the parser's to find.
func (r *resolver) fields() {
	if r.in.HTTP == "" && r.in.GRPC == "" && (len(r.in.Headers) > 0 || r.in.Body != "" || r.in.Token != nil) {
		r.fault([]any{"http"}, "is missing; headers, body and token belong to a request")
	}
	if r.in.Upgrade != "" {
		if r.out.Upgrade = true; r.in.HTTP == "" {
			r.fault([]any{"upgrade"}, "goes with http, which begins it")
		}
	}
	for i, line := range r.in.Headers {
		name, _, ok := strings.Cut(line, ":")
		switch {
		case !ok || name == "" || strings.ContainsAny(line, "\r\n"):
			r.fault([]any{"headers", i}, "%q is not a field line, as in \"X-Account: a-1\"", line)
		case strings.EqualFold(name, "Host"):
			r.fault([]any{"headers", i}, "write host: for it")
		}
	}
}

// bearer fills in what the description of the token leaves open.
func (r *resolver) bearer() {
	b, out := r.in.Token, r.out
	if b == nil {
		return
	}
	out.token = b
	asked := tokensOf(out.API)
	if b.Issuer != "" {
		out.issuer = r.issuer(b.Issuer)
	} else {
		var issuers []*compile.Issuer
		for _, t := range asked {
			if !slices.Contains(issuers, t.Issuer) {
				issuers = append(issuers, t.Issuer)
			}
		}
		switch len(issuers) {
		case 1:
			out.issuer = issuers[0]
		case 0:
			r.fault([]any{"token", "issuer"}, "issuer is missing, and no rule of the policy asks for a token")
		default:
			r.fault([]any{"token", "issuer"}, "issuer is missing; the policy's rules ask for tokens of %s", either(issuers))
		}
	}
	var audiences []string
	bound, key := b.Bound, false
	for _, t := range asked {
		if t.Issuer == out.issuer {
			audiences = append(audiences, t.Audience)
		}
		switch {
		case bound != "":
		case t.Bound == compile.BoundMTLS:
			bound = "caller"
		case t.Bound == compile.BoundDPoP, t.Bound == compile.BoundSignature:
			bound = "key"
		}
		key = key || t.Bound == compile.BoundDPoP || t.Bound == compile.BoundSignature
		out.signs = out.signs || t.Bound == compile.BoundSignature
	}
	slices.Sort(audiences)
	audiences = slices.Compact(audiences)
	_, claimed := b.Claims["aud"]
	switch out.audience = b.Audience; {
	case len(b.Audience) > 0 || claimed:
	case len(audiences) == 1:
		out.audience = audiences
	case len(audiences) > 1:
		r.fault([]any{"token", "audience"}, "audience is missing; the policy's rules ask for %s", strings.Join(audiences, " or "))
	}
	switch bound {
	case "caller":
		out.bound = out.peer.Thumbprints
	case "key":
		out.key, out.provenKey = certificate("the caller's key"), certificate("the caller's key")
	case "other":
		if key {
			out.key, out.provenKey = certificate("somebody else's key"), certificate("the caller's key")
			break
		}
		out.bound = [][sha256.Size]byte{certificate("somebody else")}
	}
}

func tokensOf(a *compile.API) (all []*compile.TokenRule) {
	if a == nil {
		return nil
	}
	for _, r := range a.Rules {
		if r.Token != nil {
			all = append(all, r.Token)
		}
	}
	return all
}

func (r *resolver) issuer(name string) *compile.Issuer {
	var found []*compile.Issuer
	var known []string
	for _, i := range r.t.plan.Issuers() {
		if i.FullName() == name || i.Name == name {
			found = append(found, i)
		}
		known = append(known, i.Name, i.FullName())
	}
	switch len(found) {
	case 1:
		return found[0]
	case 0:
		r.fault([]any{"token", "issuer"}, "no TokenIssuer %q%s", name, load.DidYouMean(name, known, `"`))
	default:
		r.fault([]any{"token", "issuer"}, "several TokenIssuers are named %q; write %s", name, either(found))
	}
	return nil
}

// relations reads the call's tuples.
func (r *resolver) relations() {
	for i, one := range r.in.Tuples {
		t := relation.Tuple{User: one.User, Relation: one.Relation, Object: one.Object}
		if err := t.Validate(); err != nil {
			r.fault([]any{"tuples", i}, "%v", err)
			continue
		}
		model := r.model(i, one.Model)
		if model == nil {
			continue
		}
		if err := model.Relations.CheckTuple(t.User, t.Relation, t.Object); err != nil {
			r.fault([]any{"tuples", i}, "%v%s", err, load.DidYouMean(err.Name, err.Known, `"`))
			continue
		}
		if r.out.tuples == nil {
			r.out.tuples = map[string][]relation.Tuple{}
		}
		r.out.tuples[model.FullName()] = append(r.out.tuples[model.FullName()], t)
	}
}

func (r *resolver) model(i int, name string) *compile.Model {
	var found []*compile.Model
	var known []string
	for _, m := range r.t.plan.Models() {
		if name == "" || m.FullName() == name || m.Name == name {
			found = append(found, m)
		}
		known = append(known, m.Name, m.FullName())
	}
	switch {
	case len(found) == 1:
		return found[0]
	case len(found) > 1:
		r.fault([]any{"tuples", i, "model"}, "model is %s", either(found))
	case name != "":
		r.fault([]any{"tuples", i, "model"}, "no RelationModel %q%s", name, load.DidYouMean(name, known, `"`))
	default:
		r.fault([]any{"tuples", i}, "the policies have no RelationModel")
	}
	return nil
}

// handshake is what a client of WebSocket writes (RFC 6455, section 1.3).
var handshake = []string{"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="}

// read writes the request out and reads it as the proxy does.
func (c *Resolved) read(req *flow.Request, headers []string) error {
	req.Host = c.Host
	if c.Method == "" {
		if c.API != nil && c.API.Protocol == compile.ProtocolTLS {
			req.Protocol = flow.ProtocolTLS
		}
		return nil
	}
	req.Protocol, req.Method = flow.ProtocolHTTP, c.Method
	if c.GRPC {
		req.Protocol = flow.ProtocolGRPC
		headers = append([]string{"Content-Type: application/grpc"}, headers...)
	}
	if c.Upgrade {
		headers = append(slices.Clone(handshake), headers...)
	}
	var raw bytes.Buffer
	fmt.Fprintf(&raw, "%s %s HTTP/1.1\r\nHost: %s\r\n", c.Method, c.target, c.Host)
	framed := false
	for _, line := range headers {
		name, value, _ := strings.Cut(line, ":")
		framed = framed || strings.EqualFold(name, "Content-Length") || strings.EqualFold(name, "Transfer-Encoding")
		fmt.Fprintf(&raw, "%s: %s\r\n", name, strings.TrimSpace(value))
	}
	if c.body != "" && !framed {
		fmt.Fprintf(&raw, "Content-Length: %s\r\n", strconv.Itoa(len(c.body)))
	}
	raw.WriteString("\r\n")
	var scan http1.Scan
	n, err := scan.End(raw.Bytes())
	if err != nil {
		return err
	}
	if n == 0 {
		return errHead
	}
	var head http1.Request
	if err := head.Parse(raw.Bytes()[:n]); err != nil {
		return err
	}
	req.Path, req.Query, req.Host = string(head.Path), string(head.Query), string(head.Host)
	req.Authority, req.ProvenKey = string(head.Authority), c.provenKey
	req.Headers, req.ContentLength, req.Body, req.Upgrade = head.Fields, head.ContentLength, []byte(c.body), head.Upgrade()
	if c.GRPC {
		req.ContentLength = -1 // of which clients say nothing
	}
	return nil
}

// unreadable is the decision on what the proxy's parser refuses.
func (t *Trial) unreadable(c *Resolved, fault error) flow.Decision {
	reason := flow.ReasonMalformed
	if e, ok := errors.AsType[*http1.Error](fault); ok {
		reason = e.Reason
	}
	d := flow.Decision{Effect: flow.EffectDeny, Enforced: t.pipeline.Mode(c.API) == flow.ModeEnforce,
		Stage: flow.StageProtocol, Reason: reason, Detail: fault.Error(),
		Steps: []flow.Step{{Stage: flow.StageProtocol, Reason: reason, Detail: fault.Error()}}}
	if c.API != nil {
		d.Policy, d.Position = c.API.Name, c.API.Position.FileLine()
	}
	return d
}
