// SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only)
/*
 * The SAL's data plane: kernel TCP segments become data packets of Serval flows, and back. See ARCHITECTURE.md, "Data plane".
 *
 *   socket -> serval0 egress [serval_out] -> seg0 or sum0 (segmentation) -> sum1 [serval_insert] -> wire
 *   wire ingress [serval_in] -> serval1 -> serval0 -> socket
 *
 * and, in framing native, socket -> serval0 egress [serval_out] -> wire ingress [serval_in] -> serval0 -> socket.
 *   raw socket [serval_control]: what user space gets to see
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "consts.h"
#include "structs.h"
#include "maps.h"
#include "access.h"
#include "serial.h"
#include "checksum.h"
#include "tcp_checksum.h"
#include "frames.h"
#include "native.h"
#include "encapsulation.h"
#include "receive.h"

/* The flags byte of a TCP header. */
static __always_inline __u8 tcp_flags(const struct tcphdr *tcp)
{
	return ((const __u8 *)tcp)[13];
}

/* The local flowID that the virtual tuple of a kernel socket spells. */
static __always_inline __be32 flow_of_tuple(__be32 remote_address, __be16 remote_port)
{
	return bpf_htonl(bpf_ntohl(remote_address) << 16 | bpf_ntohs(remote_port));
}

/*
 * Send what the kernel's TCP made, superpackets included, behind a SAL header, and an outer one if there is to be one: here once per
 * superpacket, what is left to do per packet is serval_insert's. Not inlined, for a stack of its own: without CAP_PERFMON the
 * verifier forbids a number where a pointer was.
 */
static __noinline int send_behind_header(struct __sk_buff *skb, struct flow *flow, int needs_checksum)
{
	void *data = (void *)(long)skb->data;
	struct iphdr *ip = data + ETHERNET_BYTES;
	struct tcphdr *tcp = data + ETHERNET_BYTES + IPV4_BYTES;

	if ((void *)(tcp + 1) > (void *)(long)skb->data_end)
		return drop(DROP_OUT_NOT_A_FLOW);
	__u32 outer_bytes = flow->outer_local_port ? UDP_BYTES : 0;
	__u64 difference = address_difference(ip->saddr, ip->daddr, flow->local_address, flow->peer_address);
	__be32 ports = *(__be32 *)tcp;

	ip->saddr = flow->local_address;
	ip->daddr = flow->peer_address;
	ip->check = 0;
	ip->check = ipv4_checksum(ip);
	*(__be32 *)tcp = 0; /* both ports are 0 inside Serval (SPEC 4.1) */
	replace_tcp_checksum(skb, tcp, ports, 0, difference);

	if (bpf_skb_change_head(skb, outer_bytes + SAL_HEADER_BYTES, 0))
		return drop(DROP_OUT_HEADROOM);
	struct ethhdr *ethernet = (void *)(long)skb->data;
	if ((void *)ethernet + sizeof(struct encapsulated_waiting_frame) > (void *)(long)skb->data_end)
		return drop(DROP_OUT_HEADROOM);
	/* Zeros unless FLOW_NEIGHBOUR_KNOWN. */
	__builtin_memcpy(ethernet->h_dest, flow->neighbour_mac, sizeof(flow->neighbour_mac));
	__builtin_memcpy(ethernet->h_source, flow->own_mac, sizeof(flow->own_mac));
	ethernet->h_proto = bpf_htons(ETH_P_IP);
	__u32 mark = flow->ifindex | (flow->flags & FLOW_NEIGHBOUR_KNOWN ? 0 : MARK_NEIGHBOUR_UNKNOWN);
	if (outer_bytes) {
		struct encapsulated_waiting_frame *encapsulated = (void *)ethernet;

		encapsulated->udp.source = flow->outer_local_port;
		encapsulated->udp.dest = flow->outer_peer_port;
		encapsulated->sal = flow->header_out;
		mark |= MARK_ENCAPSULATED;
	} else {
		((struct waiting_frame *)ethernet)->sal = flow->header_out;
	}
	skb->mark = mark;

	/* Both are loaded, or the compiler would choose between their addresses, which the verifier allows root only. */
	__u32 finishing = virtual_network.checksum_ifindex, plain = virtual_network.segmenter_ifindex;
	asm volatile("" : "+r"(finishing), "+r"(plain));
	return bpf_redirect(needs_checksum ? finishing : plain, 0);
}

/*
 * Egress of serval0: a segment, usually a superpacket, of a kernel socket. Everything that can be done once per superpacket is
 * done here: addresses, ports, pseudo header, counting, and both headers that the kernel does not know. Segmentation copies what is
 * before the IP header to every packet. The mark tells serval_insert, which sees one packet per MTU, where to send it.
 */
SEC("tc")
int serval_out(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (!has_bytes(skb, &data, &end, ETHERNET_BYTES + IPV4_BYTES + TCP_BYTES))
		return drop(DROP_OUT_NOT_A_FLOW);
	struct iphdr *ip = data + ETHERNET_BYTES;
	struct tcphdr *tcp = data + ETHERNET_BYTES + IPV4_BYTES;
	if (skb->protocol != bpf_htons(ETH_P_IP) || ip->protocol != IPPROTO_TCP || ip->ihl != 5)
		return drop(DROP_OUT_NOT_A_FLOW);
	/* A socket that some program connected to a virtual tuple by itself is not the flow's. */
	if (tcp->source != virtual_network.local_port)
		return drop(DROP_OUT_NOT_A_FLOW);

	__be32 id = flow_of_tuple(ip->daddr, tcp->dest);
	struct flow *flow = bpf_map_lookup_elem(&flows, &id);
	if (!flow)
		return drop(DROP_OUT_NOT_A_FLOW);
	struct flow_state *state = bpf_map_lookup_elem(&flow_states, &flow->slot);
	if (!state)
		return drop(DROP_OUT_NOT_A_FLOW);

	__u8 flags = tcp_flags(tcp);
	__u32 headers = IPV4_BYTES + tcp->doff * 4;
	/* A superpacket of 64 KiB and more (BIG TCP) has no usable tot_len. */
	__u32 payload = (ip->tot_len ? bpf_ntohs(ip->tot_len) : skb->len - ETHERNET_BYTES) - headers;
	__u32 sequence = bpf_ntohl(tcp->seq), sequence_end = sequence + payload + (flags & TCP_FLAG_FIN);
	if (flags & TCP_FLAG_FIN) {
		state->fin_end = sequence_end;
		state->fin_sent = 1;
	}
	/*
	 * Once both FINs are through, the kernel has no socket left and answers a segment that the wire had kept or doubled with an
	 * RST. It would kill the flow at a prototype, which obeys a TCP RST in any state.
	 */
	if ((flags & TCP_FLAG_RST) && state->fin_acknowledged && state->fin_received)
		return drop(DROP_OUT_LATE_RESET);
	if ((flags & TCP_FLAG_RST) && !state->reset_sent) {
		state->reset_sent = 1;
		tell(id, EVENT_RESET_SENT);
	}

	__u32 segments = skb->gso_segs ? skb->gso_segs : 1;
	__u32 wire_bytes = skb->len - ETHERNET_BYTES + (segments - 1) * headers;
	__sync_fetch_and_add(&state->out.packets, segments);
	state->sent_before = state->sent_end; /* not in a variable: it would be spilled to where a pointer was */
	if (is_before(state->sent_end, sequence_end))
		state->sent_end = sequence_end;
	if ((flow->flags & FLOW_NATIVE) && goes_native(id, flow, state, sequence, sequence_end, flags)) {
		__sync_fetch_and_add(&state->out.bytes, wire_bytes);
		return send_native(skb, flow, ip, tcp);
	}
	__u32 added_bytes = SAL_HEADER_BYTES + (flow->outer_local_port ? UDP_BYTES : 0);
	__sync_fetch_and_add(&state->out.bytes, wire_bytes + segments * added_bytes);
	return send_behind_header(skb, flow, needs_finished_checksum(flow, state, is_before(sequence, state->sent_before)));
}

/*
 * Both directions of sum1: one packet per MTU, as serval_out left the superpacket. Let IP and SAL header change places and send it.
 * This runs for each packet, so it asks no map.
 */
SEC("tc")
int serval_insert(struct __sk_buff *skb)
{
	struct waiting_frame *waiting = (void *)(long)skb->data;
	__u32 mark = skb->mark;
	__be32 id;

	if (!mark || (void *)(waiting + 1) > (void *)(long)skb->data_end)
		return drop(DROP_OUT_NOT_A_FLOW);
	if (mark & MARK_ENCAPSULATED) {
		id = insert_outer(skb);
		if (!id)
			return drop(DROP_OUT_NOT_A_FLOW);
	} else {
		struct sal_header sal = waiting->sal;
		struct iphdr ip = waiting->ip;
		struct wire_frame *wire = (void *)waiting;

		ip.protocol = IPPROTO_SAL;
		ip.tot_len = bpf_htons(bpf_ntohs(ip.tot_len) + SAL_HEADER_BYTES);
		ip.check = ~fold((__u16)~ip.check + bpf_htons(SAL_HEADER_BYTES) + bpf_htons(IPPROTO_SAL - IPPROTO_TCP));
		wire->ip = ip;
		wire->sal = sal;
		id = sal.source_flow;
	}
	skb->mark = 0;
	if (!(mark & MARK_NEIGHBOUR_UNKNOWN))
		return bpf_redirect(mark & MARK_IFINDEX, 0);

	struct flow *flow = bpf_map_lookup_elem(&flows, &id);
	if (!flow)
		return drop(DROP_OUT_NOT_A_FLOW);
	return redirect_to_next_hop(flow);
}

/* Ingress of every interface that carries Serval: data packets of known flows go to their socket, all else is untouched. */
SEC("tc")
int serval_in(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present || !has_bytes(skb, &data, &end, ETHERNET_BYTES + IPV4_BYTES))
		return TC_ACT_UNSPEC;
	struct iphdr *ip = data + ETHERNET_BYTES;
	/* The virtual tuples are ours alone: nobody on a wire may talk to a socket past the SAL. */
	if (ip->daddr == virtual_network.local_address)
		return drop(DROP_IN_VIRTUAL_ADDRESS);
	if (ip->ihl != 5 || (ip->frag_off & bpf_htons(IP_FRAGMENT_MASK)))
		return TC_ACT_UNSPEC;
	if (ip->protocol == IPPROTO_TCP)
		return receive_native(skb, data, end);
	if (ip->protocol == IPPROTO_SAL)
		return receive_behind_header(skb, data, end, 0);
	if (ip->protocol == IPPROTO_UDP)
		return receive_encapsulated(skb, data, end);
	return TC_ACT_UNSPEC;
}

/* What a filter lets through to user space. */
static __always_inline int passes_up(struct __sk_buff *skb, __u32 sal_at)
{
	struct sal_header sal;

	if (bpf_skb_load_bytes(skb, sal_at, &sal, sizeof(sal)))
		return skb->len; /* too short to be valid: user space counts it with its reason */
	if (sal.length_words != SAL_HEADER_WORDS)
		return skb->len;
	__be32 id = sal.destination_flow;
	if (bpf_map_lookup_elem(&flows, &id))
		return skb->len;
	count_drop(DROP_IN_UNKNOWN_FLOW);
	return 0;
}

/*
 * Filter of the raw socket (data starts at the IP header): control packets, and data packets only of half-open flows. A flood of
 * data for unknown flows therefore never reaches user space.
 */
SEC("socket")
int serval_control(struct __sk_buff *skb)
{
	__u8 first_byte;

	if (skb->pkt_type == PACKET_LOOPBACK)
		return 0; /* the copy of our own broadcast; a listener of this stack is found by its DEMUX rule */
	if (bpf_skb_load_bytes(skb, 0, &first_byte, 1))
		return 0;
	return passes_up(skb, (first_byte & 0xf) * 4);
}

/* The same for the sockets of the UDP encapsulation, where data starts at the UDP header. */
SEC("socket")
int serval_outer(struct __sk_buff *skb)
{
	return skb->pkt_type == PACKET_LOOPBACK ? 0 : passes_up(skb, UDP_BYTES);
}

/*
 * Run by user space (PROG_TEST_RUN) with a flowID as the mark: what has become of the flow's kernel socket, of which user space
 * holds no descriptor? The answer is written over the packet. The lookup happens in the namespace of the caller.
 */
SEC("tc")
int serval_look(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct socket_state *found = data;
	struct bpf_sock_tuple tuple = {};
	__u32 id = bpf_ntohl(skb->mark);

	if ((void *)(found + 1) > end)
		return TC_ACT_SHOT;
	tuple.ipv4.saddr = virtual_remote(skb->mark);
	tuple.ipv4.sport = bpf_htons(id);
	tuple.ipv4.daddr = virtual_network.local_address;
	tuple.ipv4.dport = virtual_network.local_port;
	struct bpf_sock *socket = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (!socket)
		return TC_ACT_SHOT;
	found->state = socket->state;
	struct bpf_tcp_sock *tcp = bpf_tcp_sock(socket);
	if (tcp) {
		found->receive_next = tcp->rcv_nxt;
		found->send_unacknowledged = tcp->snd_una;
		found->timeouts = tcp->icsk_retransmits;
		found->mss = tcp->mss_cache;
		found->send_next = tcp->snd_nxt;
		found->round_trip_us = tcp->srtt_us >> 3;
	}
	bpf_sk_release(socket);
	return TC_ACT_OK;
}

char _license[] SEC("license") = "Dual BSD/GPL";
