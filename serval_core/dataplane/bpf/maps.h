/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* Where is the state? All maps of the data plane. */
#pragma once

#include <bpf/bpf_helpers.h>
#include "consts.h"
#include "structs.h"

/* Filled in by the loader before the programs are verified. */
const volatile struct virtual_network virtual_network SEC(".rodata.config");

/* Half-open flows have an entry and no slot: there must be room for them when every slot is taken. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2 * MAX_FLOWS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __be32);
	__type(value, struct flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_FLOWS);
	__type(key, __u32);
	__type(value, struct flow_state);
} flow_states SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, struct native_port);
} native_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} flow_events SEC(".maps");

/* Reasons why the data plane dropped a packet or could not tell of something; the names are in dataplane/kernel.py. */
enum drop_reason {
	DROP_OUT_NOT_A_FLOW = 0,
	DROP_OUT_HEADROOM,
	DROP_IN_WRONG_HEADER,
	DROP_IN_STRIP_FAILED,
	DROP_IN_VIRTUAL_ADDRESS,
	DROP_IN_TRUNCATED,
	LOST_EVENT,
	DROP_OUT_LATE_RESET,
	DROP_IN_UNKNOWN_FLOW,
	DROP_IN_NATIVE_UNKNOWN,
	DROP_IN_NATIVE_RESET,
	DROP_REASONS,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DROP_REASONS);
	__type(key, __u32);
	__type(value, __u64);
} drop_counters SEC(".maps");

static __always_inline void count_drop(__u32 reason)
{
	__u64 *counter = bpf_map_lookup_elem(&drop_counters, &reason);

	if (counter)
		(*counter)++;
}

static __always_inline int drop(__u32 reason)
{
	count_drop(reason);
	return TC_ACT_SHOT;
}

static __always_inline void tell_of_address(__be32 flow, __u32 kind, __be32 address, __be16 port)
{
	struct flow_event event = { .flow = flow, .kind = kind, .address = address, .port = port };

	if (bpf_ringbuf_output(&flow_events, &event, sizeof(event), 0))
		count_drop(LOST_EVENT);
}

static __always_inline void tell(__be32 flow, __u32 kind)
{
	tell_of_address(flow, kind, 0, 0);
}
