//! Notification of open connections when their service changes.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::outbox::Outbox;

/// The open connections of a service whose [`generation`](super::Service::generation) changes.
///
/// Without it, a connection notices the change at its next request. A service returns it from
/// [`Service::watchers`](super::Service::watchers) and calls [`notify`](Watchers::notify) after
/// each change.
#[derive(Default)]
pub struct Watchers(Mutex<Vec<Weak<Outbox>>>);

impl Watchers {
    /// Makes every connection check the generation now.
    pub fn notify(&self) {
        // Woken after the lock is released: a connection may be registering itself.
        let connections = self.lock().clone();
        for outbox in connections.iter().filter_map(Weak::upgrade) {
            outbox.disturb();
        }
    }

    /// Notifies the connection of this outbox from now on.
    pub(super) fn add(&self, outbox: &Arc<Outbox>) {
        let mut connections = self.lock();
        // Ended connections are removed before the list would grow, so it is never more than twice
        // as long as the largest number of connections at once.
        if connections.len() == connections.capacity() {
            connections.retain(|outbox| outbox.strong_count() > 0);
        }
        connections.push(Arc::downgrade(outbox));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Weak<Outbox>>> {
        // No operation leaves the list in an inconsistent state.
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
    fn ended_connections_are_removed() {
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
