//! Which sessions there are, shared by all receive threads; and which are over, so that their packets, late or
//! replayed, begin nothing anew.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::units::{KeyId, SessionId};

use super::session::Session;

/// Sessions under way at most.
pub const SESSIONS_MAX: usize = 1024;
/// Sessions of one key under way at most. A host has one; more come from restarts in quick succession, or from a
/// stolen key, which shall not take the other hosts' places.
pub const SESSIONS_PER_KEY_MAX: usize = 8;
/// Sessions that are remembered as over, each about 100 bytes.
const DONE_MAX: usize = 65_536;

/// A session that threads share. Locked for a few datagrams at a time.
pub type Shared = Arc<Mutex<Session>>;

/// What is known of a session.
#[derive(Clone)]
pub enum Entry {
    /// A restarted server is reading its spool.
    Recovering,
    /// Under way.
    Live(Shared),
    /// Over: the host may reboot.
    Done,
}

/// All sessions.
#[derive(Default)]
pub struct Registry {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    entries: HashMap<SessionId, Entry>,
    /// The sessions that are over, the oldest first.
    done: VecDeque<SessionId>,
}

impl Registry {
    /// What is known of session `id`.
    #[must_use]
    pub fn get(&self, id: SessionId) -> Option<Entry> {
        self.lock().entries.get(&id).cloned()
    }

    /// Whether a new session of `key` may begin.
    #[must_use]
    pub fn has_room(&self, key: KeyId) -> bool {
        let inner = self.lock();
        let open =
            |(id, entry): (&SessionId, &Entry)| (!matches!(entry, Entry::Done)).then_some(id.key);
        let keys: Vec<KeyId> = inner.entries.iter().filter_map(open).collect();
        let same = keys.iter().filter(|&&other| other == key).count();
        keys.len() < SESSIONS_MAX && same < SESSIONS_PER_KEY_MAX
    }

    /// Puts `entry` in the place of what was known of session `id`.
    pub fn set(&self, id: SessionId, entry: Entry) {
        let mut inner = self.lock();
        if matches!(entry, Entry::Done) {
            inner.done.push_back(id);
        }
        inner.entries.insert(id, entry);
        while inner.done.len() > DONE_MAX {
            let oldest = inner.done.pop_front();
            let over = oldest.filter(|id| matches!(inner.entries.get(id), Some(Entry::Done)));
            over.and_then(|id| inner.entries.remove(&id));
        }
    }

    /// Session `id` is over, unless another attempt has taken the place of `session`.
    pub fn finished(&self, id: SessionId, session: &Shared) {
        let is_this = match self.lock().entries.get(&id) {
            Some(Entry::Live(live)) => Arc::ptr_eq(live, session),
            Some(Entry::Recovering | Entry::Done) | None => false,
        };
        if is_this {
            self.set(id, Entry::Done);
        }
    }

    /// The sessions under way.
    #[must_use]
    pub fn live(&self) -> Vec<Shared> {
        let live = |entry: &Entry| match entry {
            Entry::Live(session) => Some(Arc::clone(session)),
            Entry::Recovering | Entry::Done => None,
        };
        self.lock().entries.values().filter_map(live).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

/// Locks; a thread that panicked while it held the lock has left whole values behind, as every change here is small.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proto::units::ArmingId;

    use super::*;

    fn id(key: u64, arming: u64) -> SessionId {
        SessionId {
            key: KeyId(key),
            arming: ArmingId(arming),
        }
    }

    #[test]
    fn one_key_cannot_take_all_places() {
        let registry = Registry::default();
        for arming in 0..SESSIONS_PER_KEY_MAX as u64 {
            assert!(registry.has_room(KeyId(1)));
            registry.set(id(1, arming), Entry::Recovering);
        }
        assert!(!registry.has_room(KeyId(1)));
        assert!(registry.has_room(KeyId(2)));
        registry.set(id(1, 0), Entry::Done);
        assert!(registry.has_room(KeyId(1)));
    }

    #[test]
    fn what_is_remembered_as_over_is_bounded() {
        let registry = Registry::default();
        for arming in 0..=DONE_MAX as u64 {
            registry.set(id(1, arming), Entry::Done);
        }
        assert!(registry.get(id(1, 0)).is_none());
        assert!(matches!(registry.get(id(1, 1)), Some(Entry::Done)));
    }
}
