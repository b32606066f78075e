/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
//go:build ignore

/*
 * Who may take a port: our own ports are the agent's, a protected port is
 * its identity's. The bind hooks see the port that was asked for, post_bind
 * the one that was given.
 */
#include "include/state.h"

static __always_inline bool is_own_port(const struct control_value *c, __u16 port)
{
	return port == c->port_outbound || port == c->port_inbound || port == c->port_tunnel;
}

static __always_inline int may_bind(struct event *e, struct socket_tag *tag)
{
	struct control_value *c = controls();
	struct who me = {}, maker = {};
	struct protected_value *p;

	if (!c || e->sport == 0 || e->proto != IPPROTO_TCP)
		return 1;
	p = protection(e->netns, e->sport);
	if (!p && !is_own_port(c, e->sport))
		return 1;
	caller(&me, c, &e->cgroup);
	if (tag)
		creator(&maker, tag);
	e->hook = HOOK_BIND;
	e->identity = me.number;
	if (is_own_port(c, e->sport) && bpf_map_lookup_elem(&netns, &e->netns)) {
		if (me.known && maker.known && me.flags & maker.flags & IDENTITY_AGENT)
			return 1;
		refused(e, REASON_OWN_PORT, MODE_ENFORCE);
		return 0;
	}
	if (!p)
		return 1;
	if (me.known && maker.known && me.number == p->identity && maker.number == p->identity)
		return 1;
	e->target = p->identity;
	return !refused(e, REASON_BIND_GUARD, soften(p->mode, c));
}

static __always_inline int asked(struct bpf_sock_addr *ctx, struct address addr)
{
	struct event e = {};

	e.src = addr;
	e.sport = ntohs(ctx->user_port);
	e.proto = ctx->protocol;
	e.netns = bpf_get_netns_cookie(ctx);
	e.cookie = bpf_get_socket_cookie(ctx);
	return may_bind(&e, bpf_sk_storage_get(&socket_tags, ctx->sk, NULL, 0));
}

static __always_inline int given(struct bpf_sock *ctx, struct address addr)
{
	struct event e = {};

	e.src = addr;
	e.sport = ctx->src_port;
	e.proto = ctx->protocol;
	e.netns = bpf_get_netns_cookie(ctx);
	e.cookie = bpf_get_socket_cookie(ctx);
	return may_bind(&e, bpf_sk_storage_get(&socket_tags, ctx, NULL, 0));
}

SEC("cgroup/bind4")
int bind4(struct bpf_sock_addr *ctx)
{
	return asked(ctx, address4(ctx->user_ip4));
}

SEC("cgroup/bind6")
int bind6(struct bpf_sock_addr *ctx)
{
	struct address a = { { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] } };

	return asked(ctx, a);
}

SEC("cgroup/post_bind4")
int post_bind4(struct bpf_sock *ctx)
{
	return given(ctx, address4(ctx->src_ip4));
}

SEC("cgroup/post_bind6")
int post_bind6(struct bpf_sock *ctx)
{
	struct address a = { { ctx->src_ip6[0], ctx->src_ip6[1], ctx->src_ip6[2], ctx->src_ip6[3] } };

	return given(ctx, a);
}
