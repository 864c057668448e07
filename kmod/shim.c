// SPDX-License-Identifier: GPL-2.0-only
/*
 * netdump: what the Rust core needs of the kernel, one small function per need.
 *
 * While the host is healthy this file does nothing but hold what it took when it was armed, and answer /dev/netdump.
 * After a crash one CPU runs nd_crashed() and never returns from it, except when the server says so: it stops the
 * others, makes the network device usable by polling, and does what the core says, step by step. From there on: no
 * allocation, no lock that a stopped CPU may hold, no interrupt, no printing to a console.
 */

#include <linux/capability.h>
#include <linux/console.h>
#include <linux/etherdevice.h>
#include <linux/if_arp.h>
#include <linux/if_vlan.h>
#include <linux/kdebug.h>
#include <linux/kexec.h>
#include <linux/kprobes.h>
#include <linux/miscdevice.h>
#include <linux/nmi.h>
#include <linux/panic_notifier.h>
#include <linux/reboot.h>
#include <linux/rtnetlink.h>
#include <linux/sched/debug.h>
#include <linux/sort.h>
#include <linux/sysrq.h>
#include <linux/timekeeping.h>
#include <linux/utsname.h>
#include <linux/vmalloc.h>
#include <asm/apic.h>
#include <asm/irq_stack.h>
#include <asm/nmi.h>
#include <asm/smp.h>
#include <asm/tsc.h>

#include "bond.h"
#include "doze.h"
#include "console.h"
#include "filter.h"
#include "hardware.h"
#include "locks.h"
#include "pool.h"
#include "shim.h"

static struct nd_shim nd;

static void nd_capture_own(void);
static void nd_dump(void);
static void nd_finish(u64 action);
static void nd_resume(void);
static void nd_resume_after_fault(void);
static void nd_before_kdump(void);
static void nd_answer(size_t amount);
static void nd_read(void);

/* ---- Time ---- */

/* Prepares nd_now(): microseconds are TSC ticks times a 32-bit fraction. */
static void nd_clock_start(void)
{
	if (nd.tsc_start)
		return;
	nd.tsc_mult = div_u64(1000ULL << 32, tsc_khz);
	nd.tsc_start = rdtsc_ordered();
}

/* Microseconds since the crash. The kernel's own clocks may stand still by then. Whoever asks is alive. */
static u64 nd_now(void)
{
	WRITE_ONCE(nd.beat, nd.beat + 1);
	return mul_u64_u32_shr(rdtsc_ordered() - nd.tsc_start, nd.tsc_mult, 32);
}

/* ---- Interrupts ---- */

/*
 * Keeps interrupts away. IF alone does not: on 6.1 drivers get it set again inside their poll, because filling the
 * cache of socket buffers ends in an unconditional local_irq_enable() (kmem_cache_alloc_bulk(), until 6.2). A task
 * priority of 15 masks all vectors whatever IF says, and nobody else writes it.
 */
static void nd_mask_interrupts(unsigned long priority)
{
	asm volatile("mov %0, %%cr8" : : "r" (priority) : "memory");
}

/* After every call into a driver. */
static void nd_interrupts_off(void)
{
	if (!irqs_disabled())
		local_irq_disable();
}

/* ---- The other CPUs ---- */

static void __noreturn nd_hold(void)
{
	for (;;)
		asm volatile("hlt" : : : "memory");
}

/* Makes the calling CPU the one that runs the dump. False: another one is already. */
static bool nd_claim(void)
{
	int cpu = raw_smp_processor_id() + 1;
	int owner = atomic_cmpxchg(&nd.owner, 0, cpu);

	return !owner || owner == cpu;
}

static bool nd_is_owner(void)
{
	return atomic_read(&nd.owner) == raw_smp_processor_id() + 1;
}

static void nd_capture(struct nd_captured *to, const struct pt_regs *regs)
{
	u32 low, high;

	to->regs = *regs;
	to->task = current;
	rdmsr(MSR_FS_BASE, low, high);
	to->fs_base = (u64)high << 32 | low;
	rdmsr(MSR_KERNEL_GS_BASE, low, high);
	to->gs_base = (u64)high << 32 | low;
	asm volatile("mov %%ds, %0" : "=r" (to->segments[0]));
	asm volatile("mov %%es, %0" : "=r" (to->segments[1]));
	asm volatile("mov %%fs, %0" : "=r" (to->segments[2]));
	asm volatile("mov %%gs, %0" : "=r" (to->segments[3]));
	smp_store_release(&to->valid, true);
}

/* ---- Hangs ---- */

static void *nd_stack_top(void)
{
	return nd.stack + ND_STACK_BYTES - sizeof(void *);
}

/* Whether the dump path has shown no sign of life for ND_HANG_SECONDS, as seen by one who looks again and again. */
static bool nd_is_hung(struct nd_watch *watch)
{
	u32 beat = READ_ONCE(nd.beat);
	u64 now = rdtsc();

	if (beat != watch->beat || !watch->since || !READ_ONCE(nd.watched)) {
		*watch = (struct nd_watch){ .beat = beat, .since = now };
		return false;
	}
	return now - watch->since > ND_HANG_SECONDS * 1000ULL * tsc_khz;
}

/*
 * What one of the held CPUs does: it watches the one that dumps. A hang is first broken by an NMI, which makes that CPU give
 * up what it was doing; when that does not help, this one reboots the host.
 */
static void __noreturn nd_guard(void)
{
	struct nd_watch watch = {};

	nd_doze_begin();
	for (;;) {
		nd_doze();
		if (!nd_is_hung(&watch))
			continue;
		if (watch.kicked)
			emergency_restart();
		watch = (struct nd_watch){ .beat = watch.beat, .since = rdtsc(), .kicked = true };
		WRITE_ONCE(nd.kicked, true);
		apic->send_IPI(atomic_read(&nd.owner) - 1, NMI_VECTOR);
	}
}

/* Where the CPU that dumps finds itself after a hang. A hang before the dump is the panic's own: it is not waited for. */
static void nd_after_hang(void)
{
	nd.hangs++;
	nd.tasks.hung = true;
	if (nd.running)
		nd_resume();
	nd.resumed = true;
	nd_capture_own();
	nd.reason = "the kernel hung in its own panic";
	nd.running = true;
	nd_dump();
	nd_hold();
}

/*
 * Makes an NMI that came from kernel mode return to `entry`, on the dump's own stack. What it returns by is not `regs` but
 * the frame behind it, which entry_64.S keeps for NMIs in NMIs; where interrupts have no such table (FRED), it is `regs`.
 */
static void nd_return_to(struct pt_regs *regs, void (*entry)(void))
{
	u64 *frame = (u64 *)(regs + 1);
	bool behind = frame[0] == regs->ip && frame[1] == regs->cs && frame[3] == regs->sp;
	unsigned long flags = regs->flags & ~X86_EFLAGS_IF;

	regs->ip = (unsigned long)entry;
	regs->sp = (unsigned long)nd_stack_top();
	regs->flags = flags;
	if (behind) {
		frame[0] = regs->ip;
		frame[2] = flags;
		frame[3] = regs->sp;
	}
}

/* On the CPU that dumps: a guard's word, or a watchdog's counter that sees no life, takes it out of where it hangs. */
static int nd_on_own_nmi(struct pt_regs *regs)
{
	static struct nd_watch watch;

	if (user_mode(regs) || (!READ_ONCE(nd.kicked) && !nd_is_hung(&watch)))
		return NMI_DONE;
	WRITE_ONCE(nd.kicked, false);
	watch.since = 0;
	nd_return_to(regs, nd_after_hang);
	return NMI_HANDLED;
}

/*
 * On the other CPUs: save what they did, and hold them. They stay online for whoever reads the dump, which the kernel's
 * own way of stopping them would hide.
 */
static int nd_on_nmi(unsigned int type, struct pt_regs *regs)
{
	int cpu = raw_smp_processor_id();

	if (!READ_ONCE(nd.stopping))
		return NMI_DONE;
	if (nd_is_owner())
		return nd_on_own_nmi(regs);
	/* The one that dozes can be reached again: by its watchdog's counter, and by the reboot. */
	if (nd.captured[cpu].held)
		return NMI_HANDLED;
	nd.captured[cpu].held = true;
	nd_capture(&nd.captured[cpu], regs);
	nd_hardware_capture();
	if (!atomic_cmpxchg(&nd.guard, 0, cpu + 1))
		nd_guard();
	nd_hold();
}

static u32 nd_captured_count(void)
{
	u32 count = 0;
	int cpu;

	for_each_online_cpu(cpu)
		count += smp_load_acquire(&nd.captured[cpu].valid);
	return count;
}

/* Stops all other CPUs by NMI, which reaches them in any loop. Waits 100 ms at most. */
static void nd_stop_others(void)
{
	u64 until;

	nd_clock_start();
	if (nd.stopping)
		return;
	nd.captured[raw_smp_processor_id()].valid = false;
	smp_store_release(&nd.stopping, true);
	if (num_online_cpus() < 2)
		return;
	apic->send_IPI_allbutself(NMI_VECTOR);
	until = nd_now() + 100 * USEC_PER_MSEC;
	while (nd_captured_count() < num_online_cpus() - 1 && nd_now() < until)
		cpu_relax();
}

/* Whether smp_ops is called because of a panic, and not for a reboot. */
static bool nd_is_panic(void)
{
	return READ_ONCE(nd.state) == ND_ARMED && (oops_in_progress || READ_ONCE(nd.panicking));
}

/* From here on nothing but netdump comes, so the other panic notifiers are watched too. */
static void nd_hook_stop(int wait)
{
	if (nd_is_panic() && nd_claim()) {
		nd_stop_others();
		WRITE_ONCE(nd.watched, true);
	} else {
		nd.stop_other_cpus(wait);
	}
}

static void nd_hook_crash_stop(void)
{
	bool ours = nd_is_panic() && nd_claim();

	if (ours && nd.kdump_first && kexec_crash_loaded())
		nd_before_kdump();
	else if (ours)
		nd_stop_others();
	else
		nd.crash_stop_other_cpus();
}

static void nd_hook(void)
{
	nd.stop_other_cpus = smp_ops.stop_other_cpus;
	nd.crash_stop_other_cpus = smp_ops.crash_stop_other_cpus;
	WRITE_ONCE(smp_ops.stop_other_cpus, nd_hook_stop);
	if (nd.crash_stop_other_cpus)
		WRITE_ONCE(smp_ops.crash_stop_other_cpus, nd_hook_crash_stop);
	nd.hooked = true;
}

static void nd_unhook(void)
{
	if (!nd.hooked)
		return;
	if (smp_ops.stop_other_cpus == nd_hook_stop)
		WRITE_ONCE(smp_ops.stop_other_cpus, nd.stop_other_cpus);
	if (smp_ops.crash_stop_other_cpus == nd_hook_crash_stop)
		WRITE_ONCE(smp_ops.crash_stop_other_cpus, nd.crash_stop_other_cpus);
	nd.hooked = false;
}

/* ---- The crashing CPU's registers ---- */

/* An oops hands over the registers of the fault itself. It may be survived, so nothing is done here but to keep them. */
static int nd_on_die(struct notifier_block *block, unsigned long event, void *data)
{
	const struct die_args *args = data;

	if (event != DIE_OOPS || READ_ONCE(nd.state) != ND_ARMED)
		return NOTIFY_DONE;
	if (nd.running) {
		if (nd_is_owner())
			nd_resume_after_fault();
		nd_hold();
	}
	if (!args->regs)
		return NOTIFY_DONE;
	nd.died.valid = false;
	nd.died.regs = *args->regs;
	nd.died.task = current;
	nd.died.pid = current->pid;
	nd.died.cpu = raw_smp_processor_id();
	nd.died.valid = true;
	return NOTIFY_DONE;
}

static struct notifier_block nd_die_block = { .notifier_call = nd_on_die, .priority = INT_MAX };

/*
 * A panic without an oops: the registers of whoever called panic(), as if it had returned to it. At panic()'s own first
 * instruction crash misjudges the frame.
 */
static int nd_on_probe(struct kprobe *probe, struct pt_regs *regs)
{
	struct nd_captured *captured = &nd.captured[raw_smp_processor_id()];

	if (READ_ONCE(nd.stopping))
		return 0;
	nd_capture(captured, regs);
	/* The call itself: panic() never returns, so what follows the call may be another function. */
	captured->regs.ip = *(unsigned long *)regs->sp - 1;
	captured->regs.sp = regs->sp + sizeof(unsigned long);
	captured->probed = true;
	WRITE_ONCE(nd.panicking, true);
	return 0;
}

static struct kprobe nd_probe;

/* panic() became a wrapper of vpanic() in 3f8bd26aa5de ("panic: introduce vpanic"), 6.16. */
static void nd_probe_start(void)
{
	static const char * const names[] = { "vpanic", "panic" };
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(names) && !nd.probed; i++) {
		nd_probe = (struct kprobe){ .symbol_name = names[i], .pre_handler = nd_on_probe };
		nd.probed = !register_kprobe(&nd_probe);
	}
}

static void nd_probe_stop(void)
{
	if (nd.probed)
		unregister_kprobe(&nd_probe);
	nd.probed = false;
}

/*
 * Moves the registers of panic()'s caller on to panic() itself, where it calls its notifiers, if panic() keeps a frame
 * pointer (6.1 and 6.12 as Debian builds them). crash finds panic() on the stack by its text and takes the frame pointer
 * from the registers: with another function's it leaves frames out. What panic() has in rbx and r12 to r14 stays its
 * caller's; debuggers find that on the stack. vpanic() needs none of this: its caller is panic().
 */
static void nd_enter_panic(struct pt_regs *regs)
{
	static const u8 prologue[] = { 0x55, 0x48, 0x89, 0xe5 }; /* push %rbp; mov %rsp, %rbp */
	const unsigned long code = (unsigned long)nd_probe.addr;
	const unsigned long frame = regs->sp - 2 * sizeof(unsigned long);
	unsigned long slot, word;
	u8 head[ND_PROLOGUE_BYTES];
	unsigned int at = 0;

	/* Twice, after a hang before the dump. */
	if (regs->ip > code && regs->ip < code + ND_PANIC_BYTES)
		return;
	if (copy_from_kernel_nofault(head, nd_probe.addr, sizeof(head)))
		return;
	while (memcmp(head + at, prologue, sizeof(prologue)))
		if (++at > sizeof(head) - sizeof(prologue))
			return;
	for (slot = frame - sizeof(word); slot > frame - ND_PANIC_FRAME_BYTES; slot -= sizeof(word)) {
		if (get_kernel_nofault(word, (const unsigned long *)slot))
			return;
		if (word > code && word <= code + ND_PANIC_BYTES) {
			regs->ip = word - 1;
			regs->sp = slot + sizeof(word);
			regs->bp = frame;
			return;
		}
	}
}

/* The best registers of this CPU: the oops's if it died of one, else panic()'s, else the present ones. */
static void nd_capture_own(void)
{
	int cpu = raw_smp_processor_id();
	struct nd_captured *own = &nd.captured[cpu];
	struct pt_regs regs = {};

	if (nd.died.valid && nd.died.cpu == cpu && nd.died.task == current && nd.died.pid == current->pid) {
		nd_capture(own, &nd.died.regs);
		return;
	}
	if (own->probed) {
		nd_enter_panic(&own->regs);
		own->valid = true;
		return;
	}
	regs.ip = _THIS_IP_;
	regs.sp = current_stack_pointer;
	regs.bp = (unsigned long)__builtin_frame_address(0);
	regs.cs = __KERNEL_CS;
	regs.ss = __KERNEL_DS;
	regs.flags = native_save_fl();
	nd_capture(own, &regs);
}

/* ---- The network device ---- */

/* Of a card that something else goes down through, only hardware counts: taps and pairs of virtual machines are none. */
static void nd_add_card(struct net_device *device, bool is_below)
{
	if (!(device->flags & IFF_UP) || (is_below && !device->dev.parent))
		return;
	if (nd.cards_used < ND_CARDS_MAX)
		nd.cards[nd.cards_used++] = device;
}

/* Whether frames pass a device as they are, but for a tag, on their way to one below it. Others may do anything to them. */
static bool nd_is_made_of_others(const struct net_device *device)
{
	return netif_is_bond_master(device) || netif_is_bridge_master(device) || netif_is_macvlan(device) ||
	       is_vlan_dev(device);
}

/*
 * Finds the cards below a device, which may be one itself. Those who join and leave while the kernel is healthy do it
 * under rtnl_lock and change lists that can be read at any moment, so after a crash too.
 */
static void nd_find_cards_below(struct net_device *device, unsigned int depth)
{
	struct list_head *at = device->adj_list.lower.next;
	struct net_device *below;

	if (!nd_is_made_of_others(device)) {
		nd_add_card(device, depth);
		return;
	}
	while (depth < ND_DEPTH_MAX && (below = netdev_lower_get_next(device, &at)))
		nd_find_cards_below(below, depth + 1);
}

static void nd_find_cards(struct net_device *device)
{
	nd.cards_used = 0;
	nd_find_cards_below(device, 0);
}

/* The one that chooses among several cards by which a frame leaves: `device`, or one below it. A bond does. */
static struct net_device *nd_chooser(struct net_device *device)
{
	unsigned int depth;

	for (depth = 0; depth < ND_DEPTH_MAX && device; depth++) {
		struct list_head *at = device->adj_list.lower.next;

		if (device->netdev_ops->ndo_get_xmit_slave)
			return device;
		device = netdev_lower_get_next(device, &at);
	}
	return NULL;
}

static bool nd_is_card(const struct net_device *device)
{
	u32 i;

	for (i = 0; i < nd.cards_used; i++)
		if (nd.cards[i] == device)
			return true;
	return false;
}

/*
 * The card that frames leave by. There is one, or a bond between it and us chooses among them, by what it knew at the
 * crash. If it knows nothing, any card is better than none.
 */
static struct net_device *nd_choose_card(struct sk_buff *skb)
{
	struct net_device *chooser = nd.cards_used > 1 ? nd_chooser(nd.device) : NULL, *chosen = NULL;
	u32 i;

	if (chooser)
		chosen = chooser->netdev_ops->ndo_get_xmit_slave(chooser, skb, false);
	if (chosen && nd_is_card(chosen))
		return chosen;
	for (i = 0; i < nd.cards_used; i++)
		if (netif_carrier_ok(nd.cards[i]))
			return nd.cards[i];
	return nd.cards[0];
}

/* Locks that a stopped CPU may hold and drivers take inside their poll; the owners will never need them again. */
static void nd_release_card_locks(struct net_device *card)
{
	unsigned int i;

	for (i = 0; i < card->num_tx_queues; i++) {
		struct netdev_queue *queue = netdev_get_tx_queue(card, i);

		spin_lock_init(&queue->_xmit_lock);
		queue->xmit_lock_owner = -1;
		clear_bit(__QUEUE_STATE_FROZEN, &queue->state);
	}
}

static void nd_release_locks(void)
{
	u32 i;

	for (i = 0; i < nd.cards_used; i++)
		nd_release_card_locks(nd.cards[i]);
}

/* The whole piece that the page was allocated with: the allocator clears all of it. */
static void nd_touch(struct page *page)
{
	struct page *head = compound_head(page);
	u64 pfn = page_to_pfn(head);
	u32 i;

	for (i = nd.touched_used; i > 0; i--)
		if (nd.touched[i - 1].first == pfn)
			return;
	if (nd.touched_used < ARRAY_SIZE(nd.touched))
		nd.touched[nd.touched_used++] = (struct nd_ram){ .first = pfn, .pages = 1UL << compound_order(head) };
}

/* Remembers where a received frame lay, for the list of pages that the dump path writes. */
static void nd_touch_frame(struct sk_buff *skb)
{
	unsigned int i;

	nd_touch(virt_to_page(skb));
	nd_touch(virt_to_page(skb->head));
	for (i = 0; i < skb_shinfo(skb)->nr_frags; i++)
		nd_touch(skb_frag_page(&skb_shinfo(skb)->frags[i]));
}

/*
 * Copies a frame to nd.frame as it was on the wire; returns its bytes, or 0 if it cannot be one for us. Device or kernel
 * have taken an 802.1Q tag out of it before, which is put back.
 */
static unsigned int nd_copy_frame(struct sk_buff *skb)
{
	const unsigned int addresses = 2 * ETH_ALEN;
	unsigned int bytes, tag_bytes = 0;
	__be16 tag[2];

	skb_push(skb, skb->data - skb_mac_header(skb));
	bytes = skb->len;
	if (skb_vlan_tag_present(skb)) {
		tag[0] = skb->vlan_proto;
		tag[1] = htons(skb_vlan_tag_get(skb));
		tag_bytes = sizeof(tag);
	}
	if (bytes < ETH_HLEN || bytes + tag_bytes > ND_RECEIVE_BYTES)
		return 0;
	memcpy(nd.frame + addresses, tag, tag_bytes);
	if (skb_copy_bits(skb, 0, nd.frame, addresses) ||
	    skb_copy_bits(skb, addresses, nd.frame + addresses + tag_bytes, bytes - addresses))
		return 0;
	return bytes + tag_bytes;
}

static rx_handler_result_t nd_on_frame(struct sk_buff **pskb)
{
	struct sk_buff *skb = *pskb;
	unsigned int bytes;

	nd_touch_frame(skb);
	bytes = nd_copy_frame(skb);
	if (bytes && ether_addr_equal_unaligned(nd.frame, nd.device->dev_addr))
		nd.heard_at = nd_now();
	if (nd.place == ND_PLACE_NETWORK && bytes) {
		nd.received = true;
		nd.place = ND_PLACE_CORE;
		if (nd.last_words)
			nd_core_last_words_frame(nd_now(), nd.frame, bytes);
		else
			nd_core_frame(nd_now(), nd.frame, bytes);
		nd.place = ND_PLACE_NETWORK;
	}
	/* With a budget: it goes back to the cache that the driver's next receive buffer comes from. */
	napi_consume_skb(skb, NAPI_POLL_WEIGHT);
	return RX_HANDLER_CONSUMED;
}

/*
 * Everything a card receives comes to nd_on_frame() on this CPU: no steering to CPUs that are stopped, no packet
 * sockets whose locks they may hold. Done after the crash only, so it costs nothing before, and no bridge, bond or VLAN
 * above the card matters.
 */
static void nd_take_frames_of(struct net_device *card)
{
	unsigned int i;

	rcu_assign_pointer(card->rx_handler, nd_on_frame);
	INIT_LIST_HEAD(&card->ptype_all);
#if IS_ENABLED(CONFIG_VLAN_8021Q)
	/* A frame for one of these devices would go to it before the handler is asked. */
	RCU_INIT_POINTER(card->vlan_info, NULL);
#endif
#ifdef CONFIG_RPS
	for (i = 0; i < card->num_rx_queues; i++) {
		RCU_INIT_POINTER(card->_rx[i].rps_map, NULL);
		/* A pointer, and on 7.x one with a tag in a number. */
		WRITE_ONCE(card->_rx[i].rps_flow_table, 0);
	}
#endif
}

static void nd_take_frames(void)
{
	u32 i;

	if (nd.taps)
		INIT_LIST_HEAD(nd.taps);
	for (i = 0; i < nd.cards_used; i++)
		nd_take_frames_of(nd.cards[i]);
}

/* What a host that shall stay needs to receive again. */
static void nd_note_receivers(void)
{
	u32 i;

	for (i = 0; i < nd.cards_used; i++) {
		nd.receivers[i].rx_handler = rcu_dereference_raw(nd.cards[i]->rx_handler);
#if IS_ENABLED(CONFIG_VLAN_8021Q)
		nd.receivers[i].vlan_info = rcu_dereference_raw(nd.cards[i]->vlan_info);
#endif
	}
}

static void nd_give_frames_back(void)
{
	u32 i;

	for (i = 0; i < nd.cards_used; i++) {
		rcu_assign_pointer(nd.cards[i]->rx_handler, nd.receivers[i].rx_handler);
#if IS_ENABLED(CONFIG_VLAN_8021Q)
		rcu_assign_pointer(nd.cards[i]->vlan_info, nd.receivers[i].vlan_info);
#endif
	}
}

static void nd_poll_napi(struct napi_struct *napi)
{
	int done;

	set_bit(NAPI_STATE_SCHED, &napi->state);
	clear_bit(NAPI_STATE_NPSVC, &napi->state);
	clear_bit(NAPI_STATE_DISABLE, &napi->state);
	clear_bit(NAPI_STATE_IN_BUSY_POLL, &napi->state);
	done = napi->poll(napi, NAPI_POLL_WEIGHT);
	/* A poll that used up its budget has not completed; frames wait in its batch until somebody does. */
	if (done >= NAPI_POLL_WEIGHT)
		napi_complete_done(napi, done);
}

/* e1000 and e1000e finish transmissions in their interrupt handlers; those have a controller that calls them. */
static void nd_poll_card(struct net_device *card)
{
	const struct net_device_ops *ops = card->netdev_ops;
	struct napi_struct *napi;

	if (ops->ndo_poll_controller)
		ops->ndo_poll_controller(card);
	list_for_each_entry(napi, &card->napi_list, dev_list)
		nd_poll_napi(napi);
}

/* All of a bond's, because who answers chooses by itself which of them it uses. */
static void nd_poll(void)
{
	u32 i;

	for (i = 0; i < nd.cards_used; i++)
		nd_poll_card(nd.cards[i]);
	nd_interrupts_off();
}

/* ---- Sending ---- */

static netdev_tx_t nd_transmit_once(struct sk_buff *skb, struct netdev_queue *queue, bool more)
{
	netdev_tx_t result;

	/* Nobody else runs: a lock that is held was taken in the code that crashed. */
	if (!__netif_tx_trylock(queue)) {
		nd_release_locks();
		if (!__netif_tx_trylock(queue))
			return NETDEV_TX_BUSY;
	}
	/* The second reference keeps the driver from freeing the buffer when it is done with it. */
	skb_get(skb);
	result = netdev_start_xmit(skb, skb->dev, queue, more);
	__netif_tx_unlock(queue);
	nd_interrupts_off();
	if (!dev_xmit_complete(result))
		refcount_set(&skb->users, 1);
	return result;
}

static struct net_device *nd_next_card(const struct net_device *card)
{
	u32 i;

	for (i = 0; i < nd.cards_used; i++)
		if (nd.cards[i] == card)
			return nd.cards[(i + 1) % nd.cards_used];
	return nd.cards[0];
}

/*
 * The card that frames leave by. What a bond knew at the crash may have been old, and nobody tells of a link that goes down
 * later, so after some silence the next card is tried.
 */
static struct net_device *nd_find_sender(struct sk_buff *skb)
{
	u64 now = nd_now();

	if (nd.sender && (nd.cards_used < 2 || now < nd.heard_at + ND_SILENCE_SECONDS * USEC_PER_SEC))
		return nd.sender;
	nd.sender = nd.sender ? nd_next_card(nd.sender) : nd_choose_card(skb);
	nd.heard_at = now;
	return nd.sender;
}

/*
 * Hands a copy of a frame to the driver of a card, or of the chosen one if it is NULL, polling while its ring is full. Limits are
 * times and not counts: a busy hypervisor takes milliseconds. A frame that does not go out in time is lost, which the core expects
 * of any frame.
 */
static void nd_send(struct net_device *card, const u8 *frame, u32 bytes, bool more)
{
	u64 until = nd_now() + 50 * USEC_PER_MSEC;
	struct netdev_queue *queue;
	struct sk_buff *skb;

	while (!(skb = nd_pool_carrier())) {
		nd_poll();
		if (nd_now() >= until)
			return;
	}
	nd_pool_load(skb, frame, bytes);
	skb_reset_mac_header(skb);
	skb->protocol = eth_hdr(skb)->h_proto;
	skb_set_network_header(skb, skb->protocol == htons(ETH_P_8021Q) ? VLAN_ETH_HLEN : ETH_HLEN);
	skb->ip_summed = CHECKSUM_NONE;
	skb->dev = card ? card : nd_find_sender(skb);
	queue = netdev_get_tx_queue(skb->dev, 0);
	skb_set_queue_mapping(skb, 0);
	do {
		if (!netif_tx_queue_stopped(queue) && dev_xmit_complete(nd_transmit_once(skb, queue, more)))
			return;
		nd_poll();
	} while (nd_now() < until);
}

static void nd_transmit(u32 slot, u32 bytes, bool more)
{
	nd_send(NULL, nd_frame(slot), bytes, more);
}

/* Keeps the cards of an 802.3ad bond in it; a partner that waits shortest gives a card up after three seconds. */
static void nd_keep_bond(void)
{
	u32 i;

	if (nd_now() < nd.sign_at)
		return;
	nd.sign_at = nd_now() + 900 * USEC_PER_MSEC;
	for (i = 0; i < nd.cards_used; i++)
		if (netif_carrier_ok(nd.cards[i]) && nd_bond_sign_of_life(nd.cards[i], nd.sign))
			nd_send(nd.cards[i], nd.sign, ND_SIGN_BYTES, false);
}

/* Polls until something arrives for the core, or until the time is over. */
static void nd_wait(u64 until)
{
	nd.received = false;
	do {
		touch_nmi_watchdog();
		nd_keep_bond();
		nd_poll();
		cpu_relax();
	} while (!nd.received && nd_now() < until);
}

/* ---- What the core reads ---- */

static size_t nd_read_text(u8 *to, bool from_start)
{
	size_t bytes = 0;

	if (from_start)
		kmsg_dump_rewind(&nd.text);
	if (!kmsg_dump_get_buffer(&nd.text, false, to, ND_SCRATCH_BYTES, &bytes))
		return 0;
	return bytes;
}

/* The number of the online CPU of this index; -1 if there is none. */
static int nd_online_cpu(u64 index)
{
	int cpu;

	for_each_online_cpu(cpu)
		if (!index--)
			return cpu;
	return -1;
}

/* struct user_regs_struct begins with struct pt_regs. */
static size_t nd_read_registers(u8 *to, u64 index)
{
	const struct nd_captured *captured;
	struct nd_cpu *out = (struct nd_cpu *)to;
	int cpu = nd_online_cpu(index);
	unsigned int i;

	BUILD_BUG_ON(sizeof(struct pt_regs) != 21 * sizeof(u64));
	if (cpu < 0)
		return 0;
	captured = &nd.captured[cpu];
	memset(out, 0, sizeof(*out));
	out->cpu = cpu;
	if (cpu == raw_smp_processor_id())
		out->flags |= ND_CPU_CRASHING;
	if (!captured->valid)
		return sizeof(*out);
	out->flags |= ND_CPU_CAPTURED;
	out->pid = captured->task->pid;
	out->task = (unsigned long)captured->task;
	strscpy_pad(out->comm, captured->task->comm, sizeof(out->comm));
	memcpy(out->registers, &captured->regs, sizeof(captured->regs));
	out->registers[21] = captured->fs_base;
	out->registers[22] = captured->gs_base;
	for (i = 0; i < ARRAY_SIZE(captured->segments); i++)
		out->registers[23 + i] = captured->segments[i] & 0xffff;
	return sizeof(*out);
}

static size_t nd_read_processor(u8 *to, u64 index)
{
	int cpu = nd_online_cpu(index);

	return cpu < 0 ? 0 : nd_hardware_read_processor(to, cpu, cpu == raw_smp_processor_id());
}

/* The text inside the ELF note that the kernel keeps for crash kernels. */
static size_t nd_read_notes(u8 *to)
{
	const struct elf64_note *note = phys_to_virt(paddr_vmcoreinfo_note());
	size_t name_bytes, bytes;

	if (copy_from_kernel_nofault(to, note, VMCOREINFO_NOTE_SIZE))
		return 0;
	note = (struct elf64_note *)to;
	name_bytes = ALIGN(note->n_namesz, 4);
	bytes = note->n_descsz;
	if (name_bytes > 64 || bytes > VMCOREINFO_BYTES)
		return 0;
	memmove(to, to + sizeof(*note) + name_bytes, bytes);
	return strnlen(to, bytes);
}

static size_t nd_read_memory_map(u8 *to)
{
	size_t bytes = nd.ram_ranges * sizeof(nd.ram[0]);

	memcpy(to, nd.ram, bytes);
	return bytes;
}

/* Both checks are needed: without fast-string machine-check recovery copy_mc_to_kernel() is memcpy(), which a page that
 * is not in the direct map would kill.
 */
static bool nd_copy_page(u8 *to, const void *from)
{
	unsigned long probe;

	return !get_kernel_nofault(probe, (const unsigned long *)from) && !copy_mc_to_kernel(to, from, PAGE_SIZE);
}

/* Whether a page is meant by a pass; of a page table it is the kernel that knows. */
static bool nd_is_meant(u64 pfn, bool table, enum nd_pass pass)
{
	bool precious = pfn - nd.image.first < nd.image.pages || table;

	return pass == ND_PASS_BOTH || precious == (pass == ND_PASS_PRECIOUS);
}

static enum nd_page nd_read_page(u8 *to, u64 pfn, enum nd_pass pass, struct nd_filter *filter)
{
	struct page *page = pfn_to_online_page(pfn);

	if (!page)
		return pass == ND_PASS_PRECIOUS ? ND_PAGE_OTHER_PASS : ND_PAGE_UNREADABLE;
	if (!nd_is_meant(pfn, PageTable(page), pass))
		return ND_PAGE_OTHER_PASS;
	if (PageHWPoison(page) || PageOffline(page))
		return ND_PAGE_UNREADABLE;
	if (nd_filter_excludes(filter, page, pfn))
		return ND_PAGE_EXCLUDED;
	if (!nd_copy_page(to, pfn_to_kaddr(pfn)))
		return ND_PAGE_UNREADABLE;
	if (pfn - nd.image.first < nd.image.pages)
		nd_locks_conceal(to, pfn);
	return ND_PAGE_READ;
}

/* Pages from `pfn` on that lie in the kernel's image like it, or outside. */
static u64 nd_pages_beside(u64 pfn)
{
	if (pfn < nd.image.first)
		return nd.image.first - pfn;
	if (pfn < nd.image.first + nd.image.pages)
		return nd.image.first + nd.image.pages - pfn;
	return U64_MAX;
}

static size_t nd_read_pages(u8 *to, u64 first, u64 count, enum nd_pass pass, u32 level)
{
	struct nd_filter filter = ND_FILTER_START(level);
	u64 free, i;

	nd.run = 0;
	free = min(nd_filter_begin(&filter, first), nd_pages_beside(first));
	if (free >= count) {
		nd.run = free;
		nd.pages[0] = nd_is_meant(first, false, pass) ? ND_PAGE_EXCLUDED : ND_PAGE_OTHER_PASS;
		return 0;
	}
	for (i = 0; i < count && i < ND_BLOCK_PAGES; i++)
		nd.pages[i] = nd_read_page(to + i * PAGE_SIZE, first + i, pass, &filter);
	return i;
}

/* ---- Pages that the dump path writes ---- */

static int nd_compare_written(const void *left, const void *right)
{
	const struct nd_written *a = left, *b = right;

	if (a->kind != b->kind)
		return a->kind < b->kind ? -1 : 1;
	return a->first == b->first ? 0 : a->first < b->first ? -1 : 1;
}

/* Joins ranges that touch or overlap, so that the list says in few lines what it says. */
static u32 nd_merge_written(struct nd_written *list, u32 used)
{
	u32 i, kept = 0;

	sort(list, used, sizeof(*list), nd_compare_written, NULL);
	for (i = 0; i < used; i++) {
		struct nd_written *last = kept ? &list[kept - 1] : NULL;

		if (last && last->kind == list[i].kind && last->first + last->pages >= list[i].first)
			last->pages = max_t(u64, last->pages, list[i].first + list[i].pages - last->first);
		else
			list[kept++] = list[i];
	}
	return kept;
}

static u32 nd_add_written(struct nd_written *list, u32 used, enum nd_written_kind kind, u64 pfn, u32 pages)
{
	if (used == ND_SCRATCH_BYTES / sizeof(*list))
		used = nd_merge_written(list, used);
	if (used == ND_SCRATCH_BYTES / sizeof(*list))
		return used;
	list[used] = (struct nd_written){ .first = pfn, .pages = pages, .kind = kind };
	return used + 1;
}

static struct page *nd_page_of(unsigned long address)
{
	bool module = address >= MODULES_VADDR && address < MODULES_END;
	bool memmap = address >= (unsigned long)vmemmap && address < (unsigned long)pfn_to_page(nd.pfn_end);

	if (virt_addr_valid(address))
		return virt_to_page((void *)address);
	if (is_vmalloc_addr((void *)address) || module || memmap)
		return vmalloc_to_page((void *)address);
	return NULL;
}

static u32 nd_add_virtual(struct nd_written *list, u32 used, enum nd_written_kind kind, const void *from, size_t bytes)
{
	unsigned long address = (unsigned long)from & PAGE_MASK;
	unsigned long end = (unsigned long)from + bytes;

	for (; address < end; address += PAGE_SIZE) {
		struct page *page = nd_page_of(address);

		if (page)
			used = nd_add_written(list, used, kind, page_to_pfn(page), 1);
	}
	return used;
}

/* What receiving touched: buffers, and the kernel's notes about their pages. */
static u32 nd_add_touched(struct nd_written *list, u32 used)
{
	u32 i;

	for (i = 0; i < nd.touched_used; i++) {
		const struct nd_ram *touched = &nd.touched[i];
		struct page *page = pfn_to_page(touched->first);

		used = nd_add_written(list, used, ND_WRITTEN_DEVICE, touched->first, touched->pages);
		used = nd_add_virtual(list, used, ND_WRITTEN_OTHER, page, touched->pages * sizeof(*page));
	}
	return used;
}

/* NMIs still reach the CPU that dozes, and use their stack. */
static u32 nd_add_guard(struct nd_written *list, u32 used)
{
	int cpu = atomic_read(&nd.guard) - 1;
	struct page *page;

	if (cpu < 0)
		return used;
	page = vmalloc_to_page((void *)(per_cpu(cpu_tss_rw, cpu).x86_tss.ist[IST_INDEX_NMI] - 1));
	return page ? nd_add_written(list, used, ND_WRITTEN_STACK, page_to_pfn(page), 1) : used;
}

/*
 * Where the per-CPU variables of a CPU begin. As long as the symbols of such variables count from zero, what is added to
 * them is that; since they are addresses in the image (6.15), the area begins where its size divides the address.
 */
static void *nd_percpu_area(int cpu)
{
	if ((__force unsigned long)&cpu_tss_rw < ND_PERCPU_BYTES)
		return (void *)__per_cpu_offset[cpu];
	return (void *)ALIGN_DOWN((unsigned long)&per_cpu(cpu_tss_rw, cpu), ND_PERCPU_BYTES);
}

static size_t nd_read_written(u8 *to)
{
	struct nd_written *list = (struct nd_written *)to;
	int cpu = raw_smp_processor_id();
	u32 used = 0, i;

	for (i = 0; i < ND_MODULE_REGIONS_MAX; i++) {
		void *base;
		size_t bytes;

		nd_module_region(i, &base, &bytes);
		used = nd_add_virtual(list, used, ND_WRITTEN_MODULE, base, bytes);
	}
	used = nd_add_virtual(list, used, ND_WRITTEN_STACK, nd.stack, ND_STACK_BYTES);
	used = nd_add_guard(list, used);
	used = nd_add_virtual(list, used, ND_WRITTEN_PERCPU, nd_percpu_area(cpu), ND_PERCPU_BYTES);
	for (i = 0; i < nd.cards_used; i++) {
		const struct net_device *card = nd.cards[i];

		used = nd_add_virtual(list, used, ND_WRITTEN_DEVICE, card, sizeof(*card) + SZ_8K);
		used = nd_add_virtual(list, used, ND_WRITTEN_DEVICE, card->_tx, card->num_tx_queues * sizeof(*card->_tx));
	}
	for (i = 0; i < ARRAY_SIZE(nd.log); i++)
		used = nd_add_virtual(list, used, ND_WRITTEN_LOG, (void *)nd.log[i].first, nd.log[i].bytes);
	used = nd_add_touched(list, used);
	for (i = 0; i < nd_pool.carriers_used; i++) {
		const struct sk_buff *skb = nd_pool.carriers[i];

		used = nd_add_virtual(list, used, ND_WRITTEN_POOL, skb, sizeof(*skb));
		used = nd_add_virtual(list, used, ND_WRITTEN_POOL, skb->head, skb_end_offset(skb));
	}
	for (i = 0; i < nd_pool.blocks_used + nd_pool.blocks_lent; i++)
		used = nd_add_written(list, used, i < nd_pool.blocks_used ? ND_WRITTEN_POOL : ND_WRITTEN_RESERVE,
				      PHYS_PFN(virt_to_phys(nd_pool.blocks[i])), 1 << ND_BLOCK_ORDER);
	/* Joined, it seldom has half of what the protocol allows; what is beyond that would be the reserve. */
	return min_t(u32, nd_merge_written(list, used), ND_WRITTEN_RANGES_MAX) * sizeof(*list);
}

/* ---- Tasks and memory as text ---- */

/* The zones that Alt-SysRq-m walks have locks that a stopped CPU may hold. */
static bool nd_zones_locked(void)
{
	int node;

	for_each_online_node(node) {
		struct zone *zones = NODE_DATA(node)->node_zones;
		int i;

		for (i = 0; i < MAX_NR_ZONES; i++)
			if (spin_is_locked(&zones[i].lock))
				return true;
	}
	return false;
}

/* What Alt-SysRq-m prints. With sysrq off altogether its key handler would be registered first, which sleeps. */
static void nd_print_memory(void)
{
	if (nd_zones_locked() || !sysrq_mask()) {
		pr_info("Mem-Info: left out: %s\n", sysrq_mask() ? "a stopped CPU holds a zone's lock" : "kernel.sysrq is 0");
		return;
	}
	sysrq_toggle_support(1);
	handle_sysrq('m');
}

/* Asleep until something happens, and not idle: what Alt-SysRq-w prints. */
static bool nd_is_blocked(const struct task_struct *task)
{
	unsigned int state = READ_ONCE(task->__state);

	return (state & TASK_UNINTERRUPTIBLE) && !(state & TASK_NOLOAD);
}

static void nd_tasks_from(enum nd_tasks_pass pass)
{
	nd.tasks.pass = pass;
	nd.tasks.process = next_task(&init_task);
	nd.tasks.thread = nd.tasks.process;
	nd.tasks.threads = 0;
	if (pass == ND_TASKS_BLOCKED)
		pr_info("netdump: blocked tasks\n");
	else
		pr_info("netdump: all tasks\n");
}

static void nd_tasks_end(void)
{
	nd.tasks.pass = ND_TASKS_OVER;
	pr_info("netdump: %u threads shown, %u of them blocked\n", nd.tasks.shown, nd.tasks.blocked);
}

/* The list is left before the thread is shown, so that a fault in that costs this one only. */
static struct task_struct *nd_next_thread(void)
{
	struct task_struct *thread = nd.tasks.thread;
	bool last = false;

	nd.tasks.thread = next_thread(thread);
	if (nd.tasks.thread == nd.tasks.process) {
		nd.tasks.process = next_task(nd.tasks.process);
		nd.tasks.thread = nd.tasks.process;
		last = nd.tasks.process == &init_task;
	}
	if (++nd.tasks.threads >= ND_THREADS_MAX || last)
		nd.tasks.last = true;
	return thread;
}

/*
 * The next threads, piece by piece, so that the log need not hold them all: first the blocked ones, which most often are
 * why somebody looks, then every one.
 */
static void nd_print_tasks(unsigned int threads)
{
	while (threads-- && nd.tasks.pass != ND_TASKS_OVER) {
		enum nd_tasks_pass pass = nd.tasks.pass;
		struct task_struct *thread;

		if (nd.tasks.last && pass == ND_TASKS_BLOCKED) {
			nd.tasks.last = false;
			nd_tasks_from(ND_TASKS_ALL);
			return;
		}
		if (nd.tasks.last) {
			nd_tasks_end();
			return;
		}
		thread = nd_next_thread();
		if (pass == ND_TASKS_BLOCKED && !nd_is_blocked(thread))
			continue;
		if (pass == ND_TASKS_BLOCKED)
			nd.tasks.blocked++;
		else
			nd.tasks.shown++;
		sched_show_task(thread);
	}
}

/* Time and pieces are bounded. What is left out is told in the text itself. */
static void nd_check_state(void)
{
	bool late = nd_now() - nd.tasks.begun > ND_STATE_SECONDS * USEC_PER_SEC;

	if (nd.tasks.pass == ND_TASKS_OVER || (!late && nd.tasks.pieces < ND_STATE_PIECES_MAX))
		return;
	nd.tasks.pass = ND_TASKS_OVER;
	pr_info("netdump: tasks cut: %u threads shown, %u of them blocked, then the limit of %u %s was reached\n",
		nd.tasks.shown, nd.tasks.blocked, late ? ND_STATE_SECONDS : ND_STATE_PIECES_MAX, late ? "seconds" : "pieces");
}

/* As much of the log as fits, from where the last piece ended. One record is 2 KiB at most with its prefixes. */
static void nd_read_log(u8 *to)
{
	size_t bytes;

	while (nd.tasks.used + SZ_4K <= ND_SCRATCH_BYTES &&
	       kmsg_dump_get_line(&nd.tasks.log, false, to + nd.tasks.used, ND_SCRATCH_BYTES - nd.tasks.used, &bytes))
		nd.tasks.used += bytes;
}

static void nd_state_begin(void)
{
	memset(&nd.tasks, 0, sizeof(nd.tasks));
	nd.tasks.begun = nd_now();
	kmsg_dump_rewind(&nd.tasks.log);
	nd.tasks.log.cur_seq = nd.tasks.log.next_seq;
	if (nd_locks_taken_over() || nd.faults || nd.hangs || nd_pool.overwritten)
		pr_info("netdump: took over %u held locks, survived %u faults and %u hangs of its own way, left out %u parts of the transmit pool that had been overwritten\n",
			nd_locks_taken_over(), nd.faults, nd.hangs, nd_pool.overwritten);
	nd_print_memory();
	nd_tasks_from(ND_TASKS_BLOCKED);
}

/* Fills the buffer up to where four more threads may not fit. Goes on after a fault: what is there already stays. */
static size_t nd_read_state(u8 *to, bool from_start)
{
	size_t used;

	/* Once only, also if the beginning does not survive. */
	nd.step.a = false;
	if (from_start)
		nd_state_begin();
	for (;;) {
		touch_nmi_watchdog();
		nd_check_state();
		nd_read_log(to);
		used = nd.tasks.used;
		if (used + ND_STATE_ROOM > ND_SCRATCH_BYTES || nd.tasks.pass == ND_TASKS_OVER)
			break;
		nd_print_tasks(4);
		nd_interrupts_off();
	}
	nd.tasks.used = 0;
	nd.tasks.pieces++;
	return used;
}

/*
 * After a fault or a hang in the State text. A fault costs the thread that was shown, and is told; too many of them, or one
 * hang, end the text with what there is of it.
 */
static void nd_resume_state(void)
{
	size_t used = nd.tasks.used;

	if (!nd.tasks.hung && nd.tasks.faults++ < ND_STATE_FAULTS_MAX) {
		pr_info("netdump: a fault while this was shown: goes on with the next\n");
		if (nd.tasks.pass == ND_TASKS_NONE)
			nd_tasks_from(ND_TASKS_BLOCKED);
		nd_read();
		return;
	}
	nd.tasks.used = 0;
	if (used)
		nd_answer(used);
	nd_core_state_faulted();
}

/* ---- The dump ---- */

static void nd_answer(size_t amount)
{
	nd.place = ND_PLACE_CORE;
	if (nd.step.kind == ND_STEP_PAGES && nd.run)
		nd_core_run(nd_now(), nd.run, nd.pages[0]);
	else if (nd.step.kind == ND_STEP_PAGES)
		nd_core_pages(nd_now(), nd.pages, amount);
	else
		nd_core_filled(nd_now(), amount);
	nd.place = ND_PLACE_NETWORK;
}

static void nd_read(void)
{
	const struct nd_step *step = &nd.step;
	u8 *to = nd_core_scratch();
	size_t amount = 0;

	touch_nmi_watchdog();
	nd.place = ND_PLACE_READ;
	switch (step->kind) {
	case ND_STEP_TEXT:
		amount = nd_read_text(to, step->a);
		break;
	case ND_STEP_REGISTERS:
		amount = nd_read_registers(to, step->a);
		break;
	case ND_STEP_NOTES:
		amount = nd_read_notes(to);
		break;
	case ND_STEP_MEMORY_MAP:
		amount = nd_read_memory_map(to);
		break;
	case ND_STEP_WRITTEN:
		amount = nd_read_written(to);
		break;
	case ND_STEP_STATE:
		amount = nd_read_state(to, step->a);
		break;
	case ND_STEP_PROCESSOR:
		amount = nd_read_processor(to, step->a);
		break;
	case ND_STEP_DEVICES:
		amount = nd_hardware_read_devices(to, ND_SCRATCH_BYTES, step->a);
		nd_interrupts_off();
		break;
	default:
		amount = nd_read_pages(to, step->a, step->b, step->slot, step->filter);
		break;
	}
	nd_answer(amount);
}

/* Does what the core says until the session is over; returns the nd_action. */
static u64 nd_run(void)
{
	unsigned int sent = 0;

	for (;;) {
		nd.place = ND_PLACE_CORE;
		nd_core_step(nd_now(), &nd.step);
		nd.place = ND_PLACE_NETWORK;
		switch (nd.step.kind) {
		case ND_STEP_SEND:
			nd_transmit(nd.step.slot, nd.step.a, nd.step.b);
			if (++sent % 32 == 0) {
				nd_poll();
				nd_keep_bond();
			}
			break;
		case ND_STEP_WAIT:
			nd_wait(nd.step.a);
			break;
		case ND_STEP_FINISHED:
			return nd.step.a;
		default:
			nd_read();
			break;
		}
	}
}

/*
 * What the administrator said by panic_timeout is respected: negative is at once, positive is not before that many
 * seconds after the crash. At 0, which is "stay" to the kernel, the server's word counts, and without one the host
 * reboots, because that is what it was armed for. Returns only if it shall stay, or if a crash kernel comes next.
 */
static void nd_finish(u64 action)
{
	if (nd.kdump_last && kexec_crash_loaded() && !nd.resumed && action != ND_ACTION_HALT) {
		nd_locks_close();
		return;
	}
	while (panic_timeout > 0 && nd_now() < panic_timeout * (u64)USEC_PER_SEC)
		touch_nmi_watchdog();
	nd_locks_close();
	if (action == ND_ACTION_STAY)
		return;
	while (action == ND_ACTION_HALT && !panic_timeout)
		nd_now();
	/* A hang from here on is answered by trying this again. */
	nd.place = ND_PLACE_CORE;
	emergency_restart();
	nd_hold();
}

/* How much of what was being read counts. */
static size_t nd_salvaged(void)
{
	switch (nd.step.kind) {
	case ND_STEP_PAGES:
		return nd.step.b;
	case ND_STEP_DEVICES:
		return nd_hardware_devices_read();
	default:
		return 0;
	}
}

/* What the dump path was doing is given up and the rest goes on. If the core was running, its state is torn. */
static void nd_resume(void)
{
	nd.resumed = true;
	nd_interrupts_off();
	/* The dump can do without them: its own state is whole. */
	if (nd.last_words)
		nd.place = ND_PLACE_NETWORK;
	nd.last_words = false;
	if (nd.place == ND_PLACE_CORE || nd.faults + nd.hangs > ND_FAULTS_MAX)
		nd_finish(ND_ACTION_NONE);
	if (nd.place == ND_PLACE_READ && nd.step.kind == ND_STEP_STATE) {
		nd_resume_state();
	} else if (nd.place == ND_PLACE_READ) {
		memset(nd.pages, ND_PAGE_UNREADABLE, sizeof(nd.pages));
		nd_answer(nd_salvaged());
	}
	nd.place = ND_PLACE_NETWORK;
	nd_finish(nd_run());
	nd_hold();
}

/* The dump path itself faulted. Nothing on its stack is needed any more, so it begins anew. */
static void nd_resume_after_fault(void)
{
	nd.faults++;
	call_on_stack(nd_stack_top(), nd_resume, ASM_CALL_ARG0);
}

#ifdef ND_BENCH
/*
 * What device and cipher can do with no protocol around them: datagrams as large as the dump's, sent for two seconds the
 * dump's own way to the server, which knows no such session and drops them. The result goes into the log, whose end is
 * sent first.
 */
static void nd_bench(const char *kind, bool sealed)
{
	u64 start = nd_now(), end = start + 2 * USEC_PER_SEC, sent = 0, bytes = 0, rate;
	u32 slot;

	while (nd_now() < end) {
		for (slot = 0; slot < nd_pool.slots; slot++) {
			nd_transmit(slot, nd_core_bench(slot, sent, sealed), slot % 32 != 31);
			sent++;
		}
	}
	bytes = sent * nd_core_bench_payload();
	rate = div64_u64(bytes * 100, nd_now() - start);
	pr_info("netdump: bench %s %llu.%02llu MB/s\n", kind, rate / 100, rate % 100);
}
#endif

static void nd_describe(struct nd_crash *crash, const char *reason)
{
	*crash = (struct nd_crash){
		.ram_pages = nd.ram_pages,
		.uptime_ns = ktime_get_mono_fast_ns(),
		.unix_seconds = ktime_get_real_seconds(),
		.page_offset = page_offset_base,
		.phys_base = phys_base,
		.image_pfn = nd.image.first,
		.image_pages = nd.image.pages,
		.cpus = num_online_cpus(),
		.crashing_cpu = raw_smp_processor_id(),
		.pid = current->pid,
		.pool_slots = nd_pool.slots,
	};
	memcpy(crash->mac, nd.device->dev_addr, ETH_ALEN);
	strscpy_pad(crash->comm, current->comm, sizeof(crash->comm));
	strscpy_pad(crash->release, init_utsname()->release, sizeof(crash->release));
	strscpy_pad(crash->version, init_utsname()->version, sizeof(crash->version));
	strscpy_pad(crash->reason, reason, sizeof(crash->reason));
}

/* Sends what of the log has not been sent yet. `are_all`: no dump of ours follows, so they must arrive. */
static void nd_last_words(bool are_all)
{
	struct nd_dying dying = { .pool_slots = nd_pool.slots, .are_all = are_all };
	struct nd_clock clock;

	nd_console_sent(&dying);
	memcpy(dying.mac, nd.device->dev_addr, ETH_ALEN);
	nd.last_words = true;
	nd_core_last_words(nd_now(), &dying);
	for (;;) {
		nd.place = ND_PLACE_CORE;
		clock = nd_console_crash_clock(nd_now());
		nd_core_last_words_step(&clock, &nd.step);
		nd.place = ND_PLACE_NETWORK;
		if (nd.step.kind == ND_STEP_FINISHED)
			break;
		if (nd.step.kind == ND_STEP_SEND)
			nd_transmit(nd.step.slot, nd.step.a, nd.step.b);
		else
			nd_wait(nd.step.a);
	}
	nd.last_words = false;
}

/* The order matters: locks before the first poll, memory before the first receive. False: there is nothing to send with. */
static bool nd_take_device(void)
{
	bool can_send = nd_pool_check();

	nd_mask_interrupts(15);
	nd_interrupts_off();
	local_bh_disable();
	rcu_read_lock();
	nd_locks_open();
	/* Anew, because a bond or a bridge may have others below it than when the host was armed. */
	nd_find_cards(nd.device);
	nd.sender = NULL;
	nd_release_locks();
	nd_pool_lend();
	nd_note_receivers();
	nd_take_frames();
	return can_send && nd.cards_used;
}

static void nd_say_before_kdump(void)
{
	if (nd_take_device())
		nd_last_words(true);
	nd_locks_close();
	rcu_read_unlock();
	nd_mask_interrupts(0);
}

/*
 * A crash kernel is about to run. It wants the other CPUs stopped in its own way, and then there is still time for the
 * messages. If it does not run after all, the panic notifiers do, and with them the dump.
 */
static void nd_before_kdump(void)
{
	nd.crash_stop_other_cpus();
	nd_clock_start();
	call_on_stack(nd_stack_top(), nd_say_before_kdump, ASM_CALL_ARG0);
	atomic_set(&nd.owner, 0);
}

/* With a device that can send. */
static void nd_tell(void)
{
	static struct nd_crash crash;

	if (nd.keep_user)
		nd_filter_keep();
	nd_describe(&crash, nd.reason);
	nd_core_start(nd_now(), &crash);
	nd_last_words(!nd.dumps);
#ifdef ND_BENCH
	nd_bench("raw", false);
	nd_bench("sealed", true);
#endif
	nd_finish(nd.dumps ? nd_run() : ND_ACTION_STAY);
}

static void nd_dump(void)
{
	bool console;

	/* Held to the end: what the dump path prints stays in the log and costs no time on consoles. */
	console = console_trylock();
	console_loglevel = 1;
	if (nd_take_device())
		nd_tell();
	else
		nd_finish(ND_ACTION_NONE);

	nd_give_frames_back();
	rcu_read_unlock();
	if (console)
		console_unlock();
	nd_mask_interrupts(0);
}

/*
 * The stack that the kernel crashed on may be full, or one of the small ones for exceptions, so the dump has its own. Comes
 * back only if the host shall stay.
 */
static void nd_crashed(const char *reason)
{
	nd_hardware_note();
	nd_stop_others();
	nd_capture_own();
	nd.reason = reason;
	nd.running = true;
	WRITE_ONCE(nd.watched, true);
	call_on_stack(nd_stack_top(), nd_dump, ASM_CALL_ARG0);
	WRITE_ONCE(nd.watched, false);
}

/* Last of all panic notifiers, so that what the others print is in the log. */
static int nd_on_panic(struct notifier_block *block, unsigned long event, void *reason)
{
	if (READ_ONCE(nd.state) != ND_ARMED)
		return NOTIFY_DONE;
	if (!nd_claim())
		nd_hold();
	if (nd.running)
		nd_resume_after_fault();
	nd_crashed(reason);
	return NOTIFY_DONE;
}

static struct notifier_block nd_panic_block = { .notifier_call = nd_on_panic, .priority = INT_MIN };

/* ---- Arming; all under rtnl_lock ---- */

static __printf(2, 3) int nd_refuse(int error, const char *format, ...)
{
	va_list args;

	memset(nd.message, 0, sizeof(nd.message));
	va_start(args, format);
	vscnprintf(nd.message, sizeof(nd.message), format, args);
	va_end(args);
	return error;
}

static const char *nd_driver_name(const struct net_device *device)
{
	const struct device *parent = device->dev.parent;

	return parent && parent->driver ? parent->driver->name : "";
}

/* Drivers that finish transmissions in their hard interrupt only, which never comes after a crash. */
static bool nd_driver_unfit(const char *driver)
{
	static const char * const unfit[] = { "8139cp", "8139too" };
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(unfit); i++)
		if (!strcmp(driver, unfit[i]))
			return true;
	return false;
}

static int nd_check_card(const struct net_device *device)
{
	if (list_empty(&device->napi_list))
		return nd_refuse(-EOPNOTSUPP,
				 "device %s cannot be polled (no NAPI): name the device below it, if it is made of another",
				 device->name);
	if (nd_driver_unfit(nd_driver_name(device)))
		return nd_refuse(-EOPNOTSUPP, "device %s cannot be polled: driver %s sends only with interrupts on",
				 device->name, nd_driver_name(device));
	return 0;
}

/* The card that wants the most room around a frame. */
static const struct net_device *nd_greediest_card(void)
{
	const struct net_device *greediest = nd.cards[0];
	u32 i;

	for (i = 1; i < nd.cards_used; i++)
		if (LL_RESERVED_SPACE(nd.cards[i]) + nd.cards[i]->needed_tailroom >
		    LL_RESERVED_SPACE(greediest) + greediest->needed_tailroom)
			greediest = nd.cards[i];
	return greediest;
}

/* Whether the cards below a device can be used, and one can be chosen after a crash. */
static int nd_check_cards(struct net_device *device)
{
	int error;
	u32 i;

	nd_find_cards(device);
	if (!nd.cards_used)
		return nd_refuse(-EOPNOTSUPP, "device %s cannot be polled: no network card that is up is below it",
				 device->name);
	for (i = 0; i < nd.cards_used; i++) {
		error = nd_check_card(nd.cards[i]);
		if (error)
			return error;
	}
	if (nd.cards_used > 1 && !nd_chooser(device))
		return nd_refuse(-EOPNOTSUPP, "device %s cannot be used: %u network cards are below it, and nothing says by which a frame leaves",
				 device->name, nd.cards_used);
	return 0;
}

static int nd_check_device(struct net_device *device, u32 packet_bytes_max)
{
	if (!tsc_khz)
		return nd_refuse(-EOPNOTSUPP, "this machine has no TSC of known frequency");
	if (device->type != ARPHRD_ETHER || (device->flags & IFF_LOOPBACK))
		return nd_refuse(-EOPNOTSUPP, "device %s is no Ethernet device: name one that is", device->name);
	if (!(device->flags & IFF_UP))
		return nd_refuse(-ENETDOWN, "device %s is down: bring it up first", device->name);
	if (packet_bytes_max > device->mtu)
		return nd_refuse(-EMSGSIZE, "packets of %u bytes exceed device %s's MTU of %u: arm anew", packet_bytes_max,
				 device->name, device->mtu);
	return nd_check_cards(device);
}

static int nd_add_ram(struct resource *resource, void *unused)
{
	u64 first = PFN_UP(resource->start), end = PFN_DOWN(resource->end + 1);

	if (first >= end)
		return 0;
	if (nd.ram_ranges == ND_RAM_RANGES_MAX)
		return nd_refuse(-E2BIG, "the host has more than %u ranges of System RAM", ND_RAM_RANGES_MAX);
	nd.ram[nd.ram_ranges++] = (struct nd_ram){ .first = first, .pages = end - first };
	nd.ram_pages += end - first;
	nd.pfn_end = max(nd.pfn_end, end);
	return 0;
}

/* The image's resources are children of the RAM it lies in. They are fixed at boot, so reading them needs no lock. */
static void nd_find_image(void)
{
	phys_addr_t inside = (unsigned long)_printk - __START_KERNEL_map + phys_base;
	const struct resource *ram, *part;
	u64 end = 0;

	nd.image = (struct nd_ram){ .first = PFN_DOWN(inside) };
	for (ram = iomem_resource.child; ram; ram = ram->sibling) {
		if (inside < ram->start || inside > ram->end)
			continue;
		for (part = ram->child; part; part = part->sibling) {
			if (strncmp(part->name, "Kernel ", 7))
				continue;
			nd.image.first = min_t(u64, nd.image.first, PFN_DOWN(part->start));
			end = max_t(u64, end, PFN_UP(part->end + 1));
		}
	}
	if (end > nd.image.first)
		nd.image.pages = end - nd.image.first;
}

/* A number from VMCOREINFO; 0 if it is not there. */
u64 nd_number(const char *text, const char *name, unsigned int base)
{
	const char *at = strstr(text, name);

	return at ? simple_strtoull(at + strlen(name), NULL, base) : 0;
}

u64 nd_kernel_word(u64 address)
{
	u64 word = 0;

	return get_kernel_nofault(word, (u64 *)address) ? 0 : word;
}

/* Where the log's ring buffer is. VMCOREINFO tells, because crash tools need it too. */
static void nd_find_log(void)
{
	char *text = nd_core_scratch();
	u64 ring, descriptors, data, count, bytes;

	text[nd_read_notes(text)] = 0;
	memset(nd.log, 0, sizeof(nd.log));
	ring = nd_kernel_word(nd_number(text, "SYMBOL(prb)=", 16));
	nd_ring_find(text, ring);
	if (!ring)
		return;
	descriptors = ring + nd_number(text, "OFFSET(printk_ringbuffer.desc_ring)=", 10);
	data = ring + nd_number(text, "OFFSET(printk_ringbuffer.text_data_ring)=", 10);
	count = 1ULL << (nd_kernel_word(descriptors + nd_number(text, "OFFSET(prb_desc_ring.count_bits)=", 10)) & 31);
	bytes = 1ULL << (nd_kernel_word(data + nd_number(text, "OFFSET(prb_data_ring.size_bits)=", 10)) & 31);
	nd.log[0] = (struct nd_bytes){ ring, nd_number(text, "SIZE(printk_ringbuffer)=", 10) };
	nd.log[1] = (struct nd_bytes){
		nd_kernel_word(descriptors + nd_number(text, "OFFSET(prb_desc_ring.descs)=", 10)),
		count * nd_number(text, "SIZE(prb_desc)=", 10),
	};
	nd.log[2] = (struct nd_bytes){
		nd_kernel_word(descriptors + nd_number(text, "OFFSET(prb_desc_ring.infos)=", 10)),
		count * nd_number(text, "SIZE(printk_info)=", 10),
	};
	nd.log[3] = (struct nd_bytes){
		nd_kernel_word(data + nd_number(text, "OFFSET(prb_data_ring.data)=", 10)), bytes,
	};
}

static int nd_find_memory(void)
{
	int error;

	nd.ram_ranges = 0;
	nd.ram_pages = 0;
	nd.pfn_end = 0;
	error = walk_iomem_res_desc(IORES_DESC_NONE, IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY, 0, -1, NULL, nd_add_ram);
	if (error == -E2BIG)
		return error;
	if (!nd.ram_ranges)
		return nd_refuse(-ENODEV, "the kernel names no System RAM");
	nd_find_image();
	nd_find_log();
	return 0;
}

static int nd_hooks_start(void)
{
	int error = register_nmi_handler(NMI_LOCAL, nd_on_nmi, NMI_FLAG_FIRST, "netdump");

	if (error)
		return nd_refuse(error, "cannot register an NMI handler: error %d", -error);
	nd_hook();
	nd_probe_start();
	register_die_notifier(&nd_die_block);
	atomic_notifier_chain_register(&panic_notifier_list, &nd_panic_block);
	return 0;
}

static void nd_hooks_stop(void)
{
	if (!nd.hooked)
		return;
	atomic_notifier_chain_unregister(&panic_notifier_list, &nd_panic_block);
	unregister_die_notifier(&nd_die_block);
	nd_probe_stop();
	nd_unhook();
	unregister_nmi_handler(NMI_LOCAL, "netdump");
}

/* Gives back all that was taken, but for what the core remembers. */
static void nd_release(enum nd_state state)
{
	nd_console_stop();
	WRITE_ONCE(nd.state, state);
	nd_hooks_stop();
	if (nd.device)
		dev_put(nd.device);
	nd.device = NULL;
	nd_pool_free();
	nd_locks_forget();
	vfree(nd.stack);
	nd.stack = NULL;
	kvfree(nd.captured);
	nd.captured = NULL;
	nd_hardware_free();
}

static void nd_disarm(enum nd_state state)
{
	nd_release(state);
	nd_core_disarm();
}

static int nd_ignore_frame(struct sk_buff *skb, struct net_device *device, struct packet_type *type,
			   struct net_device *from)
{
	kfree_skb(skb);
	return NET_RX_SUCCESS;
}

/*
 * The list of those who are shown all frames of all devices (`tcpdump -i any`), which no header declares: the one who joins
 * it stands behind its head. Somebody else may join in between, so it must come out the same twice. Each network namespace
 * has a list of its own since c353e8983e0d ("net: introduce per netns packet chains"), 6.16.
 */
static void nd_find_taps(void)
{
	static struct packet_type tap = { .type = htons(ETH_P_ALL), .func = nd_ignore_frame };
	struct list_head *heads[2];
	unsigned int i;

	tap.af_packet_net = dev_net(nd.device);
	for (i = 0; i < ARRAY_SIZE(heads); i++) {
		dev_add_pack(&tap);
		heads[i] = tap.list.prev;
		dev_remove_pack(&tap);
	}
	nd.taps = heads[0] == heads[1] ? heads[0] : NULL;
}

static int nd_take(void)
{
	int error;

	if (nd_pool_take(nd_greediest_card(), nd.frame_bytes_max))
		return nd_refuse(-ENOMEM, "no memory for the transmit pool");
	nd.captured = kvcalloc(nr_cpu_ids, sizeof(*nd.captured), GFP_KERNEL);
	nd.stack = vmalloc(ND_STACK_BYTES);
	if (!nd.captured || !nd.stack || nd_hardware_take() || nd_locks_find())
		return nd_refuse(-ENOMEM, "no memory for a stack and for %u CPUs", nr_cpu_ids);
	nd_find_taps();
	error = nd_find_memory();
	return error ? error : nd_hooks_start();
}

/* Takes the place of an earlier arming, which a device that cannot be used does not cost. */
static int nd_arm(const struct nd_arming *arming)
{
	struct net_device *device = dev_get_by_index(&init_net, arming->ifindex);
	int error;

	if (!device)
		return nd_refuse(-ENODEV, "there is no device with index %u", arming->ifindex);
	error = nd_check_device(device, arming->packet_bytes_max);
	if (error) {
		dev_put(device);
		if (nd.device)
			nd_find_cards(nd.device);
		return error;
	}
	nd_release(ND_IDLE);
	nd_core_accept();
	nd.device = device;
	nd.frame_bytes_max = arming->frame_bytes_max;
	nd.keep_user = arming->keep_user;
	nd.dumps = arming->dumps;
	nd.kdump_first = arming->kdump_first;
	nd.kdump_last = arming->kdump_last;
	error = nd_take();
	if (!error) {
		error = nd_console_start();
		if (error)
			nd_refuse(error, "cannot send kernel messages: error %d: arm without --console and --syslog", -error);
	}
	if (error) {
		nd_disarm(ND_IDLE);
		return error;
	}
	nd.armed_unix_seconds = ktime_get_real_seconds();
	if (kexec_crash_loaded() && nd.kdump_first)
		nd_refuse(0, "a crash kernel is loaded, which runs before netdump: unload it, or arm with --kdump last");
	smp_store_release(&nd.state, ND_ARMED);
	return 0;
}

static int nd_command(const u8 *message, size_t bytes)
{
	struct nd_arming arming;

	memset(nd.message, 0, sizeof(nd.message));
	switch (nd_core_command(message, bytes, &arming, nd.message)) {
	case ND_COMMAND_ARM:
		return nd_arm(&arming);
	case ND_COMMAND_DISARM:
		nd_disarm(ND_IDLE);
		return 0;
	default:
		return -EINVAL;
	}
}

/* Cards come and go below a bond or a bridge. What was taken must still do for those that are there. */
static int nd_check_cards_again(void)
{
	int error = nd_check_cards(nd.device);

	if (!error && LL_RESERVED_SPACE(nd_greediest_card()) > nd_pool.headroom)
		error = nd_refuse(-ENOBUFS, "device %s has a card below it that needs more room before a frame: arm again",
				  nd.device->name);
	return error;
}

/* The device may go away at any time; what was armed then is told to whoever asks. */
static int nd_on_netdev(struct notifier_block *block, unsigned long event, void *data)
{
	struct net_device *device = netdev_notifier_info_to_dev(data);

	if (device == nd.device && (event == NETDEV_GOING_DOWN || event == NETDEV_UNREGISTER)) {
		nd_refuse(0, "device %s %s: arm again when it is back", device->name,
			  event == NETDEV_UNREGISTER ? "is gone" : "went down");
		nd_disarm(ND_LOST);
	} else if (nd.device && (event == NETDEV_CHANGEUPPER || event == NETDEV_DOWN) && nd_check_cards_again()) {
		nd_disarm(ND_LOST);
	}
	return NOTIFY_DONE;
}

static struct notifier_block nd_netdev_block = { .notifier_call = nd_on_netdev };

/* ---- /dev/netdump ---- */

static int nd_open(struct inode *inode, struct file *file)
{
	return capable(CAP_SYS_ADMIN) ? 0 : -EPERM;
}

static ssize_t nd_write(struct file *file, const char __user *from, size_t bytes, loff_t *offset)
{
	u8 *message;
	int error;

	if (bytes > SZ_4K)
		return -EMSGSIZE;
	message = memdup_user(from, bytes);
	if (IS_ERR(message))
		return PTR_ERR(message);
	rtnl_lock();
	error = nd_command(message, bytes);
	rtnl_unlock();
	kfree_sensitive(message);
	return error ? error : bytes;
}

static void nd_fill_status(struct nd_status *status)
{
	unsigned int i;

	*status = (struct nd_status){
		.state = nd.state,
		.armed_unix_seconds = nd.armed_unix_seconds,
		.ram_pages = nd.ram_pages,
		.ram_ranges = nd.ram_ranges,
		.pool_bytes = nd_pool_bytes(),
		.pool_slots = nd_pool.slots,
		.cpus = num_online_cpus(),
	};
	for (i = 0; i < ND_MODULE_REGIONS_MAX; i++) {
		void *base;
		size_t bytes;

		nd_module_region(i, &base, &bytes);
		status->module_bytes += bytes;
	}
	if (nd.captured)
		status->other_bytes = PAGE_ALIGN(nr_cpu_ids * sizeof(*nd.captured)) + ND_STACK_BYTES +
				      nd_hardware_bytes() + nd_console_bytes();
	if (nd.device) {
		status->ifindex = nd.device->ifindex;
		strscpy_pad(status->device, nd.device->name, sizeof(status->device));
		strscpy_pad(status->driver, nd.cards_used ? nd_driver_name(nd.cards[0]) : "", sizeof(status->driver));
	}
	memcpy(status->message, nd.message, sizeof(status->message));
}

static ssize_t nd_read_status(struct file *file, char __user *to, size_t bytes, loff_t *offset)
{
	struct nd_status status;
	u8 out[ND_STATUS_BYTES];

	if (bytes < sizeof(out))
		return -EINVAL;
	rtnl_lock();
	nd_fill_status(&status);
	nd_core_status(&status, out);
	rtnl_unlock();
	return copy_to_user(to, out, sizeof(out)) ? -EFAULT : sizeof(out);
}

static const struct file_operations nd_operations = {
	.owner = THIS_MODULE,
	.open = nd_open,
	.read = nd_read_status,
	.write = nd_write,
	.llseek = noop_llseek,
};

static struct miscdevice nd_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "netdump",
	.mode = 0600,
	.fops = &nd_operations,
};

static int __init nd_init(void)
{
	int error = register_netdevice_notifier(&nd_netdev_block);

	if (error)
		return error;
	error = misc_register(&nd_misc);
	if (error)
		unregister_netdevice_notifier(&nd_netdev_block);
	return error;
}

static void __exit nd_exit(void)
{
	misc_deregister(&nd_misc);
	rtnl_lock();
	nd_disarm(ND_IDLE);
	rtnl_unlock();
	unregister_netdevice_notifier(&nd_netdev_block);
}

module_init(nd_init);
module_exit(nd_exit);
MODULE_DESCRIPTION("Sends the log and memory of a crashed host to a netdump server");
MODULE_LICENSE("GPL");
