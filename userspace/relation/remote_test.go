// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	openfgav1 "github.com/openfga/api/proto/openfga/v1"
	"github.com/openfga/openfga/pkg/server"
	"github.com/openfga/openfga/pkg/storage/memory"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// elsewhere is a real OpenFGA server, over TLS, that wants a key.
type elsewhere struct {
	t     *testing.T
	fga   *server.Server
	store string
	cert  tls.Certificate
	roots *x509.CertPool
	addr  atomic.Pointer[string]
	text  string // the model that we have of it
	serve *grpc.Server
	calls atomic.Int32 // questions
	down  atomic.Bool  // no connection is made
	gone  atomic.Pointer[string]
	// What has come: a question for a store, a change of what is known.
	looked, changed chan struct{}
}

func newElsewhere(t *testing.T) *elsewhere {
	t.Helper()
	s := &elsewhere{t: t, text: testModel, looked: make(chan struct{}, 1024), changed: make(chan struct{}, 1024), fga: server.MustNewServerWithOpts(server.WithDatastore(memory.New()), server.WithCheckQueryCacheEnabled(true), server.WithCheckQueryCacheTTL(time.Minute))}
	t.Cleanup(s.fga.Close)
	made, err := s.fga.CreateStore(t.Context(), &openfgav1.CreateStoreRequest{Name: "shop"})
	must(t, err)
	s.store = made.GetId()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "fga"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"fga.example"},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	must(t, err)
	root, err := x509.ParseCertificate(der)
	must(t, err)
	s.cert, s.roots = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, x509.NewCertPool()
	s.roots.AddCert(root)
	s.start()
	return s
}

func (s *elsewhere) start() {
	s.t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	must(s.t, err)
	addr := l.Addr().String()
	s.addr.Store(&addr)
	s.serve = grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&s.cert)), grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		if got := md.Get("authorization"); len(got) != 1 || got[0] != "Bearer s3cret" {
			return nil, status.Error(codes.Unauthenticated, "who are you")
		}
		if q, ok := req.(interface{ GetStoreId() string }); ok && s.gone.Load() != nil && q.GetStoreId() == *s.gone.Load() {
			return nil, status.Error(codes.Code(openfgav1.NotFoundErrorCode_store_id_not_found), "Store ID not found")
		}
		switch {
		case strings.HasSuffix(info.FullMethod, "/Check"):
			s.calls.Add(1)
		case strings.HasSuffix(info.FullMethod, "/GetStore"):
			s.looked <- struct{}{}
		}
		return next(ctx, req)
	}))
	openfgav1.RegisterOpenFGAServiceServer(s.serve, s.fga)
	go s.serve.Serve(l) //nolint:errcheck // ends with Stop
	s.t.Cleanup(s.serve.Stop)
}

// write changes the store as others do.
func (s *elsewhere) write(user, relation, object string, add bool) {
	s.t.Helper()
	q := &openfgav1.WriteRequest{StoreId: s.store}
	if add {
		q.Writes = &openfgav1.WriteRequestWrites{TupleKeys: []*openfgav1.TupleKey{{User: user, Relation: relation, Object: object}}}
	} else {
		q.Deletes = &openfgav1.WriteRequestDeletes{TupleKeys: []*openfgav1.TupleKeyWithoutCondition{{User: user, Relation: relation, Object: object}}}
	}
	_, err := s.fga.Write(s.t.Context(), q)
	must(s.t, err)
}

const remoteName = "shop/far"

func (s *elsewhere) engine(secret string) *Engine {
	s.t.Helper()
	e := openEngine(s.t, s.t.TempDir(), Options{Roots: s.roots, Changed: func(string) { s.changed <- struct{}{} }, Dial: func(ctx context.Context, model string) (net.Conn, string, error) {
		if model != remoteName || s.down.Load() {
			return nil, "", errors.New("there is no way")
		}
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", *s.addr.Load())
		return c, secret, err
	}})
	e.looks = pollEvery
	must(s.t, e.SetModels(s.t.Context(), []Model{s.model(s.text), {Name: "shop/near", Text: testModel}}))
	return e
}

func (s *elsewhere) model(text string) Model {
	return Model{Name: remoteName, Text: text, Remote: &Remote{Address: "fga.example:8081", Store: "shop"}}
}

// until asks until the answer is the one that is wanted.
func until(t *testing.T, e *Engine, want flow.Reason) {
	t.Helper()
	for late := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		_, reason, err := e.Check(t.Context(), remoteName, "user:alice", "can_pay", "account:1")
		if reason == want {
			return
		}
		if time.Now().After(late) {
			t.Fatalf("%q (%v), want %q; %+v", reason, err, want, e.Status())
		}
	}
}

// TestRemote holds that an engine elsewhere answers as one in this process
// does, and that what is written there counts soon.
func TestRemote(t *testing.T) {
	s := newElsewhere(t)
	e := s.engine("s3cret")
	until(t, e, flow.ReasonRelation)
	if st := e.Status(); !st.Ready || st.Problem != "" || st.Models != 2 {
		t.Errorf("%+v", st)
	}
	s.write("user:alice", "can_pay", "account:1", true)
	until(t, e, flow.ReasonOK)
	// What is known is not asked for again.
	before := s.calls.Load()
	for range 20 {
		if _, ok := e.Cached(remoteName, "user:alice", "can_pay", "account:1"); !ok {
			until(t, e, flow.ReasonOK) // a lease model's answers count for a second
		}
	}
	if n := s.calls.Load() - before; n > 5 {
		t.Errorf("%d questions", n)
	}
	s.write("user:alice", "can_pay", "account:1", false)
	began := time.Now()
	until(t, e, flow.ReasonRelation)
	t.Logf("a tuple that was deleted counted for %v", time.Since(began))
	// By our own verbs, as in this process.
	must(t, e.Write(t.Context(), remoteName, tuples(t, "user:alice can_pay account:1")))
	if _, reason, err := e.Check(t.Context(), remoteName, "user:alice", "can_pay", "account:1"); reason != flow.ReasonOK {
		t.Errorf("written: %q (%v)", reason, err)
	}
	must(t, e.Write(t.Context(), remoteName, tuples(t, "user:alice can_pay account:1"))) // again
	got, err := e.Read(t.Context(), remoteName, Tuple{Object: "account:1"}, 10)
	if err != nil || len(got) != 1 || got[0].User != "user:alice" {
		t.Errorf("read: %v %v", got, err)
	}
	objects, err := e.ListObjects(t.Context(), remoteName, "user:alice", "can_pay", "account")
	if err != nil || len(objects) != 1 || objects[0] != "account:1" {
		t.Errorf("list: %v %v", objects, err)
	}
	must(t, e.Delete(t.Context(), remoteName, tuples(t, "user:alice can_pay account:1")))
	if _, reason, err := e.Check(t.Context(), remoteName, "user:alice", "can_pay", "account:1"); reason != flow.ReasonRelation {
		t.Errorf("deleted: %q (%v)", reason, err)
	}
	if text, err := e.ModelText(t.Context(), remoteName); err != nil || !strings.Contains(text, "define can_pay") {
		t.Errorf("model: %q %v", text, err)
	}
	if _, err := e.Reconcile(t.Context(), remoteName, nil); err != nil {
		t.Errorf("no tuples of files: %v", err)
	}
	if _, err := e.Reconcile(t.Context(), remoteName, tuples(t, "user:alice can_pay account:1")); err == nil {
		t.Error("tuples of files are taken")
	}
	// The other model is its own.
	if _, reason, err := e.Check(t.Context(), "shop/near", "user:alice", "can_pay", "account:1"); reason != flow.ReasonRelation {
		t.Errorf("in this process: %q (%v)", reason, err)
	}
	// One version, however often it is loaded.
	other := s.engine("s3cret")
	until(t, other, flow.ReasonRelation)
	all, err := s.fga.ReadAuthorizationModels(t.Context(), &openfgav1.ReadAuthorizationModelsRequest{StoreId: s.store})
	if err != nil || len(all.GetAuthorizationModels()) != 1 {
		t.Errorf("%d versions, %v", len(all.GetAuthorizationModels()), err)
	}
	// Another text is another version, and the old one is followed no more.
	must(t, e.SetModels(t.Context(), []Model{s.model(plainModel)}))
	s.write("user:alice", "can_pay", "account:1", true)
	until(t, e, flow.ReasonOK)
}

// TestRemoteDown holds that without an answer there is none, and that it comes
// back by itself.
func TestRemoteDown(t *testing.T) {
	s := newElsewhere(t)
	s.down.Store(true)
	e := s.engine("s3cret")
	if _, reason, err := e.Check(t.Context(), remoteName, "user:alice", "can_pay", "account:1"); reason != flow.ReasonRelationUnavailable || err == nil {
		t.Errorf("never there: %q (%v)", reason, err)
	}
	for late := time.Now().Add(20 * time.Second); !strings.Contains(e.Status().Problem, "there is no way"); time.Sleep(time.Millisecond) {
		if time.Now().After(late) {
			t.Fatalf("%+v", e.Status())
		}
	}
	for _, err := range []error{e.Write(t.Context(), remoteName, tuples(t, "user:alice can_pay account:1")), func() error { _, err := e.ModelText(t.Context(), remoteName); return err }()} {
		if err == nil {
			t.Error("something is done there")
		}
	}
	if _, reason, err := e.Check(t.Context(), "shop/near", "user:alice", "can_pay", "account:1"); reason != flow.ReasonRelation {
		t.Errorf("in this process: %q (%v)", reason, err)
	}
	s.down.Store(false)
	s.write2("user:alice", "account:1")
	until(t, e, flow.ReasonOK)
	// It goes: what is known counts as long as it may be known, and no longer.
	s.serve.Stop()
	until(t, e, flow.ReasonRelationUnavailable)
	now := time.Now().Add(maxLag)
	m := e.models.Load().find(remoteName)
	if m.fresh(now.UnixNano()) {
		t.Error("cached answers are served of an engine that is gone")
	}
	s.start()
	until(t, e, flow.ReasonOK)
}

// TestRemoteStoreMadeAgain holds that a store which is deleted answers nothing
// any more, from memory neither, whether the server answers for it or not, and
// that one which is made in its place is found.
func TestRemoteStoreMadeAgain(t *testing.T) {
	for _, refuses := range []bool{false, true} {
		s := newElsewhere(t)
		s.text = plainModel // of which answers are remembered longer than this takes
		e := s.engine("s3cret")
		until(t, e, flow.ReasonRelation)
		s.write("user:alice", "can_pay", "account:1", true)
		until(t, e, flow.ReasonOK)
		// Another that has the name as well takes nothing away.
		twin, err := s.fga.CreateStore(t.Context(), &openfgav1.CreateStoreRequest{Name: "shop"})
		must(t, err)
		m := e.models.Load().find(remoteName)
		for len(s.looked) > 0 {
			<-s.looked
		}
		for range 2 { // when the second comes, the first has been answered and judged
			s.await(e, s.looked)
		}
		until(t, e, flow.ReasonOK)
		_, err = s.fga.DeleteStore(t.Context(), &openfgav1.DeleteStoreRequest{StoreId: twin.GetId()})
		must(t, err)

		if a, ok := e.Cached(remoteName, "user:alice", "can_pay", "account:1"); !ok || !a.Allowed {
			t.Errorf("not from memory: %+v", a)
		}
		if refuses {
			id := s.store
			s.gone.Store(&id)
		}
		_, err = s.fga.DeleteStore(t.Context(), &openfgav1.DeleteStoreRequest{StoreId: s.store})
		must(t, err)
		for !m.remote.lost.Load() {
			s.await(e, s.changed)
		}
		if a, ok := e.Cached(remoteName, "user:alice", "can_pay", "account:1"); ok {
			t.Errorf("from memory: %+v", a)
		}
		until(t, e, flow.ReasonRelationUnavailable)
		if st := e.Status(); !strings.Contains(st.Problem, "store") {
			t.Errorf("%+v", st)
		}
		made, err := s.fga.CreateStore(t.Context(), &openfgav1.CreateStoreRequest{Name: "shop"})
		must(t, err)
		s.store = made.GetId()
		until(t, e, flow.ReasonRelation)
		s.write("user:alice", "can_pay", "account:1", true)
		until(t, e, flow.ReasonOK)
		if st := e.Status(); st.Problem != "" {
			t.Errorf("%+v", st)
		}
	}
}

// await waits for something that comes.
func (s *elsewhere) await(e *Engine, what chan struct{}) {
	s.t.Helper()
	select {
	case <-what:
	case <-time.After(20 * time.Second):
		s.t.Fatalf("waited in vain: %+v", e.Status())
	}
}

// write2 writes the model and a tuple as somebody who was there before us.
func (s *elsewhere) write2(user, object string) {
	s.t.Helper()
	e := s.engine("s3cret")
	until(s.t, e, flow.ReasonRelation)
	s.write(user, "can_pay", object, true)
	must(s.t, e.Close())
}

// TestRemoteRefused holds what is no engine of ours.
func TestRemoteRefused(t *testing.T) {
	s := newElsewhere(t)
	problem := func(e *Engine, want string) {
		t.Helper()
		for late := time.Now().Add(20 * time.Second); !strings.Contains(e.Status().Problem, want); time.Sleep(time.Millisecond) {
			if time.Now().After(late) {
				t.Fatalf("%+v, want %s", e.Status(), want)
			}
		}
		if strings.Contains(e.Status().Problem, "s3cret") {
			t.Errorf("%+v", e.Status())
		}
	}
	problem(s.engine("another"), "who are you")
	e := s.engine("s3cret")
	m := s.model(testModel)
	m.Remote = &Remote{Address: "fga.example:8081", Store: "none"}
	must(t, e.SetModels(t.Context(), []Model{m}))
	problem(e, `0 are named "none"`)
	m.Remote = &Remote{Address: "other.example:8081", Store: "shop"}
	must(t, e.SetModels(t.Context(), []Model{m}))
	problem(e, "other.example")
	if err := e.SetModels(t.Context(), []Model{s.model("model\n  schema 1.1\nbroken")}); err == nil {
		t.Error("a broken model is taken")
	}
}
