// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"net/netip"

	"github.com/sallyport-dev/sallyport/userspace/flow/abi"
)

// words is the address as the kernel's records hold it.
func words(ip netip.Addr) [4]uint32 { return abi.AddressOf(ip).Word }

func addrPort(w [4]uint32, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(abi.Address{Word: w}.Addr(), port)
}
