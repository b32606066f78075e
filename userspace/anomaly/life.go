// SPDX-License-Identifier: Apache-2.0

package anomaly

import "sync"

const (
	maxKnown        = 16 // identities that are told apart per endpoint
	windowSeconds   = 3600
	leastWindow     = 256
	quarantineSize  = 5
	quarantineBelow = 0.01
	leastRepeats    = 8  // how often a novelty must come before it is learned
	aloneRepeats    = 64 // the same where a single identity suffices
)

// life says how far a baseline is, and bounds what one identity adds to it:
// where the policy asks for more than one, none fills more than half of a
// window of learned requests (or of an hour, whichever ends first).
type life struct {
	N           uint32
	Known       uint8
	_           [3]uint8
	Identities  [maxKnown]uint32
	Shares      [maxKnown]uint16
	Others      uint16 // of the window, by identities beyond those known
	_           [2]uint8
	WindowLeft  uint32
	WindowStart int64
}

func (l *life) warm(w Warmup) bool {
	return int(l.N) >= w.Requests && int(l.Known) >= min(w.Identities, maxKnown)
}

// admit counts one request of an identity and says whether it may be
// learned.
func (l *life) admit(who uint64, now int64, w Warmup) bool {
	window := max(leastWindow, min(w.Requests, ageAt))
	if l.WindowLeft == 0 || now-l.WindowStart >= windowSeconds || now < l.WindowStart {
		l.WindowLeft, l.WindowStart, l.Others = uint32(window), now, 0
		l.Shares = [maxKnown]uint16{}
	}
	share := l.shareOf(uint32(who >> 32))
	if w.Identities > 1 && int(*share) >= window/2 {
		return false
	}
	*share++
	l.WindowLeft--
	if l.N < 1<<31 {
		l.N++
	}
	return true
}

func (l *life) shareOf(id uint32) *uint16 {
	for i := range int(l.Known) {
		if l.Identities[i] == id {
			return &l.Shares[i]
		}
	}
	if l.Known == maxKnown {
		return &l.Others
	}
	l.Identities[l.Known] = id
	l.Known++
	return &l.Shares[l.Known-1]
}

// quarantined is one kind of novelty that waits for its quorum.
type quarantined struct {
	Kind       uint32
	Identities [4]uint32
	Count      uint16
	Known      uint8
	Released   uint8
}

// release notes that an identity sent a novelty and says whether a quorum
// has: as many distinct identities as the warm-up asks for, at most four, and
// at least leastRepeats (aloneRepeats) requests.
func release(slots []quarantined, kind uint64, who uint64, w Warmup) bool {
	k, id := uint32(kind>>32)|1, uint32(who>>32)
	least := 0
	for i := range slots {
		q := &slots[i]
		if q.Kind != k || q.Count == 0 {
			if q.Count < slots[least].Count {
				least = i
			}
			continue
		}
		if q.Released != 0 {
			return true
		}
		q.note(id)
		if int(q.Known) >= min(w.Identities, len(q.Identities)) && q.Count >= repeats(w) {
			q.Released = 1
		}
		return false
	}
	// The least frequent makes room; those that last are worn down, so that a
	// full quarantine does not stay shut.
	for i := range slots {
		if i != least && slots[i].Count > 1 {
			slots[i].Count--
		}
	}
	slots[least] = quarantined{Kind: k}
	slots[least].note(id)
	return false
}

func repeats(w Warmup) uint16 {
	if w.Identities < 2 {
		return aloneRepeats
	}
	return leastRepeats
}

func (q *quarantined) note(id uint32) {
	if q.Count < ^uint16(0) {
		q.Count++
	}
	for i := range int(q.Known) {
		if q.Identities[i] == id {
			return
		}
	}
	if int(q.Known) < len(q.Identities) {
		q.Identities[q.Known] = id
		q.Known++
	}
}

// fingerprint names the kind of a sample's novelty: the part that stands out
// most, where, and the shape of that parameter, or the set of parameters.
func (sm *Sample) fingerprint() uint64 {
	c := &sm.score.Components[0]
	h := fold(uint64(c.Part)+mix1, mix2)
	for i := range sm.n {
		f := &sm.features[i]
		if c.Part == PartParameters {
			h += fold(f.name, mix1)
			continue
		}
		h += fold(f.shape^f.symbols, f.name|1)
	}
	return fold(h, mix2)
}

// space is what is known of the endpoints that a wildcard unfolds to.
type space struct {
	mu        sync.Mutex
	hash      uint64
	api       string
	life      life
	endpoints uint32
	fresh     novelty
	waiting   [32]quarantined
}

// admitNew says whether an endpoint never seen may be learned: freely while
// the space is not warm, by a quorum afterwards.
func (sp *space) admitNew(sm *Sample, who uint64, now int64) bool {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	if sp.endpoints >= maxPerSpace {
		return false
	}
	warm := sp.life.warm(sm.key.Warmup) && sp.fresh.unseen() < maxUnseen
	if warm && !release(sp.waiting[:], sm.hash, who, sm.key.Warmup) {
		return false
	}
	if !sp.life.admit(who, now, sm.key.Warmup) {
		return false
	}
	sp.fresh.add(true)
	sp.endpoints++
	return true
}
