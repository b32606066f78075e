// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

// load is what a node holds at a moment, each figure a count of what a call
// could leave behind.
type load struct {
	userspaceFDs, agentFDs, flows, conns, tasks, streams, threads int
}

func (n *node) load() (l load, err error) {
	s, err := n.status()
	if err != nil {
		return l, err
	}
	p := proxyOf(s)
	figure := func(name string) int {
		v, ok := p.Engine[name].(float64)
		if !ok && err == nil {
			err = fmt.Errorf("no %s among %v", name, p.Engine)
		}
		return int(v)
	}
	l.conns, l.tasks, l.streams = figure("Conns"), figure("Tasks"), p.Streams
	if err != nil {
		return l, err
	}
	count := func(dir string) int {
		entries, e := os.ReadDir(dir)
		if e != nil {
			err = e
		}
		return len(entries)
	}
	l.userspaceFDs = count(fmt.Sprintf("/proc/%d/fd", s.GetUserspace().GetPid()))
	l.threads = count(fmt.Sprintf("/proc/%d/task", s.GetUserspace().GetPid()))
	l.agentFDs = count(fmt.Sprintf("/proc/%d/fd", n.agent.cmd.Process.Pid))
	m, e := ebpf.LoadPinnedMap(filepath.Join(n.pinDir, "maps", "flow"), &ebpf.LoadPinOptions{ReadOnly: true})
	if e != nil {
		return l, e
	}
	defer m.Close()
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	it := m.Iterate()
	for it.Next(&key, &value) {
		l.flows++
	}
	if err == nil {
		err = it.Err()
	}
	return l, err
}

// TestNothingLeaks makes many connections of every kind, allowed, refused and
// broken off, and waits until the node holds no more than before.
func TestNothingLeaks(t *testing.T) {
	require(t, "nginx", "curl")
	for _, engine := range []struct{ name, extra string }{{"loops", ""}, {"goroutines", "userspace: {goroutines: true}"}} {
		t.Run(engine.name, func(t *testing.T) {
			t.Parallel()
			a, b := two(t)
			a.extra, b.extra = engine.extra, engine.extra
			startNginx(t, b.group("web"), b.ns, 8080)
			server(t, b.group("stream"), b.ns, "echo", addrB+":9090")
			b.start()
			a.start()
			for _, n := range []*node{a, b} {
				act(t, n.group("client"), n.ns, "idle").line(t)
				act(t, n.group("outcast"), n.ns, "idle").line(t)
				n.served("client", "outcast")
			}
			b.served("web", "stream")
			many := func(calls int) {
				t.Helper()
				for _, n := range []*node{a, b} {
					for _, c := range []struct{ cgroup, want string }{{n.group("client"), "200"}, {n.group("outcast"), "403"}, {"", "403"}} {
						out, err := curl(t, c.cgroup, n.ns, "-o", "/dev/null", "-w", "%{http_code}\n", "-H", "Connection: close",
							fmt.Sprintf("%s/files/hello?n=[1-%d]", webURL, calls))
						if got := strings.Count(out, c.want+"\n"); err != nil || got != calls {
							t.Fatalf("%d of %d calls got %s: %v", got, calls, c.want, err)
						}
					}
					for range calls / 50 {
						if out, err := say(t, n.group("client"), n.ns, addrB+":9090", "x"); err != nil || out != "x" {
							t.Fatalf("a byte stream got %q %v", out, err)
						}
						say(t, n.group("outcast"), n.ns, addrB+":9090", "x")                                                          //nolint:errcheck // it is refused
						say(t, n.group("client"), n.ns, addrB+":8080", "POST /up/x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n") //nolint:errcheck // it breaks off
						say(t, n.group("client"), n.ns, addrB+":8080", "GET /files/he")                                               //nolint:errcheck // so does this
						say(t, "", n.ns, addrB+":8080", "\x16\x03\x01\x00\x05hello")                                                  //nolint:errcheck // and this is no TLS
					}
				}
			}
			many(50) // pools, tunnels, threads of the runtime
			before := map[*node]load{}
			for _, n := range []*node{a, b} {
				eventually(t, "node "+n.name+" to settle", func() string {
					l, err := n.load()
					if err != nil {
						t.Fatal(err)
					}
					if l == before[n] {
						return ""
					}
					before[n] = l
					return fmt.Sprintf("%+v", l)
				})
			}
			many(200)
			for _, n := range []*node{a, b} {
				want := before[n]
				eventually(t, "node "+n.name+" to hold no more than before", func() string {
					now, err := n.load()
					if err != nil {
						return err.Error()
					}
					// A thread of the runtime stays once it was made; a pooled
					// tunnel or two, each a stream, may come and go.
					const slack = 4
					if now.userspaceFDs <= want.userspaceFDs+slack && now.agentFDs <= want.agentFDs+slack && now.flows <= want.flows+slack &&
						now.conns <= want.conns+slack && now.tasks <= want.tasks+slack && now.streams <= want.streams+slack && now.threads <= want.threads+8 {
						return ""
					}
					return fmt.Sprintf("%+v, before %+v", now, want)
				})
			}
		})
	}
}
