//! The constants in docs/protocol.md are those of `proto`.

use std::collections::BTreeMap;

use super::{File, accept, tree};

/// The specification whose section "Constants" is checked, in rows `| NAME | value | ...|`.
const DOCUMENT: &str = "docs/protocol.md";
const HEADING: &str = "Constants";
const SOURCES: &str = "crates/proto/src/";

/// A constant's right-hand side as written in the source.
type Expressions<'a> = BTreeMap<&'a str, &'a str>;

/// Complaints about rows whose value is not what `proto` says.
fn wrong_constants(files: &[File]) -> Vec<String> {
    let sources: Vec<&File> = files
        .iter()
        .filter(|file| file.path.starts_with(SOURCES))
        .collect();
    let expressions: Expressions<'_> = sources
        .iter()
        .flat_map(|file| constants(&file.text))
        .collect();
    let mut complaints = Vec::new();
    for document in files.iter().filter(|file| file.path == DOCUMENT) {
        for (number, name, value) in rows(&document.text) {
            if let Some(what) = objection(name, value, &expressions, &sources) {
                complaints.push(document.complaint(number, &what));
            }
        }
    }
    complaints
}

fn objection(
    name: &str,
    value: &str,
    known: &Expressions<'_>,
    sources: &[&File],
) -> Option<String> {
    let Some(expression) = known.get(name) else {
        return Some(format!("{name} is not a constant of proto"));
    };
    let documented = evaluate(value, known);
    match evaluate(expression, known) {
        Some(actual) if documented == Some(actual) => None,
        Some(actual) => Some(format!("{name} is {actual} in proto, not {value}")),
        None if expression == &value => None,
        None => {
            // What only the compiler can work out must be asserted to it.
            let assertion = format!("{name} == {value}");
            let asserted = sources.iter().any(|file| file.text.contains(&assertion));
            let what = format!("{name}: write `const _: () = assert!({assertion});` in proto");
            (!asserted).then_some(what)
        }
    }
}

/// Name and expression of each `const NAME: TYPE = EXPRESSION;` on one line.
fn constants(text: &str) -> Vec<(&str, &str)> {
    fn constant(line: &str) -> Option<(&str, &str)> {
        let (before, declared) = line.split_once("const ")?;
        let (name, rest) = declared.split_once(':')?;
        let (_type, expression) = rest.strip_suffix(';')?.split_once(" = ")?;
        (!before.contains("//")).then_some((name, expression))
    }
    text.lines().filter_map(constant).collect()
}

/// Line number, name and value of each row under the heading, without the table's own heading.
fn rows(text: &str) -> Vec<(usize, &str, &str)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut within = false;
    let mut rows = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        if line.starts_with('#') {
            within = line.trim_end().ends_with(HEADING);
        }
        let next = lines.get(index + 1).copied().unwrap_or_default();
        let is_heading = next.replace(' ', "").starts_with("|---");
        let mut cells = line.split('|').map(|cell| cell.trim().trim_matches('`'));
        let (Some(""), Some(name), Some(value)) = (cells.next(), cells.next(), cells.next()) else {
            continue;
        };
        if within && !is_heading && !name.is_empty() && name.chars().all(is_of_constant) {
            rows.push((index + 1, name, value));
        }
    }
    rows
}

fn is_of_constant(c: char) -> bool {
    c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'
}

/// The value of sums, differences, products, quotients and shifts of literals and constants.
fn evaluate(expression: &str, known: &Expressions<'_>) -> Option<i128> {
    let expression = expression.trim();
    let inner = expression
        .strip_prefix('(')
        .and_then(|rest| rest.strip_suffix(')'));
    if let Some(inner) = inner.filter(|inner| is_balanced(inner)) {
        return evaluate(inner, known);
    }
    for operators in [&["<<"][..], &["+", "-"], &["*", "/"]] {
        if let Some((left, operator, right)) = split_last(expression, operators) {
            let (left, right) = (evaluate(left, known)?, evaluate(right, known)?);
            return match operator {
                "<<" => left.checked_shl(u32::try_from(right).ok()?),
                "+" => left.checked_add(right),
                "-" => left.checked_sub(right),
                "*" => left.checked_mul(right),
                _ => left.checked_div(right),
            };
        }
    }
    known
        .get(expression)
        .map_or_else(|| literal(expression), |known_as| evaluate(known_as, known))
}

fn literal(text: &str) -> Option<i128> {
    let digits: String = text.chars().filter(|c| !matches!(c, '_' | ' ')).collect();
    match digits.strip_prefix("0x") {
        Some(hex) => i128::from_str_radix(hex, 16).ok(),
        None => digits.parse().ok(),
    }
}

/// Splits at the last of the operators that is outside parentheses.
fn split_last<'a>(text: &'a str, operators: &[&'a str]) -> Option<(&'a str, &'a str, &'a str)> {
    let mut found = None;
    for (at, _) in text.char_indices().skip(1) {
        let (left, rest) = text.split_at(at);
        let operator = operators
            .iter()
            .find(|operator| rest.starts_with(**operator));
        if let Some(operator) = operator.filter(|_| is_balanced(left)) {
            found = Some((left, *operator, rest.strip_prefix(operator)?));
        }
    }
    found
}

fn is_balanced(text: &str) -> bool {
    let mut depth = 0_i32;
    for c in text.chars() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        if depth < 0 {
            return false;
        }
    }
    depth == 0
}

#[test]
fn documented_constants_are_those_of_proto() {
    accept(&wrong_constants(&tree()));
}

#[test]
fn a_wrong_constant_is_seen() {
    let source = "pub const PORT: u16 = 6666;\npub const BLOCK: usize = 8 * (PAGE - 1) + 1;\n\
                  pub const PAGE: usize = 4_096;\npub const SIZE: usize = size_of::<X>();\n\
                  pub const FIXED: usize = size_of::<Y>();\nconst _: () = assert!(FIXED == 24);\n";
    let document = "| PORT | 1 |\n## 9. Constants\n| NAME | value |\n| --- | --- |\n| `PORT` | 6667 | x |\n\
                    | BLOCK | 32761 |\n| PAGE | 4096 |\n| GONE | 1 |\n| SIZE | 8 |\n| FIXED | 24 |\n\
                    ## Next\n| PORT | 2 |\n";
    let files = [
        File::new("crates/proto/src/a.rs", source),
        File::new(DOCUMENT, document),
    ];
    let expected = [
        "docs/protocol.md:5: PORT is 6666 in proto, not 6667",
        "docs/protocol.md:8: GONE is not a constant of proto",
        "docs/protocol.md:9: SIZE: write `const _: () = assert!(SIZE == 8);` in proto",
    ];
    assert_eq!(wrong_constants(&files), expected);
}

#[test]
fn expressions_have_their_usual_value() {
    let known = Expressions::from([("A", "1 << 4"), ("B", "A * 2")]);
    let cases = [
        ("(1 << 40) - 1", (1 << 40) - 1),
        ("B + 0x10", 48),
        ("9000 - 28 - 2", 8970),
        ("1 472", 1472),
    ];
    for (expression, value) in cases {
        assert_eq!(evaluate(expression, &known), Some(value), "{expression}");
    }
    assert_eq!(evaluate("size_of::<X>()", &known), None);
}
