/* SPDX-License-Identifier: (BSD-3-Clause OR GPL-2.0-only) */
/* Which of two sequence numbers comes first? Serial number arithmetic (RFC 1982). */
#pragma once

#include <linux/types.h>

static __always_inline int is_before(__u32 a, __u32 b)
{
	return (__s32)(a - b) < 0;
}
