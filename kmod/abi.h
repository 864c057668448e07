/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the C shim and the Rust core share: structures, numbers and functions. core/src/ffi.rs is the other half; both
 * sides assert every size. All calls into the core are made by one thread at a time: under rtnl_lock while the host
 * is healthy, by the one CPU that runs after the crash.
 */
#ifndef NETDUMP_ABI_H
#define NETDUMP_ABI_H

#include <linux/build_bug.h>
#include <linux/types.h>

/* Bytes of proto::arming's message and status, of a block of pages, and of texts. */
#define ND_MESSAGE_BYTES	872
#define ND_STATUS_BYTES		364
#define ND_TEXT_BYTES		160
#define ND_SCRATCH_BYTES	65536
#define ND_BLOCK_PAGES		16
#define ND_SLOTS_MAX		2048
#define ND_RAM_RANGES_MAX	512
#define ND_WRITTEN_RANGES_MAX	1024

/* What nd_core_command() made of a message. */
enum nd_command {
	ND_COMMAND_ARM,
	ND_COMMAND_DISARM,
	ND_COMMAND_REFUSED,
};

/* The part of an arming message that the shim acts on. */
struct nd_arming {
	u32 ifindex;
	/* Longest frame the core will build, in bytes, Ethernet header and tag included. */
	u32 frame_bytes_max;
	/* The same without what is before the IP header: what a device's MTU limits. */
	u32 packet_bytes_max;
	/* Not zero: the crashing task's user memory is sent whatever the filter level says. */
	u32 keep_user;
	/* Not zero: there is a server that takes dumps. Without one a crash sends its last messages only. */
	u32 dumps;
	/* Not zero: a crash kernel that is loaded runs before the panic notifiers. */
	u32 kdump_first;
	/* Not zero: a crash kernel that is loaded runs after the dump, instead of a reboot. */
	u32 kdump_last;
};
static_assert(sizeof(struct nd_arming) == 28);

enum nd_state {
	ND_IDLE,
	ND_ARMED,
	ND_LOST,
};

/* The part of the status that the shim knows. Texts are zero-padded. */
struct nd_status {
	u64 armed_unix_seconds;
	u64 ram_pages;
	u64 module_bytes;
	u64 pool_bytes;
	u64 other_bytes;
	u32 state;
	u32 ifindex;
	u32 pool_slots;
	u32 ram_ranges;
	u32 cpus;
	u32 reserved;
	u8 device[16];
	u8 driver[32];
	u8 message[ND_TEXT_BYTES];
};
static_assert(sizeof(struct nd_status) == 272);

/* What the shim knows of a crash when it starts the session. Texts are zero-padded. */
struct nd_crash {
	u64 ram_pages;
	u64 uptime_ns;
	u64 unix_seconds;
	u64 page_offset;
	u64 phys_base;
	u64 image_pfn;
	u64 image_pages;
	u32 cpus;
	u32 crashing_cpu;
	s32 pid;
	u16 pool_slots;
	u8 mac[6];
	u8 comm[16];
	u8 release[64];
	u8 version[128];
	u8 reason[256];
};
static_assert(sizeof(struct nd_crash) == 544);

/* One CPU, in the byte order and layout of proto::record::Cpu. */
struct nd_cpu {
	u32 cpu;
	u32 flags;
	s32 pid;
	u32 reserved;
	u64 task;
	u8 comm[16];
	u64 registers[27];
};
static_assert(sizeof(struct nd_cpu) == 256);
#define ND_CPU_CRASHING	1
#define ND_CPU_CAPTURED	2

/* One range of System RAM, in the layout of proto::record::RamRange. */
struct nd_ram {
	u64 first;
	u64 pages;
};
static_assert(sizeof(struct nd_ram) == 16);

/* One range of pages that the dump path writes, in the layout of proto::record::WrittenRange. */
struct nd_written {
	u64 first;
	u32 pages;
	u32 kind;
};
static_assert(sizeof(struct nd_written) == 16);

/* What a reboot destroys, in the layouts of proto::hardware. */
#define ND_PROCESSOR_REGISTERS_MAX	512
struct nd_processor_head {
	u32 cpu;
	u32 reserved;
};
static_assert(sizeof(struct nd_processor_head) == 8);

struct nd_register {
	u16 space;
	u16 reserved;
	u32 number;
	u64 value;
};
static_assert(sizeof(struct nd_register) == 16);

struct nd_device_head {
	u32 segment;
	u8 bus;
	u8 devfn;
	u16 read;
	u16 length;
	u16 reserved;
};
static_assert(sizeof(struct nd_device_head) == 12);

enum nd_written_kind {
	ND_WRITTEN_MODULE = 1,
	ND_WRITTEN_POOL,
	ND_WRITTEN_RESERVE,
	ND_WRITTEN_STACK,
	ND_WRITTEN_PERCPU,
	ND_WRITTEN_LOG,
	ND_WRITTEN_DEVICE,
	ND_WRITTEN_OTHER,
};

/* What became of one page. */
enum nd_page {
	ND_PAGE_READ,
	ND_PAGE_OTHER_PASS,
	ND_PAGE_UNREADABLE,
	ND_PAGE_EXCLUDED,
};

/* Which pages are meant: kernel image and page tables, all others, or both. */
enum nd_pass {
	ND_PASS_PRECIOUS,
	ND_PASS_REST,
	ND_PASS_BOTH,
};

/* What the shim shall do next; a and b are the numbers it needs for it. */
enum nd_step_kind {
	/* Send the first `a` bytes of frame `slot`; if `b`, another one follows at once. */
	ND_STEP_SEND,
	/* Fill the scratch buffer, then nd_core_filled(). */
	ND_STEP_TEXT,
	/* ... with the registers of the `a`-th CPU ... */
	ND_STEP_REGISTERS,
	ND_STEP_NOTES,
	ND_STEP_MEMORY_MAP,
	ND_STEP_WRITTEN,
	ND_STEP_STATE,
	/* ... with the hardware state of the `a`-th CPU ... */
	ND_STEP_PROCESSOR,
	/* ... with the next PCI devices' configuration spaces, from the first one if `a` ... */
	ND_STEP_DEVICES,
	/* Read those of `b` pages from pfn `a` on that belong to pass `slot`, an nd_pass, and are not excluded by `filter`,
	 * then nd_core_pages(); or nd_core_run(), if they and pages after them are all alike.
	 */
	ND_STEP_PAGES,
	/* Poll the device until something is received or until time `a`. */
	ND_STEP_WAIT,
	/* The session is over; `a` is an nd_action. */
	ND_STEP_FINISHED,
};

enum nd_action {
	/* Nobody told: the client gave up. */
	ND_ACTION_NONE,
	ND_ACTION_REBOOT,
	ND_ACTION_HALT,
	ND_ACTION_STAY,
};

struct nd_step {
	u32 kind;
	u32 slot;
	u64 a;
	u64 b;
	u32 filter;
	u32 reserved;
};
static_assert(sizeof(struct nd_step) == 32);

/* Where the console's messages go. */
enum nd_lane {
	ND_LANE_SEALED,
	ND_LANE_SYSLOG,
	ND_LANES,
};

/* The way of a lane: family 4 or 6; the device matters for link-local addresses. */
struct nd_way {
	u16 family;
	u16 port;
	u32 ifindex;
	u8 address[16];
};
static_assert(sizeof(struct nd_way) == 24);

/* The time, as the core, the kernel's log and people count it, in microseconds. */
struct nd_clock {
	u64 now;
	u64 kernel_us;
	u64 unix_us;
};
static_assert(sizeof(struct nd_clock) == 24);

/* What a crash knows of the console before it. `are_all`: no dump follows. */
struct nd_dying {
	u64 acked;
	u64 syslog_next;
	u16 pool_slots;
	u8 mac[6];
	u64 are_all;
};
static_assert(sizeof(struct nd_dying) == 32);

/* One record of the kernel's ring buffer; `text` and `dictionary` are their whole bytes. */
struct nd_record {
	u64 time_us;
	u32 caller;
	u32 text;
	u32 dictionary;
	u8 level;
	u8 facility;
	u8 continued;
	u8 reserved;
};
static_assert(sizeof(struct nd_record) == 24);

enum nd_ring_read {
	ND_RING_RECORD,
	ND_RING_NOT_YET,
	ND_RING_OVERWRITTEN,
	ND_RING_UNREADABLE,
};

/*
 * The core's functions. Times are microseconds since the crash. A message that arms is kept apart until
 * nd_core_accept() puts it in the place of the one before. Times are microseconds since the crash.
 */
void nd_core_accept(void);
u32 nd_core_command(const u8 *message, size_t bytes, struct nd_arming *arming, u8 text[ND_TEXT_BYTES]);
/*
 * The console's: nd_core_console_poll(), ..._received() and ..._sent() for its thread, ..._open() and ..._close() while
 * there is no such thread, nd_core_last_words...() after the crash. A step of the first has the lane as its slot.
 */
size_t nd_core_console_open(u64 now);
void nd_core_console_close(void);
bool nd_core_console_way(u32 lane, struct nd_way *way);
void nd_core_console_poll(const struct nd_clock *clock, u8 *buffer, size_t bytes, struct nd_step *step);
void nd_core_console_received(u64 now, u8 *datagram, size_t bytes);
void nd_core_console_sent(u64 *acked, u64 *syslog_next);
void nd_core_last_words(u64 now, const struct nd_dying *dying);
void nd_core_last_words_step(const struct nd_clock *clock, struct nd_step *step);
void nd_core_last_words_frame(u64 now, u8 *frame, size_t bytes);
void nd_core_disarm(void);
void nd_core_filled(u64 now, size_t bytes);
void nd_core_frame(u64 now, u8 *frame, size_t bytes);
void nd_core_pages(u64 now, const u8 *pages, size_t count);
void nd_core_run(u64 now, u64 pages, u8 status);
u8 *nd_core_scratch(void);
void nd_core_start(u64 now, const struct nd_crash *crash);
void nd_core_state_faulted(void);
void nd_core_status(const struct nd_status *status, u8 out[ND_STATUS_BYTES]);
void nd_core_step(u64 now, struct nd_step *step);
#ifdef ND_BENCH
/* Makes a frame of the largest size in `slot`; returns its bytes. The payload is UDP's in each of them. */
u32 nd_core_bench(u32 slot, u64 number, bool sealed);
u32 nd_core_bench_payload(void);
#endif

/*
 * The shim's functions: the frame of a slot, or NULL if there is no such slot, and how long frames may be. Slot `pool_slots` is a spare one for questions and answers about Ethernet addresses.
 */
u8 *nd_frame(u32 slot);
u64 nd_ring_oldest(void);
u32 nd_ring_read(u64 sequence, u8 *room, size_t bytes, struct nd_record *record);
size_t nd_frame_bytes(void);

#endif
