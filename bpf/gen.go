// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the kernel half: the object built from the C programs
// beside this file, and the Go types of the records in include/abi.h. Only
// agent/loader and agent/datapath import it.
//
// The object is little-endian BPF, which is what both amd64 and arm64 run.
package bpf

// The flags keep paths of the building machine out of the object, so that it
// is the same bytes everywhere.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -go-package bpf -target bpfel -no-global-types -type identity_value -type path_key -type claimed_key -type claimed_value -type egress_key -type egress_value -type verdict_key -type verdict_value -type flow_key -type flow_value -type protected_key -type protected_value -type netns_value -type listening_key -type usage_value -type number_value -type name_key -type control_value -type socket_tag -type event -type sample -type forget_args -type window -type counter -type hook -type own_slot -type identity_flags -type egress_action -type action -type flow_kind -type flow_flags -type sample_flags Kernel sallyport.bpf.c -- -mcpu=v3 -O2 -g -Wall -Werror -ffile-prefix-map=${PWD}=. -fdebug-compilation-dir=.

//go:generate go run ./genabi ../userspace/flow/abi/records.go
