//! The grammar of one netconsole datagram, of every kernel that ever sent one.
//!
//! ```text
//! extended = [release ","] prefix "," seq "," time ["," flag] *("," key "=" value) ";" body
//! body     = text LF *(SP key "=" value LF)        ; or a fragment of it
//! basic    = lines as a console shows them
//! ```

use memchr::memchr;

use crate::number;

/// The longest body that is put together from fragments. The longest that a kernel can send is
/// about 74 KiB: a record, 256 entries of user data and four of system data.
pub const BODY_BYTES_MAX: usize = 80 << 10;
/// `facility * 8 + level` of the last facility: syslog knows 24 of them, a kernel takes 256 from the
/// programs that write to its log.
const PREFIX_MAX: u64 = 2047;
/// Digits of that.
const PREFIX_BYTES_MAX: usize = 4;
/// `UTS_RELEASE` of any kernel.
const RELEASE_BYTES_MAX: usize = 64;

/// What a datagram is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Datagram<'a> {
    /// An extended record, or a fragment of one.
    Extended(Extended<'a>),
    /// Console text: lines, or parts of lines.
    Basic(&'a [u8]),
    /// Neither.
    Malformed(Flaw),
}

/// A datagram of extended netconsole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extended<'a> {
    /// The kernel's release, if the target says it.
    pub release: Option<&'a str>,
    /// Facility times eight plus level.
    pub prefix: u16,
    /// The record's number, counted from 0 in each boot.
    pub seq: u64,
    /// Microseconds of the kernel's local clock.
    pub time_us: u64,
    /// `-`, or `c` or `+` for a part of a line.
    pub flag: u8,
    /// Who printed it.
    pub caller: Option<Caller>,
    /// Which part of the body this is, if it is not all.
    pub fragment: Option<Fragment>,
    /// Text and dictionary, escaped by the kernel, or a part of them.
    pub body: &'a [u8],
}

/// Who printed a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// A task, by its thread id.
    Task(u32),
    /// A CPU outside of any task.
    Cpu(u32),
}

/// The place of a fragment in its record's body, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// Where it begins.
    pub offset: usize,
    /// Length of the whole body.
    pub total: usize,
}

/// What is wrong with a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// It has no bytes.
    Empty,
    /// The facility does not exist.
    Prefix,
    /// The header is not ended by a semicolon.
    NoEnd,
    /// A flag that no kernel has.
    Flag,
    /// A fragment outside of its body, or a body that is too long.
    Fragment,
    /// Bytes that no console text has.
    Control,
}

impl<'a> Datagram<'a> {
    /// Says what `bytes` are.
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Self {
        match extended(bytes) {
            Ok(Some(extended)) => Self::Extended(extended),
            Ok(None) if bytes.is_empty() => Self::Malformed(Flaw::Empty),
            Ok(None) if bytes.iter().any(|&byte| is_foreign(byte)) => {
                Self::Malformed(Flaw::Control)
            }
            Ok(None) => Self::Basic(bytes),
            Err(flaw) => Self::Malformed(flaw),
        }
    }
}

impl Caller {
    /// Reads `T123` or `C4`.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (&kind, number) = text.split_first()?;
        let number = u32::try_from(number::parse(number)?).ok()?;
        match kind {
            b'T' => Some(Self::Task(number)),
            b'C' => Some(Self::Cpu(number)),
            _ => None,
        }
    }

    /// Writes what [`Self::parse`] reads.
    pub fn write(self, out: &mut Vec<u8>) {
        let (kind, number) = match self {
            Self::Task(number) => (b'T', number),
            Self::Cpu(number) => (b'C', number),
        };
        out.push(kind);
        number::write(out, u64::from(number));
    }
}

/// Console text has no control bytes but these; terminals' escapes come from old drivers.
fn is_foreign(byte: u8) -> bool {
    byte < 0x20 && !matches!(byte, b'\n' | b'\t' | b'\r' | 0x1b)
}

/// The extended datagram that `bytes` are; `None` if they are something else.
fn extended(bytes: &[u8]) -> Result<Option<Extended<'_>>, Flaw> {
    let mut fields = Fields { rest: bytes };
    let Some(mut first) = fields.next() else {
        return Ok(None);
    };
    let mut release = None;
    if !first.first().is_some_and(u8::is_ascii_digit) || first.contains(&b'.') {
        release = release_of(first);
        let (Some(_), Some(next)) = (release, fields.next()) else {
            return Ok(None);
        };
        first = next;
    }
    // Three numbers in a row: what does not begin so is text.
    let (Some(prefix), Some(seq), Some(time_us)) = (
        number::parse(first).filter(|_| first.len() <= PREFIX_BYTES_MAX),
        fields.next().and_then(number::parse),
        fields.next_or_last().and_then(number::parse),
    ) else {
        return Ok(None);
    };
    let Some(prefix) = u16::try_from(prefix).ok().filter(|_| prefix <= PREFIX_MAX) else {
        return Err(Flaw::Prefix);
    };
    let mut found = Extended {
        release,
        prefix,
        seq,
        time_us,
        flag: b'-',
        caller: None,
        fragment: None,
        body: &[],
    };
    let end = memchr(b';', fields.rest).ok_or(Flaw::NoEnd)?;
    let (more, body) = fields.rest.split_at(end);
    found.body = body.get(1..).unwrap_or_default();
    for field in more
        .split(|&byte| byte == b',')
        .filter(|field| !field.is_empty())
    {
        found.take(field)?;
    }
    found.check()
}

impl<'a> Extended<'a> {
    /// Takes a field behind the time.
    fn take(&mut self, field: &'a [u8]) -> Result<(), Flaw> {
        if let [flag] = field {
            self.flag = match flag {
                b'-' | b'c' | b'+' => *flag,
                _ => return Err(Flaw::Flag),
            };
        } else if let Some(caller) = field.strip_prefix(b"caller=") {
            self.caller = Caller::parse(caller);
        } else if let Some(fragment) = field.strip_prefix(b"ncfrag=") {
            self.fragment = Some(Fragment::parse(fragment).ok_or(Flaw::Fragment)?);
        }
        Ok(())
    }

    fn check(self) -> Result<Option<Self>, Flaw> {
        let fits = match self.fragment {
            None => self.body.len() <= BODY_BYTES_MAX,
            Some(Fragment { offset, total }) => {
                let end = offset.saturating_add(self.body.len());
                !self.body.is_empty() && end <= total && total <= BODY_BYTES_MAX
            }
        };
        if fits {
            Ok(Some(self))
        } else {
            Err(Flaw::Fragment)
        }
    }
}

impl Fragment {
    fn parse(text: &[u8]) -> Option<Self> {
        let (offset, total) = text.split_at(memchr(b'/', text)?);
        let size = |digits| usize::try_from(number::parse(digits)?).ok();
        Some(Self {
            offset: size(offset)?,
            total: size(total.get(1..)?)?,
        })
    }
}

fn release_of(field: &[u8]) -> Option<&str> {
    let legal = field.len() <= RELEASE_BYTES_MAX
        && field.contains(&b'.')
        && field.iter().all(u8::is_ascii_graphic);
    std::str::from_utf8(field).ok().filter(|_| legal)
}

/// The fields of a header, as far as each ends with a comma.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn next(&mut self) -> Option<&'a [u8]> {
        let reach = &self.rest[..self.rest.len().min(RELEASE_BYTES_MAX + 1)];
        let end = memchr(b',', reach)?;
        let field = &self.rest[..end];
        self.rest = &self.rest[end + 1..];
        Some(field)
    }

    /// A field that a comma or the header's end follows; the end stays.
    fn next_or_last(&mut self) -> Option<&'a [u8]> {
        let digits = self
            .rest
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .count();
        let (field, rest) = self.rest.split_at(digits);
        match rest.first() {
            Some(b',' | b';') => {
                self.rest = rest;
                Some(field)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extended(text: &str) -> Extended<'_> {
        match Datagram::parse(text.as_bytes()) {
            Datagram::Extended(extended) => extended,
            other @ (Datagram::Basic(_) | Datagram::Malformed(_)) => {
                panic!("{text:?} is {other:?}")
            }
        }
    }

    #[test]
    fn every_header_that_kernels_write_is_understood() {
        let plain = extended("6,1234,5678901,-;eth0: link up\n SUBSYSTEM=net\n");
        assert_eq!(
            (plain.prefix, plain.seq, plain.time_us),
            (6, 1234, 5_678_901)
        );
        assert_eq!(
            (plain.flag, plain.caller, plain.release),
            (b'-', None, None)
        );
        assert_eq!(plain.body, b"eth0: link up\n SUBSYSTEM=net\n");

        let all = extended("6.12.95+deb13-amd64,30,7,1,c,caller=T42,new=x,ncfrag=0/986;abc");
        assert_eq!(all.release, Some("6.12.95+deb13-amd64"));
        assert_eq!((all.prefix, all.flag), (30, b'c'));
        assert_eq!(all.caller, Some(Caller::Task(42)));
        let fragment = Fragment {
            offset: 0,
            total: 986,
        };
        assert_eq!(all.fragment, Some(fragment));

        assert_eq!(extended("4,1,2,-,caller=C3;x").caller, Some(Caller::Cpu(3)));
        assert_eq!(
            extended("4,1,2;x").flag,
            b'-',
            "the first kernels had no flag"
        );
        assert_eq!(extended("4,1,2,+;x").flag, b'+');
        assert_eq!(extended("2047,1,2,-;x").prefix, 2047);
        assert_eq!(extended("4,1,2,-;;a;b,c").body, b";a;b,c");
    }

    #[test]
    fn text_is_basic_even_when_it_has_commas() {
        for text in [
            "[    1.000000] hello\n",
            "5 apples, 3 pears, 2 plums; and more",
            "6,12,x;",
            "1.2.3, 4, 5",
            "6.1.0,warning,5;",
            "** 12 printk messages dropped **\n",
            "tab\tand \x1b[1mescape\n",
        ] {
            assert_eq!(
                Datagram::parse(text.as_bytes()),
                Datagram::Basic(text.as_bytes())
            );
        }
    }

    #[test]
    fn what_is_malformed_is_said_to_be() {
        for (text, flaw) in [
            ("", Flaw::Empty),
            ("2048,1,2,-;x", Flaw::Prefix),
            ("6,1,2,-,caller=T1", Flaw::NoEnd),
            ("6,1,2,x;x", Flaw::Flag),
            ("6,1,2,-,ncfrag=0/3;four", Flaw::Fragment),
            ("6,1,2,-,ncfrag=9/9;x", Flaw::Fragment),
            ("6,1,2,-,ncfrag=0/99999999;x", Flaw::Fragment),
            ("6,1,2,-,ncfrag=18446744073709551615/4;x", Flaw::Fragment),
            ("6,1,2,-,ncfrag=x/4;x", Flaw::Fragment),
            ("6,1,2,-,ncfrag=0/4;", Flaw::Fragment),
            ("a\0b", Flaw::Control),
        ] {
            assert_eq!(
                Datagram::parse(text.as_bytes()),
                Datagram::Malformed(flaw),
                "{text:?}"
            );
        }
    }
}
