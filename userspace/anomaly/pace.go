// SPDX-License-Identifier: Apache-2.0

package anomaly

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"sync"
)

const (
	maxPaces    = 1024 // policies with a budget
	daySeconds  = 24 * 3600
	leastPaced  = 60   // seconds of a first day that are extrapolated from
	mostDays    = 7    // that an average rests on
	leastDay    = 100  // requests that a day may always count
	mostPace    = 1e12 // requests a day
	growth      = 2.0  // of what was usual, that a day may count at most
	growthAlone = 1.25 // the same by one identity
)

// pace is how many requests a day a policy gets where nothing attacks, which
// turns a budget of false alarms into a p-value: what is normal has p-values
// at least as great as uniform ones.
//
// More requests lower the threshold, and so blind the policy. So those that
// were acted upon or stand out are not counted, a day is averaged with up to
// six before it, and of a day counts no more than growth times what was
// usual, growthAlone of one identity. After the first week the average grows
// by a seventh a day at most, and by 4 % through one identity.
type pace struct {
	mu    sync.Mutex
	api   string
	state paceState
	// What is below is since the start.
	budget float64 // a day, as the policy last asked
	limit  float64 // the last threshold
	scored uint64  // while warm
	acted  uint64
}

// paceState is what is stored of it.
type paceState struct {
	Rate       float64 // requests a day, on average; 0 in the first
	Start      int64   // of the day, Unix seconds; a day begins with a request
	Days       uint8
	Known      uint8
	_          [2]uint8
	Total      uint32
	Identities [maxKnown]uint32
	Counts     [maxKnown + 1]uint32 // the last is of all others
}

func (p *paceState) valid() bool {
	return p.Days <= mostDays && p.Known <= maxKnown && p.Rate >= 0 && p.Rate <= mostPace
}

// add counts a normal request.
func (p *paceState) add(who uint64, now int64) {
	switch {
	case p.Start == 0 || now < p.Start:
		p.begin(now)
	case now-p.Start >= daySeconds:
		p.roll()
		p.begin(now)
	}
	id, at := uint32(who>>32), maxKnown
	for i := range int(p.Known) {
		if p.Identities[i] == id {
			at = i
		}
	}
	if at == maxKnown && p.Known < maxKnown {
		at = int(p.Known)
		p.Identities[at] = id
		p.Known++
	}
	if p.Total < math.MaxUint32 {
		p.Total++
		p.Counts[at]++
	}
}

// begin opens a day. Its identities are told apart anew: old ones would
// leave no room.
func (p *paceState) begin(now int64) {
	p.Start, p.Known, p.Total = now, 0, 0
	p.Identities, p.Counts = [maxKnown]uint32{}, [maxKnown + 1]uint32{}
}

// roll averages the day that has ended.
func (p *paceState) roll() {
	day := 0.0
	for i, n := range p.Counts {
		most := math.Inf(1)
		if p.Days > 0 && i < maxKnown {
			most = max(growthAlone*p.Rate, leastDay)
		}
		day += min(float64(n), most)
	}
	if p.Days > 0 {
		day = min(day, max(growth*p.Rate, leastDay))
	}
	p.Days = min(p.Days+1, mostDays)
	p.Rate += (day - p.Rate) / float64(p.Days)
}

// rate is how many requests a day are to be expected: on the first, as many
// as come.
func (p *paceState) rate(now int64) float64 {
	if p.Days > 0 {
		return p.Rate
	}
	return float64(p.Total) * daySeconds / float64(max(now-p.Start, leastPaced))
}

// threshold returns the p-value to which a budget lowers those of a policy's
// actions, at most 1, and never below what the score can reach.
func (s *Scorer) threshold(sm *Sample, sc *Score) float64 {
	if sm.key.Budget == 0 {
		return 1
	}
	p := s.pace(sm.policy)
	if p == nil {
		return 1
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	limit := 1.0
	if rate := p.state.rate(sm.time.Unix()); rate > sm.key.Budget {
		limit = sm.key.Budget / rate
	}
	limit = max(limit, 1/float64(sc.N+1))
	if sc.Warm {
		p.scored++
		p.budget, p.limit = sm.key.Budget, limit
	}
	return limit
}

// paced counts a request that was not acted upon.
func (s *Scorer) paced(sm *Sample, who uint64, now int64) {
	if sm.key.Budget == 0 || sm.scored && sm.score.Warm && sm.score.P <= quarantineBelow {
		return
	}
	p := s.pace(sm.policy)
	if p == nil {
		if p = s.addPace(sm); p == nil {
			return
		}
	}
	p.mu.Lock()
	p.state.add(who, now)
	p.mu.Unlock()
}

// Acted says that the request of the sample was acted upon.
func (s *Scorer) Acted(sm *Sample) {
	if p := s.pace(sm.policy); p != nil {
		p.mu.Lock()
		p.acted++
		p.mu.Unlock()
	}
}

func (s *Scorer) pace(policy uint64) *pace { return (*s.paces.Load())[policy] }

func (s *Scorer) addPace(sm *Sample) *pace {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := *s.paces.Load()
	if p := old[sm.policy]; p != nil {
		return p
	}
	if len(old) >= maxPaces {
		s.full.Add(1)
		return nil
	}
	m := make(map[uint64]*pace, len(old)+1)
	maps.Copy(m, old)
	p := &pace{api: clip(sm.key.API), limit: 1}
	m[sm.policy] = p
	s.paces.Store(&m)
	return p
}

// Budget is how a policy keeps its budget of false positives.
type Budget struct {
	API      string
	PerDay   float64 // actions upon normal calls that it may take
	Requests float64 // normal ones a day, as expected
	// Threshold is the p-value that no action is taken above, of the last
	// call; the nominal rate of false positives is that or less. Where
	// Threshold times Requests is more than PerDay, the baseline is too young
	// to keep the budget: P cannot be as small.
	Threshold float64
	// Scored and Acted are calls since the start, while warm. Where nothing
	// attacks, their ratio is the realised rate.
	Scored, Acted uint64
}

// Budgets returns those of the policies that have one, by name.
func (s *Scorer) Budgets() []Budget {
	now := s.opt.Now().Unix()
	var out []Budget
	for _, p := range *s.paces.Load() {
		p.mu.Lock()
		if p.budget > 0 {
			out = append(out, Budget{p.api, p.budget, p.state.rate(now), p.limit, p.scored, p.acted})
		}
		p.mu.Unlock()
	}
	slices.SortFunc(out, func(a, b Budget) int { return cmp.Compare(a.API, b.API) })
	return out
}
