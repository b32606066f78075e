// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/sallyport-dev/sallyport/policies/compile"
	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/identity"
	"github.com/sallyport-dev/sallyport/userspace/pipeline"
	"github.com/sallyport-dev/sallyport/userspace/token"
)

// echoService is what the application of these tests serves. Its bodies are
// byte strings; nothing is generated.
type echoService struct {
	started chan struct{} // Hold was called
	ended   chan error    // and ended so
}

func (e *echoService) unary(_ any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	in := new(wrapperspb.BytesValue)
	if err := dec(in); err != nil {
		return nil, err
	}
	md, _ := metadata.FromIncomingContext(ctx)
	_ = grpc.SetHeader(ctx, metadata.Pairs("x-cert", strings.Join(md.Get("x-forwarded-client-cert"), "; "), "x-role", strings.Join(md.Get("x-sallyport-role"), "; ")))
	_ = grpc.SetTrailer(ctx, metadata.Pairs("x-after", "all", "x-raw-bin", "\x00\xff"))
	if string(in.Value) == "fail" {
		return nil, status.Error(codes.FailedPrecondition, "50% \u00e9chec")
	}
	return in, nil
}

// count sends as many messages as asked for, of so many bytes.
func (e *echoService) count(_ any, s grpc.ServerStream) error {
	in := new(wrapperspb.StringValue)
	if err := s.RecvMsg(in); err != nil {
		return err
	}
	var n, size int
	if _, err := fmt.Sscan(in.Value, &n, &size); err != nil {
		return err
	}
	for i := range n {
		if err := s.SendMsg(wrapperspb.Bytes(bytes.Repeat([]byte{byte(i)}, size))); err != nil {
			return err
		}
	}
	return nil
}

// sum answers with how many bytes it got.
func (e *echoService) sum(_ any, s grpc.ServerStream) error {
	total := 0
	for {
		in := new(wrapperspb.BytesValue)
		err := s.RecvMsg(in)
		if errors.Is(err, io.EOF) {
			return s.SendMsg(wrapperspb.String(fmt.Sprint(total)))
		}
		if err != nil {
			return err
		}
		total += len(in.Value)
	}
}

func (e *echoService) chat(_ any, s grpc.ServerStream) error {
	for {
		in := new(wrapperspb.BytesValue)
		if err := s.RecvMsg(in); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := s.SendMsg(in); err != nil {
			return err
		}
	}
}

// hold sends one message and waits for the end of the call.
func (e *echoService) hold(_ any, s grpc.ServerStream) error {
	if err := s.SendMsg(wrapperspb.String("held")); err != nil {
		return err
	}
	e.started <- struct{}{}
	<-s.Context().Done()
	e.ended <- s.Context().Err()
	return s.Context().Err()
}

func newEchoService(opts ...grpc.ServerOption) (*grpc.Server, *echoService) {
	e := &echoService{started: make(chan struct{}, 100), ended: make(chan error, 100)}
	server := grpc.NewServer(opts...)
	for _, name := range []string{"t.Echo", "t.Paid", "t.Other"} {
		server.RegisterService(&grpc.ServiceDesc{ServiceName: name, HandlerType: (*any)(nil),
			Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: e.unary}, {MethodName: "Secret", Handler: e.unary}},
			Streams: []grpc.StreamDesc{
				{StreamName: "Count", Handler: e.count, ServerStreams: true},
				{StreamName: "Sum", Handler: e.sum, ClientStreams: true},
				{StreamName: "Chat", Handler: e.chat, ServerStreams: true, ClientStreams: true},
				{StreamName: "Hold", Handler: e.hold, ServerStreams: true, ClientStreams: true},
			}}, e)
	}
	return server, e
}

// rpc runs the service as the application on those ports.
func (n *node) rpc(ports ...uint16) *echoService {
	n.t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	server, e := newEchoService()
	go server.Serve(ln)
	n.t.Cleanup(server.Stop)
	n.at(ln.Addr().String(), ports...)
	return e
}

func rpcClient(t testing.TB, addr string, creds credentials.TransportCredentials, more ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	if creds == nil {
		creds = insecure.NewCredentials()
	}
	options := append([]grpc.DialOption{grpc.WithTransportCredentials(creds), grpc.WithAuthority("echo.example"), grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(32 << 20))}, more...)
	conn, err := grpc.NewClient("passthrough:///"+addr, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// within bounds a call of a test that should end at once.
func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func call1(ctx context.Context, conn *grpc.ClientConn, method, value string, opts ...grpc.CallOption) (string, error) {
	out := new(wrapperspb.BytesValue)
	err := conn.Invoke(ctx, method, wrapperspb.Bytes([]byte(value)), out, opts...)
	return string(out.Value), err
}

var bidi = &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}

// refusedCall holds the status of a refused call against the reason.
func refusedCall(t testing.TB, err error, code codes.Code, reason flow.Reason) (id string) {
	t.Helper()
	s, ok := status.FromError(err)
	if !ok || s.Code() != code || s.Message() != reason.Public() {
		t.Fatalf("got %v, want %v for %s", err, code, reason)
	}
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			if info.Reason != string(reason) || info.Domain != "sallyport.dev" || len(info.Metadata["requestID"]) != flow.IDLength {
				t.Errorf("details %v", info)
			}
			return info.Metadata["requestID"]
		}
	}
	t.Errorf("no ErrorInfo in %v", s.Details())
	return ""
}

// TestGRPC has real clients and servers call each other in every way.
func TestGRPC(t *testing.T) {
	for _, port := range []uint16{84, 81} { // protocol: grpc, protocol: auto
		t.Run(fmt.Sprint(port), func(t *testing.T) {
			eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
				e := app.rpc(port)
				testGRPC(t, rpcClient(t, in.out(clientNumber, serverPort(port)), nil), app, e)
			})
		})
	}
	t.Run("mtls", func(t *testing.T) {
		eachEngine(t, func(t *testing.T, goroutines bool) {
			n := oneNode(t, nodeOptions{goroutines: goroutines})
			addr, e := n.steeredRPC(84)
			leaf, err := n.leaves.Get(clientID)
			if err != nil {
				t.Fatal(err)
			}
			secured := credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{leaf.Certificate}})
			testGRPC(t, rpcClient(t, addr, secured), n, e)
			_, err = call1(within(t), rpcClient(t, addr, nil), "/t.Echo/Unary", "x")
			refusedCall(t, err, codes.PermissionDenied, flow.ReasonMTLSRequired)
		})
	})
}

// steeredRPC opens an inbound listener before the service: what is steered
// shows the port that it was made to.
func (n *node) steeredRPC(port uint16) (string, *echoService) {
	n.t.Helper()
	addr, fd := listener(n.t, "127.0.0.1:0")
	real := netip.MustParseAddrPort(addr)
	n.proxy.SetPlan(steeredPlan(n.t, real.Port(), port), 2)
	if err := n.proxy.Serve(fd, KindInbound, serverNetns); err != nil {
		n.t.Fatal(err)
	}
	e := n.rpc(port)
	n.mu.Lock()
	n.apps[real] = n.apps[serverPort(port)]
	n.mu.Unlock()
	return addr, e
}

func testGRPC(t *testing.T, conn *grpc.ClientConn, app *node, e *echoService) {
	t.Run("unary", func(t *testing.T) {
		var header, trailer metadata.MD
		ctx := metadata.AppendToOutgoingContext(within(t), "x-forwarded-client-cert", "URI=spiffe://example.org/root", "x-sallyport-role", "root")
		for _, size := range []int{0, 5, 100_000, 3 << 20} {
			want := strings.Repeat("x", size)
			got, err := call1(ctx, conn, "/t.Echo/Unary", want, grpc.Header(&header), grpc.Trailer(&trailer))
			if err != nil || got != want {
				t.Fatalf("%d bytes: got %d, %v", size, len(got), err)
			}
		}
		if cert := header.Get("x-cert"); len(cert) != 1 || !strings.HasSuffix(cert[0], "URI="+clientID) || header.Get("x-role")[0] != "" {
			t.Errorf("the application saw the client as %q, %q", cert, header.Get("x-role"))
		}
		if trailer.Get("x-after")[0] != "all" || trailer.Get("x-raw-bin")[0] != "\x00\xff" {
			t.Errorf("trailers %v", trailer)
		}
		_, err := call1(ctx, conn, "/t.Echo/Unary", "fail")
		if s := status.Convert(err); s.Code() != codes.FailedPrecondition || s.Message() != "50% \u00e9chec" {
			t.Errorf("the application's status: %v", err)
		}
	})
	t.Run("many at once", func(t *testing.T) {
		var wg sync.WaitGroup
		for i := range 300 { // more than streams at once
			wg.Go(func() {
				want := strings.Repeat("y", i*100)
				if got, err := call1(within(t), conn, "/t.Echo/Unary", want); err != nil || got != want {
					t.Errorf("call %d: %d bytes, %v", i, len(got), err)
				}
			})
		}
		wg.Wait()
	})
	t.Run("server stream", func(t *testing.T) {
		s, err := conn.NewStream(within(t), &grpc.StreamDesc{ServerStreams: true}, "/t.Echo/Count")
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(s.SendMsg(wrapperspb.String("50 100000")), s.CloseSend()); err != nil {
			t.Fatal(err)
		}
		for i := range 50 {
			m := new(wrapperspb.BytesValue)
			if err := s.RecvMsg(m); err != nil || len(m.Value) != 100000 || m.Value[99999] != byte(i) {
				t.Fatalf("message %d: %d bytes, %v", i, len(m.Value), err)
			}
		}
		if err := s.RecvMsg(new(wrapperspb.BytesValue)); !errors.Is(err, io.EOF) {
			t.Errorf("at the end: %v", err)
		}
	})
	t.Run("client stream", func(t *testing.T) {
		s, err := conn.NewStream(within(t), &grpc.StreamDesc{ClientStreams: true}, "/t.Echo/Sum")
		if err != nil {
			t.Fatal(err)
		}
		for range 50 {
			if err := s.SendMsg(wrapperspb.Bytes(make([]byte, 100_000))); err != nil {
				t.Fatal(err)
			}
		}
		m := new(wrapperspb.StringValue)
		if err := errors.Join(s.CloseSend(), s.RecvMsg(m)); err != nil || m.Value != "5000000" {
			t.Errorf("got %q, %v", m.Value, err)
		}
	})
	t.Run("bidi", func(t *testing.T) {
		s, err := conn.NewStream(within(t), bidi, "/t.Echo/Chat")
		if err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			m := wrapperspb.Bytes(make([]byte, i*1000))
			if err := s.SendMsg(m); err != nil {
				t.Fatal(err)
			}
			if err := s.RecvMsg(m); err != nil || len(m.Value) != i*1000 {
				t.Fatalf("round %d: %d bytes, %v", i, len(m.Value), err)
			}
		}
		if err := errors.Join(s.CloseSend()); err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(new(wrapperspb.BytesValue)); !errors.Is(err, io.EOF) {
			t.Errorf("at the end: %v", err)
		}
	})
	t.Run("cancel", func(t *testing.T) {
		ctx, cancel := context.WithCancel(within(t))
		s := held(t, ctx, conn, e)
		cancel()
		if err := s.RecvMsg(new(wrapperspb.StringValue)); status.Code(err) != codes.Canceled {
			t.Errorf("got %v", err)
		}
		if err := <-e.ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the application saw %v", err)
		}
	})
	t.Run("deadline", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(within(t), time.Second)
		defer cancel()
		s := held(t, ctx, conn, e)
		if err := s.RecvMsg(new(wrapperspb.StringValue)); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("got %v", err)
		}
		if err := <-e.ended; err == nil {
			t.Error("the application saw no end")
		}
	})
	if strings.Contains(t.Name(), "/81/") {
		return // where everything is allowed
	}
	t.Run("denied", func(t *testing.T) {
		app.records()
		_, err := call1(within(t), conn, "/t.Echo/Secret", "x")
		id := refusedCall(t, err, codes.PermissionDenied, flow.ReasonDenyRule)
		if r := app.recorded(flow.ReasonDenyRule); r.RequestID != id || r.Rule != "no-secret" || r.Source != clientID || r.Destination != serverID || r.Protocol != "grpc" || r.Path != "t.Echo/Secret" {
			t.Errorf("record %+v", r)
		}
		_, err = call1(within(t), conn, "/t.Other/Unary", "x")
		refusedCall(t, err, codes.PermissionDenied, flow.ReasonNoRule)
		// A stream whose request goes on.
		s, err := conn.NewStream(within(t), bidi, "/t.Other/Chat")
		if err != nil {
			t.Fatal(err)
		}
		_ = s.SendMsg(wrapperspb.Bytes(make([]byte, 100_000)))
		refusedCall(t, s.RecvMsg(new(wrapperspb.BytesValue)), codes.PermissionDenied, flow.ReasonNoRule)
	})
	t.Run("token", func(t *testing.T) {
		_, err := call1(within(t), conn, "/t.Paid/Unary", "x")
		refusedCall(t, err, codes.Unauthenticated, flow.ReasonTokenMissing)
		signed := app.mints(t)
		ctx := metadata.AppendToOutgoingContext(within(t), "authorization", "Bearer "+signed)
		if got, err := call1(ctx, conn, "/t.Paid/Unary", "x"); err != nil || got != "x" {
			t.Errorf("with a token: %q, %v", got, err)
		}
		_, err = call1(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+signed), conn, "/t.Paid/Unary", "x")
		refusedCall(t, err, codes.InvalidArgument, flow.ReasonTokenPlace)
	})
}

// held is a call that the application holds.
func held(t *testing.T, ctx context.Context, conn *grpc.ClientConn, e *echoService) grpc.ClientStream {
	t.Helper()
	s, err := conn.NewStream(ctx, bidi, "/t.Echo/Hold")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RecvMsg(new(wrapperspb.StringValue)); err != nil {
		t.Fatal(err)
	}
	<-e.started
	return s
}

// mints returns a token of the issuer that the policies name.
func (n *node) mints(t testing.TB) string {
	t.Helper()
	return n.mintsUntil(t, time.Now().Add(5*time.Minute))
}

// mintsUntil is mints with the token's end.
func (n *node) mintsUntil(t testing.TB, end time.Time) string {
	t.Helper()
	return n.mintsWith(t, jwt.MapClaims{"exp": end.Unix()})
}

// mintsWith is mints with further claims.
func (n *node) mintsWith(t testing.TB, claims jwt.MapClaims) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	keys, err := json.Marshal(map[string]any{"keys": []any{map[string]any{
		"kid": "k1", "kty": "EC", "crv": "P-256", "use": "sig", "x": b64(point[1:33]), "y": b64(point[33:])}}})
	if err != nil {
		t.Fatal(err)
	}
	n.jwks = keys
	for _, issuer := range pipeline.Issuers(n.pipeline.Plan()) {
		if err := errors.Join(n.tokens.SetIssuer(issuer), n.tokens.SetKeys(issuer.Name, keys, time.Now())); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	all := jwt.MapClaims{"iss": "https://sso.t.example", "sub": "alice", "aud": "server", "client_id": "c",
		"jti": "t1", "iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix()}
	maps.Copy(all, claims)
	minted := jwt.NewWithClaims(jwt.SigningMethodES256, all)
	minted.Header["kid"], minted.Header["typ"] = "k1", "at+jwt"
	signed, err := minted.SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// TestGRPCRevocation holds that a stream ends with what allowed it, and that
// the connection's other streams go on.
func TestGRPCRevocation(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		e := app.rpc(84)
		conn := rpcClient(t, in.out(clientNumber, serverPort(84)), nil)
		signed := app.mints(t)
		ctx := within(t)
		other := held(t, ctx, conn, e)
		paid, err := conn.NewStream(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+signed), bidi, "/t.Paid/Hold")
		if err != nil {
			t.Fatal(err)
		}
		if err := paid.RecvMsg(new(wrapperspb.StringValue)); err != nil {
			t.Fatal(err)
		}
		<-e.started
		list, err := identity.NewRevocations([]identity.Revocation{{Kind: identity.RevokeJTI, Value: "t1"}}, 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := app.tokens.SetRevocations([]token.Revocation{{Kind: "jti", Value: "t1"}}); err != nil {
			t.Fatal(err)
		}
		app.pipeline.SetRevocations(list)
		if err := paid.RecvMsg(new(wrapperspb.StringValue)); status.Code(err) != codes.PermissionDenied {
			t.Errorf("revoked: %v", err)
		}
		<-e.ended
		app.recorded(flow.ReasonRevoked)
		if got, err := call1(ctx, conn, "/t.Echo/Unary", "x"); err != nil || got != "x" {
			t.Errorf("another call: %v", err)
		}
		// The caller itself: everything ends.
		if list, err = identity.NewRevocations([]identity.Revocation{{Kind: identity.RevokeIdentity, Value: clientID}}, 2); err != nil {
			t.Fatal(err)
		}
		app.verifier.SetRevocations(list)
		app.pipeline.SetRevocations(list)
		if err := other.RecvMsg(new(wrapperspb.StringValue)); err == nil {
			t.Error("a stream of a revoked caller goes on")
		}
		<-e.ended
	})
}

// TestGRPCModes holds that a stream is judged again in the mode that its policy
// has by then: from audit to enforce what is not allowed ends, the other way
// round it goes on.
func TestGRPCModes(t *testing.T) {
	narrow := func(mode string) *compile.Plan {
		return build(t, strings.NewReplacer("MODE", mode, "grpc: [t.Echo/*]}\n    - {name: paid", "grpc: [t.Echo/Unary]}\n    - {name: paid").Replace(worldPolicies))
	}
	for from, to := range map[string]string{"audit": "enforce", "enforce": "audit"} {
		t.Run(from, func(t *testing.T) {
			eachEngine(t, func(t *testing.T, goroutines bool) {
				n := oneNode(t, nodeOptions{goroutines: goroutines, mode: from})
				e := n.rpc(84)
				conn := rpcClient(t, n.out(clientNumber, serverPort(84)), nil)
				ctx, cancel := context.WithCancel(within(t))
				defer cancel()
				s := held(t, ctx, conn, e)
				n.proxy.SetPlan(narrow(to), 2)
				if to == "enforce" {
					if err := s.RecvMsg(new(wrapperspb.StringValue)); status.Code(err) != codes.PermissionDenied {
						t.Errorf("the stream ended with %v", err)
					}
					n.recorded(flow.ReasonPolicyChanged)
					return
				}
				// It is judged again before another call ends.
				if got, err := call1(within(t), conn, "/t.Echo/Unary", "x"); err != nil || got != "x" {
					t.Errorf("another call: %q %v", got, err)
				}
				for _, r := range n.records() {
					if r.Reason == flow.ReasonPolicyChanged {
						t.Errorf("the stream was ended: %+v", r)
					}
				}
				cancel()
				if err := s.RecvMsg(new(wrapperspb.StringValue)); status.Code(err) != codes.Canceled {
					t.Errorf("the stream ended with %v", err)
				}
			})
		})
	}
}

// TestRevokedInAudit holds that a revocation which audit let pass ends what goes
// on once the policy is enforced.
func TestRevokedInAudit(t *testing.T) {
	eachEngine(t, func(t *testing.T, goroutines bool) {
		n := oneNode(t, nodeOptions{goroutines: goroutines, mode: "audit"})
		e := n.rpc(84)
		n.raw(echo, 7)
		stream := held(t, within(t), rpcClient(t, n.out(clientNumber, serverPort(84)), nil), e)
		conn := dialTCP(t, n.out(clientNumber, serverPort(7)))
		says := func() error {
			if _, err := io.WriteString(conn, "x"); err != nil {
				return err
			}
			_, err := io.ReadFull(conn, make([]byte, 1))
			return err
		}
		if err := says(); err != nil {
			t.Fatal(err)
		}
		list, err := identity.NewRevocations([]identity.Revocation{{Kind: identity.RevokeIdentity, Value: clientID}}, 1)
		if err != nil {
			t.Fatal(err)
		}
		n.verifier.SetRevocations(list)
		n.pipeline.SetRevocations(list)
		for range 10 {
			if err := says(); err != nil {
				t.Fatalf("in audit: %v", err)
			}
		}
		n.proxy.SetPlan(plan(t, "enforce"), 2)
		if err := stream.RecvMsg(new(wrapperspb.StringValue)); err == nil || status.Code(err) == codes.DeadlineExceeded {
			t.Errorf("the stream: %v", err)
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the connection: %v", err)
		}
		n.recorded(flow.ReasonRevoked)
	})
}

// TestLooking holds that a look which something has changed since counts for
// nothing, and that changes keep no refusal from counting.
func TestLooking(t *testing.T) {
	p := pipeline.New(pipeline.Options{})
	for _, c := range []struct {
		name    string
		answers string // of one look after another: allowed, refused, over; in upper case something changes meanwhile
		want    flow.Reason
	}{
		{"allowed", "a", ""}, {"refused", "r", "x"}, {"over", "o", ""}, {"allowed, then refused", "Ar", "x"}, {"refused before a change", "Ra", ""},
		{"refused again", "RR", "x"}, {"refused, allowed, refused", "RARR", "x"}, {"over after a change", "Ao", ""},
	} {
		for _, how := range []string{"again", "generation"} {
			l, looks := &looking{}, 0
			got := l.until(p, func() (flow.Reason, bool) {
				a := c.answers[looks : looks+1]
				looks++
				if strings.ToUpper(a) == a {
					if how == "generation" {
						p.RelationsChanged("")
					} else if reason := l.until(p, nil); reason != flow.ReasonOK {
						t.Errorf("%s: a second look says %s", c.name, reason)
					}
				}
				return map[string]flow.Reason{"r": "x"}[strings.ToLower(a)], strings.ToLower(a) != "o"
			})
			if got != c.want || looks != len(c.answers) || l.under {
				t.Errorf("%s, %s: %q after %d looks, want %q", c.name, how, got, looks, c.want)
			}
		}
	}
}

// TestGRPCRotation has leaves that live four seconds under calls of one client;
// none may be lost, and a stream may outlive the leaf that it began under.
func TestGRPCRotation(t *testing.T) {
	if testing.Short() {
		t.Skip("takes ten seconds")
	}
	for _, goroutines := range []bool{false, true} {
		t.Run(fmt.Sprintf("goroutines=%v", goroutines), func(t *testing.T) {
			t.Parallel()
			a, b := twoNodes(t, nodeOptions{goroutines: goroutines, ttl: 4 * time.Second})
			b.rpc(84)
			conn := rpcClient(t, a.out(clientNumber, serverPort(84)), nil)
			chat, err := conn.NewStream(within(t), bidi, "/t.Echo/Chat")
			if err != nil {
				t.Fatal(err)
			}
			serials := map[string]bool{}
			calls := 0
			for late := time.Now().Add(20 * time.Second); len(serials) < 3 && time.Now().Before(late); calls++ {
				var header metadata.MD
				if got, err := call1(within(t), conn, "/t.Echo/Unary", "hello", grpc.Header(&header)); err != nil || got != "hello" {
					t.Fatalf("call %d: %q %v", calls, got, err)
				}
				serials[header.Get("x-cert")[0]] = true
				m := wrapperspb.Bytes([]byte("x"))
				if err := errors.Join(chat.SendMsg(m), chat.RecvMsg(m)); err != nil {
					t.Fatalf("the stream, at call %d: %v", calls, err)
				}
			}
			if len(serials) < 3 {
				t.Errorf("%d certificates in %d calls: nothing rotated", len(serials), calls)
			}
		})
	}
}

// TestGRPCOverTLS has the proxy end the TLS of callers that speak HTTP/2 by
// ALPN.
func TestGRPCOverTLS(t *testing.T) {
	eachWay(t, nodeOptions{}, func(t *testing.T, in, app *node) {
		for _, n := range []*node{in, app} {
			n.proxy.SetPlan(terminating(t), 2)
		}
		pair := newAppKeyPair(t, ecKey(t), "app.example")
		app.shows(pair)
		app.rpc(80)
		conn := rpcClient(t, in.out(clientNumber, serverPort(80)), credentials.NewTLS(&tls.Config{RootCAs: pair.pool, ServerName: "app.example"}),
			grpc.WithAuthority("app.example"))
		if got, err := call1(within(t), conn, "/t.Echo/Unary", "hello"); err != nil || got != "hello" {
			t.Errorf("%q, %v", got, err)
		}
	})
}

func TestPercentEncode(t *testing.T) {
	if got := percentEncode("50% \u00e9\n~ok"); got != "50%25 %C3%A9%0A~ok" {
		t.Errorf("got %q", got)
	}
}
