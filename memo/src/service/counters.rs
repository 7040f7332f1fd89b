//! What a memo counts.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use afterimage_wire::proto::stats::Stats;

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) hits: AtomicU64,
    pub(super) misses: AtomicU64,
    pub(super) coalesced: AtomicU64,
    pub(super) rejected_tags: AtomicU64,
    pub(super) overloaded: AtomicU64,
    pub(super) expired: AtomicU64,
    pub(super) bad_images: AtomicU64,
    pub(super) classifier_calls: AtomicU64,
    pub(super) classifier_failures: AtomicU64,
    /// Calls that were not made in the end, since nobody waited for them any more.
    pub(super) calls_dropped: AtomicU64,
    pub(super) store_writes: AtomicU64,
}

impl Counters {
    pub(super) fn stats(&self, stats: &mut Stats) {
        for (name, counter) in [
            ("hits", &self.hits),
            ("misses", &self.misses),
            ("coalesced", &self.coalesced),
            ("rejected_tags", &self.rejected_tags),
            ("overloaded", &self.overloaded),
            ("expired", &self.expired),
            ("bad_images", &self.bad_images),
            ("classifier_calls", &self.classifier_calls),
            ("classifier_failures", &self.classifier_failures),
            ("classifier_calls_dropped", &self.calls_dropped),
            ("store_writes", &self.store_writes),
        ] {
            stats.counter(name, counter.load(Relaxed));
        }
    }
}
