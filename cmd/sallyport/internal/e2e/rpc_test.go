// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

func init() { actors["rpc"], actors["call"] = actRPC, actCall }

// actRPC serves grpc.health.v1.Health at ADDRESS and writes who calls.
func actRPC(args []string) error {
	l, err := listen(args)
	if err != nil {
		return err
	}
	says := func(ctx context.Context, method string) {
		p, _ := grpcpeer.FromContext(ctx)
		host, _, _ := net.SplitHostPort(p.Addr.String())
		fmt.Println(method, host)
	}
	s := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, in any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		says(ctx, info.FullMethod)
		return next(ctx, in)
	}), grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		says(ss.Context(), info.FullMethod)
		return next(srv, ss)
	}))
	healthpb.RegisterHealthServer(s, health.NewServer())
	return s.Serve(l)
}

// actCall calls ADDRESS: check and list are unary; watch writes the first
// message and how the stream ends.
func actCall(args []string) error {
	conn, err := grpc.NewClient("passthrough:///"+args[0], grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(), grpc.WithDisableServiceConfig())
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	client := healthpb.NewHealthClient(conn)
	switch args[1] {
	case "check":
		_, err = client.Check(ctx, &healthpb.HealthCheckRequest{})
	case "list":
		_, err = client.List(ctx, &healthpb.HealthListRequest{})
	case "watch":
		var s grpc.ServerStreamingClient[healthpb.HealthCheckResponse]
		if s, err = client.Watch(ctx, &healthpb.HealthCheckRequest{}); err == nil {
			for err == nil {
				var r *healthpb.HealthCheckResponse
				if r, err = s.Recv(); err == nil {
					fmt.Println(r.GetStatus())
				}
			}
		}
	}
	s := status.Convert(err)
	fmt.Print(s.Code())
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			fmt.Print(" ", info.GetReason(), " ", info.GetMetadata()["requestID"])
		}
	}
	fmt.Println()
	return nil
}

const rpcPolicy = `apiVersion: sallyport.dev/v1alpha1
kind: APIPolicy
metadata: {name: rpc, namespace: shop}
spec:
  mode: enforce
  protect: {identity: stream, ports: [9091], protocol: grpc}
  rules:
    - {name: health, from: [client], grpc: [grpc.health.v1.Health/Check, grpc.health.v1.Health/Watch]}
`

// TestRPC has a client of gRPC call a server on another node: methods are
// judged one by one, refusals say why, and a stream ends when the policy does
// not allow it any more.
func TestRPC(t *testing.T) {
	require(t)
	a, b := two(t)
	shop := strings.ReplaceAll(shopIn("enforce"), `"10.78.1.2:9090"`, `"10.78.1.2:9090", "10.78.1.2:9091"`)
	for _, n := range []*node{a, b} {
		n.policy("shop.yaml", shop)
		n.policy("rpc.yaml", rpcPolicy)
	}
	b.start()
	a.start()
	app := server(t, b.group("stream"), b.ns, "rpc", addrB+":9091")
	for _, who := range []string{"client", "outcast"} {
		act(t, a.group(who), a.ns, "idle").line(t)
	}
	a.served("client", "outcast")
	b.served("stream")
	const addr = addrB + ":9091"
	call := func(who, method string) string {
		t.Helper()
		return act(t, a.group(who), a.ns, "call", addr, method).line(t)
	}
	if got := call("client", "check"); got != "OK" {
		t.Fatalf("check: %s", got)
	}
	if got := app.line(t); got != "/grpc.health.v1.Health/Check "+addrA {
		t.Errorf("the server saw %s", got)
	}
	from := b.mark()
	got := strings.Fields(call("client", "list"))
	if len(got) != 3 || got[0] != "PermissionDenied" || got[1] != "no_rule" {
		t.Fatalf("list: %q", got)
	}
	r := b.decided(from, "the refusal", func(r *record) bool { return r.RequestID == got[2] })
	if r.Reason != "no_rule" || r.Method != "POST" || r.Source != a.id("client") {
		t.Errorf("record %+v", r)
	}
	if got := call("outcast", "check"); !strings.HasPrefix(got, "PermissionDenied may_call ") {
		t.Errorf("another caller: %s", got)
	}
	watch := act(t, a.group("client"), a.ns, "call", addr, "watch")
	if got := watch.line(t); got != "SERVING" {
		t.Fatalf("watch: %s", got)
	}
	b.policy("rpc.yaml", strings.ReplaceAll(rpcPolicy, ", grpc.health.v1.Health/Watch", ""))
	b.hangUp()
	if got := watch.line(t); got != "PermissionDenied" {
		t.Errorf("the stream ended with %s", got)
	}
	if got := call("client", "check"); got != "OK" {
		t.Errorf("check after the change: %s", got)
	}
}
