/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The filter: which pages of memory are left out of a dump.
 */
#ifndef NETDUMP_FILTER_H
#define NETDUMP_FILTER_H

#include <linux/mm_types.h>
#include <linux/types.h>

/* Bits of a filter level, as makedumpfile numbers its dump levels. 1, zero pages, is the core's own business. */
#define ND_FILTER_CACHE		2
/* Page cache, whether or not a file system keeps data of its own with it. */
#define ND_FILTER_CACHE_PRIVATE	4
#define ND_FILTER_USER		8
#define ND_FILTER_FREE		16

/* What has been found out about the pages before; ND_FILTER_START() for pages that do not follow them. */
struct nd_filter {
	u32 level;
	/* First page behind the free pages that were met last. */
	u64 free_end;
	/* The page that was decided last, or the first of the compound page that it belongs to. */
	struct page *head;
	u32 kinds;
};

#define ND_FILTER_START(level_)	((struct nd_filter){ .level = (level_) })

u64 nd_filter_begin(struct nd_filter *filter, u64 first);
bool nd_filter_excludes(struct nd_filter *filter, struct page *page, u64 pfn);

/* From now on the user memory of the calling task is kept whatever the level says. */
void nd_filter_keep(void);

#endif
