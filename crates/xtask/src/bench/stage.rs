//! What the benchmarks of the server have in common: programs, pins, a server under watch, rows.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Map, Value, json};

use crate::{cache, command, output};

/// The CPU of what sends.
pub(crate) const SENDER_CPU: &str = "0";
/// The CPU of what receives.
pub(crate) const RECEIVER_CPU: &str = "1";
/// Both, for pipelines whose every part may use either.
pub(crate) const BOTH_CPUS: &str = "0,1";
/// The kernel's unit in /proc/PID/stat; the same on every Linux that matters here.
const TICKS_PER_SECOND: f64 = 100.0;

/// The product's release build.
pub(crate) struct Programs {
    pub(crate) netdump: PathBuf,
    pub(crate) workbench: PathBuf,
}

/// A place for the files of one measurement; removed with all that is in it.
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
}

/// A running server.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: String,
    dumps: PathBuf,
    keys: PathBuf,
    events: PathBuf,
}

/// Figures in the order they were put in.
pub(crate) type Row = Map<String, Value>;

/// Builds what is measured.
pub(crate) fn programs() -> Result<Programs> {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    ensure!(
        cpus >= 2,
        "a sender and a receiver need a CPU each, and there is {cpus}"
    );
    let _step = output::step("building the release");
    let mut cargo = Command::new("cargo");
    cargo.args([
        "build",
        "--release",
        "-p",
        "netdump",
        "--bins",
        "--examples",
    ]);
    cargo.arg("--message-format=json-render-diagnostics");
    let messages = command::capture(cargo.stderr(Stdio::inherit()).current_dir(cache::tree()))?;
    Ok(Programs {
        netdump: crate::vm::executable(&messages, "netdump")?,
        workbench: crate::vm::executable(&messages, "workbench")?,
    })
}

/// A program that may only run on these CPUs.
pub(crate) fn pinned(cpus: &str, program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", cpus]).arg(program);
    command.stdin(Stdio::null());
    command
}

/// Runs a program that prints one JSON object on its last line.
pub(crate) fn object(command: &mut Command) -> Result<Value> {
    last_object(&command::capture(command)?)
}

pub(crate) fn last_object(text: &str) -> Result<Value> {
    let line = text.lines().next_back().unwrap_or_default();
    serde_json::from_str(line).with_context(|| format!("`{line}` is not a JSON object"))
}

/// A number of an object.
pub(crate) fn number(object: &Value, name: &str) -> Result<f64> {
    let value = object.get(name).and_then(Value::as_f64);
    value.with_context(|| format!("{object} has no number {name}"))
}

impl Place {
    pub(crate) fn new(words: &str) -> Result<Self> {
        let dir = cache::artefacts("bench", words)?;
        Ok(Self { dir })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("cannot remove {}: {error}", self.dir.display());
        }
    }
}

impl Server {
    /// Starts a server of so many hosts in `place`, on these CPUs.
    pub(crate) fn start(
        programs: &Programs,
        place: &Place,
        cpus: &str,
        hosts: u32,
    ) -> Result<Self> {
        let (keys, dumps) = (place.dir.join("keys"), place.dir.join("crash"));
        fs::create_dir_all(&keys)?;
        for host in 0..hosts {
            let name = format!("host{host}");
            let mut new = Command::new(&programs.netdump);
            new.args(["key", "new", "--json", "--host", &name]);
            command::capture(new.arg(keys.join(&name)))?;
        }
        let mut serve = pinned(cpus, &programs.netdump);
        serve.args(["serve", "--json", "--listen", "127.0.0.1:0"]);
        serve.arg("--dumpdir").arg(&dumps).arg("--keys").arg(&keys);
        let mut child = serve
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the server")?;
        let mut lines = BufReader::new(child.stdout.take().context("the server has no output")?);
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let events = place.dir.join("events");
        let mut kept = File::create(&events).context("cannot keep the server's events")?;
        thread::spawn(move || std::io::copy(&mut lines, &mut kept));
        let event: Value = serde_json::from_str(&line)
            .with_context(|| format!("the server began with `{line}`"))?;
        let address = event.get("address").and_then(Value::as_str);
        let address = address.context("the server says no address")?.to_owned();
        Ok(Self {
            child,
            address,
            dumps,
            keys,
            events,
        })
    }

    /// A sender to `address`, which is the server's or that of a link before it.
    pub(crate) fn sender(&self, programs: &Programs, cpus: &str, address: &str) -> Command {
        let mut send = pinned(cpus, &programs.netdump);
        send.args(["send", "--json", "--server", address, "--key"])
            .arg(&self.keys);
        send
    }

    /// CPU seconds so far.
    pub(crate) fn cpu_seconds(&self) -> Result<f64> {
        process_cpu_seconds(self.child.id())
    }

    /// The most memory it has held so far.
    pub(crate) fn peak_mib(&self) -> Result<f64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok());
        Ok(kib.with_context(|| format!("{path} has no VmHWM"))? / 1024.0)
    }

    /// Bytes of all spools.
    pub(crate) fn spooled(&self) -> u64 {
        self.files("spool").iter().map(|path| length(path)).sum()
    }

    /// Waits until the one crash is a finished vmcore; returns it.
    pub(crate) fn vmcore(&self, limit: Duration) -> Result<PathBuf> {
        let give_up = Instant::now() + limit;
        while Instant::now() < give_up {
            if let Some(path) = self.files("vmcore").pop() {
                return Ok(path);
            }
            thread::sleep(Duration::from_millis(10));
        }
        bail!(
            "no vmcore within {} s in {}",
            limit.as_secs(),
            self.dumps.display()
        )
    }

    /// How many events of this kind it has told.
    pub(crate) fn events(&self, kind: &str) -> Result<usize> {
        let events = fs::read_to_string(&self.events).context("cannot read the events")?;
        let start = format!(r#"{{"event":"{kind}""#);
        let told = events.lines().filter(|line| line.starts_with(&start));
        Ok(told.count())
    }

    /// The files of this name in all crashes.
    pub(crate) fn files(&self, name: &str) -> Vec<PathBuf> {
        let crashes = fs::read_dir(&self.dumps).into_iter().flatten().flatten();
        let paths = crashes.map(|crash| crash.path().join(name));
        paths.filter(|path| path.exists()).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its dumps are not wanted any more, so neither is its end in good order.
        if self.child.kill().and_then(|()| self.child.wait()).is_err() {
            eprintln!("the server of this measurement was gone before its end");
        }
    }
}

pub(crate) fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.len())
}

/// CPU seconds of a living process.
pub(crate) fn process_cpu_seconds(process: u32) -> Result<f64> {
    let (own, _) = times(&format!("/proc/{process}/stat"))?;
    Ok(own)
}

/// CPU seconds of a living process and of all that it has waited for.
pub(crate) fn tree_cpu_seconds(process: u32) -> Result<f64> {
    let (own, children) = times(&format!("/proc/{process}/stat"))?;
    Ok(own + children)
}

/// CPU seconds of all programs that this one has waited for, and of those that they waited for.
pub(crate) fn children_cpu_seconds() -> Result<f64> {
    let (_, children) = times("/proc/self/stat")?;
    Ok(children)
}

/// Own and children's CPU seconds in a stat file of the kernel.
fn times(path: &str) -> Result<(f64, f64)> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    // The name before may hold anything; user time is the twelfth field after it.
    let (_, fields) = text
        .rsplit_once(')')
        .with_context(|| format!("{path} has no name"))?;
    let ticks: Vec<f64> = fields
        .split_whitespace()
        .skip(11)
        .take(4)
        .filter_map(|field| field.parse().ok())
        .collect();
    let [user, system, children_user, children_system] = ticks.as_slice() else {
        bail!("{path} has no times");
    };
    Ok((
        (user + system) / TICKS_PER_SECOND,
        (children_user + children_system) / TICKS_PER_SECOND,
    ))
}

/// A row from pairs of names and figures.
pub(crate) fn row<const N: usize>(config: &str, figures: [(&str, f64); N]) -> Row {
    let mut row = Row::new();
    row.insert("config".to_owned(), json!(config));
    for (name, figure) in figures {
        row.insert(name.to_owned(), json!(figure));
    }
    row
}

/// Prints rows: a table, or one JSON object a row.
pub(crate) fn print(rows: &[Row], json: bool) -> Result<()> {
    if json {
        for row in rows {
            println!("{}", serde_json::to_string(row)?);
        }
        return Ok(());
    }
    let mut names = vec!["config".to_owned()];
    for name in rows.iter().flat_map(Row::keys) {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    let cell = |value: Option<&Value>| match value {
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.as_f64().map_or_else(String::new, figure),
        None => String::new(),
    };
    let line = |row: &Row| names.iter().map(|name| cell(row.get(name))).collect();
    let lines: Vec<Vec<String>> = std::iter::once(names.clone())
        .chain(rows.iter().map(line))
        .collect();
    print!("{}", output::table(&lines));
    Ok(())
}

/// Three digits are as many as a measurement has.
fn figure(number: f64) -> String {
    match number.abs() {
        size if size >= 100.0 || number.fract() == 0.0 => format!("{number:.0}"),
        size if size >= 10.0 => format!("{number:.1}"),
        _ => format!("{number:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_whatever_the_name_of_the_process() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let stat = "5 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 150 50 300 100 20 0\n";
        fs::write(file.path(), stat).unwrap();
        let (own, children) = times(file.path().to_str().unwrap()).unwrap();
        assert!((own - 2.0).abs() < 1e-9 && (children - 4.0).abs() < 1e-9);
        assert!(process_cpu_seconds(std::process::id()).unwrap() >= 0.0);
    }

    #[test]
    fn figures_have_three_digits() {
        assert_eq!(
            [1234.5, 45.67, 0.123, 16.0].map(figure),
            ["1234", "45.7", "0.12", "16"]
        );
    }

    #[test]
    fn the_last_line_is_the_result() {
        assert_eq!(last_object("words\n{\"a\":1}\n").unwrap(), json!({"a": 1}));
        assert!(last_object("words\n").is_err());
    }
}
