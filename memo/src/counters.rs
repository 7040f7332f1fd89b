//! Counters of a memo.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use afterimage_wire::proto::stats::Stats;

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) coalesced: AtomicU64,
    pub(crate) rejected_tags: AtomicU64,
    pub(crate) overloaded: AtomicU64,
    pub(crate) expired: AtomicU64,
    /// Waiters whose client was gone.
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
        for (name, counter) in [
            ("hits", &self.hits),
            ("misses", &self.misses),
            ("coalesced", &self.coalesced),
            ("rejected_tags", &self.rejected_tags),
            ("overloaded", &self.overloaded),
            ("expired", &self.expired),
            ("abandoned", &self.abandoned),
            ("bad_inputs", &self.bad_inputs),
            ("classifier_calls", &self.calls),
            ("classifier_failures", &self.call_failures),
            ("classifier_calls_dropped", &self.calls_dropped),
            ("store_writes", &self.store_writes),
        ] {
            stats.counter(name, counter.load(Relaxed));
        }
    }
}
