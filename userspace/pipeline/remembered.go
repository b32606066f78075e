// SPDX-License-Identifier: Apache-2.0

package pipeline

import (
	"crypto/sha256"
	"encoding/binary"
	"time"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// Bounds of what is remembered for onError: cached.
const (
	rememberFor        = 5 * time.Minute // from when the stage itself gave the answer
	maxRemembered      = 1024            // answers that a loop holds
	maxRememberedToken = 4 << 10         // bytes of a token whose claims are held
)

// memory is what stages allowed to the calls of policies with onError: cached,
// for when they cannot answer. It belongs to one loop; of two answers that
// fall on one place the newer stays.
type memory struct {
	key     [sha256.Size]byte // so that nobody can choose where a call falls
	answers []remembered      // none before the first
}

// question is a keyed hash of all that an answer depends on. The generation of
// plan, revocations and relations is in it: whatever changes voids all answers.
type question [sha256.Size]byte

// remembered is a stage's answer to allow.
type remembered struct {
	question question
	given    time.Time
	until    time.Time     // when it ends by itself, zero if never
	claims   *token.Claims // of the token stage
}

// place is where a question's answer stands, nil before the first is put.
func (m *memory) place(q *question) *remembered {
	if m.answers == nil {
		return nil
	}
	return &m.answers[binary.LittleEndian.Uint32(q[:])%maxRemembered]
}

func (m *memory) put(a remembered) {
	if m.answers == nil {
		m.answers = make([]remembered, maxRemembered)
	}
	*m.place(&a.question) = a
}

// remembers says whether a rule's answers are held: its policy asks for it,
// and it is of the plan that the generation stands for.
func (r *run) remembers(rule *compile.Rule) bool {
	if !r.api.CacheErrors {
		return false
	}
	_, current := r.st.rules[rule]
	return current
}

// question begins the question of a rule's stage; the caller appends what the
// stage looks at, by part, and sums it up.
func (r *run) question(stage flow.Stage, rule *compile.Rule) {
	r.asked = append(r.asked[:0], r.env.Loop.memory.key[:]...)
	r.asked = binary.LittleEndian.AppendUint64(r.asked, r.generation)
	r.asked = append(r.asked, byte(stage))
	r.asked = part(part(part(r.asked, r.api.Name), rule.Name), r.req.Peer.ID)
}

// part appends one with its length, so that no two lists of parts are alike.
func part[T string | []byte](b []byte, v T) []byte {
	return append(binary.LittleEndian.AppendUint32(b, uint32(len(v))), v...)
}

// tokenQuestion asks what the token stage does: this token, by these proofs.
func (r *run) tokenQuestion(rule *compile.Rule) question {
	r.question(flow.StageToken, rule)
	sum := sha256.Sum256(r.raw)
	r.asked = part(r.asked, sum[:])
	for i := range r.req.Peer.Thumbprints {
		r.asked = part(r.asked, r.req.Peer.Thumbprints[i][:])
	}
	return sha256.Sum256(r.asked)
}

// relationQuestion asks for the relation that r.user and r.object stand in.
func (r *run) relationQuestion(rule *compile.Rule, model string) question {
	r.question(flow.StageRelation, rule)
	r.asked = part(part(part(part(r.asked, model), r.user), rule.Relation.Relation), r.object)
	return sha256.Sum256(r.asked)
}

// remember holds an answer that the stage itself has just given.
func (r *run) remember(q question, until time.Time, claims *token.Claims) {
	r.env.Loop.memory.put(remembered{q, r.p.opt.Now(), until, claims})
}

// recall returns the answer to the same question of a while ago, nil where
// there is none that still holds.
func (r *run) recall(q *question) *remembered {
	a, now := r.env.Loop.memory.place(q), r.p.opt.Now()
	switch {
	case a == nil, a.question != *q, r.p.generation.Load() != r.generation,
		now.Before(a.given), !now.Before(a.given.Add(rememberFor)),
		!a.until.IsZero() && !now.Before(a.until):
		return nil
	}
	return a
}

// rest has the rule rest on an answer of a while ago, because of a failure of
// its stage, and says so.
func (r *run) rest(a *remembered, stage flow.Stage, rule *compile.Rule, why flow.Reason) {
	end := a.given.Add(rememberFor)
	if r.recalledEnd.IsZero() || end.Before(r.recalledEnd) {
		r.recalledEnd = end
	}
	if r.recalled != "" {
		r.recalled += "; "
	}
	text := "cached answer of " + a.given.UTC().Format(time.RFC3339) + ", because " + stage.String() + " failed: " + string(why)
	r.env.Loop.counts.recalled.Add(1)
	r.recalled += text
	r.step(stage, flow.ReasonOK, text, rule.Name)
}
