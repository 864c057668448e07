/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the partner of a bond must hear from a crashed host.
 */
#ifndef NETDUMP_BOND_H
#define NETDUMP_BOND_H

#include <linux/netdevice.h>

/* Bytes of the frame that nd_bond_sign_of_life() writes. */
#define ND_SIGN_BYTES	124

/*
 * Writes the frame by which a card of an 802.3ad bond keeps its place at the partner. False: it is none of such a bond's. After the
 * crash only.
 */
bool nd_bond_sign_of_life(const struct net_device *card, u8 *frame);

#endif
