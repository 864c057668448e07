/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A CPU that is held for ever and yet wakes up now and then.
 */
#ifndef NETDUMP_DOZE_H
#define NETDUMP_DOZE_H

/* Once, on the CPU that is held: from here on no interrupt reaches the kernel on it. */
void nd_doze_begin(void);

/* Some milliseconds up to a second; one look where the CPU has no timer of its own that is known here. */
void nd_doze(void);

#endif
