// SPDX-License-Identifier: GPL-2.0-only
/*
 * crashme: the crashes that user space cannot make, and a seeded pattern in kernel memory, for tests in virtual machines.
 *
 * /proc/crashme_pages lists the pattern, one page a line: kind, index, page frame number. Writing the name of a crash to
 * /sys/module/crashme/parameters/crash ends the kernel. There is no exit function, so the module stays once loaded.
 * It uses only functions that are exported, with the same form, from Linux 6.1 on.
 */
#include <linux/cpumask.h>
#include <linux/irq_work.h>
#include <linux/irqflags.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/netdevice.h>
#include <linux/panic.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/timer.h>
#include <linux/vmalloc.h>
#include <net/net_namespace.h>

#define PATTERN_PAGES 64

static ulong seed_slab;
module_param(seed_slab, ulong, 0400);
MODULE_PARM_DESC(seed_slab, "seed of the pattern in slab memory");

static ulong seed_vmalloc;
module_param(seed_vmalloc, ulong, 0400);
MODULE_PARM_DESC(seed_vmalloc, "seed of the pattern in vmalloc memory");

static u64 *slab_pages[PATTERN_PAGES];
static u64 *vmalloc_pages;

/* The pattern of pattern.rs: SplitMix64's output function of the golden gamma times (seed + 512 * page + word). */
static u64 pattern_word(u64 seed, u64 page, u64 word)
{
	u64 z = (seed + page * (PAGE_SIZE / sizeof(u64)) + word) * 0x9e3779b97f4a7c15ULL;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

static void pattern_fill(u64 *page, u64 seed, u64 index)
{
	u64 word;

	for (word = 0; word < PAGE_SIZE / sizeof(u64); word++)
		page[word] = pattern_word(seed, index, word);
}

static int pattern_show(struct seq_file *file, void *unused)
{
	unsigned int i;

	for (i = 0; i < PATTERN_PAGES; i++) {
		char *page = (char *)vmalloc_pages + i * PAGE_SIZE;

		seq_printf(file, "slab %u %lu\n", i, page_to_pfn(virt_to_page(slab_pages[i])));
		seq_printf(file, "vmalloc %u %lu\n", i, vmalloc_to_pfn(page));
	}
	return 0;
}

/*
 * panic() behind a pointer that the compiler cannot see through: a function that ends in a call that never returns has its
 * return address behind its own end, and debuggers then name its neighbour.
 */
static void (*volatile die)(const char *format, ...) = panic;

/* A volatile address, so that the compiler cannot turn the fault into an undefined instruction. */
static int *volatile nowhere;

static noinline void crashme_panic(void)
{
	die("crashme: panic in process context");
}

static noinline void crashme_null(void)
{
	*nowhere = 1;
}

static noinline void crashme_bug(void)
{
	BUG();
}

static noinline void crashme_softirq(struct timer_list *timer)
{
	*nowhere = 2;
}

static noinline void crashme_hardirq(struct irq_work *work)
{
	*nowhere = 3;
}

static noinline int crashme_irqs_off(void *unused)
{
	local_irq_disable();
	die("crashme: panic with interrupts off on CPU %d", smp_processor_id());
	return 0;
}

/* Every transmit lock of every Ethernet device is held, as when a driver dies while it sends. */
static noinline void crashme_nic_locked(void)
{
	struct net_device *dev;

	rcu_read_lock();
	local_bh_disable();
	for_each_netdev_rcu(&init_net, dev) {
		unsigned int i;

		for (i = 0; i < dev->num_tx_queues; i++)
			__netif_tx_lock(netdev_get_tx_queue(dev, i), smp_processor_id());
	}
	die("crashme: panic with the transmit locks held");
}

/* Nothing is left, not even the reserves for atomic allocations. */
static noinline void crashme_no_memory(void)
{
	unsigned long pages = 0;

	while (alloc_page(GFP_ATOMIC | __GFP_HIGH | __GFP_NOWARN))
		pages++;
	die("crashme: panic with no memory left after %lu pages", pages);
}

static struct timer_list softirq_timer;
static struct irq_work hardirq_work;

static int crash_set(const char *value, const struct kernel_param *param)
{
	struct task_struct *task;

	if (sysfs_streq(value, "panic"))
		crashme_panic();
	else if (sysfs_streq(value, "null"))
		crashme_null();
	else if (sysfs_streq(value, "bug"))
		crashme_bug();
	else if (sysfs_streq(value, "nic-locked"))
		crashme_nic_locked();
	else if (sysfs_streq(value, "no-memory"))
		crashme_no_memory();
	else if (sysfs_streq(value, "oops-softirq")) {
		timer_setup(&softirq_timer, crashme_softirq, 0);
		mod_timer(&softirq_timer, jiffies + 1);
	} else if (sysfs_streq(value, "oops-hardirq")) {
		init_irq_work(&hardirq_work, crashme_hardirq);
		irq_work_queue(&hardirq_work);
	} else if (sysfs_streq(value, "irqs-off")) {
		task = kthread_create(crashme_irqs_off, NULL, "crashme");
		if (IS_ERR(task))
			return PTR_ERR(task);
		kthread_bind(task, cpumask_last(cpu_online_mask));
		wake_up_process(task);
	} else {
		return -EINVAL;
	}
	return 0;
}

static const struct kernel_param_ops crash_ops = { .set = crash_set };
module_param_cb(crash, &crash_ops, NULL, 0200);
MODULE_PARM_DESC(crash,
		 "panic, null, bug, oops-softirq, oops-hardirq, irqs-off, nic-locked or no-memory: ends the kernel");

static int __init crashme_init(void)
{
	unsigned int i;

	vmalloc_pages = vmalloc(PATTERN_PAGES * PAGE_SIZE);
	if (!vmalloc_pages)
		return -ENOMEM;
	for (i = 0; i < PATTERN_PAGES; i++) {
		slab_pages[i] = kmalloc(PAGE_SIZE, GFP_KERNEL);
		if (!slab_pages[i])
			goto no_memory;
		pattern_fill(slab_pages[i], seed_slab, i);
		pattern_fill((u64 *)((char *)vmalloc_pages + i * PAGE_SIZE), seed_vmalloc, i);
	}
	if (proc_create_single("crashme_pages", 0400, NULL, pattern_show))
		return 0;
no_memory:
	while (i > 0)
		kfree(slab_pages[--i]);
	vfree(vmalloc_pages);
	return -ENOMEM;
}
module_init(crashme_init);

MODULE_DESCRIPTION("Crashes on request, for tests of netdump in virtual machines");
MODULE_LICENSE("GPL");
