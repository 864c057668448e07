/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The shim's own state, and every place where kernel versions differ. A feature test where there is one; else a version
 * test that cites the commit.
 */
#ifndef NETDUMP_SHIM_H
#define NETDUMP_SHIM_H

#include <linux/ioport.h>
#include <linux/kmsg_dump.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/netdevice.h>
#include <linux/sched/signal.h>
#include <linux/version.h>

/* Split off linux/netdevice.h by 49e47a5b6145 ("net: move struct netdev_rx_queue out of netdevice.h"), 6.6. */
#if __has_include(<net/netdev_rx_queue.h>)
#include <net/netdev_rx_queue.h>
#endif

/* Split off linux/crash_core.h by 443cbaf9e2fd ("crash: split vmcoreinfo exporting code out"), 6.9. */
#if __has_include(<linux/vmcore_info.h>)
#include <linux/vmcore_info.h>
#else
#include <linux/crash_core.h>
#endif

#include "abi.h"
#include "bond.h"

/* Longest frame taken from the network: the largest reply and its headers fit. */
#define ND_RECEIVE_BYTES	2048

/* Faults and hangs of the dump path that are survived. */
#define ND_FAULTS_MAX		16

/* The dump's own stack. */
#define ND_STACK_BYTES		(4 * PAGE_SIZE)

/* A dump path that shows no sign of life for so long hangs. What it does takes milliseconds, on a slow emulator too. */
#define ND_HANG_SECONDS		10

/* Threads whose stacks the State text may show, so that a list that is broken into a ring ends. */
#define ND_THREADS_MAX		65536

/* What the State text may take: time, pieces of it (the core takes 64), and faults in it that cost one thread each. */
#define ND_STATE_SECONDS	20
#define ND_STATE_PIECES_MAX	60
#define ND_STATE_FAULTS_MAX	4

/* What four threads may need in the buffer: the stack of one is seldom longer than 4 KiB as text. */
#define ND_STATE_ROOM		SZ_16K

/*
 * Pages of received frames that are remembered. Drivers use the same few again and again, once each buffer of a ring of
 * 256 has been used, whose frame, data and page may lie in three pages.
 */
#define ND_TOUCHED_MAX		1024

/* Bytes of panic(): of its beginning, until it has a frame pointer; of all its code; of its stack frame. */
#define ND_PROLOGUE_BYTES	16
#define ND_PANIC_BYTES		2048
#define ND_PANIC_FRAME_BYTES	512

/* Network cards below the device that a host is armed on, and devices between it and them. */
#define ND_CARDS_MAX		16
#define ND_DEPTH_MAX		4

/* A bond is left to its own choice for so long without a frame for this host; servers answer in milliseconds. */
#define ND_SILENCE_SECONDS	3

/* The variables of a CPU that the kernel itself and its modules have. */
#define ND_PERCPU_BYTES		SZ_256K

/* A range of kernel addresses. */
struct nd_bytes {
	u64 first;
	u64 bytes;
};

/* One CPU at the crash. */
struct nd_captured {
	struct pt_regs regs;
	struct task_struct *task;
	u64 fs_base;
	u64 gs_base;
	u32 segments[4];
	/* An NMI stopped this CPU for good. */
	bool held;
	/* These are those of panic()'s caller. */
	bool probed;
	/* Written last: the rest is whole. */
	bool valid;
};

/* What one who watches the dump path has seen: its beat, since when, and whether it has been tried to get it going. */
struct nd_watch {
	u32 beat;
	u64 since;
	bool kicked;
};

/* Where the dump path is, so that a fault in it can be answered. */
enum nd_place {
	/* In the shim or a driver, between the core's calls. */
	ND_PLACE_NETWORK,
	/* In the core: its state is torn. */
	ND_PLACE_CORE,
	/* Reading what the core asked for. */
	ND_PLACE_READ,
};

/* Which tasks the State text is showing. */
enum nd_tasks_pass {
	ND_TASKS_NONE,
	ND_TASKS_BLOCKED,
	ND_TASKS_ALL,
	ND_TASKS_OVER,
};

/* Everything the shim has. One instance, zeroed when the module is loaded. */
struct nd_shim {
	/* Fixed while armed; under rtnl_lock. */
	struct net_device *device;
	/* Those below it, or itself: found when it is armed, when they change, and anew after the crash. */
	struct net_device *cards[ND_CARDS_MAX];
	u32 cards_used;
	u32 frame_bytes_max;
	bool keep_user;
	bool dumps;
	bool kdump_first;
	bool kdump_last;
	struct nd_ram ram[ND_RAM_RANGES_MAX];
	u32 ram_ranges;
	u64 ram_pages;
	u64 pfn_end;
	struct nd_ram image;
	struct nd_bytes log[4];
	struct nd_captured *captured;
	u8 *stack;
	struct list_head *taps;
	u32 state;
	u64 armed_unix_seconds;
	char message[ND_TEXT_BYTES];
	bool hooked;
	bool probed;
	void (*stop_other_cpus)(int wait);
	void (*crash_stop_other_cpus)(void);

	/* From the crash on; written by the crashing CPU only, but for `stopping`, which the others read. */
	atomic_t owner;
	bool panicking;
	bool stopping;
	bool running;
	/* The dump path has begun anew on its stack: there is no way back to the panic. */
	bool resumed;
	/* The console's last words are being sent; the dump has not begun. */
	bool last_words;
	/* The first held CPU writes its number, plus one, and watches `beat` while `watched`. */
	atomic_t guard;
	u32 beat;
	bool watched;
	bool kicked;
	const char *reason;
	struct {
		struct pt_regs regs;
		struct task_struct *task;
		pid_t pid;
		int cpu;
		bool valid;
	} died;
	u64 tsc_start;
	u32 tsc_mult;
	enum nd_place place;
	struct nd_step step;
	u32 faults;
	u32 hangs;
	bool received;
	/* The card that frames leave by; NULL until the first one does. And when a frame for this host alone came last. */
	struct net_device *sender;
	u64 heard_at;
	/* What the partner of a bond hears next, and when. */
	u8 sign[ND_SIGN_BYTES];
	u64 sign_at;
	/* Who had their frames. */
	struct {
		rx_handler_func_t *rx_handler;
		struct vlan_info *vlan_info;
	} receivers[ND_CARDS_MAX];
	u32 touched_used;
	struct nd_ram touched[ND_TOUCHED_MAX];
	struct {
		struct kmsg_dump_iter log;
		struct task_struct *process;
		struct task_struct *thread;
		enum nd_tasks_pass pass;
		/* Of this pass, and those that were shown in either. */
		u32 threads;
		u32 shown;
		u32 blocked;
		/* The thread that came last is the last one of this pass. */
		bool last;
		bool hung;
		u32 faults;
		u32 pieces;
		u64 begun;
		/* Bytes of the piece that is being put together. */
		size_t used;
	} tasks;
	struct kmsg_dump_iter text;
	u8 frame[ND_RECEIVE_BYTES];
	/* What became of the pages that were asked for; if `run` is not 0, of that many, which are all like the first. */
	u8 pages[ND_BLOCK_PAGES];
	u64 run;
};

/* One memory region of the module: 6.1 has one layout, ac3b43283923 ("module: replace module_layout with
 * module_memory"), 6.4, made it an array.
 */
static inline void nd_module_region(unsigned int index, void **base, size_t *bytes)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	*base = index < MOD_MEM_NUM_TYPES ? THIS_MODULE->mem[index].base : NULL;
	*bytes = index < MOD_MEM_NUM_TYPES ? THIS_MODULE->mem[index].size : 0;
#else
	*base = index < 1 ? THIS_MODULE->core_layout.base : NULL;
	*bytes = index < 1 ? THIS_MODULE->core_layout.size : 0;
#endif
}

#define ND_MODULE_REGIONS_MAX	8

/* A number from VMCOREINFO; 0 if it is not there. */
u64 nd_number(const char *text, const char *name, unsigned int base);
/* A word of the kernel's; 0 if it cannot be read. */
u64 nd_kernel_word(u64 address);

#endif
