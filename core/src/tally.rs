//! Limits on how often an event that a peer can cause at will is logged.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Counts events and decides when a log line about them is due: at most one in an interval.
///
/// ```
/// use std::time::{Duration, Instant};
///
/// use afterimage_core::Tally;
///
/// let (tally, start) = (Tally::new(Duration::from_secs(10)), Instant::now());
/// assert_eq!(tally.count(1, start), Some(1));
/// assert_eq!(tally.count(1, start + Duration::from_secs(1)), None);
/// assert_eq!(tally.count(3, start + Duration::from_secs(10)), Some(4), "with the one before");
/// ```
#[derive(Debug)]
pub struct Tally {
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When the last line was due.
    last: Option<Instant>,
    /// Events since then.
    events: u64,
}

impl Tally {
    /// A tally that allows one log line in each `interval`.
    pub fn new(interval: Duration) -> Self {
        Tally { interval, state: Mutex::default() }
    }

    /// Counts `events` at the time `now`. If a line is due, returns the events since the last line,
    /// these included.
    pub fn count(&self, events: u64, now: Instant) -> Option<u64> {
        // A panic cannot leave the state inconsistent.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.events += events;
        let early =
            |last: Instant| now.checked_duration_since(last).is_none_or(|gap| gap < self.interval);
        if state.last.is_some_and(early) {
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.events))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_events_is_one_line_in_an_interval() {
        let (tally, start) = (Tally::new(Duration::from_secs(10)), Instant::now());
        let at = |ms: u64| tally.count(1, start + Duration::from_millis(ms));
        let lines: Vec<u64> = (0..=25_000).filter_map(at).collect();
        assert_eq!(lines, [1, 10_000, 10_000]);
    }

    #[test]
    fn a_clock_that_goes_back_makes_no_line() {
        let (tally, start) = (Tally::new(Duration::from_secs(10)), Instant::now());
        assert_eq!(tally.count(1, start + Duration::from_secs(20)), Some(1));
        assert_eq!(tally.count(1, start), None);
    }
}
