// SPDX-License-Identifier: GPL-2.0-only
/*
 * The filter: decides page by page what a dump leaves out, with the running kernel's own idea of a page, so that no
 * table of another kernel's structures can be wrong.
 *
 * It runs after the crash, on memory that may be damaged. So: each page is met once, no list is followed, every number
 * that a page holds is bounded before it is used, and what makes no sense is sent. Slab, page tables, reserved memory,
 * kernel stacks, vmalloc and per-CPU memory have none of the marks looked for here. Free pages on the CPUs' own lists
 * have none either, and are sent.
 */

#include <linux/mm.h>
#include <linux/memory_hotplug.h>
#include <linux/page-flags.h>
#include <linux/pgtable.h>
#include <linux/sched.h>
#include <linux/uaccess.h>

#include "filter.h"

/* The largest block of the page allocator. */
#define ND_ORDER_MAX		ilog2(MAX_ORDER_NR_PAGES)

/* The largest compound page: 1 GiB of hugetlb. */
#define ND_COMPOUND_PAGES_MAX	(1UL << (PUD_SHIFT - PAGE_SHIFT))

/* Free pages that are told at once: 1 GiB. */
#define ND_FREE_PAGES_MAX	(1UL << 18)

/* Pages of one piece of memory that the kept pages are looked up for at a time: 2 GiB, one bit a page. */
#define ND_KEPT_PAGES		(1UL << 19)

/* Page tables that are read for one piece. A task that maps more has the rest of its memory left out. */
#define ND_TABLES_MAX		(1U << 20)

/* ---- The crashing task's memory ---- */

static struct {
	/* Physical memory has no order by task, so its page tables are walked once for each piece of memory. */
	DECLARE_BITMAP(pages, ND_KEPT_PAGES);
	u64 first;
	bool filled;
	/* The task's highest page table; NULL if it has no memory of its own, or none shall be kept. */
	const pte_t *table;
	u32 tables_left;
} nd_kept;

void nd_filter_keep(void)
{
	struct mm_struct *mm = current->mm;
	pgd_t *table;

	nd_kept.filled = false;
	nd_kept.table = mm && !get_kernel_nofault(table, &mm->pgd) ? (const pte_t *)table : NULL;
}

static void nd_keep_pages(u64 first, u64 count)
{
	u64 from = max(first, nd_kept.first), to = min(first + count, nd_kept.first + ND_KEPT_PAGES);

	if (from < to)
		bitmap_set(nd_kept.pages, from - nd_kept.first, to - from);
}

/* The table of a level at page `pfn`. The kernel marks those of the two lowest levels, so damage leads nowhere. */
static const pte_t *nd_table(u64 pfn, unsigned int level)
{
	struct page *page = pfn_to_online_page(pfn);

	return page && (level > 2 || PageTable(page)) ? pfn_to_kaddr(pfn) : NULL;
}

/*
 * Marks what the first `entries` of a table map. Entries of all levels of an x86 page table are alike; that of a large
 * page has a flag where the page's number has a zero.
 */
static void nd_keep_table(const pte_t *table, unsigned int level, unsigned int entries)
{
	u64 pages = 1ULL << (level - 1) * (PMD_SHIFT - PAGE_SHIFT);
	unsigned int i;

	if (!table || !nd_kept.tables_left)
		return;
	nd_kept.tables_left--;
	for (i = 0; i < entries; i++) {
		pte_t entry;

		if (get_kernel_nofault(entry, table + i))
			return;
		if (!pte_present(entry))
			continue;
		if (level == 1 || (level < 4 && pte_flags(entry) & _PAGE_PSE))
			nd_keep_pages(round_down(pte_pfn(entry), pages), pages);
		else if (pte_flags(entry) & _PAGE_PRESENT)
			nd_keep_table(nd_table(pte_pfn(entry), level - 1), level - 1, PTRS_PER_PTE);
	}
}

static bool nd_is_kept(u64 pfn)
{
	if (!nd_kept.table)
		return false;
	if (!nd_kept.filled || pfn - nd_kept.first >= ND_KEPT_PAGES) {
		nd_kept.first = round_down(pfn, ND_KEPT_PAGES);
		nd_kept.filled = true;
		nd_kept.tables_left = ND_TABLES_MAX;
		bitmap_zero(nd_kept.pages, ND_KEPT_PAGES);
		/* The second half of the highest table maps the kernel. */
		nd_keep_table(nd_kept.table, pgtable_l5_enabled() ? 5 : 4, KERNEL_PGD_BOUNDARY);
	}
	return test_bit(pfn - nd_kept.first, nd_kept.pages);
}

/* ---- Kinds of pages ---- */

/*
 * The first page behind the free block that `page` is the first one of, if it is one. Its order is in page->private
 * while PageBuddy() holds.
 */
static u64 nd_free_block_end(struct page *page, u64 pfn)
{
	unsigned long order;

	if (!PageBuddy(page))
		return pfn;
	order = READ_ONCE(page->private);
	return order <= ND_ORDER_MAX && IS_ALIGNED(pfn, 1UL << order) ? pfn + (1UL << order) : pfn + 1;
}

/*
 * The first page behind the free block that page `pfn` lies in, or `pfn` if it lies in none. Only the first page of a
 * block says that it is free, so those of all blocks that could hold `pfn` are asked: a block of 2^n pages begins at a
 * multiple of 2^n.
 */
static u64 nd_free_end(u64 pfn)
{
	unsigned int order;

	for (order = 0; order <= ND_ORDER_MAX; order++) {
		u64 first = round_down(pfn, 1ULL << order);
		struct page *page;
		u64 end;

		if (order && first == round_down(pfn, 1ULL << (order - 1)))
			continue;
		page = pfn_to_online_page(first);
		end = page ? nd_free_block_end(page, first) : first;
		if (end > pfn)
			return end;
	}
	return pfn;
}

/* The first page of the compound page that `page` belongs to, or NULL if what it says of that cannot be. */
static struct page *nd_head(struct page *page, u64 pfn)
{
	struct page *head = compound_head(page);
	u64 first;

	if (head == page)
		return page;
	if ((unsigned long)page - (unsigned long)head >= ND_COMPOUND_PAGES_MAX * sizeof(*page))
		return NULL;
	first = page_to_pfn(head);
	return first < pfn && pfn_to_online_page(first) == head && !PageTail(head) ? head : NULL;
}

/* The mark of hugetlb may lie in the page behind the first one. */
static bool nd_is_hugetlb(struct page *head)
{
	return PageHead(head) && pfn_to_online_page(page_to_pfn(head) + 1) && PageHuge(head);
}

/*
 * The bits of a level that exclude a page, which is no free one; `head` is no tail. The marks are those that
 * makedumpfile looks for, so that one level means one thing.
 */
static u32 nd_kinds(struct page *head)
{
	struct folio *folio = (struct folio *)head;

	if (PagePoisoned(head) || PageReserved(head) || PageSlab(head) || PageTable(head))
		return 0;
	if (folio_test_anon(folio) || nd_is_hugetlb(head))
		return ND_FILTER_USER;
	if (!folio_test_lru(folio) && !folio_test_swapcache(folio))
		return 0;
	return folio_test_private(folio) ? ND_FILTER_CACHE_PRIVATE : ND_FILTER_CACHE | ND_FILTER_CACHE_PRIVATE;
}

/* ---- What the rest of the module calls ---- */

/*
 * Before the pages from `first` on are asked for one by one: how many of them are free and left out. Only one page of
 * a free block is looked at, which is what makes a host's free memory cost next to nothing.
 */
u64 nd_filter_begin(struct nd_filter *filter, u64 first)
{
	u64 end, next = first;

	if (filter->level & ND_FILTER_FREE)
		next = nd_free_end(first);
	do {
		struct page *page = NULL;

		end = next;
		if (end > first && end - first < ND_FREE_PAGES_MAX)
			page = pfn_to_online_page(end);
		if (page)
			next = nd_free_block_end(page, end);
	} while (next > end);
	filter->free_end = end;
	return end - first;
}

/* Whether page `pfn`, which is RAM, is left out. Pages are asked for in ascending order. */
bool nd_filter_excludes(struct nd_filter *filter, struct page *page, u64 pfn)
{
	struct page *head;

	if (filter->level & ND_FILTER_FREE) {
		if (pfn >= filter->free_end)
			filter->free_end = nd_free_block_end(page, pfn);
		if (pfn < filter->free_end)
			return true;
	}
	if (!(filter->level & (ND_FILTER_CACHE | ND_FILTER_CACHE_PRIVATE | ND_FILTER_USER)))
		return false;
	head = nd_head(page, pfn);
	if (!head)
		return false;
	if (head != filter->head) {
		filter->head = head;
		filter->kinds = nd_kinds(head);
	}
	return filter->level & filter->kinds && !nd_is_kept(pfn);
}
