/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/*
 * When and how does data travel as plain TCP/IP? Framing `native`: superpackets stay whole, between two ports that stand for the
 * two flowIDs. It is a choice of the sender, segment by segment; the receiver takes either framing at any time.
 *
 * Whoever opened the flow begins in framing sal and goes over when the first packet of the peer has come: until then the peer may
 * not have a socket yet, and only sal data is passed up to complete the handshake. What has to be repeated before anything
 * native has got through is repeated in framing sal, so a path that does not pass native data costs one timeout and no more.
 * Loss looks the same, and a path may begin to pass what it did not: now and then one segment tries again, at growing intervals.
 */
#pragma once

#include "access.h"
#include "checksum.h"
#include "consts.h"
#include "maps.h"
#include "serial.h"
#include "structs.h"
#include "tcp_checksum.h"

#define NATIVE_DOUBTS 2	 /* from then on all is sent in framing sal, until native data turns out to have got through */
#define NATIVE_REPEATS 3 /* a segment that is repeated so often in a row puts a proved path into doubt */
#define NATIVE_FOLLOW 2	 /* a peer that has sent so many data segments in framing sal gets that as well */
#define NATIVE_RETRY_S 4 /* after so long one segment tries again, then after twice as long each time, up to */
#define NATIVE_RETRIES_MAX 7 /* so many doublings */
#define NS_PER_S 1000000000ULL

/* Whether a flow that sends in framing sal may let [seq, end), which was not sent before, try native data again. */
static __always_inline int tries_again(struct flow_state *state, __u32 seq, __u32 end)
{
	__u32 now_s = bpf_ktime_get_coarse_ns() / NS_PER_S;

	if (seq == end || state->native_probing)
		return 0;
	if (!state->native_retry_s) {
		state->native_retry_s = now_s + NATIVE_RETRY_S;
		return 0;
	}
	if (is_before(now_s, state->native_retry_s))
		return 0;
	if (state->native_retries < NATIVE_RETRIES_MAX)
		state->native_retries++;
	state->native_retry_s = now_s + (NATIVE_RETRY_S << state->native_retries);
	state->probe_began = seq;
	state->probe_end = end;
	state->native_probing = 1;
	return 1;
}

/* Whether the segment [seq, end) is to be sent natively. Sequence numbers in host order. */
static __always_inline int goes_native(__be32 id, struct flow *flow, struct flow_state *state, __u32 seq, __u32 end,
				       __u8 flags)
{
	int repeated = is_before(seq, state->sent_before);

	if (state->path_number != flow->path_number) {
		state->path_number = flow->path_number;
		state->native_proved = 0;
		state->native_doubts = 0;
		state->native_repeats = 0;
		state->peer_in_sal = 0;
		state->native_retry_s = 0;
		state->native_retries = 0;
		state->native_probing = 0;
		state->sal_sent_end = state->sent_before;
		state->native_began = state->sent_before;
	}
	if (repeated && is_before(seq, state->probe_end) && is_before(state->probe_began, end))
		state->native_probing = 0; /* in vain; or if not, nobody will know */
	if (!state->in.packets || state->peer_in_sal >= NATIVE_FOLLOW) {
		if (state->in.packets && !repeated && !(flags & TCP_FLAG_RST) && tries_again(state, seq, end))
			return 1;
		if (is_before(state->native_began, end))
			state->native_began = end;
		goto in_sal;
	}
	/* A reset ends a connection, and ports are all it would take to forge one: it keeps its SAL header. */
	if (flags & TCP_FLAG_RST)
		goto in_sal;
	if (!repeated)
		goto decided;
	if (seq == end)
		goto in_sal; /* a probe or keepalive: whether it gets through matters more than what it costs */
	if (!state->native_proved) {
		/*
		 * Data that took the old path is late, or lost, because of that. Data behind a SAL header takes longer through the
		 * hosts, so native data overtakes it, and what the socket then repeats says nothing of native data either.
		 */
		if (!is_before(seq, state->native_began) && state->native_doubts < NATIVE_DOUBTS && !state->native_doubts++)
			tell(id, EVENT_NATIVE_DOUBTED);
		goto in_sal;
	}
	if (seq != state->native_repeated) {
		state->native_repeated = seq;
		state->native_repeats = 0;
	} else if (++state->native_repeats >= NATIVE_REPEATS) {
		state->native_proved = 0;
		state->native_doubts = 1;
		state->sal_sent_end = state->sent_end;
		tell(id, EVENT_NATIVE_DOUBTED);
		return 0;
	}
decided:
	if (state->native_proved || state->native_doubts < NATIVE_DOUBTS || (!repeated && tries_again(state, seq, end)))
		return 1;
in_sal:
	if (is_before(state->sal_sent_end, end))
		state->sal_sent_end = end;
	return 0;
}

/* Send what the kernel's TCP made, superpackets included, as TCP between the two ends' own addresses and ports. */
static __always_inline int send_native(struct __sk_buff *skb, struct flow *flow, struct iphdr *ip, struct tcphdr *tcp)
{
	__u64 difference = address_difference(ip->saddr, ip->daddr, flow->local_address, flow->peer_address);
	struct ethhdr *ethernet = (void *)ip - ETHERNET_BYTES;
	__be32 old_ports = *(__be32 *)tcp, new_ports = *(__be32 *)&flow->native_local_port;

	ip->saddr = flow->local_address;
	ip->daddr = flow->peer_address;
	ip->check = 0;
	ip->check = ipv4_checksum(ip);
	*(__be32 *)tcp = new_ports;
	__builtin_memcpy(ethernet->h_dest, flow->neighbour_mac, sizeof(flow->neighbour_mac));
	__builtin_memcpy(ethernet->h_source, flow->own_mac, sizeof(flow->own_mac));
	replace_tcp_checksum(skb, tcp, old_ports, new_ports, difference);
	if (flow->flags & FLOW_NEIGHBOUR_KNOWN)
		return bpf_redirect(flow->ifindex, 0);
	return redirect_to_next_hop(flow);
}

/* An acknowledgement has come: does it show that native data of ours got through? */
static __always_inline void prove_native(__be32 id, struct flow *flow, struct flow_state *state, __u32 acknowledged)
{
	int probed = state->native_probing && !is_before(acknowledged, state->probe_end);

	if (probed)
		state->native_probing = 0;
	if (state->native_proved || (!probed && !is_before(state->sal_sent_end, acknowledged)) ||
	    is_before(state->sent_end, acknowledged) || state->path_number != flow->path_number)
		return;
	state->native_proved = 1;
	if (state->native_doubts || (flow->flags & FLOW_TELL_PROOF))
		tell(id, EVENT_NATIVE_PROVED);
	state->native_doubts = 0;
}
