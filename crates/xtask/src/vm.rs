//! `cargo xtask vm`: one guest with a stock kernel, armed, crashed and judged.
//!
//! This gathers everything a run needs; the `vmtest` program, which never downloads or builds,
//! does the run.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::kmod::{self, Variant};
use crate::{cache, command, output, packages, tools};

/// The network card that the machine's own QEMU may not have (8.0 brought it).
const NEWER_NIC: &str = "igb";
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The guest, its network, its end, and how closely to look.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Guest {
    /// Line or release of the kernel, see `cargo xtask kernels list`.
    #[arg(long, default_value = "6.1")]
    pub(crate) kernel: String,
    /// The network card: virtio-net, e1000, e1000e, vmxnet3, rtl8139, igb.
    #[arg(long, default_value = "virtio-net")]
    pub(crate) nic: String,
    /// How the kernel ends: panic, oops-softirq, sysrq and others; a wrong name lists them.
    #[arg(long, default_value = "panic")]
    pub(crate) crash: String,
    /// Memory of the guest, with K, M or G.
    #[arg(long, default_value = "768M")]
    pub(crate) memory: String,
    /// CPUs of the guest.
    #[arg(long, default_value_t = 3)]
    pub(crate) cpus: u32,
    /// Guest and server speak IPv6.
    #[arg(long)]
    pub(crate) ip6: bool,
    /// Guest and server are on this VLAN.
    #[arg(long)]
    pub(crate) vlan: Option<u16>,
    /// MTU of the guest's network card, up to 9000.
    #[arg(long)]
    pub(crate) mtu: Option<u32>,
    /// The guest's address is on a device made of its network card, or of two: bridge, bond,
    /// bond-8023ad, macvlan.
    #[arg(long)]
    pub(crate) over: Option<String>,
    /// Guest and server flood each other when it crashes.
    #[arg(long)]
    pub(crate) traffic: bool,
    /// Arm the guest with a first server that does not exist.
    #[arg(long)]
    pub(crate) dead_server: bool,
    /// Frames lost on the wire, in percent, both ways; so are the following ones.
    #[arg(long)]
    pub(crate) loss: Option<f64>,
    /// Frames that arrive twice.
    #[arg(long, num_args = 0..=1, default_missing_value = "2")]
    pub(crate) duplicate: Option<f64>,
    /// Frames that later ones overtake.
    #[arg(long, num_args = 0..=1, default_missing_value = "3")]
    pub(crate) reorder: Option<f64>,
    /// Frames in which a bit changes.
    #[arg(long)]
    pub(crate) corrupt: Option<f64>,
    /// Frames that are cut short.
    #[arg(long)]
    pub(crate) truncate: Option<f64>,
    /// Milliseconds that each frame takes from one end to the other.
    #[arg(long)]
    pub(crate) delay: Option<f64>,
    /// Seed of the losses and of the pattern in memory.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// What fills memory before the crash: booted, ordinary, random, mixed.
    #[arg(long)]
    pub(crate) fill: Option<String>,
    /// Format of the vmcore: kdump, elf.
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// Filter level that the server asks for, 0 to 31.
    #[arg(long)]
    pub(crate) filter: Option<u8>,
    /// Filter level that the guest demands, 0 to 31.
    #[arg(long)]
    pub(crate) arm_filter: Option<u8>,
    /// Keep the crashing task's user memory.
    #[arg(long)]
    pub(crate) keep_user: bool,
    /// Send the kernel's messages live; the server's log of them is compared with the serial console.
    #[arg(long)]
    pub(crate) console: bool,
    /// So many cycles of loading, arming and unloading the module before the crash
    #[arg(long)]
    pub(crate) stress: Option<u32>,
    /// Read the vmcore with the kernel's symbols in drgn and crash too.
    #[arg(long)]
    pub(crate) symbols: bool,
    /// Of the readers that need symbols only drgn, which takes a fifth of their time.
    #[arg(skip)]
    pub(crate) drgn_only: bool,
}

impl Default for Guest {
    /// What `cargo xtask vm` without options runs.
    fn default() -> Self {
        Self {
            kernel: "6.1".into(),
            nic: "virtio-net".into(),
            crash: "panic".into(),
            memory: "768M".into(),
            cpus: 3,
            ip6: false,
            vlan: None,
            mtu: None,
            over: None,
            traffic: false,
            dead_server: false,
            loss: None,
            duplicate: None,
            reorder: None,
            corrupt: None,
            truncate: None,
            delay: None,
            seed: None,
            fill: None,
            format: None,
            filter: None,
            arm_filter: None,
            keep_user: false,
            stress: None,
            console: false,
            symbols: false,
            drgn_only: false,
        }
    }
}

/// What `vmtest` found, of which only what is used here.
#[derive(Debug, Deserialize)]
pub(crate) struct Judgement {
    /// `Ok`, or the stage the run failed at.
    pub(crate) verdict: String,
    /// The verdict with its reason.
    pub(crate) why: String,
    /// Pages compared with QEMU's memory.
    pub(crate) pages_checked: u64,
    /// Pages that the dump path writes, which may differ.
    pub(crate) pages_listed: u64,
    /// Milliseconds from the crash to its first datagram.
    pub(crate) first_packet_ms: Option<u64>,
    /// Seconds from the first datagram to the last.
    pub(crate) dump_s: f64,
    /// Memory the module held while armed.
    pub(crate) armed_kib: Option<u64>,
    /// Checks that were not made, with the reason.
    pub(crate) skipped: Vec<String>,
}

/// A run that is ready to start: everything it needs is there.
pub(crate) struct Run {
    command: Command,
    /// Where its artefacts go.
    pub(crate) folder: PathBuf,
}

/// What runs in the guest and beside it.
#[derive(Clone)]
pub(crate) struct Binaries {
    pub(crate) vmtest: PathBuf,
    pub(crate) guest_init: PathBuf,
    pub(crate) peer_init: PathBuf,
    pub(crate) console_init: PathBuf,
    pub(crate) netdump: PathBuf,
}

/// `cargo xtask vm`: standard output is `vmtest`'s own, so that with `json` its last line is the
/// result.
///
/// # Errors
/// Something cannot be fetched or built, or the verdict is not Ok.
pub(crate) fn run(guest: &Guest, json: bool) -> Result<()> {
    let mut run = prepare(guest, Variant::Product)?;
    if json {
        run.command.arg("--json");
    }
    let result = command::pass(&mut run.command);
    eprintln!("artefacts: {}", run.folder.display());
    result.context("the guest's dump is not good")
}

/// Runs a guest and returns the judgement, good or bad.
///
/// # Errors
/// Something cannot be fetched or built, or `vmtest` gives no judgement.
pub(crate) fn judge(guest: &Guest, variant: Variant) -> Result<(Judgement, PathBuf)> {
    let mut run = prepare(guest, variant)?;
    let (_status, text) = command::tee(run.command.arg("--json"))?;
    let line = text.lines().next_back().unwrap_or_default();
    let judgement = serde_json::from_str(line)
        .with_context(|| format!("vmtest's last line is not its judgement: `{line}`"))?;
    Ok((judgement, run.folder))
}

/// Runs a guest for people to watch; returns where its artefacts are, and an error if its dump is
/// not good.
///
/// # Errors
/// Something cannot be fetched or built.
pub(crate) fn show(guest: &Guest) -> Result<(PathBuf, Result<()>)> {
    let mut run = prepare(guest, Variant::Product)?;
    let result = command::pass(&mut run.command)
        .with_context(|| format!("the guest's dump is not good: see {}", run.folder.display()));
    Ok((run.folder, result))
}

fn prepare(guest: &Guest, variant: Variant) -> Result<Run> {
    tools::ensure()?;
    let kernel = packages::kernel(&guest.kernel)?;
    let release = kernel.release.as_str();
    let image = packages::image(release)?;
    let modules = kmod::build(release, variant)?;
    let binaries = binaries()?;
    let folder = cache::artefacts(
        "vm",
        &format!("{}-{}-{}", kernel.name, guest.nic, guest.crash),
    )?;
    let mut command = Command::new(&binaries.vmtest);
    command.arg("run").arg("--image").arg(image);
    command
        .arg("--module")
        .arg(modules.netdump)
        .arg("--crashme")
        .arg(modules.crashme);
    command
        .arg("--netdump")
        .arg(&binaries.netdump)
        .arg("--guest-init")
        .arg(&binaries.guest_init);
    command.arg("--keep").arg(&folder);
    if guest.nic == NEWER_NIC {
        command.arg("--qemu").arg(packages::newer_qemu()?);
    }
    command.args(guest.options());
    if guest.symbols {
        command.arg("--vmlinux").arg(packages::vmlinux(release)?);
        if !guest.drgn_only {
            command
                .arg("--crash-reader")
                .arg(packages::crash_reader()?.join(" "));
        }
        command.arg("--drgn").arg(packages::drgn()?);
        if guest.filter.unwrap_or(0) | guest.arm_filter.unwrap_or(0) > 0 {
            command
                .arg("--makedumpfile")
                .arg(packages::makedumpfile()?.join(" "));
        }
    }
    Ok(Run { command, folder })
}

impl Guest {
    /// The options that `vmtest` shares with this program.
    fn options(&self) -> Vec<String> {
        let mut options = Vec::new();
        let mut option = |name: &str, value: Option<String>| {
            options.extend(
                value
                    .map(|value| [format!("--{name}"), value])
                    .into_iter()
                    .flatten(),
            );
        };
        option("nic", Some(self.nic.clone()));
        option("crash", Some(self.crash.clone()));
        option("memory", Some(self.memory.clone()));
        option("cpus", Some(self.cpus.to_string()));
        option("vlan", self.vlan.map(|vlan| vlan.to_string()));
        option("mtu", self.mtu.map(|mtu| mtu.to_string()));
        option("over", self.over.clone());
        option("fill", self.fill.clone());
        option("format", self.format.clone());
        option("filter", self.filter.map(|level| level.to_string()));
        option("stress", self.stress.map(|cycles| cycles.to_string()));
        option("arm-filter", self.arm_filter.map(|level| level.to_string()));
        for (name, wanted) in [
            ("--keep-user", self.keep_user),
            ("--console", self.console),
            ("--ip6", self.ip6),
            ("--traffic", self.traffic),
            ("--dead-server", self.dead_server),
        ] {
            options.extend(wanted.then(|| name.to_owned()));
        }
        [options, self.wire()].concat()
    }

    /// Those of them that say what goes wrong on the wire.
    pub(crate) fn wire(&self) -> Vec<String> {
        let faults = [
            ("loss", self.loss),
            ("duplicate", self.duplicate),
            ("reorder", self.reorder),
            ("corrupt", self.corrupt),
            ("truncate", self.truncate),
            ("delay", self.delay),
        ];
        let amounts = faults.map(|(name, amount)| Some((name, amount?.to_string())));
        let seed = self.seed.map(|seed| ("seed", seed.to_string()));
        let given = amounts.into_iter().chain([seed]).flatten();
        given
            .flat_map(|(name, value)| [format!("--{name}"), value])
            .collect()
    }
}

/// Builds what runs in the guest and beside it, once in a process: a matrix of many guests is of one
/// build. Static, because the guest has no libraries.
pub(crate) fn binaries() -> Result<Binaries> {
    static BUILT: OnceLock<Binaries> = OnceLock::new();
    if let Some(built) = BUILT.get() {
        return Ok(built.clone());
    }
    let _step = output::step("building netdump, vmtest and the guest's first program");
    let mut cargo = Command::new("cargo");
    cargo.args([
        "build",
        "--release",
        "--target",
        TARGET,
        "-p",
        "netdump",
        "-p",
        "vmtest",
        "--bins",
    ]);
    cargo
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit());
    cargo
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .current_dir(cache::tree());
    let messages = command::capture(&mut cargo)?;
    let built = Binaries {
        vmtest: executable(&messages, "vmtest")?,
        guest_init: executable(&messages, "guest_init")?,
        peer_init: executable(&messages, "peer_init")?,
        console_init: executable(&messages, "console_init")?,
        netdump: executable(&messages, "netdump")?,
    };
    Ok(BUILT.get_or_init(|| built).clone())
}

/// Finds a program among cargo's messages, which know where cargo puts things whatever the
/// configuration says.
pub(crate) fn executable(messages: &str, name: &str) -> Result<PathBuf> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
    }
    let paths = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok()?.executable);
    let mut named = paths.filter(|path| path.file_name().is_some_and(|found| found == name));
    named
        .next()
        .with_context(|| format!("cargo built no program `{name}`"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        guest: Guest,
    }

    #[test]
    fn only_what_was_asked_for_is_passed_on() {
        let plain = Line::parse_from(["vm", "--nic", "e1000e", "--loss", "5"]).guest;
        let expected = "--nic e1000e --crash panic --memory 768M --cpus 3 --loss 5";
        assert_eq!(plain.options().join(" "), expected);
    }

    #[test]
    fn the_defaults_are_the_same_in_both_places() {
        let parsed = Line::parse_from(["vm"]).guest;
        assert_eq!(format!("{parsed:?}"), format!("{:?}", Guest::default()));
    }

    #[test]
    fn a_program_is_found_where_cargo_says() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"/x/vmtest\"}\n";
        assert_eq!(
            executable(messages, "vmtest").unwrap(),
            PathBuf::from("/x/vmtest")
        );
        assert!(executable(messages, "netdump").is_err());
    }

    #[test]
    fn a_judgement_is_read_whatever_else_it_holds() {
        let line = r#"{"verdict":"Ok","why":"Ok","pages_checked":5,"pages_listed":1,"other":[1],
            "first_packet_ms":20,"dump_s":1.5,"armed_kib":null,"skipped":[]}"#;
        let judgement: Judgement = serde_json::from_str(line).unwrap();
        assert_eq!(
            (judgement.verdict.as_str(), judgement.pages_checked),
            ("Ok", 5)
        );
    }
}
