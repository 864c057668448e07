//! Building the kernel module, and proving what can be proved of it without running it.
//!
//! The **core** is one object, the same for all kernels: `kmod-core` compiled for no operating
//! system and linked with nothing. Each kernel's own build system compiles the **shim** against its
//! headers and joins the two.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::{cache, command, output, packages, toolchain};

/// A function that does not exist; the core's panic handler calls it.
const PANIC_MARK: &str = "nd_core_panicked";
/// The names of the core's functions that the shim calls begin so.
const EXPORT_PREFIX: &str = "nd_core_";
/// The stack one function may use. The kernel's stacks are 16 KiB, and after a crash much of one
/// may be used.
const STACK_BYTES_MAX: u64 = 1024;
/// The stack that this function may use, which runs while the host is healthy and on a stack that
/// is nearly empty.
const HEALTHY_STACK_BYTES_MAX: (&str, u64) = ("nd_core_command", 4096);
/// Lines of a failed check that are shown.
const FINDINGS_SHOWN_MAX: usize = 12;

/// Which module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    /// The one for use.
    Product,
    /// One that measures device and cipher before it dumps.
    Bench,
}

impl Variant {
    const fn suffix(self) -> &'static str {
        match self {
            Self::Product => "",
            Self::Bench => "-bench",
        }
    }
}

/// The modules for one kernel.
pub(crate) struct Modules {
    /// `netdump.ko`.
    pub(crate) netdump: PathBuf,
    /// `crashme.ko`, with which the tests crash a guest.
    pub(crate) crashme: PathBuf,
}

/// Builds both modules for a kernel, unless nothing they are made of has changed.
///
/// # Errors
/// Headers or toolchain cannot be had, or something does not compile; the compiler's messages are
/// on standard error.
pub(crate) fn build(release: &str, variant: Variant) -> Result<Modules> {
    join(&core(variant)?, release, variant)
}

/// Builds both modules for a kernel with a core that is there.
fn join(core: &Core, release: &str, variant: Variant) -> Result<Modules> {
    let headers = packages::headers(release)?;
    let folder = cache::built()?.join("kmod").join(release);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let suffix = variant.suffix();
    let netdump = Build {
        name: "netdump",
        sources: cache::tree().join("kmod"),
        files: &[
            "Kbuild",
            "abi.h",
            "bond.c",
            "bond.h",
            "console.c",
            "console.h",
            "doze.c",
            "doze.h",
            "filter.c",
            "filter.h",
            "hardware.c",
            "hardware.h",
            "locks.c",
            "locks.h",
            "pool.c",
            "pool.h",
            "shim.c",
            "shim.h",
        ],
        core: Some(&core.merged),
        flags: if variant == Variant::Bench {
            "-DND_BENCH"
        } else {
            ""
        },
        module: folder.join(format!("netdump{suffix}.ko")),
    };
    let crashme = Build {
        name: "crashme",
        sources: cache::tree().join("crates/vmtest/crashme"),
        files: &["Kbuild", "crashme.c"],
        core: None,
        flags: "",
        module: folder.join("crashme.ko"),
    };
    Ok(Modules {
        netdump: netdump.ensure(&headers)?,
        crashme: crashme.ensure(&headers)?,
    })
}

/// Builds the module for a kernel and proves: nothing in the core can panic; no floating point
/// anywhere; no return and no indirect jump in the core without the kernel's mitigations; no large
/// stack frame; no symbol outside `kmod/symbols.allow` and the kernel's own list; no relocation
/// that a kernel cannot do.
///
/// # Errors
/// What [`build`] fails with, or the list of what does not hold.
pub(crate) fn check(release: &str) -> Result<()> {
    let core = core(Variant::Product)?;
    // First, because a core that can panic does not even link as a module, and this one says why.
    report("core", vec![("the core cannot panic", panics(&core)?)])?;
    let module = join(&core, release, Variant::Product)?.netdump;
    let checks = vec![
        ("no floating point", floating_point(&disassembly(&module)?)),
        (
            "no bare return or indirect jump in the core",
            bare_jumps(&disassembly(&core.merged)?),
        ),
        (
            "stack frames are small",
            large_frames(&disassembly(&module)?),
        ),
        ("only known symbols", unknown_symbols(&module, release)?),
        (
            "only relocations a kernel can do",
            unknown_relocations(&module)?,
        ),
    ];
    report(&module.display().to_string(), checks)
}

/// Prints what was found, a line each, and fails if anything was.
fn report(of: &str, checks: Vec<(&str, Vec<String>)>) -> Result<()> {
    let mut failed = 0;
    for (what, findings) in checks {
        println!(
            "{} {what}",
            if findings.is_empty() {
                "ok    "
            } else {
                "FAILED"
            }
        );
        for finding in findings.iter().take(FINDINGS_SHOWN_MAX) {
            println!("         {finding}");
        }
        failed += usize::from(!findings.is_empty());
    }
    ensure!(failed == 0, "{failed} of the checks above failed for {of}");
    Ok(())
}

/// The core, linked twice.
struct Core {
    /// As the module gets it: one section of each kind.
    merged: PathBuf,
    /// With each function in a section of its name, to tell who calls whom.
    apart: PathBuf,
}

fn core(variant: Variant) -> Result<Core> {
    let folder = cache::built()?
        .join("kmod")
        .join(format!("core{}", variant.suffix()));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let archive = archive(variant)?;
    let script = folder.join("merge.lds");
    fs::write(&script, MERGE_SCRIPT)?;
    let exports = exports(&archive)?;
    let core = Core {
        merged: folder.join("kmod_core.o"),
        apart: folder.join("apart.o"),
    };
    link(&archive, &exports, &core.apart, None)?;
    link(&archive, &exports, &core.merged, Some(&script))?;
    Ok(core)
}

/// Joins the sections that function sections took apart, which the module loader would otherwise
/// see one by one.
const MERGE_SCRIPT: &str = "SECTIONS {
  .text : { *(.text .text.*) }
  .rodata : { *(.rodata .rodata.*) }
  .data : { *(.data .data.*) }
  .bss : { *(.bss .bss.*) }
  /DISCARD/ : { *(.comment .eh_frame .note.GNU-stack .llvmbc .llvmcmd) }
}
";

/// Compiles `kmod-core` and returns the archive.
fn archive(variant: Variant) -> Result<PathBuf> {
    #[derive(Deserialize)]
    struct Message {
        #[serde(default)]
        filenames: Vec<PathBuf>,
    }
    let mut cargo = Command::new("cargo");
    cargo.args([
        "rustc",
        "--package",
        "kmod-core",
        "--lib",
        "--crate-type",
        "staticlib",
    ]);
    cargo.args(["--profile", "kernel", "--target", toolchain::TARGET]);
    if variant == Variant::Bench {
        cargo.args(["--features", "bench"]);
    }
    cargo.args(["--quiet", "--message-format=json-render-diagnostics"]);
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", toolchain::flags()?.join("\x1f"))
        .env("RUSTC_BOOTSTRAP", "1")
        .current_dir(cache::tree());
    let _step = output::step("compiling the module's core");
    let messages = command::capture(&mut cargo)?;
    let files = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok());
    files
        .flat_map(|message| message.filenames)
        .find(|file| file.ends_with("libkmod_core.a"))
        .context("cargo made no libkmod_core.a")
}

/// The functions in `archive` that the shim calls.
fn exports(archive: &Path) -> Result<Vec<String>> {
    let symbols = command::capture(
        Command::new("nm")
            .args(["--defined-only", "--quiet"])
            .arg(archive),
    )?;
    let names = symbols
        .lines()
        .filter_map(|line| line.split_once(" T ").map(|(_, name)| name.to_owned()));
    let exports: Vec<String> = names
        .filter(|name| name.starts_with(EXPORT_PREFIX))
        .collect();
    ensure!(
        !exports.is_empty(),
        "{} exports no {EXPORT_PREFIX}*",
        archive.display()
    );
    Ok(exports)
}

fn link(archive: &Path, exports: &[String], object: &Path, script: Option<&Path>) -> Result<()> {
    let mut ld = Command::new("ld");
    ld.args(["-r", "--gc-sections"]);
    for export in exports {
        ld.args(["-u", export]);
    }
    if let Some(script) = script {
        ld.arg("-T").arg(script);
    }
    command::run(ld.arg("-o").arg(object).arg(archive))
}

/// One module, made by a kernel's own build system.
struct Build<'a> {
    name: &'a str,
    sources: PathBuf,
    files: &'a [&'a str],
    core: Option<&'a Path>,
    flags: &'a str,
    module: PathBuf,
}

impl Build<'_> {
    /// Makes the module unless there is one with the same key: a digest of everything it is made
    /// of.
    fn ensure(&self, headers: &Path) -> Result<PathBuf> {
        let seal = self.module.with_extension("key");
        let key = self.key(headers)?;
        if self.module.is_file() && fs::read_to_string(&seal).is_ok_and(|found| found == key) {
            return Ok(self.module.clone());
        }
        let _only_writer = cache::hold()?;
        let _step = output::step(format!("building {}", self.module.display()));
        // Kbuild writes beside the sources, so it gets copies.
        let folder = self.module.with_extension("build");
        if folder.exists() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        fs::create_dir_all(&folder)?;
        for file in self.files {
            copy(&self.sources.join(file), &folder.join(file))?;
        }
        if let Some(core) = self.core {
            copy(core, &folder.join("kmod_core.o_shipped"))?;
        }
        self.make(headers, &folder)?;
        let built = folder.join(format!("{}.ko", self.name));
        if self.stripped() {
            command::run(Command::new("strip").arg("--strip-debug").arg(&built))?;
        }
        fs::rename(&built, &self.module)?;
        fs::write(&seal, key)?;
        Ok(self.module.clone())
    }

    /// Ours goes to hosts; debuggers shall name the functions of the other one.
    fn stripped(&self) -> bool {
        self.core.is_some()
    }

    fn make(&self, headers: &Path, folder: &Path) -> Result<()> {
        let mut make = Command::new("make");
        make.arg("-s").arg("-C").arg(headers);
        make.arg(format!("M={}", folder.display()));
        make.arg(format!("KCFLAGS=-Werror {}", self.flags));
        // Without pahole, which Debian's headers do not bring, type information cannot be made.
        make.arg("CONFIG_DEBUG_INFO_BTF_MODULES=");
        // Kernels of newer suites were built by a newer compiler. It has one option that this
        // machine's lacks, for which the kernel's Makefile knows another.
        make.args(["CC=gcc", "CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT="]);
        command::run(make.arg("modules"))
    }

    fn key(&self, headers: &Path) -> Result<String> {
        let mut digest = Sha256::new();
        digest.update(headers.to_string_lossy().as_bytes());
        digest.update(self.flags);
        digest.update([u8::from(self.stripped())]);
        for file in self.files {
            digest.update(read(&self.sources.join(file))?);
        }
        if let Some(core) = self.core {
            digest.update(read(core)?);
        }
        Ok(digest
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect())
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn disassembly(object: &Path) -> Result<String> {
    command::capture(
        Command::new("objdump")
            .args(["-d", "--no-show-raw-insn"])
            .arg(object),
    )
}

/// The chain of callers from the mark to an export, outermost last, if the mark survived linking.
fn panics(core: &Core) -> Result<Vec<String>> {
    let undefined = command::capture(Command::new("nm").arg("--undefined-only").arg(&core.merged))?;
    if !undefined
        .lines()
        .any(|line| line.trim() == format!("U {PANIC_MARK}"))
    {
        return Ok(Vec::new());
    }
    let code = command::capture(
        Command::new("objdump")
            .args(["-dr", "--no-show-raw-insn"])
            .arg(&core.apart),
    )?;
    Ok(chain(&callers(&code)))
}

/// Who refers to whom: for each symbol, the functions whose code names it.
fn callers(code: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut callers: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut function = "";
    for line in code.lines() {
        if let Some(name) = function_name(line) {
            function = name;
        } else if let Some((_, target)) = line.split_once("R_X86_64_") {
            let target = target.split_whitespace().nth(1).unwrap_or_default();
            let target = target.strip_prefix(".text.").unwrap_or(target);
            let end = target.rfind(['+', '-']).unwrap_or(target.len());
            let target = target.get(..end).unwrap_or(target).to_owned();
            callers
                .entry(target)
                .or_default()
                .insert(function.to_owned());
        }
    }
    callers
}

/// The shortest way from the mark to something the shim calls, one line a function.
fn chain(callers: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let mut ways = vec![vec![PANIC_MARK.to_owned()]];
    let mut seen: BTreeSet<String> = BTreeSet::new();
    while let Some(way) = (!ways.is_empty()).then(|| ways.remove(0)) {
        let Some(last) = way.last() else { continue };
        if last.starts_with(EXPORT_PREFIX) && last != PANIC_MARK {
            return way;
        }
        for caller in callers.get(last).into_iter().flatten() {
            if seen.insert(caller.clone()) {
                let mut longer = way.clone();
                longer.push(caller.clone());
                ways.push(longer);
            }
        }
    }
    vec![format!("{PANIC_MARK} is referred to, but by no function")]
}

/// `0000000000000010 <name>:` begins a function.
fn function_name(line: &str) -> Option<&str> {
    let name = line.strip_suffix(">:")?;
    name.split_once(" <").map(|(_, name)| name)
}

/// The instructions of a disassembly that `judge` finds fault with, each with its function.
fn findings(code: &str, judge: impl Fn(&str, &str) -> bool) -> Vec<String> {
    let mut function = "";
    let mut findings = Vec::new();
    for line in code.lines() {
        if let Some(name) = function_name(line) {
            function = name;
        } else if let Some((_, instruction)) = line.split_once(":\t")
            && judge(function, instruction.trim())
        {
            findings.push(format!("{function}: {}", instruction.trim()));
        }
    }
    findings
}

/// x87 instructions all begin with f; the others name their registers.
fn floating_point(code: &str) -> Vec<String> {
    findings(code, |_, instruction| {
        let vector = ["%xmm", "%ymm", "%zmm", "%mm", "%st"];
        instruction.starts_with('f') || vector.iter().any(|register| instruction.contains(register))
    })
}

fn bare_jumps(code: &str) -> Vec<String> {
    findings(code, |_, instruction| {
        let instruction = instruction
            .trim_start_matches("cs ")
            .trim_start_matches("notrack ");
        instruction.starts_with("ret")
            || instruction.contains("jmp    *")
            || instruction.contains("call   *")
    })
}

fn large_frames(code: &str) -> Vec<String> {
    let (healthy, healthy_max) = HEALTHY_STACK_BYTES_MAX;
    findings(code, |function, instruction| {
        let max = if function == healthy {
            healthy_max
        } else {
            STACK_BYTES_MAX
        };
        let bytes = instruction
            .strip_prefix("sub    $0x")
            .and_then(|rest| rest.strip_suffix(",%rsp"))
            .and_then(|bytes| u64::from_str_radix(bytes, 16).ok())
            // Compilers subtract -128 to add 128, which is a byte shorter.
            .filter(|&bytes| bytes <= u64::MAX / 2);
        bytes.is_some_and(|bytes| bytes > max)
    })
}

fn unknown_symbols(module: &Path, release: &str) -> Result<Vec<String>> {
    let list = cache::tree().join("kmod/symbols.allow");
    let list =
        fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let allowed: BTreeSet<&str> = list
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    let exported = packages::headers(release)?.join("Module.symvers");
    let exported = fs::read_to_string(&exported)
        .with_context(|| format!("cannot read {}", exported.display()))?;
    let exported: BTreeSet<&str> = exported
        .lines()
        .filter_map(|line| line.split('\t').nth(1))
        .collect();
    let undefined = command::capture(Command::new("nm").arg("--undefined-only").arg(module))?;
    let names = undefined
        .lines()
        .filter_map(|line| line.trim().strip_prefix("U "));
    let judge = |name: &str| match (allowed.contains(name), exported.contains(name)) {
        (true, true) => None,
        (false, _) => Some(format!("{name} is not in kmod/symbols.allow")),
        (true, false) => Some(format!("{name} is not exported by {release}")),
    };
    Ok(names.filter_map(judge).collect())
}

fn unknown_relocations(module: &Path) -> Result<Vec<String>> {
    const KNOWN: [&str; 6] = ["64", "PC32", "32", "32S", "PLT32", "PC64"];
    let relocations = command::capture(
        Command::new("readelf")
            .args(["--relocs", "--wide"])
            .arg(module),
    )?;
    let kinds = relocations
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2)?.strip_prefix("R_X86_64_"));
    let unknown: BTreeSet<&str> = kinds.filter(|kind| !KNOWN.contains(kind)).collect();
    Ok(unknown
        .into_iter()
        .map(|kind| format!("R_X86_64_{kind}"))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: &str = "
0000000000000000 <rust_begin_unwind>:
   0:\tendbr64
   4:\tcall   9 <rust_begin_unwind+0x9>
\t\t\t5: R_X86_64_PLT32\tnd_core_panicked-0x4
0000000000000000 <bounds>:
   1:\tcall   6 <bounds+0x6>
\t\t\t2: R_X86_64_PLT32\t.text.rust_begin_unwind-0x4
0000000000000000 <nd_core_step>:
   0:\tsub    $0x1000,%rsp
   1:\tcall   6 <nd_core_step+0x6>
\t\t\t2: R_X86_64_PLT32\tbounds-0x4
   6:\tmovaps %xmm0,(%rsp)
   9:\tfldz
   a:\tjmp    *%rax
   c:\tret
";

    #[test]
    fn a_panic_is_traced_to_the_function_the_shim_calls() {
        let expected = [
            "nd_core_panicked",
            "rust_begin_unwind",
            "bounds",
            "nd_core_step",
        ];
        assert_eq!(chain(&callers(CODE)), expected);
    }

    #[test]
    fn faults_are_found_with_their_function() {
        assert_eq!(
            floating_point(CODE),
            ["nd_core_step: movaps %xmm0,(%rsp)", "nd_core_step: fldz"]
        );
        assert_eq!(
            bare_jumps(CODE),
            ["nd_core_step: jmp    *%rax", "nd_core_step: ret"]
        );
        assert_eq!(large_frames(CODE), ["nd_core_step: sub    $0x1000,%rsp"]);
    }
}
