// SPDX-License-Identifier: Apache-2.0

package anomaly

import (
	"math"
	"math/bits"
	"sync"
)

const (
	maxParameters = 13 // of an endpoint whose values are modelled
	maxExtras     = 20 // further ones, of which only presence is counted
	maxUnseen     = 0.01
	// Most scores of an immature model say nothing: the first eighth of the
	// warm-up, at most that many, is learned but not calibrated on.
	maxSkipped = 16
)

func trailing(m uint64) int { return bits.TrailingZeros64(m) & 63 }

// endpoint is the baseline of one endpoint. Its state is at most 8 KiB with
// every parameter modelled.
type endpoint struct {
	mu          sync.Mutex
	hash, space uint64
	api         string
	method      string
	name        string
	labels      [maxParameters]string
	state       state
	scored      uint64
	unusual     uint64
	params      []parameter // as many as state.Params
}

// state is the part of an endpoint that has a fixed size, as it is stored.
type state struct {
	Life        life
	Held        uint32 // of the calibration, requests held in quarantine
	Learned     uint32 // requests in the models: Life.N less those held in quarantine
	Names       [maxParameters]uint64
	Params      uint8
	Extras      uint8
	_           [2]uint8
	ExtraNames  [maxExtras]uint32
	ExtraCounts [maxExtras]uint16
	Sets        table
	NewNames    novelty // requests with a name never seen
	Components  [partCount]calibration
	Whole       calibration
	Quarantine  [quarantineSize]quarantined
}

// score fills sm with the bits of each part and returns the combination.
func (e *endpoint) score(sm *Sample) Score {
	sm.bits, sm.which = [partCount]float64{}, [partCount]uint8{}
	e.scoreParts(sm)
	var ps [partCount]float64
	sum := 0.0
	for i := range partCount {
		p, tail := e.state.Components[i].rank(sm.bits[i])
		ps[i] = p
		sum += 1 / tail
	}
	// The harmonic mean of the parts' tails, in bits: what one part alone
	// shows is not drowned by the others.
	sc := Score{Evidence: math.Log2(sum / float64(partCount))}
	sc.P, _ = e.state.Whole.rank(sc.Evidence)
	sc.N = int(e.state.Whole.Total)
	sc.Warm = e.state.Life.warm(sm.key.Warmup) && e.state.NewNames.unseen() < max(maxUnseen, 2/float64(sc.N+1))
	e.topParts(sm, &ps, &sc)
	sm.scored, sm.score = true, sc
	return sc
}

// topParts fills in the three parts that stand out most.
func (e *endpoint) topParts(sm *Sample, ps *[partCount]float64, sc *Score) {
	var used [partCount]bool
	for slot := range sc.Components {
		best := -1
		for i := range ps {
			if used[i] {
				continue
			}
			if best < 0 || ps[i] < ps[best] || ps[i] == ps[best] && sm.bits[i] > sm.bits[best] {
				best = i
			}
		}
		used[best] = true
		c := &sc.Components[slot]
		*c = Component{Part: Part(best), Observed: sm.bits[best], P: ps[best], Expected: e.state.Components[best].quantile(0.99)}
		if w := sm.which[best]; w > 0 {
			c.Parameter = e.labels[w-1]
		}
	}
}

// scoreParts computes the bits of each part.
func (e *endpoint) scoreParts(sm *Sample) {
	st := &e.state
	n := float64(st.Learned)
	var seen uint64 // parameters by their index, extras after them
	set := uint64(0)
	unknown := 0
	for i := range sm.n {
		f := &sm.features[i]
		at := st.find(f.name)
		if at < 0 {
			unknown++
			set += f.name
			continue
		}
		if seen&(1<<at) == 0 {
			set += f.name
		}
		seen |= 1 << at
		if at < maxParameters && !f.mark {
			e.params[at].score(f, uint8(at+1), sm)
		}
	}
	ratio := math.Pow(st.NewNames.unseen(), float64(min(unknown, 8)))
	for i := range int(st.Params) {
		ratio *= presence(float64(e.params[i].Present), n, seen&(1<<i) != 0)
	}
	for i := range int(st.Extras) {
		ratio *= presence(float64(st.ExtraCounts[i]), n, seen&(1<<(maxParameters+i)) != 0)
	}
	sm.bits[PartParameters] = surprise(ratio) + surprise(st.Sets.tail(set*mix1))
}

func presence(count, n float64, present bool) float64 {
	if !present {
		count = max(n-count, 0)
	}
	return min((count+0.5)/(n+1), 1)
}

// find returns a parameter's index, maxParameters and more for an extra, -1
// for a name that was never seen.
func (st *state) find(name uint64) int {
	for i := range int(st.Params) {
		if st.Names[i] == name {
			return i
		}
	}
	short := uint32(name >> 32)
	for i := range int(st.Extras) {
		if st.ExtraNames[i] == short {
			return maxParameters + i
		}
	}
	return -1
}

// learn calibrates on the score that sm holds and, unless the request is
// held in quarantine, adds it to the models.
func (e *endpoint) learn(sm *Sample, who uint64, now int64) {
	st := &e.state
	if !sm.scored {
		e.score(sm)
	}
	held := false
	if sm.score.Warm && sm.score.P <= max(quarantineBelow, 2/float64(sm.score.N+1)) {
		held = !release(st.Quarantine[:], sm.fingerprint(), who, sm.key.Warmup)
	}
	if !st.Life.admit(who, now, sm.key.Warmup) {
		return
	}
	if int(st.Life.N) > min(maxSkipped, sm.key.Warmup.Requests/8) && st.calibrates(held) {
		for i := range st.Components {
			st.Components[i].add(sm.bits[i], held)
		}
		st.Whole.add(sm.score.Evidence, held)
	}
	if held {
		return
	}
	e.addModels(sm)
	if st.Learned >= ageAt {
		e.age()
	}
}

// calibrates says whether a score is counted: of those in quarantine no more
// than the share of normal requests that end there, so that a flood of them
// raises nobody's P above that.
func (st *state) calibrates(held bool) bool {
	if !held {
		return true
	}
	most := uint32(quarantineBelow * float64(st.Whole.Total))
	if st.Held = min(st.Held, most); st.Held == most {
		return false
	}
	st.Held++
	return true
}

func (e *endpoint) addModels(sm *Sample) {
	st := &e.state
	var seen uint64
	set := uint64(0)
	fresh := false
	for i := range sm.n {
		f := &sm.features[i]
		at := st.find(f.name)
		if at < 0 {
			fresh = true
			at = e.addName(f)
		}
		if at < 0 || seen&(1<<at) == 0 {
			set += f.name
		}
		if at < 0 {
			continue
		}
		if seen&(1<<at) == 0 {
			if at < maxParameters {
				e.params[at].Present++
			} else {
				st.ExtraCounts[at-maxParameters]++
			}
		}
		seen |= 1 << at
		if at < maxParameters && !f.mark {
			e.params[at].add(f)
		}
	}
	st.Learned++
	st.Sets.add(set * mix1)
	st.NewNames.add(fresh)
}

// addName gives a new name its place: marks and what comes after the
// modelled ones count by presence.
func (e *endpoint) addName(f *feature) int {
	st := &e.state
	if !f.mark && st.Params < maxParameters {
		at := int(st.Params)
		st.Names[at] = f.name
		st.Params++
		e.labels[at] = cleanLabel(f.label[:f.labels])
		e.params = append(e.params, parameter{})
		return at
	}
	if st.Extras < maxExtras {
		at := int(st.Extras)
		st.ExtraNames[at], st.ExtraCounts[at] = uint32(f.name>>32), 0
		st.Extras++
		return maxParameters + at
	}
	return -1
}

// cleanLabel keeps of a learned name what is safe in a log line.
func cleanLabel(b []byte) string {
	out := make([]byte, len(b))
	for i, c := range b {
		k := classes[c]
		if k.class != classLetter && k.class != classDigit && c != '_' && c != '-' && c != '.' && c != '{' && c != '}' && c != '[' && c != ']' {
			c = '?'
		}
		out[i] = c
	}
	return string(out)
}

func (e *endpoint) age() {
	st := &e.state
	st.Learned /= 2
	for i := range e.params {
		e.params[i].Present /= 2
	}
	halve(st.ExtraCounts[:])
	st.Sets.age()
}

func (e *endpoint) info() Info {
	i := Info{API: e.api, Method: e.method, Template: e.name, Requests: int(e.state.Life.N),
		Identities: int(e.state.Life.Known), Calibration: int(e.state.Whole.Total),
		Scored: e.scored, Unusual: e.unusual}
	for _, q := range e.state.Quarantine {
		if q.Count > 0 && q.Released == 0 {
			i.Quarantined++
		}
	}
	i.Parameters = append(i.Parameters, e.labels[:e.state.Params]...)
	return i
}
