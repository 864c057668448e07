//! How big and how bad a world is: named numbers, each with a calm value and the values that are
//! drawn, so that they can be drawn, shown, set by name and shrunk without a list beside the list.

use std::fmt;

use crate::random::Random;

/// Declares a group of options: name, value without faults, values that are drawn.
macro_rules! options {
    ($(#[$doc:meta])* pub struct $name:ident {
        $($(#[$field_doc:meta])* $field:ident: $calm:literal, $choices:expr;)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: u64,)*
        }

        impl $name {
            /// Without any fault.
            pub const CALM: Self = Self { $($field: $calm,)* };

            fn draw(source: &mut Source<'_>) -> Self {
                Self { $($field: source.option($calm, &$choices),)* }
            }

            fn each(&mut self, group: &str, visit: &mut dyn FnMut(&str, &mut u64, u64)) {
                $(visit(&format!("{group}.{}", stringify!($field)), &mut self.$field, $calm);)*
            }
        }
    };
}

options! {
    /// Who takes part, and how long the faults last.
    pub struct WorldOptions {
        /// Hosts that crash.
        hosts: 1, [1, 2, 4];
        /// Servers that each host is armed for.
        servers: 1, [1, 2, 2];
        /// When every fault ends; from then on all must come to its end. Microseconds.
        faults_us: 5_000_000, [50_000, 500_000, 3_000_000, 20_000_000];
    }
}

options! {
    /// A host and its faults.
    pub struct HostOptions {
        /// Pages of System RAM.
        ram_pages: 1000, [1, 3, 50, 400, 1500, 2500];
        /// CPUs.
        cpus: 4, [1, 2, 8];
        /// Transmit buffers.
        pool_slots: 256, [1, 2, 16, 64, 256, 512];
        /// Largest UDP payload, in bytes.
        datagram_bytes: 1472, [508, 1472, 1472, 8972];
        /// What one step of the client costs, in microseconds.
        step_us: 5, [0, 5, 50];
        /// How long the NIC owns a buffer after each send, in microseconds.
        nic_us: 20, [0, 10, 300, 5000];
        /// Packets that the NIC's transmit ring holds; 0 is no bound.
        ring_slots: 0, [1, 8, 64];
        /// Packets that the NIC's receive ring holds; the rest is lost.
        receive_slots: 256, [1, 8, 64];
        /// Runs, of 1000, after which the host is away: nothing is received, nothing is sent.
        stall_permille: 0, [1, 10];
        /// How long, in microseconds.
        stall_us: 20_000, [500, 5000, 100_000];
        /// The clock's tick in microseconds; 0 is a fine clock.
        clock_tick_us: 0, [1000, 10_000];
        /// By how much the clock steps forward now and then, in microseconds.
        clock_step_us: 0, [50_000, 2_000_000];
        /// After how many runs the first host dies; 0 is never.
        dies_after: 0, [1, 30, 1000];
        /// How long after its death it has rebooted and crashes again, in microseconds; 0 is never.
        returns_us: 0, [1000, 700_000];
        /// The kernel faults when it writes the State text.
        state_faults: 0, [1];
        /// Datagrams of the first host, of 1000, that a hostile owner of its key has altered.
        hostile_permille: 0, [2, 20, 300];
        /// How long a host goes on without a reply, in seconds.
        give_up_s: 60, [60, 300];
    }
}

options! {
    /// One direction of every link.
    pub struct LinkOptions {
        /// One-way delay of every packet, in microseconds.
        delay_us: 100, [0, 50, 1000, 25_000];
        /// Mean of an exponential delay on top, in microseconds: packets overtake each other.
        jitter_us: 0, [20, 500, 5000];
        /// Packets lost, of 1000.
        loss: 0, [1, 10, 50, 200];
        /// Packets, of 1000, at which a burst of losses begins (Gilbert-Elliott).
        burst: 0, [1, 10];
        /// Mean length of a burst, in packets; of every 10 in it, 8 are lost.
        burst_packets: 10, [3, 30];
        /// Packets delivered twice, of 1000.
        duplicate: 0, [5, 100];
        /// Packets recorded and delivered once more, much later, of 1000.
        replay: 0, [5, 50];
        /// How much later on average, in microseconds.
        replay_us: 500_000, [5000, 3_000_000];
        /// Packets with one bit flipped, of 1000.
        corrupt: 0, [5, 50];
        /// Packets cut short, of 1000.
        truncate: 0, [5, 50];
        /// Packets longer than this are dropped; 0 is no bound.
        mtu_bytes: 0, [700, 1400];
        /// Packets, of 1000, at which the link clogs: what is sent arrives when it is free again.
        clog: 0, [1, 5];
        /// For how long, in microseconds.
        clog_us: 50_000, [2000, 500_000];
        /// Packets, of 1000, at which this direction is cut.
        cut: 0, [1];
        /// For how long, in microseconds.
        cut_us: 300_000, [20_000, 3_000_000];
        /// The neighbour is not known before this time and everything is lost, in microseconds.
        deaf_us: 0, [1000, 400_000];
        /// Bytes a millisecond that the narrowest part lets through; 0 is no bound.
        rate: 0, [1000, 20_000];
        /// Packets that wait there; the rest is dropped.
        queue_packets: 64, [4, 1000];
    }
}

options! {
    /// A server, what it wants and what befalls it.
    pub struct ServerOptions {
        /// Packets a client may have under way.
        credit: 512, [1, 20, 256, 4096];
        /// Packets that may wait for their turn; the rest is refused.
        hold_packets: 4096, [0, 8, 300];
        /// What is wanted: 0 everything, 1 log only, 2 nothing.
        verdict: 0, [0, 0, 1, 2];
        /// The filter level of verdict 0.
        filter: 0, [31];
        /// How long it thinks about its verdict, in microseconds.
        undecided_us: 0, [3000, 700_000];
        /// After how long it wants the log only, in microseconds; 0 is never.
        change_us: 0, [5000, 100_000];
        /// Dumps that are taken at a time; who comes later is told to wait. 0 is no bound.
        places: 0, [1, 2];
        /// How long a waiting host is told to be quiet, in seconds.
        wait_s: 1, [2, 10];
        /// Pulls of pages drawn at random that each crash is asked for.
        pulls: 0, [1, 5, 40];
        /// Whether the host is held until they are answered.
        hold: 0, [1];
        /// Crashes, of 1000, that the first server sends to the second one.
        redirect: 0, [500, 1000];
        /// Mean time after which a server is killed, again and again, in microseconds; 0 is never.
        kill_us: 0, [10_000, 50_000, 1_000_000];
        /// A server is killed at every so-manieth event, and is back at once; 0 is never.
        kill_every: 0, [500, 5000];
        /// Kills, of 1000, that take the whole machine: what was not synced is lost.
        power: 0, [100, 1000];
        /// How long it takes to come back after a kill, in microseconds.
        down_us: 1000, [0, 300_000, 3_000_000];
        /// When the first server is gone for good, in microseconds; 0 is never.
        gone_us: 0, [1, 20_000, 1_000_000];
        /// How often the spool is synced while it grows, in microseconds.
        sync_us: 1_000_000, [1000, 50_000];
        /// Writes, of 1000, that fail.
        write_error: 0, [5, 100];
        /// Writes, of 1000, that stop in the middle.
        short_write: 0, [5, 100];
        /// Bytes that the disk holds; 0 is no bound.
        disk_bytes: 0, [2000, 300_000];
        /// How long a write takes, in microseconds; what arrives meanwhile waits in the socket.
        write_us: 0, [20, 2000];
        /// Packets that the socket holds; the rest is lost.
        socket_packets: 4096, [16, 200];
        /// Whether it replies while something is not written, and acknowledges what is.
        partial: 0, [1];
        /// Replies of the first server, of 1000, that a hostile owner of the keys has altered.
        hostile_permille: 0, [2, 100];
        /// Whether the store is read at every kill, as a vmcore.
        read_store: 0, [0];
    }
}

/// How big and how bad everything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where all draws come from.
    pub seed: u64,
    /// Option group `world`.
    pub world: WorldOptions,
    /// Option group `host`.
    pub host: HostOptions,
    /// Option group `up`: from a host to a server.
    pub up: LinkOptions,
    /// Option group `down`: from a server to a host.
    pub down: LinkOptions,
    /// Option group `server`.
    pub server: ServerOptions,
    /// An engine broken on purpose, to see that the simulator notices; never drawn.
    pub mutant: Mutant,
}

/// What is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// Nothing.
    None,
    /// The host never sends anything twice.
    NoResends,
    /// Replies acknowledge a packet that has not arrived.
    LyingNext,
    /// A pull leaves out a page.
    SkippedPage,
    /// A server acknowledges what it has not written.
    UnwrittenAcknowledged,
}

/// Where options are drawn from.
struct Source<'a> {
    below: &'a mut dyn FnMut(u64) -> u64,
    /// Options, of 1000, that are not calm in this world.
    wild: u64,
}

impl Source<'_> {
    fn option(&mut self, calm: u64, choices: &[u64]) -> u64 {
        if (self.below)(1000) >= self.wild {
            return calm;
        }
        let index = (self.below)(u64::try_from(choices.len()).unwrap_or(1));
        let index = usize::try_from(index).unwrap_or(0);
        choices.get(index).copied().unwrap_or(calm)
    }
}

impl Options {
    /// A small world without faults.
    #[must_use]
    pub const fn calm(seed: u64) -> Self {
        Self {
            seed,
            world: WorldOptions::CALM,
            host: HostOptions::CALM,
            up: LinkOptions::CALM,
            down: LinkOptions::CALM,
            server: ServerOptions::CALM,
            mutant: Mutant::None,
        }
    }

    /// The world of `seed`.
    #[must_use]
    pub fn draw(seed: u64) -> Self {
        let mut random = Random::new(seed).fork(1);
        Self::draw_from(seed, &mut |bound| random.below(bound))
    }

    /// A world whose options follow from `below`, which gives numbers below its argument: first how
    /// many faults there are, then which and how strong.
    pub fn draw_from(seed: u64, below: &mut dyn FnMut(u64) -> u64) -> Self {
        let wild = [60, 200, 200, 450][usize::try_from(below(4)).unwrap_or(0)];
        let mut source = Source { below, wild };
        Self {
            seed,
            world: WorldOptions::draw(&mut source),
            host: HostOptions::draw(&mut source),
            up: LinkOptions::draw(&mut source),
            down: LinkOptions::draw(&mut source),
            server: ServerOptions::draw(&mut source),
            mutant: Mutant::None,
        }
    }

    /// Shows every option to `visit`: its name, its value, its calm value.
    pub fn each(&mut self, visit: &mut dyn FnMut(&str, &mut u64, u64)) {
        self.world.each("world", visit);
        self.host.each("host", visit);
        self.up.each("up", visit);
        self.down.each("down", visit);
        self.server.each("server", visit);
    }

    /// Sets one option, given as `name=value`.
    pub fn set(&mut self, assignment: &str) -> Result<(), String> {
        let wrong = || format!("`{assignment}` is not a name, `=` and a number");
        let (wanted, value) = assignment.split_once('=').ok_or_else(wrong)?;
        let value: u64 = value.parse().ok().ok_or_else(wrong)?;
        let mut found = false;
        self.each(&mut |name, option, _| {
            if name == wanted {
                (*option, found) = (value, true);
            }
        });
        if found {
            Ok(())
        } else {
            Err(format!("there is no option `{wanted}`"))
        }
    }

    /// What differs from a calm world, as `name=value`.
    #[must_use]
    pub fn differences(&self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut copy = *self;
        copy.each(&mut |name, value, calm| {
            if *value != calm {
                differences.push(format!("{name}={value}"));
            }
        });
        differences
    }
}

impl fmt::Display for Options {
    /// The command line that runs this world again.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cargo xtask sim --seed {}", self.seed)?;
        if *self != Self::draw(self.seed) {
            write!(f, " --only \"{}\"", self.differences().join(" "))?;
        }
        Ok(())
    }
}
