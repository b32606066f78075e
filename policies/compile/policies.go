// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/policies/v1alpha1"
)

// Bounds and defaults of a policy.
const (
	maxInspect        = 1 << 20 // bytes of a body
	maxEntries        = 2_000_000
	defaultWarmup     = 1000 // requests
	defaultIdentities = 3

	defaultStepUpMaxAge = 5 * time.Minute
)

type policyDoc = load.Doc[v1alpha1.APIPolicy]

func (c *compiler) compilePolicies() {
	c.conditions = make(map[string]*compiled)
	docs := make(map[*API]*policyDoc, len(c.set.Policies))
	for _, d := range c.set.Policies {
		a := c.api(d)
		docs[a] = d
		for _, port := range a.Ports {
			if a.Identity == nil {
				continue
			}
			key := apiKey{a.Identity, port}
			if other := c.plan.byPort[key]; other != nil {
				c.report.Errorf(d.Key("spec", "protect"), "protect: %s port %d is already protected by %s", a.Identity.fullName, port, c.other(other.Name, other.Position))
				continue
			}
			c.plan.byPort[key] = a
		}
		c.plan.apis = append(c.plan.apis, a)
	}
	slices.SortFunc(c.plan.apis, func(a, b *API) int { return strings.Compare(a.Name, b.Name) })
	if !c.set.Failed && !c.report.Failed() { // otherwise parts are missing, and the plan is thrown away
		c.fingerprints(docs)
	}
}

func (c *compiler) api(d *policyDoc) *API {
	spec := &d.Value.Spec
	a := &API{
		Name: d.FullName(), Position: d.Position(), Mode: mode(spec.Mode), MTLS: MTLS(max(0, slices.Index(mtlsNames[:], spec.MTLS))),
		OtherwiseAllow: spec.Otherwise == "allow",
	}
	if ref := spec.Protect.Identity; ref != "" {
		if a.Identity = c.identities[fullName(d.Namespace, ref)]; a.Identity == nil {
			c.dangling(d.At("spec", "protect", "identity"), "identity", toIdentity, d.Namespace, ref)
		} else if s := a.Identity.Selector; s != nil && s.All {
			c.report.Errorf(d.At("spec", "protect", "identity"), "identity: %q is any workload; protect the one that serves", ref)
		}
	} else {
		c.empty(&d.Document, "identity", "spec", "protect", "identity")
	}
	a.Ports = c.ports(&d.Document, spec.Protect.Ports, "spec", "protect", "ports")
	c.servesAt(a, d)
	c.protocol(a, d)
	if _, written := d.Lookup("spec", "posture"); written {
		a.Posture = c.postureRef(a, &d.Document, spec.Posture, "spec", "posture")
	}
	if spec.Anomaly != nil {
		a.Anomaly = c.anomaly(d, spec.Anomaly)
		c.needsHTTP(a, d.Key("spec", "anomaly"), "anomaly")
	}
	if b := spec.Body; b != nil {
		a.Body = Body{Inspect: int(b.Inspect), SkipOver: b.Over == "skip"}
		c.needsHTTP(a, d.Key("spec", "body"), "body")
		if b.Inspect > maxInspect {
			c.report.Errorf(d.At("spec", "body", "inspect"), "inspect: is more than 1MiB")
		}
	}
	c.rules(a, d)
	c.stepUp(a, d)
	c.onError(a, d)
	return a
}

// stepUp refuses a challenge that callers could not meet: only with a token
// can they show that they have authenticated.
func (c *compiler) stepUp(a *API, d *policyDoc) {
	if a.Anomaly == nil || d.Value.Spec.Anomaly.StepUp == nil {
		return
	}
	for i, r := range a.Rules {
		if !r.Deny && r.Token == nil {
			c.report.Errorf(d.At("spec", "rules", i), "rule %q: asks for no token, by which its callers could answer anomaly.stepUp; add token, or take stepUp out", r.Name)
		}
	}
	if a.OtherwiseAllow {
		c.report.Errorf(d.At("spec", "otherwise"), "otherwise: allow asks for no token, by which callers could answer anomaly.stepUp; write deny, or take stepUp out")
	}
}

// onError refuses to cache where no stage has an answer to be cached.
func (c *compiler) onError(a *API, d *policyDoc) {
	a.CacheErrors = d.Value.Spec.OnError == "cached"
	if a.CacheErrors && !slices.ContainsFunc(a.Rules, func(r *Rule) bool { return r.Token != nil || r.Relation != nil }) {
		c.report.Errorf(d.At("spec", "onError"), `onError: "cached" has nothing to cache: no rule asks for a token or a relation`)
	}
}

// wholeSeconds refuses what a challenge cannot say.
func (c *compiler) wholeSeconds(pos load.Position, field string, v time.Duration) {
	if v%time.Second != 0 {
		c.report.Errorf(pos, "%s: is not a number of whole seconds", field)
	}
}

// servesAt warns of ports at which nobody finds the identity.
func (c *compiler) servesAt(a *API, d *policyDoc) {
	if a.Identity == nil || a.Identity.Selector != nil && a.Identity.Selector.Kubernetes != nil {
		return // the endpoints of pods are filled from them
	}
	for i, port := range d.Value.Spec.Protect.Ports {
		serves := func(e netip.AddrPort) bool { return e.Port() == port }
		if port != 0 && !slices.ContainsFunc(a.Identity.Endpoints, serves) {
			c.report.Warnf(d.At("spec", "protect", "ports", i), "ports: %s has no endpoint with port %d: calls to it will not be recognised",
				a.Identity.fullName, port)
		}
	}
}

// protocol fills in what is spoken and by whom it is encrypted.
func (c *compiler) protocol(a *API, d *policyDoc) {
	p := &d.Value.Spec.Protect
	a.Protocol = Protocol(max(0, slices.Index(protocolNames[:], p.Protocol)))
	tls := ""
	if p.App != nil {
		tls = p.App.TLS
	}
	switch tls {
	case "passthrough":
		a.AppTLS = AppTLSPassthrough
	case "terminate":
		a.AppTLS = AppTLSTerminate
	case "reencrypt":
		a.AppTLS = AppTLSReencrypt
	}
	c.certificate(a, d)
	pos := func() load.Position { return d.At("spec", "protect", "app", "tls") }
	switch {
	case a.Protocol == ProtocolTLS && a.AppTLS.Ends():
		c.report.Errorf(pos(), "tls: %q with protocol: tls cannot be: that is TLS which goes through; use protocol: auto, http or tcp for what is in it", tls)
	case a.Protocol == ProtocolTLS && tls == "none":
		c.report.Errorf(pos(), "tls: %q with protocol: tls can never be; the application speaks it or does not", tls)
	case a.Protocol == ProtocolTLS:
		a.AppTLS = AppTLSPassthrough
	case a.AppTLS == AppTLSPassthrough && a.Protocol == ProtocolAuto:
		a.Protocol = ProtocolTLS
	case a.AppTLS == AppTLSPassthrough:
		c.report.Errorf(pos(), "tls: %q with protocol: %s cannot be: what is encrypted is not read; use protocol: tls", tls, a.Protocol)
	}
}

// certificate reads where the application's own is. The files are the agent's
// to read: a set does not depend on what is in them.
func (c *compiler) certificate(a *API, d *policyDoc) {
	app := d.Value.Spec.Protect.App
	if app == nil {
		return
	}
	for _, f := range [...]struct {
		name, path, goes string
		to               *string
		asked            bool
		why              string
	}{
		{"certificate", app.Certificate, "terminate or reencrypt", &a.Certificate, a.AppTLS.Ends(), "callers are shown a certificate"},
		{"key", app.Key, "terminate or reencrypt", &a.Key, a.AppTLS.Ends(), "callers are shown a certificate"},
		{"ca", app.CA, "reencrypt", &a.CA, a.AppTLS == AppTLSReencrypt, "the application proves itself by a certificate that leads there"},
	} {
		pos, written := d.Lookup("spec", "protect", "app", f.name)
		switch {
		case !written && f.asked:
			c.report.Errorf(d.Key("spec", "protect", "app"), "%s is missing; with tls: %s %s", f.name, a.AppTLS, f.why)
		case written && !f.asked:
			c.report.Errorf(d.Key("spec", "protect", "app", f.name), "%s: goes with tls: %s", f.name, f.goes)
		case written && (!path.IsAbs(f.path) || path.Clean(f.path) != f.path):
			c.report.Errorf(pos, "%s: %q is not a clean absolute path", f.name, f.path)
		}
		*f.to = f.path
	}
}

// needsHTTP refuses what can only be judged where requests are read.
func (c *compiler) needsHTTP(a *API, pos load.Position, field string) bool {
	if a.Protocol == ProtocolAuto || a.Protocol.reads() {
		return true
	}
	if a.AppTLS == AppTLSPassthrough {
		c.report.Errorf(pos, "%s: cannot be judged where TLS is passed through: only the caller's identity and hosts can", field)
	} else {
		c.report.Errorf(pos, "%s: cannot be judged with protocol: %s", field, a.Protocol)
	}
	return false
}

func (c *compiler) anomaly(d *policyDoc, s *v1alpha1.Anomaly) *Anomaly {
	a := &Anomaly{WarmupRequests: defaultWarmup, WarmupIdentities: defaultIdentities, IgnoreErrors: s.OnError == "ignore"}
	last, lastName, some := 1.0, "", false
	for _, t := range [...]struct {
		name string
		p    *v1alpha1.Probability
		to   *float64
	}{
		{"warn", s.Warn, &a.Warn}, {"stepUp", s.StepUp, &a.StepUp}, {"throttle", s.Throttle, &a.Throttle},
		{"revoke", s.Revoke, &a.Revoke}, {"terminate", s.Terminate, &a.Terminate},
	} {
		if t.p == nil {
			continue
		}
		some = true
		*t.to = float64(*t.p)
		if *t.to > last {
			c.report.Errorf(d.At("spec", "anomaly", t.name), "%s: is above %s: what is stronger needs the smaller p-value", t.name, lastName)
		}
		last, lastName = *t.to, t.name
	}
	if !some {
		c.report.Errorf(d.Key("spec", "anomaly"), "anomaly: no threshold is set; give warn, stepUp, throttle, revoke or terminate")
	}
	switch {
	case s.StepUpMaxAge != nil && s.StepUp == nil:
		c.report.Errorf(d.Key("spec", "anomaly", "stepUpMaxAge"), "stepUpMaxAge: goes with stepUp")
	case s.StepUpMaxAge != nil:
		a.StepUpMaxAge = time.Duration(*s.StepUpMaxAge)
		c.wholeSeconds(d.At("spec", "anomaly", "stepUpMaxAge"), "stepUpMaxAge", a.StepUpMaxAge)
	case s.StepUp != nil:
		a.StepUpMaxAge = defaultStepUpMaxAge
	}
	if f := s.FalsePositives; f != nil {
		a.Budget = float64(f.Events) * 24 / f.Per.Hours()
		if some && s.StepUp == nil && s.Throttle == nil && s.Revoke == nil && s.Terminate == nil {
			c.report.Errorf(d.Key("spec", "anomaly", "falsePositives"), "falsePositives: bounds what acts upon calls, and warn does not; give stepUp, throttle, revoke or terminate")
		}
	}
	if w := s.Warmup; w != nil {
		for _, n := range [...]struct {
			name string
			v    *uint32
			to   *uint32
		}{{"requests", w.Requests, &a.WarmupRequests}, {"identities", w.Identities, &a.WarmupIdentities}} {
			if n.v == nil {
				continue
			}
			if *n.to = *n.v; *n.v == 0 && d.Text("spec", "anomaly", "warmup", n.name) == "0" {
				c.report.Errorf(d.At("spec", "anomaly", "warmup", n.name), "%s: without a warm-up everything would be unusual", n.name)
			}
		}
	}
	return a
}
