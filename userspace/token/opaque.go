// SPDX-License-Identifier: Apache-2.0

package token

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// Bounds of introspection (RFC 7662).
const (
	// MaxAnswer is the longest answer of an issuer that is read, in bytes.
	MaxAnswer = 64 << 10

	answerLife    = time.Minute     // of one that a token is active, at most
	inactiveLife  = 5 * time.Second // of one that it is not
	failureLife   = time.Second     // of none
	answerTimeout = 5 * time.Second
	maxAsking     = 32   // questions to one issuer at once
	maxRefused    = 4096 // tokens of one issuer that are remembered as refused
	maxAskers     = 1024 // callers whose questions are counted
	askBurst      = 50   // questions of one caller at once, about tokens that are not known
	askRate       = 10   // and each second from then on
)

var (
	errInactive   = errors.New("verify token: the issuer says that it is not active")
	errAnswer     = errors.New("verify token: the issuer's answer about it is not one of RFC 7662")
	errAnswerFrom = errors.New("verify token: the issuer's answer names another issuer")

	// ErrAskedMuch says that the caller has the issuer asked about more tokens
	// than it may.
	ErrAskedMuch = errors.New("verify token: too many tokens that are not known are asked about")
	// ErrAnswerPending says that the issuer has to be asked about a token, by
	// Introspect, before it can be judged.
	ErrAnswerPending = errors.New("verify token: its issuer has not been asked about it")
)

// answerNames are the members of an answer that decide something.
var answerNames = func() map[string]string {
	m := maps.Clone(reservedClaims)
	maps.Copy(m, reservedNames("active", "username", "token_type"))
	return m
}()

// questions are those about the opaque tokens of one issuer.
type questions struct {
	marker keySet // stands for the issuer's keys where cached answers are held

	mu      sync.Mutex
	asking  map[[sha256.Size]byte]*question
	refused map[[sha256.Size]byte]refusal
	askers  map[string]*asker
}

// question is one that is under way.
type question struct {
	done   chan struct{}
	claims *Claims
}

// refusal is what is known of a token that is refused.
type refusal struct {
	reason flow.Reason
	err    error
	until  time.Time
}

// asker is a caller's budget of questions.
type asker struct {
	left float64
	at   time.Time
}

// opaque says whether a token is one that its issuer is asked about: any
// where it has no keys, else one that has not the form of a JWT.
func (i *issuer) opaque(raw []byte) bool {
	return i.Introspect && (i.NoKeys || !isJWT(raw))
}

// isJWT says whether raw has the form of a JWT (RFC 7519 section 3).
func isJWT(raw []byte) bool {
	head, _, _ := bytes.Cut(raw, []byte{'.'})
	if bytes.Count(raw, []byte{'.'}) != 2 {
		return false
	}
	b, err := decodeSegment(string(head))
	return err == nil && bytes.HasPrefix(bytes.TrimLeft(b, " \t\r\n"), []byte{'{'})
}

// refusal returns what is known against a token.
func (q *questions) refusal(sum *[sha256.Size]byte, now time.Time) (flow.Reason, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if r, ok := q.refused[*sum]; ok && now.Before(r.until) {
		return r.reason, r.err
	}
	return flow.ReasonTokenUnavailable, ErrAnswerPending
}

// Introspect asks the issuer about the token of a check that Verify could not
// judge (ErrAnswerPending); then it may be verified once more. It blocks. caller
// is whose budget the question is charged to.
func (v *Verifier) Introspect(ctx context.Context, raw []byte, caller string, c *Check) {
	i := (*v.issuers.Load())[c.Issuer]
	if i == nil || v.opt.Introspect == nil {
		return
	}
	sum, now := sha256.Sum256(raw), v.opt.Now()
	i.questions.mu.Lock()
	q := i.questions.asking[sum]
	if q == nil {
		if len(i.questions.asking) >= maxAsking || !i.questions.charge(caller, now) {
			i.questions.mu.Unlock()
			c.refused = ErrAskedMuch
			return
		}
		q = &question{done: make(chan struct{})}
		i.questions.asking[sum] = q
		go v.ask(i, sum, string(raw), q)
	}
	i.questions.mu.Unlock()
	select {
	case <-q.done:
		c.given = q.claims
	case <-ctx.Done():
		c.refused = ctx.Err()
	}
}

// charge takes a question from a caller's budget. The lock is held.
func (q *questions) charge(caller string, now time.Time) bool {
	a := q.askers[caller]
	if a == nil {
		if len(q.askers) >= maxAskers {
			clear(q.askers) // whose budgets are full again before long
		}
		a = &asker{left: askBurst, at: now}
		q.askers[caller] = a
	}
	a.left = min(askBurst, a.left+askRate*max(0, now.Sub(a.at).Seconds()))
	a.at = now
	if a.left < 1 {
		return false
	}
	a.left--
	return true
}

// ask asks, once for all that wait for the same.
func (v *Verifier) ask(i *issuer, sum [sha256.Size]byte, raw string, q *question) {
	ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
	defer cancel()
	body, err := v.opt.Introspect(ctx, i.Name, raw)
	now := v.opt.Now()
	r := refusal{reason: flow.ReasonTokenUnavailable, until: now.Add(failureLife)}
	if err == nil {
		q.claims, err = readAnswer(body, i, now)
	} else {
		err = fmt.Errorf("verify token: ask its issuer: %w", err)
	}
	if errors.Is(err, errInactive) {
		r.reason, r.until = flow.ReasonTokenInactive, now.Add(inactiveLife)
	}
	if err == nil {
		v.cache.put(&sum, i, &i.questions.marker, q.claims, len(raw))
	}
	i.questions.mu.Lock()
	delete(i.questions.asking, sum)
	if r.err = err; err != nil {
		i.questions.remember(sum, r, now)
	} else {
		delete(i.questions.refused, sum)
	}
	i.questions.mu.Unlock()
	close(q.done)
}

// remember keeps a refusal. The lock is held.
func (q *questions) remember(sum [sha256.Size]byte, r refusal, now time.Time) {
	if len(q.refused) >= maxRefused {
		maps.DeleteFunc(q.refused, func(_ [sha256.Size]byte, r refusal) bool { return !now.Before(r.until) })
	}
	if len(q.refused) < maxRefused {
		q.refused[sum] = r
	}
}

// readAnswer reads an answer about a token (RFC 7662 section 2.2). What it says
// is judged as a token's claims are.
func readAnswer(body []byte, i *issuer, now time.Time) (*Claims, error) {
	if len(body) > MaxAnswer {
		return nil, errAnswer
	}
	raw, err := readObject(string(body), answerNames)
	if err != nil {
		return nil, errAnswer
	}
	switch active, ok := raw["active"].(bool); {
	case !ok:
		return nil, errAnswer
	case !active:
		return nil, errInactive
	}
	switch iss, there := raw["iss"]; {
	case !there:
		raw["iss"] = i.URL
	case iss != i.URL:
		return nil, errAnswerFrom
	}
	if _, there := raw["sub"]; !there {
		// A client that acts for itself (RFC 9068 section 2.2).
		if id, ok := raw["client_id"]; ok {
			raw["sub"] = id
		}
	}
	c, err := readClaims(raw)
	if err != nil {
		return nil, err
	}
	c.opaque, c.until = true, now.Add(answerLife)
	if !c.Expiry.IsZero() && c.Expiry.Before(c.until) {
		c.until = c.Expiry
	}
	return c, nil
}
