// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	openfgav1 "github.com/openfga/api/proto/openfga/v1"
	"github.com/openfga/language/pkg/go/transformer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sallyport-dev/sallyport/policies/relations"
)

// conditionLease is the condition that Tuple.NotBefore and Expires become.
const conditionLease = "lease"

// SetModels replaces the relation models, all or none. Each has its own
// tuples, which stay when the model goes and comes back; a text that changed
// becomes a new version and voids every cached answer of that model.
func (e *Engine) SetModels(ctx context.Context, list []Model) error {
	if err := e.ready(); err != nil {
		return fmt.Errorf("set relation models: %w", err)
	}
	if len(list) > relations.MaxModels {
		return fmt.Errorf("set relation models: %d are more than %d", len(list), relations.MaxModels)
	}
	e.write.Lock()
	defer e.write.Unlock()
	old, next := e.models.Load(), &modelSet{byName: make(map[string]*model, len(list))}
	for _, one := range list {
		if one.Name == "" || next.byName[one.Name] != nil {
			return fmt.Errorf("set relation model %q: it has no name or another's", one.Name)
		}
		m, err := e.load(ctx, one, old.byName[one.Name])
		if err != nil {
			for name, m := range next.byName {
				if old.byName[name] != m {
					m.abandon()
				}
			}
			return fmt.Errorf("set relation model %q: %w", one.Name, err)
		}
		next.byName[one.Name] = m
		next.only = m
	}
	if len(list) != 1 {
		next.only = nil
	}
	e.models.Store(next)
	for name, m := range old.byName {
		if next.byName[name] != m {
			m.replaced.Store(true)
			m.abandon()
			e.opt.Changed(name)
		}
	}
	return nil
}

// ModelText returns a loaded model in OpenFGA's modelling language.
func (e *Engine) ModelText(ctx context.Context, name string) (string, error) {
	m, err := e.find(name)
	if err != nil {
		return "", err
	}
	ids := m.ids.Load()
	res, err := m.backend.ReadAuthorizationModel(ctx, &openfgav1.ReadAuthorizationModelRequest{StoreId: ids.store, Id: ids.version})
	if err != nil {
		return "", fmt.Errorf("read relation model %q: %w", m.name, err)
	}
	text, err := transformer.TransformJSONProtoToDSL(res.GetAuthorizationModel())
	if err != nil {
		return "", fmt.Errorf("write relation model %q: %w", m.name, err)
	}
	return text, nil
}

func (e *Engine) find(name string) (*model, error) {
	if err := e.ready(); err != nil {
		return nil, err
	}
	m := e.models.Load().find(name)
	if m == nil {
		return nil, fmt.Errorf("find relation model %q: %w", name, ErrNoModel)
	}
	if !m.known() {
		return nil, fmt.Errorf("relation model %q: %w", name, m.unanswered())
	}
	return m, nil
}

// load makes a model usable, in this process or elsewhere.
func (e *Engine) load(ctx context.Context, one Model, old *model) (*model, error) {
	if one.Remote != nil {
		return e.loadRemote(one, old)
	}
	if old != nil && old.remote != nil {
		old = nil
	}
	return e.loadModel(ctx, one, old)
}

// loadModel brings a model's text into the store, as a new version only where
// it differs from the last one.
func (e *Engine) loadModel(ctx context.Context, one Model, old *model) (*model, error) {
	read, errs := relations.Parse(one.Text)
	if errs != nil {
		return nil, fmt.Errorf("read the model: %w", errs[0])
	}
	parsed := read.Proto()
	store, err := e.store(ctx, one.Name)
	if err != nil {
		return nil, err
	}
	version, err := e.version(ctx, store, parsed)
	if err != nil {
		return nil, err
	}
	if old != nil && *old.ids.Load() == (modelIDs{store, version}) {
		return old, nil
	}
	m := describe(parsed)
	m.name, m.backend = one.Name, e.fga
	m.ids.Store(&modelIDs{store, version})
	e.opt.Log.Info("relation model in use", "model", one.Name, "version", version)
	m.lastWrite.Store(e.now().UnixNano())
	if m.leases {
		err = e.loadLeases(ctx, m)
	}
	return m, err
}

// storeName is a model's name as OpenFGA can take it: 3 to 64 characters.
func storeName(name string) string {
	sum := sha256.Sum256([]byte(name))
	return "model-" + hex.EncodeToString(sum[:16])
}

// store finds or makes the OpenFGA store that holds a model's tuples.
func (e *Engine) store(ctx context.Context, name string) (string, error) {
	found, err := e.fga.ListStores(ctx, &openfgav1.ListStoresRequest{Name: storeName(name), PageSize: wrapperspb.Int32(2)})
	if err != nil {
		return "", fmt.Errorf("find its store: %w", err)
	}
	switch stores := found.GetStores(); len(stores) {
	case 0:
	case 1:
		return stores[0].GetId(), nil
	default:
		return "", errors.New("find its store: there are two")
	}
	made, err := e.fga.CreateStore(ctx, &openfgav1.CreateStoreRequest{Name: storeName(name)})
	if err != nil {
		return "", fmt.Errorf("make its store: %w", err)
	}
	return made.GetId(), nil
}

// version returns the ID of the store's newest version of a model, written
// now where the newest one is another.
func (e *Engine) version(ctx context.Context, store string, parsed *openfgav1.AuthorizationModel) (string, error) {
	last, err := e.fga.ReadAuthorizationModels(ctx, &openfgav1.ReadAuthorizationModelsRequest{StoreId: store, PageSize: wrapperspb.Int32(1)})
	if err != nil {
		return "", fmt.Errorf("read its last version: %w", err)
	}
	if all := last.GetAuthorizationModels(); len(all) > 0 {
		id := all[0].GetId()
		same := proto.Clone(all[0]).(*openfgav1.AuthorizationModel)
		same.Id = ""
		if proto.Equal(same, parsed) {
			return id, nil
		}
	}
	res, err := e.fga.WriteAuthorizationModel(ctx, &openfgav1.WriteAuthorizationModelRequest{
		StoreId: store, TypeDefinitions: parsed.GetTypeDefinitions(),
		SchemaVersion: parsed.GetSchemaVersion(), Conditions: parsed.GetConditions(),
	})
	if err != nil {
		return "", fmt.Errorf("validate and store it: %w", err)
	}
	return res.GetAuthorizationModelId(), nil
}

// describe finds out what of a model the cache needs to know.
func describe(parsed *openfgav1.AuthorizationModel) *model {
	m := &model{closed: make(map[string]bool)}
	for name := range parsed.GetConditions() {
		if name == conditionLease {
			m.leases = true
		} else {
			m.foreign = true
		}
	}
	for _, t := range parsed.GetTypeDefinitions() {
		m.closed[t.GetType()] = true
	}
	for _, t := range parsed.GetTypeDefinitions() {
		tuplesets := make(map[string]bool)
		for _, rewrite := range t.GetRelations() {
			collectTuplesets(rewrite, tuplesets)
		}
		for relation, meta := range t.GetMetadata().GetRelations() {
			for _, user := range meta.GetDirectlyRelatedUserTypes() {
				if user.GetRelation() != "" || tuplesets[relation] {
					delete(m.closed, user.GetType())
				}
			}
		}
	}
	return m
}

// collectTuplesets adds the relations that `X from RELATION` follows.
func collectTuplesets(u *openfgav1.Userset, to map[string]bool) {
	switch r := u.GetUserset().(type) {
	case *openfgav1.Userset_TupleToUserset:
		to[r.TupleToUserset.GetTupleset().GetRelation()] = true
	case *openfgav1.Userset_Union:
		for _, c := range r.Union.GetChild() {
			collectTuplesets(c, to)
		}
	case *openfgav1.Userset_Intersection:
		for _, c := range r.Intersection.GetChild() {
			collectTuplesets(c, to)
		}
	case *openfgav1.Userset_Difference:
		collectTuplesets(r.Difference.GetBase(), to)
		collectTuplesets(r.Difference.GetSubtract(), to)
	}
}
