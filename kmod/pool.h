/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The transmit pool: frames that are kept until they are acknowledged, packed densely, and the few socket buffers in which
 * they are handed to the driver, a copy each time.
 */
#ifndef NETDUMP_POOL_H
#define NETDUMP_POOL_H

#include <linux/netdevice.h>
#include <linux/skbuff.h>

#include "abi.h"

/*
 * Blocks of pages that frames lie in. Twenty-one frames of an MTU of 1500 fit into each, so that all of them hold
 * ND_SLOTS_MAX. Drivers want such blocks whole at times, and what the page allocator gets back are whole ones.
 */
#define ND_BLOCKS		98
#define ND_BLOCK_ORDER		3
#define ND_BLOCK_BYTES		(PAGE_SIZE << ND_BLOCK_ORDER)

/* Blocks that the page allocator gets back after the crash when it has no memory to receive with. The others remain. */
#define ND_BLOCKS_LENT		80

/* Socket buffers: as many as a ring of common size takes between two polls, in as much memory. Longer ones are fewer. */
#define ND_CARRIERS_MAX		128
#define ND_CARRIERS_MIN		8
#define ND_CARRIER_BYTES	(ND_CARRIERS_MAX * 2304)

/* With fewer frames than these, after some have been overwritten, there is no dump. */
#define ND_SLOTS_MIN		16

/* One instance. `crashme pool` (crates/vmtest) overwrites what is at its beginning. */
struct nd_pool {
	struct sk_buff *carriers[ND_CARRIERS_MAX];
	u8 *blocks[ND_BLOCKS];
	/* What the two were when the host was armed; a carrier's is of all that the kernel keeps about it, too. */
	u64 carrier_seals[ND_CARRIERS_MAX];
	u64 block_seals[ND_BLOCKS];
	u32 carriers_used;
	u32 blocks_used;
	/* Behind those that are used: the allocator's now. */
	u32 blocks_lent;
	u32 frame_bytes;
	u32 frames_a_block;
	/* Frames, but for a spare one behind them. */
	u32 slots;
	u32 headroom;
	u32 next_carrier;
	bool checked;
	/* Carriers and blocks that were no longer what they had been. */
	u32 overwritten;
};

extern struct nd_pool nd_pool;

/* Takes the memory for frames of `frame_bytes` bytes to `device`; 0 or an error. nd_pool_free() gives it back. */
int nd_pool_take(const struct net_device *device, u32 frame_bytes);
void nd_pool_free(void);
u64 nd_pool_bytes(void);

/* After the crash, before all else: leaves out what was overwritten. False if too little is left to send with. */
bool nd_pool_check(void);

/* After that: what the page allocator needs it gets. */
void nd_pool_lend(void);

/* A socket buffer that the device does not use, or NULL, and `bytes` of a frame copied into it, padded if too short. */
struct sk_buff *nd_pool_carrier(void);
void nd_pool_load(struct sk_buff *carrier, const u8 *frame, u32 bytes);

#endif
