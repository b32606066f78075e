// SPDX-License-Identifier: Apache-2.0

package line

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
	"github.com/sallyport-dev/sallyport/userspace/testenv"
)

func dial(port uint32) *linepb.Message {
	return &linepb.Message{Body: &linepb.Message_Dial{Dial: &linepb.Dial{Kind: linepb.DialKind_PEER, Port: port}}}
}

func dialReply() *linepb.Message {
	return &linepb.Message{Body: &linepb.Message_DialReply{DialReply: &linepb.DialReply{}}}
}

func status(n int) *linepb.Message {
	return &linepb.Message{Body: &linepb.Message_StatusReply{StatusReply: &linepb.StatusReply{Json: bytes.Repeat([]byte("x"), n)}}}
}

// pair returns two sockets, the first as the agent has it.
func pair(t testing.TB) (agent, user *Socket) {
	t.Helper()
	a, b, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	if agent, err = NewSocket(a, false); err != nil {
		t.Fatal(err)
	}
	if user, err = NewSocket(b, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { agent.Close(); user.Close() })
	return agent, user
}

// descriptorsOpen counts this process's descriptors.
func descriptorsOpen(t testing.TB) int {
	t.Helper()
	e, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(e)
}

// settle waits until f gives want.
func settle(t testing.TB, what string, want int, f func() int) {
	t.Helper()
	got := 0
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if got = f(); got == want {
			return
		}
	}
	t.Fatalf("%s: %d, want %d", what, got, want)
}

func pipe(t testing.TB) (r, w int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	return p[0], p[1]
}

func raw(t *testing.T, s *Socket, b []byte, fds ...int) {
	t.Helper()
	oob := rights(fds)
	if len(b) > 0 {
		if _, _, err := s.conn.WriteMsgUnix(b, oob, nil); err != nil {
			t.Fatal(err)
		}
		return
	}
	// Go puts a byte before descriptors that come alone; the kernel does not.
	h := unix.Msghdr{Control: &oob[0]}
	h.SetControllen(len(oob))
	s.raw.Control(func(fd uintptr) {
		if _, _, errno := unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&h)), 0); errno != 0 {
			t.Error(errno)
		}
	})
}

func encoded(t testing.TB, m *linepb.Message) []byte {
	t.Helper()
	b, err := Encode(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSocketCarriesMessageAndDescriptor(t *testing.T) {
	before := descriptorsOpen(t)
	agent, user := pair(t)
	r, w := pipe(t)
	m := dialReply()
	m.Id, m.Reply = 7, true
	if err := agent.Send(m, w); err != nil {
		t.Fatal(err)
	}
	unix.Close(w)
	got, fds, err := user.Recv()
	if err != nil || got.Id != 7 || !got.Reply || len(fds) != 1 {
		t.Fatalf("got %v %v %v", got, fds, err)
	}
	if flags, _ := unix.FcntlInt(uintptr(fds[0]), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 {
		t.Error("a received descriptor is not close-on-exec")
	}
	if _, err := unix.Write(fds[0], []byte("through")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 16)
	if n, _ := unix.Read(r, b); string(b[:n]) != "through" {
		t.Fatalf("read %q", b[:n])
	}
	unix.Close(fds[0])
	unix.Close(r)
	agent.Close()
	user.Close()
	settle(t, "descriptors", before, func() int { return descriptorsOpen(t) })
}

func TestSocketRefuses(t *testing.T) {
	listeners := &linepb.Message{Body: &linepb.Message_Listeners{Listeners: &linepb.Listeners{Listeners: make([]*linepb.Listener, 2)}}}
	for i := range listeners.GetListeners().Listeners {
		listeners.GetListeners().Listeners[i] = &linepb.Listener{}
	}
	failed := dialReply()
	failed.GetDialReply().Error = "no"
	other := dial(1)
	cases := []struct {
		name string
		b    func(t *testing.T) []byte
		fds  int
		want error
	}{
		{"garbage", func(*testing.T) []byte { return []byte{0xff, 0xff, 0xff} }, 1, ErrMalformed},
		{"another version", func(t *testing.T) []byte {
			b, _ := proto.Marshal(&linepb.Message{Version: Version + 1, Body: other.Body})
			return b
		}, 1, ErrVersion},
		{"no version", func(t *testing.T) []byte { return []byte{0x10, 1} }, 0, ErrVersion},
		{"no body", func(t *testing.T) []byte { return encoded(t, &linepb.Message{Id: 1}) }, 0, ErrMalformed},
		{"unknown field", func(t *testing.T) []byte { return append(encoded(t, dial(1)), 0xf8, 0x07, 1) }, 1, ErrMalformed},
		{"reply to nothing", func(t *testing.T) []byte { return encoded(t, &linepb.Message{Reply: true, Body: other.Body}) }, 0, ErrMalformed},
		{"error in a request", func(t *testing.T) []byte { return encoded(t, &linepb.Message{Id: 1, Error: "x"}) }, 0, ErrMalformed},
		{"descriptor where none belongs", func(t *testing.T) []byte { return encoded(t, dial(1)) }, 1, ErrDescriptors},
		{"many where none belongs", func(t *testing.T) []byte { return encoded(t, dial(1)) }, 200, ErrDescriptors},
		{"one of two", func(t *testing.T) []byte { return encoded(t, listeners) }, 1, ErrDescriptors},
		{"none with a dialled socket", func(t *testing.T) []byte { m := dialReply(); m.Id, m.Reply = 1, true; return encoded(t, m) }, 0, ErrDescriptors},
		{"one with a failed dial", func(t *testing.T) []byte { failed.Id, failed.Reply = 1, true; return encoded(t, failed) }, 1, ErrDescriptors},
		{"too long", func(t *testing.T) []byte { return encoded(t, status(MaxMessage)) }, 1, ErrTruncated},
		{"sealed from userspace", func(t *testing.T) []byte { return encoded(t, &linepb.Message{Sealed: true}) }, 1, ErrMalformed},
		{"sealed with a body", func(t *testing.T) []byte { return encoded(t, &linepb.Message{Sealed: true, Body: other.Body}) }, 1, ErrMalformed},
		{"empty with descriptors", func(*testing.T) []byte { return nil }, 3, ErrClosed},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			agent, user := pair(t)
			r, w := pipe(t)
			defer unix.Close(w)
			defer unix.Close(r)
			fds := make([]int, c.fds)
			for i := range fds {
				fds[i] = w
			}
			raw(t, user, c.b(t), fds...)
			before := descriptorsOpen(t)
			if _, got, err := agent.Recv(); !errors.Is(err, c.want) || got != nil {
				t.Fatalf("got %v, %v; want %v", got, err, c.want)
			}
			if after := descriptorsOpen(t); after != before {
				t.Fatalf("descriptors leaked: %d, before %d", after, before)
			}
			if errors.Is(c.want, ErrClosed) {
				return
			}
			if err := user.Send(dial(9)); err != nil {
				t.Fatal(err)
			}
			if m, _, err := agent.Recv(); err != nil || m.GetDial().GetPort() != 9 {
				t.Fatalf("the socket cannot be read on: %v", err)
			}
		})
	}
}

func TestSocketLostDescriptors(t *testing.T) {
	agent, user := pair(t)
	r, w := pipe(t)
	defer unix.Close(r)
	defer unix.Close(w)
	m := dialReply()
	m.Id, m.Reply = 1, true
	if err := agent.Send(m, w); err != nil {
		t.Fatal(err)
	}
	// A control buffer without room makes the kernel drop what does not fit.
	user.oob = user.oob[:unix.CmsgLen(0)]
	got, fds, err := user.Recv()
	if !errors.Is(err, ErrDescriptors) || fds != nil || got.GetId() != 1 {
		t.Fatalf("got %v %v %v", got, fds, err)
	}
}

func TestSealed(t *testing.T) {
	want := bytes.Repeat([]byte("policy\n"), 1<<16)
	fd, err := Sealed("test", want)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if got, err := ReadSealed(fd); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read %d bytes, %v", len(got), err)
	}
	if _, err := unix.Pwrite(fd, []byte("x"), 0); err == nil {
		t.Error("a sealed memfd was written")
	}
	if err := unix.Ftruncate(fd, 0); err == nil {
		t.Error("a sealed memfd was cut")
	}
	if _, err := Sealed("big", make([]byte, MaxSealed+1)); err == nil {
		t.Error("a memfd larger than MaxSealed was made")
	}
	for _, c := range []struct {
		name string
		open func() int
	}{
		{"unsealed", func() int { fd, _ := unix.MemfdCreate("t", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING); return fd }},
		{"not all seals", func() int {
			fd, _ := unix.MemfdCreate("t", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
			unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK)
			return fd
		}},
		{"pipe", func() int { r, w := pipe(t); unix.Close(w); return r }},
		{"file", func() int {
			fd, _ := unix.Open(filepath.Join(t.TempDir(), "f"), unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
			return fd
		}},
		{"too large", func() int {
			fd, _ := unix.MemfdCreate("t", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
			unix.Ftruncate(fd, MaxSealed+1)
			unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, allSeals)
			return fd
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			fd := c.open()
			defer unix.Close(fd)
			if _, err := ReadSealed(fd); err == nil {
				t.Fatal("read")
			}
		})
	}
}

func TestLargestDatagram(t *testing.T) {
	agent, user := pair(t)
	n := MaxMessage - 32
	if err := agent.Send(status(n)); err != nil {
		t.Fatal(err)
	}
	if m, _, err := user.Recv(); err != nil || len(m.GetStatusReply().GetJson()) != n {
		t.Fatalf("got %d bytes, %v", len(m.GetStatusReply().GetJson()), err)
	}
}

func TestLargeMessageIsSealed(t *testing.T) {
	before := descriptorsOpen(t)
	agent, user := pair(t)
	if err := agent.Send(status(2 << 20)); err != nil {
		t.Fatal(err)
	}
	m, _, err := user.Recv()
	if err != nil || len(m.GetStatusReply().GetJson()) != 2<<20 {
		t.Fatalf("got %d bytes, %v", len(m.GetStatusReply().GetJson()), err)
	}
	agent.Close()
	user.Close()
	settle(t, "descriptors", before, func() int { return descriptorsOpen(t) })
}

func TestNewSocketRefusesOtherKinds(t *testing.T) {
	for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
		fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fds[1])
		if _, err := NewSocket(os.NewFile(uintptr(fds[0]), "x"), false); err == nil {
			t.Errorf("kind %d was taken", kind)
		}
	}
	if _, err := FromFD(1 << 20); err == nil {
		t.Error("a descriptor that is not open was taken")
	}
}

// conns returns a line whose agent end answers with handle.
func conns(t testing.TB, opt Options) (agent, user *Conn) {
	t.Helper()
	a, u := pair(t)
	agent, user = NewConn(a, opt), NewConn(u, Options{})
	t.Cleanup(func() {
		for _, c := range []*Conn{agent, user} {
			c.Close()
			<-c.Done() // whoever closes it: the next test counts descriptors
		}
	})
	return agent, user
}

func all(*linepb.Message) bool { return true }

func TestCallsFromManyGoroutines(t *testing.T) {
	before := descriptorsOpen(t)
	agent, user := conns(t, Options{Concurrent: all, Workers: 3, Handle: func(_ context.Context, in *Incoming) {
		if in.Message.GetDial().GetPort()%2 == 0 {
			in.Reply(&linepb.Message{Body: &linepb.Message_DialReply{DialReply: &linepb.DialReply{Error: fmt.Sprint(in.Message.GetDial().GetPort())}}})
			return
		}
		r, w := pipe(t)
		unix.Close(r)
		in.Reply(dialReply(), w)
		unix.Close(w)
	}})
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 50 {
				port := uint32(g*1000 + i)
				m, fds, err := user.Call(t.Context(), dial(port))
				if err != nil {
					t.Error(err)
					return
				}
				if port%2 == 0 && m.GetDialReply().Error != fmt.Sprint(port) || port%2 == 1 && len(fds) != 1 {
					t.Errorf("port %d: %v with %d descriptors", port, m, len(fds))
				}
				closeAll(fds)
			}
		})
	}
	wg.Wait()
	agent.Close()
	user.Close()
	settle(t, "descriptors", before, func() int { return descriptorsOpen(t) })
}

func TestOrderAndBackPressure(t *testing.T) {
	const n = 20000
	got := make(chan uint32, n)
	hold := make(chan struct{})
	_, user := conns(t, Options{Queue: 4, Handle: func(_ context.Context, in *Incoming) {
		<-hold
		got <- in.Message.GetDial().GetPort()
	}})
	sent, busy := uint32(0), false
	for sent < n {
		err := user.Notify(dial(sent + 1))
		if errors.Is(err, ErrBusy) {
			if !busy {
				busy = true
				close(hold)
			}
			time.Sleep(time.Millisecond)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		sent++
	}
	if !busy {
		t.Error("an end that does not read never made the other busy")
	}
	for i := uint32(1); i <= n; i++ {
		if p := <-got; p != i {
			t.Fatalf("message %d came as number %d", p, i)
		}
	}
}

func TestOverloadAndPanicAndSilence(t *testing.T) {
	hold := make(chan struct{})
	entered := make(chan struct{}, 1)
	_, user := conns(t, Options{Concurrent: all, Workers: 1, Queue: 1, Handle: func(_ context.Context, in *Incoming) {
		switch in.Message.GetDial().GetPort() {
		case 1:
			entered <- struct{}{}
			<-hold
			in.Reply(&linepb.Message{Body: &linepb.Message_VerdictReply{VerdictReply: &linepb.VerdictReply{}}})
		case 2:
			panic("a handler's fault")
		}
	}})
	first := make(chan error, 1)
	user.Go(dial(1), func(_ *linepb.Message, _ []int, err error) { first <- err })
	<-entered
	waits := make(chan error, 1)
	user.Go(dial(3), func(_ *linepb.Message, _ []int, err error) { waits <- err })
	if _, _, err := user.Call(t.Context(), dial(3)); err == nil || !strings.Contains(err.Error(), "overload") {
		t.Fatalf("beyond its workers: %v", err)
	}
	close(hold)
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	if err := <-waits; err == nil || !strings.Contains(err.Error(), "not answered") {
		t.Fatalf("what waited for the worker: %v", err)
	}
	for port, want := range map[uint32]string{2: "internal", 3: "not answered"} {
		if _, _, err := user.Call(t.Context(), dial(port)); err == nil || !strings.Contains(err.Error(), want) {
			t.Fatalf("got %v, want %s", err, want)
		}
	}
}

func TestLateAnswerIsDropped(t *testing.T) {
	before := descriptorsOpen(t)
	ask := make(chan *Incoming, 1)
	agent, user := conns(t, Options{Handle: func(_ context.Context, in *Incoming) {
		if in.Message.GetDial().GetPort() == 1 {
			in.Later()
			ask <- in
			return
		}
		in.Reply(&linepb.Message{Body: &linepb.Message_VerdictReply{VerdictReply: &linepb.VerdictReply{}}})
	}})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		in := <-ask
		cancel()
		ask <- in
	}()
	if _, _, err := user.Call(ctx, dial(1)); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	r, w := pipe(t)
	in := <-ask
	if err := in.Reply(dialReply(), w); err != nil {
		t.Fatal(err)
	}
	unix.Close(r)
	unix.Close(w)
	if _, _, err := user.Call(t.Context(), dial(2)); err != nil {
		t.Fatalf("after a late answer: %v", err)
	}
	agent.Close()
	user.Close()
	settle(t, "descriptors", before, func() int { return descriptorsOpen(t) })
}

func TestEndFailsPendingCalls(t *testing.T) {
	agent, user := conns(t, Options{Handle: func(_ context.Context, in *Incoming) { in.Later() }})
	const n = 32
	errs := make(chan error, n)
	for range n {
		user.Go(dial(1), func(_ *linepb.Message, _ []int, err error) { errs <- err })
	}
	agent.Close()
	for range n {
		if err := <-errs; !errors.Is(err, ErrClosed) {
			t.Fatal(err)
		}
	}
	<-user.Done()
	if err := user.Err(); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
	if _, _, err := user.Call(t.Context(), dial(1)); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
	if err := user.Notify(dial(1)); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
}

// TestAnswersNotReadEndTheLine: who asks for ever and reads no answer does not
// fill the other end's memory.
func TestAnswersNotReadEndTheLine(t *testing.T) {
	before := descriptorsOpen(t)
	a, u := pair(t)
	var handlers atomic.Int32 // that are at it
	agent := NewConn(a, Options{Queue: 8, Concurrent: all, Handle: func(_ context.Context, in *Incoming) {
		handlers.Add(1)
		defer handlers.Add(-1)
		r, w := pipe(t)
		unix.Close(r)
		in.Reply(dialReply(), w)
		unix.Close(w)
	}})
	go func() {
		for id := uint64(1); ; id++ {
			m := dial(1)
			m.Id = id
			if u.Send(m) != nil {
				return
			}
		}
	}()
	<-agent.Done()
	if err := agent.Err(); !errors.Is(err, ErrBusy) {
		t.Fatal(err)
	}
	u.Close()
	settle(t, "descriptors", before, func() int {
		if n := descriptorsOpen(t); handlers.Load() == 0 {
			return n
		}
		return -1
	})
}

// TestHostilePeer sends what no proxy would, and expects that nothing leaks.
func TestHostilePeer(t *testing.T) {
	before := descriptorsOpen(t)
	r, w := pipe(t)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		a, u := pair(t)
		agent := NewConn(a, Options{Handle: func(_ context.Context, in *Incoming) {
			if in.Message.Id%2 == 0 {
				closeAll(in.TakeFDs())
			}
			in.Reply(&linepb.Message{Body: &linepb.Message_VerdictReply{VerdictReply: &linepb.VerdictReply{}}})
		}})
		for range 20 {
			m := dial(1)
			m.Id, m.Reply, m.Sealed = rng.Uint64N(3), rng.IntN(4) == 0, rng.IntN(8) == 0
			if rng.IntN(3) == 0 {
				m.Body = &linepb.Message_Maps{Maps: &linepb.Maps{}}
			}
			b := encoded(t, m)
			if rng.IntN(5) == 0 {
				b[rng.IntN(len(b))] ^= byte(1 + rng.IntN(255))
			}
			fds := []int{w, w, w}[:rng.IntN(4)]
			if _, _, err := u.conn.WriteMsgUnix(b, rights(fds), nil); err != nil {
				break // cut, as it should be
			}
		}
		u.Close()
		<-agent.Done()
	}
	unix.Close(r)
	unix.Close(w)
	settle(t, "descriptors", before, func() int { return descriptorsOpen(t) })
}

func TestReplyToNothingEndsTheLine(t *testing.T) {
	a, u := pair(t)
	agent := NewConn(a, Options{})
	defer agent.Close()
	m := &linepb.Message{Id: 5, Reply: true, Body: &linepb.Message_VerdictReply{VerdictReply: &linepb.VerdictReply{}}}
	if err := u.Send(m); err != nil {
		t.Fatal(err)
	}
	<-agent.Done()
	if err := agent.Err(); !errors.Is(err, ErrMalformed) {
		t.Fatal(err)
	}
}

func TestOrphan(t *testing.T) {
	for _, draining := range []bool{false, true} {
		a, u := pair(t)
		user := NewConn(u, Options{})
		var order []string
		o := Orphan{
			Listeners:   func() { order = append(order, "listeners") },
			Connections: func() { order = append(order, "connections") },
			Draining:    func() bool { return draining },
			Grace:       time.Millisecond,
		}
		a.Close()
		o.Watch(user)
		want := "listeners connections"
		if draining {
			want = "listeners"
		}
		if got := strings.Join(order, " "); got != want {
			t.Errorf("draining %v: %s, want %s", draining, got, want)
		}
	}
}

// TestOrphanIdle: once nothing lives the grace need not pass.
func TestOrphanIdle(t *testing.T) {
	a, u := pair(t)
	asked := 0
	o := Orphan{
		Listeners: func() {}, Connections: func() {},
		Idle:  func() bool { asked++; return asked > 2 },
		Grace: time.Hour,
	}
	a.Close()
	o.Watch(NewConn(u, Options{}))
	if asked != 3 {
		t.Errorf("asked %d times, want until it is idle", asked)
	}
}

func FuzzDecode(f *testing.F) {
	for _, m := range []*linepb.Message{
		dial(80), dialReply(), status(10),
		{Id: 1, Reply: true, Error: "x"},
		{Sealed: true},
		{Body: &linepb.Message_Policies{Policies: &linepb.Policies{Generation: 1}}},
		{Body: &linepb.Message_Revocations{Revocations: &linepb.Revocations{Revocations: []*linepb.Revocation{{Kind: "jti", Value: "1"}}}}},
		{Body: &linepb.Message_Listeners{Listeners: &linepb.Listeners{Listeners: []*linepb.Listener{{Kind: linepb.ListenerKind_TUNNEL, Family: 6}}}}},
	} {
		f.Add(encoded(f, m), 0)
		f.Add(encoded(f, m), 1)
	}
	f.Fuzz(func(t *testing.T, b []byte, nfds int) {
		m, err := Decode(b, nfds)
		if err != nil {
			return
		}
		if m.Version != Version || descriptors(m) != nfds {
			t.Fatalf("taken: %v with %d descriptors", m, nfds)
		}
		again, err := Decode(encoded(t, m), nfds)
		if err != nil || !proto.Equal(again, m) {
			t.Fatalf("not the same again: %v", err)
		}
	})
}

// TestGenerated holds the committed code against its source.
func TestGenerated(t *testing.T) {
	protoc := testenv.Program(t, "protoc")
	testenv.Program(t, "protoc-gen-go")
	dir := t.TempDir()
	cmd := exec.Command(protoc, "--go_out="+dir, "--go_opt=paths=source_relative", "linepb/line.proto")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(dir, "linepb/line.pb.go"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("linepb/line.pb.go")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(withoutVersions(got), withoutVersions(want)) {
		t.Error("linepb/line.pb.go is not what line.proto generates: run go generate ./userspace/line")
	}
}

// withoutVersions drops the lines that name the generators' versions.
func withoutVersions(b []byte) []byte {
	var keep [][]byte
	for l := range bytes.SplitSeq(b, []byte("\n")) {
		if !bytes.HasPrefix(l, []byte("// \tprotoc")) {
			keep = append(keep, l)
		}
	}
	return bytes.Join(keep, []byte("\n"))
}

func BenchmarkCall(b *testing.B) {
	_, user := conns(b, Options{Concurrent: all, Handle: func(_ context.Context, in *Incoming) {
		in.Reply(&linepb.Message{Body: &linepb.Message_VerdictReply{VerdictReply: &linepb.VerdictReply{}}})
	}})
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := user.Call(b.Context(), dial(1)); err != nil {
			b.Fatal(err)
		}
	}
}
