//! Counters of a memo.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use afterimage_cache::metrics::{HITS, MISSES};
use afterimage_wire::proto::stats::Stats;

use crate::metrics;

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) coalesced: AtomicU64,
    pub(crate) rejected_tags: AtomicU64,
    pub(crate) overloaded: AtomicU64,
    pub(crate) expired: AtomicU64,
    /// Waiters without a client: it had left.
    pub(crate) abandoned: AtomicU64,
    pub(crate) bad_inputs: AtomicU64,
    pub(crate) calls: AtomicU64,
    pub(crate) call_failures: AtomicU64,
    /// Calls that were not made, since their waiters had all left.
    pub(crate) calls_dropped: AtomicU64,
    pub(crate) store_writes: AtomicU64,
}

impl Counters {
    pub(crate) fn stats(&self, stats: &mut Stats) {
        for (metric, counter) in [
            (&HITS, &self.hits),
            (&MISSES, &self.misses),
            (&metrics::COALESCED, &self.coalesced),
            (&metrics::REJECTED_TAGS, &self.rejected_tags),
            (&metrics::OVERLOADED, &self.overloaded),
            (&metrics::EXPIRED, &self.expired),
            (&metrics::ABANDONED, &self.abandoned),
            (&metrics::BAD_INPUTS, &self.bad_inputs),
            (&metrics::CLASSIFIER_CALLS, &self.calls),
            (&metrics::CLASSIFIER_FAILURES, &self.call_failures),
            (&metrics::CLASSIFIER_CALLS_DROPPED, &self.calls_dropped),
            (&metrics::STORE_WRITES, &self.store_writes),
        ] {
            stats.counter(metric, counter.load(Relaxed));
        }
    }
}
