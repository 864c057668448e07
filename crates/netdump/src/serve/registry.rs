//! Which sessions there are, shared by all receive threads; and which are over, so that their
//! packets, late or replayed, begin nothing anew.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::units::{KeyId, SessionId};

use super::session::Session;

/// Sessions under way at most.
pub const SESSIONS_MAX: usize = 1024;
/// Sessions of one key under way at most. A host has one; more come from restarts in quick
/// succession, or from a stolen key, which shall not take the other hosts' places.
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
    /// Over.
    Done(Over),
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Over {
    /// The last attempt of it.
    pub attempt: u16,
    /// Everything that was wanted is on disk: the host may reboot. If not, it may come back.
    pub whole: bool,
    /// Its directory, as long as the spools are there to go on with.
    pub spools: Option<PathBuf>,
    /// The last of them is broken: the same attempt cannot go on.
    pub broken: bool,
}

/// All sessions.
#[derive(Default)]
pub struct Registry {
    inner: Mutex<Inner>,
}

/// Invariant: `done_order` holds the sessions of `done`, the oldest first. A session that was over
/// and is under way again is in both maps.
#[derive(Default)]
struct Inner {
    open: HashMap<SessionId, Option<Shared>>,
    done: HashMap<SessionId, Over>,
    done_order: VecDeque<SessionId>,
    /// Sessions whose spools stay for a while, and since when; the oldest first.
    lingering: VecDeque<(Instant, SessionId)>,
}

impl Registry {
    /// What is known of session `id`.
    #[must_use]
    pub fn get(&self, id: SessionId) -> Option<Entry> {
        let inner = lock(&self.inner);
        match inner.open.get(&id) {
            Some(Some(session)) => Some(Entry::Live(Arc::clone(session))),
            Some(None) => Some(Entry::Recovering),
            None => inner.done.get(&id).cloned().map(Entry::Done),
        }
    }

    /// Whether a new session of `key` may begin.
    #[must_use]
    pub fn has_room(&self, key: KeyId) -> bool {
        let inner = lock(&self.inner);
        let same = inner.open.keys().filter(|id| id.key == key).count();
        inner.open.len() < SESSIONS_MAX && same < SESSIONS_PER_KEY_MAX
    }

    /// Puts `entry` in the place of what was known of session `id`.
    pub fn set(&self, id: SessionId, entry: Entry) {
        let mut inner = lock(&self.inner);
        match entry {
            Entry::Recovering => drop(inner.open.insert(id, None)),
            Entry::Live(session) => drop(inner.open.insert(id, Some(session))),
            Entry::Done(over) => {
                inner.open.remove(&id);
                inner.finish(id, over);
            }
        }
    }

    /// Forgets a session that could not begin.
    pub fn forget(&self, id: SessionId, session: &Shared) {
        let mut inner = lock(&self.inner);
        let live = inner.open.get(&id).and_then(Option::as_ref);
        if live.is_some_and(|live| Arc::ptr_eq(live, session)) {
            inner.open.remove(&id);
        }
    }

    /// The directories of sessions whose spools have stayed for `linger`: nobody came back to
    /// them.
    pub fn expired(&self, linger: Duration) -> Vec<PathBuf> {
        let mut inner = lock(&self.inner);
        let mut expired = Vec::new();
        while let Some(&(since, id)) = inner.lingering.front()
            && since.elapsed() >= linger
        {
            inner.lingering.pop_front();
            let under_way = inner.open.contains_key(&id);
            let again = inner.lingering.iter().any(|(_, other)| *other == id);
            if let Some(over) = inner.done.get_mut(&id)
                && !under_way
                && !again
            {
                expired.extend(over.spools.take());
            }
        }
        expired
    }

    /// Session `id` is over, unless another attempt has taken the place of `session`.
    pub fn finished(&self, id: SessionId, session: &Shared, over: Over) {
        let mut inner = lock(&self.inner);
        let live = inner.open.get(&id).and_then(Option::as_ref);
        if live.is_some_and(|live| Arc::ptr_eq(live, session)) {
            inner.open.remove(&id);
            inner.finish(id, over);
        }
    }

    /// The sessions under way.
    #[must_use]
    pub fn live(&self) -> Vec<Shared> {
        lock(&self.inner)
            .open
            .values()
            .flatten()
            .map(Arc::clone)
            .collect()
    }

    /// The sessions of one key that are under way.
    #[must_use]
    pub fn of_key(&self, key: KeyId) -> Vec<Shared> {
        let inner = lock(&self.inner);
        let same = inner.open.iter().filter(|(id, _)| id.key == key);
        same.filter_map(|(_, session)| session.clone()).collect()
    }

    /// How many sessions are not over.
    #[must_use]
    pub fn open(&self) -> usize {
        lock(&self.inner).open.len()
    }
}

impl Inner {
    /// Remembers that an attempt of a session is over; what is known of other attempts stays.
    fn finish(&mut self, id: SessionId, over: Over) {
        if over.spools.is_some() {
            self.lingering.push_back((Instant::now(), id));
        }
        if let Some(before) = self.done.get_mut(&id) {
            before.attempt = before.attempt.max(over.attempt);
            before.whole |= over.whole;
            before.spools = over.spools;
            before.broken = over.broken;
            return;
        }
        self.done.insert(id, over);
        self.done_order.push_back(id);
        if self.done.len() > DONE_MAX
            && let Some(oldest) = self.done_order.pop_front()
        {
            self.done.remove(&oldest);
        }
    }
}

/// Locks; a thread that panicked while it held the lock has left whole values behind, as every
/// change here is small.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proto::units::ArmingId;

    use super::*;

    const OVER: Over = Over {
        attempt: 0,
        whole: true,
        spools: None,
        broken: false,
    };

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
        let session = registry.inner.lock().unwrap().open.remove(&id(1, 0));
        assert!(session.is_some());
        assert!(registry.has_room(KeyId(1)));
    }

    #[test]
    fn what_is_remembered_as_over_is_bounded() {
        let registry = Registry::default();
        for arming in 0..=DONE_MAX as u64 {
            registry.set(id(1, arming), Entry::Done(OVER));
        }
        assert!(registry.get(id(1, 0)).is_none());
        assert!(matches!(registry.get(id(1, 1)), Some(Entry::Done(OVER))));
    }

    #[test]
    fn spools_that_nobody_comes_back_to_are_given_up_once() {
        let registry = Registry::default();
        let over = Over {
            spools: Some("web1".into()),
            ..OVER
        };
        registry.set(id(1, 1), Entry::Done(over));
        assert!(registry.expired(Duration::from_secs(60)).is_empty());
        assert_eq!(registry.expired(Duration::ZERO), [PathBuf::from("web1")]);
        assert!(registry.expired(Duration::ZERO).is_empty());
        assert!(matches!(registry.get(id(1, 1)), Some(Entry::Done(OVER))));
    }
}
