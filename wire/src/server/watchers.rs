//! Who is told at once that a service has become another one: the connections that it welcomed.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::outbox::Outbox;

/// The open connections of a service whose [`generation`](super::Service::generation) changes.
///
/// Without it, a connection notices with its next request. A service that has one hands it out in
/// [`Service::watchers`](super::Service::watchers) and calls [`notify`](Watchers::notify) after each
/// change.
#[derive(Default)]
pub struct Watchers(Mutex<Vec<Weak<Outbox>>>);

impl Watchers {
    /// Has every connection look at the generation now.
    pub fn notify(&self) {
        // Woken outside of the lock: a connection may be on its way in here.
        let connections = self.lock().clone();
        for outbox in connections.iter().filter_map(Weak::upgrade) {
            outbox.disturb();
        }
    }

    /// From now on, the connection of this outbox is told.
    pub(super) fn add(&self, outbox: &Arc<Outbox>) {
        let mut connections = self.lock();
        // Those that are gone are swept out before the list would grow, so it is never more than
        // twice as long as there were connections at once.
        if connections.len() == connections.capacity() {
            connections.retain(|outbox| outbox.strong_count() > 0);
        }
        connections.push(Arc::downgrade(outbox));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Weak<Outbox>>> {
        // The list is whole between any two of its operations.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Watchers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watchers").field(&self.lock().len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_gone_takes_no_room_for_long() {
        let watchers = Watchers::default();
        let stays = Arc::new(Outbox::default());
        watchers.add(&stays);
        for _ in 0..10_000 {
            watchers.add(&Arc::new(Outbox::default()));
        }
        assert!(watchers.lock().capacity() <= 16, "{:?}", watchers.lock().capacity());
        assert!(!stays.is_disturbed());
        watchers.notify();
        assert!(stays.is_disturbed() && !stays.is_disturbed());
    }
}
