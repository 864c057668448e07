//! How often each thing happened, by name: what proves that a fault option does what it says.

use std::collections::BTreeMap;

/// Counts by name. Equal runs have equal counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<String, u64>);

impl Counts {
    /// Counts one more of `name`.
    pub fn one(&mut self, name: &str) {
        self.add(name, 1);
    }

    /// Counts `more` of `name`.
    pub fn add(&mut self, name: &str, more: u64) {
        match self.0.get_mut(name) {
            Some(count) => *count += more,
            None => drop(self.0.insert(name.to_owned(), more)),
        }
    }

    /// How often `name` happened.
    #[must_use]
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Adds the counts of `other`, each under its name after `prefix`.
    pub fn take_in(&mut self, prefix: &str, other: &Self) {
        for (name, count) in &other.0 {
            self.add(&format!("{prefix}{name}"), *count);
        }
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, count)| (name.as_str(), *count))
    }
}
