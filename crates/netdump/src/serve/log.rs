//! The kernel's log of a crash, put together from its spool: pieces arrive newest first and a file
//! has its oldest line first. Reading them back costs less than keeping the log of every session in
//! memory.

use std::path::Path;

use anyhow::{Context as _, Result};
use proto::record::{Malformed, Record};

use super::content::RecordStream;
use super::spool::Reader;

/// The log in the spool at `path`, oldest piece first, as far as it has arrived.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let show = path.display();
    let mut spool = Reader::open(path).with_context(|| format!("cannot read {show}"))?;
    let (mut stream, mut frame) = (RecordStream::default(), Vec::new());
    let mut text = Text::default();
    while !text.over
        && spool
            .frame(&mut frame)
            .with_context(|| format!("cannot read {show}"))?
    {
        // Bytes that are no record end the log; what came before is good.
        let read = stream.push(&frame, |record| text.take(&record));
        if read.is_err() {
            break;
        }
    }
    let mut log = Vec::with_capacity(text.bytes);
    if text.cut {
        log.extend_from_slice(CUT_MARK);
    }
    log.extend(text.pieces.into_iter().rev().flatten());
    Ok(log)
}

#[derive(Default)]
struct Text {
    /// Newest first.
    pieces: Vec<Vec<u8>>,
    bytes: usize,
    cut: bool,
    over: bool,
}

impl Text {
    fn take(&mut self, record: &Record<'_>) -> Result<(), Malformed> {
        if let Record::Text { text, .. } = record {
            // The newest pieces come first, so what is left out is the oldest.
            self.cut |= self.bytes + text.len() > LOG_BYTES_MAX;
            if !self.cut {
                self.bytes += text.len();
                self.pieces.push(text.to_vec());
            }
        } else {
            self.over |= !matches!(record, Record::Hello(_));
        }
        Ok(())
    }
}

/// The largest log buffer a kernel can be configured for (`CONFIG_LOG_BUF_SHIFT` 25).
const LOG_BYTES_MAX: usize = 32 << 20;
const CUT_MARK: &[u8] = b"[netdump: the oldest part of the log is left out, it exceeds 32 MiB]\n";
