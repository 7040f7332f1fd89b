//! Waits between attempts to connect.
//!
//! Exponential with full jitter: each wait is drawn evenly from zero to a ceiling that doubles with
//! every failure. A thousand clients that lost the same server thus return spread over the whole
//! interval instead of together (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog,
//! 2015).

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use crate::splitmix::SplitMix64;

/// The waits between failed attempts. Pure: a seed goes in, durations come out.
#[derive(Debug)]
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    ceiling: Duration,
    random: SplitMix64,
}

impl Backoff {
    /// Waits whose ceiling grows from `min` to `max`.
    pub(super) fn new(min: Duration, max: Duration, seed: u64) -> Self {
        let max = max.max(min);
        Backoff { min, max, ceiling: min, random: SplitMix64(seed) }
    }

    /// The next wait; the one after it may be twice as long.
    pub(super) fn next_delay(&mut self) -> Duration {
        let delay = self.jitter(self.ceiling);
        self.ceiling = self.ceiling.saturating_mul(2).min(self.max);
        delay
    }

    /// Starts again at `min`, after a healthy connection.
    pub(super) fn reset(&mut self) {
        self.ceiling = self.min;
    }

    /// A duration drawn evenly from zero to `ceiling`.
    pub(super) fn jitter(&mut self, ceiling: Duration) -> Duration {
        ceiling.mul_f64(self.random.share())
    }
}

/// A seed that differs from process to process and from call to call.
pub(super) fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: Duration = Duration::from_millis(20);
    const MAX: Duration = Duration::from_secs(1);

    #[test]
    fn every_wait_is_below_a_doubling_ceiling() {
        for seed in 0..1000 {
            let mut backoff = Backoff::new(MIN, MAX, seed);
            let mut ceiling = MIN;
            for _ in 0..20 {
                assert!(backoff.next_delay() <= ceiling);
                ceiling = (ceiling * 2).min(MAX);
            }
            backoff.reset();
            assert!(backoff.next_delay() <= MIN);
        }
    }

    #[test]
    fn waits_are_spread_over_the_whole_interval() {
        let mut backoff = Backoff::new(MIN, MIN, 7);
        let mut quarters = [0; 4];
        for _ in 0..4000 {
            let delay = backoff.next_delay();
            quarters[(delay.as_secs_f64() / MIN.as_secs_f64() * 4.0) as usize] += 1;
        }
        assert!(quarters.iter().all(|&n| n > 800), "{quarters:?}");
    }

    #[test]
    fn a_maximum_below_the_minimum_is_raised_to_it() {
        let mut backoff = Backoff::new(MAX, MIN, 1);
        for _ in 0..100 {
            assert!(backoff.next_delay() <= MAX);
        }
    }
}
