// SPDX-License-Identifier: GPL-2.0-only
/*
 * crashme: the crashes that user space cannot make, and a seeded pattern in kernel memory, for tests in virtual machines.
 *
 * /proc/crashme_pages lists the pattern, one page a line: kind, index, page frame number. Writing the name of a crash to
 * /sys/module/crashme/parameters/crash ends the kernel. There is no exit function, so the module stays once loaded.
 * It uses only functions that are exported, with the same form, from Linux 6.1 on.
 */
#include <linux/console.h>
#include <linux/cpumask.h>
#include <linux/if_ether.h>
#include <linux/irq_work.h>
#include <linux/irqflags.h>
#include <linux/kprobes.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/netdevice.h>
#include <linux/panic.h>
#include <linux/proc_fs.h>
#include <linux/rtnetlink.h>
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

static noinline void crashme_warn(void)
{
	WARN(1, "crashme: a warning that kernel.panic_on_warn makes the end");
}

static noinline void crashme_rtnl(void)
{
	rtnl_lock();
	die("crashme: panic with RTNL held");
}

/* The console that all messages go to crashes: the console's lock is held, and printk() is on the stack. */
static noinline void crashme_console(struct console *console, const char *text, unsigned int bytes)
{
	console->flags &= ~CON_ENABLED;
	die("crashme: panic inside printk");
}

static struct console crashing_console = { .name = "crashme", .write = crashme_console, .flags = CON_ENABLED, .index = -1 };

static void in_printk(void)
{
	register_console(&crashing_console);
	pr_emerg("crashme: the last message\n");
}

/* Inside the driver's poll and the network stack's receive path: the driver has taken a frame from its ring and not yet
 * given the buffer back.
 */
static noinline int crashme_receive(struct sk_buff *skb, struct net_device *dev, struct packet_type *type,
				    struct net_device *from)
{
	if (skb->pkt_type != PACKET_OUTGOING)
		die("crashme: panic in the receive path of %s", dev->name);
	kfree_skb(skb);
	return 0;
}

static struct packet_type crashing_type = { .type = cpu_to_be16(ETH_P_ALL), .func = crashme_receive };

/* ---- Inside functions of others, by a probe at their first instruction ---- */

static noinline int crashme_probed(struct kprobe *probe, struct pt_regs *regs)
{
	die("crashme: panic at the beginning of %pS", probe->addr);
	return 0;
}

static struct kprobe crashing_probe = { .pre_handler = crashme_probed };

static int probe_address(void *address)
{
	crashing_probe.addr = address;
	return register_kprobe(&crashing_probe);
}

static struct net_device *first_device(void)
{
	return first_net_device(&init_net) == init_net.loopback_dev ? next_net_device(init_net.loopback_dev) :
								       first_net_device(&init_net);
}

/* The next frame that is sent ends the kernel, with the transmit lock held. */
static int in_transmit(void)
{
	return probe_address(first_device()->netdev_ops->ndo_start_xmit);
}

/* The next poll ends the kernel. */
static int in_poll(void)
{
	struct net_device *dev = first_device();

	return probe_address(list_first_entry(&dev->napi_list, struct napi_struct, dev_list)->poll);
}

/*
 * Functions that e1000e, e1000 and igb call with a spin lock of their own held, when statistics are read or the link is
 * looked at. virtio_net has no such lock.
 */
static int driver_locked(void)
{
	static const char * const names[] = {
		"e1000e_update_stats", "e1000_read_phy_reg", "igb_update_stats",
	};
	int error = -ENOENT;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(names) && error; i++) {
		crashing_probe = (struct kprobe){ .pre_handler = crashme_probed, .symbol_name = names[i] };
		error = register_kprobe(&crashing_probe);
	}
	return error;
}

/* ---- Trouble in the dump path ---- */

/* Which call of the probed function, counted from the panic on, goes wrong. */
#define FAULTY_CALL 20

static bool panicked;
static atomic_t calls;

static noinline int crashme_fault_later(struct kprobe *probe, struct pt_regs *regs)
{
	if (READ_ONCE(panicked) && atomic_inc_return(&calls) == FAULTY_CALL)
		*nowhere = 4;
	return 0;
}

static noinline int crashme_hang_later(struct kprobe *probe, struct pt_regs *regs)
{
	if (READ_ONCE(panicked) && atomic_inc_return(&calls) == FAULTY_CALL)
		for (;;)
			cpu_relax();
	return 0;
}

static noinline int crashme_panic_later(kprobe_pre_handler_t handler, void *address, const char *symbol)
{
	int error;

	crashing_probe = (struct kprobe){ .pre_handler = handler, .addr = address, .symbol_name = symbol };
	error = register_kprobe(&crashing_probe);
	if (error)
		return error;
	WRITE_ONCE(panicked, true);
	die("crashme: panic, and the dump path has trouble of its own");
	return 0;
}

static void *poll_of_device(void)
{
	return list_first_entry(&first_device()->napi_list, struct napi_struct, dev_list)->poll;
}

/*
 * Netdump's transmit pool is overwritten, as by a wild pointer: two socket buffers, the address of a third one, and that of
 * a block of frames. Its state begins with 128 and 98 such addresses (kmod/pool.h); where it lies the kernel's own list of
 * symbols says.
 */
static noinline int crashme_pool(void)
{
	static struct kprobe finder = { .symbol_name = "kallsyms_lookup_name" };
	unsigned long (*find)(const char *name);
	void **state;
	int error = register_kprobe(&finder);

	if (error)
		return error;
	find = (void *)finder.addr;
	unregister_kprobe(&finder);
	state = (void **)find("netdump:nd_pool");
	if (!state)
		return -ENOENT;
	memset(state[3], 0x5a, sizeof(struct sk_buff));
	memset(state[7], 0x5a, sizeof(struct sk_buff));
	state[9] = (void *)0x5a5a5a5a5a5a5a5aUL;
	state[128 + 5] = (void *)0x5a5a5a5a5a5a5a5aUL;
	die("crashme: panic after netdump's transmit pool was overwritten");
	return 0;
}

/* ---- Threads on chosen CPUs ---- */

static atomic_t ready;

/* Interrupts off, a lock held, for ever: only an NMI reaches this CPU. The first one takes the page allocator's lock. */
static noinline int crashme_spin(void *first)
{
	struct zone *zone = page_zone(virt_to_page(slab_pages[0]));

	local_irq_disable();
	if (first)
		spin_lock(&zone->lock);
	atomic_inc(&ready);
	for (;;)
		cpu_relax();
	return 0;
}

static noinline int crashme_among_spinners(void *unused)
{
	local_irq_disable();
	while (atomic_read(&ready) < num_online_cpus() - 1)
		cpu_relax();
	die("crashme: panic on CPU %d while all others spin", smp_processor_id());
	return 0;
}

static noinline int crashme_together(void *unused)
{
	local_irq_disable();
	atomic_inc(&ready);
	while (atomic_read(&ready) < num_online_cpus())
		cpu_relax();
	die("crashme: panic on all CPUs at once, this is CPU %d", smp_processor_id());
	return 0;
}

static noinline int crashme_soft_lockup(void *unused)
{
	preempt_disable();
	for (;;)
		cpu_relax();
	return 0;
}

static noinline int crashme_hard_lockup(void *unused)
{
	local_irq_disable();
	for (;;)
		cpu_relax();
	return 0;
}

static noinline int crashme_rcu_stall(void *unused)
{
	rcu_read_lock();
	preempt_disable();
	for (;;)
		cpu_relax();
	return 0;
}

static noinline int crashme_hung_task(void *unused)
{
	for (;;) {
		set_current_state(TASK_UNINTERRUPTIBLE);
		schedule();
	}
	return 0;
}

static noinline int crashme_overflow(void *depth)
{
	volatile char frame[512];

	if ((long)depth < 0)
		return 0;
	frame[0] = (char)(long)depth;
	return crashme_overflow((void *)((long)depth + 1)) + frame[0];
}

/* A push to where nothing is mapped faults, and so does the push of the page fault's own frame. */
static noinline int crashme_double_fault(void *unused)
{
	asm volatile("cli; mov $4096, %%esp; push %%rax" : : : "memory");
	for (;;)
		cpu_relax();
	return 0;
}

static struct task_struct *thread_on(int (*body)(void *), void *argument, int cpu)
{
	struct task_struct *task = kthread_create(body, argument, "crashme/%d", cpu);

	if (!IS_ERR(task))
		kthread_bind(task, cpu);
	return task;
}

static int on_last_cpu(int (*body)(void *))
{
	struct task_struct *task = thread_on(body, NULL, cpumask_last(cpu_online_mask));

	if (IS_ERR(task))
		return PTR_ERR(task);
	wake_up_process(task);
	return 0;
}

/*
 * All threads are there before one runs, because it may take a CPU or a lock that making another one needs. The one on this
 * CPU is woken last, because it takes the CPU away.
 */
static int on_all_cpus(int (*on_last)(void *), int (*on_others)(void *))
{
	int last = cpumask_last(cpu_online_mask), cpu, here;
	struct task_struct **tasks = kcalloc(nr_cpu_ids, sizeof(*tasks), GFP_KERNEL);

	if (!tasks)
		return -ENOMEM;
	for_each_online_cpu(cpu) {
		tasks[cpu] = thread_on(cpu == last ? on_last : on_others, cpu ? NULL : &ready, cpu);
		if (IS_ERR(tasks[cpu]))
			return PTR_ERR(tasks[cpu]);
	}
	here = get_cpu();
	for_each_online_cpu(cpu)
		if (cpu != here)
			wake_up_process(tasks[cpu]);
	wake_up_process(tasks[here]);
	put_cpu();
	return 0;
}

static int among_spinners(void)
{
	return on_all_cpus(crashme_among_spinners, crashme_spin);
}

static int together(void)
{
	return on_all_cpus(crashme_together, crashme_together);
}

/* ---- The menu ---- */

static struct timer_list softirq_timer;
static struct irq_work hardirq_work;

static int do_panic(void) { crashme_panic(); return 0; }
static int do_null(void) { crashme_null(); return 0; }
static int do_bug(void) { crashme_bug(); return 0; }
static int do_warn(void) { crashme_warn(); return 0; }
static int do_nic_locked(void) { crashme_nic_locked(); return 0; }
static int do_no_memory(void) { crashme_no_memory(); return 0; }
static int do_rtnl(void) { crashme_rtnl(); return 0; }
static int do_in_printk(void) { in_printk(); return 0; }
static int do_in_receive(void) { dev_add_pack(&crashing_type); return 0; }
static int do_irqs_off(void) { return on_last_cpu(crashme_irqs_off); }
static int do_soft_lockup(void) { return on_last_cpu(crashme_soft_lockup); }
static int do_hard_lockup(void) { return on_last_cpu(crashme_hard_lockup); }
static int do_rcu_stall(void) { return on_last_cpu(crashme_rcu_stall); }
static int do_hung_task(void) { return on_last_cpu(crashme_hung_task); }
static int do_overflow(void) { return on_last_cpu(crashme_overflow); }
static int do_double_fault(void) { return on_last_cpu(crashme_double_fault); }

static int do_oops_softirq(void)
{
	timer_setup(&softirq_timer, crashme_softirq, 0);
	mod_timer(&softirq_timer, jiffies + 1);
	return 0;
}

static int do_oops_hardirq(void)
{
	init_irq_work(&hardirq_work, crashme_hardirq);
	irq_work_queue(&hardirq_work);
	return 0;
}

static int do_fault_in_dump(void) { return crashme_panic_later(crashme_fault_later, poll_of_device(), NULL); }
static int do_fault_in_state(void) { return crashme_panic_later(crashme_fault_later, NULL, "sched_show_task"); }
static int do_hang_in_dump(void) { return crashme_panic_later(crashme_hang_later, poll_of_device(), NULL); }
static int do_hang_in_state(void) { return crashme_panic_later(crashme_hang_later, NULL, "sched_show_task"); }

/* As many threads as a busy host has, a few of them blocked, then a panic. */
#define MANY_TASKS	3000
#define MANY_BLOCKED	20

static noinline int crashme_blocked(void *unused)
{
	for (;;) {
		set_current_state(TASK_UNINTERRUPTIBLE);
		schedule();
	}
	return 0;
}

static noinline int crashme_asleep(void *unused)
{
	for (;;) {
		set_current_state(TASK_INTERRUPTIBLE);
		schedule();
	}
	return 0;
}

static noinline int crashme_many_tasks(void)
{
	unsigned int i;

	for (i = 0; i < MANY_TASKS; i++) {
		int (*body)(void *) = i < MANY_BLOCKED ? crashme_blocked : crashme_asleep;
		struct task_struct *task = kthread_run(body, NULL, "crashme/%u", i);

		if (IS_ERR(task))
			return PTR_ERR(task);
	}
	/* Those that were started last have come to their sleep. */
	schedule_timeout_uninterruptible(HZ);
	panic("crashme: panic among %u threads", MANY_TASKS);
	return 0;
}

static const struct {
	const char *name;
	int (*crash)(void);
} menu[] = {
	{ "panic", do_panic },
	{ "null", do_null },
	{ "bug", do_bug },
	{ "warn", do_warn },
	{ "oops-softirq", do_oops_softirq },
	{ "oops-hardirq", do_oops_hardirq },
	{ "irqs-off", do_irqs_off },
	{ "nic-locked", do_nic_locked },
	{ "driver-locked", driver_locked },
	{ "in-transmit", in_transmit },
	{ "in-poll", in_poll },
	{ "in-receive", do_in_receive },
	{ "in-printk", do_in_printk },
	{ "rtnl", do_rtnl },
	{ "no-memory", do_no_memory },
	{ "spinners", among_spinners },
	{ "together", together },
	{ "soft-lockup", do_soft_lockup },
	{ "hard-lockup", do_hard_lockup },
	{ "hung-task", do_hung_task },
	{ "rcu-stall", do_rcu_stall },
	{ "stack-overflow", do_overflow },
	{ "double-fault", do_double_fault },
	{ "fault-in-dump", do_fault_in_dump },
	{ "fault-in-state", do_fault_in_state },
	{ "hang-in-dump", do_hang_in_dump },
	{ "hang-in-state", do_hang_in_state },
	{ "pool", crashme_pool },
	{ "many-tasks", crashme_many_tasks },
};

static int crash_set(const char *value, const struct kernel_param *param)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(menu); i++)
		if (sysfs_streq(value, menu[i].name))
			return menu[i].crash();
	return -EINVAL;
}

static const struct kernel_param_ops crash_ops = { .set = crash_set };
module_param_cb(crash, &crash_ops, NULL, 0200);
MODULE_PARM_DESC(crash, "the name of a crash: ends the kernel");

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
