// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/loader"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// The agent dies without a word. What was enforced stays so, live direct
// connections go on, and the next agent takes over.
func TestKilledAgent(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	n.listenAll(t)
	l, err := n.server.Listen(address4)
	must(t, err)
	n.direct(t, address4, time.Hour)
	must(t, n.Heartbeat())
	live, err := n.client.Dial(address4)
	must(t, err)
	served, _, err := l.Accept()
	must(t, err)
	stranger := testenv.NewActor(t, nil, n.netns)

	n.heartbeatOf(t, 4*time.Second) // as old as it would become
	must(t, n.events.Close())
	must(t, n.kernel.Close())
	must(t, unix.Kill(n.agent.PID, unix.SIGKILL))
	n.agent.Wait(t)

	must(t, live.Send([]byte("x")))
	if b, err := served.Recv(1); err != nil || string(b) != "x" {
		t.Errorf("a live direct connection: %q, %v", b, err)
	}
	for who, a := range map[string]*testenv.Actor{"a workload with a verdict": n.client, "a stranger": stranger} {
		if _, err := a.Dial(address4); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: %v", who, err)
		}
	}
	if _, err := n.client.Listen(address6); !errors.Is(err, unix.EPERM) {
		t.Errorf("a squatter in the subtree: %v", err)
	}
	nothingAccepted(t, l, "the server")
	if c, err := pinnedCounters(n.pins); err != nil || c.Refused[flow.ReasonListenerGone] < 2 {
		t.Errorf("counters of a dead agent: %+v, %v", c, err)
	}
	must(t, l.SetTimeout(5*time.Second))

	n.kernel = open(t, loader.Options{PinDir: n.pins, CgroupRoot: n.root.Path})
	if !n.kernel.TookOver() {
		t.Fatal("nothing was taken over")
	}
	d, err := New(n.kernel, Options{Ceiling: flow.ModeEnforce})
	must(t, err)
	t.Cleanup(func() { d.Close() })
	n.Datapath = d
	must(t, d.Apply(n.state(flow.ModeEnforce)))
	n.agent = testenv.NewActor(t, n.agentCgroup, n.netns)
	outbound, inbound := n.listenAll(t)
	if _, err := n.client.Dial(address4); err != nil {
		t.Error(err)
	}
	if _, _, err := outbound[4].Accept(); err != nil {
		t.Errorf("not proxied: %v", err)
	}
	if _, err := stranger.Dial(address4); err != nil {
		t.Error(err)
	}
	if _, _, err := inbound[4].Accept(); err != nil {
		t.Errorf("not steered: %v", err)
	}
	// The server's listener is still the one that is registered.
	if _, err := n.dial(t, address4, DialTag{Target: serverNumber}); err != nil {
		t.Error(err)
	}
	if _, _, err := l.Accept(); err != nil {
		t.Error(err)
	}
}

func TestReadersEnd(t *testing.T) {
	n := newNode(t, flow.ModeEnforce)
	samples, err := n.Samples()
	must(t, err)
	ended := make(chan error, 2)
	go func() { _, err := n.events.Read(); ended <- err }()
	go func() { _, err := samples.Read(); ended <- err }()
	must(t, n.events.Close())
	must(t, samples.Close())
	for range 2 {
		select {
		case err := <-ended:
			if !errors.Is(err, os.ErrClosed) {
				t.Errorf("read: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("a reader did not end")
		}
	}
}

// pinnedCounters reads all counters from the pins, which outlive the agent.
func pinnedCounters(pinDir string) (Counters, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(pinDir, "maps", "counters"), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return Counters{}, fmt.Errorf("read counters: %w", err)
	}
	defer m.Close()
	return readCounters(m)
}
