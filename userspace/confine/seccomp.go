// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of linux/seccomp.h and linux/bpf.h.
const (
	offsetNumber = 0 // struct seccomp_data
	offsetArch   = 4
	offsetArg0   = 16

	bpfMapLookup      = 1 // BPF_MAP_LOOKUP_ELEM
	bpfMapNextKey     = 4
	bpfInfoByFD       = 15
	bpfMapLookupBatch = 24
)

// denied is what the process has no use for: every socket and every
// descriptor of that kind comes over the line.
var denied = []uint32{
	unix.SYS_SOCKET, unix.SYS_SOCKETPAIR, unix.SYS_BIND, unix.SYS_LISTEN, unix.SYS_CONNECT,
	unix.SYS_EXECVE, unix.SYS_EXECVEAT,
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_GETFD, unix.SYS_KCMP,
	unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT,
	unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT, unix.SYS_FSOPEN, unix.SYS_FSMOUNT, unix.SYS_FSCONFIG, unix.SYS_MOUNT_SETATTR,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT,
	unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
	unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_FANOTIFY_INIT,
	unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_QUOTACTL,
	unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX,
	unix.SYS_PERSONALITY, unix.SYS_SYSLOG,
}

// allowedBPF are the commands of bpf(2) that read a map by a descriptor.
var allowedBPF = []uint32{bpfMapLookup, bpfMapNextKey, bpfInfoByFD, bpfMapLookupBatch}

// filter installs the seccomp filter on all threads (seccomp(2), TSYNC, 3.17).
// A refused call is EPERM, which Go code reports, in place of a kill.
func filter() error {
	prog, err := program()
	if err != nil {
		return err
	}
	f := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	// TSYNC returns the id of a thread that could not be brought along.
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&f)))
	runtime.KeepAlive(prog)
	if errno != 0 {
		return fmt.Errorf("install seccomp filter: %w", errno)
	}
	if thread != 0 {
		return fmt.Errorf("install seccomp filter: thread %d has another", thread)
	}
	return nil
}

// program is: another architecture or x32: kill; bpf: by its command; denied:
// EPERM; else allowed.
func program() ([]unix.SockFilter, error) {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		above = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
		eperm = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	)
	arch, err := auditArch()
	if err != nil {
		return nil, err
	}
	p := []unix.SockFilter{
		{Code: load, K: offsetArch},
		{Code: equal, Jt: 1, K: arch},
		{Code: ret, K: unix.SECCOMP_RET_KILL_PROCESS},
		{Code: load, K: offsetNumber},
		// x32 numbers, which would pass the list, have bit 30.
		{Code: above, Jf: 1, K: 1 << 30},
		{Code: ret, K: unix.SECCOMP_RET_KILL_PROCESS},
		{Code: equal, Jf: uint8(len(allowedBPF) + 3), K: unix.SYS_BPF},
		{Code: load, K: offsetArg0},
	}
	for i, cmd := range allowedBPF {
		p = append(p, unix.SockFilter{Code: equal, Jt: uint8(len(allowedBPF) - i), K: cmd})
	}
	p = append(p,
		unix.SockFilter{Code: ret, K: eperm},
		unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW})
	for i, nr := range denied {
		p = append(p, unix.SockFilter{Code: equal, Jt: uint8(len(denied) - i), K: nr})
	}
	return append(p,
		unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: ret, K: eperm}), nil
}

func auditArch() (uint32, error) {
	switch runtime.GOARCH {
	case "amd64":
		return unix.AUDIT_ARCH_X86_64, nil
	case "arm64":
		return unix.AUDIT_ARCH_AARCH64, nil
	}
	return 0, fmt.Errorf("install seccomp filter: no filter for %s", runtime.GOARCH)
}
