/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Hardware state: what a warm reboot destroys and no page of memory holds.
 */
#ifndef NETDUMP_HARDWARE_H
#define NETDUMP_HARDWARE_H

#include <linux/types.h>

/* While armed; the first returns an error. */
int nd_hardware_take(void);
void nd_hardware_free(void);
size_t nd_hardware_bytes(void);

/* What the crash itself changes soon on the calling CPU. Cannot fault. */
void nd_hardware_note(void);
/* Reads the calling CPU's registers. In an NMI too. */
void nd_hardware_capture(void);

/* The body of a record of the protocol: the registers of a CPU. `own`: the calling one, which has not read them yet. */
size_t nd_hardware_read_processor(u8 *to, int cpu, bool own);

/* The next devices' configuration spaces, at most `room` bytes; nothing when there is no further device. */
size_t nd_hardware_read_devices(u8 *to, size_t room, bool from_start);
/* What of them lies in the buffer already, when a device did not survive being asked. */
size_t nd_hardware_devices_read(void);

#endif
