// SPDX-License-Identifier: Apache-2.0

package anomaly

import "sort"

// Info is what is known of one endpoint.
type Info struct {
	API, Method, Template string
	Requests              int // learned
	Identities            int // distinct, at most 16 counted
	Calibration           int // N of its scores
	Quarantined           int // kinds of novelty that wait for a quorum
	// Scored counts the scores since the start while warm, Unusual those of
	// them with P at most 0.01: where nothing attacks, their ratio is the
	// realised rate of false positives to hold against that.
	Scored, Unusual uint64
	Parameters      []string
}

// List returns the endpoints in the order of API, template and method.
func (s *Scorer) List() []Info {
	var out []Info
	s.each(func(e *endpoint) {
		e.mu.Lock()
		out = append(out, e.info())
		e.mu.Unlock()
	})
	sort.Slice(out, func(i, j int) bool {
		a, b := &out[i], &out[j]
		if a.API != b.API {
			return a.API < b.API
		}
		if a.Template != b.Template {
			return a.Template < b.Template
		}
		return a.Method < b.Method
	})
	return out
}

// Show returns one endpoint's state by the names that List gives.
func (s *Scorer) Show(api, method, template string) (Info, bool) {
	for _, i := range s.List() {
		if i.API == api && i.Method == method && i.Template == template {
			return i, true
		}
	}
	return Info{}, false
}

// Full returns how often an endpoint was not learned because the bound of
// endpoints was reached.
func (s *Scorer) Full() uint64 { return s.full.Load() }

// Reset forgets the endpoints of an API, or only those of a method and
// template where these are not empty, and returns how many.
func (s *Scorer) Reset(api, method, template string) int {
	match := func(e *endpoint) bool {
		return e.api == api && (method == "" || e.method == method) && (template == "" || e.name == template)
	}
	dropped := 0
	unfolded := map[uint64]uint32{} // dropped, by their space
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.Lock()
		m := map[uint64]*endpoint{}
		for k, e := range *sh.m.Load() {
			if match(e) {
				dropped++
				unfolded[e.space]++
				continue
			}
			m[k] = e
		}
		sh.m.Store(&m)
		sh.mu.Unlock()
	}
	s.count.Add(int64(-dropped))
	for h, n := range unfolded {
		if sp := s.space(h); sp != nil {
			sp.mu.Lock()
			sp.endpoints -= min(n, sp.endpoints)
			sp.mu.Unlock()
		}
	}
	if method == "" && template == "" {
		s.mu.Lock()
		m := map[uint64]*space{}
		for k, sp := range *s.spaces.Load() {
			if sp.api != api {
				m[k] = sp
			}
		}
		s.spaces.Store(&m)
		paces := map[uint64]*pace{}
		for k, p := range *s.paces.Load() {
			if p.api != api {
				paces[k] = p
			}
		}
		s.paces.Store(&paces)
		s.mu.Unlock()
	}
	return dropped
}

func (s *Scorer) each(f func(*endpoint)) {
	for i := range s.shards {
		for _, e := range *s.shards[i].m.Load() {
			f(e)
		}
	}
}
