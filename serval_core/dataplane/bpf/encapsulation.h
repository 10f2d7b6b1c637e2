/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* How does data travel inside UDP (SPEC 8)? A UDP header before the SAL header, and its checksum without reading the payload. */
#pragma once

#include <linux/udp.h>
#include "checksum.h"
#include "consts.h"
#include "frames.h"
#include "maps.h"

/*
 * The outer checksum of a packet whose SAL header and TCP segment have correct checksums of their own: the SAL header sums up to
 * nothing, the segment to the complement of its pseudo header, and that is the same as the outer one but for protocol and length.
 */
static __always_inline __sum16 outer_checksum(__be16 source, __be16 destination, __u32 segment_bytes)
{
	__u32 udp_bytes = UDP_BYTES + SAL_HEADER_BYTES + segment_bytes;
	__u32 sum = bpf_ntohs(source) + bpf_ntohs(destination) + 2 * udp_bytes + IPPROTO_UDP - IPPROTO_TCP - segment_bytes;
	__u16 checksum = ~fold(sum);

	return bpf_htons(checksum ? checksum : 0xffff);
}

/*
 * What the checksum of a TCP segment lacks because a NAT has changed the addresses that it covers, by the outer checksum, which
 * NATs correct: 0 or its other form when nothing was changed, or when the sender has left the outer checksum out.
 */
static __always_inline __u32 translation_difference(const struct iphdr *ip, const struct udphdr *udp, __u32 segment_bytes)
{
	__u32 sum;

	if (!udp->check)
		return 0;
	sum = bpf_ntohs(udp->source) + bpf_ntohs(udp->dest) + 2 * bpf_ntohs(udp->len) + bpf_ntohs(udp->check) +
	      IPPROTO_UDP - IPPROTO_TCP - segment_bytes;
	return bpf_htons(~fold(sum));
}

/*
 * Takes note of whether a NAT is on the way. A packet whose inner checksum is still partial has a right outer one all the same, but a
 * NAT on the same machine (of the host of a virtual machine, say) would correct it as if it were partial, too. So where there
 * is one, checksums are finished before. A peer that leaves the outer checksum out shows nothing.
 */
static __always_inline void note_translation(const struct flow *flow, struct flow_state *state, const struct iphdr *ip,
					     const struct udphdr *udp, __u32 difference)
{
	__u32 untranslated = udp->check && (!difference || difference == 0xffff) ? flow->path_number + 1 : 0;

	/* What was on its way when the flow moved says nothing about the new path. */
	if (untranslated != state->untranslated && ip->daddr == flow->local_address)
		state->untranslated = untranslated;
}

/* Whether the segments of a flow have to leave with finished checksums. What is `repeated` gets one: a guess must not cost the flow. */
static __always_inline int needs_finished_checksum(const struct flow *flow, const struct flow_state *state, int repeated)
{
	if (flow->flags & FLOW_COMPLETE_THROUGH_NAT)
		return repeated || state->untranslated != flow->path_number + 1;
	return flow->flags & FLOW_COMPLETE_CHECKSUM;
}

/* Whether a peer is where we send to. If not, user space is told, once for each place. */
static __always_inline void note_source(__be32 id, struct flow *flow, struct flow_state *state, __be32 address, __be16 port)
{
	if (!flow->outer_local_port || (address == flow->peer_address && port == flow->outer_peer_port) ||
	    (address == state->seen_address && port == state->seen_port))
		return;
	state->seen_address = address;
	state->seen_port = port;
	tell_of_address(id, EVENT_PEER_SEEN, address, port);
}

/* serval_insert for a frame with UDP encapsulation. Returns the flowID, 0 when there is no such frame. */
static __always_inline __be32 insert_outer(struct __sk_buff *skb)
{
	struct encapsulated_waiting_frame *waiting = (void *)(long)skb->data;
	struct encapsulated_wire_frame *wire = (void *)waiting;

	if ((void *)(waiting + 1) > (void *)(long)skb->data_end)
		return 0;
	struct udphdr udp = waiting->udp;
	struct sal_header sal = waiting->sal;
	struct iphdr ip = waiting->ip;
	__u32 segment_bytes = bpf_ntohs(ip.tot_len) - IPV4_BYTES;
	const __u32 more = UDP_BYTES + SAL_HEADER_BYTES;

	ip.protocol = IPPROTO_UDP;
	ip.tot_len = bpf_htons(bpf_ntohs(ip.tot_len) + more);
	ip.check = ~fold((__u16)~ip.check + bpf_htons(more) + bpf_htons(IPPROTO_UDP - IPPROTO_TCP));
	udp.len = bpf_htons(more + segment_bytes);
	udp.check = outer_checksum(udp.source, udp.dest, segment_bytes);
	wire->ip = ip;
	wire->udp = udp;
	wire->sal = sal;
	return sal.source_flow;
}
