/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* How does a packet from the wire become a segment of its flow's socket? One function per framing, on the ingress of an interface. */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "access.h"
#include "checksum.h"
#include "consts.h"
#include "encapsulation.h"
#include "maps.h"
#include "native.h"
#include "structs.h"
#include "tcp_checksum.h"

/* The ports of the virtual tuple as they arrive. Network order puts the source first: the flowID's low half, then our one local port. */
static __always_inline __be32 virtual_ports(__be32 id)
{
	return bpf_htonl(bpf_ntohl(id) << 16 | bpf_ntohs(virtual_network.local_port));
}

/* The remote address of the virtual tuple. */
static __always_inline __be32 virtual_remote(__be32 id)
{
	return virtual_network.remote_network | bpf_htonl(bpf_ntohl(id) >> 16);
}

/* The MAC address of serval0: dataplane/devices.py gives it. */
static __always_inline void address_to_anchor(struct ethhdr *ethernet)
{
	static const __u8 anchor[ETH_ALEN] = { 0x02, 0x53, 0x41, 0x4c, 0, 0 };

	__builtin_memcpy(ethernet->h_dest, anchor, ETH_ALEN);
}

/* Give a segment the virtual tuple of its flow's socket, and the MAC address of serval0. Its TCP checksum is not touched. */
static __always_inline void address_to_socket(struct ethhdr *ethernet, struct iphdr *ip, struct tcphdr *tcp, __be32 id)
{
	ip->saddr = virtual_remote(id);
	ip->daddr = virtual_network.local_address;
	ip->check = 0;
	ip->check = ipv4_checksum(ip);
	*(__be32 *)tcp = virtual_ports(id);
	address_to_anchor(ethernet);
}

/* What a segment of the peer says that others than the socket want to know. `length`: of the IP packet. */
static __always_inline void note_arrival(__be32 id, struct flow *flow, struct flow_state *state,
					 const struct tcphdr *tcp, __u32 length)
{
	__u32 acknowledged = bpf_ntohl(tcp->ack_seq);

	if (tcp->ack) {
		if (state->fin_sent && !state->fin_acknowledged && acknowledged == state->fin_end) {
			state->fin_acknowledged = 1;
			tell(id, EVENT_FIN_ACKNOWLEDGED);
		}
		if (flow->flags & FLOW_NATIVE)
			prove_native(id, flow, state, acknowledged);
	}
	if (tcp->fin)
		state->fin_received = 1;
	__sync_fetch_and_add(&state->in.packets, 1);
	__sync_fetch_and_add(&state->in.bytes, length);
}

/*
 * TCP on the ingress of an interface: what comes to a native port of a flow goes to its socket as it is, superpackets included.
 * What has our port and is not the flow's is none of our business: this host may forward it, or its NAT have chosen that port.
 */
static __always_inline int receive_native(struct __sk_buff *skb, void *data, void *end)
{
	const __u32 needed = ETHERNET_BYTES + IPV4_BYTES + TCP_BYTES;

	if (!has_bytes(skb, &data, &end, needed))
		return TC_ACT_UNSPEC;
	struct tcphdr *tcp = data + ETHERNET_BYTES + IPV4_BYTES;
	__u32 port = bpf_ntohs(tcp->dest);
	struct native_port *ours = bpf_map_lookup_elem(&native_ports, &port);
	if (!ours || !ours->reserved)
		return TC_ACT_UNSPEC;
	__be32 id = ours->flow;
	struct flow *flow = bpf_map_lookup_elem(&flows, &id);
	if (!flow)
		return drop(DROP_IN_NATIVE_UNKNOWN);
	struct iphdr *ip = data + ETHERNET_BYTES;
	if (tcp->source != flow->native_peer_port ||
	    (ip->saddr != flow->peer_address && ip->saddr != flow->other_peer_address) ||
	    (ip->daddr != flow->local_address && ip->daddr != flow->other_local_address))
		return TC_ACT_UNSPEC;
	struct flow_state *state = bpf_map_lookup_elem(&flow_states, &flow->slot);
	if (!state)
		return drop(DROP_IN_NATIVE_UNKNOWN);
	/* Two ports are no proof of who sent a reset, and that of a peer comes with a SAL header. */
	if (tcp->rst || tcp->syn)
		return drop(DROP_IN_NATIVE_RESET);

	__u32 segments = skb->gso_segs ? skb->gso_segs : 1;
	__u32 headers = IPV4_BYTES + tcp->doff * 4;
	state->peer_in_sal = 0;
	note_arrival(id, flow, state, tcp, skb->len - ETHERNET_BYTES + (segments - 1) * headers);
	if (segments > 1)
		__sync_fetch_and_add(&state->in.packets, segments - 1);

	__u64 difference = address_difference(ip->saddr, ip->daddr, virtual_remote(id), virtual_network.local_address);
	__be32 old_ports = *(__be32 *)tcp;

	address_to_socket(data, ip, tcp, id);
	replace_tcp_checksum(skb, tcp, old_ports, virtual_ports(id), difference);
	return bpf_redirect(virtual_network.anchor_ifindex, BPF_F_INGRESS);
}

/*
 * Data behind a SAL header on the ingress of an interface: that of known flows goes to its socket. `outer_bytes` of UDP header come
 * before the SAL header.
 */
static __always_inline int receive_behind_header(struct __sk_buff *skb, void *data, void *end, const __u32 outer_bytes)
{
	const __u32 header_bytes = outer_bytes + SAL_HEADER_BYTES;
	const __u32 needed = ETHERNET_BYTES + IPV4_BYTES + header_bytes + TCP_BYTES;

	if (!has_bytes(skb, &data, &end, needed))
		return TC_ACT_UNSPEC;
	struct iphdr *ip = data + ETHERNET_BYTES;
	struct sal_header *sal = data + ETHERNET_BYTES + IPV4_BYTES + outer_bytes;
	if (sal->length_words != SAL_HEADER_WORDS || sal->protocol != IPPROTO_TCP)
		return TC_ACT_UNSPEC; /* control, or not ours: user space's business */

	__be32 id = sal->destination_flow;
	struct flow *flow = bpf_map_lookup_elem(&flows, &id);
	if (!flow || (flow->flags & FLOW_EXPECTED))
		return TC_ACT_UNSPEC;
	/* All 12 bytes are known in advance, checksum included: anything else is forged or damaged. */
	if (sal->source_flow != flow->header_in.source_flow || sal->checksum != flow->header_in.checksum)
		return drop(DROP_IN_WRONG_HEADER);
	struct flow_state *state = bpf_map_lookup_elem(&flow_states, &flow->slot);
	if (!state)
		return drop(DROP_IN_WRONG_HEADER);

	__u32 length = bpf_ntohs(ip->tot_len), translated = 0;
	if (length < IPV4_BYTES + header_bytes + TCP_BYTES)
		return drop(DROP_IN_TRUNCATED);
	if (outer_bytes) {
		struct udphdr *udp = data + ETHERNET_BYTES + IPV4_BYTES;

		if (bpf_ntohs(udp->len) != length - IPV4_BYTES)
			return drop(DROP_IN_TRUNCATED);
		translated = translation_difference(ip, udp, length - IPV4_BYTES - header_bytes);
		note_translation(flow, state, ip, udp, translated);
		note_source(id, flow, state, ip->saddr, udp->source);
	}
	struct tcphdr *tcp = data + ETHERNET_BYTES + IPV4_BYTES + header_bytes;
	if ((flow->flags & FLOW_NATIVE) && state->peer_in_sal < NATIVE_FOLLOW &&
	    length > IPV4_BYTES + header_bytes + tcp->doff * 4)
		state->peer_in_sal++;
	note_arrival(id, flow, state, tcp, length);

	__u64 difference = address_difference(ip->saddr, ip->daddr, virtual_remote(id), virtual_network.local_address) + translated;
	__be32 old_ports = *(__be32 *)tcp;

	difference = (difference & 0xffffffff) + (difference >> 32);
	if (bpf_skb_adjust_room(skb, -(__s32)header_bytes, BPF_ADJ_ROOM_NET,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET))
		return drop(DROP_IN_STRIP_FAILED);
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (data + ETHERNET_BYTES + IPV4_BYTES + TCP_BYTES > end)
		return drop(DROP_IN_STRIP_FAILED);

	ip = data + ETHERNET_BYTES;
	tcp = data + ETHERNET_BYTES + IPV4_BYTES;
	ip->protocol = IPPROTO_TCP;
	ip->tot_len = bpf_htons(length - header_bytes);
	address_to_socket(data, ip, tcp, id);
	replace_tcp_checksum(skb, tcp, old_ports, virtual_ports(id), difference);
	return bpf_redirect(virtual_network.anchor_outer_ifindex, 0);
}

/* UDP on the ingress of an interface: encapsulated data. All else goes to the sockets that have the port. */
static __always_inline int receive_encapsulated(struct __sk_buff *skb, void *data, void *end)
{
	struct udphdr udp;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES + IPV4_BYTES, &udp, sizeof(udp)))
		return TC_ACT_UNSPEC;
	if (udp.dest != bpf_htons(ENCAPSULATION_CLIENT_PORT) && udp.dest != bpf_htons(ENCAPSULATION_SERVER_PORT))
		return TC_ACT_UNSPEC;
	return receive_behind_header(skb, data, end, UDP_BYTES);
}
