// SPDX-License-Identifier: Apache-2.0

package compile

import (
	"encoding/json"
	"slices"
	"strings"
)

// Bounds of the search for rules that can have no effect: it only warns.
const (
	maxShadows     = 20        // warnings for a policy
	maxComparisons = 1_000_000 // for a policy
)

// shadows finds rules that can have no effect beside the others. It never
// says so of a rule that has one; it may overlook some.
func (c *compiler) shadows(sources []*ruleSource) {
	s := &shadows{c: c}
	s.twins(sources)
	var broad []*ruleSource // what needs nothing but who, where and what
	for _, r := range sources {
		if r.complete() && r.Token == nil && r.Relation == nil && r.When == nil {
			broad = append(broad, r)
		}
	}
	for _, r := range sources {
		if r.Deny || !r.complete() || s.said[r] {
			continue
		}
		for _, b := range broad {
			if s.count >= maxShadows || s.compared >= maxComparisons {
				return
			}
			if b != r && s.covers(b, r) && s.report(b, r) {
				break
			}
		}
	}
}

type shadows struct {
	c               *compiler
	said            map[*ruleSource]bool
	count, compared int
}

func (s *shadows) report(b, r *ruleSource) bool {
	switch {
	case b.Deny:
		s.c.report.Warnf(r.at(), "rule %q never allows anything: rule %q at %s denies all of it", r.Name, b.Name, b.Position)
	case r.Posture != b.Posture || s.covers(r, b) && r.index < b.index:
		return false // it asks for something else, or is the first of two that say the same
	default:
		s.c.report.Warnf(r.at(), "rule %q has no effect: rule %q at %s allows all of it and asks for no more", r.Name, b.Name, b.Position)
	}
	s.count++
	return true
}

// complete says whether a rule has no error that left a part of it out.
func (r *ruleSource) complete() bool {
	return r.Name != "" && len(r.from) == len(r.spec.From) && len(r.hosts) == len(r.spec.Hosts) && len(r.patterns) == len(r.spec.HTTP)+len(r.spec.GRPC) &&
		(r.Deny || len(r.from) > 0 || r.spec.All) && (r.spec.When == "") == (r.When == nil) && (r.spec.Posture == "") == (r.Posture == nil)
}

// twins finds rules that say the same under two names.
func (s *shadows) twins(sources []*ruleSource) {
	s.said = make(map[*ruleSource]bool)
	first := make(map[string]*ruleSource, len(sources))
	for _, r := range sources {
		spec := *r.spec
		spec.Name, spec.From, spec.Hosts = "", sorted(spec.From), sorted(r.hosts)
		spec.HTTP, spec.GRPC = sorted(spec.HTTP), sorted(spec.GRPC)
		if spec.Effect == "" {
			spec.Effect = "allow"
		}
		text, err := json.Marshal(spec)
		if err != nil || !r.complete() {
			continue
		}
		other := first[string(text)]
		if other == nil {
			first[string(text)] = r
			continue
		}
		if s.said[r] = true; s.count < maxShadows && r.Name != other.Name {
			s.c.report.Warnf(r.at(), "rule %q says the same as rule %q at %s", r.Name, other.Name, other.Position)
			s.count++
		}
	}
}

func sorted(list []string) []string { return slices.Sorted(slices.Values(list)) }

// covers says whether b speaks of every call that r speaks of, and lets it
// switch protocols where r does.
func (s *shadows) covers(b, r *ruleSource) bool {
	if r.Upgrade && !b.Upgrade && !b.Deny {
		return false
	}
	if len(b.from) > 0 && (len(r.from) == 0 || !s.all(len(r.from), func(i int) bool { return slices.Contains(b.from, r.from[i]) })) {
		return false
	}
	if len(b.hosts) > 0 && (len(r.hosts) == 0 || !s.all(len(r.hosts), func(i int) bool { return slices.Contains(b.hosts, r.hosts[i]) })) {
		return false
	}
	return len(b.patterns) == 0 || len(r.patterns) > 0 && s.all(len(r.patterns), func(i int) bool {
		return slices.ContainsFunc(b.patterns, func(p *pattern) bool { s.compared++; return p.covers(r.patterns[i], b.Deny) })
	})
}

func (s *shadows) all(n int, holds func(int) bool) bool {
	for i := range n {
		if s.compared++; !holds(i) {
			return false
		}
	}
	return true
}

// covers says whether p, of a deny rule if deny, matches whatever o does.
func (p *pattern) covers(o *pattern, deny bool) bool {
	method, segments, rest, same := p.method, p.segments, p.rest, decodeUnreserved
	if deny {
		same = decodeAll
		if p.grpc {
			if method = ""; segments[1].param {
				segments, rest = segments[:1], true
			}
		}
	}
	switch {
	case p.grpc && !deny && !o.grpc:
		return false // which is met by other requests too
	case method != "" && method != o.method && !(deny && o.method != "" && strings.EqualFold(method, o.method)):
		return false
	case o.rest && !rest, len(o.segments) < len(segments), !rest && len(o.segments) != len(segments):
		return false
	}
	for i, s := range segments {
		switch q := o.segments[i]; {
		case s.param && (q.param || q.literal != ""):
		case s.param || q.param || same(s.literal) != same(q.literal):
			return false
		}
	}
	return true
}
