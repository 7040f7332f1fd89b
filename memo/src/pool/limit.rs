//! The limit on rows in flight at one endpoint.
//!
//! A classifier takes a memo for one client, so it serves the memo's requests in the order of their
//! arrival. Requests past the limit wait in the memo instead, where each client has its turn. The
//! limit should be the work of a few milliseconds: enough to keep the classifier busy during a
//! round trip, and little enough that a new request is soon served.
//!
//! How many requests that are depends on the classifier's cores and model. So the limit begins at
//! [`MIN`], grows while answers arrive within [`FAST`], and shrinks while they take [`SLOW`].

use std::time::Duration;

/// The least limit: one and a half of the classifier's default batches. While one batch is scored,
/// the next requests are there. A new request waits for less than three batches, its own included.
const MIN: usize = 96;

/// The largest limit: a quarter of the server's default window.
const MAX: usize = 4096;

/// The limit grows while answers arrive within this time.
const FAST: Duration = Duration::from_millis(2);

/// The limit shrinks while answers take this time.
const SLOW: Duration = Duration::from_millis(4);

/// The limit of one endpoint. Pure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit(usize);

impl Limit {
    pub(super) fn new() -> Self {
        Limit(MIN)
    }

    /// Requests that may be in flight.
    pub(super) fn get(self) -> usize {
        self.0
    }

    /// Adapts to an answer of this number of rows that took so long while other requests waited.
    pub(super) fn answered(&mut self, took: Duration, rows: usize) {
        let changed = if took <= FAST {
            self.0.saturating_add(rows)
        } else if took >= SLOW {
            self.0.saturating_sub(rows)
        } else {
            self.0
        };
        self.0 = changed.clamp(MIN, MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The limit after many answers of a classifier that serves `rate` requests a second.
    fn settled(rate: f64) -> usize {
        let mut limit = Limit::new();
        for _ in 0..100_000 {
            limit.answered(Duration::from_secs_f64(limit.get() as f64 / rate), 1);
        }
        limit.get()
    }

    #[test]
    fn the_limit_is_the_work_of_a_few_milliseconds() {
        assert_eq!(settled(2_000.0), MIN);
        assert_eq!(settled(40_000.0), MIN);
        assert_eq!(settled(500_000.0), 1001);
        assert_eq!(settled(1e8), MAX);
    }

    #[test]
    fn the_limit_shrinks_when_the_classifier_gets_slow() {
        let mut limit = Limit(MAX);
        (0..MAX).for_each(|_| limit.answered(SLOW, 1));
        assert_eq!(limit.get(), MIN);
    }
}
