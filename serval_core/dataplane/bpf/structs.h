/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* What does user space share with the programs? The layouts of map values and events. Network byte order where __be says so. */
#pragma once

#include <linux/types.h>

struct sal_header {
	__be32 source_flow;
	__be32 destination_flow;
	__u8 length_words;
	__u8 protocol;
	__sum16 checksum;
} __attribute__((packed));

/*
 * How kernel sockets of Serval flows are addressed: local address and port are the same for all; the remote address and port
 * spell the local flowID: its high half are the low 16 bits of the address, its low half is the port.
 */
struct virtual_network {
	__be32 local_address;
	__be32 remote_network; /* a /16 */
	__be16 local_port;
	__u16 padding;
	__u32 anchor_outer_ifindex; /* serval1: what is sent into it arrives on serval0 */
	__u32 segmenter_ifindex;    /* seg0: what is sent into it leaves sum1 in segments */
	__u32 checksum_ifindex;	    /* sum0: what is sent into it arrives on sum1 in segments with finished checksums */
};

/* Value of `flows`, by local flowID. Replaced as a whole on migration, so nothing in here changes under a reader. */
struct flow {
	__be32 local_address;
	__be32 peer_address;
	__be32 next_hop;
	__u32 ifindex;
	__u32 slot; /* index into flow_states */
	__u32 flags;
	struct sal_header header_out; /* of every data packet we send */
	struct sal_header header_in;  /* of every data packet we accept */
	__u8 neighbour_mac[6];	      /* with FLOW_NEIGHBOUR_KNOWN */
	__u8 own_mac[6];
};

struct direction_counters {
	__u64 packets;
	__u64 bytes;
};

/* Value of `flow_states`, by slot: what the programs themselves note about a flow. In and out on separate cache lines. */
struct flow_state {
	struct direction_counters out;
	__u32 fin_end;	/* sequence number after our FIN, host order */
	__u8 fin_sent;
	__u8 reset_sent;
	__u8 padding_out[42];
	struct direction_counters in;
	__u8 fin_acknowledged;
	__u8 fin_received;
	__u8 padding_in[46];
};

/* What serval_look finds. Sequence numbers in host order; zero for a socket in TIME_WAIT. */
struct socket_state {
	__u32 state; /* linux/tcp_states.h */
	__u32 receive_next;
	__u32 send_unacknowledged;
	__u32 timeouts; /* how often the first unacknowledged segment was repeated because its time had run out */
	__u32 mss; /* of the segments that the socket sends, less its TCP options */
};

struct flow_event {
	__be32 flow;
	__u32 kind;
};
