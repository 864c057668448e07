// SPDX-License-Identifier: GPL-2.0-only
/*
 * The transmit pool.
 *
 * A frame is kept, sealed, until the server has it on its disk; on a long way two thousand are. In socket buffers they
 * would take twice the memory, so they lie one behind the other in blocks of pages, and the driver gets a copy, in one of
 * a few socket buffers: what it does to that harms nothing that may have to be sent again.
 *
 * Most of the blocks are also the reserve of a host that crashes without memory: a driver that cannot allocate cannot
 * receive. Such a host sends with what remains.
 */

#include <linux/etherdevice.h>
#include <linux/mm.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "pool.h"

struct nd_pool nd_pool;

/* ---- While the host is healthy ---- */

/* FNV-1a, a word at a time; 0 if the memory cannot be read. */
static u64 nd_digest(u64 digest, const void *from, size_t bytes)
{
	const u64 *words = from;
	size_t i;
	u64 word;

	for (i = 0; i < bytes / sizeof(word); i++) {
		if (get_kernel_nofault(word, &words[i]))
			return 0;
		digest = (digest ^ word) * 0x100000001b3ULL;
	}
	return digest | 1;
}

/* All that the kernel keeps about a socket buffer. Nothing of it changes from arming to the crash. */
static u64 nd_carrier_digest(struct sk_buff *skb)
{
	u64 digest = nd_digest((unsigned long)skb, skb, sizeof(*skb));

	return digest ? nd_digest(digest, skb_end_pointer(skb), sizeof(struct skb_shared_info)) : 0;
}

/* Of a block only its address counts: what lies in it is written before it is read. */
static u64 nd_block_digest(u8 *block)
{
	return nd_digest(ND_BLOCKS, &block, sizeof(block));
}

static void nd_count_slots(void)
{
	u32 frames = nd_pool.blocks_used * nd_pool.frames_a_block;

	nd_pool.slots = frames ? min_t(u32, frames - 1, ND_SLOTS_MAX) : 0;
}

static struct sk_buff *nd_carrier_take(const struct net_device *device)
{
	u32 bytes = nd_pool.headroom + nd_pool.frame_bytes + device->needed_tailroom;
	struct sk_buff *skb = alloc_skb(bytes, GFP_KERNEL | __GFP_NOWARN);

	if (skb)
		skb_reserve(skb, nd_pool.headroom);
	return skb;
}

/* How many there shall be follows from how large the first one is. */
static bool nd_carriers_take(const struct net_device *device)
{
	u32 wanted = 1, i;

	for (i = 0; i < wanted; i++) {
		struct sk_buff *skb = nd_carrier_take(device);

		if (!skb)
			return false;
		nd_pool.carriers[i] = skb;
		nd_pool.carrier_seals[i] = nd_carrier_digest(skb);
		nd_pool.carriers_used++;
		wanted = clamp_t(u32, ND_CARRIER_BYTES / skb->truesize, ND_CARRIERS_MIN, ND_CARRIERS_MAX);
	}
	return true;
}

static bool nd_blocks_take(void)
{
	u32 i;

	for (i = 0; i < ND_BLOCKS; i++) {
		nd_pool.blocks[i] = (u8 *)__get_free_pages(GFP_KERNEL | __GFP_NOWARN, ND_BLOCK_ORDER);
		if (!nd_pool.blocks[i])
			return false;
		nd_pool.block_seals[i] = nd_block_digest(nd_pool.blocks[i]);
		nd_pool.blocks_used++;
	}
	return true;
}

int nd_pool_take(const struct net_device *device, u32 frame_bytes)
{
	nd_pool.frame_bytes = ALIGN(max_t(u32, frame_bytes, ETH_ZLEN), sizeof(u64));
	nd_pool.headroom = LL_RESERVED_SPACE(device);
	nd_pool.frames_a_block = ND_BLOCK_BYTES / nd_pool.frame_bytes;
	if (!nd_carriers_take(device) || !nd_blocks_take()) {
		nd_pool_free();
		return -ENOMEM;
	}
	nd_count_slots();
	return 0;
}

void nd_pool_free(void)
{
	u32 i;

	for (i = 0; i < nd_pool.carriers_used; i++)
		kfree_skb(nd_pool.carriers[i]);
	for (i = 0; i < nd_pool.blocks_used; i++)
		free_pages((unsigned long)nd_pool.blocks[i], ND_BLOCK_ORDER);
	memset(&nd_pool, 0, sizeof(nd_pool));
}

u64 nd_pool_bytes(void)
{
	u64 bytes = nd_pool.blocks_used * (u64)ND_BLOCK_BYTES;
	u32 i;

	for (i = 0; i < nd_pool.carriers_used; i++)
		bytes += nd_pool.carriers[i]->truesize;
	return bytes;
}

/* ---- After the crash ---- */

/*
 * What crashed the kernel may have written over carriers, or over where blocks are. Those are not used. Carriers that have
 * been sent from are no longer as they were sealed, so only the first call looks.
 */
bool nd_pool_check(void)
{
	u32 carriers = 0, blocks = 0, i;

	if (nd_pool.checked)
		return nd_pool.carriers_used && nd_pool.slots >= ND_SLOTS_MIN;
	nd_pool.checked = true;
	for (i = 0; i < nd_pool.carriers_used; i++)
		if (nd_carrier_digest(nd_pool.carriers[i]) == nd_pool.carrier_seals[i])
			nd_pool.carriers[carriers++] = nd_pool.carriers[i];
	for (i = 0; i < nd_pool.blocks_used; i++)
		if (nd_block_digest(nd_pool.blocks[i]) == nd_pool.block_seals[i])
			nd_pool.blocks[blocks++] = nd_pool.blocks[i];
	nd_pool.overwritten = nd_pool.carriers_used - carriers + nd_pool.blocks_used - blocks;
	nd_pool.carriers_used = carriers;
	nd_pool.blocks_used = blocks;
	nd_count_slots();
	return nd_pool.carriers_used && nd_pool.slots >= ND_SLOTS_MIN;
}

/*
 * Whether no zone that drivers get their memory from has, beyond what the allocator keeps for itself, as many pages in
 * blocks as large as would be lent.
 */
static bool nd_memory_is_short(void)
{
	const u64 wanted = (u64)ND_BLOCKS_LENT << ND_BLOCK_ORDER;
	int node, i;

	for_each_online_node(node) {
		for (i = 0; i <= ZONE_NORMAL; i++) {
			const struct zone *zone = &NODE_DATA(node)->node_zones[i];
			u64 kept = high_wmark_pages(zone) + zone->lowmem_reserve[ZONE_NORMAL], free = 0;
			u32 order;

			for (order = ND_BLOCK_ORDER; order < ARRAY_SIZE(zone->free_area); order++)
				free += (u64)zone->free_area[order].nr_free << order;
			if (free >= kept + wanted)
				return false;
		}
	}
	return true;
}

void nd_pool_lend(void)
{
	if (!nd_memory_is_short())
		return;
	while (nd_pool.blocks_used > ND_BLOCKS - ND_BLOCKS_LENT) {
		nd_pool.blocks_lent++;
		free_pages((unsigned long)nd_pool.blocks[--nd_pool.blocks_used], ND_BLOCK_ORDER);
	}
	nd_count_slots();
}

u8 *nd_frame(u32 slot)
{
	if (slot > nd_pool.slots)
		return NULL;
	return nd_pool.blocks[slot / nd_pool.frames_a_block] + slot % nd_pool.frames_a_block * nd_pool.frame_bytes;
}

size_t nd_frame_bytes(void)
{
	return nd_pool.frame_bytes;
}

/* The device gives them back in the order it got them, but for those that a fault has taken away for good. */
struct sk_buff *nd_pool_carrier(void)
{
	u32 tried;

	for (tried = 0; tried < nd_pool.carriers_used; tried++) {
		struct sk_buff *skb = nd_pool.carriers[nd_pool.next_carrier];

		nd_pool.next_carrier = (nd_pool.next_carrier + 1) % nd_pool.carriers_used;
		if (refcount_read(&skb->users) == 1)
			return skb;
	}
	return NULL;
}

void nd_pool_load(struct sk_buff *carrier, const u8 *frame, u32 bytes)
{
	u8 *to = carrier->head + nd_pool.headroom;

	memcpy(to, frame, bytes);
	if (bytes < ETH_ZLEN) {
		memset(to + bytes, 0, ETH_ZLEN - bytes);
		bytes = ETH_ZLEN;
	}
	carrier->data = to;
	carrier->len = bytes;
	carrier->data_len = 0;
	skb_set_tail_pointer(carrier, bytes);
}
