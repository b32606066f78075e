/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
//go:build ignore

/*
 * The one object: one hook family a file, in the order in which a
 * connection meets them. Programs that are loaded once for each netns or
 * interface are instances of the same object with other constants.
 */
#include "connect.bpf.c"
#include "bind.bpf.c"
#include "flow.bpf.c"
#include "steer.bpf.c"
#include "tc.bpf.c"

/* Keeps the enumerations of abi.h in the object's BTF, where Go finds them. */
const volatile struct vocabulary {
	enum mode mode;
	enum identity_flags identity_flags;
	enum action action;
	enum flow_kind flow_kind;
	enum flow_flags flow_flags;
	enum hook hook;
	enum counter counter;
	enum own_slot own_slot;
	enum sample_flags sample_flags;
} vocabulary = {};

char license_text[] SEC("license") = "Dual BSD/GPL";
