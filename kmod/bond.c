// SPDX-License-Identifier: GPL-2.0-only
/*
 * A switch takes a port out of an 802.3ad bond that says nothing for three or ninety seconds. The kernel's timers, which
 * would say it, stand still after a crash, so what each port said last is said again.
 */

#include <linux/etherdevice.h>
#include <linux/if_ether.h>
#include <net/bonding.h>

#include "bond.h"

bool nd_bond_sign_of_life(const struct net_device *card, u8 *frame)
{
	struct lacpdu_header *header = (struct lacpdu_header *)frame;
	const u8 to[ETH_ALEN] = { 0x01, 0x80, 0xc2, 0x00, 0x00, 0x02 };
	const struct slave *slave;

	BUILD_BUG_ON(sizeof(*header) != ND_SIGN_BYTES);
	if (!netif_is_bond_slave(card))
		return false;
	slave = rcu_dereference_raw(card->rx_handler_data);
	if (!slave || slave->dev != card || BOND_MODE(slave->bond) != BOND_MODE_8023AD || !SLAVE_AD_INFO(slave))
		return false;
	ether_addr_copy(header->hdr.h_dest, to);
	ether_addr_copy(header->hdr.h_source, slave->perm_hwaddr);
	header->hdr.h_proto = htons(ETH_P_SLOW);
	header->lacpdu = SLAVE_AD_INFO(slave)->port.lacpdu;
	return true;
}
