// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/line"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
	"github.com/sallyport-dev/sallyport/userspace/obtain"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/proxy"
	"github.com/sallyport-dev/sallyport/userspace/relation"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// applyTimeout bounds the part of a policy set that the relation store has.
const applyTimeout = 30 * time.Second

// concurrent says which of the agent's requests need no order: questions.
// Everything that changes state is handled one after the other.
func concurrent(m *linepb.Message) bool {
	switch m.GetBody().(type) {
	case *linepb.Message_Relation, *linepb.Message_Status, *linepb.Message_Explain:
		return true
	}
	return false
}

func (p *process) handle(ctx context.Context, in *line.Incoming) {
	var err error
	switch b := in.Message.GetBody().(type) {
	case *linepb.Message_Policies:
		err = p.setPolicies(ctx, in, b.Policies.GetGeneration())
		reply := &linepb.PoliciesReply{Generation: p.generation}
		if err != nil {
			reply.Error = err.Error()
		}
		err = errors.Join(err, in.Reply(&linepb.Message{Body: &linepb.Message_PoliciesReply{PoliciesReply: reply}}))
	case *linepb.Message_Identities:
		err = p.setIdentities(b.Identities)
	case *linepb.Message_Listeners:
		if err = p.addListeners(in, b.Listeners); err != nil {
			// The agent believes them served: a new process gets them again.
			defer p.conn.Close()
		}
	case *linepb.Message_CloseListeners:
		p.proxy.CloseNetns(b.CloseListeners.GetNetnsCookie())
	case *linepb.Message_Addresses:
		err = p.setAddresses(b.Addresses)
	case *linepb.Message_Trust:
		err = p.setTrust(b.Trust)
	case *linepb.Message_Revocations:
		err = p.setRevocations(b.Revocations)
	case *linepb.Message_KeySet:
		err = p.setKeys(b.KeySet)
	case *linepb.Message_AppCertificates:
		var list []proxy.AppCertificate
		for _, c := range b.AppCertificates.GetCertificates() {
			list = append(list, proxy.AppCertificate{API: c.GetApi(), Chain: c.GetChain(), Roots: c.GetRoots(), Problem: c.GetError()})
		}
		p.proxy.SetAppCertificates(list)
	case *linepb.Message_Maps:
		p.flows.set(in.TakeFDs())
	case *linepb.Message_Drain:
		p.draining.Store(true)
		p.proxy.CloseListeners()
	case *linepb.Message_Relation:
		err = in.Reply(&linepb.Message{Body: &linepb.Message_RelationReply{RelationReply: p.relation(ctx, b.Relation)}})
	case *linepb.Message_Status:
		err = p.status(in)
	case *linepb.Message_Explain:
		err = p.explain(in, b.Explain.GetRequestId())
	default:
		in.Refuse("not a message for userspace")
		err = fmt.Errorf("message %T is not for userspace", b)
	}
	if err != nil {
		p.log.Error("message of the agent not carried out", "message", fmt.Sprintf("%T", in.Message.GetBody()), "err", err)
	}
}

// setPolicies compiles the set that the agent has validated, by the same code
// and so to the same plan, and swaps it in.
func (p *process) setPolicies(ctx context.Context, in *line.Incoming, generation uint64) error {
	fds := in.TakeFDs()
	defer closeAll(fds)
	raw, err := line.ReadSealed(fds[0])
	if err != nil {
		return fmt.Errorf("read policy set %d: %w", generation, err)
	}
	var set linepb.PolicyFiles
	if err := proto.Unmarshal(raw, &set); err != nil {
		return fmt.Errorf("decode policy set %d: %w", generation, err)
	}
	files := make([]load.File, len(set.GetFiles()))
	for i, f := range set.GetFiles() {
		files[i] = load.File{Path: f.GetPath(), Content: f.GetContent()}
	}
	plan, problems := compile.Build(files, compile.Options{TrustDomain: p.start.GetTrustDomain(), Node: p.start.GetNode()})
	if plan == nil {
		return fmt.Errorf("compile policy set %d: %s", generation, firstError(problems))
	}
	issuersErr := p.setIssuers(plan)
	ctx, cancel := context.WithTimeout(ctx, applyTimeout)
	defer cancel()
	relErr := p.setModels(ctx, plan)
	// The plan is swapped in all the same: what needs an issuer or a model
	// that is not there is denied, while keeping the old plan would keep old
	// rules.
	p.proxy.SetPlan(plan, generation)
	p.plan, p.generation = plan, generation
	return errors.Join(issuersErr, relErr, p.obtain())
}

// firstError is what a set was refused for.
func firstError(problems []load.Problem) string {
	for _, p := range problems {
		if p.Severity == load.Error {
			return p.String()
		}
	}
	return "no reason given"
}

func (p *process) setIssuers(plan *compile.Plan) error {
	if err := p.tokens.SetIssuers(pipeline.Issuers(plan)); err != nil {
		return fmt.Errorf("set token issuers: %w", err)
	}
	return nil
}

func (p *process) setModels(ctx context.Context, plan *compile.Plan) error {
	models, wanted := pipeline.Models(plan)
	if len(models) == 0 {
		// Without a RelationModel there is still the built-in one, so that
		// `sallyport relation` has something to work on.
		models = append(models, relation.Model{Name: "default/default"})
	}
	if err := p.relations.SetModels(ctx, models); err != nil {
		return fmt.Errorf("set relation models: %w", err)
	}
	for name, tuples := range wanted {
		if _, err := p.relations.Reconcile(ctx, name, tuples); err != nil {
			return fmt.Errorf("reconcile relations of %s: %w", name, err)
		}
	}
	return nil
}

func (p *process) setIdentities(m *linepb.Identities) error {
	list := make([]proxy.LocalIdentity, 0, len(m.GetIdentities()))
	ids := make([]string, 0, len(m.GetIdentities()))
	for _, i := range m.GetIdentities() {
		list = append(list, proxy.LocalIdentity{Number: flow.IdentityNumber(i.GetNumber()), ID: i.GetId()})
		ids = append(ids, i.GetId())
	}
	slices.Sort(ids)
	// The leaves first: who is known has, or is getting, a certificate.
	if err := p.leaves.Set(slices.Compact(ids)); err != nil {
		return fmt.Errorf("set identities: %w", err)
	}
	p.proxy.SetIdentities(list)
	p.local = ids
	return p.obtain()
}

// obtain has the tokens obtained that the plan gives to identities of this
// node.
func (p *process) obtain() error {
	if p.plan == nil {
		return nil
	}
	var wants []obtain.Want
	for _, local := range p.local {
		id, _, ok := p.plan.Identity(local)
		if !ok {
			continue
		}
		for _, o := range id.Tokens {
			wants = append(wants, obtain.Want{
				ID: local, To: o.To.FullName(), Issuer: o.Issuer.FullName(), URL: o.Issuer.TokenURL,
				ClientID: o.ClientID, Audience: o.Audience, Scopes: o.Scopes, MaxLifetime: o.Issuer.MaxLifetime,
			})
		}
	}
	return p.obtained.Set(wants)
}

func (p *process) setAddresses(m *linepb.Addresses) error {
	list := make([]proxy.NetnsAddresses, 0, len(m.GetNetns()))
	for _, n := range m.GetNetns() {
		one := proxy.NetnsAddresses{Netns: n.GetNetnsCookie()}
		for _, b := range n.GetAddresses() {
			a, ok := netip.AddrFromSlice(b)
			if !ok {
				return fmt.Errorf("set addresses: one of %d bytes", len(b))
			}
			one.Addresses = append(one.Addresses, a.Unmap())
		}
		list = append(list, one)
	}
	p.proxy.SetAddresses(list)
	return nil
}

func (p *process) setTrust(m *linepb.Trust) error {
	domains := make([]identity.TrustDomain, 0, len(m.GetDomains()))
	for _, d := range m.GetDomains() {
		domains = append(domains, identity.TrustDomain{Name: d.GetName(), Roots: d.GetRoots(), Foreign: d.GetForeign()})
	}
	bundle, err := identity.NewBundle(domains)
	if err != nil {
		return err
	}
	p.verifier.SetBundle(bundle)
	return nil
}

func (p *process) setRevocations(m *linepb.Revocations) error {
	if m.GetGeneration() < p.verifier.Revocations().Generation() {
		return nil // an older list, overtaken by a newer one
	}
	list := make([]identity.Revocation, 0, len(m.GetRevocations()))
	tokens := make([]token.Revocation, 0, len(m.GetRevocations()))
	for _, r := range m.GetRevocations() {
		one := identity.Revocation{Kind: identity.RevocationKind(r.GetKind()), Value: r.GetValue(), Since: timeOf(r.GetSinceUnixNs()), Until: timeOf(r.GetUntilUnixNs())}
		list = append(list, one)
		tokens = append(tokens, token.Revocation{Kind: r.GetKind(), Value: one.Value, Since: one.Since, Until: one.Until})
	}
	// Tokens first: nothing may be allowed by a revoked one once the streams
	// have been swept. What is wrong with one list is no reason to keep an old
	// one of the other.
	tokensErr := p.tokens.SetRevocations(tokens)
	revocations, err := identity.NewRevocations(list, m.GetGeneration())
	if err != nil {
		return errors.Join(tokensErr, err)
	}
	p.verifier.SetRevocations(revocations)
	p.pipeline.SetRevocations(revocations)
	return tokensErr
}

func (p *process) setKeys(m *linepb.KeySet) error {
	if m.GetError() != "" {
		p.tokens.KeysFailed(m.GetIssuer(), m.GetError())
		return nil
	}
	if err := p.tokens.SetKeys(m.GetIssuer(), m.GetJwks(), timeOf(m.GetFetchedUnixNs())); err != nil {
		return fmt.Errorf("set keys of %s: %w", m.GetIssuer(), err)
	}
	return nil
}

func (p *process) addListeners(in *line.Incoming, m *linepb.Listeners) error {
	fds := in.TakeFDs()
	defer closeAll(fds)
	if len(fds) != len(m.GetListeners()) {
		return fmt.Errorf("add listeners: %d descriptors for %d", len(fds), len(m.GetListeners()))
	}
	var errs []error
	for i, l := range m.GetListeners() {
		if err := p.proxy.Serve(fds[i], proxy.Kind(l.GetKind()), l.GetNetnsCookie()); err != nil {
			errs = append(errs, fmt.Errorf("serve %s of netns %d: %w", l.GetKind(), l.GetNetnsCookie(), err))
		}
	}
	return errors.Join(errs...)
}

func (p *process) relation(ctx context.Context, m *linepb.RelationRequest) *linepb.RelationReply {
	reply := &linepb.RelationReply{}
	if err := p.relationOp(ctx, m, reply); err != nil {
		reply.Error = plainError(err)
	}
	return reply
}

// plainError is an error's text without the wrapping of gRPC, which the engine
// answers in.
func plainError(err error) string {
	text := err.Error()
	for {
		before, after, ok := strings.Cut(text, "rpc error: code = ")
		if !ok {
			return text
		}
		_, after, _ = strings.Cut(after, " desc = ")
		text = before + after
	}
}

func (p *process) relationOp(ctx context.Context, m *linepb.RelationRequest, reply *linepb.RelationReply) error {
	tuples := make([]relation.Tuple, 0, len(m.GetTuples()))
	for _, t := range m.GetTuples() {
		tuples = append(tuples, relation.Tuple{User: t.GetUser(), Relation: t.GetRelation(), Object: t.GetObject()})
	}
	var like relation.Tuple
	if len(tuples) > 0 {
		like = tuples[0]
	}
	var err error
	switch m.GetOp() {
	case "write":
		return p.relations.Write(ctx, m.GetModel(), tuples)
	case "delete":
		return p.relations.Delete(ctx, m.GetModel(), tuples)
	case "read":
		found, err := p.relations.Read(ctx, m.GetModel(), like, int(m.GetLimit()))
		for _, t := range found {
			reply.Tuples = append(reply.Tuples, &linepb.Tuple{User: t.User, Relation: t.Relation, Object: t.Object})
		}
		return err
	case "check":
		answer, reason, err := p.relations.Check(ctx, m.GetModel(), like.User, like.Relation, like.Object)
		reply.Allowed = answer.Allowed
		if reason == flow.ReasonRelation {
			return nil
		}
		return err
	case "list-objects":
		reply.Objects, err = p.relations.ListObjects(ctx, m.GetModel(), like.User, like.Relation, m.GetType())
		return err
	case "model":
		reply.Text, err = p.relations.ModelText(ctx, m.GetModel())
		return err
	}
	return fmt.Errorf("relation op %q is unknown", m.GetOp())
}
