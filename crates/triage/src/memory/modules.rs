//! Loaded modules: where they lie, their functions and their ORC tables.

use serde::Serialize;

use super::btf::Btf;
use super::image::{Image, Unread, index, text};
use super::kallsyms::Symbols;
use super::list;
use super::orc::Table;

/// Modules a kernel may have loaded.
const MODULES_MAX: usize = 4096;
/// Symbols of one module; amdgpu has 30,000.
const SYMBOLS_MAX: u64 = 1 << 18;
/// What a symbol of a module costs: the memory that its place is kept in.
const SYMBOL_WORK: u64 = 4;
/// Bytes of the longest name of a function in a module.
const NAME_BYTES_MAX: usize = 512;
/// Parts of a module's memory; 6.4 and later have seven.
const PARTS_MAX: u64 = 16;
/// `Elf64_Sym`: name, info, other, section, value, size.
const SYMBOL_BYTES: usize = 24;
/// `MODULE_STATE_UNFORMED`: memory that is no module yet.
const UNFORMED: u64 = 3;
/// The letters of the kernel's taint flags, by bit.
const TAINTS: &str = "PFSRMBUDAWCIOELKXTNJ";

/// A loaded module.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Where its code begins.
    pub address: u64,
    /// Bytes it takes in memory.
    pub bytes: u64,
    /// Letters of its taint flags, as in `OE`.
    pub taint: String,
    /// Live, coming or going.
    pub state: &'static str,
    #[serde(skip)]
    pub(crate) text: (u64, u64),
    #[serde(skip)]
    symbols: Option<SymbolTable>,
    #[serde(skip)]
    pub(crate) orc: Option<Table>,
    #[serde(skip)]
    functions: Option<Vec<(u64, u32)>>,
}

#[derive(Clone, Copy, Debug)]
struct SymbolTable {
    symbols: u64,
    count: u64,
    names: u64,
}

/// The letters of taint flags.
pub(crate) fn taint(flags: u64) -> String {
    let letters = TAINTS.chars().enumerate();
    letters
        .filter(|&(bit, _)| flags >> bit & 1 != 0)
        .map(|(_, letter)| letter)
        .collect()
}

/// Reads the list of modules; also says why it ended early.
pub(crate) fn read(
    image: &mut Image<'_>,
    btf: &Btf,
    symbols: &Symbols,
) -> Result<(Vec<Module>, Option<Unread>), Unread> {
    let head = symbols.address("modules")?;
    let link = btf.offset("module", "list")?;
    let mut modules = Vec::new();
    let (places, mut ended) = list::walk(image, head, MODULES_MAX);
    for place in places {
        match module(image, btf, place.wrapping_sub(link)) {
            Ok(module) => modules.extend(module),
            Err(error) => ended = Some(error),
        }
    }
    Ok((modules, ended))
}

fn module(image: &mut Image<'_>, btf: &Btf, at: u64) -> Result<Option<Module>, Unread> {
    const NAME: &str = "module";
    let state = btf.field(NAME, "state")?;
    let state = image.number(at.wrapping_add(state.offset), state.size)?;
    if state == UNFORMED {
        return Ok(None);
    }
    let name = btf.field(NAME, "name")?;
    let name = image.bytes(
        at.wrapping_add(name.offset),
        name.size.min(NAME_BYTES_MAX as u64),
    )?;
    let taints = btf.field(NAME, "taints")?;
    let flags = image.number(at.wrapping_add(taints.offset), taints.size)?;
    let (code, bytes) = memory(image, btf, at)?;
    Ok(Some(Module {
        name: text(&name),
        address: code.0,
        bytes,
        taint: taint(flags),
        state: match state {
            0 => "live",
            1 => "coming",
            _ => "going",
        },
        text: code,
        symbols: symbol_table(image, btf, at).ok(),
        orc: orc(image, btf, at).ok(),
        functions: None,
    }))
}

/// Begin and end of a module's code, and the bytes of all its memory.
fn memory(image: &mut Image<'_>, btf: &Btf, at: u64) -> Result<((u64, u64), u64), Unread> {
    // Before 6.4 a module had one piece of memory that begins with its code.
    if btf.has("module", "core_layout") {
        let mut part = |member: &str| {
            let field = btf.field("module", &format!("core_layout.{member}"))?;
            image.number(at.wrapping_add(field.offset), field.size)
        };
        let base = part("base")?;
        return Ok(((base, base.wrapping_add(part("text_size")?)), part("size")?));
    }
    let parts = btf.field("module", "mem")?;
    let each = btf.size("module_memory")?.max(1);
    let (base, size) = (
        btf.offset("module_memory", "base")?,
        btf.field("module_memory", "size")?,
    );
    let mut code = (0, 0);
    let mut bytes = 0u64;
    for part in 0..(parts.size / each).min(PARTS_MAX) {
        let place = at.wrapping_add(parts.offset).wrapping_add(part * each);
        let begin = image.u64(place.wrapping_add(base))?;
        let length = image.number(place.wrapping_add(size.offset), size.size)?;
        if part == 0 {
            code = (begin, begin.wrapping_add(length));
        }
        bytes = bytes.saturating_add(length);
    }
    Ok((code, bytes))
}

fn symbol_table(image: &mut Image<'_>, btf: &Btf, at: u64) -> Result<SymbolTable, Unread> {
    let table = image.u64(at.wrapping_add(btf.offset("module", "kallsyms")?))?;
    let count = btf.field("mod_kallsyms", "num_symtab")?;
    let count = image.number(table.wrapping_add(count.offset), count.size)?;
    Ok(SymbolTable {
        symbols: image.u64(table.wrapping_add(btf.offset("mod_kallsyms", "symtab")?))?,
        names: image.u64(table.wrapping_add(btf.offset("mod_kallsyms", "strtab")?))?,
        count: count.min(SYMBOLS_MAX),
    })
}

fn orc(image: &mut Image<'_>, btf: &Btf, at: u64) -> Result<Table, Unread> {
    let count = btf.field("module", "arch.num_orcs")?;
    Ok(Table {
        count: image.number(at.wrapping_add(count.offset), count.size)?,
        addresses: image.u64(at.wrapping_add(btf.offset("module", "arch.orc_unwind_ip")?))?,
        entries: image.u64(at.wrapping_add(btf.offset("module", "arch.orc_unwind")?))?,
    })
}

impl Module {
    pub(crate) const fn contains(&self, address: u64) -> bool {
        self.text.0 <= address && address < self.text.1
    }

    /// The function that an address lies in, and how far behind its begin.
    pub(crate) fn function(
        &mut self,
        image: &mut Image<'_>,
        address: u64,
    ) -> Option<(String, u64)> {
        let table = self.symbols?;
        let text = self.text;
        if self.functions.is_none() {
            image.spend(table.count.saturating_mul(SYMBOL_WORK)).ok()?;
        }
        let functions = self
            .functions
            .get_or_insert_with(|| functions(image, table, text));
        let after = functions.partition_point(|&(begin, _)| begin <= address);
        let begin = functions.get(after.checked_sub(1)?)?.0;
        let first = functions.partition_point(|&(other, _)| other < begin);
        let &(_, name) = functions.get(first)?;
        let name = image.text(table.names.wrapping_add(u64::from(name)), NAME_BYTES_MAX);
        Some((name.ok()?, address - begin))
    }
}

/// Begins of functions and where their names are, sorted.
fn functions(image: &mut Image<'_>, table: SymbolTable, text: (u64, u64)) -> Vec<(u64, u32)> {
    let bytes = image.stretch(
        table.symbols,
        index(table.count).saturating_mul(SYMBOL_BYTES),
    );
    let mut functions: Vec<(u64, u32)> = bytes
        .chunks_exact(SYMBOL_BYTES)
        .filter_map(|symbol| {
            let name = u32::from_le_bytes(*symbol.first_chunk()?);
            let section = u16::from_le_bytes(*symbol.get(6..)?.first_chunk()?);
            let value = u64::from_le_bytes(*symbol.get(8..)?.first_chunk()?);
            // Section 0 is that of symbols which are defined elsewhere.
            (section != 0 && name != 0 && text.0 <= value && value < text.1)
                .then_some((value, name))
        })
        .collect();
    functions.sort_by_key(|&(value, _)| value);
    functions
}
