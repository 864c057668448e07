/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Locks after a crash: no wait for an owner that will never run again.
 */
#ifndef NETDUMP_LOCKS_H
#define NETDUMP_LOCKS_H

#include <linux/types.h>

/* Finds the kernel's functions that wait for locks; 0 or an error. nd_locks_forget() undoes it. */
int nd_locks_find(void);
void nd_locks_forget(void);

/* From now on, and until nd_locks_close(), a lock that is held is taken over at once. */
void nd_locks_open(void);
void nd_locks_close(void);

/* How many were. */
u32 nd_locks_taken_over(void);

/* Makes the copy `to` of page `pfn` what it was before nd_locks_open(). */
void nd_locks_conceal(u8 *to, u64 pfn);

#endif
