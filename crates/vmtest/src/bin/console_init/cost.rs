//! What a message costs who prints it, with each way of sending, in turn and in one boot.
//!
//! Nothing else differs from one way to the next: the same program writes the same texts to
//! `/dev/kmsg`, one a millisecond, so that each finds everything idle, and with the same consoles.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use vmtest::console::{Cost, MEASURED_MESSAGES, Orders, SYSLOG_PORT};
use vmtest::guest::{load_module, mount_here, run};
use vmtest::stage::{Network, SERVER_PORT};

use super::{TARGET, open_kmsg, point, print};

/// Each way has its turn so often, so that what the machine does meanwhile meets all of them.
const ROUNDS: u32 = 3;
/// What is switched on has settled after this.
const SETTLE: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(1);
/// Not timed: caches are cold.
const WARM_UP: u32 = 20;

/// Who sends while it is timed.
#[derive(Clone, Copy)]
enum Way {
    Nobody,
    Sealed,
    Syslog,
    Basic,
    Extended,
}

impl Way {
    const ALL: [Self; 5] = [
        Self::Nobody,
        Self::Sealed,
        Self::Syslog,
        Self::Basic,
        Self::Extended,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nobody",
            Self::Sealed => "netdump --console",
            Self::Syslog => "netdump --syslog",
            Self::Basic => "netconsole basic",
            Self::Extended => "netconsole extended",
        }
    }
}

/// Times all ways.
pub(super) fn measure(orders: &Orders) -> Result<Vec<Cost>> {
    let (others, netconsole) = orders
        .netconsole
        .split_last()
        .map(|(last, others)| (others, last))
        .context("no netconsole")?;
    for module in others {
        load_module(&format!("/modules/{module}"), "")?;
    }
    mount_here("configfs", "/sys/kernel/config")?;
    let mut costs = Vec::new();
    for round in 0..ROUNDS {
        for way in Way::ALL {
            begin(way, netconsole).with_context(|| format!("cannot begin {}", way.name()))?;
            thread::sleep(SETTLE);
            costs.push(time(way, round)?);
            thread::sleep(SETTLE);
            end(way).with_context(|| format!("cannot end {}", way.name()))?;
        }
    }
    Ok(costs)
}

fn begin(way: Way, netconsole: &str) -> Result<()> {
    let address = |port: u16| format!("{}:{port}", Network::default().server());
    let arm = |more: &[&str]| {
        let arguments = [&["arm", "--module", "/netdump.ko"], more].concat();
        run("/bin/netdump", &arguments).map(drop)
    };
    match way {
        Way::Nobody => Ok(()),
        Way::Sealed => {
            let server = address(SERVER_PORT);
            arm(&["--key", "/key", "--server", &server, "--console"])
        }
        Way::Syslog => arm(&["--syslog", &address(SYSLOG_PORT)]),
        Way::Basic | Way::Extended => {
            load_module(&format!("/modules/{netconsole}"), "")?;
            fs::create_dir(TARGET)?;
            point(Path::new(TARGET), matches!(way, Way::Extended))?;
            Ok(fs::write(format!("{TARGET}/enabled"), "1")?)
        }
    }
}

fn end(way: Way) -> Result<()> {
    match way {
        Way::Nobody => Ok(()),
        Way::Sealed | Way::Syslog => run("/bin/netdump", &["disarm"]).map(drop),
        Way::Basic | Way::Extended => {
            fs::write(format!("{TARGET}/enabled"), "0")?;
            fs::remove_dir(TARGET)?;
            run("/bin/busybox", &["rmmod", "netconsole"]).map(drop)
        }
    }
}

fn time(way: Way, round: u32) -> Result<Cost> {
    let mut kmsg = open_kmsg()?;
    let mut times = Vec::new();
    for message in 0..WARM_UP + MEASURED_MESSAGES {
        let text = format!("message {message} of a length that most messages of a kernel have");
        let begin = Instant::now();
        print(&mut kmsg, 14, text.as_bytes())?;
        let took = begin.elapsed();
        if message >= WARM_UP {
            times.push(took.as_secs_f64() * 1e6);
        }
        thread::sleep(PAUSE);
    }
    times.sort_by(f64::total_cmp);
    let share = |tenths: usize| times.get(times.len() * tenths / 10).copied();
    Ok(Cost {
        config: way.name().to_owned(),
        round,
        printk_us: share(5).context("nothing was timed")?,
        printk_p90_us: share(9).context("nothing was timed")?,
    })
}
