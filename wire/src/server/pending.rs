//! Connections that have not been let in yet: how many there may be, and who goes first.
//!
//! Whoever connects and says nothing takes a place until the handshake's time is over. A flood of
//! such peers would take all places, so only some are for them, and when those are taken the one
//! that has waited longest goes. A client that says its Hello at once is in long before its turn.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use tokio::task::AbortHandle;

/// The share of a server's connections that may be without a Hello.
const SHARE: usize = 4;

/// At least so many may be, lest a small server sends away clients that come together, but never
/// more than half of its connections; at most so many, since each may have a TLS handshake under
/// way.
const MIN: usize = 16;
const MAX: usize = 1024;

/// The connections of a server that have not been let in, oldest first.
pub(super) struct Pending {
    cap: usize,
    count: Arc<AtomicUsize>,
    queue: VecDeque<(Arc<Mark>, AbortHandle)>,
}

/// What the queue and the connection share.
struct Mark {
    state: AtomicU8,
    count: Arc<AtomicUsize>,
}

const WAITING: u8 = 0;
const LEFT: u8 = 1;

impl Mark {
    /// Whether it was waiting until now.
    fn leave(&self) -> bool {
        let left = self.state.swap(LEFT, Ordering::AcqRel) == WAITING;
        if left {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        left
    }
}

/// One connection's place among the pending; dropped when it is let in or over.
pub(super) struct Ticket(Arc<Mark>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Pending {
    pub(super) fn new(max_connections: usize) -> Self {
        // One at least: whoever is let in had to come in first.
        let cap = (max_connections / SHARE).clamp(MIN, MAX).min(max_connections / 2).max(1);
        Pending { cap, count: Arc::default(), queue: VecDeque::new() }
    }

    /// A ticket for a connection that `start` begins to serve. True when another one, the oldest,
    /// had to go for it.
    pub(super) fn admit(&mut self, start: impl FnOnce(Ticket) -> AbortHandle) -> bool {
        let mark = Arc::new(Mark { state: AtomicU8::new(WAITING), count: Arc::clone(&self.count) });
        self.count.fetch_add(1, Ordering::Relaxed);
        let handle = start(Ticket(Arc::clone(&mark)));
        if self.queue.len() >= 2 * self.cap {
            self.queue.retain(|(mark, _)| mark.state.load(Ordering::Acquire) == WAITING);
        }
        self.queue.push_back((mark, handle));
        self.count.load(Ordering::Relaxed) > self.cap && self.evict()
    }

    fn evict(&mut self) -> bool {
        while let Some((mark, handle)) = self.queue.pop_front() {
            if mark.leave() {
                handle.abort();
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::task::JoinSet;

    #[tokio::test]
    async fn the_oldest_that_still_waits_goes_first() {
        let (mut pending, mut tasks) = (Pending::new(2 * MIN), JoinSet::new());
        let mut admit = |n: usize, hold: bool| {
            pending.admit(|ticket| {
                let ticket = hold.then_some(ticket);
                tasks.spawn(async move {
                    let _ticket = ticket;
                    std::future::pending::<()>().await;
                    n
                })
            })
        };
        // The first is let in at once; the others fill the cap.
        assert!(!admit(0, false));
        assert!((1..=MIN).all(|n| !admit(n, true)));
        assert!(admit(MIN + 1, true) && admit(MIN + 2, true));
        for _ in 0..2 {
            assert!(tasks.join_next().await.unwrap().unwrap_err().is_cancelled());
        }
        assert_eq!(pending.count.load(Ordering::Relaxed), MIN);
        // What is over takes no place any more.
        tasks.shutdown().await;
        assert_eq!(pending.count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn who_is_not_let_in_never_takes_all_places() {
        let caps = [1, 2, 8, 31, 32, 64, 100, 4096, 1 << 20].map(|max| Pending::new(max).cap);
        assert_eq!(caps, [1, 1, 4, 15, 16, 16, 25, 1024, 1024]);
    }

    #[tokio::test]
    async fn the_queue_does_not_grow_with_those_who_were_let_in() {
        let (mut pending, mut tasks) = (Pending::new(2 * MIN), JoinSet::new());
        for _ in 0..1000 {
            assert!(!pending.admit(|_ticket| tasks.spawn(async {})));
        }
        assert!(pending.queue.len() <= 2 * MIN);
    }
}
