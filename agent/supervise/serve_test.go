// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/sockets"
	"github.com/sallyport-dev/sallyport/agent/testenv"
	"github.com/sallyport-dev/sallyport/userspace/confine"
	"github.com/sallyport-dev/sallyport/userspace/line"
	"github.com/sallyport-dev/sallyport/userspace/line/linepb"
)

const grace = 3 * time.Second

// serve is a userspace process that echoes on the listeners it is given, and
// ends as a proxy does when the agent is gone.
func serve(s *line.Socket) {
	if err := confine.Self(); err != nil {
		panic(err)
	}
	var listeners []net.Listener
	c := line.NewConn(s, line.Options{Handle: func(_ context.Context, in *line.Incoming) {
		for _, fd := range in.TakeFDs() {
			f := os.NewFile(uintptr(fd), "listener")
			l, err := net.FileListener(f)
			f.Close()
			if err != nil {
				panic(err)
			}
			listeners = append(listeners, l)
			go echo(l)
		}
		in.Reply(&linepb.Message{Body: &linepb.Message_StatusReply{StatusReply: &linepb.StatusReply{}}})
	}})
	line.Orphan{
		Listeners: func() {
			for _, l := range listeners {
				l.Close()
			}
		},
		Connections: func() {}, // the process ends
		Grace:       grace,
	}.Watch(c)
}

func echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}

// give makes the listeners of a namespace and hands them to the process; the
// agent keeps none.
func give(t *testing.T, ns *sockets.Netns, p *Process) *line.Conn {
	t.Helper()
	ls, err := ns.Listen(sockets.Ports{Outbound: 15001, Inbound: 15006, Tunnel: 15008}, 16)
	if err != nil {
		t.Fatal(err)
	}
	defer sockets.CloseListeners(ls)
	m := &linepb.Listeners{}
	var fds []int
	for _, l := range ls {
		m.Listeners = append(m.Listeners, &linepb.Listener{Kind: linepb.ListenerKind(l.Kind), NetnsCookie: ns.Cookie(), Family: uint32(l.Family)})
		fds = append(fds, l.FD)
	}
	c := line.NewConn(p.Socket, line.Options{})
	t.Cleanup(func() { c.Close() })
	if _, _, err := c.Call(t.Context(), &linepb.Message{Body: &linepb.Message_Listeners{Listeners: m}}, fds...); err != nil {
		t.Fatal(err)
	}
	return c
}

// connect connects to a port inside the namespace.
func connect(n *testenv.Netns, at string) (c net.Conn, err error) {
	err = n.Do(func() error {
		c, err = net.DialTimeout("tcp", at, 5*time.Second)
		return err
	})
	return c, err
}

func exchange(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("ping")); err != nil {
		return err
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != "ping" {
		return fmt.Errorf("got %q", b)
	}
	return nil
}

var ports = []string{"127.0.0.1:15001", "[::1]:15001", "127.0.0.1:15006", "[::1]:15006", "127.0.0.1:15008", "[::1]:15008"}

func refused(t *testing.T, n *testenv.Netns) {
	t.Helper()
	for _, at := range ports {
		if c, err := connect(n, at); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: %v, %v", at, c, err)
		}
	}
}

// TestDeadProxyRefuses: its listeners die with it, and the next one gets new
// ones in the same place.
func TestDeadProxyRefuses(t *testing.T) {
	n := testenv.NewNetns(t)
	ns, err := sockets.Open(fmt.Sprintf("/proc/self/fd/%d", n.File.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	h := supervise(t, Options{Args: []string{"userspace", "serve"}, MinBackoff: time.Millisecond})
	for range 3 {
		p := wait(t, h.started)
		give(t, ns, p)
		for _, at := range ports {
			c, err := connect(n, at)
			if err == nil {
				err = exchange(c)
				c.Close()
			}
			if err != nil {
				t.Fatalf("%s: %v", at, err)
			}
		}
		if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		wait(t, h.exited)
		refused(t, n)
	}
}

// TestOrphanClosesListenersFirst: when the line ends, the listeners go at
// once and the connections after their grace.
func TestOrphanClosesListenersFirst(t *testing.T) {
	n := testenv.NewNetns(t)
	ns, err := sockets.Open(fmt.Sprintf("/proc/self/fd/%d", n.File.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	h := supervise(t, Options{Args: []string{"userspace", "serve"}, MinBackoff: time.Hour})
	p := wait(t, h.started)
	c := give(t, ns, p)
	live, err := connect(n, ports[2])
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	if err := exchange(live); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	c.Close()
	for _, at := range ports { // closed one by one
		for {
			late, err := connect(n, at)
			if errors.Is(err, unix.ECONNREFUSED) {
				break
			}
			if err == nil {
				late.Close()
			}
			if time.Since(start) > grace {
				t.Fatalf("%s is still open", at)
			}
		}
	}
	refused(t, n)
	if err := exchange(live); err != nil && time.Since(start) < grace {
		t.Errorf("a live connection before its grace was over: %v", err)
	}
	if err := wait(t, h.exited); err != nil {
		t.Errorf("it ended with %v", err)
	}
	if d := time.Since(start); d < grace {
		t.Errorf("it ended after %s", d)
	}
	if err := exchange(live); err == nil {
		t.Error("a connection outlived the process")
	}
}
