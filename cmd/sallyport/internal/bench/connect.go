// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// connectVerb makes this program the client whose connect() is timed.
const connectVerb = "connect"

// connectTimes is what that client found.
type connectTimes struct {
	Median float64 `json:"median"` // ns
	Tenth  float64 `json:"tenth"`  // ns, 10th percentile
}

// connectMain times connect() to an address, a number of times. Each
// connection is reset at once, so that none is left in TIME_WAIT.
func connectMain(args []string, out io.Writer) error {
	if len(args) != 2 {
		return fmt.Errorf("%s: an address and a count are needed", connectVerb)
	}
	addr, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	n, err := strconv.Atoi(args[1])
	if err != nil || n < 1 {
		return fmt.Errorf("connect: %q is no count", args[1])
	}
	runtime.LockOSThread()
	to := &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	took := make([]time.Duration, 0, n)
	for range n {
		d, err := connectOnce(to)
		if err != nil {
			return fmt.Errorf("connect to %s: %w", addr, err)
		}
		took = append(took, d)
	}
	slices.Sort(took)
	return json.NewEncoder(out).Encode(connectTimes{float64(took[n/2]), float64(took[n/10])})
}

func connectOnce(to unix.Sockaddr) (time.Duration, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing to be done about it
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, err
	}
	start := time.Now()
	err = unix.Connect(fd, to)
	return time.Since(start), err
}
