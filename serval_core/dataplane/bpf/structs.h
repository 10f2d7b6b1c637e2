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
	__u32 anchor_ifindex;	    /* serval0: its ingress is where the sockets receive */
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
	__be16 native_local_port;     /* with FLOW_NATIVE; as the ports of a packet to the peer stand in its header */
	__be16 native_peer_port;
	__be16 outer_local_port;      /* of UDP encapsulation; 0: none */
	__be16 outer_peer_port;
	__u32 path_number;	      /* another one after each move: what was learnt about native data is void */
	__be32 other_local_address;   /* where native data may be on its way to or from besides: before a move, or after it */
	__be32 other_peer_address;
};

/* Value of `native_ports`, by TCP port in host order. */
struct native_port {
	__be32 flow;
	__u32 reserved; /* 0: a flow has this port no more, or never had */
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
	__u8 native_doubts;   /* segments that were repeated before native data had got through */
	__u8 native_repeats;  /* how often `native_repeated` was repeated in a row */
	__u32 sent_end; /* sequence numbers, host order: behind all that was sent, */
	__u32 sal_sent_end;    /* behind all that was sent in framing sal; what is acknowledged beyond it came natively */
	__u32 native_repeated; /* of the segment that was repeated last */
	__u32 path_number;
	__u32 native_began; /* sequence number, host order: what is before it was sent on another path or in framing sal */
	__u32 sent_before; /* what sent_end was before the segment that is being sent */
	__u32 probe_began; /* sequence numbers, host order: the segment that tries native data again, while native_probing */
	__u32 probe_end;
	__u32 native_retry_s; /* by the clock of bpf_ktime_get_coarse_ns: not before; 0: not decided */
	__u8 native_probing;
	__u8 native_retries; /* how often that was tried on this path */
	__u8 padding_out[2];
	struct direction_counters in;
	__u8 fin_acknowledged;
	__u8 fin_received;
	__u8 native_proved; /* native data of ours has got through */
	__u8 peer_in_sal;   /* how many data segments in a row the peer has sent in framing sal, at most NATIVE_FOLLOW */
	__be32 seen_address; /* where an encapsulated peer was told to be */
	__be16 seen_port;
	__u16 padding_seen;
	__u32 untranslated; /* 1 + the path_number on which the peer's encapsulated packets come without a NAT in between, else 0 */
	__u8 padding_in[32];
};

/* What serval_look finds. Sequence numbers in host order; zero for a socket in TIME_WAIT. */
struct socket_state {
	__u32 state; /* linux/tcp_states.h */
	__u32 receive_next;
	__u32 send_unacknowledged;
	__u32 timeouts; /* how often the first unacknowledged segment was repeated because its time had run out */
	__u32 mss; /* of the segments that the socket sends, less its TCP options */
	__u32 send_next;
	__u32 round_trip_us; /* smoothed; 0: not known */
};

struct flow_event {
	__be32 flow;
	__u32 kind;
	__be32 address; /* of EVENT_PEER_SEEN */
	__be16 port;
	__u16 padding;
};
