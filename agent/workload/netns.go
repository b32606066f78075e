// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sallyport-dev/sallyport/agent/sockets"
	"github.com/sallyport-dev/sallyport/userspace/confine"
)

// maxNetns bounds the namespaces that are held.
const maxNetns = 1024

// sweepEvery is how often namespaces without a process of an identity are
// checked for other life.
const sweepEvery = 10 * time.Second

// held is a namespace that is kept open.
type held struct {
	ns    *sockets.Netns
	homes map[string]bool // identities that were seen in it
	lives bool            // a process of one was, in this scan
}

// namespaces finds the namespaces of the recognised processes, and the
// agent's own where an identity has its endpoint there: the port of a server
// that has not been started yet must be guarded too.
func (s *scan) namespaces(identities []Identity) {
	for _, h := range s.r.held {
		h.lives = false
	}
	for _, p := range slices.Sorted(maps.Keys(s.cgroups)) {
		c := s.cgroups[p]
		if len(c.names) == 0 {
			continue
		}
		for _, pid := range c.procs {
			h, err := s.hold(pid)
			if err != nil {
				if !gone(err) {
					s.problem("%s: namespace of process %d: %v", c.Path, pid, err)
				}
				continue
			}
			h.lives = true
			c.netns[h.ns.Cookie()] = true
			if h.ns.Cookie() == s.r.own.Cookie() && !c.Unconfined {
				c.Unconfined = unconfined(pid)
			}
			for _, n := range c.names {
				h.homes[n] = true
			}
		}
	}
	s.ownAddresses(identities)
}

// evading are the capabilities that reach past every hook in a shared
// namespace: AF_PACKET with PACKET_QDISC_BYPASS needs CAP_NET_RAW.
const evading = 1<<unix.CAP_NET_RAW | 1<<unix.CAP_SYS_ADMIN

// unconfined says whether a process in the agent's namespace can evade. What
// cannot be read is taken to.
func unconfined(pid int) bool {
	proc := strconv.Itoa(pid)
	status, err := confine.ReadStatus(proc)
	if err != nil {
		return !gone(err)
	}
	permitted, err := strconv.ParseUint(status.CapPrm, 16, 64)
	if err != nil {
		return true
	}
	if permitted&evading == 0 {
		return false
	}
	// Capabilities of another user namespace are not over this namespace.
	mine, err1 := os.Readlink("/proc/self/ns/user")
	theirs, err2 := os.Readlink("/proc/" + proc + "/ns/user")
	return err1 != nil || err2 != nil || mine == theirs
}

// hold returns the namespace of a process, opened once.
func (s *scan) hold(pid int) (*held, error) {
	file := "/proc/" + strconv.Itoa(pid) + "/ns/net"
	inode, err := netnsInode(file)
	if err != nil {
		return nil, err
	}
	if h := s.r.held[inode]; h != nil {
		return h, nil
	}
	if len(s.r.held) >= maxNetns {
		return nil, fmt.Errorf("more than %d namespaces", maxNetns)
	}
	ns, err := sockets.Open(file)
	if err != nil {
		return nil, err
	}
	if h := s.r.held[ns.Inode()]; h != nil { // it moved meanwhile
		ns.Close()
		return h, nil
	}
	h := &held{ns: ns, homes: map[string]bool{}}
	s.r.held[ns.Inode()] = h
	return h, nil
}

func (s *scan) ownAddresses(identities []Identity) {
	if !slices.ContainsFunc(identities, func(i Identity) bool { return len(i.Endpoints) > 0 }) {
		return
	}
	mine, err := s.r.own.Addresses()
	if err != nil {
		s.problem("%v", err)
		return
	}
	for i := range identities {
		here := slices.ContainsFunc(identities[i].Endpoints, func(e netip.AddrPort) bool {
			_, ok := slices.BinarySearchFunc(mine, e.Addr().Unmap(), netip.Addr.Compare)
			return ok
		})
		if !here {
			continue
		}
		h := s.r.held[s.r.own.Inode()]
		if h == nil {
			ns, err := sockets.Own()
			if err != nil {
				s.problem("%v", err)
				return
			}
			h = &held{ns: ns, homes: map[string]bool{}}
			s.r.held[ns.Inode()] = h
		}
		h.homes[identities[i].Name] = true
	}
}

// collect puts the namespaces into the table, and takes out those that no
// policy names any more, and those that are empty: no process in them and no
// mount that another could enter them by. A held descriptor keeps a namespace
// alive, so nothing else would ever end it.
func (s *scan) collect(t *Table) (release []*held) {
	var idle []uint64
	for inode, h := range s.r.held {
		maps.DeleteFunc(h.homes, func(name string, _ bool) bool { return !s.named[name] })
		if !h.lives {
			idle = append(idle, inode)
		}
	}
	var inhabited map[uint64]bool
	if len(idle) > 0 && time.Since(s.r.swept) >= sweepEvery {
		s.r.swept = time.Now()
		inhabited = inhabitedNetns()
		inhabited[s.r.own.Inode()] = true
	}
	for _, inode := range idle {
		h := s.r.held[inode]
		if len(h.homes) == 0 || inhabited != nil && !inhabited[inode] {
			delete(s.r.held, inode)
			release = append(release, h)
		}
	}
	for _, h := range s.r.held {
		t.Netns = append(t.Netns, Netns{h.ns, slices.Sorted(maps.Keys(h.homes))})
	}
	slices.SortFunc(t.Netns, func(a, b Netns) int { return cmp.Compare(a.Cookie(), b.Cookie()) })
	return release
}

// inhabitedNetns returns the inodes of the namespaces that some process is
// in, or that are mounted somewhere (`ip netns`).
func inhabitedNetns() map[uint64]bool {
	all := map[uint64]bool{}
	procs, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, p := range procs {
		if inode, err := netnsInode(p); err == nil {
			all[inode] = true
		}
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return all
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// The root of an nsfs mount is the namespace: net:[INODE].
		if fields := strings.Fields(lines.Text()); len(fields) > 3 {
			if inode, ok := parseNetns(fields[3]); ok {
				all[inode] = true
			}
		}
	}
	return all
}

func netnsInode(link string) (uint64, error) {
	s, err := os.Readlink(link)
	if err != nil {
		return 0, err
	}
	inode, ok := parseNetns(s)
	if !ok {
		return 0, fmt.Errorf("read %s: %q", link, s)
	}
	return inode, nil
}

func parseNetns(s string) (uint64, bool) {
	s, ok := strings.CutPrefix(s, "net:[")
	if !ok {
		return 0, false
	}
	inode, err := strconv.ParseUint(strings.TrimSuffix(s, "]"), 10, 64)
	return inode, err == nil
}
