/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
//go:build ignore

/*
 * Which listener a SYN reaches. One instance a netns. Nothing that a peer
 * can forge is looked at: a flow is known by its entry or not at all.
 */
#include "include/state.h"

/* sk_lookup cannot ask for the cookie of its netns; tc cannot on older
 * kernels. */
const volatile __u64 netns_cookie = 0;

static __always_inline bool give(struct bpf_sk_lookup *ctx, __u32 slot)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &slot);
	long err;

	if (!sk)
		return false;
	/* Without reuseport: a stranger of the same user may be in the group. */
	err = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(sk);
	return err == 0;
}

static __always_inline bool give_own(struct bpf_sk_lookup *ctx, __u32 own)
{
	__u64 ns = netns_cookie;
	struct netns_value *n = bpf_map_lookup_elem(&netns, &ns);

	return n && give(ctx, n->slot + own + (ctx->family == AF_INET6));
}

static __always_inline bool bound_to(struct bpf_sock *sk, const struct address *local)
{
	struct address a;

	if (sk->family == AF_INET)
		return sk->src_ip4 == 0 || sk->src_ip4 == local->word[3];
	a = (struct address){ { sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3] } };
	if (!a.word[0] && !a.word[1] && !a.word[3] && (!a.word[2] || a.word[2] == MAPPED))
		return true;
	return same_address(&a, local);
}

/* Spreads connections over the sockets that the server listens with. */
static __always_inline bool give_server(struct bpf_sk_lookup *ctx, const struct flow_key *key, __u32 first)
{
	__u32 start = key->sport ^ (key->sport >> 3) ^ key->src.word[3];

	for (__u32 i = 0; i < SERVER_SLOTS; i++) {
		__u32 slot = first + ((start + i) & (SERVER_SLOTS - 1));
		struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &slot);
		long err = -1;

		if (!sk)
			continue;
		if (bound_to(sk, &key->dst))
			err = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
		bpf_sk_release(sk);
		if (!err)
			return true;
	}
	return false;
}

static __always_inline void read_tuple(struct bpf_sk_lookup *ctx, struct flow_key *key)
{
	__be32 src4 = ctx_read(ctx->remote_ip4), dst4 = ctx_read(ctx->local_ip4);

	key->netns = netns_cookie;
	key->sport = ntohs(ctx->remote_port);
	key->dport = ctx->local_port;
	key->proto = IPPROTO_TCP;
	key->src.word[0] = ctx_read(ctx->remote_ip6[0]);
	key->src.word[1] = ctx_read(ctx->remote_ip6[1]);
	key->src.word[2] = ctx_read(ctx->remote_ip6[2]);
	key->src.word[3] = ctx_read(ctx->remote_ip6[3]);
	key->dst.word[0] = ctx_read(ctx->local_ip6[0]);
	key->dst.word[1] = ctx_read(ctx->local_ip6[1]);
	key->dst.word[2] = ctx_read(ctx->local_ip6[2]);
	key->dst.word[3] = ctx_read(ctx->local_ip6[3]);
	if (ctx->family == AF_INET) {
		key->src = address4(src4);
		key->dst = address4(dst4);
	}
}

static __always_inline int drop(const struct flow_key *key, __u32 identity, __u32 target, __u8 reason, __u8 mode)
{
	struct event e = {
		.netns = key->netns,
		.src = key->src,
		.dst = key->dst,
		.identity = identity,
		.target = target,
		.sport = key->sport,
		.dport = key->dport,
		.hook = HOOK_STEER,
		.proto = IPPROTO_TCP,
	};

	return refused(&e, reason, mode) ? SK_DROP : SK_PASS;
}

static __always_inline int to_own(struct bpf_sk_lookup *ctx, const struct control_value *c, const struct flow_key *key)
{
	struct flow_value *v;

	if (key->dport == c->port_tunnel)
		return give_own(ctx, OWN_TUNNEL4) ? SK_PASS : drop(key, 0, 0, REASON_LISTENER_GONE, MODE_ENFORCE);
	if (key->dport == c->port_outbound) {
		v = bpf_map_lookup_elem(&flow, key);
		/* Observed and audited callers are rewritten only while our
		 * listener is there, so that one which is not in the map yet
		 * is found by the kernel's own look-up. */
		if (v && v->kind == FLOW_OUT)
			return give_own(ctx, OWN_OUTBOUND4)
				       ? SK_PASS
				       : drop(key, v->identity, v->target, REASON_LISTENER_GONE, soften(v->mode, c));
	}
	return drop(key, 0, 0, REASON_OWN_PORT, MODE_ENFORCE);
}

SEC("sk_lookup")
int steer(struct bpf_sk_lookup *ctx)
{
	struct control_value *c = controls();
	struct flow_key key = {};
	struct protected_value *p;
	struct flow_value *v;
	__u8 mode;

	if (!c || ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	read_tuple(ctx, &key);
	if (key.dport == c->port_outbound || key.dport == c->port_inbound || key.dport == c->port_tunnel)
		return to_own(ctx, c, &key);
	p = protection(key.netns, key.dport);
	if (!p)
		return SK_PASS;
	mode = soften(p->mode, c);
	v = bpf_map_lookup_elem(&flow, &key);
	/* It would come round to the proxy that made it, or reach a server that
	 * it was not meant for, which no mode lets pass. */
	if (v && v->kind == FLOW_DIAL && v->target != p->identity)
		return drop(&key, v->identity, p->identity, REASON_SERVER_GONE, MODE_ENFORCE);
	if (v && (v->kind == FLOW_DIRECT || v->kind == FLOW_DIAL) && v->target == p->identity) {
		if (give_server(ctx, &key, p->slot)) {
			count(COUNT_SERVED);
			return SK_PASS;
		}
		return drop(&key, v->identity, p->identity, REASON_SERVER_GONE, mode);
	}
	if (give_own(ctx, OWN_INBOUND4)) {
		count(COUNT_STEERED);
		return SK_PASS;
	}
	return drop(&key, 0, p->identity, REASON_LISTENER_GONE, mode);
}
