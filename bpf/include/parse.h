/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Packets and the first line of requests, read without trusting a length.
 */
#ifndef SALLYPORT_PARSE_H
#define SALLYPORT_PARSE_H

#include "state.h"

enum parsed {
	PARSED_OTHER, /* not ours to judge: ARP, UDP, later fragments */
	PARSED_TCP,
	PARSED_UNREADABLE, /* hides its transport header or its destination */
};

struct packet {
	struct flow_key key;
	__u32 payload; /* offset */
	__u32 length; /* of the payload */
	__u8 flags; /* of TCP */
};

#define IP_OFFSET_MASK 0x1fff
#define IP_MORE 0x2000

static __always_inline enum parsed parse_tcp(struct __sk_buff *skb, struct packet *p, __u32 off, __u32 end)
{
	struct tcphdr tcp;
	__u32 header;

	if (bpf_skb_load_bytes(skb, off, &tcp, sizeof(tcp)))
		return PARSED_UNREADABLE;
	header = (tcp.doff >> 4) * 4;
	if (header < sizeof(tcp) || off + header > end)
		return PARSED_UNREADABLE;
	p->key.sport = ntohs(tcp.source);
	p->key.dport = ntohs(tcp.dest);
	p->key.proto = IPPROTO_TCP;
	p->flags = tcp.flags;
	p->payload = off + header;
	p->length = end - p->payload;
	return PARSED_TCP;
}

static __always_inline enum parsed parse_ip4(struct __sk_buff *skb, struct packet *p, __u32 off)
{
	__u32 header, end;
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, off, &ip, sizeof(ip)))
		return PARSED_UNREADABLE;
	header = (ip.version_ihl & 15) * 4;
	if (ip.version_ihl >> 4 != 4 || header < sizeof(ip))
		return PARSED_UNREADABLE;
	if (ip.protocol != IPPROTO_TCP || ntohs(ip.frag_off) & IP_OFFSET_MASK)
		return PARSED_OTHER;
	/* Segments that the kernel made too long for the field say 0. */
	end = off + (ip.tot_len ? ntohs(ip.tot_len) : skb->len - off);
	if (end > skb->len)
		return PARSED_UNREADABLE;
	/* A source route has another destination than the header says. */
	if (header > sizeof(ip)) {
		__u8 options[40];

		if (header != sizeof(ip) + 4 || bpf_skb_load_bytes(skb, off + sizeof(ip), options, 4))
			return PARSED_UNREADABLE;
		if (options[0] != 0 && options[0] != 1 && options[0] != 148)
			return PARSED_UNREADABLE;
	}
	p->key.src = address4(ip.saddr);
	p->key.dst = address4(ip.daddr);
	return parse_tcp(skb, p, off + header, end);
}

enum {
	NEXT_HOP = 0,
	NEXT_FRAGMENT = 44,
	NEXT_DEST = 60,
};

static __always_inline enum parsed parse_ip6(struct __sk_buff *skb, struct packet *p, __u32 off)
{
	struct ipv6hdr ip;
	__u8 next, extension[8];
	__u32 end;

	if (bpf_skb_load_bytes(skb, off, &ip, sizeof(ip)) || (ip.version_flow & htonl(0xf0000000)) != htonl(0x60000000))
		return PARSED_UNREADABLE;
	end = ip.payload_len ? off + sizeof(ip) + ntohs(ip.payload_len) : skb->len;
	if (end > skb->len)
		return PARSED_UNREADABLE;
	for (int i = 0; i < 4; i++) {
		p->key.src.word[i] = ip.saddr[i];
		p->key.dst.word[i] = ip.daddr[i];
	}
	next = ip.nexthdr;
	off += sizeof(ip);
	for (int i = 0; i < 4; i++) {
		if (next == IPPROTO_TCP)
			return parse_tcp(skb, p, off, end);
		if (next == IPPROTO_UDP || next == IPPROTO_ICMPV6)
			return PARSED_OTHER;
		if (next != NEXT_HOP && next != NEXT_DEST && next != NEXT_FRAGMENT)
			return PARSED_UNREADABLE;
		if (bpf_skb_load_bytes(skb, off, extension, sizeof(extension)))
			return PARSED_UNREADABLE;
		if (next == NEXT_FRAGMENT && ((extension[2] << 8 | extension[3]) & 0xfff8))
			return PARSED_OTHER;
		off += next == NEXT_FRAGMENT ? 8 : (extension[1] + 1) * 8;
		next = extension[0];
	}
	return PARSED_UNREADABLE;
}

enum http_state {
	HTTP_METHOD,
	HTTP_PATH,
	HTTP_LINE, /* rest of the line */
	HTTP_NAME, /* of a header, as far as it is "host:" */
	HTTP_HOST,
	HTTP_END,
};

struct http {
	__u32 length;
	__u8 state;
	__u8 matched; /* characters of "host:" */
};

static __always_inline bool host_name_char(__u8 matched, __u8 b)
{
	b |= matched < 4 ? 0x20 : 0;
	switch (matched) {
	case 0:
		return b == 'h';
	case 1:
		return b == 'o';
	case 2:
		return b == 's';
	case 3:
		return b == 't';
	}
	return b == ':';
}

static __always_inline void http_path(struct http *h, struct sample *s, __u8 b)
{
	__u32 n = s->path_len;

	/* What may hold a secret is not kept: a query, a parameter of the path
	 * (a session), the user and password of an absolute form. */
	if (b == ' ' || b == '?' || b == ';' || b == '\r' || b == '\n' || (n == 0 && b != '/' && b != '*')) {
		h->state = b == '\n' ? HTTP_NAME : HTTP_LINE;
	} else if (n < SAMPLE_PATH) {
		barrier_var(n);
		s->path[n & (SAMPLE_PATH - 1)] = b;
		s->path_len = n + 1;
	} else {
		s->flags |= SAMPLE_PATH_CUT;
	}
}

static __always_inline void http_host(struct http *h, struct sample *s, __u8 b)
{
	__u32 n = s->host_len;

	if (b == '\r' || b == '\n') {
		h->state = HTTP_END;
	} else if (n < SAMPLE_HOST) {
		if (n == 0 && (b == ' ' || b == '\t'))
			return;
		barrier_var(n);
		s->host[n & (SAMPLE_HOST - 1)] = b;
		s->host_len = n + 1;
	} else {
		s->flags |= SAMPLE_HOST_CUT;
	}
}

/* One byte a call; bpf_loop bounds it. Returns 1 at the end. */
static long http_byte(__u32 i, struct http *h)
{
	__u32 zero = 0;
	struct scratch *w = bpf_map_lookup_elem(&scratch, &zero);
	struct sample *s;
	__u32 n;
	__u8 b;

	if (!w || i >= SAMPLE_BYTES || i >= h->length)
		return 1;
	s = &w->sample;
	b = w->bytes[i];
	switch (h->state) {
	case HTTP_METHOD:
		if (b == ' ')
			h->state = HTTP_PATH;
		else if (b < 'A' || b > 'Z' || s->method_len >= SAMPLE_METHOD)
			return 1;
		else {
			n = s->method_len++;
			barrier_var(n);
			s->method[n & (SAMPLE_METHOD - 1)] = b;
		}
		break;
	case HTTP_PATH:
		http_path(h, s, b);
		break;
	case HTTP_LINE:
		if (b == '\n') {
			h->state = HTTP_NAME;
			h->matched = 0;
		}
		break;
	case HTTP_NAME:
		if (h->matched == 0 && (b == '\r' || b == '\n')) {
			h->state = HTTP_END;
		} else if (!host_name_char(h->matched, b)) {
			h->state = b == '\n' ? HTTP_NAME : HTTP_LINE;
			h->matched = 0;
		} else if (++h->matched == 5) {
			h->state = HTTP_HOST;
		}
		break;
	case HTTP_HOST:
		http_host(h, s, b);
		break;
	default:
		return 1;
	}
	return 0;
}

/* Whether four bytes may begin a request of HTTP/1: a filter, not a parser. */
static __always_inline bool begins_request(const __u8 *b)
{
	switch (b[0] << 24 | b[1] << 16 | b[2] << 8 | b[3]) {
	case 'G' << 24 | 'E' << 16 | 'T' << 8 | ' ':
	case 'P' << 24 | 'U' << 16 | 'T' << 8 | ' ':
	case 'P' << 24 | 'O' << 16 | 'S' << 8 | 'T':
	case 'H' << 24 | 'E' << 16 | 'A' << 8 | 'D':
	case 'P' << 24 | 'A' << 16 | 'T' << 8 | 'C':
	case 'D' << 24 | 'E' << 16 | 'L' << 8 | 'E':
	case 'O' << 24 | 'P' << 16 | 'T' << 8 | 'I':
	case 'C' << 24 | 'O' << 16 | 'N' << 8 | 'N':
	case 'T' << 24 | 'R' << 16 | 'A' << 8 | 'C':
		return true;
	}
	return false;
}

#endif
