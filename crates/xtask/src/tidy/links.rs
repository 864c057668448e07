//! Links between documents lead somewhere.

use std::path::Path;

use super::{File, accept, tree};
use crate::cache;

/// Complaints about links in Markdown to files that `exists` does not know.
fn dead_links(files: &[File], exists: impl Fn(&Path) -> bool) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files.iter().filter(|file| file.path.ends_with(".md")) {
        let folder = Path::new(&file.path)
            .parent()
            .unwrap_or_else(|| Path::new(""));
        for (number, line) in file.text.lines().enumerate() {
            for target in targets(line) {
                if !exists(&folder.join(target)) {
                    complaints.push(file.complaint(number + 1, &format!("dead link to {target}")));
                }
            }
        }
    }
    complaints
}

/// The files that a line links to, without links to other sites and to places in the same file.
fn targets(line: &str) -> Vec<&str> {
    let ends = line
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split([')', ' ']).next());
    let local = ends.filter(|target| !target.contains("://") && !target.starts_with("mailto:"));
    let files = local.filter_map(|target| target.split('#').next());
    files.filter(|target| !target.is_empty()).collect()
}

#[test]
fn links_lead_somewhere() {
    accept(&dead_links(&tree(), |path| {
        cache::tree().join(path).exists()
    }));
}

#[test]
fn a_dead_link_is_seen() {
    let text = "[a](there.md#x) [b](gone.md) [c](https://a.invalid/) [d](#here)\n";
    let complaints = dead_links(&[File::new("docs/a.md", text)], |path| {
        path.ends_with("docs/there.md")
    });
    assert_eq!(complaints, ["docs/a.md:1: dead link to gone.md"]);
}
