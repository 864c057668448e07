// SPDX-License-Identifier: GPL-2.0-only
/*
 * A CPU that is held for ever and yet wakes up now and then, so that it can watch another one without being busy: that
 * would take a whole core from whoever runs beside it, which in a virtual machine is the one that dumps.
 *
 * It sleeps with interrupts on. They all lead to one instruction, by a table of interrupt gates of our own, so that
 * nothing of the kernel runs here any more; what wakes it is its local APIC's timer. Exceptions and NMIs are the kernel's
 * as before.
 */

#include <linux/cpufeature.h>
#include <linux/mm.h>
#include <linux/objtool.h>
#include <asm/apic.h>
#include <asm/desc.h>
#include <asm/ibt.h>

#include "doze.h"

/* Of the highest class, so that the task priority can keep away all lower ones. */
#define WAKE_VECTOR	0xf1
#define WAKE_PRIORITY	14UL

/* 17 ms of a bus clock of 1 GHz, 0.7 s of one of 25 MHz. */
#define WAKE_DIVISOR	APIC_TDR_DIV_128
#define WAKE_COUNT	0x20000

/* It interrupts the one `hlt` below and nothing else. */
asm(".pushsection .text, \"ax\"\n"
    ".type nd_doze_wake, @function\n"
    "nd_doze_wake:\n"
    ASM_ENDBR
    "iretq\n"
    ".size nd_doze_wake, . - nd_doze_wake\n"
    ".popsection\n");
void nd_doze_wake(void);
STACK_FRAME_NON_STANDARD(nd_doze_wake);

static gate_desc gates[IDT_ENTRIES] __aligned(PAGE_SIZE);
static bool has_timer;

static void nd_lead_to_wake(gate_desc *gate)
{
	unsigned long address = (unsigned long)nd_doze_wake;

	*gate = (gate_desc){
		.offset_low = (u16)address,
		.segment = __KERNEL_CS,
		.bits = { .type = GATE_INTERRUPT, .p = 1 },
		.offset_middle = (u16)(address >> 16),
		.offset_high = (u32)(address >> 32),
	};
}

void nd_doze_begin(void)
{
	struct desc_ptr table;
	unsigned int i;

	/* Without a table of gates, or with a hypervisor's, there is nothing to replace. */
	if (boot_cpu_has(X86_FEATURE_XENPV) || !boot_cpu_has(X86_FEATURE_APIC))
		return;
#ifdef X86_FEATURE_FRED
	if (cpu_feature_enabled(X86_FEATURE_FRED))
		return;
#endif
	store_idt(&table);
	memcpy(gates, (void *)table.address, sizeof(gates[0]) * FIRST_EXTERNAL_VECTOR);
	for (i = FIRST_EXTERNAL_VECTOR; i < IDT_ENTRIES; i++)
		nd_lead_to_wake(&gates[i]);
	table = (struct desc_ptr){ .size = sizeof(gates) - 1, .address = (unsigned long)gates };
	native_load_idt(&table);
	asm volatile("mov %0, %%cr8" : : "r" (WAKE_PRIORITY) : "memory");
	apic->write(APIC_TDCR, WAKE_DIVISOR);
	apic->write(APIC_LVTT, APIC_LVT_TIMER_PERIODIC | WAKE_VECTOR);
	apic->write(APIC_TMICT, WAKE_COUNT);
	has_timer = true;
}

void nd_doze(void)
{
	if (!has_timer) {
		cpu_relax();
		return;
	}
	asm volatile("sti; hlt; cli" : : : "memory");
	apic->write(APIC_EOI, 0);
}
