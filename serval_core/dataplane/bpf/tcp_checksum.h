/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* How does a TCP checksum follow a tuple that is rewritten? */
#pragma once

#include <linux/bpf.h>
#include <linux/tcp.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#include "checksum.h"
#include "consts.h"

#define TCP_CHECK_OFFSET (ETHERNET_BYTES + IPV4_BYTES + 16)

/*
 * Let the checksum of a TCP segment, just before its tuple is rewritten or after that, follow: the two ports, and what
 * `address_difference` says. Pointers into the packet are void afterwards.
 *
 * A superpacket, whether the kernel's TCP or GRO made it, has a partial checksum: that of the pseudo header, which the ports are not part
 * of. One that a network card made (LRO) is marked as verified, and then nobody looks at the field. The helpers find out by themselves
 * which it is, but cost a tenth of what we do with a superpacket.
 */
static __always_inline void replace_tcp_checksum(struct __sk_buff *skb, struct tcphdr *tcp, __be32 old_ports, __be32 new_ports,
						 __u64 difference)
{
	if (skb->gso_size) {
		__u64 sum = tcp->check + difference;

		tcp->check = fold((sum & 0xffffffff) + (sum >> 32));
		return;
	}
	bpf_l4_csum_replace(skb, TCP_CHECK_OFFSET, old_ports, new_ports, 4);
	bpf_l4_csum_replace(skb, TCP_CHECK_OFFSET, 0, difference, BPF_F_PSEUDO_HDR);
}
