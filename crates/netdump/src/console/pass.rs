//! The lines of one pass: what came since the last one, of all hosts, in one area, to be written
//! host by host.

use netconsole::{
    BootStart, Counts, Gap, Note, Part, Record, Sink, Stamp, Unfinished, write_note, write_record,
};

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Pass {
    pub(super) text: Vec<u8>,
    pub(super) pieces: Vec<Piece>,
    /// Hosts that have lines.
    pub(super) hosts: Vec<u32>,
    pub(super) counts: Counts,
    stamp: Stamp,
    /// Where in the text boots begin that are in no piece yet.
    boots: Vec<(usize, u64)>,
    /// Records that are in no piece yet.
    records: u64,
    /// One of them is worth a wait for the disk.
    urgent: bool,
}

/// Lines of one host that lie together.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) begin: usize,
    pub(super) end: usize,
    /// They begin a boot, which began then.
    pub(super) boot: Option<u64>,
    pub(super) records: u64,
    pub(super) urgent: bool,
    /// The host's next piece.
    pub(super) next: Option<u32>,
}

impl Pass {
    /// Adds what was put into the text from `begin` on to the host's lines; those are named by their
    /// first and last piece.
    pub(super) fn close(&mut self, begin: usize, lines: &mut Option<(u32, u32)>) {
        let mut marks = std::mem::take(&mut self.boots);
        if marks.first().is_none_or(|&(at, _)| at > begin) && self.text.len() > begin {
            marks.insert(0, (begin, NO_BOOT));
        }
        let mut records = std::mem::take(&mut self.records);
        let urgent = std::mem::take(&mut self.urgent);
        for (index, &(at, boot)) in marks.iter().enumerate() {
            let piece = Piece {
                begin: at,
                end: marks
                    .get(index + 1)
                    .map_or(self.text.len(), |&(next, _)| next),
                boot: (boot != NO_BOOT).then_some(boot),
                records: std::mem::take(&mut records),
                urgent,
                next: None,
            };
            self.append(piece, lines);
        }
        marks.clear();
        self.boots = marks;
    }

    fn append(&mut self, piece: Piece, lines: &mut Option<(u32, u32)>) {
        let last = lines.and_then(|(_, last)| self.pieces.get_mut(index(last)));
        if let Some(last) = last
            && last.end == piece.begin
            && piece.boot.is_none()
        {
            last.end = piece.end;
            last.records += piece.records;
            last.urgent |= piece.urgent;
            return;
        }
        let number = u32::try_from(self.pieces.len()).unwrap_or(u32::MAX);
        self.pieces.push(piece);
        *lines = Some(match *lines {
            Some((first, last)) => {
                if let Some(last) = self.pieces.get_mut(index(last)) {
                    last.next = Some(number);
                }
                (first, number)
            }
            None => (number, number),
        });
    }

    /// Puts a note among a host's lines.
    pub(super) fn note(&mut self, at_us: u64, note: (Note, &[u64]), text: std::fmt::Arguments<'_>) {
        write_note(&mut self.text, &mut self.stamp, at_us, note, text);
    }

    /// Forgets all lines.
    pub(super) fn clear(&mut self) {
        let small = self.text.len() < KEPT_BYTES;
        self.text.clear();
        self.pieces.clear();
        self.hosts.clear();
        if small {
            self.text.shrink_to(KEPT_BYTES);
            self.pieces.shrink_to(KEPT_BYTES / size_of::<Piece>());
        }
    }
}

impl Sink for Pass {
    fn boot(&mut self, start: &BootStart<'_>) {
        self.boots.push((self.text.len(), start.at_us));
        let first = start.first.as_slice();
        let release = start.release.unwrap_or("-");
        let text = format_args!("a boot begins\trelease={release}");
        self.note(start.at_us, (Note::Boot, first), text);
    }

    fn record(&mut self, at_us: u64, record: &Record<'_>) {
        self.records += 1;
        self.urgent |= record.prefix == Some(0);
        write_record(&mut self.text, &mut self.stamp, at_us, record);
    }

    fn gap(&mut self, at_us: u64, Gap { first, last, lost }: Gap) {
        let records = last - first + 1;
        match lost {
            Some(lost) => self.note(
                at_us,
                (Note::Lost, &[first, last, lost]),
                format_args!("{lost} records were lost on their way, among {first} to {last}"),
            ),
            None => self.note(
                at_us,
                (Note::Gap, &[first, last]),
                format_args!(
                    "{records} records, {first} to {last}, did not come: lost, or held back by the \
                    host's log level"
                ),
            ),
        }
    }

    fn part(&mut self, at_us: u64, Part { seq, have, total }: Part) {
        let numbers = [seq, have as u64, total as u64];
        let text = format_args!("of record {seq} only {have} of {total} bytes came");
        self.note(at_us, (Note::Part, &numbers), text);
    }

    fn raw(&mut self, at_us: u64, bytes: &[u8], why: Unfinished) {
        self.records += 1;
        let length = bytes.len() as u64;
        self.note(
            at_us,
            (Note::Raw, &[length]),
            format_args!("{why:?}: {}", bytes.escape_ascii()),
        );
    }

    fn counts(&mut self) -> &mut Counts {
        &mut self.counts
    }
}

fn index(number: u32) -> usize {
    number as usize
}

/// Marks the begin of lines that go on in the boot they were in.
const NO_BOOT: u64 = u64::MAX;
/// An area that was enlarged by a burst shrinks to this again.
const KEPT_BYTES: usize = 1 << 20;
