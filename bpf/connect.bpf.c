/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
//go:build ignore

/*
 * Where a workload's connection begins: socket(2), connect(2), sendto(2).
 */
#include "include/state.h"

static __always_inline bool evades_hooks(const struct bpf_sock *sk)
{
	if (sk->type == SOCK_RAW)
		return true;
	switch (sk->protocol) {
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
	case IPPROTO_SCTP:
	case IPPROTO_DCCP:
	case IPPROTO_UDPLITE:
	case IPPROTO_MPTCP:
		return true;
	}
	return false;
}

SEC("cgroup/sock_create")
int sock_create(struct bpf_sock *ctx)
{
	struct control_value *c = controls();
	struct socket_tag *tag;
	struct event e = {};
	struct who me = {};

	if (!c || (ctx->family != AF_INET && ctx->family != AF_INET6))
		return 1;
	caller(&me, c, &e.cgroup);
	if (!me.known)
		return 1;
	tag = bpf_sk_storage_get(&socket_tags, ctx, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (tag) {
		tag->cgroup = e.cgroup;
		tag->owner = me.owner;
	}
	if (me.flags & IDENTITY_AGENT)
		return 1;
	e.hook = HOOK_SOCKET;
	e.identity = me.number;
	e.proto = ctx->protocol;
	e.netns = bpf_get_netns_cookie(ctx);
	if (!tag)
		return !refused(&e, REASON_MAP_FULL, soften(me.mode, c));
	if (evades_hooks(ctx) && refused(&e, REASON_SOCKET_KIND, soften(me.mode, c))) {
		/* What libraries take for "not there", so that they fall back to TCP. */
		bpf_set_retval(-EPROTONOSUPPORT);
		return 0;
	}
	return 1;
}

enum outcome {
	LEAVE,
	REFUSE,
	REWRITE,
};

struct attempt {
	struct event e;
	__u32 number;
	__u32 target;
	__u8 mode;
	__u8 flags;
	__u8 family; /* of the listener: 4 or 6 */
	bool device;
};

/*
 * Two cgroups are at work: the hook runs for the one that made the socket,
 * the caller may be in another. Where they differ neither's rights are lent
 * to the other.
 */
static __always_inline enum outcome identify(struct attempt *a, const struct control_value *c,
					     struct bpf_sock_addr *ctx, struct socket_tag *tag)
{
	struct who me = {}, maker = {};
	bool foreign;

	caller(&me, c, &a->e.cgroup);
	if (tag)
		creator(&maker, tag);
	if (!me.known && !maker.known)
		return LEAVE;
	if (me.known && me.flags & IDENTITY_AGENT) {
		a->flags = IDENTITY_AGENT;
		return LEAVE;
	}
	a->number = me.known ? me.number : maker.number;
	a->mode = soften(me.mode > maker.mode ? me.mode : maker.mode, c);
	if (maker.flags & IDENTITY_AGENT)
		a->mode = MODE_ENFORCE;
	a->flags = (me.flags | maker.flags) & ~IDENTITY_AGENT;
	foreign = !me.known || !maker.known || me.number != maker.number;
	a->e.identity = a->number;
	if (foreign && refused(&a->e, REASON_FOREIGN_SOCKET, a->mode))
		return REFUSE;
	return REWRITE;
}

static __always_inline __u8 verdict_of(const struct attempt *a, const struct control_value *c, __u64 *server_netns)
{
	struct verdict_key key = {
		.netns = a->e.netns,
		.addr = a->e.dst,
		.identity = a->number,
		.port = a->e.dport,
		.proto = IPPROTO_TCP,
	};
	struct verdict_value *v = bpf_map_lookup_elem(&verdict, &key);
	__u64 now, *generation, *epoch;
	__u32 slot, zero = 0;

	if (!v)
		return ACTION_PROXY;
	slot = v->slot;
	generation = bpf_map_lookup_elem(&generations, &slot);
	epoch = bpf_map_lookup_elem(&generations, &zero);
	now = bpf_ktime_get_boot_ns();
	if (!generation || !epoch || *generation != v->generation || *epoch != v->epoch || now >= v->expires) {
		count(COUNT_VOID);
		return ACTION_PROXY;
	}
	if (v->action == ACTION_DIRECT && now - c->heartbeat >= c->stale_after) {
		count(COUNT_STALE);
		return ACTION_PROXY;
	}
	*server_netns = v->netns;
	return v->action;
}

static __always_inline bool listener_there(const struct attempt *a, const struct control_value *c)
{
	struct listening_key key = { .netns = a->e.netns, .port = c->port_outbound, .family = a->family };

	return bpf_map_lookup_elem(&listening, &key) != NULL;
}

/* Whether our ports are guarded and SYNs steered there; elsewhere anybody may
 * listen where we would. */
static __always_inline bool wired(__u64 ns)
{
	return bpf_map_lookup_elem(&netns, &ns) != NULL;
}

static __always_inline enum outcome not_ready(struct attempt *a)
{
	refused(&a->e, REASON_NOT_READY, MODE_ENFORCE);
	/* Applications try again after this one, not after EPERM. */
	bpf_set_retval(-ECONNREFUSED);
	return REFUSE;
}

static __always_inline void tag_flow(struct socket_tag *tag, const struct attempt *a, __u8 kind, __u64 server_netns)
{
	tag->netns = server_netns;
	tag->dst = a->e.dst;
	tag->dport = a->e.dport;
	tag->identity = a->number;
	tag->target = a->target;
	tag->client = (struct address){};
	tag->client_port = 0;
	tag->mode = a->mode;
	tag->kind = kind;
}

/* What becomes of a TCP connection to an address that an identity serves. */
static __always_inline enum outcome route(struct attempt *a, const struct control_value *c, struct bpf_sock_addr *ctx,
					  struct socket_tag *tag)
{
	__u64 server_netns = 0;
	__u8 action = verdict_of(a, c, &server_netns);

	if (action == ACTION_DENY && refused(&a->e, REASON_VERDICT_DENY, a->mode))
		return REFUSE;
	if (!wired(a->e.netns)) {
		if (a->mode == MODE_ENFORCE)
			return not_ready(a);
		count(COUNT_BYPASSED);
		return LEAVE;
	}
	/* Only steer tells the server from who took its place. */
	if (action == ACTION_DIRECT && !wired(server_netns))
		action = ACTION_PROXY;
	if (action != ACTION_DIRECT) {
		/* It would hang: the loopback listener is not on that device. */
		if (a->device)
			return refused(&a->e, REASON_BOUND_DEVICE, a->mode) ? REFUSE : LEAVE;
		if (a->mode != MODE_ENFORCE && !listener_there(a, c)) {
			count(COUNT_BYPASSED);
			return LEAVE;
		}
	}
	if (!tag)
		tag = bpf_sk_storage_get(&socket_tags, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!tag || !flow_room(c, a->number))
		return refused(&a->e, REASON_MAP_FULL, a->mode) ? REFUSE : LEAVE;
	if (action == ACTION_DIRECT) {
		tag_flow(tag, a, FLOW_DIRECT, server_netns);
		count(COUNT_DIRECT);
		return LEAVE;
	}
	tag_flow(tag, a, FLOW_OUT, 0);
	count(COUNT_PROXIED);
	return REWRITE;
}

/* A dial that would get no flow entry would come round to our own listener. */
static __always_inline enum outcome dial(struct attempt *a, const struct control_value *c, struct socket_tag *tag)
{
	if (!tag || tag->kind != FLOW_DIAL)
		return LEAVE;
	a->e.identity = tag->identity;
	a->e.target = tag->target;
	tag->dst = a->e.dst;
	tag->dport = a->e.dport;
	if (!flow_room(c, tag->target)) {
		refused(&a->e, REASON_MAP_FULL, MODE_ENFORCE);
		return REFUSE;
	}
	count(COUNT_DIALLED);
	return LEAVE;
}

static __always_inline enum outcome decide(struct attempt *a, struct bpf_sock_addr *ctx, const struct control_value *c)
{
	struct socket_tag *tag = bpf_sk_storage_get(&socket_tags, ctx->sk, NULL, 0);
	enum outcome known;

	if (a->e.proto != IPPROTO_TCP && a->e.proto != IPPROTO_UDP)
		return LEAVE;
	known = identify(a, c, ctx, tag);
	if (a->flags & IDENTITY_AGENT)
		return dial(a, c, tag);
	/* A tag describes the newest connect alone. */
	if (tag && a->e.proto == IPPROTO_TCP)
		tag->kind = FLOW_NONE;
	if (known != REWRITE)
		return known;
	if (a->flags & IDENTITY_REVOKED && refused(&a->e, REASON_IDENTITY_REVOKED, a->mode))
		return REFUSE;
	if (a->flags & IDENTITY_PENDING && a->mode == MODE_ENFORCE)
		return not_ready(a);
	a->target = server_of(a->e.netns, &a->e.dst, a->e.dport);
	a->e.target = a->target;
	if (!a->target) {
		if (a->flags & IDENTITY_EXPIRED)
			return refused(&a->e, REASON_IDENTITY_EXPIRED, a->mode) ? REFUSE : LEAVE;
		if (!(a->flags & IDENTITY_EGRESS_DENY))
			return LEAVE;
		switch (egress_to(a->number, a->e.proto, &a->e.dst, a->e.dport)) {
		case EGRESS_LEAVE:
			return LEAVE;
		case EGRESS_PROXY:
			if (a->e.proto == IPPROTO_TCP)
				return route(a, c, ctx, tag);
			break;
		case EGRESS_REFUSE:
			break;
		}
		return refused(&a->e, REASON_EGRESS, a->mode) ? REFUSE : LEAVE;
	}
	/* Nothing verifies datagrams; QUIC falls back to TCP when refused. */
	if (a->e.proto == IPPROTO_UDP)
		return refused(&a->e, REASON_SOCKET_KIND, a->mode) ? REFUSE : LEAVE;
	return route(a, c, ctx, tag);
}

static __always_inline void describe(struct attempt *a, struct bpf_sock_addr *ctx, __u8 hook)
{
	a->e.hook = hook;
	a->e.proto = ctx->protocol;
	a->e.netns = bpf_get_netns_cookie(ctx);
	a->e.cookie = bpf_get_socket_cookie(ctx);
	a->e.dport = ntohs(ctx->user_port);
	a->device = ctx->sk->bound_dev_if != 0;
	resolve_unspecified(&a->e.dst);
}

static __always_inline int connect_v4(struct bpf_sock_addr *ctx, __u8 hook)
{
	struct control_value *c = controls();
	struct attempt a = { .family = 4 };

	if (!c)
		return 1;
	a.e.dst = address4(ctx->user_ip4);
	describe(&a, ctx, hook);
	switch (decide(&a, ctx, c)) {
	case REFUSE:
		return 0;
	case REWRITE:
		ctx->user_ip4 = htonl(0x7f000001);
		ctx->user_port = htons(c->port_outbound);
		break;
	case LEAVE:
		break;
	}
	return 1;
}

static __always_inline int connect_v6(struct bpf_sock_addr *ctx, __u8 hook)
{
	struct control_value *c = controls();
	struct attempt a = { .family = 6 };

	if (!c)
		return 1;
	a.e.dst.word[0] = ctx->user_ip6[0];
	a.e.dst.word[1] = ctx->user_ip6[1];
	a.e.dst.word[2] = ctx->user_ip6[2];
	a.e.dst.word[3] = ctx->user_ip6[3];
	if (is_mapped(&a.e.dst))
		a.family = 4;
	describe(&a, ctx, hook);
	switch (decide(&a, ctx, c)) {
	case REFUSE:
		return 0;
	case REWRITE:
		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = a.family == 4 ? MAPPED : 0;
		ctx->user_ip6[3] = a.family == 4 ? htonl(0x7f000001) : htonl(1);
		ctx->user_port = htons(c->port_outbound);
		break;
	case LEAVE:
		break;
	}
	return 1;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return connect_v4(ctx, HOOK_CONNECT);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return connect_v6(ctx, HOOK_CONNECT);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return connect_v4(ctx, HOOK_SENDMSG);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return connect_v6(ctx, HOOK_SENDMSG);
}
