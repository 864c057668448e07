//! The text half of triage: any log gives findings that are bounded, and the same ones however it
//! is cut.

use triage::{Scanner, scan};

use crate::byte;

/// Reports that a log can give at most.
const REPORTS_MAX: usize = 64;
/// Bytes of a title: those of a line's characters that are kept, and a few words.
const TITLE_BYTES_MAX: usize = 4096;

/// A log, behind the length of the pieces that it comes in.
pub(crate) fn text(mut bytes: &[u8]) {
    let piece = usize::from(byte(&mut bytes)).max(1);
    let whole = scan(bytes);
    assert!(whole.reports.len() <= REPORTS_MAX);
    let mut scanner = Scanner::new();
    for piece in bytes.chunks(piece) {
        scanner.push(piece);
    }
    let cut = scanner.finish();
    assert_eq!(whole.reports.len(), cut.reports.len());
    for (report, again) in whole.reports.iter().zip(&cut.reports) {
        assert!(report.title.len() < TITLE_BYTES_MAX, "{}", report.title);
        assert_eq!(report.title, again.title);
        assert_eq!(report.signature, again.signature);
        let _page = report.to_string();
    }
}
