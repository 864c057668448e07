//! Rules about the tree that no compiler checks, as tests: `cargo test -p xtask tidy`.
//!
//! A rule is a function from files (or dependencies) to complaints, so that each can be shown to
//! fire. A complaint names the file and the line, and says what to do.

mod constants;
mod dependencies;
mod functions;
mod links;

use std::fs;
use std::path::Path;

use crate::cache;

/// Folders that hold no source of ours.
const SKIPPED_FOLDERS: [&str; 4] = [".git", "node_modules", "out", "target"];
const SOURCE_ENDINGS: [&str; 10] = [
    ".c", ".h", ".py", ".rs", ".sh", ".toml", "Kbuild", "Makefile", "linker", "run",
];
const TEXT_ENDINGS: [&str; 7] = [".conf", ".css", ".html", ".js", ".json", ".lock", ".md"];

/// A file of the tree: its path from the root and its text.
struct File {
    path: String,
    text: String,
}

impl File {
    fn new(path: &str, text: &str) -> Self {
        Self {
            path: path.to_owned(),
            text: text.to_owned(),
        }
    }

    fn ends_with_any(&self, endings: &[&str]) -> bool {
        endings.iter().any(|ending| self.path.ends_with(ending))
    }

    fn complaint(&self, line: usize, what: &str) -> String {
        format!("{}:{line}: {what}", self.path)
    }
}

fn tree() -> Vec<File> {
    let mut files = Vec::new();
    read_folder(&cache::tree(), "", &mut files);
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

fn read_folder(root: &Path, folder: &str, files: &mut Vec<File>) {
    for entry in fs::read_dir(root.join(folder)).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let path = if folder.is_empty() {
            name.clone()
        } else {
            format!("{folder}/{name}")
        };
        if entry.file_type().unwrap().is_dir() {
            if !SKIPPED_FOLDERS.contains(&name.as_str()) {
                read_folder(root, &path, files);
            }
        } else if SOURCE_ENDINGS
            .iter()
            .chain(&TEXT_ENDINGS)
            .any(|ending| name.ends_with(ending))
        {
            files.push(File {
                path,
                text: fs::read_to_string(entry.path()).unwrap(),
            });
        }
    }
}

/// Fails with all complaints, one on a line.
#[track_caller]
fn accept(complaints: &[String]) {
    assert!(
        complaints.is_empty(),
        "{} complaints:\n{}",
        complaints.len(),
        complaints.join("\n")
    );
}

/// Complaints about every line for which `objection` has one.
fn each_line(files: &[File], objection: impl Fn(&File, &str) -> Option<String>) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        for (number, line) in file.text.lines().enumerate() {
            complaints.extend(objection(file, line).map(|what| file.complaint(number + 1, &what)));
        }
    }
    complaints
}

/// A module says what it is before anything else.
fn module_docs(files: &[File]) -> Vec<String> {
    let silent = |file: &&File| file.path.ends_with(".rs") && !file.text.starts_with("//!");
    let complaint = |file: &File| file.complaint(1, "a module opens with `//!` and what it is");
    files.iter().filter(silent).map(complaint).collect()
}

/// Unfinished work belongs in an issue. The words are put together here so that this file is not
/// one of its own complaints.
fn leftovers(files: &[File]) -> Vec<String> {
    let words = [["TO", "DO"], ["FIX", "ME"], ["XX", "X"]].map(|halves| halves.concat());
    each_line(files, |_, line| {
        let mut parts = line.split(|c: char| !c.is_alphanumeric() && c != '_');
        let word = parts.find(|part| words.iter().any(|word| word == part))?;
        Some(format!("{word}: finish it or open an issue"))
    })
}

/// Where packages come from is the machine's business: a mirror is asked for, never named.
fn registries(files: &[File]) -> Vec<String> {
    let hosts = [
        ["debian", "org"],
        ["ubuntu", "com"],
        ["crates", "io"],
        ["pypi", "org"],
        ["pythonhosted", "org"],
        ["npmjs", "org"],
        ["rust-lang", "org"],
    ];
    let hosts = hosts.map(|parts| parts.join("."));
    each_line(files, |file, line| {
        // Cargo itself writes the registry's name there.
        let host = hosts.iter().find(|host| line.contains(*host))?;
        (!file.path.ends_with("Cargo.lock"))
            .then(|| format!("names {host}: derive it from the machine"))
    })
}

/// Source is ASCII, so that what a reviewer sees is what the compiler reads.
fn ascii(files: &[File]) -> Vec<String> {
    each_line(files, |file, line| {
        let odd = line.chars().find(|c| !c.is_ascii())?;
        let what = format!("non-ASCII character U+{:04X}", u32::from(odd));
        file.ends_with_any(&SOURCE_ENDINGS).then_some(what)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_say_what_they_are() {
        accept(&module_docs(&tree()));
        let files = [
            File::new("a.rs", "//! A.\n"),
            File::new("b.rs", "use x;\n//! B.\n"),
        ];
        assert_eq!(
            module_docs(&files),
            ["b.rs:1: a module opens with `//!` and what it is"]
        );
    }

    #[test]
    fn nothing_is_left_for_later() {
        accept(&leftovers(&tree()));
        let word = ["FIX", "ME"].concat();
        let text = format!("a\n// {word}: later\ntmp.{word}S prefix_{word}\n");
        assert_eq!(leftovers(&[File::new("a.c", &text)]).len(), 1);
    }

    #[test]
    fn no_registry_is_named() {
        accept(&registries(&tree()));
        let text = ["deb http://mirror.debian", "org/debian x"].join(".");
        assert_eq!(registries(&[File::new("a.md", &text)]).len(), 1);
        assert_eq!(registries(&[File::new("Cargo.lock", &text)]).len(), 0);
    }

    #[test]
    fn source_is_ascii() {
        accept(&ascii(&tree()));
        let files = [
            File::new("a.rs", "x\n// \u{2014}\n"),
            File::new("a.md", "\u{2014}"),
        ];
        assert_eq!(ascii(&files), ["a.rs:2: non-ASCII character U+2014"]);
    }

    #[test]
    fn the_tree_is_seen() {
        let files = tree();
        for path in [
            "Cargo.toml",
            "crates/xtask/src/main.rs",
            "kernels.lock",
            ".ci/run",
        ] {
            assert!(
                files.iter().any(|file| file.path == path),
                "{path} is not seen"
            );
        }
    }
}
