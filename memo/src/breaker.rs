//! A circuit breaker: after some failures in a row no request waits for a store, except for a probe
//! at intervals.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Whether a store is worth asking. Time comes in as an argument.
///
/// While it is closed, every request asks the store. After `threshold` failures in a row it opens,
/// and one probe goes every `probe_every`. The first success closes it.
#[derive(Debug)]
pub struct Breaker {
    threshold: u32,
    probe_every: Duration,
    epoch: Instant,
    failures: AtomicU32,
    /// Nanoseconds after `epoch` at which the next probe may go.
    next_probe: AtomicU64,
    opened: AtomicU64,
}

impl Breaker {
    /// A closed breaker.
    pub fn new(threshold: u32, probe_every: Duration, now: Instant) -> Self {
        Breaker {
            threshold,
            probe_every,
            epoch: now,
            failures: AtomicU32::new(0),
            next_probe: AtomicU64::new(0),
            opened: AtomicU64::new(0),
        }
    }

    /// Whether to ask now. While it is open, true for one caller every `probe_every`.
    pub fn allows(&self, now: Instant) -> bool {
        if !self.is_open() {
            return true;
        }
        let due = self.next_probe.load(Relaxed);
        let now = self.nanos(now);
        // Of all threads that find the probe due, the one that advances the time sends it.
        now >= due
            && self
                .next_probe
                .compare_exchange(due, now + self.probe_nanos(), Relaxed, Relaxed)
                .is_ok()
    }

    /// It answered. True when that closes the breaker.
    pub fn succeeded(&self) -> bool {
        // A load first: successes are many, and all but the first after failures change nothing.
        self.failures.load(Relaxed) != 0 && self.failures.swap(0, Relaxed) >= self.threshold
    }

    /// It failed, or took too long. True when that opens the breaker.
    pub fn failed(&self, now: Instant) -> bool {
        let failures = self.failures.fetch_add(1, Relaxed).saturating_add(1);
        if failures == self.threshold {
            self.opened.fetch_add(1, Relaxed);
        }
        if failures >= self.threshold {
            // Counted from a failure, not from when its probe was sent: one that takes longer than
            // `probe_every` to fail would otherwise have the next on its heels.
            self.next_probe.store(self.nanos(now) + self.probe_nanos(), Relaxed);
        }
        failures == self.threshold
    }

    /// Whether it is open.
    pub fn is_open(&self) -> bool {
        self.failures.load(Relaxed) >= self.threshold
    }

    /// How often it has opened.
    pub fn times_opened(&self) -> u64 {
        self.opened.load(Relaxed)
    }

    fn nanos(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_nanos() as u64
    }

    fn probe_nanos(&self) -> u64 {
        self.probe_every.as_nanos() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBE: Duration = Duration::from_millis(100);

    #[test]
    fn opens_after_failures_in_a_row_and_not_before() {
        let now = Instant::now();
        let breaker = Breaker::new(3, PROBE, now);
        for _ in 0..10 {
            breaker.failed(now);
            breaker.failed(now);
            breaker.succeeded();
        }
        assert!(breaker.allows(now));
        for _ in 0..3 {
            breaker.failed(now);
        }
        assert!(!breaker.allows(now));
        assert_eq!(breaker.times_opened(), 1);
    }

    #[test]
    fn lets_one_probe_through_at_a_time_and_closes_on_its_success() {
        let now = Instant::now();
        let breaker = Breaker::new(1, PROBE, now);
        breaker.failed(now);
        assert!(!breaker.allows(now + PROBE / 2));
        assert!(breaker.allows(now + PROBE));
        assert!(!breaker.allows(now + PROBE), "one probe, not two");
        breaker.failed(now + PROBE);
        assert!(!breaker.allows(now + PROBE + PROBE / 2));
        assert!(breaker.allows(now + 2 * PROBE));
        breaker.succeeded();
        assert!(breaker.allows(now + 2 * PROBE) && breaker.allows(now + 2 * PROBE));
    }

    #[test]
    fn a_probe_that_takes_long_to_fail_puts_the_next_one_off() {
        let now = Instant::now();
        let breaker = Breaker::new(1, PROBE, now);
        breaker.failed(now);
        assert!(breaker.allows(now + PROBE));
        let failed_at = now + 4 * PROBE;
        breaker.failed(failed_at);
        assert!(!breaker.allows(failed_at));
        assert!(breaker.allows(failed_at + PROBE));
        assert_eq!(breaker.times_opened(), 1);
    }
}
