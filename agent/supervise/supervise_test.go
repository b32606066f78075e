// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace/confine"
	"github.com/sallyport-dev/sallyport/userspace/line"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

// The test's binary is the userspace process as well, and for one test the
// agent; its first argument says what.
func TestMain(m *testing.M) {
	switch os.Args[0] {
	case "userspace":
		userspace(os.Args[1:])
		os.Exit(0)
	case "agent":
		agentProcess(os.Args[1])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var testUser = User{"test", 64321, 64321}

// report is what the userspace process finds out about itself.
type report struct {
	Status  confine.Status
	Dir     string
	Env     []string
	FDs     map[string]string
	Groups  []int
	Parent  int
	Session bool
	Cgroup  string
	Tried   map[string]string // what was tried -> errno, "" where it was done
}

func userspace(args []string) {
	fmt.Println("userspace says hello")
	if args[0] == "die" {
		os.Exit(3)
	}
	s, err := line.FromFD(3)
	if err != nil {
		fmt.Println("no line:", err)
		os.Exit(4)
	}
	if args[0] == "stubborn" {
		time.Sleep(time.Hour)
	}
	if args[0] == "serve" {
		serve(s)
		return
	}
	r := look(args[1:])
	if args[0] == "confined" {
		if err := confine.Self(); err != nil {
			fmt.Println("not confined:", err)
			os.Exit(5)
		}
		r = look(args[1:])
	}
	b, err := json.Marshal(r)
	if err != nil {
		panic(err)
	}
	if err := s.Send(&linepb.Message{Body: &linepb.Message_StatusReply{StatusReply: &linepb.StatusReply{Json: b}}}); err != nil {
		panic(err)
	}
	m, fds, err := s.Recv()
	if m.GetMaps() != nil {
		text := readMap(fds[0])
		if err := s.Send(&linepb.Message{Body: &linepb.Message_RelationReply{RelationReply: &linepb.RelationReply{Text: text}}}); err != nil {
			panic(err)
		}
		_, _, err = s.Recv()
	}
	if args[0] == "exits" {
		os.Exit(7)
	}
	if !errors.Is(err, line.ErrClosed) {
		panic(err)
	}
}

// mapAttr is union bpf_attr for the commands on elements, and, its first
// words, for BPF_MAP_CREATE and BPF_MAP_GET_FD_BY_ID.
type mapAttr struct {
	fd, _      uint32
	key, value uint64
	flags      uint64
}

func element(cmd, fd int, key, value *uint32) syscall.Errno {
	a := mapAttr{fd: uint32(fd), key: uint64(uintptr(unsafe.Pointer(key))), value: uint64(uintptr(unsafe.Pointer(value)))}
	_, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(unsafe.Pointer(&a)), unsafe.Sizeof(a))
	runtime.KeepAlive(key)
	runtime.KeepAlive(value)
	return errno
}

// readMap says what the process can do with the descriptor of a map.
func readMap(fd int) string {
	key, value := new(uint32), new(uint32)
	*key = 7
	read := element(unix.BPF_MAP_LOOKUP_ELEM, fd, key, value)
	got := *value
	return fmt.Sprintf("read %d %d, update %s", read, got, unix.ErrnoName(element(unix.BPF_MAP_UPDATE_ELEM, fd, key, value)))
}

// readOnlyMap makes a map with 7 -> 42 and returns a descriptor that only
// reads it.
func readOnlyMap(t *testing.T) int {
	t.Helper()
	create := [8]uint32{1, 4, 4, 8} // hash, key, value, entries
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_CREATE, uintptr(unsafe.Pointer(&create)), unsafe.Sizeof(create))
	if errno != 0 {
		t.Fatal(errno)
	}
	defer unix.Close(int(fd))
	key, value := new(uint32), new(uint32)
	*key, *value = 7, 42
	if errno := element(unix.BPF_MAP_UPDATE_ELEM, int(fd), key, value); errno != 0 {
		t.Fatal(errno)
	}
	var info [80]byte // struct bpf_map_info; the id is its second word
	ask := struct {
		fd, size uint32
		info     uint64
	}{uint32(fd), uint32(len(info)), uint64(uintptr(unsafe.Pointer(&info)))}
	if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_GET_INFO_BY_FD, uintptr(unsafe.Pointer(&ask)), unsafe.Sizeof(ask)); errno != 0 {
		t.Fatal(errno)
	}
	open := [3]uint32{*(*uint32)(unsafe.Pointer(&info[4])), 0, unix.BPF_F_RDONLY}
	ro, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_GET_FD_BY_ID, uintptr(unsafe.Pointer(&open)), unsafe.Sizeof(open))
	if errno != 0 {
		t.Fatal(errno)
	}
	return int(ro)
}

func look(closed []string) report {
	r := report{Env: os.Environ(), FDs: map[string]string{}, Parent: os.Getppid(), Tried: map[string]string{}}
	r.Status, _ = confine.ReadStatus("self")
	r.Dir, _ = os.Getwd()
	r.Groups, _ = os.Getgroups()
	sid, _ := unix.Getsid(0)
	r.Session = sid == os.Getpid()
	b, _ := os.ReadFile("/proc/self/cgroup")
	r.Cgroup = string(b)
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, f := range fds {
		if link, err := os.Readlink("/proc/self/fd/" + f.Name()); err == nil {
			r.FDs[f.Name()] = link
		}
	}
	try := func(what string, err error) {
		if err == nil || errors.Is(err, syscall.Errno(0)) {
			r.Tried[what] = ""
		} else if e, ok := asErrno(err); ok {
			r.Tried[what] = unix.ErrnoName(e)
		} else {
			r.Tried[what] = err.Error()
		}
	}
	attr := [128]byte{}
	*(*uint32)(unsafe.Pointer(&attr[0])) = 1 // hash: key 4, value 4, 1 entry
	*(*uint32)(unsafe.Pointer(&attr[4])) = 4
	*(*uint32)(unsafe.Pointer(&attr[8])) = 4
	*(*uint32)(unsafe.Pointer(&attr[12])) = 1
	_, _, errno := unix.Syscall(unix.SYS_BPF, 0, uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))
	try("bpf map create", errno)
	insns := [2]uint64{0xb7, 0x95} // r0 = 0; exit
	license := []byte("GPL\x00")
	attr = [128]byte{}
	*(*uint32)(unsafe.Pointer(&attr[0])) = 1 // socket filter
	*(*uint32)(unsafe.Pointer(&attr[4])) = 2
	*(*uint64)(unsafe.Pointer(&attr[8])) = uint64(uintptr(unsafe.Pointer(&insns[0])))
	*(*uint64)(unsafe.Pointer(&attr[16])) = uint64(uintptr(unsafe.Pointer(&license[0])))
	_, _, errno = unix.Syscall(unix.SYS_BPF, 5, uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))
	runtime.KeepAlive(&insns)
	runtime.KeepAlive(&license)
	try("bpf prog load", errno)
	attr = [128]byte{}
	_, _, errno = unix.Syscall(unix.SYS_BPF, 1, uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))
	try("bpf map look-up", errno)
	for i, dir := range closed {
		_, err := os.ReadDir(dir)
		try("read dir "+strconv.Itoa(i), err)
	}
	_, _, errno = unix.RawSyscall(unix.SYS_SETUID, 0, 0, 0)
	try("setuid", errno)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	try("socket", err)
	try("exec", exec.Command("/bin/true").Run())
	_, _, errno = unix.RawSyscall(unix.SYS_UNSHARE, unix.CLONE_FILES, 0, 0)
	try("unshare", errno)
	_, _, errno = unix.Syscall(unix.SYS_IO_URING_SETUP, 0, 0, 0)
	try("io_uring", errno)
	return r
}

func asErrno(err error) (syscall.Errno, bool) {
	var e syscall.Errno
	return e, errors.As(err, &e)
}

// harness runs a Supervisor and hands on what it tells.
type harness struct {
	*Supervisor
	started chan *Process
	exited  chan error
	mu      sync.Mutex
	lines   []string
	stop    func() error
}

func supervise(t *testing.T, opt Options) *harness {
	t.Helper()
	testenv.RequireRoot(t)
	h := &harness{started: make(chan *Process, 64), exited: make(chan error, 64)}
	opt.User = testUser
	opt.Started = func(p *Process) { h.started <- p }
	opt.Exited = func(_ *Process, err error) { h.exited <- err }
	opt.Output = func(l string) { h.mu.Lock(); h.lines = append(h.lines, l); h.mu.Unlock() }
	var err error
	if h.Supervisor, err = New(opt); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- h.Run(ctx) }()
	h.stop = sync.OnceValue(func() error { cancel(); return <-ended })
	t.Cleanup(func() {
		if err := h.stop(); err != nil {
			t.Error(err)
		}
	})
	return h
}

func (h *harness) report(t *testing.T) (report, *Process) {
	t.Helper()
	p := wait(t, h.started)
	m, _, err := p.Socket.Recv()
	if err != nil {
		t.Fatalf("%v; it wrote %q", err, h.output())
	}
	var r report
	if err := json.Unmarshal(m.GetStatusReply().GetJson(), &r); err != nil {
		t.Fatal(err)
	}
	return r, p
}

func (h *harness) output() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.lines)
}

func wait[T any](t *testing.T, ch chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(20 * time.Second):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

func TestUserspaceHasNoPrivilege(t *testing.T) {
	cg := testenv.NewCgroup(t, nil)
	closed := t.TempDir()
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SECRET", "of the agent")
	for _, confined := range []bool{false, true} {
		mode := map[bool]string{false: "plain", true: "confined"}[confined]
		t.Run(mode, func(t *testing.T) {
			// As the next one's cgroup would be the last one's.
			own := filepath.Join(cg.Path, mode)
			h := supervise(t, Options{Args: []string{"userspace", mode, closed}, Env: []string{"A=b"}, Cgroup: own})
			t.Cleanup(func() {
				if err := testenv.RemoveCgroup(own); err != nil {
					t.Error(err)
				}
			})
			r, p := h.report(t)
			s := r.Status
			if err := s.Unprivileged(); err != nil {
				t.Error(err)
			}
			id := strconv.Itoa(int(testUser.UID))
			if s.CapEff != "0000000000000000" || s.CapBnd != "0000000000000000" || s.NoNewPrivs != "1" || s.UID != strings.Join([]string{id, id, id, id}, " ") {
				t.Errorf("status %+v", s)
			}
			// The same, as the kernel says it to others.
			if seen, err := confine.ReadStatus(strconv.Itoa(p.PID)); err != nil || seen.CapEff != s.CapEff || seen.NoNewPrivs != "1" {
				t.Errorf("status %+v, %v", seen, err)
			}
			if len(r.Groups) > 1 || len(r.Groups) == 1 && r.Groups[0] != int(testUser.GID) {
				t.Errorf("groups %v", r.Groups)
			}
			if fmt.Sprint(r.Env) != "[A=b]" || r.Dir != "/" || !r.Session || r.Parent != os.Getpid() {
				t.Errorf("environment %v, directory %s, own session %v, parent %d", r.Env, r.Dir, r.Session, r.Parent)
			}
			if want := "0::" + strings.TrimPrefix(own, testenv.CgroupMount(t)) + "\n"; !strings.Contains(r.Cgroup, want) {
				t.Errorf("cgroup %q, want %q", r.Cgroup, want)
			}
			sockets := 0
			for fd, link := range r.FDs {
				switch {
				case fd == "0" && link == "/dev/null", fd == "1", fd == "2", strings.HasPrefix(link, "anon_inode:"), strings.HasPrefix(link, "/proc/"):
				case strings.HasPrefix(link, "/sys/fs/cgroup/"): // Go's runtime reads its CPU limit
				case strings.HasPrefix(link, "socket:") && sockets == 0: // the line
					sockets++
				default:
					t.Errorf("descriptor %s is %s", fd, link)
				}
			}
			want := map[string]string{
				"bpf map create": "EPERM", "bpf prog load": "EPERM", "read dir 0": "EACCES", "setuid": "EPERM",
				"socket": "", "exec": "", "unshare": "",
			}
			if confined {
				for _, w := range []string{"socket", "exec", "unshare", "io_uring"} {
					want[w] = "EPERM"
				}
				if s.Seccomp != "2" {
					t.Errorf("seccomp %s", s.Seccomp)
				}
				if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.PID)); err != nil || string(name) != confine.Name+"\n" {
					t.Errorf("it is called %s, %v", name, err)
				}
			}
			for what, errno := range want {
				if got := r.Tried[what]; got != errno {
					t.Errorf("%s: %q, want %q", what, got, errno)
				}
			}
			fd := readOnlyMap(t)
			err := p.Socket.Send(&linepb.Message{Body: &linepb.Message_Maps{Maps: &linepb.Maps{}}}, fd)
			unix.Close(fd)
			if err != nil {
				t.Fatal(err)
			}
			if m, _, err := p.Socket.Recv(); err != nil || m.GetRelationReply().GetText() != "read 0 42, update EPERM" {
				t.Errorf("with a read-only map: %q, %v", m.GetRelationReply().GetText(), err)
			}
			if err := h.stop(); err != nil {
				t.Error(err)
			}
			if err := wait(t, h.exited); err != nil {
				t.Errorf("it ended with %v; it wrote %q", err, h.output())
			}
			if got := h.output(); !slices.Contains(got, "userspace says hello") {
				t.Errorf("it wrote %q", got)
			}
		})
	}
}

func TestRestart(t *testing.T) {
	before := descriptors(t)
	h := supervise(t, Options{Args: []string{"userspace", "exits"}, MinBackoff: time.Millisecond, MaxBackoff: 4 * time.Millisecond})
	seen := map[int]bool{}
	for i := range 4 {
		_, p := h.report(t)
		if seen[p.PID] || h.Status().PID != p.PID || h.Status().Restarts != i {
			t.Fatalf("process %d, status %+v", p.PID, h.Status())
		}
		seen[p.PID] = true
		switch i {
		case 0: // it dies by itself
			if err := p.Socket.Send(&linepb.Message{Body: &linepb.Message_Drain{Drain: &linepb.Drain{}}}); err != nil {
				t.Fatal(err)
			}
			if err := wait(t, h.exited); err == nil || err.Error() != "exit status 7" {
				t.Fatalf("ended with %v", err)
			}
		case 3:
		default: // it is killed
			if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if err := wait(t, h.exited); err == nil || err.Error() != "signal: killed" {
				t.Fatalf("ended with %v", err)
			}
			if _, _, err := p.Socket.Recv(); !errors.Is(err, line.ErrClosed) {
				t.Errorf("the line of a dead process: %v", err)
			}
		}
	}
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	for pid := range seen {
		if err := syscall.Kill(pid, 0); err != syscall.ESRCH {
			t.Errorf("process %d is still there: %v", pid, err)
		}
	}
	if after := descriptors(t); after > before+1 {
		t.Errorf("descriptors: %d, before %d", after, before)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func TestBackoffGrows(t *testing.T) {
	h := supervise(t, Options{Args: []string{"userspace", "die"}, MinBackoff: 20 * time.Millisecond, MaxBackoff: time.Hour})
	var at []time.Time
	for range 4 {
		at = append(at, wait(t, h.started).Started)
	}
	for i, least := range []time.Duration{20, 40, 80} {
		if d := at[i+1].Sub(at[i]); d < least*time.Millisecond {
			t.Errorf("start %d came %s after the one before", i+1, d)
		}
	}
}

func TestStubbornProcessIsKilled(t *testing.T) {
	cg := testenv.NewCgroup(t, nil)
	h := supervise(t, Options{Args: []string{"userspace", "stubborn"}, Grace: 20 * time.Millisecond, Cgroup: cg.Path})
	p := wait(t, h.started)
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	if err := wait(t, h.exited); err == nil || err.Error() != "signal: killed" {
		t.Fatalf("ended with %v", err)
	}
	if err := syscall.Kill(p.PID, 0); err != syscall.ESRCH {
		t.Errorf("still there: %v", err)
	}
}

// A process that hangs is ended when it is asked for, and the next one
// started.
func TestHangingProcessIsEnded(t *testing.T) {
	cg := testenv.NewCgroup(t, nil)
	h := supervise(t, Options{
		Args: []string{"userspace", "stubborn"}, Grace: 20 * time.Millisecond, MinBackoff: time.Millisecond, Cgroup: filepath.Join(cg.Path, "userspace"),
	})
	p := wait(t, h.started)
	if p.Ended() {
		t.Error("it ended by itself")
	}
	p.End()
	p.End()
	if err := wait(t, h.exited); err == nil || err.Error() != "signal: killed" {
		t.Fatalf("ended with %v", err)
	}
	if !p.Ended() {
		t.Error("it is not said to have ended")
	}
	if next := wait(t, h.started); next.PID == p.PID || next.Ended() {
		t.Errorf("then started: %+v", next)
	}
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	if err := testenv.RemoveCgroup(filepath.Join(cg.Path, "userspace")); err != nil {
		t.Error(err)
	}
}

// agentProcess supervises a process that ignores the end of its line, and
// says its number.
func agentProcess(cgroup string) {
	s, err := New(Options{
		Args: []string{"userspace", "stubborn"}, User: testUser, Cgroup: cgroup,
		Started: func(p *Process) { fmt.Println(p.PID) },
	})
	if err != nil {
		panic(err)
	}
	if err := s.Run(context.Background()); err != nil {
		panic(err)
	}
}

// TestProcessDiesWithAgent: SIGKILL of the agent ends a userspace process that
// would never end by itself, although it became another user (which clears
// PDEATHSIG where it was set before) and although the agent's other threads
// come and go.
func TestProcessDiesWithAgent(t *testing.T) {
	testenv.RequireRoot(t)
	cg := testenv.NewCgroup(t, nil)
	agent := &exec.Cmd{Path: "/proc/self/exe", Args: []string{"agent", filepath.Join(cg.Path, "userspace")}, Stderr: os.Stderr}
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = agent.Process.Kill() // where the test did not come that far
		_ = agent.Wait()
		_ = testenv.RemoveCgroup(filepath.Join(cg.Path, "userspace"))
	})
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	watch, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	if ended, err := testenv.Ended(watch, 300*time.Millisecond); ended || err != nil {
		t.Fatal("it ended before the agent did")
	}
	if err := agent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = agent.Wait()
	if ended, err := testenv.Ended(watch, 10*time.Second); !ended {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		t.Fatalf("the orphan lives on (%v)", err)
	}
}

func TestConfineRefusesPrivilege(t *testing.T) {
	testenv.RequireRoot(t)
	if err := confine.Self(); err == nil || !strings.Contains(err.Error(), "never by hand") {
		t.Fatalf("root was confined: %v", err)
	}
}

func TestStartErrors(t *testing.T) {
	testenv.RequireRoot(t)
	for name, opt := range map[string]Options{
		"root":       {Args: []string{"x"}, User: User{"root", 0, 0}, Started: func(*Process) {}},
		"root group": {Args: []string{"x"}, User: User{"x", 5, 0}, Started: func(*Process) {}},
		"no args":    {User: testUser, Started: func(*Process) {}},
	} {
		if _, err := New(opt); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	before := descriptors(t)
	for name, opt := range map[string]Options{
		"no program": {Path: "/none", Args: []string{"x"}},
		"no cgroup":  {Args: []string{"userspace", "die"}, Cgroup: "/sys/fs/cgroup/none/none"},
	} {
		opt.User, opt.Started = testUser, func(*Process) { t.Error("started") }
		s, err := New(opt)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Run(t.Context()); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("descriptors: %d, before %d", after, before)
	}
}

func TestLookupUser(t *testing.T) {
	path := filepath.Join(t.TempDir(), "passwd")
	write := func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("root:x:0:0::/:\nbroken\nwww:x:33:34::/:\nwheel:x:50:0::/:\ntoor:x:0:5::/:\n")
	for _, c := range []struct {
		name, want string
	}{
		{"auto", "{65527 65527 65527}"}, {"www", "{www 33 34}"}, {"33", "{www 33 34}"}, {"777", "{777 777 777}"},
		{"none", ""}, {"wheel", ""}, {"toor", ""}, {"0", ""}, {"root", ""}, {"-1", ""}, {"99999999999", ""},
	} {
		u, err := LookupUser(path, c.name)
		if got := fmt.Sprint(u); err == nil && got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %s, %v", c.name, got, err)
		}
	}
	write("sallyport:x:990:991::/:\n")
	if u, err := LookupUser(path, "auto"); err != nil || u.UID != 990 || u.GID != 991 {
		t.Errorf("%v %v", u, err)
	}
	write("other:x:65527:1::/:\nnobody:x:65534:65534::/:\n")
	for _, shared := range []string{"auto", "nobody", "65534"} {
		if u, err := LookupUser(path, shared); err == nil {
			t.Errorf("%s: %v, which others use too", shared, u)
		}
	}
	write("sallyport:x:0:0::/:\n")
	if _, err := LookupUser(path, "auto"); err == nil {
		t.Error("a sallyport that is root")
	}
	if u, err := LookupUser(filepath.Join(t.TempDir(), "none"), "auto"); err != nil || u.UID != 65527 {
		t.Errorf("%v %v", u, err)
	}
}

func TestPrepareDir(t *testing.T) {
	testenv.RequireRoot(t)
	top, err := os.MkdirTemp("", "state")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(top)
	if err := os.Chmod(top, 0o755); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(top, "a", "userspace")
	for range 2 {
		if err := testUser.PrepareDir(dir); err != nil {
			t.Fatal(err)
		}
	}
	st, err := os.Stat(dir)
	if err != nil || st.Mode().Perm() != 0o700 || st.Sys().(*syscall.Stat_t).Uid != testUser.UID {
		t.Errorf("%v %v", st.Mode(), err)
	}
	if st, err := os.Stat(filepath.Dir(dir)); err != nil || st.Mode().Perm() != 0o711 {
		t.Errorf("parent %v %v", st.Mode(), err)
	}
	// What another user of userspace left is handed over, and nothing else.
	own, foreign := filepath.Join(dir, "proofs"), filepath.Join(dir, "foreign")
	outside := filepath.Join(top, "outside")
	for path, uid := range map[string]int{own: int(testUser.UID), foreign: 4711, outside: int(testUser.UID)} {
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chown(path, uid, uid)); err != nil {
			t.Fatal(err)
		}
	}
	twice, pointed := filepath.Join(dir, "twice"), filepath.Join(dir, "pointed")
	if err := errors.Join(os.Link(outside, twice), os.Symlink(outside, pointed)); err != nil {
		t.Fatal(err)
	}
	next := User{"next", testUser.UID + 1, testUser.GID + 1}
	if err := next.PrepareDir(dir); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]uint32{dir: next.UID, own: next.UID, foreign: 4711, outside: testUser.UID} {
		if st, err := os.Stat(path); err != nil || st.Sys().(*syscall.Stat_t).Uid != want {
			t.Errorf("%s: %v %v", path, st.Sys(), err)
		}
	}
	closed := filepath.Join(top, "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := testUser.PrepareDir(filepath.Join(closed, "state", "userspace")); err == nil || !strings.Contains(err.Error(), closed+" is closed") {
		t.Errorf("beneath a closed directory: %v", err)
	}
	link := filepath.Join(top, "link")
	if err := os.Symlink("/etc", link); err != nil {
		t.Fatal(err)
	}
	if err := testUser.PrepareDir(link); err == nil {
		t.Error("a link was followed")
	}
}

func TestLineWriter(t *testing.T) {
	var got []string
	w := &lineWriter{emit: func(s string) { got = append(got, s) }}
	fmt.Fprint(w, "a\nb")
	fmt.Fprint(w, "c\n\n"+strings.Repeat("x", maxLine+1)+"\n")
	want := []string{"a", "bc", "", strings.Repeat("x", maxLine), "x"}
	if !slices.Equal(got, want) {
		t.Errorf("got %d lines: %.80q", len(got), got)
	}
}
