//! The kernel's own symbol table: names packed with a table of tokens, addresses as offsets.
//!
//! The names have looked alike since 4.x (since 6.1 a length of 128 and more takes two bytes). The
//! addresses changed: up to 6.14 non-negative offsets of an SMP kernel are absolute, later all are
//! relative to a base, and since 7.0 each is relative to its own place. Nothing tells which, so
//! every way is tried, and the one that puts `_stext` where VMCOREINFO has it is right.

use std::cell::RefCell;
use std::collections::HashMap;

use dump::Vmcoreinfo;

use super::image::{Image, Unread, index};

/// Symbols a kernel may have; 6.12 has 230,000.
const SYMBOLS_MAX: usize = 2_000_000;
/// Bytes of packed names a symbol may take on average; it is about 12.
const NAME_BYTES_MEAN: usize = 24;
/// The longest name.
const NAME_BYTES_MAX: usize = 1024;
/// Bytes of all names as they were before they were packed; 6.12 has 7 MiB.
const NAMES_BYTES_MAX: usize = 256 << 20;
const TOKENS: usize = 256;
/// The letters of a token.
const TOKEN_BYTES_MAX: usize = 64;
const TOKEN_TABLE_BYTES: usize = TOKENS * TOKEN_BYTES_MAX;

/// All symbols of the kernel's image, by address.
pub(crate) struct Symbols {
    names: Vec<u8>,
    /// In the order of the kernel's table, which is that of the addresses.
    entries: Vec<Entry>,
    /// The places of functions in `entries`.
    functions: Vec<usize>,
    /// What was looked up: the same few names again and again, for each CPU.
    found: RefCell<HashMap<String, Option<u64>>>,
}

#[derive(Clone, Copy)]
struct Entry {
    address: u64,
    name: usize,
    length: usize,
    kind: u8,
}

/// How addresses are stored.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Form {
    /// Non-negative ones are absolute, negative ones go up from the base.
    AbsolutePercpu(u64),
    /// All are relative to the base.
    Relative(u64),
    /// Each is relative to where it lies.
    Place(u64),
}

impl Form {
    fn address(self, place: usize, offset: i32) -> u64 {
        let signed = i64::from(offset).cast_unsigned();
        match self {
            Self::AbsolutePercpu(_) if offset >= 0 => signed,
            Self::AbsolutePercpu(base) => base.wrapping_sub(1).wrapping_sub(signed),
            Self::Relative(base) => base.wrapping_add(u64::from(offset.cast_unsigned())),
            Self::Place(table) => table
                .wrapping_add((place as u64).wrapping_mul(4))
                .wrapping_add(signed),
        }
    }
}

impl Symbols {
    pub(crate) fn read(image: &mut Image<'_>, info: Vmcoreinfo<'_>) -> Result<Self, Unread> {
        let symbol = |name: &str| {
            info.symbol(name)
                .ok_or_else(|| Unread::Strange(format!("VMCOREINFO lacks SYMBOL({name})")))
        };
        let count = index(u64::from(image.u32(symbol("kallsyms_num_syms")?)?));
        if count > SYMBOLS_MAX {
            return Err(Unread::strange(format!(
                "kallsyms has {count} symbols; the limit is {SYMBOLS_MAX}"
            )));
        }
        let packed = image.stretch(symbol("kallsyms_names")?, count * NAME_BYTES_MEAN);
        let tokens = image.stretch(symbol("kallsyms_token_table")?, TOKEN_TABLE_BYTES);
        let token_index: [u8; 2 * TOKENS] = image.array(symbol("kallsyms_token_index")?)?;
        let mut symbols = unpack(&packed, &tokens, &token_index, count);
        let table = symbol("kallsyms_offsets")?;
        let offsets = image.bytes(table, count as u64 * 4)?;
        let offsets: Vec<i32> = offsets
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| i32::from_le_bytes(bytes))
            .collect();
        let mut forms = vec![Form::Place(table)];
        if let Some(at) = info.symbol("kallsyms_relative_base") {
            let base = image.u64(at)?;
            forms = vec![Form::AbsolutePercpu(base), Form::Relative(base)];
        }
        symbols.place(&offsets, &forms, symbol("_stext")?)?;
        Ok(symbols)
    }

    /// Gives every symbol its address, in the one form that is right.
    fn place(&mut self, offsets: &[i32], forms: &[Form], text: u64) -> Result<(), Unread> {
        let at = self.position("_stext");
        let offset = at.and_then(|at| Some((at, *offsets.get(at)?)));
        let form = offset
            .and_then(|(at, offset)| forms.iter().find(|form| form.address(at, offset) == text));
        let Some(form) = form else {
            return Err(Unread::strange(format!(
                "kallsyms: no known form of addresses puts _stext at {text:#x}, as VMCOREINFO does"
            )));
        };
        let placed = self.entries.iter_mut().zip(offsets).enumerate();
        for (at, (entry, &offset)) in placed {
            entry.address = form.address(at, offset);
        }
        let is_function = |entry: &Entry| matches!(entry.kind, b't' | b'T' | b'w' | b'W');
        self.functions = (0..self.entries.len())
            .filter(|&at| self.entries.get(at).is_some_and(is_function))
            .collect();
        let address = |&at: &usize| self.entries.get(at).map_or(0, |entry| entry.address);
        // The kernel's own table is sorted; a damaged one must not mislead the search.
        self.functions.sort_by_key(address);
        Ok(())
    }

    fn name(&self, entry: &Entry) -> &str {
        let bytes = self
            .names
            .get(entry.name..)
            .and_then(|names| names.get(..entry.length));
        bytes
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .unwrap_or_default()
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.entries
            .iter()
            .position(|entry| entry.length == name.len() && self.name(entry) == name)
    }

    /// The address of a symbol.
    pub(crate) fn address(&self, name: &str) -> Result<u64, Unread> {
        let known = self.found.borrow().get(name).copied();
        let address = known.unwrap_or_else(|| {
            let at = self.position(name);
            let entry = at.and_then(|at| self.entries.get(at));
            let address = entry.map(|entry| entry.address);
            self.found.borrow_mut().insert(name.to_owned(), address);
            address
        });
        address.ok_or_else(|| Unread::Strange(format!("the kernel has no symbol {name}")))
    }

    /// The function that an address lies in, and how far behind its begin. Of several names for one
    /// place the first counts, as in the kernel.
    pub(crate) fn function(&self, address: u64) -> Option<(&str, u64)> {
        let at = |place: &usize| self.entries.get(*place).map_or(0, |entry| entry.address);
        let after = self.functions.partition_point(|place| at(place) <= address);
        let begin = at(self.functions.get(after.checked_sub(1)?)?);
        let first = self.functions.partition_point(|place| at(place) < begin);
        let entry = self.entries.get(*self.functions.get(first)?)?;
        Some((self.name(entry), address - begin))
    }
}

/// Unpacks the names; stops where they end or make no sense.
fn unpack(packed: &[u8], tokens: &[u8], token_index: &[u8; 2 * TOKENS], count: usize) -> Symbols {
    let token_at: Vec<&[u8]> = token_index
        .as_chunks()
        .0
        .iter()
        .map(|&at| {
            let token = tokens
                .get(usize::from(u16::from_le_bytes(at))..)
                .unwrap_or_default();
            let token = token.get(..TOKEN_BYTES_MAX).unwrap_or(token);
            let length = memchr::memchr(0, token).unwrap_or(0);
            token.get(..length).unwrap_or_default()
        })
        .collect();
    let mut symbols = Symbols {
        names: Vec::with_capacity(packed.len()),
        entries: Vec::with_capacity(count),
        functions: Vec::new(),
        found: RefCell::default(),
    };
    let mut rest = packed;
    while symbols.entries.len() < count && symbols.names.len() < NAMES_BYTES_MAX {
        let Some((codes, later)) = next_name(rest) else {
            break;
        };
        rest = later;
        let begin = symbols.names.len();
        for &code in codes {
            let token = token_at.get(usize::from(code)).copied().unwrap_or_default();
            symbols.names.extend_from_slice(token);
            if symbols.names.len() - begin > NAME_BYTES_MAX {
                break;
            }
        }
        // The first letter is the kind.
        let kind = symbols.names.get(begin).copied().unwrap_or(0);
        let name = (begin + 1).min(symbols.names.len());
        symbols.entries.push(Entry {
            address: 0,
            name,
            length: symbols.names.len() - name,
            kind,
        });
    }
    symbols
}

/// The codes of the next name, and what follows.
fn next_name(packed: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&first, rest) = packed.split_first()?;
    if first & 0x80 == 0 {
        return rest.split_at_checked(usize::from(first));
    }
    let (&second, rest) = rest.split_first()?;
    rest.split_at_checked(usize::from(first & 0x7f) | usize::from(second) << 7)
}
