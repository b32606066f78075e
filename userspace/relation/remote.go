// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	openfgav1 "github.com/openfga/api/proto/openfga/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sallyport-dev/sallyport/policies/relations"
)

// Of an engine elsewhere.
const (
	// pollEvery is how often its changes are asked for, maxLag how long ago the
	// last answer may be for cached answers to be served.
	pollEvery = 500 * time.Millisecond
	maxLag    = 5 * time.Second
	// storeEvery is how often the store is looked for: one that was deleted
	// still answers questions, as those that were asked of it before.
	storeEvery = 5 * time.Second
	retryMin   = 500 * time.Millisecond
	retryMax   = 15 * time.Second
	// overlap is how far back changes are read at first: what was written while
	// the first questions were asked, whatever the clocks say.
	overlap = time.Minute
	// maxVersions is how many versions of a store's model are looked through
	// for an equal one.
	maxVersions = 50
)

// backend is what answers the questions of a model: OpenFGA in this process,
// or elsewhere.
type backend interface {
	Check(context.Context, *openfgav1.CheckRequest) (*openfgav1.CheckResponse, error)
	ListObjects(context.Context, *openfgav1.ListObjectsRequest) (*openfgav1.ListObjectsResponse, error)
	Read(context.Context, *openfgav1.ReadRequest) (*openfgav1.ReadResponse, error)
	Write(context.Context, *openfgav1.WriteRequest) (*openfgav1.WriteResponse, error)
	ReadAuthorizationModel(context.Context, *openfgav1.ReadAuthorizationModelRequest) (*openfgav1.ReadAuthorizationModelResponse, error)
}

// remote is the connection to an engine elsewhere, for one model.
type remote struct {
	spec   Model
	stop   context.CancelFunc
	conn   *grpc.ClientConn
	client openfgav1.OpenFGAServiceClient
	secret atomic.Pointer[string] // of the last connection
	// problem is why it does not answer, nil while it does; polled when it was
	// last asked for changes, and answered.
	problem atomic.Pointer[string]
	polled  atomic.Int64 // Unix nanoseconds
	lost    atomic.Bool  // its store is not there any more
}

var (
	errNotYet = errors.New("the engine elsewhere has not answered yet")
	errLost   = errors.New("its store is not there any more")
)

// Check asks it.
func (r *remote) Check(ctx context.Context, q *openfgav1.CheckRequest) (*openfgav1.CheckResponse, error) {
	return r.client.Check(ctx, q)
}

// ListObjects asks it.
func (r *remote) ListObjects(ctx context.Context, q *openfgav1.ListObjectsRequest) (*openfgav1.ListObjectsResponse, error) {
	return r.client.ListObjects(ctx, q)
}

// Read asks it.
func (r *remote) Read(ctx context.Context, q *openfgav1.ReadRequest) (*openfgav1.ReadResponse, error) {
	return r.client.Read(ctx, q)
}

// Write writes to it.
func (r *remote) Write(ctx context.Context, q *openfgav1.WriteRequest) (*openfgav1.WriteResponse, error) {
	return r.client.Write(ctx, q)
}

// ReadAuthorizationModel asks it.
func (r *remote) ReadAuthorizationModel(ctx context.Context, q *openfgav1.ReadAuthorizationModelRequest) (*openfgav1.ReadAuthorizationModelResponse, error) {
	return r.client.ReadAuthorizationModel(ctx, q)
}

// GetRequestMetadata gives each question the pre-shared key.
func (r *remote) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	if s := r.secret.Load(); s != nil && *s != "" {
		return map[string]string{"authorization": "Bearer " + *s}, nil
	}
	return nil, nil
}

// RequireTransportSecurity keeps the key from what is not encrypted.
func (r *remote) RequireTransportSecurity() bool { return true }

// loadRemote makes the model of an engine elsewhere. It does not wait for that:
// until it has answered, questions have no answer.
func (e *Engine) loadRemote(one Model, old *model) (*model, error) {
	if old != nil && old.remote != nil && old.remote.spec.same(&one) {
		return old, nil
	}
	read, errs := relations.Parse(one.Text)
	if errs != nil {
		return nil, fmt.Errorf("read the model: %w", errs[0])
	}
	host, _, err := net.SplitHostPort(one.Remote.Address)
	if err != nil {
		return nil, err
	}
	r := &remote{spec: one}
	problem := errNotYet.Error()
	r.problem.Store(&problem)
	r.conn, err = grpc.NewClient("passthrough:///"+one.Remote.Address,
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c, secret, err := e.opt.Dial(ctx, one.Name)
			if err == nil {
				r.secret.Store(&secret)
			}
			return c, err
		}),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{ServerName: host, RootCAs: e.opt.Roots, MinVersion: tls.VersionTLS12})),
		grpc.WithPerRPCCredentials(r), grpc.WithNoProxy(), grpc.WithDisableServiceConfig(), grpc.WithUserAgent("sallyport"),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}))
	if err != nil {
		return nil, err
	}
	r.client = openfgav1.NewOpenFGAServiceClient(r.conn)
	m := e.describeRemote(read.Proto(), r)
	var ctx context.Context
	ctx, r.stop = context.WithCancel(context.Background())
	e.tails.Go(func() {
		defer r.conn.Close() //nolint:errcheck // nothing is asked any more
		e.follow(ctx, m, read.Proto())
	})
	return m, nil
}

func (m *Model) same(o *Model) bool {
	return m.Name == o.Name && m.Text == o.Text && *m.Remote == *o.Remote
}

func (e *Engine) describeRemote(parsed *openfgav1.AuthorizationModel, r *remote) *model {
	m := describe(parsed)
	m.name, m.backend, m.remote = r.spec.Name, r, r
	// When its leases begin and end is not known here.
	m.foreign = m.foreign || m.leases
	return m
}

// follow finds the store and the model's version, puts them in force, and then
// follows what is written to the store, until ctx ends. A store that is made
// again is another.
func (e *Engine) follow(ctx context.Context, m *model, parsed *openfgav1.AuthorizationModel) {
	r, retry := m.remote, retryMin
	for {
		err := e.resolve(ctx, m, parsed)
		if err == nil {
			e.opt.Log.Info("relation model in use", "model", m.name, "engine", r.spec.Remote.Address)
			retry = retryMin
			err = e.tail(ctx, m)
		}
		if !r.failed(ctx, e, m, err, &retry) {
			return
		}
	}
}

// tail follows what is written to the store, until ctx ends or the store is
// lost.
func (e *Engine) tail(ctx context.Context, m *model) error {
	r, retry := m.remote, retryMin
	looked := e.now()
	since, token := looked.Add(-overlap), ""
	for {
		began := e.now()
		next, changed, err := r.changes(ctx, m, since, token)
		if began.Sub(looked) >= e.looks {
			switch look := r.look(ctx, m); {
			case errors.Is(look, errLost):
				r.lost.Store(true)
				m.all.Add(1) // nothing is known any more
				e.opt.Changed(m.name)
				return look
			case look == nil:
				looked = began
			case err == nil:
				err = look
			}
		}
		switch {
		case err == nil:
			retry, token = retryMin, next
			r.problem.Store(nil)
			if len(changed) > 0 {
				m.lastWrite.Store(e.now().UnixNano())
				m.touch(changed)
				e.opt.Changed(m.name)
				continue // there may be more, and until it is read memory is not fresh
			}
			r.polled.Store(began.UnixNano())
		case !r.failed(ctx, e, m, err, &retry):
			return ctx.Err()
		default:
			continue
		}
		t := time.NewTimer(pollEvery)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}

// look finds out whether the store is still there.
func (r *remote) look(ctx context.Context, m *model) error {
	ctx, cancel := context.WithTimeout(ctx, maxLag)
	defer cancel()
	_, err := r.client.GetStore(ctx, &openfgav1.GetStoreRequest{StoreId: m.ids.Load().store})
	switch status.Code(err) {
	case codes.OK:
		return nil
	case codes.NotFound, codes.Code(openfgav1.NotFoundErrorCode_store_id_not_found):
		return errLost
	}
	return fmt.Errorf("look for its store: %w", err)
}

// store returns the ID of the store that has the name.
func (r *remote) store(ctx context.Context) (string, error) {
	found, err := r.client.ListStores(ctx, &openfgav1.ListStoresRequest{Name: r.spec.Remote.Store, PageSize: wrapperspb.Int32(2)})
	if err != nil {
		return "", fmt.Errorf("find its store: %w", err)
	}
	if n := len(found.GetStores()); n != 1 {
		return "", fmt.Errorf("find its store: %d are named %q", n, r.spec.Remote.Store)
	}
	return found.GetStores()[0].GetId(), nil
}

// failed notes a failure and waits before the next try; false where there is
// to be none.
func (r *remote) failed(ctx context.Context, e *Engine, m *model, err error, retry *time.Duration) bool {
	if ctx.Err() != nil {
		return false
	}
	text := err.Error()
	if before := r.problem.Swap(&text); before == nil || *before == errNotYet.Error() {
		e.opt.Log.Warn("relation engine elsewhere does not answer", "model", m.name, "engine", r.spec.Remote.Address, "error", err)
	}
	t := time.NewTimer(*retry)
	defer t.Stop()
	*retry = min(2**retry, retryMax)
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// resolve finds the store and the version of its model that is equal to ours,
// or writes one.
func (e *Engine) resolve(ctx context.Context, m *model, parsed *openfgav1.AuthorizationModel) error {
	ctx, cancel := context.WithTimeout(ctx, 5*e.opt.Timeout)
	defer cancel()
	r := m.remote
	store, err := r.store(ctx)
	if err != nil {
		return err
	}
	version, token := "", ""
	for seen := 0; version == "" && seen < maxVersions; {
		all, err := r.client.ReadAuthorizationModels(ctx, &openfgav1.ReadAuthorizationModelsRequest{StoreId: store, PageSize: wrapperspb.Int32(10), ContinuationToken: token})
		if err != nil {
			return fmt.Errorf("read its versions: %w", err)
		}
		for _, one := range all.GetAuthorizationModels() {
			same := proto.Clone(one).(*openfgav1.AuthorizationModel)
			same.Id = ""
			if version == "" && proto.Equal(same, parsed) {
				version = one.GetId()
			}
		}
		seen += len(all.GetAuthorizationModels())
		if token = all.GetContinuationToken(); token == "" {
			break
		}
	}
	if version == "" {
		res, err := r.client.WriteAuthorizationModel(ctx, &openfgav1.WriteAuthorizationModelRequest{
			StoreId: store, TypeDefinitions: parsed.GetTypeDefinitions(), SchemaVersion: parsed.GetSchemaVersion(), Conditions: parsed.GetConditions(),
		})
		if err != nil {
			return fmt.Errorf("write the model: %w", err)
		}
		version = res.GetAuthorizationModelId()
	}
	m.ids.Store(&modelIDs{store, version})
	m.lastWrite.Store(e.now().UnixNano())
	m.all.Add(1) // what another store answered
	r.lost.Store(false)
	e.opt.Changed(m.name)
	return nil
}

// changes reads a page of what was written to the store.
func (r *remote) changes(ctx context.Context, m *model, since time.Time, token string) (next string, changed []Tuple, err error) {
	ctx, cancel := context.WithTimeout(ctx, maxLag)
	defer cancel()
	req := &openfgav1.ReadChangesRequest{StoreId: m.ids.Load().store, PageSize: wrapperspb.Int32(100), ContinuationToken: token}
	if token == "" {
		req.StartTime = timestamppb.New(since)
	}
	res, err := r.client.ReadChanges(ctx, req)
	if err != nil {
		return token, nil, fmt.Errorf("read its changes: %w", err)
	}
	for _, c := range res.GetChanges() {
		changed = append(changed, fromKey(c.GetTupleKey()))
	}
	if next = res.GetContinuationToken(); next == "" {
		next = token
	}
	return next, changed, nil
}

// fresh says whether a model's cached answers may be served: those of an
// engine elsewhere only while it is known what is written there.
func (m *model) fresh(now int64) bool {
	return m.remote == nil || now-m.remote.polled.Load() < int64(maxLag)
}
