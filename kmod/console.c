// SPDX-License-Identifier: GPL-2.0-only
/*
 * netdump: kernel messages to servers, live.
 *
 * printk waits for nobody. It writes its ring buffer, as always, and passes the tracepoint `console`, where a probe of
 * ours does one thing: unless the thread has been woken already, it queues a lazy irq_work, which wakes the thread at the
 * next tick at the latest. The thread reads the records from the ring buffer by their sequence numbers, so messages are
 * copied once, those that were lost on the way can be read again, and no console lock, level or slow serial line matters.
 * It sends them by ordinary UDP sockets: routes, neighbours, bonds and firewalls are the kernel's business while it lives.
 *
 * The ring buffer's reader is not exported. Its layout is: VMCOREINFO has it, because crash tools need it. Every word is
 * read by a copy that cannot fault, in the order of kernel/printk/printk_ringbuffer.c: state, contents, state again.
 */

#include <linux/in.h>
#include <linux/in6.h>
#include <linux/irq_work.h>
#include <linux/kthread.h>
#include <linux/net.h>
#include <linux/sched/clock.h>
#include <linux/timekeeping.h>
#include <linux/tracepoint.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <net/net_namespace.h>
#include <net/sock.h>

#include "console.h"

/* ---- The kernel's ring buffer ---- */

/* The longest text of a record and its dictionary: "SUBSYSTEM=" and 15 bytes, "DEVICE=" and 47, two ends of line. */
#define ND_RECORD_TEXT_BYTES	1024
#define ND_INFO_BYTES_MAX	256
#define ND_DEV_TEXT_MAX		64

/* A descriptor's state is in the two highest bits, its number in the others. */
#define ND_STATE_SHIFT		62
#define ND_ID_MASK		((1ULL << ND_STATE_SHIFT) - 1)

enum nd_desc_state {
	ND_DESC_RESERVED,
	ND_DESC_COMMITTED,
	ND_DESC_FINALIZED,
	ND_DESC_REUSABLE,
};

/* printk_info.flags, include/linux/printk.h's neighbour: the record continues the one before. */
#define ND_LOG_CONT		8

static struct {
	u64 descs, infos, data, head, tail;
	u64 count, data_bytes;
	/* What is to be added to a sequence number to get its descriptor's number. */
	u64 base;
	u32 data_bits;
	u32 desc_bytes, state, begin, next;
	u32 info_bytes, seq, time, text_len, caller, dev;
	u32 subsystem, subsystem_bytes, device, device_bytes;
	/* A record is being written: who waits looks again soon. */
	bool pending;
	bool usable;
} nd_ring;

static u32 nd_offset(const char *vmcoreinfo, const char *name)
{
	return nd_number(vmcoreinfo, name, 10);
}

static void nd_ring_find_info(const char *text)
{
	nd_ring.info_bytes = nd_offset(text, "SIZE(printk_info)=");
	nd_ring.seq = nd_offset(text, "OFFSET(printk_info.seq)=");
	nd_ring.time = nd_offset(text, "OFFSET(printk_info.ts_nsec)=");
	nd_ring.text_len = nd_offset(text, "OFFSET(printk_info.text_len)=");
	nd_ring.caller = nd_offset(text, "OFFSET(printk_info.caller_id)=");
	nd_ring.dev = nd_offset(text, "OFFSET(printk_info.dev_info)=");
	nd_ring.subsystem = nd_ring.dev + nd_offset(text, "OFFSET(dev_printk_info.subsystem)=");
	nd_ring.device = nd_ring.dev + nd_offset(text, "OFFSET(dev_printk_info.device)=");
	nd_ring.subsystem_bytes = nd_offset(text, "LENGTH(printk_info_subsystem)=");
	nd_ring.device_bytes = nd_offset(text, "LENGTH(printk_info_device)=");
}

static u64 nd_ring_desc(u64 id)
{
	return nd_ring.descs + (id & (nd_ring.count - 1)) * nd_ring.desc_bytes;
}

static u64 nd_ring_state_of(u64 id)
{
	return nd_kernel_word(nd_ring_desc(id) + nd_ring.state);
}

/*
 * The descriptor of the oldest record that still has its text. There are more descriptors than texts, so those at the
 * tail have lost theirs: they are before all that have not.
 */
static u64 nd_ring_first(void)
{
	u64 tail = nd_kernel_word(nd_ring.tail) & ND_ID_MASK, from = 0;
	/* Descriptor numbers begin anew after the highest one, which in newer kernels comes soon. */
	u64 to = (nd_kernel_word(nd_ring.head) - tail) & ND_ID_MASK;

	while (from < to) {
		u64 middle = from + (to - from) / 2, id = (tail + middle) & ND_ID_MASK, state = nd_ring_state_of(id);

		if ((state & ND_ID_MASK) != id || state >> ND_STATE_SHIFT == ND_DESC_REUSABLE)
			from = middle + 1;
		else
			to = middle;
	}
	return (tail + from) & ND_ID_MASK;
}

/*
 * Sequence and descriptor numbers count on together, from beginnings that differ: any record tells by how much, as long
 * as it is there.
 */
static bool nd_ring_find_base(void)
{
	u64 id = nd_ring_first(), state, sequence;
	int tries;

	for (tries = 0; tries < 64; tries++, id = (id + 1) & ND_ID_MASK) {
		state = nd_ring_state_of(id);
		smp_rmb();
		sequence = nd_kernel_word(nd_ring.infos + (id & (nd_ring.count - 1)) * nd_ring.info_bytes + nd_ring.seq);
		smp_rmb();
		nd_ring.base = (id - sequence) & ND_ID_MASK;
		if (state == (id | (u64)ND_DESC_FINALIZED << ND_STATE_SHIFT) &&
		    nd_ring_state_of(id) == state)
			return !(nd_ring.base & (nd_ring.count - 1));
	}
	return false;
}

void nd_ring_find(const char *text, u64 ring)
{
	u64 descriptors = ring + nd_offset(text, "OFFSET(printk_ringbuffer.desc_ring)=");
	u64 data = ring + nd_offset(text, "OFFSET(printk_ringbuffer.text_data_ring)=");
	u32 block = nd_offset(text, "OFFSET(prb_desc.text_blk_lpos)=");

	nd_ring.usable = false;
	nd_ring.descs = nd_kernel_word(descriptors + nd_offset(text, "OFFSET(prb_desc_ring.descs)="));
	nd_ring.infos = nd_kernel_word(descriptors + nd_offset(text, "OFFSET(prb_desc_ring.infos)="));
	nd_ring.data = nd_kernel_word(data + nd_offset(text, "OFFSET(prb_data_ring.data)="));
	nd_ring.head = descriptors + nd_offset(text, "OFFSET(prb_desc_ring.head_id)=");
	nd_ring.tail = descriptors + nd_offset(text, "OFFSET(prb_desc_ring.tail_id)=");
	nd_ring.count = 1ULL << (nd_kernel_word(descriptors + nd_offset(text, "OFFSET(prb_desc_ring.count_bits)=")) & 31);
	nd_ring.data_bits = nd_kernel_word(data + nd_offset(text, "OFFSET(prb_data_ring.size_bits)=")) & 31;
	nd_ring.data_bytes = 1ULL << nd_ring.data_bits;
	nd_ring.desc_bytes = nd_offset(text, "SIZE(prb_desc)=");
	nd_ring.state = nd_offset(text, "OFFSET(prb_desc.state_var)=");
	nd_ring.begin = block + nd_offset(text, "OFFSET(prb_data_blk_lpos.begin)=");
	nd_ring.next = block + nd_offset(text, "OFFSET(prb_data_blk_lpos.next)=");
	nd_ring_find_info(text);
	nd_ring.usable = ring && nd_ring.descs && nd_ring.infos && nd_ring.data && nd_ring.desc_bytes >= 24 &&
			 nd_ring.info_bytes >= 24 && nd_ring.info_bytes <= ND_INFO_BYTES_MAX &&
			 nd_ring.text_len && nd_ring.caller && nd_ring.subsystem < nd_ring.device &&
			 nd_ring.device + nd_ring.device_bytes <= nd_ring.info_bytes &&
			 nd_ring.subsystem_bytes <= ND_DEV_TEXT_MAX && nd_ring.device_bytes <= ND_DEV_TEXT_MAX &&
			 nd_ring_find_base();
}

u64 nd_ring_oldest(void)
{
	return nd_ring.usable ? (nd_ring_first() - nd_ring.base) & ND_ID_MASK : 0;
}

/* Appends to `to`, as far as there is room; returns the bytes it would have been. */
static u32 nd_append(u8 *room, size_t bytes, u32 used, const char *text, u32 length)
{
	if (used < bytes)
		memcpy(room + used, text, min_t(size_t, length, bytes - used));
	return used + length;
}

static u32 nd_append_pair(u8 *room, size_t bytes, u32 used, const char *key, const u8 *value, u32 length)
{
	length = strnlen(value, length);
	if (!length)
		return used;
	used = nd_append(room, bytes, used, key, strlen(key));
	used = nd_append(room, bytes, used, value, length);
	return nd_append(room, bytes, used, "\n", 1);
}

/* Copies the text that a descriptor points to; its length, or a negative number if there is none. */
static int nd_ring_text(const u8 *desc, u64 id, u32 length, u8 *room, size_t bytes)
{
	u64 mask = nd_ring.data_bytes - 1;
	u64 begin = *(u64 *)(desc + nd_ring.begin), next = *(u64 *)(desc + nd_ring.next), at = begin, size;

	/* Odd numbers are no places: the record has an empty text, or there was no room for it. */
	if (begin & 1)
		return length ? -ENOENT : 0;
	size = next - begin;
	/* A block that would pass the end begins again at the start, behind its number at the end. */
	if (begin >> nd_ring.data_bits != next >> nd_ring.data_bits && (next & mask)) {
		at = 0;
		size = next & mask;
	}
	if (size < sizeof(u64) || size > nd_ring.data_bytes || nd_kernel_word(nd_ring.data + (at & mask)) != id)
		return -ENOENT;
	length = min_t(u64, length, size - sizeof(u64));
	length = min_t(u32, length, ND_RECORD_TEXT_BYTES);
	if (copy_from_kernel_nofault(room, (void *)(nd_ring.data + (at & mask) + sizeof(u64)),
				     min_t(size_t, length, bytes)))
		return -EFAULT;
	return length;
}

static void nd_ring_info(const u8 *info, struct nd_record *record)
{
	u8 flags = info[nd_ring.text_len + 3];

	/* u16 text_len; u8 facility; u8 flags:5, level:3: since 5.10, when the ring buffer came. */
	record->time_us = div_u64(*(u64 *)(info + nd_ring.time), NSEC_PER_USEC);
	record->text = *(u16 *)(info + nd_ring.text_len);
	record->facility = info[nd_ring.text_len + 2];
	record->level = flags >> 5;
	record->continued = !!(flags & ND_LOG_CONT);
	record->caller = *(u32 *)(info + nd_ring.caller);
}

/* What the state of its descriptor says of a record; ND_RING_RECORD if it can be read. */
static enum nd_ring_read nd_ring_state(u64 state, u64 id)
{
	u64 behind = ((state & ND_ID_MASK) - id) & ND_ID_MASK;

	/* Never used: its number says nothing. Or it is number 0, which is being written. */
	if (!state) {
		nd_ring.pending |= !id;
		return ND_RING_NOT_YET;
	}
	if (behind)
		return behind >> (ND_STATE_SHIFT - 1) ? ND_RING_NOT_YET : ND_RING_OVERWRITTEN;
	switch (state >> ND_STATE_SHIFT) {
	case ND_DESC_RESERVED:
		nd_ring.pending = true;
		return ND_RING_NOT_YET;
	case ND_DESC_COMMITTED:
		return ND_RING_NOT_YET;
	case ND_DESC_FINALIZED:
		return ND_RING_RECORD;
	default:
		return ND_RING_OVERWRITTEN;
	}
}

u32 nd_ring_read(u64 sequence, u8 *room, size_t bytes, struct nd_record *record)
{
	u64 id = (sequence + nd_ring.base) & ND_ID_MASK, index = sequence & (nd_ring.count - 1), state;
	u64 desc_at = nd_ring_desc(id);
	u8 desc[64], info[ND_INFO_BYTES_MAX];
	enum nd_ring_read read;
	int text;
	u32 end;

	if (!nd_ring.usable || nd_ring.desc_bytes > sizeof(desc))
		return ND_RING_NOT_YET;
	state = nd_ring_state_of(id);
	read = nd_ring_state(state, id);
	if (read != ND_RING_RECORD)
		return read;
	smp_rmb();
	if (copy_from_kernel_nofault(desc, (void *)desc_at, nd_ring.desc_bytes) ||
	    copy_from_kernel_nofault(info, (void *)(nd_ring.infos + index * nd_ring.info_bytes), nd_ring.info_bytes))
		return ND_RING_UNREADABLE;
	nd_ring_info(info, record);
	text = nd_ring_text(desc, id, record->text, room, bytes);
	smp_rmb();
	if (nd_ring_state_of(id) != state)
		return ND_RING_OVERWRITTEN;
	if (text < 0 || *(u64 *)(info + nd_ring.seq) != sequence)
		return ND_RING_UNREADABLE;
	end = nd_append_pair(room, bytes, text, "SUBSYSTEM=", info + nd_ring.subsystem, nd_ring.subsystem_bytes);
	end = nd_append_pair(room, bytes, end, "DEVICE=", info + nd_ring.device, nd_ring.device_bytes);
	record->text = text;
	record->dictionary = end - text;
	return ND_RING_RECORD;
}

/* ---- The thread ---- */

static struct {
	struct task_struct *thread;
	struct tracepoint *tracepoint;
	struct socket *sockets[ND_LANES];
	struct sockaddr_storage to[ND_LANES];
	u8 *buffer;
	size_t buffer_bytes;
	/* Whether the thread has been woken since it looked last. */
	atomic_t woken;
	/* What the core has said of them last; a crash goes on from there. */
	u64 acked;
	u64 syslog_next;
} nd_console;

static u64 nd_console_now(void)
{
	return div_u64(ktime_get_mono_fast_ns(), NSEC_PER_USEC);
}

static struct nd_clock nd_console_clock(void)
{
	return (struct nd_clock){
		.now = nd_console_now(),
		.kernel_us = div_u64(local_clock(), NSEC_PER_USEC),
		.unix_us = div_u64(ktime_get_real_fast_ns(), NSEC_PER_USEC),
	};
}

struct nd_clock nd_console_crash_clock(u64 now)
{
	struct nd_clock clock = nd_console_clock();

	clock.now = now;
	return clock;
}

static void nd_console_on_work(struct irq_work *work)
{
	wake_up_process(nd_console.thread);
}

static struct irq_work nd_console_work = IRQ_WORK_INIT_LAZY(nd_console_on_work);

/*
 * In printk, in any context. The record is not complete yet, but interrupts are off until it is. What the thread itself
 * makes the kernel print (a firewall's log of our own datagrams) does not wake it: that would never end.
 */
static void nd_console_on_print(void *unused, const char *text, size_t bytes)
{
	if (!atomic_read(&nd_console.woken) && current != nd_console.thread && !atomic_xchg(&nd_console.woken, 1))
		irq_work_queue(&nd_console_work);
}

/* A reply has arrived. */
static void nd_console_on_data(struct sock *sk)
{
	atomic_set(&nd_console.woken, 1);
	wake_up_process(nd_console.thread);
}

/* Waits for room in the socket, but not for ever: what is sealed is sent again, and syslog was never more than UDP. */
static void nd_console_send(u32 lane, size_t bytes)
{
	struct msghdr message = { .msg_flags = MSG_NOSIGNAL };
	struct kvec part = { .iov_base = nd_console.buffer, .iov_len = bytes };
	struct sockaddr_storage *to = &nd_console.to[lane];

	message.msg_name = to;
	message.msg_namelen = to->ss_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
	kernel_sendmsg(nd_console.sockets[lane], &message, &part, 1, bytes);
}

static void nd_console_receive(void)
{
	struct socket *socket = nd_console.sockets[ND_LANE_SEALED];
	int bytes;

	if (!socket)
		return;
	for (;;) {
		struct msghdr message = {};
		struct kvec part = { .iov_base = nd_console.buffer, .iov_len = nd_console.buffer_bytes };

		bytes = kernel_recvmsg(socket, &message, &part, 1, part.iov_len, MSG_DONTWAIT);
		if (bytes < 0)
			return;
		nd_core_console_received(nd_console_now(), nd_console.buffer, bytes);
	}
}

/* Sends all that is to be sent; returns how many jiffies to sleep. */
static long nd_console_work_off(void)
{
	struct nd_clock clock;
	struct nd_step step;
	u64 acked, syslog_next;

	for (;;) {
		clock = nd_console_clock();
		nd_ring.pending = false;
		nd_core_console_poll(&clock, nd_console.buffer, nd_console.buffer_bytes, &step);
		nd_core_console_sent(&acked, &syslog_next);
		WRITE_ONCE(nd_console.acked, acked);
		WRITE_ONCE(nd_console.syslog_next, syslog_next);
		if (step.kind != ND_STEP_SEND)
			break;
		nd_console_send(step.slot, step.a);
		nd_console_receive();
		cond_resched();
		if (kthread_should_stop())
			return 0;
	}
	if (nd_ring.pending)
		return 1;
	return step.a > clock.now ? usecs_to_jiffies(min_t(u64, step.a - clock.now, 60 * USEC_PER_SEC)) + 1 : 1;
}

static int nd_console_run(void *unused)
{
	long jiffies;

	while (!kthread_should_stop()) {
		atomic_set(&nd_console.woken, 0);
		smp_mb__after_atomic();
		nd_console_receive();
		jiffies = nd_console_work_off();
		set_current_state(TASK_IDLE);
		if (!atomic_read(&nd_console.woken) && !kthread_should_stop())
			schedule_timeout(jiffies);
		__set_current_state(TASK_RUNNING);
	}
	return 0;
}

/* ---- Start and stop ---- */

static void nd_console_find_tracepoint(struct tracepoint *tracepoint, void *unused)
{
	if (!strcmp(tracepoint->name, "console"))
		nd_console.tracepoint = tracepoint;
}

static void nd_console_address(const struct nd_way *way, struct sockaddr_storage *to)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)to;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)to;

	memset(to, 0, sizeof(*to));
	if (way->family == 4) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(way->port);
		memcpy(&v4->sin_addr, way->address, sizeof(v4->sin_addr));
		return;
	}
	v6->sin6_family = AF_INET6;
	v6->sin6_port = htons(way->port);
	memcpy(&v6->sin6_addr, way->address, sizeof(v6->sin6_addr));
	/* fe80::/10: each device has its own. */
	if (way->address[0] == 0xfe && (way->address[1] & 0xc0) == 0x80)
		v6->sin6_scope_id = way->ifindex;
}

static int nd_console_open_lane(u32 lane)
{
	struct socket *socket;
	struct nd_way way;
	int error;

	if (!nd_core_console_way(lane, &way))
		return 0;
	nd_console_address(&way, &nd_console.to[lane]);
	error = sock_create_kern(&init_net, nd_console.to[lane].ss_family, SOCK_DGRAM, IPPROTO_UDP, &socket);
	if (error)
		return error;
	nd_console.sockets[lane] = socket;
	socket->sk->sk_sndtimeo = HZ / 10;
	if (lane == ND_LANE_SEALED) {
		write_lock_bh(&socket->sk->sk_callback_lock);
		socket->sk->sk_data_ready = nd_console_on_data;
		write_unlock_bh(&socket->sk->sk_callback_lock);
	}
	return 0;
}

/* The thread exists before anybody can wake it, and runs last. */
static int nd_console_begin(void)
{
	struct task_struct *thread = kthread_create(nd_console_run, NULL, "netdump_console");
	int error = 0;
	u32 lane;

	if (IS_ERR(thread))
		return PTR_ERR(thread);
	get_task_struct(thread);
	nd_console.thread = thread;
	for (lane = 0; lane < ND_LANES && !error; lane++)
		error = nd_console_open_lane(lane);
	for_each_kernel_tracepoint(nd_console_find_tracepoint, NULL);
	if (!error && nd_console.tracepoint)
		error = tracepoint_probe_register(nd_console.tracepoint, nd_console_on_print, NULL);
	else if (!error)
		error = -ENOENT;
	if (error)
		nd_console.tracepoint = NULL;
	wake_up_process(thread);
	return error;
}

int nd_console_start(void)
{
	int error;

	nd_console.buffer_bytes = nd_core_console_open(nd_console_now());
	if (!nd_console.buffer_bytes)
		return 0;
	nd_console.buffer = kvmalloc(nd_console.buffer_bytes, GFP_KERNEL);
	if (!nd_console.buffer)
		error = -ENOMEM;
	else
		error = nd_ring.usable ? nd_console_begin() : -EOPNOTSUPP;
	if (error)
		nd_console_stop();
	return error;
}

void nd_console_stop(void)
{
	u32 lane;

	if (nd_console.tracepoint) {
		tracepoint_probe_unregister(nd_console.tracepoint, nd_console_on_print, NULL);
		tracepoint_synchronize_unregister();
		nd_console.tracepoint = NULL;
	}
	irq_work_sync(&nd_console_work);
	for (lane = 0; lane < ND_LANES; lane++) {
		struct socket *socket = nd_console.sockets[lane];

		if (socket)
			kernel_sock_shutdown(socket, SHUT_RDWR);
	}
	if (nd_console.thread)
		kthread_stop(nd_console.thread);
	for (lane = 0; lane < ND_LANES; lane++) {
		if (nd_console.sockets[lane])
			sock_release(nd_console.sockets[lane]);
		nd_console.sockets[lane] = NULL;
	}
	if (nd_console.thread)
		put_task_struct(nd_console.thread);
	nd_console.thread = NULL;
	kvfree(nd_console.buffer);
	nd_console.buffer = NULL;
	nd_core_console_close();
}

size_t nd_console_bytes(void)
{
	if (!nd_console.thread)
		return 0;
	return THREAD_SIZE + sizeof(struct task_struct) + PAGE_ALIGN(nd_console.buffer_bytes);
}

void nd_console_sent(struct nd_dying *dying)
{
	dying->acked = READ_ONCE(nd_console.acked);
	dying->syslog_next = READ_ONCE(nd_console.syslog_next);
}
