// SPDX-License-Identifier: Apache-2.0

package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sallyport-dev/sallyport/agent/control/controlpb"
	"github.com/sallyport-dev/sallyport/agent/revocations"
	"github.com/sallyport-dev/sallyport/userspace/testenv"
)

const testGroup = 54321 // of the group file that the tests write

// agent answers with what it was asked.
type agent struct{}

func (agent) Status(context.Context) (*controlpb.StatusReply, error) {
	return &controlpb.StatusReply{Node: "n1", Ready: true}, nil
}

func (agent) Explain(_ context.Context, q *controlpb.ExplainRequest) (*controlpb.ExplainReply, error) {
	if q.RequestId == "panic" {
		panic("a fault")
	}
	return nil, fmt.Errorf("no decision with id %s: %w", q.RequestId, os.ErrNotExist)
}

func (agent) Identities(context.Context, *controlpb.IdentitiesRequest) (*controlpb.IdentitiesReply, error) {
	return &controlpb.IdentitiesReply{}, nil
}

func (agent) Policies(context.Context, *controlpb.PoliciesRequest) (*controlpb.PoliciesReply, error) {
	return &controlpb.PoliciesReply{}, nil
}

func (agent) Relation(_ context.Context, q *controlpb.RelationRequest) (*controlpb.RelationReply, error) {
	return &controlpb.RelationReply{Text: q.Op}, nil
}

func TestMain(m *testing.M) {
	if path := os.Getenv("CONTROL_SOCKET"); path != "" {
		fmt.Print(callAll(path))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// callAll makes one call of each kind and returns a word for each.
func callAll(path string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := Dial(ctx, path)
	if err != nil {
		return "dial: " + err.Error()
	}
	defer c.Close()
	var b strings.Builder
	word := func(name string, err error) {
		fmt.Fprintf(&b, "%s=%s ", name, status.Code(err))
	}
	_, err = c.Status(ctx, &controlpb.StatusRequest{})
	word("status", err)
	_, err = c.Revocations(ctx, &controlpb.RevocationsRequest{})
	word("revocations", err)
	_, err = c.Revoke(ctx, &controlpb.RevokeRequest{Kind: "jti", Value: "t-1"})
	word("revoke", err)
	_, err = c.Unrevoke(ctx, &controlpb.UnrevokeRequest{Kind: "jti", Value: "t-1"})
	word("unrevoke", err)
	_, err = c.Relation(ctx, &controlpb.RelationRequest{Op: "check"})
	word("check", err)
	_, err = c.Relation(ctx, &controlpb.RelationRequest{Op: "write"})
	word("write", err)
	o, err := c.Observe(ctx, &controlpb.ObserveRequest{})
	if err == nil {
		if _, err = o.Recv(); errors.Is(err, io.EOF) {
			err = nil
		}
	}
	word("observe", err)
	return strings.TrimSpace(b.String())
}

// serve starts a server on a socket that every user can find.
func serve(t *testing.T) (path string, s *Server, hub *Hub) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the control socket is root's")
	}
	dir, err := os.MkdirTemp("", "control")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	groups := filepath.Join(dir, "group")
	if err := os.WriteFile(groups, fmt.Appendf(nil, "root:x:0:\n%s:x:%d:\n", Group, testGroup), 0o644); err != nil {
		t.Fatal(err)
	}
	store, err := revocations.Open(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	hub = NewHub()
	s = NewServer(Options{Agent: agent{}, Hub: hub, Revocations: store, GroupFile: groups})
	path = filepath.Join(dir, "control.sock")
	l, err := s.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("the socket is still there: %v", err)
		}
	})
	return path, s, hub
}

func TestWhoMayDoWhat(t *testing.T) {
	path, _, _ := serve(t)
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o660 || st.Sys().(*syscall.Stat_t).Gid != testGroup {
		t.Fatalf("socket %v of group %d, %v", st.Mode(), st.Sys().(*syscall.Stat_t).Gid, err)
	}
	read := "status=OK revocations=OK revoke=PermissionDenied unrevoke=PermissionDenied check=OK write=PermissionDenied observe=OK"
	none := strings.NewReplacer("=OK", "=PermissionDenied").Replace(read)
	for _, c := range []struct {
		name string
		cred *syscall.Credential
		mode os.FileMode
		want string
	}{
		{"root", nil, 0o660, "status=OK revocations=OK revoke=OK unrevoke=OK check=OK write=OK observe=OK"},
		{"supplementary group", &syscall.Credential{Uid: 65534, Gid: 65534, Groups: []uint32{testGroup}}, 0o660, read},
		{"primary group", &syscall.Credential{Uid: 65534, Gid: testGroup}, 0o660, read},
		{"many groups", &syscall.Credential{Uid: 65534, Gid: 65534, Groups: append(make([]uint32, 200), testGroup)}, 0o660, read},
		{"another user", &syscall.Credential{Uid: 65534, Gid: 65534}, 0o660, "dial: connect to " + path + ": not permitted; be root, or in the group sallyport to read"},
		// The mode is not the only gate.
		{"another user, socket open to all", &syscall.Credential{Uid: 65534, Gid: 65534}, 0o666, none},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.Chmod(path, c.mode); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = []string{"CONTROL_SOCKET=" + path}
			cmd.Dir = "/"
			if c.cred != nil {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: c.cred}
			}
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			got, err := cmd.Output()
			if err != nil || string(got) != c.want {
				t.Errorf("got  %s\nwant %s\n%v %s", got, c.want, err, stderr.String())
			}
		})
	}
}

func client(t *testing.T, path string) *Client {
	t.Helper()
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestErrors(t *testing.T) {
	path, _, _ := serve(t)
	c := client(t, path)
	ctx := t.Context()
	for _, x := range []struct {
		name string
		call func() error
		code codes.Code
		text string
	}{
		{"bad kind", func() error { _, err := c.Revoke(ctx, &controlpb.RevokeRequest{Kind: "x", Value: "y"}); return err }, codes.InvalidArgument, "not one of"},
		{"not revoked", func() error {
			_, err := c.Unrevoke(ctx, &controlpb.UnrevokeRequest{Kind: "jti", Value: "y"})
			return err
		}, codes.NotFound, "no such revocation"},
		{"no id", func() error { _, err := c.Explain(ctx, &controlpb.ExplainRequest{}); return err }, codes.InvalidArgument, "request id"},
		{"unknown id", func() error { _, err := c.Explain(ctx, &controlpb.ExplainRequest{RequestId: "01J"}); return err }, codes.NotFound, "01J"},
		{"panic", func() error {
			_, err := c.Explain(ctx, &controlpb.ExplainRequest{RequestId: "panic"})
			return err
		}, codes.Internal, "fault"},
		{"unknown op", func() error { _, err := c.Relation(ctx, &controlpb.RelationRequest{Op: "drop"}); return err }, codes.InvalidArgument, "drop"},
		{"unknown field", func() error {
			o, err := c.Observe(ctx, &controlpb.ObserveRequest{Filters: []*controlpb.Filter{{Field: "secret", Values: []string{"x"}}}})
			if err == nil {
				_, err = o.Recv()
			}
			return err
		}, codes.InvalidArgument, "secret"},
	} {
		if err := x.call(); status.Code(err) != x.code || !strings.Contains(Text(err), x.text) {
			t.Errorf("%s: %v", x.name, err)
		}
	}
}

func TestListen(t *testing.T) {
	path, s, _ := serve(t)
	if _, err := s.Listen(path); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second agent: %v", err)
	}
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	again, err := s.Listen(stale)
	if err != nil {
		t.Fatalf("over a dead agent's socket: %v", err)
	}
	again.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Listen(file); err == nil {
		t.Error("a file was replaced")
	}
	if _, err := Dial(t.Context(), filepath.Join(dir, "none")); err == nil || !strings.Contains(err.Error(), "sallyport agent") {
		t.Errorf("no agent: %v", err)
	}
}

func observation(n int, kind, from string) *controlpb.Observation {
	return &controlpb.Observation{TimeUnixNs: int64(n), Kind: kind, From: from, Json: fmt.Append(nil, n)}
}

func TestObserve(t *testing.T) {
	path, s, hub := serve(t)
	for i := range 100 {
		hub.Publish(observation(i, []string{"decision", "sample"}[i%2], "shop/checkout"))
	}
	hub.Publish(observation(100, "decision", "other"))
	c := client(t, path)
	for _, q := range []struct {
		name string
		q    *controlpb.ObserveRequest
		want string
	}{
		{"all kept", &controlpb.ObserveRequest{}, "81-100 20"},
		{"last", &controlpb.ObserveRequest{Last: 3}, "98-100 3"},
		{"since", &controlpb.ObserveRequest{SinceUnixNs: 90}, "90-100 11"},
		{"kind", &controlpb.ObserveRequest{Last: 2, Filters: []*controlpb.Filter{{Field: "kind", Values: []string{"sample"}}}}, "97-99 2"},
		{"prefix and not", &controlpb.ObserveRequest{Last: 2, Filters: []*controlpb.Filter{
			{Field: "from", Values: []string{"x", "shop/*"}}, {Field: "kind", Values: []string{"sample"}, Negate: true}}}, "96-98 2"},
	} {
		o, err := c.Observe(t.Context(), q.q)
		if err != nil {
			t.Fatal(err)
		}
		var got []*controlpb.Observation
		for {
			m, err := o.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(q.name, err)
			}
			got = append(got, m)
		}
		if s := fmt.Sprintf("%d-%d %d", got[0].TimeUnixNs, got[len(got)-1].TimeUnixNs, len(got)); s != q.want {
			t.Errorf("%s: %s, want %s", q.name, s, q.want)
		}
	}

	o, err := c.Observe(t.Context(), &controlpb.ObserveRequest{Follow: true, Last: 1})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := o.Recv(); err != nil || m.TimeUnixNs != 100 {
		t.Fatalf("%v %v", m, err)
	}
	hub.Publish(observation(101, "event", "x"))
	if m, err := o.Recv(); err != nil || m.TimeUnixNs != 101 {
		t.Fatalf("%v %v", m, err)
	}
	s.Close()
	if _, err := o.Recv(); status.Code(err) != codes.Unavailable {
		t.Fatalf("after the end: %v", err)
	}
	if hub.Watching() {
		t.Error("a reader is left")
	}
}

func TestSlowReaderLosesAndIsTold(t *testing.T) {
	hub := NewHub()
	_, r := hub.subscribe(&controlpb.ObserveRequest{Follow: true})
	for i := range readerBuffer + 500 {
		hub.Publish(observation(i, "decision", ""))
	}
	for i := range readerBuffer {
		if o := <-r.ch; o.TimeUnixNs != int64(i) || o.Lost != 0 {
			t.Fatalf("%d: %v", i, o)
		}
	}
	hub.Publish(observation(9999, "decision", ""))
	if o := <-r.ch; o.TimeUnixNs != 9999 || o.Lost != 500 {
		t.Fatalf("got %v", o)
	}
	hub.Publish(observation(10000, "decision", ""))
	if o := <-r.ch; o.Lost != 0 {
		t.Fatalf("got %v", o)
	}
}

func TestHubIsBounded(t *testing.T) {
	hub := NewHub()
	hub.Publish(&controlpb.Observation{Json: make([]byte, maxJSON+1)})
	if len(hub.ring) != 0 || hub.Refused() != 1 {
		t.Error("a huge record was kept")
	}
	for range hubKeeps + 10 {
		hub.Publish(&controlpb.Observation{Json: make([]byte, 8<<10)})
	}
	if hub.bytes > hubBytes || len(hub.ring) > hubKeeps {
		t.Errorf("keeps %d bytes in %d", hub.bytes, len(hub.ring))
	}
	for range maxReaders {
		if _, r := hub.subscribe(&controlpb.ObserveRequest{Follow: true}); r == nil {
			t.Fatal("no reader")
		}
	}
	if _, r := hub.subscribe(&controlpb.ObserveRequest{Follow: true}); r != nil {
		t.Error("one reader too many")
	}
}

func TestGroupID(t *testing.T) {
	path := filepath.Join(t.TempDir(), "group")
	if err := os.WriteFile(path, []byte("x\nsallyport2:x:1:\nsallyport:x:notanumber:\nsallyport:x:77:a,b\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if g := groupID(path, Group); g != 77 {
		t.Error(g)
	}
	if g := groupID(path, "none"); g != -1 {
		t.Error(g)
	}
	if (Peer{UID: 1, GID: 4294967295}).mayRead(-1) {
		t.Error("without the group somebody may read")
	}
}

// TestGenerated holds the committed code against its source.
func TestGenerated(t *testing.T) {
	for _, tool := range []string{"protoc", "protoc-gen-go", "protoc-gen-go-grpc"} {
		testenv.Program(t, tool)
	}
	dir := t.TempDir()
	cmd := exec.Command("protoc", "--go_out="+dir, "--go_opt=paths=source_relative",
		"--go-grpc_out="+dir, "--go-grpc_opt=paths=source_relative", "controlpb/control.proto")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, name := range []string{"controlpb/control.pb.go", "controlpb/control_grpc.pb.go"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(withoutVersions(got), withoutVersions(want)) {
			t.Errorf("%s is not what control.proto generates: run go generate ./agent/control", name)
		}
	}
}

// withoutVersions drops the lines that name the generators' versions.
func withoutVersions(b []byte) []byte {
	var keep [][]byte
	for l := range bytes.SplitSeq(b, []byte("\n")) {
		if !bytes.HasPrefix(l, []byte("// \tprotoc")) && !bytes.HasPrefix(l, []byte("// - protoc")) {
			keep = append(keep, l)
		}
	}
	return bytes.Join(keep, []byte("\n"))
}
