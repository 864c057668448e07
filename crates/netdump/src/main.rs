//! The `netdump` command: reads the command line, runs one subcommand, prints what it returns.
//!
//! An error is one line on stderr and exit code 1; a wrong command line is clap's and exit code 2.

use std::fmt::Display;
use std::io::{IsTerminal as _, Write as _, stderr, stdout};
use std::net::SocketAddr;
use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use clap::{Args, Parser, Subcommand};
use netdump::arm;
use netdump::config::Config;
use netdump::key::{HostKey, HostName};
use netdump::log;
use netdump::operate;
use netdump::records;
use netdump::send::{self, Origin};
use netdump::serve::events::Events;
use netdump::serve::finish::Format;
use netdump::serve::hub::Policy;
use netdump::serve::registry::SESSIONS_MAX;
use netdump::serve::signal::Signals;
use netdump::serve::verdict::{Deed, Order};
use netdump::serve::{LINGER, Options, SILENCE_MAX, Server};
use netdump::status;
use netdump::triage;
use proto::console::Format as SyslogFormat;
use serde::Serialize;

/// Sends a crashed Linux host's memory and log over the network, and receives them.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make the keys that hosts and servers share.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Arm this host: from now on a crash is sent to the server.
    Arm(ArmArgs),
    /// Say whether this host is armed, and how; on a server that runs, how hosts' messages stand.
    Status {
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Disarm this host and unload the module.
    Disarm,
    /// Send a core file, a kdump kernel's /proc/vmcore or computed memory to a server, as a crashed
    /// host would.
    Send(SendArgs),
    /// Receive crashes. Ends with SIGINT or SIGTERM; a restarted server goes on with unfinished
    /// crashes.
    Serve(ServeArgs),
    /// Say what killed a kernel, from its console log or its vmcore.
    Triage(TriageArgs),
    /// Show a host's console messages.
    Log(LogArgs),
    /// List the crashes that a running server is receiving.
    List {
        #[command(flatten)]
        server: ServerArgs,
    },
    /// List the signatures of all crashes that were here: how often, where, when, and what is kept.
    Signatures {
        /// Take the next crash with this signature in full, whatever is kept of it already.
        #[arg(long, value_name = "SIGNATURE")]
        next_in_full: Option<String>,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Show a crash's record: what killed the host, what was decided, and why.
    Show {
        /// The crash: the name of its directory.
        crash: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Say what is wanted of a crash that a running server is receiving.
    Verdict(VerdictArgs),
    /// Get pages from a crashed host that is held, or still sends, and print or save them.
    Pull(PullArgs),
}

#[derive(Args)]
struct TriageArgs {
    /// Logs in any form and vmcores; `-` is a log from stdin.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Print one JSON object a file.
    #[arg(long)]
    json: bool,
    /// Say what each signature is made of and which functions were passed over.
    #[arg(long, conflicts_with = "json")]
    explain: bool,
    /// Of a vmcore, show all tasks with their backtraces, and all modules.
    #[arg(long, conflicts_with_all = ["json", "explain"])]
    tasks: bool,
    /// Print only the kernel's log of each vmcore.
    #[arg(long, conflicts_with_all = ["json", "explain", "tasks"])]
    dmesg: bool,
    /// Write report.txt and report.json of the first file into this folder instead, in bounded
    /// memory and time, as `netdump serve` has it done for each crash.
    #[arg(long, conflicts_with_all = ["json", "explain", "tasks", "dmesg"])]
    into: Option<PathBuf>,
}

#[derive(Args)]
struct ServerArgs {
    /// The dump directory of the server.
    #[arg(long, global = true, default_value = "/var/crash")]
    dumpdir: PathBuf,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Args)]
struct LogArgs {
    /// The host: its name, or its address.
    host: String,
    /// Go on with what comes.
    #[arg(long, short)]
    follow: bool,
    /// Only what was received since: an age (90s, 10m, 2h, 3d) or a time (2026-11-24T18:02:00Z).
    #[arg(long)]
    since: Option<String>,
    /// Only one boot: 0 is the last one, -1 the one before; or its name.
    #[arg(long, allow_hyphen_values = true)]
    boot: Option<String>,
    /// Only records of this level, 0 (emerg) to 7 (debug) or by name, or a graver one.
    #[arg(long, value_parser = log::parse_level)]
    level: Option<u8>,
    /// Only records with this text in them.
    #[arg(long)]
    grep: Option<String>,
    /// Only the last lines; with -f 10, unless this, --since or --boot says otherwise.
    #[arg(long, short = 'n')]
    lines: Option<usize>,
    /// When there are colours.
    #[arg(long, value_enum, default_value_t)]
    color: log::Color,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Args)]
struct VerdictArgs {
    /// The crash: the name of its directory.
    crash: String,
    #[command(subcommand)]
    order: OrderArgs,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Subcommand)]
enum OrderArgs {
    /// Send the memory.
    Full {
        /// Which pages to leave out, instead of those that the server was started with.
        #[arg(long, value_parser = clap::value_parser!(u8).range(0..=31))]
        filter: Option<u8>,
    },
    /// Send no more pages, but tasks and memory state as text.
    LogOnly,
    /// Send nothing more until told.
    Hold,
    /// Go to another one of the servers that the host was armed for.
    Redirect {
        /// Its address and port.
        address: SocketAddr,
    },
    /// Send nothing more and reboot.
    Reboot,
    /// Send nothing more, stop and stay down.
    Halt,
    /// Send nothing more and go on as the kernel's panic_timeout says.
    Stay,
}

#[derive(Args)]
struct PullArgs {
    /// The crash: the name of its directory.
    crash: String,
    /// The pages: PFN or PFN+COUNT; 0x for hexadecimal.
    #[arg(required = true)]
    pages: Vec<String>,
    /// Write their contents to this file, instead of printing them.
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Subcommand)]
enum KeyCommand {
    /// Make a new key; copy the file to the host and to the server's key directory.
    New {
        /// The file to create, with mode 0600.
        file: PathBuf,
        /// The name of the host that the key is for.
        #[arg(long)]
        host: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct ArmArgs {
    /// The server: HOST[:PORT]. Up to four; a crash tries them in this order.
    #[arg(long = "server", required_unless_present = "syslog", requires = "key")]
    servers: Vec<String>,
    /// The host's key file.
    #[arg(long)]
    key: Option<PathBuf>,
    /// The network device to use, instead of the one the routing table gives.
    #[arg(long)]
    device: Option<String>,
    /// The module file, instead of the one under /lib/modules.
    #[arg(long)]
    module: Option<PathBuf>,
    /// The largest IP packet to send, in bytes, instead of what device and path carry.
    #[arg(long)]
    mtu: Option<u32>,
    /// Never send these pages, whatever the server asks for: a sum of 2 (page cache), 4 (page cache
    /// with private data of a file system, and all other), 8 (user memory), 16 (free pages).
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=31))]
    filter: u8,
    /// Send the user memory of the task that crashes, whatever the filter leaves out.
    #[arg(long)]
    keep_user: bool,
    /// Send kernel messages to the first server, live and sealed.
    #[arg(long, requires = "servers")]
    console: bool,
    /// Send kernel messages to a syslog server by UDP, in the clear: HOST[:PORT]. It needs no
    /// --server.
    #[arg(long)]
    syslog: Option<String>,
    /// The RFC that these messages follow.
    #[arg(long, default_value = "5424", value_parser = ["3164", "5424"])]
    syslog_format: String,
    /// Send no kernel messages of a level above this one: 7 is all.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u8).range(0..=7))]
    console_level: u8,
    /// When a crash kernel runs, if one is loaded: `first`, and then there is no dump of ours, or
    /// `last`, after our dump, instead of a reboot. This is set in the kernel and stays; not given, it
    /// is left as it is.
    #[arg(long, value_enum)]
    kdump: Option<arm::Kdump>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ServeArgs {
    /// Where to receive: an IP address and a UDP port. [::] is all addresses, those of IPv4 too.
    #[arg(long, default_value = "[::]:6666")]
    listen: SocketAddr,
    /// The directory that gets one directory a crash.
    #[arg(long, default_value = "/var/crash")]
    dumpdir: PathBuf,
    /// The directory with the hosts' key files. A new one needs no restart.
    #[arg(long, default_value = "/etc/netdump/keys")]
    keys: PathBuf,
    /// The format of the vmcore.
    #[arg(long, value_enum, default_value = "kdump")]
    format: Format,
    /// What is wanted of a crash. `full` becomes `log-only` when the disk has no room.
    #[arg(long, value_enum, default_value = "full")]
    verdict: Policy,
    /// Which pages hosts leave out: the sum of 1 (zero pages), 2 (page cache), 4 (page cache with
    /// private data of a file system, and all other), 8 (user memory), 16 (free pages).
    #[arg(long, default_value_t = 31, value_parser = clap::value_parser!(u8).range(0..=31))]
    filter: u8,
    /// Hold every crash until `netdump verdict` says what to do with it.
    #[arg(long, conflicts_with = "verdict")]
    hold: bool,
    /// Send crashes on to this server, those whose host was armed for it.
    #[arg(long, conflicts_with = "hold")]
    redirect: Option<SocketAddr>,
    /// What hosts do in the end.
    #[arg(long, value_enum, default_value = "reboot")]
    action: Deed,
    /// How many hosts send their pages at a time; the others wait for their turn. What comes before
    /// the pages everybody sends at once.
    #[arg(long, default_value_t = SESSIONS_MAX)]
    active: usize,
    /// The configuration file, TOML: what is kept of hosts' console messages, and of crashes that
    /// are known already.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Print one JSON object an event on stdout.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct SendArgs {
    /// A core file (ELF or kdump-compressed), /proc/vmcore, or
    /// synthetic:SIZE[,zero=P,text=P,random=P,seed=N] (percent of its pages).
    source: Origin,
    /// Send this kernel log as the crashed host's, instead of the one in the memory.
    #[arg(long)]
    log: Option<PathBuf>,
    /// The server: HOST[:PORT].
    #[arg(long)]
    server: String,
    /// The host's key file, or a directory of several hosts', which the sessions take in turn.
    #[arg(long)]
    key: PathBuf,
    /// Send it so many times at once, each as a crash of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    sessions: u32,
    /// The most decimal megabytes of UDP payload a second.
    #[arg(long, value_name = "MB/S")]
    rate: Option<u64>,
    /// The largest IP packet, in bytes, where the path would take larger ones.
    #[arg(long, value_parser = clap::value_parser!(u16).range(576..))]
    mtu: Option<u16>,
    /// How many seconds to go on without a reply.
    #[arg(long, default_value_t = 120)]
    give_up: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("netdump: {}", one_line(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn run_arm(args: ArmArgs) -> Result<()> {
    let armed = arm::arm(&arm::Request {
        servers: args.servers,
        key: args.key,
        device: args.device,
        module: args.module,
        mtu: args.mtu,
        filter: args.filter,
        keep_user: args.keep_user,
        console: args.console,
        syslog: args.syslog,
        syslog_format: if args.syslog_format == "3164" {
            SyslogFormat::Rfc3164
        } else {
            SyslogFormat::Rfc5424
        },
        console_level: args.console_level,
        kdump: args.kdump,
    })?;
    print(args.json, &armed)
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Key(KeyCommand::New { file, host, json }) => {
            let key = HostKey::random(HostName::new(&host)?)?;
            key.store(&file)?;
            print(
                json,
                &NewKey {
                    file: file.display().to_string(),
                    host,
                    id: key.id.to_string(),
                },
            )
        }
        Command::Arm(args) => run_arm(args),
        Command::Status { server } => print(server.json, &status::status(&server.dumpdir)?),
        Command::Disarm => arm::disarm(),
        Command::Send(args) => run_send(args),
        Command::Serve(args) => run_server(args),
        Command::Triage(args) => run_triage(&args),
        Command::Log(args) => log::run(&args.into()),
        Command::List { server } => print(server.json, &operate::list(&server.dumpdir)?),
        Command::Signatures {
            next_in_full: Some(signature),
            server,
        } => print(
            server.json,
            &operate::want_next(&server.dumpdir, signature)?,
        ),
        Command::Signatures { server, .. } => {
            print(server.json, &records::signatures(&server.dumpdir)?)
        }
        Command::Show { crash, server } => {
            print(server.json, &records::show(&server.dumpdir, &crash)?)
        }
        Command::Verdict(args) => {
            let VerdictArgs {
                crash,
                order,
                server,
            } = args;
            let told = operate::verdict(&server.dumpdir, crash, order.into())?;
            print(server.json, &told)
        }
        Command::Pull(args) => pull(args),
    }
}

fn run_send(args: SendArgs) -> Result<()> {
    let SendArgs {
        source,
        log,
        server,
        key,
        sessions,
        rate,
        mtu,
        give_up,
        json,
    } = args;
    let report = send::send(&send::Request {
        origin: source,
        log,
        server,
        key,
        sessions,
        bytes_per_second: rate.map(|megabytes| megabytes.saturating_mul(1_000_000)),
        mtu,
        give_up: Duration::from_secs(give_up),
        progress: !json && stderr().is_terminal(),
    })?;
    print(json, &report)?;
    match report.failure() {
        Some(failure) => Err(anyhow!("{failure}")),
        None => Ok(()),
    }
}

fn pull(args: PullArgs) -> Result<()> {
    let PullArgs {
        crash,
        pages,
        out,
        server,
    } = args;
    let ranges = pages
        .iter()
        .map(|text| operate::parse_range(text))
        .collect::<Result<_>>()?;
    let pulled = operate::pull(&server.dumpdir, crash, ranges)?;
    match out {
        Some(out) => pulled.save(&out),
        None => print(server.json, &pulled),
    }
}

impl From<LogArgs> for log::Request {
    fn from(args: LogArgs) -> Self {
        Self {
            dumpdir: args.server.dumpdir,
            host: args.host,
            follow: args.follow,
            since: args.since,
            boot: args.boot,
            level: args.level,
            grep: args.grep,
            json: args.server.json,
            lines: args.lines,
            color: args.color,
        }
    }
}

impl From<OrderArgs> for Order {
    fn from(args: OrderArgs) -> Self {
        match args {
            OrderArgs::Full { filter } => Self::Full { filter },
            OrderArgs::LogOnly => Self::LogOnly,
            OrderArgs::Hold => Self::Hold,
            OrderArgs::Redirect { address } => Self::Redirect(address),
            OrderArgs::Reboot => Self::Over(Deed::Reboot),
            OrderArgs::Halt => Self::Over(Deed::Halt),
            OrderArgs::Stay => Self::Over(Deed::Stay),
        }
    }
}

fn run_triage(args: &TriageArgs) -> Result<()> {
    if let (Some(folder), Some(file)) = (&args.into, args.files.first()) {
        return triage::into(folder, file);
    }
    if args.dmesg {
        return triage::dmesg(&args.files);
    }
    let form = match (args.json, args.explain, args.tasks) {
        (true, ..) => triage::Form::Json,
        (_, true, _) => triage::Form::Explained,
        (_, _, true) => triage::Form::Tasks,
        _ => triage::Form::Page,
    };
    triage::run(&args.files, form)
}

fn run_server(args: ServeArgs) -> Result<()> {
    // Before any thread starts, so that all of them leave the signals to this one.
    let signals = Signals::block().context("cannot block signals")?;
    let ServeArgs {
        listen,
        dumpdir,
        keys,
        format,
        verdict: policy,
        filter,
        hold,
        redirect,
        action,
        active,
        config,
        json,
    } = args;
    let config = match config {
        Some(path) => Config::read(&path)?,
        None => Config::default(),
    };
    let threads = thread::available_parallelism()
        .map_or(1, NonZero::get)
        .min(RECEIVE_THREADS_MAX);
    let options = Options {
        listen,
        dumpdir,
        keys,
        format,
        policy,
        filter,
        hold,
        redirect,
        action,
        active,
        threads,
        silence: SILENCE_MAX,
        linger: LINGER,
        console: config.console,
        signatures: config.signatures,
        forward: config.forward,
        triage: Some(std::env::current_exe().context("cannot find this program")?),
    };
    let server = Server::start(&options, Events::new(json))?;
    signals.wait().context("cannot wait for signals")?;
    server.stop();
    Ok(())
}

#[derive(Serialize)]
struct NewKey {
    file: String,
    host: String,
    id: String,
}

impl Display for NewKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: key {} of host {}", self.file, self.id, self.host)
    }
}

fn print<T: Display + Serialize>(json: bool, value: &T) -> Result<()> {
    let text = if json {
        serde_json::to_string(value).context("cannot write JSON")?
    } else {
        value.to_string()
    };
    writeln!(stdout(), "{text}").context("cannot write to stdout")
}

/// Texts from the system may hold line breaks; an error is one line.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// One core decrypts and stores about 5 Gbit/s; more threads than this outrun any disk.
const RECEIVE_THREADS_MAX: usize = 8;
