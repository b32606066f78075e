// SPDX-License-Identifier: Apache-2.0

// Package control is the agent's control API: gRPC on a unix socket, whose
// other end the kernel vouches for. Reading is for root and the group
// sallyport, changing for root.
package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/revocations"
)

// Group is the group whose members may read.
const Group = "sallyport"

const (
	maxConnections = 64
	maxStreams     = 16 // of one connection
	maxRequest     = 1 << 20
	maxReply       = 32 << 20
	maxFilters     = 16
	maxValues      = 64
	unaryTimeout   = 30 * time.Second
)

// Agent is what the API asks the running agent for. Errors are shown to the
// caller as they are.
type Agent interface {
	Status(context.Context) (*controlpb.StatusReply, error)
	Explain(context.Context, *controlpb.ExplainRequest) (*controlpb.ExplainReply, error)
	Identities(context.Context, *controlpb.IdentitiesRequest) (*controlpb.IdentitiesReply, error)
	Policies(context.Context, *controlpb.PoliciesRequest) (*controlpb.PoliciesReply, error)
	Relation(context.Context, *controlpb.RelationRequest) (*controlpb.RelationReply, error)
}

// Options configure a Server.
type Options struct {
	Agent       Agent
	Hub         *Hub
	Revocations *revocations.Store
	Logger      *slog.Logger
	// GroupFile is where Group is looked up; /etc/group if empty.
	GroupFile string
}

// Server serves the API.
type Server struct {
	controlpb.UnimplementedControlServer
	opt   Options
	group int
	grpc  *grpc.Server
	done  chan struct{}
	close sync.Once
}

// writes are the methods that change something whatever they are asked.
var writes = map[string]bool{
	controlpb.Control_Revoke_FullMethodName:   true,
	controlpb.Control_Unrevoke_FullMethodName: true,
}

// NewServer returns a server that Serve starts.
func NewServer(opt Options) *Server {
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	if opt.GroupFile == "" {
		opt.GroupFile = "/etc/group"
	}
	s := &Server{opt: opt, group: groupID(opt.GroupFile, Group), done: make(chan struct{})}
	s.grpc = grpc.NewServer(
		grpc.Creds(peerCredentials{}),
		grpc.MaxRecvMsgSize(maxRequest), grpc.MaxSendMsgSize(maxReply),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(5*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: time.Hour}),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
	)
	controlpb.RegisterControlServer(s.grpc, s)
	return s
}

// Listen makes the socket at path: mode 0660, of the group sallyport where
// there is one. What a dead agent left there is replaced; a live agent's is
// an error.
func (s *Server) Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make directory of control socket: %w", err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on control socket %s: another agent serves it; stop that one, or set controlSocket", path)
	} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ECONNREFUSED) {
		return nil, fmt.Errorf("listen on control socket %s: %w", path, err)
	}
	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("listen on control socket %s: something else is there", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove stale control socket: %w", err)
		}
	}
	// Made under another name, so that nobody finds it before its mode is
	// right.
	temporary := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove stale control socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on control socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chown(temporary, 0, max(s.group, 0))
	if err == nil {
		err = os.Chmod(temporary, 0o660)
	}
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		l.Close()
		os.Remove(temporary)
		return nil, fmt.Errorf("set up control socket %s: %w", path, err)
	}
	return &limited{Listener: l, path: path, slots: make(chan struct{}, maxConnections)}, nil
}

// Serve answers on l until Close.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve control API: %w", err)
	}
	return nil
}

// Close ends every stream and removes the socket. Calls under way have a
// second to end.
func (s *Server) Close() {
	s.close.Do(func() {
		close(s.done)
		t := time.AfterFunc(time.Second, s.grpc.Stop)
		s.grpc.GracefulStop()
		t.Stop()
	})
}

// limited bounds the connections, and removes the socket at its end.
type limited struct {
	net.Listener
	path  string
	slots chan struct{}
	once  sync.Once
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
			return &slotConn{UnixConn: c.(*net.UnixConn), free: sync.OnceFunc(func() { <-l.slots })}, nil
		default:
			c.Close()
		}
	}
}

func (l *limited) Close() error {
	l.once.Do(func() { os.Remove(l.path) })
	return l.Listener.Close()
}

type slotConn struct {
	*net.UnixConn
	free func()
}

func (c *slotConn) Close() error {
	c.free()
	return c.UnixConn.Close()
}

func (s *Server) authorise(ctx context.Context, write bool) (Peer, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Peer{}, status.Error(codes.PermissionDenied, "the other end is not known")
	}
	a, ok := p.AuthInfo.(authInfo)
	switch {
	case !ok || !a.mayRead(s.group):
		return Peer{}, status.Errorf(codes.PermissionDenied, "only root and the group %s may ask the agent", Group)
	case write && !a.mayChange():
		return Peer{}, status.Error(codes.PermissionDenied, "only root may change this")
	}
	return a.Peer, nil
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (reply any, err error) {
	p, err := s.authorise(ctx, writes[info.FullMethod])
	if err != nil {
		s.opt.Logger.Warn("control call refused", "method", info.FullMethod, "peer", p.String())
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, unaryTimeout)
	defer cancel()
	defer s.recovered(info.FullMethod, &err)
	reply, err = next(ctx, req)
	return reply, toStatus(err)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	if _, err := s.authorise(ss.Context(), false); err != nil {
		return err
	}
	defer s.recovered(info.FullMethod, &err)
	return toStatus(next(srv, ss))
}

func (s *Server) recovered(method string, err *error) {
	if r := recover(); r != nil {
		s.opt.Logger.Error("control call panicked", "method", method, "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
		*err = status.Error(codes.Internal, "a fault of the agent's; its log says more")
	}
}

// toStatus keeps a status error, and gives any other one a code.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	code := codes.Unknown
	switch {
	case errors.Is(err, revocations.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		code = codes.NotFound
	case errors.Is(err, revocations.ErrFull):
		code = codes.ResourceExhausted
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	}
	return status.Error(code, err.Error())
}

// Status implements the API.
func (s *Server) Status(ctx context.Context, _ *controlpb.StatusRequest) (*controlpb.StatusReply, error) {
	return s.opt.Agent.Status(ctx)
}

// Explain implements the API.
func (s *Server) Explain(ctx context.Context, q *controlpb.ExplainRequest) (*controlpb.ExplainReply, error) {
	if q.RequestId == "" || len(q.RequestId) > 64 {
		return nil, status.Error(codes.InvalidArgument, "a request id is needed")
	}
	return s.opt.Agent.Explain(ctx, q)
}

// Identities implements the API.
func (s *Server) Identities(ctx context.Context, q *controlpb.IdentitiesRequest) (*controlpb.IdentitiesReply, error) {
	return s.opt.Agent.Identities(ctx, q)
}

// Policies implements the API.
func (s *Server) Policies(ctx context.Context, q *controlpb.PoliciesRequest) (*controlpb.PoliciesReply, error) {
	return s.opt.Agent.Policies(ctx, q)
}

// Relation implements the API; what it changes is for root.
func (s *Server) Relation(ctx context.Context, q *controlpb.RelationRequest) (*controlpb.RelationReply, error) {
	switch q.Op {
	case "read", "check", "list-objects", "model":
	case "write", "delete":
		p, err := s.authorise(ctx, true)
		if err != nil {
			return nil, err
		}
		s.opt.Logger.Info("relations changed", "op", q.Op, "tuples", len(q.Tuples), "by", p.String())
	default:
		return nil, status.Errorf(codes.InvalidArgument, "op %q is not one of write, delete, read, check, list-objects, model", q.Op)
	}
	return s.opt.Agent.Relation(ctx, q)
}

// Revoke implements the API.
func (s *Server) Revoke(ctx context.Context, q *controlpb.RevokeRequest) (*controlpb.Revocation, error) {
	p, err := s.authorise(ctx, true)
	if err != nil {
		return nil, err
	}
	e, err := s.opt.Revocations.Revoke(revocations.Kind(q.Kind), q.Value, time.Duration(q.TtlNs), q.Reason, p.String())
	if err != nil {
		if !errors.Is(err, revocations.ErrFull) && e.Kind == "" {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
		return nil, err
	}
	s.opt.Logger.Info("revoked", "kind", q.Kind, "until", e.Until, "by", p.String())
	return revocation(e), nil
}

// Revocations implements the API.
func (s *Server) Revocations(context.Context, *controlpb.RevocationsRequest) (*controlpb.RevocationsReply, error) {
	entries, generation := s.opt.Revocations.List()
	reply := &controlpb.RevocationsReply{Generation: generation}
	for _, e := range entries {
		reply.Revocations = append(reply.Revocations, revocation(e))
	}
	return reply, nil
}

// Unrevoke implements the API.
func (s *Server) Unrevoke(ctx context.Context, q *controlpb.UnrevokeRequest) (*controlpb.UnrevokeReply, error) {
	p, err := s.authorise(ctx, true)
	if err != nil {
		return nil, err
	}
	if err := s.opt.Revocations.Lift(revocations.Kind(q.Kind), q.Value); err != nil {
		return nil, err
	}
	s.opt.Logger.Info("revocation lifted", "kind", q.Kind, "by", p.String())
	return &controlpb.UnrevokeReply{}, nil
}

func revocation(e revocations.Entry) *controlpb.Revocation {
	r := &controlpb.Revocation{
		Kind: string(e.Kind), Value: e.Value, SinceUnixNs: e.Since.UnixNano(), Reason: e.Reason, By: e.By,
	}
	if !e.Until.IsZero() {
		r.UntilUnixNs = e.Until.UnixNano()
	}
	return r
}

// Observe implements the API.
func (s *Server) Observe(q *controlpb.ObserveRequest, out grpc.ServerStreamingServer[controlpb.Observation]) error {
	if len(q.Filters) > maxFilters {
		return status.Errorf(codes.InvalidArgument, "more than %d filters", maxFilters)
	}
	for _, f := range q.Filters {
		if fields[f.Field] == nil || len(f.Values) == 0 || len(f.Values) > maxValues {
			return status.Errorf(codes.InvalidArgument, "filter %q: a known field and 1 to %d values are needed", f.Field, maxValues)
		}
	}
	kept, r := s.opt.Hub.subscribe(q)
	if r != nil {
		defer s.opt.Hub.unsubscribe(r)
	} else if q.Follow {
		return status.Errorf(codes.ResourceExhausted, "%d observers follow already", maxReaders)
	}
	for _, o := range kept {
		if err := out.Send(o); err != nil {
			return err
		}
	}
	if r == nil {
		return nil
	}
	for {
		select {
		case o := <-r.ch:
			if err := out.Send(o); err != nil {
				return err
			}
		case <-out.Context().Done():
			return nil
		case <-s.done:
			return status.Error(codes.Unavailable, "the agent is stopping")
		}
	}
}
