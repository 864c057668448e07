//! `netdump arm`, `status` and `disarm`: what user space says to the module and hears from it.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, ensure};
use proto::arming::{
    Address, Arming, Command, Console, HOST_BYTES, Refusal, SERVERS_MAX, STATUS_BYTES, Server,
    State, Status, VLAN_MASK, text,
};
use proto::console::Format;
use proto::keys::{KEY_BYTES, SessionKeys};
use proto::units::{ArmingId, KeyId, SessionId};
use proto::wire::PORT;
use rustix::io::Errno;
use rustix::system::uname;
use serde::Serialize;

use crate::key::{HostKey, fill_random};
use crate::module::{self, DEVICE_PATH};
use crate::time::utc;
use crate::way::{self, Way};

/// What `netdump arm` was asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// The servers, `HOST[:PORT]`, in the order in which a crash tries them; up to
    /// [`SERVERS_MAX`], none only if there is a syslog server.
    pub servers: Vec<String>,
    /// The host's key file; needed if there is a server.
    pub key: Option<PathBuf>,
    /// The device to use; `None` leaves it to the routing table.
    pub device: Option<String>,
    /// The module file; `None` looks where packages put it.
    pub module: Option<PathBuf>,
    /// The largest IP packet to send, in bytes; `None` is what device and path carry.
    pub mtu: Option<u32>,
    /// Filter level that the host demands: pages of these kinds are never sent.
    pub filter: u8,
    /// The crashing task's user memory is sent whatever the filter level says.
    pub keep_user: bool,
    /// Kernel messages go to the first server, live.
    pub console: bool,
    /// Kernel messages go to this syslog server, `HOST[:PORT]`.
    pub syslog: Option<String>,
    /// How they look there.
    pub syslog_format: Format,
    /// Messages of a higher level are not sent.
    pub console_level: u8,
    /// When a crash kernel runs; `None` leaves it to the kernel's settings.
    pub kdump: Option<Kdump>,
}

/// When a crash kernel runs, if one is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kdump {
    /// At once; there is no dump of ours.
    First,
    /// After our dump, instead of a reboot.
    Last,
}

/// An arming that the module took.
#[derive(Debug, Clone, Serialize)]
pub struct Armed {
    host: String,
    device: String,
    driver: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    vlan: Option<u16>,
    servers: Vec<ArmedServer>,
    /// Kernel messages go to the first server.
    console: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    syslog: Option<String>,
    datagram_bytes: u16,
    filter: u8,
    keep_user: bool,
    memory_bytes: u64,
    ram_pages: u64,
    cpus: u32,
}

/// One of its servers.
#[derive(Debug, Clone, Serialize)]
struct ArmedServer {
    address: String,
    local: IpAddr,
    next_hop: IpAddr,
    /// `None`: nobody answered; a crash asks again.
    next_hop_mac: Option<String>,
    session: String,
}

/// What the module says of itself.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arming: Option<ArmingReport>,
}

#[derive(Debug, Clone, Serialize)]
struct ArmingReport {
    host: String,
    device: String,
    driver: String,
    server: String,
    key: String,
    armed_at: String,
    memory: Memory,
    ram_pages: u64,
    ram_ranges: u32,
    cpus: u32,
}

/// Memory the module holds, in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
struct Memory {
    total: u64,
    module: u64,
    transmit_pool: u64,
    other: u64,
}

/// Arms this host: finds the ways to the servers, loads the module if need be, and hands it the
/// arming.
///
/// Everything that can be found wrong without the module is found before it is loaded. Of several
/// servers one must answer now; the others may be down, as they may be when the host crashes.
pub fn arm(request: &Request) -> Result<Armed> {
    let key = request.key.as_deref().map(HostKey::load).transpose()?;
    let ways = find_ways(request)?;
    let syslog = find_syslog(request, &ways)?;
    let way = ways.first().or(syslog.as_ref());
    let way = way.context("nobody to send to is named: give --server or --syslog")?;
    request.kdump.map_or(Ok(()), order_kdump)?;
    let arming = arming(key.as_ref(), &ways, syslog.as_ref(), request)?;
    let host = field(&arming.host);
    let (datagram_bytes, sessions) = (arming.datagram_bytes, sessions(&arming));
    let arming_console = arming.console.keys.is_some();
    module::load(request.module.as_deref())?;
    write(&Command::Arm(arming))
        .with_context(|| format!("cannot arm on device {}", way.device.name))?;
    let status = read()?;
    ensure!(
        status.state() == Some(State::Armed),
        "the module took the arming but is not armed: {}",
        module_message(&status).unwrap_or_else(|| "it does not say why".to_owned())
    );
    let servers = ways.iter().zip(sessions).map(|(way, session)| ArmedServer {
        address: way.remote.to_string(),
        local: way.local,
        next_hop: way.next_hop,
        next_hop_mac: way.next_hop_mac.map(mac_text),
        session: session.to_string(),
    });
    Ok(Armed {
        host,
        console: arming_console,
        syslog: syslog.as_ref().map(|way| way.remote.to_string()),
        device: way.device.name.clone(),
        driver: field(&status.driver),
        vlan: way.tag.map(|tag| tag & VLAN_MASK),
        servers: servers.collect(),
        datagram_bytes,
        filter: request.filter,
        keep_user: request.keep_user,
        memory_bytes: Memory::of(&status).total,
        ram_pages: status.ram_pages.get(),
        cpus: status.cpus.get(),
    })
}

/// The ways to all servers, which must begin with one device.
fn find_ways(request: &Request) -> Result<Vec<Way>> {
    ensure!(
        request.servers.len() <= SERVERS_MAX,
        "{} servers are named, {SERVERS_MAX} is the most",
        request.servers.len()
    );
    let mut ways: Vec<Way> = Vec::new();
    for server in &request.servers {
        let way = way::find(server, request.device.as_deref(), request.mtu)?;
        if let Some(first) = ways.first() {
            ensure!(
                (first.device.index, first.tag) == (way.device.index, way.tag),
                "server {} is reached by {}, server {} by {}: a crash uses one device and one \
                 VLAN; name servers that share them",
                first.remote,
                by(first),
                way.remote,
                by(&way)
            );
        }
        ways.push(way);
    }
    if let Some(way) = ways.first() {
        let answered = ways.iter().any(|way| way.next_hop_mac.is_some());
        ensure!(answered, way::unanswered(way));
    }
    Ok(ways)
}

/// The way to the syslog server. A crash must be able to reach it without asking anybody.
fn find_syslog(request: &Request, ways: &[Way]) -> Result<Option<Way>> {
    let Some(server) = &request.syslog else {
        return Ok(None);
    };
    let named = with_port(server, SYSLOG_PORT);
    let way = way::find(&named, request.device.as_deref(), request.mtu)?;
    if let Some(first) = ways.first() {
        ensure!(
            (first.device.index, first.tag) == (way.device.index, way.tag),
            "syslog server {} is reached by {}, server {} by {}: a crash uses one device and one \
             VLAN; name servers that share them",
            way.remote,
            by(&way),
            first.remote,
            by(first)
        );
    }
    ensure!(way.next_hop_mac.is_some(), way::unanswered(&way));
    Ok(Some(way))
}

/// `server` with `port`, unless it ends in one.
fn with_port(server: &str, port: u16) -> String {
    let plain = server.rsplit_once('%').map_or(server, |(plain, _)| plain);
    let bare_v6 = plain.parse::<Ipv6Addr>().is_ok();
    let has_port = !bare_v6
        && server
            .rsplit_once(':')
            .is_some_and(|(_, port)| !port.contains(']'));
    match (bare_v6, has_port) {
        (true, _) => format!("[{server}]:{port}"),
        (false, true) => server.to_owned(),
        (false, false) => format!("{server}:{port}"),
    }
}

fn by(way: &Way) -> String {
    let vlan = way.tag.map(|tag| format!(" VLAN {}", tag & VLAN_MASK));
    format!("{}{}", way.device.name, vlan.unwrap_or_default())
}

/// Asks the module how it stands. It is no error when it is not loaded or not armed.
pub fn status() -> Result<Report> {
    if !Path::new(DEVICE_PATH).exists() {
        return Ok(Report {
            state: "not loaded",
            message: None,
            arming: None,
        });
    }
    Ok(Report::of(&read()?))
}

/// Disarms this host and unloads the module. It is no error when it is not loaded.
pub fn disarm() -> Result<()> {
    if !Path::new(DEVICE_PATH).exists() {
        return Ok(());
    }
    write(&Command::Disarm).context("cannot disarm")?;
    module::unload()
}

/// The message to the module, with a session of its own for each server: random, so that no key is
/// ever derived twice.
fn arming(
    key: Option<&HostKey>,
    ways: &[Way],
    syslog: Option<&Way>,
    request: &Request,
) -> Result<Arming> {
    let mut servers = [const { None }; SERVERS_MAX];
    let mut log_keys = None;
    for (place, way) in servers.iter_mut().zip(ways) {
        let key = key.context("a server is named but no key: give --key")?;
        let server = server(key, way)?;
        log_keys.get_or_insert_with(|| key.secret.log_keys(server.session));
        *place = Some(server);
    }
    let all = || ways.iter().chain(syslog);
    let first = all().next().context("no way to any server")?;
    let datagram_bytes = all().map(|way| way.datagram_bytes).min();
    let mut host = [0; HOST_BYTES];
    let own_name = uname().nodename().to_string_lossy().into_owned();
    let name = key.map_or(own_name.as_str(), |key| key.host.as_str());
    let name = name.as_bytes();
    host.get_mut(..name.len())
        .context("host name too long")?
        .copy_from_slice(name);
    Ok(Arming {
        ifindex: first.device.index,
        vlan: first.tag,
        datagram_bytes: datagram_bytes.unwrap_or(first.datagram_bytes),
        give_up_seconds: GIVE_UP_SECONDS,
        filter: request.filter,
        keep_user: request.keep_user,
        boot: boot_id()?,
        host,
        servers,
        console: Console {
            level: request.console_level,
            keys: log_keys.filter(|_| request.console),
            syslog: syslog.map(|way| (request.syslog_format, syslog_server(way))),
            kdump_first: !crash_kernel_waits()?,
            kdump_last: request.kdump == Some(Kdump::Last),
        },
    })
}

/// The syslog server in the form that ways have to the module. There is no session with it.
fn syslog_server(way: &Way) -> Server {
    const NO_KEY: [u8; KEY_BYTES] = [0; KEY_BYTES];
    let keys = SessionKeys {
        client: NO_KEY,
        server: NO_KEY,
    };
    server_on(way, SessionId::default(), keys)
}

/// Has the kernel run a crash kernel before the panic notifiers, of which we are one, or after them. A
/// kernel without this setting cannot run one.
fn order_kdump(kdump: Kdump) -> Result<()> {
    let word = if kdump == Kdump::Last { "Y" } else { "N" };
    match fs::write(POST_NOTIFIERS_PATH, word) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written.with_context(|| format!("cannot write {word} to {POST_NOTIFIERS_PATH}")),
    }
}

/// Whether a crash kernel, if one is loaded, runs after the panic notifiers and so after us.
fn crash_kernel_waits() -> Result<bool> {
    match fs::read_to_string(POST_NOTIFIERS_PATH) {
        Ok(text) => Ok(text.trim_end() == "Y"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot read {POST_NOTIFIERS_PATH}")),
    }
}

fn server(key: &HostKey, way: &Way) -> Result<Server> {
    let mut random = [0; 8];
    fill_random(&mut random)?;
    let session = SessionId {
        key: key.id,
        arming: ArmingId(u64::from_le_bytes(random)),
    };
    Ok(server_on(way, session, key.secret.session_keys(session)))
}

fn server_on(way: &Way, session: SessionId, keys: SessionKeys) -> Server {
    Server {
        local: address(way.local),
        local_port: PORT,
        remote: address(way.remote.ip()),
        remote_port: way.remote.port(),
        next_hop: address(way.next_hop),
        next_hop_mac: way.next_hop_mac.unwrap_or_default(),
        session,
        keys,
    }
}

fn sessions(arming: &Arming) -> Vec<SessionId> {
    let servers = arming.servers.iter().flatten();
    servers.map(|server| server.session).collect()
}

fn boot_id() -> Result<[u8; 16]> {
    let text =
        fs::read_to_string(BOOT_ID_PATH).with_context(|| format!("cannot read {BOOT_ID_PATH}"))?;
    let digits: String = text.trim().chars().filter(|&c| c != '-').collect();
    let number = u128::from_str_radix(&digits, 16)
        .with_context(|| format!("{BOOT_ID_PATH} holds no UUID: {text:?}"))?;
    Ok(number.to_be_bytes())
}

/// Hands the module one message; turns its refusal into words.
fn write(command: &Command) -> Result<()> {
    let mut device = OpenOptions::new()
        .write(true)
        .open(DEVICE_PATH)
        .map_err(open_error)?;
    // One write is one message, so a short one is an error and never continued.
    let Err(error) = device.write(&command.encode()) else {
        return Ok(());
    };
    let said = read().ok().as_ref().and_then(module_message);
    let meaning = match Errno::from_io_error(&error) {
        Some(Errno::OPNOTSUPP) => "the device cannot be polled, which a crashed host must do",
        Some(Errno::NODEV) => "the device is gone",
        Some(Errno::NOMEM) => "not enough memory",
        Some(Errno::BUSY) => "the host is crashing",
        Some(Errno::INVAL) => "the module does not take the message",
        _ => "the module refused",
    };
    let said = said.map(|said| format!(": {said}")).unwrap_or_default();
    Err(anyhow!("{meaning}{said} ({error})"))
}

fn read() -> Result<Status> {
    let mut device = File::open(DEVICE_PATH).map_err(open_error)?;
    let mut bytes = [0; STATUS_BYTES];
    let got = device
        .read(&mut bytes)
        .with_context(|| format!("cannot read {DEVICE_PATH}"))?;
    Status::decode(&bytes[..got]).copied().map_err(|refusal| {
        if matches!(refusal, Refusal::Version | Refusal::Length) {
            anyhow!(
                "the loaded module and this netdump are of different versions: netdump disarm, \
                 install both from one package, arm again"
            )
        } else {
            anyhow!("{DEVICE_PATH} does not answer as our module would ({refusal:?})")
        }
    })
}

fn open_error(error: io::Error) -> anyhow::Error {
    let advice = match Errno::from_io_error(&error) {
        Some(Errno::ACCESS | Errno::PERM) => " (only root may)",
        Some(Errno::NOENT) => " (the module is not loaded: netdump arm)",
        _ => "",
    };
    anyhow!(error).context(format!("cannot open {DEVICE_PATH}{advice}"))
}

impl Memory {
    fn of(status: &Status) -> Self {
        let (module, transmit_pool) = (status.module_bytes.get(), status.pool_bytes.get());
        let other = status.other_bytes.get();
        let total = module.saturating_add(transmit_pool).saturating_add(other);
        Self {
            total,
            module,
            transmit_pool,
            other,
        }
    }
}

impl Report {
    fn of(status: &Status) -> Self {
        let state = match status.state() {
            Some(State::Idle) => "not armed",
            Some(State::Armed) => "armed",
            Some(State::Lost) => "lost",
            None => "unknown",
        };
        let server = status.server_address();
        let arming = server.map(|server| ArmingReport {
            host: field(&status.host),
            device: field(&status.device),
            driver: field(&status.driver),
            server: SocketAddr::new(ip(server), status.server_port.get()).to_string(),
            key: KeyId(status.key.get()).to_string(),
            armed_at: utc(UNIX_EPOCH + Duration::from_secs(status.armed_unix_seconds.get())),
            memory: Memory::of(status),
            ram_pages: status.ram_pages.get(),
            ram_ranges: status.ram_ranges.get(),
            cpus: status.cpus.get(),
        });
        Self {
            state,
            message: module_message(status),
            arming,
        }
    }
}

impl fmt::Display for Armed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.servers.is_empty() {
            "kernel messages only"
        } else {
            "its crash"
        };
        write!(f, "armed: {} sends {what}", self.host)?;
        for (at, server) in self.servers.iter().enumerate() {
            let word = if at == 0 { " to" } else { ", or to" };
            write!(f, "{word} {}", server.address)?;
        }
        let vlan = self.vlan.map(|vlan| format!(", VLAN {vlan}"));
        writeln!(
            f,
            "\n  device     {} ({}){}",
            self.device,
            self.driver,
            vlan.unwrap_or_default()
        )?;
        for server in &self.servers {
            let mac = server.next_hop_mac.as_deref();
            writeln!(
                f,
                "  next hop   {} at {}, from {}",
                server.next_hop,
                mac.unwrap_or("(no answer now; a crash asks again)"),
                server.local
            )?;
        }
        writeln!(f, "  datagrams  {} bytes", self.datagram_bytes)?;
        writeln!(
            f,
            "  filter     at least level {}{}",
            self.filter,
            if self.keep_user {
                ", but for the crashing task's user memory"
            } else {
                ""
            }
        )?;
        if self.console {
            writeln!(f, "  console    kernel messages to the first server")?;
        }
        if let Some(syslog) = &self.syslog {
            writeln!(f, "  syslog     kernel messages to {syslog}, in the clear")?;
        }
        writeln!(
            f,
            "  host       {} MiB of memory, {} CPUs",
            self.ram_pages / 256,
            self.cpus
        )?;
        write!(
            f,
            "  held       {} KiB of memory",
            self.memory_bytes.div_ceil(1024)
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.state)?;
        if let Some(message) = &self.message {
            write!(f, ": {message}")?;
        }
        let Some(arming) = &self.arming else {
            return Ok(());
        };
        write!(
            f,
            "\n  {} to {} by {} ({})",
            arming.host, arming.server, arming.device, arming.driver
        )?;
        write!(f, "\n  since {}, key {}", arming.armed_at, arming.key)?;
        let held = arming.memory;
        write!(
            f,
            "\n  holds {} KiB: module {}, transmit pool {}, other {}",
            held.total.div_ceil(1024),
            held.module.div_ceil(1024),
            held.transmit_pool.div_ceil(1024),
            held.other.div_ceil(1024)
        )?;
        write!(
            f,
            "\n  {} MiB of memory in {} ranges, {} CPUs",
            arming.ram_pages / 256,
            arming.ram_ranges,
            arming.cpus
        )
    }
}

fn module_message(status: &Status) -> Option<String> {
    Some(field(&status.message)).filter(|message| !message.is_empty())
}

fn field(bytes: &[u8]) -> String {
    text(bytes).unwrap_or_default().to_owned()
}

pub(crate) fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => Address::V4(ip.octets()),
        IpAddr::V6(ip) => Address::V6(ip.octets()),
    }
}

fn ip(address: Address) -> IpAddr {
    match address {
        Address::V4(octets) => IpAddr::from(octets),
        Address::V6(octets) => IpAddr::from(octets),
    }
}

fn mac_text(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// The port of syslog over UDP (RFC 5426).
const SYSLOG_PORT: u16 = 514;
const POST_NOTIFIERS_PATH: &str = "/sys/module/kernel/parameters/crash_kexec_post_notifiers";
const BOOT_ID_PATH: &str = "/proc/sys/kernel/random/boot_id";
/// Long enough for a rebooting server to come back, short enough not to keep a host dead for long.
const GIVE_UP_SECONDS: u32 = 120;
