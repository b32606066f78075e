// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/userspace/flow"
)

// hookStats sums up what the programs behind the pinned cgroup links took.
func (n *node) hookStats(b *testing.B) map[string]*ebpf.ProgramStats {
	b.Helper()
	stats := map[string]*ebpf.ProgramStats{}
	pins, err := filepath.Glob(filepath.Join(n.pins, "links", "*"))
	must(b, err)
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(pin, nil)
		must(b, err)
		info, err := l.Info()
		must(b, err)
		must(b, l.Close())
		p, err := ebpf.NewProgramFromID(info.Program)
		must(b, err)
		s, err := p.Stats()
		must(b, err)
		must(b, p.Close())
		stats[filepath.Base(pin)] = s
	}
	return stats
}

// joinCgroup moves the test's process for as long as the benchmark runs.
func joinCgroup(b *testing.B, path string) {
	b.Helper()
	must(b, os.WriteFile(filepath.Join(path, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0))
}

// BenchmarkConnect opens and closes a connection, in the benchmark's own
// process, and reports the share of it that the hooks took and what each of
// them took. The sub-benchmark "no hooks" is what the others compare to.
func BenchmarkConnect(b *testing.B) {
	n := newNode(b, flow.ModeEnforce)
	mount := filepath.Dir(n.root.Path)
	b.Cleanup(func() { joinCgroup(b, mount) })
	open := netip.MustParseAddrPort("192.0.2.10:9999")
	for _, c := range []struct {
		name, cgroup string
		dst          netip.AddrPort
	}{
		{"no hooks", mount, open},
		{"no identity", n.root.Path, open},
		{"unclaimed", n.clientCgroup.Path, open},
		{"direct", n.clientCgroup.Path, address4},
	} {
		b.Run(c.name, func(b *testing.B) {
			joinCgroup(b, n.serverCgroup.Path)
			l := n.netns.Listen(b, "tcp4", c.dst)
			joinCgroup(b, c.cgroup)
			g, err := n.GenerationOf("policy")
			must(b, err)
			must(b, n.PutVerdict(flow.Verdict{Source: clientNumber, SourceNetns: n.netns.Cookie, Destination: address4,
				DestinationNetns: n.netns.Cookie, Action: flow.ActionDirect, Expires: time.Hour}, g))
			must(b, n.Heartbeat())
			n.connectMany(b, l, c.dst)
		})
	}
}

func (n *node) connectMany(b *testing.B, l *net.TCPListener, dst netip.AddrPort) {
	raw, err := l.SyscallConn()
	must(b, err)
	closer, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	must(b, err)
	defer closer.Close()
	sa := &unix.SockaddrInet4{Port: int(dst.Port()), Addr: dst.Addr().As4()}
	must(b, n.netns.Do(func() error {
		runtime.LockOSThread()
		before := n.hookStats(b)
		b.ResetTimer()
		for range b.N {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			// Reset on close, so that ports do not run out.
			_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
			if err := unix.Connect(fd, sa); err != nil {
				return err
			}
			var accepted int
			var acceptErr error
			if err := raw.Control(func(s uintptr) { accepted, _, acceptErr = unix.Accept4(int(s), unix.SOCK_CLOEXEC) }); err != nil {
				return err
			}
			if acceptErr != nil {
				return acceptErr
			}
			unix.Close(fd)
			unix.Close(accepted)
		}
		b.StopTimer()
		var total float64
		for name, after := range n.hookStats(b) {
			ns := float64(after.Runtime-before[name].Runtime) / float64(b.N)
			total += ns
			if ns > 0 && (name == "connect4" || name == "sock_create" || name == "track") {
				b.ReportMetric(ns, name+"-ns/op")
			}
		}
		b.ReportMetric(total/(float64(b.Elapsed().Nanoseconds())/float64(b.N)), "share-of-hooks")
		return nil
	}))
}

// BenchmarkTCX runs the programs of an interface on packets, without a
// network: what a data packet, a SYN and a request cost.
func BenchmarkTCX(b *testing.B) {
	n := newNode(b, flow.ModeEnforce)
	n.watch(b, "eth0")
	src, dst := netip.AddrPortFrom(address4.Addr(), 40000), netip.MustParseAddrPort("192.0.2.20:80")
	payload := func(text string, flags byte) []byte {
		return syn(src, dst, func(f []byte) []byte {
			f = append(f, text...)
			f[47] = flags
			binary.BigEndian.PutUint16(f[16:], uint16(len(f)-14))
			return f
		})
	}
	for _, direction := range []string{"egress", "ingress"} {
		p := n.program(b, "eth0", direction)
		for _, c := range []struct {
			name  string
			frame []byte
		}{
			{"data", payload(string(make([]byte, 1400)), 0x10)},
			{"syn", syn(src, dst, nil)},
			{"request of a sampled flow", payload("GET /a/b/c HTTP/1.1\r\nHost: example.test\r\n\r\n", 0x18)},
		} {
			b.Run(direction+"/"+c.name, func(b *testing.B) {
				_, each, err := p.Benchmark(c.frame, b.N, b.ResetTimer)
				must(b, err)
				b.ReportMetric(float64(each.Nanoseconds()), "ns/packet")
			})
		}
	}
}
