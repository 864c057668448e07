//! Who may import whom, and what dependencies may be: rules about `cargo metadata`.

use std::collections::BTreeMap;
use std::process::Command;

use serde::Deserialize;

use super::accept;
use crate::{cache, command};

/// Imports between our packages. What is not here is forbidden, so that `proto` never learns what
/// a dump file is and `dump` never what a packet is.
const ALLOWED_IMPORTS: [(&str, &str); 9] = [
    ("kmod-core", "proto"),
    ("netdump", "dump"),
    ("netdump", "netconsole"),
    ("netdump", "proto"),
    ("netdump", "triage"),
    ("sim", "dump"),
    ("sim", "proto"),
    ("triage", "dump"),
    ("vmtest", "dump"),
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Clone, Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// Absent for packages of the workspace.
    source: Option<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Clone, Deserialize)]
struct Dependency {
    name: String,
    path: Option<String>,
}

/// The part of deny.toml that is checked here.
#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
    exceptions: Vec<LicenseException>,
}

#[derive(Deserialize)]
struct LicenseException {
    #[serde(rename = "crate")]
    package: String,
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    skip: Vec<Skip>,
}

#[derive(Deserialize)]
struct Skip {
    #[serde(rename = "crate")]
    package: String,
}

fn forbidden_imports(packages: &[Package]) -> Vec<String> {
    let mut complaints = Vec::new();
    for package in packages.iter().filter(|package| package.source.is_none()) {
        for import in package
            .dependencies
            .iter()
            .filter(|import| import.path.is_some())
        {
            if !ALLOWED_IMPORTS.contains(&(&package.name, &import.name)) {
                complaints.push(format!("{} must not import {}", package.name, import.name));
            }
        }
    }
    complaints
}

fn forbidden_licences(packages: &[Package], licenses: &Licenses) -> Vec<String> {
    let mut complaints = Vec::new();
    for package in packages {
        let own = licenses
            .exceptions
            .iter()
            .filter(|exception| exception.package == package.name);
        let allowed: Vec<&str> = own
            .flat_map(|exception| &exception.allow)
            .chain(&licenses.allow)
            .map(String::as_str)
            .collect();
        let licence = package.license.as_deref().unwrap_or("none");
        if !is_allowed(licence, &allowed) {
            complaints.push(format!(
                "{} {}: licence {licence}",
                package.name, package.version
            ));
        }
    }
    complaints
}

/// Whether an SPDX expression can be satisfied with the allowed licences. OR binds loosest.
fn is_allowed(expression: &str, allowed: &[&str]) -> bool {
    let flat = expression.replace('/', " OR ");
    match top_level(&flat, " OR ").as_slice() {
        [one] => match top_level(one, " AND ").as_slice() {
            [one] => {
                let one = one.trim();
                match one
                    .strip_prefix('(')
                    .and_then(|rest| rest.strip_suffix(')'))
                {
                    Some(inner) => is_allowed(inner, allowed),
                    None => allowed.contains(&one),
                }
            }
            all => all.iter().all(|part| is_allowed(part, allowed)),
        },
        any => any.iter().any(|part| is_allowed(part, allowed)),
    }
}

/// Splits at the operator where it is outside parentheses.
fn top_level<'a>(text: &'a str, operator: &str) -> Vec<&'a str> {
    let (mut parts, mut start) = (Vec::new(), 0);
    for (at, _) in text.match_indices(operator) {
        let before = text.get(start..at).unwrap_or_default();
        if before.matches('(').count() == before.matches(')').count() {
            parts.push(before);
            start = at + operator.len();
        }
    }
    parts.push(text.get(start..).unwrap_or_default());
    parts
}

fn foreign_sources(packages: &[Package]) -> Vec<String> {
    let foreign = |package: &&Package| {
        package
            .source
            .as_ref()
            .is_some_and(|source| !source.starts_with("registry+"))
    };
    let complaint = |package: &Package| format!("{} is not from the registry", package.name);
    packages.iter().filter(foreign).map(complaint).collect()
}

fn duplicates(packages: &[Package], bans: &Bans) -> Vec<String> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        let skipped = bans.skip.iter().any(|skip| is_of(package, &skip.package));
        if !skipped {
            versions
                .entry(&package.name)
                .or_default()
                .push(&package.version);
        }
    }
    let several = versions.iter().filter(|(_, versions)| versions.len() > 1);
    several
        .map(|(name, versions)| format!("{name} in versions {}", versions.join(", ")))
        .collect()
}

/// Whether a package is `name@major` or `name@version`.
fn is_of(package: &Package, specification: &str) -> bool {
    specification
        .split_once('@')
        .is_some_and(|(name, version)| {
            let rest = package.version.strip_prefix(version);
            package.name == name
                && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        })
}

fn graph() -> Vec<Package> {
    let mut cargo = Command::new("cargo");
    cargo.args([
        "metadata",
        "--format-version=1",
        "--filter-platform=x86_64-unknown-linux-gnu",
    ]);
    let text = command::capture(cargo.current_dir(cache::tree())).unwrap();
    serde_json::from_str::<Metadata>(&text).unwrap().packages
}

fn deny() -> Deny {
    toml::from_str(&std::fs::read_to_string(cache::tree().join("deny.toml")).unwrap()).unwrap()
}

#[test]
fn dependencies_keep_the_rules() {
    let (packages, deny) = (graph(), deny());
    let complaints = [
        forbidden_imports(&packages),
        forbidden_licences(&packages, &deny.licenses),
        foreign_sources(&packages),
        duplicates(&packages, &deny.bans),
    ];
    accept(&complaints.concat());
}

#[cfg(test)]
fn package(
    name: &str,
    version: &str,
    license: &str,
    source: Option<&str>,
    imports: &[&str],
) -> Package {
    let import = |name: &&str| Dependency {
        name: (*name).to_owned(),
        path: Some("x".to_owned()),
    };
    Package {
        name: name.to_owned(),
        version: version.to_owned(),
        license: Some(license.to_owned()),
        source: source.map(str::to_owned),
        dependencies: imports.iter().map(import).collect(),
    }
}

#[test]
fn a_forbidden_import_is_seen() {
    let packages = [
        package("netdump", "0.0.0", "MIT", None, &["dump"]),
        package("proto", "0.0.0", "MIT", None, &["dump"]),
    ];
    assert_eq!(forbidden_imports(&packages), ["proto must not import dump"]);
}

#[test]
fn a_forbidden_licence_is_seen() {
    let allowed = ["MIT", "Zlib", "Apache-2.0 WITH LLVM-exception"];
    let fine = [
        "MIT",
        "GPL-3.0 OR MIT",
        "X/MIT",
        "(X OR MIT) AND Zlib",
        "Apache-2.0 WITH LLVM-exception OR X",
    ];
    for expression in fine {
        assert!(is_allowed(expression, &allowed), "{expression}");
    }
    for expression in ["GPL-3.0", "MIT AND X", "(X OR Y) AND MIT", "Apache-2.0", ""] {
        assert!(!is_allowed(expression, &allowed), "{expression}");
    }
}

#[test]
fn a_duplicate_and_a_foreign_source_are_seen() {
    let packages = [
        package("a", "1.0.0", "MIT", Some("registry+x"), &[]),
        package("a", "2.0.0", "MIT", Some("git+x"), &[]),
        package("b", "1.0.0", "MIT", Some("registry+x"), &[]),
    ];
    let none = Bans { skip: Vec::new() };
    assert_eq!(duplicates(&packages, &none), ["a in versions 1.0.0, 2.0.0"]);
    let old = Bans {
        skip: vec![Skip {
            package: "a@1".to_owned(),
        }],
    };
    assert_eq!(duplicates(&packages, &old), [""; 0]);
    assert_eq!(foreign_sources(&packages), ["a is not from the registry"]);
}
