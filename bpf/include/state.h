/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What all hooks ask of the maps: who is calling, who serves a destination,
 * how a refusal is counted and told.
 */
#ifndef SALLYPORT_STATE_H
#define SALLYPORT_STATE_H

#include "vmlinux.h"
#include "helpers.h"
#include "maps.h"

#define NSEC_PER_SEC 1000000000ULL
#define MAPPED htonl(0x0000ffff)

static __always_inline struct control_value *controls(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

static __always_inline void count(__u32 counter)
{
	__u64 *n = bpf_map_lookup_elem(&counters, &counter);

	if (n)
		*n += 1;
}

static __always_inline __u8 soften(__u8 mode, const struct control_value *c)
{
	return mode < c->ceiling ? mode : c->ceiling;
}

static __always_inline struct address address4(__be32 ip)
{
	struct address a = { { 0, 0, MAPPED, ip } };

	return a;
}

static __always_inline bool is_mapped(const struct address *a)
{
	return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == MAPPED;
}

static __always_inline bool same_address(const struct address *a, const struct address *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] &&
	       a->word[3] == b->word[3];
}

static __always_inline bool is_loopback(const struct address *a)
{
	if (is_mapped(a))
		return (a->word[3] & htonl(0xff000000)) == htonl(0x7f000000);
	return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == 0 && a->word[3] == htonl(1);
}

/* To the kernel a connect to the unspecified address is one to loopback. */
static __always_inline void resolve_unspecified(struct address *a)
{
	if (a->word[0] || a->word[1])
		return;
	if (a->word[2] == MAPPED && a->word[3] == 0)
		a->word[3] = htonl(0x7f000001);
	else if (a->word[2] == 0 && a->word[3] == 0)
		a->word[3] = htonl(1);
}

/* An identity as of now, and the cgroup that it was found at. */
struct who {
	__u64 owner;
	__u32 number;
	__u8 mode;
	__u8 flags;
	bool known;
};

/* Exempt is only the agent's leaf itself, never what inherits from it. */
static __always_inline bool take(struct who *w, __u64 id, bool inherited)
{
	struct identity_value *v = bpf_map_lookup_elem(&identity_by_cgroup, &id);

	if (!v)
		return false;
	w->owner = id;
	w->number = v->number;
	w->mode = v->mode;
	w->flags = v->flags;
	w->known = !(inherited && v->flags & IDENTITY_AGENT);
	return true;
}

/*
 * The identity of a cgroup that has just come into being is that of the
 * nearest ancestor that has one.
 */
static __always_inline void caller(struct who *w, const struct control_value *c, __u64 *cgroup)
{
	__u64 id = bpf_get_current_cgroup_id();

	*cgroup = id;
	if (take(w, id, false))
		return;
	for (int level = MAX_LEVELS - 1; level > 0; level--) {
		if (!(c->levels & (1U << level)))
			continue;
		id = bpf_get_current_ancestor_cgroup_id(level);
		if (id && take(w, id, true))
			return;
	}
}

/* The identity, as of now, of the cgroup that made the socket. */
static __always_inline void creator(struct who *w, const struct socket_tag *tag)
{
	if (!take(w, tag->cgroup, false) && tag->owner != tag->cgroup)
		take(w, tag->owner, true);
}

static __always_inline struct protected_value *protection(__u64 ns, __u16 port)
{
	struct protected_key key = { .netns = ns, .port = port, .proto = IPPROTO_TCP };

	return bpf_map_lookup_elem(&protected, &key);
}

/*
 * Who serves a destination, 0: nobody that we know of. Loopback is not an
 * address that can be claimed for the node: there the netns says it.
 */
static __always_inline __u32 server_of(__u64 ns, const struct address *dst, __u16 port)
{
	struct claimed_key key = { .addr = *dst, .port = port, .proto = IPPROTO_TCP };
	struct claimed_value *v = bpf_map_lookup_elem(&claimed, &key);
	struct protected_value *p;

	if (v)
		return v->identity;
	if (!is_loopback(dst))
		return 0;
	p = protection(ns, port);
	return p ? p->identity : 0;
}

static __always_inline enum egress_action egress_to(__u32 identity, __u8 proto, const struct address *dst, __u16 port)
{
	struct egress_key key = {
		.prefixlen = EGRESS_FIXED + 128,
		.identity = identity,
		.port = port,
		.proto = proto,
		.addr = *dst,
	};
	struct egress_value *v = bpf_map_lookup_elem(&egress, &key);

	if (v)
		return v->action;
	key.port = 0;
	v = bpf_map_lookup_elem(&egress, &key);
	return v ? v->action : EGRESS_REFUSE;
}

static __always_inline bool within_limit(struct window *w, __u64 now, __u32 limit)
{
	__u64 second = now / NSEC_PER_SEC;

	if (w->second != second) {
		w->second = second;
		w->used = 0;
	}
	if (w->used >= limit)
		return false;
	return __sync_fetch_and_add(&w->used, 1) < limit;
}

/*
 * Tells the agent of a refusal. One identity can fill only its own share of
 * the ring; the counters count all of them.
 */
static __noinline int tell(struct event *e)
{
	struct control_value *c = controls();
	struct window *w;
	__u32 bucket;

	if (!e || !c)
		return 0;
	bucket = (e->identity * 2654435761U + e->reason * 40503U + e->target * 97U) % EVENT_WINDOWS;
	e->time = bpf_ktime_get_boot_ns();
	w = bpf_map_lookup_elem(&event_windows, &bucket);
	if (!w)
		return 0;
	if (!within_limit(w, e->time, c->event_limit))
		count(COUNT_EVENTS_LIMITED);
	else if (bpf_ringbuf_output(&events, e, sizeof(*e), 0))
		count(COUNT_EVENTS_LOST);
	else
		count(COUNT_EVENTS);
	return 0;
}

/* Counts and tells; true where the mode makes it a refusal. */
static __always_inline bool refused(struct event *e, __u8 reason, __u8 mode)
{
	e->reason = reason;
	e->mode = mode;
	count(mode == MODE_ENFORCE ? reason : WOULD_REFUSE + reason);
	tell(e);
	return mode == MODE_ENFORCE;
}

static __always_inline struct usage_value *usage_of(__u32 identity)
{
	struct usage_value *u = bpf_map_lookup_elem(&usage, &identity), none = {};

	if (u)
		return u;
	bpf_map_update_elem(&usage, &identity, &none, BPF_NOEXIST);
	return bpf_map_lookup_elem(&usage, &identity);
}

/* Whose quota an entry is counted against: a dial's is its server's. */
static __always_inline __u32 payer(__u8 kind, __u32 identity, __u32 target)
{
	return kind == FLOW_DIAL ? target : identity;
}

static __always_inline bool flow_room(const struct control_value *c, __u32 identity)
{
	struct usage_value *all = usage_of(USAGE_TOTAL), *own = usage_of(identity);

	return all && own && all->flows < c->flow_limit && own->flows < c->flow_quota;
}

#endif
