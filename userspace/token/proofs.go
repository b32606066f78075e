// SPDX-License-Identifier: Apache-2.0

package token

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/statefile"
)

const (
	// maxProofs bounds the proofs that are remembered, so that none is taken
	// twice; where they are as many, further ones are refused. Once they are
	// half as many, those of a key that has its share already are: one key
	// keeps no other out.
	maxProofs   = 1 << 18
	proofShards = 64
	maxShard    = maxProofs / proofShards
	proofShare  = maxShard / 64 // of a key in a shard

	proofsMagic = "sallyport proofs 1\n"
	proofsHead  = 64 // bytes: magic, since when, boot
	proofEntry  = 40 // bytes: id, key, until
)

var (
	errProofsFull  = errors.New("more proofs came than can be remembered")
	errProofsOfKey = errors.New("more proofs of this key came than can be remembered beside others'")
	errProofBefore = errors.New("the proof may have been used before this node began to remember them (iat, created)")
)

// Proofs remembers the proofs that were used, for as long as they could be used
// again. It is safe for concurrent use; of 64 locks a request takes one.
type Proofs struct {
	since  time.Time               // of what was used before nothing is known (with the monotonic clock); zero: nothing was
	file   *os.File                // nil: in memory alone
	broken error                   // why none can be remembered, nil if they can
	failed atomic.Pointer[failure] // of the last to be noted, nil if it was
	shards [proofShards]proofShard
}

type proofShard struct {
	mu    sync.Mutex
	used  map[[16]byte]usedProof // by the start of the id
	byKey map[[16]byte]int       // how many, by the start of the thumbprint
	free  []int                  // places below next
	next  int                    // from here on all places are free
	swept int64
}

type usedProof struct {
	key   [16]byte
	until int64 // Unix seconds
	place int   // of maxShard in the file
}

// NewProofs remembers in memory; nothing was used before.
func NewProofs() *Proofs {
	p := &Proofs{}
	for i := range p.shards {
		p.shards[i].used, p.shards[i].byKey = map[[16]byte]usedProof{}, map[[16]byte]int{}
	}
	return p
}

// OpenProofs remembers in a file too, so that a process which ends in any way
// and begins again knows what was used. What another boot of the machine left
// may not be all: then, and where there is no file, proofs of before now are
// refused. The file is this process's until Close.
func OpenProofs(ctx context.Context, path, boot string, now time.Time) (*Proofs, error) {
	f, err := statefile.Hold(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("open used proofs %s: %w", path, err)
	}
	p := NewProofs()
	p.since, p.file = now, f
	if err := p.begin(sha256.Sum256([]byte(boot)), now); err != nil {
		f.Close()
		return nil, fmt.Errorf("open used proofs %s: %w", path, err)
	}
	return p, nil
}

// UnavailableProofs takes no proof, because of err: one that is taken and not
// written down could be used again in the next process.
func UnavailableProofs(err error) *Proofs {
	p := NewProofs()
	p.broken = err
	return p
}

func (p *Proofs) begin(boot [sha256.Size]byte, now time.Time) error {
	info, err := p.file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("not a regular file")
	}
	const size = proofsHead + maxProofs*proofEntry
	want, got := make([]byte, proofsHead), make([]byte, proofsHead)
	copy(want, proofsMagic)
	copy(want[proofsHead-len(boot):], boot[:])
	since := want[24:32]
	if _, err := p.file.ReadAt(got, 0); err == nil && info.Size() == size {
		copy(since, got[24:32])
		before := time.Unix(0, int64(binary.LittleEndian.Uint64(since)))
		if string(got) == string(want) && !before.After(now) { // the clock has not gone back
			p.since = now.Add(before.Sub(now))
			return p.read(now)
		}
	}
	binary.LittleEndian.PutUint64(since, uint64(now.UnixNano()))
	if err := errors.Join(p.file.Truncate(0), p.file.Truncate(size)); err != nil {
		return err
	}
	_, err = p.file.WriteAt(want, 0)
	return err
}

// read takes over what can be used again.
func (p *Proofs) read(now time.Time) error {
	b := make([]byte, maxShard*proofEntry)
	at := now.Unix()
	for i := range p.shards {
		if _, err := p.file.ReadAt(b, offset(i, 0)); err != nil {
			return err
		}
		s := &p.shards[i]
		for place := range maxShard {
			e := b[place*proofEntry:][:proofEntry]
			u := usedProof{[16]byte(e[16:32]), int64(binary.LittleEndian.Uint64(e[32:])), place}
			id := [16]byte(e)
			if _, twice := s.used[id]; twice || u.until < at {
				continue
			}
			for ; s.next < place; s.next++ {
				s.free = append(s.free, s.next)
			}
			s.next = place + 1
			s.used[id] = u
			s.byKey[u.key]++
		}
	}
	return nil
}

func offset(shard, place int) int64 {
	return proofsHead + int64(shard*maxShard+place)*proofEntry
}

// Close lets go of the file.
func (p *Proofs) Close() error {
	if p.file == nil {
		return nil
	}
	return p.file.Close()
}

// use notes a proof of a key, in one step with the look whether it was used
// before.
func (p *Proofs) use(id, key *[sha256.Size]byte, until, now time.Time) (flow.Reason, error) {
	if p.broken != nil {
		return flow.ReasonOverload, fmt.Errorf("used proofs cannot be noted: %w", p.broken)
	}
	if p.before(until.Add(-MaxProofAge), now) {
		return flow.ReasonProofStale, errProofBefore
	}
	n := int(binary.BigEndian.Uint16(id[16:]) % proofShards)
	s := &p.shards[n]
	i, k := [16]byte(id[:16]), [16]byte(key[:16])
	at := now.Unix()
	s.mu.Lock()
	defer s.mu.Unlock()
	before, used := s.used[i]
	if used && before.until >= at {
		return flow.ReasonProofReplayed, errProofTwice
	}
	if used {
		s.forget(i, before)
	}
	err := s.room(k)
	if err != nil && s.swept != at {
		s.sweep(at)
		err = s.room(k)
	}
	if err != nil {
		return flow.ReasonOverload, err
	}
	u := usedProof{k, until.Unix() + 1, s.place()}
	s.used[i] = u
	s.byKey[k]++
	if err := p.write(n, i, u); err != nil {
		s.forget(i, u)
		p.failed.Store(&failure{err.Error(), now})
		return flow.ReasonOverload, fmt.Errorf("used proofs cannot be noted: %w", err)
	}
	if p.failed.Load() != nil {
		p.failed.Store(nil)
	}
	return flow.ReasonOK, nil
}

// failure is why a proof could not be noted.
type failure struct {
	why string
	at  time.Time
}

// failureCounts is for how long one is told where no other proof comes.
const failureCounts = time.Minute

// Unavailable says whether no proof is taken until others are set.
func (p *Proofs) Unavailable() bool { return p.broken != nil }

// Problem says why proofs are not taken, "" where they are.
func (p *Proofs) Problem(now time.Time) string {
	if p.broken != nil {
		return p.broken.Error()
	}
	if f := p.failed.Load(); f != nil && now.Sub(f.at) < failureCounts {
		return f.why
	}
	return ""
}

// before says whether a proof of that time may have been used when nothing was
// remembered yet. After a while none can be used again that was, whatever the
// clock has been set to.
func (p *Proofs) before(issued, now time.Time) bool {
	return !p.since.IsZero() && now.Sub(p.since) <= MaxProofAge+2*MaxProofLead && issued.Before(p.since.Add(MaxProofLead))
}

func (p *Proofs) write(shard int, id [16]byte, u usedProof) error {
	if p.file == nil {
		return nil
	}
	var e [proofEntry]byte
	copy(e[:], id[:])
	copy(e[16:], u.key[:])
	binary.LittleEndian.PutUint64(e[32:], uint64(u.until))
	_, err := p.file.WriteAt(e[:], offset(shard, u.place))
	return err
}

// room says why there is none for another proof of a key.
func (s *proofShard) room(key [16]byte) error {
	switch {
	case len(s.used) >= maxShard:
		return errProofsFull
	case len(s.used) >= maxShard/2 && s.byKey[key] >= proofShare:
		return errProofsOfKey
	}
	return nil
}

// place takes a free place, of which there is one while there is room.
func (s *proofShard) place() int {
	if n := len(s.free); n > 0 {
		place := s.free[n-1]
		s.free = s.free[:n-1]
		return place
	}
	s.next++
	return s.next - 1
}

func (s *proofShard) sweep(at int64) {
	s.swept = at
	for i, u := range s.used {
		if u.until < at {
			s.forget(i, u)
		}
	}
}

func (s *proofShard) forget(id [16]byte, u usedProof) {
	delete(s.used, id)
	s.free = append(s.free, u.place)
	if s.byKey[u.key]--; s.byKey[u.key] <= 0 {
		delete(s.byKey, u.key)
	}
}

// Len is how many used proofs are remembered.
func (p *Proofs) Len() int {
	n := 0
	for i := range p.shards {
		s := &p.shards[i]
		s.mu.Lock()
		n += len(s.used)
		s.mu.Unlock()
	}
	return n
}
