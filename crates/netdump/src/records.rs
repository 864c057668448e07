//! What people ask of the crashes in a dump directory, whether a server runs there or not:
//! `netdump signatures` and `netdump show`.

use std::fmt;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use crate::hardware::Hardware;
use crate::operate::{self, table};
use crate::serve::directory::{CrashDir, SESSION_FILE, SessionFile};
use crate::serve::signatures::{Entries, Entry, Ruling, stored};

/// All signatures, those that came most often first.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Signatures(Vec<Known>);

/// A signature and what is known of it.
#[derive(Debug, Serialize)]
struct Known {
    signature: String,
    #[serde(flatten)]
    entry: Entry,
}

/// A crash's record.
#[derive(Debug, Serialize)]
pub struct Shown {
    /// The name of its directory.
    crash: String,
    #[serde(flatten)]
    file: SessionFile,
    #[serde(skip_serializing_if = "Option::is_none")]
    hardware: Option<Hardware>,
}

/// The signatures that the server in `dumpdir` knows, or knew when it ended.
///
/// # Errors
/// No server answers and its file cannot be read.
pub fn signatures(dumpdir: &Path) -> Result<Signatures> {
    let entries: Entries = match operate::signatures(dumpdir) {
        Ok(entries) => entries,
        // Without a server the file has it all.
        Err(_) => stored(dumpdir)?,
    };
    let known = entries.into_iter();
    let mut known: Vec<Known> = known
        .map(|(signature, entry)| Known { signature, entry })
        .collect();
    known.sort_by_key(|known| std::cmp::Reverse(known.entry.crashes));
    Ok(Signatures(known))
}

/// The record of the crash with this name.
///
/// # Errors
/// There is no such crash, or its record or what is kept of its hardware cannot be read.
pub fn show(dumpdir: &Path, crash: &str) -> Result<Shown> {
    let is_name = !crash.is_empty() && !crash.contains('/') && crash != "..";
    ensure!(
        is_name,
        "{crash} is no name of a crash: give its directory's own name"
    );
    let dir = CrashDir::at(dumpdir.join(crash));
    ensure!(
        dir.path().join(SESSION_FILE).exists(),
        "no crash {crash} is in {}",
        dumpdir.display()
    );
    let file = dir.session().context("its record cannot be read")?;
    Ok(Shown {
        crash: crash.to_owned(),
        file,
        hardware: Hardware::read(dir.path())?,
    })
}

impl fmt::Display for Signatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no crash was here");
        }
        let head = [
            "signature",
            "crashes",
            "hosts",
            "dumps",
            "first",
            "last",
            "title",
        ];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for Known { signature, entry } in &self.0 {
            let dumps: usize = entry
                .kernels
                .values()
                .map(|kernel| kernel.dumps.len())
                .sum();
            let next = if entry.next_in_full { " + next" } else { "" };
            rows.push(vec![
                signature.clone(),
                entry.crashes.to_string(),
                entry.hosts.len().to_string(),
                format!("{dumps}{next}"),
                entry.first_seen.clone(),
                entry.last_seen.clone(),
                entry.title.clone(),
            ]);
        }
        f.write_str(&table(&rows))
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            crash,
            file,
            hardware,
        } = self;
        let summary = &file.summary;
        let wanted = file.verdict.as_ref().map(crate::serve::verdict::Want::name);
        let (verdict, why) = wanted.unwrap_or(("undecided", None));
        let ruling = file.ruling.as_ref();
        let why = why.or_else(|| ruling.map(|ruling| ruling.why.clone()));
        let mut rows = vec![
            ("crash", crash.clone()),
            ("host", file.host.clone()),
            ("kernel", summary.build()),
            ("began", file.started.clone()),
            ("reason", summary.reason.clone()),
        ];
        rows.extend(ruling.map(of_ruling).unwrap_or_default());
        let verdict = match why {
            Some(why) => format!("{verdict}: {why}"),
            None => verdict.to_owned(),
        };
        rows.push(("verdict", verdict));
        let state = serde_json::to_value(file.state).unwrap_or_default();
        let state = state.as_str().unwrap_or_default().to_owned();
        let state = match &file.why {
            Some(why) => format!("{state}: {why}"),
            None => state,
        };
        rows.push(("state", state));
        if let Some(vmcore) = &file.vmcore {
            rows.push(("vmcore", format!("{}, {} bytes", vmcore.file, vmcore.bytes)));
        }
        let rows: Vec<Vec<String>> = rows
            .into_iter()
            .map(|(name, value)| vec![name.to_owned(), value])
            .collect();
        f.write_str(&table(&rows))?;
        match hardware {
            Some(hardware) => write!(f, "\n{hardware}"),
            None => Ok(()),
        }
    }
}

fn of_ruling(ruling: &Ruling) -> Vec<(&'static str, String)> {
    let Some(cause) = &ruling.cause else {
        return Vec::new();
    };
    vec![
        ("title", cause.title.clone()),
        (
            "signature",
            format!("{}, family {}", cause.signature, cause.family),
        ),
        (
            "known",
            format!("crash {} of this signature here", ruling.number),
        ),
    ]
}
