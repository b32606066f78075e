// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bufio"
	"encoding/json"
	"errors"
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

// process is one program of the demo in its namespace and cgroup.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // of Wait, once done is closed
	in   io.WriteCloser
	out  *bufio.Reader
	log  string // file with its standard error
}

// start runs argv in the namespace space and, if it is not "", in the cgroup
// folder. Standard error goes to a file in the lab's folder, standard output to
// stdout or, where that is nil, to the process's out.
func (l *lab) start(space, cgroup, name string, stdout *os.File, argv ...string) (*process, error) {
	p := &process{done: make(chan struct{}), log: filepath.Join(l.dir, name+".log")}
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
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	if stdout != nil {
		p.cmd.Stdout = stdout
	} else {
		out, err := p.cmd.StdoutPipe()
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", name, err)
		}
		p.out = bufio.NewReader(out)
	}
	if err := l.in(space, p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// pid is the process's id, valid until done is closed.
func (p *process) pid() int { return p.cmd.Process.Pid }

// kill ends the process at once and waits until it is gone.
func (p *process) kill() {
	select {
	case <-p.done:
		return
	default:
	}
	p.cmd.Process.Signal(unix.SIGKILL) //nolint:errcheck // it may have ended meanwhile
	<-p.done
}

// stop asks the process to end, and makes it after a grace.
func (p *process) stop(grace time.Duration) {
	p.in.Close()
	p.cmd.Process.Signal(unix.SIGTERM) //nolint:errcheck // it may have ended meanwhile
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-p.done:
	case <-t.C:
		p.kill()
	}
}

// lastLines are the end of what the process wrote to standard error.
func (p *process) lastLines(n int) string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// application is an App in a process of its own.
type application struct {
	*process
	name string
	enc  *json.Encoder
	dec  *json.Decoder
}

func (l *lab) startApp(space, cgroup, name string) (*application, error) {
	p, err := l.start(space, cgroup, name, nil, "/proc/self/exe", "demo", "application")
	if err != nil {
		return nil, err
	}
	return &application{process: p, name: name, enc: json.NewEncoder(p.in), dec: json.NewDecoder(p.out)}, nil
}

// do gives an order and waits for its reply. An application that has ended
// answers with an error.
func (a *application) do(q appRequest) appReply {
	if err := a.enc.Encode(q); err != nil {
		return appReply{Err: fmt.Sprintf("order to %s: %v", a.name, err)}
	}
	type answer struct {
		r   appReply
		err error
	}
	c := make(chan answer, 1)
	go func() {
		var r appReply
		err := a.dec.Decode(&r)
		c <- answer{r, err}
	}()
	t := time.NewTimer(4 * appTimeout)
	defer t.Stop()
	select {
	case x := <-c:
		if x.err != nil {
			return appReply{Err: fmt.Sprintf("reply of %s: %v: %s", a.name, x.err, a.lastLines(3))}
		}
		return x.r
	case <-t.C:
		return appReply{Err: errors.New("no reply of " + a.name).Error()}
	}
}
