//! What a server counts about its connections. Added to once a batch, never once a request.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::time::Instant;

use crate::proto::stats::Stats;

#[derive(Debug)]
pub(super) struct Counters {
    started: Instant,
    pub(super) accepted: AtomicU64,
    pub(super) open: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) unauthenticated: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) malformed: AtomicU64,
    pub(super) panics: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Counters {
            started: Instant::now(),
            accepted: AtomicU64::new(0),
            open: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            unauthenticated: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            panics: AtomicU64::new(0),
        }
    }
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Relaxed);
    }

    pub(super) fn sub(counter: &AtomicU64, n: u64) {
        counter.fetch_sub(n, Relaxed);
    }

    pub(super) fn stats(&self, stats: &mut Stats) {
        stats.counter("uptime_ms", self.started.elapsed().as_millis() as u64);
        stats.gauge("connections_open", self.open.load(Relaxed));
        stats.counter("connections_accepted", self.accepted.load(Relaxed));
        stats.counter("connections_refused", self.refused.load(Relaxed));
        stats.counter("connections_unauthenticated", self.unauthenticated.load(Relaxed));
        stats.counter("requests", self.requests.load(Relaxed));
        stats.counter("malformed", self.malformed.load(Relaxed));
        stats.counter("panics", self.panics.load(Relaxed));
    }
}
