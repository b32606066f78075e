// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/agent/testenv"
)

// running is an agent as `sallyport agent` runs it; its userspace process
// takes nothing over, so whatever is protected refuses.
type running struct {
	stop  context.CancelFunc
	ended chan error
}

func (g *ground) run(cfg *config.Config) *running {
	ctx, stop := context.WithCancel(context.Background())
	r := &running{stop: stop, ended: make(chan error, 1)}
	go func() {
		r.ended <- Run(ctx, Options{Config: cfg, Version: "test", Logger: slog.New(slog.DiscardHandler), Decisions: io.Discard, Notices: io.Discard})
	}()
	g.t.Cleanup(stop)
	return r
}

func (r *running) end(t *testing.T) {
	t.Helper()
	r.stop()
	select {
	case err := <-r.ended:
		must(t, err)
	case <-time.After(patience):
		t.Fatal("it does not end")
	}
}

// inForce waits until the agent has brought the policies in force.
func (g *ground) inForce(r *running) {
	g.t.Helper()
	for late := time.Now().Add(patience); time.Now().Before(late); time.Sleep(5 * time.Millisecond) {
		select {
		case err := <-r.ended:
			g.t.Fatalf("it ended: %v", err)
		default:
		}
		res, err := http.Get("http://" + g.metricsAt.String() + "/metrics")
		if err != nil {
			continue
		}
		b, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err == nil && strings.Contains(string(b), "\nsallyport_policies 3\n") {
			return
		}
	}
	g.t.Fatal("the policies did not come into force")
}

// What is protected refuses from the moment it is in force: while userspace
// hangs, when the agent has ended, and through all of the start of the next
// one, which takes over the pins. Ended, an agent leaves nothing else behind.
func TestNothingIsOpenAcrossARestart(t *testing.T) {
	testenv.RequireRoot(t)
	g := &ground{t: t, nearCgroup: map[string]*testenv.Cgroup{}}
	cfg, root := g.configure()
	cfg.ControlSocket = filepath.Join(openDir(t), "control.sock")
	must(t, os.WriteFile(filepath.Join(cfg.PolicyDir, "set.yaml"), []byte(documents), 0o644))
	g.populate(root)
	listen(t, g.server, serverAt) // before any agent: it is adopted
	if _, err := g.client.Dial(serverAt); err != nil {
		t.Fatalf("before the first agent: %v", err)
	}
	first := g.run(cfg)
	g.inForce(first)
	refusedNow := func(when string) {
		t.Helper()
		if _, err := g.client.Dial(serverAt); err == nil {
			t.Errorf("%s: the client got through", when)
		}
	}
	// The policies are counted as soon as the view is there, a moment before
	// the kernel has it.
	for late := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s, err := g.client.Dial(serverAt)
		if err != nil {
			break
		}
		must(t, s.Close())
		if time.Now().After(late) {
			t.Fatal("it is never refused")
		}
	}
	refusedNow("while userspace hangs")
	first.end(t)
	refusedNow("after the first agent")

	http.DefaultClient.CloseIdleConnections()
	fds, goroutines := descriptors(t), runtime.NumGoroutine()
	second := g.run(cfg)
	stop, dialled := make(chan struct{}), make(chan int, 1)
	go func() {
		n := 0
		for {
			select {
			case <-stop:
				dialled <- n
				return
			default:
			}
			refusedNow("while the second agent starts")
			n++
		}
	}()
	g.inForce(second)
	close(stop)
	if n := <-dialled; n < 10 {
		t.Errorf("only %d calls were tried", n)
	}
	refusedNow("while the second agent runs")
	second.end(t)
	refusedNow("after the second agent")
	http.DefaultClient.CloseIdleConnections()
	settle(t, "descriptors", fds, func() int { return descriptors(t) })
	settle(t, "goroutines", goroutines, runtime.NumGoroutine)
}
