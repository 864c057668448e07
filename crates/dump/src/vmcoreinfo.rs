//! The VMCOREINFO text: lines of `KEY=value` that tell a reader where the kernel keeps things.

/// A view of VMCOREINFO text. Total: any bytes are accepted, what cannot be understood is `None`.
#[derive(Clone, Copy, Debug)]
pub struct Vmcoreinfo<'a> {
    text: &'a [u8],
}

impl<'a> Vmcoreinfo<'a> {
    /// A view of `text`, as in [`crate::Machine::vmcoreinfo`].
    pub const fn new(text: &'a [u8]) -> Self {
        Self { text }
    }

    /// The value of the first line that starts with `key=`; `None` when it is not UTF-8.
    pub fn get(self, key: &str) -> Option<&'a str> {
        let value = self
            .text
            .split(|&byte| byte == b'\n')
            .find_map(|line| line.strip_prefix(key.as_bytes())?.strip_prefix(b"="))?;
        std::str::from_utf8(value).ok()
    }

    /// `SYMBOL(name)`: a virtual address, the kernel's displacement included.
    pub fn symbol(self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.get(&format!("SYMBOL({name})"))?, 16).ok()
    }

    /// `NUMBER(name)`, which the kernel prints as a signed decimal or as `0x` and hexadecimal.
    pub fn number(self, name: &str) -> Option<i64> {
        let value = self.get(&format!("NUMBER({name})"))?;
        value.strip_prefix("0x").map_or_else(
            || value.parse().ok(),
            |digits| u64::from_str_radix(digits, 16).ok().map(u64::cast_signed),
        )
    }

    /// `OSRELEASE`: the kernel's release, as in `6.1.0-56-amd64`.
    pub fn osrelease(self) -> Option<&'a str> {
        self.get("OSRELEASE")
    }

    /// `PAGESIZE` in bytes.
    pub fn page_size(self) -> Option<u64> {
        self.get("PAGESIZE")?.parse().ok()
    }

    /// `KERNELOFFSET`: how far KASLR moved the kernel's virtual addresses, in bytes.
    pub fn kernel_offset(self) -> Option<u64> {
        u64::from_str_radix(self.get("KERNELOFFSET")?, 16).ok()
    }

    /// `NUMBER(phys_base)`: physical address of a kernel image address minus its distance from
    /// `__START_KERNEL_map`. Negative when the image was moved down; wraps like the kernel's own.
    pub fn phys_base(self) -> Option<u64> {
        self.number("phys_base").map(i64::cast_unsigned)
    }

    /// Whether the page tables have five levels; `None` when the text does not say.
    pub fn five_level_paging(self) -> Option<bool> {
        self.number("pgtable_l5_enabled")
            .map(|enabled| enabled != 0)
    }
}
