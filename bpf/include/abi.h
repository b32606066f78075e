/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Every record that the kernel half shares with Go. Fixed-width fields,
 * explicit padding, no packing: the Go types are generated from the BTF of
 * these, and keys are compared byte by byte, so padding is always zero.
 *
 * Addresses are 16 bytes in network order, IPv4 as v4-mapped IPv6. Ports are
 * in host order. Times are CLOCK_BOOTTIME in nanoseconds.
 */
#ifndef SALLYPORT_ABI_H
#define SALLYPORT_ABI_H

/* Goes up with every change of a record or a map; pins of another one are
 * refused. */
#define LAYOUT_VERSION 1

enum mode {
	MODE_OBSERVE = 0,
	MODE_AUDIT = 1,
	MODE_ENFORCE = 2,
};

enum identity_flags {
	IDENTITY_AGENT = 1, /* the agent's own leaf: exempt, never inherited */
	IDENTITY_REVOKED = 2, /* no connection at all */
	IDENTITY_EGRESS_DENY = 4, /* what nobody claims only by the egress map */
	IDENTITY_PENDING = 8, /* known to be enforced, listeners not there yet */
	IDENTITY_EXPIRED = 16, /* nothing to what nobody claims; the rest is judged by the proxy */
};

enum action {
	ACTION_PROXY = 0,
	ACTION_DIRECT = 1,
	ACTION_DENY = 2,
};

enum flow_kind {
	FLOW_NONE = 0,
	FLOW_OUT = 1, /* rewritten to the outbound listener */
	FLOW_DIRECT = 2, /* verdict direct, untouched */
	FLOW_DIAL = 3, /* made by the agent on a client's behalf */
	FLOW_SERVED = 4, /* in a socket's tag alone: accepted from such a dial */
};

enum flow_flags {
	FLOW_PEER = 1, /* the second entry of a flow, under the server's netns */
};

/* Where a refusal was decided. */
enum hook {
	HOOK_SOCKET = 1,
	HOOK_BIND = 2,
	HOOK_CONNECT = 3,
	HOOK_SENDMSG = 4,
	HOOK_LISTEN = 5,
	HOOK_STEER = 6,
	HOOK_EGRESS = 7,
};

/* Indices of the counters map. REASON_* counts what was refused;
 * WOULD_REFUSE + REASON_* what would have been in enforce. */
enum counter {
	REASON_VERDICT_DENY = 1,
	REASON_BIND_GUARD = 2,
	REASON_OWN_PORT = 3,
	REASON_LISTENER_GONE = 4,
	REASON_SERVER_GONE = 5,
	REASON_UNTAGGED = 6,
	REASON_MAP_FULL = 7,
	REASON_FOREIGN_SOCKET = 8,
	REASON_BOUND_DEVICE = 9,
	REASON_SOCKET_KIND = 10,
	REASON_EGRESS = 11,
	REASON_IDENTITY_REVOKED = 12,
	REASON_NOT_READY = 13,
	REASON_IDENTITY_EXPIRED = 14,
	REASON_COUNT = 15,

	WOULD_REFUSE = 16,

	COUNT_PROXIED = 32, /* connections rewritten to the outbound listener */
	COUNT_DIRECT = 33, /* connections let through by a verdict */
	COUNT_DIALLED = 34, /* connections tagged for the agent */
	COUNT_STEERED = 35, /* SYNs given to an inbound listener */
	COUNT_SERVED = 36, /* SYNs of tagged flows given to their server */
	COUNT_STALE = 37, /* direct verdicts not used: heartbeat stale */
	COUNT_VOID = 38, /* verdicts not used: expired or generation bumped */
	COUNT_BYPASSED = 39, /* observe, audit: no listener or netns of ours, left alone */
	COUNT_EVENTS = 40,
	COUNT_EVENTS_LOST = 41, /* the events ring was full */
	COUNT_EVENTS_LIMITED = 42, /* over the limit per identity and reason */
	COUNT_SAMPLES = 43,
	COUNT_SAMPLES_LOST = 44, /* the samples ring was full */
	COUNT_SAMPLES_LIMITED = 45, /* over the budget per second */
	COUNT_SERVERS_FULL = 46, /* a listener without a free slot */
	COUNT_ADOPTED = 47, /* sockets tagged after they were made */
	COUNTERS = 64,
};

/* Slots of the listeners map that a netns has for our own listeners, from
 * struct netns_value.slot on. */
enum own_slot {
	OWN_OUTBOUND4 = 0,
	OWN_OUTBOUND6 = 1,
	OWN_INBOUND4 = 2,
	OWN_INBOUND6 = 3,
	OWN_TUNNEL4 = 4,
	OWN_TUNNEL6 = 5,
	OWN_USED = 6,
	OWN_SLOTS = 8,
};

/* Slots that one protected port has for its server's listeners. */
#define SERVER_SLOTS 16

/* Depth down to which a cgroup inherits from an ancestor at once; deeper
 * ones wait for the agent's scan. */
#define MAX_LEVELS 16

struct address {
	__u32 word[4];
};
_Static_assert(sizeof(struct address) == 16, "address");

/* identity_by_cgroup and identity_by_path */
struct identity_value {
	__u32 number;
	__u8 mode;
	__u8 flags;
	__u16 pad;
	__u64 generation; /* goes up when the agent changes the entry */
};
_Static_assert(sizeof(struct identity_value) == 16, "identity_value");

#define PATH_SIZE 256
struct path_key {
	__u8 path[PATH_SIZE]; /* in the cgroup2 hierarchy, zero padded */
};
_Static_assert(sizeof(struct path_key) == 256, "path_key");

struct claimed_key {
	struct address addr;
	__u16 port;
	__u8 proto;
	__u8 pad[5];
};
_Static_assert(sizeof(struct claimed_key) == 24, "claimed_key");

struct claimed_value {
	__u32 identity; /* who serves there */
	__u32 pad;
};
_Static_assert(sizeof(struct claimed_value) == 8, "claimed_value");

/* In the order of the trie: identity, protocol and port are always whole,
 * so prefixlen is EGRESS_FIXED plus the bits of the address, or, for every
 * port of a protocol, an entry with port 0. */
struct egress_key {
	__u32 prefixlen;
	__u32 identity;
	__u16 port;
	__u8 proto;
	__u8 pad;
	struct address addr;
};
_Static_assert(sizeof(struct egress_key) == 28, "egress_key");
#define EGRESS_FIXED 64

enum egress_action {
	EGRESS_REFUSE,
	EGRESS_LEAVE, /* it goes there by itself */
	EGRESS_PROXY, /* TCP only: the proxy sees to whom it speaks */
};

struct egress_value {
	enum egress_action action;
};
_Static_assert(sizeof(struct egress_value) == 4, "egress_value");

struct verdict_key {
	__u64 netns;
	struct address addr;
	__u32 identity;
	__u16 port;
	__u8 proto;
	__u8 pad;
};
_Static_assert(sizeof(struct verdict_key) == 32, "verdict_key");

struct verdict_value {
	__u64 netns; /* of the server, ACTION_DIRECT */
	__u64 expires;
	__u64 generation; /* what generations[slot] must be */
	__u64 epoch; /* what generations[0] must be */
	__u32 slot;
	__u8 action;
	__u8 pad[3];
};
_Static_assert(sizeof(struct verdict_value) == 40, "verdict_value");

/* As the end that opened the connection sees it. */
struct flow_key {
	__u64 netns;
	struct address src;
	struct address dst;
	__u16 sport;
	__u16 dport;
	__u8 proto;
	__u8 pad[3];
};
_Static_assert(sizeof(struct flow_key) == 48, "flow_key");

struct flow_value {
	__u64 cookie; /* of the socket that opened it */
	__u64 created;
	__u64 netns; /* of the socket that opened it */
	struct address dst; /* original destination */
	struct address client; /* FLOW_DIAL: the true client, else zero */
	__u32 identity; /* source, 0: a caller that lives elsewhere */
	__u32 target; /* expected server, 0: nobody's address */
	__u16 dport;
	__u16 client_port;
	__u8 kind;
	__u8 flags;
	__u8 mode; /* of the source identity when it connected */
	__u8 pad;
};
_Static_assert(sizeof(struct flow_value) == 72, "flow_value");

struct protected_key {
	__u64 netns;
	__u16 port;
	__u8 proto;
	__u8 pad[5];
};
_Static_assert(sizeof(struct protected_key) == 16, "protected_key");

struct protected_value {
	__u64 generation;
	__u32 identity;
	__u32 slot; /* first of SERVER_SLOTS in listeners */
	__u8 mode;
	__u8 pad[7];
};
_Static_assert(sizeof(struct protected_value) == 24, "protected_value");

/* A netns in which we have listeners; its own ports are guarded. */
struct netns_value {
	__u32 slot; /* first of OWN_SLOTS in listeners */
	__u32 pad;
};
_Static_assert(sizeof(struct netns_value) == 8, "netns_value");

struct listening_key {
	__u64 netns;
	__u16 port;
	__u8 family; /* 4 or 6 */
	__u8 pad[5];
};
_Static_assert(sizeof(struct listening_key) == 16, "listening_key");

struct usage_value {
	__u64 flows;
};
_Static_assert(sizeof(struct usage_value) == 8, "usage_value");

/* Key of the usage map for all identities together. */
#define USAGE_TOTAL 0xffffffff

struct number_value {
	__u32 number;
	__u32 pad;
};
_Static_assert(sizeof(struct number_value) == 8, "number_value");

#define NAME_SIZE 256
struct name_key {
	__u8 name[NAME_SIZE]; /* SHA-256 of longer ones; zero padded */
};
_Static_assert(sizeof(struct name_key) == 256, "name_key");

struct control_value {
	__u64 heartbeat; /* last sign of life of the agent */
	__u64 stale_after; /* age at which a heartbeat is none */
	__u32 levels; /* bit n: an identity's cgroup is at level n */
	__u32 flow_limit; /* entries of the flow map in use at most */
	__u32 flow_quota; /* of one identity */
	__u32 sample_budget; /* samples a second, all flows */
	__u32 event_limit; /* events a second, per identity and reason */
	__u32 next_number; /* the identity number to give next */
	__u16 port_outbound;
	__u16 port_inbound;
	__u16 port_tunnel;
	__u8 ceiling; /* enum mode; softens every mode */
	__u8 pad;
};
_Static_assert(sizeof(struct control_value) == 48, "control_value");

/* What a socket carries (SK_STORAGE). The kernel writes the creator, connect
 * the rest; for a dial the agent writes it before connect(2). */
struct socket_tag {
	__u64 cgroup; /* of the creator */
	__u64 owner; /* the cgroup that the creator's identity came from */
	__u64 netns; /* of the server, FLOW_DIRECT */
	struct address dst;
	struct address client;
	__u32 identity;
	__u32 target;
	__u16 dport;
	__u16 client_port;
	__u8 kind;
	__u8 mode;
	__u8 entries; /* flow entries that this socket has: 0, 1 or 2 */
	__u8 listens; /* counted in the listening map */
	struct flow_key key; /* of the first entry */
};
_Static_assert(sizeof(struct socket_tag) == 120, "socket_tag");

struct event {
	__u64 time;
	__u64 netns;
	__u64 cgroup;
	__u64 cookie;
	struct address src;
	struct address dst;
	__u32 identity; /* who did it */
	__u32 target; /* whose address or port it was */
	__u16 sport;
	__u16 dport;
	__u8 reason; /* enum counter */
	__u8 hook;
	__u8 mode; /* MODE_ENFORCE: it was refused */
	__u8 proto;
};
_Static_assert(sizeof(struct event) == 80, "event");

#define SAMPLE_METHOD 8
#define SAMPLE_PATH 128
#define SAMPLE_HOST 64

enum sample_flags {
	SAMPLE_INGRESS = 1,
	SAMPLE_PATH_CUT = 2, /* longer than is kept */
	SAMPLE_HOST_CUT = 4,
};

struct sample {
	__u64 time;
	__u64 netns;
	struct address src;
	struct address dst;
	__u32 identity; /* source, 0 if the kernel does not know */
	__u32 payload; /* bytes of the segment */
	__u32 ifindex;
	__u16 sport;
	__u16 dport;
	__u8 method_len;
	__u8 path_len;
	__u8 host_len;
	__u8 flags;
	__u8 kind; /* enum flow_kind */
	__u8 pad[11];
	__u8 method[SAMPLE_METHOD];
	__u8 path[SAMPLE_PATH]; /* without query */
	__u8 host[SAMPLE_HOST];
};
_Static_assert(sizeof(struct sample) == 280, "sample");

/* Argument of the forget program. */
struct forget_args {
	struct flow_key key;
	__u64 cookie; /* only if the entry is this socket's */
	__u32 removed; /* set to 1 */
	__u32 pad;
};
_Static_assert(sizeof(struct forget_args) == 64, "forget_args");

#endif
