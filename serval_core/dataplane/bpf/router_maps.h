/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* What does user space tell the service router's program, and what does it learn? dataplane/router_programs.py writes and reads. */
#pragma once

#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#define SERVICE_ID_BYTES 32
#define TARGETS_MAX 16 /* of one prefix; more are left to user space */
#define PREFIXES_MAX 65536
#define ALL_TARGETS_MAX 65536
#define LINKS_MAX 4096
#define OWN_ADDRESSES_MAX 16 /* packets to others of this host are left to user space */

struct service_key {
	__u32 bits;
	__u8 service[SERVICE_ID_BYTES];
};

/*
 * All of a prefix's targets that compete; replaced as a whole. None: the packet is left to user space. Targets stand in a map of
 * their own because without CAP_PERFMON the verifier lets no pointer be chosen by a number.
 */
struct router_service {
	__u32 targets;
	__u32 share_end[TARGETS_MAX]; /* chosen by random numbers below this and not below that of the target before */
	__u32 target[TARGETS_MAX];    /* index into targets and target_counters */
};

struct router_target {
	__be32 address;
	__u32 mtu_bytes;
	__u32 link; /* index into links */
};

/* A next hop. */
struct router_link {
	__be32 next_hop;
	__u32 ifindex;
	__u32 neighbour_known;
	__u8 neighbour_mac[6]; /* with neighbour_known; else the kernel's neighbour code finds it */
	__u8 own_mac[6];
};

struct target_counter {
	__u64 packets;
	__u64 bytes; /* as the service table counts: behind the SAL header (SPEC 6.7) */
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, PREFIXES_MAX);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct service_key);
	__type(value, struct router_service);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ALL_TARGETS_MAX);
	__type(key, __u32);
	__type(value, struct router_target);
} targets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LINKS_MAX);
	__type(key, __u32);
	__type(value, struct router_link);
} links SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ALL_TARGETS_MAX);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct target_counter);
} target_counters SEC(".maps");

/* Until when the maps are kept up to date. After that, say because user space crashed, nothing is done. */
struct router_host {
	__u64 lease_until_ns; /* CLOCK_MONOTONIC */
	__be32 own_addresses[OWN_ADDRESSES_MAX]; /* unused ones are 0 */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct router_host);
} host SEC(".maps");
