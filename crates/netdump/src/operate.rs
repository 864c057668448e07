//! What people ask a running server: `netdump list`, `verdict`, `pull` and `signatures`, over the
//! control socket in its dump directory.

use std::fmt;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use proto::units::PAGE_BYTES;
use serde::Serialize;

use crate::serve::content::PULLED_PAGES_MAX;
use crate::serve::control::{Answer, CONTROL_FILE, PagesRow, Request, Row};
use crate::serve::signatures::Entries;
use crate::status::Server as Status;

/// The sessions under way, for people and programs.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Sessions(Vec<Row>);

/// What came of a verdict.
#[derive(Debug, Serialize)]
pub struct Told {
    crash: String,
    verdict: String,
}

/// Pages that a host sent.
#[derive(Debug, Serialize)]
pub struct Pages {
    pages: Vec<PagesRow>,
    #[serde(skip)]
    bytes: Vec<u8>,
}

/// The sessions under way at the server that works in `dumpdir`.
pub fn list(dumpdir: &Path) -> Result<Sessions> {
    let (answer, _) = ask(dumpdir, &Request::List)?;
    let Answer::Sessions(rows) = answer else {
        return unexpected(&answer);
    };
    Ok(Sessions(rows))
}

/// How hosts' logs and targets stand at the server that works in `dumpdir`, if one does.
pub fn status(dumpdir: &Path) -> Result<Option<Status>> {
    if UnixStream::connect(dumpdir.join(CONTROL_FILE)).is_err() {
        return Ok(None);
    }
    let (answer, _) = ask(dumpdir, &Request::Status)?;
    let Answer::Status(status) = answer else {
        return unexpected(&answer);
    };
    Ok(Some(*status))
}

/// The signatures that the server in `dumpdir` knows.
pub fn signatures(dumpdir: &Path) -> Result<Entries> {
    let (answer, _) = ask(dumpdir, &Request::Signatures)?;
    let Answer::Signatures(entries) = answer else {
        return unexpected(&answer);
    };
    Ok(entries)
}

/// Has the server in `dumpdir` take the next crash with this signature in full.
pub fn want_next(dumpdir: &Path, signature: String) -> Result<Told> {
    let request = Request::WantNext {
        signature: signature.clone(),
    };
    done(dumpdir, &request, signature)
}

/// Says what is wanted of a crash.
pub fn verdict(dumpdir: &Path, crash: String, order: crate::serve::verdict::Order) -> Result<Told> {
    let request = Request::Verdict {
        crash: crash.clone(),
        order,
    };
    done(dumpdir, &request, crash)
}

/// What came of a request about `what`.
fn done(dumpdir: &Path, request: &Request, what: String) -> Result<Told> {
    let (answer, _) = ask(dumpdir, request)?;
    let Answer::Done(verdict) = answer else {
        return unexpected(&answer);
    };
    Ok(Told {
        crash: what,
        verdict,
    })
}

/// Gets pages from a host that is held, or still sends.
pub fn pull(dumpdir: &Path, crash: String, ranges: Vec<(u64, u64)>) -> Result<Pages> {
    let (answer, bytes) = ask(dumpdir, &Request::Pull { crash, ranges })?;
    let Answer::Pages(pages) = answer else {
        return unexpected(&answer);
    };
    let data = pages.iter().filter(|row| row.kind == "data");
    let count: u64 = data.map(|row| row.pages).sum();
    let told = usize::try_from(count).unwrap_or(usize::MAX);
    if bytes.len() != told.saturating_mul(PAGE_BYTES) {
        bail!(
            "the server announced {count} pages and sent {} bytes",
            bytes.len()
        );
    }
    Ok(Pages { pages, bytes })
}

/// `PFN` or `PFN+COUNT`, in decimal or, with `0x`, in hexadecimal.
pub fn parse_range(text: &str) -> Result<(u64, u64)> {
    let (first, pages) = text.split_once('+').unwrap_or((text, "1"));
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let both = number(first).ok().zip(number(pages).ok());
    both.with_context(|| format!("{text} is no PFN[+COUNT], such as 0x1000+4"))
}

fn ask(dumpdir: &Path, request: &Request) -> Result<(Answer, Vec<u8>)> {
    let path = dumpdir.join(CONTROL_FILE);
    let show = path.display();
    let mut stream = UnixStream::connect(&path).with_context(|| {
        format!("no netdump serve answers at {show}: is it running, and is this its --dumpdir?")
    })?;
    stream.set_read_timeout(Some(ANSWER_WAIT))?;
    let mut line = serde_json::to_vec(request).context("cannot write JSON")?;
    line.push(b'\n');
    stream
        .write_all(&line)
        .with_context(|| format!("cannot ask the server at {show}"))?;
    let mut reader = BufReader::new(stream.take(ANSWER_BYTES_MAX));
    let mut line = String::new();
    reader
        .read_line(&mut line)
        .with_context(|| format!("the server at {show} does not answer"))?;
    let answer = serde_json::from_str(&line)
        .with_context(|| format!("the server at {show} answers what this netdump cannot read"))?;
    if let Answer::Refused(why) = answer {
        bail!("{why}");
    }
    let mut bytes = Vec::new();
    reader
        .read_to_end(&mut bytes)
        .with_context(|| format!("the server at {show} broke off"))?;
    Ok((answer, bytes))
}

fn unexpected<T>(answer: &Answer) -> Result<T> {
    bail!("the server answers something else than was asked: {answer:?}")
}

impl Pages {
    /// Writes the contents of all pages to `out`, one after the other in the order asked for; those
    /// without contents as zeros.
    pub fn save(&self, out: &Path) -> Result<()> {
        let write = || {
            let mut file = File::create(out)?;
            let mut rest = self.bytes.as_slice();
            for row in &self.pages {
                let length = usize::try_from(row.pages).unwrap_or(0) * PAGE_BYTES;
                if row.kind == "data" {
                    let (bytes, more) = rest.split_at(length.min(rest.len()));
                    file.write_all(bytes)?;
                    rest = more;
                } else {
                    file.write_all(&vec![0; length])?;
                }
            }
            file.sync_all()
        };
        write().with_context(|| format!("cannot write {}", out.display()))
    }
}

impl fmt::Display for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no crash is under way");
        }
        for (index, row) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            let percent = row.pages.saturating_mul(100).checked_div(row.ram_pages);
            let why = row.why.as_deref().map(|why| format!("; {why}"));
            write!(
                f,
                "{}: {}, {} of {} pages ({} %), {} in {:.1} s, heard {:.1} s ago: {}{}",
                row.crash,
                row.state,
                row.pages,
                row.ram_pages,
                percent.unwrap_or(0),
                rate(row),
                row.seconds,
                row.silent_seconds,
                row.reason,
                why.unwrap_or_default()
            )?;
        }
        Ok(())
    }
}

/// Rows of equal length with their columns aligned, a line each, no line end behind the last.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..columns).filter_map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths);
        let cells: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Megabytes (10^6) a second; a time too short to tell counts as a hundredth of a second.
#[expect(
    clippy::cast_precision_loss,
    reason = "for people, who read four digits"
)]
fn rate(row: &Row) -> String {
    format!("{:.1} MB/s", row.bytes as f64 / row.seconds.max(0.01) / 1e6)
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.crash, self.verdict)
    }
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut data = self.bytes.chunks(PAGE_BYTES);
        for row in &self.pages {
            for pfn in row.first..row.first + row.pages {
                writeln!(f, "pfn {pfn:#x}: {}", row.kind)?;
                if row.kind == "data" {
                    dump(f, pfn, data.next().unwrap_or_default())?;
                }
            }
        }
        Ok(())
    }
}

/// Sixteen bytes a line with their physical address.
fn dump(f: &mut fmt::Formatter<'_>, pfn: u64, page: &[u8]) -> fmt::Result {
    for (line, bytes) in (0_u64..).zip(page.chunks(16)) {
        write!(f, "{:012x} ", (pfn << 12) + line * 16)?;
        for byte in bytes {
            write!(f, " {byte:02x}")?;
        }
        let shown = |byte: &u8| {
            let byte = *byte;
            if byte.is_ascii_graphic() {
                char::from(byte)
            } else {
                '.'
            }
        };
        writeln!(f, "  {}", bytes.iter().map(shown).collect::<String>())?;
    }
    Ok(())
}

/// Longer than a server waits for a host.
const ANSWER_WAIT: Duration = Duration::from_secs(90);
/// A line for each page and all pages.
const ANSWER_BYTES_MAX: u64 = PULLED_PAGES_MAX * (4096 + 256) + (1 << 20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_in_both_notations() {
        assert_eq!(parse_range("7").unwrap(), (7, 1));
        assert_eq!(parse_range("0x10+0x2").unwrap(), (16, 2));
        for wrong in ["", "x", "1+", "+1", "-1", "1+1+1"] {
            assert!(parse_range(wrong).is_err(), "{wrong}");
        }
    }
}
