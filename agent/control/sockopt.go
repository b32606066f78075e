// SPDX-License-Identifier: Apache-2.0

package control

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// getsockopt reads a socket option of variable length into b and returns the
// length that the kernel tells, also beside ERANGE.
func getsockopt(fd, option int, b []byte) (int, error) {
	n := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, uintptr(option),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return int(n), errno
	}
	return int(n), nil
}
