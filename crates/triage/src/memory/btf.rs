//! BTF: the kernel's own description of its types, which lies in its memory.
//!
//! Only what offsets need: structures, unions, enumerations, and what leads to their sizes. All
//! offsets of kernel structures used by this crate come from here.

use std::cell::RefCell;
use std::collections::HashMap;

use super::image::{Unread, index};

/// Types a kernel may have; 6.12 has 140,000.
const TYPES_MAX: usize = 2_000_000;
/// How deep anonymous structures are looked into, and typedefs followed.
const DEPTH_MAX: u32 = 16;
/// Members of anonymous structures that are looked at for one name.
const MEMBERS_MAX: u32 = 100_000;

/// Bytes of the names that can be looked for; those of structures here are much shorter.
const NAME_BYTES_MAX: usize = 64;

const MAGIC: u16 = 0xeb9f;
const HEADER_BYTES: usize = 24;
const TYPE_BYTES: usize = 12;
const POINTER_BYTES: u64 = 8;

const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FWD: u32 = 7;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const FLOAT: u32 = 16;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// All types of a kernel.
pub(crate) struct Btf {
    data: Vec<u8>,
    /// Where each type's record begins in `data`; type 0 is `void`.
    types: Vec<usize>,
    /// Where the names begin and end in `data`.
    names: (usize, usize),
    /// Structures, unions and enumerations by name.
    named: HashMap<Vec<u8>, usize>,
    /// Members that were looked up, by structure and path: the same few again and again.
    found: RefCell<HashMap<String, Option<Field>>>,
}

/// A member of a structure.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Field {
    /// Bytes from the structure's begin.
    pub(crate) offset: u64,
    /// Bytes it takes.
    pub(crate) size: u64,
    /// Of a bit field, the first bit from the structure's begin and how many.
    pub(crate) bits: Option<(u32, u32)>,
    type_id: usize,
}

struct Record<'a> {
    name: u32,
    kind: u32,
    flag: bool,
    count: usize,
    /// Size in bytes or the type referred to, by kind.
    value: u32,
    rest: &'a [u8],
}

impl Btf {
    /// Takes the contents of `.BTF`.
    pub(crate) fn parse(data: Vec<u8>) -> Result<Self, Unread> {
        let bad = |what: String| Unread::Strange(format!("BTF: {what}"));
        let header = data
            .first_chunk::<HEADER_BYTES>()
            .ok_or_else(|| bad(format!("{} bytes are no header", data.len())))?;
        let word = |at: usize| word(header, at).unwrap_or(0);
        let magic = word(0) & 0xffff;
        if magic != u32::from(MAGIC) {
            return Err(bad(format!("it begins with {magic:#x}, not {MAGIC:#x}")));
        }
        let base = word(4);
        let span = |at: u32, length: u32| {
            let from = u64::from(base) + u64::from(at);
            let end = from + u64::from(length);
            if end > data.len() as u64 {
                let have = data.len();
                return Err(bad(format!("a section ends at {end} of {have} bytes")));
            }
            Ok((index(from), index(end)))
        };
        let (from, end) = span(word(8), word(12))?;
        let names = span(word(16), word(20))?;
        let mut btf = Self {
            data,
            types: vec![end],
            names,
            named: HashMap::new(),
            found: RefCell::default(),
        };
        btf.walk(from, end)?;
        Ok(btf)
    }

    fn walk(&mut self, from: usize, end: usize) -> Result<(), Unread> {
        let mut at = from;
        while at < end {
            let number = self.types.len();
            let bad = |what: String| Unread::Strange(format!("BTF: type {number}: {what}"));
            let record = self
                .record_at(at)
                .ok_or_else(|| bad("it is cut short".to_owned()))?;
            let length = tail_bytes(record.kind, record.count)
                .ok_or_else(|| bad(format!("kind {} is not known here", record.kind)))?;
            let is_named = matches!(record.kind, STRUCT | UNION | ENUM | ENUM64);
            if is_named && record.name != 0 {
                let name = self.name(record.name).to_vec();
                self.named.entry(name).or_insert(number);
            }
            if number >= TYPES_MAX {
                return Err(bad(format!("more than {TYPES_MAX} types")));
            }
            self.types.push(at);
            at = at.saturating_add(TYPE_BYTES).saturating_add(length);
        }
        Ok(())
    }

    fn record_at(&self, at: usize) -> Option<Record<'_>> {
        let bytes = self.data.get(at..)?;
        let info = word(bytes, 4)?;
        Some(Record {
            name: word(bytes, 0)?,
            kind: info >> 24 & 0x1f,
            flag: info >> 31 != 0,
            count: index(u64::from(info & 0xffff)),
            value: word(bytes, 8)?,
            rest: bytes.get(TYPE_BYTES..)?,
        })
    }

    fn record(&self, number: usize) -> Option<Record<'_>> {
        if number == 0 {
            return None;
        }
        self.record_at(*self.types.get(number)?)
    }

    /// The name at an offset, without its NUL and what is beyond [`NAME_BYTES_MAX`].
    fn name(&self, at: u32) -> &[u8] {
        let (from, end) = self.names;
        let names = self.data.get(from..end).unwrap_or_default();
        let name = names.get(index(u64::from(at))..).unwrap_or_default();
        let name = name.get(..NAME_BYTES_MAX).unwrap_or(name);
        let length = memchr::memchr(0, name).unwrap_or(name.len());
        name.get(..length).unwrap_or_default()
    }

    /// Whether the structure has this member.
    pub(crate) fn has(&self, name: &str, path: &str) -> bool {
        self.field(name, path).is_ok()
    }

    /// Bytes of a structure.
    pub(crate) fn size(&self, name: &str) -> Result<u64, Unread> {
        let number = self.structure(name)?;
        Ok(self.size_of(number, 0).unwrap_or(0))
    }

    /// Where a member lies, in bytes.
    pub(crate) fn offset(&self, name: &str, path: &str) -> Result<u64, Unread> {
        self.field(name, path).map(|field| field.offset)
    }

    /// A member by its path, as in `("task_struct", "thread.sp")`.
    pub(crate) fn field(&self, name: &str, path: &str) -> Result<Field, Unread> {
        let structure = self.structure(name)?;
        let key = format!("{name}.{path}");
        let known = self.found.borrow().get(&key).copied();
        let field = known.unwrap_or_else(|| {
            let field = self.member_at(structure, path);
            self.found.borrow_mut().insert(key, field);
            field
        });
        field.ok_or_else(|| Unread::Strange(format!("struct {name} has no {path}")))
    }

    fn member_at(&self, structure: usize, path: &str) -> Option<Field> {
        let mut field = Field {
            type_id: structure,
            ..Field::default()
        };
        for part in path.split('.') {
            let number = self.resolved(field.type_id);
            let mut budget = MEMBERS_MAX;
            let inner = self.member(number, part.as_bytes(), DEPTH_MAX, &mut budget)?;
            let before = field.offset;
            field = inner;
            field.offset = before.saturating_add(inner.offset);
        }
        field.size = self.size_of(field.type_id, 0).unwrap_or(0);
        Some(field)
    }

    fn structure(&self, name: &str) -> Result<usize, Unread> {
        self.named
            .get(name.as_bytes())
            .copied()
            .ok_or_else(|| Unread::Strange(format!("BTF has no struct {name}")))
    }

    /// The value of an enumerator.
    pub(crate) fn enumerator(&self, name: &str, wanted: &str) -> Option<u64> {
        let record = self.record(*self.named.get(name.as_bytes())?)?;
        let size = match record.kind {
            ENUM => 8,
            ENUM64 => 12,
            _ => return None,
        };
        record
            .rest
            .chunks_exact(size)
            .take(record.count)
            .find(|entry| word(entry, 0).is_some_and(|at| self.name(at) == wanted.as_bytes()))
            .and_then(|entry| word(entry, 4))
            .map(u64::from)
    }

    /// Looks for a member in a structure and the anonymous ones in it.
    fn member(&self, number: usize, wanted: &[u8], depth: u32, budget: &mut u32) -> Option<Field> {
        let record = self.record(number)?;
        if !matches!(record.kind, STRUCT | UNION) || depth == 0 {
            return None;
        }
        for entry in record.rest.chunks_exact(TYPE_BYTES).take(record.count) {
            *budget = budget.checked_sub(1)?;
            let (name, type_id, place) = (word(entry, 0)?, word(entry, 4)?, word(entry, 8)?);
            let type_id = index(u64::from(type_id));
            let (bit, width) = if record.flag {
                (place & 0xff_ffff, place >> 24)
            } else {
                (place, 0)
            };
            let offset = u64::from(bit / 8);
            if name != 0 {
                if self.name(name) == wanted {
                    return Some(Field {
                        offset,
                        size: 0,
                        bits: (width > 0).then_some((bit, width)),
                        type_id,
                    });
                }
                continue;
            }
            let inner = self.resolved(type_id);
            if let Some(found) = self.member(inner, wanted, depth - 1, budget) {
                return Some(Field {
                    offset: offset.saturating_add(found.offset),
                    ..found
                });
            }
        }
        None
    }

    /// The type behind typedefs and qualifiers.
    fn resolved(&self, number: usize) -> usize {
        let mut number = number;
        for _ in 0..DEPTH_MAX {
            match self.record(number) {
                Some(Record {
                    kind: TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG,
                    value,
                    ..
                }) => number = index(u64::from(value)),
                _ => break,
            }
        }
        number
    }

    fn size_of(&self, number: usize, depth: u32) -> Option<u64> {
        if depth > DEPTH_MAX {
            return None;
        }
        let record = self.record(self.resolved(number))?;
        match record.kind {
            INT | STRUCT | UNION | ENUM | ENUM64 | FLOAT => Some(u64::from(record.value)),
            PTR => Some(POINTER_BYTES),
            ARRAY => {
                let element = index(u64::from(word(record.rest, 0)?));
                let count = u64::from(word(record.rest, 8)?);
                self.size_of(element, depth + 1)?.checked_mul(count)
            }
            _ => None,
        }
    }
}

/// Bytes that follow a type's record.
fn tail_bytes(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        INT | VAR | DECL_TAG => 4,
        ARRAY => 12,
        STRUCT | UNION | DATASEC | ENUM64 => count * 12,
        ENUM | FUNC_PROTO => count * 8,
        PTR | FWD | TYPEDEF | VOLATILE | CONST | RESTRICT | FUNC | FLOAT | TYPE_TAG => 0,
        _ => return None,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}
