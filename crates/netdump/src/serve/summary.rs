//! What is told to syslog servers and collectors of a crash that is over: one message, from what lies
//! in its directory.

use std::fs::File;
use std::io::Read as _;

use anyhow::Result;
use serde::Deserialize;

use super::directory::{CrashDir, LOG_FILE, SessionFile};
use super::hub::Hub;
use crate::forward::Crash;

/// Name of the report for programs.
const REPORT_FILE: &str = "report.json";
/// A report is some kilobytes.
const REPORT_BYTES_MAX: u64 = 16 << 20;

/// What a report says first.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Report {
    title: Option<String>,
    signature: Option<String>,
}

/// Forwards the summary of the crash in `dir`.
///
/// # Errors
/// `session.json` cannot be read.
pub(super) fn tell(hub: &Hub, dir: &CrashDir) -> Result<()> {
    if !hub.forward.is_empty() {
        hub.forward.crash(&summary(dir, &dir.session()?));
    }
    Ok(())
}

fn summary(dir: &CrashDir, session: &SessionFile) -> Crash {
    let report = report(dir);
    let state = serde_json::to_value(session.state).unwrap_or_default();
    let state = state.as_str().unwrap_or_default();
    let file = session.vmcore.as_ref();
    let path = dir
        .path()
        .join(file.map_or(LOG_FILE, |vmcore| &vmcore.file));
    Crash {
        host: session.host.clone(),
        title: report
            .title
            .unwrap_or_else(|| session.summary.reason.clone()),
        kernel: session.summary.kernel.clone(),
        signature: report.signature,
        state: match &session.why {
            Some(why) => format!("{state} ({why})"),
            None => state.to_owned(),
        },
        path: path.display().to_string(),
    }
}

/// What the report says; nothing where there is none, as of a host that sent nothing to report.
fn report(dir: &CrashDir) -> Report {
    let mut text = Vec::new();
    let read = File::open(dir.file(REPORT_FILE))
        .and_then(|file| file.take(REPORT_BYTES_MAX).read_to_end(&mut text));
    match read {
        Ok(_) => serde_json::from_slice(&text).unwrap_or_default(),
        Err(_) => Report::default(),
    }
}
