//! `report.txt` and `report.json` beside a vmcore, written by `netdump triage` in a process of its
//! own: what a hostile host sent can end that process, not the server. One runs at a time, at the
//! lowest priority; it limits its own memory and CPU, and here its time.

use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::directory::{CrashDir, LOG_FILE};
use super::hub::Hub;
use super::registry::lock;

/// How long a report may take. One of an ordinary host takes a fifth of a second.
const REPORT_TIME: Duration = Duration::from_secs(120);
/// How often is looked whether it is done.
const STEP: Duration = Duration::from_millis(20);

/// Whose turn it is.
static TURN: Mutex<()> = Mutex::new(());

/// Writes the reports of what lies in a crash's directory: its vmcore if it has one, else its log.
///
/// # Errors
/// The process could not be started, failed or took too long.
pub(super) fn write(hub: &Hub, dir: &CrashDir, vmcore: Option<&str>) -> Result<()> {
    let Some(program) = &hub.triage else {
        return Ok(());
    };
    let stop = &hub.stop;
    let file = dir.path().join(vmcore.unwrap_or(LOG_FILE));
    if !file.exists() {
        return Ok(());
    }
    let _turn = lock(&TURN);
    if stop.load(Ordering::Relaxed) {
        return Ok(());
    }
    let mut child = Command::new(program)
        .args(["triage", "--into"])
        .args([dir.path(), file.as_path()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start `netdump triage`")?;
    let show = file.display();
    let Some(status) = end(&mut child, stop)? else {
        return Ok(());
    };
    ensure!(
        status.success(),
        "no report of {show}: `netdump triage` ended with {status}; run it by hand to see why"
    );
    Ok(())
}

/// Waits for the process; `None` when the server ended first.
fn end(child: &mut Child, stop: &AtomicBool) -> Result<Option<ExitStatus>> {
    let steps = REPORT_TIME.as_millis() / STEP.as_millis();
    for _ in 0..steps {
        if let Some(status) = child.try_wait().context("cannot wait for the report")? {
            return Ok(Some(status));
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
        thread::sleep(STEP);
    }
    child.kill().context("cannot end the report")?;
    let status = child.wait().context("cannot wait for the report")?;
    Ok((!stop.load(Ordering::Relaxed)).then_some(status))
}
