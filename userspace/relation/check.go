// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	openfgav1 "github.com/openfga/api/proto/openfga/v1"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

var (
	errQuestion = errors.New("check relation: the subject is not TYPE:ID or TYPE:ID#RELATION, or the object not TYPE:ID")
	errMissing  = errors.New("check relation: the subject does not have it")
)

// Cached returns an answer from memory, and whether there is one that holds.
// It neither blocks nor allocates nor keeps its arguments.
func (e *Engine) Cached(model, subject, relation, object string) (Answer, bool) {
	m := e.models.Load().find(model)
	if m == nil {
		return Answer{}, false
	}
	now := e.now().UnixNano()
	if !m.known() || !m.fresh(now) {
		return Answer{}, false
	}
	return e.cache.get(m, e.cache.hash(subject, relation, object), subject, relation, object, now)
}

// Check answers from memory or asks the engine, so it may block for
// Options.Timeout. Contextual tuples hold for this question alone; with them
// neither the cache nor another's question is used. Without an error the
// reason is flow.ReasonOK and the answer allowed; otherwise it is
// flow.ReasonRelation (the relation does not hold), ReasonRelationTemplate
// (not a question) or ReasonRelationUnavailable (no answer could be had).
func (e *Engine) Check(ctx context.Context, model, subject, relation, object string, contextual ...Tuple) (Answer, flow.Reason, error) {
	answer, err := e.ask(ctx, model, subject, relation, object, contextual)
	switch {
	case errors.Is(err, errQuestion):
		return Answer{}, flow.ReasonRelationTemplate, err
	case err != nil:
		e.failures.Add(1)
		return Answer{}, flow.ReasonRelationUnavailable, err
	case !answer.Allowed:
		return answer, flow.ReasonRelation, errMissing
	}
	return answer, flow.ReasonOK, nil
}

func (e *Engine) ask(ctx context.Context, name, subject, relation, object string, contextual []Tuple) (Answer, error) {
	if err := e.ready(); err != nil {
		return Answer{}, err
	}
	m := e.models.Load().find(name)
	if m == nil {
		return Answer{}, fmt.Errorf("check relation with model %q: %w", name, ErrNoModel)
	}
	if !validUser(subject, false) || !validName(relation, maxRelation) || !validObject(object) {
		return Answer{}, errQuestion
	}
	if !m.known() {
		return Answer{}, m.unanswered()
	}
	hash := e.cache.hash(subject, relation, object)
	if len(contextual) == 0 {
		now := e.now().UnixNano()
		if a, ok := e.cache.get(m, hash, subject, relation, object, now); ok && m.fresh(now) {
			return a, nil
		}
	} else if len(contextual) > MaxTuples {
		return Answer{}, errQuestion
	}
	q := question{m, strings.Clone(subject), strings.Clone(relation), strings.Clone(object), m.stamp(object)}
	ctx, cancel := context.WithTimeout(ctx, e.opt.Timeout)
	defer cancel()
	f, leader := e.flights.join(q, len(contextual) == 0)
	if leader {
		select {
		case e.slots <- struct{}{}:
			if !e.begin() {
				<-e.slots
				e.flights.end(f, Answer{}, errUnavailable)
				break
			}
			go e.fly(f, hash, contextual)
		case <-ctx.Done():
			e.flights.end(f, Answer{}, errOverload)
		}
	}
	select {
	case <-f.done:
		return f.answer, f.err
	case <-ctx.Done():
		return Answer{}, fmt.Errorf("check relation: %w", ctx.Err())
	}
}

// begin counts a question in, unless the engine is being closed.
func (e *Engine) begin() bool {
	e.closing.RLock()
	defer e.closing.RUnlock()
	if !e.open.Load() {
		return false
	}
	e.work.Add(1)
	return true
}

// fly works on one question for all who ask it. It outlives each of them, so
// that one caller's end does not fail the others.
func (e *Engine) fly(f *flight, hash uint64, contextual []Tuple) {
	ctx, cancel := context.WithTimeout(context.Background(), e.opt.Timeout)
	answer, err := Answer{}, errUnavailable
	now := e.now()
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("check relation: the engine broke off: %v", r)
		}
		cancel()
		if err == nil && f.shared {
			e.remember(&f.question, hash, answer, now)
		}
		e.flights.end(f, answer, err)
		<-e.slots
		e.work.Done()
	}()
	e.checks.Add(1)
	answer, err = e.evaluate(ctx, &f.question, contextual, now)
}

func (e *Engine) remember(q *question, hash uint64, answer Answer, now time.Time) {
	expires := now.Add(e.opt.TTL)
	if q.model.foreign {
		expires = now.Add(min(e.opt.TTL, time.Second))
	}
	if !answer.Until.IsZero() && answer.Until.Before(expires) {
		expires = answer.Until
	}
	e.cache.put(&decision{
		model: q.model, subject: q.subject, relation: q.relation, object: q.object,
		hash: hash, stamp: q.stamp, answer: answer, expires: expires.UnixNano(),
	}, now.UnixNano())
}

func (e *Engine) evaluate(ctx context.Context, q *question, contextual []Tuple, now time.Time) (Answer, error) {
	m, ids := q.model, q.model.ids.Load()
	req := &openfgav1.CheckRequest{
		StoreId: ids.store, AuthorizationModelId: ids.version,
		TupleKey:    &openfgav1.CheckRequestTupleKey{User: q.subject, Relation: q.relation, Object: q.object},
		Consistency: openfgav1.ConsistencyPreference_MINIMIZE_LATENCY,
	}
	// The stamp was read before this: whoever has seen a write's stamp sees its time too.
	if now.UnixNano()-m.lastWrite.Load() < int64(settle) {
		req.Consistency = openfgav1.ConsistencyPreference_HIGHER_CONSISTENCY
	}
	answer := Answer{}
	if m.leases || m.foreign {
		req.Context = &structpb.Struct{Fields: map[string]*structpb.Value{
			"now": structpb.NewStringValue(now.UTC().Format(time.RFC3339Nano)),
		}}
		answer.Until = m.ends.next(now)
	}
	for i := range contextual {
		if err := contextual[i].Validate(); err != nil {
			return Answer{}, err
		}
		if req.ContextualTuples == nil {
			req.ContextualTuples = &openfgav1.ContextualTupleKeys{}
		}
		req.ContextualTuples.TupleKeys = append(req.ContextualTuples.TupleKeys, tupleKey(&contextual[i]))
	}
	res, err := m.backend.Check(ctx, req)
	if err != nil {
		return Answer{}, fmt.Errorf("check relation: %w", err)
	}
	answer.Allowed = res.GetAllowed()
	return answer, nil
}

// question is what is asked, and the stamp under which: one that is asked
// after a write is another question than the same one asked before it.
type question struct {
	model                     *model
	subject, relation, object string
	stamp                     stamp
}

// flight is a question that the engine works on.
type flight struct {
	question
	shared bool
	done   chan struct{}
	answer Answer // as err, written before done is closed
	err    error
}

// flights makes one of the questions that are asked at the same time. Only
// what is not in the cache comes here.
type flights struct {
	mu  sync.Mutex
	all map[question]*flight
}

func (f *flights) init() { f.all = make(map[question]*flight) }

// join returns the flight of a question and whether the caller is to start
// it. One that is not shared is the caller's own.
func (f *flights) join(q question, shared bool) (*flight, bool) {
	made := &flight{question: q, shared: shared, done: make(chan struct{})}
	if !shared {
		return made, true
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if one := f.all[q]; one != nil {
		return one, false
	}
	f.all[q] = made
	return made, true
}

func (f *flights) end(one *flight, answer Answer, err error) {
	one.answer, one.err = answer, err
	if one.shared {
		f.mu.Lock()
		delete(f.all, one.question)
		f.mu.Unlock()
	}
	close(one.done)
}
