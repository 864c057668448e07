//! What a kernel says of itself: symbols, types, modules. Everything else is read with these.

use dump::Vmcoreinfo;

use super::btf::{Btf, Field};
use super::image::{Image, Unread};
use super::kallsyms::Symbols;
use super::modules::{self, Module};
use super::orc::{Entry, Layout, Table};

/// Bytes of one ORC address.
const ADDRESS_BYTES: u64 = 4;
/// A function that every kernel has.
const A_FUNCTION: &str = "panic";
/// CPUs a kernel may have.
pub(crate) const CPUS_MAX: u32 = 8192;

/// A crashed kernel whose symbols and types are known.
pub(crate) struct Kernel<'a> {
    pub(crate) image: Image<'a>,
    pub(crate) symbols: Symbols,
    pub(crate) btf: Btf,
    pub(crate) modules: Vec<Module>,
    /// Where the kernel's functions lie: its text, and that of its start-up.
    text: Vec<(u64, u64)>,
    orc: Option<(Layout, Table)>,
    /// What could not be read, and why.
    pub(crate) unread: Vec<String>,
}

impl<'a> Kernel<'a> {
    /// Reads symbols, types and modules.
    pub(crate) fn new(mut image: Image<'a>, info: Vmcoreinfo<'_>) -> Result<Self, Unread> {
        let symbols = Symbols::read(&mut image, info)?;
        let btf = types(&mut image, &symbols)?;
        let ranges = [("_stext", "_etext"), ("_sinittext", "_einittext")];
        let text = ranges.iter().filter_map(|(begin, end)| {
            Some((symbols.address(begin).ok()?, symbols.address(end).ok()?))
        });
        let mut kernel = Self {
            text: text.collect(),
            image,
            symbols,
            btf,
            modules: Vec::new(),
            orc: None,
            unread: Vec::new(),
        };
        let orc = kernel.own_orc();
        kernel.orc = kernel.kept("ORC tables: backtraces by frame pointers only", orc);
        let found = modules::read(&mut kernel.image, &kernel.btf, &kernel.symbols);
        if let Some((modules, ended)) = kernel.kept("modules", found) {
            kernel.modules = modules;
            if let Some(error) = ended {
                kernel.note("modules", &error);
            }
        }
        Ok(kernel)
    }

    fn own_orc(&mut self) -> Result<(Layout, Table), Unread> {
        let addresses = self.symbols.address("__start_orc_unwind_ip")?;
        let end = self.symbols.address("__stop_orc_unwind_ip")?;
        let table = Table {
            addresses,
            entries: self.symbols.address("__start_orc_unwind")?,
            count: end.saturating_sub(addresses) / ADDRESS_BYTES,
        };
        let mut layout = Layout::new(&self.btf)?;
        if let Ok(begin) = self.symbols.address(A_FUNCTION)
            && let Some(entry) = table.find(&mut self.image, &layout, begin)?
        {
            layout.learn(entry);
        }
        Ok((layout, table))
    }

    /// Remembers why something could not be read.
    pub(crate) fn note(&mut self, what: &str, error: &Unread) {
        self.unread.push(format!("{what}: {error}"));
    }

    /// What was read, or `None` and a note.
    pub(crate) fn kept<T>(&mut self, what: &str, read: Result<T, Unread>) -> Option<T> {
        read.map_err(|error| self.note(what, &error)).ok()
    }

    /// A member of a structure.
    pub(crate) fn member(&mut self, at: u64, name: &str, path: &str) -> Result<u64, Unread> {
        let field = self.btf.field(name, path)?;
        self.value(at, field)
    }

    pub(crate) fn value(&mut self, at: u64, field: Field) -> Result<u64, Unread> {
        self.image.number(at.wrapping_add(field.offset), field.size)
    }

    /// The address of a per-CPU variable on one CPU.
    pub(crate) fn percpu(&mut self, name: &str, cpu: u32) -> Result<u64, Unread> {
        let offsets = self.symbols.address("__per_cpu_offset")?;
        let base = self.image.u64(offsets.wrapping_add(u64::from(cpu) * 8))?;
        Ok(self.symbols.address(name)?.wrapping_add(base))
    }

    /// The CPUs of a mask.
    pub(crate) fn mask(&mut self, name: &str) -> Result<Vec<u32>, Unread> {
        let at = self.symbols.address(name)?;
        let bytes = self.btf.size("cpumask")?.min(u64::from(CPUS_MAX / 8));
        let bits = self.image.bytes(at, bytes)?;
        let is_set = |cpu: u32| {
            let byte = usize::try_from(cpu / 8).ok().and_then(|at| bits.get(at));
            byte.is_some_and(|byte| byte >> (cpu % 8) & 1 != 0)
        };
        Ok((0..CPUS_MAX).filter(|&cpu| is_set(cpu)).collect())
    }

    pub(crate) fn is_text(&self, address: u64) -> bool {
        let inside = |&(begin, end): &(u64, u64)| begin <= address && address < end;
        self.text.iter().any(inside) || self.modules.iter().any(|m| m.contains(address))
    }

    /// The function an address lies in: its name, how far behind its begin, and its module.
    pub(crate) fn function(&mut self, address: u64) -> Option<(String, u64, Option<String>)> {
        let Self { image, modules, .. } = self;
        if let Some(module) = modules.iter_mut().find(|module| module.contains(address)) {
            let (name, offset) = module.function(image, address)?;
            return Some((name, offset, Some(module.name.clone())));
        }
        if !self.is_text(address) {
            return None;
        }
        let (name, offset) = self.symbols.function(address)?;
        Some((name.to_owned(), offset, None))
    }

    /// How to get from an instruction to the caller; `None` when ORC says nothing of it.
    pub(crate) fn orc(&mut self, address: u64) -> Result<Option<Entry>, Unread> {
        let Some((layout, own)) = self.orc else {
            return Ok(None);
        };
        if let Some(module) = self.modules.iter().find(|module| module.contains(address)) {
            return match module.orc {
                Some(table) => table.find(&mut self.image, &layout, address),
                None => Ok(None),
            };
        }
        if self.is_text(address) {
            own.find(&mut self.image, &layout, address)
        } else {
            Ok(None)
        }
    }
}

fn types(image: &mut Image<'_>, symbols: &Symbols) -> Result<Btf, Unread> {
    let begin = symbols.address("__start_BTF")?;
    let end = symbols.address("__stop_BTF")?;
    let data = image.bytes(begin, end.saturating_sub(begin))?;
    Btf::parse(data)
}
