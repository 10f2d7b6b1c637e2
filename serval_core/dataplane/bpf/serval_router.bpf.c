// SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only)
/*
 * The service router's fast path: SYNs and unconnected datagrams for services of other hosts go on without user space.
 *
 *   wire ingress [serval_in, then serval_route] -> out of the target's interface
 *
 * Does what serval_core/forwarding.py does, byte for byte, for the shapes that senders use; everything else, also whatever
 * would have to be refused and counted, is left to it. See ARCHITECTURE.md, "Service routers".
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "consts.h"
#include "structs.h"
#include "checksum.h"
#include "router_maps.h"

#define CONTROL_SYN 0x80
#define CONTROL_FLAGS 0xfc

#define CONTROL_HEAD 0x10
#define CONTROL_BYTES 20
#define SERVICE_HEAD 0x20
#define SERVICE_BYTES 36
#define SOURCE_HEAD 0x40
#define SOURCE_BASE_BYTES 4
#define SOURCE_ADDRESSES_MAX 20

#define SYN_BYTES (SAL_HEADER_BYTES + CONTROL_BYTES + SERVICE_BYTES)
#define DATAGRAM_BYTES (SAL_HEADER_BYTES + 2 * SERVICE_BYTES)

#define SAL_AT (ETHERNET_BYTES + IPV4_BYTES)
#define TCP_CHECK_IN_HEADER 16
#define UDP_CHECK_IN_HEADER 6

struct source_extension {
	__u8 head;
	__u8 bytes;
	__u16 reserved;
	__be32 originator;
	__be32 forwarder;
};

/* A packet on its way: what was read from it, and where it goes. */
struct onward {
	const struct router_target *target;
	__u32 index; /* of the target */
	__be32 source;
	__be32 forwarder;  /* this host, as the packet named it */
	__u32 ip_bytes;	   /* as it came */
	__u32 header_bytes; /* of the SAL header, as it came */
};

static __always_inline int is_extension(const __u8 *at, __u8 head, __u8 bytes)
{
	return (at[0] & 0xf0) == head && at[1] == bytes;
}

static __always_inline __u16 fold_long(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return fold(sum);
}

static __always_inline __u64 sum_of_words(const __u32 *at, __u32 words)
{
	__u64 sum = 0;

#pragma clang loop unroll(full)
	for (__u32 i = 0; i < words; i++)
		sum += at[i];
	return sum;
}

/* The checksum after some words were replaced: `change` is the sum of the new ones and of the complements of the old ones. */
static __always_inline __u16 changed_checksum(__u16 checksum, __u64 change)
{
	return ~fold_long((__u16)~checksum + change);
}

/* A sender that cannot be answered, or that only this host itself may be. */
static __always_inline int is_odd_source(__be32 address)
{
	__u32 source = bpf_ntohl(address);

	return source < 0x01000000 || source >= 0xe0000000 || source >> 24 == 127;
}

/* Whether this host is meant, and the maps are right. */
static __always_inline int is_for_us(const struct iphdr *ip)
{
	__u32 zero = 0;
	const struct router_host *known = bpf_map_lookup_elem(&host, &zero);
	int to_us = 0;

	if (!known || bpf_ktime_get_coarse_ns() > known->lease_until_ns)
		return 0;
#pragma clang loop unroll(full)
	for (int i = 0; i < OWN_ADDRESSES_MAX; i++) {
		__be32 own = known->own_addresses[i];

		if (!own)
			break;
		if (own == ip->saddr)
			return 0;
		to_us |= own == ip->daddr;
	}
	return to_us;
}

/* The index of the target that gets the packet. */
static __always_inline __u32 choose(const struct router_service *service)
{
	__u32 number = service->targets > 1 ? bpf_get_prandom_u32() : 0;

#pragma clang loop unroll(full)
	for (__u32 i = 0; i < TARGETS_MAX; i++) {
		/* Volatile: the compiler would choose a place first, and read there once. */
		__u32 index = *(volatile const __u32 *)&service->target[i];

		if (number < service->share_end[i] || i + 1 >= service->targets)
			return index;
	}
	return service->target[0];
}

/* Whom is a packet for `service` meant for? 0: user space has to say. */
static __always_inline const struct router_target *find_target(const struct iphdr *ip, const __u8 *service_id, __u32 *index)
{
	struct service_key key = { .bits = 8 * SERVICE_ID_BYTES };

	if (is_odd_source(ip->saddr) || !is_for_us(ip))
		return 0;
	__builtin_memcpy(key.service, service_id, SERVICE_ID_BYTES);
	const struct router_service *service = bpf_map_lookup_elem(&services, &key);
	if (!service || !service->targets)
		return 0;
	*index = choose(service);
	const struct router_target *target = bpf_map_lookup_elem(&targets, index);
	if (!target || target->address == ip->saddr)
		return 0;
	return target;
}

/* The transport checksum follows the address, so that a wrong one stays wrong. UDP: 0 is none. */
static __always_inline __u16 transport_check(__u16 check, __u8 protocol, __be32 old_address, __be32 new_address)
{
	if (!check && protocol == IPPROTO_UDP)
		return 0;
	check = changed_checksum(check, (__u64)(__u32)~old_address + new_address);
	return check || protocol == IPPROTO_TCP ? check : 0xffff;
}

static __always_inline __u32 check_in_transport(__u8 protocol)
{
	return protocol == IPPROTO_TCP ? TCP_CHECK_IN_HEADER : UDP_CHECK_IN_HEADER;
}

static __always_inline void rewrite_ip(struct iphdr *ip, __be32 destination, __u32 bytes)
{
	ip->daddr = destination;
	ip->ttl -= 1;
	ip->tot_len = bpf_htons(bytes);
	ip->check = 0;
	ip->check = ~fold_long(sum_of_words((const __u32 *)ip, IPV4_BYTES / 4));
}

static __always_inline int send(struct __sk_buff *skb, const struct onward *onward)
{
	const struct router_target *target = onward->target;
	struct target_counter *counter = bpf_map_lookup_elem(&target_counters, &onward->index);

	if (counter) {
		__sync_fetch_and_add(&counter->packets, 1);
		__sync_fetch_and_add(&counter->bytes, onward->ip_bytes - IPV4_BYTES - onward->header_bytes);
	}
	const struct router_link *link = bpf_map_lookup_elem(&links, &target->link);
	if (!link)
		return TC_ACT_SHOT;
	if (link->neighbour_known) {
		struct ethhdr *ethernet = (void *)(long)skb->data;

		if ((void *)(ethernet + 1) > (void *)(long)skb->data_end)
			return TC_ACT_SHOT;
		__builtin_memcpy(ethernet->h_dest, link->neighbour_mac, sizeof(link->neighbour_mac));
		__builtin_memcpy(ethernet->h_source, link->own_mac, sizeof(link->own_mac));
		return bpf_redirect(link->ifindex, 0);
	}
	/* Zeroed as a whole: without CAP_PERFMON the verifier refuses to let padding of the stack out. */
	struct bpf_redir_neigh neighbour;
	__builtin_memset(&neighbour, 0, sizeof(neighbour));
	neighbour.nh_family = 2; /* AF_INET */
	neighbour.ipv4_nh = link->next_hop;
	return bpf_redirect_neigh(link->ifindex, &neighbour, sizeof(neighbour), 0);
}

/* A packet without SOURCE, as it comes from its sender: by far the most. All lengths are constants, nothing is copied out. */
static __always_inline int route_first(struct __sk_buff *skb, const __u32 header_bytes, const __u32 service_at)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + ETHERNET_BYTES;
	struct sal_header *sal = data + SAL_AT;
	__u8 *transport = data + SAL_AT + header_bytes;

	if ((void *)transport > end)
		return TC_ACT_UNSPEC;
	/* Damaged headers are counted in user space. */
	if (fold_long(sum_of_words((void *)ip, IPV4_BYTES / 4)) != 0xffff ||
	    fold_long(sum_of_words((void *)sal, header_bytes / 4)) != 0xffff)
		return TC_ACT_UNSPEC;
	__u32 index;
	struct onward onward = {
		.target = find_target(ip, (__u8 *)sal + service_at, &index),
		.source = ip->saddr,
		.forwarder = ip->daddr,
		.ip_bytes = bpf_ntohs(ip->tot_len),
		.header_bytes = header_bytes,
	};
	const __u32 growth = sizeof(struct source_extension);
	if (!onward.target || onward.ip_bytes + growth > onward.target->mtu_bytes)
		return TC_ACT_UNSPEC;
	onward.index = index;

	/* By branches, since without CAP_PERFMON the verifier refuses to let a pointer be chosen by a number. */
	const __u32 transport_bytes = onward.ip_bytes - IPV4_BYTES - header_bytes;
	__u8 protocol = sal->protocol;
	if (protocol == IPPROTO_TCP && transport_bytes >= TCP_CHECK_IN_HEADER + 2) {
		__u16 *check = (void *)transport + TCP_CHECK_IN_HEADER;

		if ((void *)(check + 1) > end)
			return TC_ACT_UNSPEC;
		*check = transport_check(*check, IPPROTO_TCP, onward.forwarder, onward.target->address);
		asm volatile("" ::: "memory");
	} else if (protocol == IPPROTO_UDP && transport_bytes >= UDP_CHECK_IN_HEADER + 2) {
		__u16 *check = (void *)transport + UDP_CHECK_IN_HEADER;

		if ((void *)(check + 1) > end)
			return TC_ACT_UNSPEC;
		*check = transport_check(*check, IPPROTO_UDP, onward.forwarder, onward.target->address);
		asm volatile("" ::: "memory");
	}
	rewrite_ip(ip, onward.target->address, onward.ip_bytes + growth);

	/*
	 * Room appears behind the IP header; the SAL header moves into it, and what it leaves is the room for SOURCE. That can fail
	 * for want of memory only, and the packet has been changed: it is lost then, as on any congested router.
	 */
	if (bpf_skb_adjust_room(skb, growth, BPF_ADJ_ROOM_NET, 0))
		return TC_ACT_SHOT;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	struct source_extension *added = data + SAL_AT + header_bytes;
	__u32 *to = data + SAL_AT, *from = data + SAL_AT + growth;
	if ((void *)(added + 1) > end)
		return TC_ACT_SHOT;
#pragma clang loop unroll(full)
	for (__u32 i = 0; i < header_bytes / 4; i++)
		to[i] = from[i];
	added->head = SOURCE_HEAD;
	added->bytes = growth;
	added->reserved = 0;
	added->originator = onward.source;
	added->forwarder = onward.forwarder;
	sal = (void *)to;
	sal->length_words += growth / 4;
	/* The length in words is the high half of its 16-bit word. */
	sal->checksum = changed_checksum(sal->checksum, bpf_htons(growth / 4 << 8) + sum_of_words((void *)added, growth / 4));
	return send(skb, &onward);
}

/* Whether SOURCE names one of two addresses: whoever has had the packet before must not get it again. */
static __always_inline int is_listed(struct __sk_buff *skb, __u32 addresses_at, __u32 bytes, __be32 a, __be32 b)
{
	__be32 listed[SOURCE_ADDRESSES_MAX - 1];

	__builtin_memset(listed, 0, sizeof(listed));
	asm volatile("" : "+r"(bytes)); /* here and below: let the bounds be checked where the verifier has forgotten them */
	if (bytes < 8 || bytes > sizeof(listed) || bpf_skb_load_bytes(skb, addresses_at, listed, bytes))
		return 1;
#pragma clang loop unroll(full)
	for (int i = 0; i < SOURCE_ADDRESSES_MAX - 1; i++) {
		if (listed[i] && (listed[i] == a || listed[i] == b))
			return 1;
	}
	return 0;
}

/* A packet that another router has sent on: SOURCE, which must be the last extension, becomes longer by our address. */
static __always_inline int route_again(struct __sk_buff *skb, const __u32 source_at, const __u32 service_at)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + ETHERNET_BYTES;
	struct sal_header *sal = data + SAL_AT;
	__u8 *source = data + SAL_AT + source_at;
	__u8 header[DATAGRAM_BYTES + SOURCE_BASE_BYTES + 4 * (SOURCE_ADDRESSES_MAX - 1)];

	if ((void *)(source + SOURCE_BASE_BYTES) > end)
		return TC_ACT_UNSPEC;
	__u32 header_bytes = sal->length_words * 4;
	__u32 source_bytes = header_bytes - source_at;
	if (source_bytes > SOURCE_BASE_BYTES + 4 * (SOURCE_ADDRESSES_MAX - 1) || !is_extension(source, SOURCE_HEAD, source_bytes) ||
	    fold_long(sum_of_words((void *)ip, IPV4_BYTES / 4)) != 0xffff)
		return TC_ACT_UNSPEC;
	struct iphdr new_ip = *ip;
	__u16 old_check = sal->checksum;
	__u8 protocol = sal->protocol, words = sal->length_words;
	__u32 index;
	struct onward onward = {
		.target = find_target(ip, (__u8 *)sal + service_at, &index),
		.source = ip->saddr,
		.forwarder = ip->daddr,
		.ip_bytes = bpf_ntohs(ip->tot_len),
		.header_bytes = header_bytes,
	};
	const __u32 growth = sizeof(onward.forwarder);
	if (!onward.target || onward.ip_bytes + growth > onward.target->mtu_bytes)
		return TC_ACT_UNSPEC;
	onward.index = index;
	if (is_listed(skb, SAL_AT + source_at + SOURCE_BASE_BYTES, source_bytes - SOURCE_BASE_BYTES, onward.forwarder,
		      onward.target->address))
		return TC_ACT_UNSPEC;
	__builtin_memset(header, 0, sizeof(header));
	asm volatile("" : "+r"(header_bytes));
	if (header_bytes < source_at || header_bytes > sizeof(header) || bpf_skb_load_bytes(skb, SAL_AT, header, header_bytes) ||
	    fold_long(sum_of_words((void *)header, sizeof(header) / 4)) != 0xffff)
		return TC_ACT_UNSPEC;

	const __u32 check_at = SAL_AT + header_bytes + check_in_transport(protocol);
	__u16 check = 0;
	int has_check = onward.ip_bytes + ETHERNET_BYTES >= check_at + sizeof(check);
	if (has_check && bpf_skb_load_bytes(skb, check_at, &check, sizeof(check)))
		return TC_ACT_UNSPEC;

	struct {
		__be32 flows[2];
		__u8 words, protocol;
		__u16 checksum;
	} base;
	__builtin_memcpy(&base, header, sizeof(base));
	base.words = words + growth / 4;
	/* The lengths: in words, the high half of its 16-bit word; of SOURCE, the low half. */
	base.checksum = changed_checksum(old_check, (__u64)onward.forwarder + bpf_htons((growth / 4 << 8) + growth));
	rewrite_ip(&new_ip, onward.target->address, onward.ip_bytes + growth);
	__u8 new_source_bytes = source_bytes + growth;

	if (bpf_skb_adjust_room(skb, growth, BPF_ADJ_ROOM_NET, 0))
		return TC_ACT_UNSPEC;
	if (has_check) {
		check = transport_check(check, protocol, onward.forwarder, onward.target->address);
		if (bpf_skb_store_bytes(skb, check_at + growth, &check, sizeof(check), 0))
			return TC_ACT_SHOT;
	}
	asm volatile("" : "+r"(header_bytes));
	if (header_bytes < source_at || header_bytes > sizeof(header) ||
	    bpf_skb_store_bytes(skb, ETHERNET_BYTES, &new_ip, sizeof(new_ip), 0) ||
	    bpf_skb_store_bytes(skb, SAL_AT, header, header_bytes, 0) ||
	    bpf_skb_store_bytes(skb, SAL_AT, &base, sizeof(base), 0) ||
	    bpf_skb_store_bytes(skb, SAL_AT + source_at + 1, &new_source_bytes, 1, 0) ||
	    bpf_skb_store_bytes(skb, SAL_AT + header_bytes, &onward.forwarder, sizeof(onward.forwarder), 0))
		return TC_ACT_SHOT;
	return send(skb, &onward);
}

SEC("tc")
int serval_route(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present || skb->pkt_type != PACKET_HOST)
		return TC_ACT_UNSPEC;
	/* Drivers that receive into pages leave little here, and serval_in has not asked for as much. */
	const __u32 wanted = SAL_AT + DATAGRAM_BYTES + TCP_CHECK_IN_HEADER + 2;
	if (data + wanted > end) {
		if (data + SAL_AT > end || ((struct iphdr *)(data + ETHERNET_BYTES))->protocol != IPPROTO_SAL)
			return TC_ACT_UNSPEC;
		if (bpf_skb_pull_data(skb, skb->len < wanted ? skb->len : wanted))
			return TC_ACT_UNSPEC;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
	}
	struct iphdr *ip = data + ETHERNET_BYTES;
	struct sal_header *sal = data + SAL_AT;
	__u8 *first = (void *)(sal + 1);
	if (first + CONTROL_BYTES + SERVICE_BYTES > (__u8 *)end)
		return TC_ACT_UNSPEC;
	if (ip->protocol != IPPROTO_SAL || ip->version != 4 || ip->ihl != 5 || (ip->frag_off & bpf_htons(IP_FRAGMENT_MASK)) || ip->ttl <= 1)
		return TC_ACT_UNSPEC;
	__u32 header_bytes = sal->length_words * 4;
	__u32 ip_bytes = bpf_ntohs(ip->tot_len);
	if (ip_bytes < IPV4_BYTES + header_bytes || ETHERNET_BYTES + ip_bytes > skb->len)
		return TC_ACT_UNSPEC;
	if (sal->destination_flow || (sal->protocol != IPPROTO_TCP && sal->protocol != IPPROTO_UDP))
		return TC_ACT_UNSPEC;

	if (is_extension(first, CONTROL_HEAD, CONTROL_BYTES) && (first[2] & CONTROL_FLAGS) == CONTROL_SYN &&
	    is_extension(first + CONTROL_BYTES, SERVICE_HEAD, SERVICE_BYTES)) {
		const __u32 service_at = SAL_HEADER_BYTES + CONTROL_BYTES + 4;

		if (header_bytes == SYN_BYTES)
			return route_first(skb, SYN_BYTES, service_at);
		if (header_bytes > SYN_BYTES)
			return route_again(skb, SYN_BYTES, service_at);
	} else if (is_extension(first, SERVICE_HEAD, SERVICE_BYTES) &&
		   is_extension(first + SERVICE_BYTES, SERVICE_HEAD, SERVICE_BYTES)) {
		const __u32 service_at = SAL_HEADER_BYTES + 4;

		if (header_bytes == DATAGRAM_BYTES)
			return route_first(skb, DATAGRAM_BYTES, service_at);
		if (header_bytes > DATAGRAM_BYTES)
			return route_again(skb, DATAGRAM_BYTES, service_at);
	}
	return TC_ACT_UNSPEC;
}

char _license[] SEC("license") = "Dual BSD/GPL";
