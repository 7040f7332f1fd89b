//! Counters of an engine.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A reading of the counters of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineCounters {
    /// Images that got a label.
    pub scored: u64,
    /// Batches scored.
    pub batches: u64,
    /// Images refused because their client had used its share of the queue.
    pub overloaded: u64,
    /// Images whose deadline passed while they waited.
    pub expired: u64,
    /// Images that were not scored because their caller had left.
    pub abandoned: u64,
    /// Images whose scoring panicked.
    pub panicked: u64,
    /// Callers that panicked when they were asked or answered.
    pub reply_panics: u64,
    /// Images waiting now.
    pub queued: usize,
    /// Time spent scoring, all threads together.
    pub busy: Duration,
}

/// The live counters.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) scored: AtomicU64,
    pub(super) batches: AtomicU64,
    pub(super) overloaded: AtomicU64,
    pub(super) expired: AtomicU64,
    pub(super) abandoned: AtomicU64,
    pub(super) panicked: AtomicU64,
    pub(super) reply_panics: AtomicU64,
    pub(super) busy_ns: AtomicU64,
}

impl Counters {
    /// Reads the counters; `queued` images wait.
    pub(super) fn read(&self, queued: usize) -> EngineCounters {
        let Self {
            scored,
            batches,
            overloaded,
            expired,
            abandoned,
            panicked,
            reply_panics,
            busy_ns,
        } = self;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        EngineCounters {
            scored: read(scored),
            batches: read(batches),
            overloaded: read(overloaded),
            expired: read(expired),
            abandoned: read(abandoned),
            panicked: read(panicked),
            reply_panics: read(reply_panics),
            queued,
            busy: Duration::from_nanos(read(busy_ns)),
        }
    }
}
