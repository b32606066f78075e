// SPDX-License-Identifier: Apache-2.0

package line

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrNotSealed says that a descriptor that should be a sealed memfd is
// something else, or could still change while it is read.
var ErrNotSealed = errors.New("not a sealed memfd")

const allSeals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

// Sealed returns a memfd (memfd_create(2)) that holds b and can never change
// again. The descriptor is the caller's, close-on-exec.
func Sealed(name string, b []byte) (int, error) {
	if len(b) > MaxSealed {
		return -1, fmt.Errorf("seal %s: %d bytes, at most %d", name, len(b), MaxSealed)
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if err == unix.EINVAL { // MFD_NOEXEC_SEAL is of 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return -1, fmt.Errorf("make memfd for %s: %w", name, err)
	}
	for off := 0; off < len(b); {
		n, err := unix.Pwrite(fd, b[off:], int64(off))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("write memfd for %s: %w", name, err)
		}
		off += n
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, allSeals); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("seal memfd for %s: %w", name, err)
	}
	return fd, nil
}

// ReadSealed returns what the sealed memfd fd holds, after checking that its
// seals make it constant and that it holds at most MaxSealed bytes. fd stays
// the caller's.
func ReadSealed(fd int) ([]byte, error) {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotSealed, err)
	}
	if seals&allSeals != allSeals {
		return nil, fmt.Errorf("%w: seals %#x", ErrNotSealed, seals)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat memfd: %w", err)
	}
	if st.Size > MaxSealed {
		return nil, fmt.Errorf("read memfd: %d bytes, at most %d", st.Size, MaxSealed)
	}
	b := make([]byte, st.Size)
	for off := 0; off < len(b); {
		n, err := unix.Pread(fd, b[off:], int64(off))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read memfd: %w", err)
		}
		if n == 0 {
			return nil, fmt.Errorf("read memfd: %d bytes, %d promised", off, len(b))
		}
		off += n
	}
	return b, nil
}
