/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* Which numbers are fixed? Protocol constants, and the constants that user space and the programs agree on. */
#pragma once

#define IPPROTO_SAL 144
#define SAL_HEADER_BYTES 12
#define SAL_HEADER_WORDS 3 /* shl of a data packet: base header, no extension (SPEC 2.1) */

#define ETHERNET_BYTES 14
#define IPV4_BYTES 20
#define TCP_BYTES 20
#define UDP_BYTES 8
#define ENCAPSULATION_CLIENT_PORT 54324 /* SPEC 8 */
#define ENCAPSULATION_SERVER_PORT 54325
#define IP_FRAGMENT_MASK 0x3fff /* more-fragments bit and offset */

#define TCP_FLAG_FIN 0x01
#define TCP_FLAG_RST 0x04
#define TCP_FLAG_ACK 0x10

/* struct flow: flags */
#define FLOW_EXPECTED 1          /* half-open: data goes up to the SAL, which completes the handshake with it */
#define FLOW_COMPLETE_CHECKSUM 2 /* the peer or its link needs finished TCP checksums */
#define FLOW_NEIGHBOUR_KNOWN 4     /* the MAC addresses are in the entry; else the kernel's neighbour code finds them */
#define FLOW_NATIVE 8		 /* both ends have a native port: data may travel as plain TCP */
#define FLOW_TELL_PROOF 16	 /* user space wants to know that native data has got through */
#define FLOW_COMPLETE_THROUGH_NAT 32 /* checksums have to be finished as long as a NAT may be on the way */

/* In the mark, beside the number of the interface: serval_insert has to ask the kernel for the next hop's address */
#define MARK_NEIGHBOUR_UNKNOWN 0x80000000
#define MARK_ENCAPSULATED 0x40000000 /* the frame that waits is an encapsulated one */
#define MARK_IFINDEX 0x3fffffff

/* struct flow_event: kind */
#define EVENT_FIN_ACKNOWLEDGED 1
#define EVENT_RESET_SENT 2
#define EVENT_NATIVE_DOUBTED 3 /* native data had to be repeated before any has got through */
#define EVENT_PEER_SEEN 5 /* an encapsulated peer sends from another address or port than we send to */
#define EVENT_NATIVE_PROVED 4  /* native data has got through after all, or FLOW_TELL_PROOF asked for it */

#define MAX_FLOWS 65536
