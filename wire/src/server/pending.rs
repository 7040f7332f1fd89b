//! Connections without a `Hello`: their limit, and the order in which they are closed.
//!
//! A peer that connects and sends nothing occupies a connection until the handshake times out. A
//! flood of such peers must not occupy all connections. So only a share of the connections may be
//! without a `Hello`, and when the share is used up, the oldest of these is closed. A client that
//! sends its `Hello` at once is done long before.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use tokio::task::AbortHandle;

/// One out of this many connections may be without a `Hello`.
const SHARE: usize = 4;

/// Bounds of the share. The lower one lets clients of a small server connect together, but is never
/// more than half of its connections; the upper one bounds the TLS handshakes under way.
const MIN: usize = 16;
const MAX: usize = 1024;

/// The connections without a `Hello`, oldest first.
pub(super) struct Pending {
    cap: usize,
    count: Arc<AtomicUsize>,
    queue: VecDeque<(Arc<Mark>, AbortHandle)>,
}

/// State that the queue and a connection share.
struct Mark {
    state: AtomicU8,
    count: Arc<AtomicUsize>,
}

const WAITING: u8 = 0;
const LEFT: u8 = 1;

impl Mark {
    /// Whether the connection was still without a `Hello`.
    fn leave(&self) -> bool {
        let left = self.state.swap(LEFT, Ordering::AcqRel) == WAITING;
        if left {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        left
    }
}

/// A connection's entry among those without a `Hello`; dropped after the `Hello` or at its end.
pub(super) struct Ticket(Arc<Mark>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Pending {
    pub(super) fn new(max_connections: usize) -> Self {
        // At least 1, since every connection begins without a `Hello`.
        let cap = (max_connections / SHARE).clamp(MIN, MAX).min(max_connections / 2).max(1);
        Pending { cap, count: Arc::default(), queue: VecDeque::new() }
    }

    /// Issues a ticket for a connection that `start` begins to serve. True if the oldest connection
    /// was closed for it.
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
    async fn the_oldest_without_hello_is_closed_first() {
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
        // The first one sends its Hello at once; the others fill the share.
        assert!(!admit(0, false));
        assert!((1..=MIN).all(|n| !admit(n, true)));
        assert!(admit(MIN + 1, true) && admit(MIN + 2, true));
        for _ in 0..2 {
            assert!(tasks.join_next().await.unwrap().unwrap_err().is_cancelled());
        }
        assert_eq!(pending.count.load(Ordering::Relaxed), MIN);
        // Connections that have ended do not count.
        tasks.shutdown().await;
        assert_eq!(pending.count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn connections_without_hello_never_fill_a_server() {
        let caps = [1, 2, 8, 31, 32, 64, 100, 4096, 1 << 20].map(|max| Pending::new(max).cap);
        assert_eq!(caps, [1, 1, 4, 15, 16, 16, 25, 1024, 1024]);
    }

    #[tokio::test]
    async fn the_queue_does_not_grow_with_accepted_connections() {
        let (mut pending, mut tasks) = (Pending::new(2 * MIN), JoinSet::new());
        for _ in 0..1000 {
            assert!(!pending.admit(|_ticket| tasks.spawn(async {})));
        }
        assert!(pending.queue.len() <= 2 * MIN);
    }
}
