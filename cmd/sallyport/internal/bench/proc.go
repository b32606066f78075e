// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of /proc's times: USER_HZ, 100 on every architecture that
// Linux has today.
const tick = 10 * time.Millisecond

// tree is what the processes of some trees have used up.
type tree struct {
	cpu   time.Duration // user and system
	roots time.Duration // the share of the processes at the roots
	mib   float64       // proportional set size
}

// children lists every process's children, by one pass over /proc.
func children() (map[int][]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	out := map[int][]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if f := statOf(pid); f != nil {
			parent, _ := strconv.Atoi(f[1]) //nolint:errcheck // the kernel writes a number
			out[parent] = append(out[parent], pid)
		}
	}
	return out, nil
}

// statOf are the fields of /proc/PID/stat after the name, nil once it is gone.
func statOf(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 15 {
		return nil
	}
	return f
}

// usage adds up the trees that start at these processes. What has ended and
// was waited for counts at its parent.
func usage(roots []int) (tree, error) {
	kids, err := children()
	if err != nil {
		return tree{}, err
	}
	var t tree
	for top := len(roots); len(roots) > 0; top-- {
		pid := roots[0]
		roots = append(roots[1:], kids[pid]...)
		f := statOf(pid)
		if f == nil {
			continue
		}
		for _, i := range []int{11, 12, 13, 14} { // utime, stime, cutime, cstime
			n, err := strconv.ParseInt(f[i], 10, 64)
			if err != nil {
				return tree{}, fmt.Errorf("read times of process %d: %w", pid, err)
			}
			t.cpu += time.Duration(n) * tick
			if top > 0 {
				t.roots += time.Duration(n) * tick
			}
		}
		t.mib += pss(pid)
	}
	return t, nil
}

// pss is a process's proportional set size in MiB: what is shared counts by
// shares, so that a pair of one binary is not charged twice for its text.
func pss(pid int) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0
	}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) > 1 && f[0] == "Pss:" {
			kib, err := strconv.ParseFloat(f[1], 64)
			if err == nil {
				return kib / 1024
			}
		}
	}
	return 0
}

// busy is the time that all cores together have not been idle since boot.
func busy() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, fmt.Errorf("read the machine's times: %w", err)
	}
	first, _, _ := strings.Cut(string(b), "\n")
	var sum time.Duration
	// cpu user nice system idle iowait irq softirq steal
	for i, f := range strings.Fields(first) {
		if i == 0 || i == 4 || i == 5 || i > 8 {
			continue
		}
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read the machine's times: %w", err)
		}
		sum += time.Duration(n) * tick
	}
	return sum, nil
}

// cpuModel is what the processor calls itself.
func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		if k, v, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

// load is the load of the last minute.
func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(b), " ")
	return first
}
