// SPDX-License-Identifier: Apache-2.0

// Package abi holds the records of the kernel's flow map as plain Go types,
// and reads that map through a descriptor that may be read only. The types
// are generated from the kernel half; nothing here needs a privilege (from
// Linux 5.19 on, a map may be read by whoever holds its descriptor).
package abi

import (
	"encoding/binary"
	"net/netip"
	"structs"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kinds of FlowValue.Kind: enum flow_kind of bpf/include/abi.h.
const (
	KindOut    = 1 // rewritten to the outbound listener
	KindDirect = 2 // let through by a verdict
	KindDial   = 3 // made by the agent on a client's behalf
)

// FlagPeer in FlowValue.Flags marks the second entry of a flow, under the
// netns of its server.
const FlagPeer = 1

const protocolTCP = 6

// AddressOf returns the address as the kernel's records hold it.
func AddressOf(ip netip.Addr) (a Address) {
	b := ip.As16()
	for i := range a.Word {
		a.Word[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return a
}

// Addr returns the address, IPv4 unmapped.
func (a Address) Addr() netip.Addr {
	var b [16]byte
	for i, w := range a.Word {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrFrom16(b).Unmap()
}

// Key returns the key of a TCP connection from src to dst in the network
// namespace with that cookie.
func Key(netns uint64, src, dst netip.AddrPort) FlowKey {
	return FlowKey{
		Netns: netns,
		Src:   AddressOf(src.Addr()), Sport: src.Port(),
		Dst: AddressOf(dst.Addr()), Dport: dst.Port(),
		Proto: protocolTCP,
	}
}

// Source returns the end that opened the connection.
func (k *FlowKey) Source() netip.AddrPort { return netip.AddrPortFrom(k.Src.Addr(), k.Sport) }

// Destination returns the end that it went to on the wire.
func (k *FlowKey) Destination() netip.AddrPort { return netip.AddrPortFrom(k.Dst.Addr(), k.Dport) }

// Original returns the destination that the application asked for.
func (v *FlowValue) Original() netip.AddrPort { return netip.AddrPortFrom(v.Dst.Addr(), v.Dport) }

// TrueClient returns the client on whose behalf the agent dialled, the zero
// AddrPort for other kinds.
func (v *FlowValue) TrueClient() netip.AddrPort {
	if v.ClientPort == 0 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(v.Client.Addr(), v.ClientPort)
}

// FlowMap reads the flow map.
type FlowMap struct{ fd uint32 }

// NewFlowMap returns the map behind a descriptor, which stays the caller's.
func NewFlowMap(fd int) FlowMap { return FlowMap{uint32(fd)} }

// lookupAttr is the part of union bpf_attr that BPF_MAP_LOOKUP_ELEM reads.
type lookupAttr struct {
	_     structs.HostLayout
	fd    uint32
	_     uint32
	key   unsafe.Pointer // 8 bytes on every target that we build for
	value unsafe.Pointer
	flags uint64
}

// Lookup reads the entry of k into v. Its error is unix.ENOENT where there
// is none. It allocates nothing.
func (m FlowMap) Lookup(k *FlowKey, v *FlowValue) error {
	attr := lookupAttr{fd: m.fd, key: unsafe.Pointer(k), value: unsafe.Pointer(v)}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_LOOKUP_ELEM, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return errno
	}
	return nil
}
