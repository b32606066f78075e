/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
//go:build ignore

/*
 * The life of a flow entry, from the moment before the SYN leaves to the
 * close of the socket; the registration of listeners; and the addresses that
 * both ends are shown.
 */
#include "include/state.h"

static __always_inline void use(__u32 identity, __s64 entries)
{
	struct usage_value *u = usage_of(identity);

	if (u)
		__sync_fetch_and_add(&u->flows, entries);
}

/* Removes an entry if it is still that socket's. */
static __noinline int remove_flow(struct flow_key *key, __u64 cookie)
{
	struct flow_value *v;
	__u32 who;

	if (!key)
		return 0;
	v = bpf_map_lookup_elem(&flow, key);
	if (!v || v->cookie != cookie)
		return 0;
	who = payer(v->kind, v->identity, v->target);
	if (bpf_map_delete_elem(&flow, key))
		return 0;
	use(who, -1);
	use(USAGE_TOTAL, -1);
	return 1;
}

static __noinline int insert_flow(struct flow_key *key, struct flow_value *value)
{
	struct flow_value *stale;
	__u32 who;

	if (!key || !value)
		return 0;
	/* The tuple is this socket's now, whatever was not cleaned up. */
	stale = bpf_map_lookup_elem(&flow, key);
	if (stale)
		remove_flow(key, stale->cookie);
	if (bpf_map_update_elem(&flow, key, value, BPF_NOEXIST))
		return 0;
	who = payer(value->kind, value->identity, value->target);
	use(who, 1);
	use(USAGE_TOTAL, 1);
	return 1;
}

static __always_inline void forget_flows(struct socket_tag *tag, __u64 cookie)
{
	struct flow_key key = tag->key;

	if (!tag->entries)
		return;
	remove_flow(&key, cookie);
	if (tag->entries > 1) {
		key.netns = tag->netns;
		remove_flow(&key, cookie);
	}
	tag->entries = 0;
}

static __always_inline void ends_of(struct bpf_sock_ops *ctx, struct flow_key *key)
{
	__be32 src4 = ctx_read(ctx->local_ip4), dst4 = ctx_read(ctx->remote_ip4);

	key->sport = ctx->local_port;
	key->dport = ntohl(ctx->remote_port);
	key->proto = IPPROTO_TCP;
	key->src.word[0] = ctx_read(ctx->local_ip6[0]);
	key->src.word[1] = ctx_read(ctx->local_ip6[1]);
	key->src.word[2] = ctx_read(ctx->local_ip6[2]);
	key->src.word[3] = ctx_read(ctx->local_ip6[3]);
	key->dst.word[0] = ctx_read(ctx->remote_ip6[0]);
	key->dst.word[1] = ctx_read(ctx->remote_ip6[1]);
	key->dst.word[2] = ctx_read(ctx->remote_ip6[2]);
	key->dst.word[3] = ctx_read(ctx->remote_ip6[3]);
	if (ctx->family == AF_INET) {
		key->src = address4(src4);
		key->dst = address4(dst4);
	}
}

static __always_inline void tell_full(const struct flow_key *key, const struct flow_value *value)
{
	struct event e = {
		.netns = key->netns,
		.cookie = value->cookie,
		.src = key->src,
		.dst = value->dst,
		.identity = value->identity,
		.target = value->target,
		.sport = key->sport,
		.dport = value->dport,
		.hook = HOOK_CONNECT,
		.proto = IPPROTO_TCP,
	};

	/* The SYN dies: steer gives our listeners and servers no untagged flow. */
	refused(&e, REASON_MAP_FULL, MODE_ENFORCE);
}

static __always_inline void opened(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct socket_tag *tag = bpf_sk_storage_get(&socket_tags, sk, NULL, 0);
	struct flow_value value = {};
	struct flow_key key = {};

	if (!tag || tag->kind == FLOW_NONE || tag->kind == FLOW_SERVED)
		return;
	value.cookie = bpf_get_socket_cookie(ctx);
	forget_flows(tag, value.cookie);
	key.netns = bpf_get_netns_cookie(ctx);
	ends_of(ctx, &key);
	value.created = bpf_ktime_get_boot_ns();
	value.netns = key.netns;
	value.dst = tag->dst;
	value.dport = tag->dport;
	value.client = tag->client;
	value.client_port = tag->client_port;
	value.identity = tag->identity;
	value.target = tag->target;
	value.kind = tag->kind;
	value.mode = tag->mode;
	tag->key = key;
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	if (!insert_flow(&key, &value)) {
		tell_full(&key, &value);
		return;
	}
	tag->entries = 1;
	if (tag->kind != FLOW_DIRECT || tag->netns == 0 || tag->netns == key.netns)
		return;
	key.netns = tag->netns;
	value.flags = FLOW_PEER;
	if (insert_flow(&key, &value))
		tag->entries = 2;
	else
		tell_full(&key, &value);
}

/*
 * A server shows the true client for as long as its connection lives, also
 * after the dial that brought it has been closed.
 */
static __always_inline void accepted(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct flow_key there = {}, key = {};
	struct socket_tag *tag;
	struct flow_value *v;

	key.netns = bpf_get_netns_cookie(ctx);
	if (!protection(key.netns, ctx->local_port))
		return;
	ends_of(ctx, &there);
	key.src = there.dst;
	key.sport = there.dport;
	key.dst = there.src;
	key.dport = there.sport;
	key.proto = IPPROTO_TCP;
	v = bpf_map_lookup_elem(&flow, &key);
	if (!v || v->kind != FLOW_DIAL || !v->client_port)
		return;
	tag = bpf_sk_storage_get(&socket_tags, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!tag)
		return;
	tag->client = v->client;
	tag->client_port = v->client_port;
	tag->kind = FLOW_SERVED;
}

static __always_inline void count_listener(struct socket_tag *tag, __u64 ns, __u16 port, __u32 family)
{
	struct listening_key key = { .netns = ns, .port = port, .family = family == AF_INET ? 4 : 6 };
	__u32 zero = 0, *n;

	bpf_map_update_elem(&listening, &key, &zero, BPF_NOEXIST);
	n = bpf_map_lookup_elem(&listening, &key);
	if (!n)
		return;
	__sync_fetch_and_add(n, 1);
	tag->listens = 1;
	tag->key.netns = ns;
	tag->key.sport = port;
	tag->key.proto = key.family;
}

static __always_inline void uncount_listener(struct socket_tag *tag)
{
	struct listening_key key = { .netns = tag->key.netns, .port = tag->key.sport, .family = tag->key.proto };
	__u32 *n = bpf_map_lookup_elem(&listening, &key);

	tag->listens = 0;
	if (n && __sync_fetch_and_add(n, -1) == 1)
		bpf_map_delete_elem(&listening, &key);
}

static __always_inline void register_server(struct bpf_sock_ops *ctx, struct bpf_sock *sk, struct socket_tag *tag,
					    const struct who *maker, struct protected_value *p, __u64 ns)
{
	struct event e = {};

	if (!maker->known || maker->number != p->identity) {
		struct control_value *c = controls();

		e.hook = HOOK_LISTEN;
		e.netns = ns;
		e.cookie = bpf_get_socket_cookie(ctx);
		e.identity = maker->number;
		e.cgroup = tag ? tag->cgroup : 0;
		e.target = p->identity;
		e.sport = ctx->local_port;
		e.proto = IPPROTO_TCP;
		/* It listens, and steer gives it nothing. */
		if (c)
			refused(&e, REASON_BIND_GUARD, soften(p->mode, c));
		return;
	}
	for (__u32 i = 0; i < SERVER_SLOTS; i++) {
		__u32 slot = p->slot + i;

		if (!bpf_sock_map_update(ctx, &listeners, &slot, BPF_NOEXIST))
			return;
	}
	count(COUNT_SERVERS_FULL);
}

static __always_inline void listens(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct control_value *c = controls();
	__u64 ns = bpf_get_netns_cookie(ctx);
	__u16 port = ctx->local_port;
	struct protected_value *p;
	struct socket_tag *tag;
	struct who maker = {};

	if (!c)
		return;
	p = protection(ns, port);
	if (!p && port != c->port_outbound && port != c->port_inbound && port != c->port_tunnel)
		return;
	tag = bpf_sk_storage_get(&socket_tags, sk, NULL, 0);
	if (tag)
		creator(&maker, tag);
	if (p) {
		register_server(ctx, sk, tag, &maker, p, ns);
	} else if (tag && maker.known && maker.flags & IDENTITY_AGENT && !tag->listens) {
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
		count_listener(tag, ns, port, ctx->family);
	}
}

static __always_inline void closed(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct socket_tag *tag = bpf_sk_storage_get(&socket_tags, sk, NULL, 0);

	if (!tag)
		return;
	if (tag->listens)
		uncount_listener(tag);
	forget_flows(tag, bpf_get_socket_cookie(ctx));
}

SEC("sockops")
int track(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return 1;
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		opened(ctx, sk);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		accepted(ctx, sk);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		listens(ctx, sk);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ctx->args[1] == BPF_TCP_CLOSE)
			closed(ctx, sk);
		break;
	}
	return 1;
}

static __always_inline __u64 cgroup_id(struct cgroup *cgrp)
{
	struct kernfs_node *kn = NULL;
	__u64 id = 0;

	if (!core_read(kn, cgrp->kn) && kn)
		core_read(id, kn->id);
	return id;
}

/*
 * Sockets that were made before their cgroup had an identity get the tag
 * that sock_create would have given them: the kernel still knows the cgroup.
 */
SEC("iter/task_file")
int adopt(struct bpf_iter__task_file *ctx)
{
	struct file *file = ctx->file;
	struct cgroup *cgrp, *up;
	struct socket_tag *tag;
	struct socket *socket;
	struct who maker = {};
	struct sock *sk;
	__u64 id, first;
	__u16 family;

	if (!file)
		return 0;
	socket = bpf_sock_from_file(file);
	if (!socket)
		return 0;
	sk = socket->sk;
	if (!sk)
		return 0;
	family = sk->__sk_common.skc_family;
	if (family != AF_INET && family != AF_INET6)
		return 0;
	cgrp = sk->sk_cgrp_data.cgroup;
	if (!cgrp || bpf_sk_storage_get(&socket_tags, sk, NULL, 0))
		return 0;
	first = id = cgroup_id(cgrp);
	up = cgrp;
	for (int i = 0; id && i < MAX_LEVELS && !take(&maker, id, i > 0); i++) {
		struct cgroup_subsys_state *parent = NULL;

		/* A cgroup begins with its own state. */
		if (core_read(parent, up->self.parent) || !parent)
			return 0;
		up = (struct cgroup *)parent;
		id = cgroup_id(up);
	}
	if (!maker.known)
		return 0;
	tag = bpf_sk_storage_get(&socket_tags, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!tag)
		return 0;
	tag->cgroup = first;
	tag->owner = maker.owner;
	count(COUNT_ADOPTED);
	return 0;
}

/* Removes what sockops could not, and keeps the usage right. */
SEC("syscall")
int forget(struct forget_args *args)
{
	struct flow_key key = args->key;

	args->removed = remove_flow(&key, args->cookie);
	return 0;
}

/*
 * The peer to show: the original destination to a client whose connection
 * was rewritten, the true client to a server that the agent dialled.
 */
static __always_inline bool true_peer(struct bpf_sock_addr *ctx, struct address *addr, __u16 *port)
{
	struct socket_tag *tag = bpf_sk_storage_get(&socket_tags, ctx->sk, NULL, 0);

	if (!tag || ctx->protocol != IPPROTO_TCP)
		return false;
	if (tag->kind == FLOW_OUT) {
		*addr = tag->dst;
		*port = tag->dport;
		return true;
	}
	*addr = tag->client;
	*port = tag->client_port;
	return tag->kind == FLOW_SERVED;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct address addr;
	__u16 port;

	/* There is no room in it for a client that came over IPv6. */
	if (true_peer(ctx, &addr, &port) && is_mapped(&addr)) {
		ctx->user_ip4 = addr.word[3];
		ctx->user_port = htons(port);
	}
	return 1;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct address addr;
	__u16 port;

	if (true_peer(ctx, &addr, &port)) {
		ctx->user_ip6[0] = addr.word[0];
		ctx->user_ip6[1] = addr.word[1];
		ctx->user_ip6[2] = addr.word[2];
		ctx->user_ip6[3] = addr.word[3];
		ctx->user_port = htons(port);
	}
	return 1;
}

/*
 * A unit that is started again gets a new cgroup, and must be known before
 * its first process is in it. Exact paths only: below them, ancestors tell.
 */
SEC("tp_btf/cgroup_mkdir")
int cgroup_mkdir(__u64 *ctx)
{
	struct cgroup *cgrp = (struct cgroup *)ctx[0];
	struct path_key key = {};
	struct identity_value *v;
	__u64 id;
	long n;

	if (cgrp->root->hierarchy_id != 0)
		return 0;
	n = bpf_probe_read_kernel_str(key.path, sizeof(key.path), (const void *)ctx[1]);
	if (n <= 0 || n >= PATH_SIZE)
		return 0;
	v = bpf_map_lookup_elem(&identity_by_path, &key);
	if (!v)
		return 0;
	id = cgrp->kn->id;
	if (bpf_map_update_elem(&identity_by_cgroup, &id, v, BPF_ANY))
		count(REASON_MAP_FULL);
	return 0;
}
