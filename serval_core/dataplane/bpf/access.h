/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* Which bytes of a packet may a program touch, and how does it get to the next hop? What all programs do alike. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#include "structs.h"

/*
 * Whether the first `needed` bytes are there, between `data` and `end`. Drivers that receive into pages leave little more than the
 * Ethernet header there; then they are fetched, and pointers into the packet are void.
 */
static __always_inline int has_bytes(struct __sk_buff *skb, void **data, void **end, const __u32 needed)
{
	if (*data + needed <= *end)
		return 1;
	if (skb->len < needed || bpf_skb_pull_data(skb, needed))
		return 0;
	*data = (void *)(long)skb->data;
	*end = (void *)(long)skb->data_end;
	return *data + needed <= *end;
}

/* Send a packet to the next hop of its flow, whose MAC address the kernel is asked for. */
static __always_inline int redirect_to_next_hop(const struct flow *flow)
{
	/* Zeroed as a whole: without CAP_PERFMON the verifier refuses to let padding of the stack out. */
	struct bpf_redir_neigh neighbour;

	__builtin_memset(&neighbour, 0, sizeof(neighbour));
	neighbour.nh_family = 2; /* AF_INET */
	neighbour.ipv4_nh = flow->next_hop;
	return bpf_redirect_neigh(flow->ifindex, &neighbour, sizeof(neighbour), 0);
}
