//! What passes between the host's user space and the module: one message in, one status out.
//!
//! Both are fixed structures of little-endian integers without padding, so that a 32-bit tool,
//! another compiler or a newer tool cannot disagree about them. The module takes a message only if
//! every field is legal.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::console::Format;
use crate::keys::{KEY_BYTES, SessionKeys};
use crate::units::{ArmingId, KeyId, SessionId};
use crate::wire::{DATAGRAM_BYTES_MAX, DATAGRAM_BYTES_MIN};

/// First bytes of a message to the module.
pub const MESSAGE_MAGIC: [u8; 4] = *b"NDam";
/// First bytes of a status from the module.
pub const STATUS_MAGIC: [u8; 4] = *b"NDst";
/// Version of message and status. Tool and module must agree exactly: they are built from one
/// source and installed together, and a mismatch is told as such.
pub const ABI_VERSION: u16 = 3;
/// Servers one arming can name; they are tried in order.
pub const SERVERS_MAX: usize = 4;
/// Bytes of a host name, zero-padded.
pub const HOST_BYTES: usize = 64;
/// The longest time a crashed host may be told to look for a server, in seconds.
pub const GIVE_UP_SECONDS_MAX: u32 = 3600;
/// The largest filter level; its five bits are makedumpfile's dump levels.
pub const FILTER_MAX: u8 = 31;
/// Bytes a message has in all.
pub const MESSAGE_BYTES: usize = size_of::<Message>();

/// An IP address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// IPv4.
    V4([u8; 4]),
    /// IPv6.
    V6([u8; 16]),
}

/// One server and the way to it.
#[derive(Clone)]
pub struct Server {
    /// The host's own address towards this server.
    pub local: Address,
    /// The host's UDP port.
    pub local_port: u16,
    /// The server's address; of the same family as `local`.
    pub remote: Address,
    /// The server's UDP port.
    pub remote_port: u16,
    /// The next hop, the server itself or the gateway; of the same family as `local`.
    pub next_hop: Address,
    /// The next hop's Ethernet address, or zeros if nobody answered when the host was armed: then it
    /// is asked for after the crash.
    pub next_hop_mac: [u8; 6],
    /// The session that a crash under this arming will be, if it goes to this server.
    pub session: SessionId,
    /// The session's keys.
    pub keys: SessionKeys,
}

/// Where the host's kernel messages go, healthy and in a crash.
#[derive(Clone)]
pub struct Console {
    /// Records of a higher level are not sent; 7 sends all.
    pub level: u8,
    /// To the first server, sealed with [`crate::keys::Secret::log_keys`] of its session.
    pub keys: Option<SessionKeys>,
    /// To a syslog server, in the clear. Session and keys of the way there do not matter.
    pub syslog: Option<(Format, Server)>,
    /// A crash kernel, if one is loaded, runs before the panic notifiers. Then the last messages must
    /// go out before it, and there is no dump of ours.
    pub kdump_first: bool,
    /// A crash kernel, if one is loaded, runs after our dump, instead of a reboot.
    pub kdump_last: bool,
}

impl Console {
    /// No messages are sent.
    pub const NONE: Self = Self {
        level: LEVEL_MAX,
        keys: None,
        syslog: None,
        kdump_first: false,
        kdump_last: false,
    };
}

/// Everything the client needs to know before it may have to act.
#[derive(Clone)]
pub struct Arming {
    /// Index of the network device.
    pub ifindex: u32,
    /// The 802.1Q tag of all frames, as it is on the wire: priority (3 bits), 0, VLAN (12 bits, 1 to
    /// 4094).
    pub vlan: Option<u16>,
    /// Largest UDP payload to send, in bytes.
    pub datagram_bytes: u16,
    /// Seconds a crashed host looks for a server that answers before it reboots by itself.
    pub give_up_seconds: u32,
    /// Filter level that the host demands, 0 to [`FILTER_MAX`]: pages of these kinds are never
    /// sent, whatever a server asks for.
    pub filter: u8,
    /// The user memory of the task that crashes is sent whatever the filter level says.
    pub keep_user: bool,
    /// The kernel's `/proc/sys/kernel/random/boot_id`.
    pub boot: [u8; 16],
    /// The host's name, zero-padded UTF-8.
    pub host: [u8; HOST_BYTES],
    /// The servers, in the order they are tried; 1 to [`SERVERS_MAX`], the rest `None`. None at all if
    /// there is a syslog server: then a crash sends its messages and no dump.
    pub servers: [Option<Server>; SERVERS_MAX],
    /// Where the kernel's messages go.
    pub console: Console,
}

/// What user space may tell the module.
#[expect(
    clippy::large_enum_variant,
    reason = "decoded once into static storage; nobody moves it about"
)]
#[derive(Clone)]
pub enum Command {
    /// Arm, replacing any earlier arming.
    Arm(Arming),
    /// Disarm.
    Disarm,
}

/// Why the module refused a message. The discriminants are stable: the status carries them to user
/// space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The message is not [`MESSAGE_BYTES`] long.
    Length,
    /// The magic is not a message's.
    Magic,
    /// Tool and module are of different versions.
    Version,
    /// An unknown command.
    Command,
    /// No device index.
    Device,
    /// `datagram_bytes` is outside the protocol's bounds.
    DatagramBytes,
    /// `give_up_seconds` is zero or above [`GIVE_UP_SECONDS_MAX`].
    GiveUpSeconds,
    /// The number of servers is above [`SERVERS_MAX`], or zero without a syslog server.
    Servers,
    /// A server's address family is unknown.
    Family,
    /// A port is zero.
    Port,
    /// A next hop's Ethernet address is broadcast or multicast.
    NextHop,
    /// The tag is drop eligible, or names no VLAN.
    Vlan,
    /// Two servers share one session identifier: their nonces would collide.
    SessionTwice,
    /// The host's name is empty or not zero-padded UTF-8.
    Host,
    /// Level, syslog format or a flag of the console is unknown.
    Console,
    /// The filter level is above [`FILTER_MAX`], or `keep_user` is neither 0 nor 1.
    Filter,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Message {
    magic: [u8; 4],
    version: U16,
    command: U16,
    ifindex: U32,
    give_up_seconds: U32,
    datagram_bytes: U16,
    /// 0 is no tag.
    vlan: U16,
    servers_used: U16,
    filter: u8,
    keep_user: u8,
    boot: [u8; 16],
    host: [u8; HOST_BYTES],
    servers: [RawServer; SERVERS_MAX],
    console_level: u8,
    /// 1 if the log keys are meant.
    console_sealed: u8,
    /// 0 is no syslog server.
    syslog_format: u8,
    /// When a crash kernel runs, if one is loaded: 0 never, because a reboot comes before it;
    /// [`KDUMP_FIRST`] or [`KDUMP_LAST`].
    kdump: u8,
    log_client_key: [u8; KEY_BYTES],
    log_server_key: [u8; KEY_BYTES],
    syslog: RawServer,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawServer {
    family: U16,
    local_port: U16,
    remote_port: U16,
    next_hop_mac: [u8; 6],
    local: [u8; 16],
    remote: [u8; 16],
    next_hop: [u8; 16],
    key: U64,
    arming: U64,
    client_key: [u8; KEY_BYTES],
    server_key: [u8; KEY_BYTES],
}

const KDUMP_FIRST: u8 = 1;
const KDUMP_LAST: u8 = 2;
const LEVEL_MAX: u8 = 7;
const FORMAT_RFC3164: u8 = 1;
const FORMAT_RFC5424: u8 = 2;
const COMMAND_ARM: u16 = 1;
const COMMAND_DISARM: u16 = 2;
const FAMILY_V4: u16 = 4;
const FAMILY_V6: u16 = 6;
const DROP_ELIGIBLE: u16 = 0x1000;
/// The bits of a tag that name the VLAN.
pub const VLAN_MASK: u16 = 0xfff;

impl Command {
    /// The message's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; MESSAGE_BYTES] {
        let mut message = Message::new_zeroed();
        message.magic = MESSAGE_MAGIC;
        message.version = ABI_VERSION.into();
        match self {
            Self::Disarm => message.command = COMMAND_DISARM.into(),
            Self::Arm(arming) => {
                message.command = COMMAND_ARM.into();
                message.ifindex = arming.ifindex.into();
                message.give_up_seconds = arming.give_up_seconds.into();
                message.datagram_bytes = arming.datagram_bytes.into();
                message.vlan = arming.vlan.unwrap_or(0).into();
                message.filter = arming.filter;
                message.keep_user = arming.keep_user.into();
                message.boot = arming.boot;
                message.host = arming.host;
                let used = arming.servers.iter().flatten();
                for (raw, server) in message.servers.iter_mut().zip(used) {
                    *raw = server.raw();
                    message.servers_used = message.servers_used.get().saturating_add(1).into();
                }
                message.put_console(&arming.console);
            }
        }
        zerocopy::transmute!(message)
    }

    /// Reads and judges a message.
    pub fn decode(bytes: &[u8]) -> Result<Self, Refusal> {
        let message = Message::ref_from_bytes(bytes).or(Err(Refusal::Length))?;
        if message.magic != MESSAGE_MAGIC {
            return Err(Refusal::Magic);
        }
        if message.version.get() != ABI_VERSION {
            return Err(Refusal::Version);
        }
        match message.command.get() {
            COMMAND_ARM => Ok(Self::Arm(message.arming()?)),
            COMMAND_DISARM => Ok(Self::Disarm),
            _ => Err(Refusal::Command),
        }
    }
}

impl Message {
    fn arming(&self) -> Result<Arming, Refusal> {
        if self.ifindex.get() == 0 {
            return Err(Refusal::Device);
        }
        let datagram_bytes = usize::from(self.datagram_bytes.get());
        if !(DATAGRAM_BYTES_MIN..=DATAGRAM_BYTES_MAX).contains(&datagram_bytes) {
            return Err(Refusal::DatagramBytes);
        }
        if !(1..=GIVE_UP_SECONDS_MAX).contains(&self.give_up_seconds.get()) {
            return Err(Refusal::GiveUpSeconds);
        }
        let vlan = Some(self.vlan.get()).filter(|&tag| tag != 0);
        if vlan.is_some_and(|tag| !is_tag(tag)) {
            return Err(Refusal::Vlan);
        }
        if self.filter > FILTER_MAX || self.keep_user > 1 {
            return Err(Refusal::Filter);
        }
        if text(&self.host).is_none_or(str::is_empty) {
            return Err(Refusal::Host);
        }
        let console = self.console()?;
        let used = self.servers.get(..usize::from(self.servers_used.get()));
        let used = used
            .filter(|used| !used.is_empty() || console.syslog.is_some())
            .ok_or(Refusal::Servers)?;
        let mut servers = [const { None }; SERVERS_MAX];
        for (place, (at, raw)) in servers.iter_mut().zip(used.iter().enumerate()) {
            let server = raw.server()?;
            let earlier = used.iter().take(at);
            if earlier
                .into_iter()
                .any(|other| other.session() == server.session)
            {
                return Err(Refusal::SessionTwice);
            }
            *place = Some(server);
        }
        Ok(Arming {
            ifindex: self.ifindex.get(),
            vlan,
            datagram_bytes: self.datagram_bytes.get(),
            give_up_seconds: self.give_up_seconds.get(),
            filter: self.filter,
            keep_user: self.keep_user == 1,
            boot: self.boot,
            host: self.host,
            servers,
            console,
        })
    }

    fn console(&self) -> Result<Console, Refusal> {
        if self.console_level > LEVEL_MAX || self.console_sealed > 1 || self.kdump > KDUMP_LAST {
            return Err(Refusal::Console);
        }
        let format = match self.syslog_format {
            0 => None,
            FORMAT_RFC3164 => Some(Format::Rfc3164),
            FORMAT_RFC5424 => Some(Format::Rfc5424),
            _ => return Err(Refusal::Console),
        };
        let syslog = match format {
            Some(format) => Some((format, self.syslog.server()?)),
            None => None,
        };
        Ok(Console {
            level: self.console_level,
            keys: (self.console_sealed == 1).then_some(SessionKeys {
                client: self.log_client_key,
                server: self.log_server_key,
            }),
            syslog,
            kdump_first: self.kdump == KDUMP_FIRST,
            kdump_last: self.kdump == KDUMP_LAST,
        })
    }

    fn put_console(&mut self, console: &Console) {
        self.console_level = console.level;
        self.kdump = match (console.kdump_first, console.kdump_last) {
            (true, _) => KDUMP_FIRST,
            (false, true) => KDUMP_LAST,
            (false, false) => 0,
        };
        if let Some(keys) = &console.keys {
            self.console_sealed = 1;
            self.log_client_key = keys.client;
            self.log_server_key = keys.server;
        }
        if let Some((format, server)) = &console.syslog {
            self.syslog_format = match format {
                Format::Rfc3164 => FORMAT_RFC3164,
                Format::Rfc5424 => FORMAT_RFC5424,
            };
            self.syslog = server.raw();
        }
    }
}

impl RawServer {
    fn session(&self) -> SessionId {
        SessionId {
            key: KeyId(self.key.get()),
            arming: ArmingId(self.arming.get()),
        }
    }

    fn server(&self) -> Result<Server, Refusal> {
        let family = self.family.get();
        let local = address(family, &self.local).ok_or(Refusal::Family)?;
        let remote = address(family, &self.remote).ok_or(Refusal::Family)?;
        if self.local_port.get() == 0 || self.remote_port.get() == 0 {
            return Err(Refusal::Port);
        }
        let next_hop = address(family, &self.next_hop).ok_or(Refusal::Family)?;
        let [first, ..] = self.next_hop_mac;
        if first & 1 != 0 {
            return Err(Refusal::NextHop);
        }
        Ok(Server {
            local,
            local_port: self.local_port.get(),
            remote,
            remote_port: self.remote_port.get(),
            next_hop,
            next_hop_mac: self.next_hop_mac,
            session: self.session(),
            keys: SessionKeys {
                client: self.client_key,
                server: self.server_key,
            },
        })
    }
}

impl Server {
    fn raw(&self) -> RawServer {
        let (family, local) = raw_address(self.local);
        let (_, remote) = raw_address(self.remote);
        let (_, next_hop) = raw_address(self.next_hop);
        RawServer {
            family: family.into(),
            local_port: self.local_port.into(),
            remote_port: self.remote_port.into(),
            next_hop_mac: self.next_hop_mac,
            local,
            remote,
            next_hop,
            key: self.session.key.0.into(),
            arming: self.session.arming.0.into(),
            client_key: self.keys.client,
            server_key: self.keys.server,
        }
    }
}

/// Whether `tag` may be a frame's 802.1Q tag: not drop eligible, and of a VLAN that exists.
const fn is_tag(tag: u16) -> bool {
    let vlan = tag & VLAN_MASK;
    tag & DROP_ELIGIBLE == 0 && vlan != 0 && vlan != VLAN_MASK
}

fn address(family: u16, bytes: &[u8; 16]) -> Option<Address> {
    match family {
        FAMILY_V4 => bytes.first_chunk::<4>().map(|v4| Address::V4(*v4)),
        FAMILY_V6 => Some(Address::V6(*bytes)),
        _ => None,
    }
}

fn raw_address(address: Address) -> (u16, [u8; 16]) {
    match address {
        Address::V4([a, b, c, d]) => (FAMILY_V4, [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        Address::V6(bytes) => (FAMILY_V6, bytes),
    }
}

/// The text in a zero-padded field, or `None` if it is not UTF-8 or something follows the padding.
#[must_use]
pub fn text(field: &[u8]) -> Option<&str> {
    let length = field
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(field.len());
    let (used, padding) = field.split_at_checked(length)?;
    if padding.iter().any(|&byte| byte != 0) {
        return None;
    }
    str::from_utf8(used).ok()
}

/// Where the module stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Loaded, not armed.
    Idle,
    /// Armed.
    Armed,
    /// Was armed; the device went away or down since. [`Status::message`] tells.
    Lost,
}

/// What the module says of itself: read(2) on its device.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Status {
    /// [`STATUS_MAGIC`].
    pub magic: [u8; 4],
    /// [`ABI_VERSION`].
    pub version: U16,
    /// 0 idle, 1 armed, 2 lost; see [`Status::state`].
    pub state: U16,
    /// The device's index, 0 if none.
    pub ifindex: U32,
    /// Transmit buffers in the pool.
    pub pool_slots: U32,
    /// When it was armed, in seconds since 1970.
    pub armed_unix_seconds: U64,
    /// Pages of System RAM found when it was armed.
    pub ram_pages: U64,
    /// Ranges of System RAM found when it was armed.
    pub ram_ranges: U32,
    /// CPUs that can be captured.
    pub cpus: U32,
    /// Bytes of the module itself, static buffers included.
    pub module_bytes: U64,
    /// Bytes of the transmit pool.
    pub pool_bytes: U64,
    /// Bytes of everything else.
    pub other_bytes: U64,
    /// The device's name, zero-padded.
    pub device: [u8; 16],
    /// The device's driver, zero-padded.
    pub driver: [u8; 32],
    /// The host's name as armed, zero-padded.
    pub host: [u8; HOST_BYTES],
    /// The first server's address family (4 or 6), 0 if none.
    pub server_family: U16,
    /// The first server's port.
    pub server_port: U16,
    /// The first server's address.
    pub server: [u8; 16],
    /// The key in use.
    pub key: U64,
    /// Why the last command was refused or the arming was lost; empty if all is well. Zero-padded.
    pub message: [u8; 160],
}

/// Bytes of a status.
pub const STATUS_BYTES: usize = size_of::<Status>();

impl Status {
    /// An all-zero status with magic and version: a module that has not been armed.
    #[must_use]
    pub fn idle() -> Self {
        Self {
            magic: STATUS_MAGIC,
            version: ABI_VERSION.into(),
            ..Self::new_zeroed()
        }
    }

    /// Reads what the module's device gave.
    pub fn decode(bytes: &[u8]) -> Result<&Self, Refusal> {
        let status = Self::ref_from_bytes(bytes).or(Err(Refusal::Length))?;
        if status.magic != STATUS_MAGIC {
            return Err(Refusal::Magic);
        }
        if status.version.get() != ABI_VERSION {
            return Err(Refusal::Version);
        }
        Ok(status)
    }

    /// Where the module stands; `None` for a number this version does not know.
    #[must_use]
    pub fn state(&self) -> Option<State> {
        match self.state.get() {
            0 => Some(State::Idle),
            1 => Some(State::Armed),
            2 => Some(State::Lost),
            _ => None,
        }
    }

    /// The first server's address, if one is armed.
    #[must_use]
    pub fn server_address(&self) -> Option<Address> {
        address(self.server_family.get(), &self.server)
    }
}
