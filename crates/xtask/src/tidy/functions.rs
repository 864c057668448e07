//! No function over 70 lines, in Rust and in C, counted like clippy does: lines of its body that
//! are neither blank nor comment.

use super::{File, accept, tree};

const LINES_MAX: usize = 70;

/// Complaints about functions that are too long. It relies on formatted source: a Rust function
/// ends where a brace returns to the indent it began at, a C function at a brace in column 0.
fn long_functions(files: &[File]) -> Vec<String> {
    files.iter().flat_map(long_functions_in).collect()
}

fn long_functions_in(file: &File) -> Vec<String> {
    let is_rust = file.path.ends_with(".rs");
    if !is_rust && !file.path.ends_with(".c") {
        return Vec::new();
    }
    let mut complaints = Vec::new();
    let mut open: Vec<(usize, usize)> = Vec::new();
    let lines: Vec<&str> = file.text.lines().collect();
    for (number, line) in lines.iter().enumerate() {
        let starts = if is_rust {
            starts_rust(line)
        } else {
            line.starts_with('{')
        };
        let indent = line.len() - line.trim_start().len();
        if starts && !line.ends_with('}') && !line.ends_with(';') {
            open.push((number, indent));
        }
        let ends = matches!(line.trim_start(), "}" | "};" | "});");
        let Some((start, _)) = open
            .pop_if(|(start, start_indent)| ends && *start != number && *start_indent == indent)
        else {
            continue;
        };
        let body = lines.get(start + 1..number).unwrap_or_default();
        let count = body.iter().filter(|line| is_code(line)).count();
        if count > LINES_MAX {
            let what = format!("a function of {count} lines; {LINES_MAX} is the most: split it");
            complaints.push(file.complaint(start + 1, &what));
        }
    }
    complaints
}

fn starts_rust(line: &str) -> bool {
    let qualifiers = [
        "pub",
        "pub(crate)",
        "pub(super)",
        "const",
        "async",
        "unsafe",
        "extern",
        "\"C\"",
    ];
    let mut words = line
        .split_whitespace()
        .skip_while(|word| qualifiers.contains(word));
    words.next() == Some("fn")
}

fn is_code(line: &str) -> bool {
    let line = line.trim();
    let comment = ["//", "/*", "* ", "*/"]
        .iter()
        .any(|start| line.starts_with(start))
        || line == "*";
    !line.is_empty() && !comment
}

#[test]
fn no_function_is_too_long() {
    accept(&long_functions(&tree()));
}

#[test]
fn a_long_function_is_seen() {
    let body = |lines: usize| "        x();\n".repeat(lines);
    let rust = |lines| {
        format!(
            "impl A {{\n    pub(crate) fn f() {{\n{}    }}\n}}\n",
            body(lines)
        )
    };
    let c = |lines| format!("int f(void)\n{{\n{}}}\n", body(lines));
    for (path, at, text) in [("a.rs", 2, rust(71)), ("a.c", 2, c(71))] {
        let expected = format!("{path}:{at}: a function of 71 lines; 70 is the most: split it");
        assert_eq!(long_functions(&[File::new(path, &text)]), [expected]);
    }
    let files = [
        File::new("a.rs", &rust(70)),
        File::new("a.c", &c(70)),
        File::new("a.md", &c(99)),
    ];
    assert_eq!(long_functions(&files), [""; 0]);
}

#[test]
fn comments_and_declarations_do_not_count() {
    let text = format!(
        "trait A {{\n    fn f();\n    fn g() {{\n{}    }}\n}}\n",
        "        // x\n".repeat(90)
    );
    assert_eq!(long_functions(&[File::new("a.rs", &text)]), [""; 0]);
}
