// SPDX-License-Identifier: Apache-2.0

package sockets

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Per namespace; looked up in that of the thread that opens it.
const reservedPorts = "/proc/sys/net/ipv4/ip_local_reserved_ports"

// ReservePorts makes the kernel give none of ports to a socket that asks for
// no particular one: an unbound listen(), bind(0) and IP_LOCAL_PORT_RANGE
// would otherwise be handed a protected port behind the bind hooks' backs. It
// replaces what an earlier call reserved, and leaves alone what others did.
func (n *Netns) ReservePorts(ports []uint16) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.In(func() error {
		b, err := os.ReadFile(reservedPorts)
		if err != nil {
			return fmt.Errorf("read reserved ports of netns %s: %w", n.name, err)
		}
		set, err := parsePorts(string(b))
		if err != nil {
			return fmt.Errorf("read reserved ports of netns %s: %w", n.name, err)
		}
		before := formatPorts(set)
		mine := map[uint16]bool{}
		for p := range n.reserved {
			if !slices.Contains(ports, p) {
				delete(set, p)
			}
		}
		for _, p := range ports {
			if !set[p] || n.reserved[p] {
				mine[p] = true
			}
			set[p] = true
		}
		if after := formatPorts(set); after != before {
			if err := os.WriteFile(reservedPorts, []byte(after+"\n"), 0); err != nil {
				return fmt.Errorf("reserve ports in netns %s: %w", n.name, err)
			}
		}
		n.reserved = mine
		return nil
	})
}

// parsePorts reads the kernel's list: "1-3,80".
func parsePorts(s string) (map[uint16]bool, error) {
	set := map[uint16]bool{}
	for part := range strings.SplitSeq(strings.TrimSpace(s), ",") {
		if part == "" {
			continue
		}
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		lo, err1 := strconv.ParseUint(from, 10, 16)
		hi, err2 := strconv.ParseUint(to, 10, 16)
		if err1 != nil || err2 != nil || lo > hi {
			return nil, fmt.Errorf("port list: %q", part)
		}
		for p := lo; p <= hi; p++ {
			set[uint16(p)] = true
		}
	}
	return set, nil
}

// formatPorts writes a set as the kernel does: sorted, runs as ranges.
func formatPorts(set map[uint16]bool) string {
	ports := make([]uint16, 0, len(set))
	for p := range set {
		ports = append(ports, p)
	}
	slices.Sort(ports)
	var parts []string
	for i := 0; i < len(ports); {
		j := i
		for j+1 < len(ports) && ports[j+1] == ports[j]+1 {
			j++
		}
		s := strconv.Itoa(int(ports[i]))
		if j > i {
			s += "-" + strconv.Itoa(int(ports[j]))
		}
		parts = append(parts, s)
		i = j + 1
	}
	return strings.Join(parts, ",")
}
