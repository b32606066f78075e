/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Every map of the kernel half. All are pinned and outlive the agent. No map
 * that security rests on forgets by itself: a full one refuses and counts,
 * but for what identity_by_cgroup says.
 */
#ifndef SALLYPORT_MAPS_H
#define SALLYPORT_MAPS_H

#include "abi.h"

/*
 * cgroup id -> identity.
 * Written by the agent's scan and by the mkdir program; read by every hook.
 * Full: the agent gets an error and reports it; the mkdir program counts
 * REASON_MAP_FULL. It can refuse nothing: a cgroup made then at a known path
 * is open, like one of nobody's, until the agent's scan makes room and finds
 * it. Cgroups beneath one that is known need no entry and inherit as ever.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct identity_value);
} identity_by_cgroup SEC(".maps");

/*
 * cgroup path -> identity that a cgroup made there gets at once.
 * Written by the agent; read by the mkdir program.
 * Full: the agent gets an error; such a cgroup waits for the scan.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct path_key);
	__type(value, struct identity_value);
} identity_by_path SEC(".maps");

/*
 * address and port -> identity that serves there.
 * Written by the agent; read by connect, sendmsg, tc.
 * Full: the agent gets an error and reports it.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct claimed_key);
	__type(value, struct claimed_value);
} claimed SEC(".maps");

/*
 * identity, port, protocol, address prefix -> allowed though nobody claims
 * it. Written by the agent; read by connect, sendmsg, tc.
 * Full: the agent gets an error; what is missing is refused.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct egress_key);
	__type(value, struct egress_value);
} egress SEC(".maps");

/*
 * source identity and netns, destination -> verdict.
 * Written by the agent; read by connect.
 * Full: the agent gets an error; what is missing goes to the proxy.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct verdict_key);
	__type(value, struct verdict_value);
} verdict SEC(".maps");

/*
 * netns, protocol, tuple -> who opened the connection and where to.
 * Written by sockops before the SYN leaves, removed by it on close; read by
 * steer, getpeername, tc, and by userspace through a read-only descriptor.
 * Full: connect refuses once control.flow_limit entries are in use, which
 * leaves a margin for connects that are under way; an identity that has used
 * up its quota is refused alone.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 147456);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct flow_key);
	__type(value, struct flow_value);
} flow SEC(".maps");

/*
 * identity -> entries of the flow map that it uses; USAGE_TOTAL: all.
 * Written by sockops and forget; read by connect.
 * Full: connections of an identity that has no entry are refused; there is
 * room for every number that the numbers map can give.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65792);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct usage_value);
} usage SEC(".maps");

/*
 * netns, protocol, port -> identity that serves there and nobody else.
 * Written by the agent; read by bind, connect, sockops, steer.
 * Full: the agent gets an error and reports the port as not protected.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct protected_key);
	__type(value, struct protected_value);
} protected SEC(".maps");

/*
 * netns cookie -> the slots of our own listeners in it; their ports are
 * guarded there. In one that is not here nothing is rewritten.
 * Written by the agent; read by bind, connect, steer.
 * Full: the agent gets an error and refuses the netns.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct netns_value);
} netns SEC(".maps");

/*
 * netns, own port, family -> how many of the agent's sockets listen there.
 * Written by sockops; read by connect for identities that are not enforced.
 * Full: their connections are left alone.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct listening_key);
	__type(value, __u32);
} listening SEC(".maps");

/*
 * slot -> listening socket: OWN_SLOTS for each netns, SERVER_SLOTS for each
 * protected port. Written by the agent for ours and for a server that
 * listened before its port was protected, by sockops for other servers; read
 * by steer. A socket leaves it when it is closed.
 * Full: never, slots are given with the entries of netns and protected.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 73728);
	__type(key, __u32);
	__type(value, __u64);
} listeners SEC(".maps");

/*
 * slot -> generation. 0: the epoch, for break-glass and for a new agent.
 * Written by the agent; read by connect. Never full: names that find no slot
 * of their own share one, so a bump voids more than it must.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u64);
} generations SEC(".maps");

/*
 * One record: ceiling, heartbeat, limits, ports. Written by the agent; read
 * by every hook.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control_value);
} control SEC(".maps");

/*
 * name of an identity -> its number in this boot. Written and read by the
 * agent alone. Full: the identity gets none and is reported.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct name_key);
	__type(value, struct number_value);
} numbers SEC(".maps");

/*
 * socket -> its tag. Written by sock_create, adopt and connect, by the agent
 * for its dials; read by connect, sockops, getpeername. Freed with the socket.
 * Full: a connection that needs a tag and gets none is refused.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct socket_tag);
} socket_tags SEC(".maps");

/*
 * Refusals, one struct event each. Written by every hook; read by the agent.
 * Full: counted as COUNT_EVENTS_LOST.
 */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

/*
 * First requests of connections, one struct sample each; a ring of their own
 * so that a flood of them pushes out no refusal. Written by tc; read by the
 * agent. Full: counted as COUNT_SAMPLES_LOST.
 */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} samples SEC(".maps");

/* enum counter -> how often. Written by every hook; read by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

struct window {
	__u64 second;
	__u32 used;
	__u32 pad;
};

/*
 * hash of identity and reason -> events of this second. Read and written by
 * every hook. Two that share a bucket share its limit.
 */
#define EVENT_WINDOWS 1024
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, EVENT_WINDOWS);
	__type(key, __u32);
	__type(value, struct window);
} event_windows SEC(".maps");

/* Samples of this second. Read and written by tc. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct window);
} sample_window SEC(".maps");

/*
 * flow -> how often the budget was spent on it; no more once a sample was
 * taken. Read and written by tc. May forget: a flow is then sampled again,
 * nothing else rests on it.
 */
#define SAMPLE_ATTEMPTS 3
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct flow_key);
	__type(value, __u8);
} sampled SEC(".maps");

#define SAMPLE_BYTES 512
struct scratch {
	__u8 bytes[SAMPLE_BYTES];
	struct sample sample;
};

/* Where tc parses. Read and written by tc alone, never across packets. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

#endif
