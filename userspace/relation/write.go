// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"errors"
	"fmt"
	"time"

	openfgav1 "github.com/openfga/api/proto/openfga/v1"
	"github.com/openfga/openfga/pkg/storage"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Write stores tuples; one that is there already is no error, and takes the
// lease of the new one. When it returns, every later Check sees them. They
// become the operator's own: Reconcile leaves them alone.
func (e *Engine) Write(ctx context.Context, name string, tuples []Tuple) error {
	return e.change(ctx, "write", name, tuples, func(m *model) error {
		if err := e.unmark(ctx, m, tuples); err != nil {
			return err
		}
		return e.put(ctx, m, tuples)
	})
}

// Delete removes tuples; one that is not there is no error. When it returns,
// no later Check sees them, and no answer that rested on them is served. One
// that policy files name stays deleted until they stop naming it or Write
// brings it back.
func (e *Engine) Delete(ctx context.Context, name string, tuples []Tuple) error {
	return e.change(ctx, "delete", name, tuples, func(m *model) error {
		if err := e.withhold(ctx, m, tuples); err != nil {
			return err
		}
		return e.remove(ctx, m, tuples)
	})
}

func (e *Engine) change(ctx context.Context, verb, name string, tuples []Tuple, do func(*model) error) error {
	if len(tuples) == 0 || len(tuples) > MaxTuples {
		return fmt.Errorf("%s relations: %d are not between 1 and %d", verb, len(tuples), MaxTuples)
	}
	for i := range tuples {
		if err := tuples[i].Validate(); err != nil {
			return fmt.Errorf("%s relations: tuple %d: %w", verb, i+1, err)
		}
	}
	e.write.Lock()
	defer e.write.Unlock()
	m, err := e.find(name)
	if err != nil {
		return fmt.Errorf("%s relations: %w", verb, err)
	}
	if err := do(m); err != nil {
		return fmt.Errorf("%s relations of model %q: %w", verb, m.name, err)
	}
	return nil
}

// stored runs one change of the store, then voids the answers it can change,
// also where it failed: what a failed transaction left is not known.
func (e *Engine) stored(m *model, tuples []Tuple, do func() error) error {
	m.lastWrite.Store(e.now().UnixNano())
	err := do()
	m.lastWrite.Store(e.now().UnixNano())
	m.touch(tuples)
	e.opt.Changed(m.name)
	return err
}

func (e *Engine) put(ctx context.Context, m *model, tuples []Tuple) error {
	now := e.now()
	for i := range tuples {
		if tuples[i].leased() && !m.leases {
			return errors.New("a tuple is a lease, and the model has no condition lease")
		}
		m.ends.add(&tuples[i], now)
	}
	// A tuple whose lease changes cannot be overwritten, only removed and written.
	var changed []Tuple
	for i := range tuples {
		old, there, err := e.get(ctx, m, &tuples[i])
		if err != nil {
			return err
		}
		if there && (!old.NotBefore.Equal(tuples[i].NotBefore) || !old.Expires.Equal(tuples[i].Expires)) {
			changed = append(changed, tuples[i])
		}
	}
	if len(changed) > 0 {
		if err := e.remove(ctx, m, changed); err != nil {
			return err
		}
	}
	writes := &openfgav1.WriteRequestWrites{OnDuplicate: "ignore"}
	seen := make(map[Tuple]bool, len(tuples))
	for i := range tuples {
		if k := tuples[i].key(); !seen[k] {
			seen[k] = true
			writes.TupleKeys = append(writes.TupleKeys, tupleKey(&tuples[i]))
		}
	}
	return e.stored(m, tuples, func() error {
		_, err := m.backend.Write(ctx, &openfgav1.WriteRequest{StoreId: m.ids.Load().store, AuthorizationModelId: m.ids.Load().version, Writes: writes})
		return err
	})
}

func (e *Engine) remove(ctx context.Context, m *model, tuples []Tuple) error {
	deletes := &openfgav1.WriteRequestDeletes{OnMissing: "ignore"}
	seen := make(map[Tuple]bool, len(tuples))
	for i := range tuples {
		if k := tuples[i].key(); !seen[k] {
			seen[k] = true
			deletes.TupleKeys = append(deletes.TupleKeys, &openfgav1.TupleKeyWithoutCondition{User: k.User, Relation: k.Relation, Object: k.Object})
		}
	}
	return e.stored(m, tuples, func() error {
		_, err := m.backend.Write(ctx, &openfgav1.WriteRequest{StoreId: m.ids.Load().store, AuthorizationModelId: m.ids.Load().version, Deletes: deletes})
		return err
	})
}

// get looks one tuple up by its whole key, which OpenFGA's Read does by
// sorting all of the object's.
func (e *Engine) get(ctx context.Context, m *model, t *Tuple) (Tuple, bool, error) {
	if m.remote != nil {
		res, err := m.backend.Read(ctx, &openfgav1.ReadRequest{StoreId: m.ids.Load().store, PageSize: wrapperspb.Int32(1), Consistency: openfgav1.ConsistencyPreference_HIGHER_CONSISTENCY,
			TupleKey: &openfgav1.ReadRequestTupleKey{User: t.User, Relation: t.Relation, Object: t.Object}})
		if err != nil || len(res.GetTuples()) == 0 {
			return Tuple{}, false, err
		}
		return fromKey(res.GetTuples()[0].GetKey()), true, nil
	}
	found, err := e.tuples.ReadUserTuple(ctx, m.ids.Load().store, storage.ReadUserTupleFilter{User: t.User, Relation: t.Relation, Object: t.Object}, storage.ReadUserTupleOptions{})
	if errors.Is(err, storage.ErrNotFound) {
		return Tuple{}, false, nil
	}
	if err != nil {
		return Tuple{}, false, err
	}
	return fromKey(found.GetKey()), true, nil
}

// Read returns up to limit stored tuples, at most MaxListed, that equal the
// given one in each part that is not empty; without any part, all. A filter
// needs an object or its type ("document:"), unless it is empty.
func (e *Engine) Read(ctx context.Context, model string, like Tuple, limit int) ([]Tuple, error) {
	m, err := e.find(model)
	if err != nil {
		return nil, fmt.Errorf("read relations: %w", err)
	}
	if limit <= 0 || limit > MaxListed {
		limit = MaxListed
	}
	var out []Tuple
	err = e.scan(ctx, m, like, func(t Tuple) bool {
		out = append(out, t)
		return len(out) < limit
	})
	if err != nil {
		return nil, fmt.Errorf("read relations of model %q: %w", m.name, err)
	}
	return out, nil
}

// scan calls yield for the matching tuples until it returns false.
func (e *Engine) scan(ctx context.Context, m *model, like Tuple, yield func(Tuple) bool) error {
	req := &openfgav1.ReadRequest{
		StoreId: m.ids.Load().store, PageSize: wrapperspb.Int32(100), Consistency: openfgav1.ConsistencyPreference_HIGHER_CONSISTENCY,
	}
	if like.User != "" || like.Relation != "" || like.Object != "" {
		req.TupleKey = &openfgav1.ReadRequestTupleKey{User: like.User, Relation: like.Relation, Object: like.Object}
	}
	for {
		res, err := m.backend.Read(ctx, req)
		if err != nil {
			return err
		}
		for _, t := range res.GetTuples() {
			if !yield(fromKey(t.GetKey())) {
				return nil
			}
		}
		if req.ContinuationToken = res.GetContinuationToken(); req.ContinuationToken == "" {
			return nil
		}
	}
}

// ListObjects returns the objects of a type that a subject has a relation to,
// at most MaxListed and as many as are found within Options.Timeout.
func (e *Engine) ListObjects(ctx context.Context, model, subject, relation, objectType string) ([]string, error) {
	m, err := e.find(model)
	if err != nil {
		return nil, fmt.Errorf("list objects: %w", err)
	}
	if !validUser(subject, false) || !validName(relation, maxRelation) || !validName(objectType, maxType) {
		return nil, fmt.Errorf("list objects: %w", errQuestion)
	}
	req := &openfgav1.ListObjectsRequest{
		StoreId: m.ids.Load().store, AuthorizationModelId: m.ids.Load().version, Type: objectType, Relation: relation, User: subject,
		Consistency: openfgav1.ConsistencyPreference_HIGHER_CONSISTENCY,
	}
	if m.leases || m.foreign {
		req.Context = &structpb.Struct{Fields: map[string]*structpb.Value{
			"now": structpb.NewStringValue(e.now().UTC().Format(time.RFC3339Nano)),
		}}
	}
	res, err := m.backend.ListObjects(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("list objects of model %q: %w", m.name, err)
	}
	return res.GetObjects(), nil
}

// loadLeases finds when the stored leases of a model begin and end.
func (e *Engine) loadLeases(ctx context.Context, m *model) error {
	now := e.now()
	err := e.scan(ctx, m, Tuple{}, func(t Tuple) bool {
		m.ends.add(&t, now)
		return true
	})
	if err != nil {
		return fmt.Errorf("read its leases: %w", err)
	}
	return nil
}

const (
	openBegin = "1970-01-01T00:00:00Z"
	openEnd   = "9999-12-31T23:59:59Z"
)

func tupleKey(t *Tuple) *openfgav1.TupleKey {
	k := &openfgav1.TupleKey{User: t.User, Relation: t.Relation, Object: t.Object}
	if !t.leased() {
		return k
	}
	begin, end := openBegin, openEnd
	if !t.NotBefore.IsZero() {
		begin = t.NotBefore.UTC().Format(time.RFC3339Nano)
	}
	if !t.Expires.IsZero() {
		end = t.Expires.UTC().Format(time.RFC3339Nano)
	}
	k.Condition = &openfgav1.RelationshipCondition{Name: conditionLease, Context: &structpb.Struct{Fields: map[string]*structpb.Value{
		"not_before": structpb.NewStringValue(begin), "expires": structpb.NewStringValue(end),
	}}}
	return k
}

func fromKey(k *openfgav1.TupleKey) Tuple {
	t := Tuple{User: k.GetUser(), Relation: k.GetRelation(), Object: k.GetObject()}
	if k.GetCondition().GetName() != conditionLease {
		return t
	}
	fields := k.GetCondition().GetContext().GetFields()
	if s := fields["not_before"].GetStringValue(); s != openBegin {
		t.NotBefore, _ = time.Parse(time.RFC3339Nano, s)
	}
	if s := fields["expires"].GetStringValue(); s != openEnd {
		t.Expires, _ = time.Parse(time.RFC3339Nano, s)
	}
	return t
}
