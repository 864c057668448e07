//! One function of a call trace, in the spelling of every architecture, and names without what a
//! compiler hung on them.

use serde::Serialize;

/// A place in the kernel's code, as a trace line tells it.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Frame {
    /// The function's symbol as printed, with the compiler's suffixes.
    pub symbol: String,
    /// Bytes from the function's start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The module that the function is in; none for the kernel itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// False for what the unwinder only found on the stack (`?`).
    pub reliable: bool,
    /// True for the function a register pointed at, false for a return address.
    #[serde(skip_serializing_if = "is_false")]
    pub register: bool,
    /// True for a function that the compiler put into the next one. Only logs that were symbolised
    /// afterwards tell them, so they are shown and not counted.
    #[serde(skip_serializing_if = "is_false")]
    pub inlined: bool,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_false(value: &bool) -> bool {
    !value
}

impl Frame {
    /// The function as its author called it.
    #[must_use]
    pub fn function(&self) -> &str {
        plain_name(&self.symbol)
    }

    /// Reads `symbol+0x1/0x2 [module]`, with or without the parts after the plus.
    ///
    /// Returns the rest of the text as well.
    pub(crate) fn symbolic(text: &str) -> Option<(Self, &str)> {
        let (symbol, rest) = symbol(text)?;
        let rest = rest.strip_prefix("+0x")?;
        let (offset, rest) = hexadecimal(rest)?;
        let rest = rest
            .strip_prefix("/0x")
            .and_then(hexadecimal)
            .map_or(rest, |(_, rest)| rest);
        // Old kernels write "()" behind the function of a warning.
        let rest = rest.strip_prefix("()").unwrap_or(rest);
        let (module, rest) = module(rest);
        let frame = Self {
            symbol: symbol.to_owned(),
            offset: Some(offset),
            module: module.map(str::to_owned),
            reliable: true,
            register: false,
            inlined: false,
        };
        Some((frame, rest))
    }

    /// The first `symbol+0x1/0x2` in `text`.
    pub(crate) fn within(text: &str) -> Option<Self> {
        let plus = text.find("+0x")?;
        let before = text.get(..plus)?;
        let start = before
            .rfind(|c: char| !is_symbol_char(c))
            .map_or(0, |at| at + 1);
        Self::symbolic(text.get(start..)?).map(|(frame, _)| frame)
    }
}

/// A line of a trace.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct TraceLine {
    /// The functions in the order from callee to caller; arm writes two in a line.
    pub frames: Vec<Frame>,
}

impl TraceLine {
    /// Reads a line that holds nothing but a frame; other lines of a report name functions too.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let text = after_marks(line.trim());
        let (text, had_address) = after_addresses(text);
        let text = after_marks(text);
        let (text, reliable) = match text.strip_prefix("? ") {
            Some(rest) => (rest.trim_start(), false),
            None => (text, true),
        };
        if let Some(frames) = arm_pair(text) {
            return Some(Self { frames });
        }
        if let Some(frame) = inlined(text) {
            return Some(Self {
                frames: vec![frame],
            });
        }
        let (mut frame, rest) = Frame::symbolic(text)?;
        frame.reliable = reliable && !rest.contains("(unreliable)");
        let rest = rest.trim();
        // What may follow: a source position of a symbolised log, or the kernel's own marks.
        let is_alone = rest.is_empty()
            || rest.starts_with('(')
            || rest.starts_with('[')
            || (is_position(rest) && rest.split_whitespace().count() <= 2);
        (is_alone || had_address).then_some(Self {
            frames: vec![frame],
        })
    }
}

/// A function of `function file.c:12 [inline]`.
fn inlined(text: &str) -> Option<Frame> {
    let text = text.trim_end().strip_suffix("[inline]")?;
    let (symbol, position) = symbol(text)?;
    is_position(position.trim()).then(|| Frame {
        symbol: symbol.to_owned(),
        reliable: true,
        inlined: true,
        ..Frame::default()
    })
}

/// `dir/file.c:12`.
fn is_position(text: &str) -> bool {
    let word = text.split_whitespace().next().unwrap_or("");
    [".c:", ".h:", ".S:", ".rs:", ".cc:"]
        .iter()
        .any(|ending| word.contains(ending))
}

/// arm: `(callee) from (caller+0x1/0x2)`, and `callee from caller+0x1/0x2` since 5.18.
fn arm_pair(text: &str) -> Option<Vec<Frame>> {
    let (left, right) = text.split_once(" from ")?;
    let left = left.trim().trim_matches(['(', ')']);
    let right = after_addresses(right.trim()).0.trim_start_matches('(');
    let callee = match Frame::symbolic(left) {
        Some((frame, "")) => frame,
        Some(_) => return None,
        None => match symbol(left)? {
            (symbol, "") => Frame {
                symbol: symbol.to_owned(),
                reliable: true,
                ..Frame::default()
            },
            _ => return None,
        },
    };
    let (caller, _) = Frame::symbolic(right)?;
    Some(vec![callee, caller])
}

/// Without `<IRQ>`, `</TASK>`, `<#DF>` and their like.
fn after_marks(mut text: &str) -> &str {
    while let Some(rest) = text.strip_prefix('<') {
        let Some(end) = rest.find('>').filter(|end| *end <= 12) else {
            break;
        };
        text = rest.get(end + 1..).unwrap_or("").trim_start();
    }
    text
}

/// Without `[<ffffffff81000000>]`, `[c000000000000000]` and `([<0>]` in front.
fn after_addresses(mut text: &str) -> (&str, bool) {
    let mut any = false;
    loop {
        let Some(rest) = text.strip_prefix("([").or_else(|| text.strip_prefix('[')) else {
            return (text, any);
        };
        let Some(end) = rest.find(']').filter(|end| *end <= 24) else {
            return (text, any);
        };
        let inside = rest.get(..end).unwrap_or("");
        let digits = inside.trim_start_matches('<').trim_end_matches('>');
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return (text, any);
        }
        any = true;
        text = rest.get(end + 1..).unwrap_or("").trim_start();
    }
}

fn is_symbol_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '$')
}

fn symbol(text: &str) -> Option<(&str, &str)> {
    let end = text.find(|c| !is_symbol_char(c)).unwrap_or(text.len());
    let (symbol, rest) = text.split_at_checked(end)?;
    let first = symbol.bytes().find(|b| *b != b'.')?;
    let is_name = (first.is_ascii_alphabetic() || first == b'_') && symbol.len() <= SYMBOL_MAX;
    is_name.then_some((symbol, rest))
}

/// The kernel's KSYM_NAME_LEN since Rust came in.
const SYMBOL_MAX: usize = 512;

fn hexadecimal(text: &str) -> Option<(u64, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_hexdigit())
        .unwrap_or(text.len());
    let (digits, rest) = text.split_at_checked(end)?;
    Some((u64::from_str_radix(digits, 16).ok()?, rest))
}

/// ` [module]`, with or without a build id.
fn module(text: &str) -> (Option<&str>, &str) {
    let Some(inside) = text.strip_prefix(" [") else {
        return (None, text);
    };
    let Some((inside, rest)) = inside.split_once(']') else {
        return (None, text);
    };
    let name = inside.split_whitespace().next().unwrap_or("");
    let is_name = !name.is_empty()
        && name != "inline"
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if is_name {
        (Some(name), rest)
    } else {
        (None, text)
    }
}

/// `symbol` without what depends on the compiler and its options: `.isra.0`, `.constprop.3`,
/// `.part.1`, `.cold`, `.llvm.123`, the `.` of ppc64's descriptors, `__pfx_`, and the mangling of
/// plain C++ names, and the hash in the name of a BPF program.
#[must_use]
pub fn plain_name(symbol: &str) -> &str {
    let name = symbol.trim_start_matches('.');
    let name = name.split('.').next().unwrap_or(name);
    let name = name.strip_prefix("__pfx_").unwrap_or(name);
    mangled(name).or_else(|| bpf_program(name)).unwrap_or(name)
}

/// The name in `bpf_prog_0123456789abcdef_name`.
fn bpf_program(name: &str) -> Option<&str> {
    let rest = name.strip_prefix("bpf_prog_")?;
    let (hash, rest) = rest.split_at_checked(16)?;
    let program = rest.strip_prefix('_')?;
    hash.bytes()
        .all(|b| b.is_ascii_hexdigit())
        .then_some(program)
}

/// The name in `_Z8fakeNameiii`.
fn mangled(name: &str) -> Option<&str> {
    let rest = name.strip_prefix("_Z")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit())?;
    let length: usize = rest.get(..digits)?.parse().ok()?;
    rest.get(digits..digits.checked_add(length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn frames(line: &str) -> Vec<(String, bool, Option<String>)> {
        TraceLine::parse(line)
            .map(|line| {
                line.frames
                    .into_iter()
                    .map(|frame| (frame.symbol, frame.reliable, frame.module))
                    .collect()
            })
            .unwrap_or_default()
    }

    fn sure(names: &[&str]) -> Vec<(String, bool, Option<String>)> {
        names
            .iter()
            .map(|name| ((*name).to_owned(), true, None))
            .collect()
    }

    #[test]
    fn every_architecture_is_read() {
        for line in [
            " foo+0x1/0x2",
            " [<ffffffff81d91149>] foo+0x1/0x2",
            " <IRQ>  [<ffffffff81d91149>] foo+0x1/0x2",
            "[c0000000fe4b3b90] [c00000000036a1b0] foo+0x1/0x2",
            "([<00000000001aa0a0>] foo+0x1/0x2)",
            " foo+0x1/0x2 fs/foo.c:12",
            " <TASK> foo+0x1/0x2",
            " foo fs/foo.c:12 [inline]",
        ] {
            assert_eq!(frames(line), sure(&["foo"]), "{line}");
        }
        for line in [
            "[<802b3ffc>] (foo) from [<802e1324>] (bar+0x6c/0x120)",
            " foo from bar+0x6c/0x120",
        ] {
            assert_eq!(frames(line), sure(&["foo", "bar"]), "{line}");
        }
    }

    #[test]
    fn doubt_and_modules_are_kept() {
        let uncertain = vec![("foo".to_owned(), false, None)];
        assert_eq!(frames(" ? foo+0x1/0x2"), uncertain);
        assert_eq!(
            frames("[c0] [c0000001] foo+0x1/0x2 (unreliable)"),
            uncertain
        );
        let inside = vec![("foo.isra.0".to_owned(), true, Some("ext4".to_owned()))];
        assert_eq!(frames(" foo.isra.0+0x1/0x2 [ext4]"), inside);
        assert_eq!(frames(" foo.isra.0+0x1/0x2 [ext4 0123abcd]"), inside);
    }

    #[test]
    fn other_lines_with_functions_are_no_frames() {
        for line in [
            " #0: ffffffff8c91c200 (lock){....}-{1:2}, at: foo+0x9/0x30",
            "hardirqs last  enabled at (1): [<ffffffff81c7152f>] foo+0x1/0x2",
            "RIP: 0010:foo+0x1/0x2",
            "wait 3 from here",
            "Code: 00 11",
        ] {
            assert_eq!(frames(line), [], "{line}");
        }
    }

    #[test]
    fn names_lose_what_compilers_add() {
        for symbol in [
            "foo",
            "foo.isra.0",
            "foo.constprop.0.isra.3",
            "foo.part.1.cold.9",
            "foo.llvm.123456",
            ".foo",
            "__pfx_foo",
            "_Z3fooiii",
            "bpf_prog_0123456789abcdef_foo",
        ] {
            assert_eq!(plain_name(symbol), "foo");
        }
        assert_eq!(
            plain_name("_Z99999999999999999999foo"),
            "_Z99999999999999999999foo"
        );
    }
}
