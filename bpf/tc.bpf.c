/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
//go:build ignore

/*
 * The backstop and the samples, on the interfaces that are configured. One
 * instance an attachment.
 */
#include "include/parse.h"

/* Whether frames begin with an Ethernet header. */
const volatile bool ethernet = true;

/* Whether this direction takes samples: on lo each packet passes both. */
const volatile bool sampling = true;

static __always_inline enum parsed parse(struct __sk_buff *skb, struct packet *p)
{
	__u32 off = ethernet ? sizeof(struct ethhdr) : 0;
	__u16 proto = ntohs(skb->protocol);

	p->key.netns = netns_cookie;
	if (proto == ETH_P_IP)
		return parse_ip4(skb, p, off);
	if (proto == ETH_P_IPV6)
		return parse_ip6(skb, p, off);
	return proto == ETH_P_ARP ? PARSED_OTHER : PARSED_UNREADABLE;
}

static __always_inline void sender(struct who *w, struct __sk_buff *skb, const struct control_value *c, __u64 *cgroup)
{
	__u64 id = bpf_skb_cgroup_id(skb);

	*cgroup = id;
	if (!id || take(w, id, false))
		return;
	for (int level = MAX_LEVELS - 1; level > 0; level--) {
		if (!(c->levels & (1U << level)))
			continue;
		id = bpf_skb_ancestor_cgroup_id(skb, level);
		if (id && take(w, id, true))
			return;
	}
}

/*
 * What connect never saw has no flow entry: a hook that is detached, a
 * packet socket, a ring that was inherited. True: drop it.
 */
static __always_inline bool untagged(struct __sk_buff *skb, const struct control_value *c, struct packet *p,
				     bool readable, bool confined)
{
	struct event e = {};
	struct who me = {};

	sender(&me, skb, c, &e.cgroup);
	if (!me.known && !e.cgroup && confined)
		me.mode = MODE_ENFORCE;
	else if (!me.known || me.flags & IDENTITY_AGENT)
		return false;
	e.identity = me.number;
	if (readable) {
		if (bpf_map_lookup_elem(&flow, &p->key))
			return false;
		e.target = server_of(p->key.netns, &p->key.dst, p->key.dport);
		/* What is only watched connect has told of. */
		if (!e.target && (!(me.flags & IDENTITY_EGRESS_DENY) || soften(me.mode, c) != MODE_ENFORCE))
			return false;
		if (!e.target && egress_to(e.identity, IPPROTO_TCP, &p->key.dst, p->key.dport) == EGRESS_LEAVE)
			return false;
	}
	e.hook = HOOK_EGRESS;
	e.netns = p->key.netns;
	e.src = p->key.src;
	e.dst = p->key.dst;
	e.sport = p->key.sport;
	e.dport = p->key.dport;
	e.proto = p->key.proto;
	return refused(&e, REASON_UNTAGGED, soften(me.mode, c));
}

static __always_inline void fill(struct __sk_buff *skb, struct sample *s, const struct packet *p, __u64 now, __u8 flags)
{
	struct flow_value *v = bpf_map_lookup_elem(&flow, &p->key);

	__builtin_memset(s, 0, sizeof(*s));
	s->time = now;
	s->netns = p->key.netns;
	s->src = p->key.src;
	s->dst = p->key.dst;
	s->sport = p->key.sport;
	s->dport = p->key.dport;
	s->payload = p->length;
	s->ifindex = skb->ifindex;
	s->flags = flags;
	if (v) {
		s->identity = v->identity;
		s->kind = v->kind;
	}
}

/* The request's metadata: never its query, a header but Host, or its body. */
static __noinline int take_sample(struct __sk_buff *skb, struct packet *p, __u8 flags)
{
	struct control_value *c = controls();
	struct http h = {};
	__u32 zero = 0, n, last;
	__u8 *spent, first = 1, taken = SAMPLE_ATTEMPTS;
	struct window *budget;
	struct scratch *w;
	__u64 now;

	if (!c || !p)
		return 0;
	spent = bpf_map_lookup_elem(&sampled, &p->key);
	if (spent && *spent >= SAMPLE_ATTEMPTS)
		return 0;
	budget = bpf_map_lookup_elem(&sample_window, &zero);
	w = bpf_map_lookup_elem(&scratch, &zero);
	if (!budget || !w)
		return 0;
	now = bpf_ktime_get_boot_ns();
	if (!within_limit(budget, now, c->sample_budget)) {
		count(COUNT_SAMPLES_LIMITED);
		return 0;
	}
	/* Before it is parsed: a request line that never ends costs as much. */
	if (spent)
		*spent += 1;
	else
		bpf_map_update_elem(&sampled, &p->key, &first, BPF_ANY);
	n = p->length;
	if (n > SAMPLE_BYTES)
		n = SAMPLE_BYTES;
	/* Before Linux 6.8 the verifier learns nothing from n != 0. */
	last = n - 1;
	barrier_var(last);
	if (last >= SAMPLE_BYTES || bpf_skb_load_bytes(skb, p->payload, w->bytes, last + 1))
		return 0;
	fill(skb, &w->sample, p, now, flags);
	h.length = n;
	bpf_loop(SAMPLE_BYTES, http_byte, &h, 0);
	if (h.state < HTTP_LINE)
		return 0;
	/* One sample a flow: what was taken is not asked for again. */
	bpf_map_update_elem(&sampled, &p->key, &taken, BPF_ANY);
	if (bpf_ringbuf_output(&samples, &w->sample, sizeof(w->sample), 0))
		count(COUNT_SAMPLES_LOST);
	else
		count(COUNT_SAMPLES);
	return 0;
}

static __always_inline void look(struct __sk_buff *skb, struct packet *p, __u8 flags)
{
	__u8 first[4];

	if (p->flags & (TCP_SYN | TCP_FIN | TCP_RST)) {
		/* The next flow with this tuple is another one. */
		bpf_map_delete_elem(&sampled, &p->key);
		return;
	}
	if (p->length >= 16 && !bpf_skb_load_bytes(skb, p->payload, first, sizeof(first)) && begins_request(first))
		take_sample(skb, p, flags);
}

static __always_inline int outgoing(struct __sk_buff *skb, bool confined)
{
	struct control_value *c = controls();
	struct packet p = {};

	if (!c)
		return TCX_NEXT;
	switch (parse(skb, &p)) {
	case PARSED_UNREADABLE:
		return untagged(skb, c, &p, false, confined) ? TCX_DROP : TCX_NEXT;
	case PARSED_OTHER:
		return TCX_NEXT;
	case PARSED_TCP:
		break;
	}
	if ((p.flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN && untagged(skb, c, &p, true, confined))
		return TCX_DROP;
	if (sampling)
		look(skb, &p, 0);
	return TCX_NEXT;
}

static __always_inline int incoming(struct __sk_buff *skb)
{
	struct packet p = {};

	if (sampling && parse(skb, &p) == PARSED_TCP)
		look(skb, &p, SAMPLE_INGRESS);
	return TCX_NEXT;
}

/* An interface in the netns of the workloads. */
SEC("tcx/egress")
int tc_egress(struct __sk_buff *skb)
{
	return outgoing(skb, false);
}

SEC("tcx/ingress")
int tc_ingress(struct __sk_buff *skb)
{
	return incoming(skb);
}

/* The host side of a workload's veth: what leaves the workload comes in
 * there, without its socket. */
SEC("tcx/ingress")
int tc_confined(struct __sk_buff *skb)
{
	return outgoing(skb, true);
}

SEC("tcx/egress")
int tc_deliver(struct __sk_buff *skb)
{
	return incoming(skb);
}
