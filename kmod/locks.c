// SPDX-License-Identifier: GPL-2.0-only
/*
 * Locks after a crash.
 *
 * One CPU runs. A lock that it finds held belongs to a CPU that is stopped for ever, or to the code that crashed under
 * it: no owner will ever give it back, and drivers, allocators and the network stack take locks that this module does not
 * know. So the kernel's functions that wait for a lock are replaced, for as long as the dump goes on, by ones that take it
 * over at once. What the lock protects may be half changed. That is a fault at worst, which the dump path survives, where
 * waiting is the certain end.
 *
 * Each function's first instruction becomes a jump, written through a mapping of our own made when the host was armed.
 * Nobody runs inside the functions while that happens, and the dump shows their true text.
 */

#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/vmalloc.h>
#include <asm/page.h>
#include <asm/processor.h>
#include <asm/qrwlock.h>
#include <asm/qspinlock.h>

#include "locks.h"

#define JUMP_BYTES	5
#define JUMP_OPCODE	0xe9

static u32 taken_over;

/* Instead of queued_spin_lock_slowpath(), which is called when the lock was not free. */
static void nd_take_spinlock(struct qspinlock *lock, u32 value)
{
	taken_over++;
	atomic_set(&lock->val, _Q_LOCKED_VAL);
}

#ifdef CONFIG_PREEMPT_RT
/* Spin locks are mutexes there, and waiting for one would switch to another task. Instead of all of rt_spin_lock(). */
static void nd_take_rt_lock(spinlock_t *lock)
{
	if (READ_ONCE(lock->lock.owner))
		taken_over++;
	WRITE_ONCE(lock->lock.owner, current);
	rcu_read_lock();
	migrate_disable();
}
#else
static void nd_take_read_lock(struct qrwlock *lock)
{
	taken_over++;
	atomic_set(&lock->cnts, _QR_BIAS);
}

static void nd_take_write_lock(struct qrwlock *lock)
{
	taken_over++;
	atomic_set(&lock->cnts, _QW_LOCKED);
}
#endif

/* One replaced function. */
struct nd_patch {
	void *waits;
	void *takes;
	/* Where the jump goes: the instruction after the function's landing pad for indirect jumps, if it has one. */
	unsigned long at;
	/* Two pages of the kernel's text, because the jump may begin in one and end in the next. */
	void *mapping;
	u8 *writable;
	u8 original[JUMP_BYTES];
};

static struct nd_patch patches[] = {
	{ native_queued_spin_lock_slowpath, nd_take_spinlock },
#ifdef CONFIG_PARAVIRT_SPINLOCKS
	{ __pv_queued_spin_lock_slowpath, nd_take_spinlock },
#endif
#ifdef CONFIG_PREEMPT_RT
	{ rt_spin_lock, nd_take_rt_lock },
#else
	{ queued_read_lock_slowpath, nd_take_read_lock },
	{ queued_write_lock_slowpath, nd_take_write_lock },
#endif
};

static bool opened;

static u64 nd_text_pfn(unsigned long address)
{
	return PHYS_PFN(address - __START_KERNEL_map + phys_base);
}

/* Kernels built for indirect branch tracking begin each function with four bytes for it, used or not. */
static unsigned long nd_behind_landing_pad(void *function)
{
	static const u8 endbr64[] = { 0xf3, 0x0f, 0x1e, 0xfa };
	bool pad = IS_ENABLED(CONFIG_X86_KERNEL_IBT) || !memcmp(function, endbr64, sizeof(endbr64));

	return (unsigned long)function + (pad ? sizeof(endbr64) : 0);
}

static int nd_map(struct nd_patch *patch)
{
	struct page *pages[2];

	patch->at = nd_behind_landing_pad(patch->waits);
	pages[0] = pfn_to_page(nd_text_pfn(patch->at));
	pages[1] = pfn_to_page(nd_text_pfn(patch->at + JUMP_BYTES - 1));
	patch->mapping = vmap(pages, ARRAY_SIZE(pages), VM_MAP, PAGE_KERNEL);
	if (!patch->mapping)
		return -ENOMEM;
	patch->writable = (u8 *)patch->mapping + offset_in_page(patch->at);
	return 0;
}

int nd_locks_find(void)
{
	unsigned int i;
	int error = 0;

	for (i = 0; i < ARRAY_SIZE(patches) && !error; i++)
		error = nd_map(&patches[i]);
	if (error)
		nd_locks_forget();
	return error;
}

void nd_locks_forget(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(patches); i++) {
		vunmap(patches[i].mapping);
		patches[i].mapping = NULL;
	}
}

/* The two pages need not lie side by side in memory, but in the mapping they do. */
static void nd_write_text(struct nd_patch *patch, const u8 *bytes)
{
	memcpy(patch->writable, bytes, JUMP_BYTES);
}

void nd_locks_open(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(patches) && !opened; i++) {
		struct nd_patch *patch = &patches[i];
		s32 distance = (unsigned long)patch->takes - (patch->at + JUMP_BYTES);
		u8 jump[JUMP_BYTES] = { JUMP_OPCODE };

		memcpy(jump + 1, &distance, sizeof(distance));
		memcpy(patch->original, patch->writable, JUMP_BYTES);
		nd_write_text(patch, jump);
	}
	opened = true;
	sync_core();
}

void nd_locks_close(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(patches) && opened; i++)
		nd_write_text(&patches[i], patches[i].original);
	opened = false;
	sync_core();
}

u32 nd_locks_taken_over(void)
{
	return taken_over;
}

void nd_locks_conceal(u8 *to, u64 pfn)
{
	unsigned int i, byte;

	for (i = 0; i < ARRAY_SIZE(patches) && opened; i++)
		for (byte = 0; byte < JUMP_BYTES; byte++)
			if (nd_text_pfn(patches[i].at + byte) == pfn)
				to[offset_in_page(patches[i].at + byte)] = patches[i].original[byte];
}
