//! Who may send pages: a bounded number of sessions at a time, and those that wait, in the order
//! they came. Everybody may send what comes before the pages.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::registry::{Shared, lock};

/// See the module's documentation. The session that [`Self::next`] gives has a place.
pub struct Admission {
    places: usize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    active: Vec<Shared>,
    waiting: VecDeque<Shared>,
}

impl Admission {
    /// `places` sessions send pages at a time, at least one.
    #[must_use]
    pub fn new(places: usize) -> Self {
        Self {
            places: places.max(1),
            inner: Mutex::default(),
        }
    }

    /// Gives `session` a place, if there is one and nobody has waited longer; else it waits.
    /// Whether it has one.
    pub fn enter(&self, session: &Shared) -> bool {
        let mut inner = lock(&self.inner);
        if inner.active.iter().any(|other| Arc::ptr_eq(other, session)) {
            return true;
        }
        if inner.active.len() < self.places && inner.waiting.is_empty() {
            inner.active.push(Arc::clone(session));
            return true;
        }
        if !inner
            .waiting
            .iter()
            .any(|other| Arc::ptr_eq(other, session))
        {
            inner.waiting.push_back(Arc::clone(session));
        }
        false
    }

    /// `session` sends pages whether there is a place or not: it is the rest of a dump that had
    /// one.
    pub fn enter_first(&self, session: &Shared) {
        let mut inner = lock(&self.inner);
        if !inner.active.iter().any(|other| Arc::ptr_eq(other, session)) {
            inner.active.push(Arc::clone(session));
        }
    }

    /// `session` needs no place any more, nor waits for one.
    pub fn leave(&self, session: &Shared) {
        let mut inner = lock(&self.inner);
        inner.active.retain(|other| !Arc::ptr_eq(other, session));
        inner.waiting.retain(|other| !Arc::ptr_eq(other, session));
    }

    /// Gives a free place to the session that has waited longest.
    pub fn next(&self) -> Option<Shared> {
        let mut inner = lock(&self.inner);
        if inner.active.len() >= self.places {
            return None;
        }
        let next = inner.waiting.pop_front()?;
        inner.active.push(Arc::clone(&next));
        Some(next)
    }

    /// Sessions that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        lock(&self.inner).waiting.len()
    }
}
