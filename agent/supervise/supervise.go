// SPDX-License-Identifier: Apache-2.0

// Package supervise starts the userspace process, the half that parses what
// strangers send, as another user without any privilege, and starts it again
// when it dies. What it holds (listeners, dialled sockets) dies with it: the
// agent keeps no copies, so a dead proxy refuses.
package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/confine"
	"github.com/sallyport-dev/sallyport/userspace/line"
)

// Options configure a Supervisor.
type Options struct {
	Path string   // the program; /proc/self/exe if empty: the binary's folder may be closed to the user
	Args []string // its arguments, with the name it is called by
	Env  []string // its whole environment
	User User
	// Cgroup is the directory of the process's own cgroup2, made if it is
	// missing; "" leaves the process in the agent's, for tests.
	Cgroup string
	// Started is called with each new process, on a goroutine of the
	// Supervisor's; its socket, descriptor 3 on the other end, becomes
	// Started's. The process must be told what it is by the line.
	Started func(*Process)
	// Exited is called when a process has ended, with how.
	Exited func(*Process, error)
	// Output takes each line that the process writes to its standard output
	// and error; without one they are logged.
	Output func(line string)
	// Grace is how long the process may take to end once its line is closed,
	// at the end of Run; 6 s if 0: a second more than connections get.
	Grace time.Duration
	// MinBackoff and MaxBackoff bound the wait before a process is started
	// again; 100 ms and 10 s if 0.
	MinBackoff, MaxBackoff time.Duration
	Logger                 *slog.Logger
}

// Process is one running userspace process.
type Process struct {
	PID     int
	Started time.Time
	Socket  *line.Socket // the agent's end of the line

	end   chan struct{} // closed by End
	once  sync.Once
	ended chan struct{} // closed when it has ended, before Exited is called
}

// NewProcess returns a process that was started just now, with the agent's
// end of its line.
func NewProcess(pid int, socket *line.Socket) *Process {
	return &Process{PID: pid, Started: time.Now(), Socket: socket, end: make(chan struct{}), ended: make(chan struct{})}
}

// End has the process ended, as at the end of Run: what does not go by itself
// once its line is closed is killed. It does not wait.
func (p *Process) End() { p.once.Do(func() { close(p.end) }) }

// Ended says whether the process has ended. It has before Exited is called.
func (p *Process) Ended() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// Status is what a Supervisor knows about its process.
type Status struct {
	PID      int // 0 while none runs
	Started  time.Time
	Restarts int
	LastExit string // how the last one ended, "" before
}

// healthy is how long a process must have lived for its death to be no
// reason to wait longer.
const healthy = 30 * time.Second

// Supervisor keeps one userspace process running.
type Supervisor struct {
	opt    Options
	mu     sync.Mutex
	status Status
}

// New returns a Supervisor for Run.
func New(opt Options) (*Supervisor, error) {
	if opt.User.UID == 0 || opt.User.GID == 0 {
		return nil, errors.New("start userspace: its user must be another than root")
	}
	if len(opt.Args) == 0 || opt.Started == nil {
		return nil, errors.New("start userspace: arguments and Started are needed")
	}
	if opt.Path == "" {
		opt.Path = "/proc/self/exe"
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	if opt.Output == nil {
		opt.Output = func(text string) { opt.Logger.Info("userspace", "line", text) }
	}
	if opt.Grace == 0 {
		opt.Grace = 6 * time.Second
	}
	if opt.MinBackoff == 0 {
		opt.MinBackoff = 100 * time.Millisecond
	}
	if opt.MaxBackoff == 0 {
		opt.MaxBackoff = 10 * time.Second
	}
	return &Supervisor{opt: opt}, nil
}

// Status returns what is known now.
func (s *Supervisor) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

// Run keeps the process running until ctx ends, and then ends it. An error of
// the first start is returned; later ones are logged and tried again.
func (s *Supervisor) Run(ctx context.Context) error {
	result := make(chan error, 1)
	go func() { result <- s.run(ctx) }()
	return <-result
}

// run is the thread that forks. PDEATHSIG is sent when that thread ends, not
// the process; so it is locked, lives as long as its children, and ends with
// this goroutine, because it has given up what no other goroutine may miss.
func (s *Supervisor) run(ctx context.Context) error {
	runtime.LockOSThread()
	if err := dropOnThread(s.opt.Logger); err != nil {
		return err
	}
	// What the agent itself inherited (from a shell, from systemd) may lack
	// close-on-exec; Go's own descriptors have it (close_range(2), 5.11).
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("keep the agent's descriptors from userspace: %w", err)
	}
	wait := s.opt.MinBackoff
	for first := true; ; first = false {
		p, cmd, err := s.start()
		if err != nil && first {
			return err
		}
		lived := time.Duration(0)
		if err != nil {
			s.opt.Logger.Error("userspace not started", "err", err)
		} else {
			err = s.attend(ctx, p, cmd)
			lived = time.Since(p.Started)
			s.ended(p, err)
			s.opt.Logger.Log(context.Background(), level(ctx), "userspace ended", "pid", p.PID, "how", describe(err), "lived", lived)
		}
		if ctx.Err() != nil {
			return nil
		}
		if lived > healthy {
			wait = s.opt.MinBackoff
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, s.opt.MaxBackoff)
		s.mu.Lock()
		s.status.Restarts++
		s.mu.Unlock()
	}
}

func level(ctx context.Context) slog.Level {
	if ctx.Err() != nil {
		return slog.LevelInfo
	}
	return slog.LevelError
}

// start starts one process and makes sure that it has no privilege.
func (s *Supervisor) start() (*Process, *exec.Cmd, error) {
	mine, theirs, err := line.Pair()
	if err != nil {
		return nil, nil, err
	}
	defer theirs.Close()
	socket, err := line.NewSocket(mine, false)
	if err != nil {
		return nil, nil, err
	}
	cmd := &exec.Cmd{
		Path: s.opt.Path, Args: s.opt.Args, Dir: "/",
		// Never nil: that would hand down the agent's own.
		Env:        append([]string{}, s.opt.Env...),
		ExtraFiles: []*os.File{theirs},
		SysProcAttr: &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: s.opt.User.UID, Gid: s.opt.User.GID},
			Pdeathsig:  syscall.SIGKILL,
			Setsid:     true, // no terminal, and no Ctrl-C before the agent's own drain
		},
	}
	out := &lineWriter{emit: s.opt.Output}
	cmd.Stdout, cmd.Stderr = out, out
	if s.opt.Cgroup != "" {
		dir, err := openCgroup(s.opt.Cgroup)
		if err != nil {
			socket.Close()
			return nil, nil, err
		}
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	// What the process's children might do to its pipes must not hold Wait.
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		socket.Close()
		return nil, nil, fmt.Errorf("start userspace as uid %d: %w", s.opt.User.UID, err)
	}
	status, err := confine.ReadStatus(strconv.Itoa(cmd.Process.Pid))
	if err == nil {
		err = status.Unprivileged()
	}
	if err != nil {
		_ = cmd.Process.Kill() // it may have ended by itself
		_ = cmd.Wait()
		socket.Close()
		return nil, nil, fmt.Errorf("check privilege of userspace: %w", err)
	}
	return NewProcess(cmd.Process.Pid, socket), cmd, nil
}

// attend waits for the process to end, and ends it where ctx does or End says
// so.
func (s *Supervisor) attend(ctx context.Context, p *Process, cmd *exec.Cmd) error {
	s.mu.Lock()
	s.status.PID, s.status.Started = p.PID, p.Started
	s.mu.Unlock()
	s.opt.Logger.Info("userspace started", "pid", p.PID, "uid", s.opt.User.UID)
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	go s.opt.Started(p)
	select {
	case err := <-ended:
		s.sweep()
		return err
	case <-ctx.Done():
	case <-p.end:
	}
	// The end of the line tells it: listeners at once, connections after
	// their grace.
	p.Socket.Close()
	select {
	case err := <-ended:
		s.sweep()
		return err
	case <-time.After(s.opt.Grace):
	}
	_ = cmd.Process.Kill() // it may be ending by itself
	err := <-ended
	s.sweep()
	return err
}

func (s *Supervisor) ended(p *Process, err error) {
	p.Socket.Close()
	close(p.ended)
	s.mu.Lock()
	s.status.PID, s.status.LastExit = 0, describe(err)
	s.mu.Unlock()
	if s.opt.Exited != nil {
		s.opt.Exited(p, err)
	}
}

// sweep kills what the process may have left in its cgroup (cgroup.kill,
// 5.14): an orphan would hold the listeners open.
func (s *Supervisor) sweep() {
	if s.opt.Cgroup == "" {
		return
	}
	if err := os.WriteFile(filepath.Join(s.opt.Cgroup, "cgroup.kill"), []byte("1"), 0); err != nil {
		s.opt.Logger.Error("userspace's cgroup not swept", "cgroup", s.opt.Cgroup, "err", err)
	}
}

// openCgroup makes the process's cgroup anew. One that was killed once also
// kills what is cloned into it afterwards (seen on 6.18: the child's count of
// kills is taken from its parent's cgroup and held against the new one's).
func openCgroup(path string) (*os.File, error) {
	if err := unix.Rmdir(path); err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("renew userspace's cgroup %s: %w", path, err)
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, fmt.Errorf("make userspace's cgroup: %w", err)
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open userspace's cgroup: %w", err)
	}
	return dir, nil
}

func describe(err error) string {
	if err == nil {
		return "exit 0"
	}
	return err.Error()
}

// lineWriter cuts what the process writes into lines, each at most 8 KiB.
type lineWriter struct {
	emit func(string)
	mu   sync.Mutex
	rest []byte
}

const maxLine = 8 << 10

func (w *lineWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range b {
		if c != '\n' {
			w.rest = append(w.rest, c)
		}
		if c == '\n' || len(w.rest) == maxLine {
			w.emit(string(w.rest))
			w.rest = w.rest[:0]
		}
	}
	return len(b), nil
}

var _ io.Writer = (*lineWriter)(nil)

// dropOnThread takes from the calling thread what its children must not have:
// they inherit it. The thread keeps its effective capabilities, to become
// another user; the kernel takes those away there.
func dropOnThread(log *slog.Logger) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var c [2]unix.CapUserData
	if err := unix.Capget(&h, &c[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	c[0].Inheritable, c[1].Inheritable = 0, 0
	if err := unix.Capset(&h, &c[0]); err != nil {
		return fmt.Errorf("clear inheritable capabilities: %w", err)
	}
	for n := range uintptr(64) {
		switch err := unix.Prctl(unix.PR_CAPBSET_DROP, n, 0, 0, 0); err {
		case nil:
		case unix.EINVAL: // beyond the kernel's last
			return nil
		case unix.EPERM:
			// Without CAP_SETPCAP the set stays; no_new_privs alone makes it
			// worth nothing.
			log.Info("bounding set of userspace not emptied: the agent lacks CAP_SETPCAP")
			return nil
		default:
			return fmt.Errorf("drop capability %d from bounding set: %w", n, err)
		}
	}
	return nil
}
