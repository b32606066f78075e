// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"cmp"
	"net/http"
	"slices"
	"strings"

	"github.com/sallyport-dev/sallyport/policies/load"
)

// Miss is an allow rule that does not speak of a call.
type Miss struct {
	Rule     string        `json:"rule"`
	Position load.Position `json:"position"`
	// Differs are what of the rule the call does not meet, in the policy's
	// words: the nearest rule has the fewest.
	Differs []string `json:"differs"`
}

// Near returns the allow rules that do not speak of a call, the nearest
// first: a rule that fits but for the caller is nearer than one for another
// path. Its arguments are those of Match; it is for explanations, and its
// cost grows with the number of rules.
func (a *API) Near(src *Identity, c Call) []Miss {
	c.Host = strings.ToLower(strings.TrimSuffix(c.Host, "."))
	type ranked struct {
		Miss
		weight int
	}
	var near []ranked
	var m Matches
	for _, r := range a.Rules {
		if r.Deny {
			continue
		}
		one := ranked{Miss: Miss{Rule: r.Name, Position: r.Position}}
		call, weight := a.missCall(&m, r, c)
		for _, p := range [...]struct {
			differs string
			weight  int
		}{{call, weight}, {r.missCaller(src), 2}, {r.missHost(c.Host), 1}, {r.missUpgrade(a, src, c), 1}} {
			if p.differs != "" {
				one.Differs = append(one.Differs, p.differs)
				one.weight += p.weight
			}
		}
		if one.weight > 0 {
			near = append(near, one)
		}
	}
	slices.SortStableFunc(near, func(x, y ranked) int {
		return cmp.Or(cmp.Compare(len(x.Differs), len(y.Differs)), cmp.Compare(x.weight, y.weight))
	})
	out := make([]Miss, len(near))
	for i := range near {
		out[i] = near[i].Miss
	}
	return out
}

const maxNamed = 5 // of a list in an explanation

func named(list []string) string {
	if len(list) > maxNamed {
		return strings.Join(list[:maxNamed], ", ") + ", ..."
	}
	return strings.Join(list, ", ")
}

func (r *Rule) missCaller(src *Identity) string {
	if r.From == nil || src != nil && slices.Contains(r.From, src) {
		return ""
	}
	var names []string
	for _, id := range r.From {
		names = append(names, id.FullName())
	}
	return "from: " + named(names)
}

func (r *Rule) missHost(host string) string {
	if len(r.Hosts) == 0 || slices.Contains(r.Hosts, host) {
		return ""
	}
	return "hosts: " + named(r.Hosts)
}

func (r *Rule) missUpgrade(a *API, src *Identity, c Call) string {
	if !c.Upgrade || r.Upgrade || !a.AsksUpgrade(src) {
		return ""
	}
	return "upgrade: none"
}

// missCall tells what of a rule's methods and paths the request does not
// meet. It asks the tree itself, with a caller and a host that suit.
func (a *API) missCall(m *Matches, r *Rule, c Call) (differs string, weight int) {
	const byMethod, byPath = 1, 4
	if len(r.Calls) == 0 {
		return "", 0
	}
	if c.Method == "" {
		return "http: " + named(r.Calls) + "; a connection without a request meets none", byPath
	}
	var src *Identity
	if len(r.From) > 0 {
		src = r.From[0]
	}
	if len(r.Hosts) > 0 {
		c.Host = r.Hosts[0]
	}
	meets := func(method string, grpc bool) bool {
		m.Rules = m.Rules[:0]
		w := walker{out: m.Rules, src: src, method: method, grpc: grpc}
		a.allow.request(&w, c.Host, decodeUnreserved(c.Path), true)
		m.Rules = w.out
		return slices.ContainsFunc(m.Rules, func(x Match) bool { return x.Rule == r })
	}
	if meets(c.Method, c.GRPC) {
		return "", 0
	}
	if !c.GRPC && meets(http.MethodPost, true) && !meets(http.MethodPost, false) {
		return "grpc: this method by a call of gRPC", byMethod
	}
	var methods []string
	for _, call := range r.Calls {
		if other, _, ok := strings.Cut(call, " "); ok && meets(other, c.GRPC) && !slices.Contains(methods, other) {
			methods = append(methods, other)
		}
	}
	if len(methods) > 0 {
		return "http: this path by " + named(methods), byMethod
	}
	return "http: " + named(r.Calls), byPath
}
