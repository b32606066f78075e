// SPDX-License-Identifier: Apache-2.0

// Package vmtests runs the tests of the agent that are about the kernel
// in other kernels than the running one:
//
//	go test ./vmtests -kernel 6.12
//
// It builds the test binaries, packs them with a small init (guest) into an
// initramfs, boots a Debian cloud kernel in QEMU, and repeats each result of
// the guest as a subtest of its own. matrix says which kernels there are and
// what each of them cannot do; whatever is not named there must run and pass.
//
// It needs an amd64 Debian with qemu-system-x86 and xz-utils, and about three
// minutes a kernel on two processors. Without -kernel the package tests only
// itself.
package vmtests
