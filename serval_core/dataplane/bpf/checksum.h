/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* How do checksums follow a rewritten header? Incrementally (RFC 1624). */
#pragma once

#include <linux/ip.h>
#include <linux/types.h>

/* Fold a 32-bit sum of 16-bit words. */
static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* The checksum of an option-less IPv4 header whose check field is zero. */
static __always_inline __u16 ipv4_checksum(const struct iphdr *ip)
{
	const __u16 *words = (const void *)ip;
	__u32 sum = 0;

#pragma clang loop unroll(full)
	for (int i = 0; i < 10; i++)
		sum += words[i];
	return ~fold(sum);
}

/* Sum to add to a TCP checksum when the pseudo header's two addresses change (for replace_tcp_checksum). */
static __always_inline __u64 address_difference(__be32 old_a, __be32 old_b, __be32 new_a, __be32 new_b)
{
	__u64 sum = (__u64)(__u32)~old_a + (__u32)~old_b + new_a + new_b;

	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return sum;
}
