// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is one program of the lab in its namespace and cgroup.
type Process struct {
	Done chan struct{}  // closed when it has ended
	Err  error          // of its end, once Done is closed
	In   io.WriteCloser // its standard input
	Out  *bufio.Reader  // its standard output, nil where Start was given a file
	cmd  *exec.Cmd
	out  *os.File // what Out reads
	log  string   // file with its standard error
}

// Start runs argv in the namespace space and, if it is not "", in the cgroup
// folder. Standard error goes to a file in the lab's folder, standard output to
// stdout or, where that is nil, to the process's Out.
func (l *Lab) Start(space, cgroup, name string, stdout *os.File, argv ...string) (*Process, error) {
	p := &Process{Done: make(chan struct{}), log: filepath.Join(l.Dir, name+".log")}
	logFile, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log of %s: %w", name, err)
	}
	defer logFile.Close()
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Stderr = logFile
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if cgroup != "" {
		dir, err := os.Open(cgroup)
		if err != nil {
			return nil, fmt.Errorf("open cgroup of %s: %w", name, err)
		}
		defer dir.Close()
		p.cmd.SysProcAttr.UseCgroupFD = true
		p.cmd.SysProcAttr.CgroupFD = int(dir.Fd())
	}
	if p.In, err = p.cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	if stdout == nil {
		// Not the command's own, which ends with the process: what it said last
		// is read after that.
		if p.out, stdout, err = os.Pipe(); err != nil {
			return nil, fmt.Errorf("start %s: %w", name, err)
		}
		defer stdout.Close()
		p.Out = bufio.NewReader(p.out)
	}
	p.cmd.Stdout = stdout
	if err := l.In(space, p.cmd.Start); err != nil {
		p.out.Close() //nolint:errcheck // it may be none
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.Err = p.cmd.Wait()
		close(p.Done)
	}()
	return p, nil
}

// PID is the process's id, valid until Done is closed.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// CPU is the time that the process has used, with the children that it waited
// for, once Done is closed.
func (p *Process) CPU() time.Duration {
	s := p.cmd.ProcessState
	return s.UserTime() + s.SystemTime()
}

// Kill ends the process at once and waits until it is gone; nothing more can be
// read of its Out.
func (p *Process) Kill() {
	defer p.out.Close() //nolint:errcheck // it may be none
	select {
	case <-p.Done:
		return
	default:
	}
	p.cmd.Process.Signal(unix.SIGKILL) //nolint:errcheck // it may have ended meanwhile
	<-p.Done
}

// Stop asks the process to end, and makes it after a grace; nothing more can be
// read of its Out.
func (p *Process) Stop(grace time.Duration) {
	defer p.out.Close() //nolint:errcheck // it may be none
	p.In.Close()
	p.cmd.Process.Signal(unix.SIGTERM) //nolint:errcheck // it may have ended meanwhile
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-p.Done:
	case <-t.C:
		p.Kill()
	}
}

// LastLines are the end of what the process wrote to standard error.
func (p *Process) LastLines(n int) string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// WaitFor waits until ok, the process's end, or the start's time-out.
func WaitFor(ctx context.Context, p *Process, what string, ok func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for !ok() {
		select {
		case <-p.Done:
			return fmt.Errorf("wait for %s to %s: it ended: %w\n%s", p.cmd.Path, what, p.Err, p.LastLines(5))
		case <-ctx.Done():
			return fmt.Errorf("wait for %s to %s: %w", p.cmd.Path, what, ctx.Err())
		case <-time.After(PollInterval):
		}
	}
	return nil
}
