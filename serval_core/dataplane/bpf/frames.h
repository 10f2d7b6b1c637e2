/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* How does a frame with data of a flow begin? */
#pragma once

#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include "structs.h"

/* On the wire. */
struct wire_frame {
	struct ethhdr ethernet;
	struct iphdr ip; /* protocol 144 */
	struct sal_header sal;
} __attribute__((packed));

/* Between serval_out and serval_insert. What is before the IP header, segmentation copies as it is to every packet. */
struct waiting_frame {
	struct ethhdr ethernet;
	struct sal_header sal;
	struct iphdr ip; /* protocol TCP, its length that of the segment */
} __attribute__((packed));

/* The same with UDP encapsulation. */
struct encapsulated_wire_frame {
	struct ethhdr ethernet;
	struct iphdr ip; /* protocol UDP */
	struct udphdr udp;
	struct sal_header sal;
} __attribute__((packed));

struct encapsulated_waiting_frame {
	struct ethhdr ethernet;
	struct udphdr udp; /* ports only */
	struct sal_header sal;
	struct iphdr ip;
} __attribute__((packed));
