//! One line of a console log without what the way here put in front of it.
//!
//! The same kernel message arrives in many dresses: bare, with a level (`<4>`), with the boot time
//! (`[   12.345678]`), with the caller (`[  T123]`, `[    C1]`), from `dmesg -T` and `dmesg -x`,
//! or behind a syslog or journal head (`Nov 23 10:00:00 host kernel: `).

/// Who printed a line, as `CONFIG_PRINTK_CALLER` and extended netconsole tell it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Caller {
    /// A task, by its thread id.
    Task(u32),
    /// A CPU that was in an interrupt.
    Cpu(u32),
}

/// A message and what was told about it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Line<'a> {
    /// The message itself.
    pub text: &'a str,
    /// Who printed it, if the log says so.
    pub caller: Option<Caller>,
    /// Microseconds since boot, if the log says so.
    pub time: Option<u64>,
}

impl<'a> Line<'a> {
    /// Takes every known prefix off `raw`.
    #[must_use]
    pub fn parse(raw: &'a str) -> Self {
        let mut line = Self {
            text: raw,
            caller: None,
            time: None,
        };
        line.text = after_level(line.text);
        line.text = after_log_head(line.text);
        while let Some(rest) = line.bracket() {
            line.text = rest;
        }
        line
    }

    /// Takes one `[...]` in front off, if it is a time or a caller.
    fn bracket(&mut self) -> Option<&'a str> {
        let rest = self
            .text
            .strip_prefix('[')
            .or_else(|| self.text.strip_prefix(" [").filter(|_| self.time.is_some()))?;
        let end = rest.bytes().take(BRACKET_MAX).position(|b| b == b']')?;
        let inside = rest.get(..end)?.trim_start();
        let mut after = rest.get(end + 1..)?;
        if let Some(time) = boot_time(inside) {
            if self.time.is_some() {
                return None;
            }
            self.time = Some(time);
        } else if let Some(caller) = caller(inside) {
            self.caller = Some(caller);
        } else {
            let is_prefix = match self.time {
                Some(_) => is_cpu_and_task(inside),
                None => is_wall_time(inside),
            };
            if !is_prefix {
                return None;
            }
        }
        // One space belongs to the prefix, unless the caller comes behind it.
        if !next_is_prefix(after) {
            after = after.strip_prefix(' ').unwrap_or(after);
        }
        Some(after)
    }
}

/// Where a second message begins in the middle of a line, because two writers shared the console:
/// the `[` of a boot time that is not the line's own.
#[must_use]
pub(crate) fn glued(raw: &str) -> Option<usize> {
    let bytes = raw.as_bytes();
    let mut from = 1;
    while let Some(found) = memchr::memchr(b'[', bytes.get(from..)?) {
        let at = from + found;
        let inside = bytes.get(at + 1..)?;
        let end = inside.iter().take(BRACKET_MAX).position(|b| *b == b']');
        if let Some(end) = end
            && raw
                .get(at + 1..at + 1 + end)
                .is_some_and(|text| boot_time(text.trim_start()).is_some())
        {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

/// `[` to `]` of a prefix is not longer than the wall time of `dmesg -T`.
const BRACKET_MAX: usize = 32;

/// Syslog heads longer than this are not looked for.
const HEAD_MAX: usize = 160;

fn next_is_prefix(after: &str) -> bool {
    let inside = after.trim_start().strip_prefix('[').unwrap_or("");
    let end = inside.find(']').unwrap_or(0);
    let inside = inside.get(..end).unwrap_or("").trim_start();
    boot_time(inside).is_some() || caller(inside).is_some()
}

/// `12.345678` in microseconds.
fn boot_time(text: &str) -> Option<u64> {
    let (seconds, fraction) = text.split_once('.')?;
    if fraction.len() != 6 || seconds.is_empty() || seconds.len() > 10 {
        return None;
    }
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if !digits(seconds) || !digits(fraction) {
        return None;
    }
    let seconds: u64 = seconds.parse().ok()?;
    let fraction: u64 = fraction.parse().ok()?;
    Some(seconds.saturating_mul(1_000_000).saturating_add(fraction))
}

/// `T123` or `C1`.
pub(crate) fn caller(text: &str) -> Option<Caller> {
    let (kind, number) = text.split_at_checked(1)?;
    let number: u32 = number.parse().ok()?;
    match kind {
        "T" => Some(Caller::Task(number)),
        "C" => Some(Caller::Cpu(number)),
        _ => None,
    }
}

/// `Mon Nov 23 10:00:00 2026`, as `dmesg -T` writes it.
fn is_wall_time(text: &str) -> bool {
    text.len() == 24
        && text.as_bytes().get(13) == Some(&b':')
        && text.as_bytes().get(16) == Some(&b':')
}

/// `0:      swapper/0:    0`, as kernels of some telephones put it behind the time: CPU, task, pid.
fn is_cpu_and_task(text: &str) -> bool {
    let number = |part: &str| {
        let part = part.trim();
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit())
    };
    let Some((cpu, rest)) = text.split_once(':') else {
        return false;
    };
    let Some((task, pid)) = rest.rsplit_once(':') else {
        return false;
    };
    number(cpu) && number(pid) && !task.trim().is_empty()
}

/// Without `<4>`, and without `kern  :warn  : ` of `dmesg -x`.
fn after_level(text: &str) -> &str {
    if let Some(rest) = text.strip_prefix('<')
        && let Some((level, after)) = rest.split_once('>')
        && (1..=3).contains(&level.len())
        && level.bytes().all(|b| b.is_ascii_digit())
    {
        return after;
    }
    if let Some(rest) = text.strip_prefix("kern  :")
        && let Some((level, after)) = rest.split_once(": ")
        && level.len() <= 7
    {
        return after;
    }
    text
}

/// Without a syslog or journal head: whatever begins with a date and holds ` kernel: `.
fn after_log_head(text: &str) -> &str {
    let bytes = text.as_bytes();
    let is_date = match bytes {
        [a, b, c, b' ', ..] => MONTHS.contains(&[*a, *b, *c]) || WEEKDAYS.contains(&[*a, *b, *c]),
        [a, b, c, d, b'-', ..] => [a, b, c, d].iter().all(|x| x.is_ascii_digit()),
        _ => false,
    };
    if !is_date {
        return text;
    }
    let head = bytes.get(..HEAD_MAX).unwrap_or(bytes);
    let Some(at) = memchr::memmem::find(head, b" kernel: ") else {
        return text;
    };
    text.get(at + b" kernel: ".len()..).unwrap_or(text)
}

const MONTHS: [[u8; 3]; 12] = [
    *b"Jan", *b"Feb", *b"Mar", *b"Apr", *b"May", *b"Jun", *b"Jul", *b"Aug", *b"Sep", *b"Oct",
    *b"Nov", *b"Dec",
];

/// What `logread` begins with.
const WEEKDAYS: [[u8; 3]; 7] = [
    *b"Mon", *b"Tue", *b"Wed", *b"Thu", *b"Fri", *b"Sat", *b"Sun",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(raw: &str, text: &str, caller: Option<Caller>, time: Option<u64>) {
        assert_eq!(Line::parse(raw), Line { text, caller, time });
    }

    #[test]
    fn every_dress_comes_off() {
        check("BUG: x", "BUG: x", None, None);
        check("<4>BUG: x", "BUG: x", None, None);
        check("[   12.345678] BUG: x", "BUG: x", None, Some(12_345_678));
        check(
            "<1>[    0.000001][    T1] BUG: x",
            "BUG: x",
            Some(Caller::Task(1)),
            Some(1),
        );
        check(
            "[   12.345678] [   C3]  f+0x1/0x2",
            " f+0x1/0x2",
            Some(Caller::Cpu(3)),
            Some(12_345_678),
        );
        check(
            "Nov 23 10:00:00 host kernel: [   12.345678] BUG: x",
            "BUG: x",
            None,
            Some(12_345_678),
        );
        check(
            "2026-11-23T10:00:00+00:00 host kernel: BUG: x",
            "BUG: x",
            None,
            None,
        );
        check(
            "kern  :alert : [   12.345678] BUG: x",
            "BUG: x",
            None,
            Some(12_345_678),
        );
        check("[Mon Nov 23 10:00:00 2026] BUG: x", "BUG: x", None, None);
        check(
            "Tue Nov 24 10:00:00 2026 kern.warn kernel:  f+0x1/0x2",
            " f+0x1/0x2",
            None,
            None,
        );
        check(
            "<1>[  123.456789]  [0:      swapper/0:    0]  f+0x1/0x2",
            " f+0x1/0x2",
            None,
            Some(123_456_789),
        );
    }

    #[test]
    fn frames_keep_their_brackets_and_indentation() {
        check(
            "[   12.345678]  [<ffffffff81d91149>] f+0x1/0x2",
            " [<ffffffff81d91149>] f+0x1/0x2",
            None,
            Some(12_345_678),
        );
        check(
            "[c0000000] [c0000001] f+0x1",
            "[c0000000] [c0000001] f+0x1",
            None,
            None,
        );
        check(
            "[   12.345678] [ BUG: held lock freed! ]",
            "[ BUG: held lock freed! ]",
            None,
            Some(12_345_678),
        );
    }

    #[test]
    fn a_second_message_in_a_line_is_found() {
        assert_eq!(glued("executing[   12.345678] BUG: x"), Some(9));
        assert_eq!(glued("[   12.345678] [   12.345679] BUG: x"), Some(15));
        assert_eq!(glued("[   12.345678] quiet [1.2] [abc.defghi]"), None);
    }
}
