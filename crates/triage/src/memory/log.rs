//! The kernel's log from its ring buffer (5.10 and later), by the offsets that VMCOREINFO has.
//!
//! Descriptors lie in a ring, numbered from tail to head; each names a block in a ring of text.
//! A record that was being written or was overwritten when the machine stopped is left out and
//! counted, as the kernel's own reader does.

use dump::Vmcoreinfo;

use super::image::{Image, PIECE_MAX, Unread, index};

/// Descriptors of a ring; the largest that a kernel can be told to make has 2^26 / 32.
const DESCRIPTOR_BITS_MAX: u64 = 22;
/// Bytes of a ring of text, as a power of two.
const TEXT_BITS_MAX: u64 = 26;
/// Bytes of the lines that are kept; blocks that overlap could make them without end.
const LINES_BYTES_MAX: usize = 2 * PIECE_MAX;
/// The two highest bits of a descriptor's state variable.
const STATE_SHIFT: u32 = 62;
const ID_MASK: u64 = (1 << STATE_SHIFT) - 1;
/// States in which a record's text is whole.
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;
/// Bytes before each text: the number of its descriptor.
const BLOCK_HEADER: u64 = 8;

/// The kernel's log.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Log {
    /// Lines as `dmesg` prints them: `[    1.234567] text`.
    pub text: String,
    /// Records.
    pub records: u64,
    /// Records whose text could not be read.
    pub lost: u64,
    /// Time of the last record in nanoseconds since the kernel's clock began.
    pub end_ns: u64,
}

struct Ring {
    /// Descriptor states and blocks.
    descriptors: Vec<u8>,
    infos: Vec<u8>,
    text: Vec<u8>,
    count: u64,
    descriptor_bytes: u64,
    info_bytes: u64,
}

struct Offsets {
    state: u64,
    begin: u64,
    next: u64,
    time: u64,
    length: u64,
}

/// Reads the log.
pub(crate) fn read(image: &mut Image<'_>, info: Vmcoreinfo<'_>) -> Result<Log, Unread> {
    let number = |kind: &str, name: &str| -> Result<u64, Unread> {
        let key = format!("{kind}({name})");
        let value = info.get(&key).and_then(|value| value.parse().ok());
        value.ok_or_else(|| Unread::Strange(format!("VMCOREINFO lacks {key}")))
    };
    let offset = |name: &str| number("OFFSET", name);
    let at = info
        .symbol("prb")
        .ok_or_else(|| Unread::strange("VMCOREINFO lacks SYMBOL(prb): kernels before 5.10"))?;
    let ring = image.u64(at)?;
    let part = |base: u64, name: &str| Ok::<u64, Unread>(base.wrapping_add(offset(name)?));
    let descs = part(ring, "printk_ringbuffer.desc_ring")?;
    let texts = part(ring, "printk_ringbuffer.text_data_ring")?;
    let counter = offset("atomic_long_t.counter")?;
    let bits = image.u32(part(descs, "prb_desc_ring.count_bits")?)?;
    let text_bits = image.u32(part(texts, "prb_data_ring.size_bits")?)?;
    let count = power(u64::from(bits), DESCRIPTOR_BITS_MAX, "descriptors")?;
    let text_bytes = power(u64::from(text_bits), TEXT_BITS_MAX, "bytes of text")?;
    let descriptor_bytes = number("SIZE", "prb_desc")?.max(1);
    let info_bytes = number("SIZE", "printk_info")?.max(1);
    let mut array = |place: u64, each: u64| {
        let base = image.u64(place)?;
        let bytes = count.saturating_mul(each).min(PIECE_MAX as u64 + 1);
        image.bytes(base, bytes)
    };
    let descriptors = array(part(descs, "prb_desc_ring.descs")?, descriptor_bytes)?;
    let infos = array(part(descs, "prb_desc_ring.infos")?, info_bytes)?;
    let text_at = image.u64(part(texts, "prb_data_ring.data")?)?;
    // Text that is not there costs its records only.
    let text = image.stretch(text_at, index(text_bytes));
    let tail = image.u64(part(descs, "prb_desc_ring.tail_id")?.wrapping_add(counter))?;
    let head = image.u64(part(descs, "prb_desc_ring.head_id")?.wrapping_add(counter))?;
    let block = offset("prb_desc.text_blk_lpos")?;
    let offsets = Offsets {
        state: offset("prb_desc.state_var")?.saturating_add(counter),
        begin: block.saturating_add(offset("prb_data_blk_lpos.begin")?),
        next: block.saturating_add(offset("prb_data_blk_lpos.next")?),
        time: offset("printk_info.ts_nsec")?,
        length: offset("printk_info.text_len")?,
    };
    let ring = Ring {
        descriptors,
        infos,
        text,
        count,
        descriptor_bytes,
        info_bytes,
    };
    Ok(ring.log(&offsets, text_bytes, tail & ID_MASK, head & ID_MASK))
}

fn power(bits: u64, limit: u64, what: &str) -> Result<u64, Unread> {
    if bits > limit {
        return Err(Unread::strange(format!(
            "the log has 2^{bits} {what}; the limit is 2^{limit}"
        )));
    }
    Ok(1 << bits)
}

impl Ring {
    fn log(&self, offsets: &Offsets, text_bytes: u64, tail: u64, head: u64) -> Log {
        let mut log = Log::default();
        let records = (head.wrapping_sub(tail) & ID_MASK).min(self.count - 1);
        for step in 0..=records {
            let id = tail.wrapping_add(step) & ID_MASK;
            let slot = id & (self.count - 1);
            let place = slot.saturating_mul(self.descriptor_bytes);
            let field = |offset: u64| number(&self.descriptors, place.saturating_add(offset), 8);
            let state = field(offsets.state).unwrap_or(0);
            if state & ID_MASK != id || !matches!(state >> STATE_SHIFT, COMMITTED | FINALIZED) {
                // The ring's first slot is made up and never was a record.
                log.lost += u64::from(state & ID_MASK == id && state >> STATE_SHIFT == 0);
                continue;
            }
            let info = slot.saturating_mul(self.info_bytes);
            let time = number(&self.infos, info.saturating_add(offsets.time), 8).unwrap_or(0);
            let length = number(&self.infos, info.saturating_add(offsets.length), 2).unwrap_or(0);
            let (begin, next) = (field(offsets.begin), field(offsets.next));
            let text = begin
                .zip(next)
                .and_then(|(begin, next)| self.block(begin, next, text_bytes, id, length));
            match text.filter(|_| log.text.len() < LINES_BYTES_MAX) {
                Some(text) => log.add(time, text),
                None => log.lost += 1,
            }
        }
        log
    }

    /// The text of a block; empty when it has none, `None` when it is gone.
    fn block(&self, begin: u64, next: u64, ring: u64, id: u64, length: u64) -> Option<&[u8]> {
        // Odd positions stand for "no text": empty on purpose, or because there was no room.
        if begin & 1 != 0 && next & 1 != 0 {
            return (length == 0).then_some(&[]);
        }
        // A block that would cross the end of the ring begins at its start instead.
        let wraps = begin / ring != next.wrapping_sub(1) / ring;
        let from = if wraps { 0 } else { begin % ring };
        let end = if next.is_multiple_of(ring) && !wraps {
            ring
        } else {
            next % ring
        };
        let block = self.text.get(index(from)..index(end))?;
        if number(block, 0, 8)? & ID_MASK != id {
            return None;
        }
        let text = block.get(index(BLOCK_HEADER)..)?;
        text.get(..index(length).min(text.len()))
    }
}

impl Log {
    fn add(&mut self, time: u64, text: &[u8]) {
        self.records += 1;
        self.end_ns = self.end_ns.max(time);
        let (seconds, micros) = (time / 1_000_000_000, time / 1000 % 1_000_000);
        for line in String::from_utf8_lossy(text).split('\n') {
            self.text
                .push_str(&format!("[{seconds:5}.{micros:06}] {line}\n"));
        }
    }
}

fn number(bytes: &[u8], at: u64, length: usize) -> Option<u64> {
    let mut value = [0; 8];
    let found = bytes.get(index(at)..)?.get(..length)?;
    value.get_mut(..length)?.copy_from_slice(found);
    Some(u64::from_le_bytes(value))
}
