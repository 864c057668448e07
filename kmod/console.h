/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The console: kernel messages to servers, live. console.c says how.
 */
#ifndef NETDUMP_CONSOLE_H
#define NETDUMP_CONSOLE_H

#include "shim.h"

/* Takes from VMCOREINFO where the kernel's log is; `ring` is the address of its structure. */
void nd_ring_find(const char *vmcoreinfo, u64 ring);

/* Begins to send what has just been armed; ends it. Both sleep. */
int nd_console_start(void);
void nd_console_stop(void);

/* Bytes of memory that it holds. */
size_t nd_console_bytes(void);

/* What a crash needs to know to go on. Reads nothing that may be torn. */
void nd_console_sent(struct nd_dying *dying);

/* The clocks of a host that has crashed, `now` microseconds ago. */
struct nd_clock nd_console_crash_clock(u64 now);

#endif
