// SPDX-License-Identifier: GPL-2.0-only
/*
 * Hardware state: what a warm reboot destroys and no page of memory holds.
 *
 * Each CPU reads its own registers: the held ones in the NMI that stops them, after what the dump cannot do without, the
 * crashing one when the server wants them. Devices are asked last of all, when everything else has arrived: one that does
 * not answer may stop the machine for good. Their list is walked as it lies in memory, because the kernel's way of walking
 * it sleeps, and their bus is asked below the lock that the kernel puts around it.
 */

#include <linux/cpufeature.h>
#include <linux/mm.h>
#include <linux/nmi.h>
#include <linux/pci.h>
#include <asm/apic.h>
#include <asm/desc.h>
#include <asm/mce.h>
#include <asm/msr.h>
#include <asm/special_insns.h>
#include <asm/tsc.h>

#include "abi.h"
#include "hardware.h"

/* Banks of a CPU that are read. Today's have up to 32; the count that the CPU tells is sent too. */
#define ND_BANKS_MAX	32

/* Longest stay on a bus that is walked by way of lists that may be torn. */
#define ND_DEVICES_MAX	8192

/* What asking devices may take. After the first time only the first 256 bytes of each are asked for, after the second none. */
#define ND_DEVICES_WHOLE_MS	1000
#define ND_DEVICES_MS		3000

/* A bank of machine-check registers. */
struct nd_bank {
	u64 control;
	u64 status;
	u64 address;
	u64 misc;
};

static const u32 msrs[] = {
	MSR_IA32_APICBASE, MSR_IA32_UCODE_REV, MSR_IA32_MCG_CAP, MSR_IA32_MCG_STATUS, MSR_IA32_MCG_CTL, MSR_IA32_THERM_STATUS,
	MSR_IA32_MISC_ENABLE, MSR_IA32_PACKAGE_THERM_STATUS, MSR_IA32_DEBUGCTLMSR, MSR_EFER, MSR_LSTAR, MSR_FS_BASE,
	MSR_GS_BASE, MSR_KERNEL_GS_BASE,
};

/* Those of both kinds of local APIC: reading another one would fault. */
static const u16 apic_registers[] = {
	APIC_ID, APIC_LVR, APIC_TASKPRI, APIC_LDR, APIC_SPIV,
	APIC_ISR, APIC_ISR + 0x10, APIC_ISR + 0x20, APIC_ISR + 0x30, APIC_ISR + 0x40, APIC_ISR + 0x50, APIC_ISR + 0x60,
	APIC_ISR + 0x70,
	APIC_TMR, APIC_TMR + 0x10, APIC_TMR + 0x20, APIC_TMR + 0x30, APIC_TMR + 0x40, APIC_TMR + 0x50, APIC_TMR + 0x60,
	APIC_TMR + 0x70,
	APIC_IRR, APIC_IRR + 0x10, APIC_IRR + 0x20, APIC_IRR + 0x30, APIC_IRR + 0x40, APIC_IRR + 0x50, APIC_IRR + 0x60,
	APIC_IRR + 0x70,
	APIC_ESR, APIC_LVTT, APIC_LVT0, APIC_LVT1, APIC_LVTERR, APIC_TMICT, APIC_TMCCT, APIC_TDCR,
	/* From here on only where the version register says so. */
	APIC_LVTPC, APIC_LVTTHMR, APIC_LVTCMCI,
};
#define APIC_REGISTERS_ALWAYS	(ARRAY_SIZE(apic_registers) - 3)

/* Control registers as the wire numbers them. */
static const u8 controls[] = { 0, 2, 3, 4, 8 };
enum { AT_CR0, AT_CR2, AT_CR3, AT_CR4, AT_CR8 };

/* One CPU. */
struct nd_processor {
	u64 controls[ARRAY_SIZE(controls)];
	u64 xcr0;
	struct desc_ptr gdt;
	struct desc_ptr idt;
	u16 task_register;
	u16 ldt;
	u64 msrs[ARRAY_SIZE(msrs)];
	u32 apic[ARRAY_SIZE(apic_registers)];
	u32 apic_used;
	u32 banks_used;
	/* Bit `i`: msrs[i] could be read. */
	u32 msrs_read;
	bool has_xcr0;
	/* CR2 and CR8 are those of the crash, and not of now. */
	bool noted;
	/* Written last. */
	bool valid;
	struct nd_bank banks[ND_BANKS_MAX];
};

static struct nd_processor *processors;

/* Where the walk over the devices is. */
static struct {
	struct pci_bus *bus;
	/* The device that is asked next; the bus's list itself at its end. */
	struct list_head *at;
	u32 devices;
	u64 begun;
	size_t used;
	bool ended;
} walk;

int nd_hardware_take(void)
{
	processors = kvcalloc(nr_cpu_ids, sizeof(*processors), GFP_KERNEL);
	return processors ? 0 : -ENOMEM;
}

void nd_hardware_free(void)
{
	kvfree(processors);
	processors = NULL;
}

size_t nd_hardware_bytes(void)
{
	return PAGE_ALIGN(nr_cpu_ids * sizeof(*processors));
}

/* ---- Processors ---- */

/* Under a hypervisor that runs the kernel in place of a machine, these registers are its own. */
static bool nd_has_registers(void)
{
	return !boot_cpu_has(X86_FEATURE_XENPV);
}

static bool nd_read_msr(u32 number, u64 *value)
{
	u32 low, high;

	if (rdmsr_safe(number, &low, &high))
		return false;
	*value = (u64)high << 32 | low;
	return true;
}

static void nd_capture_controls(struct nd_processor *to)
{
	to->controls[AT_CR0] = native_read_cr0();
	to->controls[AT_CR3] = __native_read_cr3();
	to->controls[AT_CR4] = native_read_cr4();
	if (!to->noted) {
		to->controls[AT_CR2] = native_read_cr2();
		asm volatile("mov %%cr8, %0" : "=r" (to->controls[AT_CR8]));
	}
	to->has_xcr0 = boot_cpu_has(X86_FEATURE_OSXSAVE);
	if (to->has_xcr0) {
		u32 low, high;

		asm volatile("xgetbv" : "=a" (low), "=d" (high) : "c" (0));
		to->xcr0 = (u64)high << 32 | low;
	}
	native_store_gdt(&to->gdt);
	store_idt(&to->idt);
	asm volatile("str %0" : "=m" (to->task_register));
	asm volatile("sldt %0" : "=m" (to->ldt));
}

static void nd_capture_msrs(struct nd_processor *to)
{
	unsigned int i;

	to->msrs_read = 0;
	for (i = 0; i < ARRAY_SIZE(msrs); i++)
		if (nd_read_msr(msrs[i], &to->msrs[i]))
			to->msrs_read |= 1U << i;
}

/* Address and miscellaneous register exist where the status says that they are valid. */
static void nd_capture_banks(struct nd_processor *to)
{
	u64 capability = 0;
	unsigned int i, count;

	to->banks_used = 0;
	if (!boot_cpu_has(X86_FEATURE_MCE) || !boot_cpu_has(X86_FEATURE_MCA) ||
	    !nd_read_msr(MSR_IA32_MCG_CAP, &capability))
		return;
	count = min_t(u64, capability & 0xff, ND_BANKS_MAX);
	for (i = 0; i < count; i++) {
		struct nd_bank *bank = &to->banks[i];

		*bank = (struct nd_bank){};
		if (!nd_read_msr(MSR_IA32_MCx_STATUS(i), &bank->status))
			break;
		nd_read_msr(MSR_IA32_MCx_CTL(i), &bank->control);
		if (bank->status & MCI_STATUS_ADDRV)
			nd_read_msr(MSR_IA32_MCx_ADDR(i), &bank->address);
		if (bank->status & MCI_STATUS_MISCV)
			nd_read_msr(MSR_IA32_MCx_MISC(i), &bank->misc);
		to->banks_used = i + 1;
	}
}

static void nd_capture_apic(struct nd_processor *to)
{
	u32 version, last, i;

	to->apic_used = 0;
	if (!boot_cpu_has(X86_FEATURE_APIC))
		return;
	version = apic->read(APIC_LVR);
	last = GET_APIC_MAXLVT(version);
	/* The fifth entry is the performance counters', the sixth the thermal sensor's, the seventh the corrected errors'. */
	to->apic_used = APIC_REGISTERS_ALWAYS + (last >= 4) + (last >= 5) + (last >= 6);
	for (i = 0; i < to->apic_used; i++) {
		bool changed = apic_registers[i] == APIC_TASKPRI && to->noted;

		/* CR8 is its upper half. The dump path has raised it since. */
		to->apic[i] = changed ? to->controls[AT_CR8] << 4 : apic->read(apic_registers[i]);
	}
}

void nd_hardware_note(void)
{
	struct nd_processor *own = &processors[raw_smp_processor_id()];

	if (!nd_has_registers() || own->noted)
		return;
	own->controls[AT_CR2] = native_read_cr2();
	asm volatile("mov %%cr8, %0" : "=r" (own->controls[AT_CR8]));
	own->noted = true;
}

void nd_hardware_capture(void)
{
	struct nd_processor *own = &processors[raw_smp_processor_id()];

	if (!nd_has_registers() || own->valid)
		return;
	nd_capture_controls(own);
	nd_capture_msrs(own);
	nd_capture_banks(own);
	nd_capture_apic(own);
	smp_store_release(&own->valid, true);
}

/* ---- A processor as the wire has it ---- */

/* Where registers lie: proto::hardware::space. */
enum nd_space {
	ND_SPACE_MSR = 1,
	ND_SPACE_CONTROL,
	ND_SPACE_EXTENDED_CONTROL,
	ND_SPACE_APIC,
	ND_SPACE_TABLE,
};

static struct nd_register *nd_put(struct nd_register *at, enum nd_space space, u32 number, u64 value)
{
	*at = (struct nd_register){ .space = space, .number = number, .value = value };
	return at + 1;
}

static struct nd_register *nd_put_banks(struct nd_register *at, const struct nd_processor *from)
{
	unsigned int i;

	for (i = 0; i < from->banks_used; i++) {
		const struct nd_bank *bank = &from->banks[i];

		at = nd_put(at, ND_SPACE_MSR, MSR_IA32_MCx_CTL(i), bank->control);
		at = nd_put(at, ND_SPACE_MSR, MSR_IA32_MCx_STATUS(i), bank->status);
		if (bank->status & MCI_STATUS_ADDRV)
			at = nd_put(at, ND_SPACE_MSR, MSR_IA32_MCx_ADDR(i), bank->address);
		if (bank->status & MCI_STATUS_MISCV)
			at = nd_put(at, ND_SPACE_MSR, MSR_IA32_MCx_MISC(i), bank->misc);
	}
	return at;
}

static struct nd_register *nd_put_registers(struct nd_register *at, const struct nd_processor *from)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(controls); i++)
		at = nd_put(at, ND_SPACE_CONTROL, controls[i], from->controls[i]);
	if (from->has_xcr0)
		at = nd_put(at, ND_SPACE_EXTENDED_CONTROL, 0, from->xcr0);
	at = nd_put(at, ND_SPACE_TABLE, 0, from->gdt.address);
	at = nd_put(at, ND_SPACE_TABLE, 1, from->gdt.size);
	at = nd_put(at, ND_SPACE_TABLE, 2, from->idt.address);
	at = nd_put(at, ND_SPACE_TABLE, 3, from->idt.size);
	at = nd_put(at, ND_SPACE_TABLE, 4, from->task_register);
	at = nd_put(at, ND_SPACE_TABLE, 5, from->ldt);
	for (i = 0; i < ARRAY_SIZE(msrs); i++)
		if (from->msrs_read & 1U << i)
			at = nd_put(at, ND_SPACE_MSR, msrs[i], from->msrs[i]);
	at = nd_put_banks(at, from);
	for (i = 0; i < from->apic_used; i++)
		at = nd_put(at, ND_SPACE_APIC, apic_registers[i], from->apic[i]);
	return at;
}

size_t nd_hardware_read_processor(u8 *to, int cpu, bool own)
{
	struct nd_processor_head *head = (struct nd_processor_head *)to;
	struct nd_register *at = (struct nd_register *)(head + 1);

	BUILD_BUG_ON(ARRAY_SIZE(controls) + 1 + 6 + ARRAY_SIZE(msrs) + 4 * ND_BANKS_MAX + ARRAY_SIZE(apic_registers) >
		     ND_PROCESSOR_REGISTERS_MAX);
	BUILD_BUG_ON(ARRAY_SIZE(msrs) > 32);
	*head = (struct nd_processor_head){ .cpu = cpu };
	if (own)
		nd_hardware_capture();
	if (smp_load_acquire(&processors[cpu].valid))
		at = nd_put_registers(at, &processors[cpu]);
	return (u8 *)at - to;
}

/* ---- Devices ---- */

static u64 nd_walk_ms(void)
{
	return div_u64(rdtsc() - walk.begun, tsc_khz);
}

/* How much of a device may be asked for: nothing of one that is off, gone, or under reset. */
static unsigned int nd_config_bytes(const struct pci_dev *device)
{
	u64 passed = nd_walk_ms();
	bool silent = device->current_state == PCI_D3cold || device->error_state == pci_channel_io_perm_failure ||
		      device->block_cfg_access;

	if (silent || passed >= ND_DEVICES_MS)
		return 0;
	if (passed >= ND_DEVICES_WHOLE_MS)
		return PCI_CFG_SPACE_SIZE;
	return clamp_t(int, device->cfg_size, PCI_CFG_SPACE_SIZE, PCI_CFG_SPACE_EXP_SIZE);
}

/* Reads four bytes at a time; returns how many were read. A device that is not there answers with ones, or with an error. */
static unsigned int nd_read_config(u8 *to, const struct pci_dev *device, unsigned int bytes)
{
	struct pci_bus *bus = device->bus;
	unsigned int at;
	u32 value;

	for (at = 0; at < bytes; at += sizeof(value)) {
		/* One that lets the bus wait for each answer is given up in the middle. */
		if (at % 64 == 0 && nd_walk_ms() >= ND_DEVICES_MS)
			break;
		if (bus->ops->read(bus, device->devfn, at, sizeof(value), &value))
			break;
		if (at == 0 && value == ~0U)
			break;
		memcpy(to + at, &value, sizeof(value));
	}
	return at;
}

static void nd_walk_to_bus(struct pci_bus *bus)
{
	walk.bus = bus;
	walk.at = bus->devices.next;
}

/* The bus after this one and all below it. */
static void nd_walk_beyond(struct pci_bus *bus)
{
	struct list_head *next = bus->node.next;

	while (bus->parent && next == &bus->parent->children) {
		bus = bus->parent;
		next = bus->node.next;
	}
	walk.ended = next == &pci_root_buses;
	if (!walk.ended)
		nd_walk_to_bus(list_entry(next, struct pci_bus, node));
}

/* The next device; NULL if there is none. */
static struct pci_dev *nd_walk_device(void)
{
	struct pci_dev *device;
	unsigned int buses = 0;

	while (!walk.ended && walk.at == &walk.bus->devices) {
		if (buses++ == ND_DEVICES_MAX)
			walk.ended = true;
		else if (!list_empty(&walk.bus->children))
			nd_walk_to_bus(list_first_entry(&walk.bus->children, struct pci_bus, node));
		else
			nd_walk_beyond(walk.bus);
	}
	if (walk.ended || walk.devices++ == ND_DEVICES_MAX)
		return NULL;
	device = list_entry(walk.at, struct pci_dev, bus_list);
	walk.at = walk.at->next;
	return device;
}

static void nd_walk_begin(void)
{
	walk.devices = 0;
	walk.begun = rdtsc();
	walk.ended = list_empty(&pci_root_buses);
	if (!walk.ended)
		nd_walk_to_bus(list_first_entry(&pci_root_buses, struct pci_bus, node));
}

/* Counted before it is asked: if it does not survive that, it is told as one that could not be asked. */
static void nd_read_device(u8 *to, const struct pci_dev *device)
{
	struct nd_device_head *head = (struct nd_device_head *)to;
	u8 *config = (u8 *)(head + 1);
	unsigned int read, length;

	*head = (struct nd_device_head){
		.segment = pci_domain_nr(device->bus),
		.bus = device->bus->number,
		.devfn = device->devfn,
	};
	walk.used += sizeof(*head);
	read = length = nd_read_config(config, device, nd_config_bytes(device));
	while (length && !config[length - 1])
		length--;
	head->length = length;
	head->read = read;
	walk.used += length;
}

size_t nd_hardware_read_devices(u8 *to, size_t room, bool from_start)
{
	const size_t largest = sizeof(struct nd_device_head) + PCI_CFG_SPACE_EXP_SIZE;
	struct pci_dev *device;

	if (from_start)
		nd_walk_begin();
	walk.used = 0;
	while (walk.used + largest <= room && (device = nd_walk_device())) {
		touch_nmi_watchdog();
		nd_read_device(to + walk.used, device);
	}
	return walk.used;
}

size_t nd_hardware_devices_read(void)
{
	return walk.used;
}
