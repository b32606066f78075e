// SPDX-License-Identifier: Apache-2.0

package userspace

import (
	"net/netip"
	"sync/atomic"

	"github.com/sallyport-dev/sallyport/userspace/flow"
	"github.com/sallyport-dev/sallyport/userspace/flow/abi"
	"github.com/sallyport-dev/sallyport/userspace/proxy"
)

// flows looks connections up in the kernel's flow map, through a descriptor
// that can only read. It is the only way in which this process learns who
// opened a connection.
type flows struct {
	fd atomic.Int64 // the descriptor, 0 for none
}

func (f *flows) set(fds []int) {
	if len(fds) == 0 {
		return
	}
	closeAll(fds[1:])
	if old := f.fd.Swap(int64(fds[0])); old != 0 {
		closeAll([]int{int(old)})
	}
}

// Lookup returns the flow of a connection that src opened to dst, as both are
// on the wire, in the network namespace with that cookie. ok is false where
// the kernel has not sent that connection to us, or cannot be asked.
func (f *flows) Lookup(netns uint64, src, dst netip.AddrPort) (flow.Flow, bool) {
	fd := f.fd.Load()
	if fd == 0 {
		return flow.Flow{}, false
	}
	return proxy.KernelFlows{Map: abi.NewFlowMap(int(fd))}.Lookup(netns, src, dst)
}
